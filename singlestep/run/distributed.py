"""Processes that train one network together: communication, and stopping on a signal."""
import atexit
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .console import Stopped, StopSignals, UsageError

T = TypeVar("T")
CPU = torch.device("cpu")
PATIENCE = timedelta(hours=1)  # how long processes wait for rank 0, which may be downloading


@dataclass(frozen=True)
class World:
    """This process's `rank` among `size` processes. With one process, nothing is communicated."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """Join torchrun's process group, given by environment variables; without torchrun, return one process."""
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1":
            return cls(device=device)
        try:
            if device.type == "cuda":
                # Without device_id, NCCL guesses the GPU of each rank.
                dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
            else:
                dist.init_process_group("gloo", timeout=PATIENCE)
            # DDP keeps the process group, and so gloo's threads, alive until exit. A thread that frees its last tensor
            # while Python shuts down aborts the process, so give the threads time.
            atexit.register(time.sleep, 0.2)
            return cls(int(os.environ["RANK"]), int(size), device)
        except ValueError:  # a variable is missing, or is not a number
            raise UsageError(f"WORLD_SIZE is {size}, but torchrun did not start this process: unset it, or use "
                             f"torchrun") from None

    def leave(self) -> None:
        """Leave the group. Every process must call this method: if one process fails before, the others hang."""
        if self.size > 1 and dist.is_initialized():
            dist.barrier()  # a process that leaves early would break the others' connections
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def said_once(self) -> Iterator[None]:
        """Context for code that raises the same UsageError in every process, so that only rank 0 prints it."""
        try:
            yield
        except UsageError as error:
            error.printed_elsewhere = not self.is_main
            raise

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and broadcast the return value. A UsageError on rank 0 is raised in every process."""
        if self.size == 1:
            return make()
        answer: list = [None]
        if self.is_main:
            try:
                answer = [make()]
            except UsageError as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], UsageError):
            with self.said_once():
                raise answer[0]
        return answer[0]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the processes, a new tensor."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def min(self, values: Tensor) -> Tensor:
        """Return the elementwise minimum of `values` over the processes, a new tensor."""
        return self._reduced(values, dist.ReduceOp.MIN)

    def max(self, value: float) -> float:
        """Return the largest of the processes' values. For a flag: whether the flag is set in any process."""
        if self.size == 1:
            return value  # called in every step: avoid a synchronization
        return self._reduced(torch.tensor(float(value), device=self.device), dist.ReduceOp.MAX).item()

    def _reduced(self, values: Tensor, operation) -> Tensor:
        if self.size == 1:
            return values.clone()
        values = values.to(self.device, copy=True)  # NCCL takes CUDA tensors only
        dist.all_reduce(values, operation)
        return values

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copy rank 0's buffers to every process, because BatchNorm's running statistics differ between processes."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


ALONE = World()


@dataclass(frozen=True)
class Stop:
    """Checks for stop signals. `how`: text that is appended to the message, such as how to continue."""

    signals: StopSignals
    world: World = ALONE
    how: str = ""

    def together(self) -> None:
        """Raise Stopped in every process if any process received a signal. Every process must call this method."""
        number = int(self.world.max(self.signals.received or 0))
        if number:
            raise Stopped(signal.Signals(number), self.how)

    def alone(self) -> None:
        """Raise Stopped if a signal was received and there is only one process."""
        if self.world.size == 1:
            self.together()
