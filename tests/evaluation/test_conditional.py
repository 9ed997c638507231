"""Commands on conditional runs."""

import json

import pytest

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
