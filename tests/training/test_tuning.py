import pytest
import torch

from fastdiff.config import Config
from fastdiff.diffusion.consistency import Consistency
from fastdiff.diffusion.flow_map import FlowMap
from fastdiff.diffusion.objectives import VObjective
from fastdiff.diffusion.tangents import ContinuousConsistency, MeanFlow
from fastdiff.nets.text import byte_ids
from fastdiff.nets.unet import UNet
from fastdiff.runs.weights import TeacherWeights
from fastdiff.training.tuning import objective_of
from tests.configs import TINY


@pytest.mark.parametrize(
    ("few_step", "objective", "kind"),
    [("none", "v", VObjective), ("consistency", "v", Consistency), ("flow-map", "flow", FlowMap),
     ("mean-flow", "flow", MeanFlow), ("scm", "edm", ContinuousConsistency)],
)  # fmt: skip
def test_each_few_step_is_an_objective_of_its_own(few_step, objective, kind):
    assert type(objective_of(Config.of(few_step=few_step, objective=objective), torch.device("cpu"))) is kind


def test_consistency_weighs_levels_alike_only_if_asked():
    x0, eps, t = torch.rand(3, 1, 1, 4), torch.randn(3, 1, 1, 4), torch.tensor([0.5, 3.0, 60.0]).double()
    config, cpu = Config.of(objective="edm", few_step="consistency", q=4.0), torch.device("cpu")
    ect, alike = (objective_of(config.replace(weighting=name), cpu) for name in ("uniform", "image"))
    steps = t - ect.earlier(t)[1]
    ratio = [objective.loss(lambda x, c: x.sin(), x0, t, eps) for objective in (ect, alike)]
    torch.testing.assert_close(ratio[1] / ratio[0], steps.float())


def test_the_boundary_is_the_config_s():
    config = Config.of(objective="x0", few_step="consistency", boundary=0.03)
    assert objective_of(config, torch.device("cpu")).boundary == 0.03


def test_a_guided_teacher_leads_away_from_no_class():
    config = Config.of(
        net=TINY, num_classes=3, conditional=True, objective="edm", few_step="consistency", teacher="x",
        teacher_guidance=2.5, kernels="torch",
    )  # fmt: skip
    torch.manual_seed(0)
    net = UNet(config.net).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    cpu, weights = torch.device("cpu"), TeacherWeights(net.state_dict(), "x", "")
    learned = objective_of(config, cpu, teacher=weights, nothing={"labels": torch.tensor(3)})
    x_t, t, labels = torch.randn(4, 3, 8, 8), torch.tensor([0.1, 1.0, 10.0, 70.0]).double(), torch.tensor([0, 1, 2, 3])
    got = learned.teacher(x_t, t, labels=labels)
    asked, other = (learned.kind.denoise(net, x_t, t, labels=v) for v in (labels, torch.full((4,), 3)))
    assert (got - (other + 2.5 * (asked - other))).abs().max() < 1e-4
    assert (asked - other)[:3].abs().amax() > 1e-4
    assert not got.requires_grad


@pytest.mark.parametrize("encoder", ["bytes", "frozen"])
def test_a_teacher_reads_texts_and_leads_away_from_the_empty_one(encoder):
    config = Config.of(
        net=TINY, text="bytes", text_width=8, objective="edm", few_step="consistency", teacher="x",
        teacher_guidance=2.5, kernels="torch",
    ).replace(text_encoder=encoder)  # fmt: skip
    torch.manual_seed(0)
    net = UNet(config.net).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    cond, empty = {"text": byte_ids(["a cat", "dogs"], 9)}, {"text": byte_ids([""], 2)}
    if encoder == "frozen":  # whose tokens are kept in half precision
        cond = {"text": torch.randn(2, 9, 8), "text_mask": torch.arange(9) < torch.tensor([[7], [6]])}
        empty = {"text": torch.randn(1, 2, 8).half(), "text_mask": torch.ones(1, 2, dtype=torch.bool)}
    learned = objective_of(
        config, torch.device("cpu"), teacher=TeacherWeights(net.state_dict(), "x", ""),
        nothing={name: rows[0] for name, rows in empty.items()},
    )  # fmt: skip
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 10.0]).double()
    got = learned.teacher(x_t, t, **cond)
    nothing = {n: v.float().expand(2, -1, -1) if v.ndim == 3 else v.expand(2, -1) for n, v in empty.items()}
    asked, other = (learned.kind.denoise(net, x_t, t, **each) for each in (cond, nothing))
    assert (got - (other + 2.5 * (asked - other))).abs().max() < 1e-4
    assert (asked - other).abs().amax() > 1e-4


def test_a_teacher_under_autocast_has_its_weights_cast_once(monkeypatch):
    config = Config.of(
        net=TINY, objective="edm", few_step="consistency", q=2.0, teacher="x", kernels="torch", precision="bf16"
    )
    torch.manual_seed(0)
    net = UNet(config.net).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    learned = objective_of(config, torch.device("cpu"), teacher=TeacherWeights(net.state_dict(), "x", ""))
    x_t, t, seen = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 10.0]).double(), []
    real = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: (seen.append(self.weight.dtype), real(self, x))[1])
    with torch.autocast("cpu", torch.bfloat16):
        got = learned.teacher(x_t, t)
        assert set(seen) == {torch.bfloat16}
        assert torch.equal(got, learned.kind.denoise(net, x_t, t))
