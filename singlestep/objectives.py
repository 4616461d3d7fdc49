"""What training minimizes at perturbed images.

Each objective takes the model, images x in [0, 1] of shape (B, C, H, W), labels y (B,), the attack's perturbation
delta, epsilon in pixel units, and the `Step` in which the attack left what it found at its start. It returns the loss,
a scalar, and the logits (B, classes) of the perturbed images. Terms beside the one at the perturbed images run
`step.network`, the same weights. "Passes" counts forward and backward passes beside the attack's.
"""
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .attacks import Step


def perturbed(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta, clipped to [0, 1], with delta's gradient as if it were not: the attack left no more than rounding to
    clip, and where that falls is no reason for a gradient of 0."""
    moved = x + delta
    return moved + (moved.clamp(0, 1) - moved).detach()


def ce(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step",
       smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy at the perturbed images, as in the published method (arXiv 2103.15476). Passes: 1."""
    logits = model(perturbed(x, delta))
    return F.cross_entropy(logits, y, label_smoothing=smoothing), logits


def gradalign(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", weight: float,
              smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """GradAlign (Andriushchenko and Flammarion, arXiv 2007.02617). Passes: 4, one of them a double backward.

    + weight (1 - mean cos(g1, g2)): g1 the input gradient at the attack's start, detached; g2 that at x + U(-epsilon,
    epsilon), not clipped to the pixel box, with its graph. Images with a zero gradient are left out of the mean.
    """
    loss, logits = ce(model, x, y, delta, epsilon, step, smoothing)
    noise = torch.empty_like(x).uniform_(-epsilon, epsilon).requires_grad_()
    g2, = torch.autograd.grad(F.cross_entropy(step.network(x + noise), y), noise, create_graph=True)
    g1, g2 = step.gradient.flatten(1), g2.flatten(1)
    norms = g1.norm(dim=1) * g2.norm(dim=1)
    there = norms.detach() > 0
    cosine = (g1 * g2).sum(dim=1) / norms.where(there, 1)
    return loss + weight * (1 - cosine).where(there, 0).sum() / there.sum().clamp(min=1), logits


def elle(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", weight: float,
         adaptive: bool = False, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """ELLE and, adaptive, ELLE-A (Abad Rocamora et al., arXiv 2401.11618). Passes: 4.

    + weight mean((l(x_c) - (1 - t) l(x_a) - t l(x_b))^2), l the cross-entropy of each image, x_a and x_b at x +
    U(-epsilon, epsilon), not clipped, x_c = (1 - t) x_a + t x_b, t ~ U(0, 1) for each image. Adaptive: the weight
    begins at 0, and is `weight` after a batch whose term is above the mean and two standard deviations of all before,
    else 0.99 of itself.
    """
    loss, logits = ce(model, x, y, delta, epsilon, step, smoothing)
    x_a, x_b = (x + torch.empty_like(x).uniform_(-epsilon, epsilon) for _ in range(2))
    t = torch.rand(len(x), dtype=x.dtype, device=x.device)
    x_c = torch.lerp(x_a, x_b, t.view(-1, 1, 1, 1))
    triplet = step.network(torch.cat([x_a, x_b, x_c]))
    l_a, l_b, l_c = F.cross_entropy(triplet, y.repeat(3), reduction="none").chunk(3)
    errors = (l_c - (1 - t) * l_a - t * l_b).square()
    if not adaptive:
        return loss + weight * errors.mean(), logits
    kept = step.kept.setdefault("elle", torch.zeros(4, dtype=torch.float64, device=x.device))
    current, n, total, squares = kept.clone()  # the weight now; of all terms so far: how many, their sum, of squares
    error = step.mean(errors)
    mean = total / n.clamp(min=1)
    deviation = (squares / n.clamp(min=1) - mean**2).clamp(min=0).sqrt()
    jumps = (n > 2) & (error > mean + 2 * deviation)
    kept.copy_(torch.stack([torch.where(jumps, weight, 0.99 * current), n + 1, total + error, squares + error**2]))
    return loss + current.to(errors.dtype) * errors.mean(), logits


def aaer(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step",
         weights: tuple[float, float, float], smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Abnormal adversarial examples regularization (Lin et al., NeurIPS 2023, arXiv 2404.08154). Passes: 1.

    Abnormal are images whose cross-entropy the attack made smaller. + l1 (n_abnormal / B) (l2 mean_abnormal(
    CE(x + start) - CE(x + delta)) + l3 max(V_abnormal - V_normal, 0)), where both kinds occur; V is the mean over a
    kind's images of norm2(f(x + start) - f(x + delta))^2. As in the authors' code, only V_abnormal has a gradient,
    through f(x + delta).
    """
    l1, l2, l3 = weights
    loss, logits = ce(model, x, y, delta, epsilon, step, smoothing)
    at_start = step.logits.detach()
    before, after = (F.cross_entropy(each.detach(), y, reduction="none") for each in (at_start, logits))
    abnormal = (before > after).to(loss.dtype)
    n, normal = abnormal.sum(), 1 - abnormal
    variation = (at_start - logits).square().sum(dim=1)
    v_abnormal = (variation * abnormal).sum() / n.clamp(min=1)
    v_normal = (variation.detach() * normal).sum() / normal.sum().clamp(min=1)
    fall = ((before - after) * abnormal).sum() / n.clamp(min=1)
    both = (n > 0) & (n < len(y))
    term = n / len(y) * (l2 * fall + l3 * (v_abnormal - v_normal).clamp(min=0))
    return loss + l1 * term.where(both, 0), logits


def trades(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", beta: float,
           smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """TRADES (Zhang et al., arXiv 1901.08573): CE(f(x), y) + beta KL(p(x) || p(x + delta)), both with their gradients.
    Passes: 2."""
    clean, logits = step.network(x), model(perturbed(x, delta))
    divergence = F.kl_div(logits.float().log_softmax(dim=1), clean.float().log_softmax(dim=1), log_target=True,
                          reduction="batchmean")
    return F.cross_entropy(clean, y, label_smoothing=smoothing) + beta * divergence, logits


def nuclear(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", weight: float,
            smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """NuAT (Sriramanan et al., NeurIPS 2021): CE(f(x), y) + weight norm_nuclear(f(x) - f(x + delta)) / B, the weight
    growing as `Step.ramp` says. Passes: 2."""
    logits, clean = model(perturbed(x, delta)), step.network(x)
    norm = torch.linalg.matrix_norm(clean.float() - logits.float(), ord="nuc")
    return F.cross_entropy(clean, y, label_smoothing=smoothing) + weight * step.ramp * norm / len(x), logits


def logits(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", weight: float,
           smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The regularizer of FGSM-MEP (Jia et al., arXiv 2207.08859). Passes: 1.7.

    + weight times the mean square over images and classes of f(x + delta) - f(x + start), both with their gradients.
    """
    loss, found = ce(model, x, y, delta, epsilon, step, smoothing)
    return loss + weight * (found - step.logits).square().mean(), found
