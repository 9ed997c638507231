"""Count the bytes and launches of a training step from Inductor's own code for an H100, without a GPU.

    python bench/step_counts.py             the CIFAR-10 U-Net at batch 128, minutes; writes bench/results/step_counts.*
    python bench/step_counts.py --dropout 0.1 --variants stock ours --no-write
    python bench/step_counts.py --told labels --variants ours     what ten classes cost, or text; writes nothing
    python bench/step_counts.py --image-size 64 --variants ours   images of 64 pixels; writes nothing
    python bench/step_counts.py --image-size 16 --image-channels 4 --variants ours     their latents, by factor 4

Checked are bars 1 to 3: bytes of the norms over their floor, bytes of the step and its Triton launches over ours. Exits
1 if one is missed. Counts are what the code asks for; caches and the clock are not in them.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `kernels` must be this repository's

import torch
import tyro

from bench import inductor_mock
from bench.bars import COUNTED
from bench.step_variants import KERNELS_A_LIBRARY_CALL, SMALL, VARIANTS, Counts, Variant, count_small, count_variant
from fastdiff.cli import run_command
from fastdiff.model_sections import UNetConfig
from kernels.caching import source_hash

REPO = Path(__file__).resolve().parent.parent
FLOOR = (4.0, 6.0)  # bytes an element of a bf16 norm, forward (x, y) and backward (x, dy, dx)
UPDATES = ("flat", "fused_adam", "groups", "optim", "radam", "torch_adam")
SOURCES = (
    "bench/step_variants.py", "bench/inductor_mock.py", "kernels",
    *(f"fastdiff/nets/{name}.py" for name in ("fuse", "graph", "layers", "text", "unet")),
    *(f"fastdiff/training/{name}.py" for name in UPDATES),
)  # fmt: skip


WHAT = {  # the bars of bench/bars.py that are counted here
    "1": "GN+SiLU bytes / floor, ours",
    "2a": "bytes of the step and its update, stock / ours",
    "2b": "the same, the least of the three without our kernels / ours",
    "3": "launches of all Triton kernels, forward and backward, stock / ours",
}


def ratios(counts: dict[Variant, Counts]) -> dict[str, float]:
    """The value of every bar whose variants were counted."""
    if "ours" not in counts:
        return {}
    ours = counts["ours"]
    values = {"1": sum(ours.norm) / sum(FLOOR)}
    if "stock" in counts:
        values["2a"] = counts["stock"].total / ours.total
        values["3"] = counts["stock"].triton / ours.triton
    if set(counts) == set(VARIANTS):
        values["2b"] = min(c.total for v, c in counts.items() if v != "ours") / ours.total
    return values


def markdown(document: dict[str, Any]) -> str:
    """The document as tables."""
    lines = [
        "# Bytes and launches of a training step",
        "",
        f"Written by `python bench/step_counts.py` with torch {document['torch']}: the code that Inductor makes for",
        f"an H100, batch {document['batch']}, bf16 autocast, without a GPU. Counts, not times.",
        "",
        "| bar | what | value | at least | aim | holds |",
        "|---|---|---|---|---|---|",
    ]
    for key, value in document["bars"].items():
        bar = COUNTED[key]
        sign = "<=" if bar.better == "lower" else ">="
        lines.append(
            f"| {key} | {WHAT[key]} | {value:.3f} | {sign} {bar.least} | {sign} {bar.aim} | {bar.holds(value)} |"
        )
    lines += [
        "",
        "MB: requested an image. Forward and backward: each kernel's buffers, once for reading and once for writing.",
        "Update: clipping, optimizer, average and copies of the weights, run eagerly. Inductor's: launches of the",
        "Triton kernels that it writes. Ours: of our own, one forward and one backward for each of 51 norms and one",
        "for each of 6 attentions; bar 3 is of both. Calls: all of these, with convolutions, matrix products and",
        "attention, which no variant avoids. Kernels: a guess, since a library call starts several:",
        f"{KERNELS_A_LIBRARY_CALL:.2f} by a GPU's profile of an earlier commit and the calls counted there. Norm:",
        "bytes an element of all the network's norms, each compiled alone, adding nothing up (floor 4 and 6). Update's",
        "operators and kernels: by multi_tensor_apply's packing rule. Ours is compiled with `combo_kernels`, as the",
        "trainer compiles, the others by torch.compile's defaults; [LOG.md](LOG.md) has stock with it too.",
        "",
        "| dropout | variant | MB | forward | backward | update | Inductor's | ours | calls | kernels | norm fwd | norm bwd | update ops | kernels |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for dropout, rows in document["counts"].items():
        for name, row in rows.items():
            c = Counts(**row)
            cells = (
                dropout, f"{name}: {VARIANTS[name]}",
                *(f"{megabytes:.1f}" for megabytes in (c.total, c.forward, c.backward, c.optimizer)),
                c.inductor, c.triton - c.inductor, c.calls, f"~{round(c.kernels, -1):.0f}",
                *(f"{b:.2f}" for b in c.norm), c.optimizer_calls, c.optimizer_launches,
            )  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "A convolution's backward is two kernels, which both read dy, and a sum for the bias. Two things to know of",
        "ours: Inductor books a buffer that a user's kernel writes as read too; ours are given to be written, so the",
        "second is taken off. And the looped kernels (32x32) read again from L2 what they have read or written before",
        "(x and dy, or the sum): bytes that this count, one of device memory, does not have.",
        "",
        "Largest contributors of `ours` without dropout:",
        "",
        "| pass | kind | what | calls | MB an image |",
        "|---|---|---|---|---|",
    ]
    for row in document["counts"].get("0.0", {}).get("ours", {}).get("top", []):
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Options:
    """Count the bytes and launches of a training step, stock and fused side by side, without a GPU."""

    variants: tuple[Variant, ...] = ("ours", "stock", "plain", "stock-nchw")
    """Which to count."""
    batch: int = 128
    """Images of a step."""
    dropout: float = 0.0
    """Dropout probability in the network; counts at 0 and at this one stand side by side in the file."""
    told: Literal["nothing", "labels", "text"] = "nothing"
    """What the network is told: ten classes, or text by an encoder of bytes, 256 wide with 4 blocks. These counts are
    printed only."""
    image_size: int = 32
    """Height and width of what the network sees. Only counts of 32x32 pixels are written."""
    image_channels: int = 3
    """Channels of what the network sees."""
    small: bool = False
    """Count the small network of the tests instead."""
    verbose: bool = False
    """Print each variant's largest contributors."""
    write: bool = True
    """Add to bench/results/step_counts.json and .md as each variant is done."""


TOLD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "labels": {"num_classes": 10},
    "text": {"text_encoder": "bytes", "text_width": 256, "text_blocks": 4},
}


def save(document: dict[str, Any], path: Path) -> None:
    """Write the JSON and the tables."""
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(document))


def main(options: Options) -> int:
    """Count, print, write; 1 if a bar is missed."""
    inductor_mock.check_version()
    sees = {} if options.small else {"image_size": options.image_size, "image_channels": options.image_channels}
    config = replace(SMALL if options.small else UNetConfig(), dropout=options.dropout, **TOLD[options.told], **sees)
    path = REPO / "bench" / "results" / "step_counts.json"
    key, sources = str(options.dropout), source_hash(REPO, SOURCES)
    document: dict[str, Any] = {"torch": torch.__version__, "sources": sources, "batch": options.batch, "bars": {},
                                "counts": {}, "small": {}}  # fmt: skip
    if path.exists() and (old := json.loads(path.read_text()))["sources"] == sources and old["batch"] == options.batch:
        document = old
    published = (
        not options.small and options.told == "nothing" and (config.image_size, config.image_channels) == (32, 3)
    )
    write = options.write and published
    counts: dict[Variant, Counts] = {}
    for variant in options.variants:
        start = time.monotonic()
        counts[variant] = c = count_variant(variant, config, options.batch)
        print(f"{variant}: {c.total:.1f} MB an image, {c.inductor} launches of Inductor's kernels and "
            f"{c.triton - c.inductor} of ours, {c.calls} calls (some {c.kernels:.0f} kernels), norm "
            f"{c.norm[0]:.2f} + {c.norm[1]:.2f} B an element, update {c.optimizer_calls} operators, "
            f"{c.optimizer_launches} kernels; counted in {time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
        if options.verbose:
            for row in c.top:
                print("    " + "  ".join(map(str, row)), flush=True)
        document["counts"].setdefault(key, {})[variant] = asdict(c)
        if write:
            if options.dropout == 0:
                known: dict[Variant, Counts] = {v: Counts(**row) for v, row in document["counts"][key].items()}
                document["bars"] = {name: round(v, 4) for name, v in ratios(known).items()}
            save(document, path)
    if write and not document["small"]:
        document["small"] = {v: count_small(v) for v in ("stock", "ours")}
        save(document, path)
    values = ratios(counts)
    for name, value in values.items():
        print(f"bar {name}: {WHAT[name]}: {value:.3f} ({COUNTED[name].holds(value)})")
    return int(any(COUNTED[name].holds(value) == "missed" for name, value in values.items()))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(Options))))
