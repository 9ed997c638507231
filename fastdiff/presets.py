"""The table of recipes: `--preset NAME` gives every other flag its default."""

from fastdiff.config import Config
from fastdiff.sections import UNetConfig

PRESETS: dict[str, Config] = {
    "ddpm-cifar10": Config.of(),
    "quick": Config.of(
        preset="quick",
        data="digits",
        net=UNetConfig(
            image_size=16,
            channels=16,
            channel_mult=(1, 4, 4),
            blocks_per_level=1,
            attention_resolutions=(8, 4),
            norm_groups=8,
        ),
        batch_size=64,
        lr=2e-3,
        warmup_steps=100,
        ema_decay=0.99,
        steps=850,
        log_every=25,
        save_every=425,
        eval_every=850,
        eval_at_start=True,
        eval_samples=200,
        eval_batch_size=200,
        # Of 16 samples after 600 steps, ddim left visible noise in about 6 and ddpm in none.
        eval_sampler="ddpm",
        eval_steps=100,
        features="efficientnet_lite0",
        sigma_data=0.75,  # digits have a mean of -0.38 and a standard deviation of 0.70
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
