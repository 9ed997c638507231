"""The sections of a config that say what is learned: the network, what it is told, and the noise process.

Frozen dataclasses, each with its flags and the rules about them; the others are in `few_step_section.py` and
`sections.py`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from fastdiff.checks import at_least, check_words, positive, require
from fastdiff.errors import UserError
from fastdiff.words import counted

DISCRETE_SCHEDULES = ("ddpm-linear", "cosine")
NEEDS_SIGNAL = ("eps", "score")  # objectives whose prediction does not determine x0 where alpha = 0
# What --schedule auto means for each objective: the one of its paper, or the baseline's.
AUTO_SCHEDULE = {
    "eps": "ddpm-linear", "x0": "ddpm-linear", "v": "ddpm-linear", "score": "vp-sde", "flow": "flow", "edm": "edm",
}  # fmt: skip


def task(objective: str, schedule: str, *, timesteps: int | None, zero_terminal_snr: bool) -> str:
    """Objective and process in words. Two networks with the same words predict the same quantity."""
    levels = "" if timesteps is None else f", {timesteps} timesteps"
    return f"{objective} on {schedule}{levels}{', zero terminal SNR' if zero_terminal_snr else ''}"


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; the defaults are google/ddpm-cifar10-32 (35,746,307 parameters)."""

    image_size: int = 32
    """Height and width of the images, in pixels; a multiple of --patch x 2^(levels - 1)."""
    image_channels: int = 3
    """Channels of the images (RGB: 3)."""
    patch: int = 1
    """Side, in pixels, of the squares that are one position of the first level; 2 takes a quarter of the computation,
    which small details must then share. Divide --attention-resolutions by it as well."""
    channels: int = 128
    """Channels of the first level; a multiple of --norm-groups."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    """One factor of --channels for each level; each level halves the resolution."""
    blocks_per_level: int = 2
    """Residual blocks in each level on the way down (one more on the way up)."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Resolutions, in positions (pixels, unless --patch), whose blocks are followed by single-head self-attention."""
    dropout: float = 0.0
    """Dropout probability inside the residual blocks, in [0, 1)."""
    norm_groups: int = 32
    """Groups of each GroupNorm."""
    norm_eps: float = 1e-6
    """Added to the variance in each GroupNorm."""
    norm_conditioning: bool = False
    """Time and conditions scale and shift what the residual blocks normalise (AdaGN), instead of being added before."""
    num_classes: tyro.conf.Fixed[int] = 0
    """How many classes the network knows; 0: none. --conditional sets it by the data."""
    two_times: tyro.conf.Fixed[bool] = False
    """Whether the network is told a second time, to which its output leads; by --few-step flow-map."""
    text_encoder: tyro.conf.Fixed[Literal["none", "bytes", "words", "frozen"]] = "none"
    """What gives the tokens of texts; set from --text by runs/data.py."""
    text_width: int = 128
    """Width of the tokens of --text bytes and words; a multiple of 4. Other encoders have their own."""
    text_blocks: int = 2
    """Transformer blocks of --text bytes (at least 1) and words; 0: a token is
    its own word and place alone."""
    text_pooled: bool = True
    """Add the mean of a text's tokens to the time embedding, beside the attention to each of them."""

    def __post_init__(self) -> None:
        at_least(1, self, "image_size", "image_channels", "patch", "channels", "blocks_per_level", "norm_groups")
        at_least(0, self, "num_classes")
        at_least(1 if self.text_encoder == "bytes" else 0, self, "text_blocks")  # a byte alone says nothing
        mult, size, channels, width = self.channel_mult, self.image_size, self.channels, self.text_width
        require(len(mult) >= 1 and min(mult) >= 1, "channel_mult", mult, "one or more positive integers")
        factor, why = self.patch * 2 ** (len(mult) - 1), f" in patches of {self.patch}" if self.patch > 1 else ""
        require(size % factor == 0, "image_size", size, f"a multiple of {factor} ({counted(len(mult), 'level')}{why})")
        groups = f"a multiple of --norm-groups ({self.norm_groups})"
        require(channels % self.norm_groups == 0, "channels", channels, groups)
        require(channels % 2 == 0, "channels", channels, "even (the time embedding has sine and cosine halves)")
        among = set(self.attention_resolutions) <= set(self.resolutions)
        require(among, "attention_resolutions", self.attention_resolutions, f"among {self.resolutions}")
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")
        require(0.0 < self.norm_eps < math.inf, "norm_eps", self.norm_eps, "a finite number above 0")
        require(width >= 4 and width % 4 == 0, "text_width", width, "a multiple of 4, the heads of its attention")
        if self.text_encoder != "none":
            expected = "not empty with --text, as texts are read where there is attention"
            require(len(self.attention_resolutions) > 0, "attention_resolutions", self.attention_resolutions, expected)
            require(channels % 4 == 0, "channels", channels, "a multiple of 4, the heads that read texts")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Height and width of each level, in positions."""
        return tuple(self.image_size // self.patch // 2**level for level in range(len(self.channel_mult)))


@dataclass(frozen=True)
class ConditionsConfig:
    """What the network is told about an image, beside its noise level."""

    conditional: bool = False
    """Tell the network each image's class, so that samples can be asked for by class; the data must have classes."""
    label_dropout: float = 0.1
    """Part of the images whose class is left out, in [0, 1): the same network then also draws without one, which
    guidance needs."""
    class_names: tyro.conf.Fixed[tuple[str, ...]] = ()
    """Names of the classes, by label. --conditional takes them from the data."""

    text: str = "none"
    """Tell the network what each image shows by its caption: `bytes` and `words` are read by an
    encoder that learns with the network, and knows no word that no caption has; `wordllama` (a
    package) and `transformers:PATH` (a folder of a CLIP or T5 encoder) are taken as they are; `none`: no captions."""
    captions: str | None = None
    """A file of templates, one a line with {} for the class, that makes captions of class names; by default the data's
    own: metadata.jsonl or .csv, .txt files beside the images, or `captions` in an .npz."""
    caption_dropout: float = 0.1
    """Part of the images whose caption is left out, in [0, 1); see --label-dropout."""
    text_fingerprint: tyro.conf.Fixed[str] = ""
    """Of the encoder that the network was trained with."""

    def __post_init__(self) -> None:
        require(0.0 <= self.label_dropout < 1.0, "label_dropout", self.label_dropout, "in [0, 1)")
        require(0.0 <= self.caption_dropout < 1.0, "caption_dropout", self.caption_dropout, "in [0, 1)")
        kind, _, path = self.text.partition(":")
        known = self.text in ("none", "bytes", "words", "wordllama") or bool(kind == "transformers" and path)
        require(known, "text", self.text, "none, bytes, words, wordllama or transformers:PATH")
        if self.captions is not None and self.text == "none":
            raise UserError(
                f"--captions {self.captions} would be read by nothing; add --text bytes or words, or drop it."
            )

    @property
    def any(self) -> bool:
        """Whether the network is told anything."""
        return self.conditional or self.text != "none"


def check_guidance(scale: float, interval: tuple[float, float] | None, prefix: str = "") -> None:
    """Raise UserError for a scale that is not finite, or an interval the wrong way round; `prefix` is of the flags."""
    require(math.isfinite(scale), f"{prefix}guidance", scale, "a finite number; 1: none")
    if interval is not None:
        low, high = interval
        expected = "LO HI with 0 <= LO < HI, finite levels of sigma / alpha; e.g. 0.2 1.5"
        require(0 <= low < high < math.inf, f"{prefix}guidance_interval", f"{low:g} {high:g}", expected)


@dataclass(frozen=True)
class Guidance:
    """How strongly samples are led, and at which noise levels; see fastdiff/diffusion/guidance.py.

    Args:
        scale: w; 1: not at all.
        interval: (lo, hi) of sigma / alpha, 0 <= lo < hi; None: at every noise level.

    Raises:
        UserError: a scale that is not finite, or an interval the wrong way round.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_guidance(self.scale, self.interval)

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Scale, lo and hi."""
        return self.scale, *(self.interval or (0.0, math.inf))

    @property
    def label(self) -> str:
        """1.5 in 0.2 to 1.5"""
        return f"{self.scale:g}" + (f" in {self.interval[0]:g} to {self.interval[1]:g}" if self.interval else "")


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise process, and what the network learns about it."""

    objective: Literal["eps", "x0", "v", "score", "flow", "edm"] = "eps"
    """What the network predicts."""
    schedule: Literal["auto", "ddpm-linear", "cosine", "vp-sde", "subvp-sde", "ve-sde", "edm", "flow"] = "auto"
    """Noise schedule; `auto`: ddpm-linear for eps, x0 and v, vp-sde for score, flow for flow, edm for edm."""
    weighting: Literal["uniform", "image", "snr", "truncated-snr", "min-snr", "edm", "sigmoid"] = "uniform"
    """How the error of the estimated image at each noise level is weighted, the same for every objective; but
    `uniform`: the plain error of what the network predicts. --few-step consistency: `uniform` is ECT's weight, which
    counts small noise most, and `image`, for a --teacher, counts all levels alike."""
    time_sampling: Literal["auto", "uniform", "low-discrepancy", "log-normal", "wide-log-normal", "logit-normal"] = (
        "auto"
    )
    """Which noise levels training sees; `auto`: log-normal for schedule edm, else uniform (of log sigma for ve-sde);
    with --few-step its own."""
    timesteps: int = 1000
    """T, the number of noise levels of ddpm-linear and cosine; other schedules are continuous. The betas of ddpm-linear
    are meant for 1000: with far fewer, x_T is not pure noise, and sampling needs --zero-terminal-snr or cosine."""
    zero_terminal_snr: bool = False
    """Rescale ddpm-linear or cosine so that the last level is pure noise; not for eps and score."""
    min_snr_gamma: float = 5.0
    """Largest weight of --weighting min-snr."""
    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1], for objective and weighting edm."""
    time_scale: float = 1.0
    """Factor of the number, about 0..1000, that tells the network its noise level; 0.01, say, makes its output vary
    less from one level to the next."""

    def __post_init__(self) -> None:
        check_words(self)
        at_least(1, self, "timesteps")
        positive(self, "min_snr_gamma", "sigma_data", "time_scale")
        schedule, auto = self.resolved_schedule, " (auto)" if self.schedule == "auto" else ""
        if self.zero_terminal_snr and not self.discrete:
            raise UserError(
                f"--zero-terminal-snr rescales {' and '.join(DISCRETE_SCHEDULES)}, but --schedule is {schedule}{auto}; "
                "drop one of them."
            )
        if self.objective in NEEDS_SIGNAL and (self.zero_terminal_snr or schedule == "flow"):
            reason = "--zero-terminal-snr" if self.zero_terminal_snr else "--schedule flow"
            raise UserError(
                f"--objective {self.objective} cannot tell the image from pure noise, with which {reason} begins; "
                "choose x0, v, flow or edm, or drop it."
            )
        if self.time_sampling == "logit-normal" and schedule in ("ve-sde", "edm"):
            raise UserError(
                f"--time-sampling logit-normal needs a time in [0, 1], but the time of --schedule {schedule}{auto} is "
                "sigma; choose log-normal, uniform or low-discrepancy."
            )

    @property
    def resolved_schedule(self) -> str:
        """The schedule, with `auto` resolved by the objective."""
        return AUTO_SCHEDULE[self.objective] if self.schedule == "auto" else self.schedule

    @property
    def discrete(self) -> bool:
        """Whether the schedule has --timesteps levels, and no times between them."""
        return self.resolved_schedule in DISCRETE_SCHEDULES

    @property
    def task(self) -> str:
        """What the network is trained for; see the function `task`."""
        timesteps, zero = self.timesteps if self.discrete else None, self.zero_terminal_snr
        words = task(self.objective, self.resolved_schedule, timesteps=timesteps, zero_terminal_snr=zero)
        words += f", sigma_data {self.sigma_data:g}" if self.objective == "edm" else ""
        return words + (f", time scale {self.time_scale:g}" if self.time_scale != 1 else "")

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `make_objective`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": values.pop("objective"), **values, "schedule": self.resolved_schedule}
