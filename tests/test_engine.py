"""Schedules, the training step, and the two evaluations, against results that can be worked out by hand."""
import argparse
import math
import os
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import engine
import train_cifar
import train_svhn
from attacks import fgsm, pgd, zerograd
from data import Augmentation, Images
from device import choose_device, to_compile
from distributed import World
from engine import NotFinite, Progress, Trainer, closing_attack, evaluate, train_epoch
from precision import Precision, prepare_momentum
from run import first_batches
from utils import UsageError, cyclic_lr, onedrop_lr, seed_everything

FLOAT32 = Precision(False, "bfloat16", "native", torch.device("cpu"))
EPSILON = 8 / 255


def test_cyclic_schedule_at_its_corners():
    cifar, svhn = train_cifar.DATASET, train_svhn.DATASET
    for dataset, epochs, peak in ((cifar, 30, 15), (svhn, 15, 6), (cifar, 5, 2), (svhn, 5, 2)):
        assert dataset.peak(epochs) == peak
        lr = partial(cyclic_lr, lr_max=0.2, peak=peak, epochs=epochs)
        assert lr(0) == 0 and lr(epochs) == 0 and lr(peak) == 0.2
        assert lr(peak / 2) == pytest.approx(0.1) and lr((peak + epochs) / 2) == pytest.approx(0.1)
    assert cyclic_lr(0.5, 0.2, 0, 1) == pytest.approx(0.1)  # a single epoch only goes down
    assert cyclic_lr(1.0, 0.2, 0, 1) == 0


def test_onedrop_schedule_at_its_corners():
    assert onedrop_lr(49.999, 0.1, 50) == 0.1
    assert onedrop_lr(50, 0.1, 50) == pytest.approx(0.01)
    assert onedrop_lr(0, 0.1, 0) == pytest.approx(0.01)


@settings(max_examples=50, deadline=None)
@given(keys=st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3).map(tuple), min_size=2, max_size=5,
                     unique=True))
def test_random_numbers_are_a_function_of_their_key(keys):
    def draw(key):
        seed_everything(*key)
        return torch.randint(2**62, (1,)).item()
    drawn = [draw(key) for key in keys]
    assert drawn == [draw(key) for key in keys] and len(set(drawn)) == len(keys)


PAGES = """
import resource, torch
from device import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = new_pages()
keep_freed_memory()
print(usual, min(new_pages() for _ in range(6)))  # not the first, and small things may be in the way of another
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_used_again_without_new_pages():
    """In a process of its own: how the heap of this one is cut up depends on the tests before."""
    usual, kept = map(int, subprocess.check_output([sys.executable, "-c", PAGES], cwd=ROOT, text=True).split())
    assert kept < usual / 10


def test_a_part_of_the_batches_is_batches_0_to_the_floor():
    images = Images(torch.zeros(1000, 32, 32, 3, dtype=torch.uint8), torch.zeros(1000, dtype=torch.long))
    assert len(first_batches(images, 10, 10)) == 110  # 100 batches: 0..10
    assert len(first_batches(images, 128, 10)) == 128  # 8 batches: 0
    assert len(first_batches(images[:5], 128, 10)) == 5


class Brightness(nn.Module):
    """Says class 1 where the mean pixel is above one half: what PGD does to it can be worked out by hand."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))

    def forward(self, x):
        z = self.scale * (x.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-z, z], dim=1)


def grey(values, labels) -> Images:
    pixels = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 32, 32, 3).contiguous()
    return Images(pixels, torch.tensor(labels))


# Value, label, right without a perturbation, right under every perturbation of at most 8.
GREY = [(140, 1, True, True), (136, 1, True, True), (135, 1, True, False), (128, 1, True, False),
        (127, 1, False, False), (60, 0, True, True), (119, 0, True, True), (120, 0, True, False), (127, 0, True, False),
        (200, 0, False, False), (255, 1, True, True), (0, 0, True, True)]


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_evaluations_count_what_can_be_counted_by_hand(batch_size):
    images = grey([row[0] for row in GREY], [row[1] for row in GREY])
    clean, robust = (sum(row[i] for row in GREY) / len(GREY) for i in (2, 3))
    attack = partial(pgd, epsilon=EPSILON, alpha=2 / 255, steps=10)
    found = evaluate(Brightness(), images, attack, 1, batch_size, (0,), FLOAT32)
    assert (found["test_acc"], found["test_robust_acc"], found["test_images"]) == (clean, robust, len(GREY))
    assert 7 < found["attack_mean"] <= 8.0001
    done = []
    found = closing_attack(Brightness(), images, EPSILON, 2 / 255, 10, 2, batch_size, 0, FLOAT32, progress=done.append)
    assert (found["clean_acc"], found["robust_acc"], found["images"]) == (clean, robust, len(GREY))
    assert sum(done) == len(GREY)


class Wavy(nn.Module):
    """A fixed network in float64 whose decisions change within a small ball."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(3072, 16, generator=generator, dtype=torch.float64) / 10)
        self.second = nn.Parameter(torch.randn(16, 3, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return (torch.tanh(x.double().flatten(1) @ self.first) @ self.second).float()


def wavy_images(n=40):
    pixels = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = Images(pixels, torch.zeros(n, dtype=torch.long))
    labels = Wavy()(images.batch(slice(None))[0]).argmax(dim=1)
    labels[::10] = (labels[::10] + 1) % 3  # some are wrong from the start
    return Images(pixels, labels)


def test_an_image_broken_by_any_restart_is_never_robust():
    images, model, restarts = wavy_images(), Wavy(), 6
    x, y = images.batch(slice(None))
    held = model(x).argmax(dim=1) == y
    each = []
    for restart in range(restarts):  # with steps of size 0 an attack is its random start alone
        delta = engine._starts(images, 0.15, 3, restart).clamp(-x, 1 - x)
        each.append(model(x + delta).argmax(dim=1) == y)
    robust = torch.stack([held, *each]).all(dim=0)
    assert 0 < robust.sum() < min(right.sum() for right in each)  # no single restart breaks them all
    for batch_size in (3, 7, 40, 64):
        found = closing_attack(model, images, 0.15, 0.0, 1, restarts, batch_size, 3, FLOAT32)
        assert found["robust_acc"] == robust.double().mean() and found["clean_acc"] == held.double().mean()


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_the_shrinking_batch_finds_what_the_plain_attack_finds(batch_size):
    images, model, epsilon, alpha, steps, restarts = wavy_images(), Wavy(), 0.004, 0.001, 5, 3
    x, y = images.batch(slice(None))
    robust = model(x).argmax(dim=1) == y
    loss = torch.where(robust, 0, F.cross_entropy(model(x), y, reduction="none"))
    for restart in range(restarts):
        delta = engine._starts(images, epsilon, 0, restart).clamp(-x, 1 - x)
        for step in range(steps + 1):
            wanted = delta.clone().requires_grad_()
            losses = F.cross_entropy(model(x + wanted), y, reduction="none")
            broken = robust & (model(x + delta).argmax(dim=1) != y)
            loss = torch.where(broken, losses, torch.where(robust & (step == steps), loss.maximum(losses), loss))
            robust &= ~broken
            grad, = torch.autograd.grad(losses.sum(), wanted)
            delta = (delta + alpha * grad.sign()).clamp(-epsilon, epsilon).clamp(-x, 1 - x)
    assert 5 < robust.sum() < 35
    found = closing_attack(model, images, epsilon, alpha, steps, restarts, batch_size, 0, FLOAT32)
    assert found["robust_acc"] == robust.double().mean()
    assert found["robust_loss"] == pytest.approx(loss.mean().item(), rel=1e-5)


def test_a_process_that_no_image_is_left_for_finds_nothing(monkeypatch):
    monkeypatch.setattr(World, "_reduced", lambda self, values, operation: values)
    monkeypatch.setattr(World, "broadcast_buffers", lambda self, model: None)
    found = closing_attack(Wavy(), wavy_images()[:2], EPSILON, 2 / 255, 2, 2, 8, 0, FLOAT32, World(rank=4, size=8))
    assert found == {"clean_loss": 0, "clean_acc": 0, "robust_loss": 0, "robust_acc": 0, "images": 2}


def test_the_shrinking_batch_does_less_work():
    images, passed = wavy_images(), []
    model = Wavy()
    model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
    found = closing_attack(model, images, 0.3, 0.1, 20, 10, 8, 0, FLOAT32)
    assert found["robust_acc"] < 0.2
    assert sum(passed) < 0.3 * 20 * 10 * len(images)
    assert sum(size == 8 for size in passed) > 0.5 * len(passed)


def test_a_lower_precision_is_judged_only_where_there_is_something_to_judge():
    passed, model = [], Wavy()
    model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
    lowered = Precision(True, "bfloat16", "native", torch.device("cpu"))
    found = closing_attack(model, wavy_images(), 1e-4, 1e-4, 6, 2, 8, 0, lowered)
    assert found["robust_acc"] > 0.5 and min(passed) > 0


def test_evaluation_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 3)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, wavy_images(), partial(fgsm, epsilon=EPSILON, alpha=EPSILON), 2, 16, (0,), FLOAT32)
    closing_attack(model, wavy_images(), EPSILON, EPSILON, 2, 2, 16, 0, FLOAT32)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def small_trainer(model, images, attack, lr=0.1, precision=FLOAT32):
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0, momentum=0.9, weight_decay=5e-4, fused=True)
    return Trainer(model, model, optimizer, attack, lambda t: lr * t, images, Augmentation(), 16, 5, precision, World())


def test_a_training_step_is_the_published_one():
    """Two epochs against the update written out by hand in float64."""
    images, attack = wavy_images(40), partial(zerograd, epsilon=EPSILON, alpha=2 * EPSILON, q=0.35, init="zero")
    torch.manual_seed(1)
    model = Wavy()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer, progress = small_trainer(model, images, attack), Progress()
    metrics = []
    for _ in range(2):
        metrics.append(train_epoch(trainer, progress))
        progress.next_epoch()

    shadow, momentum = Wavy(), {}
    with torch.no_grad():
        for name, value in shadow.named_parameters():
            value.copy_(weights[name])
    for epoch in range(2):
        seed_everything(engine.ORDER, 5, epoch)
        order = torch.randperm(40)
        total = right = 0
        for step in range(3):
            x, y = images.batch(order[step * 16:(step + 1) * 16])
            delta = attack(shadow, x, y)
            logits = shadow((x + delta).clamp(0, 1))
            loss = F.cross_entropy(logits, y)
            gradients = torch.autograd.grad(loss, list(shadow.parameters()))
            total, right = total + loss.item() * len(y), right + (logits.argmax(dim=1) == y).sum().item()
            lr = 0.1 * (epoch + (step + 1) / 3)
            with torch.no_grad():
                for (name, value), gradient in zip(shadow.named_parameters(), gradients):
                    momentum[name] = 0.9 * momentum.get(name, 0) + gradient + 5e-4 * value
                    value -= lr * momentum[name]
        assert metrics[epoch]["train_robust_acc"] == right / 40 and metrics[epoch]["train_images"] == 40
        assert metrics[epoch]["train_robust_loss"] == pytest.approx(total / 40, rel=1e-6)
        assert metrics[epoch]["lr"] == pytest.approx(0.1 * (epoch + 1))
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, shadow.get_parameter(name), rtol=1e-9, atol=1e-9)


def test_the_attack_sees_the_model_in_training_mode_and_unaugmented_delta_is_counted():
    seen = []

    def attack(model, x, y):
        seen.append((model.training, len(x)))
        return torch.full_like(x, 3 / 255)

    metrics = train_epoch(small_trainer(Wavy(), wavy_images(40), attack), Progress())
    assert seen == [(True, 16), (True, 16), (True, 8)]
    assert metrics["defence_mean"] == pytest.approx(3)


def test_a_first_step_that_float16_skips_leaves_no_trace():
    """PyTorch's fused SGD would otherwise leave the momentum of such a step uninitialized."""
    precision = Precision(True, "float16", "native", torch.device("cpu"))
    model = nn.Linear(4, 2)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    prepare_momentum(optimizer)
    precision.backward_and_step(model(torch.full((1, 4), 1e38)).sum() * 1e38, optimizer)
    assert torch.equal(model.weight, before)
    assert all((state["momentum_buffer"] == 0).all() for state in optimizer.state.values())


def test_a_loss_that_is_not_finite_stops_the_epoch_and_names_the_first_step():
    calls = []

    def attack(model, x, y):
        calls.append(1)
        return torch.full_like(x, math.nan if len(calls) >= 2 else 0.0)

    with pytest.raises(NotFinite) as fault:
        train_epoch(small_trainer(Wavy(), wavy_images(40), attack), Progress())
    assert fault.value.step == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_trains_nearly_alike_and_is_judged_in_float32(dtype):
    precision = Precision(True, dtype, "native", torch.device("cpu"))
    images, seen = wavy_images(32), []
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, 3)

        def forward(self, x):
            hidden = self.conv(x)
            seen.append((hidden.dtype, torch.is_grad_enabled()))
            return self.linear(torch.relu(hidden).mean(dim=(2, 3)))

    model = Net()
    start = model.linear.weight.detach().clone()
    trained = {}
    for kind in (FLOAT32, precision):
        with torch.no_grad():
            model.linear.weight.copy_(start)
        attack = partial(fgsm, epsilon=EPSILON, alpha=EPSILON)
        metrics = train_epoch(small_trainer(model, images, attack, precision=kind), Progress())
        trained[kind] = metrics["train_robust_loss"]
    assert trained[precision] == pytest.approx(trained[FLOAT32], rel=0.05)
    low = getattr(torch, dtype)
    seen.clear()
    evaluate(model, images, partial(pgd, epsilon=EPSILON, alpha=EPSILON, steps=2), 1, 16, (0,), precision)
    assert {kind for kind, attacking in seen if attacking} == {low}
    assert {kind for kind, attacking in seen if not attacking} == {torch.float32}


def test_tf32_is_on_only_where_it_is_asked_for_and_never_where_accuracy_is_judged():
    def allowed():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    for asked in (True, False):
        precision = Precision(False, "bfloat16", "native", torch.device("cpu"), tf32=asked)
        assert allowed() == (asked, asked) and precision.is_float32 != asked
        with pytest.raises(KeyError), precision.float32():
            assert allowed() == (False, False)
            raise KeyError
        assert allowed() == (asked, asked)


def test_deterministic_on_cuda_asks_for_deterministic_kernels(monkeypatch):
    """As far as this can be seen without a GPU."""
    monkeypatch.setattr("device.cuda_devices", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr("os.environ", {})
    try:
        for asked in (False, True):
            args = argparse.Namespace(device="auto", deterministic=asked)
            assert choose_device(args) == torch.device("cuda", 0)
            assert torch.are_deterministic_algorithms_enabled() == asked
            assert torch.backends.cudnn.benchmark == (not asked)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_gpu_whose_driver_does_not_start_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(argparse.Namespace(device="auto", deterministic=False)) == torch.device("cpu")
    with pytest.raises(UsageError, match=r"--device cuda is not there.*take --device cpu"):
        choose_device(argparse.Namespace(device="cuda", deterministic=False))


@pytest.mark.parametrize("device, flags, expected", [
    ("cuda:0", {}, True), ("cpu", {}, False), ("cpu", {"compile": True}, True), ("cuda:0", {"compile": False}, False),
    ("cuda:0", {"deterministic": True}, False), ("cuda:0", {"sync_bn": True}, False),
    ("cuda:0", {"amp": True}, True), ("cuda:0", {"amp": True, "amp_impl": "apex"}, False),
    ("cuda:0", {"deterministic": True, "compile": True}, True)])
def test_the_compiler_is_for_cuda_unless_it_breaks_another_flags_promise(device, flags, expected):
    args = argparse.Namespace(**{"compile": None, "deterministic": False, "sync_bn": False, "amp": False,
                                 "amp_impl": "native", **flags})
    assert to_compile(args, torch.device(device)) == expected
