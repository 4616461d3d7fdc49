"""Adversarial perturbations, for training and for evaluation.

Everything is in pixel space: images x in [0, 1] of shape (B, C, H, W), labels y of shape (B,), epsilon and alpha in
the same unit (8/255, not 8), and a `model` (an nn.Module) that takes images in [0, 1] to logits (B, classes). Each
attack returns a perturbation delta, shaped like x, detached, with 0 <= x + delta <= 1 and abs(delta) <= epsilon (for
l_2: its norm) unless it says otherwise. It leaves the model's parameters, their `.grad` and the model's mode as it
found them; in train mode its forward passes move BatchNorm's running statistics, as in the published methods. "Passes"
counts the forward and backward passes of a training step, that of the weights included. `step` carries what an attack
shares with the rest of a training step; only `sora`, `free` and `pgi` need it.
"""
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Step:
    """A training step, beside its images and labels.

    network: the model without DistributedDataParallel, for passes beside the one that is trained on; images: how many
    training images there are; whole: (global batch,) which of them these are, of all processes; epoch, batch: both
    count from 0, batch within the epoch; done: the share of the run's epochs that is over; kept: what the method itself
    keeps from step to step, by name, a part of the run's state; rank, size: of the processes, each of which takes
    every size-th image; sum: adds tensors up over the processes.

    start, logits, gradient: where the attack's first forward pass was (a perturbation), what it found there, and the
    gradient of the mean cross-entropy; keeps_graph: whether the objective needs these logits with the way back to the
    weights.
    """

    network: nn.Module
    images: int
    whole: Tensor
    epoch: int = 0
    batch: int = 0
    done: float = 0.0
    kept: dict[str, Tensor] = field(default_factory=dict)
    rank: int = 0
    size: int = 1
    sum: Callable[[Tensor], Tensor] = torch.clone
    keeps_graph: bool = False
    start: Any = None
    logits: Any = None
    gradient: Any = None

    @property
    def index(self) -> Tensor:
        """Which training images this process's share of the batch are."""
        return self.whole[self.rank::self.size]

    @property
    def ramp(self) -> float:
        """How much of NuAT's weight there is: all of it in the last tenth of the epochs, linearly more up to there."""
        return min(self.done / 0.9, 1.0)

    def store(self, name: str, rows: Tensor, whole: Tensor) -> None:
        """Put this process's rows, and those of the others, at `whole` of what is kept under `name`."""
        together = torch.zeros(len(whole), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        together[self.rank::self.size] = rows
        self.kept[name][whole] = self.sum(together).to(self.kept[name].dtype)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` (B,) over the images of all processes, detached."""
        return self.sum(values.detach().double().sum()) / len(self.whole)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, init: str = "random",
         step: Step | None = None) -> Tensor:
    """One step of alpha along the gradient's sign, from zero (Goodfellow et al., arXiv 1412.6572) or from a uniform
    start (FGSM-RS, Wong et al., arXiv 2001.03994). Passes: 2."""
    delta = start(x, in_pixels(epsilon), init)
    grad, _ = input_gradient(model, x, y, delta, step)
    return box(delta + alpha * grad.sign(), x, epsilon)


def zerograd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, q: float, steps: int = 1,
             init: str = "random", step: Step | None = None) -> Tensor:
    """FGSM without the smallest entries of each image's gradient (arXiv 2103.15476, ZeroGrad).

    In each step at most a fraction `q` of an image's entries are made to stay where they are; see `quantile_mask`.
    Passes: 2, and one more for each further step.
    """
    delta = start(x, in_pixels(epsilon), init)
    for _ in range(steps):
        grad, _ = input_gradient(model, x, y, delta, step)
        delta = box(delta + alpha * quantile_mask(grad, q).sign(), x, epsilon)
    return delta


def multigrad(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, samples: int = 3,
              threshold: int | None = None, parallel: bool = False, step: Step | None = None) -> Tensor:
    """One step from zero where the gradient signs at `samples` uniform starts agree (arXiv 2103.15476, MultiGrad).

    `threshold` of the samples must agree, all of them if None; see `sign_consensus`. `parallel` computes the samples
    as one batch of samples * B, over which BatchNorm then normalizes, instead of one after another.
    Passes: 1 + samples.
    """
    epsilon = in_pixels(epsilon)
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

    Madry et al. (arXiv 1706.06083). Passes, with one restart: 1 + steps.

    `norm` is "l_inf" or "l_2". With `early_stop` an image that is already misclassified moves no further.
    """
    best_delta, best_loss = torch.zeros_like(x), x.new_full((len(x),), -math.inf)
    for _ in range(restarts):
        delta = start(x, epsilon if norm == "l_2" else in_pixels(epsilon), norm=norm)
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


def none(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, step: Step | None = None) -> Tensor:
    """No perturbation: ordinary training. Passes: 1."""
    return torch.zeros_like(x)


def nfgsm(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, k: float = 2.0,
          step: Step | None = None) -> Tensor:
    """N-FGSM (de Jorge et al., arXiv 2202.01181): a step from noise of k epsilon, and no clip to the ball, so that
    abs(delta) can be k epsilon + alpha. Passes: 2."""
    eta = start(x, k * in_pixels(epsilon))
    grad, _ = input_gradient(model, x, y, eta, step)
    return box(eta + alpha * grad.sign(), x, math.inf)


def sora(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, step: Step) -> Tensor:
    """SORA (arXiv 2606.00738): a step of random length, shorter as the loss becomes less linear. Passes: 2.

    delta = eta + a r sign(g), eta ~ U(-epsilon, epsilon), r ~ U(0, 1) for each entry, clipped to the pixel box
    alone: abs(delta) can be 3 epsilon. a = 2 epsilon min(1, 0.02 / (1 - v)); v, a moving average (weight 0.05, from
    0.99) of the mean over images of <sign(g), g'> / norm1(g), says how well g foretells g', the gradient at x + delta.
    """
    v = step.kept.setdefault("sora", torch.tensor(0.99, dtype=torch.float64, device=x.device))
    eta = start(x, epsilon)
    g, _ = input_gradient(model, x, y, eta, step)
    a = 2 * epsilon * (0.02 / (1 - v).clamp(min=1e-12)).clamp(max=1)
    return box(eta + a.to(x.dtype) * torch.rand_like(x) * g.sign(), x, math.inf)


def sora_update(step: Step, x: Tensor, delta: Tensor, grad: Tensor, epsilon: float) -> None:
    """SORA's v <- 0.95 v + 0.05 mean(<sign(g), g'> / norm1(g)), with g' = `grad`."""
    g, v = step.gradient, step.kept["sora"]
    ratio = (g.sign() * grad).flatten(1).sum(dim=1) / g.abs().flatten(1).sum(dim=1).clamp(min=1e-12)
    u = step.mean(ratio)  # not finite where float16 overflows, and the step is skipped
    v.copy_(torch.where(u.isfinite(), 0.95 * v + 0.05 * u.clamp(-1, 1), v))


def ckpt(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, count: int = 3,
         step: Step | None = None) -> Tensor:
    """FGSM-RS, cut short where less of it is enough (Kim et al., arXiv 2010.01799). Passes: 2 + (count - 1) / 3.

    Per image, the smallest k / count, k = 1 .. count - 1, of the whole perturbation at which the model in eval mode is
    wrong, else all of it; an image that is wrong at its random start is left as it is.
    """
    eta = start(x, epsilon)
    grad, logits = input_gradient(model, x, y, eta, step)
    delta = box(eta + alpha * grad.sign(), x, epsilon)
    share = torch.ones(len(x), dtype=x.dtype, device=x.device)
    with torch.no_grad(), frozen(model), evaluating(model):
        for k in range(count - 1, 0, -1):  # the smallest is written last
            wrong = model(x + k / count * delta).argmax(dim=1) != y
            share = torch.where(wrong, k / count, share)
    share = torch.where(logits.argmax(dim=1) != y, 0, share)
    return _per_image(share) * delta


def free(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, step: Step) -> Tensor:
    """Free adversarial training (Shafahi et al., arXiv 1904.12843). Passes: 1.

    Each batch is used several times (--free-replays), and one backward pass gives both the weights' step and delta's:
    delta = box(delta + epsilon sign(g)). The delta of a place in the batch goes on to the image that is there next,
    brought into its box.
    """
    places = torch.arange(len(step.whole), device=x.device)
    kept = step.kept.get("free")
    if kept is None or len(kept) < len(places):
        kept = step.kept["free"] = torch.zeros(len(places), *x.shape[1:], device=x.device)
    return box(kept[places[step.rank::step.size]].to(x.dtype), x, epsilon)


def free_update(step: Step, x: Tensor, delta: Tensor, grad: Tensor, epsilon: float) -> None:
    """Free's delta <- box(delta + epsilon sign(g)), with g = `grad`."""
    places = torch.arange(len(step.whole), device=x.device)
    step.store("free", box(delta + epsilon * grad.sign().nan_to_num(), x, epsilon), places)


def pgi(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, step: Step, reset: int = 40,
        smoothing: float = 0.0) -> Tensor:
    """FGSM-MEP, from a prior kept for each training image (Jia et al., arXiv 2207.08859). Passes: 2.7 with `logits`.

    delta = box(D + alpha sign(g)), from the D stored for the image; M <- 0.3 M + g / norm1(g), norm1 over the whole
    batch; D <- box(D + alpha sign(M)). Every `reset` epochs D is random corners of the ball and M is 0. D does not move
    with an image's crop and flip. g is of the smoothed cross-entropy. (D and M are kept in half precision, M times the
    entries of 128 images, so that it is about 1.)
    """
    for name in ("pgi", "pgi momentum"):
        if name not in step.kept or len(step.kept[name]) != step.images:
            step.kept[name] = torch.zeros(step.images, *x.shape[1:], dtype=torch.float16, device=x.device)
    if step.epoch % reset == 0:
        d, m = epsilon * (2 * torch.rand_like(x) - 1).sign(), torch.zeros_like(x)
    else:
        d, m = (step.kept[name][step.index].to(x.dtype) for name in ("pgi", "pgi momentum"))
    grad, _ = input_gradient(model, x, y, d, step, smoothing)
    grad = grad * len(y)  # that of the sum: shares of a last batch can differ by an image
    norm = step.sum(grad.abs().sum()) / (128 * x[0].numel())
    m = 0.3 * m + grad / norm.clamp(min=torch.finfo(grad.dtype).tiny)
    step.store("pgi", box(d + alpha * m.sign(), x, epsilon), step.whole)
    step.store("pgi momentum", m, step.whole)
    return box(d + alpha * grad.sign(), x, epsilon)


def kl(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, steps: int = 10,
       step: Step | None = None) -> Tensor:
    """The inner maximization of TRADES (Zhang et al., arXiv 1901.08573). Passes, with that objective: 2.3 + steps.

    From x + 0.001 normal noise, `steps` steps of alpha up the Kullback-Leibler divergence from the model's answer at x
    to that at x + delta, in eval mode.
    """
    delta = 0.001 * torch.randn_like(x)
    with evaluating(model):
        with torch.no_grad(), frozen(model):
            target = model(x).float().softmax(dim=1)
        for _ in range(steps):
            grad, _ = gradient(model, x, delta, lambda logits: F.kl_div(
                logits.float().log_softmax(dim=1), target, reduction="batchmean"))
            delta = box(delta + alpha * grad.sign(), x, epsilon)
    return delta


def nuclear(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, weight: float,
            step: Step | None = None) -> Tensor:
    """The attack of NuAT (Sriramanan et al., NeurIPS 2021). Passes, with that objective: 3.3.

    From Bernoulli noise of epsilon / 2, one step of alpha up the cross-entropy and, in every other batch,
    + weight * norm_nuclear(f(x) - f(x + delta)) / B, f(x) in train mode, f(x + delta) in eval mode. `weight` grows as
    `Step.ramp` says.
    """
    delta = (epsilon / 2 * (2 * torch.rand_like(x) - 1).sign()).clamp(-x, 1 - x)
    odd = step is not None and step.batch % 2 == 1
    with torch.no_grad(), frozen(model):
        clean = model(x).float()  # in every batch, as published: BatchNorm's statistics move with it

    def loss(logits: Tensor) -> Tensor:
        ce = F.cross_entropy(logits, y)
        term = torch.linalg.matrix_norm(clean - logits.float(), ord="nuc") / len(x)
        return ce + weight * (step.ramp if step else 1.0) * term if odd else ce

    with evaluating(model):
        grad, _ = gradient(model, x, delta, loss)
    return box(delta + alpha * grad.sign(), x, epsilon)


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


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, step: Step | None = None,
                   smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The gradient of the mean cross-entropy at x + delta with respect to delta alone, and the logits there."""
    first = step if step and step.start is None else None
    grad, logits = gradient(model, x, delta, lambda logits: F.cross_entropy(logits, y, label_smoothing=smoothing),
                            keep=first is not None and first.keeps_graph)
    if first:
        first.start, first.logits, first.gradient = delta.detach(), logits, grad
    return grad, logits.detach()


def gradient(model: nn.Module, x: Tensor, delta: Tensor, mean_loss: Callable[[Tensor], Tensor],
             keep: bool = False) -> tuple[Tensor, Tensor]:
    """The gradient of `mean_loss(logits)`, a mean over images, with respect to delta alone, and the logits.

    The parameters are frozen, so that no gradient of theirs is computed and less is stored for it, unless `keep` asks
    for logits that they can be reached through.
    """
    delta = delta.detach().requires_grad_()
    with contextlib.nullcontext() if keep else frozen(model), torch.enable_grad():
        logits = model(x + delta)
        scale = 8 * 2 ** (len(x) - 1).bit_length()  # a power of two: exact, and float16 gradients do not vanish
        grad, = torch.autograd.grad(mean_loss(logits) * scale, delta, retain_graph=keep)
    return grad / scale, logits if keep else logits.detach()


def confident_gradient(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor,
                       loss: str = "ce") -> tuple[Tensor, Tensor]:
    """As `input_gradient`, but each image's gradient is scaled so that it does not vanish however sure the model is.

    With m = logsumexp of the other classes' logits - the label's logit, the cross-entropy is log(1 + exp(m)): m has the
    same gradient but for a positive factor, which rounds to 0 where the label's probability rounds to 1. For attacks
    that take the gradient's sign or direction alone. With the loss "cw", the highest of the other logits stands for
    their logsumexp (Carlini and Wagner, arXiv 1608.04644).
    """
    label = y.unsqueeze(1)

    def margin(logits: Tensor) -> Tensor:
        wide = logits.float()
        others = wide.scatter(1, label, -math.inf)
        highest = others.amax(dim=1) if loss == "cw" else others.logsumexp(dim=1)
        return (highest - wide.gather(1, label).squeeze(1)).mean()

    return gradient(model, x, delta, margin)


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


def in_pixels(epsilon: float) -> float:
    """`epsilon`, unless it is more than all that a pixel can be: then it was most likely meant in 255ths."""
    if epsilon > 1:
        raise ValueError(f"epsilon is in pixel units: 8/255, not {epsilon}")
    return epsilon


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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in eval mode in here."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _norm(values: Tensor) -> Tensor:
    """Each image's l_2 norm, never quite 0: (B, C, H, W) -> (B, 1, 1, 1)."""
    return _per_image(values.flatten(1).norm(dim=1).clamp(min=torch.finfo(values.dtype).tiny))
