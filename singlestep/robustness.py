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

from .attacks import check_epsilon, confident_gradient, eval_mode, in_ball, magnitude, pgd_step
from .data import Images
from .run.console import Screen
from .run.device import Precision, padded, seed_everything
from .run.distributed import ALONE, Stop, World

STARTS = 3  # first number of the key that seeds random starting points, see train.ORDER


@dataclass(frozen=True)
class PGD:
    """Settings of PGD, or of FGSM (one step).

    Attributes:
        epsilon: radius of the ball, in pixel units (8/255, not 8).
        alpha: step size, in pixel units.
        steps: attack steps in a restart.
        restarts: number of restarts.
        seed: seed of the random starting points.
        init: starting point, "random" or "zero".
        loss: "ce", the cross-entropy, or "cw", the margin between the logits.
        norm: "l_inf" or "l_2".
    """

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
    """Result of an attack on each of N images, in tensors (N,).

    Attributes:
        clean_loss: cross-entropy without a perturbation.
        right: whether the image is correct without a perturbation.
        robust_loss: cross-entropy at the first misclassified point; for a robust image, the highest of the losses at
            the ends of the restarts.
        robust: whether the image is correct at every point of the attack.
        magnitude: mean abs(delta), for l_2 norm2(delta), at the first misclassified point; for a robust image, at the
            end of the last restart.
        vanished: whether all entries of the gradient were 0 at some attack step.
    """

    clean_loss: Tensor
    right: Tensor
    robust_loss: Tensor
    robust: Tensor
    magnitude: Tensor
    vanished: Tensor

    def sums(self, world: World) -> "Result":
        """Return the sum over the processes. Each process has zeros for the images of other processes."""
        return Result(*(world.sum(getattr(self, part.name).double()) for part in fields(self)))

    def share(self, index: Tensor) -> "Result":
        """Return the results of the images at `index`, and zeros for all other images.

        The tensors are on the device of `index`; robust and vanished are bool, the others float32.
        """
        parts = {}
        for part in fields(self):
            dtype = torch.bool if part.name in ("robust", "vanished") else torch.float32
            whole = getattr(self, part.name).to(index.device, dtype)
            parts[part.name] = torch.zeros_like(whole).index_copy(0, index, whole[index])
        return Result(**parts)

    def unperturbed(self) -> "Result":
        """Return the initial result of an attack: the clean result, without a perturbation."""
        none = torch.zeros_like(self.right)
        return Result(self.clean_loss, self.right, (1 - self.right) * self.clean_loss, self.right, none, none)

    def metrics(self, first: int | None = None) -> dict[str, float]:
        """Return means over the first `first` images (None: all).

        attack_mean (in 1/255) and no_gradient are means over the attacked images, those that are correct without a
        perturbation.
        """
        mean = {part.name: getattr(self, part.name)[:first].double().mean().item() for part in fields(self)}
        attacked = max(mean["right"], 1e-9)  # misclassified clean images are not attacked
        return {"clean_loss": mean["clean_loss"], "clean_acc": mean["right"], "robust_loss": mean["robust_loss"],
                "robust_acc": mean["robust"], "attack_mean": 255 * mean["magnitude"] / attacked,
                "no_gradient": mean["vanished"] / attacked, "images": len(self.right[:first])}


class AttackStep(NamedTuple):
    """Event after an attack step, or a forward pass without a perturbation, on a batch of this process's images.

    Attributes:
        image_passes: forward passes of single images in this step: the number of images in the batch.
        remaining: forward passes of single images that remain if all images that are still robust stay robust.
    """

    image_passes: int
    remaining: int


class Restart(NamedTuple):
    """Event before restart `number` (from 0) and after the last restart, with the results so far."""

    number: int
    result: Result


def evaluate(network: nn.Module, images: Tensor, labels: Tensor, attack: PGD, batch_size: int = 128) -> Result:
    """Evaluate a network on clean and on attacked images, in eval mode.

    The attack may use TF32 on CUDA; float32 forward passes confirm every misclassification.

    Args:
        network: maps images in [0, 1], (B, C, H, W), to logits (B, classes).
        images: (N, C, H, W), uint8 or float in [0, 1], on the device of the network.
        labels: (N,).
        attack: settings of the attack.
        batch_size: images in an evaluation batch.

    Returns:
        The result of each image.

    Raises:
        ValueError: images or epsilon are out of range.

    Warns:
        UserWarning: the gradient was 0 for more than 1% of the attacked images.
    """
    check_epsilon(attack.epsilon, attack.norm)
    precision = Precision.float32(images.device)
    with eval_mode(network):
        *_, last = attack_steps(network, Images.of(images, labels), attack, batch_size, precision)
    assert isinstance(last, Restart)
    for warning in no_gradient("the attack", last.result.metrics()["no_gradient"]):
        warnings.warn(warning, stacklevel=2)
    return last.result


def no_gradient(attack: str, share: float) -> list[str]:
    """Return a warning if an attack had a gradient of 0 for more than 1% of the attacked images (our choice)."""
    return [f"{attack} had a gradient of 0 for {100 * share:.0f}% of the images: the accuracy may be too high; try "
            f"an attack without gradients (evaluate.py --attacks=square)"] if share > 0.01 else []


def shown(events: Iterator[AttackStep | Restart], screen: Screen, title: str, restarts: int,
          stop: Stop) -> Iterator[Restart]:
    """Show the progress of `attack_steps`, and stop on a signal. Yields each Restart with all processes' results."""
    with screen.progress(title, 1, "image-step") as bar:
        for event in events:
            if isinstance(event, AttackStep):
                bar.update(event.image_passes * stop.world.size, event.remaining * stop.world.size)
                stop.alone()
                continue
            whole = event.result.sums(stop.world)
            if event.number < restarts and restarts > 1:
                bar.tell(f"{title}, restart {event.number + 1}/{restarts}, "
                         f"{100 * whole.robust.mean().item():.1f}% still robust")
            yield Restart(event.number, whole)
            stop.together()


def attack_steps(model: nn.Module, images: Images, attack: PGD, batch_size: int, precision: Precision,
                 world: World = ALONE, begun: Restart | None = None) -> Iterator[AttackStep | Restart]:
    """Attack the images. Yields an AttackStep after every step, and a Restart before every restart and after the last.

    A misclassified image leaves the batch, and the next image takes its place, so that batches stay full. Random
    starting points depend only on the seed, the restart and the image, so the number of robust images does not depend
    on the batch size or the number of processes. The attack computes in the run's precision; float32 forward passes
    confirm every misclassification and the end of every restart.

    Each process attacks its share of the images. Processes take different numbers of steps, so they may communicate
    only at a Restart.

    Args:
        begun: Restart with all processes' results, from which to continue an interrupted attack.
    """
    model.eval()
    world.broadcast_buffers(model)
    model = padded(model, batch_size, images.labels.device)
    mine = torch.arange(len(images), device=images.labels.device)[world.rank::world.size]
    per_restart = attack.steps + 1  # forward passes of an image that stays robust
    if begun:
        first, result = begun.number, begun.result.share(mine)
    else:
        first, result = 0, Result(*torch.zeros(6, len(images), dtype=torch.float32, device=mine.device))
        result.robust, result.vanished = result.robust.bool(), result.vanished.bool()
        left = len(mine) * (1 + per_restart * attack.restarts)
        for index in mine.split(batch_size):
            wrong = _clean(model, images, index, precision, result)
            left -= len(index) + wrong * per_restart * attack.restarts
            yield AttackStep(len(index), left)
    for number in range(first, attack.restarts):
        yield Restart(number, result)
        robust = result.robust[mine]
        queue = mine[chosen(robust, *read(robust.sum()))]
        left = len(queue) * per_restart * (attack.restarts - number)
        for passes, spared in _restart(model, images, queue, attack, number, batch_size, precision, result):
            left -= passes + spared
            yield AttackStep(passes, left)
    yield Restart(attack.restarts, result)


def _clean(model: nn.Module, images: Images, index: Tensor, precision: Precision, result: Result) -> int:
    """Evaluate the images at `index` without a perturbation. Returns the number of misclassified images."""
    x, y = images.batch(index)
    logits = precision.float32_logits(model, x)
    loss, right = F.cross_entropy(logits, y, reduction="none"), correct(logits, y)
    result.clean_loss[index], result.right[index], result.robust[index] = loss, right.float(), right
    result.robust_loss[index] = torch.where(right, 0, loss)
    wrong, = read((~right).sum())
    return wrong


def _restart(model: nn.Module, images: Images, queue: Tensor, attack: PGD, number: int, batch_size: int,
             precision: Precision, result: Result) -> Iterator[tuple[int, int]]:
    """Attack the images in `queue` once.

    Yields, after every step, the number of images in the batch and the number of forward passes (of single images) that
    are saved because images were misclassified in this step.
    """
    starts = _starts(images, attack, number).to(queue.device)
    index, taken, since = queue[:0], queue[:0], 0  # images in the batch, number of steps that each image has taken
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
    """Return the logits, recomputed in float32 for misclassified and for finished images, whose logits are results."""
    logits = logits.float()
    if not precision.is_float32:
        suspects = finished | ~correct(logits, y)
        suspect = chosen(suspects, *read(suspects.sum()))
        if len(suspect):
            logits[suspect] = precision.float32_logits(model, (x[suspect] + delta[suspect]).clamp(0, 1))
    return logits


def read(*counts: Tensor) -> list[int]:
    """Copy the counts to the host: the only synchronization in a step."""
    return torch.stack(counts).tolist()


def chosen(mask: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` true entries of `mask` (B,), in order, without synchronization."""
    return mask.byte().argsort(descending=True, stable=True)[:count]


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Return whether each image (B,) is classified correctly: False if a logit is not finite."""
    return (logits.argmax(dim=1) == y) & logits.isfinite().all(dim=1)


def _starts(images: Images, attack: PGD, number: int) -> Tensor:
    """Return the starting points of all images, (N, C, H, W).

    Random starting points are drawn on the CPU, for all images at once, so they depend only on the seed and the
    restart.
    """
    n, height, width, channels = images.pixels.shape
    if attack.init == "zero":
        return torch.zeros(1, channels, height, width, dtype=torch.float32).expand(n, -1, -1, -1)
    seed_everything(STARTS, attack.seed, number)
    starts = in_ball(torch.empty(n, height, width, channels, dtype=torch.float32), attack.epsilon, attack.norm)
    return starts.permute(0, 3, 1, 2)
