"""The table of recipes: `--preset NAME` gives every other flag its default."""

from dataclasses import replace
from typing import Any

from fastdiff.config import Config
from fastdiff.latent_sections import AutoencoderConfig
from fastdiff.model_sections import UNetConfig

SMALL = UNetConfig(
    image_size=16, channels=16, channel_mult=(1, 4, 4), blocks_per_level=1, attention_resolutions=(8, 4), norm_groups=8,
)  # fmt: skip


LOWER = replace(SMALL, image_size=8, channels=64, channel_mult=(1, 1))  # its two lower levels


def on_cpu(**changes: Any) -> Config:
    """Small images in minutes on a CPU. Of the objectives x0 draws digits that can be read after the fewest steps."""
    recipe: dict[str, Any] = {
        "net": SMALL, "objective": "x0", "schedule": "cosine", "batch_size": 64, "lr": 2e-3, "warmup_steps": 100,
        "lr_decay": "linear-decay", "ema_decay": 0.99, "log_every": 25, "features": "efficientnet_lite0",
        "eval_samples": 200, "eval_batch_size": 200, "eval_steps": 20, "eval_guidance": 4.0, "grid_samples": 80,
    }  # fmt: skip
    return Config.of(**recipe | changes)


# Geng et al. 2024: in one hour on an A100 1 million images, from a trained teacher's weights.
TUNED = {"few_step": "consistency", "objective": "edm", "eval_sampler": "consistency", "optimizer": "radam", "lr": 1e-4}
HOUR = {"steps": 8000, "dropout": 0.2, "ema_decay": 0.9993, "flip": "off", "huber_c": 1e-6}
# Song et al. 2023, table 3, with Heun's step and weight 1; q = 3 has about the steps of its 18 noise levels, and times
# uniform in log sigma are the nearest to its choice among them.
TAUGHT = {"teacher_solver": "heun", "lr": 4e-4, "weighting": "image", "time_sampling": "low-discrepancy"}
# SoFlow: from random weights, a falls over the run, of 800,000 steps of 1,024 images.
AVERAGED = {
    "few_step": "flow-map", "objective": "flow", "eval_sampler": "flow-map", "lr": 1e-4,
    "stage_images": 800_000 * 1024,
}  # fmt: skip


def few_steps(**recipe: Any) -> Config:
    """CIFAR-10 in one and two steps, as in papers: no warm-up, no clipping of gradients."""
    return Config.of(warmup_steps=0, grad_clip=1e6, eval_steps=2, eval_few_steps=(1, 4), **recipe)


def autoencoder(shape: AutoencoderConfig, *, image_size: int, **recipe: Any) -> Config:
    """A run of `python -m fastdiff autoencoder`, which needs nothing of the U-Net but the images' size."""
    net = UNetConfig(image_size=image_size, channel_mult=(1,), attention_resolutions=())
    return Config.of(net=net, autoencoder=shape, lr_decay="linear-decay", **recipe)


# 38,400 digits of ten classes, in about three minutes on 2 cores.
DIGITS = {"data": "digits", "conditional": True, "steps": 600, "save_every": 300, "eval_every": 600}


# Small pictures of what their captions say: 2x2 pixels a position, texts read at 8x8 and 4x4.
CAPTIONED = {
    "net": replace(LOWER, image_size=16, patch=2, norm_conditioning=True, text_width=64, text_blocks=0),
    "text": "words", "objective": "edm", "weighting": "image", "steps": 3600, "batch_size": 32, "beta2": 0.99,
    "log_every": 50, "save_every": 600, "eval_every": 3600, "eval_guidance": 3.0,
}  # fmt: skip

# Few steps on a CPU, by a --teacher.
STUDENT = {
    "few_step": "consistency", "weighting": "image", "time_sampling": "low-discrepancy", "optimizer": "radam",
    "warmup_steps": 0, "eval_guidance": 1.0, "eval_sampler": "consistency", "eval_steps": 2, "eval_few_steps": (1, 4),
}  # fmt: skip
# 57,600 digits; as many samples as there are digits, since fewer of them favour students (bench/results/LOG.md).
LED = {
    "q": 2.0, "teacher_steps": 4, "huber_c": 0.01, "lr": 4.8e-3, "steps": 900, "eval_every": 900, "eval_samples": 1797,
    "boundary": 0.01, "last_level": 2.0,
}  # fmt: skip
# Without a teacher: ECT's weight and times.
TUNING = {
    "q": 64.0, "lr": 1e-4, "weighting": "uniform", "time_sampling": "auto", "eval_samples": 1797, "last_level": 3.0,
}  # fmt: skip


PRESETS: dict[str, Config] = {
    "ddpm-cifar10": Config.of(),
    "cifar10-conditional": Config.of(preset="cifar10-conditional", conditional=True, eval_guidance=1.25),
    "quick": on_cpu(
        preset="quick",
        **DIGITS,
        eval_at_start=True,
        sigma_data=0.75,  # for --objective edm: digits have a mean of -0.38 and a standard deviation of 0.70
    ),
    "quick-latent": on_cpu(
        preset="quick-latent",
        **DIGITS,
        net=LOWER,  # for the latents of quick-autoencoder
        eval_at_start=True,
    ),
    "text-digits": on_cpu(preset="text-digits", data="digits-captioned", sigma_data=0.7, **CAPTIONED),
    "emoji-16": on_cpu(preset="emoji-16", data="openmoji", sigma_data=0.55, **CAPTIONED),
    "emoji": Config.of(
        preset="emoji",
        data="openmoji",
        text="words",
        net=UNetConfig(image_size=64, patch=2, norm_conditioning=True, attention_resolutions=(16, 8), text_blocks=2),
        objective="edm",
        weighting="image",
        schedule="cosine",
        sigma_data=0.55,
        steps=50_000,
        lr_decay="linear-decay",
        eval_guidance=3.0,
        eval_samples=1000,
    ),
    "quick-consistency": on_cpu(preset="quick-consistency", **DIGITS | STUDENT | LED),
    "quick-tuning": on_cpu(preset="quick-tuning", **DIGITS | STUDENT | TUNING),
    "text-consistency": on_cpu(
        preset="text-consistency",
        data="digits-captioned",
        sigma_data=0.7,
        **CAPTIONED | STUDENT | {"q": 4.0, "lr": 6e-4, "steps": 1800, "eval_every": 1800},
        last_level=8.0,
    ),
    "consistency-cifar10": few_steps(preset="consistency-cifar10", **TUNED | HOUR),
    # The same images in eight stages, the first half of them in cheaper precision.
    "stages-cifar10": few_steps(
        preset="stages-cifar10", **TUNED | HOUR, q=2.0, stages=8, stage_images=128_000, precision="staged"
    ),
    "distil-cifar10": few_steps(
        preset="distil-cifar10", **TUNED | TAUGHT, steps=800_000, batch_size=512, dropout=0.0, q=3.0
    ),
    "flow-map-cifar10": few_steps(
        preset="flow-map-cifar10", **AVERAGED, steps=800_000, batch_size=1024, dropout=0.3, q=3200.0
    ),
    "autoencoder": autoencoder(
        AutoencoderConfig(factor=2),
        image_size=32,
        preset="autoencoder",
        steps=50_000,
        lr=5e-4,
        warmup_steps=500,
        ema_decay=0.999,
    ),
    "quick-autoencoder": autoencoder(
        AutoencoderConfig(factor=2, base_channels=16, blocks=1),
        image_size=16,
        preset="quick-autoencoder",
        data="digits",
        steps=400,
        batch_size=64,
        lr=3e-3,
        warmup_steps=50,
        ema_decay=0.99,
        log_every=25,
        save_every=200,
        features="efficientnet_lite0",
        eval_samples=300,
        eval_every=400,
        eval_batch_size=100,
        grid_samples=40,
    ),
    "v-cosine": Config.of(preset="v-cosine", objective="v", schedule="cosine", eval_sampler="dpmpp-2m", eval_steps=25),
    "edm": Config.of(preset="edm", objective="edm", weighting="edm", eval_sampler="heun", eval_steps=18),
    "flow": Config.of(
        preset="flow",
        objective="flow",
        time_sampling="logit-normal",
        eval_sampler="heun",
        eval_steps=25,
    ),
    "score-vp": Config.of(preset="score-vp", objective="score", eval_sampler="dpmpp-2m", eval_steps=25),
    "score-ve": Config.of(preset="score-ve", objective="score", schedule="ve-sde", eval_sampler="heun", eval_steps=25),
}
