"""The processes that train one network together."""
import atexit
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .console import UsageError

T = TypeVar("T")
CPU = torch.device("cpu")
PATIENCE = timedelta(hours=1)  # of the processes that wait while the first one downloads


@dataclass(frozen=True)
class World:
    """This process's `rank` among `size` processes. Alone, every call does nothing."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """The world that `torchrun` announces in the environment, joined with `device`; else this process alone."""
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1":
            return cls(device=device)
        try:
            if device.type == "cuda":
                dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)  # else it guesses whose is which
            else:
                dist.init_process_group("gloo", timeout=PATIENCE)
            # gloo's threads outlive the group, which DDP keeps alive; one that frees its last tensor while Python shuts
            # down aborts the process.
            atexit.register(time.sleep, 0.2)
            return cls(int(os.environ["RANK"]), int(size), device)
        except ValueError:  # a variable is missing, or no number
            raise UsageError(f"WORLD_SIZE is {size}, but torchrun did not start this process: unset it, or use "
                             f"torchrun") from None

    def leave(self) -> None:
        """End it. All processes have to call it; after an error in one of them, it can wait for ever."""
        if self.size > 1 and dist.is_initialized():
            dist.barrier()  # one that leaves early would break the others' connections
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        """A UsageError in here, which every process comes to by itself, is said by the first one alone."""
        try:
            yield
        except UsageError as error:
            error.told = not self.is_main
            raise

    def decide(self, choose: Callable[[], T]) -> T:
        """What `choose()` returns in the first process, for all of them; a UsageError there is raised in all."""
        if self.size == 1:
            return choose()
        answer: list = [None]
        if self.is_main:
            try:
                answer = [choose()]
            except UsageError as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], UsageError):
            answer[0].told = not self.is_main  # or it would be said once for each process
            raise answer[0]
        return answer[0]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over the processes; the argument stays as it is."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def min(self, values: Tensor) -> Tensor:
        """Likewise the smallest."""
        return self._reduced(values, dist.ReduceOp.MIN)

    def max(self, value: float) -> float:
        """The largest of the processes' values; of flags, whether any is set."""
        if self.size == 1:
            return value  # every step asks: the host is not to wait for the device
        return self._reduced(torch.tensor(float(value), device=self.device), dist.ReduceOp.MAX).item()

    def _reduced(self, values: Tensor, operation) -> Tensor:
        if self.size == 1:
            return values.clone()
        values = values.to(self.device, copy=True)  # NCCL takes nothing that a checkpoint left on the CPU
        dist.all_reduce(values, operation)
        return values

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: BatchNorm's running statistics differ from shard to shard."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
