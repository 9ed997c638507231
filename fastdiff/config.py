"""The config of a run: its sections together, checked when they are put together."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import tyro

from fastdiff.checks import check_words, require
from fastdiff.errors import UserError
from fastdiff.few_step_section import TAUGHT, TuningConfig
from fastdiff.latent_sections import AutoencoderConfig, LatentsConfig
from fastdiff.model_sections import NEEDS_SIGNAL, ConditionsConfig, DiffusionConfig, UNetConfig
from fastdiff.sections import EvalConfig, ImagesConfig, MachineConfig, OptimConfig, PresetName, RunConfig


@dataclass(frozen=True)
class Config:
    """A training run. Every field of a section is a flag of `train_cifar.py`, named without its section; the defaults
    are the DDPM CIFAR-10 baseline."""

    preset: PresetName = "ddpm-cifar10"
    """Where the other fields' defaults come from; `quick`: digits, in minutes on a CPU, without a download."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    net: UNetConfig = field(default_factory=lambda: UNetConfig(dropout=0.1))
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    space: LatentsConfig = field(default_factory=LatentsConfig)
    autoencoder: tyro.conf.Fixed[AutoencoderConfig] = field(default_factory=AutoencoderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        check_words(self)
        if self.space.latents is None:
            require(self.net.image_channels == 3, "image_channels", self.net.image_channels, "3, as all data are RGB")
        steps, timesteps = self.eval.eval_steps, self.diffusion.timesteps
        if self.diffusion.discrete:
            require(steps <= timesteps, "eval_steps", steps, f"at most --timesteps ({timesteps})")
        for flag, scale in (("eval", self.eval.eval_guidance), ("teacher", self.tuning.teacher_guidance)):
            if scale != 1 and not self.conditions.any:
                raise UserError(
                    f"--{flag}-guidance is {scale:g}, but guidance leads to a class or a caption; add --conditional or "
                    f"--text, or --{flag}-guidance 1."
                )
        for flag, used, dropout in (
            ("label", self.conditions.conditional, self.conditions.label_dropout),
            ("caption", self.conditions.text != "none", self.conditions.caption_dropout),
        ):
            if self.eval.eval_guidance != 1.0 and used and dropout == 0:
                raise UserError(
                    f"--{flag}-dropout is 0, so that the network never learns to draw without a {flag}, from which "
                    f"--eval-guidance leads away; raise it, or add --eval-guidance 1."
                )
        self._check_decay()
        self._check_few_steps()
        self._check_autoencoder()

    @property
    def pixels(self) -> int:
        """Height and width of the images of the data."""
        return self.space.pixels or self.net.image_size

    @property
    def task(self) -> tuple[str, ...]:
        """What the network is trained for, in words, then the names of its classes; equal for networks that can mix."""
        if self.autoencoder.factor:
            return (f"an autoencoder of factor {self.autoencoder.factor}",)
        told, words = self.conditions, [self.diffusion.task]
        words += [f"latents of {self.space.autoencoder_sha256[:12]}"] if self.space.latents is not None else []
        words += ["two times"] if self.net.two_times else []
        words += [f"texts by {told.text_fingerprint or told.text}"] if told.text != "none" else []
        return ", ".join(words), *told.class_names

    @property
    def unprepared(self) -> str | None:
        """A warning where few steps are learned from random weights, or from the data with a teacher's weighting."""
        if self.tuning.few_step not in TAUGHT or self.tuning.teacher:
            return None
        if not self.optim.init_from:
            return (
                f"--few-step {self.tuning.few_step} begins with random weights, which takes far more images; name a "
                "trained run of the same objective by --init-from or --teacher."
            )
        if self.tuning.few_step == "consistency" and self.diffusion.weighting == "image":
            return (
                "--weighting image suits a --teacher; without one digits were unlearned: add --weighting uniform and a "
                "lower --lr, as --preset quick-tuning has."
            )
        return None

    def _check_few_steps(self) -> None:
        """Raises UserError for an objective that cannot be tuned, and where rounding would exceed the step."""
        tuning, diffusion, machine = self.tuning, self.diffusion, self.machine
        if machine.precision == "staged" and not tuning.compared:
            others = "fp32" if tuning.exact else "bf16, tf32 or fp32"
            raise UserError(
                "--precision staged follows the stages of --few-step consistency or flow-map; choose one of them, or "
                f"--precision {others}."
            )
        if machine.precision == "staged" and self.run.profile:
            raise UserError(
                f"--profile {self.run.profile} is of steps in one precision, but --precision staged changes it; "
                "profile a run of --precision bf16, tf32 or fp32."
            )
        if tuning.few_step == "none":
            return
        flag = f"--few-step {tuning.few_step}"
        weightings = ("uniform", "image") if tuning.few_step == "consistency" else ("uniform",)
        if diffusion.weighting not in weightings:
            raise UserError(
                f"--weighting {diffusion.weighting} would be ignored, as {flag} has weights of its own; choose "
                f"{' or '.join(weightings)}."
            )
        if tuning.few_step != "consistency" and diffusion.time_sampling != "auto":
            raise UserError(
                f"--time-sampling {diffusion.time_sampling} would be ignored, as {flag} draws times of its own; add "
                "--time-sampling auto."
            )
        if tuning.two_times and (diffusion.objective, diffusion.resolved_schedule) != ("flow", "flow"):
            raise UserError(
                f"{flag} averages the velocity of --objective flow on --schedule flow, but this is {diffusion.task}; "
                "choose these."
            )
        if tuning.few_step == "consistency" and diffusion.objective in NEEDS_SIGNAL:
            raise UserError(
                f"{flag} compares estimates of the image. Those of --objective {diffusion.objective} are divided by "
                "alpha, which is about 0 at the noisiest level; choose x0, edm, v or flow."
            )
        if tuning.few_step == "scm" and diffusion.objective != "edm":
            raise UserError(f"{flag} needs --objective edm, but this is {diffusion.objective}; choose it.")
        for name, value, can in (
            ("precision", machine.precision, "fp32"), ("compile", machine.compile, "off"),
            ("kernels", machine.kernels, "torch"),
        ):  # fmt: skip
            if tuning.exact and value not in ("auto", can):
                raise UserError(
                    f"{flag} differentiates the network forwards, which --{name} {value} cannot; add --{name} {can}."
                )
        seen = 2**63 if self.run.steps is None else (self.run.steps - 1) * self.optim.batch_size
        precision = machine.precision if machine.precision in SMALLEST_GAP else "fp32"
        gap, least = tuning.at(seen), SMALLEST_GAP[precision]
        if tuning.compared and gap < least:
            words = "float32" if precision == "fp32" else f"--precision {precision}"
            raise UserError(
                f"{flag} would compare estimates at noise levels {tuning.compared} = {gap:.2g} apart, but in {words} "
                f"rounding drowns steps below {least:g}; lower --q or --stages"
                + ("." if precision == "fp32" else ", or use --precision staged.")
            )

    def _check_autoencoder(self) -> None:
        """Raises UserError where an autoencoder does not fit its images, and for flags that it would ignore."""
        ours, none = self.autoencoder, EvalConfig()
        if ours.factor == 0:
            return
        for flag, given in (
            ("conditional", self.conditions.conditional), ("text", self.conditions.text != "none"),
            ("latents", self.space.latents is not None), ("few-step", self.tuning.few_step != "none"),
        ):  # fmt: skip
            if given:
                raise UserError(f"--{flag} is for diffusion networks, but this run trains an autoencoder; drop it.")
        least = ours.factor * (2 if ours.equivariance else 1)
        why = " (--equivariance halves the latents)" if ours.equivariance else ""
        size = self.net.image_size
        require(size % least == 0, "image_size", size, f"a multiple of {least}, with --factor {ours.factor}{why}")
        for name in ("eval_sampler", "eval_steps", "eval_few_steps", "eval_guidance", "eval_guidance_interval"):
            expected = "left out: an autoencoder draws no samples"
            require(getattr(self.eval, name) == getattr(none, name), name, getattr(self.eval, name), expected)

    def _check_decay(self) -> None:
        """Raises UserError where the learning rate has no steps to fall over."""
        optim, steps = self.optim, self.run.steps
        if optim.lr_decay == "constant":
            return
        if steps is None:
            raise UserError(f"--lr-decay {optim.lr_decay} falls to 0 at --steps, which is not given; add --steps.")
        start = optim.decay_start(steps)
        if start is None or not optim.warmup_steps <= start < steps:
            lower = "--warmup-steps or --decay-fraction" if optim.lr_decay == "wsd" else "--warmup-steps"
            raise UserError(
                f"--lr-decay {optim.lr_decay} would fall from step {start:,} to --steps {steps:,}, but must begin "
                f"after --warmup-steps ({optim.warmup_steps:,}); raise --steps, or lower {lower}."
            )

    @classmethod
    def of(cls, **flags: Any) -> "Config":
        """The baseline with other values, each by its flag's name: `Config.of(lr=1e-3, channels=64)`."""
        return cls().replace(**flags)

    def replace(self, **flags: Any) -> "Config":
        """A copy with other values, each by its flag's name, or a whole section by the section's."""
        changes: dict[str, Any] = {name: flags[name] for name in flags if name in SECTIONS or name == "preset"}
        for section in SECTIONS:
            values = {name: value for name, value in flags.items() if SECTION_OF.get(name) == section}
            if values:
                changes[section] = dataclasses.replace(flags.get(section, getattr(self, section)), **values)
        if unknown := sorted(flags.keys() - SECTION_OF.keys() - SECTIONS.keys() - {"preset"}):
            raise TypeError(f"no flag has the name {', '.join(unknown)}")
        return dataclasses.replace(self, **changes)

    def resolved(self, device: str) -> "Config":
        """The config with every `auto` decided that the kind of device, "cuda" or "cpu", and the data decide.

        `features`, `time_sampling` and `feature_size` stay: the extractor's weights and the schedule decide them.
        """
        cuda, exact = device == "cuda", self.tuning.exact
        auto = {
            "device": device, "precision": "bf16" if cuda and self.tuning.few_step == "none" else "fp32",
            "compile": "on" if cuda and not exact else "off",
            "kernels": "triton" if cuda and not exact else "torch", "loader": "dali" if cuda else "resident",
            "schedule": self.diffusion.resolved_schedule, "flip": "on" if self.images.flips else "off",
        }  # fmt: skip
        values = self.flat()
        return self.replace(**{name: value for name, value in auto.items() if values[name] == "auto"})

    def precision_at(self, images: int) -> str:
        """bf16, tf32 or fp32: what a step computes in after so many images; of a resolved config."""
        if self.machine.precision != "staged":
            return self.machine.precision
        gap = self.tuning.at(images)
        return next((name for name, least in SMALLEST_GAP.items() if gap >= least), "fp32")

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types, section by section."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """Every field by its flag's name."""
        return {"preset": self.preset} | {name: getattr(getattr(self, s), name) for name, s in SECTION_OF.items()}

    def changes(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """Fields that are not among RESUMABLE_CHANGES and differ: name -> their value in `other`, and here."""
        ours, theirs = ({**each.flat(), "flip": "on" if each.images.flips else "off"} for each in (self, other))
        return {
            name: (theirs[name], value)
            for name, value in ours.items()
            if value != theirs[name] and name not in RESUMABLE_CHANGES
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`; also of what stood in config.json before it had sections.

        Raises:
            UserError: a field that this version does not know.
        """
        flat: dict[str, Any] = {}
        for name, value in values.items():
            if name == "resolved":  # what each `auto` became then
                continue
            if isinstance(value, dict) and name in SECTIONS:
                flat |= {each if SECTION_OF.get(each) == name else f"{name}.{each}": v for each, v in value.items()}
            else:
                flat[name] = value
        if unknown := sorted(flat.keys() - SECTION_OF.keys() - {"preset"}):
            raise UserError(f"config.json has fields that this version does not know: {', '.join(unknown)}.")
        if flat.get("text", "none") != "none":  # networks that read texts were so before they had this field
            flat = {"text_pooled": False} | flat
        try:
            return cls.of(**{name: tuple(v) if isinstance(v, list) else v for name, v in flat.items()})
        except TypeError as error:
            raise UserError(f"config.json has a field of another type ({error}); restore it.") from error


# Section -> the names of its fields; and flag -> its section. No two sections have a field of one name.
SECTIONS: dict[str, tuple[str, ...]] = {
    name: tuple(f.name for f in dataclasses.fields(section))
    for name, section in vars(Config()).items()
    if dataclasses.is_dataclass(section)
}
SECTION_OF = {name: section for section, names in SECTIONS.items() for name in names}

# Of a step's `gap`: below it rounding is more than half of the difference of two estimates. Coarsest first.
SMALLEST_GAP = {"bf16": 0.3, "tf32": 0.05, "fp32": 0.0003}

# A resumed run may change these: none of them changes the mathematics of a later step. `accumulate` splits a batch, and
# the update stays the same up to rounding. Data, captions and teacher may have another name or place, as their content
# is compared. `steps`, `lr_decay` and `decay_fraction` may change the learning rate of later steps, not of one made.
RESUMABLE_CHANGES = frozenset(
    {
        "steps", "log_every", "save_every", "eval_every", "keep_last", "eval_at_start", "eval_samples",
        "final_eval_samples", "eval_batch_size", "eval_sampler", "eval_steps", "eval_guidance",
        "eval_guidance_interval", "grid_samples", "features", "feature_size", "data", "data_root", "split", "loader",
        "device", "compile", "graphs", "kernels", "accumulate", "run_root", "profile", "skip_nonfinite", "rank_timeout",
        "deterministic", "lr_decay", "decay_fraction", "captions", "teacher", "latents",
        "last_level", "eval_few_steps",
    }
)  # fmt: skip
