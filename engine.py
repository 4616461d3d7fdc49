"""The loops: one epoch of training, the evaluation of an epoch, and the closing attack on the whole test set."""
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import input_gradient, pgd_step
from data import Augmentation, Images
from distributed import World
from precision import Precision
from utils import seed_everything

ALONE = World()

# What random numbers are drawn for in these loops: the first part of every key that they are seeded with here.
ORDER, STEP, EVALUATION, CLOSING = range(4)


class NotFinite(Exception):
    """The loss or a gradient ceased to be a finite number in the given step of the epoch."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


@dataclass
class Progress:
    """How far a run is: the next `step` of `epoch`, and the epoch's sums up to it, this process's share of them.

    best: the highest robust accuracy of an epoch so far; first_fault: the first step of the epoch with a loss or a
    gradient that was not finite.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))  # loss, right, n, mean |delta|
    first_fault: Tensor = field(default_factory=lambda: torch.tensor(math.inf))

    def next_epoch(self) -> None:
        self.epoch += 1
        self.restart_epoch()

    def restart_epoch(self) -> None:
        self.step, self.seconds, self.sums = 0, 0.0, torch.zeros_like(self.sums)


@dataclass(frozen=True)
class Trainer:
    """All that an epoch of training needs. `forward` is `model`, under DistributedDataParallel where there are many."""

    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor]
    schedule: Callable[[float], float]
    images: Images
    augmentation: Augmentation
    batch_size: int
    seed: int
    precision: Precision
    world: World

    @property
    def steps(self) -> int:
        """Steps in an epoch; the last may be on a smaller batch."""
        return math.ceil(len(self.images) / self.batch_size)


def train_epoch(t: Trainer, progress: Progress, after_step: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Train to the end of `progress.epoch`, of which some steps may be done. Returns the epoch's training metrics.

    The order of the images and their augmentation depend on the seed and the epoch alone, an attack's random start
    on those, the step and the process. Nothing waits for the device before the epoch is over.
    """
    device = t.images.labels.device
    seed_everything(ORDER, t.seed, progress.epoch)
    order = torch.randperm(len(t.images)).to(device)
    drawn = {name: values.to(device) for name, values in t.augmentation.draw(len(t.images)).items()}
    progress.sums, progress.first_fault = progress.sums.to(device), progress.first_fault.to(device)
    began = time.perf_counter() - progress.seconds
    t.model.train()
    while progress.step < t.steps:
        lr = t.schedule(progress.epoch + (progress.step + 1) / t.steps)
        for group in t.optimizer.param_groups:
            group["lr"] = lr
        whole = range(progress.step * t.batch_size, min((progress.step + 1) * t.batch_size, len(t.images)))
        share = slice(whole.start + t.world.rank, whole.stop, t.world.size)
        x, y = t.images.batch(order[share], t.augmentation, {name: values[share] for name, values in drawn.items()})
        seed_everything(STEP, t.seed, progress.epoch, progress.step, t.world.rank)
        with t.precision.autocast():
            delta = t.attack(t.model, x, y)
            logits = t.forward((x + delta).clamp(0, 1))
            loss = F.cross_entropy(logits, y)
        # Gradients are averaged over the processes; shares of a last batch can differ by an image.
        finite = t.precision.backward_and_step(loss * (len(y) * t.world.size / len(whole)), t.optimizer)
        progress.first_fault = torch.where(finite, progress.first_fault, progress.first_fault.clamp(max=progress.step))
        correct = (logits.detach().argmax(dim=1) == y).sum()
        progress.sums += torch.stack([loss.detach().double() * len(y), correct.double(),
                                      torch.ones_like(correct).double() * len(y),
                                      delta.abs().mean().double() * len(y)])
        progress.step += 1
        progress.seconds = time.perf_counter() - began
        after_step()
    require_finite(progress, t.world)
    loss, correct, n, magnitude = t.world.sum(progress.sums).tolist()
    progress.seconds = time.perf_counter() - began
    return {"train_time": progress.seconds, "lr": t.schedule(progress.epoch + 1), "train_robust_loss": loss / n,
            "train_robust_acc": correct / n, "defence_mean": 255 * magnitude / n, "train_images": int(n)}


def require_finite(progress: Progress, world: World) -> None:
    """Raise NotFinite if any step of this epoch had a loss or a gradient that was not."""
    fault = world.min(progress.first_fault).item()
    if fault < math.inf:
        raise NotFinite(int(fault))


def evaluate(model: nn.Module, images: Images, attack: Callable[[nn.Module, Tensor, Tensor], Tensor], restarts: int,
             batch_size: int, key: tuple[int, ...], precision: Precision, world: World = ALONE,
             between: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Loss and accuracy of `model` on `images`, clean and under `restarts` runs of `attack` (one restart each).

    An image counts as robust if it is classified correctly at the end of every run; its robust loss is the highest.
    Batches are dealt out to the processes, and what is drawn depends on `key` and the batch: any number of processes
    finds the same counts. Accuracy is judged in float32. All processes call `between` equally often.
    """
    model.eval()
    world.broadcast_buffers(model)
    sums = torch.zeros(6, dtype=torch.float64, device=images.labels.device)
    for dealt in range(0, math.ceil(len(images) / batch_size), world.size):
        i = dealt + world.rank
        between()
        if i * batch_size >= len(images):
            break
        seed_everything(EVALUATION, *key, i)
        x, y = images.batch(slice(i * batch_size, (i + 1) * batch_size))
        clean = float32_logits(model, x, precision)
        worst, robust, magnitude = torch.full_like(clean[:, 0], -math.inf), torch.ones_like(y, dtype=torch.bool), 0.0
        for _ in range(restarts):
            with precision.autocast():
                delta = attack(model, x, y)
            logits = float32_logits(model, (x + delta).clamp(0, 1), precision)
            worst = worst.maximum(F.cross_entropy(logits, y, reduction="none"))
            robust &= logits.argmax(dim=1) == y
            magnitude = magnitude + delta.abs().mean() * len(y) / restarts
        sums += torch.stack([value.double() for value in (
            F.cross_entropy(clean, y, reduction="sum"), (clean.argmax(dim=1) == y).sum(), worst.sum(), robust.sum(),
            magnitude, torch.ones_like(y).sum())])
    *values, n = world.sum(sums).tolist()
    names = ("test_loss", "test_acc", "test_robust_loss", "test_robust_acc", "attack_mean")
    metrics = {name: value / n for name, value in zip(names, values)}
    return {**metrics, "attack_mean": 255 * metrics["attack_mean"], "test_images": int(n)}


def closing_attack(model: nn.Module, images: Images, epsilon: float, alpha: float, steps: int, restarts: int,
                   batch_size: int, seed: int, precision: Precision, world: World = ALONE,
                   progress: Callable[[int], None] = lambda images_done: None,
                   between: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Clean accuracy, and robust accuracy under l_inf PGD with early stop and restarts (PGD-50-10).

    An image is robust only if it is right without a perturbation and after every step of every restart: once wrong,
    it leaves, and the next one takes its place in the batch, so that batches stay full while the work shrinks. Its
    robust loss is that at which it broke, or the highest at the end of a restart. A random start depends on `seed`,
    the restart and the image alone, so the batch size and the number of processes change no count. Attacks run in the
    run's precision; an image is broken or robust by a float32 forward pass only. `progress` is told of images that are
    done with, after every step; `between` is called before every restart, by all processes.
    """
    model.eval()
    world.broadcast_buffers(model)
    device, n = images.labels.device, len(images)
    mine = torch.arange(n, device=device)[world.rank::world.size]
    clean_loss, robust_loss = torch.zeros(2, n, device=device)
    robust = torch.zeros(n, dtype=torch.bool, device=device)
    for index in mine.split(batch_size):
        x, y = images.batch(index)
        logits = float32_logits(model, x, precision)
        clean_loss[index] = F.cross_entropy(logits, y, reduction="none")
        robust[index] = logits.argmax(dim=1) == y
    clean_correct = robust.sum()
    robust_loss[~robust] = clean_loss[~robust]
    progress(int((~robust[mine]).sum()))
    for restart in range(restarts):
        between()
        queue = mine[robust[mine]]
        starts = _starts(images, epsilon, seed, restart).to(device)
        index, taken = queue[:0], queue[:0]  # the images in the batch, and the steps that each has taken
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
            with precision.autocast():
                grad, logits = input_gradient(model, x, y, delta)
            finished = taken == steps
            suspect = (finished | (logits.argmax(dim=1) != y)).nonzero().squeeze(1)
            judged = logits[suspect]
            if len(suspect) and not precision.is_float32:
                judged = float32_logits(model, (x[suspect] + delta[suspect]).clamp(0, 1), precision)
            wrong = torch.zeros_like(finished)
            wrong[suspect] = judged.argmax(dim=1) != y[suspect]
            loss = torch.zeros_like(robust_loss[index])
            loss[suspect] = F.cross_entropy(judged.float(), y[suspect], reduction="none")
            robust[index[wrong]] = False
            robust_loss[index[wrong]] = loss[wrong]
            survived = finished & ~wrong
            robust_loss[index[survived]] = robust_loss[index[survived]].maximum(loss[survived])
            stays = ~(wrong | finished)
            delta = pgd_step(delta, grad, x, epsilon, alpha)[stays]
            x, y, index, taken = x[stays], y[stays], index[stays], taken[stays] + 1
            progress(int(wrong.sum()) + (int(survived.sum()) if restart + 1 == restarts else 0))
    sums = torch.stack([clean_loss.double().sum(), clean_correct.double(), robust_loss.double().sum(),
                        robust.sum().double()])
    names = ("clean_loss", "clean_acc", "robust_loss", "robust_acc")
    return {**{name: value / n for name, value in zip(names, world.sum(sums).tolist())}, "images": n}


def _starts(images: Images, epsilon: float, seed: int, restart: int) -> Tensor:
    """Uniform starts for all `images`, (N, 3, 32, 32), drawn on the CPU and whole, to depend on nothing else."""
    seed_everything(CLOSING, seed, restart)
    n, height, width, channels = images.pixels.shape
    return torch.empty(n, height, width, channels).uniform_(-epsilon, epsilon).permute(0, 3, 1, 2)


def float32_logits(model: Callable[[Tensor], Tensor], x: Tensor, precision: Precision) -> Tensor:
    """The logits of a float32 forward pass, such as decides every accuracy."""
    with torch.no_grad(), precision.float32():
        return model(x).float().clone()  # under CUDA graphs, the next pass overwrites the network's own output
