"""`python -m fastdiff {sample,evaluate,likelihood,export,show}`, installed `fastdiff`: use what a run has saved."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import tyro

from fastdiff.config import PRESETS, PresetName, SamplerName, SpacingName
from fastdiff.errors import TrainingFailed, UsageError, UserError
from fastdiff.runtime import output

NARROWEST = 20  # columns in which --help is set; in 3 it would never end
MEMORY = re.compile("out of memory|allocate|Storage size")  # how PyTorch and NumPy say that it does not suffice
OTHER_RANKS_WAIT = 5.0  # seconds in which another rank tells the mistake that all have found: torchrun ends all by one

# torch takes seconds to import, which --help and a mistyped flag need not wait for: the commands import what they use.


def other_rank() -> bool:
    """Whether torchrun has started this process beside the one that tells this host's users of their mistakes."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


@contextmanager
def told_once() -> Generator[None]:
    """Nothing of what the block prints is shown by another rank, which then waits a moment before it exits."""
    if not other_rank():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except SystemExit:
            time.sleep(OTHER_RANKS_WAIT)
            raise


def run_command(command: Callable[[], int]) -> int:
    """Run a command; a mistake or a failed run becomes one line on stderr and the exit code 1, or 2 for a bad flag."""
    output.spare()
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)

    def checked() -> int:
        _refuse_blanks(sys.argv[1:])
        return command()

    try:
        return _recorded(checked)() if "TORCHELASTIC_ERROR_FILE" in os.environ else checked()
    except Exception as error:
        message = _told(error)
        if message is None:
            raise
        if not (other_rank() and isinstance(error, UserError)):
            print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _recorded(command: Callable[[], int]) -> Callable[[], int]:
    """The command, whose failure torchrun's summary tells: by the line for the user, or by the traceback of a bug."""
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

    class Handler(ErrorHandler):
        def record_exception(self, e: BaseException) -> None:
            if other_rank() and isinstance(e, UserError):
                time.sleep(OTHER_RANKS_WAIT)
            message = _told(e)
            if message is None:
                super().record_exception(e)
            else:  # torchrun shows it where there is no "py_callstack"
                summary = {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}
                Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": summary}))

    recorded = record(command, Handler())
    return lambda: recorded() or 0  # None: SystemExit(0), as of --help


def _told(error: BaseException) -> str | None:
    """The line to tell of what the user or the machine did wrong; None for an error of ours."""
    if isinstance(error, UserError | TrainingFailed):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError | RuntimeError) and MEMORY.search(str(error)):
        reason = " ".join(str(error).split("\n")[0].split())
        return (
            f"not enough memory ({reason}); lower --batch-size, --eval-batch-size or --timesteps, or raise --accumulate"
        )
    return None


def _refuse_blanks(arguments: list[str]) -> None:
    """No flag means anything by an empty value, least of all its default or the current folder."""
    for before, argument in pairwise(["an argument", *arguments]):
        flag, equals, value = argument.partition("=") if argument.startswith("--") else (before, "=", argument)
        if equals and not value.strip():
            raise UsageError(f"{flag} is empty ({value!r}), perhaps by a variable that is not set; give a value.")


@dataclass(frozen=True)
class _FromCheckpoint:
    """What every command that draws samples needs to know."""

    checkpoint: Path
    """A run directory (its newest checkpoint is taken), one checkpoint, e.g. working/1/checkpoints/step-10000, or a
    folder that `export --to safetensors` has written."""
    sampler: SamplerName = "ddim"
    """How samples are drawn."""
    steps: int = 50
    """Steps for each sample: network evaluations, but twice as many for heun and predictor-corrector. At least 1, and
    for the schedules ddpm-linear and cosine at most their T (1000)."""
    eta: float = 0.0
    """ddim only: fresh noise in each step, from 0 (deterministic) to 1 (as much as ddpm)."""
    spacing: SpacingName = "auto"
    """Where the steps lie: `trailing`, `leading` or `uniform` in time, `karras` (rho = 7), `log-snr`; `auto`: the
    schedule's own."""
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


@dataclass(frozen=True)
class Sample(_FromCheckpoint):
    """Draw images from a trained network into a grid, and if asked into an .npz."""

    n: int = 64
    """Images to draw."""
    out: Path = Path("samples.png")
    """The grid, a .png or .jpg; of more than 1,024 images it shows the first 1,024."""
    save_npz: Path | None = None
    """Also write all images here: `images`, uint8 (n, H, W, C)."""

    def run(self) -> int:
        """Returns 0. Raises UserError for bad input."""
        from fastdiff.evaluation import commands

        commands.sample(**vars(self))
        return 0


@dataclass(frozen=True)
class Evaluate(_FromCheckpoint):
    """Measure the Frechet distance of a trained network: one JSON line on stdout, and a row in the run's
    metrics where they can be written."""

    n: int = 10_000
    """Samples to draw; published FIDs use 50,000."""
    features: Literal["auto", "inception", "efficientnet_lite0"] = "auto"
    """Extractor: inception gives `fid`; `auto` takes it if its weights are to be had."""
    feature_size: int | None = None
    """Input of efficientnet_lite0 in pixels; default 224 on CUDA, 64 on CPU."""
    data: str | None = None
    """Reference images; default: what the run was trained on."""
    data_root: str | None = None
    """Folder for downloads and caches; default: the run's."""

    def run(self) -> int:
        """Returns 0. Raises UserError for bad input."""
        from fastdiff.evaluation import commands

        output.put(json.dumps(commands.measure(**vars(self))))
        return 0


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

    def run(self) -> int:
        """Returns 0. Raises UserError for bad input."""
        from fastdiff.evaluation import commands

        output.put(json.dumps(commands.likelihood(**vars(self))))
        return 0


@dataclass(frozen=True)
class Export:
    """Write a trained network's averaged weights for other programs."""

    checkpoint: Path
    """A run directory (its newest checkpoint is taken), one checkpoint, or a folder of `export --to safetensors`."""
    out: Path
    """Folder to write, which must be new or empty."""
    to: Literal["diffusers", "safetensors"] = "diffusers"
    """`diffusers`: a folder for DDPMPipeline.from_pretrained; `safetensors`: our weights and config.json."""

    def run(self) -> int:
        """Returns 0. Raises UserError for bad input."""
        from fastdiff.evaluation import commands

        commands.export(**vars(self))
        return 0


@dataclass(frozen=True)
class Show:
    """Print a network's parts: resolution, channels, parameters, and floating-point operations an image."""

    preset: PresetName = "ddpm-cifar10"
    """Whose network."""
    code: bool = False
    """Print what the network runs with --kernels triton instead: layers, kernels and parameters, a call a line."""

    def run(self) -> int:
        """Returns 0."""
        from fastdiff.nets.fuse import fuse
        from fastdiff.nets.graph import program
        from fastdiff.nets.show import table
        from fastdiff.nets.unet import UNet

        config = PRESETS[self.preset].net
        net = UNet(config)
        size = {"image_size": config.image_size, "image_channels": config.image_channels}
        print(program(fuse(net)) if self.code else table(net, **size), end="")
        return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse `python -m fastdiff ...` and run the command; returns the exit code."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"sample": Sample, "evaluate": Evaluate, "likelihood": Likelihood, "export": Export, "show": Show},
        description="Use what a training run has saved. Train by `python train_cifar.py`, installed: `fastdiff-train`.",
        prog="fastdiff" if Path(sys.argv[0]).name == "fastdiff" else "python -m fastdiff",
        args=arguments,
    )
    return command.run()
