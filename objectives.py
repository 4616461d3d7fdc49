"""What training minimizes at perturbed images.

Each objective takes the model, images x in [0, 1] of shape (B, C, H, W), labels y (B,), the attack's perturbation
delta, epsilon in pixel units, and the `Step` in which the attack left what it found at its start. It returns the loss,
a scalar, and the logits (B, classes) of the perturbed images.
"""
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import Step


def ce(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: Step) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy at the perturbed images, as in the published method (arXiv 2103.15476)."""
    logits = model((x + delta).clamp(0, 1))
    return F.cross_entropy(logits, y), logits
