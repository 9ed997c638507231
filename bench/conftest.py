"""`pytest bench`: options, the run's table, and its JSON."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.results import Results, rich_table
from bench.suite import Bench, Comparison, Size, make_size
from bench.timing import Samples
from fastdiff.runtime.device import slug

HERE = Path(__file__).parent
BENCH = pytest.StashKey[Bench]()
WHOLE, DESELECTED = pytest.StashKey[bool](), pytest.StashKey[bool]()


class ReplayClock:
    """A timer for pytest-benchmark that tells times already measured: interleaved ones, or a GPU's."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, samples: Samples, benchmark) -> None:
        """One round of pytest-benchmark for each sample, so that its statistics are the samples'."""
        seconds = iter(samples.seconds)

        def advance() -> None:
            self.now = next(seconds)

        def rewind() -> None:
            self.now = 0.0

        benchmark.pedantic(advance, setup=rewind, rounds=len(samples.seconds))


CLOCK = ReplayClock()


def pytest_addoption(parser):
    group = parser.getgroup("fastdiff bench")
    group.addoption(
        "--size", choices=("auto", "gpu", "cpu", "tiny"), default="auto",
        help="what is measured; auto: gpu where there is one, else cpu; tiny: only try the code",
    )  # fmt: skip
    group.addoption(
        "--save", metavar="JSON", type=Path,
        help="write the results there as they come; without it a whole, passing run writes bench/results/<device>.json",
    )  # fmt: skip
    group.addoption(
        "--append", action="store_true", help="keep the rows that the file of --save has, but those measured anew"
    )
    group.addoption(
        "--tiles", metavar="PY", type=Path, help="time the step in the tiles of this file of bench/tune_norms.py"
    )


def pytest_configure(config):
    config.option.benchmark_quiet = config.option.verbose <= 0  # our own table tells more; -v shows both
    if config.option.size == "auto":
        config.option.size = "gpu" if torch.cuda.is_available() else "cpu"
    elif config.option.size == "gpu" and not torch.cuda.is_available():
        raise pytest.UsageError("--size gpu: torch sees no CUDA device; use --size cpu or leave it out")
    if config.option.tiles is not None and not config.option.tiles.is_file():
        raise pytest.UsageError(f"--tiles {config.option.tiles}: there is no such file; write it with tune_norms.py")
    if config.option.append and config.option.save is None:
        raise pytest.UsageError("--append: name the file with --save JSON")
    if config.option.size == "tiny":
        torch.compiler.set_stance("force_eager")  # compilers take longer than everything else


def size_of(config: pytest.Config) -> Size:
    """What the options ask for."""
    return replace(make_size(config.option.size), tiles=config.option.tiles)


def pytest_generate_tests(metafunc):
    """One test for each variant of each comparison that the module's `comparisons(size)` names."""
    if "record" in metafunc.fixturenames:
        size = metafunc.config.option.size
        comparisons: list[Comparison] = metafunc.module.comparisons(size_of(metafunc.config))
        limit = [pytest.mark.timeout(150)] if size == "cpu" else []  # seconds, for a whole suite of 5 minutes
        params = [
            pytest.param((c, v), id=f"{c.case}-{v}", marks=[pytest.mark.benchmark(timer=CLOCK, group=c.group), *limit])
            for c in comparisons
            for v in c.variants
        ]
        metafunc.parametrize("record", params, indirect=True)


@pytest.fixture(scope="session")
def bench(request) -> Bench:
    bench = Bench(size_of(request.config))
    request.config.stash[BENCH] = bench
    return bench


def save(bench: Bench, path: Path, earlier: Results | None) -> None:
    """Write what has been measured so far."""
    results = bench.results()
    (results if earlier is None else results.after(earlier)).write(path)


@pytest.fixture(scope="session")
def earlier(request) -> Results | None:
    """What the file of --save holds, if it is to be kept."""
    path = request.config.option.save
    return Results.read(path) if request.config.option.append and path.exists() else None


@pytest.fixture(scope="module")
def measured() -> dict:
    """The module's last comparison, so that all its variants are timed together and reported one by one."""
    return {}


@pytest.fixture
def record(request, bench, measured, benchmark, earlier):
    """Calling it measures the comparison, if that has not been done, and reports this variant."""

    def run() -> None:
        comparison, variant = request.param
        if comparison.case not in measured:
            measured.clear()
            measured[comparison.case] = bench.measure(comparison)
        row, samples = measured[comparison.case][variant]
        bench.rows.append(row)
        if request.config.option.save is not None:
            save(bench, request.config.option.save, earlier)
        benchmark.extra_info |= {
            "calls": row.calls, "images_s": row.images_s, "GB_s": row.gb_s, "TFLOP_s": row.tflop_s,
            "share_of_ceiling": row.share, "ceilings": bench.ceilings,
            "ratios": {f"against {r.against}": r.value for r in row.ratios},
            "verdicts": [r.verdict for r in row.ratios if r.verdict],
        }  # fmt: skip
        CLOCK.replay(samples, benchmark)

    yield run
    if not benchmark._mode:
        benchmark.skipped = True  # the comparison was skipped or failed: nothing to warn about


def is_whole(session) -> bool:
    """Whether every benchmark of the suite ran: nothing deselected, no file left out, none failed."""
    files = {Path(item.path) for item in session.items}
    return (
        files == set(HERE.glob("test_*.py"))
        and not session.config.stash.get(DESELECTED, False)
        and not any("::" in argument for argument in session.config.args)
        and not session.shouldstop
        and not session.testsfailed
    )


def pytest_deselected(items):
    if items:
        items[0].config.stash[DESELECTED] = True


def pytest_sessionfinish(session):
    session.config.stash[WHOLE] = is_whole(session)


def pytest_terminal_summary(terminalreporter, config):
    bench = config.stash.get(BENCH, None)
    if bench is None or not bench.rows:
        return
    results = bench.results()
    console = Console(width=None if terminalreporter.isatty else 160)
    console.print()
    console.print(rich_table(results))
    if config.option.size == "tiny":
        console.print("tiny sizes: these times and verdicts say nothing but that the code runs")
    path, skipped = config.option.save, terminalreporter.stats.get("skipped")
    if path is None and config.stash.get(WHOLE, False) and config.option.size != "tiny" and not skipped:
        path = HERE / "results" / f"{slug(results.environment['device'])}.json"
        results.write(path)
    if path is None:
        console.print("not the whole suite: bench/results is unchanged (--save JSON writes what ran)")
    else:
        console.print(f"wrote {path}")
