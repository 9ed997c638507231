"""A diffusers pipeline that draws images of classes. `export --to diffusers` copies this file into its folder.

pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipeline(class_labels=[3, 3, 5], guidance_scale=2.0).images
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput


class ConditionalPipeline(DiffusionPipeline):
    """A UNet2DModel whose last class embedding means no class, and a scheduler."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, class_labels: Sequence[int], *, guidance_scale: float = 1.0, num_inference_steps: int = 1000,
        generator: torch.Generator | None = None, output_type: str = "pil",
    ) -> ImagePipelineOutput:  # fmt: skip
        """Draw an image for each label.

        Args:
            class_labels: from 0.
            guidance_scale: 1 draws as the network does; more is more typical of the class.
            output_type: "pil", or "np" for float (N, H, W, 3) in [0, 1].
        """
        unet, scheduler = self.unet, self.scheduler
        labels = torch.tensor(class_labels, device=self.device)
        nothing = torch.full_like(labels, unet.config.num_class_embeds - 1)
        shape = (len(labels), unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        x = torch.randn(shape, generator=generator, device=self.device)
        scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(scheduler.timesteps):
            if guidance_scale == 1:
                prediction = unet(x, t, class_labels=labels).sample
            else:
                asked, other = unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, nothing])).sample.chunk(2)
                prediction = other + guidance_scale * (asked - other)
            x = scheduler.step(prediction, t, x, generator=generator).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(images) if output_type == "pil" else images)
