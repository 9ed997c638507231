"""The three kinds of tests, each with a command: `pytest`, `pytest -m lab`, `pytest -m guarantee`; `-m ""` runs all.

Unmarked tests are the contributor's loop: each takes at most LONGEST seconds of processor time. `lab` tests compile,
interpret, count or time. `guarantee` tests train and break things: crashes, faults, ranks, resume. The folders and
files below have one kind; elsewhere a test carries the mark itself. Tests that the command line names run in any case.
"""

import os
import resource
import sys
from pathlib import Path

import pytest

KINDS = {
    "lab": (
        "bench/", "kernels/", "profiles/", "test_interop", "evaluation/test_graph_loop.py", "nets/test_levers.py",
        "runtime/test_graphs.py", "training/test_captured.py", "training/test_interpreter.py", "nets/test_show.py",
    ),
    "guarantee": (
        "distributed/", "guarantees/", "reliability/", "test_installing.py", "evaluation/test_commands.py",
        "evaluation/test_conditional.py", "evaluation/test_export.py", "evaluation/test_sample.py",
        "runs/test_data.py", "runs/test_weights.py", "training/test_autoencoder_runs.py",
        "training/test_few_step_runs.py", "training/test_latent", "training/test_resume.py", "training/test_train.py",
    ),
}  # fmt: skip
LONGEST = 3.0  # seconds of processor time: 2, and what a slower machine takes more
COMPILER = "torch._dynamo"
TESTS = Path(__file__).resolve().parent


def named(config: pytest.Config) -> bool:
    """Whether the command line names tests."""
    return config.args_source is pytest.Config.ArgsSource.ARGS


def pytest_configure(config):
    if not config.option.markexpr and "-m" not in config.invocation_params.args and not named(config):
        config.option.markexpr = "not lab and not guarantee"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A whole kind runs in one process a core, file by file; what is named runs in this one, which starts at once."""
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):  # xdist asks each process anew
        return
    if config.option.numprocesses is None and not (named(config) or config.option.usepdb):
        config.option.numprocesses, config.option.dist = os.cpu_count(), "loadfile"
        config.option.loadscopereorder = False  # by how long files take, not by how many tests they have


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        for kind, places in KINDS.items():
            if item.path.is_relative_to(TESTS) and str(item.path.relative_to(TESTS)).startswith(places):
                item.add_marker(getattr(pytest.mark, kind))
    # The longest files first, so that no process is left with one of them while the others have ended.
    items.sort(key=lambda item: all(item.get_closest_marker(kind) is None for kind in KINDS))


def seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    began, compiler = seconds(), COMPILER in sys.modules
    result = yield
    took = seconds() - began
    imports = not compiler and COMPILER in sys.modules  # for seconds, in whichever test is the first
    if took > LONGEST and not imports and not any(item.get_closest_marker(kind) for kind in KINDS):
        pytest.fail(f"took {took:.1f} s of processor time: make it quicker, or mark it lab or guarantee", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    # Names that no encoding has are tested, and may be in the captured log, which is sent to another process.
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
