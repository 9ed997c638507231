"""Tiles of GroupNorm + SiLU for bf16 and fp16, chosen by measurement."""

# (channels, H * W, groups, backward, dropout): (channels and pixels of a program's tile or chunk, warps)
NORM_TILES: dict[tuple[int, int, int, bool, bool], tuple[int, int, int]] = {}
