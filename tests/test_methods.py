"""The methods of other papers: what they compute, against their formulas written out again here, and how they are run.

A reference is a function of a network, images, labels, epsilon and a namespace `at`, which plays the part of `Step`. It
draws the same random numbers in the same order, and makes the forward passes that were published, in the same modes, so
that BatchNorm's running statistics have to agree too. None of it calls attacks.py or objectives.py.
"""
import copy
import dataclasses
import json
import math
import shutil
import signal
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import DATASETS, SMALL, Calls, SmallNet, a_step, assert_same, assert_same_run, interrupt
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import forked, together
from torch import nn
from torch.optim import swa_utils

from singlestep import attacks, checkpoints, data, methods, networks, objectives, options, train
from singlestep.attacks import Step
from singlestep.run.console import StopSignals
from singlestep.run.device import seed_everything
from singlestep.run.distributed import CPU, World
from singlestep.run.folder import Folder
from singlestep.run.state import Average

EPSILON = 8 / 255


# The formulas: building blocks


def each_ce(logits, y):
    """The cross-entropy of each image."""
    return -logits.log_softmax(dim=1)[torch.arange(len(y)), y]


def mean_ce(logits, y, smoothing=0.0):
    """The mean cross-entropy with the target 1 - s + s / K for the label, s / K for the other classes."""
    return (1 - smoothing) * each_ce(logits, y).mean() - smoothing * logits.log_softmax(dim=1).mean()


def slope(net, x, y, delta, smoothing=0.0):
    """The gradient with respect to delta, and the logits with their way back to the weights."""
    delta = delta.clone().requires_grad_()
    logits = net(x + delta)
    g, = torch.autograd.grad(mean_ce(logits, y, smoothing), delta, retain_graph=True)
    return g, logits


def pixels(delta, x):
    return torch.max(torch.min(delta, 1 - x), -x)


def ball(delta, x, epsilon):
    return pixels(torch.clamp(delta, -epsilon, epsilon), x)


def nonuniform_ce(logits, y, a):
    """The mean cross-entropy with the target 1 - a for the label, and for the others a in random proportions."""
    draws, total = torch.rand_like(logits), 0
    for logs, label, r in zip(logits.log_softmax(dim=1), y.tolist(), draws):
        others = [c for c in range(len(r)) if c != label]
        total -= (1 - a) * logs[label] + a * (r[others] * logs[others]).sum() / r[others].sum()
    return total / len(y)


def unit(g):
    """Each image's gradient, of norm 1."""
    return torch.stack([one / one.square().sum().sqrt() for one in g])


def l2_ball(delta, x, epsilon):
    return pixels(torch.stack([one * min(1, epsilon / one.square().sum().sqrt().item()) for one in delta]), x)


def uniform(x, size):
    return torch.empty_like(x).uniform_(-size, size)


def random_start(x, epsilon, norm):
    if norm == "l_inf":
        return pixels(uniform(x, epsilon), x)
    delta, radii = torch.randn_like(x), epsilon * torch.rand(len(x), dtype=x.dtype)
    return pixels(unit(delta) * radii.view(-1, 1, 1, 1), x)


def corners(x, size):
    """Bernoulli noise of -size or size."""
    return size * torch.sign(2 * torch.rand_like(x) - 1)


def singular_sum(matrix):
    """The nuclear norm in float32, in which it is computed."""
    return torch.linalg.svdvals(matrix).sum()


def divergence(clean, perturbed):
    """KL(p || q) of the two answers, the mean over images, in float32, in which it is computed."""
    log_p, log_q = clean.float().log_softmax(dim=1), perturbed.float().log_softmax(dim=1)
    return (clean.float().softmax(dim=1) * (log_p - log_q)).sum() / len(clean)


def change(clean, perturbed):
    """The squared distance of the probabilities, the mean over images, in float32, in which it is computed."""
    p, q = (logits.float().exp() / logits.float().exp().sum(dim=1, keepdim=True) for logits in (clean, perturbed))
    return sum(((one - other) ** 2).sum() for one, other in zip(p, q)) / len(p)


# The perturbations


def none(net, x, y, epsilon, at):
    return x * 0


def fgsm(net, x, y, epsilon, at, alpha, init="random", smoothing=0.0, norm="l_inf"):
    at.eta = eta = x * 0 if init == "zero" else random_start(x, epsilon, norm)
    at.gradient, at.logits = slope(net, x, y, eta, smoothing)
    if norm == "l_2":
        return l2_ball(eta + alpha * unit(at.gradient), x, epsilon)
    return ball(eta + alpha * at.gradient.sign(), x, epsilon)


def nfgsm(net, x, y, epsilon, at, alpha, k=2, smoothing=0.0):
    at.eta = eta = pixels(uniform(x, k * epsilon), x)
    at.gradient, at.logits = slope(net, x, y, eta, smoothing)
    return pixels(eta + alpha * at.gradient.sign(), x)


def pgd(net, x, y, epsilon, at, alpha, steps, norm="l_inf", init="random"):
    """The first pass is the one that objectives compare with."""
    delta, found = x * 0 if init == "zero" else random_start(x, epsilon, norm), []
    for _ in range(steps):
        found.append(slope(net, x, y, delta))
        g = found[-1][0]
        delta = l2_ball(delta + alpha * unit(g), x, epsilon) if norm == "l_2" else ball(
            delta + alpha * g.sign(), x, epsilon)
    at.gradient, at.logits = found[0]
    return delta


def sora(net, x, y, epsilon, at, norm="l_inf"):
    v = at.kept.setdefault("v", 0.99)
    eta = random_start(x, epsilon, norm)
    g, _ = slope(net, x, y, eta)
    a = 2 * epsilon * (min(1, 0.02 / (1 - v)) if v < 1 else 1)

    def after(g_after):
        if norm == "l_2":
            ratios = [((one * other).sum() / one.square().sum()).item() for one, other in zip(g, g_after)]
        else:
            ratios = [(one.sign() * other).sum().item() / max(one.abs().sum().item(), 1e-12)
                      for one, other in zip(g, g_after)]
        at.kept["v"] = 0.95 * v + 0.05 * min(max(sum(ratios) / len(ratios), -1), 1)

    at.after = after
    return pixels(eta + a * torch.rand_like(x) * (unit(g) if norm == "l_2" else g.sign()), x)


def ckpt(net, x, y, epsilon, at, alpha, count=3, mode="eval", smoothing=0.0):
    eta = pixels(uniform(x, epsilon), x)
    net.train(mode == "train")
    g, logits = slope(net, x, y, eta, smoothing)
    delta = ball(eta + alpha * g.sign(), x, epsilon)
    net.eval()
    for i in range(len(x)):
        wrong = [k for k in range(1, count) if net(x[i:i + 1] + k / count * delta[i:i + 1]).argmax() != y[i]]
        share = 0 if logits[i].argmax() != y[i] else wrong[0] / count if wrong else 1
        at.shares.append(share)
        delta[i] *= share
    net.train()
    return delta


def free(net, x, y, epsilon, at):
    if "delta" not in at.kept:
        at.kept["delta"] = torch.zeros_like(x)
    delta = ball(at.kept["delta"][:len(x)].float().to(x.dtype), x, epsilon)  # kept in float32

    def after(g):
        at.kept["delta"][:len(x)] = ball(delta + epsilon * g.sign(), x, epsilon)

    at.after = after
    return delta.clone()


def pgi(net, x, y, epsilon, at, alpha, reset, smoothing=0.0):
    """D and M, times the entries of 128 images, are kept here as they are and, for images in float32, rounded to half
    precision where they are taken up again."""
    entries = 128 * x[0].numel()
    for name in ("D", "M"):
        at.kept.setdefault(name, torch.zeros(at.images, *x.shape[1:], dtype=x.dtype))
    if at.epoch % reset == 0:
        d, m = corners(x, epsilon), x * 0
    else:
        d, m = (at.kept[name][at.index] for name in ("D", "M"))
        if x.dtype == torch.float32:
            d, m = d.half().float(), m.half().float()
    at.gradient, at.logits = slope(net, x, y, d, smoothing)
    m = 0.3 * m / entries + at.gradient / at.gradient.abs().sum()
    at.kept["D"][at.index], at.kept["M"][at.index] = ball(d + alpha * m.sign(), x, epsilon), m * entries
    return ball(d + alpha * at.gradient.sign(), x, epsilon)


def uap(net, x, y, epsilon, at, alpha, a, smoothing=0.0, decay=0.3):
    return from_universal(net, x, y, epsilon, at, alpha, a, smoothing, decay, 1, [0] * len(x), 0)


def cuap(net, x, y, epsilon, at, alpha, a, smoothing=0.0, decay=0.3):
    return from_universal(net, x, y, epsilon, at, alpha, a, smoothing, decay, at.classes, y.tolist(), 0)


def fuap(net, x, y, epsilon, at, alpha, a, count, smoothing=0.0, decay=0.3):
    """The head and its optimizer are PyTorch's, their first weights drawn as the code draws them."""
    v, seen = pixels(uniform(x, epsilon), x), []
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    hook = linear.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    net(x + v)
    hook.remove()
    features, = seen
    if "head" not in at.kept:
        first, second = (nn.utils.skip_init(nn.Linear, *shape, dtype=features.dtype)
                         for shape in ((features.shape[1], count), (count, at.classes)))
        head = nn.Sequential(first, nn.ReLU(), second)
        drawn = 2 * torch.rand(1, sum(p.numel() for p in head.parameters()), dtype=features.dtype).flatten() - 1
        for layer in (first, second):
            for parameter in (layer.weight, layer.bias):
                own, drawn = drawn[:parameter.numel()], drawn[parameter.numel():]
                parameter.data = own.view_as(parameter) / math.sqrt(layer.in_features)
        at.kept["head"], at.adam = head, torch.optim.Adam(head.parameters(), lr=1e-3)
    head = at.kept["head"]
    groups = [max(range(count), key=scores.__getitem__) for scores in head[0](features).tolist()]
    at.adam.zero_grad()
    with torch.enable_grad():
        mean_ce(head(features), y, smoothing).backward()
    at.adam.step()
    return from_universal(net, x, y, epsilon, at, alpha, a, smoothing, decay, count, groups, v)


def from_universal(net, x, y, epsilon, at, alpha, a, smoothing, decay, count, rows, v):
    if "u" not in at.kept:
        at.kept["u"] = a * torch.sign(2 * torch.rand(count, *x.shape[1:], dtype=x.dtype) - 1)
        at.kept["m"] = torch.zeros_like(at.kept["u"])
    u, m = at.kept["u"], at.kept["m"]
    at.start = ball(v + u[rows], x, epsilon).requires_grad_()
    at.logits = net(x + at.start)
    g, = torch.autograd.grad(mean_ce(at.logits, y, smoothing), at.start, retain_graph=True)

    def after(of_loss):
        whole = g + of_loss
        for k in set(rows):
            own = [i for i, row in enumerate(rows) if row == k]
            m[k] = decay * m[k] + sum(whole[i] for i in own) / len(own) / whole.abs().sum()
            u[k] = torch.clamp(u[k] + a * m[k].sign(), -a, a)

    at.after = after
    return ball(at.start.detach() + alpha * g.sign(), x, epsilon)


def liet(net, x, y, epsilon, at, alpha, smoothing, noise, every):
    """L is kept here in epsilons."""
    if at.batch % every == 0:
        net.eval()
        grey = torch.full((at.classes, *x.shape[1:]), 0.5, dtype=x.dtype, requires_grad=True)
        at.kept["L"], = torch.autograd.grad(nonuniform_ce(net(grey), torch.arange(at.classes), smoothing), grey)
        at.kept["L"] = at.kept["L"].sign()
        net.train()
    u, coin = torch.rand(2, dtype=x.dtype).tolist()
    rho, t = noise[0] + u * (noise[1] - noise[0]), 1 if coin > 0.5 else -1
    mask = torch.rand_like(x) < rho
    large = epsilon > 8 / 255
    d = epsilon * at.kept["L"][y]
    d[mask] = uniform(x, 2 * epsilon if large else epsilon)[mask]
    eta = pixels(t * d, x).requires_grad_()
    at.logits = net(x + eta)
    g, = torch.autograd.grad(nonuniform_ce(at.logits, y, smoothing), eta, retain_graph=True)
    delta = eta.detach() + alpha * g.sign()
    return pixels(delta, x) if large else ball(delta, x, epsilon)


def pco(net, x, y, epsilon, at, alpha, smoothing=0.0):
    """D is kept here as it is and, for images in float32, rounded to half precision where it is taken up again."""
    kept = at.kept.setdefault("history", torch.zeros(at.images, *x.shape[1:], dtype=x.dtype))
    if at.epoch == 0:
        d = corners(x, epsilon)
    else:
        d = kept[at.index].half().float() if x.dtype == torch.float32 else kept[at.index]
    at.eta = d
    at.gradient, at.logits = slope(net, x, y, d, smoothing)
    kept[at.index] = ball(d + alpha * at.gradient.sign(), x, epsilon)
    return kept[at.index].clone()


def kl(net, x, y, epsilon, at, alpha, steps=10):
    delta = 0.001 * torch.randn_like(x)
    net.eval()
    clean = net(x).detach()
    for _ in range(steps):
        delta = delta.clone().requires_grad_()
        g, = torch.autograd.grad(divergence(clean, net(x + delta)), delta)
        delta = ball(delta.detach() + alpha * g.sign(), x, epsilon)
    net.train()
    return delta


def nuclear(net, x, y, epsilon, at, alpha, weight, smoothing=0.0):
    delta = pixels(corners(x, epsilon / 2), x).requires_grad_()
    clean = net(x).detach()
    net.eval()
    logits = net(x + delta)
    loss = mean_ce(logits, y, smoothing)
    if at.batch % 2 == 1:
        loss = loss + weight * min(at.done / 0.9, 1) * singular_sum(clean.float() - logits.float()) / len(x)
    g, = torch.autograd.grad(loss, delta)
    net.train()
    return ball(delta.detach() + alpha * g.sign(), x, epsilon)


def lap(net, x, y, at, eta, beta, up):
    """The gradient at the start, and the weights on their way from there."""
    eta = eta.clone().requires_grad_()
    parameters = list(net.parameters())
    g, *slopes = torch.autograd.grad(mean_ce(net(x + eta), y), [eta, *parameters])
    layers = [i for i, parameter in enumerate(parameters) if parameter.dim() > 1]
    with torch.no_grad():
        for number, i in enumerate(layers, 1):
            w = parameters[i]
            b = 0.9 * at.momentum.get(i, 0) + slopes[i] + 5e-4 * w
            size = beta * (1 - (math.log(number) / math.log(len(layers))) ** 0.3) * (w**2).sum().sqrt()
            parameters[i] += (size if up else -size) * b / (b**2).sum().sqrt()
    return g


def n_lap(net, x, y, epsilon, at, alpha, beta, k=2, up=False):
    eta = pixels(uniform(x, k * epsilon), x)
    return pixels(eta + alpha * lap(net, x, y, at, eta, beta, up).sign(), x)


def r_lap(net, x, y, epsilon, at, alpha, beta, init="random", up=False):
    eta = x * 0 if init == "zero" else pixels(uniform(x, epsilon), x)
    return ball(eta + alpha * lap(net, x, y, at, eta, beta, up).sign(), x, epsilon)


def atas(net, x, y, epsilon, at, c=0.01, warmup=5, reset=10):
    """Image by image; D and v are kept as they are and, for images in float32, D is rounded to half precision where it
    is taken up again."""
    height, width = x.shape[2:]
    shape = [x.shape[1], height + 2 * at.padding, width + 2 * at.padding]
    kept = at.kept.setdefault("padded", torch.zeros(at.images, *shape, dtype=x.dtype))
    v = at.kept.setdefault("squares", torch.zeros(at.images, dtype=x.dtype))
    number = at.epoch + 1
    if number == 1 or (number < at.epochs and number % reset == 0):
        d = torch.empty(len(x), *shape, dtype=x.dtype).uniform_(-epsilon, epsilon)
    else:
        d = kept[at.index].half().float() if x.dtype == torch.float32 else kept[at.index]
    windows = [one[:, top:top + height, left:left + width]
               for one, top, left in zip(d, at.drawn["top"], at.drawn["left"])]
    eta = ball(torch.stack([w.flip(2) if flip else w for w, flip in zip(windows, at.drawn["flip"])]), x, epsilon)
    net.eval()
    g, _ = slope(net, x, y, eta)
    net.train()
    steps = []
    for i, one in zip(at.index, g):
        if number <= warmup:
            steps.append(epsilon)
            continue
        v[i] = 0.5 * v[i] + 0.5 * (len(x) / 128 * one.norm()) ** 2
        steps.append(min(max(16 / 255 / (1 + math.sqrt(v[i]) / c), 4 / 255), 14 / 255))
    at.steps += steps
    delta = ball(eta + torch.tensor(steps, dtype=x.dtype).view(-1, 1, 1, 1) * g.sign(), x, epsilon)
    for window, one, flip in zip(windows, delta, at.drawn["flip"]):
        window.copy_(one.flip(2) if flip else one)
    kept[at.index] = d
    return delta


def guided(net, x, y, epsilon, at, alpha, weight, smoothing=0.0):
    delta = pixels(corners(x, epsilon / 2), x).requires_grad_()
    clean = net(x).detach()
    net.eval()
    logits = net(x + delta)
    loss = mean_ce(logits, y, smoothing)
    if at.batch in (1, 3, 5):
        loss = loss + (4 * weight if at.done >= 0.86 else weight) * change(clean, logits)
    g, = torch.autograd.grad(loss, delta)
    net.train()
    return ball(delta.detach() + alpha * g.sign(), x, epsilon)


# What is minimized there


def ce(net, x, y, delta, epsilon, at, smoothing=0.0):
    return mean_ce(net(x + delta), y, smoothing)


def gradalign(net, x, y, delta, epsilon, at, weight):
    loss = mean_ce(net(x + delta), y)
    g1 = at.gradient
    noise = uniform(x, epsilon).requires_grad_()
    g2, = torch.autograd.grad(mean_ce(net(x + noise), y), noise, create_graph=True)
    cosines = [(a / a.norm() * b / b.norm()).sum() for a, b in zip(g1, g2) if a.abs().sum() > 0 and b.abs().sum() > 0]
    return loss + weight * (1 - sum(cosines) / len(cosines)) if cosines else loss


def elle(net, x, y, delta, epsilon, at, weight, adaptive=False):
    loss = mean_ce(net(x + delta), y)
    x_a = x + uniform(x, epsilon)
    x_b = x + uniform(x, epsilon)
    t = torch.rand(len(x), dtype=x.dtype)
    wide = t.view(-1, 1, 1, 1)
    triplet = net(torch.cat([x_a, x_b, (1 - wide) * x_a + wide * x_b]))
    l_a, l_b, l_c = (each_ce(triplet[i * len(x):(i + 1) * len(x)], y) for i in range(3))
    term = ((l_c - (1 - t) * l_a - t * l_b) ** 2).mean()
    return loss + (elle_a(at.kept, term.item(), weight) if adaptive else weight) * term


def elle_a(kept, term, weight):
    """The weight for this batch; what is kept is then that for the next one, and all terms so far."""
    now, history = kept.setdefault("lambda", 0.0), kept.setdefault("terms", [])
    jumps = len(history) > 2 and term > np.mean(history) + 2 * np.std(history)
    kept["lambda"] = weight if jumps else 0.99 * now
    kept.setdefault("jumps", []).append(bool(jumps))
    history.append(term)
    return now


def aaer(net, x, y, delta, epsilon, at, weights):
    l1, l2, l3 = weights
    logits, start = net(x + delta), at.logits.detach()
    before, after = each_ce(start, y), each_ce(logits, y).detach()
    abnormal = [i for i in range(len(y)) if before[i] > after[i]]
    normal = [i for i in range(len(y)) if before[i] <= after[i]]
    loss = mean_ce(logits, y)
    at.kinds.append((len(abnormal), len(normal)))
    if not abnormal or not normal:
        return loss
    variation = ((start - logits) ** 2).sum(dim=1)
    v_abnormal, v_normal = variation[abnormal].mean(), variation[normal].mean().item()
    fall = (before - after)[abnormal].mean()
    at.terms.append(v_abnormal.item() - v_normal)
    return loss + l1 * len(abnormal) / len(y) * (l2 * fall + l3 * torch.clamp(v_abnormal - v_normal, min=0))


def trades(net, x, y, delta, epsilon, at, beta):
    clean = net(x)
    perturbed = net(x + delta)
    return mean_ce(clean, y) + beta * divergence(clean, perturbed)


def nuclear_norm(net, x, y, delta, epsilon, at, weight):
    perturbed = net(x + delta)
    clean = net(x)
    return mean_ce(clean, y) + weight * min(at.done / 0.9, 1) * singular_sum(clean.float() - perturbed.float()) / len(x)


def smooth(net, x, y, delta, epsilon, at, weight, gap, point, smoothing=0.0):
    """What is kept: the images and the mean loss of each batch, by epoch."""
    loss = mean_ce(net(x + delta), y, smoothing)
    term = mean_ce(net(x + at.eta if point == "start" else x), y, smoothing)
    batches = at.kept.setdefault("batches", {})
    batches.setdefault(at.epoch, []).append((len(x), term.item()))
    k = 0
    if at.epoch >= 2:
        images, means = zip(*batches[at.epoch - 1])
        rise = term.item() - np.average(means, weights=images)
        k = np.sign(rise) if abs(rise) > gap else 0
    at.signs.append(k)
    return loss + k * weight * term


def pco_blend(net, x, y, delta, epsilon, at, weight, scale, smoothing=0.0):
    q = at.logits.softmax(dim=1)[torch.arange(len(y)), y].view(-1, 1, 1, 1)
    blended = net(x + at.eta + q * (scale * delta - at.eta))
    attacked = net(x + delta)
    difference = ((attacked - at.logits) ** 2).mean() - ((attacked - blended) ** 2).mean()
    at.signs.append(np.sign(difference.item()))
    return mean_ce(blended, y, smoothing) + weight * difference.abs()


def guided_change(net, x, y, delta, epsilon, at, weight):
    perturbed = net(x + delta)
    clean = net(x)
    return mean_ce(clean, y) + (4 * weight if at.done >= 0.86 else weight) * change(clean, perturbed)


def logits(net, x, y, delta, epsilon, at, weight, smoothing=0.0):
    found = net(x + delta)
    return mean_ce(found, y, smoothing) + weight * ((found - at.logits) ** 2).mean()


def liet_loss(net, x, y, delta, epsilon, at, smoothing, weight):
    found = net(x + delta)
    p, q = at.logits.softmax(dim=1), found.softmax(dim=1)
    m = (p + q) / 2
    jsd = (p * (p / m).log() + q * (q / m).log()).sum() / 2 / len(x)
    return nonuniform_ce(found, y, smoothing) + weight * (at.epoch + 1) / at.epochs * jsd


# One step after another, side by side


def sharp_net(classes: int = 4) -> SmallNet:
    """In float64, and with answers that a perturbation changes."""
    net = SmallNet(3, classes).double().train()
    with torch.no_grad():
        net.linear.weight.mul_(6)
    return net


def pool(n: int = 6, seed: int = 0):
    """n images, some pixels at the edge of the box, labelled with what the network says but for two of them."""
    torch.manual_seed(seed)
    net = sharp_net()
    x = torch.rand(n, 3, 5, 5, dtype=torch.float64)
    x[:, :, 0] = x[:, :, 0].round()
    y = copy.deepcopy(net)(x).argmax(dim=1)
    y[:n // 3] = (y[:n // 3] + 1) % 4
    return net, x, y


ATTACKS = {f.__name__: f for f in (none, fgsm, nfgsm, pgd, sora, ckpt, free, pgi, liet, uap, cuap, fuap, kl, nuclear,
                                   n_lap, r_lap, atas, guided, pco)}
OBJECTIVES = {**{f.__name__: f for f in (ce, gradalign, elle, aaer, trades, logits, smooth)}, "nuclear": nuclear_norm,
              "liet": liet_loss, "guided": guided_change, "pco": pco_blend}

# Name: an attack and its keywords, an objective and its, and the relative tolerance: some terms are in float32.
FAR, ZERO = dict(alpha=1.25 * EPSILON), dict(alpha=1.25 * EPSILON, init="zero")
PAIRS = {
    "none": ("none", {}, "ce", {}, 1e-9),
    "fgsm, smoothed": ("fgsm", ZERO, "ce", dict(smoothing=0.3), 1e-9),
    "nfgsm": ("nfgsm", dict(alpha=EPSILON), "ce", {}, 1e-9),
    "nfgsm, k = 4": ("nfgsm", dict(alpha=1.25 * EPSILON, k=4), "ce", {}, 1e-9),
    "sora": ("sora", {}, "ce", {}, 1e-9),
    **{f"{name} in l_2": (name, dict(norm="l_2", **its), "ce", {}, 1e-9) for name, its in (
        ("fgsm", dict(alpha=1.25 * EPSILON)), ("pgd", dict(alpha=EPSILON / 4, steps=3)), ("sora", {}))},
    "fgsm in l_2 from zero": ("fgsm", dict(norm="l_2", alpha=EPSILON, init="zero"), "ce", {}, 1e-9),
    "ckpt": ("ckpt", FAR, "ce", {}, 1e-9),
    "ckpt in 5 parts": ("ckpt", dict(alpha=1.25 * EPSILON, count=5), "ce", {}, 1e-9),
    "ckpt in train mode": ("ckpt", dict(alpha=1.25 * EPSILON, mode="train"), "ce", {}, 1e-9),
    "free": ("free", {}, "ce", {}, 1e-9),
    "free, smoothed": ("free", {}, "ce", dict(smoothing=0.3), 1e-9),
    "pgi": ("pgi", dict(alpha=EPSILON, reset=2, smoothing=0.4), "logits", dict(weight=10.0, smoothing=0.4), 1e-9),
    "pgi, reset in every epoch": ("pgi", dict(alpha=1.25 * EPSILON, reset=1), "ce", {}, 1e-9),
    "liet": ("liet", dict(alpha=EPSILON, smoothing=0.6, noise=(0.1, 0.5), every=2), "liet",
             dict(smoothing=0.6, weight=100.0), 1e-9),
    "liet, new perturbations in every batch": (
        "liet", dict(alpha=1.25 * EPSILON, smoothing=0.4, noise=(0.0, 1.0), every=1), "ce", {}, 1e-9),
    "uap": ("uap", dict(alpha=EPSILON, a=10 / 255, smoothing=0.4), "logits", dict(weight=10.0, smoothing=0.4), 1e-9),
    "cuap": ("cuap", dict(alpha=0.5 * EPSILON, a=6 / 255), "logits", dict(weight=3.0), 1e-9),
    "fuap": ("fuap", dict(alpha=EPSILON, a=10 / 255, count=5, smoothing=0.4), "logits",
             dict(weight=10.0, smoothing=0.4), 1e-9),
    "pgd, logits": ("pgd", dict(alpha=EPSILON / 4, steps=3), "logits", dict(weight=10.0), 1e-9),
    "pgd from zero": ("pgd", dict(alpha=EPSILON / 2, steps=2, init="zero"), "ce", {}, 1e-9),
    "rs-cs": ("nfgsm", dict(alpha=EPSILON, k=1), "smooth", dict(weight=0.7, gap=0.03, point="start", smoothing=0.4),
              1e-9),
    "mep-cs": ("pgi", dict(alpha=EPSILON, reset=2, smoothing=0.4), "smooth",
               dict(weight=1.0, gap=0.02, point="clean", smoothing=0.4), 1e-9),
    "kl, trades": ("kl", dict(alpha=EPSILON / 4), "trades", dict(beta=6.0), 1e-5),
    "kl": ("kl", dict(alpha=EPSILON / 4, steps=3), "ce", {}, 1e-9),
    "nuclear": ("nuclear", dict(alpha=EPSILON, weight=4.5), "nuclear", dict(weight=4.5), 1e-5),
    "fgsm, smoothed attack": ("fgsm", dict(**FAR, smoothing=0.4), "ce", {}, 1e-9),
    "nfgsm, smoothed attack": ("nfgsm", dict(**FAR, smoothing=0.4), "ce", {}, 1e-9),
    "ckpt, smoothed attack": ("ckpt", dict(**FAR, smoothing=0.4), "ce", {}, 1e-9),
    "nuclear, smoothed attack": ("nuclear", dict(**FAR, weight=4.5, smoothing=0.4), "ce", {}, 1e-9),
    "n-lap": ("n_lap", dict(alpha=EPSILON, beta=0.05), "ce", {}, 1e-9),
    "n-lap, k = 4, up": ("n_lap", dict(alpha=EPSILON, beta=0.2, k=4, up=True), "ce", dict(smoothing=0.3), 1e-9),
    "r-lap, trades": ("r_lap", dict(alpha=1.25 * EPSILON, beta=0.05), "trades", dict(beta=6.0), 1e-5),
    "r-lap, from zero, up": ("r_lap", dict(alpha=EPSILON, beta=0.2, init="zero", up=True), "ce", {}, 1e-9),
    "atas": ("atas", dict(c=0.001, warmup=1, reset=2), "ce", {}, 1e-9),
    "atas, trades": ("atas", dict(c=0.0005, warmup=0, reset=9), "trades", dict(beta=6.0), 1e-5),
    "guided, smoothed attack": ("guided", dict(**FAR, weight=4.5, smoothing=0.4), "ce", {}, 1e-9),
    "gat": ("guided", dict(alpha=EPSILON, weight=10.0), "guided", dict(weight=10.0), 1e-5),
    "pco": ("pco", dict(alpha=EPSILON, smoothing=0.4), "pco", dict(weight=10.0, scale=1.5, smoothing=0.4), 1e-9),
    "fgsm, pco": ("fgsm", FAR, "pco", dict(weight=3.0, scale=2.5), 1e-9),
    "gradalign": ("fgsm", ZERO, "gradalign", dict(weight=0.2), 1e-9),
    "nfgsm, gradalign": ("nfgsm", FAR, "gradalign", dict(weight=2.5), 1e-9),
    "elle": ("fgsm", ZERO, "elle", dict(weight=1000.0), 1e-9),
    "elle-a": ("fgsm", ZERO, "elle", dict(weight=4000.0, adaptive=True), 1e-9),
    "n-aaer": ("nfgsm", dict(alpha=EPSILON), "aaer", dict(weights=(1.0, 1.5, 0.15)), 1e-9),
    "rs-aaer": ("fgsm", FAR, "aaer", dict(weights=(1.0, 2.5, 1.5)), 1e-9),
    "pgd, aaer": ("pgd", dict(alpha=EPSILON / 4, steps=2), "aaer", dict(weights=(2.0, 1.5, 0.15)), 1e-9),
}

# The steps of a short run: epoch, batch in it, how much of the run is over, which images, epsilon in 8/255.
STEPS = [(0, 0, 0.0, [4, 0, 5, 1, 2, 3], 1), (0, 1, 0.0, [3, 5, 1, 0], 1), (1, 0, 0.3, [0, 2, 4, 1, 5, 3], 1),
         (1, 1, 0.3, [1, 0, 3], 1), (2, 0, 0.6, [3, 5, 1, 0, 4, 2], 8), (2, 1, 0.6, [0, 1, 3, 5], 1),
         (3, 1, 0.95, [5, 4, 1, 0, 2, 3], 8)]


def memory(images: int, classes: int = 4) -> SimpleNamespace:
    return SimpleNamespace(images=images, classes=classes, epochs=4, kept={}, after=None, logits=None, gradient=None,
                           start=None, shares=[], kinds=[], terms=[], signs=[], momentum={}, steps=[], padding=0,
                           drawn={})


def assert_kept(found: dict, expected: dict, rtol: float = 1e-9) -> None:
    """What the code keeps is what the reference keeps; D and M to half precision."""
    close = torch.testing.assert_close
    if "v" in expected:
        close(found["sora"].item(), expected["v"], rtol=rtol, atol=0)
    if "delta" in expected:
        close(found["free"].to(expected["delta"].dtype), expected["delta"], rtol=1e-5, atol=1e-7)
    if "D" in expected:
        close(found["pgi"].double(), expected["D"].double(), rtol=2**-10, atol=1e-7)
        close(found["pgi momentum"].double(), expected["M"].double(), rtol=2**-10, atol=1e-4)
    if "L" in expected:
        assert torch.equal(found["liet"], expected["L"])
    if "padded" in expected:
        close(found["atas"].double(), expected["padded"].double(), rtol=2**-10, atol=1e-7)
        close(found["atas v"], expected["squares"], rtol=rtol, atol=0)
    if "u" in expected:
        close(found["uap"].sign(), expected["u"].sign(), rtol=0, atol=0)
        close(found["uap momentum"], expected["m"], rtol=1e-5, atol=1e-3 * rtol)
    if "head" in expected:
        close(found["fuap head"], nn.utils.parameters_to_vector(expected["head"].parameters()).detach(), rtol=rtol,
              atol=rtol)
    if "terms" in expected:
        terms = np.array(expected["terms"])
        close(found["elle"], torch.tensor([expected["lambda"], len(terms), terms.sum(), (terms**2).sum()],
                                          dtype=torch.float64), rtol=rtol, atol=0)
    if "history" in expected:
        close(found["pco"].double(), expected["history"].double(), rtol=2**-10, atol=1e-7)
    if "batches" in expected:
        sums = [[sum(images * mean for images, mean in epoch), sum(images for images, _ in epoch)]
                for epoch in expected["batches"].values()]
        means = [0, 0, *(total / images for total, images in sums[:-1])]
        close(found["smooth"], torch.tensor([len(sums) - 1, *sums[-1], means[-1], means[-2]], dtype=torch.float64),
              rtol=rtol, atol=0)
    names = expected.keys() & {"v", "delta", "D", "M", "L", "u", "m", "head", "padded", "squares", "terms", "batches",
                               "history"}
    assert len(found) == len(names) + 2 * ("head" in names)  # with its moments


@pytest.mark.parametrize("name", PAIRS)
def test_steps_are_the_formulas(name):
    """Perturbation, loss, its gradient, BatchNorm's statistics and what is kept, in steps of which each moves the
    weights; and an attack leaves the gradients and the mode of the model alone."""
    attack, its, objective, more, rtol = PAIRS[name]
    net, x_pool, y_pool = pool()
    other, at, kept = copy.deepcopy(net), memory(len(x_pool)), {}
    optimizer = a_step(net, len(x_pool)).optimizer
    at.momentum = {i: torch.randn_like(parameter) / 10 for i, parameter in enumerate(net.parameters())}
    for i, parameter in enumerate(net.parameters()):
        optimizer.state[parameter]["momentum_buffer"].copy_(at.momentum[i])
    for number, (epoch, batch, done, index, factor) in enumerate(STEPS):
        x, y, index = x_pool[index], y_pool[index], torch.tensor(index)
        at.padding, at.drawn = 2, data.Augmentation(2, flip=True).draw(len(x))
        step = Step(net, len(x_pool), index, epoch, batch, done, kept, keeps_graph=methods.OBJECTIVES[objective].graph,
                    epochs=at.epochs, optimizer=optimizer, classes=at.classes, drawn=at.drawn, padding=2)
        at.epoch, at.batch, at.done, at.index = epoch, batch, done, index
        gradients = {name: torch.randn_like(p) for name, p in net.named_parameters()}
        for parameter, gradient in gradients.items():
            net.get_parameter(parameter).grad = gradient.clone()
        factor *= 3.9 if its.get("norm") == "l_2" else 1
        epsilon, keywords = factor * EPSILON, {**its, "alpha": factor * its["alpha"]} if "alpha" in its else its
        torch.manual_seed(100 + number)
        delta = getattr(attacks, attack)(net, x, y, epsilon, step=step, **keywords)
        for parameter, gradient in gradients.items():
            assert torch.equal(net.get_parameter(parameter).grad, gradient)
        assert net.training and all(p.requires_grad for p in net.parameters()) and not delta.requires_grad
        loss, _ = getattr(objectives, objective)(net, x, y, delta.requires_grad_(), epsilon, step, **more)
        point = step.start if methods.ATTACKS[attack].update_at == "start" else delta
        found = torch.autograd.grad(loss, [*net.parameters(), point], materialize_grads=True)

        torch.manual_seed(100 + number)
        expected_delta = ATTACKS[attack](other, x, y, epsilon, at, **keywords).requires_grad_()
        expected_loss = OBJECTIVES[objective](other, x, y, expected_delta, epsilon, at, **more)
        point = expected_delta if at.start is None else at.start
        expected = torch.autograd.grad(expected_loss, [*other.parameters(), point], materialize_grads=True)
        torch.testing.assert_close(delta, expected_delta, rtol=0, atol=1e-12)
        torch.testing.assert_close(loss.double(), expected_loss.double(), rtol=rtol, atol=0)
        scale = max(gradient.abs().max().item() for gradient in expected)  # that of a bias before BatchNorm is zero
        for one, two in zip(found, expected):
            torch.testing.assert_close(one, two, rtol=100 * rtol, atol=10 * rtol * scale)
        update = methods.ATTACKS[attack].update
        assert bool(update) == bool(at.after)
        if update:
            more_keywords = {"decay": 0.3} if update == "uap_update" else {}
            getattr(attacks, update)(step, x, delta.detach(), found[-1], epsilon, **more_keywords)
            at.after(expected[-1])
        for one, two in zip(net.buffers(), other.buffers()):
            torch.testing.assert_close(one, two, rtol=rtol, atol=0)
        assert_kept(kept, at.kept)
        with torch.no_grad():
            for one, two, gradient in zip(net.parameters(), other.parameters(), expected):
                for parameter in (one, two):
                    parameter -= 0.01 * gradient / max(gradient.norm().item(), 1)
    # The steps were worth taking: every rule has acted.
    if attack == "ckpt":
        c = its.get("count", 3)
        assert {0, 1 / c, 2 / c, 1} <= set(at.shares)
    if "terms" in at.kept:
        assert at.kept["jumps"].count(True) == 1 and at.kept["lambda"] == 0.99**2 * 4000
    if attack == "atas":
        assert (EPSILON if its["warmup"] else 4 / 255) in at.steps and len(set(at.steps)) > 9
    assert at.kept.get("v", 0) < 0.98
    assert objective != "smooth" or -1 in at.signs[4:]
    assert name != "pco" or set(at.signs) == {-1, 1}


def test_aaer_where_some_images_are_abnormal():
    """Between random points, with both kinds of images there, and the abnormal ones' answers changed more, or less; an
    image that is the same at both, and as well classified, is normal."""
    net, x, y = pool(8, seed=3)
    at = memory(len(x))
    for seed in range(12):
        torch.manual_seed(seed)
        eta, delta, n = pixels(uniform(x, 0.3), x), pixels(uniform(x, 0.3), x), 8 if seed % 3 else 2
        x_n, y_n = x[:n], y[:n]
        net.train(seed % 2 == 0)  # or an image's answer would depend on the others
        eta[0] = delta[0]
        other, step = copy.deepcopy(net), Step(net, n, torch.arange(n))
        step.logits, at.logits = net(x_n + eta[:n]), other(x_n + eta[:n]).detach()
        loss, _ = objectives.aaer(net, x_n, y_n, delta[:n], EPSILON, step, weights=(2.0, 1.5, 0.7))
        expected = aaer(other, x_n, y_n, delta[:n], EPSILON, at, (2.0, 1.5, 0.7))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for one, two in zip(torch.autograd.grad(loss, list(net.parameters())),
                            torch.autograd.grad(expected, list(other.parameters()))):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert {abnormal > 0 and normal > 0 for abnormal, normal in at.kinds} == {True, False}
    assert min(at.terms) < 0 < max(at.terms)


class Told(nn.Module):
    """Its cross-entropy for the label 0 is 1, and the loss bends at the last third of three times the images."""

    def __init__(self, bend):
        super().__init__()
        self.bend = bend

    def forward(self, x):
        losses = torch.ones(len(x), dtype=torch.float64)
        losses[2:] += self.bend
        return torch.stack([torch.zeros_like(losses), losses.expm1().log()], dim=1)


def weights_after(terms) -> list[float]:
    """The weights that ELLE-A gives to such terms, one after another: by how much each makes the loss larger."""
    kept, weights = {}, []
    x, y = torch.zeros(1, 3, 2, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    for term in terms:
        step = Step(Told(math.sqrt(term)), 1, y, kept=kept)
        loss, _ = objectives.elle(step.network, x, y, x, EPSILON, step, weight=4000.0, adaptive=True)
        weights.append((loss.item() - 1) / term)
    return weights


def test_the_adaptive_weight_needs_three_terms_and_acts_one_step_late():
    """0 at first, whatever comes; 4000 after the fifth term; then a hundredth less at each that is no exception."""
    weights = weights_after([1, 100, 1, 1, 500, 1, 1, 1])
    assert weights == pytest.approx([0, 0, 0, 0, 0, 4000, 3960, 3920.4], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.01, 0.04, 0.09, 1.0, 9.0]), min_size=1, max_size=25))
def test_the_adaptive_weight_follows_its_rule_along_any_history(terms):
    """By NumPy's mean and standard deviation, but for ties, which rounding decides."""
    memo, expected = {}, []
    for i, term in enumerate(terms):
        if i > 2 and abs(term - np.mean(terms[:i]) - 2 * np.std(terms[:i])) < 1e-9:
            terms = terms[:i]
            break
        expected.append(elle_a(memo, term, 4000.0))
    assert weights_after(terms) == pytest.approx(expected, rel=1e-6, abs=1e-6)


class Says(nn.Module):
    """The cross-entropy of every image for the label 0 is `loss`."""

    def __init__(self, loss):
        super().__init__()
        self.logits = torch.tensor([0.0, math.log(math.expm1(loss))], dtype=torch.float64)

    def forward(self, x):
        return self.logits.expand(len(x), 2)


@settings(max_examples=60, deadline=None)
@given(first=st.sampled_from([0, 5]), lambda_=st.floats(0.1, 3), batches=st.lists(st.tuples(
    st.booleans(), st.integers(1, 4), st.sampled_from([0.5, 1.0, 1.1, 2.0])), min_size=1, max_size=25))
def test_the_sign_of_smooths_penalty_follows_its_rule_along_any_history(first, lambda_, batches):
    """Epochs of any number of batches of any size, also from an epoch in the middle of a run on: none in two epochs."""
    kept, epochs = {}, [[]]
    for ends, images, loss in batches:
        if ends and epochs[-1]:
            epochs.append([])
        epochs[-1] += [loss] * images
        index = torch.arange(images)
        x, step = torch.zeros(images, 3, 2, 2), Step(Says(loss), 4, index, first + len(epochs) - 1, kept=kept)
        found, _ = objectives.smooth(step.network, x, index * 0, x, EPSILON, step, lambda_, 0.2, "clean")
        rise = loss - np.mean(epochs[-2]) if len(epochs) > 2 else 0
        if abs(abs(rise) - 0.2) > 1e-9:
            k = np.sign(rise) if abs(rise) > 0.2 else 0
            assert found.item() == pytest.approx((1 + k * lambda_) * loss)


def test_the_sign_of_pcos_penalty_is_that_of_all_processes():
    """Here one whose difference outweighs this one's, either way."""
    net, x, y = pool()
    found = []
    for others in (torch.add, torch.sub):
        step = Step(net.eval(), 12, torch.arange(12), size=2, keeps_graph=True, sum=partial(others, other=1e3))
        delta = attacks.fgsm(net, x, y, 0.1, 0.1, "zero", step)
        loss, logits = objectives.pco(net, x, y, delta, 0.1, step, weight=10.0, scale=1.5)
        found.append(loss.item() - mean_ce(logits, y).item())
    assert found[0] == pytest.approx(-found[1]) and abs(found[0]) > 0.01


def test_gats_weight_is_four_times_as_much_from_epoch_86_of_100_on():
    factors = [Step(nn.Identity(), 1, torch.zeros(1), done=epoch / epochs).boost for epoch, epochs in (
        (0, 100), (85, 100), (86, 100), (99, 100), (42, 50), (43, 50), (1, 2))]
    assert factors == [1, 1, 4, 4, 1, 4, 1]


@pytest.mark.parametrize("seed", range(3))
def test_gradaligns_double_backward_is_the_slope_of_its_loss(seed):
    """Against central differences along random directions of the weights, the detached gradient held fixed."""
    net, x, y = pool(seed=seed)
    step = Step(net, len(x), torch.arange(len(x)))
    delta = attacks.fgsm(net, x, y, 0.1, 0.1, "zero", step)

    def loss():
        torch.manual_seed(seed)
        return objectives.gradalign(net, x, y, delta, 0.1, step, weight=3.0)[0]

    parameters = list(net.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    for _ in range(3):
        torch.manual_seed(10 + seed)
        directions, h, ends = [torch.randn_like(p) for p in parameters], 1e-5, []
        for sign in (h, -2 * h):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions):
                    parameter += sign * direction
            ends.append(loss().item())
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions):
                parameter += h * direction
        slope = sum((gradient * direction).sum().item() for gradient, direction in zip(gradients, directions))
        plain = torch.autograd.grad(mean_ce(net(x + delta), y), parameters)
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)
        assert abs(slope - sum((g * d).sum().item() for g, d in zip(plain, directions))) > 0.01  # the term's own share


class Blind(nn.Module):
    """Sees nothing of images that are almost white: their gradient is 0."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x * (x.mean(dim=(1, 2, 3), keepdim=True) < 0.9))


def test_gradalign_leaves_out_images_without_a_gradient():
    """Some or all of them; the loss and its gradient stay finite."""
    net, x, y = pool()
    net = Blind(net)
    for blind in ([1, 4], [0, 1, 2, 3, 4, 5]):
        x_now = x.clone()
        x_now[blind] = 1
        step = Step(net, len(x), torch.arange(len(x)))
        step.gradient, _ = slope(net, x_now, y, x * 0)
        delta, other = (0.01 * torch.ones_like(x)).clamp(-x_now, 1 - x_now), copy.deepcopy(net)
        torch.manual_seed(1)
        loss, _ = objectives.gradalign(net, x_now, y, delta, EPSILON, step, weight=5.0)
        torch.manual_seed(1)
        expected = gradalign(other, x_now, y, delta, EPSILON, SimpleNamespace(gradient=step.gradient), weight=5.0)
        assert (step.gradient.flatten(1).abs().sum(dim=1) == 0).nonzero().flatten().tolist() == blind
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for one, two in zip(torch.autograd.grad(loss, list(net.parameters())),
                            torch.autograd.grad(expected, list(other.parameters()))):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stretch, ratio", [(1.0, 1.0), (0.5, 0.5), (-0.2, -0.2), (100.0, 1.0), (-100.0, -1.0)])
def test_soras_ratio_is_clipped_and_moves_v_for_the_next_step(stretch, ratio):
    """The gradient after is a multiple of that before; v of exactly 1 gives the whole step."""
    net, x, y = pool()
    for v in (1.0, 0.99, 0.9):
        step = Step(net, len(x), torch.arange(len(x)), kept={"sora": torch.tensor(v, dtype=torch.float64)})
        torch.manual_seed(2)
        delta = attacks.sora(net, x, y, EPSILON, step)
        torch.manual_seed(2)
        eta = pixels(uniform(x, EPSILON), x)
        a = 2 * EPSILON * {1.0: 1, 0.99: 1, 0.9: 0.2}[v]
        torch.testing.assert_close(delta, pixels(eta + a * torch.rand_like(x) * step.gradient.sign(), x), rtol=0,
                                   atol=1e-12)
        assert step.kept["sora"] == v  # not before the training step's own backward pass
        attacks.sora_update(step, x, step.gradient, stretch * step.gradient, EPSILON)
        assert step.kept["sora"].item() == pytest.approx(0.95 * v + 0.05 * ratio, abs=1e-12)


def in_two_processes(seed: int, attack, **keywords) -> list[Step]:
    """The steps of two processes with the same images and other random numbers, of which rank 0's are sent."""
    steps, sent = [], []
    for rank in range(2):
        net, x, y = pool()
        step = Step(net, len(x), torch.arange(2 * len(x)), rank=rank, size=2, classes=4)
        step.sum = (lambda values: values + sent.pop(0)) if rank else (lambda values: sent.append(values) or values)
        torch.manual_seed(2 * seed + rank)
        attack(net, x, y, EPSILON, EPSILON, step=step, **keywords)
        steps.append(step)
    return steps


def test_liets_classes_coin_and_share_of_noise_are_rank_0s_in_all_processes():
    """Without noise, both start at the same point; with it, as many entries are replaced, but for chance."""
    for seed in range(8):
        first, second = in_two_processes(seed, attacks.liet, smoothing=0.6, noise=(0, 0), every=1)
        assert torch.equal(first.kept["liet"], second.kept["liet"]) and torch.equal(first.start, second.start)
        _, x, y = pool()
        shares = []
        for step in in_two_processes(seed, attacks.liet, smoothing=0.6, noise=(0, 1), every=1):
            d = EPSILON * step.kept["liet"][y]
            shares.append(((step.start != pixels(d, x)) & (step.start != pixels(-d, x))).double().mean().item())
        assert shares[1] == pytest.approx(shares[0], abs=0.1)


@pytest.mark.parametrize("compiled", [False, True])
def test_fuaps_features_are_the_input_of_the_last_layer(compiled):
    """Also of a compiled network, whose code has been made without the hook."""
    net, x, _ = pool()
    model = torch.compile(net, backend="eager") if compiled else net
    with torch.no_grad(), attacks.frozen(net):
        expected = torch.tanh(net.bn(net.conv(x))).square().mean(dim=(2, 3))
        model(x)
    found = attacks.features(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert not net.linear._forward_pre_hooks and not found.requires_grad
    with pytest.raises(ValueError, match="this network has none"):
        attacks.features(nn.Flatten(), x)


def test_uap_moves_the_perturbations_of_the_batch_alone_and_none_after_an_overflow():
    net, x, y = pool()
    step = Step(net, len(x), torch.arange(len(x)), classes=4)
    y = y.clamp(max=1)
    attacks.cuap(net, x, y, EPSILON, EPSILON, step, 10 / 255)
    before = {name: values.clone() for name, values in step.kept.items()}
    attacks.uap_update(step, x, x, torch.full_like(x, torch.inf), EPSILON, decay=0.3)
    assert all(torch.equal(values, before[name]) for name, values in step.kept.items())
    attacks.uap_update(step, x, x, torch.zeros_like(x), EPSILON, decay=0.3)
    for name, values in step.kept.items():
        moved = [not torch.equal(one, two) for one, two in zip(values, before[name])]
        assert moved == [bool((y == k).any()) for k in range(4)]
    # Without a kept graph, the step's own gradient is the whole: u moves as it says, m is its mean in shares of norm1.
    mean = step.gradient[y == 1].mean(dim=0) / step.gradient.abs().sum()
    torch.testing.assert_close(step.kept["uap momentum"][1], mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(step.kept["uap"][1], (before["uap"][1] + mean.sign()).clamp(-1, 1), rtol=0, atol=0)


def test_liets_loss_is_in_float32_and_finite_where_probabilities_underflow():
    """Some are 0 in float32 at both points; in float16, the logits alone are rounded."""
    net, x, y = pool()
    x, net = x.float(), net.float().eval()
    net.linear.weight.data *= 1e4
    losses = []
    for dtype in (torch.float32, torch.float16):
        step = Step(net, len(x), torch.arange(len(x)), epochs=1)
        step.logits = net(x).to(dtype)
        torch.manual_seed(0)
        loss, logits = objectives.liet(lambda images, dtype=dtype: net(images).to(dtype), x, y,
                                       0.1 * torch.rand_like(x), EPSILON, step, smoothing=0.0, weight=100.0)
        assert ((step.logits.softmax(dim=1) == 0) & (logits.softmax(dim=1) == 0)).any() and loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:the gradient is 0")
def test_sora_and_pgi_where_there_is_no_gradient():
    """Of one image or of all, nothing becomes infinite or undefined."""
    net, x, y = pool()
    net = Blind(net)
    for blind in ([1], [0, 1, 2, 3, 4, 5]):
        x_now = x.clone()
        x_now[blind] = 1
        step = Step(net, len(x), torch.arange(len(x)))
        attacks.sora(net, x_now, y, EPSILON, step)
        attacks.sora_update(step, x, step.gradient, step.gradient, EPSILON)
        assert step.kept["sora"].item() == pytest.approx(0.95 * 0.99 + 0.05 * (1 - len(blind) / 6), abs=1e-12)
        step = Step(net, len(x), torch.arange(len(x)))
        assert attacks.pgi(net, x_now, y, EPSILON, EPSILON, step).isfinite().all()
        assert all(values.isfinite().all() for values in step.kept.values())


def keywords_of(attack: str, *flags: str) -> dict:
    args = options.parse(options.CIFAR10, argv=[f"--attack={attack}", *flags])
    return args.keywords(methods.ATTACKS[attack].keywords)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", methods.ATTACKS)
def test_an_attack_leaves_the_model_as_it_found_it(name, training):
    """Its mode, what of it needs a gradient, and every gradient, also where there is none yet; and its weights, but
    for those that the attack trains by its record: not biases, BatchNorm or what is frozen."""
    net, x, y = pool()
    net.train(training).conv.weight.requires_grad_(False)
    net.bn.weight.grad = torch.randn(6, dtype=torch.float64)
    before = {name: (p.grad, None if p.grad is None else p.grad.clone(), p.detach().clone(), p.requires_grad)
              for name, p in net.named_parameters()}
    step = a_step(net, 6, batch=1, done=0.5)
    getattr(attacks, name)(net, x, y, EPSILON, step=step, **keywords_of(name))
    assert all(module.training == training for module in net.modules())
    for parameter, (grad, values, weight, needed) in before.items():
        now = net.get_parameter(parameter)
        moves = methods.ATTACKS[name].moves_weights and parameter == "linear.weight"
        assert now.grad is grad and torch.equal(now, weight) != moves and now.requires_grad == needed
        assert grad is None or torch.equal(grad, values)


@pytest.mark.parametrize("name", methods.ATTACKS)
def test_passes_without_a_gradient_are_on_frozen_parameters(name):
    """Or autocast, in PyTorch's older versions, keeps casts of them that no gradient flows back from."""
    net, x, y = pool()
    seen = []
    net.register_forward_pre_hook(lambda module, args: seen.append(
        torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in module.parameters())))
    step = a_step(net, 6, batch=1, done=0.5)
    getattr(attacks, name)(net, x, y, EPSILON, step=step, **keywords_of(name))
    assert all(seen)


# How far a perturbation can be from zero, in epsilons.
REACH = {"none": 0, "nfgsm": 3, "sora": 3, "n_lap": 3, "liet": 3}
REACH |= {name: math.inf for name, attack in methods.ATTACKS.items() if "ball" not in attack.clip and name not in REACH}


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(methods.ATTACKS)), epsilon=st.floats(0, 80), seed=st.integers(0, 1000),
       n=st.integers(1, 5))
def test_a_perturbation_stays_in_its_ball_and_in_the_box(name, epsilon, seed, n):
    """To the last bit in the box, so that nothing needs clipping before the network; in float32, as in training."""
    torch.manual_seed(seed)
    net, x, y = SmallNet().train(), torch.rand(n, 3, 4, 4), torch.randint(4, (n,))
    x[:, 0] = x[:, 0].round()
    flags = [f"--epsilon={epsilon}", f"--pgd-alpha={epsilon / 3}", "--pgd-iters=3"]
    step = a_step(net, n, batch=1, done=0.5)
    delta = getattr(attacks, name)(net, x, y, epsilon / 255, step=step, **keywords_of(name, *flags))
    assert delta.shape == x.shape and delta.dtype == x.dtype and not delta.requires_grad
    assert (x + delta).min() >= 0 and (x + delta).max() <= 1
    assert delta.abs().max() <= REACH.get(name, 1) * (epsilon / 255 + 1e-30) * (1 + 1e-6)


# Whole training steps


class Wide(nn.Module):
    """The same, for images in float32."""

    def __init__(self, classes: int):
        super().__init__()
        self.network = sharp_net(classes)

    def forward(self, x):
        return self.network(x.double())


@pytest.fixture
def tiny(monkeypatch, small_dummy):
    """Runs are of a network and images so small that they take no time."""
    monkeypatch.setattr(data, "DUMMY_SIDE", 8)
    for module in (train, checkpoints):
        monkeypatch.setattr(module, "new_network", lambda dataset, args: Wide(dataset.classes))


def small_run(folder, *flags: str, dataset=options.SVHN) -> train.Run:
    """A run on SVHN, whose images are not augmented, about to begin."""
    begin = [*SMALL, "--lr-schedule=onedrop", "--lr-max=0.1", "--fname", str(folder)]
    args = options.parse(dataset, argv=[*begin, *flags])
    state, layout = train.build(dataset, args, CPU, World())
    images = [each.to(CPU, layout) for each in data.load(dataset, args)]
    return train.assemble(dataset, args, state, Folder(folder), World(), StopSignals(), images)


# Name: the passes of a training step; T: of the batch in train mode, E: in eval mode, 3: of three batches in one.
PASSES = {"fgsm": "TT", "fgsm-rs": "TT", "zerograd": "TT", "multigrad": "TTTT", "pgd": "T" * 11, "n-fgsm": "TT",
          "n-aaer": "TT", "rs-aaer": "TT", "gradalign": "TTT", "elle": "TT3", "elle-a": "TT3", "free": "T",
          "ckpt": "EEET", "pgi": "TT", "nuat": "TETT", "trades": "E" * 11 + "TT", "sora": "TT", "n-lap": "TT",
          "r-lap": "TT", "liet": "TT", "atas": "ET", "uap": "TT", "cuap": "TT", "fuap": "TTT", "pgd-2": "TTT",
          "rs-cs": "TTT", "mep-cs": "TTT", "gat": "TETT", "pco": "TTT"}
# The same in the first batch of an epoch, where it differs; C: of one image for each class, in eval mode.
FIRST_PASSES = {"liet": "CTT"}


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_step_makes_the_published_passes(name, tmp_path, tiny):
    """Forward passes by number, size and mode, in every step of an epoch whose last batch is smaller."""
    run = small_run(tmp_path, "--method", name)
    seen, steps, sizes = [], [], [32] * 3 if name == "free" else [32, 32, 16]

    def passes(model, inputs):
        if len(steps) == len(sizes):  # the look at whether all is finite, after the epoch
            return
        size, whole = len(inputs[0]), sizes[len(steps)]
        seen.append({whole: "T", 3 * whole: "3"}[size] if model.training else {whole: "E", 10: "C"}[size])

    def after_step():
        steps.append("".join(seen))
        seen.clear()

    run.state.model.register_forward_pre_hook(passes)
    train.train_epoch(run, after_step)
    assert steps == [FIRST_PASSES.get(name, PASSES[name]), PASSES[name], PASSES[name]]


# Name: the reference's attack and its keywords, its objective and its.
TRAINED = {
    "fgsm": (fgsm, dict(alpha=EPSILON, init="zero"), ce, {}),
    "fgsm-rs": (fgsm, dict(alpha=10 / 255), ce, {}),
    "pgd-2": (pgd, dict(alpha=4 / 255, steps=2), ce, {}),
    "rs-cs": (nfgsm, dict(alpha=EPSILON, k=1), smooth, dict(weight=1, gap=0.03, point="start", smoothing=4 / 9)),
    "mep-cs": (pgi, dict(alpha=EPSILON, reset=2, smoothing=4 / 9), smooth,
               dict(weight=1, gap=0.03, point="clean", smoothing=4 / 9)),
    "n-fgsm": (nfgsm, dict(alpha=EPSILON, k=2), ce, {}),
    "n-aaer": (nfgsm, dict(alpha=EPSILON, k=2), aaer, dict(weights=(1, 1.5, 0.15))),
    "rs-aaer": (fgsm, dict(alpha=10 / 255), aaer, dict(weights=(1, 2.5, 1.5))),
    "gradalign": (fgsm, dict(alpha=10 / 255, init="zero"), gradalign, dict(weight=2.5)),
    "elle": (fgsm, dict(alpha=EPSILON, init="zero"), elle, dict(weight=1000)),
    "elle-a": (fgsm, dict(alpha=EPSILON, init="zero"), elle, dict(weight=4000, adaptive=True)),
    "free": (free, {}, ce, {}),
    "ckpt": (ckpt, dict(alpha=10 / 255), ce, {}),
    "pgi": (pgi, dict(alpha=EPSILON, reset=2, smoothing=4 / 9), logits, dict(weight=10, smoothing=4 / 9)),
    "nuat": (nuclear, dict(alpha=EPSILON, weight=4.5), nuclear_norm, dict(weight=4.5)),
    "pco": (pco, dict(alpha=EPSILON, smoothing=4 / 9), pco_blend, dict(weight=10, scale=1.5, smoothing=4 / 9)),
    "gat": (guided, dict(alpha=EPSILON, weight=10), guided_change, dict(weight=10)),
    "trades": (kl, dict(alpha=2 / 255, steps=10), trades, dict(beta=6)),
    "sora": (sora, {}, ce, {}),
    "n-lap": (n_lap, dict(alpha=EPSILON, beta=0.001), ce, {}),
    "r-lap": (r_lap, dict(alpha=10 / 255, beta=0.002), ce, {}),
    "liet": (liet, dict(alpha=EPSILON, smoothing=0.6, noise=(0.1, 0.5), every=20), liet_loss,
             dict(smoothing=0.6, weight=100)),
    "sora --norm=l_2": (sora, dict(norm="l_2"), ce, {}),
    "fgsm-rs --norm=l_2": (fgsm, dict(alpha=10 / 255, norm="l_2"), ce, {}),
    "atas": (atas, dict(warmup=1, reset=2), ce, {}),
    "uap": (uap, dict(alpha=EPSILON, a=10 / 255, smoothing=0.4), logits, dict(weight=10, smoothing=0.4)),
    "cuap": (cuap, dict(alpha=EPSILON, a=10 / 255, smoothing=0.4), logits, dict(weight=10, smoothing=0.4)),
    "fuap": (fuap, dict(alpha=EPSILON, a=10 / 255, count=50, smoothing=0.4), logits, dict(weight=10, smoothing=0.4)),
    "none": (none, {}, ce, {}),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_the_update_written_out_by_hand(name, tmp_path, tiny):
    """Three epochs of a run of four, with the published numbers: the weights, BatchNorm's statistics, what is kept."""
    samples = 80  # the last batch is a short one
    dataset = dataclasses.replace(options.SVHN, augmentation=dict(padding=2, flip=True) if name == "atas" else {})
    method = ["--attack=none"] if name == "none" else f"--method={name}".split()
    run = small_run(tmp_path, *method, f"--train-samples={samples}", "--epochs=4", "--free-replays=2", "--pgi-reset=2",
                    "--eps-warmup=0", "--atas-warmup=1", "--atas-reset=2", dataset=dataset)
    net, steps = copy.deepcopy(run.state.model).train(), math.ceil(samples / 32)
    attack, its, objective, more = TRAINED[name]
    at = memory(samples, 10)
    at.padding = run.augmentation.padding
    for epoch in range(3):
        run.state.begin_epoch(epoch)
        train.train_epoch(run)
        seed_everything(train.ORDER, 0, epoch)
        order, drawn = torch.randperm(samples), run.augmentation.draw(samples)
        for number in range(steps):
            at.epoch, at.batch, at.done = epoch, number // 2 if name == "free" else number, epoch / 4
            batch = slice(at.batch * 32, (at.batch + 1) * 32)
            at.index, at.drawn = order[batch], {key: values[batch] for key, values in drawn.items()}
            x, y = run.train.batch(at.index, run.augmentation, at.drawn)
            seed_everything(train.STEP, 0, epoch, number, 0)
            delta = attack(net, x, y, EPSILON, at, **its).requires_grad_()
            loss = objective(net, x, y, delta, EPSILON, at, **more)
            point = delta if at.start is None else at.start
            *gradients, g = torch.autograd.grad(loss, [*net.parameters(), point])
            if at.after:
                at.after(g)
            with torch.no_grad():
                for i, (parameter, gradient) in enumerate(zip(net.parameters(), gradients)):
                    at.momentum[i] = 0.9 * at.momentum.get(i, 0) + gradient + 5e-4 * parameter
                    parameter -= 0.1 * at.momentum[i]
    loose = {"trades": 1e-4, "nuat": 1e-4, "gat": 1e-4, "gradalign": 1e-6, "elle": 1e-6}  # of what is in float32
    rtol = loose.get(name, 1e-8)
    torch.testing.assert_close(run.state.model.state_dict(), net.state_dict(), rtol=rtol, atol=rtol)
    assert_kept(run.state.kept, at.kept, 1e-4 if name == "elle-a" else 1e-6)  # small differences of large numbers


@pytest.mark.parametrize("attack", methods.ATTACKS)
def test_every_attack_goes_with_every_objective_that_is_not_refused(attack, tmp_path, tiny, call):
    """Two steps and a smaller one of each pair; those that are refused are refused in one line."""
    for objective in methods.OBJECTIVES:
        flags = [f"--attack={attack}", f"--objective={objective}", "--pgd-iters=2", "--multi-samps=2"]
        compares = objective in ("gradalign", "aaer", "logits", "liet", "smooth", "pco")
        without_start = attack in ("none", "free", "kl", "nuclear", "guided", "n_lap", "r_lap", "atas") and compares
        if without_start or (attack == "sora" and objective != "ce"):
            refused(call("train_svhn.py", *flags, "--fname", tmp_path / "never"), "--objective")
            continue
        run = small_run(tmp_path, *flags)
        metrics = train.train_epoch(run)
        assert metrics["train_images"] == (96 if attack == "free" else 80)
        assert math.isfinite(metrics["train_robust_loss"])


def refused(result, *named: str) -> None:
    """A run that was refused with one line, which says why."""
    status, output, error = result
    assert status == 2 and error.count("\n") == 1 and output == "" and "Traceback" not in error, (status, error)
    for part in named:
        assert part in error, error


@pytest.mark.parametrize("method", ["sora", "free", "pgi", "elle-a", "gradalign", "liet", "fuap", "n-lap", "atas",
                                    "pco", "rs-cs"])
def test_a_step_that_overflows_in_float16_spoils_nothing_that_is_kept(method, tmp_path, small_dummy):
    """The first steps in float16 are scaled too far and skipped; their gradients are infinite."""
    run = small_run(tmp_path, f"--method={method}", "--amp", "--amp-dtype=float16", "--free-replays=2")
    run.state.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    train.train_epoch(run)
    assert run.state.precision.scaler.get_scale() == 2.0**37
    assert all(values.isfinite().all() for values in (*run.state.kept.values(), *run.state.model.state_dict().values()))


def test_the_gradient_of_an_update_is_not_scaled_in_float16(tmp_path, small_dummy, monkeypatch):
    """The gradient at x + delta that SORA gets after the step, from the same weights in float32 and in float16."""
    found = []
    monkeypatch.setattr(attacks, "sora_update", lambda step, x, delta, grad, epsilon: found.append(grad))
    for precision in ([], ["--amp", "--amp-dtype=float16"]):
        run = small_run(tmp_path, "--method=sora", *precision)
        run.state.model.train()
        train.train_step(run, train.batch(run, torch.arange(32), {}))
    torch.testing.assert_close(found[1].norm(), found[0].norm(), rtol=0.1, atol=0)


@pytest.mark.parametrize("flags", [["--amp"], ["--amp", "--amp-dtype=float16"], []])
def test_laps_loss_is_at_the_moved_weights_also_where_autocast_keeps_casts(flags, tmp_path, small_dummy):
    """The logits of each pass are those of a copy of the network as it then is."""
    run = small_run(tmp_path, "--method=n-lap", "--lap-beta=0.5", *flags)
    run.state.model.train()
    weights = []

    def compare(network, inputs, logits):
        if network is run.network:
            weights.append(network.conv1.weight.detach().clone())
            assert torch.equal(logits, copy.deepcopy(network)(inputs[0]))

    run.network.register_forward_hook(compare)
    train.train_step(run, train.batch(run, torch.arange(32), {}))
    assert len(weights) == 2 and not torch.equal(*weights)


def test_laps_weights_move_under_a_compiled_network_as_under_an_eager_one(tmp_path, tiny, monkeypatch):
    compile_function, found = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: compile_function(
        function, dynamic=dynamic, backend="aot_eager"))
    for flags in (["--compile"], []):
        run = small_run(tmp_path, "--method=r-lap", "--lap-beta=0.3", *flags)
        assert (run.network is run.state.model) == (not flags)
        train.train_epoch(run)
        found.append(run.state.model.state_dict())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


# Runs that go on


THREE = [*SMALL, "--epochs=3", "--chkpt-iters=1", "--lr-max=0.1", "--test-iters=1", "--final-iters=1",
         "--final-restarts=1", "--final-samples=16", "--free-replays=2", "--pgi-reset=2", "--pgd-iters=2",
         "--atas-warmup=1", "--atas-reset=2"]


@pytest.mark.parametrize("more", ["", "--ema=0.9 --eps-warmup=1.5 --lr-schedule=onecycle"])
@pytest.mark.parametrize("method", methods.METHODS)
def test_a_run_that_goes_on_ends_with_the_bits_of_an_unbroken_one(method, more, tmp_path, call, tiny, monkeypatch):
    """From the files of the first epoch and from the middle of the second: weights, averages, what is kept."""
    flags, whole, part = [*THREE, "--method", method, *more.split()], tmp_path / "whole", tmp_path / "from_1"
    assert call("train_cifar100.py", *flags, "--fname", whole)[0] == 0
    part.mkdir()
    for name in ("model_0.pth", "opt_0.pth", "model_best.pth"):
        shutil.copy(whole / name, part)
    assert call("train_cifar100.py", *flags, "--fname", part, "--resume=1")[0] == 0
    assert_same_run(part, whole)
    with monkeypatch.context() as patch:
        interrupt(patch, at=4)
        status, _, error = call("train_cifar100.py", *flags, "--fname", tmp_path / "part")
    assert status == 128 + signal.SIGTERM and error.count("\n") == 1
    status, output, error = call("train_cifar100.py", *flags, "--fname", tmp_path / "part", "--resume=auto")
    assert status == 0 and "# resumed after 1 epoch and 1 step, from" in output, error
    assert_same_run(tmp_path / "part", whole)
    kept = torch.load(whole / "state.pth", weights_only=True)["opt"]["run"]["kept"]
    assert kept.keys() == {"sora": {"sora"}, "free": {"free"}, "pgi": {"pgi", "pgi momentum"}, "elle-a": {"elle"},
                           "liet": {"liet"}, "atas": {"atas", "atas v"}, "uap": {"uap", "uap momentum"},
                           "cuap": {"uap", "uap momentum"},
                           "fuap": {"uap", "uap momentum", "fuap head", "fuap moments", "fuap steps"},
                           "rs-cs": {"smooth"}, "mep-cs": {"pgi", "pgi momentum", "smooth"}, "pco": {"pco"}}.get(
        method, set())
    assert all(values.any() for values in kept.values())


def test_a_name_may_take_the_place_of_its_flags(tmp_path, call, tiny):
    """A run goes on whichever way its flags are said, and with another method's not."""
    flags = [*THREE, "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags, "--method=n-aaer", "--epochs=1")[0] == 0
    refused(call("train_cifar.py", *flags, "--method=rs-aaer", "--resume=auto", "--epochs=1"), "--attack")
    said = ["--attack=nfgsm", "--fgsm-alpha=1", "--objective=aaer", "--resume=auto", "--epochs=1"]
    status, output, error = call("train_cifar.py", *flags, *said)
    assert status == 0 and "complete" in output, error


def test_a_run_takes_up_or_drops_an_average(tmp_path, call, tiny):
    """With --allow-changes: the average begins with the next step; without it, its weights are what is trained on."""
    flags = [*THREE, "--fname", tmp_path / "run", "--allow-changes"]
    for n, ema in ((0, []), (1, ["--ema=0.5"]), (2, [])):
        status, _, error = call("train_cifar.py", *flags, *ema, f"--epochs={n + 1}", f"--resume={n}")
        assert status == 0, error
    assert json.loads((tmp_path / "run" / "final.json").read_text())["epoch"] == 2


@pytest.mark.parametrize("method, names", [("pgi", ["pgi", "pgi momentum"]), ("pco", ["pco"])])
def test_what_is_stored_for_each_image_goes_on_with_more_images(method, names, tmp_path, call, tiny):
    flags = [*THREE, f"--method={method}", "--fname", tmp_path / "run", "--pgi-reset=9"]
    assert call("train_cifar.py", *flags, "--train-samples=64", "--epochs=1")[0] == 0
    for samples in (80, 48):
        status, _, error = call("train_cifar.py", *flags, f"--train-samples={samples}", "--resume=1", "--epochs=2",
                                "--allow-changes")
        assert status == 0, error
        kept = torch.load(tmp_path / "run" / "state.pth", weights_only=True)["opt"]["run"]["kept"]
        assert [len(kept[name]) for name in names] == [samples] * len(names)


@pytest.mark.parametrize("method, megabytes", [("pgi", 614), ("atas", 480)])
def test_a_run_says_how_much_its_perturbations_take(method, megabytes, tmp_path, tiny):
    """Of the 50,000 images of CIFAR, with ATAS padded by 4 on each side."""
    run = small_run(tmp_path, "--method", method, dataset=options.CIFAR10)
    pixels, labels = torch.zeros(1, dtype=torch.uint8).expand(50000, 32, 32, 3), torch.zeros(1).expand(50000)
    run = dataclasses.replace(run, train=data.Images(pixels, labels))
    lines = [*train.notes(run, train.Plan(None, [], (run.train, run.held_out, run.test), False, None))]
    assert f"--attack {method} stores {megabytes} MB of perturbations, in half precision, on cpu" in lines


# The command line


def parsed(dataset, *flags: str) -> dict:
    return options.parse(dataset, argv=list(flags)).flags()


PUBLISHED = {
    "fgsm": "--attack=fgsm --fgsm-init=zero --fgsm-alpha=1",
    "fgsm-rs": "--attack=fgsm --fgsm-init=random --fgsm-alpha=1.25",
    "zerograd": "--attack=zerograd --fgsm-init=random --fgsm-alpha=2 --zero-iters=1",
    "multigrad": "--attack=multigrad --fgsm-alpha=2 --multi-samps=3 --multi-th=-1",
    "pgd": "--attack=pgd --pgd-alpha=2 --pgd-iters=10",
    "pgd-2": "--attack=pgd --pgd-step=0.5 --pgd-iters=2 --fgsm-init=random",
    "rs-cs": "--attack=nfgsm --noise-k=1 --fgsm-alpha=1 --objective=smooth --smooth-lambda=1 --smooth-gap=0.03 "
             f"--smooth-at=start --label-smoothing={4 / 9}",
    "mep-cs": "--attack=pgi --fgsm-alpha=1 --pgi-reset=40 --objective=smooth --smooth-lambda=1 --smooth-gap=0.03 "
              f"--smooth-at=clean --label-smoothing={4 / 9}",
    "n-fgsm": "--attack=nfgsm --fgsm-alpha=1 --noise-k=2",
    "n-aaer": "--attack=nfgsm --fgsm-alpha=1 --noise-k=2 --objective=aaer",
    "rs-aaer": "--attack=fgsm --fgsm-init=random --fgsm-alpha=1.25 --objective=aaer",
    "gradalign": "--attack=fgsm --fgsm-init=zero --fgsm-alpha=1.25 --objective=gradalign",
    "elle": "--attack=fgsm --fgsm-init=zero --fgsm-alpha=1 --objective=elle",
    "elle-a": "--attack=fgsm --fgsm-init=zero --fgsm-alpha=1 --objective=elle --elle-adaptive --elle-lambda=4000",
    "free": "--attack=free --free-replays=8",
    "ckpt": "--attack=ckpt --fgsm-alpha=1.25 --ckpt-count=3",
    "pgi": f"--attack=pgi --fgsm-alpha=1 --pgi-reset=40 --objective=logits --logits-lambda=10 "
           f"--label-smoothing={4 / 9}",
    "nuat": "--attack=nuclear --fgsm-alpha=1 --objective=nuclear --nuclear-lambda=4.5",
    "pco": f"--attack=pco --fgsm-alpha=1 --objective=pco --pco-lambda=10 --pco-scale=1.5 --label-smoothing={4 / 9}",
    "gat": "--attack=guided --fgsm-alpha=1 --objective=guided --guided-lambda=10",
    "trades": "--attack=kl --pgd-alpha=2 --pgd-iters=10 --objective=trades --trades-beta=6",
    "sora": "--attack=sora --objective=ce --label-smoothing=0",
    "n-lap": "--attack=n_lap --fgsm-alpha=1 --noise-k=2 --lap-beta=0.001",
    "r-lap": "--attack=r_lap --fgsm-alpha=1.25 --fgsm-init=random --lap-beta=0.002",
    "liet": "--attack=liet --fgsm-alpha=1 --liet-noise=0.1,0.5 --liet-every=20 --objective=liet --liet-smoothing=0.6 "
            "--liet-lambda=100",
    "atas": "--attack=atas --pad-mode=zero --rotate=0 --atas-c=0.01 --atas-warmup=5 --atas-reset=10",
    **{name: f"--attack={name} --fgsm-alpha=1 --uap-alpha=10 --uap-decay=0.3 --fuap-rows=50 --objective=logits "
             "--logits-lambda=10 --label-smoothing=0.4" for name in ("uap", "cuap", "fuap")},
}


def test_every_method_is_written_out():
    assert PUBLISHED.keys() == methods.METHODS.keys() == PASSES.keys()


@pytest.mark.parametrize("script_name", DATASETS)
@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_is_its_flags_and_gives_way_to_any_flag_beside_it(method, script_name):
    dataset, flags = DATASETS[script_name], PUBLISHED[method].split()
    if script_name == "train_cifar.py":  # the same numbers, written in other ways
        found, expected = parsed(dataset, "--method", method), parsed(dataset, *flags)
        assert {**found, "method": None} == {**expected, "method": None} and found["method"] == method
    others = {"attack": "multigrad", "fgsm_init": "random", "fgsm_alpha": 3.5, "objective": "ce", "elle_adaptive": True,
              "label_smoothing": 0.25, "pgd_iters": 3, "pgd_step": 0.75, "noise_k": 3.0, "smooth_at": "clean"}
    required = methods.ATTACKS[methods.METHODS[method].flags["attack"]].requires
    for flag in methods.METHODS[method].flags.keys() - required:
        value = others[flag]
        beside = [f"--{flag.replace('_', '-')}" + ("" if value is True else f"={value}")]
        for order in (["--method", method, *beside], [*beside, "--method", method]):
            named = parsed(dataset, *order)
            assert named[flag] == value
            stands_for = {**methods.METHODS[method].flags, **methods.METHODS[method].on.get(dataset.name, {})}
            kept = {name: value for name, value in stands_for.items() if name != flag}
            assert {name: named[name] for name in kept} == kept


@pytest.mark.parametrize("script_name", DATASETS)
def test_without_a_method_nothing_is_changed(script_name):
    """The defaults are those that were published with ZeroGrad and MultiGrad."""
    args = parsed(DATASETS[script_name])
    for flag, value in dict(method=None, recipe=None, attack="multigrad", objective="ce", fgsm_alpha=2.0,
                            fgsm_init="random", model="PreActResNet18", batch_size=128, epsilon=8.0, eps_warmup=0.0,
                            pgd_alpha=2.0, pgd_iters=10, label_smoothing=0.0, ema=0.0, mean=None, std=None,
                            elle_adaptive=False, multi_samps=3, zero_iters=1).items():
        assert args[flag] == value, flag
    for name in ("fgsm", "zerograd", "multigrad", "pgd", "sora", "free", "kl", "none"):
        assert parsed(DATASETS[script_name], "--attack", name)["fgsm_alpha"] == 2.0
    for name, alpha in (("nfgsm", 1.0), ("pgi", 1.0), ("pco", 1.0), ("nuclear", 1.0), ("guided", 1.0), ("ckpt", 1.25),
                        ("n_lap", 1.0), ("r_lap", 1.25), ("liet", 1.0), ("uap", 1.0), ("cuap", 1.0), ("fuap", 1.0)):
        assert parsed(DATASETS[script_name], "--attack", name)["fgsm_alpha"] == alpha
        assert parsed(DATASETS[script_name], "--attack", name, "--fgsm-alpha=0.5")["fgsm_alpha"] == 0.5


@pytest.mark.parametrize("script_name", DATASETS)
def test_method_list_shows_every_method(script_name, call):
    """With the passes, the source, the text, and the flags on the script's data set; nothing is run."""
    status, output, error = call(script_name, "--method=list", "--device=nonsense")
    lines = output.splitlines()
    rows = lines[next(number for number, line in enumerate(lines) if line.startswith("--method ")) + 1:]
    assert status == 0 and error == "" and [line.split()[0] for line in rows[::2]] == list(methods.METHODS)
    for described, flags, method in zip(rows[::2], rows[1::2], methods.METHODS.values(), strict=True):
        assert described.split()[1] == method.passes and method.source in described and described.endswith(method.text)
        assert flags.strip() == options.as_flags(method.flags_on(DATASETS[script_name].name))
    status, output, _ = call(script_name, "--help")
    assert status == 0 and "--method NAME" in output and "(default: None)" not in output


def test_the_fastat_recipe_is_that_benchmarks():
    """Flags beside it win, on either side; with a method, each sets what is its own, and both may be given."""
    fastat = dict(model="ResNet18", epochs=100, lr_schedule="onecycle-epoch", lr_max=0.1, label_smoothing=0.4,
                  ema=0.9995, val_size=1000, mean=(0, 0, 0), std=(1, 1, 1), pad_mode="zero", rotate=0,
                  final_model="best", batch_size=128, momentum=0.95, momentum_low=0.85)
    on_tiny = dict(model="PreActResNet18", no_final_norm=True, val_size=2000)
    for dataset in DATASETS.values():
        expected = fastat | (on_tiny if dataset is options.TINY else {})
        args, plain = parsed(dataset, "--recipe=fastat"), parsed(dataset)
        assert {name: args[name] for name in expected} == expected
        assert {**args, **{name: plain[name] for name in [*expected, "recipe"]}} == plain
        for flags in (["--recipe=fastat", "--epochs=7", "--ema=0"], ["--epochs=7", "--ema=0", "--recipe=fastat"]):
            args = parsed(dataset, *flags)
            assert (args["epochs"], args["ema"], args["lr_max"]) == (7, 0, 0.1)
        for method in methods.METHODS:
            args = parsed(dataset, "--recipe=fastat", "--method", method)
            assert (args["attack"], args["model"]) == (methods.METHODS[method].flags["attack"], expected["model"])
            assert args["label_smoothing"] == (0 if refuses_smoothing(method) else 0.4)  # also where it has its own
            assert args["attack_smoothing"] == (0.4 if method in SMOOTHED_ATTACKS else 0)
            assert args["ckpt_mode"] == ("train" if method == "ckpt" else "eval")


# Methods whose attack there is on the smoothed cross-entropy by a flag of its own.
SMOOTHED_ATTACKS = {"fgsm", "fgsm-rs", "n-fgsm", "ckpt", "nuat", "rs-cs", "gat"}


def refuses_smoothing(method: str) -> bool:
    args = options.parse(options.CIFAR10, argv=[f"--method={method}"])
    requires = {**methods.ATTACKS[args.attack].requires, **methods.OBJECTIVES[args.objective].requires}
    return requires.get("label_smoothing") == 0


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=lambda dataset: dataset.name)
def test_the_papers_recipe_is_for_every_method(dataset):
    epochs, lr_max = (15, 0.01) if dataset is options.SVHN else (30, 0.2)
    for method in [[], *([f"--method={name}"] for name in methods.METHODS)]:
        args, plain = parsed(dataset, "--recipe=paper", *method), parsed(dataset, *method)
        expected = dict(epochs=epochs, lr_schedule="cyclic", lr_max=lr_max, recipe="paper")
        assert args == {**plain, **expected}


def test_a_recipes_flag_that_the_method_refuses_is_dropped_with_a_note(tmp_path, call, small_dummy):
    flags = [*SMALL, "--epochs=1", "--method=sora", "--recipe=fastat", "--model=PreActResNet18", "--val-size=8"]
    status, output, error = call("train_cifar.py", *flags, "--fname", tmp_path / "run")
    assert status == 0 and "--label-smoothing=0.0, not 0.4 as in --recipe fastat" in output, error
    refused(call("train_cifar.py", *flags, "--label-smoothing=0.4", "--fname", tmp_path / "run"), "--label-smoothing 0")


def test_the_authors_settings_on_svhn():
    """Epsilon grows over five epochs, with a higher rate; N-FGSM has more noise where epsilon is large."""
    for method in ("n-fgsm", "n-aaer", "rs-aaer", "gradalign", "elle", "elle-a", "free", "fgsm", "pgi"):
        warms = method not in ("free", "fgsm", "pgi")
        args = parsed(options.SVHN, f"--method={method}")
        assert (args["eps_warmup"], args["lr_max"]) == ((5, 0.05) if warms else (0, {"free": 0.04}.get(method, 0.01)))
        assert parsed(options.CIFAR10, f"--method={method}")["eps_warmup"] == 0
    for dataset, flags, k in ((options.SVHN, ["--epsilon=12"], 3), (options.SVHN, ["--epsilon=10"], 2),
                              (options.CIFAR10, ["--epsilon=16"], 2), (options.SVHN, ["--noise-k=1"], 1),
                              (options.CIFAR10, ["--epsilon=16", "--model=WideResNet"], 4)):
        assert parsed(dataset, "--method=n-fgsm", *flags)["noise_k"] == k


@pytest.mark.parametrize("dataset, classes, reset", [(options.CIFAR10, 10, 40), (options.CIFAR100, 100, 10)])
def test_pgi_keeps_three_fifths_of_a_label_and_resets_as_its_authors_do(dataset, classes, reset):
    args = parsed(dataset, "--method=pgi")
    assert 1 - args["label_smoothing"] * (1 - 1 / classes) == pytest.approx(0.6) and args["pgi_reset"] == reset
    assert parsed(dataset, "--method=pgi", "--pgi-reset=7")["pgi_reset"] == 7
    assert parsed(dataset, "--pgi-reset=7", "--label-smoothing=0", "--method=pgi")["label_smoothing"] == 0


@given(epsilon=st.floats(0, 255), alpha=st.floats(0, 255), step=st.floats(0, 4))
def test_pgds_training_step_is_the_evaluations_unless_it_has_its_own(epsilon, alpha, step):
    """The evaluation's to the last bit."""
    for attack in ("pgd", "kl"):
        flags = (f"--epsilon={epsilon}", f"--pgd-alpha={alpha}")
        assert keywords_of(attack, *flags)["alpha"] == alpha / 255
        assert keywords_of(attack, *flags, f"--pgd-step={step}")["alpha"] == step * epsilon / 255
        assert parsed(options.CIFAR10, *flags, f"--pgd-step={step}")["pgd_alpha"] == alpha


# GradAlign's weights at epsilon 1, 2, ... as published.
GRADALIGN = {"CIFAR": (.027, .036, .047, .063, .084, .112, .150, .2, .267, .356, .474, .632, .843, 1.124, 1.5, 2),
             "SVHN": (1.657, 1.757, 1.864, 1.976, 2.096, 2.223, 2.357, 2.5, 2.651, 2.812, 2.982, 3.162)}


@pytest.mark.parametrize("dataset, key", [(options.CIFAR10, "CIFAR"), (options.CIFAR100, "CIFAR"),
                                          (options.SVHN, "SVHN")])
def test_weights_by_epsilon_are_the_published_ones(dataset, key):
    for epsilon, value in enumerate(GRADALIGN[key], 1):
        found = parsed(dataset, "--method=gradalign", f"--epsilon={epsilon}")["gradalign_lambda"]
        assert found == pytest.approx(value, abs=1e-3), epsilon
    for epsilons, value in (((2, 4, 6, 8), 1000), ((10, 12, 14, 16, 18, 20), 5000), ((22, 24, 26), 10000)):
        for epsilon in epsilons:
            assert parsed(dataset, "--method=elle", f"--epsilon={epsilon}")["elle_lambda"] == value
            assert parsed(dataset, "--method=elle-a", f"--epsilon={epsilon}")["elle_lambda"] == 4000
    for flags, value in ((["--gradalign-lambda=0.7"], 0.7), (["--epsilon=16", "--gradalign-lambda=0"], 0)):
        assert parsed(dataset, "--method=gradalign", *flags)["gradalign_lambda"] == value
    assert parsed(dataset, "--method=elle", "--elle-lambda=3")["elle_lambda"] == 3


@pytest.mark.parametrize("epsilon, rs_10, n_10, rs_100, n_100", [
    (8, (2.5, 1.5), (1.5, 0.15), (3.5, 1.5), (1.5, 0.15)), (12, (5, 2.75), (5, 0.55), (3.5, 2.75), (3.5, 0.3)),
    (16, (7, 3.25), (8.5, 1.5), (6, 2.25), (6, 0.5)), (32, (5.75, 1.5), (2.75, 0.75), (5, 0.75), (3.5, 0.5))])
def test_aaers_weights_are_the_published_ones(epsilon, rs_10, n_10, rs_100, n_100):
    cifar, cifar100 = options.CIFAR10, options.CIFAR100
    for dataset, method, pair in ((cifar, "rs-aaer", rs_10), (cifar, "n-aaer", n_10), (cifar100, "rs-aaer", rs_100),
                                  (cifar100, "n-aaer", n_100), (options.TINY, "rs-aaer", rs_100)):
        assert parsed(dataset, f"--method={method}", f"--epsilon={epsilon}")["aaer_lambdas"] == (1, *pair)
        near = parsed(dataset, f"--method={method}", f"--epsilon={epsilon + 0.4}")
        assert near["aaer_lambdas"] == (1, *pair)
        given_ones = parsed(dataset, f"--method={method}", f"--epsilon={epsilon}", "--aaer-lambdas=1,2,3")
        assert given_ones["aaer_lambdas"] == (1, 2, 3)


@pytest.mark.parametrize("epsilon, n, r, v", [
    (8, 0.001, 0.002, 0.03), (12, 0.002, 0.03, 0.058), (16, 0.005, 0.05, 0.07), (32, 0.75, 0.3, 0.48)])
def test_laps_shares_are_the_published_ones(epsilon, n, r, v):
    for flags, beta in (("--method=n-lap", n), ("--method=r-lap", r), ("--method=r-lap --fgsm-init=zero", v),
                        ("--method=n-lap --fgsm-init=zero", n), ("--method=r-lap --lap-beta=0.4", 0.4)):
        for near in (epsilon, epsilon - 0.4):
            assert parsed(options.CIFAR10, *flags.split(), f"--epsilon={near}")["lap_beta"] == beta


@pytest.mark.parametrize("dataset, rows", [(options.CIFAR10, 50), (options.CIFAR100, 200), (options.TINY, 300),
                                           (options.SVHN, 50)])
def test_fuap_has_as_many_perturbations_as_published(dataset, rows):
    assert parsed(dataset, "--method=fuap")["fuap_rows"] == rows
    assert parsed(dataset, "--method=fuap", "--fuap-rows=7")["fuap_rows"] == 7


@pytest.mark.parametrize("dataset, epsilon, smoothing, weight, noise, every", [
    (options.CIFAR10, 8, 0.6, 100, (0.1, 0.5), 20), (options.CIFAR100, 8, 0.8, 200, (0.1, 0.5), 20),
    (options.SVHN, 4, 0.6, 100, (0.1, 0.5), 20), (options.CIFAR10, 16, 0.4, 20, (0, 1), 10),
    (options.CIFAR100, 16, 0.4, 20, (0, 1), 20), (options.SVHN, 12, 0.4, 20, (0, 1), 20)])
def test_liets_numbers_are_the_published_ones(dataset, epsilon, smoothing, weight, noise, every):
    args = parsed(dataset, "--method=liet", f"--epsilon={epsilon}")
    names = ("liet_smoothing", "liet_lambda", "liet_noise", "liet_every")
    assert tuple(args[name] for name in names) == (smoothing, weight, noise, every)
    beside = parsed(dataset, "--method=liet", "--liet-smoothing=0", "--liet-lambda=0", "--liet-noise=0,0.25",
                    "--liet-every=7")
    assert tuple(beside[name] for name in names) == (0, 0, (0, 0.25), 7)


@pytest.mark.parametrize("flags, named", [
    *((f"--attack={attack} --objective={objective}", f"--objective {objective}")
      for attack in ("none", "free", "kl", "nuclear", "guided", "n_lap", "r_lap", "atas")
      for objective in ("gradalign", "aaer", "logits", "liet", "smooth", "pco")),
    ("--attack=multigrad --multi-parallel --objective=aaer", "--multi-parallel"),
    *((f"--norm=l_2 {flags}", "--attack fgsm/pgd/none/sora and --objective ce: ") for flags in (
        "", "--method=zerograd", "--method=n-fgsm", "--method=gradalign", "--method=trades")),
    ("--method=sora --objective=elle", "--objective ce"),
    ("--method=sora --label-smoothing=0.1", "--label-smoothing 0"),
    ("--method=sora --amp --amp-impl=apex", "--amp-impl native"),
    ("--method=n-lap --amp --amp-impl=apex", "--amp-impl native"), ("--lap-beta=-1", "--lap-beta"),
    ("--method=fuap --amp --amp-impl=apex", "--amp-impl native"), ("--fuap-rows=0", "--fuap-rows"),
    ("--uap-alpha=256", "--uap-alpha"), ("--uap-decay=2", "--uap-decay"),
    ("--method=liet --label-smoothing=0.1", "--label-smoothing 0"), ("--liet-noise=0.5,0.1", "--liet-noise"),
    ("--liet-noise=0.5", "--liet-noise"), ("--liet-noise=0,nan", "--liet-noise"), ("--liet-every=0", "--liet-every"),
    ("--method=atas --pad-mode=reflect", "--pad-mode zero"), ("--attack=atas --rotate=15", "--rotate 0"),
    ("--atas-c=0", "--atas-c"), ("--atas-reset=0", "--atas-reset"),
    ("--method=nonsense", "--method"), ("--recipe=nonsense", "--recipe"), ("--attack=nonsense", "--attack"),
    ("--objective=nonsense", "--objective"), ("--aaer-lambdas=1,2", "--aaer-lambdas"), ("--ema=1.5", "--ema"),
    ("--ckpt-count=1", "--ckpt-count"), ("--free-replays=0", "--free-replays"), ("--pgi-reset=0", "--pgi-reset"),
    ("--label-smoothing=2", "--label-smoothing"), ("--eps-warmup=-1", "--eps-warmup"), ("--noise-k=nan", "--noise-k"),
    ("--elle-lambda=inf", "--elle-lambda"), ("--mean=1,2", "--mean"), ("--method", "--method")])
def test_what_does_not_go_together_is_refused_in_one_line(flags, named, tmp_path, call):
    refused(call("train_cifar.py", *SMALL, "--fname", tmp_path / "run", *flags.split()), named)
    assert not (tmp_path / "run").exists()


def test_a_flag_of_another_attack_is_no_reason_to_refuse():
    assert parsed(options.CIFAR10, "--method=n-aaer", "--multi-parallel")["objective"] == "aaer"


# Schedules, averages, and epsilon's growth


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(4, 300), epochs=st.integers(1, 200), lr_max=st.floats(1e-3, 1))
def test_onecycle_is_pytorchs(steps, epochs, lr_max):
    """Step s (from 0) of a run of S is at the time (s + 1) / S of its epochs. From where the rate is highest on, this
    is OneCycleLR to rounding. Before, PyTorch stretches its part, to begin at the lowest rate itself: what its step s
    has, ours has at the time 0.3 s / (0.3 S - 1), and so up to one step earlier."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr_max, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr_max, total_steps=steps)
    peak = 0.3 * steps - 1
    lr, momentum = rates(f"--lr-max={lr_max}", f"--epochs={epochs}", "--lr-schedule=onecycle")
    for s in range(steps):
        group = optimizer.param_groups[0]
        share = 0.3 * s / peak if s <= peak else (s + 1) / steps
        assert abs(share - (s + 1) / steps) <= 1 / steps + 1e-12
        assert lr(share * epochs) == pytest.approx(group["lr"], rel=1e-6, abs=1e-9 * lr_max)
        assert momentum(share * epochs) == pytest.approx(group["momentum"], rel=1e-9)
        optimizer.step()
        if s + 1 < steps:
            schedule.step()
    assert lr(0) == pytest.approx(lr_max / 25)
    assert lr(0.3 * epochs) == pytest.approx(lr_max)
    assert lr(epochs) == pytest.approx(lr_max / 25 / 1e4)


@settings(max_examples=30, deadline=None)
@given(epochs=st.integers(2, 120), steps=st.integers(1, 50), step=st.integers(0, 49))
def test_onecycle_by_epoch_is_pytorchs_with_a_step_an_epoch(epochs, steps, step):
    """In every step of an epoch, the rate and the momentum are those of OneCycleLR after as many calls as epochs."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1, momentum=0.9)
    lr, momentum = rates("--lr-max=0.1", f"--epochs={epochs}", "--lr-schedule=onecycle-epoch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs)
        for epoch in range(epochs):
            now, group = epoch + (step % steps + 1) / steps, optimizer.param_groups[0]
            assert lr(now) == pytest.approx(group["lr"], rel=1e-9, abs=1e-15)
            assert momentum(now) == pytest.approx(group["momentum"], rel=1e-9)
            optimizer.step()
            if epoch + 1 < epochs:
                schedule.step()


@settings(max_examples=30, deadline=None)
@given(epochs=st.integers(1, 60), share=st.floats(0, 1), high=st.floats(0, 1), low=st.floats(0, 1))
def test_momentum_is_lowest_where_the_cyclic_rate_is_highest(epochs, share, high, low):
    """As PyTorch's CyclicLR has it; by default, it is 0.9 throughout, to the bit."""
    cyclic, t = [f"--epochs={epochs}", "--lr-schedule=cyclic", "--lr-max=0.2"], share * epochs
    lr, momentum = rates(*cyclic, f"--momentum={high}", f"--momentum-low={low}")
    assert momentum(t) == pytest.approx(high - (high - low) * lr(t) / 0.2, abs=1e-9)
    assert rates(*cyclic)[1](t) == 0.9
    assert rates(*cyclic, "--lr-schedule=onedrop", f"--momentum={high}")[1](t) == high


def rates(*flags: str):
    """The learning rate and the momentum as functions of the time in epochs."""
    args = options.parse(options.SVHN, argv=list(flags))
    return train.schedule(args, options.SVHN), train.momentum(args, options.SVHN)


@pytest.mark.parametrize("flags, moves", [(["--lr-schedule=onecycle"], True), (["--lr-schedule=cyclic"], False),
                                          (["--lr-schedule=onedrop"], False)])
def test_a_run_has_the_schedules_learning_rate_and_momentum_in_every_step(flags, moves, tmp_path, tiny):
    run = small_run(tmp_path, "--epochs=5", *flags)
    seen, schedule = [], run.schedule
    for epoch in range(5):
        run.state.begin_epoch(epoch)
        metrics = train.train_epoch(run, lambda: seen.append(dict(run.state.optimizer.param_groups[0])))
        assert metrics["lr"] == schedule(epoch + 1)
    momentum = [run.momentum((s + 1) / 3) if moves else 0.9 for s in range(15)]
    assert [group["momentum"] for group in seen] == pytest.approx(momentum)
    assert {group["weight_decay"] for group in seen} == {5e-4}
    assert [group["lr"] for group in seen] == pytest.approx([schedule((s + 1) / 3) for s in range(15)])
    if moves:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1, momentum=0.9)
        torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=15)
        for s in range(15):  # from the step after 0.3 * 15 - 1 on, the very same
            if s > 3.5:
                assert seen[s]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
                assert seen[s]["momentum"] == pytest.approx(optimizer.param_groups[0]["momentum"], rel=1e-9)
            optimizer.step()
            torchs.step() if s < 14 else None


def test_the_average_is_of_weights_and_buffers_and_is_what_is_judged_and_saved(tmp_path, call, tiny, monkeypatch):
    """From the weights after the first step: nine tenths of itself and a tenth of the network after each step."""
    averages, runs, train_epoch = [], [], train.train_epoch

    def spy(run, after_step):
        def observed():
            now = {name: value.double().clone() for name, value in run.state.model.state_dict().items()}
            averages.append({name: 0.9 * averages[-1][name] + 0.1 * value for name, value in now.items()}
                            if averages else now)
            after_step()
        runs.append(run)
        return train_epoch(run, observed)

    judged = []
    steps, measure = train.robustness.attack_steps, train.measure
    monkeypatch.setattr(train, "train_epoch", spy)
    monkeypatch.setattr(train.robustness, "attack_steps",
                        lambda model, *rest: judged.append(model.state_dict()) or steps(model, *rest))
    monkeypatch.setattr(train, "measure", lambda run: {**measure(run), "score": run.state.epoch, "test_robust_acc": 1})
    flags = [*THREE, "--attack=fgsm", "--ema=0.9", "--lr-schedule=onedrop", "--epochs=2", "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags)[0] == 0
    state, moved = runs[-1].state, 0
    saved = [torch.load(tmp_path / "run" / f"model_{name}.pth", weights_only=True) for name in (1, "best", "healthy")]
    whole = torch.load(tmp_path / "run" / "state.pth", weights_only=True)
    for name, value in averages[-1].items():
        if name.endswith("num_batches_tracked"):
            continue
        for found in (state.ema.module.state_dict(), state.evaluated.state_dict(), judged[-1], *saved, whole["model"]):
            torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-9)
        assert torch.equal(whole["opt"]["run"]["raw"][name], state.model.state_dict()[name])
        moved += not torch.allclose(value, state.model.state_dict()[name].double(), rtol=1e-3)
    assert moved >= 4 and len(averages) == 6


def test_the_average_is_pytorchs_bit_by_bit_in_two_calls():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    average = Average(model, 0.9)
    pytorchs = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        model(torch.rand(2, 3, 6, 6))
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        pytorchs.update_parameters(model)
        with Calls() as calls:
            average.update()
        assert calls.names == ["aten::_foreach_lerp_.Scalar", "aten::_foreach_copy_"]
        expected = {**pytorchs.module.state_dict(), "1.num_batches_tracked": model[1].num_batches_tracked}
        assert_same(dict(average.module.state_dict()), dict(expected))


def test_an_evaluation_is_of_the_average_whether_or_not_it_is_told_so(tmp_path, call, tiny):
    """model_N.pth holds the average alone."""
    flags = [*THREE, "--attack=fgsm", "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags, "--ema=0.9")[0] == 0
    for ema in (["--ema=0.9"], []):
        assert call("train_cifar.py", *flags, *ema, "--eval", "--resume=3")[0] == 0
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    for record in json.loads((tmp_path / "run" / "evaluation.json").read_text()):
        assert record["final"]["robust_loss"] == final["robust_loss"]


@pytest.mark.parametrize("warmup", [0.0, 1.0, 1.5, 4.0])
def test_epsilon_and_the_attacks_step_grow_from_zero_step_by_step(warmup, tmp_path, tiny):
    """Linearly over so many epochs, in the attack and in the objective; an attack without a step is given none."""
    flags = ["--epsilon=10", "--fgsm-alpha=1.25", f"--eps-warmup={warmup}", "--epochs=2"]
    run = small_run(tmp_path, "--attack=fgsm", *flags)
    attack, objective, seen = run.attack, run.objective, []

    def spied_attack(model, x, y, epsilon, alpha, step):
        seen.append([epsilon, alpha])
        return attack(model, x, y, epsilon, alpha, step=step)

    def spied_objective(model, x, y, delta, epsilon, step):
        seen[-1].append(epsilon)
        assert delta.abs().max() <= epsilon * (1 + 1e-6)
        return objective(model, x, y, delta, epsilon, step)

    run = dataclasses.replace(run, attack=spied_attack, objective=spied_objective)
    for epoch in range(2):
        run.state.begin_epoch(epoch)
        train.train_epoch(run)
    for s, found in enumerate(seen):
        grown = min(1, (s + 1) / 3 / warmup) if warmup else 1
        assert found == pytest.approx([grown * 10 / 255, grown * 12.5 / 255, grown * 10 / 255]), s
    assert len(seen) == 6
    seen.clear()
    run = dataclasses.replace(small_run(tmp_path, "--attack=none", f"--eps-warmup={warmup}"),
                              attack=lambda model, x, y, epsilon, step: seen.append(epsilon) or torch.zeros_like(x))
    train.train_epoch(run)
    assert seen[0] == pytest.approx((min(1, 1 / 3 / warmup) if warmup else 1) * 8 / 255)


# The network


def test_resnet18_is_the_one_whose_checkpoints_are_exchanged():
    """Its names, in their order, and its size; and that a state dict of these names loads."""
    net = networks.ResNet18()
    assert sum(p.numel() for p in net.parameters()) == 11_173_962
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["conv1.weight", *(f"bn1.{name}" for name in norm)]
    for layer in range(1, 5):
        for block in range(2):
            for part in (1, 2):
                names += [f"layer{layer}.{block}.conv{part}.weight",
                          *(f"layer{layer}.{block}.bn{part}.{name}" for name in norm)]
            if layer > 1 and block == 0:
                names += [f"layer{layer}.0.shortcut.0.weight", *(f"layer{layer}.0.shortcut.1.{name}" for name in norm)]
    assert list(net.state_dict()) == [*names, "linear.weight", "linear.bias"]
    foreign = {f"module.{name}": torch.rand_like(value, dtype=torch.float32).to(value.dtype)
               for name, value in net.state_dict().items()}
    checkpoints.load_network(net, {"net": foreign, "acc": 90.0}, "a file")
    assert torch.equal(net.state_dict()["layer3.0.shortcut.1.running_mean"],
                       foreign["module.layer3.0.shortcut.1.running_mean"])


def test_resnet18_halves_the_image_three_times_and_normalizes_it():
    net, sizes = networks.ResNet18(num_classes=7, base_width=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).eval(), []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        layer.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape)))
    x = torch.rand(2, 3, 32, 32)
    answer = net(x)
    assert sizes == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)] and answer.shape == (2, 7)
    plain = networks.ResNet18(num_classes=7, base_width=4).eval()
    plain.load_state_dict(net.state_dict())
    normalized = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(answer, plain(normalized))
    with torch.no_grad():  # a block: relu(convolved + shortcut), BatchNorm before the first relu and before the sum
        block, inside = net.layer2[0], torch.rand(2, 4, 8, 8)
        convolved = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(inside)))))
        expected = torch.relu(convolved + block.shortcut[1](block.shortcut[0](inside)))
        torch.testing.assert_close(block(inside), expected)


def test_a_run_of_resnet18_in_the_recipe(tmp_path, call, small_dummy):
    """All of the recipe's modifiers at once, on the network that it names."""
    flags = [*THREE, "--recipe=fastat", "--method=n-fgsm", "--epochs=1", "--val-size=16", "--fname", tmp_path / "run"]
    status, _, error = call("train_cifar.py", *flags)
    assert status == 0, error
    assert "layer2.0.shortcut.1.weight" in torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)


# Two processes


PROGRAM = """
import sys
import torch
from torch import nn
from helpers import SMALL, SmallNet
from singlestep import data
from singlestep import options
from singlestep import train
from singlestep.methods import METHODS
from singlestep.run.folder import Folder
from singlestep.run.distributed import CPU, World
from singlestep.run.console import StopSignals

folder, world = sys.argv[1], World.join(CPU)
data.DUMMY_SIZES, data.DUMMY_SIDE = {True: 32, False: 16}, 32
dataset, draws = options.SVHN, 0
methods = list(METHODS)

class Steady(nn.Module):
    # In float64, so that rounding turns no sign over, and with BatchNorm in eval mode.
    def __init__(self):
        super().__init__()
        self.network = SmallNet(3, 10).double()
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.mul_(5)
    def forward(self, x):
        return self.network(x.double())
    def train(self, mode=True):
        return super().train(False)

def pattern(values, low=0.0, high=1.0):
    # Numbers that depend on how often some were drawn, and not on which image they are for.
    global draws
    draws += 1
    row = torch.arange(values[0].numel()) + 1
    row = ((row * 12.9898 + draws * 78.233).sin() * 43758.5453).frac().abs().view(values.shape[1:])
    return values.copy_(low + (high - low) * row.to(values.dtype))

drawn = {"rand_like": lambda x: pattern(torch.empty_like(x)),
         "randn_like": lambda x: pattern(torch.empty_like(x), -1, 1),
         "rand": lambda *size, **kind: pattern(torch.empty(*size, **kind))}
real = {name: getattr(torch, name) for name in drawn}
uniform = torch.Tensor.uniform_

for mode in ("eval", "train"):
    train.new_network = lambda dataset, args: Steady() if mode == "eval" else SmallNet(3, 10)
    for method in methods:
        args = options.parse(dataset, argv=[*SMALL, *"--train-samples=27 --batch-size=12 --epochs=3 --free-replays=2 "
                             "--pgi-reset=3 --pgd-iters=3 --lr-schedule=onedrop --lr-max=0.05 --epsilon=24 "
                             "--atas-warmup=0 --atas-reset=2".split(), "--method", method, "--fname", folder])
        state, layout = train.build(dataset, args, CPU, world)
        images = [each.to(CPU, layout) for each in data.load(dataset, args)]
        run = train.assemble(dataset, args, state, Folder(folder), world, StopSignals(), images)
        if mode == "eval":
            vars(torch).update(drawn)
            torch.Tensor.uniform_ = pattern
            draws = 0
        losses = []
        try:
            for epoch in range(3 if mode == "eval" else 1):
                state.begin_epoch(epoch)
                losses.append(train.train_epoch(run)["train_robust_loss"])
        finally:
            vars(torch).update(real)
            torch.Tensor.uniform_ = uniform
        torch.save({"model": state.model.state_dict(), "kept": state.kept, "losses": losses},
                   f"{folder}/{mode} {method} {world.rank} of {world.size}.pt")
world.leave()
"""


@pytest.mark.slow
def test_two_processes_keep_the_same_and_take_the_steps_of_one(tmp_path):
    """Three epochs of batches of 12, 12 and 3 images, BatchNorm in eval mode, in float64 and with the same noise for
    every image: what is kept is the same in both processes and, as the weights, what one process comes to. Then an
    epoch with BatchNorm in train mode: weights and what is kept are the same in both."""
    (tmp_path / "program.py").write_text(PROGRAM)
    for run in (forked, together):
        done = run(tmp_path / "program.py", tmp_path)
        assert done.returncode == 0, done.stderr

    def result(mode, method, process):
        return torch.load(tmp_path / f"{mode} {method} {process}.pt", weights_only=True)

    for method in methods.METHODS:
        for mode in ("eval", "train"):
            first, second = (result(mode, method, f"{rank} of 2") for rank in range(2))
            assert first["kept"].keys() == second["kept"].keys() and first["losses"] == second["losses"]
            for name, value in first["kept"].items():
                assert torch.equal(value, second["kept"][name]) and value.any(), (method, mode, name)
            for name, value in first["model"].items():
                if "running" not in name:
                    assert torch.equal(value, second["model"][name]), (method, mode, name)
        if method in ("n-aaer", "rs-aaer", "nuat"):  # of each process's own images
            continue
        first, alone = result("eval", method, "0 of 2"), result("eval", method, "0 of 1")
        loose = {"trades": 1e-3, "gradalign": 1e-5, "elle": 1e-5, "elle-a": 1e-5, "gat": 1e-5}  # of float32
        tolerance = loose.get(method, 1e-7)
        torch.testing.assert_close(first["model"], alone["model"], rtol=tolerance, atol=tolerance)
        for name, value in alone["kept"].items():
            limit = 2e-3 if name == "pgi momentum" else tolerance  # where float16 rounds the other way
            torch.testing.assert_close(first["kept"][name], value, rtol=limit, atol=limit)
        assert first["losses"] == pytest.approx(alone["losses"], rel=tolerance)
