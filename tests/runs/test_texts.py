"""What turns a run's texts into its network's arguments."""

import pytest
import torch

from fastdiff.config import Config
from fastdiff.nets.text import PAD, POSITIONS
from fastdiff.runs.texts import text_reader


@pytest.mark.parametrize(("text", "longest"), [("bytes", 13), ("words", 5)])
def test_positions_that_no_text_has_may_be_left_out(text, longest):
    config = Config.of(text=text).replace(text_encoder=text)
    texts = ["a red three", "a", ""]
    whole, trimmed = (text_reader(config, None, trim=trim)(texts)["text"] for trim in (False, True))
    assert whole.shape == (3, POSITIONS)
    assert trimmed.shape == (3, longest)
    assert torch.equal(whole[:, :longest], trimmed)
    assert (whole[:, longest:] == PAD).all()


def test_a_network_without_texts_has_no_reader():
    assert text_reader(Config(), None) is None
