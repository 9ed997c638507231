"""Commands on conditional runs."""

import json

import pytest

from fastdiff.config import Config
from fastdiff.runs import checkpoint
from tests.evaluation.commands import call


def test_a_sweep_of_guidance_is_a_row_each_and_a_picture(conditional, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    asked = ["--guidance", 1, 2, "--interval", "off", "0.2,1.5", "--features", "efficientnet_lite0"]
    code = call("evaluate", "--checkpoint", conditional, "--steps", 2, "--n", 6, "--feature-size", 32, *asked)
    assert code == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["guidance"], row["guidance_interval"]) for row in rows] == [
        (1, "off"), (2, "off"), (1, "0.2,1.5"), (2, "0.2,1.5"),
    ]  # fmt: skip
    assert all(row["labels"] == "balanced" and 0 <= row["label_agreement"] <= 1 for row in rows)
    assert rows[0]["value"] == rows[2]["value"] != rows[1]["value"]
    assert (conditional / "saves" / "guidance.png").stat().st_size > 10_000
    logged = [json.loads(line) for line in (conditional / "metrics.jsonl").read_text().splitlines()]
    assert [row["value"] for row in logged] == [row["value"] for row in rows]
    assert call("evaluate", "--checkpoint", conditional, "--interval", "1.5") == 2
    assert "--interval 1.5 is not of the form LO,HI" in capsys.readouterr().err


def test_in_several_numbers_of_steps_each_class_is_drawn_once(conditional, tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert call("sample", "--checkpoint", conditional, "--steps", 1, 2, "--out", out) == 0
    assert "3 of 3 images each by ddim, 1 2 steps" in capsys.readouterr().out
    assert call("sample", "--checkpoint", conditional, "--steps", 2, "--out", out) == 0
    assert "24 of 24 images by ddim, 2 steps" in capsys.readouterr().out


def test_a_network_for_few_steps_warns_of_other_samplers_and_of_guidance_twice(conditional, tmp_path, capsys):
    saved = checkpoint.load_latest(conditional / "checkpoints")
    config = Config.from_dict(saved.state["config"]).replace(
        objective="x0", schedule="cosine", few_step="consistency", teacher="x", teacher_guidance=2.0
    )
    checkpoint.save(tmp_path / "few", saved.step, {**saved.state, "config": config.to_dict()})
    path, out = tmp_path / "few" / f"step-{saved.step}", tmp_path / "grid.png"
    other = "warning: this network was trained for few steps: --sampler consistency --steps 1 2 4."
    twice = "warning: this network has guidance 2 built in, and would be guided twice: --guidance 1."
    for flags, warnings in (
        ([], [other]), (["--sampler", "consistency"], []), (["--sampler", "consistency", "--guidance", 3], [twice])
    ):  # fmt: skip
        assert call("sample", "--checkpoint", path, "--steps", 2, "--n", 3, "--out", out, *flags) == 0
        assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")] == warnings
