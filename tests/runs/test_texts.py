"""What turns a run's texts into its network's arguments."""

import pytest
import torch

from fastdiff.config import Config
from fastdiff.nets.text import PAD, READERS
from fastdiff.runs.texts import text_reader


@pytest.mark.parametrize(("text", "longest"), [("bytes", 13), ("words", 5)])
def test_positions_that_no_text_has_are_left_out(text, longest):
    texts = ["a red three", "a", ""]
    whole = READERS[text][0](texts)
    trimmed = text_reader(Config.of(text=text).replace(text_encoder=text), None)(texts)["text"]
    assert trimmed.shape == (3, longest)
    assert torch.equal(whole[:, :longest], trimmed)
    assert (whole[:, longest:] == PAD).all()


def test_a_network_without_texts_has_no_reader():
    assert text_reader(Config(), None) is None
