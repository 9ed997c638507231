"""Ranks as users start them."""

import signal

import pytest
import torch

from fastdiff.runs import checkpoint
from tests.distributed.conftest import torchrun

FLAGS = [
    "--preset", "quick", "--channels", "8", "--channel-mult", "1", "2", "--attention-resolutions", "--norm-groups", "4",
    "--features", "none", "--no-eval-at-start", "--log-every", "1", "--save-every", "100000", "--eval-every", "100000",
    "--lr-decay", "constant",
]  # fmt: skip


def test_a_signal_to_torchrun_leaves_a_checkpoint(tmp_path):
    process = torchrun("train_cifar.py", *FLAGS, "--device", "cpu", "--batch-size", 8, "--run-root", tmp_path)
    for line in process.stdout:
        if line.startswith("step 3"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    (last,) = checkpoint.list_checkpoints(tmp_path / "1" / "checkpoints")
    assert f"stopped by SIGTERM at step {last.name.removeprefix('step-')}" in out, out + err
    assert err.count("finishing this step") == 1


def test_ranks_whose_terminal_has_closed_leave_a_checkpoint_too(tmp_path):
    process = torchrun("train_cifar.py", *FLAGS, "--device", "cpu", "--batch-size", 8, "--run-root", tmp_path)
    for line in process.stdout:
        if line.startswith("step 3"):
            break
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) != 0
    (last,) = checkpoint.list_checkpoints(tmp_path / "1" / "checkpoints")
    log = (tmp_path / "1" / "log.txt").read_text()
    assert f"stopped by SIGHUP at step {last.name.removeprefix('step-')}\n" in log


def test_a_bad_flag_is_told_once(tmp_path):
    out, err = torchrun("train_cifar.py", "--steps", "0", "--run-root", tmp_path).communicate(timeout=120)
    assert (out + err).count("--steps is 0, but must be at least 1.") == 1, out + err


def test_a_batch_that_ranks_cannot_share_is_refused_once(tmp_path):
    flags = ["--device", "cpu", "--batch-size", "12", "--accumulate", "4", "--run-root", tmp_path / "working"]
    out, err = torchrun("train_cifar.py", *flags).communicate(timeout=120)
    told = "error: --batch-size is 12, but must be a multiple of 8: 2 ranks times --accumulate 4."
    assert [line.strip() for line in err.splitlines() if told in line] == [told, f"traceback : {told}"], out + err
    assert "exitcode  : 2" in err.partition("Root Cause")[2], out + err
    assert not (tmp_path / "working").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("graphs", ["--graphs", "--no-graphs"])
def test_two_gpus_train_by_nccl(tmp_path, graphs):
    """The whole way: compiled, fused kernels, captured where asked; a checkpoint and an evaluation at the end."""
    flags = [*FLAGS, "--device", "cuda", "--steps", 20, "--eval-every", 20, "--run-root", tmp_path, graphs]
    process = torchrun("train_cifar.py", *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    losses = [float(line.split("loss ")[1].split()[0]) for line in out.splitlines() if line.startswith("step ")]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert checkpoint.load_latest(tmp_path / "1" / "checkpoints").step == 20
