import math

import numpy as np
import pytest
from PIL import Image

from fastdiff.reporting import plots
from fastdiff.reporting.pictures import image_grid, save_grid, save_labelled
from fastdiff.reporting.plots import (
    _running_mean,
    plot_denoising,
    plot_distance,
    plot_few_steps,
    plot_loss,
    plot_loss_by_noise,
    plot_throughput,
)

BLUE, ORANGE, GREEN = (0x25, 0x63, 0xEB), (0xD9, 0x77, 0x06), (0x05, 0x96, 0x69)


def train_rows(n, every=100, batch=128):
    rng = np.random.default_rng(0)
    steps = [every * (i + 1) for i in range(n)]
    return [
        {
            "kind": "train",
            "step": step,
            "images": step * batch,
            "loss": (0.03 + math.exp(-step / (3 * every))) * math.exp(rng.normal(0, 0.1)),
            "images_per_second": 3000 + 200 * rng.random(),
            "denoising_error": 0.004 * math.exp(rng.normal(0, 0.5)),
        }
        for step in steps
    ]


def eval_row(step, value, **more):
    row = {"kind": "eval", "step": step, "images": 128 * step, "metric": "fid", "value": value, "samples": 5000}
    return row | {"sampler": "ddim", "sampler_steps": 50, "eta": 0.0, "reference": "cifar10-train"} | more


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def pixels(path, colour):
    return int((np.asarray(Image.open(path)) == colour).all(axis=-1).sum())


def noise_row(step, empty=()):
    centres = [k + 0.5 for k in range(-12, 16)]
    losses = [None if i in empty else 0.01 + math.exp(-i / 5) / step for i in range(28)]
    return {
        "step": step,
        "log_snr": centres,
        "loss": losses,
        "images": [0 if i in empty else 100 + i for i in range(28)],
    }


class TestFewSteps:
    def test_each_sampler_is_a_line_of_its_newest_rows(self, tmp_path):
        path = tmp_path / "plot.png"
        rows = [eval_row(100, 9.0), eval_row(200, 8.0), eval_row(200, 5.0, guidance=2.0, sampler_steps=2)]
        plot_few_steps(rows, path)
        assert not path.exists()  # one number of steps is no line
        rows += [eval_row(200, 20.0 / n, sampler="consistency", sampler_steps=n) for n in (1, 2, 4)]
        plot_few_steps(rows, path)
        assert pixels(path, BLUE) > 20
        assert pixels(path, ORANGE) > 300
        assert pixels(path, GREEN) == 0
        plot_few_steps(rows, path, teacher=[eval_row(50, 30.0 / n, sampler_steps=n) for n in (2, 10)])
        assert pixels(path, BLUE) > 300
        assert pixels(path, GREEN) > 300


class TestLossByNoise:
    @pytest.mark.parametrize("n", [1, 3, 40])
    def test_the_last_stage_is_drawn_over_the_others(self, tmp_path, n):
        path = tmp_path / "plot.png"
        plot_loss_by_noise([noise_row(step, empty=(0, 13)) for step in range(1, n + 1)], path)
        assert Image.open(path).width == 864
        assert pixels(path, BLUE) > 200
        assert pixels(path, (0xE5, 0xE7, 0xEB)) > 5000  # the bars

    def test_no_rows_no_file_and_rows_without_images_do_no_harm(self, tmp_path):
        plot_loss_by_noise([], tmp_path / "none.png")
        assert not (tmp_path / "none.png").exists()
        plot_loss_by_noise([noise_row(1, empty=range(28))], tmp_path / "empty.png")
        assert (tmp_path / "empty.png").exists()


class TestCurves:
    @pytest.mark.parametrize("plot", [plot_loss, plot_throughput, plot_denoising])
    @pytest.mark.parametrize("n", [1, 2, 40, 2000])
    def test_size_and_content(self, tmp_path, plot, n):
        path = tmp_path / "plot.png"
        plot(train_rows(n), path)
        assert Image.open(path).size == (864, 504)
        assert path.stat().st_size < 150_000
        assert pixels(path, BLUE) > (0 if n == 1 else 200)  # the running mean is drawn
        assert [entry.name for entry in tmp_path.iterdir()] == ["plot.png"]

    def test_many_rows_stay_small(self, tmp_path):
        plot_loss(train_rows(50_000), tmp_path / "loss.png")
        assert (tmp_path / "loss.png").stat().st_size < 150_000

    @pytest.mark.parametrize("plot", [plot_loss, plot_throughput, plot_denoising, plot_distance])
    @pytest.mark.parametrize("rows", [[], [{"kind": "train", "step": 1, "images": 64, "loss": None}]])
    def test_nothing_to_plot(self, tmp_path, plot, rows):
        plot(rows, tmp_path / "plot.png")
        assert not list(tmp_path.iterdir())

    def test_rows_without_a_number_are_left_out(self, tmp_path):
        rows = train_rows(50)
        plot_loss(rows[:20] + rows[21:], tmp_path / "without.png")
        rows[20]["loss"] = None
        plot_loss(rows, tmp_path / "none.png")
        assert (tmp_path / "none.png").read_bytes() == (tmp_path / "without.png").read_bytes()

    @pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [-1.0, 2.0, 0.5], [1e-8, 1.0, 1e6]])
    def test_odd_losses(self, tmp_path, values):
        rows = [row | {"loss": value} for row, value in zip(train_rows(3), values, strict=True)]
        plot_loss(rows, tmp_path / "loss.png")
        assert pixels(tmp_path / "loss.png", BLUE) > 100

    def test_no_images_and_step_zero(self, tmp_path):
        plot_throughput([{"step": 0, "images_per_second": 0.0}], tmp_path / "plot.png")
        assert (tmp_path / "plot.png").exists()

    def test_running_mean(self):
        assert _running_mean(np.array([3.0])).tolist() == [3.0]
        assert np.allclose(_running_mean(np.full(500, 2.0)), 2.0)
        values = np.arange(500.0)
        smooth = _running_mean(values)
        assert np.allclose(smooth[:-10], values[:-10])  # centred: a straight line stays where it is
        assert smooth[-1] == values[-11:].mean()
        assert _running_mean(np.random.default_rng(0).normal(size=500))[50:].std() < 0.4  # of 1 before


class TestDistance:
    def test_one_curve_per_way_of_evaluation(self, tmp_path):
        path = tmp_path / "fid.png"
        rows = [eval_row(step, 100 / (1 + step / 1000)) for step in range(0, 10_000, 1000)]
        plot_distance(rows, path)
        assert Image.open(path).size == (864, 504)
        assert path.stat().st_size < 150_000
        assert pixels(path, BLUE) > 500
        assert pixels(path, ORANGE) == 0
        plot_distance([*rows, eval_row(9000, 8.0, sampler="ddpm", sampler_steps=1000)], path)
        assert pixels(path, ORANGE) > 20

    def test_a_panel_per_metric(self, tmp_path):
        path = tmp_path / "fid.png"
        plot_distance([eval_row(0, 300.0), eval_row(0, 2.0, metric="fd_efficientnet_lite0")], path)
        assert Image.open(path).size == (864, 1008)

    def test_evaluated_again_the_last_value_counts(self, tmp_path):
        plot_distance([eval_row(0, 300.0), eval_row(100, 20.0)], tmp_path / "a.png")
        plot_distance([eval_row(100, 25.0), eval_row(0, 300.0), eval_row(100, 20.0)], tmp_path / "b.png")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_many_curves_all_differ_and_their_legend_hides_none(tmp_path, monkeypatch):
    """Nor does it leave the figure, however long a way of evaluation is."""
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    samplers, figures = [f"sampler-{i}" for i in range(12)], []
    rows = [
        eval_row(s, 9 / (n + s), sampler=name, sampler_steps=n) for name in samplers for n in (1, 2) for s in (0, 1)
    ]
    plot_distance([*rows, eval_row(0, 1.0, guide="working/" + "long/" * 30)], tmp_path / "fid.png")
    plot_few_steps(rows, tmp_path / "few-step.png")
    plot_loss_by_noise([noise_row(step) for step in range(1, 6)], tmp_path / "loss-by-noise.png")
    for figure, count in zip(figures, (25, 12, 5), strict=True):
        figure.draw_without_rendering()
        axes = next(axes for axes in figure.axes if axes.lines)
        looks = {(line.get_color(), line.get_marker(), line.get_alpha()) for line in axes.lines}
        assert len(looks) == count
        legend = axes.get_legend().get_window_extent()
        assert axes.get_window_extent().height > 300
        assert 0 <= legend.y0 < legend.y1 < axes.xaxis.get_tightbbox().y0
        assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1


def test_the_line_of_warning_is_a_multiple_of_the_smallest_denoising_error(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    plot_denoising([row | {"denoising_error": row["step"] / 100} for row in train_rows(5)], tmp_path / "denoising.png")
    curve, limit = figures[0].axes[0].lines
    assert curve.get_ydata().tolist() == [1, 2, 3, 4, 5]
    assert set(limit.get_ydata()) == {2.5}


def test_a_legend_tells_once_what_its_curves_share():
    hows = [tuple(how.split(", ")) for how in ("ddim, 1 step, guidance 1", "ddim, 50 steps, guidance 1")]
    hows.append(("ddim", "50 steps", "eta 1", "guidance 1"))
    assert plots._told_apart(hows) == ("guidance 1", ["ddim, 1 step", "ddim, 50 steps", "ddim, 50 steps, eta 1"])
    assert plots._told_apart(hows[:1]) == ("1 step, guidance 1", ["ddim"])
    rows = [eval_row(0, 1.0, sampler="unipc (log-snr, order=3)", sampler_steps=n) for n in (1, 2)]
    common, names = plots._told_apart([plots._how(row) for row in rows])
    assert common == "5,000 samples, reference cifar10-train"
    assert names == ["unipc (log-snr, order=3), 1 step", "unipc (log-snr, order=3), 2 steps"]


class TestGrid:
    def test_geometry_is_exact(self, tmp_path):
        images = noise(5, 16, 12)
        grid = image_grid(images, columns=3, scale=2)
        assert grid.shape == (2 * (32 + 2) + 2, 3 * (24 + 2) + 2, 3)
        untouched = np.ones(grid.shape[:2], bool)
        for i, image in enumerate(images):
            top, left = 2 + i // 3 * 34, 2 + i % 3 * 26
            assert (grid[top : top + 32, left : left + 24] == np.kron(image, np.ones((2, 2, 1), np.uint8))).all()
            untouched[top : top + 32, left : left + 24] = False
        assert (grid[untouched] == 255).all()
        save_grid(images, tmp_path / "grid.png", columns=3)
        assert (np.asarray(Image.open(tmp_path / "grid.png")) == image_grid(images, columns=3)).all()

    @pytest.mark.parametrize(("size", "scale"), [(8, 8), (16, 4), (28, 3), (32, 2), (64, 1), (100, 1)])
    def test_default_scale_and_columns(self, size, scale):
        for count, columns, rows in ((1, 1, 1), (5, 3, 2), (9, 3, 3), (10, 4, 3)):
            side = size * scale + 2
            assert image_grid(noise(count, size, size)).shape == (rows * side + 2, columns * side + 2, 3)

    def test_bad_images(self):
        for images in (noise(2, 8, 8).astype(np.float32), noise(8, 8), noise(2, 8, 8)[..., :1], noise(0, 8, 8)):
            with pytest.raises(ValueError, match=r"images are uint8 \(N, H, W, 3\)"):
                image_grid(images)


class TestLabelled:
    @staticmethod
    def found(path, images):
        """Where each uint8 (H, W, 3) stands in the PNG, pixel for pixel: (top, left); fails if it is not there once."""
        canvas = np.asarray(Image.open(path))
        places = []
        for image in images:
            height, width = image.shape[:2]
            candidates = np.argwhere((canvas[: -height + 1, : -width + 1] == image[0, 0]).all(axis=-1))
            hits = [(y, x) for y, x in candidates if (canvas[y : y + height, x : x + width] == image).all()]
            assert len(hits) == 1, f"found {len(hits)} times"
            places.append(hits[0])
        return np.array(places)

    @staticmethod
    def enlarged(images, scale):
        flat = images.reshape(-1, *images.shape[-3:])
        return flat.repeat(scale, axis=1).repeat(scale, axis=2)

    def test_forward_noising(self, tmp_path):
        images = noise(3, 4, 16, 16)
        path = tmp_path / "forward.png"
        labels = [
            f"t = {t}\n" + rf"$\bar\alpha_t$ = {a:.2g}" for t, a in ((0, 1.0), (10, 0.99), (500, 0.07), (999, 4e-5))
        ]
        save_labelled(images[:, None], "Forward process", labels, [""], path)
        places = self.found(path, self.enlarged(images, 5)).reshape(3, 4, 2)
        top, left = places[0, 0]
        assert (top, left) == (64, 12)
        assert (places[..., 0] == top + 82 * np.arange(3)[:, None]).all()
        assert (places[..., 1] == left + 82 * np.arange(4)[None, :]).all()
        canvas = np.asarray(Image.open(path))
        for column in range(4):  # a label stands above every column
            x = left + 82 * column
            assert (canvas[top - 30 : top - 2, x : x + 80] < 100).any()
        assert path.stat().st_size < 150_000

    def test_trajectory_pairs_rows(self, tmp_path):
        x_t, x0_hat = noise(2, 8, 32, 32), noise(2, 8, 32, 32, seed=1)
        path = tmp_path / "trajectory.png"
        labels = [f"t = {t}" for t in range(980, -1, -140)]
        save_labelled(np.stack([x_t, x0_hat], 1), "Sampling", labels, ["$x_t$", r"$\hat{x}_0$"], path)
        above = self.found(path, self.enlarged(x_t, 3)).reshape(2, 8, 2)
        below = self.found(path, self.enlarged(x0_hat, 3)).reshape(2, 8, 2)
        assert (below - above == (98, 0)).all()
        assert (np.diff(above, axis=1) == (0, 98)).all()
        assert (above[1] - above[0] == (2 * 98 + 2 + 8, 0)).all()

    def test_few_columns(self, tmp_path):
        images = noise(1, 2, 8, 8)
        save_labelled(images[None], "Sampling", ["t = 80", "t = 0.002"], ["$x_t$"], tmp_path / "trajectory.png")
        assert Image.open(tmp_path / "trajectory.png").size[0] == 420

    def test_shapes_that_do_not_fit(self, tmp_path):
        with pytest.raises(ValueError, match="2 columns of images but 1 labels"):
            save_labelled(noise(1, 1, 2, 8, 8), "Sampling", ["t"], [""], tmp_path / "a.png")
