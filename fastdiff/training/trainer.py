"""The parts of a training run, put together, and the loop over its steps."""

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from fastdiff.config import PRESETS, Config
from fastdiff.data.datasets import ImageSet
from fastdiff.data.loaders import batch_plan, make_loader
from fastdiff.diffusion.objectives import Objective, make_objective
from fastdiff.diffusion.schedules import unnoised_end
from fastdiff.errors import TrainingFailed
from fastdiff.evaluation.evaluate import evaluate
from fastdiff.evaluation.figures import draw_forward_noising, draw_trajectory
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.evaluation.generate import Generator, SamplerSettings
from fastdiff.nets.fuse import fuse, half_parameters
from fastdiff.nets.unet import UNet
from fastdiff.reporting import pictures, plots
from fastdiff.reporting.progress import TrainingProgress
from fastdiff.reporting.recording import StepRecorder, record_run
from fastdiff.runs import checkpoint
from fastdiff.runs.async_save import BackgroundSaver
from fastdiff.runs.run import Run, write_atomically
from fastdiff.runs.weights import InitialWeights
from fastdiff.runtime.device import device_name, resolve_bf16, resolve_compile, resolve_kernels, resolve_loader
from fastdiff.runtime.signals import Stopped, StopRequest
from fastdiff.runtime.world import Ranks
from fastdiff.training import run_state
from fastdiff.training.ema import EMA
from fastdiff.training.optim import learning_rate, make_update
from fastdiff.training.step import TrainStep, step_seed

# Evaluations draw the same noise every time, so that grids of one run can be compared; apart from the steps' streams.
EVALUATION_STREAM = 2**32 - 1


class Trainer:
    """All parts of one run.

    Args:
        config: what to train, and how.
        ranks: the processes that train together, each with a Trainer of its own; rank 0 alone writes.
        image_set, data: see `load_run_data`.
        run: the run directory, held open; None on other ranks.
        resumed: the checkpoint to continue from.
        initial: the weights that a new run starts from, if not from random ones.
        after_evaluation: see `train`.
    """

    def __init__(
        self,
        config: Config,
        *,
        ranks: Ranks,
        image_set: ImageSet,
        data: Mapping[str, Any],
        distance: FrechetDistance | None,
        run: Run | None,
        progress: TrainingProgress,
        stop: StopRequest,
        resumed: checkpoint.Checkpoint | None,
        initial: InitialWeights | None = None,
        after_evaluation: Callable[[Run], object] = lambda run: None,
    ) -> None:
        device = ranks.device
        self.config, self.ranks, self.device, self.progress, self.stop = config, ranks, device, progress, stop
        self._run, self.image_set, self.data = run, image_set, data
        self.distance, self.after_evaluation = distance, after_evaluation
        self.bf16 = resolve_bf16(config.precision, device)
        compiled = resolve_compile(config.compile, device)
        self.loader_kind = resolve_loader(config.loader, device)
        self.flip = config.flips

        torch.manual_seed(config.seed)
        self.kernels = resolve_kernels(config.kernels, device)
        self.model = UNet(config.net).to(device)
        if initial is not None:
            self.model.load_state_dict(initial.state)
        network = fuse(self.model) if self.kernels == "triton" else self.model
        self.objective: Objective = make_objective(**config.diffusion)
        self.ema = EMA(self.model, config.ema_decay)
        self.update = make_update(
            self.kernels, self.model, self.ema, weight_decay=config.weight_decay,
            half=half_parameters(network) if self.bf16 else (), accumulate=config.accumulate * ranks.size > 1,
            graphs=config.graphs, skip_nonfinite=config.skip_nonfinite > 0,
        )  # fmt: skip
        self.step, self.seconds, self.last_log = 0, 0.0, (0, 0.0)
        self.loss_history: list[tuple[int, float]] = []
        self.fid_history: list[dict[str, Any]] = []
        self.noise_history: list[dict[str, Any]] = []  # the loss by noise level, since the row before
        self.best: dict[str, Any] | None = None
        self.evaluated: int | None = None  # the last step that was evaluated
        self.saver = BackgroundSaver(run.checkpoints) if run is not None else None
        self.not_saved = False  # the last save failed: the next boundary tries again
        self.stopping = False  # all ranks know by now that a signal came
        self.train_step = TrainStep(
            network, self.objective, self.update, lr=config.lr, warmup_steps=config.warmup_steps,
            grad_clip=config.grad_clip, seed=config.seed, bf16=self.bf16, compile=compiled,
            accumulate=config.accumulate, graphs=config.graphs, skip_nonfinite=config.skip_nonfinite,
            ranks=ranks,
        )  # fmt: skip
        if resumed is not None:
            run_state.restore(self, resumed)
        size = config.net.image_size
        self.generator = Generator(
            fuse(self.ema.model) if self.kernels == "triton" else self.ema.model, self.objective,
            SamplerSettings(config.eval_sampler, config.eval_steps), batch_size=config.eval_batch_size,
            image_shape=(config.net.image_channels, size, size), device=device, bf16=self.bf16, compile=compiled,
            graphs=config.graphs,
        )  # fmt: skip
        if ranks.is_main:
            self._describe(compiled, initial)

    @property
    def run(self) -> Run:
        """The run directory, which only rank 0 has."""
        assert self._run is not None
        return self._run

    def _describe(self, compiled: bool, initial: InitialWeights | None) -> None:
        config, parameters = self.config, sum(p.numel() for p in self.model.parameters())
        cuda = self.device.type == "cuda"
        reference = f"{self.distance.metric} against {self.distance.reference}" if self.distance else "none"
        ranks = self.ranks.size
        lines = {
            "ranks": f"{ranks}, each with {self.config.batch_size // ranks} of {self.config.batch_size} images",
            "device": f"{device_name(self.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "precision": ("bf16 autocast, float32 weights" if self.bf16 else "float32")
            + ", TF32 off"
            + (", deterministic" if config.deterministic else ""),
            "compile": "torch.compile" if compiled else "off",
            "graphs": "CUDA graphs of training and sampling steps" if self.config.graphs and cuda else "off",
            "kernels": f"{self.kernels} (GroupNorm+SiLU, clip + Adam + EMA)",
            "loader": f"{self.loader_kind}, flip {'on' if self.flip else 'off'}",
            "data": self.image_set.describe(),
            "objective": f"{config.objective} on {config.resolved_schedule}, weighting {config.weighting}",
            "network": f"U-Net, {parameters:,} parameters",
            **({"weights": f"from {initial.source}"} if initial is not None else {}),
            "distance": reference,
            "run": str(self.run.path),
        }
        self.facts = {name: lines[name] for name in ("precision", "compile", "kernels", "loader", "data", "network")}
        self.facts["data"] = lines["data"].partition(";")[0]
        for name, value in lines.items():
            self.progress.print(f"{name:<10} {value}")
        for warning in (initial and initial.warning, unnoised_end(self.objective.schedule)):
            if warning:
                self.progress.print(f"{'warning':<10} {warning}")

    def loop(self) -> None:
        """Train until the last step, or until a signal asks to stop; either way the last step is saved.

        The first steps of a process, which compile and capture, are in no `seconds` and no `images_per_second`, unless
        a row, checkpoint or evaluation is due right after one of them.

        Raises:
            TrainingFailed: the loss or a gradient was not finite.
            Stopped: a signal came; all is saved.
        """
        try:
            self._loop()
        except Stopped:
            self._collect_save(wait=True)
            raise
        finally:
            if self.saver is not None:
                self.saver.close()

    def _loop(self) -> None:
        config = self.config
        self._check_ranks()
        if self.step == 0 and self.ranks.is_main:
            with self._spared():
                path = self.run.saves / "forward-noising.png"
                draw_forward_noising(self.objective, self.image_set, path, seed=config.seed)
        due = config.eval_at_start if self.step == 0 else self._evaluates()
        if due and self.evaluated != self.step:  # at the start, or where the last run was stopped before it
            try:
                self.evaluate()
            except Stopped:
                if self.step == 0:
                    self.save()  # so that this run can be resumed as any other
                raise
            if self.step:
                self.save()
        if config.steps is not None and self.step >= config.steps:
            self.progress.print(f"step {self.step:,} of --steps {config.steps:,} is reached")
            return
        loader = make_loader(
            self.loader_kind, self.image_set, batch_size=config.batch_size // self.ranks.size, seed=config.seed,
            rank=self.ranks.rank, world_size=self.ranks.size, device=self.device, start_step=self.step, flip=self.flip,
        )  # fmt: skip
        with closing(loader), self._recorder() as recorder:
            clock = time.perf_counter()
            while config.steps is None or self.step < config.steps:
                with record_function("data"):
                    images, _ = next(loader)
                ready = self.train_step.ready
                self.train_step(images, self.step)
                self.step += 1
                self.stopping = bool(self.ranks.any(self.stop.signal is not None))  # on the host: no wait for a GPU
                self._collect_save(wait=False)
                if recorder is not None:
                    clock += recorder.after_step(self.step)  # what the profiler takes is no training time
                if self._is_boundary():
                    self._at_boundary(clock)
                    clock = time.perf_counter()
                elif not ready:
                    self._check_finite()  # waits for the device, so that the clock starts after its work
                    self.last_log, clock = (self.step, self.seconds), time.perf_counter()

    def _recorder(self) -> StepRecorder | nullcontext[None]:
        """What `--profile` asks for, of rank 0."""
        if not self.ranks.is_main:
            return nullcontext()
        config = self.config
        changes = config.changes(PRESETS[config.preset])
        facts = {
            **self.facts,
            "step": f"a batch of {config.batch_size}",
            "beside the preset": ", ".join(f"{name} {now}" for name, (_, now) in changes.items()) or "nothing",
        }
        return record_run(
            self.run.path / "profile", steps=config.profile, start=self.step, last=config.steps, device=self.device,
            pauses=(config.save_every, config.eval_every), title=f"Training step, preset {config.preset}",
            facts=facts, say=self.progress.print, settle=self.saver.wait if self.saver is not None else lambda: None,
        )  # fmt: skip

    def _is_boundary(self) -> bool:
        config, step = self.config, self.step
        due = any(step % every == 0 for every in (config.log_every, config.save_every))
        return due or self._evaluates() or self.stopping

    def _evaluates(self) -> bool:
        return self.step % self.config.eval_every == 0 or self.step == self.config.steps

    def _at_boundary(self, clock: float) -> None:
        """Log, save and evaluate as is due; `clock` is when the steps since the last boundary began."""
        config, step = self.config, self.step
        saves = self._evaluates() or step % config.save_every == 0 or self.stopping
        self._check_finite()  # waits for the device, so that the clock sees all its work
        self.seconds += time.perf_counter() - clock
        if step % config.log_every == 0 or step == config.steps:
            self._log()
        if step % config.save_every == 0 or step % config.eval_every == 0:  # not at a last step between: see `_log`
            self.noise_history.append({"step": step, **self.train_step.noise_levels.read()})
        if saves:
            self._check_ranks()
        if saves or self.not_saved:
            self.save()  # before an evaluation, so that a crash in it costs nothing
        if self.stopping:
            raise Stopped
        if self._evaluates():
            self.evaluate()
            self.save()  # with the new distance

    def _check_finite(self) -> None:
        bad_step = int(self.train_step.metrics_state()["bad_step"])
        if bad_step >= 0 and self.ranks.is_main:  # with whom the others end
            dump = self._dump_batch(bad_step)
            raise TrainingFailed(
                f"the loss or the gradient of step {bad_step + 1:,} is not finite; nothing was saved after it, and "
                f"{self._last_good()}. {dump} tells its batch. A lower --lr (now {self.config.lr:g}) or "
                "--precision fp32 may help."
            )

    def _check_ranks(self) -> None:
        """Raise TrainingFailed unless all ranks have the same weights: each makes every update by itself."""
        if self.ranks.size > 1:
            sums = torch.stack([p.detach().double().sum() for p in self.model.parameters()])
            sums = [float.hex(s) for s in sums.tolist()]  # NaN is the same as NaN, and another error's
            if any(each != sums for each in self.ranks.gather(sums, "the comparison of weights")):
                raise TrainingFailed(
                    f"the ranks' weights differ after {self.step:,} steps; nothing was saved, and {self._last_good()}. "
                    "Use GPUs of one kind, and the same versions of this repository and of PyTorch on all hosts."
                )

    def _dump_batch(self, step: int) -> Path:
        """Write which images, flips and times a step (from 0) had: all a pure function of the seed and the step."""
        n = self.config.batch_size
        indices, flips = batch_plan(len(self.image_set.images), batch_size=n, seed=self.config.seed, step=step)
        path = self.run.path / f"non-finite-step-{step + 1}.json"
        batch = {
            "step": step + 1,
            "indices": indices.tolist(),
            "flips": (flips & self.flip).tolist(),
            "t": self.train_step.times(n, step).tolist(),
        }
        with self._spared():
            write_atomically(path, (json.dumps(batch) + "\n").encode())
        return path

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
        if self.ranks.is_main:
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

    def _last_good(self) -> str:
        if self.saver is not None:
            self.saver.wait()
        saved = checkpoint.list_checkpoints(self.run.checkpoints)
        return f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"

    def save(self) -> None:
        """Begin to write a checkpoint and to drop those no longer wanted; bring the plots up to date.

        The run's last is waited for. Where the disk is full the run goes on, and tries again at the next boundary; a
        run that ends here fails.

        Raises:
            TrainingFailed: a number in it is not finite, or it is the run's last and could not be written.
        """
        if not self.ranks.is_main:
            return
        self._collect_save(wait=True)
        self.not_saved = False
        state = run_state.collect(self)
        # Finite losses and gradients may still overflow in the update of the last step.
        numbers = [t for t in checkpoint.tensors(state) if t.is_floating_point()]
        if not torch.stack([t.isfinite().all().to(self.device) for t in numbers]).all():
            raise TrainingFailed(
                f"a weight, average or moment is not finite at step {self.step:,}, which is not saved; "
                f"{self._last_good()}. A lower --lr (now {self.config.lr:g}) or --precision fp32 may help."
            )
        assert self.saver is not None
        keep = {self.best["step"]} if self.best else set()
        self.run.sync()
        self.saver.save(self.step, state, keep_last=self.config.keep_last, keep_steps=keep)
        if self._ends:
            self._collect_save(wait=True)
        self.plot()

    @property
    def _ends(self) -> bool:
        """Whether a save is the run's last."""
        return self.stopping or self.stop.signal is not None or self.step == self.config.steps

    def _collect_save(self, *, wait: bool) -> None:
        """Learn how the save under way has ended, if it has.

        Raises:
            TrainingFailed: it was the run's last and could not be written.
        """
        if self.saver is None:
            return
        try:
            self.saver.collect(wait=wait)
        except checkpoint.NotSaved as error:
            self.not_saved = True
            message = f"{error.strerror}; {self._last_good()}"
            if self._ends:
                raise TrainingFailed(f"{message}. Free some space and resume") from error
            self.progress.print(f"{message}. Training goes on, and the next {self.config.log_every} steps try again")

    def plot(self) -> None:
        """Draw loss, throughput and Frechet distance over the whole run, and the loss by noise level, also as rows."""
        since = self.train_step.noise_levels.read(reset=False)
        noise_rows = [*self.noise_history, *([{"step": self.step, **since}] if any(since["images"]) else [])]
        lines = "".join(json.dumps(row) + "\n" for row in noise_rows)
        with self._spared():
            plots.plot_run(self.run.train_rows(), self.run.eval_rows(), noise_rows, self.run.saves)
            write_atomically(self.run.path / "loss-by-noise.jsonl", lines.encode())
        gc.collect()  # figures are cycles of several MB each, which the collector would let pile up

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """A picture, or a note, that cannot be written is not worth a run."""
        try:
            yield
        except OSError as error:
            self.progress.print(f"{error.filename or self.run.saves} could not be written: {error.strerror or error}")

    def evaluate(self) -> None:
        """Samples, their grid, a sampling trajectory and the Frechet distance, from the averaged weights."""
        if self.ranks.any(self.stop.signal is not None):  # all of them, or none
            raise Stopped
        seed = step_seed(self.config.seed, EVALUATION_STREAM)
        row, grid = evaluate(
            self.generator, self.distance, n=self.config.eval_samples, seed=seed, keep=self.config.grid_samples,
            check=self.stop.check, ranks=self.ranks,
        )  # fmt: skip
        self.evaluated = self.step
        if not self.ranks.is_main:
            return
        with self._spared():
            pictures.save_grid(grid, self.run.saves / f"samples-{self.step:08d}.png")
            draw_trajectory(self.generator, self.run.saves / f"trajectory-{self.step:08d}.png", seed=seed)
        self.run.log_image("samples", pictures.image_grid(grid), self.step)
        if self.distance is None:
            return
        row |= {"step": self.step, "images": self.images, "checkpoint": f"step-{self.step}" if self.step else None}
        self.run.log_eval(row)
        self.fid_history.append(row)
        how = {key: row[key] for key in ("metric", "samples", "sampler", "sampler_steps", "feature_size", "reference")}
        # Distances made in other ways do not compare.
        best = self.best if self.best is not None and self.best.items() >= how.items() else None
        if self.step and (best is None or row["value"] < best["value"]):
            self.best = {"step": self.step, "value": row["value"], **how}
        self.progress.print(
            f"step {self.step:,}: {row['metric']} {row['value']:.3f} "
            f"({row['samples']:,} samples, {row['sampler']} {row['sampler_steps']} steps, {row['seconds']:.0f} s)"
        )
        self.after_evaluation(self.run)
