"""What every module may need: errors, checked numbers, learning-rate schedules, seeds, normalization, whole files."""
import argparse
import contextlib
import fcntl
import hashlib
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn


class UsageError(Exception):
    """A mistake the user can mend: one line that names the flag or file and says what would be right."""


def number(kind: type, low: float, high: float = float("inf"), also: tuple = ()) -> Callable[[str], float]:
    """An argparse type: a finite `kind` (int or float) from `low` to `high`, or one of the values in `also`."""
    noun = "a whole number" if kind is int else "a number"
    span = f"{low} or more" if high == float("inf") else f"from {low} to {high}"
    rule = f"must be {noun}, {span}" + "".join(f", or {value}" for value in also)

    def parse(text: str):
        for value in also:
            if text == str(value):
                return value
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{rule}, not {text!r}") from None
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{rule}, not {text}")
        if value > sys.maxsize and kind is int:
            raise argparse.ArgumentTypeError(f"{rule}, and at most {sys.maxsize}, not {text}")
        return value

    return parse


def cyclic_lr(t: float, lr_max: float, peak: float, epochs: int) -> float:
    """The rate at time `t` in epochs: linear from 0 to `lr_max` at `peak`, and back to 0 at `epochs`."""
    if t < peak:
        return lr_max * (t / peak)
    return lr_max * ((epochs - t) / (epochs - peak))


def onedrop_lr(t: float, lr_max: float, drop: float) -> float:
    """The rate at time `t` in epochs: `lr_max`, and a tenth of it from `drop` on."""
    return lr_max if t < drop else lr_max / 10


def seed_everything(*key: int) -> None:
    """Make all random numbers from here on a function of `key` (whole numbers, 0 or more) alone.

    Every training step and every evaluated batch starts with this, so that a run that goes on from any step draws
    what an unbroken run draws, and no random state needs saving. (NumPy fills a short key up with zeros: (5,) is the
    same as (5, 0, 0, 0).)
    """
    state = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(state[0])
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))


class Normalize(nn.Module):
    """(x - mean) / std, channel by channel; the constants travel with the module but not in its state dict."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open `path` for binary writing so that it changes whole or not at all, also when the machine goes down."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def one_at_a_time(place: str | Path) -> Iterator[None]:
    """Of several processes on this machine that get here with the same file or folder, one is let in at a time."""
    key = hashlib.md5(os.path.abspath(place).encode(errors="surrogateescape")).hexdigest()
    with open(Path(tempfile.gettempdir(), f"lock-{os.getuid()}-{key}"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
