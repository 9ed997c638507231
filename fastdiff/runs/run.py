"""The run directory: `config.json`, `metrics.jsonl` + `metrics.csv`, TensorBoard events, `log.txt`, `checkpoints/` and
`saves/`.

`metrics.jsonl` is the record: one JSON object a line, told apart by `"kind"`. `metrics.csv` holds the same rows under
one fixed header (a column that a row lacks is an empty cell) and is derived from it whenever a run is opened. A number
that is not finite becomes `null` in the JSON, an empty cell in the CSV and `None` in the rows read back; TensorBoard
gets the number itself.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import numbers
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.errors import UserError
from fastdiff.runs import locking
from fastdiff.runs.files import Lines, sync, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

TRAIN_COLUMNS = (
    *("step", "images", "loss", "grad_norm", "lr", "images_per_second", "seconds", "skipped", "gap"),
    "denoising_error",
)
EVAL_COLUMNS = (
    *("step", "images", "metric", "value", "samples", "sampler", "sampler_steps", "eta"),
    *("features", "feature_size", "reference", "seconds", "checkpoint"),
    *("labels", "guidance", "guidance_interval", "guide", "label_agreement", "label_agreement_real"),
    *("psnr", "ssim", "latent_mean", "latent_std"),
)
CSV_HEADER = tuple(dict.fromkeys(("kind", *TRAIN_COLUMNS, *EVAL_COLUMNS)))  # their union, in this order
TENSORBOARD_SCALARS = ("loss", "grad_norm", "lr", "images_per_second", "denoising_error")

log = logging.getLogger(__name__)

Row = dict[str, Any]  # column -> str, int, float or None


def create_run(root: str | os.PathLike = "working", *, config: dict) -> Run:
    """Makes `<root>/<n>/`, with n one above the highest there (from 1), and opens it.

    Two runs started at the same moment get different numbers. `config` is anything that JSON can hold.
    Raises UserError if the directory cannot be made.
    """
    text = json_text(config)  # before the directory: a bad config leaves none behind
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        path = _make_numbered(root)
    except OSError as error:
        raise UserError(
            f"{root}: cannot make a run directory here ({error.strerror}); choose a folder that you can write to"
        ) from error
    lock = None
    try:
        lock = locking.acquire(path)
        write_atomically(path / "config.json", text.encode())
        run = Run(path, json.loads(text), lock)
        sync(root)
        return run
    except BaseException as error:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def _cannot_write(path: Path, error: OSError) -> UserError:
    free = shutil.disk_usage(path.parent).free
    return UserError(f"{path}: cannot be written ({error.strerror}; {free:,} bytes are free); free some space")


def open_run(path: str | os.PathLike) -> Run:
    """Opens a run that exists, to go on with it: takes its lock, and mends what a power cut left half written.

    Raises UserError if `path` is no run directory, if another process has the run open, or if a file is damaged.
    """
    path = Path(path)
    config_path = path / "config.json"
    if not config_path.is_file():
        raise UserError(f"{path}: no run directory (it has no config.json); give one such as working/1")
    try:
        config = json.loads(config_path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read as a JSON object ({error})"
        raise UserError(f"{config_path}: {problem}; restore it, or start a new run") from error
    lock = locking.acquire(path)
    try:
        return Run(path, config, lock)
    except BaseException as error:
        os.close(lock)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


class Run:
    """A run directory held open, and locked, by this process. Made by `create_run` and `open_run`."""

    def __init__(self, path: Path, config: dict, lock: int):
        self.path, self.config = path, config  # `config` is what `config.json` holds
        self.checkpoints, self.saves = path / "checkpoints", path / "saves"
        self._lock: int | None = lock
        self._files: list[Lines] = []  # metrics.jsonl and metrics.csv
        self._writer: SummaryWriter | None = None
        self._events_lost = False
        self._purge_step: int | None = None
        self.checkpoints.mkdir(exist_ok=True)
        self.saves.mkdir(exist_ok=True)
        for folder in (path, self.saves):
            for stale in folder.glob(".*.tmp"):  # of `write_atomically`, in a run that was killed
                stale.unlink()
        self._store(self._rows())

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        if kind is not None:
            self.note(f"{kind.__name__}: {error}")
        self.close()

    def note(self, line: str) -> None:
        """Appends a line to `log.txt`, for who could not see it elsewhere; it is dropped if that cannot be written."""
        now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        with suppress(OSError), open(self.path / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{now}  {line}\n")

    def log_train(self, row: Row) -> None:
        """Appends one row of training metrics: `step` and any other of TRAIN_COLUMNS.

        Values are Python or numpy numbers (no tensors: reading one would wait for the device). An unknown column
        raises ValueError, another type TypeError.
        """
        self._append(_checked("train", row, TRAIN_COLUMNS))
        for name in TENSORBOARD_SCALARS:
            if row.get(name) is not None:
                self._show("add_scalar", f"train/{name}", row[name], row["step"])

    def log_eval(self, row: Row) -> None:
        """Appends one row of an evaluation: `step` and any other of EVAL_COLUMNS.

        `metric` names what `value` is ("fid", "fd_efficientnet_lite0"). Raises as `log_train` does.
        """
        self._append(_checked("eval", row, EVAL_COLUMNS))
        if row.get("metric") is not None and row.get("value") is not None:
            self._show("add_scalar", f"eval/{row['metric']}", row["value"], row["step"])
            self._show("flush")

    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Shows `image`, uint8 (H, W, 3), in TensorBoard under `tag`."""
        self._show("add_image", tag, image, step, dataformats="HWC")
        self._show("flush")

    def train_rows(self) -> list[Row]:
        """The training rows in the order they were written, read from `metrics.jsonl`."""
        return [row for row in self._rows() if row["kind"] == "train"]

    def eval_rows(self) -> list[Row]:
        """The evaluation rows in the order they were written, read from `metrics.jsonl`."""
        return [row for row in self._rows() if row["kind"] == "eval"]

    def teacher_rows(self) -> list[Row]:
        """The evaluation rows of the run whose network this one, trained for few steps, was taught by or began from."""
        told = {"few_step": "none", **self.config.get("optim", {}), **self.config.get("tuning", {})}
        named = told.get("teacher") or told.get("init_from")
        if told["few_step"] == "none" or named is None:
            return []
        rows: list[Row] = []
        with suppress(UserError, OSError, RuntimeError):  # it may be gone, not ours to read, or in no one's ~
            path = Path(named).expanduser()
            for folder in (path, path.parent.parent):  # a run, or a checkpoint in one
                rows = rows or _read_rows(folder / "metrics.jsonl")
        return [row for row in rows if row["kind"] == "eval"]

    def record_config(self, config: dict) -> None:
        """Have `config.json` hold this, where it does not."""
        text = json_text(config)
        if self.config != json.loads(text):
            try:
                write_atomically(self.path / "config.json", text.encode())
            except OSError as error:
                raise _cannot_write(self.path, error) from error
            self.config = json.loads(text)

    def truncate(self, step: int, *, drop: Callable[[Row], bool] = lambda row: False) -> None:
        """Drops the rows of steps after `step`: a run resumed from that step's checkpoint writes them again.

        `drop` says of a row of `step` itself or before whether it goes too.
        """
        self._store([row for row in self._rows() if row["step"] <= step and not drop(row)])
        self._close_writer()
        self._purge_step = step + 1  # the next writer tells TensorBoard to forget events from here on

    @contextmanager
    def spared(self, say: Callable[[str], object]) -> Generator[None]:
        """A picture or a note that cannot be written is not worth a run: the reason goes to `say`."""
        try:
            yield
        except OSError as error:
            say(f"{error.filename or self.path} could not be written: {error.strerror or error}")

    def sync(self) -> None:
        """Have the disk confirm the rows so far, so that no checkpoint that follows is ahead of them."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Closes the files and frees the lock. Closing twice does nothing more."""
        self._close_writer()
        for file in self._files:
            file.close()
        if self._lock is not None:
            locking.release(self._lock)
            self._lock = None

    def _rows(self) -> list[Row]:
        return _read_rows(self.path / "metrics.jsonl")

    def _store(self, rows: list[Row]) -> None:
        """Makes both files hold exactly `rows`, and opens them for appending."""
        header = dict(zip(CSV_HEADER, CSV_HEADER, strict=True))
        for file in self._files:
            file.close()
        self._files = []
        for name, lines in (
            ("metrics.jsonl", map(_json_line, rows)),
            ("metrics.csv", map(_csv_line, [header, *rows])),
        ):
            path, content = self.path / name, "".join(lines).encode()
            if not path.exists() or path.read_bytes() != content:
                write_atomically(path, content)
            self._files.append(Lines(path))

    def _append(self, row: Row) -> None:
        for file, line in zip(self._files, (_json_line(row), _csv_line(row)), strict=True):
            file.append(line)

    def _show(self, action: str, *arguments: Any, **options: Any) -> None:
        """Call TensorBoard's writer; if that fails its events are lost, and the next call begins a new file."""
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # here, as importing it takes seconds

                self._writer = SummaryWriter(self.path / "tensorboard", purge_step=self._purge_step, flush_secs=30)
            getattr(self._writer, action)(*arguments, **options)
            self._events_lost = False
        except (OSError, UnicodeError) as error:  # it cannot encode a path that is no UTF-8
            if not self._events_lost:
                log.warning("%s: TensorBoard events are lost (%s)", self.path / "tensorboard", error)
            self._events_lost, self._writer = True, None

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._show("close")
            self._writer = None


def json_text(config: dict) -> str:
    """A config as `config.json` holds it. Raises ValueError for a number that is not finite."""
    return json.dumps(config, indent=2, allow_nan=False) + "\n"


def _make_numbered(root: Path) -> Path:
    number = max((int(entry.name) for entry in root.iterdir() if entry.name.isdecimal()), default=0)
    while True:
        number += 1
        path = root / str(number)
        with suppress(FileExistsError):
            path.mkdir()  # atomic: of two processes that try one number, one gets it
            return path


def _checked(kind: str, row: Row, columns: tuple[str, ...]) -> Row:
    unknown = row.keys() - set(columns)
    if unknown or "step" not in row:
        problem = f"unknown columns {sorted(unknown)}" if unknown else "no step"
        raise ValueError(f"{kind} row with {problem}; the columns are {', '.join(columns)}")
    return {"kind": kind} | {name: _plain(name, value) for name, value in row.items()}


def _plain(name: str, value: Any) -> str | int | float | None:
    """`value` as JSON holds it: numpy scalars become Python numbers, and numbers that are not finite None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"{name}: {type(value).__name__} cannot be logged; give a str, a Python or numpy number, or None")


def _json_line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _csv_line(row: Row) -> str:
    text = io.StringIO()
    csv.DictWriter(text, CSV_HEADER, lineterminator="\n").writerow(row)  # floats by repr, None as an empty cell
    return text.getvalue()


def _read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, without a last line that was cut in the middle."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            known = {"train": TRAIN_COLUMNS, "eval": EVAL_COLUMNS}[row["kind"]]
            int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # what follows the last newline: nothing, or half a line
                break
            raise UserError(f"{path}, line {number}: not a row of metrics; mend or delete that line") from error
        if unknown := row.keys() - {"kind", *known}:
            raise UserError(
                f"{path}, line {number}: unknown columns {sorted(unknown)}; "
                "open the run with the version of fastdiff that wrote it"
            )
        rows.append(row)
    return rows
