"""What a run is made of: frozen dataclasses, checked when they are built, and the table of presets."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastdiff.errors import UserError

SamplerName = Literal[
    "ddpm", "ddim", "euler", "heun", "euler-ancestral", "euler-maruyama", "predictor-corrector", "dpmpp-2m", "dpmpp-3m",
    "dpmpp-2m-sde", "unipc",
]  # fmt: skip
"""Names in fastdiff.diffusion.samplers.SAMPLERS."""
PresetName = Literal["ddpm-cifar10", "quick", "v-cosine", "edm", "flow", "score-vp", "score-ve"]
SpacingName = Literal["auto", "trailing", "leading", "uniform", "karras", "log-snr"]


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise UserError(f"--{name.replace('_', '-')} is {value!r}, but must be {expected}.")


def _at_least(least: int, name: str, value: int) -> None:
    _require(value >= least, name, value, f"at least {least}")
    _require(value < 2**63, name, value, "below 2^63")


DISCRETE_SCHEDULES = ("ddpm-linear", "cosine")
# What --schedule auto means for each objective: the one of its paper, or the baseline's.
AUTO_SCHEDULE = {
    "eps": "ddpm-linear", "x0": "ddpm-linear", "v": "ddpm-linear", "score": "vp-sde", "flow": "flow", "edm": "edm",
}  # fmt: skip


def task(objective: str, schedule: str, *, timesteps: int | None, zero_terminal_snr: bool) -> str:
    """What a network predicts of which process, in words; two networks with the same words mean the same."""
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

    def __post_init__(self) -> None:
        for name in ("image_size", "image_channels", "channels", "blocks_per_level", "norm_groups"):
            _at_least(1, name, getattr(self, name))
        mult = self.channel_mult
        _require(len(mult) >= 1 and min(mult) >= 1, "channel_mult", mult, "one or more positive integers")
        factor = 2 ** (len(mult) - 1)
        _require(
            self.image_size % factor == 0, "image_size", self.image_size, f"a multiple of {factor} ({len(mult)} levels)"
        )
        _require(
            self.channels % self.norm_groups == 0,
            "channels",
            self.channels,
            f"a multiple of --norm-groups ({self.norm_groups})",
        )
        resolutions = tuple(self.image_size // 2**level for level in range(len(mult)))
        for resolution in self.attention_resolutions:
            _require(
                resolution in resolutions, "attention_resolutions", self.attention_resolutions, f"among {resolutions}"
            )
        _require(
            self.channels % 2 == 0, "channels", self.channels, "even (the time embedding has sine and cosine halves)"
        )
        _require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")
        _require(0.0 < self.norm_eps < math.inf, "norm_eps", self.norm_eps, "a finite number above 0")


@dataclass(frozen=True)
class Config:
    """A training run. Every field is a flag of `train_cifar.py`; the defaults are the DDPM CIFAR-10 baseline."""

    preset: PresetName = "ddpm-cifar10"
    """Where the other fields' defaults come from."""

    data: str = "cifar10"
    """`cifar10`, `digits` (scikit-learn's; no download), or a path: a folder, tar or zip of images, or an .npz."""
    data_root: str = "data"
    """Folder for downloads and caches of decoded images."""
    split: Literal["train", "test"] = "train"
    """Which part of the data to train on."""
    loader: Literal["auto", "dali", "resident"] = "auto"
    """`dali`: NVIDIA DALI pipeline; `resident`: whole set on the device; `auto`: dali on CUDA, else resident."""
    flip: Literal["auto", "on", "off"] = "auto"
    """Mirror every other image at random; `auto`: on, but off for digits."""

    init_from: str | None = None
    """Start from the averaged weights of a network of the same shape, as step 0 of a new run: a run, a checkpoint, a
    folder of `export`, or the folder of a diffusers pipeline or UNet2DModel."""
    net: UNetConfig = field(default_factory=lambda: UNetConfig(dropout=0.1))

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

    batch_size: int = 128
    """Images in a step."""
    accumulate: int = 1
    """Parts of a batch that go through the network one after the other, to need less memory; the update is the same."""
    lr: float = 2e-4
    """Adam's learning rate after warm-up."""
    warmup_steps: int = 5000
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW's); 0 is plain Adam."""
    grad_clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    skip_nonfinite: int = 0
    """Steps in a row whose loss or gradient may be NaN or infinite: they are skipped and counted; one more stops."""
    ema_decay: float = 0.9999
    """Decay of the weights' exponential moving average, in [0, 1); 0 keeps no memory."""
    steps: int | None = None
    """Stop after this many steps; by default train until stopped (Ctrl-C saves)."""
    seed: int = 0
    """Seed of weights, data order, noise and evaluation samples; at least 0."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: cuda if there is one."""
    rank_timeout: float = 600.0
    """Several ranks: seconds that one waits for another in training before all end."""
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

    log_every: int = 100
    """Steps between metric rows; the only moments in which the host reads a value of the device."""
    save_every: int = 10_000
    """Steps between checkpoints."""
    eval_every: int = 10_000
    """Steps between evaluations (sample grid, trajectory, Frechet distance, plots); each also saves a checkpoint."""
    keep_last: int = 3
    """Newest checkpoints to keep; the best by Frechet distance is kept as well."""
    profile: int = 0
    """Record this many steps in the middle of the run with torch.profiler into <run>/profile/; 0: none."""
    run_root: str = "working"
    """Folder in which the run directory is made; it is numbered upwards."""

    features: Literal["auto", "inception", "efficientnet_lite0", "none"] = "auto"
    """Extractor of the Frechet distance; `auto`: inception if its weights are to be had; `none`: no distance."""
    feature_size: int | None = None
    """Input of efficientnet_lite0 in pixels; default 224 on CUDA, 64 on CPU."""
    eval_at_start: bool = False
    """Also evaluate before the first step."""
    eval_samples: int = 10_000
    """Samples of each Frechet distance during training."""
    eval_batch_size: int = 256
    """Images sampled at a time."""
    eval_sampler: SamplerName = "ddim"
    """Sampler of evaluations (ddim with eta = 0)."""
    eval_steps: int = 50
    """Sampling steps for each sample: network evaluations, but twice as many for heun and predictor-corrector."""
    grid_samples: int = 64
    """Images in the sample grid."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Config).items():
            if get_origin(hint) is Literal:
                _require(
                    getattr(self, name) in get_args(hint),
                    name,
                    getattr(self, name),
                    f"one of {', '.join(get_args(hint))}",
                )
            elif isinstance(getattr(self, name), str):
                _require(getattr(self, name).strip() != "", name, getattr(self, name), "a name or a path")
        _require(self.net.image_channels == 3, "image_channels", self.net.image_channels, "3, as all data are RGB")
        at_least = {
            "timesteps": 1, "batch_size": 1, "accumulate": 1, "warmup_steps": 0, "log_every": 1, "save_every": 1,
            "eval_every": 1, "keep_last": 1, "eval_samples": 2, "eval_batch_size": 1, "eval_steps": 1,
            "grid_samples": 1, "seed": 0, "profile": 0, "skip_nonfinite": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            _at_least(least, name, getattr(self, name))
        _require(self.batch_size < 2**31, "batch_size", self.batch_size, "below 2^31, as for DALI")
        _require(
            self.batch_size % self.accumulate == 0,
            "accumulate",
            self.accumulate,
            f"a divisor of --batch-size ({self.batch_size})",
        )
        for name in ("steps", "feature_size"):
            if getattr(self, name) is not None:
                _at_least(1, name, getattr(self, name))
        for name in ("lr", "grad_clip", "rank_timeout", "min_snr_gamma", "sigma_data"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "a finite number above 0")
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0"
        )
        _require(0.0 <= self.ema_decay < 1.0, "ema_decay", self.ema_decay, "in [0, 1)")
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Raises UserError where objective, schedule and sampling of times do not fit together."""
        schedule, auto = self.resolved_schedule, " (auto)" if self.schedule == "auto" else ""
        discrete = schedule in DISCRETE_SCHEDULES
        if discrete:
            _require(
                self.eval_steps <= self.timesteps,
                "eval_steps",
                self.eval_steps,
                f"at most --timesteps ({self.timesteps})",
            )
        if self.zero_terminal_snr and not discrete:
            raise UserError(
                f"--zero-terminal-snr rescales {' and '.join(DISCRETE_SCHEDULES)}, but --schedule is {schedule}{auto}; "
                "drop one of them."
            )
        if self.objective in ("eps", "score") and (self.zero_terminal_snr or schedule == "flow"):
            reason = "--zero-terminal-snr" if self.zero_terminal_snr else "--schedule flow"
            raise UserError(
                f"--objective {self.objective} cannot tell the image from pure noise, with which {reason} begins; "
                "choose x0, v, flow or edm, or drop it."
            )
        if self.time_sampling == "logit-normal" and schedule in ("ve-sde", "edm"):
            raise UserError(
                f"--time-sampling logit-normal needs a time in [0, 1], but that of --schedule {schedule}{auto} is "
                "sigma; choose log-normal, uniform or low-discrepancy."
            )

    @property
    def resolved_schedule(self) -> str:
        """The schedule, with `auto` resolved by the objective."""
        return AUTO_SCHEDULE[self.objective] if self.schedule == "auto" else self.schedule

    @property
    def task(self) -> str:
        """What the network is trained for; see the function `task`."""
        schedule = self.resolved_schedule
        timesteps = self.timesteps if schedule in DISCRETE_SCHEDULES else None
        words = task(self.objective, schedule, timesteps=timesteps, zero_terminal_snr=self.zero_terminal_snr)
        return f"{words}, sigma_data {self.sigma_data:g}" if self.objective == "edm" else words

    @property
    def flips(self) -> bool:
        """Whether images are mirrored at random, with `auto` resolved by the data."""
        return self.flip == "on" or (self.flip == "auto" and self.data != "digits")

    @property
    def diffusion(self) -> dict[str, Any]:
        """What `make_objective` needs, as its keyword arguments."""
        names = ("weighting", "timesteps", "zero_terminal_snr", "time_sampling", "min_snr_gamma", "sigma_data")
        options = {name: getattr(self, name) for name in names}
        return {"kind": self.objective, "schedule": self.resolved_schedule, **options}

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """Every field by its flag's name, the network's among them."""
        values = self.to_dict()
        return {**{name: value for name, value in values.items() if name != "net"}, **values["net"]}

    def changes(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """Fields that are not among RESUMABLE_CHANGES and differ: name -> their value in `other`, and here."""
        ours, theirs = ({**each.flat(), "flip": "on" if each.flips else "off"} for each in (self, other))
        return {
            name: (theirs[name], value)
            for name, value in ours.items()
            if value != theirs[name] and name not in RESUMABLE_CHANGES
        }

    def to_json(self) -> str:
        """The config as the text of a run's config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`. Raises UserError for a field that this version does not know."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        unknown += [
            f"net.{name}" for name in set(values.get("net", {})) - {f.name for f in dataclasses.fields(UNetConfig)}
        ]
        if unknown:
            raise UserError(f"config.json has fields that this version does not know: {', '.join(unknown)}.")
        values = dict(values)
        if "net" in values:
            net: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values["net"].items()}
            values["net"] = UNetConfig(**net)
        return cls(**values)


PRESETS: dict[str, Config] = {
    "ddpm-cifar10": Config(),
    "quick": Config(
        preset="quick",
        data="digits",
        net=UNetConfig(
            image_size=16,
            channels=16,
            channel_mult=(1, 4, 4),
            blocks_per_level=1,
            attention_resolutions=(8, 4),
            norm_groups=8,
        ),
        batch_size=64,
        lr=2e-3,
        warmup_steps=100,
        ema_decay=0.99,
        steps=850,
        log_every=25,
        save_every=425,
        eval_every=850,
        eval_at_start=True,
        eval_samples=200,
        eval_batch_size=200,
        # Of 16 samples after 600 steps, ddim left visible noise in about 6 and ddpm in none.
        eval_sampler="ddpm",
        eval_steps=100,
        features="efficientnet_lite0",
        sigma_data=0.75,  # digits have a mean of -0.38 and a standard deviation of 0.70
    ),
    "v-cosine": Config(preset="v-cosine", objective="v", schedule="cosine", eval_sampler="dpmpp-2m", eval_steps=25),
    "edm": Config(preset="edm", objective="edm", weighting="edm", eval_sampler="heun", eval_steps=18),
    "flow": Config(
        preset="flow",
        objective="flow",
        time_sampling="logit-normal",
        eval_sampler="heun",
        eval_steps=25,
    ),
    "score-vp": Config(preset="score-vp", objective="score", eval_sampler="dpmpp-2m", eval_steps=25),
    "score-ve": Config(preset="score-ve", objective="score", schedule="ve-sde", eval_sampler="heun", eval_steps=25),
}

# A resumed run may change these: none of them changes the mathematics of a step that is still to come. Whatever
# `accumulate`, an update is that of the whole batch, its times and its noise, up to rounding. Data may have another
# name or place, as their content is compared.
RESUMABLE_CHANGES = frozenset(
    {
        "steps", "log_every", "save_every", "eval_every", "keep_last", "eval_at_start", "eval_samples",
        "eval_batch_size", "eval_sampler", "eval_steps", "grid_samples", "features", "feature_size", "data",
        "data_root", "split", "loader", "device", "compile", "graphs", "kernels", "accumulate", "run_root", "profile",
        "skip_nonfinite", "rank_timeout", "deterministic",
    }
)  # fmt: skip
