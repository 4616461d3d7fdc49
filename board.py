"""TensorBoard's files of a run: the same numbers as in metrics.jsonl, drawn while it trains."""
import shutil
from pathlib import Path
from typing import Any

# tag -> name in an epoch's record
SCALARS = {
    "accuracy/train": "train_robust_acc", "accuracy/clean": "test_acc", "accuracy/fgsm": "fgsm_acc",
    "accuracy/pgd": "test_robust_acc", "accuracy/validation": "val_robust_acc", "loss/train": "train_robust_loss",
    "loss/clean": "test_loss", "loss/pgd": "test_robust_loss", "perturbation/train": "defence_mean",
    "perturbation/pgd": "attack_mean", "watch/alignment": "alignment", "watch/participation": "participation",
    "watch/abnormal": "abnormal", "watch/collapsed": "collapsed", "lr": "lr"}


class Board:
    """Draws the epochs of a run in `folder`, which is its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer: Any = None
        self.drawn: list[dict[str, Any]] = []

    def draw(self, history: list[dict[str, Any]]) -> None:
        """Add the epochs that are not drawn yet, or, after a start, draw all of them anew."""
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        if self.writer is None or self.drawn != history[:len(self.drawn)]:
            self.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.writer, self.drawn = SummaryWriter(self.folder), []
        for record in history[len(self.drawn):]:
            for tag, name in SCALARS.items():
                if record.get(name) is not None:
                    self.writer.add_scalar(tag, float(record[name]), record["epoch"])
        self.writer.flush()
        self.drawn = list(history)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
