"""The perturbations: FGSM, ZeroGrad, MultiGrad and PGD.

Everything is in pixel space: images x in [0, 1] of shape (B, C, H, W), labels y of shape (B,), epsilon and alpha in
the same unit (8/255, not 8), and a `model` (an nn.Module) that takes images in [0, 1] to logits (B, classes). Each
attack returns a perturbation delta, shaped like x, with abs(delta) <= epsilon (for l_2: its norm) and
0 <= x + delta <= 1, detached. It leaves the model's parameters, their `.grad` and the model's mode as it found them;
in train mode its forward passes move BatchNorm's running statistics, as in the published method. In training, `step`
is what it shares with the rest of the step; anyone else leaves it out.

Sources: FGSM, Goodfellow et al. (arXiv 1412.6572); its random start, Wong et al. (arXiv 2001.03994); ZeroGrad and
MultiGrad, Golgooni et al. (arXiv 2103.15476); PGD, Madry et al. (arXiv 1706.06083).
"""
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Step:
    """What a training step tells its attack and its objective beside images and labels, and they each other.

    time: in epochs since the run began; kept: what the method itself keeps from step to step, by name, a part of the
    run's state; start, logits: where the attack's first forward pass was (a perturbation) and what it found there.
    """

    time: float = 0.0
    kept: dict[str, Tensor] = field(default_factory=dict)
    start: Tensor | None = None
    logits: Tensor | None = None


def fgsm(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, init: str = "random",
         step: Step | None = None) -> Tensor:
    """One step of alpha along the gradient's sign, from zero or (FGSM-RS) from a uniform start."""
    delta = start(x, epsilon, init)
    grad, _ = input_gradient(model, x, y, delta, step)
    return box(delta + alpha * grad.sign(), x, epsilon)


def zerograd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, q: float, steps: int = 1,
             init: str = "random", step: Step | None = None) -> Tensor:
    """FGSM without the smallest entries of each image's gradient (arXiv 2103.15476, ZeroGrad).

    In each step at most a fraction `q` of an image's entries are made to stay where they are; see `quantile_mask`.
    """
    delta = start(x, epsilon, init)
    for _ in range(steps):
        grad, _ = input_gradient(model, x, y, delta, step)
        delta = box(delta + alpha * quantile_mask(grad, q).sign(), x, epsilon)
    return delta


def multigrad(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, samples: int = 3,
              threshold: int | None = None, parallel: bool = False, step: Step | None = None) -> Tensor:
    """One step from zero where the gradient signs at `samples` uniform starts agree (arXiv 2103.15476, MultiGrad).

    `threshold` of the samples must agree, all of them if None; see `sign_consensus`. `parallel` computes the samples
    as one batch of samples * B, over which BatchNorm then normalizes, instead of one after another.
    """
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, not {samples}")
    if parallel:
        xs, ys = torch.cat([x] * samples), torch.cat([y] * samples)
        grads = input_gradient(model, xs, ys, start(xs, epsilon))[0].unflatten(0, (samples, len(x)))
    else:
        grads = torch.stack([input_gradient(model, x, y, start(x, epsilon), step)[0] for _ in range(samples)])
    return box(alpha * sign_consensus(grads, samples if threshold is None else threshold), x, epsilon)


def pgd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, steps: int, restarts: int = 1,
        norm: str = "l_inf", early_stop: bool = False, step: Step | None = None) -> Tensor:
    """`steps` projected steps from each of `restarts` random starts; per image, the delta of the highest loss.

    `norm` is "l_inf" or "l_2". With `early_stop` an image that is already misclassified moves no further.
    """
    best_delta, best_loss = torch.zeros_like(x), x.new_full((len(x),), -math.inf)
    for _ in range(restarts):
        delta = start(x, epsilon, norm=norm)
        for _ in range(steps):
            grad, logits = input_gradient(model, x, y, delta, step)
            moved = pgd_step(delta, grad, x, epsilon, alpha, norm)
            if early_stop:
                right = logits.argmax(dim=1) == y
                if not right.any():
                    break
                moved = torch.where(_per_image(right), moved, delta)
            delta = moved
        if restarts == 1:
            return delta
        with torch.no_grad():
            loss = F.cross_entropy(model(x + delta), y, reduction="none").to(x.dtype)
        higher = loss >= best_loss
        best_delta = torch.where(_per_image(higher), delta, best_delta)
        best_loss = torch.where(higher, loss, best_loss)
    return best_delta


def pgd_step(delta: Tensor, grad: Tensor, x: Tensor, epsilon: float, alpha: float, norm: str = "l_inf") -> Tensor:
    """`delta` after one step of PGD, projected to the ball and the box."""
    step = grad.sign() if norm == "l_inf" else grad / _norm(grad)
    return box(delta + alpha * step, x, epsilon, norm)


def quantile_mask(grad: Tensor, q: float) -> Tensor:
    """`grad` (B, C, H, W) with every entry 0 whose magnitude is strictly below its image's q-quantile.

    The quantile interpolates linearly between two neighbours in order of magnitude, so exactly the entries below the
    upper one are below it: to find that one, the smallest that is kept, is enough, and no sort is needed. Raises
    ValueError unless 0 <= q <= 1.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"q must be from 0 to 1, not {q}")
    magnitude = grad.abs().flatten(1)
    below = math.ceil(q * (magnitude.shape[1] - 1))  # in order of magnitude, as many stand before that one
    smallest_kept = magnitude.topk(magnitude.shape[1] - below, dim=1, sorted=False).values.amin(dim=1)
    return grad.masked_fill(grad.abs() < _per_image(smallest_kept), 0)


def sign_consensus(grads: Tensor, threshold: int) -> Tensor:
    """The sign on which at least `threshold` of the n gradients (n, B, C, H, W) agree, else 0: (B, C, H, W).

    As published, by the sum s of the signs: 0 where abs(s) < threshold - (n - threshold), else the sign of s; this is
    the same where no gradient is 0 and threshold > n / 2. Raises ValueError unless 1 <= threshold <= n.
    """
    n = len(grads)
    if not 1 <= threshold <= n:
        raise ValueError(f"threshold must be from 1 to the {n} samples, not {threshold}")
    s = grads.sign().sum(dim=0)
    return s.masked_fill(s.abs() < threshold - (n - threshold), 0).sign()


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor,
                   step: Step | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of the mean cross-entropy at x + delta with respect to delta alone, and the logits there."""
    delta = delta.detach().requires_grad_()
    with frozen(model), torch.enable_grad():
        logits = model(x + delta)
        loss = F.cross_entropy(logits, y)
        scale = 8 * 2 ** (len(x) - 1).bit_length()  # a power of two: exact, and float16 gradients do not vanish
        grad, = torch.autograd.grad(loss * scale, delta)
    if step is not None and step.start is None:
        step.start, step.logits = delta.detach(), logits.detach()
    return grad / scale, logits.detach()


def confident_gradient(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """As `input_gradient`, but each image's gradient is scaled so that it does not vanish however sure the model is.

    With m = logsumexp of the other classes' logits - the label's logit, the cross-entropy is log(1 + exp(m)): m has the
    same gradient but for a positive factor, which rounds to 0 where the label's probability rounds to 1. For attacks
    that take the gradient's sign or direction alone.
    """
    delta = delta.detach().requires_grad_()
    with frozen(model), torch.enable_grad():
        logits = model(x + delta)
        label = y.unsqueeze(1)
        wide = logits.float()
        m = wide.scatter(1, label, -math.inf).logsumexp(dim=1) - wide.gather(1, label).squeeze(1)
        grad, = torch.autograd.grad(8 * m.sum(), delta)
    return grad, logits.detach()


@torch.no_grad()
def start(x: Tensor, epsilon: float, init: str = "random", norm: str = "l_inf") -> Tensor:
    """Where an attack begins: "zero", or "random" in the ball of `norm`, clipped to the box."""
    if init == "zero":
        return torch.zeros_like(x)
    if init != "random" or norm not in ("l_inf", "l_2"):
        raise ValueError(f"init must be zero or random, norm l_inf or l_2, not {init!r}, {norm!r}")
    if norm == "l_inf":
        delta = torch.empty_like(x).uniform_(-epsilon, epsilon)
    else:
        delta = torch.randn_like(x)
        radius = epsilon * torch.rand(len(x), dtype=x.dtype, device=x.device)
        delta *= _per_image(radius) / _norm(delta)
    return delta.clamp(-x, 1 - x)


@torch.no_grad()
def box(delta: Tensor, x: Tensor, epsilon: float, norm: str = "l_inf") -> Tensor:
    """`delta` brought into the ball of radius epsilon, then into [-x, 1-x]."""
    inside = delta.clamp(-epsilon, epsilon) if norm == "l_inf" else delta * (epsilon / _norm(delta).clamp(min=epsilon))
    return inside.clamp(-x, 1 - x)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model's parameters need no gradient in here, so that none is computed and less is kept for it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _norm(values: Tensor) -> Tensor:
    """Each image's l_2 norm, never quite 0: (B, C, H, W) -> (B, 1, 1, 1)."""
    return _per_image(values.flatten(1).norm(dim=1).clamp(min=torch.finfo(values.dtype).tiny))
