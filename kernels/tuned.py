"""Tiles of GroupNorm + SiLU for 16-bit x, chosen by measurement in bf16: written by bench/tune_norms.py.

On an NVIDIA H200, torch 2.11.0+cu130, triton 3.6.0, 2026-11-26, batch 128. Behind each row:
its time as a multiple of a device copy of the same bytes, and that of the rule in kernels/launch.py. Shapes
that are not here follow the rule. These times are of the norm alone, without sums, and none load ahead.
"""

# (channels, H * W, groups, backward, dropout): (channels and pixels of a program's tile or chunk, warps,
# NormTiles.ahead)
NORM_TILES: dict[tuple[int, int, int, bool, bool], tuple[int, int, int, int]] = {
    (128, 1024, 32, True, False): (16, 1024, 8, 0),  # 2.08, the rule 2.66
    (256, 1024, 32, True, False): (64, 32, 8, 0),  # 1.98, the rule 2.36
    (384, 1024, 32, False, False): (24, 256, 16, 0),  # 2.09, the rule 2.62
    (128, 256, 32, False, False): (32, 256, 8, 0),  # 1.33, the rule 1.37
    (256, 256, 32, True, False): (32, 256, 4, 0),  # 1.66, the rule 1.79
    (512, 256, 32, True, False): (32, 256, 4, 0),  # 1.60, the rule 1.81
    (128, 1024, 32, True, True): (16, 1024, 8, 0),  # 2.35, the rule 2.85
    (256, 256, 32, True, True): (32, 256, 4, 0),  # 2.00, the rule 2.05
}
