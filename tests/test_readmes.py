"""The Markdown files: links lead somewhere, commands exist, and the README stays short."""

import re
import shlex
from functools import cache

import pytest

from tests.configs import REPO

PAGES = [REPO / "README.md", *sorted(path for path in REPO.glob("*/**/*.md") if ".venv" not in path.parts)]
PAGES += sorted(REPO.glob(".github/**/*.md"))


def name(path):
    return str(path.relative_to(REPO))


@cache
def anchors(path):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", dict.fromkeys(PAGES), ids=name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)} links to {link}"


def commands(page):
    """The lines of a page's bash blocks, joined where a backslash ends them, without comments."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.mark.parametrize("page", dict.fromkeys(PAGES), ids=name)
def test_commands_name_files_that_are_there(page):
    for words in commands(page):
        for word in words:
            if word.endswith(".py") or word.startswith(("tests/", "bench/test", ".ci/")):
                assert (REPO / word).exists(), " ".join(words)


def helps():
    """Of each program, the calls that print all of its flags."""
    import train_cifar
    from fastdiff import cli

    yield "train_cifar.py", [lambda: train_cifar.parse(["--help"])]
    commands = ("sample", "evaluate", "likelihood", "export", "show", "autoencoder")
    yield "fastdiff", [lambda command=command: cli.main([command, "--help"]) for command in commands]


def test_flags_exist(capsys):
    known = {}
    for program, calls in helps():
        for call in calls:
            with pytest.raises(SystemExit):
                call()
        known[program] = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    seen = 0
    for words in (words for page in PAGES for words in commands(page)):
        program = next((each for each in known if each in words), None)
        if program is not None:
            flags = {word for word in words[words.index(program) :] if word.startswith("--")}
            assert flags <= known[program], " ".join(words)
            seen += len(flags)
    assert seen > 30


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_text().splitlines()) <= 150
