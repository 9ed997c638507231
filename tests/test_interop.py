import diffusers
import pytest
import torch

from fastdiff.diffusion.objectives import make_objective
from fastdiff.errors import UserError
from fastdiff.interop import (
    save_diffusers_pipeline,
    unet_config_from_diffusers,
    unet_config_to_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
)
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


@pytest.mark.parametrize("config", [SMALL, UNetConfig()], ids=["small", "ddpm-cifar10"])
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
    pipeline.set_progress_bar_config(disable=True)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([10])
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet.eval()(x, t).sample, ours(x, t), rtol=1e-5, atol=1e-5)
    built = make_objective(objective, schedule=schedule, zero_terminal_snr=zero)
    abar = built.schedule.alpha(torch.arange(1, 1001, dtype=torch.float64)).square()
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod.double(), abar, rtol=1e-4, atol=1e-7)
    x_t, t64 = torch.randn(1, 3, 16, 16), torch.tensor([700], dtype=torch.float64)  # the estimate of x0 is the same too
    theirs = pipeline.scheduler.step(x, 699, x_t, generator=torch.Generator().manual_seed(0)).pred_original_sample
    torch.testing.assert_close(theirs, built.to_x0(x, x_t, t64).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    assert torch.equal(unet_from_diffusers(tmp_path / "out").eval()(x, t), ours(x, t))


def test_what_has_no_counterpart_is_named(tmp_path):
    with pytest.raises(UserError, match="flip_sin_to_cos"):
        unet_config_from_diffusers({**unet_config_to_diffusers(SMALL), "flip_sin_to_cos": True})
    with pytest.raises(UserError, match=r"config\.json is missing"):
        unet_from_diffusers(tmp_path)
    with pytest.raises(UserError, match="cannot be exported"):
        save_diffusers_pipeline(UNet(SMALL), tmp_path, schedule="flow", timesteps=1000)
    with pytest.raises(UserError, match="objective 'edm' cannot be exported"):
        save_diffusers_pipeline(UNet(SMALL), tmp_path, schedule="cosine", timesteps=1000, objective="edm")
