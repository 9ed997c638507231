"""A diffusers pipeline that draws images of classes, or by latents. `export --to diffusers` copies this file.

pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipeline(class_labels=[3, 3, 5], guidance_scale=2.0).images
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput


class ConditionalPipeline(DiffusionPipeline):
    """A UNet2DModel, whose last class embedding means no class if it has classes, and a scheduler; and an AutoencoderKL
    whose latents the network draws, with mean 0 and standard deviation 1."""

    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, unet: Any, scheduler: Any, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self, class_labels: Sequence[int] | None = None, *, batch_size: int = 1, guidance_scale: float = 1.0,
        num_inference_steps: int = 1000, generator: torch.Generator | None = None, output_type: str = "pil",
    ) -> ImagePipelineOutput:  # fmt: skip
        """Draw an image for each label; of a network without classes, `batch_size` images.

        Args:
            class_labels: from 0; without them a network with classes draws as if none was asked for.
            guidance_scale: 1 draws as the network does; more is more typical of the class.
            output_type: "pil", or "np" for float (N, H, W, 3) in [0, 1].
        """
        unet, scheduler = self.unet, self.scheduler
        n = batch_size if class_labels is None else len(class_labels)
        labels = nothing = None
        if unet.config.num_class_embeds:
            nothing = torch.full((n,), unet.config.num_class_embeds - 1, device=self.device)
            labels = nothing if class_labels is None else torch.tensor(class_labels, device=self.device)
        shape = (n, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        x = torch.randn(shape, generator=generator, device=self.device)
        scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(scheduler.timesteps):
            if guidance_scale == 1 or labels is None:
                prediction = unet(x, t, class_labels=labels).sample
            else:
                both = torch.cat([labels, nothing])  # ty: ignore[invalid-argument-type]
                asked, other = unet(torch.cat([x, x]), t, class_labels=both).sample.chunk(2)
                prediction = other + guidance_scale * (asked - other)
            x = scheduler.step(prediction, t, x, generator=generator).prev_sample
        if self.vae is not None:
            x = self.vae.decode(x).sample
        images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(images) if output_type == "pil" else images)
