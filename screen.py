"""What a run shows: a banner, a line an epoch, and a bar over whatever takes time.

The files of a run hold more; nothing reads what is printed here. Epochs count from 1 in words, from 0 in the files.
"""
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from tqdm import tqdm

import options
from utils import say

MINUTES = 3  # off a terminal, where bars are not shown, a long wait says a line this often


class Screen:
    """Of a run's first process; those of the others show nothing, and that of --quiet warnings alone."""

    def __init__(self, is_main: bool = True, quiet: bool = False):
        self.is_main, self.shown = is_main, is_main and not quiet

    def say(self, text: str) -> None:
        if self.shown and text:
            say(text)

    def warn(self, text: str) -> None:
        if self.is_main:
            say(f"# warning: {text}")

    @contextmanager
    def progress(self, what: str, total: int | None = None, unit: str = "", done: int = 0) -> Iterator["Progress"]:
        """A bar over `total` units, of which some may be done; without a total, the time that has gone by."""
        bar = Progress(self, what, total, unit, done)
        try:
            yield bar
        finally:
            bar.close()


class Progress:
    """A bar that moves while the program waits; off a terminal, a line now and then."""

    def __init__(self, screen: Screen, what: str, total: int | None, unit: str, done: int):
        self.screen, self.what, self.total, self.unit = screen, what, total, unit
        self.done, self.first = done, done
        self.said, self.values, self.over = time.monotonic(), "", threading.Event()
        self.timed: tuple[float, int] | None = None  # after the first step, which may have compiled: when, how many
        self.bar = tqdm(desc=what, total=total, unit=unit, initial=done, leave=False, dynamic_ncols=True,
                        bar_format=None if total else "{desc} {elapsed}", disable=not (screen.shown and drawable()))
        if not self.bar.disable:
            threading.Thread(target=self._move, daemon=True).start()

    def _move(self) -> None:
        while not self.over.wait(1):
            self.bar.refresh()

    def tell(self, what: str, **values: str) -> None:
        """Change what the bar says before and behind itself."""
        self.what, self.values = what, "".join(f", {name} {value}" for name, value in values.items())
        self.bar.total = self.total  # it may have changed
        self.bar.set_description(what, refresh=False)
        self.bar.set_postfix(values, refresh=False)

    def update(self, n: int = 1) -> None:
        """Note that n more are done; never more than there are."""
        n = n if self.total is None else min(n, self.total - self.done)
        self.done += n
        self.bar.update(n)
        if self.done == self.total:  # the last step may have come too soon after one that was drawn
            self.bar.refresh()
        now = time.monotonic()
        self.timed = self.timed or (now, self.done)
        if self.bar.disable and now - self.said > 60 * MINUTES:
            self.said = now
            self.screen.say(f"# {self.what}: {self.done:,} of {self.total:,} {self.unit}s{self.values}, {self.left()}")

    def left(self) -> str:
        """How long the rest will take at the pace so far."""
        since, then = self.timed or (0.0, self.done)
        if self.total is None or self.done == then:
            return "some time left"
        return f"about {duration((time.monotonic() - since) / (self.done - then) * (self.total - self.done))} left"

    def close(self) -> None:
        self.over.set()
        self.bar.close()


def drawable() -> bool:
    """Whether there is a terminal to draw bars on. That of a container or a job can have no columns."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):  # there is no stream, it is closed, or no terminal
        return False


def duration(seconds: float) -> str:
    """Roughly, as one would say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def clock(seconds: float) -> str:
    """As a clock shows it: 2:04, 1:02:11."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def banner(args, model: nn.Module, start: dict[str, Any], images: tuple[int, int, int], steps: int) -> str:
    """What is about to run: the method with its numbers, the data, the network and the machine, the folder.

    start: as `machine.describe` gives it; images: how many to train, to validate and to test on.
    """
    train, held_out, test = images
    first = test if args.full_test else min(args.test_samples, test)
    last = min(max(first, args.last_samples or test), test)
    flags = options.as_flags(options.in_effect(args))
    width = f" of base width {args.base_width}" if args.model != "WideResNet" else f"-34-{args.width_factor}"
    precision = args.amp_dtype if args.amp else "float32"
    compiled = args.compile and args.objective not in options.EAGER
    return "\n".join([
        f"method   {args.method + ': ' if args.method else ''}{flags}",
        f"data     {args.data_set}{' (synthetic)' if args.dummy else ''}: {train:,} training images, {args.epochs} "
        f"epochs of {steps:,} steps; judged on {f'{held_out:,} validation and ' if held_out else ''}{first:,} test "
        f"images after an epoch, {last:,} after the last",
        f"network  {args.model}{width}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{precision}{', compiled' * compiled}, on {start['device']}, threads: {start['threads']}, "
        f"processes: {start['processes']}",
        f"folder   {args.fname}"])


def epoch_line(record: dict[str, Any], history: list[dict[str, Any]], epochs: int) -> str:
    """An epoch's line: accuracy in %, on training images, clean test images, and those under FGSM and PGD."""
    def percent(name: str) -> str:
        return "    -" if record.get(name) is None else f"{100 * record[name]:5.1f}"

    name = "val_robust_acc" if "val_robust_acc" in record else "test_robust_acc"
    best = max((past for past in history if past.get("best")), key=lambda past: past["epoch"], default=None)
    digits = len(str(epochs))
    cells = [f"{1 + record['epoch']:>{digits}}/{epochs}",
             f"lr {record['lr']:.4f}" if record.get("lr") is not None else "",
             f"train {percent('train_robust_acc')}" if record.get("train_robust_acc") is not None else "",
             f"clean {percent('test_acc')}", f"FGSM {percent('fgsm_acc')}", f"PGD {percent('test_robust_acc')}",
             f"val {percent('val_robust_acc')}" if "val_robust_acc" in record else "",
             f"best {100 * best[name]:5.1f} @{1 + best['epoch']:<{digits}}"
             if best and best.get(name) is not None else "",
             f"{clock((record['train_time'] or 0) + record['test_time']):>7}",
             "COLLAPSED" if record.get("collapsed") else ""]
    return "  ".join(cell for cell in cells if cell)


def final_line(final: dict[str, Any]) -> str:
    """That of the final evaluation, in %."""
    return (f"final evaluation of the {final['model']} model, {final['images']:,} images, "
            f"PGD-{final['iters']}-{final['restarts']}: clean {100 * final['clean_acc']:.2f}  "
            f"robust {100 * final['robust_acc']:.2f}  {clock(final['seconds'])}")


def final_estimate(args, seconds: float, judged: int, images: int) -> str:
    """How long the final evaluation will take if four images of ten withstand it, when an epoch's, on `judged` images,
    took `seconds`; empty if it is not worth a word."""
    passes = args.final_iters * (1 + 0.4 * (args.final_restarts - 1)) / (args.test_iters * args.test_restarts)
    expected = seconds / judged * images * passes
    if expected < 300:
        return ""
    return (f"# the final evaluation (PGD-{args.final_iters}-{args.final_restarts} on {images:,} images) may take "
            f"{duration(expected)}; --final-iters, --final-restarts and --final-samples shorten it")


def where(args) -> str:
    """Where everything is, and what to do with it."""
    return (f"# everything is in {args.fname}\n"
            f"# to attack it further:  python evaluate.py {shlex.quote(args.fname)}\n"
            f"# to plot it:            python plot.py {shlex.quote(args.fname)} "
            f"--out={shlex.quote(args.fname + '/curves.png')}")
