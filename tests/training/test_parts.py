"""What is made of a config."""

import pytest
import torch

from fastdiff.config import Config
from fastdiff.runtime.world import Ranks
from fastdiff.training.parts import evaluation_samplers, make_step
from tests.configs import TINY


@pytest.mark.parametrize(("few_step", "captured"), [("consistency", True), ("scm", False)])
def test_a_step_with_exact_derivatives_is_not_captured(few_step, captured):
    config = Config.of(net=TINY, few_step=few_step, objective="edm", init_from="x").resolved("cpu")
    step, _, _ = make_step(config, [], Ranks(torch.device("cpu")), None, None)
    assert step.graphs == captured


@pytest.mark.parametrize(
    ("few_step", "objective", "sampler"), [("none", "v", "consistency"), ("flow-map", "flow", "flow-map")]
)
def test_few_steps_are_drawn_by_the_networks_own_sampler(few_step, objective, sampler):
    config = Config.of(few_step=few_step, objective=objective, eval_few_steps=(1, 4), eval_steps=7, last_level=2.0)
    drawn = [(each.name, each.steps, each.last_level) for each in evaluation_samplers(config)]
    assert drawn == [("ddim", 7, 2.0), (sampler, 1, 2.0), (sampler, 4, 2.0)]
