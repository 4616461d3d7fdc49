"""From the real command line to the loss, the weights and the accuracies, against the method written out again here.

No attack, objective, schedule or augmentation of the project is used for what is expected, only its network, without
the normalization. Both sides compute in float64, where rounding decides no sign; pixels and perturbations are float32.
"""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from helpers import DATASETS, plain_evaluation
from PIL import Image

from singlestep import methods, options, train
from singlestep.data import load
from singlestep.networks import PreActResNet18
from singlestep.run.console import StopSignals
from singlestep.run.device import seed_everything
from singlestep.run.distributed import World
from singlestep.run.folder import Folder

SIDE, IMAGES, BATCH, STEPS, SEED, EPSILON, CPU = 16, 20, 8, 3, 3, 4 / 255, torch.device("cpu")
RNG = np.random.default_rng(0)


def own_images(n):
    """A coarse pattern each, under noise, some pixels at the edge of what there is; and labels by chance."""
    patterns = RNG.integers(256, size=(n, 4, 4, 3)).repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)
    noise = RNG.integers(-20, 21, size=patterns.shape)
    return (patterns + noise).clip(0, 255).astype(np.uint8), RNG.integers(10, size=n)


TRAIN, TEST = own_images(24), own_images(32)

# Classes, mean, std, padding mode (None: no augmentation), degrees; the schedule's flags, its rate at a time in epochs,
# and the epoch to train in: on CIFAR-10's way up to its peak and SVHN's way down from it, on CIFAR-100 around the drop.
SCRIPTS = {
    "train_cifar.py": (10, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616), "reflect", 0,
                       ["--epochs=4", "--lr-schedule=cyclic", "--lr-max=0.3"],
                       lambda t: np.interp(t, [0, 2, 4], [0, 0.3, 0]), 1),
    "train_cifar100.py": (100, (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
                          (0.2673342858792401, 0.2564384629170883, 0.27615047132568404), "constant", 15,
                          ["--epochs=3", "--lr-schedule=onedrop", "--lr-max=0.2", "--lr-drop=1.5"],
                          lambda t: 0.2 if t < 1.5 else 0.02, 1),
    "train_svhn.py": (10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), None, 0,
                      ["--epochs=4", "--lr-schedule=cyclic", "--lr-max=0.3"],
                      lambda t: np.interp(t, [0, 1, 4], [0, 0.3, 0]), 1),
}


def gradient(network, x, delta, y, smoothing=0.0):
    delta = delta.clone().requires_grad_()
    logs = network(x + delta).log_softmax(dim=1)
    loss = -(1 - smoothing) * logs[torch.arange(len(y)), y].mean() - smoothing * logs.mean()
    return torch.autograd.grad(loss, delta)[0]


def inside(delta, x):
    return delta.clamp(-EPSILON, EPSILON).maximum(-x).minimum(1 - x)


def random_start(x):
    return inside(torch.empty_like(x).uniform_(-EPSILON, EPSILON), x)


def fgsm(network, x, y, alpha, delta):
    return inside(delta + alpha * gradient(network, x, delta, y).sign(), x)


def zerograd(network, x, y, alpha, q, steps, smoothing=0.0):
    delta = random_start(x)
    for _ in range(steps):
        g = gradient(network, x, delta, y, smoothing)
        for image in g:
            magnitude = image.abs().double().numpy()
            image[torch.from_numpy(magnitude < np.quantile(magnitude, q))] = 0
        delta = inside(delta + alpha * g.sign(), x)
    return delta


def multigrad(network, x, y, alpha, n, threshold, parallel=False, smoothing=0.0):
    if parallel:
        xs = torch.cat([x] * n)
        signs = gradient(network, xs, random_start(xs), torch.cat([y] * n), smoothing).sign().chunk(n)
    else:
        signs = [gradient(network, x, random_start(x), y, smoothing).sign() for _ in range(n)]
    s = sum(signs)
    s[s.abs() < threshold - (n - threshold)] = 0
    return inside(alpha * s.sign(), x)


def pgd(network, x, y, alpha, steps, delta):
    for _ in range(steps):
        delta = fgsm(network, x, y, alpha, delta)
    return delta


# The flags, the attack, and its forward passes in a step. Steps below epsilon, or clipping would hide them.
ATTACKS = {
    "fgsm zero": (["--attack=fgsm", "--fgsm-init=zero", "--fgsm-alpha=0.75"],
                  lambda *batch: fgsm(*batch, 3 / 255, torch.zeros_like(batch[1])), 1),
    "fgsm random": (["--attack=fgsm", "--fgsm-alpha=0.75"],
                    lambda *batch: fgsm(*batch, 3 / 255, random_start(batch[1])), 1),
    "zerograd": (["--attack=zerograd", "--fgsm-alpha=0.75", "--zero-qval=0.55", "--zero-iters=2"],
                 lambda *batch: zerograd(*batch, 3 / 255, 0.55, 2), 2),
    "zerograd smoothed": (["--attack=zerograd", "--fgsm-alpha=0.75", "--zero-qval=0.55", "--attack-smoothing=0.5"],
                          lambda *batch: zerograd(*batch, 3 / 255, 0.55, 1, smoothing=0.5), 1),
    "multigrad all": (["--fgsm-alpha=0.75", "--multi-samps=4"], lambda *batch: multigrad(*batch, 3 / 255, 4, 4), 4),
    "multigrad 2 of 3": (["--attack=multigrad", "--fgsm-alpha=0.75", "--multi-samps=3", "--multi-th=2"],
                         lambda *batch: multigrad(*batch, 3 / 255, 3, 2), 3),
    "multigrad parallel": (["--attack=multigrad", "--fgsm-alpha=0.75", "--multi-th=2", "--multi-parallel"],
                           lambda *batch: multigrad(*batch, 3 / 255, 3, 2, parallel=True), 1),
    "multigrad smoothed": (["--attack=multigrad", "--fgsm-alpha=0.75", "--attack-smoothing=0.5"],
                           lambda *batch: multigrad(*batch, 3 / 255, 3, 3, smoothing=0.5), 3),
    "pgd": (["--attack=pgd", "--pgd-alpha=1.5", "--pgd-iters=3"],
            lambda *batch: pgd(*batch, 1.5 / 255, 3, random_start(batch[1])), 3),
    "pgd zero": (["--attack=pgd", "--pgd-alpha=1", "--pgd-step=0.375", "--pgd-iters=3", "--fgsm-init=zero"],
                 lambda *batch: pgd(*batch, 1.5 / 255, 3, torch.zeros_like(batch[1])), 3),
}

# The flags, the loss and the logits at the perturbed images, and its forward passes in a step.
OBJECTIVES = {
    "ce": ([], lambda net, x, y, delta: (F.cross_entropy(logits := net((x + delta).clamp(0, 1)), y), logits), 1),
}


# The rivals, whose functions have references of their own in test_methods.py: the flags, and what is called with what.
SIZES = ["--epsilon=4", "--fgsm-alpha=0.75", "--pgd-alpha=1.5", "--pgd-iters=3", "--label-smoothing=0.3",
         "--attack-smoothing=0.2"]
RIVAL_ATTACKS = {
    "none": ([], {}), "nfgsm": (["--noise-k=1.5"], dict(alpha=3 / 255, k=1.5, smoothing=0.2)),
    "sora": (["--label-smoothing=0", "--norm=l_2"], dict(norm="l_2")),
    "ckpt": (["--ckpt-count=5", "--ckpt-mode=train"], dict(alpha=3 / 255, count=5, mode="train", smoothing=0.2)),
    "free": ([], {}),
    "pgi": (["--pgi-reset=7"], dict(alpha=3 / 255, reset=7, smoothing=0.3)),
    "liet": (["--liet-smoothing=0.7", "--liet-noise=0.2,0.9", "--liet-every=6"],
             dict(alpha=3 / 255, smoothing=0.7, noise=(0.2, 0.9), every=6)),
    "uap": (["--uap-alpha=7", "--uap-decay=0.6"], dict(alpha=3 / 255, a=7 / 255, smoothing=0.3, decay=0.6)),
    "cuap": (["--uap-alpha=7", "--uap-decay=0.6"], dict(alpha=3 / 255, a=7 / 255, smoothing=0.3, decay=0.6)),
    "fuap": (["--uap-alpha=7", "--uap-decay=0.6", "--fuap-rows=9"],
             dict(alpha=3 / 255, a=7 / 255, count=9, smoothing=0.3, decay=0.6)),
    "kl": ([], dict(alpha=1.5 / 255, steps=3)),
    "nuclear": (["--nuclear-lambda=2.5"], dict(alpha=3 / 255, weight=2.5, smoothing=0.2)),
    "n_lap": (["--noise-k=1.5", "--lap-beta=0.2", "--lap-up"], dict(alpha=3 / 255, k=1.5, beta=0.2, up=True)),
    "r_lap": (["--fgsm-init=zero"], dict(alpha=3 / 255, init="zero", beta=0.03, up=False)),
    "atas": (["--atas-c=0.2", "--atas-warmup=3", "--atas-reset=4"], dict(c=0.2, warmup=3, reset=4)),
    "pco": ([], dict(alpha=3 / 255, smoothing=0.3)),
    "guided": (["--guided-lambda=7"], dict(alpha=3 / 255, weight=7, smoothing=0.2)),
}
RIVAL_OBJECTIVES = {
    "gradalign": (["--gradalign-lambda=0.6"], dict(weight=0.6)),
    "elle": (["--elle-lambda=70", "--elle-adaptive"], dict(weight=70, adaptive=True)),
    "aaer": (["--aaer-lambdas=2,3,0.5"], dict(weights=(2, 3, 0.5))), "trades": (["--trades-beta=5"], dict(beta=5)),
    "nuclear": (["--nuclear-lambda=2.5"], dict(weight=2.5)), "logits": (["--logits-lambda=9"], dict(weight=9)),
    "liet": (["--label-smoothing=0", "--liet-smoothing=0.7", "--liet-lambda=8"], dict(smoothing=0.7, weight=8)),
    "guided": (["--guided-lambda=7"], dict(weight=7)),
    "pco": (["--pco-lambda=8", "--pco-scale=2"], dict(weight=8, scale=2)),
    "smooth": (["--smooth-lambda=2", "--smooth-gap=0.1", "--smooth-at=start"], dict(weight=2, gap=0.1, point="start")),
}


@pytest.mark.parametrize("kind, name", [("attack", name) for name in RIVAL_ATTACKS] + [
    ("objective", name) for name in RIVAL_OBJECTIVES])
def test_the_rivals_are_called_with_what_the_command_line_says(kind, name):
    flags, expected = (RIVAL_ATTACKS if kind == "attack" else RIVAL_OBJECTIVES)[name]
    argv = [*SIZES, "--attack=fgsm", f"--{kind}={name}", *flags]
    args = options.parse(DATASETS["train_cifar.py"], argv=argv)
    if kind == "objective":
        expected = {"smoothing": 0.3, **expected}
    record = (methods.ATTACKS if kind == "attack" else methods.OBJECTIVES)[name]
    found = args.keywords({**record.keywords, **getattr(record, "update_keywords", {})})
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(value) for key, value in expected.items())


def test_every_attack_and_objective_of_the_command_line_is_here():
    def chosen(flag, cases):
        parsed = [options.parse(DATASETS["train_cifar.py"], argv=flags) for flags, *_ in cases.values()]
        return {vars(args)[flag] for args in parsed}

    assert chosen("attack", ATTACKS) | RIVAL_ATTACKS.keys() == methods.ATTACKS.keys()
    assert chosen("objective", OBJECTIVES) | RIVAL_OBJECTIVES.keys() == methods.OBJECTIVES.keys()


def run_of(script, flags, tmp_path):
    """The run that the script makes of the command line, its network in float64; and the network's first weights."""
    dataset = replace(DATASETS[script], source=lambda data_dir: (TRAIN, TEST))
    args = options.parse(dataset, argv=[
        "--device=cpu", "--base-width=4", f"--batch-size={BATCH}", f"--train-samples={IMAGES}", f"--seed={SEED}",
        "--epsilon=4", f"--fname={tmp_path}", *flags])
    world = World()
    state, layout = train.build(dataset, args, CPU, world)
    for network in {state.model, state.evaluated}:
        network.double().register_forward_pre_hook(lambda module, inputs: inputs[0].double())
    for each in state.optimizer.state.values():
        each["momentum_buffer"] = each["momentum_buffer"].double()
    images = [each.to(CPU, layout) for each in load(dataset, args)]
    first = {name: value.clone() for name, value in state.model.state_dict().items()}
    return train.assemble(dataset, args, state, Folder(tmp_path), world, StopSignals(), images), first


def own_network(script, weights):
    """The network with these weights, and the function of images that it is behind the normalization."""
    classes, mean, std, *_ = SCRIPTS[script]
    net = PreActResNet18(classes, base_width=4).double()
    net.load_state_dict(weights)
    mean, std = (torch.tensor(values).view(3, 1, 1).double() for values in (mean, std))
    return net, lambda x: net((x.double() - mean) / std)


def augmented(pixels, mode, degrees, top, left, flip, angle):
    """One image through the published transforms."""
    picture = Image.fromarray(pixels)
    if mode:
        picture = TF.crop(TF.pad(picture, 4, padding_mode=mode), int(top), int(left), SIDE, SIDE)
        picture = TF.hflip(picture) if flip else picture
        picture = TF.rotate(picture, float(angle)) if degrees else picture
    return TF.to_tensor(picture)


def trained(script, weights, attack, objective):
    """Three steps from `weights`: the state dict after them, and the epoch's loss, accuracy and mean abs(delta)."""
    *_, mode, degrees, _, schedule, epoch = SCRIPTS[script]
    net, network = own_network(script, weights)
    pixels, labels = TRAIN
    momentum, found = [0.0 for _ in net.parameters()], np.zeros(3)
    seed_everything(0, SEED, epoch)
    order = torch.randperm(IMAGES)
    drawn = [torch.randint(9, (IMAGES,)), torch.randint(9, (IMAGES,)), torch.rand(IMAGES) < 0.5,
             torch.empty(IMAGES, dtype=torch.float64).uniform_(-degrees, degrees)]
    for step in range(STEPS):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        y = torch.tensor(labels[order[batch]])
        x = torch.stack([augmented(pixels[i], mode, degrees, *each)
                         for i, *each in zip(order[batch], *(values[batch] for values in drawn))])
        seed_everything(1, SEED, epoch, step, 0)
        delta = attack(network, x, y)
        loss, logits = objective(network, x, y, delta)
        found += len(y) / IMAGES * np.array([loss.item(), (logits.argmax(dim=1) == y).double().mean(),
                                             255 * delta.abs().mean()])
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for i, (weight, grad) in enumerate(zip(net.parameters(), gradients)):
                momentum[i] = 0.9 * momentum[i] + grad + 5e-4 * weight
                weight -= schedule(epoch + (step + 1) / STEPS) * momentum[i]
    return net.state_dict(), found


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_three_steps_are_those_of_the_method(script, attack, objective, tmp_path):
    (attack_flags, own_attack, passes), (objective_flags, own_objective, more) = ATTACKS[attack], OBJECTIVES[objective]
    *_, schedule_flags, schedule, epoch = SCRIPTS[script]
    run, first = run_of(script, [*attack_flags, *objective_flags, *schedule_flags], tmp_path)
    wanted = []  # at each forward pass, the parameters whose gradients autograd gets ready for
    run.network.register_forward_pre_hook(lambda module, inputs: wanted.append(
        sum(parameter.requires_grad for parameter in module.parameters())))
    run.state.begin_epoch(epoch)
    metrics = train.train_epoch(run)

    expected = ([0] * passes + [len(list(run.network.parameters()))] * more) * STEPS
    assert wanted[:len(expected)] == expected
    weights, (loss, accuracy, magnitude) = trained(script, first, own_attack, own_objective)
    assert metrics["train_robust_loss"] == pytest.approx(loss, rel=1e-9)
    assert metrics["train_robust_acc"] == pytest.approx(accuracy) and metrics["train_images"] == IMAGES
    assert metrics["defence_mean"] == pytest.approx(magnitude, rel=1e-6)
    assert metrics["lr"] == pytest.approx(schedule(epoch + 1))
    for name, value in run.state.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("averaged", [False, True])
def test_evaluations_attack_as_the_flags_say(averaged, tmp_path):
    """With --ema, they are all of the averaged network; what is class 0 to it is class 1 to the other, and so on."""
    flags = "--pgd-alpha=0.5 --test-iters=3 --test-restarts=2 --final-iters=5 --final-restarts=3 --final-samples=24 " \
            "--val-size=4"
    run, _ = run_of("train_cifar.py", [*flags.split(), "--ema=0.5" if averaged else "--ema=0"], tmp_path)
    train.train_epoch(run)
    model, (x, _) = (run.state.ema.module if averaged else run.state.model).eval(), run.test.batch(slice(None))
    with torch.no_grad():
        model.linear.bias -= model(x).mean(dim=0)  # or all answers were the same, too far apart for the attack
        labels = model(x).argmax(dim=1)
        run.held_out.labels.copy_(model(run.held_out.batch(slice(None))[0]).argmax(dim=1))
    labels[::8] = (labels[::8] + 1) % 10
    run.test.labels.copy_(labels)
    net, network = own_network("train_cifar.py", model.state_dict())
    net.eval()
    if averaged:
        run.state.model.load_state_dict(model.state_dict())
        for parameter in run.state.model.linear.parameters():
            parameter.data = parameter.data.roll(1, 0)
    epoch = train.measure(run)

    for n, right, steps, restarts, prefix, found in (
            (32, 28, 3, 2, "test_", epoch), (24, 21, 5, 3, "", train.final_evaluation(run))):
        robust, loss = plain_evaluation(network, run.test[:n], EPSILON, 0.5 / 255, steps, restarts, SEED)
        assert 0 < robust.sum() < right
        assert found[f"{prefix}acc" if prefix else "clean_acc"] == right / n and found[f"{prefix}images"] == n
        assert found[f"{prefix}robust_acc"] == robust.double().mean()
        assert found[f"{prefix}robust_loss"] == pytest.approx(loss.double().mean().item(), rel=1e-6)

    fgsm, _ = plain_evaluation(network, run.test, EPSILON, EPSILON, 1, 1, SEED, init="zero")
    robust, _ = plain_evaluation(network, run.held_out, EPSILON, 0.5 / 255, 3, 2, SEED)
    assert epoch["fgsm_acc"] == fgsm.double().mean() and epoch["score"] == robust.double().mean()
    assert epoch["val_robust_acc"] == epoch["score"] > 0
    seed_everything(2, SEED, 0)
    g = gradient(network, x, torch.zeros_like(x), labels).flatten(1)
    other = gradient(network, x, torch.empty_like(x).uniform_(-EPSILON, EPSILON), labels).flatten(1)
    assert epoch["alignment"] == pytest.approx(torch.cosine_similarity(g, other).mean().item(), rel=1e-5)
    participation = g.abs().sum(dim=1).square() / g.square().sum(dim=1) / g.shape[1]
    assert epoch["participation"] == pytest.approx(participation.mean().item(), rel=1e-5)
