"""Evaluations while a run trains: samples, their distance to the training images, and pictures in the run directory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastdiff.evaluation.evaluate import evaluate
from fastdiff.evaluation.figures import draw_trajectory
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.evaluation.generate import Generator
from fastdiff.reporting import pictures
from fastdiff.runs.run import Run
from fastdiff.runtime.world import Ranks


@dataclass(frozen=True)
class Evaluator:
    """Draws samples from the averaged weights and writes what they show into the run directory.

    Args:
        generator: draws from the network whose average is evaluated.
        distance: to the reference images; None for pictures alone.
        run: the run directory; None on ranks other than 0.
        grid: samples in the picture.
        seed: of the noise, the same at every evaluation, so that the pictures of a run can be compared.
        say: prints a line.
    """

    generator: Generator
    distance: FrechetDistance | None
    ranks: Ranks
    run: Run | None
    grid: int
    seed: int
    say: Callable[[str], None]

    def __call__(self, step: int, images: int, check: Callable[[], object], *, samples: int) -> dict[str, Any] | None:
        """Evaluate; every rank must call it.

        Args:
            step, images: how far the run is.
            check: called at every sampling step; may raise Stopped to break off, on all ranks.
            samples: for the distance.

        Returns:
            The row that was logged; None without a distance, and on ranks other than 0.
        """
        row, grid = evaluate(
            self.generator, self.distance, n=samples, seed=self.seed, keep=self.grid, check=check,
            ranks=self.ranks,
        )  # fmt: skip
        if self.run is None:
            return None
        with self.run.spared(self.say):
            pictures.save_grid(grid, self.run.saves / f"samples-{step:08d}.png")
            draw_trajectory(self.generator, self.run.saves / f"trajectory-{step:08d}.png", seed=self.seed)
        self.run.log_image("samples", pictures.image_grid(grid), step)
        if self.distance is None:
            return None
        row |= {"step": step, "images": images, "checkpoint": f"step-{step}" if step else None}
        self.run.log_eval(row)
        self.say(
            f"step {step:,}: {row['metric']} {row['value']:.3f} "
            f"({row['samples']:,} samples, {row['sampler']} {row['sampler_steps']} steps, {row['seconds']:.0f} s)"
        )
        return row
