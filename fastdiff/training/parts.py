"""The parts of a training run, made of its config: conditions, distance, step, evaluator."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from fastdiff.config import Config
from fastdiff.data.cache import cache_folder
from fastdiff.data.datasets import ImageSet
from fastdiff.diffusion.objectives import Objective, make_objective
from fastdiff.diffusion.reconstruction import Reconstruction
from fastdiff.evaluation.denoising import DenoisingError
from fastdiff.evaluation.evaluator import Evaluator
from fastdiff.evaluation.features import make_extractor
from fastdiff.evaluation.frechet import FrechetDistance
from fastdiff.evaluation.generate import Generator, SamplerSettings
from fastdiff.evaluation.reconstructions import ReconstructionEvaluator
from fastdiff.evaluation.space import PIXELS, Space
from fastdiff.evaluation.wishes import nothing, wishes
from fastdiff.model_sections import Guidance
from fastdiff.nets.autoencoder import Autoencoder
from fastdiff.nets.fuse import fuse, half_parameters
from fastdiff.nets.unet import UNet
from fastdiff.runs.run import Run
from fastdiff.runs.texts import text_reader
from fastdiff.runs.weights import InitialWeights, TeacherWeights
from fastdiff.runtime.world import Ranks
from fastdiff.training.conditions import UNIFORMS, CaptionTable, Labels, Table
from fastdiff.training.ema import EMA
from fastdiff.training.optim import LearningRate, make_update
from fastdiff.training.step import TrainStep, step_seed
from fastdiff.training.tuning import objective_of

EVALUATION_STREAM = 2**32 - 1  # in place of a step's number, so that evaluations draw apart from the steps


def make_conditions(config: Config, image_set: ImageSet, ranks: Ranks) -> list[Table]:
    """What the network is told about images. Raises UserError for a caption that is too long."""
    told, conditions = config.conditions, list[Table]()
    if told.conditional and image_set.labels is not None:
        conditions.append(
            Labels(
                image_set.labels, num_classes=config.net.num_classes, dropout=told.label_dropout, device=ranks.device
            )
        )
    read = text_reader(config, cache_folder(config.images.data_root))
    if read is not None and image_set.captions is not None:
        conditions.append(CaptionTable(image_set.captions, read, dropout=told.caption_dropout, device=ranks.device))
    return conditions


def make_distance(config: Config, image_set: ImageSet, ranks: Ranks) -> FrechetDistance:
    """The distance to the training images; all ranks take the extractor that `auto` is on rank 0."""
    make = partial(make_extractor, device=ranks.device, size=config.eval.feature_size)
    extractor = make(config.eval.features) if ranks.is_main else None
    name = ranks.share(extractor.name if extractor is not None else "", "the extractor")
    return FrechetDistance(
        extractor or make(name), image_set, cache_dir=cache_folder(config.images.data_root), device=ranks.device,
        reference=ranks.is_main,
    )  # fmt: skip


def make_step(
    config: Config, conditions: list[Table], ranks: Ranks, initial: InitialWeights | None,
    teacher: TeacherWeights | None, space: Space = PIXELS,
) -> tuple[TrainStep, UNet | Autoencoder, EMA]:  # fmt: skip
    """The network, its average, and the step that trains it."""
    optim, machine = config.optim, config.machine
    bf16, compile = machine.precision == "bf16", machine.compile == "on"
    graphs = machine.graphs and not config.tuning.exact  # no test on a CPU can see such a step in a graph
    torch.manual_seed(config.run.seed)
    objective: Objective | Reconstruction
    if (shape := config.autoencoder).factor:
        model, side = Autoencoder(shape).to(ranks.device), config.pixels // shape.factor
        objective = Reconstruction(
            shape.reconstruction, kl_weight=shape.kl_weight, equivariance=shape.equivariance,
            latent_shape=(shape.latent_channels, side, side), critic_weight=shape.critic_weight,
            critic_start=shape.critic_start, device=ranks.device,
        )  # fmt: skip
    else:
        model = UNet(config.net).to(ranks.device)
        for table in conditions:
            if isinstance(table, CaptionTable) and model.text is not None:
                model.text.begin_with(table.tables["text"])
        read = text_reader(config, cache_folder(config.images.data_root)) if teacher is not None else None
        objective = objective_of(config, ranks.device, teacher=teacher, nothing=nothing(config, read))
    if initial is not None:
        new = {name: v for name, v in model.state_dict().items() if name.startswith(("span.", "critic.", "pooled."))}
        model.load_state_dict(new | initial.state)  # which may lack them
        if isinstance(model, Autoencoder):
            model.latent_std.zero_()  # not measured yet
    network = fuse(model) if machine.kernels == "triton" else model
    ema = EMA(model, optim.ema_decay)
    update = make_update(
        machine.kernels, model, ema, optimizer=optim.optimizer, weight_decay=optim.weight_decay, beta2=optim.beta2,
        half=half_parameters(network) if bf16 else (), accumulate=optim.accumulate * ranks.size > 1,
        graphs=graphs, skip_nonfinite=optim.skip_nonfinite > 0,
    )  # fmt: skip
    step = TrainStep(
        network, objective, update, lr=LearningRate.of(config),
        grad_clip=optim.grad_clip, seed=config.run.seed, bf16=bf16, compile=compile, accumulate=optim.accumulate,
        graphs=graphs, skip_nonfinite=optim.skip_nonfinite, ranks=ranks, conditions=conditions,
        space=space, critic=model.critic if isinstance(model, Autoencoder) else None,
    )  # fmt: skip
    return step, model, ema


def evaluation_samplers(config: Config) -> list[SamplerSettings]:
    """How evaluations draw, then how they draw in few steps. Raises UserError for what the schedule does not have."""
    wanted, schedule = config.eval, make_objective(**config.diffusion.arguments).schedule
    few = "flow-map" if config.tuning.two_times else "consistency"
    kinds = [(wanted.eval_sampler, wanted.eval_steps), *((few, n) for n in wanted.eval_few_steps)]
    samplers = [SamplerSettings(name, n, last_level=config.tuning.last_level) for name, n in kinds]
    for each in samplers:
        each.plan(schedule)
    return samplers


def make_evaluator(
    config: Config, image_set: ImageSet, ranks: Ranks, run: Run | None, step: TrainStep, ema: EMA,
    distance: FrechetDistance | None, say: Callable[[str], None],
) -> Evaluator | ReconstructionEvaluator:  # fmt: skip
    """What measures and draws the average's samples, or reconstructions."""
    net, machine, wanted = config.net, config.machine, config.eval
    if isinstance(ema.model, Autoencoder):
        return ReconstructionEvaluator(
            ema.model, image_set, distance, ranks, run, batch_size=wanted.eval_batch_size, shown=wanted.grid_samples,
            seed=step_seed(config.run.seed, EVALUATION_STREAM), say=say,
            measured=lambda mean, std: ema.set_buffers(latent_mean=mean, latent_std=std),
        )  # fmt: skip
    assert isinstance(step.objective, Objective)
    read = text_reader(config, cache_folder(config.images.data_root))
    first, *few = evaluation_samplers(config)
    generator = Generator(
        fuse(ema.model) if machine.kernels == "triton" else ema.model, step.objective, first,
        batch_size=wanted.eval_batch_size, shape=(net.image_channels, net.image_size, net.image_size),
        device=ranks.device, bf16=step.bf16, compile=machine.compile == "on", graphs=machine.graphs,
        space=step.space, nothing=nothing(config, read),
    )  # fmt: skip
    guidance = Guidance(wanted.eval_guidance, wanted.eval_guidance_interval)
    return Evaluator(
        generator, distance, ranks, run, grid=wanted.grid_samples, seed=step_seed(config.run.seed, EVALUATION_STREAM),
        say=say, wishes=wishes(config, image_set, read), guidance=guidance,
        few_steps=[generator.by(each) for each in few],
    )  # fmt: skip


def make_watch(
    config: Config, image_set: ImageSet, step: TrainStep, evaluator: Evaluator | ReconstructionEvaluator
) -> DenoisingError | None:
    """Of 64 images of a run for few steps, which may unlearn what its network knew."""
    if config.tuning.few_step == "none" or not isinstance(evaluator, Evaluator):
        return None
    n = len(image_set.images)
    index = np.linspace(0, n - 1, min(64, n), dtype=np.int64)
    x0 = step.space.encode(torch.from_numpy(image_set.images[index]).to(step.device))
    uniform = torch.ones(len(index), UNIFORMS, device=step.device)  # nothing is left out
    told = [table(torch.from_numpy(index).to(step.device), uniform) for table in step.conditions]
    cond = {name: value for each in told for name, value in each.items()}
    draws = evaluator.generator
    return DenoisingError(draws.network, draws.objective, x0, cond, batch_size=config.eval.eval_batch_size)
