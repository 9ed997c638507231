"""Several ranks: data-parallel training under torchrun, by gloo on CPUs and NCCL on GPUs.

Every rank holds the whole network and takes an equal, consecutive part of each batch; `Ranks.sum_` adds up the
gradients between backward and update, so that all ranks make the same update. Rank 0 alone writes.

The gradient goes as float32 in one or two calls after the backward pass, and not bucket by bucket during it: so it
works alike with a compiled step, the fused update and CUDA graphs. Nothing hides the transfer, then: of a gradient of
4 bytes a parameter (143 MB for 35.7 M), a ring of N ranks sends 2 (N - 1) / N times as many out of every one.
"""

import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fastdiff.errors import TrainingFailed, UserError
from fastdiff.runtime.device import resolve_device

T = TypeVar("T")

START_UP = timedelta(days=1)  # a rank that downloads or decodes the data may keep the others waiting so long
GRACE = 2.0  # seconds between ranks that lose the same one; torchrun sees within them which has failed first


@dataclass(eq=False)
class Ranks:
    """This process among those that train together; one alone, unless told otherwise.

    Within `with`, several ranks are connected. All methods are collectives: every rank calls them, in the same order.
    Alone they do nothing. Where another rank has failed, they raise TrainingFailed at once; where it hangs, after
    `timeout` seconds. torchrun ends the ranks of a host as soon as one has failed.

    device      where this rank computes
    rank, size  this process among all
    local_rank  this process's index on its host
    timeout     seconds to wait for another rank, from `limit_waits` on
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    timeout: float = 600.0
    _group: dist.ProcessGroup | None = None  # None: the default group, which waits for START_UP
    _parent: int = field(default_factory=os.getppid)

    @classmethod
    def launched(cls, device: str, *, timeout: float) -> "Ranks":
        """As torchrun says in the environment; one alone without it.

        Args:
            device: "auto", "cuda" or "cpu", as in the config.

        Raises:
            UserError: no such device, or fewer GPUs than ranks on this host.
        """
        resolved = resolve_device(device)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls(resolved)
        if missing := [name for name in names if name not in os.environ]:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start the ranks by "
                "torchrun."
            )
        rank, size, local_rank, on_host = (int(os.environ[name]) for name in names)
        if resolved.type == "cuda":
            gpus = torch.cuda.device_count()
            if on_host > gpus:
                raise UserError(f"--nproc-per-node is {on_host}, but this host has {gpus} GPUs; every rank needs one.")
            resolved = torch.device("cuda", local_rank)
        return cls(resolved, rank=rank, size=size, local_rank=local_rank, timeout=timeout)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Whether torchrun, which started this rank, is gone."""
        return self._parent != os.getppid() and "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> "Ranks":
        if self.size > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            self._store, rank, size = next(rendezvous("env://", timeout=START_UP))
            dist.init_process_group("gloo", store=self._store, rank=rank, world_size=size, timeout=START_UP)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.size > 1 and error is None:
            self.barrier("the end")  # rank 0 may still save, and torchrun ends it when another leaves by a signal
            dist.destroy_process_group()

    def limit_waits(self) -> None:
        """End the start-up: from now on `timeout` counts, and `sum_` takes tensors on the GPU."""
        if self.size > 1:
            self.barrier("the start")
            timeout, cuda = timedelta(seconds=self.timeout), self.device.type == "cuda"
            backend, device = ("cpu:gloo,cuda:nccl", self.device) if cuda else ("gloo", None)
            group = dist.new_group(timeout=timeout, backend=backend, device_id=device)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    @contextmanager
    def _waiting(self, what: str) -> Generator[None]:
        """Runs a collective. If it fails, raises TrainingFailed, which names the missing rank."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            reason = str(error).split("] ", 1)[-1].split(". ")[0]
            raise TrainingFailed(
                f"rank {self.rank}: no answer from {self._missing()} in: {what} "
                f"({reason}; --rank-timeout {self.timeout:g})"
            ) from error

    def _missing(self) -> str:
        """Who has not lost another rank, as this one has."""
        who = "another rank"
        with suppress(dist.DistError):  # the store is on the first host, which may be gone
            self._store.set(f"{self.rank} waits", "")
            time.sleep(GRACE)
            missing = [str(r) for r in range(self.size) if not self._store.check([f"{r} waits"])]
            who = f"rank {', '.join(missing)}" if missing else "others, which wait themselves"
        if self._group is not None and self.device.type == "cuda":
            self._group.abort()  # else an all-reduce in a CUDA graph waits on, and the end of this process for it
        return who

    def sum_(self, tensors: list[Tensor], what: str = "all-reduce") -> None:
        """Replace each tensor by the sum over the ranks, the same bits on all of them.

        Args:
            tensors: dense, on `device`, at the same place of memory in no two; float32 or wider, or integers.
            what: what this sum is called where it fails.
        """
        if self.size > 1:
            with self._waiting(what):
                for tensor in tensors:
                    dist.all_reduce(tensor, group=self._group)

    def any(self, number: int, what: str = "agreement") -> int:
        """The largest of the ranks' numbers; on the host, so that it does not wait for a GPU."""
        if self.size > 1:
            largest = torch.tensor(int(number))
            with self._waiting(what):
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
            number = int(largest)
        return number

    def share(self, value: T, what: str = "broadcast") -> T:
        """Rank 0's value; the others' is ignored."""
        values: list[Any] = [value]
        if self.size > 1:
            with self._waiting(what):
                dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: T, what: str = "gather") -> list[T]:
        """All ranks' values in their order, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._waiting(what):
            dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def barrier(self, what: str = "barrier") -> None:
        """Wait until every rank is here."""
        self.any(0, what)

    @contextmanager
    def first_on_host(self, what: str) -> Generator[None]:
        """One rank of each host runs the block, then the others: downloads and caches are made once."""
        if self.local_rank > 0:
            self.barrier(what)
        yield
        if self.local_rank == 0:
            self.barrier(what)

    def check_equal(self, **values: Any) -> None:
        """Raise UserError unless the ranks have equal values, which are named by what users know them by."""
        theirs = self.gather(values, "comparison")
        for rank, other in enumerate(theirs):
            for name, value in values.items():
                if other[name] != value:
                    raise UserError(
                        f"rank {rank} has another {name} ({other[name]}) than rank 0 ({value}); make them equal."
                    )
