"""Where the time goes: `python profiles/capture.py train|sample|kernels [--preset NAME] [--any-config-field VALUE]`.

Writes trace.json.gz, summary.md and time.png into profiles/<device>/<topic>/.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # `kernels` must be this repository's
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # before torch: on a CPU the profiler complains of a missing GPU

# ruff: noqa: E402
import tyro

from fastdiff.cli import run_command
from fastdiff.config import Config
from fastdiff.errors import UserError
from fastdiff.words import counted
from train_cifar import defaults

if TYPE_CHECKING:
    import torch

# torch takes seconds to import, which --help and a mistyped flag need not wait for: the commands import what they use.


@dataclass(frozen=True)
class _Topic:
    config: Config
    out: Path | None = None
    """Folder to write; default profiles/<device>/<command>-<preset>."""

    def __post_init__(self) -> None:
        if self.config.run.profile < 1:
            raise UserError(f"--profile is {self.config.run.profile}, but a capture records at least 1 step.")

    def directory(self, command: str) -> Path:
        """Where the files go."""
        from fastdiff.runtime.device import device_name, resolve_device, slug

        device = slug(device_name(resolve_device(self.config.machine.device)))
        return self.out or REPO / "profiles" / device / f"{command}-{self.config.preset}"


@dataclass(frozen=True)
class Train(_Topic):
    """Training steps: the loop, loader and step of train_cifar.py, without evaluations. --profile: how many.

    A replay has no ranges and no shapes, so a step that is captured is recorded once more uncaptured, for its tables.
    """

    def run(self) -> int:
        """Returns the exit code. Raises UserError for bad input."""
        from fastdiff.reporting.profile_report import append_uncaptured
        from fastdiff.reporting.profiling import analyse, read_trace
        from fastdiff.runtime.device import resolve_device

        directory = self.directory("train")
        with tempfile.TemporaryDirectory() as folder:
            code = _train(self.config, folder)
            if code != 0:
                return code
            shutil.copytree(Path(folder) / "1" / "profile", directory, dirs_exist_ok=True)
            if self.config.machine.graphs and resolve_device(self.config.machine.device).type == "cuda":
                code = _train(self.config.replace(graphs=False), folder)
                if code != 0:
                    return code
                append_uncaptured(directory, analyse(read_trace(Path(folder) / "2" / "profile" / "trace.json.gz")))
        print(f"wrote {directory}")
        return 0


def _train(config: Config, folder: str) -> int:
    """Just enough training for a profile, as the next run in `folder`; returns the exit code."""
    from fastdiff.reporting.recording import LEAD, steps_needed
    from fastdiff.training.train import train

    never = 10**9
    return train(
        config.replace(
            steps=LEAD + steps_needed(config.run.profile), lr_decay="constant", run_root=folder, features="none",
            eval_at_start=False, save_every=never, eval_every=never, eval_steps=1, grid_samples=1,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Sample(_Topic):
    """Batches of samples, drawn as in evaluations from a new network's weights. --profile: how many."""

    def run(self) -> int:
        """Returns 0. Raises UserError for bad input."""
        import torch

        from fastdiff.diffusion.objectives import make_objective
        from fastdiff.diffusion.plan import evaluations
        from fastdiff.evaluation.generate import Generator, SamplerSettings
        from fastdiff.nets.fuse import fuse
        from fastdiff.nets.unet import UNet
        from fastdiff.reporting.recording import LEAD, StepRecorder, steps_needed
        from fastdiff.runtime.device import resolve_device, set_backends

        device = resolve_device(self.config.machine.device)
        config, net = self.config.resolved(device.type), self.config.net
        bf16, compiles = config.machine.precision == "bf16", config.machine.compile == "on"
        cuda = device.type == "cuda"
        lead = LEAD if cuda else 1
        kernels = config.machine.kernels
        set_backends(device)
        torch.manual_seed(config.run.seed)
        model = UNet(net).to(device).requires_grad_(False).eval()
        model = fuse(model) if kernels == "triton" else model
        objective = make_objective(**config.diffusion.arguments)
        batch, steps = config.eval.eval_batch_size, config.eval.eval_steps
        settings = SamplerSettings(config.eval.eval_sampler, steps)
        generator = Generator(
            model, objective, settings, shape=(net.image_channels, net.image_size, net.image_size),
            batch_size=batch, device=device, bf16=bf16, compile=compiles, graphs=config.machine.graphs,
        )  # fmt: skip
        batches = generator.batches((lead + steps_needed(config.run.profile)) * batch, seed=config.run.seed)
        facts = {
            "step": f"a batch of {batch}, {settings.label}, {counted(evaluations(generator.plan), 'evaluation')}",
            "precision": "bf16 autocast, bf16 weights" if bf16 else "float32",
            "compile": "torch.compile" if compiles else "off",
            "graphs": "a CUDA graph of the sampling step" if config.machine.graphs and cuda else "off",
            "kernels": kernels,
            "network": f"U-Net, {sum(p.numel() for p in model.parameters()):,} parameters",
        }
        recorder = StepRecorder(
            self.directory("sample"), steps=config.run.profile, begin=lead, device=device,
            title=f"Sampling, preset {config.preset}", facts=facts,
        )  # fmt: skip
        with recorder:
            for i, _ in enumerate(batches, start=1):
                recorder.after_step(i)
        print(f"wrote {recorder.directory}")
        return 0


@dataclass(frozen=True)
class Kernels(_Topic):
    """Our kernels by themselves, on the shapes of the preset's network and batch. --profile: passes to record."""

    def run(self) -> int:
        """Returns 0. Raises UserError for bad input."""
        from fastdiff.reporting.recording import LEAD, StepRecorder, steps_needed
        from fastdiff.runtime.device import resolve_device, set_backends

        device = resolve_device(self.config.machine.device)
        config = self.config.resolved(device.type)
        set_backends(device)
        bf16 = config.machine.precision == "bf16"
        calls, shapes = _kernel_calls(config, device, bf16=bf16)
        facts = {
            "step": f"group_norm_silu and add_group_norm_silu (of a residual) forward and backward at (N, C, H, W) = "
            f"{shapes}, merge_columns at the last level with attention, adam_ema_ and ema_update_ over all parameters",
            "precision": "bf16 activations" if bf16 else "float32",
        }
        recorder = StepRecorder(
            self.directory("kernels"), steps=config.run.profile, begin=LEAD, device=device,
            title=f"Our kernels, preset {config.preset}", facts=facts,
        )  # fmt: skip
        with recorder:
            for i in range(1, LEAD + steps_needed(config.run.profile) + 1):
                for call in calls:
                    call()
                recorder.after_step(i)
        print(f"wrote {recorder.directory}")
        return 0


def _kernel_calls(config: Config, device: "torch.device", *, bf16: bool) -> tuple[list[Callable[[], object]], str]:
    """A call for each kernel and level of the network, over buffers that are made here; and the shapes of the norms."""
    import torch
    from torch.profiler import record_function

    from fastdiff.nets.unet import UNet
    from kernels import adam_ema_, add_group_norm_silu, ema_update_, group_norm_silu, merge_columns

    net, dtype = config.net, torch.bfloat16 if bf16 else torch.float32
    levels = [(net.channels * mult, side) for mult, side in zip(net.channel_mult, net.resolutions, strict=True)]

    def norm(channels: int, side: int, *, add: bool) -> Callable[[], object]:
        shape = (config.optim.batch_size, channels, side, side)
        x, residual, dy, du, du2 = (
            torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last) for _ in range(5)
        )  # fmt: skip
        weight, bias = (torch.ones(channels, device=device, requires_grad=True) for _ in range(2))
        leaves = (x.requires_grad_(), weight, bias)

        def call() -> object:
            with record_function("forward"):
                if add:
                    results = add_group_norm_silu(x, weight, bias, net.norm_groups, residual=residual)
                else:
                    results = (group_norm_silu(x, weight, bias, net.norm_groups),)
            with record_function("backward"):
                return torch.autograd.grad(results, leaves, (dy, du, du2)[: len(results)])

        return call

    attention = [(c, side) for c, side in levels if side in net.attention_resolutions] or levels[-1:]
    channels, side = attention[-1]
    thirds = [torch.randn(config.optim.batch_size, side**2, channels, device=device).to(dtype) for _ in range(3)]

    def merge() -> object:
        with record_function("backward"):
            return merge_columns(*thirds)

    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet(net).parameters())
    param, grad, exp_avg, exp_avg_sq, average = (torch.zeros(parameters, device=device) for _ in range(5))
    half = torch.zeros_like(param, dtype=dtype) if bf16 else None
    step, lr, decay, clip = (torch.full((), v, dtype=torch.float64, device=device) for v in (1, 2e-4, 0.9999, 1.0))

    def adam() -> None:
        with record_function("optimizer"):
            adam_ema_(param, grad, exp_avg, exp_avg_sq, average, half, step=step, lr=lr, decay=decay, clip=clip)

    def ema() -> None:
        with record_function("ema"):
            ema_update_(average, param, decay)

    shapes = ", ".join(f"({config.optim.batch_size}, {c}, {side}, {side})" for c, side in levels)
    norms = [norm(c, side, add=add) for add in (False, True) for c, side in levels]
    return [*norms, merge, adam, ema], shapes


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = defaults(arguments).replace(profile=5)
    few = config.replace(eval_sampler="ddim", eval_steps=5, eval_batch_size=min(config.eval.eval_batch_size, 64))
    commands = {"train": Train(config), "sample": Sample(few), "kernels": Kernels(config)}
    command = tyro.cli(
        tyro.extras.subcommand_type_from_defaults(
            commands, descriptions={name: command.__doc__ or "" for name, command in commands.items()}
        ),
        args=arguments, prog="python profiles/capture.py",
        description=__doc__, config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )  # fmt: skip
    return command.run()


if __name__ == "__main__":
    sys.exit(run_command(main))
