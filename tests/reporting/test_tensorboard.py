import io
import math

import numpy as np
import pytest
from PIL import Image

from fastdiff.runs.run import create_run, open_run
from tests.reporting.rows import EVAL, TRAIN


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def fresh_names(self, monkeypatch):
        """Files of one second and process are told apart by a count that sorts as text: 10 before 9."""
        from tensorboard.summary.writer import event_file_writer

        monkeypatch.setattr(event_file_writer, "_global_uid", type(event_file_writer._global_uid)(0))

    @staticmethod
    def events(path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        return EventAccumulator(str(path / "tensorboard")).Reload()

    def test_scalars_images_and_resume(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            for step in (10, 20, 30):
                run.log_train(TRAIN | {"step": step, "loss": 1 / step})
                run.log_eval(EVAL | {"step": step, "value": 100 / step})
            run.log_train({"step": 40, "loss": math.nan})
        with open_run(run.path) as run:
            run.truncate(20)
            run.log_train(TRAIN | {"step": 30, "loss": 7.0})
            image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
            run.log_image("samples", image, 30)
        events = self.events(run.path)
        tags = ["eval/fd_efficientnet_lite0", "train/grad_norm", "train/images_per_second", "train/loss", "train/lr"]
        assert sorted(events.Tags()["scalars"]) == tags
        assert [(e.step, round(e.value, 6)) for e in events.Scalars("train/loss")] == [(10, 0.1), (20, 0.05), (30, 7.0)]
        assert [(e.step, e.value) for e in events.Scalars(tags[0])] == [(10, 10.0), (20, 5.0)]
        shown = Image.open(io.BytesIO(events.Images("samples")[0].encoded_image_string))
        assert (np.asarray(shown) == image).all()

    def test_truncate_while_writing(self, tmp_path):
        with create_run(tmp_path, config={}) as run:
            for step in (1, 2, 3):
                run.log_train({"step": step, "loss": 1.0})
            run.truncate(1)
            run.log_train({"step": 2, "loss": 2.0})
        assert [(e.step, e.value) for e in self.events(run.path).Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]

    def test_a_path_that_it_cannot_encode_costs_its_events_alone(self, tmp_path, caplog):
        """Such as any with an umlaut where Python takes the locale for ASCII."""
        with create_run(tmp_path / "l\udcc3\udca4ufe", config={}) as run:
            run.log_train(TRAIN | {"step": 1})
            run.log_train(TRAIN | {"step": 2})
            assert [row["step"] for row in run.train_rows()] == [1, 2]
        assert caplog.text.count("TensorBoard events are lost") == 1
