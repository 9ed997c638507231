"""The section of a config that says how a network is trained for few steps."""

import math
from dataclasses import dataclass
from typing import Literal

from fastdiff.checks import at_least, check_words, positive, require
from fastdiff.errors import UserError
from fastdiff.model_sections import check_guidance

TAUGHT = ("consistency", "scm")  # may have a teacher
# Times the smallest denoising error, from which on a run warns. A perfect student returns one possible image in place
# of their mean, with at most twice its squared error; students of guided teachers reached 1.95.
ALARM = 2.5


@dataclass(frozen=True)
class TuningConfig:
    """How a network is trained for one and two steps: by tuning, by a teacher, or from random weights."""

    few_step: Literal["none", "consistency", "flow-map", "mean-flow", "scm"] = "none"
    """`consistency`: the network's estimates along a trajectory learn to agree, so that the first one is the image
    (ECT); each step compares those at a noise level t and an earlier r. `flow-map`: the network learns the average
    velocity from any t to any r (SoFlow); it needs --objective flow. `scm` and `mean-flow` are their limits for a step
    of 0, exact but slower: neither compiled, fused nor captured; scm needs --objective edm."""
    q: float = 256.0
    """consistency: two compared levels are at least 1 / q of the noisier one apart (in sigma / alpha), and in each
    further stage q times less. flow-map: a falls from 1 evenly, by q in each stage."""
    stages: int = 1
    """How many stages there are."""
    stage_images: int = 3_200_000
    """Training images of each stage; consistency stays in the last, flow-map at its end. scm: images over which the
    derivative by time comes in."""
    huber_c: float = 0.00054
    """consistency: differences of pixel values below which the distance is quadratic; above it is linear."""
    boundary: float = 0.1
    """consistency with --objective x0: sigma / alpha at which its estimate of the image is half x_t, as at t = 0 it
    must be all of it. With a --teacher 0.01 gave nearer samples of digits."""
    teacher: str | None = None
    """consistency, scm: a run, a checkpoint or an exported folder of the same task, whose frozen network gives the
    trajectories in place of the data (consistency distillation); also where --init-from is not given."""
    teacher_solver: Literal["euler", "heun"] = "euler"
    """consistency: how the teacher goes from t to r: in each step `euler` asks it once, `heun` twice."""
    teacher_steps: int = 1
    """consistency: how many steps the teacher takes from t to r. With several --q can be smaller, and fewer pairs lead
    from noise to data."""
    teacher_guidance: float = 1.0
    """Guidance scale w of the teacher, which its student then has built in; 1: none."""
    last_level: float = 0.821
    """sigma / alpha at which the last of several steps of the sampler consistency starts; other data have another best
    one, such as 2 for digits."""

    def __post_init__(self) -> None:
        check_words(self)
        require(1 < self.q < math.inf, "q", self.q, "a finite number above 1")
        at_least(1, self, "stages", "stage_images", "teacher_steps")
        positive(self, "huber_c", "boundary", "last_level")
        check_guidance(self.teacher_guidance, None, "teacher_")
        if self.teacher is not None and self.few_step not in TAUGHT:
            raise UserError(
                f"--teacher {self.teacher} would teach nothing; add --few-step consistency or scm, or drop it."
            )
        for flag, value, default in (("solver", self.teacher_solver, "euler"), ("steps", self.teacher_steps, 1)):
            if value != default and self.few_step != "consistency":
                raise UserError(
                    f"--teacher-{flag} {value} is for --few-step consistency, not {self.few_step}; "
                    f"add --teacher-{flag} {default}."
                )
        if self.teacher_guidance != 1 and self.teacher is None:
            raise UserError(f"--teacher-guidance is {self.teacher_guidance:g}, but there is no --teacher; name one.")

    @property
    def two_times(self) -> bool:
        """Whether the network is told a second time."""
        return self.few_step in ("flow-map", "mean-flow")

    @property
    def exact(self) -> bool:
        """Whether the network is differentiated forwards, which only plain PyTorch in float32 can."""
        return self.few_step in ("mean-flow", "scm")

    @property
    def compared(self) -> str | None:
        """The relative distance of the two times that are compared, in words."""
        return {"consistency": "(t - r) / t", "flow-map": "(t - s) / (t - r)"}.get(self.few_step)

    def at(self, images: int) -> float:
        """(t - r) / t, or a, or scm's ramp, after so many images, which decide it alone: a resumed run goes on in its
        stage."""
        if self.few_step == "flow-map":
            return self.q ** -min(images / self.stage_images, self.stages)
        if self.exact:
            return min(images / self.stage_images, 1.0)
        return self.q ** -(1 + min(images // self.stage_images, self.stages - 1))
