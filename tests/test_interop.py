import dataclasses
import functools
from types import SimpleNamespace

import diffusers
import pytest
import torch

from fastdiff.diffusion.guidance import guided
from fastdiff.diffusion.objectives import make_objective
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.diffusion.schedules import make_schedule
from fastdiff.errors import UserError
from fastdiff.interop import (
    save_diffusers_pipeline,
    unet_config_to_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from fastdiff.interop_settings import scheduler_to_diffusers
from fastdiff.nets.unet import UNet, UNetConfig

SMALL = UNetConfig(
    image_size=16, channels=16, channel_mult=(1, 2, 3), blocks_per_level=2, attention_resolutions=(8, 4), norm_groups=4
)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter, the zero-initialised ones too, a random value that keeps activations near unit size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
            p.copy_((1.0 if p.ndim == 1 else 0.0) + scale * torch.randn(p.shape, generator=generator))
    return model.eval()


ADAPTIVE = dataclasses.replace(SMALL, norm_conditioning=True)


@pytest.mark.parametrize("config", [SMALL, ADAPTIVE, UNetConfig()], ids=["small", "adaptive norms", "ddpm-cifar10"])
def test_outputs_agree_with_diffusers_both_ways(config):
    ours = randomize(UNet(config))
    theirs = unet_to_diffusers(ours).eval()
    back = unet_from_diffusers(theirs).eval()
    x = torch.randn(2, 3, config.image_size, config.image_size)
    t = torch.tensor([3, 977])
    with torch.no_grad():
        expected = theirs(x, t).sample
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(x, t), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours(x, t), back(x, t))


def test_classes_agree_with_diffusers_both_ways_and_the_exported_pipeline_draws_them(tmp_path):
    ours = randomize(UNet(dataclasses.replace(SMALL, num_classes=3)))
    theirs = unet_to_diffusers(ours).eval()
    assert theirs.config.num_class_embeds == 4  # the last means no class
    x, t, labels = torch.randn(3, 3, 16, 16), torch.tensor([3, 500, 977]), torch.tensor([0, 2, 3])
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        torch.testing.assert_close(ours(x, t, labels=labels), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(unet_from_diffusers(theirs).eval()(x, t, labels=labels), ours(x, t, labels=labels))
    save_diffusers_pipeline(ours, tmp_path, schedule="cosine", timesteps=1000, objective="v")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    objective = make_objective("v", schedule="cosine")
    for scale in (1.0, 2.0):
        drawn = pipeline(
            [0, 2], guidance_scale=scale, num_inference_steps=10, generator=torch.Generator().manual_seed(5),
            output_type="np",
        ).images  # fmt: skip
        generator = torch.Generator().manual_seed(5)
        asked, other = (
            functools.partial(objective.denoise, ours, labels=torch.tensor(labels)) for labels in ([0, 2], [3, 3])
        )
        denoise = guided(asked, other, objective.schedule, scale=scale)
        x_T = torch.randn(2, 3, 16, 16, generator=generator)
        with torch.no_grad():
            mine = SAMPLERS["ddpm"](
                denoise, objective.schedule, x_T, objective.schedule.grid(10), clip_x0=True, generator=generator
            )
        mine = (mine.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1)
        torch.testing.assert_close(torch.from_numpy(drawn), mine, rtol=0, atol=1e-3)


def test_a_diffusers_model_of_its_own_making_converts():
    theirs = diffusers.UNet2DModel(**unet_config_to_diffusers(SMALL))
    randomize(theirs)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0, 500])
    with torch.no_grad():
        torch.testing.assert_close(unet_from_diffusers(theirs).eval()(x, t), theirs(x, t).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "objective", "zero"), [("ddpm-linear", "eps", False), ("cosine", "x0", False), ("cosine", "v", True)]
)
def test_the_exported_folder_loads_as_a_pipeline(tmp_path, schedule, objective, zero):
    ours = randomize(UNet(SMALL))
    save_diffusers_pipeline(
        ours, tmp_path / "out", schedule=schedule, timesteps=1000, objective=objective, zero_terminal_snr=zero
    )
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([10])
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet.eval()(x, t).sample, ours(x, t), rtol=1e-5, atol=1e-5)
    built = make_objective(objective, schedule=schedule, zero_terminal_snr=zero)
    abar = built.schedule.alpha(torch.arange(1, 1001, dtype=torch.float64)).square()
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod.double(), abar, rtol=1e-4, atol=1e-7)
    x_t, t64 = torch.randn(1, 3, 16, 16), torch.tensor([700], dtype=torch.float64)  # the estimate of x0 is the same too
    theirs = pipeline.scheduler.step(x, 699, x_t, generator=torch.Generator().manual_seed(0)).pred_original_sample
    torch.testing.assert_close(theirs, built.to_x0(x, x_t, t64).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(unet_from_diffusers(tmp_path / "out").eval()(x, t), ours(x, t))


# An exported pipeline against our samplers.

EXPORTED = [
    (objective, schedule, zero)
    for objective in ("eps", "x0", "v")
    for schedule in ("ddpm-linear", "cosine")
    for zero in (False, True)
    if not (zero and objective == "eps")
]


def perfect_network(objective, mean=0.2, std=0.05):
    """What the best network of an objective answers, `network(x, index)`, for data of N(mean, std^2): affine in x."""
    t = torch.arange(1, objective.schedule.T + 1, dtype=torch.float64)
    a, s = objective.schedule.alpha(t), objective.schedule.sigma(t)
    slope = a * std**2 / (a**2 * std**2 + s**2)
    x0 = torch.stack([slope, mean * (1 - slope * a)])  # times x, and alone
    eps = (torch.tensor([[1.0], [0.0]]) - a * x0) / s
    answers = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[objective.name].T.tolist()

    def network(x, index):
        times_x, alone = answers[int(index.flatten()[0])]
        return times_x * x + alone

    return network


TABLES = {"rtol": 0, "atol": 3e-4}  # diffusers keeps 1 - alpha_bar in float32: at t = 1 its error is 1 in 1000


def draw(pipeline, steps, **options):
    """8 images by a pipeline, back in [-1, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    images = pipeline(batch_size=8, num_inference_steps=steps, generator=generator, output_type="pt", **options).images
    return images * 2 - 1


def draw_ours(objective, network, name, steps):
    """The same of the same noise by our sampler."""
    generator = torch.Generator().manual_seed(5)
    x_T = torch.randn(8, 3, 16, 16, generator=generator)
    ts = objective.schedule.grid(steps)
    denoise = functools.partial(objective.denoise, network)
    return SAMPLERS[name](denoise, objective.schedule, x_T, ts, clip_x0=True, generator=generator).clamp(-1, 1)


@pytest.mark.parametrize(("name", "schedule", "zero"), EXPORTED)
def test_the_exported_pipeline_is_our_sampler(tmp_path, name, schedule, zero):
    save_diffusers_pipeline(
        UNet(SMALL), tmp_path, schedule=schedule, timesteps=1000, objective=name, zero_terminal_snr=zero
    )
    objective = make_objective(name, schedule=schedule, zero_terminal_snr=zero)
    network = perfect_network(objective)
    ddpm, ddim = (kind.from_pretrained(tmp_path) for kind in (diffusers.DDPMPipeline, diffusers.DDIMPipeline))
    for pipeline in (ddpm, ddim):
        pipeline.unet.forward = lambda x, t: SimpleNamespace(sample=network(x, t.reshape(1)))
    for steps in (10, 20, 50, 1000):
        expected = draw_ours(objective, network, "ddpm", steps)
        torch.testing.assert_close(draw(ddpm, steps), expected, **TABLES)
        assert ddpm.scheduler.timesteps[0] == 999  # pure noise with zero terminal SNR
        if steps < 1000:
            expected = draw_ours(objective, network, "ddim", steps)
            theirs = draw(ddim, steps, use_clipped_model_output=True)
            torch.testing.assert_close(theirs, expected, **TABLES)
    assert expected.std() == pytest.approx(0.05, rel=0.1)  # of ddim in 50 steps


@pytest.mark.parametrize(("timesteps", "zero"), [(1000, False), (100, True)])
def test_the_exported_network_is_asked_as_ours_is(tmp_path, timesteps, zero):
    model = randomize(UNet(SMALL))
    save_diffusers_pipeline(
        model, tmp_path, schedule="cosine", timesteps=timesteps, objective="v", zero_terminal_snr=zero
    )
    objective = make_objective("v", schedule="cosine", timesteps=timesteps, zero_terminal_snr=zero)
    with torch.no_grad():
        expected = draw_ours(objective, model, "ddpm", 10)
    theirs = draw(diffusers.DDPMPipeline.from_pretrained(tmp_path), 10)
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-3)
    assert expected.std() > 0.1


@pytest.mark.parametrize("timesteps", [1000, 840, 37])
def test_both_grids_agree_where_the_steps_divide_the_timesteps(timesteps):
    ours = make_schedule("cosine", timesteps=timesteps)
    settings = scheduler_to_diffusers(objective="v", schedule="cosine", timesteps=timesteps)
    theirs = diffusers.DDPMScheduler.from_config(settings)
    for steps in (n for n in range(1, timesteps + 1) if timesteps % n == 0):
        theirs.set_timesteps(steps)
        assert theirs.timesteps.tolist() == (ours.grid(steps)[:-1] - 1).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "flow"}, "schedule 'flow' cannot be exported"),
        ({"schedule": "vp-sde"}, "schedule 'vp-sde' cannot be exported"),
        ({"objective": "edm"}, "objective 'edm' cannot be exported"),
        ({"objective": "score"}, "objective 'score' cannot be exported"),
        ({"timesteps": 1001}, "1001 timesteps cannot be exported"),
        ({"timesteps": 1, "zero_terminal_snr": True}, "zero terminal SNR with 1 timestep cannot be exported"),
        ({"time_scale": 0.01}, "time scale 0.01 cannot be exported"),
    ],
)
def test_what_diffusers_cannot_draw_is_not_exported(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        save_diffusers_pipeline(
            UNet(SMALL), tmp_path, **{"schedule": "cosine", "timesteps": 1000, "objective": "v", **changes}
        )
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_patches_is_not_exported(tmp_path):
    net = UNet(dataclasses.replace(SMALL, patch=2))
    with pytest.raises(UserError, match="--patch 2 cannot be exported, as UNet2DModel has no patches; use --to"):
        save_diffusers_pipeline(net, tmp_path, schedule="cosine", timesteps=1000, objective="v")
    assert list(tmp_path.iterdir()) == []


# Import, of networks that diffusers itself has made and saved.
