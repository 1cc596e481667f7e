"""The processes of a run: one, or several that a launcher such as torchrun has started.

A launcher starts the same program several times and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. A process alone is the trivial case: every method here then returns at once, unchanged.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

_OTHER_ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")


class Processes:
    """All processes of a run as one of them sees them.

    rank: which one this is, from 0; 0 is the first, which alone prints and writes files of which there is
    one. size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._failed_first = False

    @property
    def is_first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def rows(self, batch_size: int) -> range:
        """Which rows of every step are this process's.

        Raises:
            ValueError: if the rows of a step cannot be divided evenly.
        """
        if batch_size % self.size:
            raise ValueError(
                f"batch_size={batch_size} with {self.size} processes: it counts the rows of all of them; "
                f"give a multiple of {self.size}"
            )
        each = batch_size // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def sums(self, *numbers: float) -> tuple[float, ...]:
        """Each number's sum over all processes, added in float64."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def mean(self, value: float, weight: float) -> float:
        """The mean of what all processes found, each weighted by how much it is the mean of."""
        if self.size == 1:
            return value
        total, weights = self.sums(value * weight, weight)
        return total / weights

    def share(self, weight: Tensor) -> float:
        """What a mean over this process's tokens is multiplied by before gradients are averaged over
        processes, so that the result is the gradient of the mean over all tokens; `weight` is of this one.
        """
        if self.size == 1:
            return 1.0
        own = float(weight)
        return own * self.size / self.sums(own)[0]

    def stacked(self, rows: Tensor) -> Tensor:
        """The rows of all processes in order, on the CPU in each of them; each gives as many."""
        if self.size == 1:
            return rows
        whole = rows.new_zeros(self.size, *rows.shape)
        whole[self.rank] = rows
        dist.all_reduce(whole)
        return whole.flatten(0, 1)

    def any(self, flag: bool) -> bool:
        """Whether it is set in at least one process."""
        return self.sums(float(flag))[0] > 0

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))

    def from_first(self, value: str) -> str:
        """The first process's value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    @contextmanager
    def end_together(self) -> Iterator[None]:
        """Whatever ends this block with an error ends all processes, and only the first error is raised.

        A process whose peer has gone is left with an error of its own in the middle of an exchange. It exits
        quietly, with status 1, because the one that failed first says why.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            if self._is_first_to_fail():
                if self.rank and error.args and not self._failed_first:
                    error.args = (f"{error.args[0]} (in process {self.rank} of {self.size})",)
                self._failed_first = True
                raise
            # A launcher kills the others as soon as one has ended, and the first needs time to say why.
            time.sleep(2)
            leave(1)

    def _is_first_to_fail(self) -> bool:
        if self._failed_first:  # known from a block inside this one
            return True
        try:
            return int(self._store.add("titans/failed", 1)) == 1
        except (RuntimeError, OSError):  # the process that kept the store has gone
            return False


ALONE = Processes()
_joined: Processes | None = None


def join() -> Processes:
    """The processes that a launcher has started, this one connected with the others; `ALONE` without one.

    Raises:
        ValueError: where `accelerate launch` is configured with an engine of its own.
    """
    global _joined
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size == 1 or "RANK" not in os.environ:
        return ALONE
    if _joined is None:
        if given := [name for name in _OTHER_ENGINES if os.environ.get(name, "").lower() in ("true", "1")]:
            raise ValueError(
                f"{given[0]}={os.environ[given[0]]}: accelerate launch was configured with an engine; "
                "configure it for several devices without one, and give --parallel fsdp here"
            )
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        store, rank, size = next(iter(dist.rendezvous("env://")))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("titans/group", store),
            rank=rank,
            world_size=size,
        )
        _joined = Processes(rank, size, store)
    return _joined


def end(status: int) -> int:
    """The exit status of a process alone; a process that has joined others exits here with it."""
    return status if _joined is None else leave(status)


def leave(status: int) -> NoReturn:
    """Exit at once. Threads of the exchange between processes can abort an interpreter that ends the usual
    way, after all work is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
