"""The rows of a run in its two files: what is written, and what is mended when a run is opened."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from fastdiff.errors import UserError
from fastdiff.runs.run import CSV_HEADER, create_run, open_run
from tests.reporting.rows import EVAL, TRAIN
from tests.runs.opened import python, step_row


def csv_rows(path):
    """The CSV as rows: cells parsed as JSON does where they are numbers, empty ones left out."""

    def parse(cell):
        try:
            return json.loads(cell)
        except ValueError:
            return cell

    with open(path / "metrics.csv", newline="") as file:
        return [{name: parse(cell) for name, cell in row.items() if cell != ""} for row in csv.DictReader(file)]


def json_rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


class TestRows:
    def test_text_of_both_files(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            run.log_train(TRAIN)
            run.log_eval(EVAL)
            assert run.train_rows() == [{"kind": "train", **TRAIN}]
            assert run.eval_rows() == [{"kind": "eval", **EVAL}]
        lines = (run.path / "metrics.jsonl").read_text().split("\n")
        assert lines[0] == (
            '{"kind": "train", "step": 100, "images": 6400, "loss": 0.30000000000000004, "grad_norm": 1e-07, '
            '"lr": 0.0002, "images_per_second": 3210.5, "seconds": 12.25}'
        )
        assert [json.loads(line) for line in lines[:2]] == [{"kind": "train", **TRAIN}, {"kind": "eval", **EVAL}]
        assert lines[2:] == [""]
        assert (run.path / "metrics.csv").read_text().split("\n") == [
            "kind,step,images,loss,grad_norm,lr,images_per_second,seconds,skipped,gap,denoising_error,"
            "metric,value,samples,sampler,sampler_steps,eta,features,feature_size,reference,checkpoint,"
            "labels,guidance,guidance_interval,guide,label_agreement,label_agreement_real,"
            "psnr,ssim,latent_mean,latent_std",
            "train,100,6400,0.30000000000000004,1e-07,0.0002,3210.5,12.25,,,,,,,,,,,,,,,,,,,,,,,",
            "eval,100,6400,,,,,3.5,,,,fd_efficientnet_lite0,1.75,500,ddim,50,0.0,efficientnet_lite0,96,"
            '"digits, ""train""",checkpoints/step-100,,,,,,,,,,',
            "",
        ]

    def test_rows_are_there_at_once_and_equal_in_both_files(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            rows = []
            for step in range(5):
                row = step_row(step, seconds=step / 7)
                rows.append({"kind": "train", **row})
                run.log_train(row)
                assert json_rows(run.path) == csv_rows(run.path) == rows
        with open_run(run.path) as run:
            run.log_eval(step_row(5, sampler="ddpm"))
            assert json_rows(run.path) == csv_rows(run.path) == [*rows, {"kind": "eval", **step_row(5, sampler="ddpm")}]

    def test_numpy_numbers(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            run.log_train({"step": np.int64(3), "seconds": np.float32(0.1)})
            assert run.train_rows() == [{"kind": "train", "step": 3, "seconds": float(np.float32(0.1))}]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
    def test_non_finite(self, tmp_path, value):
        with create_run(tmp_path, config={}) as run:
            run.log_train(step_row(1, seconds=value))
            assert run.train_rows() == [{"kind": "train", **step_row(1, seconds=None)}]
            assert (run.path / "metrics.jsonl").read_text().endswith('"seconds": null}\n')
            assert csv_rows(run.path) == [{"kind": "train", **step_row(1)}]

    @pytest.mark.parametrize(
        ("kind", "row", "error", "message"),
        [
            ("train", {"step": 1, "losss": 0.1}, ValueError, r"train row with unknown columns \['losss'\]"),
            ("train", {"step": 1, "value": 0.1}, ValueError, "unknown columns"),
            ("eval", {"step": 1, "loss": 0.1}, ValueError, "eval row with unknown columns"),
            ("train", {"loss": 0.1}, ValueError, "no step"),
            ("train", {"step": 1, "loss": torch.tensor(0.1)}, TypeError, "loss: Tensor cannot be logged"),
        ],
    )
    def test_bugs_are_errors_and_write_nothing(self, tmp_path, kind, row, error, message):
        with create_run(tmp_path, config={}) as run:
            with pytest.raises(error, match=message):
                (run.log_train if kind == "train" else run.log_eval)(row)
            assert json_rows(run.path) == csv_rows(run.path) == []

    def test_truncate(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            for step in (0, 10, 20, 30):
                run.log_eval(step_row(step))
                run.log_train(step_row(step))
            run.truncate(20)
            run.log_train(step_row(25))
            expected = [(kind, step) for step in (0, 10, 20) for kind in ("eval", "train")] + [("train", 25)]
            assert [(row["kind"], row["step"]) for row in json_rows(run.path)] == expected
            assert csv_rows(run.path) == json_rows(run.path)
            assert [row["step"] for row in run.eval_rows()] == [0, 10, 20]
        assert not list(run.path.glob("*.tmp")) + list(run.path.glob(".*.tmp"))


class TestRepair:
    @pytest.fixture
    def logged(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            for step in (1, 2):
                run.log_train(step_row(step, seconds=0.5))
        return run.path

    @pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv"])
    def test_half_a_line_at_every_byte(self, logged, name):
        path = logged / name
        whole = path.read_bytes()
        first, last = whole.splitlines(keepends=True)[-2:]
        for cut in range(len(whole) - len(last), len(whole)):
            path.write_bytes(whole[:cut])
            with open_run(logged) as run:
                # Without its newline alone, the JSON is complete; the CSV is made from the JSON.
                steps = [1, 2] if name == "metrics.csv" or cut == len(whole) - 1 else [1]
                assert [row["step"] for row in run.train_rows()] == steps
                assert json_rows(logged) == csv_rows(logged) == run.train_rows()
                run.log_train(step_row(3))
                assert [row["step"] for row in json_rows(logged)] == [*steps, 3]
            with open_run(logged) as run:
                run.truncate(1)
                run.log_train(step_row(2, seconds=0.5))
            assert path.read_bytes() == whole
        assert first in whole

    def test_a_tail_of_zeros_and_missing_files(self, logged):
        whole = (logged / "metrics.jsonl").read_bytes()
        (logged / "metrics.jsonl").write_bytes(whole + bytes(512))
        (logged / "metrics.csv").unlink()
        (logged / "saves").rmdir()
        with open_run(logged) as run:
            assert run.saves.is_dir()
        assert (logged / "metrics.jsonl").read_bytes() == whole
        assert csv_rows(logged) == json_rows(logged)

    @pytest.mark.parametrize("line", ["{half", "[1]", '{"kind": "test", "step": 1}', '{"kind": "train"}'])
    def test_damage_before_the_last_line_is_told_and_kept(self, logged, line):
        path = logged / "metrics.jsonl"
        damaged = line + "\n" + path.read_text()
        path.write_text(damaged)
        for _ in range(2):  # and the lock is free again
            with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: not a row of metrics"):
                open_run(logged)
        assert path.read_text() == damaged

    def test_unknown_column_in_the_file(self, logged):
        path = logged / "metrics.jsonl"
        path.write_text('{"kind": "train", "step": 0, "vibes": 1}\n')
        with pytest.raises(UserError, match=r"line 1: unknown columns \['vibes'\]"):
            open_run(logged)

    def test_kill_9_while_logging(self, repo, tmp_path):
        code = """
import itertools, sys
from fastdiff.runs.run import create_run
run = create_run(sys.argv[1], config={})
for step in itertools.count():
    run.log_train({"step": step, "seconds": step / 7})
    if step == 100:
        print("busy", flush=True)
"""
        process = python(repo, code, tmp_path)
        assert process.stdout.readline() == "busy\n"
        process.kill()
        process.communicate()
        for name in ("metrics.jsonl", "metrics.csv"):
            assert (tmp_path / "1" / name).read_bytes().endswith(b"\n")
        rows = json_rows(tmp_path / "1")
        assert [row["step"] for row in rows] == list(range(len(rows)))
        assert len(rows) > 100


def test_header_holds_each_column_once():
    assert len(set(CSV_HEADER)) == len(CSV_HEADER) == 31
