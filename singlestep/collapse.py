"""Detection of catastrophic overfitting: metrics, and the rule that decides whether a run has collapsed.

Catastrophic overfitting: the network becomes robust to nothing but the single-step attack of its training, and its
accuracy under multi-step attacks falls to near zero. Accuracies are from 0 to 1 and are measured on the same images.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import check_epsilon, check_images, eval_mode, in_ball, input_gradient

# Thresholds, chosen on runs labelled by eye; experiments/collapses.py measures the errors of the rule.
MISLED = 0.5  # a collapse begins below this PGD accuracy / FGSM accuracy
AGREES = 0.75  # a collapse can end from this PGD accuracy / FGSM accuracy on
LEARNED = 0.25  # the network is robust to FGSM above this FGSM accuracy / clean accuracy
FALLEN = 0.85  # PGD accuracy has fallen below this PGD accuracy / best PGD accuracy of earlier epochs


def collapsed(history: list[dict[str, Any]]) -> list[bool]:
    """Return, for each epoch, whether the network is collapsed at the end of the epoch.

    With P, F and C the accuracies under PGD, under FGSM and without a perturbation, and B the best P of earlier epochs,
    a collapse starts at an epoch with

        P < F / 2   and   F > C / 4   and   P < 0.85 * B,

    that is, the network is robust to FGSM, is not robust to PGD, and was more robust before. It ends at the next epoch
    with P >= 3/4 * F and P >= B / 2. The first epoch has no B and needs the first two conditions only.

    Records of older runs have no F: for these, the network is collapsed if P < B / 2. Records without C do not need
    F > C / 4. Records of standard training (defence_mean = 0) are never collapsed, and their P do not count for B.
    """
    states: list[bool] = []
    best: float | None = None
    for record in history:
        pgd, fgsm, clean = record["test_robust_acc"], record.get("fgsm_acc"), record.get("test_acc") or 0.0
        if record.get("defence_mean") == 0:  # standard training cannot overfit to an attack
            states.append(False)
            continue
        half_of_best = best is not None and pgd < best / 2
        if fgsm is None:
            states.append(half_of_best)
        elif states and states[-1]:
            states.append(pgd < AGREES * fgsm or half_of_best)
        else:
            fell = best is None or pgd < FALLEN * best
            states.append(pgd < MISLED * fgsm and fgsm > LEARNED * clean and fell)
        best = max(best or 0.0, pgd)
    return states


def summary(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first collapsed epoch, the number of collapsed epochs, and the best and the last PGD accuracy."""
    states, robust = collapsed(history), [record["test_robust_acc"] for record in history]
    return {"collapse_epoch": states.index(True) if any(states) else None, "collapsed_epochs": sum(states),
            "best_robust_acc": max(robust, default=None), "last_robust_acc": robust[-1] if robust else None}


def abnormal(at_start: Tensor | None, logits: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """Count abnormal images: those whose cross-entropy the attack lowered (Lin et al., arXiv 2404.08154).

    Args:
        at_start: logits at the attack's starting point, (B, classes); None if the attack did not compute them.
        logits: logits at x + delta, (B, classes).
        y: labels, (B,).

    Returns:
        The number of abnormal images, and the number of compared images: B, or 0 without `at_start`.
    """
    if at_start is None:
        return torch.zeros((), dtype=torch.float64, device=y.device), 0
    before, after = (F.cross_entropy(each.detach().float(), y, reduction="none") for each in (at_start, logits))
    return (before > after).sum().double(), len(y)


def signs(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, norm: str = "l_inf") -> dict[str, float]:
    """Compute two metrics of g1, the input gradient at x (B, C, H, W), and g2, the input gradient at a random point of
    the ball (see `attacks.in_ball`), with the model in eval mode.

    Raises:
        ValueError: images or epsilon are out of range.

    Returns:
        alignment: mean cos(g1, g2) (Andriushchenko and Flammarion, arXiv 2007.02617); it falls from near 1 as the loss
        becomes less linear. participation: mean of (norm1(g1) / norm2(g1))^2 / d, the effective fraction of the d
        entries that the gradient is spread over.
    """
    check_images(x)
    check_epsilon(epsilon, norm)
    with eval_mode(model):
        at_x, _ = input_gradient(model, x, y, torch.zeros_like(x))
        at_point, _ = input_gradient(model, x, y, in_ball(x, epsilon, norm))
    at_x, at_point = at_x.float().flatten(1), at_point.float().flatten(1)
    cosine = torch.cosine_similarity(at_x, at_point, dim=1)
    spread = (at_x.norm(p=1, dim=1) / at_x.norm(dim=1).clamp(min=1e-30)).square() / at_x.shape[1]
    return {"alignment": cosine.mean().item(), "participation": spread.mean().item()}
