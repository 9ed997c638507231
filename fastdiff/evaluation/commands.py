"""The commands of `python -m fastdiff`: one function for each dataclass of flags. All raise UserError for bad input."""

import itertools
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.config import Config
from fastdiff.data.cache import cache_folder
from fastdiff.data.datasets import ImageSet, load_dataset
from fastdiff.diffusion.likelihood import LEVEL, bits_per_dim, likelihood_grid, log_likelihood
from fastdiff.errors import UsageError, UserError
from fastdiff.evaluation.asked import asked_for, shares_of
from fastdiff.evaluation.evaluate import Trained, load_trained
from fastdiff.evaluation.evaluate import evaluate as measure
from fastdiff.evaluation.exporting import export as export
from fastdiff.evaluation.features import make_extractor
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.evaluation.generate import Generator, SamplerSettings, on_device, parse_options
from fastdiff.evaluation.graph_loop import Conditions
from fastdiff.evaluation.wishes import LabelAgreement, kept_features, wishes
from fastdiff.flags import Evaluate, Likelihood, Sample, Show
from fastdiff.model_sections import Guidance
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.nets.fuse import fuse
from fastdiff.nets.graph import program
from fastdiff.nets.text import POSITIONS, READERS
from fastdiff.nets.unet import UNet
from fastdiff.presets import PRESETS
from fastdiff.reporting import pictures
from fastdiff.reporting.progress import bar
from fastdiff.runs.data import load_run_data, with_inputs
from fastdiff.runs.outputs import check_output, npz_writer
from fastdiff.runs.run import open_run
from fastdiff.runtime import output
from fastdiff.runtime.device import resolve_device, set_backends
from fastdiff.words import counted

GRID_LIMIT = 1024


def _trained(flags: Sample | Evaluate) -> tuple[Trained, list[Generator]]:
    """The network of a checkpoint, and what draws from it in each of --steps. Raises UserError for bad input."""
    _check_seed(flags.seed)
    if not flags.steps or len(set(flags.steps)) < len(flags.steps):
        raise UsageError(f"--steps is {_words(flags.steps)}, but must be one number or several different ones.")
    options = parse_options(flags.sampler, flags.options)
    samplers = [SamplerSettings(flags.sampler, n, flags.eta, flags.spacing, options) for n in flags.steps]
    device = resolve_device(flags.device)
    set_backends(device)
    trained = load_trained(flags.checkpoint, device=device, moved=flags.autoencoder, graphs=flags.graphs)
    last_level = trained.config.tuning.last_level if flags.last_level is None else flags.last_level
    samplers = [replace(each, last_level=last_level) for each in samplers]
    guide = load_trained(flags.guide, device=device) if flags.guide else None
    if guide is not None and guide.config.task != trained.config.task:
        raise UsageError(
            f"--guide {guide.path} was trained as {_told(guide)}, but {trained.path} as {_told(trained)}; name a "
            "checkpoint of the same task, such as an earlier one of the same run."
        )
    machine = Config.of(machine=trained.config.machine, device=device.type, precision=flags.precision)
    machine = machine.resolved(device.type).machine
    for warning in (machine.warning, _unlike_training(trained, flags)):
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
    generator = trained.generator(
        samplers[0], batch_size=flags.batch_size, device=device, bf16=machine.precision == "bf16",
        compile=flags.compile == "on", graphs=flags.graphs, guide=guide.network if guide is not None else None,
    )  # fmt: skip
    return trained, [generator.by(each) for each in samplers]


def _unlike_training(trained: Trained, flags: Sample | Evaluate) -> str | None:
    """What a network trained for few steps was not meant for."""
    tuning = trained.config.tuning
    if tuning.few_step == "none":
        return None
    scales = flags.guidance if isinstance(flags.guidance, tuple) else (flags.guidance,)
    if tuning.teacher_guidance != 1 and any(w != 1 for w in scales):
        return (
            f"this network has guidance {tuning.teacher_guidance:g} built in, and would be guided twice: --guidance 1."
        )
    sampler = "flow-map" if tuning.two_times else "consistency"
    if flags.sampler not in ("flow-map", "consistency"):
        return f"this network was trained for few steps: --sampler {sampler} --steps 1 2 4."
    return None


def _words(steps: Sequence[int]) -> str:
    return " ".join(map(str, steps)) or "empty"


def _told(trained: Trained) -> str:
    task, *names = trained.config.task
    return f"{task}, on {counted(len(names), 'class', 'classes')}" if names else task


def sample(flags: Sample) -> None:
    """Draw images into the grid `out`, and into `save_npz`; both appear only when they are complete."""
    out, save_npz = flags.out, flags.save_npz
    guidance = Guidance(flags.guidance, flags.guidance_interval)
    if save_npz is not None and save_npz.resolve() == out.resolve():
        raise UsageError(f"--out and --save-npz are both {out}, and one would replace the other; name two files.")
    if out.suffix.lower() == ".npz":
        raise UsageError(f"--out {out} is for the grid, a picture; write the images by --save-npz {out}.")
    if save_npz is not None and len(flags.steps) > 1:
        raise UsageError(f"--save-npz holds images of one number of steps, but --steps is {_words(flags.steps)}.")
    pictures.image_format(out)
    for path in filter(None, (out, save_npz)):
        check_output(path)
    trained, generators = _trained(flags)
    generator = generators[0]
    generator.check(guidance)
    asked, names, arrays = asked_for(flags, trained)
    if guidance.scale != 1 and generator.guide is None and not asked:
        raise UsageError(f"--guidance is {guidance.scale:g}, but nothing is asked for; add --prompt, or drop it.")
    shares = shares_of(flags, len(names))
    n, row = sum(shares), np.repeat(np.arange(len(shares)), shares)  # of each image
    conditions = {name: v[row] for name, v in asked.items()}
    c, height, width = generator.image_shape
    shown: list[list[np.ndarray]] = [[] for _ in generators]
    arrays = {name: v[row] for name, v in arrays.items()}
    with bar("sampling", n * len(generators)) as show, npz_writer(save_npz, (n, height, width, c), **arrays) as write:
        for i, (draws, kept) in enumerate(zip(generators, shown, strict=True)):
            for images in draws.batches(
                n, seed=flags.seed, conditions=conditions, guidance=guidance, progress=lambda k, i=i: show(n * i + k)
            ):
                array = images.permute(0, 2, 3, 1).cpu().numpy()
                write(array)
                if sum(map(len, kept)) < GRID_LIMIT:
                    kept.append(array)
    grids = [np.concatenate(kept)[:GRID_LIMIT] for kept in shown]
    grid = grids[0]
    if len(generators) > 1:
        pictures.save_rows(grids, [counted(n, "step") for n in flags.steps], out)
    elif names:
        rows = {i: grid[row[: len(grid)] == i] for i in np.unique(row[: len(grid)])}
        pictures.save_rows(list(rows.values()), [names[i] for i in rows], out)
    else:
        pictures.save_grid(grid, out)
    led = f", guidance {guidance.label}" if guidance.scale != 1 else ""
    each = " each" if len(generators) > 1 else ""
    steps = f"{_words(flags.steps)} steps" if each else counted(flags.steps[0], "step")
    how = f"{generator.settings.label}, {steps}{led}"
    print(f"{out}: {len(grid):,} of {counted(n, 'image')}{each} by {how}, from {trained.path}")


def evaluate(flags: Evaluate) -> None:
    """Print the Frechet distance of n samples as a JSON line, and add it to the run if the checkpoint lies in one.

    With several guidance scales or intervals, a line each, and a picture of them in the run.
    """
    if flags.n < 2:
        raise UsageError(f"--n is {flags.n}, but a Frechet distance needs at least 2 samples.")
    guidances = [Guidance(scale, interval) for interval in map(_interval, flags.interval) for scale in flags.guidance]
    if len(flags.steps) > 1 and len(guidances) > 1:
        raise UsageError("--steps and --guidance, or --interval, have several values; measure one of them at a time.")
    trained, generators = _trained(flags)
    generator = generators[0]
    generator.check(*guidances)
    config, classes = _at(trained.config, flags.data_root), trained.config.net.num_classes
    reference = _images(config, trained, flags.data)
    if classes:
        _check_classes(trained, reference)
    print(f"data       {reference.describe()}", file=sys.stderr)
    extractor = make_extractor(flags.features, device=generator.device, size=flags.feature_size)
    folder = cache_folder(config.images.data_root)
    distance = FrechetDistance(extractor, reference, cache_dir=folder, device=generator.device)
    wished = wishes(config, reference, trained.read)
    asked = wished.of(flags.n) if wished is not None else {}
    agreement = None
    if classes:
        agreement = LabelAgreement(extractor, reference, _test_images(config, trained, flags.data), folder)
    about = {"step": trained.step, "images": trained.step * config.optim.batch_size}
    rows = []
    for draws, guidance in itertools.product(generators, guidances):
        with kept_features(extractor) if agreement is not None else nullcontext([]) as features:
            row, _ = measure(draws, distance, n=flags.n, seed=flags.seed, keep=0, conditions=asked, guidance=guidance)
        row = {**about, **row, "checkpoint": trained.path.name}
        if flags.guide is not None and guidance.scale != 1:
            row["guide"] = flags.guide.name
        if agreement is not None:
            share = agreement(torch.cat(features), asked["labels"])
            row |= {"label_agreement": share, "label_agreement_real": agreement.ceiling}
        rows.append(row)
        _record(trained, row)
        output.put(json.dumps(row))
    if len(guidances) > 1:
        _record(trained, sweep=rows)


def _interval(text: str) -> tuple[float, float] | None:
    """LO,HI as two numbers; None for `off`."""
    if text == "off":
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high:
        raise UsageError(f"--interval {text} is not of the form LO,HI with 0 <= LO < HI, e.g. 0.2,1.5, nor `off`.")
    return low, high


def _test_images(config: Config, trained: Trained, data: str | None) -> ImageSet | None:
    """The test split of the data, if there is one apart from what the run was trained on."""
    if config.images.split == "test":
        return None
    try:
        return _images(config, trained, data, "test")
    except UserError:
        return None


def _record(trained: Trained, *rows: dict[str, Any], sweep: Sequence[dict[str, Any]] = ()) -> None:
    """Add evaluations, or the picture of a sweep of guidance, to the checkpoint's run; a run that cannot be written to,
    or is in use, stays as it is."""
    from fastdiff.reporting import plots  # with Matplotlib, which the other commands need not wait for

    if trained.run is None:
        print(f"{trained.path} lies in no run, so that the row is not recorded", file=sys.stderr)
        return
    try:
        with open_run(trained.run) as run:
            for row in rows:
                run.log_eval(row)
                plots.plot_distance(run.eval_rows(), run.saves / "fid.png")
                plots.plot_few_steps(run.eval_rows(), run.saves / "few-step.png", teacher=run.teacher_rows())
            if sweep:
                plots.plot_guidance(sweep, run.saves / "guidance.png")
                print(f"{run.saves / 'guidance.png'}: the distance against guidance", file=sys.stderr)
    except (UserError, OSError) as error:
        print(f"not recorded in the run: {error}", file=sys.stderr)


def likelihood(flags: Likelihood) -> None:
    """Print the bits per dimension of n random images, by the probability flow in float32: mean and standard error.

    Of a network that works in latents they are of the density of the latents, which says nothing of the images' own.
    """
    _check_seed(flags.seed)
    for name, least in (("n", 2), ("steps", 2), ("probes", 1), ("batch_size", 1)):
        if getattr(flags, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(flags, name)}, but must be at least {least}.")
    device, n = resolve_device(flags.device), flags.n
    set_backends(device)
    trained = load_trained(flags.checkpoint, device=device, moved=flags.autoencoder)
    latents = trained.config.space.latents is not None
    schedule = trained.objective.schedule
    images = _images(_at(trained.config, flags.data_root), trained, flags.data, flags.split)
    if len(images.images) < n:
        raise UsageError(f"--n is {n}, but {images.name} has {len(images.images)} images.")
    print(f"data       {images.describe()}", file=sys.stderr)
    chosen = images.draw(n, seed=flags.seed)
    conditions = _conditions_of(trained, images, chosen, device)
    network = trained.network.requires_grad_(False)
    generator = torch.Generator(device).manual_seed(flags.seed)
    ts = likelihood_grid(schedule, flags.steps)
    bits: list[Tensor] = []
    with bar("likelihood", n) as tell:
        for start in range(0, n, flags.batch_size):
            part = images.images[chosen[start : start + flags.batch_size]]
            x = trained.space.encode(torch.from_numpy(part).to(device), generator)
            cond = {name: v[start : start + len(part)] for name, v in conditions.items()}
            log_p, _ = log_likelihood(
                lambda x_t, t, cond=cond: trained.objective.denoise(network, x_t, t, **cond), schedule, x, ts,
                probes=flags.probes, generator=generator,
            )  # fmt: skip
            bits.append(bits_per_dim(log_p.double(), x[0].numel(), scale=1.0 if latents else LEVEL).cpu())
            tell(start + len(part))
    values = torch.cat(bits)
    row = {
        "bits_per_latent_dim" if latents else "bits_per_dim": values.mean().item(),
        "standard_error": values.std().item() / n**0.5, "images": n,
        "drawn": f"at random from {len(images.images)}, seed {flags.seed}", "data": images.name,
        "steps": flags.steps, "probes": flags.probes, "step": trained.step, "checkpoint": trained.path.name,
    }  # fmt: skip
    output.put(json.dumps(row))


def _conditions_of(trained: Trained, images: ImageSet, chosen: np.ndarray, device: torch.device) -> Conditions:
    """What the network is told about the chosen images: their class, their first caption.

    Raises:
        UserError: they have none, or other classes.
    """
    found: dict[str, Tensor] = {}
    if trained.config.conditions.class_names:
        found["labels"] = torch.from_numpy(_check_classes(trained, images)[chosen])
    if trained.read is not None and images.captions is not None:
        found |= trained.read([images.captions[i][0] for i in chosen])
    return on_device(found, device)


def _check_classes(trained: Trained, images: ImageSet) -> np.ndarray:
    """The labels of images of the network's classes. Raises UserError if they have none, or others."""
    names = trained.config.conditions.class_names
    theirs = () if images.labels is None else images.class_names or tuple(map(str, range(images.labels.max() + 1)))
    same_data = trained.saved.get("data_sha256") == images.sha256  # a run keeps the names that its data had first
    if images.labels is None or not (same_data or tuple(theirs) == names):
        has = f"the classes {', '.join(theirs)}" if theirs else "no classes"
        raise UserError(f"{images.name} has {has}, but the network was trained on the classes {', '.join(names)}.")
    return images.labels


def show(flags: Show) -> None:
    """Print a preset's network as a table, or the program that it is fused into."""
    from fastdiff.nets.show import table  # its FLOP counter warns where Triton is missing

    config = with_inputs(PRESETS[flags.preset])
    side, shape = config.pixels, config.autoencoder
    image = torch.empty(1, config.net.image_channels, side, side)
    told = {"span": torch.empty(1)} if config.net.two_times else {}
    if config.net.text_encoder in READERS:
        told["text"] = torch.zeros(1, POSITIONS, dtype=torch.int64)
    nets = [("", UNet(config.net), {"x": image, "t": torch.empty(1), **told})]
    if shape.factor:
        both, small = Autoencoder(shape), side // shape.factor
        latents = torch.empty(1, shape.latent_channels, small, small)
        nets = [("encoder\n", both.encoder, {"x": image}), ("\ndecoder\n", both.decoder, {"z": latents})]
    for title, net, inputs in nets:
        print(title + (program(fuse(net)) if flags.code else table(net, **inputs)), end="")
    if config.conditions.conditional and not flags.code:
        print(f"and {4 * config.net.channels} parameters for each class of the data, and for none")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed is {seed}, but must be at least 0 and below 2^63.")


def _at(config: Config, data_root: str | None) -> Config:
    return config if data_root is None else config.replace(data_root=data_root)


def _images(config: Config, trained: Trained, data: str | None, split: Any = None) -> ImageSet:
    """The images that `data` names, or those that the run was trained on."""
    if data is None:
        return load_run_data(config, trained.saved, split=split)[0]
    told = config.conditions
    return load_dataset(
        data, root=config.images.data_root, split=split or config.images.split, image_size=config.pixels,
        captions=told.text != "none" and (told.captions or True),
    )  # fmt: skip
