"""The sections of a config: frozen dataclasses, each with its flags and the rules about them."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from fastdiff.errors import UserError

SamplerName = Literal[
    "ddpm", "ddim", "euler", "heun", "euler-ancestral", "euler-maruyama", "predictor-corrector", "dpmpp-2m", "dpmpp-3m",
    "dpmpp-2m-sde", "unipc",
]  # fmt: skip
"""Names in fastdiff.diffusion.samplers.SAMPLERS."""
PresetName = Literal[
    "ddpm-cifar10", "cifar10-conditional", "quick", "v-cosine", "edm", "flow", "score-vp", "score-ve",
]  # fmt: skip
SpacingName = Literal["auto", "trailing", "leading", "uniform", "karras", "log-snr"]


def require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise UserError(f"--{name.replace('_', '-')} is {value!r}, but must be {expected}.")


def at_least(least: int, name: str, value: int) -> None:
    require(value >= least, name, value, f"at least {least}")
    require(value < 2**63, name, value, "below 2^63")


def positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(math.isfinite(value) and value > 0, name, value, "a finite number above 0")


def check_words(section: object) -> None:
    """Every choice is one of those that its type lists, and no name or path is blank."""
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if get_origin(hint) is Literal:
            require(value in get_args(hint), name, value, f"one of {', '.join(get_args(hint))}")
        elif isinstance(value, str):
            require(value.strip() != "", name, value, "a name or a path")


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
    """Height and width of the images, in pixels; a multiple of 2^(levels - 1)."""
    image_channels: int = 3
    """Channels of the images (RGB: 3)."""
    channels: int = 128
    """Channels of the first level; a multiple of --norm-groups."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    """One factor of --channels for each level; each level halves the resolution."""
    blocks_per_level: int = 2
    """Residual blocks in each level on the way down (one more on the way up)."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Resolutions, in pixels, whose blocks are followed by single-head self-attention."""
    dropout: float = 0.0
    """Dropout probability inside the residual blocks, in [0, 1)."""
    norm_groups: int = 32
    """Groups of each GroupNorm."""
    norm_eps: float = 1e-6
    """Added to the variance in each GroupNorm."""
    num_classes: tyro.conf.Fixed[int] = 0
    """Classes that the network can be told; 0: none. With --conditional, those of the data."""
    text_encoder: tyro.conf.Fixed[Literal["none", "bytes", "frozen"]] = "none"
    """What gives the tokens of texts; by --text."""
    text_width: int = 128
    """Width of the tokens of --text bytes; a multiple of 4. Other encoders have their own."""
    text_blocks: int = 2
    """Transformer blocks of --text bytes."""

    def __post_init__(self) -> None:
        for name in ("image_size", "image_channels", "channels", "blocks_per_level", "norm_groups"):
            at_least(1, name, getattr(self, name))
        mult = self.channel_mult
        require(len(mult) >= 1 and min(mult) >= 1, "channel_mult", mult, "one or more positive integers")
        factor = 2 ** (len(mult) - 1)
        require(
            self.image_size % factor == 0, "image_size", self.image_size, f"a multiple of {factor} ({len(mult)} levels)"
        )
        require(
            self.channels % self.norm_groups == 0,
            "channels",
            self.channels,
            f"a multiple of --norm-groups ({self.norm_groups})",
        )
        resolutions = tuple(self.image_size // 2**level for level in range(len(mult)))
        for resolution in self.attention_resolutions:
            require(
                resolution in resolutions, "attention_resolutions", self.attention_resolutions, f"among {resolutions}"
            )
        require(
            self.channels % 2 == 0, "channels", self.channels, "even (the time embedding has sine and cosine halves)"
        )
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")
        require(0.0 < self.norm_eps < math.inf, "norm_eps", self.norm_eps, "a finite number above 0")
        at_least(0, "num_classes", self.num_classes)
        at_least(1, "text_blocks", self.text_blocks)
        width = self.text_width
        require(width >= 4 and width % 4 == 0, "text_width", width, "a multiple of 4, the heads of its attention")
        if self.text_encoder != "none":
            expected = "not empty with --text, as texts are read where there is attention"
            require(len(self.attention_resolutions) > 0, "attention_resolutions", self.attention_resolutions, expected)
            require(self.channels % 4 == 0, "channels", self.channels, "a multiple of 4, the heads that read texts")


@dataclass(frozen=True)
class ImagesConfig:
    """Where the images come from, and how they reach the device."""

    data: str = "cifar10"
    """`cifar10`, `digits` (scikit-learn's; no download), `digits-captioned` (these in colours), `openmoji` (extra
    `emoji`), or a path: a folder, tar or zip of images, or an .npz."""
    data_root: str = "data"
    """Folder for downloads and caches of decoded images."""
    split: Literal["train", "test"] = "train"
    """Which part of the data to train on."""
    loader: Literal["auto", "dali", "resident"] = "auto"
    """`dali`: NVIDIA DALI pipeline; `resident`: whole set on the device; `auto`: dali on CUDA, else resident."""
    flip: Literal["auto", "on", "off"] = "auto"
    """Mirror each image with probability 1/2; `auto`: on, but off for digits and emoji."""

    def __post_init__(self) -> None:
        check_words(self)

    @property
    def flips(self) -> bool:
        """Whether images are mirrored at random, with `auto` resolved by the data."""
        return self.flip == "on" or (
            self.flip == "auto" and self.data not in ("digits", "digits-captioned", "openmoji")
        )


@dataclass(frozen=True)
class ConditionsConfig:
    """What the network is told about an image, beside its noise level."""

    conditional: bool = False
    """Tell the network each image's class, so that samples can be asked for by class; the data must have classes."""
    label_dropout: float = 0.1
    """Part of the images whose class is left out, in [0, 1): the same network then also draws without one, which
    guidance needs."""
    class_names: tyro.conf.Fixed[tuple[str, ...]] = ()
    """Names of the classes, by label; with --conditional, those of the data."""

    text: str = "none"
    """Tell the network what each image shows by its caption: `bytes` learns to read with the network; `wordllama` (a
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
        known = self.text in ("none", "bytes", "wordllama") or bool(kind == "transformers" and path)
        require(known, "text", self.text, "none, bytes, wordllama or transformers:PATH")
        if self.captions is not None and self.text == "none":
            raise UserError(f"--captions {self.captions} would be read by nothing; add --text bytes, or drop it.")

    @property
    def any(self) -> bool:
        """Whether the network is told anything."""
        return self.conditional or self.text != "none"


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise process, and what the network learns about it."""

    objective: Literal["eps", "x0", "v", "score", "flow", "edm"] = "eps"
    """What the network predicts."""
    schedule: Literal["auto", "ddpm-linear", "cosine", "vp-sde", "subvp-sde", "ve-sde", "edm", "flow"] = "auto"
    """Noise schedule; `auto`: ddpm-linear for eps, x0 and v, vp-sde for score, flow for flow, edm for edm."""
    weighting: Literal["uniform", "snr", "truncated-snr", "min-snr", "edm", "sigmoid"] = "uniform"
    """How the error of the estimated image at each noise level is weighted, the same for every objective; but
    `uniform`: the plain error of what the network predicts."""
    time_sampling: Literal["auto", "uniform", "low-discrepancy", "log-normal", "logit-normal"] = "auto"
    """Which noise levels training sees; `auto`: log-normal for schedule edm, else uniform (of log sigma for ve-sde)."""
    timesteps: int = 1000
    """T, the number of noise levels of ddpm-linear and cosine; other schedules are continuous. The betas of ddpm-linear
    are meant for 1000: with far fewer, x_T is not pure noise, and sampling needs --zero-terminal-snr or cosine."""
    zero_terminal_snr: bool = False
    """Rescale ddpm-linear or cosine so that the last level is pure noise; not for eps and score."""
    min_snr_gamma: float = 5.0
    """Largest weight of --weighting min-snr."""
    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1], for objective and weighting edm."""

    def __post_init__(self) -> None:
        check_words(self)
        at_least(1, "timesteps", self.timesteps)
        positive(self, "min_snr_gamma", "sigma_data")
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
        timesteps = self.timesteps if self.discrete else None
        words = task(
            self.objective, self.resolved_schedule, timesteps=timesteps, zero_terminal_snr=self.zero_terminal_snr
        )
        return f"{words}, sigma_data {self.sigma_data:g}" if self.objective == "edm" else words

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `make_objective`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": values.pop("objective"), **values, "schedule": self.resolved_schedule}


@dataclass(frozen=True)
class OptimConfig:
    """The update of the weights and of their average."""

    init_from: str | None = None
    """Start from the averaged weights of a network of the same shape, as step 0 of a new run: a run, a checkpoint, a
    folder of `export`, or the folder of a diffusers pipeline or UNet2DModel."""
    batch_size: int = 128
    """Images in a step."""
    accumulate: int = 1
    """Parts of a batch that go through the network one after the other, to need less memory; the update is the same."""
    optimizer: Literal["adam", "radam"] = "adam"
    """`adam`, or `radam`, whose first steps are rectified."""
    lr: float = 2e-4
    """Learning rate after warm-up."""
    warmup_steps: int = 5000
    """Steps over which the learning rate rises linearly; the first has lr / warmup_steps."""
    lr_decay: Literal["constant", "linear-decay", "wsd"] = "constant"
    """After warm-up: `linear-decay`: fall linearly to 0 at --steps; `wsd`: stay, then fall over the last steps."""
    decay_fraction: float = 0.2
    """The part of --steps over which --lr-decay wsd falls, in (0, 1]."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as AdamW's; 0: none."""
    grad_clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    skip_nonfinite: int = 0
    """Steps in a row whose loss or gradient may be NaN or infinite: they are skipped and counted; one more stops."""
    ema_decay: float = 0.9999
    """Decay of the weights' exponential moving average, in [0, 1); 0 keeps no memory."""

    def __post_init__(self) -> None:
        check_words(self)
        at_least(1, "batch_size", self.batch_size)
        at_least(1, "accumulate", self.accumulate)
        at_least(0, "warmup_steps", self.warmup_steps)
        at_least(0, "skip_nonfinite", self.skip_nonfinite)
        require(self.batch_size < 2**31, "batch_size", self.batch_size, "below 2^31, as for DALI")
        divides = f"a divisor of --batch-size ({self.batch_size})"
        require(self.batch_size % self.accumulate == 0, "accumulate", self.accumulate, divides)
        positive(self, "lr", "grad_clip")
        decay = self.weight_decay
        require(math.isfinite(decay) and decay >= 0, "weight_decay", decay, "at least 0")
        require(0.0 <= self.ema_decay < 1.0, "ema_decay", self.ema_decay, "in [0, 1)")
        require(0.0 < self.decay_fraction <= 1.0, "decay_fraction", self.decay_fraction, "above 0 and at most 1")

    def decay_start(self, steps: int | None) -> int | None:
        """How many of --steps are made before the learning rate falls; None if it does not."""
        if self.lr_decay == "constant" or steps is None:
            return None
        if self.lr_decay == "linear-decay":
            return self.warmup_steps
        return max(0, steps - max(1, round(self.decay_fraction * steps)))


@dataclass(frozen=True)
class Guidance:
    """How strongly samples are led, and at which noise levels; see fastdiff/diffusion/guidance.py.

    Args:
        scale: w; 1: not at all.
        interval: (lo, hi) of sigma / alpha, 0 <= lo < hi; None: at every noise level.
        flag: what stands before `guidance` in the flag's name.

    Raises:
        UserError: a scale that is not finite, or an interval the wrong way round.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    flag: str = ""

    def __post_init__(self) -> None:
        require(math.isfinite(self.scale), f"{self.flag}guidance", self.scale, "a finite number; 1: none")
        if self.interval is not None:
            low, high = self.interval
            expected = "LO HI with 0 <= LO < HI, finite levels of sigma / alpha; e.g. 0.2 1.5"
            require(0 <= low < high < math.inf, f"{self.flag}guidance_interval", f"{low:g} {high:g}", expected)

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Scale, lo and hi."""
        return self.scale, *(self.interval or (0.0, math.inf))

    @property
    def label(self) -> str:
        """1.5 in 0.2 to 1.5"""
        return f"{self.scale:g}" + (f" in {self.interval[0]:g} to {self.interval[1]:g}" if self.interval else "")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluations during training: sample grid, trajectory, Frechet distance."""

    features: Literal["auto", "inception", "efficientnet_lite0", "none"] = "auto"
    """Extractor of the Frechet distance; `auto`: inception if its weights can be loaded; `none`: no distance."""
    feature_size: int | None = None
    """Input of efficientnet_lite0 in pixels; default 224 on CUDA, 64 on CPU."""
    eval_at_start: bool = False
    """Also evaluate before the first step."""
    eval_every: int = 10_000
    """Steps between evaluations (sample grid, trajectory, Frechet distance, plots); each also saves a checkpoint."""
    eval_samples: int = 10_000
    """Samples of each Frechet distance during training."""
    final_eval_samples: int | None = None
    """Samples of the distance at the last of --steps, e.g. 50000; by default as many as of the others."""
    eval_batch_size: int = 256
    """Images sampled at a time."""
    eval_sampler: SamplerName = "ddim"
    """Sampler of evaluations (ddim with eta = 0)."""
    eval_steps: int = 50
    """Sampling steps for each sample: network evaluations, but twice as many for heun and predictor-corrector."""
    eval_guidance: float = 1.0
    """Guidance scale w of evaluations, see `python -m fastdiff sample --help`; 1: none. With --conditional."""
    eval_guidance_interval: tuple[float, float] | None = None
    """Guide only where LO < sigma / alpha <= HI; everywhere by default."""
    grid_samples: int = 64
    """Images in the sample grid; with --conditional, as many whole rows of one class each."""

    def __post_init__(self) -> None:
        check_words(self)
        for name in ("eval_every", "eval_batch_size", "eval_steps", "grid_samples"):
            at_least(1, name, getattr(self, name))
        at_least(2, "eval_samples", self.eval_samples)
        Guidance(self.eval_guidance, self.eval_guidance_interval, "eval_")
        if self.final_eval_samples is not None:
            at_least(2, "final_eval_samples", self.final_eval_samples)
        if self.feature_size is not None:
            at_least(1, "feature_size", self.feature_size)


@dataclass(frozen=True)
class RunConfig:
    """How long a run is, and what it leaves."""

    steps: int | None = None
    """Stop after this many steps; by default train until stopped (Ctrl-C saves)."""
    seed: int = 0
    """Seed of weights, data order, noise and evaluation samples; at least 0."""
    log_every: int = 100
    """Steps between metric rows; between them, saves and evaluations the host reads no value of the device."""
    save_every: int = 10_000
    """Steps between checkpoints."""
    keep_last: int = 3
    """Newest checkpoints to keep; the best by Frechet distance is kept as well."""
    profile: int = 0
    """Record this many steps in the middle of the run with torch.profiler into <run>/profile/; 0: none."""
    run_root: str = "working"
    """Folder in which the run directory is made; it is numbered upwards."""

    def __post_init__(self) -> None:
        check_words(self)
        for name, least in (("log_every", 1), ("save_every", 1), ("keep_last", 1), ("seed", 0), ("profile", 0)):
            at_least(least, name, getattr(self, name))
        if self.steps is not None:
            at_least(1, "steps", self.steps)


@dataclass(frozen=True)
class MachineConfig:
    """Where and how a run computes. These fields change its rounding, never its mathematics."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: cuda if there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Activations under autocast; weights stay float32. `auto`: bf16 on CUDA, fp32 on CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; `auto`: on for CUDA, off for CPU."""
    graphs: bool = True
    """Capture the training step and each sampling step in CUDA graphs; without effect on a CPU."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """GroupNorm+SiLU, Adam and EMA by our fused Triton kernels or by PyTorch; `auto`: triton on CUDA, torch on CPU."""
    deterministic: bool = False
    """On a GPU, only algorithms that give the same bits in every run, so that a resumed run is the unbroken one bit for
    bit; slower. A CPU always does."""
    rank_timeout: float = 600.0
    """Several ranks: seconds that one waits for another before all end; more than a batch of samples takes."""

    def __post_init__(self) -> None:
        check_words(self)
        positive(self, "rank_timeout")

    @property
    def warning(self) -> str | None:
        """A line on what was asked for, and is slower on a CPU; of a resolved config."""
        values = {"precision": "bf16", "kernels": "triton"}
        slow = [f"--{name} {value}" for name, value in values.items() if getattr(self, name) == value]
        if self.device != "cpu" or not slow:
            return None
        return f"{' and '.join(slow)} on a CPU: 1.6 to 1.9 times slower than what `auto` takes there."
