"""What the parts of a training step share: the attack, the objective, and what a method keeps from step to step."""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from machine import World


@dataclass
class Step:
    """A training step, beside its images and labels.

    network: the model without DistributedDataParallel, for passes beside the one that is trained on; images: how many
    training images there are; whole: (global batch,) which of them these are, of all processes; epoch, batch: both
    count from 0, batch within the epoch; done: the share of the run's epochs that is over; kept: what the method itself
    keeps from step to step, by name, a part of the run's state.

    start, logits, gradient: where the attack's first forward pass was (a perturbation), what it found there, and the
    gradient of the mean cross-entropy; keeps_graph: whether the objective needs these logits with the way back to the
    weights. after: called after the backward pass with the training loss's gradient with respect to delta.
    """

    network: nn.Module
    images: int
    whole: Tensor
    epoch: int = 0
    batch: int = 0
    done: float = 0.0
    kept: dict[str, Tensor] = field(default_factory=dict)
    world: World = field(default_factory=World)
    keeps_graph: bool = False
    start: Any = None
    logits: Any = None
    gradient: Any = None
    after: Callable[[Tensor], None] | None = None

    @property
    def index(self) -> Tensor:
        """Which training images this process's share of the batch are."""
        return self.whole[self.world.rank::self.world.size]

    def store(self, name: str, rows: Tensor, whole: Tensor) -> None:
        """Put this process's rows, and those of the others, at `whole` of what is kept under `name`."""
        together = torch.zeros(len(whole), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        together[self.world.rank::self.world.size] = rows
        self.kept[name][whole] = self.world.sum(together).to(self.kept[name].dtype)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` (B,) over the images of all processes, detached."""
        return self.world.sum(values.detach().double().sum()) / len(self.whole)
