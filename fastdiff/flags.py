"""The flags of `python -m fastdiff`: one dataclass a command, which evaluation/commands.py runs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdiff.config import Config
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.sections import (
    EvalConfig,
    ImagesConfig,
    MachineConfig,
    OptimConfig,
    PresetName,
    RunConfig,
    SamplerName,
    SpacingName,
)


@dataclass(frozen=True)
class Sampling:
    """The flags of every command that draws samples."""

    checkpoint: Path
    """A run directory (its newest checkpoint is taken), one checkpoint, e.g. working/1/checkpoints/step-10000, or a
    folder that `export --to safetensors` has written."""
    sampler: SamplerName = "ddim"
    """How samples are drawn."""
    steps: tuple[int, ...] = (50,)
    """Steps for each sample: network evaluations, but twice as many for heun and predictor-corrector. At least 1, and
    for the schedules ddpm-linear and cosine at most their T (1000). With several, such as 1 2 4: all from the same
    noise, a row of pictures each, or a line each."""
    eta: float = 0.0
    """ddim only: fresh noise in each step, from 0 (deterministic) to 1 (as much as ddpm)."""
    spacing: SpacingName = "auto"
    """Where the steps lie: `trailing`, `leading` or `uniform` in time, `karras` (rho = 7), `log-snr`, `few-step`;
    `auto`: the schedule's own, but few-step for sampler consistency."""
    last_level: float | None = None
    """sigma / alpha at which the last step of spacing few-step starts; default: the run's."""
    options: tuple[str, ...] = ()
    """Other options of the sampler as NAME=VALUE: unipc order; euler and heun S_churn, S_tmin, S_tmax, S_noise;
    euler-ancestral eta; predictor-corrector snr, corrector_steps; ddpm variance."""
    seed: int = 0
    """The same seed, n, batch size and machine give the same images."""
    batch_size: int = 256
    """Images drawn at a time; bounds the memory."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: cuda if there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Activations of the network; `auto`: bf16 on CUDA, fp32 on CPU."""
    compile: Literal["on", "off"] = "off"
    """torch.compile the network, at its first evaluation: slower to start, for many samples."""
    graphs: bool = True
    """Capture a sampling step in a CUDA graph and replay it; without effect on a CPU."""
    guide: Path | None = None
    """An earlier checkpoint, of the same run, say, from which guidance leads away (autoguidance); by default guidance
    leads away from what the network itself draws when nothing is asked for."""
    autoencoder: Path | None = None
    """Of a run with --latents: where its autoencoder lies, if it has moved."""


@dataclass(frozen=True)
class Sample(Sampling):
    """Draw images from a trained network into a grid, and if asked into an .npz."""

    n: int | None = None
    """Images to draw; default: 64, or 8 of each class or prompt; with several --steps 8, or 1 of each."""
    classes: tuple[str, ...] = ()
    """Of a conditional run: classes to draw, a row each, by name, by number, or `all`, the default without --text."""
    prompt: tuple[str, ...] = ()
    """Of a run with --text: what to draw, a row each."""
    prompt_file: Path | None = None
    """A file of prompts, one a line."""
    per_class: int | None = None
    """Images of each class or prompt, in place of --n."""
    guidance: float = 1.0
    """w in x0_hat = x0_other + w (x0_asked - x0_other): 1 as the network draws by itself, 0 as if nothing was asked
    for, above 1 more typical of the class or prompt. Ho & Salimans count it from 0: their w is this one minus 1."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where LO < sigma / alpha <= HI, such as 0.2 1.5; everywhere by default."""
    out: Path = Path("samples.png")
    """The grid, a .png or .jpg; of more than 1,024 images it shows the first 1,024."""
    save_npz: Path | None = None
    """Also write all images here: `images`, uint8 (n, H, W, C), and of a conditional run `labels`, int64 (n,), or
    `prompts`, in the same order."""


@dataclass(frozen=True)
class Evaluate(Sampling):
    """Measure the Frechet distance of a trained network: one JSON line on stdout, and a row in the run's
    metrics where they can be written."""

    n: int = 10_000
    """Samples to draw, as many of each class; published FIDs use 50,000."""
    guidance: tuple[float, ...] = (1.0,)
    """Guidance scales w to measure, a row each; with several, saves/guidance.png shows the distance against w, and
    --steps is one number."""
    interval: tuple[str, ...] = ("off",)
    """Levels of sigma / alpha at which to guide, as LO,HI, each with every scale; `off`: at all levels."""
    features: Literal["auto", "inception", "efficientnet_lite0"] = "auto"
    """Extractor: inception gives `fid`; `auto` takes it if its weights are available."""
    feature_size: int | None = None
    """Input of efficientnet_lite0 in pixels; default 224 on CUDA, 64 on CPU."""
    data: str | None = None
    """Reference images; default: what the run was trained on."""
    data_root: str | None = None
    """Folder for downloads and caches; default: the run's."""


@dataclass(frozen=True)
class Likelihood:
    """Estimate how likely a trained network finds images: one JSON line, in bits per dimension (lower is likelier)."""

    checkpoint: Path
    """A run directory (its newest checkpoint is taken), one checkpoint, or a folder of `export --to safetensors`."""
    n: int = 256
    """Images to measure, drawn at random; at least 2."""
    steps: int = 50
    """Steps of the probability-flow ODE, each 4 evaluations of the network and as many backward passes."""
    probes: int = 1
    """Random vectors of the estimate of the divergence for each image; its error falls as 1 / sqrt(probes)."""
    seed: int = 0
    """Of the images drawn, the dequantisation and the probes."""
    batch_size: int = 64
    """Images at a time; bounds the memory."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: cuda if there is one. Computed in float32 either way."""
    data: str | None = None
    """Images; default: what the run was trained on."""
    data_root: str | None = None
    """Folder for downloads and caches; default: the run's."""
    split: Literal["train", "test"] | None = None
    """Part of the data; default: the run's."""
    autoencoder: Path | None = None
    """Of a run with --latents: where its autoencoder lies, if it has moved."""


@dataclass(frozen=True)
class Export:
    """Write a trained network's averaged weights for other programs."""

    checkpoint: Path
    """A run directory (its newest checkpoint is taken), one checkpoint, or a folder of `export --to safetensors`."""
    out: Path
    """Folder to write, which must be new or empty."""
    to: Literal["diffusers", "safetensors"] = "diffusers"
    """`diffusers`: a folder for DDPMPipeline.from_pretrained, of an autoencoder for AutoencoderKL.from_pretrained;
    `safetensors`: our weights and config.json."""
    autoencoder: Path | None = None
    """Of a run with --latents: where its autoencoder lies, if it has moved."""


@dataclass(frozen=True)
class Show:
    """Print a network's parts: resolution, channels, parameters, and floating-point operations an image."""

    preset: PresetName = "ddpm-cifar10"
    """Whose network."""
    code: bool = False
    """Print what the network runs with --kernels triton instead: layers, kernels and parameters, a call a line."""


@dataclass(frozen=True)
class Autoencoder:
    """Train an autoencoder, in whose latents `train_cifar.py --latents RUN` then trains."""

    preset: PresetName
    """`autoencoder`, or `quick-autoencoder` for digits on a CPU: where the other fields' defaults come from."""
    image_size: int
    """Height and width of the images, in pixels; a multiple of --factor, and of twice --factor with --equivariance."""
    autoencoder: AutoencoderConfig
    images: ImagesConfig
    optim: OptimConfig
    eval: EvalConfig
    run: RunConfig
    machine: MachineConfig
    resume: Path | None = None
    """Continue this run (e.g. working/1) from its newest checkpoint; its own config is the default of every flag."""

    @classmethod
    def of(cls, config: Config) -> "Autoencoder":
        """The flags of a config of an autoencoder."""
        return cls(
            config.preset, config.pixels, config.autoencoder, config.images, config.optim, config.eval, config.run,
            config.machine,
        )  # fmt: skip

    def over(self, config: Config) -> Config:
        """The config with these flags."""
        return config.replace(
            preset=self.preset, image_size=self.image_size, autoencoder=self.autoencoder, images=self.images,
            optim=self.optim, eval=self.eval, run=self.run, machine=self.machine,
        )  # fmt: skip


COMMANDS: dict[str, Callable[..., object]] = {
    "sample": Sample,
    "evaluate": Evaluate,
    "likelihood": Likelihood,
    "export": Export,
    "show": Show,
}
