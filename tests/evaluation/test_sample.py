"""`python -m fastdiff sample`: what it draws, and the files that it leaves."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.commands import call


def test_sample_is_deterministic_and_writes_a_grid_and_an_npz(run, tmp_path, capsys):
    common = ("sample", "--checkpoint", run, "--n", 7, "--steps", 3, "--batch-size", 4)
    grids, arrays = [], []
    for i, seed in enumerate((0, 0, 1)):
        png, npz = tmp_path / f"{i}.png", tmp_path / f"{i}.npz"
        assert call(*common, "--seed", seed, "--out", png, "--save-npz", npz) == 0
        grids.append(png.read_bytes())
        with np.load(npz) as file:
            arrays.append(file["images"])
    assert arrays[0].shape == (7, 8, 8, 3)
    assert arrays[0].dtype == np.uint8
    assert (arrays[0] == arrays[1]).all()
    assert grids[0] == grids[1] != grids[2]
    assert (arrays[0] != arrays[2]).any()
    assert "7 of 7 images by ddim, 3 steps" in capsys.readouterr().out
    # The first image of the grid, enlarged by a whole factor, is the first sample.
    grid = np.asarray(Image.open(tmp_path / "0.png").convert("RGB"))
    assert (grid[2 : 2 + 64 : 8, 2 : 2 + 64 : 8] == arrays[0][0]).all()


def test_several_numbers_of_steps_are_a_row_each_from_the_same_noise(run, tmp_path, capsys):
    common = ("sample", "--checkpoint", run, "--sampler", "consistency", "--n", 3)
    assert call(*common, "--steps", 1, 4, "--out", tmp_path / "both.png") == 0
    assert "3 of 3 images each by consistency, 1 4 steps" in capsys.readouterr().out
    both = np.asarray(Image.open(tmp_path / "both.png").convert("RGB"))
    assert len(both) == 2 * 66 + 2
    for row, steps in enumerate((1, 4)):
        assert (
            call(*common, "--steps", steps, "--save-npz", tmp_path / f"{steps}.npz", "--out", tmp_path / "1.png") == 0
        )
        with np.load(tmp_path / f"{steps}.npz") as file:
            strip = both[2 + 66 * row : 66 * (row + 1), -(3 * 66) : -2]
            drawn = np.stack([strip[::8, 66 * i : 66 * i + 64 : 8] for i in range(3)])
            assert (drawn == file["images"]).all()
    assert "3 of 3 images by consistency, 1 step, from " in capsys.readouterr().out
    assert call(*common, "--steps", 1, 4, "--save-npz", tmp_path / "new.npz") == 2
    assert "--save-npz holds images of one number of steps, but --steps is 1 4" in capsys.readouterr().err
    assert call(*common, "--steps", 2, 2) == 2
    assert "--steps is 2 2, but must be one number or several different ones" in capsys.readouterr().err


def test_a_compiled_network_draws_the_same_images(run, tmp_path):
    """Up to a rounding to the next of 256 values; the last batch, which is cut, has the shape of the others."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    arrays = []
    for compile in ("off", "on"):
        npz = tmp_path / f"{compile}.npz"
        common = ("--n", 7, "--steps", 3, "--batch-size", 4, "--out", tmp_path / "grid.png", "--save-npz", npz)
        assert call("sample", "--checkpoint", run, "--compile", compile, *common) == 0
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (compile == "on")
        with np.load(npz) as file:
            arrays.append(file["images"].astype(int))
    assert abs(arrays[0] - arrays[1]).max() <= 1
    assert arrays[0].std() > 10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_change_no_image(run, tmp_path, precision):
    common = ("sample", "--checkpoint", run, "--n", 5, "--steps", 3, "--batch-size", 4, "--precision", precision)
    for flag in ("--graphs", "--no-graphs"):
        assert call(*common, flag, "--out", tmp_path / f"{flag}.png") == 0
    assert (tmp_path / "--graphs.png").read_bytes() == (tmp_path / "--no-graphs.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "kind"), [("grid.png", "PNG"), ("grid.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("grid", "PNG")]
)
def test_a_grid_is_what_its_suffix_says(run, tmp_path, name, kind):
    assert call("sample", "--checkpoint", run, "--n", 4, "--steps", 2, "--out", tmp_path / name) == 0
    with Image.open(tmp_path / name) as image:
        assert image.format == kind
        assert image.size == (2 * 66 + 2, 2 * 66 + 2)


def test_an_interrupted_sampling_leaves_no_file(run, tmp_path, monkeypatch):
    from fastdiff.evaluation.generate import Generator

    def interrupted(*arguments, **options):
        yield torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "batches", interrupted)
    before = sorted(tmp_path.rglob("*"))
    assert call("sample", "--checkpoint", run, "--out", tmp_path / "a.png", "--save-npz", tmp_path / "a.npz") == 130
    assert sorted(tmp_path.rglob("*")) == before
