"""What `auto` means for the device and the precision."""

import torch

from fastdiff.errors import UserError


def resolve_device(device: str) -> torch.device:
    """`auto` is cuda if there is one. Raises UserError for cuda without a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is 'cuda', but torch sees no CUDA device; use --device cpu or auto.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast activations to bfloat16: as asked, and for `auto` on CUDA only."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")
