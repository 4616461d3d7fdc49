"""The watch over a run: signs of catastrophic overfitting, and the rule by which a run has collapsed.

Catastrophic overfitting: a network learns to withstand the one step that it is trained on and no other; its accuracy
under many small steps falls to near zero. Accuracies are shares of the same images.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import input_gradient

GAP = 0.2  # accuracy under FGSM less that under PGD
MOST = 0.5  # of the training images, those whose loss the attack made smaller


def collapsed(history: list[dict[str, Any]]) -> list[bool]:
    """For each epoch, whether the run is in collapse after it.

    It is from the first epoch in which one step misleads and PGD's accuracy is low, until neither holds. One step
    misleads where accuracy under FGSM is more than 20 points above that under PGD, or where the attack of training made
    most training images easier. Low is under half of PGD's best so far or, as a run can be unsound from its first epoch
    on, of FGSM's. Where FGSM's is not known, in older runs, the best alone decides.
    """
    states: list[bool] = []
    best = 0.0
    for record in history:
        robust, fgsm = record["test_robust_acc"], record.get("fgsm_acc")
        if record.get("defence_mean") == 0:  # ordinary training cannot overfit to an attack
            states.append(False)
            continue
        misleads = fgsm is None or fgsm - robust > GAP or (record.get("abnormal") or 0) > MOST
        low = robust < max(best, fgsm or 0.0) / 2
        before = bool(states) and states[-1]
        states.append((misleads and low) or (before and (low if fgsm is None else misleads or low)))
        best = max(best, robust)
    return states


def summary(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a whole run: the first epoch in collapse, how many were, PGD's accuracy in the best and the last epoch."""
    states, robust = collapsed(history), [record["test_robust_acc"] for record in history]
    return {"collapse_epoch": states.index(True) if any(states) else None, "collapsed_epochs": sum(states),
            "best_robust_acc": max(robust, default=None), "last_robust_acc": robust[-1] if robust else None}


def abnormal(at_start: Tensor | None, logits: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """How many images' cross-entropy an attack made smaller than at its start (arXiv 2404.08154), and of how many
    this is known: none where the attack did not look at its start."""
    if at_start is None:
        return torch.zeros((), dtype=torch.float64, device=y.device), 0
    before, after = (F.cross_entropy(each.detach().float(), y, reduction="none") for each in (at_start, logits))
    return (before > after).sum().double(), len(y)


def signs(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> dict[str, float]:
    """Two signs from the input gradients of a batch of images (B, C, H, W), at x and at a random point of its ball.

    alignment: the mean cosine between the two (arXiv 2007.02617); it falls from near 1 as the loss ceases to be linear.
    participation: (norm1(g) / norm2(g))^2 / d, the share of its d entries that a gradient is spread over.
    """
    model.eval()
    here, _ = input_gradient(model, x, y, torch.zeros_like(x))
    there, _ = input_gradient(model, x, y, torch.empty_like(x).uniform_(-epsilon, epsilon))
    here, there = here.float().flatten(1), there.float().flatten(1)
    cosine = torch.cosine_similarity(here, there, dim=1)
    spread = (here.norm(p=1, dim=1) / here.norm(dim=1).clamp(min=1e-30)).square() / here.shape[1]
    return {"alignment": cosine.mean().item(), "participation": spread.mean().item()}
