"""The commands of `python -m fastdiff`, as functions of plain arguments."""

import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.config import Config
from fastdiff.data.cache import cache_folder
from fastdiff.data.datasets import ImageSet, load_dataset
from fastdiff.diffusion.likelihood import bits_per_dim, dequantize, likelihood_grid, log_likelihood
from fastdiff.errors import UsageError, UserError
from fastdiff.evaluation.evaluate import Trained, evaluate, load_trained
from fastdiff.evaluation.features import make_extractor
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.evaluation.generate import SamplerSettings, parse_options
from fastdiff.interop import save_diffusers_pipeline
from fastdiff.reporting import pictures, plots
from fastdiff.reporting.progress import bar
from fastdiff.runs.data import load_run_data
from fastdiff.runs.run import json_text, open_run, write_atomically
from fastdiff.runtime.device import resolve_bf16, resolve_compile, resolve_device, set_backends

GRID_LIMIT = 1024


def sample(
    *,
    checkpoint: Path,
    sampler: str,
    steps: int,
    eta: float,
    spacing: str,
    options: Sequence[str],
    seed: int,
    batch_size: int,
    device: str,
    precision: str,
    compile: str,
    graphs: bool,
    n: int,
    out: Path,
    save_npz: Path | None,
) -> None:
    """Draw n images into the grid `out`, and into `save_npz`; both appear only when they are complete."""
    _check_seed(seed)
    if save_npz is not None and save_npz.resolve() == out.resolve():
        raise UsageError(f"--out and --save-npz are both {out}, and one would replace the other; name two files.")
    if out.suffix.lower() == ".npz":
        raise UsageError(f"--out {out} is for the grid, a picture; write the images by --save-npz {out}.")
    pictures.image_format(out)
    for path in filter(None, (out, save_npz)):
        _check_output(path)
    settings = SamplerSettings(sampler, steps, eta, spacing, parse_options(sampler, options))
    where = resolve_device(device)
    set_backends(where)
    bf16 = resolve_bf16(precision, where)
    trained = load_trained(checkpoint, device=where)
    generator = trained.generator(
        settings, batch_size=batch_size, device=where, bf16=bf16, compile=resolve_compile(compile, where), graphs=graphs
    )
    c, height, width = generator.image_shape
    shown: list[np.ndarray] = []
    with bar("sampling", n) as show, _npz_writer(save_npz, (n, height, width, c)) as write:
        for images in generator.batches(n, seed=seed, progress=show):
            array = _nhwc(images)
            write(array)
            if sum(map(len, shown)) < GRID_LIMIT:
                shown.append(array)
    pictures.save_grid(np.concatenate(shown)[:GRID_LIMIT], out)
    print(f"{out}: {min(n, GRID_LIMIT):,} of {n:,} images by {settings.label}, {steps} steps, from {trained.path}")


def measure(
    *,
    checkpoint: Path,
    sampler: str,
    steps: int,
    eta: float,
    spacing: str,
    options: Sequence[str],
    seed: int,
    batch_size: int,
    device: str,
    precision: str,
    compile: str,
    graphs: bool,
    n: int,
    features: str,
    feature_size: int | None,
    data: str | None,
    data_root: str | None,
) -> dict[str, Any]:
    """Measure the Frechet distance of n samples, add the row to the run if `checkpoint` lies in one, and return it."""
    _check_seed(seed)
    if n < 2:
        raise UsageError(f"--n is {n}, but a Frechet distance needs at least 2 samples.")
    settings = SamplerSettings(sampler, steps, eta, spacing, parse_options(sampler, options))
    where = resolve_device(device)
    set_backends(where)
    bf16 = resolve_bf16(precision, where)
    trained = load_trained(checkpoint, device=where)
    config = _at(trained.config, data_root)
    reference = _images(config, trained, data)
    print(f"data       {reference.describe()}", file=sys.stderr)
    extractor = make_extractor(features, device=where, size=feature_size)
    distance = FrechetDistance(extractor, reference, cache_dir=cache_folder(config.images.data_root), device=where)
    generator = trained.generator(
        settings, batch_size=batch_size, device=where, bf16=bf16, compile=resolve_compile(compile, where), graphs=graphs
    )
    row, _ = evaluate(generator, distance, n=n, seed=seed, keep=1)
    images = trained.step * config.optim.batch_size
    row = {"step": trained.step, "images": images, **row, "checkpoint": trained.path.name}
    _record(trained, row)
    return row


def _record(trained: Trained, row: dict[str, Any]) -> None:
    """Add an evaluation to the checkpoint's run; a run that cannot be written to, or is in use, stays as it is."""
    if trained.run is None:
        print(f"{trained.path} lies in no run, so that the row is not recorded", file=sys.stderr)
        return
    try:
        with open_run(trained.run) as run:
            run.log_eval(row)
            plots.plot_distance(run.eval_rows(), run.saves / "fid.png")
    except (UserError, OSError) as error:
        print(f"not recorded in the run: {error}", file=sys.stderr)


def likelihood(
    *,
    checkpoint: Path,
    n: int,
    steps: int,
    probes: int,
    seed: int,
    batch_size: int,
    device: str,
    data: str | None,
    data_root: str | None,
    split: Literal["train", "test"] | None,
) -> dict[str, Any]:
    """Bits per dimension of n random images, by the probability flow in float32: their mean and its error."""
    _check_seed(seed)
    for name, value, least in (("n", n, 2), ("steps", steps, 2), ("probes", probes, 1), ("batch-size", batch_size, 1)):
        if value < least:
            raise UsageError(f"--{name} is {value}, but must be at least {least}.")
    where = resolve_device(device)
    set_backends(where)
    trained = load_trained(checkpoint, device=where)
    schedule = trained.objective.schedule
    images = _images(_at(trained.config, data_root), trained, data, split)
    if len(images.images) < n:
        raise UsageError(f"--n is {n}, but {images.name} has {len(images.images)} images.")
    print(f"data       {images.describe()}", file=sys.stderr)
    chosen = images.draw(n, seed=seed)
    network = trained.network.requires_grad_(False)
    generator = torch.Generator(where).manual_seed(seed)
    ts = likelihood_grid(schedule, steps)
    bits: list[Tensor] = []
    with bar("likelihood", n) as show:
        for start in range(0, n, batch_size):
            batch = torch.from_numpy(images.images[chosen[start : start + batch_size]]).to(where).permute(0, 3, 1, 2)
            x = dequantize(batch, generator=generator)
            log_p, _ = log_likelihood(
                lambda x_t, t: trained.objective.denoise(network, x_t, t), schedule, x, ts, probes=probes,
                generator=generator,
            )  # fmt: skip
            bits.append(bits_per_dim(log_p.double(), x[0].numel()).cpu())
            show(start + len(batch))
    values = torch.cat(bits)
    return {
        "bits_per_dim": values.mean().item(), "standard_error": values.std().item() / n**0.5, "images": n,
        "drawn": f"at random from {len(images.images)}, seed {seed}",
        "data": images.name, "steps": steps, "probes": probes, "step": trained.step, "checkpoint": trained.path.name,
    }  # fmt: skip


def export(*, checkpoint: Path, out: Path, to: str) -> None:
    """Write the averaged weights into the folder `out`, new or empty, where they appear only when they are complete."""
    if out.exists() and not _is_empty_folder(out):
        raise UserError(f"--out {out} exists already; name a folder that does not, or an empty one.")
    trained = load_trained(checkpoint, device=torch.device("cpu"))
    config, process = trained.config, trained.config.diffusion
    with _complete_folder(out) as folder:
        if to == "diffusers":
            save_diffusers_pipeline(
                trained.model, folder, schedule=process.resolved_schedule, timesteps=process.timesteps,
                objective=process.objective, zero_terminal_snr=process.zero_terminal_snr,
            )  # fmt: skip
        else:
            state = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
            save_file(state, folder / "model.safetensors", metadata={"step": str(trained.step)})
            write_atomically(folder / "config.json", json_text(config.to_dict()).encode())
    print(f"{out}: {to}, averaged weights of {trained.path}")
    if to == "diffusers":
        print(
            "DDPMPipeline draws from it as `sample --sampler ddpm` does, and DDIMPipeline with "
            "use_clipped_model_output=True as `--sampler ddim`; with both, choose num_inference_steps among the "
            f"divisors of {process.timesteps}, as diffusers rounds other grids differently."
        )


def _is_empty_folder(path: Path) -> bool:
    try:
        return not os.listdir(path)
    except OSError:
        return False


@contextmanager
def _complete_folder(out: Path) -> Generator[Path]:
    """A folder to write in, whose content is moved to `out` in the end; after an error nothing is left.

    Raises:
        UserError: it cannot be written.
    """
    there = _is_empty_folder(out)
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # An empty folder is filled, not replaced: it may be a mount, or where the user is.
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out if there else out.parent))
        yield temporary
        if there:
            for path in sorted(temporary.iterdir(), reverse=True):  # config.json or model_index.json last
                path.rename(out / path.name)
            temporary.rmdir()
        else:
            os.chmod(temporary, 0o755)
            temporary.rename(out)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"--out {out} cannot be written: {error}.") from error
        raise


def _check_output(path: Path) -> None:
    """Refuse, before the work, a file that could not be written after it."""
    folder = path.absolute().parent
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; name a file.")
    if not folder.is_dir():
        raise UserError(f"{path} cannot be written: the folder {folder} does not exist.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {folder} takes no files ({error.strerror}).") from error


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


@contextmanager
def _npz_writer(path: Path | None, shape: tuple[int, ...]) -> Generator[Any]:
    """A function that appends batches to `images` of an .npz, so that they are never all in memory."""
    if path is None:
        yield lambda batch: None
        return
    temporary = path.with_name(f".{path.name}.part")
    try:
        with zipfile.ZipFile(temporary, "w") as archive, archive.open("images.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            yield lambda batch: file.write(np.ascontiguousarray(batch).data)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
