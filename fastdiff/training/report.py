"""What a training run shows: its facts at the start, its rows, its curves, and the batch that made it fail."""

import gc
import json
from pathlib import Path

import torch
from torch import nn

from fastdiff.config import SMALLEST_GAP, Config
from fastdiff.data.datasets import ImageSet
from fastdiff.data.loaders import batch_plan
from fastdiff.evaluation.denoising import LEVEL, DenoisingError
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.few_step_section import ALARM
from fastdiff.presets import PRESETS
from fastdiff.reporting import plots
from fastdiff.reporting.progress import TrainingProgress
from fastdiff.runs.files import write_atomically
from fastdiff.runs.run import Run
from fastdiff.runs.weights import InitialWeights
from fastdiff.runtime.device import device_name
from fastdiff.runtime.world import Ranks
from fastdiff.training.optim import LearningRate
from fastdiff.training.state import RunState
from fastdiff.training.step import TrainStep
from fastdiff.words import counted

PRECISIONS = {
    "bf16": "bf16 autocast, float32 weights, TF32 off",
    "tf32": "float32, products rounded to TF32 where the device can",
    "fp32": "float32, TF32 off",
    "staged": "staged: " + ", ".join(f"{name} while gap is at least {least:g}" for name, least in SMALLEST_GAP.items()),
}


def facts(
    config: Config, ranks: Ranks, run: Run, image_set: ImageSet, distance: FrechetDistance | None, model: nn.Module,
    initial: InitialWeights | None,
) -> dict[str, str]:  # fmt: skip
    """Name -> what runs, in words: the lines that a run starts with. The config is resolved."""
    device, size, machine, diffusion = ranks.device, ranks.size, config.machine, config.diffusion
    batch, deterministic = config.optim.batch_size, ", deterministic" if machine.deterministic else ""
    graphs = machine.graphs and device.type == "cuda"
    tuning, weighting = config.tuning, f"weighting {diffusion.weighting}"
    learning = "" if tuning.few_step == "none" else f", {tuning.few_step}"
    if tuning.teacher is not None:
        learning += f" by the teacher {tuning.teacher}, guidance {tuning.teacher_guidance:g}"
    if tuning.few_step == "consistency":
        if tuning.teacher is not None:
            learning += f", {counted(tuning.teacher_steps, 'step')} of {tuning.teacher_solver}"
        weighting += ": 1" if diffusion.weighting == "image" else ": 1 / (rho_t - rho_r)"
    if tuning.few_step in ("none", "consistency"):
        learning += f", {weighting}"
    objective = f"{diffusion.objective} on {diffusion.schedule}{learning}"
    net, latents, network = config.net, config.space.latents, "U-Net"
    encoded = f"{net.image_size}x{net.image_size} of {counted(net.image_channels, 'channel')} by {latents}"
    if (shape := config.autoencoder).factor:
        equivariance = ", equivariance" if shape.equivariance else ""
        objective = f"reconstruction, {shape.reconstruction}, KL weight {shape.kl_weight:g}{equivariance}"
        side = config.pixels // shape.factor
        network = f"autoencoder, latents {side}x{side} of {counted(shape.latent_channels, 'channel')}"
    return {
        "ranks": f"{size}, each with {batch // size} of {counted(batch, 'image')}",
        "device": f"{device_name(device)}, {counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}",
        "precision": PRECISIONS[machine.precision] + deterministic,
        "compile": "torch.compile" if machine.compile == "on" else "off",
        "graphs": f"CUDA graphs of {'' if config.tuning.exact else 'training and '}sampling steps" if graphs else "off",
        "kernels": machine.kernels,
        "optimizer": f"{config.optim.optimizer}, learning rate {config.optim.lr:g}, {LearningRate.of(config)}",
        "loader": f"{config.images.loader}, flip {config.images.flip}",
        "data": image_set.describe(),
        **({"latents": encoded} if latents is not None else {}),
        "objective": objective,
        "network": f"{network}, {sum(p.numel() for p in model.parameters()):,} parameters",
        **({"weights": f"from {initial.source}"} if initial is not None else {}),
        "distance": f"{distance.metric} against {distance.reference}" if distance else "none",
        "run": str(run.path),
    }


def profile_facts(config: Config, lines: dict[str, str]) -> dict[str, str]:
    """Of the facts, those that a profile is read with."""
    chosen = {name: lines[name] for name in ("precision", "compile", "kernels", "loader", "network")}
    changes = config.changes(PRESETS[config.preset])
    return {
        **chosen,
        "data": lines["data"].partition(";")[0],
        "step": f"a batch of {config.optim.batch_size}",
        "beside the preset": ", ".join(f"{name} {now}" for name, (_, now) in changes.items()) or "nothing",
    }


def log(state: RunState, run: Run | None, progress: TrainingProgress, watch: DenoisingError | None) -> None:
    """Write a row of the steps since the last one, and say if the network unlearns. Waits for the device.

    A partial window at the end of a run is logged but not reset, so that resuming with a larger --steps reproduces the
    unbroken run.
    """
    config, step, tuning = state.config, state.step, state.config.tuning
    last_step, last_seconds = state.last_log
    whole = step % config.run.log_every == 0
    row = {
        "step": step,
        "images": state.images,
        **state.metrics.means(reset=whole),
        **({} if tuning.compared is None else {"gap": tuning.at(state.images - config.optim.batch_size)}),
        "lr": LearningRate.of(config)(step - 1),
        "images_per_second": (step - last_step) * config.optim.batch_size / (state.seconds - last_seconds),
        "seconds": state.seconds,
    }
    if run is not None:
        if watch is not None:
            row["denoising_error"] = _denoising_error(state, watch, progress, whole=whole)
        run.log_train(row)
    if whole:
        state.last_log = (step, state.seconds)
        state.loss_history.append((step, row["loss"]))
    to_eval = config.eval.eval_every - step % config.eval.eval_every
    if config.run.steps is not None:
        to_eval = min(to_eval, config.run.steps - step)
    progress.update(
        step=step, images=state.images, loss=row["loss"], images_per_second=row["images_per_second"],
        steps_to_eval=to_eval,
    )  # fmt: skip


def _denoising_error(state: RunState, watch: DenoisingError, progress: TrainingProgress, *, whole: bool) -> float:
    error = watch()
    least = error if state.least_error is None else state.least_error
    risen = not error <= ALARM * least  # an error of NaN too
    if risen and not state.alarmed:
        lower = "--lr" if state.config.tuning.compared is None else "--lr or --q"
        progress.print(
            f"{'warning':<10} step {state.step:,}: estimates of images at sigma / alpha = {LEVEL:g} err "
            f"{error / least:.1f} times as much as they did (denoising_error); few steps may be unlearning them: "
            f"lower {lower}."
        )
    if whole:  # the unbroken run has no other rows
        state.least_error, state.alarmed = min(least, error), state.alarmed or risen  # min passes over NaN
    return error


def plot(state: RunState, run: Run | None, progress: TrainingProgress) -> None:
    """Draw loss, throughput and Frechet distance over the whole run, and the loss by noise level, also as rows."""
    if run is None:
        return
    since = state.noise_levels.read(reset=False)
    rows = [*state.noise_history, *([{"step": state.step, **since}] if any(since["images"]) else [])]
    with run.spared(progress.print):
        plots.plot_run(run.train_rows(), run.eval_rows(), rows, run.saves, teacher=run.teacher_rows())
        write_atomically(run.path / "loss-by-noise.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    gc.collect()  # figures are cycles of several MB each, which the collector would let pile up


def dump_batch(path: Path, train_step: TrainStep, config: Config, image_set: ImageSet, step: int) -> None:
    """Write which images, flips and times a step (from 0) had: all a pure function of the seed and the step."""
    n = config.optim.batch_size
    indices, flips = batch_plan(len(image_set.images), batch_size=n, seed=config.run.seed, step=step)
    batch = {
        "step": step + 1,
        "indices": indices.tolist(),
        "flips": (flips & config.images.flips).tolist(),
        "t": train_step.times(n, step).tolist(),
    }
    write_atomically(path, (json.dumps(batch) + "\n").encode())
