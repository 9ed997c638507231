"""The commands of `python -m fastdiff`: one function for each dataclass of flags. All raise UserError for bad input."""

import json
import sys
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.config import Config
from fastdiff.data.cache import cache_folder
from fastdiff.data.datasets import ImageSet, load_dataset
from fastdiff.diffusion.likelihood import bits_per_dim, dequantize, likelihood_grid, log_likelihood
from fastdiff.errors import UsageError, UserError
from fastdiff.evaluation.evaluate import Trained, load_trained
from fastdiff.evaluation.evaluate import evaluate as measure
from fastdiff.evaluation.features import make_extractor
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.evaluation.generate import Generator, SamplerSettings, parse_options
from fastdiff.flags import Evaluate, Export, Likelihood, Sample, Sampling, Show
from fastdiff.interop import save_diffusers_pipeline
from fastdiff.nets.fuse import fuse
from fastdiff.nets.graph import program
from fastdiff.nets.unet import UNet
from fastdiff.presets import PRESETS
from fastdiff.reporting import pictures
from fastdiff.reporting.progress import bar
from fastdiff.runs.data import load_run_data
from fastdiff.runs.files import write_atomically
from fastdiff.runs.outputs import check_output, complete_folder, is_empty_folder, npz_writer
from fastdiff.runs.run import json_text, open_run
from fastdiff.runtime import output
from fastdiff.runtime.device import resolve_device, set_backends

GRID_LIMIT = 1024


def _trained(flags: Sampling) -> tuple[Trained, Generator]:
    """The network of a checkpoint, and what draws from it. Raises UserError for bad input."""
    _check_seed(flags.seed)
    options = parse_options(flags.sampler, flags.options)
    settings = SamplerSettings(flags.sampler, flags.steps, flags.eta, flags.spacing, options)
    device = resolve_device(flags.device)
    set_backends(device)
    trained = load_trained(flags.checkpoint, device=device)
    machine = trained.config.replace(device=device.type, precision=flags.precision).resolved(device.type).machine
    if machine.warning:
        print(f"warning: {machine.warning}", file=sys.stderr)
    generator = trained.generator(
        settings, batch_size=flags.batch_size, device=device, bf16=machine.precision == "bf16",
        compile=flags.compile == "on", graphs=flags.graphs,
    )  # fmt: skip
    return trained, generator


def sample(flags: Sample) -> None:
    """Draw images into the grid `out`, and into `save_npz`; both appear only when they are complete."""
    n, out, save_npz = flags.n, flags.out, flags.save_npz
    if save_npz is not None and save_npz.resolve() == out.resolve():
        raise UsageError(f"--out and --save-npz are both {out}, and one would replace the other; name two files.")
    if out.suffix.lower() == ".npz":
        raise UsageError(f"--out {out} is for the grid, a picture; write the images by --save-npz {out}.")
    pictures.image_format(out)
    for path in filter(None, (out, save_npz)):
        check_output(path)
    trained, generator = _trained(flags)
    c, height, width = generator.image_shape
    shown: list[np.ndarray] = []
    with bar("sampling", n) as show, npz_writer(save_npz, (n, height, width, c)) as write:
        for images in generator.batches(n, seed=flags.seed, progress=show):
            array = _nhwc(images)
            write(array)
            if sum(map(len, shown)) < GRID_LIMIT:
                shown.append(array)
    pictures.save_grid(np.concatenate(shown)[:GRID_LIMIT], out)
    label, steps = generator.settings.label, generator.settings.steps
    print(f"{out}: {min(n, GRID_LIMIT):,} of {n:,} images by {label}, {steps} steps, from {trained.path}")


def evaluate(flags: Evaluate) -> None:
    """Print the Frechet distance of n samples as a JSON line, and add it to the run if the checkpoint lies in one."""
    if flags.n < 2:
        raise UsageError(f"--n is {flags.n}, but a Frechet distance needs at least 2 samples.")
    trained, generator = _trained(flags)
    config = _at(trained.config, flags.data_root)
    reference = _images(config, trained, flags.data)
    print(f"data       {reference.describe()}", file=sys.stderr)
    extractor = make_extractor(flags.features, device=generator.device, size=flags.feature_size)
    folder = cache_folder(config.images.data_root)
    distance = FrechetDistance(extractor, reference, cache_dir=folder, device=generator.device)
    row, _ = measure(generator, distance, n=flags.n, seed=flags.seed, keep=1)
    images = trained.step * config.optim.batch_size
    row = {"step": trained.step, "images": images, **row, "checkpoint": trained.path.name}
    _record(trained, row)
    output.put(json.dumps(row))


def _record(trained: Trained, row: dict[str, Any]) -> None:
    """Add an evaluation to the checkpoint's run; a run that cannot be written to, or is in use, stays as it is."""
    from fastdiff.reporting import plots  # with Matplotlib, which the other commands need not wait for

    if trained.run is None:
        print(f"{trained.path} lies in no run, so that the row is not recorded", file=sys.stderr)
        return
    try:
        with open_run(trained.run) as run:
            run.log_eval(row)
            plots.plot_distance(run.eval_rows(), run.saves / "fid.png")
    except (UserError, OSError) as error:
        print(f"not recorded in the run: {error}", file=sys.stderr)


def likelihood(flags: Likelihood) -> None:
    """Print the bits per dimension of n random images, by the probability flow in float32: mean and standard error."""
    _check_seed(flags.seed)
    for name, least in (("n", 2), ("steps", 2), ("probes", 1), ("batch_size", 1)):
        if getattr(flags, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(flags, name)}, but must be at least {least}.")
    device, n = resolve_device(flags.device), flags.n
    set_backends(device)
    trained = load_trained(flags.checkpoint, device=device)
    schedule = trained.objective.schedule
    images = _images(_at(trained.config, flags.data_root), trained, flags.data, flags.split)
    if len(images.images) < n:
        raise UsageError(f"--n is {n}, but {images.name} has {len(images.images)} images.")
    print(f"data       {images.describe()}", file=sys.stderr)
    chosen = images.draw(n, seed=flags.seed)
    network = trained.network.requires_grad_(False)
    generator = torch.Generator(device).manual_seed(flags.seed)
    ts = likelihood_grid(schedule, flags.steps)
    bits: list[Tensor] = []
    with bar("likelihood", n) as tell:
        for start in range(0, n, flags.batch_size):
            part = images.images[chosen[start : start + flags.batch_size]]
            x = dequantize(torch.from_numpy(part).to(device).permute(0, 3, 1, 2), generator=generator)
            log_p, _ = log_likelihood(
                lambda x_t, t: trained.objective.denoise(network, x_t, t), schedule, x, ts, probes=flags.probes,
                generator=generator,
            )  # fmt: skip
            bits.append(bits_per_dim(log_p.double(), x[0].numel()).cpu())
            tell(start + len(part))
    values = torch.cat(bits)
    row = {
        "bits_per_dim": values.mean().item(), "standard_error": values.std().item() / n**0.5, "images": n,
        "drawn": f"at random from {len(images.images)}, seed {flags.seed}", "data": images.name,
        "steps": flags.steps, "probes": flags.probes, "step": trained.step, "checkpoint": trained.path.name,
    }  # fmt: skip
    output.put(json.dumps(row))


def export(flags: Export) -> None:
    """Write the averaged weights into the folder `out`, new or empty, where they appear only when they are complete."""
    out = flags.out
    if out.exists() and not is_empty_folder(out):
        raise UserError(f"--out {out} exists already; name a folder that does not, or an empty one.")
    trained = load_trained(flags.checkpoint, device=torch.device("cpu"))
    config, process = trained.config, trained.config.diffusion
    with complete_folder(out) as folder:
        if flags.to == "diffusers":
            save_diffusers_pipeline(
                trained.model, folder, schedule=process.resolved_schedule, timesteps=process.timesteps,
                objective=process.objective, zero_terminal_snr=process.zero_terminal_snr,
            )  # fmt: skip
        else:
            state = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
            save_file(state, folder / "model.safetensors", metadata={"step": str(trained.step)})
            write_atomically(folder / "config.json", json_text(config.to_dict()).encode())
    print(f"{out}: {flags.to}, averaged weights of {trained.path}")
    if flags.to == "diffusers":
        print(
            "DDPMPipeline draws from it as `sample --sampler ddpm` does, and DDIMPipeline with "
            "use_clipped_model_output=True as `--sampler ddim`; with both, choose num_inference_steps among the "
            f"divisors of {process.timesteps}, as diffusers rounds other grids differently."
        )


def show(flags: Show) -> None:
    """Print a preset's network as a table, or the program that it is fused into."""
    from fastdiff.nets.show import table  # its FLOP counter warns where Triton is missing

    config = PRESETS[flags.preset].net
    net = UNet(config)
    size = {"image_size": config.image_size, "image_channels": config.image_channels}
    print(program(fuse(net)) if flags.code else table(net, **size), end="")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed is {seed}, but must be at least 0 and below 2^63.")


def _at(config: Config, data_root: str | None) -> Config:
    return config if data_root is None else config.replace(data_root=data_root)


def _images(config: Config, trained: Trained, data: str | None, split: Any = None) -> ImageSet:
    """The images that `data` names, or those that the run was trained on."""
    if data is None:
        return load_run_data(config, trained.saved, split=split)[0]
    return load_dataset(
        data, root=config.images.data_root, split=split or config.images.split, image_size=config.net.image_size
    )


def _nhwc(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).cpu().numpy()
