"""Samples by class: what is asked for, guidance in batches and in a captured step, and how the commands say it."""

import json
from argparse import Namespace
from dataclasses import replace
from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.data.pixels import to_uint8
from fastdiff.diffusion.objectives import make_objective
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.errors import UsageError
from fastdiff.evaluation.evaluate import load_trained
from fastdiff.evaluation.generate import Generator, SamplerSettings
from fastdiff.evaluation.wishes import LabelAgreement, balanced, kept_features, parse_classes
from fastdiff.model_sections import Guidance
from fastdiff.nets.text import byte_ids
from fastdiff.nets.unet import UNet
from fastdiff.runs import checkpoint
from tests.evaluation.commands import CLASSES, NET, call

OBJECTIVE = make_objective("eps", schedule="ddpm-linear", timesteps=100)


def network(x, t, labels):
    """Its noise is the brighter the higher the label; rows do not meet."""
    return 0.5 * x + 0.1 * (labels[:, None, None, None] - 1.0)


def generator(model=network, *, classes=3, sampler="ddim", batch_size=4, **options):
    return Generator(
        model, OBJECTIVE, SamplerSettings(sampler, 5), shape=(3, 4, 4), batch_size=batch_size,
        device=torch.device("cpu"), nothing={"labels": torch.tensor(classes)} if classes else {}, **options,
    )  # fmt: skip


def draw(made, labels, **options):
    conditions = {"labels": torch.tensor(labels)} if labels is not None else None
    return torch.cat(list(made.batches(len(labels or range(4)), seed=0, conditions=conditions, **options)))


@pytest.mark.parametrize("graphs", [True, False])
def test_each_call_of_one_generator_sees_its_own_labels_and_guidance(graphs):
    made = generator(graphs=graphs)
    for labels in ([0, 1, 2, 0], [2, 2, 1, 1]):
        for guidance in (Guidance(), Guidance(2.5), Guidance(2.5, (0.2, 1.0)), Guidance(0.0)):
            assert torch.equal(draw(made, labels, guidance=guidance), draw(generator(), labels, guidance=guidance))
    assert len(made.loop.steps) == (
        2 if graphs else 0
    )  # with and without guidance: neither labels nor scales make another


def test_guidance_of_1_is_the_network_of_0_the_network_without_a_class_and_more_is_further_away():
    made, labels = generator(), [0, 0, 2, 2]
    plain, nothing = draw(made, labels), draw(made, None)
    calls = []
    counted = generator(lambda x, t, labels: calls.append(len(x)) or network(x, t, labels))
    assert torch.equal(draw(counted, labels, guidance=Guidance(1.0, (0.2, 1.0))), plain)
    assert torch.equal(draw(counted, labels, guidance=Guidance(0.0)), nothing)
    assert torch.equal(nothing, draw(made, [3, 3, 3, 3]))
    assert set(calls) == {4}  # one branch only
    led = draw(counted, labels, guidance=Guidance(2.0)).float()
    assert calls[-1] == 8
    assert ((led - plain.float()) * (plain.float() - nothing.float()) >= 0).all()
    assert not torch.equal(led, plain.float())


def test_a_network_that_guides_itself_changes_nothing_and_another_does():
    labels = [0, 1, 2, 0]
    for model, classes in ((network, 3), (lambda x, t: 0.5 * x, 0)):
        asked = labels if classes else None
        plain = draw(generator(model, classes=classes), asked)
        itself, other = (torch.nn.Module(), torch.nn.Module())
        itself.forward, other.forward = model, lambda *a, **c: 0.4 * a[0]
        led = draw(generator(model, classes=classes, guide=itself), asked, guidance=Guidance(3.0))
        assert torch.equal(led, plain)
        assert not torch.equal(
            draw(generator(model, classes=classes, guide=other), asked, guidance=Guidance(3.0)), plain
        )


def reader(seed):
    """A small network that reads bytes, and how often its encoder has been called, by the rows that it was given."""
    torch.manual_seed(seed)
    shape = replace(NET, blocks_per_level=1, text_encoder="bytes", text_width=8, text_blocks=1)
    net = UNet(shape).eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    rows = []
    net.text.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    return net, rows


def test_texts_are_read_once_for_all_steps_also_by_a_guide_of_its_own():
    (network, rows), (leads, others) = reader(0), reader(1)
    texts, empty, cpu = byte_ids(["a cat", "a dog", "", "two"]), byte_ids([""])[0], torch.device("cpu")

    def drawn(scale, guide=None, graphs=True):
        made = Generator(
            network, OBJECTIVE, SamplerSettings("ddim", 3), shape=(3, 8, 8), batch_size=4, device=cpu, graphs=graphs,
            nothing={"text": empty}, guide=guide,
        )  # fmt: skip
        for each in (rows, others):
            each.clear()
        [images] = made.batches(4, seed=0, conditions={"text": texts}, guidance=Guidance(scale))
        return images, [*rows], [*others]

    def expected(scale, away):
        def denoise(x_t, t):
            asked = OBJECTIVE.denoise(network, x_t, t, text=texts)
            return (away(x_t, t) + scale * (asked - away(x_t, t))).clamp(-1, 1)

        ts = SamplerSettings("ddim", 3).times(OBJECTIVE.schedule)
        noise = torch.randn(4, 8, 8, 3, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)
        return to_uint8(SAMPLERS["ddim"](denoise, OBJECTIVE.schedule, noise, ts))

    def unasked(x_t, t):
        return OBJECTIVE.denoise(network, x_t, t, text=empty.expand(4, -1))

    def led(x_t, t):
        return OBJECTIVE.denoise(leads, x_t, t, text=texts)

    for scale, guide, away, calls in (
        (1.0, None, unasked, ([4], [])), (3.0, None, unasked, ([8], [])), (3.0, leads, led, ([4], [4]))
    ):  # fmt: skip
        images, *read = drawn(scale, guide)
        assert tuple(read) == calls  # 8: what is asked for, and nothing
        assert (images.int() - expected(scale, away).int()).abs().max() <= 1  # sums of 8 rows may round otherwise
        assert torch.equal(drawn(scale, guide, graphs=False)[0], images)
    assert (images.int() - expected(3.0, unasked).int()).abs().max() > 10


def test_guidance_needs_something_to_lead_away_from():
    with pytest.raises(UsageError, match=r"knows no classes .* add --guide"):
        draw(generator(lambda x, t: x, classes=0), None, guidance=Guidance(2.0))


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_images_of_a_column_start_from_the_same_noise(batch_size):
    made = generator(lambda x, t, labels: 0.5 * x, batch_size=batch_size)
    images = torch.cat(
        list(made.batches(6, seed=0, conditions={"labels": torch.tensor([0, 2]).repeat_interleave(3)}, columns=3))
    )
    assert torch.equal(images[:3], images[3:])
    assert not torch.equal(images[0], images[1])


def test_classes_are_named_by_name_number_or_all():
    assert parse_classes(["dog", "0"], CLASSES) == [1, 0]
    assert parse_classes(["3"], CLASSES) == [2]  # a name goes before a number
    assert parse_classes(["cat", "all"], CLASSES) == [0, 1, 2]
    assert parse_classes([], ()) == []
    for words, names, message in (
        (["cow"], CLASSES, "cow is unknown; choose among cat, dog, 3,"), (["3"], ("a", "b"), "choose among a, b"),
        (["cat"], (), "knows no classes; train one with --conditional"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            parse_classes(words, names)
    assert balanced(7, 3)["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]


class Means(torch.nn.Module):
    """Features that are the mean colours."""

    def __init__(self):
        super().__init__()
        self.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))

    def forward(self, images):
        return images.float().mean((2, 3))


def test_agreement_is_the_share_whose_neighbours_are_of_the_class():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = (rng.integers(0, 20, (60, 4, 4, 3)) + 80 * labels[:, None, None, None]).astype(np.uint8)
    whole = Namespace(images=images, labels=labels, name="x", class_names=None, draw=lambda n, seed: np.arange(n))
    extractor = Means()
    agreement = LabelAgreement(extractor, whole, None)
    assert agreement.ceiling == 1.0
    shuffled = Namespace(**{**vars(whole), "labels": rng.permutation(labels)})
    assert LabelAgreement(extractor, whole, shuffled).ceiling < 0.7
    with kept_features(extractor) as features:
        for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(25):
            extractor(part)
    asked = torch.from_numpy(labels).clone()
    assert agreement(torch.cat(features), asked) == 1.0
    asked[:15] = (asked[:15] + 1) % 3
    assert agreement(torch.cat(features), asked) == 0.75


def test_sample_draws_rows_of_classes_and_says_which_they_are(conditional, tmp_path, capsys):
    out, npz = tmp_path / "g.png", tmp_path / "g.npz"
    asked = ["sample", "--checkpoint", conditional, "--steps", 2, "--out", out, "--save-npz", npz]
    assert call(*asked, "--classes", "3", "cat", "--per-class", 3, "--guidance", 1.5) == 0
    assert "6 of 6 images by ddim, 2 steps, guidance 1.5" in capsys.readouterr().out
    with np.load(npz) as saved:
        assert saved["labels"].tolist() == [2, 2, 2, 0, 0, 0]
        assert saved["images"].shape == (6, 8, 8, 3)
        led = saved["images"]
    assert Image.open(out).height == 2 * 66 + 2
    assert call(*asked, "--n", 7) == 0
    with np.load(npz) as saved:
        assert saved["labels"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    guide = conditional / "checkpoints" / "step-1"
    assert call(*asked, "--classes", "3", "cat", "--per-class", 3, "--guidance", 1.5, "--guide", guide) == 0
    with np.load(npz) as saved:
        assert not np.array_equal(saved["images"], led)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--classes", "cow"], "--classes cow is unknown; choose among cat, dog, 3, their numbers from 0, or all."),
     (["--per-class", "2", "--n", "3"], "--per-class 2: --n is given as well"),
     (["--per-class", "0"], "--per-class is 0, but must be at least 1"),
     (["--guidance", "inf"], "--guidance is inf"),
     (["--guidance-interval", "1.5", "0.2"], "--guidance-interval is '1.5 0.2', but must be LO HI")],
)  # fmt: skip
def test_bad_wishes_are_told_in_one_line(conditional, tmp_path, capsys, arguments, message):
    out = tmp_path / "g.png"
    assert call("sample", "--checkpoint", conditional, "--steps", 2, "--out", out, *arguments) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert sum(line.startswith("error: ") for line in error.splitlines()) == 1
    assert not out.exists()


def test_an_unconditional_run_says_what_it_cannot_do(run, conditional, tmp_path, capsys):
    for arguments, message in (
        (["--classes", "cat"], "knows no classes; train one with --conditional"),
        (["--per-class", "2"], "no class and no prompt is asked for; use --n"),
        (["--guidance", "2"], "add --guide and an earlier checkpoint"),
        (["--guidance", "2", "--guide", str(conditional)], "on 3 classes"),
    ):
        assert call("sample", "--checkpoint", run, "--steps", 2, "--out", tmp_path / "g.png", *arguments) == 2
        assert message in capsys.readouterr().err
    guide = run / "checkpoints" / "step-1"
    asked = ["sample", "--checkpoint", run, "--steps", 2, "--n", 2, "--out", tmp_path / "g.png"]
    assert call(*asked, "--guidance", 2, "--guide", guide) == 0


@pytest.mark.guarantee
def test_likelihood_is_of_the_images_own_classes(conditional, tmp_path, capsys):
    asked = ["likelihood", "--checkpoint", conditional, "--n", 4, "--steps", 2]
    assert call(*asked) == 0
    bits = json.loads(capsys.readouterr().out)["bits_per_dim"]
    with np.load(tmp_path / "images.npz") as saved:
        arrays = dict(saved)
    np.savez(tmp_path / "others.npz", **{**arrays, "labels": (arrays["labels"] + 1) % 3})
    assert call(*asked, "--data", tmp_path / "others.npz") == 0
    assert json.loads(capsys.readouterr().out)["bits_per_dim"] != bits
    np.savez(tmp_path / "none.npz", images=arrays["images"])
    assert call(*asked, "--data", tmp_path / "none.npz") == 1
    assert "has no classes, but the network was trained on the classes cat, dog, 3" in capsys.readouterr().err


def test_sample_draws_a_row_for_each_prompt(captioned, tmp_path, capsys):
    out, npz, file = tmp_path / "g.png", tmp_path / "g.npz", tmp_path / "prompts.txt"
    file.write_text("a cat\n")
    asked = ["sample", "--checkpoint", captioned, "--steps", 2, "--out", out, "--save-npz", npz, "--per-class", 2]
    assert call(*asked, "--prompt", "one dog", "--prompt-file", file, "--guidance", 2) == 0
    with np.load(npz) as saved:
        assert saved["prompts"].tolist() == ["one dog", "one dog", "a cat", "a cat"]
        images = saved["images"]
    assert call(*asked, "--prompt", "a cat", "a cat", "--guidance", 2) == 0
    with np.load(npz) as saved:
        assert np.array_equal(saved["images"][2:], images[2:])  # what else is asked for changes nothing
        assert not np.array_equal(saved["images"][:2], images[:2])
    capsys.readouterr()
    assert call(*asked, "--prompt", "a cat", "Scarlet, a dog") == 0
    words = load_trained(captioned, device=torch.device("cpu")).config.conditions.text == "words"
    assert ("no caption in training had 'scarlet', ','; the network" in capsys.readouterr().err) is words
    assert call("sample", "--checkpoint", captioned, "--steps", 2, "--out", out, "--n", 3) == 0
    assert call("likelihood", "--checkpoint", captioned, "--n", 4, "--steps", 2) == 0


@pytest.mark.parametrize(
    ("prompts", "message"),
    [(["a cat", " "], "prompt 2 of 2 is empty"),
     (["? " * 63], ("has 126 bytes, but at most 62 fit", "has 63 words, but at most 62 fit")),
     (["caf\udce9"], "is not valid Unicode")],
)  # fmt: skip
def test_bad_prompts_are_told_in_one_line(captioned, tmp_path, capsys, prompts, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\n".join(prompts).encode(errors="surrogateescape"))
    code = call("sample", "--checkpoint", captioned, "--steps", 2, "--out", tmp_path / "g.png", "--prompt", *prompts)
    assert code == 2
    error = capsys.readouterr().err
    words = load_trained(captioned, device=torch.device("cpu")).config.conditions.text == "words"
    assert (message if isinstance(message, str) else message[words]) in error
    assert not (tmp_path / "g.png").exists()
    assert call("sample", "--checkpoint", captioned, "--steps", 2, "--prompt-file", file) == 2


def test_guidance_without_a_prompt_is_refused(captioned, tmp_path, capsys):
    assert call("sample", "--checkpoint", captioned, "--steps", 2, "--guidance", 2, "--out", tmp_path / "g.png") == 2
    assert "--guidance is 2, but nothing is asked for; add --prompt" in capsys.readouterr().err
    assert not (tmp_path / "g.png").exists()


def test_a_run_without_text_says_how_to_get_one(run, capsys):
    assert call("sample", "--checkpoint", run, "--prompt", "a cat") == 2
    assert "this network reads no texts; train one with --text words" in capsys.readouterr().err


def test_images_of_other_classes_measure_nothing(conditional, tmp_path, capsys):
    with np.load(tmp_path / "images.npz") as saved:
        arrays = dict(saved)
    np.savez(tmp_path / "none.npz", images=arrays["images"])
    np.savez(tmp_path / "swapped.npz", **{**arrays, "class_names": np.array(["dog", "cat", "3"])})
    for name, has in (("none", "has no classes"), ("swapped", "has the classes dog, cat, 3")):
        assert call("likelihood", "--checkpoint", conditional, "--n", 4, "--data", tmp_path / f"{name}.npz") == 1
        assert has in capsys.readouterr().err


def test_a_guide_needs_guidance_and_a_prompt_file_prompts(conditional, captioned, tmp_path, capsys):
    guide = conditional / "checkpoints" / "step-1"
    assert call("sample", "--checkpoint", conditional, "--steps", 2, "--guide", guide) == 2
    assert "does nothing at --guidance 1" in capsys.readouterr().err
    other, saved = tmp_path / "other", checkpoint.load_latest(captioned / "checkpoints").state
    copytree(captioned, other)  # another network of the same task
    checkpoint.save(other / "checkpoints", 2, saved | {"ema": {name: 0.5 * v for name, v in saved["ema"].items()}})
    asked = ["sample", "--checkpoint", captioned, "--steps", 2, "--prompt", "a cat", "--guidance"]
    pictures = []
    for options in ([1], [2, "--guide", captioned], [2, "--guide", other]):
        assert call(*asked, *options, "--out", tmp_path / "guided.png") == 0
        pictures.append(np.asarray(Image.open(tmp_path / "guided.png")))
    assert np.array_equal(pictures[0], pictures[1])  # by itself it is led nowhere
    assert not np.array_equal(pictures[0], pictures[2])
    (tmp_path / "empty.txt").write_text("")
    assert call("sample", "--checkpoint", captioned, "--steps", 2, "--prompt-file", tmp_path / "empty.txt") == 2
    assert "holds no prompt" in capsys.readouterr().err
