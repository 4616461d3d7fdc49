"""What evaluate.py does once its command line is read: networks under attacks by name, a table, and a record."""
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import options
from .autoattack import AutoAttack, library
from .checkpoints import Opened, fingerprint, open_run
from .data import Images, testing
from .robustness import PGD, evaluate, row
from .run import folder as folders
from .run.console import Screen, Stopped, StopSignals, UsageError, one_line_errors, say
from .run.device import Precision, choose_device, describe, memory_format
from .run.distributed import World

MASKED = 0.08  # AutoAttack is two to five points under PGD-50-10 where gradients are sound
SURPRISE = 0.002  # of images that Square breaks and APGD does not: the threshold of AutoAttack's authors


@dataclass
class Job:
    """One network to judge on images, how, and what was found: rows of the table, and which images each attack left
    (a tensor (N,) of bool, by attack and epsilon). `check` raises Stopped if a signal came."""

    opened: Opened
    images: Images
    batch_size: int
    precision: Precision
    world: World
    screen: Screen
    check: Callable[[], None]
    rows: list[dict[str, Any]] = field(default_factory=list)
    left: dict[tuple[str, float], Tensor] = field(default_factory=dict)
    unfinished: list[Path] = field(default_factory=list)


def main(args) -> None:
    """Judge what the arguments name; an error ends the process."""
    with one_line_errors(), StopSignals() as signals:
        args.deterministic = False
        device = choose_device(args)
        world = World.join(device)
        if any(name in (*options.PARTS, "autoattack") for name in args.attacks):
            library()
            if world.size > 1:
                raise UsageError("--attacks: AutoAttack and its parts are for one process, without torchrun")

        def check() -> None:  # all processes have to call it together
            number = int(world.max(signals.received or 0))
            if number:
                raise Stopped(signal.Signals(number))

        for path in args.runs:
            judge(path, args, device, world, check)
        world.leave()


def judge(path: str, args, device: torch.device, world: World, check: Callable[[], None]) -> None:
    """Measure the network at `path`, print the table and keep it."""
    names = ("data_set", "model", "base_width", "width_factor", "shortcut", "mean", "std", "data_dir", "dummy", "seed")
    epsilon = args.epsilons[0] if args.epsilons and len(args.epsilons) == 1 else None
    opened = open_run(path, args.which, epsilon=epsilon, **{name: getattr(args, name) for name in names})
    world.decide(lambda: opened.folder.require_writable("RUN_OR_FILE"))
    world.decide(lambda: folders.evaluations(opened.folder))  # before anything is measured
    run, epsilons = opened.args, args.epsilons or (opened.args.epsilon,)
    for note in opened.notes if world.is_main else ():
        say(f"# {opened.source}: {note}")
    images = world.decide(lambda: testing(opened.dataset, run.data_dir, run.dummy))[:args.samples]
    layout = memory_format(opened.model, device)
    precision = Precision(SimpleNamespace(amp=False, tf32=False), device)
    opened.model.to(device).to(memory_format=layout)
    job = Job(opened, images.to(device, layout), args.batch_size, precision, world, Screen(world.is_main), check)
    warnings = mismatch(job)
    for attack in args.attacks:
        for epsilon in (0.0,) if attack == "clean" else epsilons:
            measure(job, attack, epsilon)
    rows = job.rows + worst(job, epsilons)
    warnings += suspicions(job, epsilons)
    if world.is_main:
        record = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "file": opened.source,
                  "network": fingerprint(opened.model), **parameters(opened), "seed": run.seed,
                  "samples": len(images), "batch_size": args.batch_size, "attacks": rows, "notes": opened.notes,
                  "warnings": warnings, **describe(device, world.size)}
        try:
            folders.add_evaluation(opened.folder, record)
            for file in job.unfinished:
                file.unlink(missing_ok=True)
        finally:  # the disk may be full
            say(table(opened.source, rows))
            for warning in warnings:
                say(f"\nwarning: {warning}")


def parameters(opened: Opened) -> dict[str, Any]:
    """What a record has to tell of the network and its images."""
    normalize = getattr(opened.model, "normalize", None)
    constants = {} if normalize is None else {name: getattr(normalize, name).flatten().tolist()
                                              for name in ("mean", "std")}
    names = ("data_set", "dummy", "model", "base_width", "width_factor", "shortcut")
    return {**{name: getattr(opened.args, name) for name in names}, **constants}


def measure(job: Job, attack: str, epsilon: float) -> None:
    """Attack the images, epsilon in 1/255, and add a row."""
    began, more = time.perf_counter(), dict[str, Any]()
    if attack in (*options.PARTS, "autoattack"):
        left, seconds, more = auto_attack(job, attack, epsilon)
    else:
        left, share = attacked(job, attack, epsilon)
        seconds = time.perf_counter() - began
        if attack != "clean":
            more["no_gradient"] = share
    job.left[attack, epsilon] = left
    job.rows.append({**row(attack, epsilon, int(left.sum()), len(left), seconds), **more})


def attacked(job: Job, attack: str, epsilon: float) -> tuple[Tensor, float]:
    """Which images a form of PGD leaves, and the share of those attacked that it ever had no gradient for."""
    size = epsilon / 255
    pgd = PGD(size, size / 4, 50, 10, job.opened.args.seed, loss="cw")
    if attack == "clean":
        pgd = PGD(0.0, 0.0, 0, 0)
    elif attack == "fgsm":
        pgd = PGD(size, size, 1, 1, init="zero")
    elif attack != "cw":
        steps, restarts = map(int, attack.split("-")[1:])
        pgd = PGD(size, size / 4, steps, restarts, job.opened.args.seed)
    with job.screen.progress(f"{attack}, epsilon {epsilon:g}", len(job.images), "image") as bar:
        def progress(images_done: int) -> None:
            bar.update(images_done * job.world.size)
            if job.world.size == 1:
                job.check()

        def between(restart: int, found) -> None:
            job.check()
            bar.tell(f"{attack}, epsilon {epsilon:g}, restart {restart + 1}/{pgd.restarts}")

        found = evaluate(job.opened.model, job.images, pgd, job.batch_size, job.precision, job.world, progress, between)
    return found.robust.bool(), found.metrics()["no_gradient"]


def auto_attack(job: Job, attack: str, epsilon: float) -> tuple[Tensor, float, dict[str, Any]]:
    """Which images AutoAttack, or a part of it, leaves; seconds; more to record."""
    parts = options.PARTS if attack == "autoattack" else (attack,)
    model, images, seed = job.opened.model, job.images, job.opened.args.seed
    file = job.opened.folder.path / f".{attack}-{epsilon:g}.json"
    key = {"network": fingerprint(model), **parameters(job.opened), "attack": attack, "epsilon": epsilon,
           "images": len(images), "seed": seed, "batch_size": job.batch_size}
    run = AutoAttack(model, images, parts, epsilon / 255, seed, job.batch_size, job.precision, file, key)
    with job.screen.progress(attack, 1, "pass") as bar:
        for passes in run.steps():
            bar.update(passes)
            bar.total = bar.done + run.passes_left
            number = f" {run.part} ({1 + parts.index(run.part)}/{len(parts)})" if len(parts) > 1 else ""
            bar.tell(f"{attack}{number}, epsilon {epsilon:g}, {100 * len(run.left) / len(images):.1f}% still robust")
            job.check()
    job.unfinished.append(file)
    left = torch.zeros(len(images), dtype=torch.bool)
    left[run.left] = True
    return left, run.seconds, {"parts": run.broken}


def worst(job: Job, epsilons: tuple[float, ...]) -> list[dict[str, Any]]:
    """For each epsilon, the images that all attacks left, where there were several."""
    rows = []
    for epsilon in epsilons:
        left = [flags.cpu() for (_, size), flags in job.left.items() if size == epsilon]
        if len(left) > 1:
            rows.append(row("worst case", epsilon, int(torch.stack(left).all(dim=0).sum()), len(left[0])))
    return rows


def suspicions(job: Job, epsilons: tuple[float, ...]) -> list[str]:
    """What in the results says that gradients mislead the attacks that follow them."""
    found = []
    for epsilon in epsilons:
        rows = {row["attack"]: row for row in job.rows if row["epsilon"] == epsilon}
        n = len(job.images)
        pgd = min((row for name, row in rows.items() if name.startswith("pgd-")), default=None,
                  key=lambda row: (row["attack"] != "pgd-50-10", row["robust"]))
        if pgd and "autoattack" in rows and (gap := pgd["accuracy"] - rows["autoattack"]["accuracy"]) > MASKED:
            found.append(f"at epsilon {epsilon:g}, AutoAttack is {100 * gap:.1f} points under "
                         f"{pgd['attack'].upper()}: gradients may be masked")
        square = rows.get("autoattack", {}).get("parts", {}).get("square", 0)
        apgd = [job.left[name, epsilon].cpu() for name in ("apgd-ce", "apgd-t") if name in rows]
        if "square" in rows and apgd:
            square = max(square, int((torch.stack(apgd).all(dim=0) & ~job.left["square", epsilon].cpu()).sum()))
        if square > SURPRISE * n:
            found.append(f"at epsilon {epsilon:g}, Square, which needs no gradient, breaks {square} of {n} images that "
                         f"APGD leaves: gradients may be masked")
        found += [f"at epsilon {epsilon:g}, {name} had no gradient to go by for {100 * row['no_gradient']:.0f}% of the "
                  f"images: try autoattack" for name, row in rows.items() if row.get("no_gradient", 0) > 0.01]
    return found


# Of thirteen right networks, the farthest, about to collapse, is 0.21 off; of wrong ones, the nearest is 0.48.
MISMATCH = 0.33


def mismatch(job: Job) -> list[str]:
    """A warning where BatchNorm's statistics are not of such inputs as the layers get. What a run says of its own
    network is right."""
    if job.opened.run and not job.opened.notes:
        return []
    x, _ = job.images.batch(slice(512))
    distance = batchnorm_mismatch(job.opened.model, x)
    return [] if distance < MISMATCH else [
        f"the inputs of a BatchNorm layer are {distance:.2f} off its running statistics (up to {MISMATCH:g} is usual): "
        f"the normalization (--mean, --std), the block (--shortcut) or the data set may be another one's"]


@torch.no_grad()
def batchnorm_mismatch(model: nn.Module, x: Tensor) -> float:
    """How far the inputs of BatchNorm layers are, on images x (B, 3, H, W), from what their running statistics say.

    Of a channel, the length of ((mean - running mean) / running deviation, log(deviation / running deviation)); of a
    layer, what three quarters of its channels exceed; the largest over the layers. Every layer passes on what it makes
    of this batch's own statistics, as in training, so that no difference adds to those of later layers.
    """
    found: list[Tensor] = []

    def compare(layer: nn.BatchNorm2d, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(inputs[0].float(), dim=(0, 2, 3))
        running_mean, running_var = (layer.get_buffer(f"running_{part}") for part in ("mean", "var"))
        running = (running_var + layer.eps).sqrt()
        stretch = ((deviation.square() + layer.eps).sqrt() / running).log()
        found.append(torch.hypot((mean - running_mean) / running, stretch).quantile(0.25))
        return F.batch_norm(inputs[0], None, None, layer.weight, layer.bias, training=True, eps=layer.eps)

    hooks = [layer.register_forward_hook(compare) for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).max().item() if found else 0.0


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [f"\n{title}\n", "| attack | epsilon | images | accuracy | 95% interval | seconds |",
             "|:--|--:|--:|--:|:-:|--:|"]
    for each in rows:
        epsilon = "" if each["attack"] == "clean" else f"{each['epsilon']:g}"
        seconds = "" if each["seconds"] is None else f"{each['seconds']:.1f}"
        lines.append(f"| {each['attack']} | {epsilon} | {each['n']} | {100 * each['accuracy']:.2f}% | "
                     f"{100 * each['low']:.2f}-{100 * each['high']:.2f}% | {seconds} |")
    return "\n".join(lines)
