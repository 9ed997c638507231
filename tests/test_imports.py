"""The layers of the code: a file imports only from lower layers. Imports inside functions count too."""

import ast
import re
from pathlib import Path

import pytest

import kernels

# Lowest first. A name stands for a module or for all modules of a package; the longest match decides.
LAYERS = [
    ["kernels"],
    ["fastdiff.errors", "fastdiff.words"],
    ["fastdiff._kernels"],
    ["fastdiff.checks"],
    ["fastdiff.model_sections"],
    ["fastdiff.sections", "fastdiff.few_step_section", "fastdiff.latent_sections"],
    ["fastdiff.diffusion", "fastdiff.data"],
    ["fastdiff.config", "fastdiff.flags"],
    ["fastdiff.presets"],
    ["fastdiff.nets"],
    ["fastdiff.interop_settings"],
    ["fastdiff.interop", "fastdiff.interop_pipeline"],
    ["fastdiff.interop_autoencoder"],
    ["fastdiff.runtime"],
    ["fastdiff.runs"],
    ["fastdiff.reporting"],
    ["fastdiff.evaluation"],
    ["fastdiff.training"],
    ["fastdiff.cli"],
    ["fastdiff.__main__", "train_cifar"],
]  # fmt: skip
REPO = Path(__file__).resolve().parent.parent
FILES = sorted([*REPO.glob("fastdiff/**/*.py"), *REPO.glob("kernels/**/*.py"), REPO / "train_cifar.py"])


def module_name(path):
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(name):
    matches = [(len(entry), i) for i, row in enumerate(LAYERS) for entry in row if f"{name}.".startswith(f"{entry}.")]
    return max(matches)[1] if matches else None


def package(name):
    """The package that a module belongs to."""
    return name.rsplit(".", 1)[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            in_kernels = path.is_relative_to(REPO / "kernels")
            assert node.level in (0, in_kernels), f"{path}: relative import"
            module = ".".join(filter(None, ["kernels" if node.level else "", node.module]))
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                is_module = (REPO / (whole.replace(".", "/") + ".py")).exists()
                yield whole if is_module else module


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downward(path):
    name = module_name(path)
    if name == "fastdiff" or (path.name == "__init__.py" and layer(name) is None):
        return
    assert layer(name) is not None, f"{name} has no layer: add it to LAYERS"
    for target in imported(path):
        if target.split(".")[0] not in ("fastdiff", "kernels", "train_cifar", "bench", "profiles", "tests"):
            continue
        assert layer(target) is not None, f"{name} imports {target}, which no layer has"
        same_row = layer(target) == layer(name) and package(target) == package(name)
        assert layer(target) < layer(name) or same_row, f"{name} imports {target}, which lies no lower"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_name_kernels_is_used_in_one_file(path):
    """An installed fastdiff has the folder under another name, as `fastdiff._kernels`."""
    uses = re.search(r"^\s*(from|import) kernels\b", path.read_text(), re.MULTILINE)
    assert not uses or path.name == "_kernels.py"


def test_files_do_not_import_each_other_in_a_circle():
    edges = {module_name(path): set(imported(path)) for path in FILES if path.name != "__init__.py"}

    def visit(name, above):
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, [*above, name])
            done.add(name)

    done = set()
    for name in edges:
        visit(name, [])


@pytest.mark.parametrize("name", ["checks", "model_sections", "config", "sections", "flags", "presets"])
def test_flags_need_the_standard_library_and_tyro_alone(name):
    import sys

    roots = {target.split(".")[0] for target in imported(REPO / "fastdiff" / f"{name}.py")}
    assert roots <= {*sys.stdlib_module_names, "fastdiff", "tyro"}


def test_kernels_is_this_repositorys_folder():
    """Hugging Face's package on the index has the same import name."""
    assert Path(kernels.__file__).resolve().is_relative_to(REPO)
