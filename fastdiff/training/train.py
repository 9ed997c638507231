"""The training run: reads the whole config, builds the parts, and loops.

data -> step(objective, model) -> optimizer + EMA -> checkpoint, metrics, evaluation
"""

import platform
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.config import RESUMABLE_CHANGES, Config
from fastdiff.data.datasets import ImageSet, load_dataset
from fastdiff.data.loaders import make_loader
from fastdiff.diffusion.objectives import Model, Objective, make_objective
from fastdiff.errors import TrainingFailed, UserError
from fastdiff.evaluation.evaluate import evaluate
from fastdiff.evaluation.features import make_extractor
from fastdiff.evaluation.frechet import FrechetDistance, to_uint8
from fastdiff.evaluation.sampling import SamplerSettings, trajectory
from fastdiff.hardware import resolve_bf16, resolve_device
from fastdiff.nets.unet import UNet
from fastdiff.reporting import plots
from fastdiff.reporting.progress import TrainingProgress
from fastdiff.reporting.run import Run, create_run, open_run, write_atomically
from fastdiff.training import checkpoint
from fastdiff.training.ema import EMA
from fastdiff.training.optim import learning_rate, make_update
from fastdiff.training.signals import Stopped, StopRequest
from fastdiff.training.step import TrainStep, step_seed

# Evaluations draw the same noise every time, so that grids of one run can be compared; apart from the steps' streams.
EVALUATION_STREAM = 2**32 - 1


class Trainer:
    """All parts of one run.

    Args:
        config: what to train, and how.
        run: the run directory, held open.
        resumed: the checkpoint to continue from.
    """

    def __init__(
        self,
        config: Config,
        *,
        device: torch.device,
        image_set: ImageSet,
        distance: FrechetDistance | None,
        run: Run,
        progress: TrainingProgress,
        stop: StopRequest,
        resumed: checkpoint.Checkpoint | None,
    ) -> None:
        self.config, self.device, self.run, self.progress, self.stop = config, device, run, progress, stop
        self.image_set, self.distance = image_set, distance
        cuda = device.type == "cuda"
        self.bf16 = resolve_bf16(config.precision, device)
        compiled = config.compile == "on" or (config.compile == "auto" and cuda)
        self.loader_kind = config.loader if config.loader != "auto" else ("dali" if cuda else "resident")
        self.flip = config.flip == "on" or (config.flip == "auto" and config.data != "digits")

        torch.manual_seed(config.seed)
        self.kernels = config.kernels if config.kernels != "auto" else ("triton" if cuda else "torch")
        self.model = UNet(config.net).to(device).use_kernels(self.kernels)
        self.objective: Objective = make_objective(
            config.objective, schedule=config.schedule, timesteps=config.timesteps, weighting=config.weighting
        )
        self.ema = EMA(self.model, config.ema_decay)
        self.update = make_update(self.kernels, self.model, self.ema, weight_decay=config.weight_decay, bf16=self.bf16)
        self.step, self.seconds, self.last_log = 0, 0.0, (0, 0.0)
        self.loss_history: list[tuple[int, float]] = []
        self.fid_history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.evaluated: int | None = None  # the last step that was evaluated
        self.train_step = TrainStep(
            self.model, self.objective, self.update, lr=config.lr, warmup_steps=config.warmup_steps,
            grad_clip=config.grad_clip, seed=config.seed, bf16=self.bf16, compile=compiled,
        )  # fmt: skip
        if resumed is not None:
            self._restore(resumed)
        self.sampling_model: Model = torch.compile(self.ema.model) if compiled else self.ema.model
        self.settings = SamplerSettings(config.eval_sampler, config.eval_steps)
        self._describe(compiled)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        state = saved.state
        if state["data_sha256"] != self.image_set.sha256:
            raise UserError(
                f"--data {self.config.data} holds other images than the run was trained on ({self.image_set.name}); "
                "restore them, or start a new run."
            )
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"], updates=saved.step)
        self.update.load_state_dict(state["optimizer"])
        self.train_step.load_metrics_state(state["metrics"])
        self.step, self.seconds, self.last_log = saved.step, state["seconds"], tuple(state["last_log"])
        self.loss_history, self.fid_history, self.best = state["loss_history"], state["fid_history"], state["best"]
        self.evaluated = state["evaluated"]

        def unfinished(row: dict[str, Any]) -> bool:
            """Rows of the checkpoint's own step that it does not count: a last partial mean, a later evaluation."""
            if row["kind"] == "train":
                return row["step"] == saved.step and saved.step % self.config.log_every != 0
            return row["step"] == saved.step and self.evaluated != saved.step

        self.run.truncate(saved.step, drop=unfinished)

    def _describe(self, compiled: bool) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        hardware = (
            torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor() or platform.machine()
        )
        size = self.config.net.image_size
        reference = f"{self.distance.metric} against {self.distance.reference}" if self.distance else "none"
        lines = {
            "device": f"{self.device.type} ({hardware}), {torch.get_num_threads()} threads, torch {torch.__version__}",
            "precision": "bf16 autocast, float32 weights" if self.bf16 else "float32",
            "compile": "torch.compile" if compiled else "off",
            "kernels": f"{self.kernels} (GroupNorm+SiLU, clip + Adam + EMA)",
            "loader": f"{self.loader_kind}, flip {'on' if self.flip else 'off'}",
            "data": f"{self.image_set.name}: {len(self.image_set.images):,} images of {size}x{size}",
            "network": f"U-Net, {parameters:,} parameters",
            "distance": reference,
            "run": str(self.run.path),
        }
        for name, value in lines.items():
            self.progress.print(f"{name:<10} {value}")

    def loop(self) -> None:
        """Train until the last step, or until a signal asks to stop; either way the last step is saved.

        Raises:
            TrainingFailed: the loss or a gradient was not finite.
            Stopped: a signal came; all is saved.
        """
        config = self.config
        if self.step == 0:
            self._draw_forward_noising()
        due = config.eval_at_start if self.step == 0 else self._evaluates()
        if due and self.evaluated != self.step:  # at the start, or where the last run was stopped before it
            self.evaluate()
            if self.step:
                self.save()
        if config.steps is not None and self.step >= config.steps:
            self.progress.print(f"step {self.step:,} of --steps {config.steps:,} is reached")
            return
        loader = make_loader(
            self.loader_kind, self.image_set, batch_size=config.batch_size, seed=config.seed, device=self.device,
            start_step=self.step, flip=self.flip,
        )  # fmt: skip
        with closing(loader):
            clock = time.perf_counter()
            while config.steps is None or self.step < config.steps:
                images, _ = next(loader)
                self.train_step(images, self.step)
                self.step += 1
                if self._is_boundary():
                    self._at_boundary(clock)
                    clock = time.perf_counter()

    def _is_boundary(self) -> bool:
        config, step = self.config, self.step
        due = any(step % every == 0 for every in (config.log_every, config.save_every))
        return due or self._evaluates() or self.stop.signal is not None

    def _evaluates(self) -> bool:
        return self.step % self.config.eval_every == 0 or self.step == self.config.steps

    def _at_boundary(self, clock: float) -> None:
        """Log, save and evaluate as is due; `clock` is when the steps since the last boundary began."""
        config, step = self.config, self.step
        stopping = self.stop.signal is not None  # read once: a signal that comes later is seen at the next step
        self._check_finite()  # waits for the device, so that the clock sees all its work
        self.seconds += time.perf_counter() - clock
        if step % config.log_every == 0 or step == config.steps:
            self._log()
        if self._evaluates() or step % config.save_every == 0 or stopping:
            self.save()  # before an evaluation, so that a crash in it costs nothing
        if stopping:
            raise Stopped
        if self._evaluates():
            self.evaluate()
            self.save()  # with the new distance

    def _check_finite(self) -> None:
        bad_step = self.train_step.metrics_state()["bad_step"]
        if bad_step >= 0:
            saved = checkpoint.list_checkpoints(self.run.checkpoints)
            rest = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
            raise TrainingFailed(
                f"the loss or the gradient of step {bad_step + 1:,} is not finite; nothing was saved after it, and "
                f"{rest}. A lower --lr (now {self.config.lr:g}) or --precision fp32 may help."
            )

    def _log(self) -> None:
        """Write a row; one of fewer steps at the end of a run is not counted, so that a longer run goes on as if."""
        config, step = self.config, self.step
        last_step, last_seconds = self.last_log
        whole = step % config.log_every == 0
        row = {
            "step": step,
            "images": self.images,
            **self.train_step.read_metrics(reset=whole),
            "lr": learning_rate(step - 1, peak=config.lr, warmup_steps=config.warmup_steps),
            "images_per_second": (step - last_step) * config.batch_size / (self.seconds - last_seconds),
            "seconds": self.seconds,
        }
        self.run.log_train(row)
        if whole:
            self.last_log = (step, self.seconds)
            self.loss_history.append((step, row["loss"]))
        to_eval = config.eval_every - step % config.eval_every
        if config.steps is not None:
            to_eval = min(to_eval, config.steps - step)
        self.progress.update(
            step=step,
            images=self.images,
            loss=row["loss"],
            images_per_second=row["images_per_second"],
            steps_to_eval=to_eval,
        )

    @property
    def images(self) -> int:
        """Training images seen so far."""
        return self.step * self.config.batch_size

    def save(self) -> None:
        """Write a checkpoint, drop those that are no longer wanted, and bring the plots up to date."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.update.state_dict(),
            "metrics": self.train_step.metrics_state(),
            "seconds": self.seconds,
            "last_log": self.last_log,
            "loss_history": self.loss_history,
            "fid_history": self.fid_history,
            "best": self.best,
            "evaluated": self.evaluated,
            "data_sha256": self.image_set.sha256,
            "config": self.config.to_dict(),
        }
        checkpoint.save(self.run.checkpoints, self.step, state)
        keep = {self.best["step"]} if self.best else set()
        checkpoint.prune(self.run.checkpoints, self.step, keep_last=self.config.keep_last, keep_steps=keep)
        self.plot()

    def plot(self) -> None:
        """Draw loss, throughput and Frechet distance over the whole run."""
        train_rows, eval_rows = self.run.train_rows(), self.run.eval_rows()
        plots.plot_loss(train_rows, self.run.saves / "loss.png")
        plots.plot_throughput(train_rows, self.run.saves / "throughput.png")
        plots.plot_distance(eval_rows, self.run.saves / "fid.png")

    def evaluate(self) -> None:
        """Samples, their grid, a sampling trajectory and the Frechet distance, from the averaged weights."""
        config, net = self.config, self.config.net
        common: dict[str, Any] = {
            "settings": self.settings,
            "image_shape": (net.image_channels, net.image_size, net.image_size),
            "seed": step_seed(config.seed, EVALUATION_STREAM),
            "device": self.device,
            "bf16": self.bf16,
        }
        row, grid = evaluate(
            self.sampling_model, self.objective, self.distance, n=config.eval_samples,
            batch_size=config.eval_batch_size, keep=config.grid_samples, check=self.stop.check, **common,
        )  # fmt: skip
        plots.save_grid(grid, self.run.saves / f"samples-{self.step:08d}.png")
        self.run.log_image("samples", plots.image_grid(grid), self.step)
        x_t, x0_hat, times = trajectory(self.ema.model, self.objective, **common)
        plots.plot_trajectory(_nhwc(x_t), _nhwc(x0_hat), times, self.run.saves / f"trajectory-{self.step:08d}.png")
        self.evaluated = self.step
        if self.distance is None:
            return
        row |= {"step": self.step, "images": self.images, "checkpoint": f"step-{self.step}" if self.step else None}
        self.run.log_eval(row)
        self.fid_history.append(row)
        how = {key: row[key] for key in ("metric", "samples", "sampler", "sampler_steps", "feature_size", "reference")}
        best = (
            self.best if self.best is not None and self.best.items() >= how.items() else None
        )  # others do not compare
        if self.step and (best is None or row["value"] < best["value"]):
            self.best = {"step": self.step, "value": row["value"], **how}
        self.progress.print(
            f"step {self.step:,}: {row['metric']} {row['value']:.3f} "
            f"({row['samples']:,} samples, {row['sampler']} {row['sampler_steps']} steps, {row['seconds']:.0f} s)"
        )

    def _draw_forward_noising(self) -> None:
        """How the first images dissolve: x_t at eight times from 0 to T."""
        schedule = self.objective.schedule
        times = torch.linspace(0, schedule.T, 8).round().double()
        x0 = torch.from_numpy(self.image_set.images[:4]).permute(0, 3, 1, 2).double() / 127.5 - 1
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(self.config.seed), dtype=x0.dtype)
        columns = [to_uint8(self.objective.add_noise(x0, t.expand(len(x0)), eps)) for t in times]
        labels = [f"t = {t:.0f}\n$\\bar\\alpha_t$ = {schedule.alpha(t) ** 2:.3g}" for t in times]
        plots.plot_forward_noising(_nhwc(torch.stack(columns, 1)), labels, self.run.saves / "forward-noising.png")


def _nhwc(images: torch.Tensor) -> np.ndarray:
    return images.movedim(-3, -1).numpy()


def train(config: Config, *, resume: Path | None = None) -> int:
    """Train as the config says; the entry point of `train_cifar.py`.

    Args:
        config: the whole run.
        resume: a run directory to continue, from its newest checkpoint that verifies.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        UserError: bad input, before anything is written.
        TrainingFailed: the loss or a gradient was not finite.
    """
    device = resolve_device(config.device)
    with ExitStack() as stack:
        saved = None
        if resume is not None:
            run = stack.enter_context(open_run(resume))
            saved = _find_checkpoint(config, resume)
        image_set = load_dataset(
            config.data, root=config.data_root, split=config.split, image_size=config.net.image_size
        )
        distance = None
        if config.features != "none":
            extractor = make_extractor(config.features, device=device, size=config.feature_size)
            distance = FrechetDistance(extractor, image_set, cache_dir=Path(config.data_root) / ".cache", device=device)
        if resume is None:  # only now, so that bad input leaves no run directory
            run = stack.enter_context(create_run(config.run_root, config=config.to_dict()))
        stop = stack.enter_context(StopRequest())
        progress = stack.enter_context(TrainingProgress(config.steps))
        trainer = Trainer(
            config, device=device, image_set=image_set, distance=distance, run=run, progress=progress, stop=stop,
            resumed=saved,
        )  # fmt: skip
        write_atomically(run.path / "config.json", config.to_json().encode())
        try:
            trainer.loop()
        except Stopped:
            assert stop.signal is not None
            how = f"resume with: python train_cifar.py --resume {run.path}" if trainer.step else "no step was taken"
            progress.print(f"stopped by {stop.signal.name} at step {trainer.step:,}; {how}")
            return stop.exit_code
        progress.print(
            f"done: look at {run.saves}/ (samples, curves), {run.path / 'metrics.csv'} and {run.checkpoints}/"
        )
    return 0


def _find_checkpoint(config: Config, resume: Path) -> checkpoint.Checkpoint:
    """The newest good checkpoint of a run, whose config may differ from `config` only where that does no harm."""
    saved = checkpoint.load_latest(resume / "checkpoints")
    if saved is None:
        raise UserError(f"--resume {resume} has no checkpoint to continue from; start a new run.")
    for path, reason in saved.skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    before, now = (_flat(c) for c in (Config.from_dict(saved.state["config"]).to_dict(), config.to_dict()))
    changed = [name for name in now if now[name] != before[name] and name not in RESUMABLE_CHANGES]
    if changed:
        listed = "; ".join(f"--{name.replace('_', '-')} was {before[name]!r}, now {now[name]!r}" for name in changed)
        raise UserError(
            f"--resume {resume} cannot change what is trained: {listed}. Drop these flags, or start a new run."
        )
    return saved


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in config.items() if k != "net"}, **config["net"]}
