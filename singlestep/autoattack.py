"""AutoAttack, with its authors' code; an interrupted attack can be resumed after every batch."""
import copy
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attacks import frozen, magnitude
from .data import Images
from .options import PARTS
from .robustness import correct
from .run.console import UsageError
from .run.device import Precision, padded
from .run.folder import atomic_write

EDGE = {"l_inf": 1e-6, "l_2": 1e-5}  # tolerance for rounding errors in abs(delta) or norm2(delta) <= epsilon

# Cost of a robust image in forward passes, rounded; a backward pass counts 2. APGD and FAB take 100 steps (targeted:
# for each of 9 classes; FAB makes two forward passes a step), Square takes 5,000 queries.
COST = {"apgd-ce": 300, "apgd-t": 2800, "fab-t": 3600, "square": 5000}


def library():
    """Import the code of AutoAttack's authors. Raises UsageError if it is not installed."""
    try:
        import pyautoattack
    except ImportError:
        raise UsageError("--attacks: AutoAttack and its parts need another package: pip install pyautoattack") from None
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    return pyautoattack


def parts_for(attack: str, classes: int) -> tuple[tuple[str, ...], list[str]]:
    """Return the parts of `attack` that work with `classes` classes, and notes to print.

    Raises UsageError if no part works.
    """
    wanted = PARTS if attack == "autoattack" else (attack,)
    parts = tuple(part for part in wanted if part != "apgd-t" or classes > 3)  # the loss of apgd-t compares four logits
    if not parts:
        raise UsageError(f"--attacks: {attack} needs four classes, and the data set has {classes}")
    return parts, [] if parts == wanted else [f"{attack} is {', '.join(parts)}: apgd-t needs four classes"]


class AutoAttack:
    """Standard AutoAttack (Croce and Hein, arXiv 2003.01690), or some of its parts.

    Each part attacks, batch by batch, the images that are still classified correctly after the previous parts. As in
    the authors' code, every batch starts from the same seed, so an attack can be resumed after any batch.

    Args:
        parts: keys of COST, in the order of the attack.
        file: file of the attack's state, which the caller removes at the end; None: no state is saved.
        key: network, images and settings; only a state with an equal key is resumed.
        classes: number of classes; targeted parts attack toward min(classes - 1, 9) target classes.
        check: called in every forward pass; may raise Stopped.
        norm: "l_inf" or "l_2".

    Attributes:
        left: indices of the images that are still classified correctly.
        broken: number of images that each part made misclassified.
        seconds: time spent so far.
    """

    def __init__(self, model: nn.Module, images: Images, parts: tuple[str, ...], epsilon: float, seed: int,
                 batch_size: int, precision: Precision, file: Path | None, key: dict[str, Any], classes: int = 10,
                 check: Callable[[], None] = lambda: None, norm: str = "l_inf"):
        contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # the library calls view()
        self.model = padded(contiguous, batch_size, images.labels.device)
        self.images = Images(images.pixels, images.labels, torch.contiguous_format)
        self.parts, self.epsilon, self.batch_size, self.precision = parts, epsilon, batch_size, precision
        self.file, self.key, self.check, self.norm = file, key, check, norm
        self.targets = min(classes - 1, 9)
        self.vanished: int | None = None  # images of the batch whose first gradient is 0; None before it
        self.perturb = perturbations(self.logits, epsilon, seed, images.labels.device, self.targets, norm)
        self.state = self._saved() or self._begin()

    @property
    def left(self) -> list[int]:
        return self.state["left"]

    @property
    def broken(self) -> dict[str, int]:
        return self.state["broken"]

    @property
    def seconds(self) -> float:
        return self.state["seconds"]

    @property
    def part(self) -> str:
        return self.parts[self.state["part"]]

    @property
    def passes_left(self) -> int:
        """Remaining cost in forward passes of single images, if all images that are still robust stay robust."""
        state = self.state
        now, later = state["part"], state["part"] + 1
        queue = max(0, len(state["queue"]) - state["done"] * self.batch_size)
        return self._cost(self.parts[now:later]) * queue + self._cost(self.parts[later:]) * len(self.left)

    @property
    def no_gradient(self) -> dict[str, float]:
        """Fraction of each part's images whose first gradient was 0."""
        return {part: self.state["vanished"][part] / count for part, count in self.state["attacked"].items()}

    def steps(self) -> Iterator[int]:
        """Attack batch by batch. Before each batch, yield the previous batch's cost in forward passes of images."""
        state, passes = self.state, 0
        device = self.images.labels.device
        with frozen(self.model):
            while state["part"] < len(self.parts):
                queue = torch.tensor(state["queue"], dtype=torch.long, device=device)
                for index in queue.split(self.batch_size)[state["done"]:] if len(queue) else ():
                    yield passes
                    self._attack(index)
                    passes = self._cost((self.part,)) * len(index)
                state |= {"part": state["part"] + 1, "done": 0, "queue": state["left"]}

    def _attack(self, index: Tensor) -> None:
        """Attack the images at `index` with the current part, and save the state."""
        began, state, part = time.perf_counter(), self.state, self.part
        x, y = self.images.batch(index)
        self.vanished = None
        broken = set(index[self.breaks(part, x, y)].tolist())
        state["left"] = [image for image in state["left"] if image not in broken]
        for name, count in (("broken", len(broken)), ("attacked", len(index)), ("vanished", self.vanished or 0)):
            state[name][part] = state[name].get(part, 0) + count
        state["done"] += 1
        state["seconds"] += time.perf_counter() - began
        if self.file:
            with atomic_write(self.file) as out:
                out.write(json.dumps(state).encode())

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits for the parts, and count the images of the batch whose first gradient is 0."""
        self.check()
        if x.requires_grad and self.vanished is None:
            self.vanished = 0
            x.register_hook(self._note)
        return self.model(x).float()

    def _note(self, gradient: Tensor) -> None:
        self.vanished = int((~gradient.flatten(1).any(dim=1)).sum())

    def breaks(self, part: str, x: Tensor, y: Tensor) -> Tensor:
        """Return for which images (B,) a part finds a point in the ball that float32 misclassifies."""
        with self.precision.full():
            changed = self.perturb[part](x.clone(), y.clone()).detach()
        near = magnitude(changed - x, self.norm) <= self.epsilon + EDGE[self.norm]
        inside = near & (changed >= 0) & (changed <= 1)
        return inside.flatten(1).all(dim=1) & ~self._right(changed, y)

    def _cost(self, parts: tuple[str, ...]) -> int:
        """Return the cost of a robust image in forward passes."""
        return sum(COST[part] * self.targets // 9 if part.endswith("-t") else COST[part] for part in parts)

    def _begin(self) -> dict[str, Any]:
        everything = torch.arange(len(self.images), device=self.images.labels.device)
        right = [index for batch in everything.split(self.batch_size)
                 for index in batch[self._right(*self.images.batch(batch))].tolist()]
        return {"key": self.key, "part": 0, "done": 0, "seconds": 0.0, "queue": right, "left": right, "broken": {},
                "attacked": {}, "vanished": {}}

    def _saved(self) -> dict[str, Any]:
        """Return the state of an interrupted attack with the same key; empty if there is none."""
        try:
            state = json.loads(self.file.read_text(encoding="utf-8")) if self.file else {}
            return {"attacked": {}, "vanished": {}, **state} if state["key"] == self.key else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _right(self, x: Tensor, y: Tensor) -> Tensor:
        return correct(self.precision.float32_logits(self.model, x), y)


def perturbations(logits: Callable[[Tensor], Tensor], epsilon: float, seed: int, device: torch.device,
                  targets: int, norm: str = "l_inf") -> dict[str, Callable]:
    """Return the parts of AutoAttack by name, as functions (x, y) -> perturbed images.

    targets: number of target classes.
    """
    whole = library().AutoAttack(logits, norm={"l_inf": "Linf", "l_2": "L2"}[norm], eps=epsilon, seed=seed,
                                 device=device, version="standard")
    whole.apgd.loss, whole.fab.targeted = "ce", True
    whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = targets
    return {"apgd-ce": whole.apgd.perturb, "apgd-t": whole.apgd_targeted.perturb, "fab-t": whole.fab.perturb,
            "square": whole.square.perturb}
