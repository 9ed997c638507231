import subprocess
import sys

import pytest
import torch

from fastdiff.reporting.profiling import analyse, read_trace
from profiles import capture

TINY = [
    *("--preset", "quick", "--channels", "8", "--channel-mult", "1", "2", "--attention-resolutions", "8"),
    *("--batch-size", "4", "--eval-batch-size", "2", "--eval-steps", "2", "--device", "cpu", "--profile", "2"),
]


@pytest.mark.parametrize(
    ("command", "title", "categories"),
    [
        ("train", "# Training step, preset quick", {"conv", "norm", "attention", "optimizer"}),
        ("sample", "# Sampling, preset quick", {"conv", "norm", "attention"}),
        ("kernels", "# Our kernels, preset quick", {"norm", "optimizer"}),
    ],
)
def test_a_capture_leaves_its_three_files(tmp_path, capsys, command, title, categories):
    out = tmp_path / "topic"
    flags = [*TINY, "--data-root", str(tmp_path / "data")]
    assert capture.main([command, *flags, "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {"trace.json.gz", "summary.md", "time.png"}
    assert f"wrote {out}" in capsys.readouterr().out
    text = (out / "summary.md").read_text()
    assert text.startswith(title)
    for part in ("- device: CPU ", "- commit: ", "- torch: ", "without the profiler", "| idle |", "**Next:**"):
        assert part in text
    profile = analyse(read_trace(out / "trace.json.gz"))
    assert profile.steps == 2
    assert all(profile.categories[name] > 0 for name in categories)
    assert sum(profile.categories.values()) == pytest.approx(profile.step)
    assert profile.categories["other"] < 0.1 * profile.step  # the table of names knows what runs
    if command == "kernels":
        assert profile.ranges.keys() == {"forward", "backward", "optimizer", "ema"}


def test_kernels_are_called_at_the_levels_of_patches():
    config = capture.defaults(["--preset", "text-digits"]).replace(batch_size=2)
    calls, shapes = capture._kernel_calls(config, torch.device("cpu"), bf16=False)
    assert shapes == "(2, 64, 8, 8), (2, 64, 4, 4)"
    assert len(calls) > len(config.net.resolutions)


def test_the_folder_is_named_for_device_command_and_preset():
    topic = capture.Train(capture.defaults(["--preset", "quick"]).replace(profile=1, device="cpu"))
    directory = topic.directory("train")
    assert directory.name == "train-quick"
    assert directory.parent.name.startswith("cpu-")
    assert directory.parent.parent == capture.REPO / "profiles"


@pytest.mark.parametrize("arguments", [["nope"], [], ["train", "--profile", "0"], ["sample", "--nope", "1"]])
def test_bad_usage_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        capture.main(arguments)
    assert caught.value.code == 2


def test_a_users_mistake_is_1_and_one_line(repo, tmp_path):
    command = [sys.executable, "profiles/capture.py", "train", "--data", str(tmp_path / "nothing"), "--device", "cpu"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        capture.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "sample", "kernels"))


@pytest.mark.gpu
def test_on_a_gpu_kernels_and_streams_are_what_counts(tmp_path):
    out = tmp_path / "topic"
    flags = [*TINY, "--data-root", str(tmp_path / "data"), "--device", "cuda", "--loader", "resident"]
    assert capture.main(["train", *flags, "--out", str(out)]) == 0
    profile = analyse(read_trace(out / "trace.json.gz"))
    assert profile.gpu
    assert profile.launches > 0
    assert profile.kernels > 10
    assert profile.syncs == 0  # those of the recorder itself are left out
    captured, uncaptured = (out / "summary.md").read_text().split("## The same step uncaptured")
    assert "| backward |" not in captured
    assert "| backward |" in uncaptured
    assert profile.memory is not None
    assert profile.categories["conv"] > 0
    assert sum(profile.categories.values()) == pytest.approx(profile.step)
    assert 0 <= profile.categories["idle"] < profile.step
    assert "- driver: " in (out / "summary.md").read_text()
