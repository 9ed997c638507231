"""The checkpoints of a run: when one is begun, what must hold for it, and what a failed one means."""

from collections.abc import Callable

import torch

from fastdiff.errors import TrainingFailed
from fastdiff.runs import checkpoint
from fastdiff.runs.async_save import BackgroundSaver
from fastdiff.runs.run import Run
from fastdiff.training.state import RunState
from fastdiff.words import counted


class Saver:
    """Writes the checkpoints of a run; on ranks other than 0, whose run is None, it does nothing.

    Where the disk is full the run goes on and the next boundary tries again; a run that ends here fails.

    Args:
        ends: whether the save that is begun or collected now is the run's last, which is waited for.
        say: prints a line.
    """

    def __init__(self, run: Run | None, state: RunState, *, ends: Callable[[], bool], say: Callable[[str], None]):
        self.run, self.state, self.ends, self.say = run, state, ends, say
        self.failed = False  # the last save: the next boundary tries again
        self._step = -1  # of the last save
        self._writer = BackgroundSaver(run.checkpoints) if run is not None else None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def save(self) -> None:
        """Begin to write a checkpoint, and to drop those that are no longer wanted.

        Raises:
            TrainingFailed: a number in it is not finite, or it is the run's last and could not be written.
        """
        if self.run is None or self._writer is None:
            return
        self.collect(wait=True)
        self.failed = False
        config, step, values = self.state.config, self.state.step, self.state.state_dict()
        # Finite losses and gradients may still overflow in the last update.
        numbers = [t for t in checkpoint.tensors(values) if t.is_floating_point()]
        if not torch.stack([t.isfinite().all().to(numbers[0].device) for t in numbers]).all():
            raise TrainingFailed(
                f"a weight, average or moment is not finite at step {step:,}, which is not saved; {self.last_good()}. "
                f"A new run from there (--init-from) with a lower --lr (now {config.optim.lr:g}) or --precision fp32 "
                "may help."
            )
        self.run.sync()
        best = {self.state.best["step"]} if self.state.best else set()
        self._step = step
        self._writer.save(step, values, keep_last=config.run.keep_last, keep_steps=best)
        if self.ends():
            self.collect(wait=True)

    def collect(self, *, wait: bool = False) -> None:
        """Learn how the save under way has ended, if it has.

        Raises:
            TrainingFailed: it was the run's last and could not be written.
        """
        if self._writer is None:
            return
        try:
            self._writer.collect(wait=wait)
        except checkpoint.NotSaved as error:
            self.failed = True
            message = f"{error.strerror}; {self.last_good()}"
            if self.ends() and self._step == self.state.step:  # an older one is tried again, at the last step
                raise TrainingFailed(f"{message}. Free some space and resume") from error
            soon = counted(self.state.config.run.log_every, "step")
            self.say(f"{message}. Training goes on, and tries again within {soon}")

    def settle(self) -> None:
        """Wait until no save is under way."""
        if self._writer is not None:
            self._writer.wait()

    def last_good(self) -> str:
        """Which checkpoint a run that fails now can be resumed from."""
        self.settle()
        saved = checkpoint.list_checkpoints(self.run.checkpoints) if self.run is not None else []
        return f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
