"""How tests call the commands, and the small network that they call them on."""

from fastdiff.cli import main, run_command
from fastdiff.model_sections import UNetConfig

CLASSES = ("cat", "dog", "3")
NET = UNetConfig(image_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4)


def call(*arguments):
    return run_command(lambda: main([str(a) for a in arguments]))
