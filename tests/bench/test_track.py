import json
import math
from itertools import pairwise

import numpy as np
import pytest

from bench import machine, track
from fastdiff.errors import UserError
from fastdiff.evaluation.features import FeatureExtractor
from fastdiff.reporting.plots import plot_track
from fastdiff.training import parts

TINY = [
    *("--image-size", "8", "--channels", "8", "--channel-mult", "1", "2", "--attention-resolutions", "4"),
    *("--norm-groups", "4", "--timesteps", "20", "--batch-size", "8", "--log-every", "2", "--device", "cpu"),
    *("--features", "efficientnet_lite0", "--eval-samples", "8", "--eval-steps", "2"),
    *("--grid-samples", "4", "--warmup-steps", "2"),
]


def trained(*pairs, batch=64):
    """Training rows of (step, seconds so far)."""
    return [
        {
            "step": step,
            "images": batch * step,
            "seconds": float(seconds),
            "images_per_second": batch * (step - s) / (seconds - t),
        }
        for (s, t), (step, seconds) in pairwise([(0, 0), *pairs])
    ]


def evaluated(step, value, *, seconds=3.0, batch=64, **changes):
    row = {"step": step, "images": batch * step, "metric": "fid", "value": value, "samples": 100, "sampler": "ddim"}
    return row | {"sampler_steps": 10, "feature_size": None, "reference": "digits", "seconds": seconds} | changes


NOW = track.Now(flops=10**9, ceiling=1e12, memory=("gpu allocated", 5000))


def test_a_row_holds_what_lies_between_two_evaluations():
    train_rows = trained((10, 2), (20, 4), (30, 14), (40, 24))
    eval_rows = [evaluated(0, 90.0), evaluated(20, 50.0, seconds=5), evaluated(40, 40.0, seconds=7)]
    first, second, third = track.track_rows(train_rows, eval_rows, [], NOW)
    assert (first["images_per_second"], first["step_ms"], first["seconds_total"]) == (None, None, 3)
    assert second["images_per_second"] == pytest.approx(20 * 64 / 4)
    assert third["images_per_second"] == pytest.approx(20 * 64 / 20)  # not the mean since the start
    assert (second["step_ms"], third["step_ms"]) == (pytest.approx(200), pytest.approx(1000))
    assert [row["fid"] for row in (first, second, third)] == [90, 50, 40]
    assert (third["seconds_evaluating"], third["seconds_total"]) == (7, 24 + 3 + 5 + 7)
    # Only the last row is measured now: the machine's share is of 64 images a second of 1 GFLOP each.
    assert third["share_of_ceiling"] == pytest.approx(64e9 / 1e12)
    assert (third["memory_of"], third["memory_peak_bytes"]) == ("gpu allocated", 5000)
    assert second["share_of_ceiling"] is second["memory_peak_bytes"] is None


def test_a_row_from_before_the_first_step_has_no_time():
    train_rows, eval_rows = trained((10, 2)), [evaluated(10, 50.0)]
    before = {"step": 0, "images": 0, "denoising_error": 0.1}
    assert track.track_rows([before, *train_rows], eval_rows, [], NOW) == track.track_rows(
        train_rows, eval_rows, [], NOW
    )


def test_steps_that_no_clock_saw_do_not_make_it_faster():
    """The first steps of a process compile: its first row counts their images, but not their time."""
    rows = [{"step": 4, "images": 256, "seconds": 3.0, "images_per_second": 64.0}]  # 3 of 4 steps were timed
    (row,) = track.track_rows(rows, [evaluated(4, 9.0)], [], None)
    assert (row["images_per_second"], row["step_ms"]) == (64, 1000)


def test_measurements_of_earlier_calls_are_kept_and_those_of_dropped_evaluations_are_not():
    train_rows = trained((10, 1), (20, 2), (30, 3))
    eval_rows = [evaluated(10, 5.0), evaluated(20, 4.0)]
    known = track.track_rows(train_rows, eval_rows[:1], [], NOW)
    later = track.Now(flops=10**9, ceiling=2e12, memory=("host resident", 7000))
    rows = track.track_rows(train_rows, eval_rows, known, later)
    assert [row["memory_peak_bytes"] for row in rows] == [5000, 7000]
    assert rows[1]["share_of_ceiling"] == pytest.approx(rows[0]["share_of_ceiling"] / 2)
    assert track.track_rows(train_rows, eval_rows, rows, None) == rows
    assert track.track_rows(train_rows, eval_rows[:1], rows, None) == rows[:1]


def test_two_evaluations_of_one_step_have_the_same_throughput():
    rows = track.track_rows(trained((10, 2)), [evaluated(10, 5.0), evaluated(10, 4.0, sampler="ddpm")], [], None)
    assert [row["images_per_second"] for row in rows] == [320, 320]


class Colours(FeatureExtractor):
    """The mean of each channel: features that cost nothing."""

    name, metric, size, num_features = "colours", "fd_colours", 8, 3

    def extract(self, images):
        return images.double().mean((2, 3))


@pytest.fixture
def quiet(monkeypatch):
    """A ceiling, and features, that cost no time."""
    monkeypatch.setattr(machine, "ceilings_apart", lambda *_, **__: {"bytes_s": 1e9, "flops_s": 1e12})
    monkeypatch.setattr(parts, "make_extractor", lambda *_, **__: Colours())


def rows_of(run):
    return [json.loads(line) for line in (run / "track.jsonl").read_text().splitlines()]


def test_a_run_is_tracked_resumed_and_plotted_anew(tmp_path, quiet, capsys):
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    paths = ["--data", str(tmp_path / "images.npz"), "--data-root", str(tmp_path), "--run-root", str(tmp_path / "runs")]
    assert track.main([*TINY, *paths, "--steps", "8", "--every", "4", "--eval-at-start"]) == 0
    run = tmp_path / "runs" / "1"
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [0, 4, 8]
    for row in rows:
        assert row["metric"] == "fd_colours"
        assert math.isfinite(row["fd_colours"])
        assert row["memory_of"] == "host resident"
        assert row["memory_peak_bytes"] > 2**20
    for row in rows[1:]:
        assert row["step_ms"] * row["images_per_second"] == pytest.approx(8e3)
        assert 0 < row["share_of_ceiling"] < 1
    assert (run / "track.png").read_bytes()[:4] == b"\x89PNG"

    assert track.main(["--resume", str(run), "--steps", "12"]) == 0
    assert [row["step"] for row in rows_of(run)] == [0, 4, 8, 12]
    assert rows_of(run)[:3] == rows
    known = rows_of(run)

    (run / "track.png").unlink()
    assert track.main(["--plot", str(run)]) == 0
    assert "4 rows" in capsys.readouterr().out
    assert (run / "track.png").exists()
    assert rows_of(run) == known
    (run / "track.jsonl").unlink()  # a run of train_cifar.py has none
    assert track.main(["--plot", str(run)]) == 0
    unknown = {"share_of_ceiling": None, "ceiling_flops": None, "memory_peak_bytes": None, "memory_of": None}
    assert rows_of(run) == [row | unknown for row in known]
    (run / "track.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match=r"track\.jsonl is damaged"):
        track.main(["--plot", str(run)])


def test_mistakes_are_one_line(tmp_path, quiet):
    with pytest.raises(UserError, match="--features none"):
        track.main([*TINY, "--features", "none"])
    with pytest.raises(UserError, match="no run directory"):
        track.main(["--plot", str(tmp_path / "nothing")])
    run = tmp_path / "1"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no evaluation yet"):
        track.main(["--plot", str(run)])
    with pytest.raises(SystemExit) as caught:
        track.main(["--nope"])
    assert caught.value.code == 2


def test_metrics_that_do_not_compare_are_curves_of_their_own(tmp_path):
    rows = track.track_rows(
        trained((10, 2), (20, 4)), [evaluated(10, 5.0), evaluated(20, 4.0, metric="fd_x", samples=50)], [], None
    )
    plot_track(rows, tmp_path / "track.png")
    assert (tmp_path / "track.png").stat().st_size > 5000
    plot_track([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
