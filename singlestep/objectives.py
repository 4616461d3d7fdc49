"""Training objectives: losses at perturbed images.

All objectives share these arguments:

    model        nn.Module from images in [0, 1] to logits, (B, classes)
    x, y         images in [0, 1], (B, C, H, W), and labels, (B,)
    delta        perturbation from the attack, of the shape of x
    epsilon      radius of the ball in the unit of x
    step         context of the training step, with the attack's logits and gradient at its starting point
    smoothing    label smoothing of the cross-entropy

An objective returns the loss, a scalar, and the logits at x + delta, (B, classes). Extra forward passes use
`step.network`, which has the same weights as `model`.

In formulas, f(x) are logits, p(x) = softmax(f(x)), CE(x) is the mean cross-entropy of f(x) and y, and eta is the
attack's starting point, `step.start`. "Passes of the objective: N" is the cost of a training step without the
attack. One pass is a forward and a backward pass; a forward pass alone counts 1/3.
"""
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .attacks import Step


def perturbed(x: Tensor, delta: Tensor) -> Tensor:
    """Return x + delta, clipped to [0, 1] with a straight-through gradient, since only rounding error is clipped."""
    moved = x + delta
    return moved + (moved.clamp(0, 1) - moved).detach()


def ce(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step",
       smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy at the perturbed images (arXiv 2103.15476): loss = CE(x + delta). Passes of the objective: 1."""
    step.check(x, epsilon)
    logits = model(perturbed(x, delta))
    return F.cross_entropy(logits, y, label_smoothing=smoothing), logits


def gradalign(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", weight: float,
              smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """GradAlign (Andriushchenko and Flammarion, arXiv 2007.02617).

    Passes of the objective: 4 (1 for CE, 1 for g2, 2 for the double backward pass).

    loss = CE(x + delta) + weight * (1 - mean(cos(g1, g2)))

    g1 is the input gradient at x + eta, detached. g2 is the input gradient at x + u, u ~ U(-epsilon, epsilon),
    with its graph; x + u is not clipped to [0, 1]. The mean excludes images where g1 or g2 is 0.
    """
    loss, logits = ce(model, x, y, delta, epsilon, step, smoothing)
    noise = torch.empty_like(x).uniform_(-epsilon, epsilon).requires_grad_()
    g2, = torch.autograd.grad(F.cross_entropy(step.network(x + noise), y), noise, create_graph=True)
    g1, g2 = step.gradient.flatten(1), g2.flatten(1)
    norms = g1.norm(dim=1) * g2.norm(dim=1)
    nonzero = norms.detach() > 0
    cosine = (g1 * g2).sum(dim=1) / norms.where(nonzero, 1)
    return loss + weight * (1 - cosine).where(nonzero, 0).sum() / nonzero.sum().clamp(min=1), logits


def elle(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", weight: float,
         adaptive: bool = False, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """ELLE and, with `adaptive`, ELLE-A (Abad Rocamora et al., arXiv 2401.11618). Passes of the objective: 4.

    loss = CE(x + delta) + weight * mean((l(x_c) - (1 - t) * l(x_a) - t * l(x_b))^2)

    l is the cross-entropy of each image, x_c = (1 - t) * x_a + t * x_b, and t ~ U(0, 1) for each image. x_a and x_b are
    independent samples of x + U(-epsilon, epsilon), not clipped to [0, 1].

    ELLE-A's weight is 0 at first. After a batch whose mean squared error exceeds the mean of all earlier batches (three
    or more) by more than two standard deviations, its weight becomes `weight`; otherwise, it is multiplied by 0.99.
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
    if "elle" not in step.kept:
        step.kept["elle"] = torch.zeros(4, dtype=torch.float64, device=x.device)
    kept = step.kept["elle"]
    current, n, total, squares = kept.clone()  # current weight; number, sum and sum of squares of all earlier errors
    error = step.mean(errors)
    mean = total / n.clamp(min=1)
    deviation = (squares / n.clamp(min=1) - mean**2).clamp(min=0).sqrt()
    jumps = (n > 2) & (error > mean + 2 * deviation)
    kept.copy_(torch.stack([torch.where(jumps, weight, 0.99 * current), n + 1, total + error, squares + error**2]))
    return loss + current.to(errors.dtype) * errors.mean(), logits


def aaer(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step",
         weights: tuple[float, float, float], smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """AAER, abnormal adversarial examples regularization (Lin et al., NeurIPS 2023, arXiv 2404.08154).

    Passes of the objective: 1.

    loss = CE(x + delta) + lambda_1 * (n_a / B) * (lambda_2 * D_a + lambda_3 * max(V_a - V_n, 0))

    An image is abnormal (subscript a) if the attack lowered its cross-entropy l, else normal (subscript n). n_a is the
    number of abnormal images and D_a their mean of l(x + eta) - l(x + delta). V_a and V_n are the means of
    norm2(f(x + eta) - f(x + delta))^2 over abnormal and over normal images. The penalty is 0 if all images of the batch
    are abnormal or all are normal. As in the authors' code, only V_a has a gradient, through f(x + delta).

    Args:
        weights: (lambda_1, lambda_2, lambda_3).
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
    """TRADES (Zhang et al., arXiv 1901.08573). Passes of the objective: 2.

    loss = CE(x) + beta * KL(p(x) || p(x + delta)), with gradients through both p(x) and p(x + delta).
    """
    step.check(x, epsilon)
    clean, logits = step.network(x), model(perturbed(x, delta))
    divergence = F.kl_div(logits.float().log_softmax(dim=1), clean.float().log_softmax(dim=1), log_target=True,
                          reduction="batchmean")
    return F.cross_entropy(clean, y, label_smoothing=smoothing) + beta * divergence, logits


def nuclear(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", weight: float,
            smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """NuAT (Sriramanan et al., NeurIPS 2021). Passes of the objective: 2.

    loss = CE(x) + ramp * weight * norm_nuclear(f(x) - f(x + delta)) / B, with `Step.ramp`.
    """
    step.check(x, epsilon)
    logits, clean = model(perturbed(x, delta)), step.network(x)
    norm = torch.linalg.matrix_norm(clean.float() - logits.float(), ord="nuc")
    return F.cross_entropy(clean, y, label_smoothing=smoothing) + weight * step.ramp * norm / len(x), logits


def guided(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", weight: float,
           smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """GAT (Sriramanan et al., arXiv 2011.14969). Passes of the objective: 2.

    loss = CE(x) + boost * weight * mean_i(sum_c((p_c(x) - p_c(x + delta))^2)), with `Step.boost`.
    """
    step.check(x, epsilon)
    logits, clean = model(perturbed(x, delta)), step.network(x)
    change = clean.float().softmax(dim=1) - logits.float().softmax(dim=1)
    penalty = change.square().sum(dim=1).mean()
    return F.cross_entropy(clean, y, label_smoothing=smoothing) + weight * step.boost * penalty, logits


def logits(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", weight: float,
           smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The objective of FGSM-MEP (Jia et al., arXiv 2207.08859) and of FGSM-UAP (Pan et al., AAAI 2024).

    Passes of the objective: 1.7.

    loss = CE(x + delta) + weight * mean((f(x + delta) - f(x + eta))^2), a mean over images and classes, with gradients
    through both logits.
    """
    loss, attacked = ce(model, x, y, delta, epsilon, step, smoothing)
    return loss + weight * (attacked - step.logits).square().mean(), attacked


def liet(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", smoothing: float,
         weight: float) -> tuple[Tensor, Tensor]:
    """The objective of LIET (ICCV 2025). Passes of the objective: 1.7.

    loss = nCE(x + delta) + weight * (e + 1) / E * mean(JSD(p(x + eta), p(x + delta))), with gradients through both.

    nCE is the cross-entropy with non-uniform label smoothing (`Step.nonuniform_ce`), e the epoch from 0, E the number
    of epochs. JSD(p, q) = (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2, computed from logarithms, which stay finite
    where a probability underflows.
    """
    step.check(x, epsilon)
    logits = model(perturbed(x, delta))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_q = (each.log_softmax(dim=1, dtype=dtype) for each in (step.logits, logits))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergence = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(dim=1).mean() / 2
    growth = (step.epoch + 1) / step.epochs
    return step.nonuniform_ce(logits, y, smoothing) + weight * growth * divergence, logits


def pco(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", weight: float,
        scale: float, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The objective of FGSM-PCO (Wang et al., arXiv 2407.12443), as in its authors' code. Passes of the objective: 2.7.

    loss = CE(x + d) + weight * abs(MSE(f(x + delta), f(x + eta)) - MSE(f(x + delta), f(x + d)))

    d = (1 - q) * eta + scale * q * delta, with q = p_y(x + eta) of each image. Gradients flow through all three logits
    and through q. MSE is the mean over classes and over the images of all processes. x + eta and x + d are not
    clipped to [0, 1]. Returns the loss and f(x + d).
    """
    step.check(x, epsilon)
    q = (-F.cross_entropy(step.logits, y, reduction="none")).exp().view(-1, 1, 1, 1)
    logits = model(x + (1 - q) * step.start.detach() + scale * q * delta)
    attacked = step.network(x + delta)
    difference = (F.mse_loss(attacked, step.logits, reduction="none")
                  - F.mse_loss(attacked, logits, reduction="none")).mean(dim=1)
    k = step.mean(difference).sign().to(difference.dtype)
    return F.cross_entropy(logits, y, label_smoothing=smoothing) + weight * k * difference.mean(), logits


def smooth(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, epsilon: float, step: "Step", weight: float,
           gap: float, point: str, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """ConvergeSmooth (Zhao et al., arXiv 2308.12857), as in its authors' code. Passes of the objective: 2.

    loss = CE(x + delta) + k * weight * L, with L = CE(x) for point "clean", CE(x + eta) for point "start"

    k = sign(L - U) if abs(L - U) > gap, else 0; U is the mean of L over the previous epoch. L is the mean over the
    global batch. So the penalty has the gradient of weight * abs(L - U). k = 0 in the first two epochs.
    """
    loss, logits = ce(model, x, y, delta, epsilon, step, smoothing)
    b = x if point == "clean" else x + step.start.detach()
    each = F.cross_entropy(step.network(b), y, label_smoothing=smoothing, reduction="none")
    if "smooth" not in step.kept:
        step.kept["smooth"] = torch.zeros(5, dtype=torch.float64, device=x.device)
    kept, now = step.kept["smooth"], step.mean(each)
    epoch, total, n, u, u_before = kept.clone()  # sum of L and number of images in `epoch`; U, and U one epoch earlier
    ended = epoch != step.epoch
    u_before, u = torch.where(ended, u, u_before), torch.where(ended, total / n.clamp(min=1), u)
    total, n = torch.where(ended, 0, total), torch.where(ended, 0, n)
    images = len(step.whole)
    kept.copy_(torch.stack([torch.full_like(epoch, step.epoch), total + images * now, n + images, u, u_before]))
    k = torch.where((u_before > 0) & ((now - u).abs() > gap), (now - u).sign(), 0)
    return loss + k.to(each.dtype) * weight * each.mean(), logits
