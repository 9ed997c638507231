"""What is made of a config."""

import numpy as np
import pytest
import torch

from fastdiff.config import Config
from fastdiff.data.datasets import ImageSet
from fastdiff.runtime.world import Ranks
from fastdiff.training.parts import evaluation_samplers, make_conditions, make_step
from tests.configs import TINY


@pytest.mark.parametrize(("few_step", "captured"), [("consistency", True), ("scm", False)])
def test_a_step_with_exact_derivatives_is_not_captured(few_step, captured):
    config = Config.of(net=TINY, few_step=few_step, objective="edm", init_from="x").resolved("cpu")
    step, _, _ = make_step(config, [], Ranks(torch.device("cpu")), None, None)
    assert step.graphs == captured


@pytest.mark.parametrize(("text", "longest"), [("bytes", 13), ("words", 5)])
def test_a_step_reads_no_more_positions_than_the_longest_caption_has_and_knows_its_words(text, longest):
    images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    image_set = ImageSet.from_arrays(images, None, "two", captions=(("a red three",), ("a", "two")))
    config = Config.of(net=TINY, text=text).replace(text_encoder=text, text_width=8).resolved("cpu")
    ranks = Ranks(torch.device("cpu"))
    (table,) = conditions = make_conditions(config, image_set, ranks)
    assert table.tables["text"].shape == (4, longest)  # the empty text too
    _, model, ema = make_step(config, conditions, ranks, None, None)
    for network in (model, ema.model):
        seen = (~network.text.unseen(torch.arange(len(network.text.byte.weight)))).nonzero()[:, 0]
        assert torch.equal(seen, table.tables["text"].unique())


@pytest.mark.parametrize(
    ("few_step", "objective", "sampler"), [("none", "v", "consistency"), ("flow-map", "flow", "flow-map")]
)
def test_few_steps_are_drawn_by_the_networks_own_sampler(few_step, objective, sampler):
    config = Config.of(few_step=few_step, objective=objective, eval_few_steps=(1, 4), eval_steps=7, last_level=2.0)
    drawn = [(each.name, each.steps, each.last_level) for each in evaluation_samplers(config)]
    assert drawn == [("ddim", 7, 2.0), (sampler, 1, 2.0), (sampler, 4, 2.0)]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_the_optimizer_has_the_configs_settings(optimizer, kernels):
    settings = {"optimizer": optimizer, "beta2": 0.9, "weight_decay": 0.1, "kernels": kernels}
    config = Config.of(net=TINY, **settings).resolved("cpu")
    step, _, _ = make_step(config, [], Ranks(torch.device("cpu")), None, None)
    (group,) = step.update.state_dict()["param_groups"]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.9), 0.1)
    assert getattr(step.update, "beta2", 0.9) == 0.9  # what our kernel is given
