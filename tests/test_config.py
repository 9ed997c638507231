import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.config import RESUMABLE_CHANGES, SECTION_OF, SECTIONS, Config
from fastdiff.diffusion.objectives import OBJECTIVES, make_objective
from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.diffusion.schedules import DISCRETE, SCHEDULES
from fastdiff.diffusion.times import TIME_SAMPLINGS
from fastdiff.diffusion.weightings import WEIGHTINGS
from fastdiff.errors import UserError
from fastdiff.model_sections import AUTO_SCHEDULE, DISCRETE_SCHEDULES, NEEDS_SIGNAL, UNetConfig
from fastdiff.presets import PRESETS
from fastdiff.training.optim import OPTIMIZERS


def choices(name):
    from typing import get_args, get_type_hints

    section = type(getattr(Config(), SECTION_OF[name])) if name in SECTION_OF else Config
    return set(get_args(get_type_hints(section)[name]))


def test_the_flags_choices_are_the_tables_keys():
    assert choices("schedule") == {"auto", *SCHEDULES}
    assert choices("time_sampling") == {"auto", *TIME_SAMPLINGS}
    assert choices("objective") == set(OBJECTIVES)
    assert choices("weighting") == set(WEIGHTINGS)
    assert choices("eval_sampler") == set(SAMPLERS)
    assert choices("preset") == set(PRESETS)
    assert choices("optimizer") == set(OPTIMIZERS)


def test_presets_carry_their_own_names_and_the_default_is_the_baseline():
    assert all(config.preset == name for name, config in PRESETS.items())
    assert PRESETS["ddpm-cifar10"] == Config()
    baseline = Config()
    assert (baseline.optim.batch_size, baseline.optim.lr, baseline.optim.warmup_steps) == (128, 2e-4, 5000)
    assert (baseline.net.dropout, baseline.optim.grad_clip, baseline.optim.ema_decay) == (0.1, 1.0, 0.9999)
    assert baseline.run.steps is None


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_objective_changes_by_one_flag(preset, objective):
    refused = {
        ("flow", "edm"): r"--time-sampling logit-normal .* is sigma; choose log-normal",  # times not in [0, 1]
        **{
            (each, kind): f"Those of --objective {kind} are divided by alpha"
            for each in (
                "quick-consistency",
                "quick-tuning",
                "text-consistency",
                "consistency-cifar10",
                "stages-cifar10",
                "distil-cifar10",
            )
            for kind in ("eps", "score")
        },
        **{("flow-map-cifar10", kind): "averages the velocity" for kind in OBJECTIVES if kind != "flow"},
    }
    if message := refused.get((preset, objective)):
        with pytest.raises(UserError, match=message):
            PRESETS[preset].replace(objective=objective)
        return
    config = PRESETS[preset].replace(objective=objective)
    built = make_objective(**config.diffusion.arguments)
    assert built.name == objective
    assert built.schedule.name == config.diffusion.resolved_schedule
    built.schedule.grid(config.eval.eval_steps)


def test_auto_schedules_are_those_of_the_objectives():
    assert set(DISCRETE_SCHEDULES) == set(DISCRETE)
    assert AUTO_SCHEDULE.keys() == OBJECTIVES.keys()
    assert set(NEEDS_SIGNAL) == {name for name, kind in OBJECTIVES.items() if kind.needs_signal}
    assert Config().replace(objective="edm").diffusion.resolved_schedule == "edm"
    assert Config().replace(objective="edm", schedule="cosine").diffusion.resolved_schedule == "cosine"


MISFITS = [
    ({"zero_terminal_snr": True, "objective": "v", "schedule": "edm"}, "--zero-terminal-snr rescales"),
    ({"zero_terminal_snr": True, "objective": "flow"}, r"--schedule is flow \(auto\)"),
    ({"zero_terminal_snr": True}, "--objective eps cannot tell the image from pure noise, with which --zero-terminal"),
    ({"objective": "score", "schedule": "flow"}, "--objective score cannot tell .* --schedule flow"),
    ({"time_sampling": "logit-normal", "objective": "edm"}, r"--time-sampling logit-normal .* edm \(auto\) is sigma"),
]


@pytest.mark.parametrize(("changes", "message"), MISFITS)
def test_parts_that_do_not_fit_are_refused_here_and_when_they_are_built(changes, message):
    with pytest.raises(UserError, match=message):
        Config().replace(**changes)
    options = dict(changes)
    options["kind"] = options.pop("objective", "eps")
    options.setdefault("schedule", AUTO_SCHEDULE[options["kind"]])
    with pytest.raises(UserError):
        make_objective(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_decay": "wsd"}, "--lr-decay wsd falls to 0 at --steps, which is not given; add --steps"),
        ({"lr_decay": "linear-decay"}, "--lr-decay linear-decay falls to 0 at --steps, which is not given"),
        ({"lr_decay": "linear-decay", "steps": 5000}, r"from step 5,000 to --steps 5,000, .* --warmup-steps \(5,000\)"),
        ({"lr_decay": "wsd", "steps": 6000}, "would fall from step 4,800 .* or --decay-fraction"),
        ({"lr_decay": "wsd", "steps": 9000, "decay_fraction": 1.0}, "would fall from step 0 to --steps 9,000"),
    ],
)
def test_a_learning_rate_needs_steps_to_fall_over(changes, message):
    with pytest.raises(UserError, match=message):
        Config().replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"precision": "bf16", "steps": 10},
            r"= 0\.0039 apart, but in --precision bf16 rounding .* below 0\.3; .* or use --precision staged\.",
        ),
        ({"precision": "tf32", "q": 30.0}, r"= 0\.033 apart, but in --precision tf32 rounding .* below 0\.05; "),
        ({"precision": "staged", "q": 5000.0}, r"= 0\.0002 apart, but in float32"),
        (
            {"precision": "staged", "few_step": "none"},
            "--precision staged follows the stages of --few-step consistency",
        ),
        ({"precision": "staged", "few_step": "scm"}, "--precision staged follows .*; choose .*, or --precision fp32."),
        ({"precision": "staged", "profile": 5}, "--profile 5 is of steps in one precision, but --precision staged"),
        ({"q": 5000.0}, r"= 0\.0002 apart, but in float32 rounding drowns steps below 0\.0003; lower --q or --stages"),
        ({"q": 2.0, "stages": 12}, r"= 0\.00024 apart"),
        (
            {"few_step": "flow-map"},
            "averages the velocity of --objective flow on --schedule flow, but this is edm on edm",
        ),
        ({"objective": "eps"}, "Those of --objective eps are divided by alpha, .*; choose x0"),
        ({"few_step": "scm", "teacher_solver": "heun"}, "--teacher-solver heun is for --few-step consistency, not scm"),
        ({"few_step": "scm", "teacher_steps": 4}, "--teacher-steps 4 is for .* not scm; add --teacher-steps 1."),
        ({"teacher_steps": 0}, "--teacher-steps is 0"),
        ({"few_step": "scm", "objective": "v"}, "--few-step scm needs --objective edm, but this is v"),
        ({"few_step": "mean-flow"}, "averages the velocity of --objective flow on --schedule flow"),
        (
            {"few_step": "scm", "kernels": "triton"},
            "differentiates the network forwards, which --kernels triton cannot; add --kernels torch",
        ),
        ({"few_step": "scm", "compile": "on"}, "which --compile on cannot; add --compile off"),
        ({"few_step": "scm", "precision": "bf16"}, "which --precision bf16 cannot; add --precision fp32"),
        ({"weighting": "edm"}, "--weighting edm would be ignored, as .*; choose uniform or image."),
        (
            {"few_step": "scm", "weighting": "image"},
            "--weighting image would be ignored, as .*; choose uniform.",
        ),
        (
            {"few_step": "flow-map", "objective": "flow", "time_sampling": "uniform"},
            "--time-sampling uniform would be ignored, as --few-step flow-map draws times",
        ),
        ({"q": 1.0}, "--q is 1.0, but must be a finite number above 1"),
        ({"huber_c": 0.0}, "--huber-c is 0.0"),
        ({"boundary": 0.0}, "--boundary is 0.0"),
        ({"stages": 0}, "--stages is 0"),
        ({"teacher": "x", "few_step": "none"}, "--teacher x would teach nothing; add --few-step consistency or scm"),
        ({"teacher_guidance": 2.0, "conditional": True}, "--teacher-guidance is 2, but there is no --teacher"),
        ({"teacher": "x", "teacher_guidance": 2.0}, "--teacher-guidance is 2, but guidance leads to a class"),
    ],
)
def test_what_few_steps_cannot_be_learned_by_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Config.of(**{"few_step": "consistency", "objective": "edm", **changes})


def test_few_steps_from_random_weights_are_warned_of():
    config = Config.of(few_step="consistency", objective="v")
    assert "--few-step consistency begins with random weights" in config.unprepared
    tuned = config.replace(init_from="x")
    assert [c.unprepared for c in (Config(), tuned, config.replace(teacher="x", weighting="image"))] == [None] * 3
    assert "--weighting image suits a --teacher" in tuned.replace(weighting="image").unprepared


def test_coarse_precision_is_for_the_stages_with_large_steps():
    stages = {"few_step": "consistency", "objective": "edm", "q": 2.0, "stages": 8, "stage_images": 1280}
    assert Config.of(precision="bf16", steps=10, **stages).tuning.at(1279) == 0.5
    with pytest.raises(UserError, match=r"= 0\.25 apart"):
        Config.of(precision="bf16", steps=11, **stages)
    assert Config.of(**stages).resolved("cuda").machine.precision == "fp32"
    assert Config.of().resolved("cuda").machine.precision == "bf16"
    exact = Config.of(few_step="scm", objective="edm").resolved("cuda").machine
    assert (exact.kernels, exact.compile, exact.precision) == ("torch", "off", "fp32")
    assert [Config.of(**stages).tuning.at(n) for n in (1280, 1280 * 7, 10**9)] == [0.25, 2.0**-8, 2.0**-8]


def test_staged_precision_is_the_coarsest_that_each_stage_allows():
    config = Config.of(
        few_step="consistency", objective="edm", q=2.0, stages=8, stage_images=100, precision="staged"
    ).resolved("cuda")  # fmt: skip
    stages = [config.precision_at(image) for start in range(0, 800, 100) for image in (start, start + 99)]
    assert stages == ["bf16"] * 2 + ["tf32"] * 6 + ["fp32"] * 8
    assert config.precision_at(10**9) == "fp32"
    assert config.replace(q=20.0, stages=1).precision_at(0) == "tf32"  # just 5%
    falling = Config.of(few_step="flow-map", objective="flow", q=100.0, stage_images=100, precision="staged")
    assert [falling.precision_at(image) for image in (26, 27, 65, 66)] == ["bf16", "tf32", "tf32", "fp32"]
    assert {Config.of(precision=name).precision_at(0) for name in ("bf16", "tf32", "fp32")} == {"bf16", "tf32", "fp32"}


def test_continuous_schedules_have_no_number_of_steps_to_exceed():
    assert Config().replace(objective="flow", eval_steps=2000).eval.eval_steps == 2000


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_a_config_survives_json(config):
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_from_before_the_time_scale_is_read_and_tells_it_only_where_it_is_set():
    values = Config.of(objective="edm").to_dict()
    del values["diffusion"]["time_scale"]
    config = Config.from_dict(values)
    assert config == Config.of(objective="edm")
    assert config.diffusion.task == "edm on edm, sigma_data 0.5"
    assert config.replace(time_scale=0.01).diffusion.task == "edm on edm, sigma_data 0.5, time scale 0.01"


def test_patches_count_where_the_image_size_does_not_fit():
    with pytest.raises(
        UserError, match=r"--image-size is 36, but must be a multiple of 16 \(4 levels in patches of 2\)"
    ):
        Config.of(image_size=36, patch=2)


def test_bytes_need_a_block_and_words_do_not():
    with pytest.raises(UserError, match="--text-blocks is 0, but must be at least 1"):
        Config.of(text="bytes", text_blocks=0).replace(text_encoder="bytes")
    assert Config.of(text="words", text_blocks=0).replace(text_encoder="words").net.text_blocks == 0


def test_a_network_that_read_texts_before_there_was_a_choice_is_read_as_it_was():
    for config, pooled in ((Config.of(text="bytes"), False), (Config(), True)):
        values = config.to_dict()
        assert values["net"].pop("text_pooled")
        assert Config.from_dict(values).net.text_pooled is pooled


def test_an_unknown_field_is_named():
    with pytest.raises(UserError, match="does not know: colour"):
        Config.from_dict({**Config().to_dict(), "colour": 1})
    with pytest.raises(UserError, match=r"does not know: net\.width"):
        Config.from_dict({**Config().to_dict(), "net": {"width": 1}})


def test_the_changes_that_a_resumed_run_may_make_are_fields():
    assert SECTION_OF.keys() >= RESUMABLE_CHANGES


BAD = [
    ("batch_size", 0), ("lr", 0.0), ("lr", float("nan")), ("lr", float("inf")), ("warmup_steps", -1),
    ("weight_decay", -1.0), ("beta2", 0.0), ("beta2", 1.0), ("grad_clip", 0.0), ("ema_decay", 1.0), ("ema_decay", -0.1),
    ("batch_size", 2**31), ("steps", 0), ("seed", -1), ("seed", 2**63), ("skip_nonfinite", 2**63), ("steps", 2**63),
    ("log_every", 0), ("accumulate", 0), ("accumulate", 3), ("accumulate", 256),
    ("save_every", 0), ("eval_every", 0), ("keep_last", 0), ("eval_samples", 1), ("eval_batch_size", 0),
    ("eval_steps", 0), ("eval_steps", 1001), ("eval_few_steps", (2, 0)), ("final_eval_samples", 1),
    ("grid_samples", 0), ("timesteps", 0), ("feature_size", 0), ("schedule", "linear"),
    ("objective", "noise"), ("weighting", "loud"), ("time_sampling", "often"), ("min_snr_gamma", 0.0),
    ("sigma_data", -0.5), ("time_scale", 0.0), ("device", "tpu"), ("loader", "torch"), ("preset", "huge"),
    ("optimizer", "sgd"),
    ("lr_decay", "cosine"), ("decay_fraction", 0.0), ("decay_fraction", 1.5), ("decay_fraction", float("nan")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_the_flags_name(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is .*, but must be"):
        Config().replace(**{name: value})


BAD_NET = [
    ("image_size", 0), ("image_size", 30), ("image_channels", 0), ("channels", 100), ("channel_mult", ()),
    ("channel_mult", (1, 0)), ("blocks_per_level", 0), ("patch", 0), ("patch", 3), ("text_blocks", -1),
    ("attention_resolutions", (5,)), ("dropout", 1.0),
    ("dropout", -0.1), ("norm_groups", 0), ("norm_groups", 5), ("norm_eps", 0.0), ("norm_eps", float("inf")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_NET)
def test_a_bad_network_is_refused(name, value):
    with pytest.raises(UserError, match="but must be"):
        dataclasses.replace(UNetConfig(), **{name: value})


def test_a_flag_beside_its_section_counts():
    assert Config.of(net=UNetConfig(channels=64), channels=32).net.channels == 32
    with pytest.raises(TypeError, match="no flag has the name chanels"):
        Config.of(chanels=32)


@pytest.mark.parametrize("values", [{"lr": "x"}, {"run": {"steps": "5"}}, {"net": {"channel_mult": 5}}])
def test_a_field_of_another_type_is_one_line(values):
    with pytest.raises(UserError, match=r"config\.json has a field of another type"):
        Config.from_dict(values)


def test_flags_have_names_of_their_own():
    assert sum(map(len, SECTIONS.values())) == len(SECTION_OF)
    assert not SECTION_OF.keys() & SECTIONS.keys()


def test_a_config_from_before_the_sections_is_read():
    flat = {"preset": "edm", "data": "digits", "objective": "edm", "lr": 1e-3, "steps": 7, "net": {"channels": 64}}
    config = Config.from_dict(flat)
    assert config == Config.of(preset="edm", data="digits", objective="edm", lr=1e-3, steps=7, channels=64)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_resolved_config_leaves_no_auto_that_the_device_decides(device):
    auto = [name for name, value in PRESETS["quick"].resolved(device).flat().items() if value == "auto"]
    assert auto == ["time_sampling"]
    assert Config.of(kernels="torch").resolved("cuda").machine.kernels == "torch"


WHOLE = [name for name, value in Config().flat().items() if type(value) is int and name not in SECTIONS["net"]]


@given(st.sampled_from(WHOLE), st.integers(-(2**40), 2**40))
def test_any_whole_number_is_taken_or_refused_by_name(name, value):
    try:
        config = Config().replace(**{name: value})
    except UserError as error:
        refusal = str(error)
    else:
        assert config.flat()[name] == value
        return
    assert "--" in refusal
    assert re.search("must be|; add --teacher-steps 1", refusal)


@pytest.mark.parametrize(
    ("device", "flags", "named"),
    [
        ("cpu", {}, None),
        ("cuda", {"precision": "bf16", "kernels": "triton"}, None),
        ("cpu", {"precision": "bf16"}, "--precision bf16 on a CPU: "),
        (
            "cpu",
            {"precision": "staged", "few_step": "consistency", "objective": "edm"},
            "--precision staged on a CPU: ",
        ),
        ("cpu", {"precision": "bf16", "kernels": "triton"}, "--precision bf16 and --kernels triton on a CPU: "),
    ],
)
def test_what_is_slower_on_a_cpu_is_said_to_who_asks_for_it(device, flags, named):
    warning = Config.of(**flags).resolved(device).machine.warning
    assert warning is None if named is None else warning.startswith(named)
