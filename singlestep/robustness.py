"""How accuracy is measured, clean and under PGD with restarts, by one loop with one meaning of robust."""
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import confident_gradient, pgd_step
from .data import Images
from .run.device import Precision, seed_everything
from .run.distributed import World

ALONE = World()
BOOLEAN = ("robust", "vanished")
STARTS = 3  # what random numbers are drawn for: the first part of the key that they are seeded with


@dataclass(frozen=True)
class PGD:
    """An l_inf attack: radius and step in pixel units, steps, random restarts; its starts depend on the seed. The loss
    is "ce", or "cw", the margin between the logits."""

    epsilon: float
    alpha: float
    steps: int
    restarts: int
    seed: int = 0
    init: str = "random"
    loss: str = "ce"


@dataclass
class Verdict:
    """What was found of each of N images, in tensors (N,).

    robust_loss: the cross-entropy where the image broke, or the highest at the end of a restart; magnitude: the mean
    abs(delta) there; vanished: whether the attack ever had no gradient to go by.
    """

    clean_loss: Tensor
    right: Tensor
    robust_loss: Tensor
    robust: Tensor
    magnitude: Tensor
    vanished: Tensor

    def sums(self, world: World) -> "Verdict":
        """The processes' findings put together; each has zeros for the images of the others."""
        return Verdict(*(world.sum(getattr(self, part.name).double()) for part in fields(self)))

    def part(self, index: Tensor) -> "Verdict":
        """What was found of the images at `index`, and nothing of the others; on the index's device, in its types."""
        parts = {}
        for part in fields(self):
            whole = getattr(self, part.name).to(index.device, torch.bool if part.name in BOOLEAN else torch.float32)
            parts[part.name] = torch.zeros_like(whole).index_copy(0, index, whole[index])
        return Verdict(**parts)

    def unperturbed(self) -> "Verdict":
        """What was found without a perturbation: what any other attack begins with."""
        none = torch.zeros_like(self.right)
        return Verdict(self.clean_loss, self.right, (1 - self.right) * self.clean_loss, self.right, none, none)

    def metrics(self, first: int | None = None) -> dict[str, float]:
        """Means over the (first) images."""
        mean = {part.name: getattr(self, part.name)[:first].double().mean().item() for part in fields(self)}
        attacked = max(mean["right"], 1e-9)  # only what is right to begin with is
        return {"clean_loss": mean["clean_loss"], "clean_acc": mean["right"], "robust_loss": mean["robust_loss"],
                "robust_acc": mean["robust"], "attack_mean": 255 * mean["magnitude"] / attacked,
                "no_gradient": mean["vanished"] / attacked, "images": len(self.right[:first])}


def evaluate(model: nn.Module, images: Images, attack: PGD, batch_size: int, precision: Precision,
             world: World = ALONE, progress: Callable[[int], None] = lambda images_done: None,
             between: Callable[[int, Verdict], None] = lambda restart, found: None,
             before: tuple[int, Verdict] | None = None) -> Verdict:
    """Loss and accuracy of `model`, clean and under `attack`, image by image.

    An image is robust only if it is right without a perturbation and at every point of every restart: once wrong, it
    leaves, and the next one takes its place in the batch, so that batches stay full while the work shrinks. Random
    starts depend on the seed, the restart and the image alone, so the batch size and the number of processes change no
    count. Attacks run in the run's precision; an image is broken or robust by a float32 forward pass only. `progress`
    is told of images that are done with, after every step; all processes call `between`, equally often, before a
    restart, with its number and what this process has found. An evaluation that was broken off goes on from `before`,
    what `between` had then, put together.
    """
    model.eval()
    world.broadcast_buffers(model)
    device, n = images.labels.device, len(images)
    mine = torch.arange(n, device=device)[world.rank::world.size]
    first, found = (before[0], before[1].part(mine)) if before else \
        (0, _clean(model, images, mine, batch_size, precision))
    progress(int((~found.robust[mine]).sum()) if attack.restarts else len(mine))
    for restart in range(first, attack.restarts):
        between(restart, found)
        queue = mine[found.robust[mine].nonzero().squeeze(1)]
        last = restart + 1 == attack.restarts
        for broken, survived in _restart(model, images, queue, attack, restart, batch_size, precision, found):
            progress(broken + (survived if last else 0))
    return found.sums(world)


def _clean(model, images: Images, mine: Tensor, batch_size: int, precision: Precision) -> Verdict:
    """What there is to say of the images at `mine` without a perturbation."""
    found = Verdict(*torch.zeros(6, len(images), device=mine.device))
    found.robust, found.vanished = found.robust.bool(), found.vanished.bool()
    for index in mine.split(batch_size):
        x, y = images.batch(index)
        logits = precision.float32_logits(model, x)
        found.clean_loss[index] = F.cross_entropy(logits, y, reduction="none")
        found.right[index] = (logits.argmax(dim=1) == y).float()
    found.robust |= found.right.bool()
    found.robust_loss += torch.where(found.robust, 0, found.clean_loss)
    return found


def _restart(model, images: Images, queue: Tensor, attack: PGD, restart: int, batch_size: int, precision: Precision,
             found: Verdict):
    """Attack the images in `queue` once; yields after every step how many broke and how many came through."""
    starts = _starts(images, attack, restart).to(queue.device)
    index, taken, since = queue[:0], queue[:0], 0  # the images in the batch, the steps that each has taken
    x, y = images.batch(index)
    delta = torch.zeros_like(x)
    while len(queue) or len(index):
        room = batch_size - len(index)
        entering, queue = queue[:room], queue[room:]
        if len(entering):
            x_new, y_new = images.batch(entering)
            x, delta = (torch.cat(parts).contiguous(memory_format=images.memory_format) for parts in (
                (x, x_new), (delta, starts[entering].clamp(-x_new, 1 - x_new))))
            y, index, taken = (torch.cat(parts) for parts in (
                (y, y_new), (index, entering), (taken, torch.zeros_like(entering))))
            since = 0
        finished = taken == attack.steps
        if since == attack.steps:  # as long ago the last ones entered: all are only to be judged
            grad, judged = torch.zeros_like(delta), precision.float32_logits(model, (x + delta).clamp(0, 1))
        else:
            with precision.autocast():
                grad, logits = confident_gradient(model, x, y, delta, attack.loss)
            judged = _judged(model, x, y, delta, logits, finished, precision)
            found.vanished[index] |= ~(finished | grad.flatten(1).any(dim=1))
        wrong, loss = judged.argmax(dim=1) != y, F.cross_entropy(judged, y, reduction="none")
        before = found.robust_loss[index]
        found.robust[index] &= ~wrong
        found.robust_loss[index] = torch.where(wrong, loss, torch.where(finished, before.maximum(loss), before))
        found.magnitude[index] = torch.where(wrong | finished, delta.abs().mean(dim=(1, 2, 3)), found.magnitude[index])
        yield tuple(torch.stack([wrong.sum(), (finished & ~wrong).sum()]).tolist())
        stays = (~(wrong | finished)).nonzero().squeeze(1)
        delta = pgd_step(delta, grad, x, attack.epsilon, attack.alpha)[stays]
        x, y, index, taken, since = x[stays], y[stays], index[stays], taken[stays] + 1, since + 1


def _judged(model, x: Tensor, y: Tensor, delta: Tensor, logits: Tensor, finished: Tensor,
            precision: Precision) -> Tensor:
    """The logits that decide: those of a float32 forward pass wherever something is to be decided."""
    judged = logits.float()
    if not precision.is_float32:
        suspect = (finished | (judged.argmax(dim=1) != y)).nonzero().squeeze(1)
        if len(suspect):
            judged[suspect] = precision.float32_logits(model, (x[suspect] + delta[suspect]).clamp(0, 1))
    return judged


def _starts(images: Images, attack: PGD, restart: int) -> Tensor:
    """Uniform starts for all `images`, (N, 3, H, W), drawn on the CPU and whole, to depend on nothing else."""
    n, height, width, channels = images.pixels.shape
    if attack.init == "zero":
        return torch.zeros(1, channels, height, width).expand(n, -1, -1, -1)
    seed_everything(STARTS, attack.seed, restart)
    starts = torch.empty(n, height, width, channels).uniform_(-attack.epsilon, attack.epsilon)
    return starts.permute(0, 3, 1, 2)


def row(attack: str, epsilon: float, robust: int, n: int, seconds: float | None = None) -> dict[str, Any]:
    """A line of the table: of n images, those still right; with Wilson's 95% interval. Epsilon is in
    1/255."""
    from scipy.stats import binomtest  # takes long to import

    interval = binomtest(robust, n).proportion_ci(0.95, method="wilson")
    return {"attack": attack, "epsilon": epsilon, "n": n, "robust": robust, "accuracy": robust / n,
            "low": float(interval.low), "high": float(interval.high), "seconds": seconds}
