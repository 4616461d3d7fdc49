"""Clean accuracy and accuracy under PGD, image by image.

An image is robust if it is classified correctly without a perturbation and at every point that every restart of the
attack visits.
"""
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import check_epsilon, confident_gradient, in_ball, magnitude, pgd_step
from .data import Images
from .run.console import Screen
from .run.device import Precision, padded, seed_everything
from .run.distributed import ALONE, Stop, World

STARTS = 3  # first part of the seeds' key, see train.ORDER


@dataclass(frozen=True)
class PGD:
    """PGD, or FGSM. epsilon, alpha: radius and step in pixel units; init: "random" or "zero" start; loss: "ce", the
    cross-entropy, or "cw", the margin between the logits; norm: "l_inf" or "l_2". The random starts depend on the
    seed."""

    epsilon: float
    alpha: float
    steps: int
    restarts: int
    seed: int = 0
    init: str = "random"
    loss: str = "ce"
    norm: str = "l_inf"


@dataclass
class Result:
    """What an attack did to each of N images, in tensors (N,).

    clean_loss, right: cross-entropy and correctness without a perturbation; robust_loss: the cross-entropy where the
    image broke, or the highest at the end of a restart; robust: whether no point of the attack is misclassified;
    magnitude: the mean abs(delta), for l_2 norm2(delta), where it broke, or at the end of the last restart; vanished:
    whether the attack once had a gradient of 0 everywhere.
    """

    clean_loss: Tensor
    right: Tensor
    robust_loss: Tensor
    robust: Tensor
    magnitude: Tensor
    vanished: Tensor

    def sums(self, world: World) -> "Result":
        """The sum over the processes, each of which has zeros for the others' images."""
        return Result(*(world.sum(getattr(self, part.name).double()) for part in fields(self)))

    def share(self, index: Tensor) -> "Result":
        """The results of the images at `index`, zeros for the others; on the index's device, robust and vanished as
        bool, the rest in float32."""
        parts = {}
        for part in fields(self):
            dtype = torch.bool if part.name in ("robust", "vanished") else torch.float32
            whole = getattr(self, part.name).to(index.device, dtype)
            parts[part.name] = torch.zeros_like(whole).index_copy(0, index, whole[index])
        return Result(**parts)

    def unperturbed(self) -> "Result":
        """The results without a perturbation, with which every other attack begins."""
        none = torch.zeros_like(self.right)
        return Result(self.clean_loss, self.right, (1 - self.right) * self.clean_loss, self.right, none, none)

    def metrics(self, first: int | None = None) -> dict[str, float]:
        """Means over the first images, all if None; attack_mean (in 1/255) and no_gradient over the attacked ones."""
        mean = {part.name: getattr(self, part.name)[:first].double().mean().item() for part in fields(self)}
        attacked = max(mean["right"], 1e-9)  # an image that is wrong without a perturbation is not attacked
        return {"clean_loss": mean["clean_loss"], "clean_acc": mean["right"], "robust_loss": mean["robust_loss"],
                "robust_acc": mean["robust"], "attack_mean": 255 * mean["magnitude"] / attacked,
                "no_gradient": mean["vanished"] / attacked, "images": len(self.right[:first])}


class Step(NamedTuple):
    """Event after a step on a batch of this process's images. passes: number of images in the batch; left: passes that
    remain if no further image breaks."""

    passes: int
    left: int


class Restart(NamedTuple):
    """Event before restart `number` (from 0) and after the last: the results so far."""

    number: int
    result: Result


def evaluate(network: nn.Module, images: Tensor, labels: Tensor, attack: PGD, batch_size: int = 128) -> Result:
    """Evaluate a network, clean and under an attack, in eval mode, on the images' device. Float32 decides; on CUDA, the
    attack may use TF32. Warns if the attack had no gradient to follow.

    network: images in [0, 1], (B, C, H, W), to logits; images: (N, C, H, W), uint8 or float in [0, 1]; labels: (N,).
    Raises ValueError if images or epsilon are out of range.
    """
    check_epsilon(attack.epsilon, attack.norm)
    training = network.training
    precision = Precision.float32(images.device)
    *_, last = attack_steps(network, Images.of(images, labels), attack, batch_size, precision)
    network.train(training)
    assert isinstance(last, Restart)
    for warning in no_gradient("the attack", last.result.metrics()["no_gradient"]):
        warnings.warn(warning, stacklevel=2)
    return last.result


def no_gradient(attack: str, share: float) -> list[str]:
    """A warning if an attack had a gradient of 0 for more than 1% of the images that it attacked."""
    return [f"{attack} had a gradient of 0 for {100 * share:.0f}% of the images: the network may only look robust; try "
            f"an attack without gradients, such as Square"] if share > 0.01 else []


def shown(events: Iterator[Step | Restart], screen: Screen, title: str, restarts: int, stop: Stop) -> Iterator[Restart]:
    """Draw a bar over `attack_steps`, and stop if a signal came. Yields each Restart with all processes' results."""
    with screen.progress(title, 1, "image-step") as bar:
        for event in events:
            if isinstance(event, Step):
                bar.update(event.passes * stop.world.size, event.left * stop.world.size)
                stop.alone()
                continue
            whole = event.result.sums(stop.world)
            if event.number < restarts and restarts > 1:
                bar.tell(f"{title}, restart {event.number + 1}/{restarts}, "
                         f"{100 * whole.robust.mean().item():.1f}% still robust")
            yield Restart(event.number, whole)
            stop.together()


def attack_steps(model: nn.Module, images: Images, attack: PGD, batch_size: int, precision: Precision,
                 world: World = ALONE, begun: Restart | None = None) -> Iterator[Step | Restart]:
    """Attack the images. Yields a Step after every step, and a Restart before every restart and after the last.

    An image that is misclassified leaves the batch and the next one takes its place, so that batches stay full while
    the work shrinks. Random starts depend on the seed, the restart and the image alone: neither the batch size nor the
    number of processes changes a count. The attack computes in the run's precision; float32 forward passes confirm
    every misclassification and the end of every restart. Each process attacks its own share of the images: processes
    take different numbers of steps, and may communicate at a Restart only. `begun` continues an interrupted attack from
    a Restart with all processes' results.
    """
    model.eval()
    world.broadcast_buffers(model)
    model = padded(model, batch_size, images.labels.device)
    mine = torch.arange(len(images), device=images.labels.device)[world.rank::world.size]
    whole = attack.steps + 1  # an image's passes in a restart that it withstands
    if begun:
        first, result = begun.number, begun.result.share(mine)
    else:
        first, result = 0, Result(*torch.zeros(6, len(images), dtype=torch.float32, device=mine.device))
        result.robust, result.vanished = result.robust.bool(), result.vanished.bool()
        left = len(mine) * (1 + whole * attack.restarts)
        for index in mine.split(batch_size):
            wrong = _clean(model, images, index, precision, result)
            left -= len(index) + wrong * whole * attack.restarts
            yield Step(len(index), left)
    for number in range(first, attack.restarts):
        yield Restart(number, result)
        robust = result.robust[mine]
        queue = mine[chosen(robust, *read(robust.sum()))]
        left = len(queue) * whole * (attack.restarts - number)
        for passes, spared in _restart(model, images, queue, attack, number, batch_size, precision, result):
            left -= passes + spared
            yield Step(passes, left)
    yield Restart(attack.restarts, result)


def _clean(model: nn.Module, images: Images, index: Tensor, precision: Precision, result: Result) -> int:
    """Evaluate the images at `index` without a perturbation. Returns how many are misclassified."""
    x, y = images.batch(index)
    logits = precision.float32_logits(model, x)
    loss, right = F.cross_entropy(logits, y, reduction="none"), correct(logits, y)
    result.clean_loss[index], result.right[index], result.robust[index] = loss, right.float(), right
    result.robust_loss[index] = torch.where(right, 0, loss)
    wrong, = read((~right).sum())
    return wrong


def _restart(model: nn.Module, images: Images, queue: Tensor, attack: PGD, number: int, batch_size: int,
             precision: Precision, result: Result) -> Iterator[tuple[int, int]]:
    """Attack the images in `queue` once. Yields after every step the batch's size, and how many passes are spared
    because images broke."""
    starts = _starts(images, attack, number).to(queue.device)
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
        if since == attack.steps:  # every image has taken all its steps; only the final check is left
            grad, logits = torch.zeros_like(delta), precision.float32_logits(model, (x + delta).clamp(0, 1))
        else:
            with precision.autocast():
                grad, logits = confident_gradient(model, x, y, delta, attack.loss)
            logits = _deciding_logits(model, x, y, delta, logits, finished, precision)
            result.vanished[index] |= ~(finished | grad.flatten(1).any(dim=1))
        wrong, loss = ~correct(logits, y), F.cross_entropy(logits, y, reduction="none")
        before = result.robust_loss[index]
        result.robust[index] &= ~wrong
        result.robust_loss[index] = torch.where(wrong, loss, torch.where(finished, before.maximum(loss), before))
        size = magnitude(delta, attack.norm).mean(dim=(1, 2, 3))
        result.magnitude[index] = torch.where(wrong | finished, size, result.magnitude[index])
        later = (attack.restarts - number - 1) * (attack.steps + 1)
        stays = ~(wrong | finished)
        spared, count = read((wrong * (attack.steps - taken + later)).sum(), stays.sum())
        yield len(index), spared
        stays = chosen(stays, count)
        delta = pgd_step(delta, grad, x, attack.epsilon, attack.alpha, attack.norm)[stays]
        x, y, index, taken, since = x[stays], y[stays], index[stays], taken[stays] + 1, since + 1


def _deciding_logits(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, logits: Tensor, finished: Tensor,
                     precision: Precision) -> Tensor:
    """The logits, computed again in float32 wherever they decide: of misclassified and of finished images."""
    logits = logits.float()
    if not precision.is_float32:
        suspects = finished | ~correct(logits, y)
        suspect = chosen(suspects, *read(suspects.sum()))
        if len(suspect):
            logits[suspect] = precision.float32_logits(model, (x[suspect] + delta[suspect]).clamp(0, 1))
    return logits


def read(*counts: Tensor) -> list[int]:
    """The values of the counts. Nothing else in a step makes the host wait for the device."""
    return torch.stack(counts).tolist()


def chosen(mask: Tensor, count: int) -> Tensor:
    """The indices at which `mask` (B,) holds, which are `count`, in order."""
    return mask.byte().argsort(descending=True, stable=True)[:count]


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each image (B,) is classified correctly; never where a logit is not finite."""
    return (logits.argmax(dim=1) == y) & logits.isfinite().all(dim=1)


def _starts(images: Images, attack: PGD, number: int) -> Tensor:
    """Random starts of all images, (N, C, H, W), drawn on the CPU and for all at once, so that they depend on the
    seed and the restart alone."""
    n, height, width, channels = images.pixels.shape
    if attack.init == "zero":
        return torch.zeros(1, channels, height, width, dtype=torch.float32).expand(n, -1, -1, -1)
    seed_everything(STARTS, attack.seed, number)
    starts = in_ball(torch.empty(n, height, width, channels, dtype=torch.float32), attack.epsilon, attack.norm)
    return starts.permute(0, 3, 1, 2)
