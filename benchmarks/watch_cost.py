"""What the watch over a run costs, beside the epoch that it watches.

    python benchmarks/watch_cost.py --base-width=16 --train-samples=20000

trains one epoch as train_cifar.py would, with its flags, and evaluates it on --test-samples images. Times are those of
the processors (on a GPU, of the clock), so that other programs do not move the shares much.
"""
import contextlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import options
import train
import watch
from train_cifar import DATASET

TITLES = {"train_epoch": "training", "measure": "evaluation", "fgsm": "accuracy under FGSM",
          "signs": "signs of the gradients", "abnormal": "abnormal images, in training"}


class Done(Exception):
    """The epoch is over."""


@contextlib.contextmanager
def timed(seconds: Counter, name: str) -> Iterator[None]:
    """Add how long the block took to `seconds[name]`."""
    def now() -> float:
        if not torch.cuda.is_available():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    yield
    seconds[name] += now() - began


def wrapped(function: Callable, seconds: Counter, name: str) -> Callable:
    def timing(*args, **keywords):
        with timed(seconds, "fgsm" if keywords.get("init") == "zero" else name):
            return function(*args, **keywords)
    return timing


def main() -> None:
    seconds = Counter[str]()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        args = options.parse(DATASET, argv=[*sys.argv[1:], f"--fname={folder}", "--epochs=2", "--quiet"])
        for module, name in ((watch, "signs"), (watch, "abnormal"), (train, "judged"), (train, "train_epoch"),
                             (train, "measure")):
            stack.enter_context(patch.object(module, name, wrapped(getattr(module, name), seconds, name)))
        stack.enter_context(patch.object(train, "finish_epoch", side_effect=Done))
        stack.enter_context(contextlib.suppress(Done))
        train.main(DATASET, args)
    epoch = seconds["train_epoch"] + seconds["measure"]
    for name, title in TITLES.items():
        print(f"{title:30} {seconds[name]:8.2f} s {100 * seconds[name] / epoch:6.2f}%")
    cost = seconds["fgsm"] + seconds["signs"] + seconds["abnormal"]
    print(f"{'the watch, of the epoch':30} {cost:8.2f} s {100 * cost / epoch:6.2f}%")


if __name__ == "__main__":
    main()
