"""Adversarial attacks for training and evaluation.

All attacks work in pixel space and share these arguments:

    model             nn.Module from images in [0, 1] to logits, (B, classes)
    x                 images in [0, 1], (B, C, H, W)
    y                 labels, (B,)
    epsilon, alpha    radius of the ball and step size, in the unit of x: 8/255, not 8
    smoothing         label smoothing of the cross-entropy whose gradient is taken
    norm              "l_inf" or "l_2": norm of the ball and of the attack step
    step              context of the training step; required by attacks that store tensors or move the weights

An attack returns a detached perturbation delta of the shape of x with 0 <= x + delta <= 1. Unless its docstring says
otherwise, abs(delta) <= epsilon (for l_2: the l_2 norm of each image's delta). The parameters, their `.grad` and the
model's mode stay unchanged, except that LAP moves the weights. In train mode, the forward passes update BatchNorm's
running statistics, as in the published methods.

"Passes: N" is the cost of a whole training step: of this attack and of its objective, `ce` unless named. One pass is a
forward and a backward pass; a forward pass alone counts 1/3.

In formulas, eta is the starting point, the perturbation from which delta is computed. Random starting points are
clipped so that x + eta is in [0, 1], except those of PGI, FGSM-PCO and TRADES. g is the gradient of the mean
cross-entropy with respect to the perturbation, at x + eta unless stated otherwise, and box(delta) projects delta to the
ball and clips x + delta to [0, 1]. For l_2, g / norm2(g) of each image replaces sign(g), and a random point of the ball
has a uniform direction and a length ~ U(0, epsilon).
"""
import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Step:
    """Context of one training step.

    Attributes:
        network: the model without DistributedDataParallel, for the extra forward passes of objectives.
        images: number of training images.
        whole: training-set indices of the global batch, (global batch,).
        epoch, batch: number of the epoch, and of the batch within the epoch; both count from 0.
        done: completed epochs / epochs of the run, from 0 to 1.
        kept: the method's own tensors by name; they persist between steps and are saved with the run.
        rank, size: rank of this process and number of processes; a process takes every size-th image of the batch.
        sum: sums a tensor over all processes.
        keeps_graph: whether the objective backpropagates through `logits`.
        epochs: epochs of the run.
        classes: number of classes.
        drawn: the augmentation of x: "top" and "left" of the crop in the padded image, "flip", each (B,).
        padding: pixels by which the augmentation pads each side of an image before the crop.
        optimizer: SGD with its momentum buffers and one parameter group, for an attack that moves the weights.
        rows: of uap, cuap and fuap: index of the universal perturbation of each image's starting point, (B,).
        start: eta, the perturbation at the attack's first gradient; with keeps_graph, a leaf of the graph.
        logits, gradient: logits at x + eta, and the gradient of the mean cross-entropy with respect to eta.
        direction: sora's direction of steepest ascent at its starting point.
        checks: check images, epsilon, logits and gradients in every call, which synchronizes with the device.
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
    epochs: int = 1
    drawn: dict[str, Tensor] = field(default_factory=dict)
    padding: int = 0
    optimizer: Any = None
    classes: int = 10
    rows: Any = None
    start: Any = None
    logits: Any = None
    gradient: Any = None
    direction: Any = None
    checks: bool = True

    @property
    def index(self) -> Tensor:
        """Training-set indices of this process's share of the batch."""
        return self.whole[self.rank::self.size]

    @property
    def ramp(self) -> float:
        """Factor of NuAT's weight: min(done / 0.9, 1), as in the authors' code."""
        return min(self.done / 0.9, 1.0)

    @property
    def boost(self) -> float:
        """Factor of GAT's weight: 4 from done = 0.86 on (the authors' second drop of the learning rate), 1 before."""
        return 4.0 if self.done >= 0.86 else 1.0

    def reserve(self, name: str, x: Tensor, *shape: int) -> None:
        """Allocate `kept[name]` as zeros, (images, *shape), unless it exists with this shape.

        dtype: float16 if x is float32 and `shape` is not empty, else the dtype of x.
        """
        if name not in self.kept or self.kept[name].shape != (self.images, *shape):
            dtype = torch.float16 if shape and x.dtype is torch.float32 else x.dtype
            self.kept[name] = torch.zeros(self.images, *shape, dtype=dtype, device=x.device)

    def store(self, name: str, values: Tensor, whole: Tensor) -> None:
        """Write the values of all processes into `kept[name]`.

        Args:
            name: key of a tensor in `kept`.
            values: one value or tensor for each image of this process's share.
            whole: indices into `kept[name]` for the global batch.
        """
        together = torch.zeros(len(whole), *values.shape[1:], dtype=values.dtype, device=values.device)
        together[self.rank::self.size] = values
        self.kept[name][whole] = self.sum(together).to(self.kept[name].dtype)

    def same(self, values: Tensor) -> Tensor:
        """Return rank 0's `values` on every process."""
        return self.sum(values if self.rank == 0 else torch.zeros_like(values))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` (B,) over the images of all processes, detached."""
        return self.sum(values.detach().double().sum()) / len(self.whole)

    @staticmethod
    def nonuniform_ce(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
        """Return the mean cross-entropy with LIET's non-uniform label smoothing, in float32 or better.

        The target is 1 - smoothing for the label. The other classes share `smoothing` in the proportions of U(0, 1)
        numbers, drawn for every image in every call.
        """
        logits, label = logits.to(torch.promote_types(logits.dtype, torch.float32)), y.unsqueeze(1)
        shares = torch.rand_like(logits).scatter(1, label, 0)
        target = smoothing * shares / shares.sum(dim=1, keepdim=True)
        return F.cross_entropy(logits, target.scatter(1, label, 1 - smoothing))

    def check(self, x: Tensor, epsilon: float) -> None:
        """Raise ValueError if `checks` is set and images or epsilon are not in [0, 1], also in l_2."""
        if self.checks:
            check_images(x)
            check_epsilon(epsilon)


P = ParamSpec("P")


def checked(attack: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorate an attack with checks of its arguments, logits and gradients, unless `Step.checks` is False.

    The attack raises ValueError if images or epsilon are out of range, or if a logit or the perturbation is not
    finite. It warns if the gradient is 0 for more than 1% of the images (our choice).
    """
    signature = inspect.signature(attack)

    @functools.wraps(attack)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        model, x, step = given["model"], given["x"], given.get("step")
        if step is not None and not step.checks:
            return attack(*args, **kwargs)
        check_images(x)
        check_epsilon(given["epsilon"], given.get("norm", "l_inf"))
        vanished = [torch.zeros(0, device=x.device)]  # for each pass, whether each image's gradient is 0

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled() and inputs[0].requires_grad:
                inputs[0].register_hook(lambda grad: vanished.append(1.0 - grad.flatten(1).any(dim=1).float()))

        def after(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
            require_finite(logits)

        with model.register_forward_pre_hook(before), model.register_forward_hook(after):
            delta = attack(*args, **kwargs)
        require_finite(delta)
        if torch.cat(vanished).mean() > 0.01:
            warnings.warn("the gradient is 0 for more than 1% of the images, so the attack leaves them "
                          "unchanged and the accuracy may be too high: use singlestep.evaluate, whose gradient does "
                          "not vanish with confidence, or Square, an attack without gradients", stacklevel=2)
        return delta

    return call


@checked
def fgsm(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, init: str = "random",
         step: Step | None = None, smoothing: float = 0.0, norm: str = "l_inf") -> Tensor:
    """FGSM (Goodfellow et al., arXiv 1412.6572) or, with a random start, FGSM-RS (Wong et al., arXiv 2001.03994).

    delta = box(eta + alpha * sign(g)), g the gradient at x + eta; eta = 0 with init "zero", eta ~ U(-epsilon, epsilon)
    with init "random". Passes: 2.

    For l_2: FGSM-RS as in issue 1 of github.com/locuslab/fast_adversarial.
    """
    delta = start(x, epsilon, init, norm)
    grad, _ = input_gradient(model, x, y, delta, step, smoothing)
    return pgd_step(delta, grad, x, epsilon, alpha, norm)


@checked
def zerograd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, q: float, steps: int = 1,
             init: str = "random", step: Step | None = None, smoothing: float = 0.0) -> Tensor:
    """ZeroGrad (arXiv 2103.15476): FGSM that ignores the smallest gradient entries of each image.

    delta = box(eta + alpha * sign(g')); g' is g with about the fraction `q` of each image's entries, those below the
    q-quantile of the magnitude, set to 0 (see `quantile_mask`). The update is repeated `steps` times.
    Passes: 1 + steps.
    """
    delta = start(x, epsilon, init)
    for _ in range(steps):
        grad, _ = input_gradient(model, x, y, delta, step, smoothing)
        delta = box(delta + alpha * quantile_mask(grad, q).sign(), x, epsilon)
    return delta


@checked
def multigrad(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, samples: int = 3,
              threshold: int | None = None, parallel: bool = False, step: Step | None = None,
              smoothing: float = 0.0) -> Tensor:
    """MultiGrad (arXiv 2103.15476): one step along the signs on which several gradients agree.

    delta = box(alpha * s); s is, for each entry, the common sign of the gradients at x + eta_1, ..., x + eta_samples,
    or 0 if they disagree (see `sign_consensus`); eta_i ~ U(-epsilon, epsilon). Passes: 1 + samples.

    Args:
        samples: number of gradients, 1 or more.
        threshold: number of gradients that must agree; None: all.
        parallel: compute all gradients in one batch of samples * B images, over which BatchNorm then normalizes.
    """
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, not {samples}")
    if parallel:
        xs, ys = torch.cat([x] * samples), torch.cat([y] * samples)
        grads = input_gradient(model, xs, ys, start(xs, epsilon), None, smoothing)[0].unflatten(0, (samples, len(x)))
    else:
        grads = torch.stack([input_gradient(model, x, y, start(x, epsilon), step, smoothing)[0]
                             for _ in range(samples)])
    return box(alpha * sign_consensus(grads, samples if threshold is None else threshold), x, epsilon)


@checked
def pgd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, steps: int, restarts: int = 1,
        norm: str = "l_inf", early_stop: bool = False, step: Step | None = None, init: str = "random") -> Tensor:
    """PGD (Madry et al., arXiv 1706.06083).

    delta <- box(delta + alpha * sign(g)), `steps` times from each starting point; g is the gradient at x + delta.
    Passes with one restart: 1 + steps.

    Args:
        restarts: number of restarts, 1 or more; the result is, for each image, the delta with the highest loss.
        early_stop: stop updating an image once it is misclassified.
        init: starting point: "random" in the ball, or "zero".
    """
    best_delta, best_loss = torch.zeros_like(x), x.new_full((len(x),), -math.inf)
    for _ in range(restarts):
        delta = start(x, epsilon, init, norm)
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


@checked
def none(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, step: Step | None = None) -> Tensor:
    """No perturbation (standard training): delta = 0. Passes: 1."""
    return torch.zeros_like(x)


@checked
def nfgsm(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, k: float = 2.0,
          step: Step | None = None, smoothing: float = 0.0) -> Tensor:
    """N-FGSM (de Jorge et al., arXiv 2202.01181): FGSM from larger noise, without projection to the ball.

    delta = eta + alpha * sign(g); eta ~ U(-k * epsilon, k * epsilon). x + delta is clipped to [0, 1], but delta is not
    projected to the ball, so abs(delta) can reach k * epsilon + alpha. Passes: 2.
    """
    eta = start(x, k * epsilon)
    grad, _ = input_gradient(model, x, y, eta, step, smoothing)
    return box(eta + alpha * grad.sign(), x, math.inf)


@checked
def sora(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, step: Step, norm: str = "l_inf") -> Tensor:
    """SORA (arXiv 2606.00738): a step of random length that shrinks as the loss becomes less linear. Passes: 2.

    delta = eta + a * r * sign(g); eta ~ U(-epsilon, epsilon); r ~ U(0, 1) for each entry. x + delta is clipped to
    [0, 1], but delta is not projected to the ball, so abs(delta) can reach 3 * epsilon.

    a = 2 * epsilon * min(1, 0.02 / (1 - v)). v measures how well g predicts g', the gradient at x + delta: it starts at
    0.99 and is updated after each step (see `sora_update`).

    For l_2, g / norm2(g) replaces sign(g). The authors' code has a function for this, but no flag that selects it.
    """
    if "sora" not in step.kept:
        step.kept["sora"] = torch.full((), 0.99, dtype=torch.float64, device=x.device)
    eta = start(x, epsilon, norm=norm)
    g, _ = input_gradient(model, x, y, eta, step)
    step.direction = steepest(g, norm)
    a = 2 * epsilon * (0.02 / (1 - step.kept["sora"]).clamp(min=1e-12)).clamp(max=1)
    return box(eta + a.to(x.dtype) * torch.rand_like(x) * step.direction, x, math.inf)


def sora_update(step: Step, x: Tensor, delta: Tensor, grad: Tensor, epsilon: float) -> None:
    """Update SORA's v: v <- 0.95 * v + 0.05 * clip(mean(<d, g'> / <d, g>), -1, 1).

    g' = `grad`; d = sign(g) or, for l_2, g / norm2(g).
    """
    v = step.kept["sora"]
    along, before = ((step.direction * each).flatten(1).sum(dim=1) for each in (grad, step.gradient))
    ratio = along / before.clamp(min=1e-12)
    u = step.mean(ratio)  # not finite if float16 overflows; the optimizer step is then skipped, too
    v.copy_(torch.where(u.isfinite(), 0.95 * v + 0.05 * u.clamp(-1, 1), v))


@checked
def ckpt(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, count: int = 3,
         step: Step | None = None, mode: str = "eval", smoothing: float = 0.0) -> Tensor:
    """FGSM-RS with checkpoints, points on the way to delta (Kim et al., arXiv 2010.01799).

    Passes: 2 + (count - 1) / 3.

    delta = (k / count) * delta_RS; delta_RS is the result of FGSM-RS. For each image, k is the smallest of
    1 .. count - 1 at which the model in eval mode misclassifies the image, else count. delta = 0 for an image that is
    misclassified at its random starting point. The pass at the starting point, which gives delta_RS, is in eval mode,
    as in the authors' code, or, with `mode` "train", in the model's current mode, as in FastAT_Benchmark.
    """
    eta = start(x, epsilon)
    with eval_mode(model) if mode == "eval" else contextlib.nullcontext():
        grad, logits = input_gradient(model, x, y, eta, step, smoothing)
    delta = box(eta + alpha * grad.sign(), x, epsilon)
    share = torch.ones(len(x), dtype=x.dtype, device=x.device)
    with torch.no_grad(), frozen(model), eval_mode(model):
        for k in range(count - 1, 0, -1):  # descending, so the smallest k is written last
            wrong = model(x + k / count * delta).argmax(dim=1) != y
            share = torch.where(wrong, k / count, share)
    share = torch.where(logits.argmax(dim=1) != y, 0, share)
    return _per_image(share) * delta


@checked
def free(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, step: Step) -> Tensor:
    """Free adversarial training (Shafahi et al., arXiv 1904.12843). Passes: 1.

    delta <- box(delta + epsilon * sign(g)). One backward pass gives the gradient of the weights and g. Each batch is
    used --free-replays times. delta is stored by position in the batch: a new batch starts from the delta of the
    previous batch, clipped for the new images; the first batch starts from 0.
    """
    places = torch.arange(len(step.whole), device=x.device)
    kept = step.kept.get("free")
    if kept is None or len(kept) < len(places):
        kept = step.kept["free"] = torch.zeros(len(places), *x.shape[1:], device=x.device)
    return box(kept[places[step.rank::step.size]].to(x.dtype), x, epsilon)


def free_update(step: Step, x: Tensor, delta: Tensor, grad: Tensor, epsilon: float) -> None:
    """Update Free's delta: delta <- box(delta + epsilon * sign(g)), with g = `grad`."""
    places = torch.arange(len(step.whole), device=x.device)
    step.store("free", box(delta + epsilon * grad.sign().nan_to_num(), x, epsilon), places)


@checked
def pgi(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, step: Step, reset: int = 40,
        smoothing: float = 0.0) -> Tensor:
    """FGSM-MEP, the momentum variant of FGSM-PGI (Jia et al., arXiv 2207.08859).

    Passes with the objective `logits`: 2.7.

    For each training image, an initial perturbation D and a momentum M are stored:

        delta = box(D + alpha * sign(g))
        M <- 0.3 M + g / norm1(g), with norm1 over the global batch
        D <- box(D + alpha * sign(M))

    g is the gradient at x + D of the cross-entropy with label smoothing `smoothing`. Every `reset` epochs, D becomes a
    random corner of the ball and M becomes 0. D is not cropped or flipped with its image.

    D and M are stored in half precision. M is stored multiplied by 128 * C * H * W, so that its entries are about 1
    with batches of 128.
    """
    for name in ("pgi", "pgi momentum"):
        step.reserve(name, x, *x.shape[1:])
    if step.epoch % reset == 0:
        d, m = corners(x, epsilon), torch.zeros_like(x)
    else:
        d, m = (step.kept[name][step.index].to(x.dtype) for name in ("pgi", "pgi momentum"))
    grad, _ = input_gradient(model, x, y, d, step, smoothing)
    grad = grad * len(y)  # gradient of the sum, since the processes' shares of a last batch can differ by one image
    norm = step.sum(grad.abs().sum()) / (128 * x[0].numel())
    m = 0.3 * m + grad / norm.clamp(min=torch.finfo(grad.dtype).tiny)
    step.store("pgi", box(d + alpha * m.sign(), x, epsilon), step.whole)
    step.store("pgi momentum", m, step.whole)
    return box(d + alpha * grad.sign(), x, epsilon)


@checked
def liet(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, step: Step, smoothing: float,
         noise: tuple[float, float], every: int) -> Tensor:
    """LIET (ICCV 2025): FGSM from a perturbation of the label's class. Passes with the objective `liet`: 2.7.

        L_c = epsilon * sign(gradient of nCE(f(G), c) with respect to G), in eval mode; all pixels of G are 0.5
        eta = t * L_y, each entry replaced, with probability rho, by U(-h, h); then clipped to the pixel range
        delta = box(eta + alpha * sign(g))

    g is the gradient of nCE at x + eta, nCE the cross-entropy with non-uniform label smoothing (`Step.nonuniform_ce`).
    L is recomputed every `every` batches, counted from the first batch of an epoch. t = 1 or -1 and rho ~ U(noise) are
    drawn once per batch. Up to epsilon 8/255, h = epsilon. Above, h = 2 * epsilon, and box clips to the pixel range
    only, so abs(delta) can reach 2 * epsilon + alpha.
    """
    if step.batch % every == 0 or "liet" not in step.kept:
        grey, classes = x.new_full((step.classes, *x.shape[1:]), 0.5), torch.arange(step.classes, device=x.device)
        with eval_mode(model):
            slope, _ = gradient(model, grey, torch.zeros_like(grey),
                                lambda logits: step.nonuniform_ce(logits, classes, smoothing))
        step.kept["liet"] = step.same(slope.sign())
    low, high = noise
    u, coin = step.same(torch.rand(2, dtype=x.dtype, device=x.device))
    h, radius = (epsilon, epsilon) if epsilon <= 8 / 255 else (2 * epsilon, math.inf)
    replaced = torch.rand_like(x) < low + (high - low) * u
    d = torch.where(replaced, in_ball(x, h), epsilon * step.kept["liet"][y])
    eta = box((2 * coin - 1).sign() * d, x, math.inf)
    grad, _ = first_gradient(model, x, eta, lambda logits: step.nonuniform_ce(logits, y, smoothing), step)
    return box(eta + alpha * grad.sign(), x, radius)


@checked
def uap(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, step: Step, a: float,
        smoothing: float = 0.0) -> Tensor:
    """FGSM-UAP (Pan et al., AAAI 2024): FGSM from one perturbation for all images.

    Passes with the objective `logits`: 2.7.

        eta = box(u)
        delta = box(eta + alpha * sign(g))

    g is the gradient at x + eta of the cross-entropy with label smoothing `smoothing`. u starts at a random corner of
    the ball of radius a, and moves after each step (see `uap_update`).
    """
    return _from_universal(model, x, y, epsilon, alpha, step, a, smoothing, 1, torch.zeros_like(y))


@checked
def cuap(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, step: Step, a: float,
         smoothing: float = 0.0) -> Tensor:
    """FGSM-CUAP (Pan et al., AAAI 2024): `uap` with a perturbation for each class, eta = box(u_y).

    Passes with the objective `logits`: 2.7.
    """
    return _from_universal(model, x, y, epsilon, alpha, step, a, smoothing, step.classes, y)


@checked
def fuap(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, step: Step, a: float, count: int = 50,
         smoothing: float = 0.0) -> Tensor:
    """FGSM-FUAP (Pan et al., AAAI 2024): `uap` with `count` perturbations, chosen by an image's features.

    Passes with the objective `logits`: 3.

    eta = box(v + u_j), v ~ U(-epsilon, epsilon), j the group of x + v (see `fuap_groups`).
    """
    v = start(x, epsilon)
    groups = fuap_groups(features(model, x + v), y, step, count, smoothing)
    return _from_universal(model, x, y, epsilon, alpha, step, a, smoothing, count, groups, v)


def _from_universal(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, step: Step, a: float,
                    smoothing: float, count: int, rows: Tensor, v: Tensor | float = 0.0) -> Tensor:
    """Return delta after one step from eta = box(v + u_k); k = `rows`, (B,), for each image. u is stored as u / a."""
    if "uap" not in step.kept or len(step.kept["uap"]) != count:
        u = (2 * torch.rand(count, *x.shape[1:], dtype=x.dtype, device=x.device) - 1).sign()
        step.kept["uap"], step.kept["uap momentum"] = step.same(u), torch.zeros_like(u)
    step.rows = rows
    eta = box(v + a * step.kept["uap"][rows], x, epsilon)
    grad, _ = input_gradient(model, x, y, eta, step, smoothing)
    return box(eta + alpha * grad.sign(), x, epsilon)


def uap_update(step: Step, x: Tensor, delta: Tensor, grad: Tensor, epsilon: float, decay: float) -> None:
    """Update the perturbations u_k that images of the global batch started from (FGSM-UAP and its variants).

        m_k <- decay * m_k + mean(G_i) / norm1(G), the mean over the images i that started from u_k
        u_k <- clip(u_k + a * sign(m_k), -a, a)

    G = g + g'. g is the gradient of the attack's loss and g' (`grad`) the gradient of the training loss, both with
    respect to eta. The authors' code accumulates the two gradients in one tensor, too.
    """
    u, m = step.kept["uap"], step.kept["uap momentum"]
    total = len(x) * (step.gradient + grad)  # of the sum over images, since the processes' shares can differ by one
    norm = step.sum(total.abs().sum()).clamp(min=torch.finfo(x.dtype).tiny)
    chosen = (step.rows == torch.arange(len(u), device=x.device).unsqueeze(1)).to(x.dtype)
    count = step.sum(chosen.sum(dim=1)).view(-1, 1, 1, 1)
    mean = step.sum(chosen @ total.flatten(1)).view_as(m) / count.clamp(min=1)
    moves = (count > 0) & norm.isfinite()  # float16 may overflow; the optimizer step is then skipped, too
    m.copy_(torch.where(moves, decay * m + mean / norm, m))
    u.copy_(torch.where(moves, (u + m.sign()).clamp(-1, 1), u))


def features(model: nn.Module, x: Tensor) -> Tensor:
    """Return the input of the last nn.Linear at x, (B, features), in float32 or better, without a gradient."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("fuap groups images by the input of the network's last nn.Linear: this network has none")
    seen: list[Tensor] = []
    with layers[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])), \
            torch.compiler.set_stance("force_eager"), torch.no_grad(), frozen(model):  # compiled code has no hooks
        model(x)
    return seen[-1].to(torch.promote_types(seen[-1].dtype, torch.float32))


def fuap_groups(phi: Tensor, y: Tensor, step: Step, count: int, smoothing: float) -> Tensor:
    """Return the group of each image, (B,), from 0 to count - 1.

    The groups come from a head, a small classifier of the features phi with two linear layers, A, b and C, d:

        s = A phi + b; group = argmax(s); loss = CE(C relu(s) + d, y)

    Each call also trains the head: one step of Adam (learning rate 0.001, betas 0.9 and 0.999, epsilon 1e-8) on the
    mean loss of the global batch, with label smoothing `smoothing`. The head is initialized like nn.Linear.

    Args:
        phi: features, (B, features).
    """
    shapes = (count, phi.shape[1]), (count,), (step.classes, count), (step.classes,)
    sizes = [math.prod(shape) for shape in shapes]
    if "fuap head" not in step.kept or len(step.kept["fuap head"]) != sum(sizes):
        fans = phi.shape[1], phi.shape[1], count, count
        bounds = torch.cat([phi.new_full((size,), fan**-0.5) for size, fan in zip(sizes, fans)])
        drawn, = 2 * torch.rand(1, len(bounds), dtype=phi.dtype, device=phi.device) - 1
        step.kept["fuap head"] = step.same(bounds * drawn)
        step.kept["fuap moments"] = torch.zeros(2, len(bounds), dtype=phi.dtype, device=phi.device)
        step.kept["fuap steps"] = torch.zeros((), dtype=torch.float64, device=phi.device)
    weights, (first, second) = step.kept["fuap head"], step.kept["fuap moments"]
    leaf = weights.clone().requires_grad_()
    with torch.enable_grad(), torch.autocast(phi.device.type, enabled=False):
        a, b, c, d = (part.view(shape) for part, shape in zip(leaf.split(sizes), shapes))
        s = F.linear(phi, a, b)
        loss = F.cross_entropy(F.linear(s.relu(), c, d), y, label_smoothing=smoothing)
        grad, = torch.autograd.grad(loss * (len(y) / len(step.whole)), leaf)
    grad, t = step.sum(grad), step.kept["fuap steps"].add_(1)
    first.lerp_(grad, 0.1)
    second.lerp_(grad.square(), 0.001)
    weights -= 0.001 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return s.argmax(dim=1)


@checked
def pco(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, step: Step,
        smoothing: float = 0.0) -> Tensor:
    """The attack of FGSM-PCO (Wang et al., arXiv 2407.12443). Passes with the objective `pco`: 3.7.

    delta = box(D + alpha * sign(g)); then D <- delta, stored for each image. In the first epoch, D is a random corner
    of the ball.

    g is the gradient at x + D of the cross-entropy with label smoothing `smoothing`. D is not cropped or flipped with
    its image, x + D is not clipped to [0, 1], and D is stored in half precision.
    """
    step.reserve("pco", x, *x.shape[1:])
    d = corners(x, epsilon) if step.epoch == 0 else step.kept["pco"][step.index].to(x.dtype)
    grad, _ = input_gradient(model, x, y, d, step, smoothing)
    delta = box(d + alpha * grad.sign(), x, epsilon)
    step.store("pco", delta, step.whole)
    return delta


@checked
def kl(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, steps: int = 10,
       step: Step | None = None) -> Tensor:
    """The attack of TRADES (Zhang et al., arXiv 1901.08573). Passes with the objective `trades`: 2.3 + steps.

    delta <- box(delta + alpha * sign(g)), `steps` times from 0.001 * N(0, 1); g is the gradient of
    KL(p(x) || p(x + delta)) with the model in eval mode.
    """
    delta = 0.001 * torch.randn_like(x)
    with eval_mode(model):
        with torch.no_grad(), frozen(model):
            target = model(x).float().softmax(dim=1)
        for _ in range(steps):
            grad, _ = gradient(model, x, delta, lambda logits: F.kl_div(
                logits.float().log_softmax(dim=1), target, reduction="batchmean"))
            delta = box(delta + alpha * grad.sign(), x, epsilon)
    return delta


@checked
def nuclear(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, weight: float,
            step: Step | None = None, smoothing: float = 0.0) -> Tensor:
    """The attack of NuAT (Sriramanan et al., NeurIPS 2021). Passes with the objective `nuclear`: 3.3.

    delta = box(eta + alpha * sign(g)), eta = epsilon / 2 or -epsilon / 2 at random for each entry. g is the gradient at
    x + eta of CE(f(x + eta), y); in every second batch (never without `step`), it is instead that of

        CE(f(x + eta), y) + ramp * weight * norm_nuclear(f(x) - f(x + eta)) / B, with `Step.ramp`.

    f(x) is computed in the model's current mode (train mode during training), f(x + eta) in eval mode.
    """
    return alternating(model, x, y, epsilon, alpha, smoothing, step, lambda step, clean, logits: weight * step.ramp * (
        torch.linalg.matrix_norm(clean - logits, ord="nuc") / len(x)))


@checked
def guided(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, weight: float,
           step: Step | None = None, smoothing: float = 0.0) -> Tensor:
    """The attack of GAT (Sriramanan et al., arXiv 2011.14969). Passes with the objective `guided`: 3.3.

    delta = box(eta + alpha * sign(g)), eta = epsilon / 2 or -epsilon / 2 at random for each entry. g is the gradient at
    x + eta of CE(f(x + eta), y); in every second batch (never without `step`), it is instead that of

        CE(f(x + eta), y) + boost * weight * mean_i(sum_c((p_c(x) - p_c(x + eta))^2)), with `Step.boost`.

    p(x) is computed in the model's current mode (train mode during training), f(x + eta) in eval mode.
    """
    return alternating(model, x, y, epsilon, alpha, smoothing, step, lambda step, clean, logits: weight * step.boost * (
        (clean.softmax(dim=1) - logits.softmax(dim=1)).square().sum(dim=1).mean()))


def alternating(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, smoothing: float,
                step: Step | None, term: Callable[[Step, Tensor, Tensor], Tensor]) -> Tensor:
    """Return delta after one FGSM step in eval mode from eta = ±epsilon / 2, at random for each entry.

    In every second batch, the loss includes `term`.

    Args:
        term: (step, f(x) in the model's current mode, f(x + eta) in eval mode) -> scalar; both logits in float32.
    """
    delta = corners(x, epsilon / 2).clamp(-x, 1 - x)
    with torch.no_grad(), frozen(model):
        clean = model(x).float()  # in every batch, as published, since it updates BatchNorm's running statistics

    def loss(logits: Tensor) -> Tensor:
        ce = F.cross_entropy(logits, y, label_smoothing=smoothing)
        return ce if step is None or step.batch % 2 == 0 else ce + term(step, clean, logits.float())

    with eval_mode(model):
        grad, _ = gradient(model, x, delta, loss)
    return box(delta + alpha * grad.sign(), x, epsilon)


@checked
def n_lap(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, beta: float, step: Step, k: float = 2.0,
          up: bool = False) -> Tensor:
    """N-LAP: N-FGSM with layer-aware weight perturbations (Lin et al., arXiv 2405.16262). Passes: 2.

    delta = eta + alpha * sign(g); eta ~ U(-k * epsilon, k * epsilon). x + delta is clipped to [0, 1], but delta is not
    projected to the ball, so abs(delta) can reach k * epsilon + alpha. The backward pass that gives g also gives the
    gradients of the weights, with which `lap_gradient` moves the weights. The training loss is computed at the moved
    weights.
    """
    eta = start(x, k * epsilon)
    grad = lap_gradient(model, x, y, eta, beta, up, step)
    return box(eta + alpha * grad.sign(), x, math.inf)


@checked
def r_lap(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, alpha: float, beta: float, step: Step,
          init: str = "random", up: bool = False) -> Tensor:
    """R-LAP and, with init "zero", LAP from zero (Lin et al., arXiv 2405.16262). Passes: 2.

    delta = box(eta + alpha * sign(g)) as in `fgsm`. The weights move as in `n_lap`.
    """
    eta = start(x, epsilon, init)
    grad = lap_gradient(model, x, y, eta, beta, up, step)
    return box(eta + alpha * grad.sign(), x, epsilon)


def lap_gradient(model: nn.Module, x: Tensor, y: Tensor, eta: Tensor, beta: float, up: bool, step: Step) -> Tensor:
    """Return g, the gradient at x + eta with respect to eta, and move the weights, with one backward pass for both.

        w_l <- w_l - beta * (1 - (ln l / ln L)^0.3) * norm2(w_l) * b_l / norm2(b_l), with + in place of - if `up`

    w_1, ..., w_L are the weights of two or more dimensions, in the order of the network's parameters; biases and
    BatchNorm's weights stay. b_l = mu * m_l + G_l + lambda * w_l is the step that SGD would take next, with its
    momentum mu, momentum buffer m_l and weight decay lambda; G_l is the gradient of the global batch's mean
    cross-entropy at x + eta. At the learning rate 0, nothing moves.

    Source: the authors' code, which moves the weights down the loss; the paper (arXiv 2405.16262) moves them up.
    Neither restores the weights.
    """
    layers = [weight for weight in step.network.parameters() if weight.dim() > 1 and weight.requires_grad]
    eta = eta.detach().requires_grad_()
    scale = loss_scale(x)
    with torch.enable_grad():
        loss = F.cross_entropy(model(x + eta), y)
        grad, *slopes = torch.autograd.grad(loss * scale, [eta, *layers])
    sgd, share = step.optimizer.param_groups[0], len(y) / len(step.whole) / scale
    with torch.no_grad():
        for number, (weight, slope) in enumerate(zip(layers, slopes if sgd["lr"] else ()), 1):
            buffer = step.optimizer.state[weight]["momentum_buffer"]
            b = sgd["momentum"] * buffer + step.sum(share * slope) + sgd["weight_decay"] * weight
            direction = (b / b.norm()).nan_to_num(0.0, 0.0, 0.0)  # 0 also where float16 overflows
            size = beta * (1 - (math.log(number) / math.log(max(len(layers), 2))) ** 0.3) * weight.norm()
            weight.add_(size * (direction if up else -direction))
    torch.clear_autocast_cache()  # of the weights before they moved
    return grad / scale


@checked
def atas(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, step: Step, c: float = 0.01, warmup: int = 5,
         reset: int = 10) -> Tensor:
    """ATAS (Huang et al., arXiv 2206.02417): a step from a stored perturbation, shorter where gradients are large.

    For each training image i, a perturbation D_i of the padded image and a number v_i, which starts at 0, are stored:

        eta_i = box(D_i), cropped and flipped like the image
        v_i <- (v_i + norm2(g_i)^2) / 2
        a_i = 16/255 / (1 + sqrt(v_i) / c), clipped to [4/255, 14/255]
        delta_i = box(eta_i + a_i * sign(g_i))
        the cropped window of D_i <- delta_i, flipped back

    g is the gradient with the model in eval mode. norm2(g_i) is multiplied by B / 128, since c was published for
    batches of 128. In the first `warmup` epochs, a_i = epsilon, and v stays. D is drawn uniformly from the ball in the
    first epoch and in every `reset`-th epoch, but not in the run's last epoch. D is stored in half precision.
    Passes: 2.
    """
    height, width = x.shape[2:]
    padded = (len(x), x.shape[1], height + 2 * step.padding, width + 2 * step.padding)
    step.reserve("atas", x, *padded[1:])
    step.reserve("atas v", x)
    number = step.epoch + 1
    if number == 1 or (number % reset == 0 and number < step.epochs):
        d = torch.empty(padded, dtype=x.dtype, device=x.device).uniform_(-epsilon, epsilon)
    else:
        d = step.kept["atas"][step.index].to(x.dtype)
    window = crop(x, step.drawn)
    eta = box(d[window].permute(0, 3, 1, 2), x, epsilon)
    with eval_mode(model):
        grad, _ = gradient(model, x, eta, lambda logits: F.cross_entropy(logits, y))
    a: float | Tensor = epsilon
    if number > warmup:
        v = (step.kept["atas v"][step.index] + (len(x) / 128 * _norm(grad).flatten()) ** 2) / 2
        step.store("atas v", v, step.whole)
        a = _per_image((16 / 255 / (1 + v.sqrt() / c)).clamp(4 / 255, 14 / 255))
    delta = box(eta + a * grad.sign(), x, epsilon)
    d[window] = delta.permute(0, 2, 3, 1)
    step.store("atas", d, step.whole)
    return delta


def crop(x: Tensor, drawn: dict[str, Tensor]) -> tuple[Tensor | slice, ...]:
    """Return the index that cuts each image's crop, flipped like the image, out of its padded image.

    padded[index] of padded images (B, C, H', W') is (B, H, W, C). An assignment to padded[index] flips back.

    Args:
        x: images, (B, C, H, W).
        drawn: "top", "left" and "flip" of the augmentation, each (B,).
    """
    rows, cols = (torch.arange(size, device=x.device) for size in x.shape[2:])
    top, left, flip = (drawn[name].view(-1, 1, 1) for name in ("top", "left", "flip"))
    cols = torch.where(flip, len(cols) - 1 - cols, cols)
    return torch.arange(len(x), device=x.device).view(-1, 1, 1), slice(None), top + rows.view(-1, 1), left + cols


def pgd_step(delta: Tensor, grad: Tensor, x: Tensor, epsilon: float, alpha: float, norm: str = "l_inf") -> Tensor:
    """Return `delta` after one PGD step along `grad`, projected to the ball and clipped to the pixel range."""
    return box(delta + alpha * steepest(grad, norm), x, epsilon, norm)


def steepest(grad: Tensor, norm: str) -> Tensor:
    """Return the direction of norm 1 in which the loss grows fastest: sign(g) or, for "l_2", g / norm2(g)."""
    if norm == "l_inf":
        return grad.sign()
    grad = grad.nan_to_num()  # entries may overflow in float16; the sign of NaN is 0, too
    return grad / _norm(grad)


def quantile_mask(grad: Tensor, q: float) -> Tensor:
    """Return `grad` (B, C, H, W) with 0 for entries whose magnitude is strictly below their image's q-quantile.

    The quantile may lie between two sorted magnitudes (linear interpolation). The smallest kept entry is the first one
    at or above the quantile; finding it needs no full sort.

    Raises:
        ValueError: q is not in [0, 1].
    """
    if not 0 <= q <= 1:
        raise ValueError(f"q must be from 0 to 1, not {q}")
    magnitude = grad.abs().flatten(1)
    below = math.ceil(q * (magnitude.shape[1] - 1))  # number of entries before the smallest kept one in sorted order
    smallest_kept = magnitude.topk(magnitude.shape[1] - below, dim=1, sorted=False).values.amin(dim=1)
    return grad.masked_fill(grad.abs() < _per_image(smallest_kept), 0)


def sign_consensus(grads: Tensor, threshold: int) -> Tensor:
    """Return the sign on which at least `threshold` of n gradients agree, and 0 where they do not.

    As published, computed from the sum of signs: s = sum_i sign(g_i); the result is sign(s) where abs(s) >=
    2 * threshold - n, else 0. Both definitions are equal if no gradient entry is 0 and threshold > n / 2.

    Args:
        grads: the gradients g_i, (n, B, C, H, W).
        threshold: from 1 to n.

    Returns:
        -1, 0 or 1 for each entry, (B, C, H, W).

    Raises:
        ValueError: threshold is not in 1 .. n.
    """
    n = len(grads)
    if not 1 <= threshold <= n:
        raise ValueError(f"threshold must be from 1 to the {n} samples, not {threshold}")
    s = grads.sign().sum(dim=0)
    return s.masked_fill(s.abs() < threshold - (n - threshold), 0).sign()


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, step: Step | None = None,
                   smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the gradient of the mean cross-entropy at x + delta with respect to delta, and the logits, both detached.

    The first call in a training step stores its results in `step` for the objective.
    """
    return first_gradient(model, x, delta, lambda logits: F.cross_entropy(logits, y, label_smoothing=smoothing), step)


def first_gradient(model: nn.Module, x: Tensor, delta: Tensor, mean_loss: Callable[[Tensor], Tensor],
                   step: Step | None = None) -> tuple[Tensor, Tensor]:
    """Like `gradient`, with logits detached. The first call in a training step stores its results in `step`."""
    first = step if step and step.start is None else None
    delta = delta.detach().requires_grad_(first is not None and first.keeps_graph)
    grad, logits = gradient(model, x, delta, mean_loss, keep=delta.requires_grad)
    if first:
        first.start, first.logits, first.gradient = delta, logits, grad
    return grad, logits.detach()


def gradient(model: nn.Module, x: Tensor, delta: Tensor, mean_loss: Callable[[Tensor], Tensor],
             keep: bool = False) -> tuple[Tensor, Tensor]:
    """Return the gradient of `mean_loss(logits)` at x + delta with respect to delta, and the logits.

    Args:
        mean_loss: logits (B, classes) to a scalar, a mean over images.
        keep: return logits with their graph, so that an objective can backpropagate through them to the parameters and
            to delta, a leaf that requires a gradient. By default the parameters are frozen, which saves time and
            memory, and the logits are detached.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("attacks need gradients: call them outside torch.inference_mode() (torch.no_grad() is fine)")
    delta = delta if keep else delta.detach().requires_grad_()
    with contextlib.nullcontext() if keep else frozen(model), torch.enable_grad():
        logits = model(x + delta)
        scale = loss_scale(x)
        grad, = torch.autograd.grad(mean_loss(logits) * scale, delta, retain_graph=keep)
    return grad / scale, logits if keep else logits.detach()


def loss_scale(x: Tensor) -> int:
    """Return a power of 2 that, as a factor of the batch's mean loss, keeps float16 gradients from vanishing."""
    return 8 * 2 ** (len(x) - 1).bit_length()


def confident_gradient(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor,
                       loss: str = "ce") -> tuple[Tensor, Tensor]:
    """Like `input_gradient`, but with gradients that do not vanish when the model is confident.

    Loss "ce": m = logsumexp_{k != y} f_k - f_y. The cross-entropy is log(1 + exp(m)), so its gradient is that of m
    times a positive factor for each image. This factor rounds to 0 where the probability of the label rounds to 1; the
    gradient of m does not. The result is for attacks that use only the sign or the direction of the gradient.

    Loss "cw" (Carlini and Wagner, arXiv 1608.04644): m = max_{k != y} f_k - f_y.
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
    """Return the starting point: "zero", or "random" in the ball of `norm`, clipped to the pixel range.

    Raises:
        ValueError: init is not "zero" or "random", or norm is not "l_inf" or "l_2".
    """
    if init == "zero":
        return torch.zeros_like(x)
    if init != "random" or norm not in ("l_inf", "l_2"):
        raise ValueError(f"init must be zero or random and norm l_inf or l_2, not {init!r} and {norm!r}")
    return in_ball(x, epsilon, norm).clamp(-x, 1 - x)


def in_ball(like: Tensor, epsilon: float, norm: str = "l_inf") -> Tensor:
    """Return a random point of each image's ball, of the shape of `like`.

    "l_inf": uniform in the ball. "l_2": uniform direction, length ~ U(0, epsilon).
    """
    if norm == "l_inf":
        return torch.empty_like(like).uniform_(-epsilon, epsilon)
    delta = torch.randn_like(like)
    radius = epsilon * torch.rand(len(like), dtype=like.dtype, device=like.device)
    return delta * (_per_image(radius) / _norm(delta))


def magnitude(delta: Tensor, norm: str) -> Tensor:
    """Return abs(delta) or, for "l_2", each image's norm, (B, 1, 1, 1)."""
    return delta.abs() if norm == "l_inf" else _norm(delta)


def corners(x: Tensor, size: float) -> Tensor:
    """Return size or -size at random for each entry of x."""
    return size * (2 * torch.rand_like(x) - 1).sign()


def check_images(x: Tensor) -> None:
    """Raise ValueError unless the images are float in [0, 1], up to rounding errors."""
    if not x.is_floating_point():
        raise ValueError(f"images must be float in [0, 1], not {x.dtype}")
    if len(x):
        low, high = torch.stack(x.aminmax()).tolist()
        rounding = max(1e-6, 4 * torch.finfo(x.dtype).eps)
        if not (low >= -rounding and high <= 1 + rounding):
            raise ValueError(f"images must be in [0, 1], not from {low:.3g} to {high:.3g}: divide pixels in 0 to 255 "
                             f"by 255, and leave normalization to the network")


def require_finite(values: Tensor) -> None:
    """Raise ValueError unless all values are finite."""
    if not values.isfinite().all():
        raise ValueError("the network's logits or gradients are not finite")


def check_epsilon(epsilon: float, norm: str = "l_inf") -> None:
    """Raise ValueError unless epsilon is from 0 to 1 or, for "l_2", 0 or more."""
    if not 0 <= epsilon <= (1 if norm == "l_inf" else math.inf):
        rule = "from 0 to 1, such as 8/255" if norm == "l_inf" else "0 or more, such as 128/255"
        raise ValueError(f"epsilon must be in pixel units, {rule}, not {epsilon}")


@torch.no_grad()
def box(delta: Tensor, x: Tensor, epsilon: float, norm: str = "l_inf") -> Tensor:
    """Project `delta` to the ball of radius epsilon, then clip it to [-x, 1 - x]."""
    inside = delta.clamp(-epsilon, epsilon) if norm == "l_inf" else delta * (epsilon / _norm(delta).clamp(min=epsilon))
    return inside.clamp(-x, 1 - x)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters in this context: no gradients are computed for them, and less memory is used."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode in this context; afterwards, every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _norm(values: Tensor) -> Tensor:
    """Return each image's l_2 norm, at least the smallest positive float: (B, C, H, W) -> (B, 1, 1, 1)."""
    return _per_image(values.flatten(1).norm(dim=1).clamp(min=torch.finfo(values.dtype).tiny))
