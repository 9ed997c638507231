"""The training run, from a config to the last checkpoint: `train` builds the parts, `_loop` takes the steps.

data -> step(objective, network) -> optimizer + EMA -> checkpoint, metrics, evaluation
"""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import record_function

from fastdiff.config import Config
from fastdiff.data.datasets import ImageSet
from fastdiff.data.loaders import Moments, check_loader, make_loader
from fastdiff.diffusion.objectives import Objective
from fastdiff.diffusion.schedules import unnoised_end
from fastdiff.errors import TrainingFailed, UsageError
from fastdiff.evaluation.denoising import DenoisingError
from fastdiff.evaluation.evaluate import space_of
from fastdiff.evaluation.evaluator import Evaluator
from fastdiff.evaluation.figures import draw_forward_noising
from fastdiff.evaluation.reconstructions import ReconstructionEvaluator
from fastdiff.evaluation.space import Latents
from fastdiff.reporting.progress import TrainingProgress
from fastdiff.reporting.recording import StepRecorder, record_run
from fastdiff.runs import checkpoint
from fastdiff.runs.data import load_run_data, with_conditions
from fastdiff.runs.latents import FOLDER, autoencoder_weights, with_latents
from fastdiff.runs.run import Run, create_run, open_run
from fastdiff.runs.weights import initial_weights, teacher_weights
from fastdiff.runtime import output
from fastdiff.runtime.device import check_triton, set_backends
from fastdiff.runtime.signals import Stopped, StopRequest
from fastdiff.runtime.world import Ranks
from fastdiff.training.moments import latent_moments
from fastdiff.training.parts import (
    evaluation_samplers,
    make_conditions,
    make_distance,
    make_evaluator,
    make_step,
    make_watch,
)
from fastdiff.training.report import PRECISIONS, dump_batch, facts, log, plot, profile_facts
from fastdiff.training.resume import find_checkpoint
from fastdiff.training.saving import Saver
from fastdiff.training.state import RunState
from fastdiff.training.step import TrainStep
from fastdiff.words import counted

OWN_FLAGS = ("device", "data", "data_root")  # which may differ from rank to rank; the content of data is compared
PLOT_SECONDS = 60.0  # between two pictures of the curves, which take seconds; and after each evaluation, and at the end
SIGNAL_GRACE = 3.0  # seconds in which torchrun's copy of a signal, and a scheduler's own, count as one


@dataclass(frozen=True)
class Session:
    """What surrounds the training: its resolved config and images, what the loader reads (the images, or the moments of
    their latents), the ranks, the run directory (None but on rank 0), the screen, and what may stop it."""

    config: Config
    image_set: ImageSet
    inputs: ImageSet | Moments
    ranks: Ranks
    run: Run | None
    progress: TrainingProgress
    stop: StopRequest


def train(
    config: Config, *, resume: Path | Run | None = None, after_evaluation: Callable[[Run], object] = lambda run: None
) -> int:
    """Train as the config says; the entry point of `train_cifar.py`.

    Under torchrun, every rank calls it.

    Args:
        config: the whole run.
        resume: a run directory to continue, from its newest checkpoint that verifies; or that run, open already. Only
            rank 0's counts.
        after_evaluation: called with the run, on rank 0, when the row of an evaluation has been written.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        UserError: bad input, before anything is written; or the step cannot be captured in a CUDA graph.
        TrainingFailed: the loss or a gradient was not finite, the last step could not be saved, or another rank failed.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(Ranks.launched(config.machine.device, timeout=config.machine.rank_timeout))
        asked, config = config, config.resolved(ranks.device.type)
        _check(asked, config, ranks)
        run, saved, initial = None, None, None
        if ranks.is_main and resume is not None:
            run = stack.enter_context(resume if isinstance(resume, Run) else open_run(resume))
            checkpoint.recover(run.checkpoints)
            saved = find_checkpoint(asked, run.path)
        saved = ranks.share(saved, "the checkpoint")
        learned = saved.state if saved is not None else {}
        home = run.path if run is not None else None
        autoencoder = ranks.share(
            autoencoder_weights(config, learned, home=home) if ranks.is_main else None, "the autoencoder"
        )
        asked, config = (with_latents(each, autoencoder) for each in (asked, config))
        space = space_of(config, autoencoder, ranks.device, graphs=config.machine.graphs)
        with ranks.first_on_host("loading the data"):
            image_set, data = load_run_data(config, learned)
            inputs = image_set
            if autoencoder is not None and isinstance(space, Latents):
                data |= autoencoder.saved
                inputs = latent_moments(
                    space, image_set, sha256=autoencoder.sha256, mirrored=config.images.flips,
                    root=config.images.data_root,
                )  # fmt: skip
        ranks.check_equal(**{"--data": image_set.sha256, "captions": image_set.captions_sha256})
        asked, config = (with_conditions(each, image_set) for each in (asked, config))
        if ranks.is_main and resume is None:
            initial = initial_weights(config)
        initial = ranks.share(initial, "the weights to start from")
        teacher = ranks.share(teacher_weights(config, learned) if ranks.is_main else None, "the teacher")
        data |= teacher.saved if teacher is not None else {}
        distance = make_distance(config, image_set, ranks) if config.eval.features != "none" else None
        check_loader(config.images.loader)
        conditions = make_conditions(config, image_set, ranks)
        if run is None and ranks.is_main:  # only now, so that bad input leaves no run directory
            run = stack.enter_context(create_run(config.run.run_root, config=_recorded(asked, config)))
        if run is not None:
            stack.enter_context(output.losses_told_to(run.note))
            if autoencoder is not None and not (run.path / FOLDER).exists():
                autoencoder.save(run.path / FOLDER)
        stop = stack.enter_context(StopRequest(quiet=not ranks.is_main, grace=SIGNAL_GRACE if ranks.size > 1 else 0.0))
        ranks.limit_waits()
        console = None if ranks.is_main else Console(quiet=True, force_terminal=False)
        progress = stack.enter_context(TrainingProgress(config.run.steps, console))
        session = Session(config, image_set, inputs, ranks, run, progress, stop)

        step, model, ema = make_step(config, conditions, ranks, initial, teacher, space)
        state = RunState(asked, data, model, ema, step.update, step.metrics, step.noise_levels)
        if saved is not None:
            state.load_state_dict(saved.state, step=saved.step)
            if run is not None:
                run.truncate(saved.step, drop=lambda row: not state.counts(row))
        evaluator = make_evaluator(config, image_set, ranks, run, step, ema, distance, progress.print)
        watch = make_watch(config, image_set, step, evaluator) if run is not None else None
        if run is not None and watch is not None and state.step == 0 and state.least_error is None:
            state.least_error = watch()
            run.log_train({"step": 0, "images": 0, "denoising_error": state.least_error})
        saver = stack.enter_context(
            Saver(run, state, ends=lambda: bool(stop.signal) or state.step == config.run.steps, say=progress.print)
        )
        record: Callable[[], AbstractContextManager[StepRecorder | None]] = nullcontext
        if run is not None:
            lines = facts(config, ranks, run, image_set, distance, model, initial)
            for name, value in lines.items():
                progress.print(f"{name:<10} {value}")
            for warning in (
                initial.warning if initial else None,
                config.unprepared,
                unnoised_end(step.objective.schedule) if step.objective.schedule is not None else None,
                config.machine.warning,
            ):  # fmt: skip
                if warning:
                    progress.print(f"{'warning':<10} {warning}")
            run.record_config(_recorded(asked, config))
            record = partial(
                record_run, run.path / "profile", steps=config.run.profile, start=state.step, last=config.run.steps,
                pauses=(config.run.save_every, config.eval.eval_every), title=f"Training step, preset {config.preset}",
                device=ranks.device, facts=profile_facts(asked, lines), say=progress.print, settle=saver.settle,
            )  # fmt: skip
        try:
            _loop(session, state, step, evaluator, saver, watch, record, after_evaluation)
        except TrainingFailed:
            plot(state, run, progress)
            raise
        except Stopped:
            saver.collect(wait=True)
            plot(state, run, progress)
            if run is not None and stop.signal is not None:  # all ranks have agreed on it
                end = f"stopped by {stop.signal.name} at step {state.step:,}"
                run.note(end)
                progress.print(f"{end}; resume with: {_command(config)} --resume {run.path}")
            return stop.exit_code
        if run is not None:
            run.note(f"done at step {state.step:,}")
            progress.print(
                f"done: look at {run.saves}/ (samples, curves), {run.path / 'metrics.csv'} and {run.checkpoints}/"
            )
        return stop.exit_code  # not 0 where a signal came in the last moment


def _loop(
    session: Session, state: RunState, step: TrainStep, evaluator: Evaluator | ReconstructionEvaluator, saver: Saver,
    watch: DenoisingError | None, record: Callable[[], AbstractContextManager[StepRecorder | None]],
    after_evaluation: Callable[[Run], object],
) -> None:  # fmt: skip
    """Train until the last step, or until a signal asks to stop; either way the last step is saved.

    The first steps of a process and of a precision, which compile and capture, are in no `seconds` and no
    `images_per_second`, unless a row, checkpoint or evaluation is due right after one of them.

    Raises:
        TrainingFailed: the loss or a gradient was not finite.
        Stopped: a signal came; all is saved.
    """
    config, image_set, ranks, run = session.config, session.image_set, session.ranks, session.run
    progress, stop = session.progress, session.stop

    plotted = time.monotonic()

    def curves() -> None:
        nonlocal plotted
        plot(state, run, progress)
        plotted = time.monotonic()

    def save() -> None:
        saver.save()
        if time.monotonic() - plotted > PLOT_SECONDS:
            curves()

    def signalled() -> bool:
        """Whether a signal has come to any rank, or torchrun is gone; all ranks know then."""
        number = ranks.any(stop.signal or (signal.SIGHUP if ranks.orphaned else 0))  # on the host: no wait for a GPU
        if number:
            stop.signal = signal.Signals(number)
        return bool(number)

    def evaluate() -> None:
        if signalled():
            raise Stopped
        try:
            samples = config.eval.eval_samples
            if state.step == config.run.steps:
                samples = config.eval.final_eval_samples or samples
            row = evaluator(state.step, state.images, stop.check, samples=samples)
        except Stopped:
            signalled()
            raise
        state.evaluated = state.step
        if row is not None and run is not None:
            state.add_evaluation(row)
            after_evaluation(run)

    def evaluation_due() -> bool:
        return state.step % config.eval.eval_every == 0 or state.step == config.run.steps

    _check_ranks(session, state, saver)
    if run is not None and state.step == 0 and isinstance(step.objective, Objective):
        with run.spared(progress.print):
            draw_forward_noising(
                step.objective, image_set, run.saves / "forward-noising.png", seed=config.run.seed, space=step.space
            )
    due = config.eval.eval_at_start if state.step == 0 else evaluation_due()
    if due and state.evaluated != state.step:  # at the start, or where the last process was stopped before it
        try:
            evaluate()
        except Stopped:
            if state.step == 0:
                save()  # so that this run can be resumed as any other
            raise
        if state.step:
            save()
            curves()
    if config.run.steps is not None and state.step >= config.run.steps:
        progress.print(f"step {state.step:,} of --steps {config.run.steps:,} is reached")
        return
    loader = make_loader(
        config.images.loader, session.inputs, batch_size=config.optim.batch_size // ranks.size, seed=config.run.seed,
        rank=ranks.rank, world_size=ranks.size, device=ranks.device, start_step=state.step,
        flip=config.images.flip == "on",
    )  # fmt: skip
    precision = ""
    with closing(loader), record() as recorder:
        clock = time.perf_counter()
        while config.run.steps is None or state.step < config.run.steps:
            if (now := config.precision_at(state.images)) != precision:
                if precision:
                    _check_finite(session, step, saver)  # the device is waited for, so the clock has seen its work
                    state.seconds += time.perf_counter() - clock
                if config.machine.precision == "staged":
                    progress.print(f"{'precision':<10} {PRECISIONS[now]} from step {state.step + 1:,}")
                step.compute_in(precision := now)
                clock = time.perf_counter()
            with record_function("data"):
                images, index = next(loader)
            ready = step.run.ready
            step(images, state.step, index)
            state.step += 1
            stopping = signalled()
            saver.collect()
            if recorder is not None:
                clock += recorder.after_step(state.step)  # what the profiler takes is no training time
            log_due = state.step % config.run.log_every == 0 or state.step == config.run.steps
            save_due = state.step % config.run.save_every == 0 or evaluation_due() or stopping
            if not (log_due or save_due):
                if not ready:
                    _check_finite(session, step, saver)  # the device is waited for, so the clock starts after it
                    state.last_log, clock = (state.step, state.seconds), time.perf_counter()
                continue
            _check_finite(session, step, saver)  # the device is waited for, so the clock has seen its work
            state.seconds += time.perf_counter() - clock
            if log_due:
                log(state, run, progress, watch)
            # Not at a last step between two rows: a longer run would go on with the sums.
            window = state.step % config.run.save_every == 0 or state.step % config.eval.eval_every == 0
            if window and step.objective.schedule is not None:
                state.noise_history.append({"step": state.step, **step.noise_levels.read()})
            if save_due:
                _check_ranks(session, state, saver)
            if save_due or saver.failed:
                save()  # before an evaluation, so that a crash in it costs nothing
            if stopping:
                raise Stopped
            if evaluation_due():
                evaluate()
                save()  # with the new distance
                curves()
            clock = time.perf_counter()


def _check(asked: Config, config: Config, ranks: Ranks) -> None:
    """Raise UserError where the config does not fit the machine or the ranks; set PyTorch's own switches."""
    batch, accumulate, machine = config.optim.batch_size, config.optim.accumulate, config.machine
    if batch % (ranks.size * accumulate):
        raise UsageError(
            f"--batch-size is {batch}, but must be a multiple of {ranks.size * accumulate}: "
            f"{counted(ranks.size, 'rank')} times --accumulate {accumulate}."
        )
    evaluation_samplers(config)
    check_triton(machine.kernels, machine.compile == "on", ranks.device)
    set_backends(ranks.device, deterministic=machine.deterministic)
    flags = {f"--{name.replace('_', '-')}": value for name, value in asked.flat().items() if name not in OWN_FLAGS}
    flags["--flip"] = config.images.flip  # which `auto` takes from the name of the data
    ranks.check_equal(**flags, torch=torch.__version__)


def _recorded(asked: Config, config: Config) -> dict[str, Any]:
    """What config.json holds: the config as asked for, and what each `auto` has become."""
    ran = {name: value for name, value in config.flat().items() if value != asked.flat()[name]}
    return {**asked.to_dict(), "resolved": ran}


def _check_finite(session: Session, step: TrainStep, saver: Saver) -> None:
    """Raise TrainingFailed if some loss or gradient was not finite; rank 0 tells it. Waits for the device."""
    bad = int(step.metrics.state_dict()["bad_step"])
    run, config = session.run, session.config
    if bad >= 0 and run is not None:
        path = run.path / f"non-finite-step-{bad + 1}.json"
        with run.spared(session.progress.print):
            dump_batch(path, step, config, session.image_set, bad)
        raise TrainingFailed(
            f"the loss or the gradient of step {bad + 1:,} is not finite; nothing was saved after it, and "
            f"{saver.last_good()}. {path} tells its batch. A new run from there (--init-from) with a lower --lr (now "
            f"{config.optim.lr:g}) or --precision fp32 may help."
        )


def _check_ranks(session: Session, state: RunState, saver: Saver) -> None:
    """Raise TrainingFailed unless all ranks have the same weights: each makes every update by itself."""
    if session.ranks.size > 1:
        sums = torch.stack([p.detach().double().sum() for p in state.model.parameters()])
        sums = [float.hex(s) for s in sums.tolist()]  # NaN is the same as NaN, and another error's
        if any(each != sums for each in session.ranks.gather(sums, "the comparison of weights")):
            raise TrainingFailed(
                f"the ranks' weights differ after {counted(state.step, 'step')}; nothing was saved, and "
                f"{saver.last_good()}. Use GPUs of one kind, and the same versions of this repository and of PyTorch "
                "on all hosts."
            )


def _command(config: Config) -> str:
    """What a user types to train: an installed fastdiff has commands of its own."""
    name = Path(sys.argv[0]).name
    if config.autoencoder.factor:
        return f"{'fastdiff' if name == 'fastdiff' else 'python -m fastdiff'} autoencoder"
    return name if name == "fastdiff-train" else "python train_cifar.py"
