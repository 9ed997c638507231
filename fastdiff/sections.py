"""The sections of a config that say how a run learns: images, optimizer, evaluations, the run and the machine.

Frozen dataclasses, each with its flags and the rules about them; `model_sections.py` says what is learned.
"""

import math
from dataclasses import dataclass
from typing import Literal

from fastdiff.checks import at_least, check_words, positive, require
from fastdiff.model_sections import check_guidance

SamplerName = Literal[
    "ddpm", "ddim", "euler", "heun", "euler-ancestral", "euler-maruyama", "predictor-corrector", "dpmpp-2m", "dpmpp-3m",
    "dpmpp-2m-sde", "unipc", "consistency", "flow-map",
]  # fmt: skip
"""Names in fastdiff.diffusion.samplers.SAMPLERS."""
PresetName = Literal[
    "ddpm-cifar10", "cifar10-conditional", "quick", "quick-latent", "text-digits", "emoji-16", "emoji",
    "quick-consistency", "quick-tuning", "text-consistency", "consistency-cifar10", "stages-cifar10", "distil-cifar10",
    "flow-map-cifar10", "autoencoder", "quick-autoencoder", "v-cosine", "edm", "flow", "score-vp", "score-ve",
]  # fmt: skip
SpacingName = Literal["auto", "trailing", "leading", "uniform", "karras", "log-snr", "few-step"]


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
        plain = self.data not in ("digits", "digits-captioned", "openmoji")
        return self.flip == "on" or (self.flip == "auto" and plain)


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
    beta2: float = 0.999
    """Decay of the optimizer's mean of squared gradients, in (0, 1); a run of few steps may want it lower."""
    grad_clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    skip_nonfinite: int = 0
    """Steps in a row whose loss or gradient may be NaN or infinite: they are skipped and counted; one more stops."""
    ema_decay: float = 0.9999
    """Decay of the weights' exponential moving average, in [0, 1); 0 keeps no memory."""

    def __post_init__(self) -> None:
        check_words(self)
        at_least(1, self, "batch_size", "accumulate")
        at_least(0, self, "warmup_steps", "skip_nonfinite")
        require(self.batch_size < 2**31, "batch_size", self.batch_size, "below 2^31, as for DALI")
        divides = f"a divisor of --batch-size ({self.batch_size})"
        require(self.batch_size % self.accumulate == 0, "accumulate", self.accumulate, divides)
        positive(self, "lr", "grad_clip")
        decay = self.weight_decay
        require(math.isfinite(decay) and decay >= 0, "weight_decay", decay, "at least 0")
        adam = self.optimizer == "adam"  # at 2/3 and below RAdam would never adapt
        expected = "in (0, 1)" if adam else "above 2/3 and below 1, as --optimizer radam needs"
        require((0.0 if adam else 2 / 3) < self.beta2 < 1.0, "beta2", self.beta2, expected)
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
    eval_few_steps: tuple[int, ...] = ()
    """Also measure the sampler consistency, or flow-map, in each of these numbers of steps, such as 1 2 4, without
    guidance."""
    eval_guidance: float = 1.0
    """Guidance scale w of evaluations with --conditional or --text, see `python -m fastdiff sample --help`; 1: none."""
    eval_guidance_interval: tuple[float, float] | None = None
    """Guide only where LO < sigma / alpha <= HI; everywhere by default."""
    grid_samples: int = 64
    """Images in the sample grid; with --conditional, as many whole rows of one class each."""

    def __post_init__(self) -> None:
        check_words(self)
        at_least(1, self, "eval_every", "eval_batch_size", "eval_steps", "grid_samples", "eval_few_steps")
        at_least(2, self, "eval_samples")
        if self.final_eval_samples is not None:
            at_least(2, self, "final_eval_samples")
        if self.feature_size is not None:
            at_least(1, self, "feature_size")
        check_guidance(self.eval_guidance, self.eval_guidance_interval, "eval_")


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
        at_least(1, self, "log_every", "save_every", "keep_last")
        at_least(0, self, "seed", "profile")
        if self.steps is not None:
            at_least(1, self, "steps")


@dataclass(frozen=True)
class MachineConfig:
    """Where and how a run computes. These fields change its rounding, never its mathematics."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: cuda if there is one."""
    precision: Literal["auto", "bf16", "tf32", "fp32", "staged"] = "auto"
    """Of the training step, whose weights stay float32: activations in bf16 by autocast; products of a GPU rounded to
    TF32; neither; `staged`, with --few-step: the coarsest in which rounding does not drown the steps of each stage.
    `auto`: bf16 on CUDA, fp32 on CPU and with --few-step. Evaluations of tf32 and staged runs draw in float32."""
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
        slow = [f"--precision {self.precision}"] if self.precision in ("bf16", "staged") else []
        slow += ["--kernels triton"] if self.kernels == "triton" else []
        if self.device != "cpu" or not slow:
            return None
        return f"{' and '.join(slow)} on a CPU: 1.6 to 1.9 times slower than what `auto` takes there."
