"""Evaluations while a run trains: samples, their distance to the training images, and pictures in the run directory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastdiff.evaluation.evaluate import evaluate
from fastdiff.evaluation.figures import draw_trajectory
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.evaluation.generate import NONE, Generator
from fastdiff.evaluation.wishes import Wishes
from fastdiff.model_sections import Guidance
from fastdiff.reporting import pictures
from fastdiff.runs.run import Run
from fastdiff.runtime.world import Ranks
from fastdiff.words import counted


@dataclass(frozen=True)
class Evaluator:
    """Draws samples from the averaged weights and writes what they show into the run directory.

    Args:
        distance: to the reference images; None for pictures alone.
        run: None on ranks other than 0.
        grid: samples in the picture; of a conditional network as many whole rows, one for each class.
        seed: of the noise, the same at every evaluation, so that the pictures of a run can be compared.
        say: prints a line.
        wishes: what a conditional network is asked for.
        few_steps: draw from the same network in few steps, without guidance; each is a row in the metrics.
    """

    generator: Generator
    distance: FrechetDistance | None
    ranks: Ranks
    run: Run | None
    grid: int
    seed: int
    say: Callable[[str], None]
    wishes: Wishes | None = None
    guidance: Guidance = NONE
    few_steps: Sequence[Generator] = ()

    def __call__(self, step: int, images: int, check: Callable[[], object], *, samples: int) -> dict[str, Any] | None:
        """Evaluate; every rank must call it.

        Args:
            step, images: how far the run is.
            check: called at every sampling step; may raise Stopped to break off, on all ranks.
            samples: for the distance.

        Returns:
            The row that was logged; None without a distance, and on ranks other than 0.
        """
        measure = partial(evaluate, seed=self.seed, check=check, ranks=self.ranks)
        draw = partial(measure, self.generator, guidance=self.guidance)
        columns, row, few = None, {}, []
        asked = self.wishes.of(samples) if self.wishes is not None else None
        if self.distance is not None:
            few = [measure(each, self.distance, n=samples, keep=0, conditions=asked)[0] for each in self.few_steps]
        if self.wishes is None:
            row, grid = draw(self.distance, n=samples, keep=self.grid)
        else:
            if self.distance is not None:
                row, _ = draw(self.distance, n=samples, keep=0, conditions=asked)
            shown = min(len(self.wishes.names), self.grid)
            columns = self.grid // shown
            rows = {name: v[:shown].repeat_interleave(columns, 0) for name, v in self.wishes.rows.items()}
            _, grid = draw(None, n=columns * shown, keep=columns * shown, conditions=rows, columns=columns)
        if self.run is None:
            return None
        picture, trajectory = (self.run.saves / f"{name}-{step:08d}.png" for name in ("samples", "trajectory"))
        with self.run.spared(self.say):
            if self.wishes is None or columns is None:
                pictures.save_grid(grid, picture)
            else:
                pictures.save_rows(np.split(grid, len(grid) // columns), self.wishes.names, picture)
            draw_trajectory(self.generator, trajectory, seed=self.seed, wishes=self.wishes, guidance=self.guidance)
        self.run.log_image("samples", pictures.image_grid(grid, columns=columns), step)
        if self.distance is None:
            return None
        for each in (*few, row):  # the one that names the best checkpoint is the last of its step
            each |= {"step": step, "images": images, "checkpoint": f"step-{step}" if step else None}
            self.run.log_eval(each)
        for each in sorted((*few, row), key=lambda each: each["sampler_steps"]):
            drawn = f"{counted(each['samples'], 'sample')}, {each['sampler']} {counted(each['sampler_steps'], 'step')}"
            self.say(f"step {step:,}: {each['metric']} {each['value']:.3f} ({drawn}, {each['seconds']:.0f} s)")
        return row
