"""AutoAttack, run with its authors' code and resumable after every batch."""
import copy
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attacks import frozen
from .data import Images
from .run.console import UsageError
from .run.device import Precision
from .run.folder import atomic_write

EDGE = 1e-6  # tolerance for rounding errors in abs(delta) <= epsilon

# Cost of a robust image in forward passes; a backward pass counts 2. APGD and FAB take 100 steps (for each of 9 target
# classes), Square takes 5,000 queries.
COST = {"apgd-ce": 300, "apgd-t": 2800, "fab-t": 3600, "square": 5000}


def library():
    """Import the code of AutoAttack's authors. Raises UsageError if it is not installed."""
    try:
        import pyautoattack
    except ImportError:
        raise UsageError("--attacks: AutoAttack and its parts need another package: pip install pyautoattack") from None
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    return pyautoattack


class AutoAttack:
    """Standard AutoAttack (Croce and Hein, arXiv 2003.01690), or some of its parts.

    Each part attacks, batch by batch, the images that are still classified correctly after the parts before it. As in
    the authors' code, every batch starts from the same seed, so an attack can be resumed after any batch.

    Args:
        parts: keys of COST, in the order of the attack.
        file: file of the attack's state; the caller removes it at the end.
        key: what is attacked and how; only a state with an equal key is resumed.

    Attributes:
        left: indices of the images that are still classified correctly.
        broken: number of images that each part broke.
        seconds: time spent so far.
    """

    def __init__(self, model: nn.Module, images: Images, parts: tuple[str, ...], epsilon: float, seed: int,
                 batch_size: int, precision: Precision, file: Path, key: dict[str, Any]):
        self.model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # the library calls view()
        self.images = Images(images.pixels, images.labels, torch.contiguous_format)
        self.parts, self.epsilon, self.batch_size, self.precision = parts, epsilon, batch_size, precision
        self.file, self.key = file, key
        self.perturb = perturbations(self.model, epsilon, seed, images.labels.device)
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
        """Remaining cost in forward passes, if no further image breaks."""
        state = self.state
        later = sum(COST[part] for part in self.parts[state["part"] + 1:])
        return COST[self.part] * (len(state["queue"]) - state["done"] * self.batch_size) + len(self.left) * later

    def steps(self) -> Iterator[int]:
        """Attack batch by batch. Before each batch, yield the cost of the batch before it, in forward passes."""
        state, passes = self.state, 0
        device = self.images.labels.device
        with frozen(self.model):
            while state["part"] < len(self.parts):
                queue = torch.tensor(state["queue"], dtype=torch.long, device=device)
                for index in queue.split(self.batch_size)[state["done"]:] if len(queue) else ():
                    yield passes
                    self._attack(index)
                    passes = COST[self.part] * len(index)
                state |= {"part": state["part"] + 1, "done": 0, "queue": state["left"]}

    def _attack(self, index: Tensor) -> None:
        """Attack the images at `index` with the current part, and save the state."""
        began, state, part = time.perf_counter(), self.state, self.part
        x, y = self.images.batch(index)
        broken = set(index[self.breaks(part, x, y)].tolist())
        state["left"] = [image for image in state["left"] if image not in broken]
        state["broken"][part] = state["broken"].get(part, 0) + len(broken)
        state["done"] += 1
        state["seconds"] += time.perf_counter() - began
        with atomic_write(self.file) as out:
            out.write(json.dumps(state).encode())

    def breaks(self, part: str, x: Tensor, y: Tensor) -> Tensor:
        """Return for which images (B,) a part finds a misclassified image within the ball."""
        changed = self.perturb[part](x.clone(), y.clone()).detach()
        inside = ((changed - x).abs() <= self.epsilon + EDGE) & (changed >= 0) & (changed <= 1)
        return inside.flatten(1).all(dim=1) & ~self._right(changed, y)

    def _begin(self) -> dict[str, Any]:
        everything = torch.arange(len(self.images), device=self.images.labels.device)
        right = [index for batch in everything.split(self.batch_size)
                 for index in batch[self._right(*self.images.batch(batch))].tolist()]
        return {"key": self.key, "part": 0, "done": 0, "seconds": 0.0, "queue": right, "left": right, "broken": {}}

    def _saved(self) -> dict[str, Any]:
        """Return the state of an interrupted attack with the same key; empty if there is none."""
        try:
            state = json.loads(self.file.read_text(encoding="utf-8"))
            return state if state["key"] == self.key else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _right(self, x: Tensor, y: Tensor) -> Tensor:
        return self.precision.float32_logits(self.model, x).argmax(dim=1) == y


def perturbations(model: nn.Module, epsilon: float, seed: int, device: torch.device) -> dict[str, Callable]:
    """Return the parts of AutoAttack by name, as functions (x, y) -> perturbed images."""
    whole = library().AutoAttack(lambda x: model(x).float(), eps=epsilon, seed=seed, device=device, version="standard")
    whole.apgd.loss, whole.fab.targeted = "ce", True
    return {"apgd-ce": whole.apgd.perturb, "apgd-t": whole.apgd_targeted.perturb, "fab-t": whole.fab.perturb,
            "square": whole.square.perturb}
