"""`python -m fastdiff export`: averaged weights for other programs."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from fastdiff.errors import UserError
from fastdiff.evaluation.evaluate import Trained, load_trained
from fastdiff.flags import Export
from fastdiff.interop import save_diffusers_pipeline
from fastdiff.interop_autoencoder import save_autoencoder_kl
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.runs.files import write_atomically
from fastdiff.runs.latents import FOLDER, autoencoder_weights
from fastdiff.runs.outputs import complete_folder, is_empty_folder
from fastdiff.runs.run import json_text
from fastdiff.runs.weights import TrainedWeights, read_trained


def export(flags: Export) -> None:
    """Write the averaged weights into the folder `out`, new or empty, where they appear only when they are complete."""
    out = flags.out
    if out.exists() and not is_empty_folder(out):
        raise UserError(f"--out {out} exists already; name a folder that does not, or an empty one.")
    found = read_trained(flags.checkpoint)
    if flags.to == "safetensors":
        _to_safetensors(found, flags)
        hint = ""
    elif found.config.autoencoder.factor:
        model = Autoencoder(found.config.autoencoder)
        model.load_state_dict(found.state)
        with complete_folder(out) as folder:
            save_autoencoder_kl(model, folder, pixels=found.config.pixels)
        hint = f"AutoencoderKL.from_pretrained({str(out)!r}) loads it; its latents have mean 0 and deviation 1."
    else:
        hint = _to_diffusers(load_trained(flags.checkpoint, device=torch.device("cpu"), moved=flags.autoencoder), out)
    print(f"{out}: {flags.to}, averaged weights of {found.path}")
    if hint:
        print(hint)


def _to_safetensors(found: TrainedWeights, flags: Export) -> None:
    """With the autoencoder, of a network that draws latents."""
    home = found.run or found.path
    weights = autoencoder_weights(found.config, found.rest, home=home, moved=flags.autoencoder, flag="--autoencoder")
    with complete_folder(flags.out) as folder:
        state = {name: value.contiguous() for name, value in found.state.items()}
        save_file(state, folder / "model.safetensors", metadata={"step": str(found.step)})
        if weights is not None:
            weights.save(folder / FOLDER)
        write_atomically(folder / "config.json", json_text(found.config.to_dict()).encode())


def _to_diffusers(trained: Trained, out: Path) -> str:
    """Returns how to draw from it."""
    config, process, weights = trained.config, trained.config.diffusion, trained.autoencoder
    if (config.tuning.few_step, process.objective) == ("consistency", "x0"):
        raise UserError(
            "a network of --few-step consistency and --objective x0 cannot be exported: diffusers' schedulers do not "
            "add x_t to its estimates, as it has learned; use --to safetensors."
        )
    autoencoder = None if weights is None else weights.make(torch.device("cpu"))
    if autoencoder is not None and not isinstance(autoencoder, Autoencoder):
        raise UserError(
            "a network in the latents of an AutoencoderTiny cannot be exported: diffusers would not scale them; use "
            "--to safetensors."
        )
    with complete_folder(out) as folder:
        save_diffusers_pipeline(
            trained.model, folder, schedule=process.resolved_schedule, timesteps=process.timesteps,
            objective=process.objective, zero_terminal_snr=process.zero_terminal_snr, time_scale=process.time_scale,
            latents=autoencoder is not None,
        )  # fmt: skip
        if autoencoder is not None:
            save_autoencoder_kl(autoencoder, folder / "vae", pixels=config.pixels)
    if config.net.num_classes or autoencoder is not None:
        how = "class_labels and guidance_scale" if config.net.num_classes else "batch_size"
        return (
            f"DiffusionPipeline.from_pretrained({str(out)!r}, custom_pipeline={str(out)!r}, trust_remote_code=True) "
            f"draws from it: call it with {how}."
        )
    return (
        "DDPMPipeline draws from it as `sample --sampler ddpm` does, and DDIMPipeline with "
        "use_clipped_model_output=True as `--sampler ddim`; with both, choose num_inference_steps among the "
        f"divisors of {process.timesteps}, as diffusers rounds other grids differently."
    )
