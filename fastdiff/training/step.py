"""One training step. Nothing in it reads a value of the device on the host."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import record_function

from fastdiff.diffusion.objectives import Objective
from fastdiff.diffusion.reconstruction import Reconstruction
from fastdiff.errors import UserError
from fastdiff.evaluation.space import PIXELS, Space
from fastdiff.nets.fuse import seed_or_drawn
from fastdiff.runtime.device import compiled, tf32
from fastdiff.runtime.graphs import Captured
from fastdiff.runtime.world import Ranks
from fastdiff.training.conditions import UNIFORMS, Table
from fastdiff.training.metrics import Metrics, NoiseLevels
from fastdiff.training.optim import Update

CRITIC = "critic."  # before the names of the weights of an autoencoder's critic, which is called beside it


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The 63-bit seed of all randomness in a step, so that a resumed run draws what an unbroken one would have."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class TrainStep:
    """batch -> t, eps -> x0 -> loss under autocast -> backward -> clip -> optimizer -> EMA.

    A call has a part on the host, which seeds the generators and writes what changes from step to step (batch, step
    number, learning rate, decay) to the device, and a body that depends on nothing else, so that a CUDA graph can
    replay it. On a CPU `graphs` takes the same way through a fixed input, and runs the body as it is.

    t, eps and left-out conditions are drawn for the whole batch, so parts and ranks change the update by rounding
    alone; only dropout draws other masks.

    Args:
        model: the network, plain or fused, its weights float32 in channels_last memory.
        update: made with accumulate, graphs and skip_nonfinite where the step has them; accumulate also with ranks.
        lr: the learning rate of each step, counted from 0.
        grad_clip: largest global gradient norm.
        bf16: autocast activations to bfloat16.
        compile: torch.compile forward, loss and backward.
        accumulate: equal parts of the batch, one after the other through the network, to need less memory.
        graphs: capture the step in a CUDA graph, after a few that run as they are. All batches must be of one size.
        skip_nonfinite: steps in a row whose loss or gradient may be not finite; the device passes over their updates,
            and counts them. One more, and the metrics' `bad_step` says where.
        ranks: the processes that share each batch, each calling with its part; None for one alone.
        conditions: what the network is told about an image by its index in the set.
        space: turns a batch into x0.
        critic: an autoencoder's discriminator, its part `critic`, trained in the same step; `objective` gets it.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | Reconstruction,
        update: Update,
        *,
        lr: Callable[[int], float],
        grad_clip: float,
        seed: int,
        bf16: bool,
        compile: bool,
        accumulate: int = 1,
        graphs: bool = False,
        skip_nonfinite: int = 0,
        ranks: Ranks | None = None,
        conditions: Sequence[Table] = (),
        space: Space = PIXELS,
        critic: nn.Module | None = None,
    ) -> None:
        self.conditions, self.space, self.critic = conditions, space, critic
        self.model, self.objective, self.update = model, objective, update
        if isinstance(objective, Reconstruction) and critic is not None:
            objective.critic = self._judge
        self.lr, self.grad_clip = lr, grad_clip
        self.seed, self.accumulate, self.graphs = seed, accumulate, graphs
        self.skip_nonfinite = skip_nonfinite
        self.ranks = ranks if ranks is not None and ranks.size > 1 else None
        self.rank, self.size = (ranks.rank, ranks.size) if ranks is not None else (0, 1)
        self.parameters = update.parameters
        self.device = self.parameters[0].device
        self.leaves = list(update.weights.values())
        for p in self.parameters:
            if p.ndim == 4 and not p.is_contiguous(memory_format=torch.channels_last):
                raise ValueError("the network's weights must be in channels_last memory")
        self.loss: Callable[..., tuple[Tensor, Tensor]] = compiled(self._loss) if compile else self._loss
        self.account = compiled(self._account) if compile else self._account
        self.metrics, self.noise_levels = Metrics(self.device), NoiseLevels(self.device)
        self.batch: tuple[Tensor, ...] = ()  # the body's input, images and index, fixed where it may be captured
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)  # of the step, from 0
        # Every rank draws t and eps as rank 0 does, and masks from the default generator, which each seeds differently.
        self.noise = torch.Generator(self.device) if self.rank > 0 else None
        self.compute_in("bf16" if bf16 else "fp32")

    def compute_in(self, precision: str) -> None:
        """Take the next steps in bf16, tf32 or fp32; they are compiled and captured anew."""
        self.bf16, self.tf32 = precision == "bf16", precision == "tf32"
        self.run = Captured(
            self._body, device=self.device, capture=self.graphs and self.device.type == "cuda",
            what="the training step", generators=[self.noise] if self.noise is not None else [],
        )  # fmt: skip

    def _loss(self, images: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, 0-dim, and each image's loss (N,), detached."""
        x0 = self.space.x0(images)
        if self.objective.shares_dropout:
            cond["dropout_seed"] = seed_or_drawn(None, images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.objective.loss(self._network, x0, t, eps, **cond)
            return losses.mean(), losses.detach()

    def _judge(self, images: Tensor, frozen: bool = False) -> Tensor:
        """What the critic says, with or without a gradient of its weights; in float32, as slopes are differences."""
        assert self.critic is not None
        own = {n.removeprefix(CRITIC): w for n, w in self.update.weights.items() if n.startswith(CRITIC)}
        weights = {n: w.detach() if frozen else w for n, w in own.items()}
        with torch.autocast(images.device.type, enabled=False):
            return functional_call(self.critic, weights, (images.to(next(iter(weights.values())).dtype),))

    def _network(self, x_t: Tensor, c_noise: Tensor, **cond: Tensor) -> Tensor:
        weights = {n: w for n, w in self.update.weights.items() if not n.startswith(CRITIC)}
        return functional_call(self.model, weights, (x_t, c_noise), cond)

    def __call__(self, images: Tensor, step: int, index: Tensor | None = None) -> None:
        """Take one step.

        Args:
            images: uint8 (N, H, W, C), or what `space` has in its place, on the model's device, contiguous, this rank's
                part of the batch; free to be overwritten by work that is queued after the call.
            step: the number of updates made before this one.
            index: (N,) int64, where each image stands in the set; `conditions` look them up by it.

        Raises:
            UserError: `graphs`, and the batch has another size than the first one, or the step cannot be captured.
        """
        if not images.is_contiguous():
            raise ValueError("images must be contiguous (N, H, W, C), which normalisation makes channels_last")
        if len(images) % self.accumulate:
            raise ValueError(f"a batch of {len(images)} cannot be split into {self.accumulate} equal parts")
        with record_function("data"):
            self._take(images, *([index] if self.conditions and index is not None else []))
        torch.manual_seed(step_seed(self.seed, step, self.rank))
        if self.noise is not None:
            self.noise.manual_seed(step_seed(self.seed, step))
        self.number.fill_(step)
        self.objective.advance(step * len(images) * self.size)
        self.update.begin(lr=self.lr(step))
        with tf32(self.tf32):
            self.run()
        self.metrics.step()

    def _take(self, *batch: Tensor) -> None:
        if not self.graphs:
            self.batch = batch
            return
        if not self.batch:
            self.batch = tuple(torch.empty_like(v) for v in batch)
        if batch[0].shape != self.batch[0].shape:
            size, first = (" x ".join(map(str, v[0].shape)) for v in (batch, self.batch))
            raise UserError(
                f"a batch of {size} cannot go through the step that was captured for {first}; use --no-graphs for "
                "batches of several sizes."
            )
        for mine, given in zip(self.batch, batch, strict=True):
            mine.copy_(given)

    def _body(self) -> None:
        """All that a step does on the device; the same kernels on the same addresses in every step."""
        images, *index = self.batch
        n = len(images)
        total, mine = n * self.size, slice(n * self.rank, n * (self.rank + 1))

        def normal(shape: torch.Size) -> Tensor:
            """Of all ranks' images, this one's: (n, ...)."""
            return torch.randn(total, *shape[1:], generator=self.noise, device=self.device)[mine]

        t = self.objective.sample_t(total, generator=self.noise, device=self.device)
        images = self.space.sample(images, normal)
        batch, cond = (images, t[mine], normal(images.shape).permute(0, 3, 1, 2)), {}
        if self.conditions:
            uniform = torch.rand(total, UNIFORMS, generator=self.noise, device=self.device)[mine]
            cond = {name: value for table in self.conditions for name, value in table(*index, uniform).items()}
        parts = zip(*(v.chunk(self.accumulate) for v in (*batch, *cond.values())), strict=True)
        losses, of_images, share = [], [], 1 / (self.accumulate * self.size)
        for i, part in enumerate(parts):
            with record_function("forward"):
                loss, per_image = self.loss(*part[:3], **dict(zip(cond, part[3:], strict=True)))
            with record_function("backward"):
                self.update.add(torch.autograd.grad(loss, self.leaves), share=share, first=i == 0)
            losses.append(loss.detach())
            of_images.append(per_image.detach())
        image_losses = torch.cat(of_images)
        if self.ranks is None:
            loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        else:
            gathered = torch.zeros(total, device=self.device)
            gathered[mine] = image_losses
            with record_function("all-reduce"):
                self.ranks.sum_([gathered], "all-reduce of the loss")
                self.update.reduce(self.ranks.sum_)
            loss, image_losses = gathered.mean(), gathered
        grad_norm = self.update.apply(grad_clip=self.grad_clip, good=loss.isfinite())
        self.account(t, image_losses, loss, grad_norm)

    def _account(self, t: Tensor, losses: Tensor, loss: Tensor, grad_norm: Tensor) -> None:
        """Add a step to the sums: t (N,) or (N, 2) and losses (N,) of all its images; their mean and gradient norm."""
        log_snr = self.objective.log_snr(t)
        if log_snr is not None:
            self.noise_levels.update(log_snr, losses)
        self.metrics.add(loss, grad_norm, self.number, allowed=self.skip_nonfinite)

    def times(self, n: int, step: int) -> Tensor:
        """The t, (n,) or (n, 2), that a step draws for the n images of all ranks: again, to tell what went wrong."""
        generator = torch.Generator(self.device).manual_seed(step_seed(self.seed, step))
        return self.objective.sample_t(n, generator=generator, device=self.device)
