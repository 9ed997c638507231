"""A row of training and one of an evaluation."""

TRAIN = {
    "step": 100,
    "images": 6400,
    "loss": 0.1 + 0.2,
    "grad_norm": 1e-7,
    "lr": 2e-4,
    "images_per_second": 3210.5,
    "seconds": 12.25,
}
EVAL = {
    "step": 100,
    "images": 6400,
    "metric": "fd_efficientnet_lite0",
    "value": 1.75,
    "samples": 500,
    "sampler": "ddim",
    "sampler_steps": 50,
    "eta": 0.0,
    "features": "efficientnet_lite0",
    "feature_size": 96,
    "reference": 'digits, "train"',  # has to be quoted in a CSV
    "seconds": 3.5,
    "checkpoint": "checkpoints/step-100",
}
