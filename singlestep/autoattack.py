"""AutoAttack by its authors' code, resumable after every batch."""
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
from .run.folder import whole_file

EDGE = 1e-6  # tolerance for rounding at the edge of the ball

# Forward passes for an image that stays robust, a backward pass as two: 100 steps for each target class, 5,000 queries.
COST = {"apgd-ce": 300, "apgd-t": 2800, "fab-t": 3600, "square": 5000}


def library():
    """Import AutoAttack's authors' code. Raises UsageError where it is not installed."""
    try:
        import pyautoattack
    except ImportError:
        raise UsageError("--attacks: AutoAttack and its parts need a package more: pip install pyautoattack") from None
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    return pyautoattack


class AutoAttack:
    """AutoAttack's standard version (Croce and Hein, arXiv 2003.01690), or some of its parts.

    Each part attacks, in batches, the images that the parts before it left, and every batch starts from the same seed,
    as in the authors' code. So an attack can be continued after any batch: its state is kept in `file`, under a `key`
    that says what it is of, until the caller removes the file.

    left: indices of the images that are still right; broken: images that each part broke; seconds: time so far.
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
        """Forward passes to come, if no further image breaks."""
        state = self.state
        later = sum(COST[part] for part in self.parts[state["part"] + 1:])
        return COST[self.part] * (len(state["queue"]) - state["done"] * self.batch_size) + len(self.left) * later

    def steps(self) -> Iterator[int]:
        """Attack batch by batch. Yields before every batch, with the forward passes that the one before it took."""
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
        """Attack the images at `index` by the present part, and save the state."""
        began, state, part = time.perf_counter(), self.state, self.part
        x, y = self.images.batch(index)
        broken = set(index[self.breaks(part, x, y)].tolist())
        state["left"] = [image for image in state["left"] if image not in broken]
        state["broken"][part] = state["broken"].get(part, 0) + len(broken)
        state["done"] += 1
        state["seconds"] += time.perf_counter() - began
        with whole_file(self.file) as out:
            out.write(json.dumps(state).encode())

    def breaks(self, part: str, x: Tensor, y: Tensor) -> Tensor:
        """Which images (B,) a part changes, within the ball, to ones that are misclassified."""
        changed = self.perturb[part](x.clone(), y.clone()).detach()
        inside = ((changed - x).abs() <= self.epsilon + EDGE) & (changed >= 0) & (changed <= 1)
        return inside.flatten(1).all(dim=1) & ~self._right(changed, y)

    def _begin(self) -> dict[str, Any]:
        everything = torch.arange(len(self.images), device=self.images.labels.device)
        right = [index for batch in everything.split(self.batch_size)
                 for index in batch[self._right(*self.images.batch(batch))].tolist()]
        return {"key": self.key, "part": 0, "done": 0, "seconds": 0.0, "queue": right, "left": right, "broken": {}}

    def _saved(self) -> dict[str, Any]:
        """The state of an interrupted attack of the same key; empty where there is none."""
        try:
            state = json.loads(self.file.read_text(encoding="utf-8"))
            return state if state["key"] == self.key else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _right(self, x: Tensor, y: Tensor) -> Tensor:
        return self.precision.float32_logits(self.model, x).argmax(dim=1) == y


def perturbations(model: nn.Module, epsilon: float, seed: int, device: torch.device) -> dict[str, Callable]:
    """The parts of AutoAttack: functions (x, y) -> perturbed images."""
    whole = library().AutoAttack(lambda x: model(x).float(), eps=epsilon, seed=seed, device=device, version="standard")
    whole.apgd.loss, whole.fab.targeted = "ce", True
    return {"apgd-ce": whole.apgd.perturb, "apgd-t": whole.apgd_targeted.perturb, "fab-t": whole.fab.perturb,
            "square": whole.square.perturb}
