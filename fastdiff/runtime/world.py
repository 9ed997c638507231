"""Several ranks: data-parallel training under torchrun, by gloo on CPUs and NCCL on GPUs.

Every rank holds the whole network and takes an equal, consecutive part of each batch; `Ranks.sum_` adds up the
gradients between backward and update, so that all ranks make the same update. Rank 0 alone writes.

The gradient goes as float32 in one or two calls after the backward pass, and not bucket by bucket during it: so it
works alike with a compiled step, the fused update and CUDA graphs. Nothing hides the transfer, then: of a gradient of
4 bytes a parameter (143 MB for 35.7 M), a ring of N ranks sends 2 (N - 1) / N times as many out of every one.
"""

import datetime
import os
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.errors import TrainingFailed, UsageError, UserError
from fastdiff.runtime.device import resolve_device
from fastdiff.runtime.signals import StopRequest
from fastdiff.runtime.watch import Watch

T = TypeVar("T")


class Ranks:
    """This process among those that train together; one alone, unless told otherwise.

    Within `with`, several ranks are connected, and `Watch` ends all of them when one dies, fails or hangs: an exception
    that leaves the block is told in one line, and the process ends with exit code 1. All methods but `at` and `spread`
    are collectives, which every rank must call in the same order; alone they do nothing.

    Args:
        device: where this rank computes.
        rank, size: this process among all.
        local_rank, on_host: this process among those of this host.
        timeout: seconds without progress after which a rank has hung.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        on_host: int = 1,
        timeout: float = 600.0,
    ) -> None:
        self.device, self.rank, self.size, self.timeout = device, rank, size, timeout
        self.local_rank, self.on_host = local_rank, on_host
        self.watch: Watch | None = None

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
        return cls(resolved, rank=rank, size=size, local_rank=local_rank, on_host=on_host, timeout=timeout)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def __enter__(self) -> "Ranks":
        if self.size > 1:
            cuda = self.device.type == "cuda"
            if cuda:
                torch.cuda.set_device(self.device)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                device_id=self.device if cuda else None,
                timeout=datetime.timedelta(days=7),  # the watch is quicker, and knows who waits for a good reason
            )
            address = "127.0.0.1" if self.on_host == self.size else os.environ["MASTER_ADDR"]
            self.watch = Watch(self.rank, self.size, address=address, share=self._broadcast, timeout=self.timeout)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.watch is None:
            return
        if error is not None:
            self._fail(error)
        self.barrier("the end")  # torchrun stops the others as soon as one leaves by a signal; rank 0 may still save
        self.watch.close()
        dist.destroy_process_group()

    def _fail(self, error: BaseException) -> None:
        assert self.watch is not None
        code = 2 if isinstance(error, UsageError) else 1
        if isinstance(error, UserError | TrainingFailed):
            cause = str(error)
        else:
            traceback.print_exception(error)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            cause = f"rank {self.rank} has failed in {self.watch.place} by {reason}"
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.watch.fail(cause, code)

    def at(self, place: str) -> None:
        """Tell the watch what begins now; it counts as progress, the lack of which is judged from the first call on."""
        if self.watch is not None:
            self.watch.at(place)
            self.watch.judged = True

    def spread(self, stop: StopRequest) -> None:
        """From now on, a signal that one rank gets is also in the others' `stop`, within about a second."""
        if self.watch is not None:
            self.watch.stop = stop

    @contextmanager
    def _waiting(self, what: str) -> Generator[None]:
        assert self.watch is not None
        with self.watch.waiting(what):
            yield

    def sum_(self, tensors: list[Tensor], what: str = "all-reduce") -> None:
        """Replace each tensor by the sum over the ranks, the same bits on all of them.

        Args:
            tensors: dense, on `device`, at the same place of memory in no two; float32 or wider, or integers.
            what: the name of this sum where one hangs.
        """
        if self.size > 1:
            with self._waiting(what):
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def any(self, number: int, what: str = "agreement") -> int:
        """The largest of the ranks' numbers; on the host, so that it does not wait for a GPU."""
        if self.size > 1:
            largest = torch.tensor(int(number))
            with self._waiting(what):
                dist.all_reduce(largest, dist.ReduceOp.MAX)
            number = int(largest)
        return number

    def share(self, value: T, what: str = "broadcast") -> T:
        """Rank 0's value; the others' is ignored."""
        if self.size > 1:
            with self._waiting(what):
                value = self._broadcast(value)
        return value

    def _broadcast(self, value: T) -> T:
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T, what: str = "gather") -> list[T]:
        """All ranks' values in their order, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._waiting(what):
            dist.gather_object(value, values, dst=0)
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
