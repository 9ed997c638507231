"""The norm kernels at the shapes of the CIFAR-10 U-Net, with what its call sites switch on, for Triton's
ahead-of-time compiler."""

from collections.abc import Iterable, Iterator

from .launch import NormTiles, norm_tiles
from .spec import Job

# (C, H = W) of the DDPM CIFAR-10 U-Net's norms, 32 groups.
UNET_SHAPES = (
    (128, 32), (256, 32), (384, 32), (128, 16), (256, 16), (384, 16), (512, 16), (256, 8), (512, 8), (256, 4), (512, 4),
)  # fmt: skip
# (C, H = W) of its skip concatenations -> channels of the first part.
CONCATENATIONS = {(256, 32): 128, (384, 32): 256, (384, 16): 256, (512, 16): 256, (512, 8): 256, (512, 4): 256}
# What a call site switches on: SiLU alone, nothing (attention's norm), the time embedding, dropout, AdaGN, everything;
# and for add_group_norm_silu a residual with a bias, on the way up with a skip, on the way down kept for one.
NORMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "none": ("none",),
    "shift": ("shift",),
    "dropout": ("seed",),
    "shift+dropout": ("shift", "seed"),
    "adagn": ("scale", "offset"),
    "all": ("shift", "scale", "offset", "seed"),
}
SUMS: dict[str, tuple[str, ...]] = {
    "add": ("shift", "residual"),
    "add, none": ("shift", "residual", "none"),
    "add, kept": ("shift", "residual", "du2"),
}
VARIANTS = NORMS | SUMS


def norm_jobs(channels: int, side: int, variant: str, dtype: str = "bf16", groups: int = 32, *,
              tiles: NormTiles | None = None) -> Iterator[Job]:  # fmt: skip
    """Forward and backward at one shape, in the tiles that launch.py chooses or in others."""
    options = VARIANTS[variant]
    for backward in (False, True):
        cut = tiles or norm_tiles(channels, side * side, groups, itemsize=2 if dtype == "bf16" else 4,
                                  backward=backward, dropout="seed" in options,
                                  adaptive="scale" in options)  # fmt: skip
        kernel = ("backward" if backward else "forward") + ("_loop" if cut.looped else "_tile")
        summed, c_x = "residual" in options, channels
        if summed and "du2" not in options:
            c_x = CONCATENATIONS.get((channels, side), channels)
        wide = {"x_ptr", "y_ptr", "dy_ptr", "dx_ptr"} | ({"residual_ptr", "u_ptr", "du_ptr"} if summed else set())
        wide |= {"skip_ptr", "dskip_ptr"} if c_x < channels else set()
        wide |= {"du2_ptr"} if "du2" in options else set()
        types = dict.fromkeys(sorted(wide), f"*{dtype}")
        types |= {
            f"{name}_ptr": f"*{dtype}"
            for name in ("shift", "scale", "offset", "dshift", "dscale", "doffset")
            if name.removeprefix("d") in options
        }
        types |= {f"{name}_ptr": "*fp32" for name in ("weight", "bias", "mean", "rstd", "part_weight", "part_bias")}
        if summed:  # the biases of convolutions are rows of float32; in the backward they are in u already
            types["shift_ptr"], types["dshift_ptr"] = ("constexpr" if backward else "*fp32"), "*fp32"
        types |= dict.fromkeys(("shift_row", "stream_id", "threshold", "N"), "i32")
        types |= {"seed_ptr": "*i64"} if "seed" in options else {}
        constants = {"EPS": 1e-6, "SILU": "none" not in options, "C": channels, "C_X": c_x, "HW": side * side,
                     "PER_GROUP": channels // groups, "OWN": cut.channels, "BLOCK_C": cut.block_c,
                     "BLOCK_G": cut.block_g, "BLOCK_HW": cut.block_hw, "AHEAD": cut.ahead > 0}  # fmt: skip
        label = f"C={channels} {side}x{side} {variant}" + (f", ahead {cut.ahead}" if cut.ahead else "")
        yield Job(
            label + ("" if dtype == "bf16" else f" {dtype}"),
            f"{__package__}.group_norm_{'backward' if backward else 'forward'}:{kernel}",
            types, constants, cut.num_warps, frozenset(wide),
            frozenset({"shift_row"}),  # 0 where all images share a row, else a slice of a wide tensor
        )  # fmt: skip


def all_jobs(variants: Iterable[str], more: Iterable[tuple[int, int, str, str]]) -> list[Job]:
    """Every shape of the U-Net with each of the variants, and (channels, side, variant, dtype) more."""
    jobs = [job for shape in UNET_SHAPES for variant in variants for job in norm_jobs(*shape, variant)]
    return jobs + [job for case in more for job in norm_jobs(*case)]
