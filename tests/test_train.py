"""Schedules, seeds, the training step, precision and how training ends, against what can be worked out by hand."""
import argparse
import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import DATASETS, EPSILON, FLOAT32, ROOT, TINY, Brightness, SmallNet, Wavy, precision, wavy_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from singlestep import evaluation, networks, objectives, options, train
from singlestep.attacks import confident_gradient, fgsm, frozen, input_gradient, zerograd
from singlestep.data import Augmentation, Images
from singlestep.robustness import PGD, evaluate
from singlestep.run.console import Failure, Progress, Screen, Stopped, StopSignals, UsageError
from singlestep.run.device import Compiled, Padded, bytes_per_image, choose_device, evaluation_batch, seed_everything
from singlestep.run.distributed import ALONE, CPU, World
from singlestep.run.folder import Folder
from singlestep.run.state import State


def schedule_of(dataset, *flags):
    args = options.parse(dataset, argv=list(flags))
    return train.schedule(args, dataset)


def test_cyclic_schedule_at_its_corners():
    cifar, svhn = options.CIFAR10, options.SVHN
    for dataset, epochs, peak in ((cifar, 30, 15), (svhn, 15, 6), (cifar, 5, 2), (svhn, 5, 2)):
        lr = schedule_of(dataset, "--lr-schedule=cyclic", "--lr-max=0.2", f"--epochs={epochs}")
        assert lr(0) == 0 and lr(epochs) == 0 and lr(peak) == 0.2
        assert lr(peak / 2) == pytest.approx(0.1) and lr((peak + epochs) / 2) == pytest.approx(0.1)
    lr = schedule_of(cifar, "--lr-schedule=cyclic", "--lr-max=0.2", "--epochs=1")  # a single epoch only goes down
    assert lr(0.5) == pytest.approx(0.1) and lr(1.0) == 0


def test_onedrop_schedule_at_its_corners():
    lr = schedule_of(options.CIFAR10, "--lr-max=0.1")
    assert lr(49.999) == 0.1 and lr(50) == pytest.approx(0.01)
    assert schedule_of(options.CIFAR10, "--lr-max=0.1", "--lr-drop=0")(0) == pytest.approx(0.01)


@settings(max_examples=50, deadline=None)
@given(keys=st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3).map(tuple), min_size=2, max_size=5,
                     unique=True))
def test_random_numbers_are_a_function_of_their_key(keys):
    def draw(key):
        seed_everything(*key)
        return torch.randint(2**62, (1,)).item()
    drawn = [draw(key) for key in keys]
    assert drawn == [draw(key) for key in keys] and len(set(drawn)) == len(keys)


def test_the_tests_compute_on_one_thread():
    """conftest.py has to say so before PyTorch is imported."""
    assert torch.get_num_threads() == 1


# The training step


def small_run(model, images, attack=None, precision=FLOAT32, folder="nowhere", held_out=slice(0), **changes):
    """A run of `model`, trained and tested on `images`; the learning rate is a tenth of the time in epochs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0, momentum=0.9, weight_decay=5e-4, fused=True)
    args = {"batch_size": 16, "seed": 5, "epsilon": 8.0, "pgd_alpha": 2.0, "epochs": 9, "eval": False,
            "full_test": False, "test_iters": 8, "test_restarts": 1, "chkpt_steps": None, "eps_warmup": 0.0,
            "final_iters": 50, "final_restarts": 10, "final_samples": None, "last_samples": None,
            "final_model": "last", "on_collapse": "warn",
            "attack": "fgsm", "objective": "ce", "model": "Wavy", **changes}
    return train.Run(options.Args(**args), State(model, optimizer, precision), Folder(folder), World(),
                     StopSignals(), model, model, attack, objectives.ce, None, lambda t: 0.1 * t, lambda t: 0.9,
                     Augmentation(), images, images[held_out], images)


def test_an_epoch_waits_for_the_device_at_its_end_only(monkeypatch, tmp_path):
    """Tensors without data answer nothing, so that whatever looks at a value ends in an error."""
    meta, sgd = torch.device("meta"), torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, fused, **rest: sgd(*args, **rest))  # there is no fused one
    monkeypatch.setattr(train, "new_network", lambda dataset, args: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)))
    args = options.parse(options.CIFAR10, argv=["--batch-size=4", "--lr-max=0.1", "--ema=0.9", "--method=fgsm"])
    state, layout = train.build(options.CIFAR10, args, meta, World(device=meta))
    state.precision = FLOAT32
    images = Images(torch.zeros(8, 32, 32, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.long)).to(meta, layout)
    run = train.assemble(options.CIFAR10, args, state, Folder(str(tmp_path)), World(device=meta), StopSignals(),
                         [images, images[:0], images[:1]])
    state.begin_epoch(0)
    with pytest.raises(RuntimeError, match="item") as error:
        train.train_epoch(run)
    ours = [each.name for each in error.traceback if each.path.is_relative_to(ROOT / "singlestep")]
    assert ours[-1] == "require_finite" and state.step == run.steps  # the first look: the epoch is over


# Bytes that an image stores in float32 at full width, measured on a CPU: in MiB.
STORED = dict(PreActResNet18=4.3, PreActResNet50=22.5, WideResNet=22.0)


@pytest.mark.parametrize("model", STORED)
def test_a_gpu_evaluates_what_half_of_its_memory_holds(model, monkeypatch):
    """On a tensor without data, of a GPU that is not there."""
    total = {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: argparse.Namespace(**total))

    def size(gigabytes, batch_size=128):
        total["total_memory"] = gigabytes * 2**30
        return evaluation_batch(batch_size, network, x)

    with FakeTensorMode(), torch.device("cuda"):
        network, x = getattr(networks, model)().train(), torch.zeros(2, 3, 32, 32)
        assert bytes_per_image(network, x) / 2**20 == pytest.approx(STORED[model], abs=0.1) and network.training
        for gigabytes in (8, 24):
            fit = gigabytes * 1024 / 2 / STORED[model]
            assert size(gigabytes) == max(each for each in (64, 128, 256, 512) if each < fit)
        if model == "WideResNet":
            assert (size(140), size(1), size(140, 32), size(140, 8)) == (512, 23, 128, 32)
    assert evaluation_batch(512, nn.Identity(), torch.zeros(2)) == 128  # on a CPU
    assert evaluation_batch(32, nn.Identity(), torch.zeros(2)) == 32


def test_the_size_of_an_evaluation_is_recorded(tmp_path, call, evaluates, small_dummy, monkeypatch):
    monkeypatch.setattr(train, "evaluation_batch", lambda batch_size, model, x: 7)
    monkeypatch.setattr(evaluation, "evaluation_batch", lambda batch_size, model, x: batch_size + len(x))
    assert call("train_cifar.py", *TINY, "--epochs=1", "--fname", tmp_path)[0] == 0
    assert json.loads((tmp_path / "args.json").read_text())["starts"][0]["evaluation_batch"] == 7
    for flags, expected in (([], 130), (["--batch-size=5"], 5)):
        assert evaluates(tmp_path, "--attacks=clean", "--device=cpu", "--samples=8", "--again", *flags)[0] == 0
        assert json.loads((tmp_path / "evaluation.json").read_text())[-1]["batch_size"] == expected
    assert call("train_cifar.py", *TINY, "--epochs=1", "--fname", tmp_path, "--eval", "--resume=auto")[0] == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())[-1]["batch_size"] == 10


def test_a_training_step_is_the_published_one():
    """Two epochs against the update written out by hand in float64."""
    images, attack = wavy_images(40), partial(zerograd, alpha=2 * EPSILON, q=0.35, init="zero")
    torch.manual_seed(1)
    model = Wavy()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    run, metrics = small_run(model, images, attack), []
    for epoch in range(2):
        run.state.begin_epoch(epoch)
        metrics.append(train.train_epoch(run))

    shadow, momentum = Wavy(), {}
    with torch.no_grad():
        for name, value in shadow.named_parameters():
            value.copy_(weights[name])
    for epoch in range(2):
        seed_everything(train.ORDER, 5, epoch)
        order = torch.randperm(40)
        total = right = 0
        for step in range(3):
            x, y = images.batch(order[step * 16:(step + 1) * 16])
            delta = attack(shadow, x, y, EPSILON)
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

    def attack(model, x, y, epsilon, step):
        seen.append((model.training, len(x), epsilon, step.batch))
        return torch.full_like(x, 3 / 255)

    metrics = train.train_epoch(small_run(Wavy().eval(), wavy_images(40), attack))
    assert seen == [(True, 16, EPSILON, 0), (True, 16, EPSILON, 1), (True, 8, EPSILON, 2)]
    assert metrics["defence_mean"] == pytest.approx(3)


def test_saving_within_epochs_too_short_for_it_is_noted():
    found: list[str] = []
    for steps in (3, 4):
        run = small_run(Wavy(), wavy_images(40), chkpt_steps=steps)
        run.args.model = "WideResNet"
        found += train.notes(run, train.Plan(None, [], (), False, None))
    assert [line for line in found if "--chkpt-steps" in line] == [
        "--chkpt-steps=4 has no effect: an epoch has 3 training steps"]


def test_what_a_method_keeps_is_the_states_and_what_it_finds_is_the_steps():
    seen = []

    def attack(model, x, y, epsilon, step):
        step.kept["count"] = step.kept.get("count", torch.zeros(())) + 1
        seen.append(step.logits)
        return fgsm(model, x, y, epsilon, 0.0, "zero", step)

    def objective(model, x, y, delta, epsilon, step):
        torch.testing.assert_close(step.logits, model(x))
        assert (step.start == 0).all()
        return objectives.ce(model, x, y, delta, epsilon, step)

    run = replace(small_run(Wavy(), wavy_images(40), attack), objective=objective)
    train.train_epoch(run)
    assert run.state.kept == {"count": 3} and seen == [None] * 3


# Precision and finite numbers


def test_a_first_step_that_float16_skips_leaves_no_trace():
    """PyTorch's fused SGD would otherwise leave the momentum of such a step uninitialized."""
    args = options.parse(options.CIFAR10, argv=["--amp", "--amp-dtype=float16", "--base-width=4"])
    state, _ = train.build(options.CIFAR10, args, torch.device("cpu"), World())
    before = [weight.detach().clone() for weight in state.model.parameters()]
    state.precision.backward_and_step(sum(weight.sum() for weight in state.model.parameters()) * 1e38, state.optimizer)
    assert all(map(torch.equal, state.model.parameters(), before))
    momentum = [each["momentum_buffer"] for each in state.optimizer.state.values()]
    assert len(momentum) == len(before) and not any(buffer.any() for buffer in momentum)


def test_a_loss_that_is_not_finite_stops_the_epoch_and_names_the_first_step():
    calls = []

    def attack(model, x, y, epsilon, step):
        calls.append(1)
        return torch.full_like(x, math.nan if len(calls) >= 2 else 0.0)

    with pytest.raises(Failure, match="no longer finite in epoch 1, step 2; no state was saved before: lower --lr-max"):
        train.train_epoch(small_run(Wavy(), wavy_images(40), attack))


@pytest.mark.parametrize("broken", ["weight", "statistics", "answer"])
def test_what_is_not_finite_is_never_saved(broken, tmp_path):
    """Not even where every loss was finite: the last step may have been too long, or an answer be beyond float32."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.bn = nn.Parameter(torch.ones(())), nn.BatchNorm2d(3)

        def forward(self, x):
            z = self.bn(x).mean(dim=(2, 3))
            return z if self.training else z * self.scale

    model = Net()
    run = small_run(model, wavy_images(40), folder=tmp_path)
    run.state.step = 3
    train.require_finite(run)
    with torch.no_grad():
        if broken == "weight":
            model.bn.weight[0] = math.inf
        elif broken == "statistics":
            model.bn.running_var[0] = math.inf
        else:
            model.scale.fill_(3e38)
            model.bn.weight.fill_(1e3)
    model.train()
    with pytest.raises(Failure, match="no longer finite in epoch 1, step 3"):
        train.save(run)
    assert model.training and not list(tmp_path.iterdir())


def test_small_gradients_do_not_vanish_in_float16():
    """An entry of a gradient of a mean over 2^15 images is 2^-29 or 2^-28 here; float16 ends at 2^-24."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1], [-1]]) * torch.tensor([1, -1] * 6) * 2.0**-14)
    x, y = torch.full((2**15, 3, 2, 2), 0.5), torch.zeros(2**15, dtype=torch.long)
    for gradient in (input_gradient, confident_gradient):
        expected, _ = gradient(model, x, y, torch.zeros_like(x))
        with precision(True, "float16").autocast():
            found, logits = gradient(model, x, y, torch.zeros_like(x))
        assert logits.dtype == torch.float16
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_trains_nearly_alike(dtype):
    images, seen, trained = wavy_images(32), [], []
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
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for kind in (FLOAT32, precision(True, dtype)):
        model.load_state_dict(start)
        seen.clear()
        metrics = train.train_epoch(small_run(model, images, partial(fgsm, alpha=EPSILON), precision=kind))
        trained.append(metrics["train_robust_loss"])
        assert {low for low, training in seen if training} == {kind.dtype}
        assert {low for low, training in seen if not training} == {torch.float32}  # whether its answers are finite
    assert trained[1] == pytest.approx(trained[0], rel=0.05)


def test_tf32_is_off_where_it_is_refused_and_never_on_where_accuracy_is_judged(monkeypatch):
    def allowed():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def judge(x):
        assert allowed() == (False, False)
        raise KeyError

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    args = argparse.Namespace(amp=False, amp_dtype="bfloat16", amp_impl="native")
    for asked in (True, False):
        args.tf32 = asked
        on_gpu = train.Precision(args, torch.device("cuda"))
        assert allowed() == (False, asked) and on_gpu.is_float32 != asked
        assert on_gpu.name == ("tf32" if asked else "float32")
        assert train.Precision(args, torch.device("cpu")).is_float32
        with pytest.raises(KeyError):
            on_gpu.float32_logits(judge, torch.zeros(1))
        assert allowed() == (False, asked)


# The evaluation of an epoch


@pytest.mark.parametrize("flags, held_out, last, judged_on, scored_on", [
    ({}, 0, False, 10, 10), ({}, 0, True, 12, 10), ({"full_test": True}, 0, False, 12, 12), ({}, 3, False, 10, 3),
    ({"last_samples": 11}, 0, True, 11, 10), ({"last_samples": 4}, 0, True, 10, 10),
    ({"last_samples": 4}, 0, False, 10, 10)])
def test_an_epoch_is_judged_on_the_first_images_and_scored_on_the_same_in_each(flags, held_out, last, judged_on,
                                                                               scored_on):
    values = torch.tensor([140] * 4 + [130] * 8)  # the first four withstand it
    test = Images(values.byte().view(-1, 1, 1, 1).expand(-1, 32, 32, 3).contiguous(), torch.ones_like(values))
    run = small_run(Brightness(), test, held_out=slice(3, 3 + held_out), test_samples=10, **flags)
    run.state.begin_epoch(8 if last else 7)  # of 9
    found = train.measure(run)
    assert (found["test_images"], found["test_robust_acc"], found["test_acc"]) == (judged_on, 4 / judged_on, 1)
    assert found["score"] == (1 / 3 if held_out else 4 / scored_on)
    assert (found.get("val_images"), found.get("val_robust_acc")) == ((3, 1 / 3) if held_out else (None, None))


# Signals


def test_before_signals_are_deferred_the_first_one_stops_at_once():
    with StopSignals() as signals, pytest.raises(Stopped, match="stopped by SIGTERM"), contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)  # in a library that catches every Exception
        time.sleep(10)
    assert signals.received == signal.SIGTERM


def test_the_first_signal_is_noted_the_second_acts_and_an_ignored_one_stays_ignored(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    acted, hangup = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(signal, "SIG_DFL", lambda number, frame: acted.append(number))
    try:
        with StopSignals() as signals:
            signals.deferred = True
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM and not acted
            os.kill(os.getpid(), signal.SIGTERM)
            assert acted == [signal.SIGTERM]
        assert {number: signal.getsignal(number) for number in before} == before
    finally:
        signal.signal(signal.SIGHUP, hangup)


def test_training_stops_after_the_step_in_which_a_signal_came():
    class Bar(Progress):
        def update(self, n: int = 1) -> None:
            super().update(n)
            if self.done == 2:
                run.signals.received = signal.SIGTERM

    run = small_run(Wavy(), wavy_images(40), lambda model, x, *rest, step: torch.zeros_like(x))
    bar = Bar(Screen(quiet=True), "training", 3, "step", 0)
    with pytest.raises(Stopped, match="stopped by SIGTERM; --resume auto continues from here"):
        train.train_epoch(run, train.AfterStep(run, bar))
    assert (bar.done, run.state.step) == (2, 2) and run.state.sums[2] == 32


# The machine


PAGES = """
import resource, torch
from singlestep.run.device import keep_freed_memory

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


def test_sync_bn_normalizes_over_all_processes():
    """As far as this can be seen without a GPU."""
    class Here(SmallNet):
        def to(self, *args, **keywords):
            return self

    args = options.parse(options.CIFAR10, argv=["--sync-bn"])
    state, _ = train.build(options.CIFAR10, args, torch.device("cuda"), World(size=2), Here())
    assert isinstance(state.model.bn, nn.SyncBatchNorm)


def test_deterministic_on_cuda_asks_for_deterministic_kernels(monkeypatch):
    """As far as this can be seen without a GPU."""
    monkeypatch.setattr("singlestep.run.device.cuda_devices", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr("os.environ", {})
    try:
        for asked in (False, True):
            args = argparse.Namespace(device="auto", deterministic=asked)
            assert choose_device(args) == torch.device("cuda", 0)
            assert torch.are_deterministic_algorithms_enabled() == asked
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_a_way_to_compile_that_fails_is_refused():
    parse = partial(options.parse, options.CIFAR10)
    args = parse(argv=["--compile", "--compile-mode=max-autotune", "--base-width=16"])
    with pytest.raises(UsageError, match="--compile-mode max-autotune fails under torchrun"):
        train.build(options.CIFAR10, args, CPU, World(0, 2))
    args = parse(argv=["--compile-mode=max-autotune", "--base-width=4"])  # without --compile, it is not used
    assert train.build(options.CIFAR10, args, CPU, World(0, 2))
    with pytest.raises(UsageError, match="--sync-bn does not work with --compile"):
        options.arguments(options.CIFAR10, dict(sync_bn=True, compile=True))


def test_cudnn_searches_in_training_steps_and_in_no_evaluation(monkeypatch):
    seen, model = {True: set(), False: set()}, Wavy()
    model.register_forward_pre_hook(
        lambda module, inputs: seen[module.training].add(torch.backends.cudnn.benchmark))
    for asked in (False, True):
        run = small_run(model, wavy_images(20), partial(fgsm, alpha=EPSILON), test_samples=10, deterministic=asked)
        train.train_epoch(run)
        train.measure(run)
        evaluate(model, *run.test.batch(slice(4)), PGD(EPSILON, EPSILON, 2, 1))
        assert seen == {True: {not asked}, False: {False}}
        seen[True].clear()


def test_a_gpu_whose_driver_does_not_start_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(argparse.Namespace(device="auto", deterministic=False)) == torch.device("cpu")
    with pytest.raises(UsageError, match=r"--device cuda is not available.*use --device cpu"):
        choose_device(argparse.Namespace(device="cuda", deterministic=False))


@pytest.mark.parametrize("script", DATASETS)
def test_the_compiler_is_never_used_unasked(script):
    assert not options.parse(DATASETS[script], argv=[]).compile
    assert not options.parse(DATASETS[script], argv=["--device=cuda", "--amp", "--no-compile"]).compile
    assert options.parse(DATASETS[script], argv=["--compile", "--deterministic"]).compile


def test_whole_training_batches_are_compiled_and_nothing_else(monkeypatch):
    modes, answers = [], []

    def fake(forward, mode, dynamic):
        def compiled(x):
            modes.append(mode)
            answers.append(forward(x))
            return answers[-1]
        return compiled

    monkeypatch.setattr(torch, "compile", fake)
    model = nn.Linear(3, 2)
    for mode in ("default", "max-autotune"):
        network = Compiled(model, 4, mode)
        for n, training, compiled in ((4, True, True), (12, True, True), (3, True, False), (4, False, False)):
            model.train(training)
            modes.clear()
            found, x = network(torch.ones(n, 3)), torch.ones(n, 3)
            assert modes == [mode] * compiled and torch.equal(found, model(x))
            # CUDA graphs, which the other modes use, write their next answer where this one is.
            assert not compiled or (found is answers[-1]) == (mode == "default")


@pytest.mark.parametrize("wrap", [lambda model: Padded(model, 4), lambda model: Compiled(model, 4, "default")])
def test_attacks_freeze_a_compiled_or_padded_network_without_a_walk_through_it(wrap, monkeypatch):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    wrapped = wrap(model)
    expected = list(model.parameters())
    assert list(wrapped.state_dict()) == [f"model.{name}" for name in model.state_dict()]
    monkeypatch.delattr(nn.Module, "named_parameters")
    assert list(map(id, wrapped.parameters())) == list(map(id, expected))
    with frozen(wrapped):
        assert not any(parameter.requires_grad for parameter in expected)
    assert all(parameter.requires_grad for parameter in expected)


def test_a_state_within_a_step_is_not_saved(monkeypatch):
    saved = []
    monkeypatch.setattr(train, "save", saved.append)
    for midway in (True, False):
        with pytest.raises(Stopped), train.saved_if_stopped("run"):
            raise Stopped(signal.SIGTERM, midway=midway)
    assert saved == ["run"]


def test_a_wide_network_on_a_cpu_is_told_what_is_faster():
    for flags, there in (([], True), (["--base-width=16"], False), (["--dummy"], False)):
        run = SimpleNamespace(steps=1, args=options.parse(options.CIFAR10, argv=flags), world=ALONE)
        notes = " ".join(train.notes(run, SimpleNamespace(found=None, earlier=None)))
        assert ("--base-width=16" in notes and "--last-samples=1000" in notes) == there
