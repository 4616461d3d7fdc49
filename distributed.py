"""One process or many: the little that the scripts need of torch.distributed. Alone, every call does nothing."""
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import UsageError

PATIENCE = timedelta(hours=1)  # of the processes that wait while the first one downloads


@dataclass(frozen=True)
class World:
    """This process's `rank` among `size` processes."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """The world that `torchrun` announces in the environment, joined with `device`; else this process alone."""
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1":
            return cls()
        try:
            if device.type == "cuda":
                dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)  # else it guesses whose is which
            else:
                dist.init_process_group("gloo", timeout=PATIENCE)
            return cls(int(os.environ["RANK"]), int(size))
        except ValueError:  # a variable is missing, or no number
            raise UsageError(f"WORLD_SIZE is {size}, but torchrun did not start this process: unset it, or use "
                             f"torchrun") from None

    def leave(self) -> None:
        """End it. All processes have to call it; after an error in one of them, it can wait for ever."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over the processes; the argument stays as it is."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def min(self, values: Tensor) -> Tensor:
        """Likewise the smallest."""
        return self._reduced(values, dist.ReduceOp.MIN)

    def max(self, value: float, device: torch.device) -> float:
        """The largest of the processes' values; of flags, whether any is set."""
        if self.size == 1:
            return value  # every step asks: the host is not to wait for the device
        return self._reduced(torch.tensor(float(value), device=device), dist.ReduceOp.MAX).item()

    def agree(self, values: list[int], device: torch.device) -> bool:
        """Whether all processes have the same values."""
        both = torch.tensor([*values, *(-value for value in values)], device=device)
        return torch.equal(self.min(both), both)

    def _reduced(self, values: Tensor, operation) -> Tensor:
        values = values.clone()
        if self.size > 1:
            dist.all_reduce(values, operation)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: BatchNorm's running statistics differ from shard to shard."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
