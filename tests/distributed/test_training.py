"""Two ranks train what one would, resume exactly, and share out evaluations; rank 0 alone writes."""

import dataclasses

import pytest
import torch

from fastdiff.config import Config
from fastdiff.data.datasets import load_dataset
from fastdiff.data.loaders import batch_plan
from fastdiff.diffusion.objectives import make_objective
from fastdiff.errors import UserError
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.nets.unet import UNet
from fastdiff.runs import checkpoint
from fastdiff.runtime.world import Ranks
from fastdiff.training.optim import LearningRate
from fastdiff.training.step import step_seed
from tests.configs import TINY
from tests.numerics import assert_as_accurate
from tests.reliability.jobs import rows, same_state, saved


def exact_losses(config: Config) -> torch.Tensor:
    """The losses of each step in float64, by a loop that shares no code with TrainStep."""
    torch.manual_seed(config.run.seed)
    model = UNet(config.net).double()
    objective = make_objective("eps", schedule="ddpm-linear", timesteps=config.diffusion.timesteps, weighting="uniform")
    adam = torch.optim.Adam(model.parameters())
    images = torch.from_numpy(load_dataset(config.images.data, root=config.images.data_root, image_size=8).images)
    labels = torch.arange(len(images)) % 2
    losses = []
    for step in range(config.run.steps):
        indices, flips = map(torch.from_numpy, batch_plan(len(images), batch_size=8, seed=config.run.seed, step=step))
        batch = torch.where(flips[:, None, None, None], images[indices].flip(2), images[indices])
        torch.manual_seed(step_seed(config.run.seed, step))
        t, eps = objective.sample_t(8), torch.randn(8, 8, 8, 3).permute(0, 3, 1, 2).double()
        x0, cond = (batch.permute(0, 3, 1, 2).double() - 127.5) / 127.5, {}
        if config.conditions.conditional:
            cond["labels"] = torch.where(torch.rand(8, 1)[:, 0] < config.conditions.label_dropout, 2, labels[indices])
        loss = objective.loss(model, x0, t, eps, **cond).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        adam.param_groups[0]["lr"] = LearningRate.of(config)(step)
        adam.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize(("kernels", "conditional"), [("torch", False), ("triton", True)])
def test_two_ranks_have_the_loss_curve_of_one(tiny_config, labelled, run_ranks, tmp_path, kernels, conditional):
    options = {"net": dataclasses.replace(TINY, dropout=0.0), "kernels": kernels, "eval_every": 1000}
    if conditional:
        options |= {"conditional": True, "label_dropout": 0.3, "data": labelled("cat", "dog")}
    curves = {}
    for ranks, accumulate in ((1, 1), (2, 1), (2, 2)):
        root = f"ranks-{ranks}-{accumulate}"
        ended = run_ranks("train", tiny_config(root, accumulate=accumulate, **options), ranks=ranks)
        assert ended.codes == [0] * ranks, ended.outputs
        curves[ranks, accumulate] = torch.tensor([row["loss"] for row in rows(tmp_path / root / "1")])
    config = Config.from_dict(tiny_config(**options))
    if conditional:
        config = config.replace(num_classes=2)
    exact = exact_losses(config)
    assert exact[-1] < exact[0]
    for parts in ((2, 1), (2, 2)):
        assert_as_accurate(curves[parts], curves[1, 1], exact, f"the losses of {parts[0]} ranks")


@pytest.mark.parametrize(
    ("program", "named"),
    [("other_objective", "rank 1 has another --objective (v) than rank 0 (eps)"),
     ("other_intervals", "rank 1 has another --save-every (7) than rank 0 (5)")],
)  # fmt: skip
def test_ranks_with_other_flags_end_at_once(tiny_config, run_ranks, tmp_path, program, named):
    ended = run_ranks(program, tiny_config())
    assert ended.codes == [1, 1], ended.outputs
    assert ended.errors[0] == f"error: {named}; make them equal."
    assert ended.errors[1].startswith("error: rank 1: no answer from ")
    assert not (tmp_path / "working").exists()


def test_rank_0_alone_writes_and_one_rank_can_go_on(tiny_config, run_ranks, tmp_path):
    ended = run_ranks("train", tiny_config(), timeout=200)
    assert ended.codes == [0, 0], ended.outputs
    assert [path.name for path in (tmp_path / "working").iterdir()] == ["1"]
    run = tmp_path / "working" / "1"
    assert [row["step"] for row in rows(run)] == list(range(1, 21))
    assert [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")] == [
        f"step-{step}" for step in (5, 10, 15, 20)
    ]
    assert "2, each with 4 of 8 images" in ended.outputs[0]
    assert f"look at {run}" in ended.outputs[0]
    assert ended.outputs[1] == ""
    ended = run_ranks("train", tiny_config(steps=23), str(run), ranks=1)
    assert ended.codes == [0], ended.outputs
    assert checkpoint.load_latest(run / "checkpoints").step == 23


@pytest.mark.parametrize("stops", [[7, 12], pytest.param(list(range(1, 20)), marks=pytest.mark.slow)], ids=["2", "19"])
def test_a_resumed_run_of_two_ranks_is_the_unbroken_one(tiny_config, run_ranks, tmp_path, stops):
    options = {"accumulate": 2, "eval_every": 1000}
    assert run_ranks("train", tiny_config("whole", **options)).codes == [0, 0]
    whole = tmp_path / "whole" / "1"
    for stop in stops:
        config = tiny_config(f"stopped-{stop}", **options)
        run = tmp_path / f"stopped-{stop}" / "1"
        # A signal to rank 1 alone, within the step: of its two parts, between the first and the second.
        ended = run_ranks("train", config, None, {"rank": 1, "place": "forward", "call": 2 * stop, "way": "term"})
        assert ended.codes == [143, 143], ended.outputs
        assert checkpoint.load_latest(run / "checkpoints").step in (stop, stop + 1)
        ended = run_ranks("train", config, str(run))
        assert ended.codes == [0, 0], ended.outputs
        assert same_state(saved(run), saved(whole))
        assert rows(run) == rows(whole)
        assert len(rows(run)) == 20


def test_samples_and_statistics_of_two_ranks_are_those_of_one(tiny_config, run_ranks):
    ended = run_ranks("shared_samples", tiny_config())
    assert ended.codes == [0, 0], ended.outputs


def test_ranks_whose_weights_drift_apart_are_stopped(tiny_config, run_ranks, tmp_path):
    ended = run_ranks("other_weights", tiny_config())
    assert ended.codes == [1, 1], ended.outputs
    assert "the ranks' weights differ after 5 steps" in ended.errors[0]
    assert checkpoint.list_checkpoints(tmp_path / "working" / "1" / "checkpoints") == []


def test_a_mistake_of_rank_0_alone_ends_all(tiny_config, run_ranks, tmp_path):
    ended = run_ranks("train", tiny_config(), str(tmp_path / "nothing"))
    assert ended.codes == [1, 1], ended.outputs
    told, lost = ended.errors
    assert str(tmp_path / "nothing") in told
    assert lost.startswith("error: rank 1: no answer from ")
    assert "Traceback" not in "".join(ended.outputs)


def test_a_signal_to_one_rank_before_an_evaluation_stops_all(tiny_config, run_ranks, tmp_path):
    """Rank 1 may be drawing samples already when rank 0 gets it."""
    fault = {"rank": 0, "place": "before evaluation", "call": 2, "way": "term"}
    ended = run_ranks("train", tiny_config(), None, fault)
    assert ended.codes == [143, 143], ended.outputs
    assert checkpoint.load_latest(tmp_path / "working" / "1" / "checkpoints").step == 10


def test_collectives(run_ranks):
    ended = run_ranks("collectives")
    assert ended.codes == [0, 0], ended.outputs


def test_ranks_with_different_data_are_refused(run_ranks):
    ended = run_ranks("other_data")
    assert ended.codes == [1, 1], ended.outputs
    assert ended.errors[0] == "error: rank 1 has another data (set 1) than rank 0 (set 0); make them equal."


def test_ranks_that_wait_for_each_other_end(run_ranks):
    ended = run_ranks("other_order")
    assert ended.codes == [1, 1], ended.outputs
    assert "no answer from others, which wait themselves in: all-reduce (Timed out" in ended.errors[0]
    assert "in: broadcast" in ended.errors[1]


def test_a_rank_knows_that_torchrun_is_gone(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    ranks = Ranks(torch.device("cpu"))
    assert not ranks.orphaned
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert ranks.orphaned


def test_ranks_that_torchrun_did_not_start_are_refused(monkeypatch):
    """Each would train a run of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, but .*LOCAL_WORLD_SIZE is not set; start the ranks"):
        Ranks.launched("cpu", timeout=10)


def test_two_ranks_train_an_autoencoder_and_in_its_latents_as_one(tiny_config, run_ranks, tmp_path):
    shape = AutoencoderConfig(factor=2, base_channels=8, blocks=1)
    auto = {"autoencoder": shape, "eval_steps": 50, "steps": 6, "eval_every": 6, "eval_samples": 30}
    told = {"latents": str(tmp_path / "auto-1" / "1"), "image_size": 4, "steps": 6, "eval_every": 100}
    for name, options in (("auto", auto), ("latents", {"net": dataclasses.replace(TINY, dropout=0.0), **told})):
        found = {}
        for ranks in (1, 2):
            ended = run_ranks("train", tiny_config(f"{name}-{ranks}", **options), ranks=ranks)
            assert ended.codes == [0] * ranks, ended.outputs
            found[ranks] = [
                {key: row[key] for key in ("loss", "value", "psnr", "latent_std") if key in row}
                for row in rows(tmp_path / f"{name}-{ranks}" / "1")
            ]
        assert len(found[1]) == 6 + (name == "auto")
        for one, two in zip(found[1], found[2], strict=True):
            assert two == pytest.approx(one, rel=1e-5)
