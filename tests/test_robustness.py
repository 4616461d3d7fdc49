"""Accuracy, clean and under PGD with restarts, against results that can be worked out by hand or plainly."""
import re
import statistics
import warnings
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import EPSILON, FLOAT32, Brightness, Wavy, evaluated, plain_evaluation, plain_start, precision, wavy_images
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from singlestep import robustness
from singlestep.data import Images
from singlestep.robustness import PGD, AttackStep, Restart, attack_steps, evaluate, shown
from singlestep.run import console
from singlestep.run.console import Screen, StopSignals
from singlestep.run.device import padded
from singlestep.run.distributed import ALONE, Stop, World

# Value, label, right without a perturbation, right under every perturbation of at most 8.
GREY = [(140, 1, True, True), (136, 1, True, True), (135, 1, True, False), (128, 1, True, False),
        (127, 1, False, False), (60, 0, True, True), (119, 0, True, True), (120, 0, True, False), (127, 0, True, False),
        (200, 0, False, False), (255, 1, True, True), (0, 0, True, True)]


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
@pytest.mark.parametrize("restarts", [1, 2])
def test_an_evaluation_finds_what_can_be_worked_out_by_hand(batch_size, restarts):
    values, labels, right, robust = map(torch.tensor, zip(*GREY))
    pixels = values.byte().view(-1, 1, 1, 1).expand(-1, 32, 32, 3).contiguous()
    model, passed = Brightness(), []
    model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
    *events, last = attack_steps(model, Images(pixels, labels), PGD(EPSILON, 2 / 255, 10, restarts), batch_size,
                                 FLOAT32)
    steps = [event for event in events if isinstance(event, AttackStep)]
    found = last.result.sums(ALONE)
    assert torch.equal(found.right.bool(), right) and torch.equal(found.robust.bool(), robust)
    assert [step.image_passes for step in steps] == passed
    left = [step.remaining for step in steps]
    assert all(before >= after + step.image_passes for before, after, step in zip(left, left[1:], steps[1:]))
    assert left[-1] == 0 and (restarts == 1 or 6 * 11 in left)  # in a second restart, six images take eleven passes
    # Toward one half, all pixels move by epsilon, those of 255 and 0 too; what was wrong stays where it was.
    assert (255 * found.magnitude[robust]).tolist() == pytest.approx([8] * 6, rel=1e-4)
    assert (found.magnitude[~right] == 0).all() and not found.vanished.any()
    metrics, first = found.metrics(), found.metrics(5)
    assert (metrics["clean_acc"], metrics["robust_acc"], metrics["images"]) == (10 / 12, 6 / 12, 12)
    assert (first["clean_acc"], first["robust_acc"], first["images"]) == (4 / 5, 2 / 5, 5)
    z = 50 * (values.double() / 255 - 0.5) * (2 * labels - 1)  # the label's logit; the other class has minus that
    clean_loss, shifted_loss = F.softplus(-2 * z), F.softplus(-2 * (z - 50 * EPSILON))
    assert metrics["clean_loss"] == pytest.approx(clean_loss.mean().item(), rel=1e-5)
    for part, expected in ((robust, shifted_loss), (~right, clean_loss)):
        torch.testing.assert_close(found.robust_loss[part], expected[part], rtol=1e-3, atol=1e-6)
    assert metrics["attack_mean"] == pytest.approx(255 * found.magnitude[right].mean().item(), rel=1e-9)


def test_the_magnitude_in_l2_is_the_norm():
    """Toward one half, all pixels move alike; a step of the radius from zero ends on the ball, whose radius may be
    above 1."""
    pixels = torch.tensor([120, 122, 127]).view(3, 1, 1, 1).expand(3, 32, 32, 3).byte()
    images = Images(pixels, torch.zeros(3, dtype=torch.long))
    for epsilon, robust in ((0.5, [True, True, False]), (1.5, [True, False, False])):  # 2.3 and 6.9 of 255 a pixel
        found = evaluated(Brightness(), images, PGD(epsilon, epsilon, 1, 1, init="zero", norm="l_2"), 3, FLOAT32)
        assert found.robust.bool().tolist() == robust and found.magnitude.tolist() == pytest.approx([epsilon] * 3)
    assert evaluate(Brightness(), *images.batch(slice(None)), PGD(1.5, 1.5, 1, 1, norm="l_2")).right.all()
    with pytest.raises(ValueError, match="from 0 to 1"):
        evaluate(Brightness(), *images.batch(slice(None)), PGD(1.5, 1.5, 1, 1))


def test_an_image_broken_by_any_restart_is_never_robust():
    images, model, restarts = wavy_images(), Wavy(), 6
    x, y = images.batch(slice(None))
    held = model(x).argmax(dim=1) == y
    # With steps of size 0 an attack is its random start alone.
    each = [model(x + plain_start(x, 0.15, 3, restart)).argmax(dim=1) == y for restart in range(restarts)]
    robust = torch.stack([held, *each]).all(dim=0)
    assert 0 < robust.sum() < min(right.sum() for right in each)  # no single restart breaks them all
    for batch_size in (3, 7, 40, 64):
        found = evaluated(model, images, PGD(0.15, 0.0, 1, restarts, seed=3), batch_size, FLOAT32)
        assert torch.equal(found.robust.bool(), robust) and torch.equal(found.right.bool(), held)


@pytest.mark.parametrize("batch_size, attack", [
    *((batch_size, PGD(0.004, 0.001, 5, 3)) for batch_size in (1, 7, 40)), (7, PGD(0.2, 0.05, 5, 3, norm="l_2"))])
def test_the_shrinking_batch_finds_what_the_plain_attack_finds(batch_size, attack):
    images, model = wavy_images(), Wavy()
    robust, loss = plain_evaluation(model, images, attack.epsilon, attack.alpha, attack.steps, attack.restarts, 0,
                                    norm=attack.norm)
    assert 5 < robust.sum() < 35
    found = evaluated(model, images, attack, batch_size, FLOAT32)
    assert torch.equal(found.robust.bool(), robust)
    assert found.metrics()["robust_loss"] == pytest.approx(loss.mean().item(), rel=1e-5)


def test_a_process_that_no_image_is_left_for_finds_nothing(monkeypatch):
    monkeypatch.setattr(World, "_reduced", lambda self, values, operation: values)
    monkeypatch.setattr(World, "broadcast_buffers", lambda self, model: None)
    found = evaluated(Wavy(), wavy_images()[:2], PGD(EPSILON, 2 / 255, 2, 2), 8, FLOAT32,
                                World(rank=4, size=8))
    assert found.metrics() == {"clean_loss": 0, "clean_acc": 0, "robust_loss": 0, "robust_acc": 0, "attack_mean": 0,
                               "no_gradient": 0, "images": 2}


def test_the_processes_findings_are_those_of_one(monkeypatch):
    """Each finds something of its own images alone, so that the sum of all is what one process finds."""
    attack, parts = PGD(0.004, 0.001, 5, 2), []
    alone = evaluated(Wavy(), wavy_images(), attack, 8, FLOAT32)
    monkeypatch.setattr(World, "_reduced", lambda self, values, operation: values)
    monkeypatch.setattr(World, "broadcast_buffers", lambda self, model: None)
    for rank in range(3):
        parts.append(vars(evaluated(Wavy(), wavy_images(), attack, 8, FLOAT32, World(rank=rank, size=3))))
    for name, value in vars(alone).items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-6, atol=1e-9)


def test_an_attack_goes_on_from_what_another_found_without_a_perturbation():
    """FGSM after PGD finds what FGSM alone finds, without a forward pass of its own on the images themselves."""
    fgsm, passed, model = PGD(0.004, 0.004, 1, 1, init="zero"), [], Wavy()
    model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
    alone = evaluated(model, wavy_images(), fgsm, 8, FLOAT32)
    passes = sum(passed)
    pgd = evaluated(model, wavy_images(), PGD(0.004, 0.001, 5, 2), 8, FLOAT32)
    passed.clear()
    after = evaluated(model, wavy_images(), fgsm, 8, FLOAT32, begun=Restart(0, pgd.unperturbed()))
    assert not torch.equal(pgd.robust, alone.robust) and sum(passed) == passes - 40
    for name, value in vars(alone).items():
        assert torch.equal(vars(after)[name], value), name


def test_the_shrinking_batch_does_less_work():
    images, passed = wavy_images(), []
    model = Wavy()
    model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
    found = evaluated(model, images, PGD(0.3, 0.1, 20, 10), 8, FLOAT32)
    assert found.metrics()["robust_acc"] < 0.2
    assert sum(passed) < 0.3 * 20 * 10 * len(images)
    assert sum(size == 8 for size in passed) > 0.5 * len(passed)


def test_the_time_left_of_many_restarts_never_grows(monkeypatch, capsys):
    """On a clock that shows the images that the network has seen."""
    passed, model = [], Wavy()
    model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
    monkeypatch.setattr(console, "MINUTES", 0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: sum(passed)))
    events = attack_steps(model, wavy_images(), PGD(0.004, 0.001, 5, 10), 8, FLOAT32)
    assert [restart.number for restart in shown(events, Screen(), "PGD", 10, Stop(StopSignals()))] == list(range(11))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"# PGD, restart 10/10, .* robust: [\d,]+ of [\d,]+ image-steps, about 0 s left", lines[-1])
    times = [line.partition("about ")[2].split() for line in lines if "about" in line]
    left = [int(number) * (60 if unit == "min" else 1) for number, unit, _ in times]
    assert len(left) > 100 and all(after <= before + 30 for before, after in pairwise(left))
    assert left[0] <= 40 * 10 * 6


def test_a_lower_precision_is_judged_only_where_there_is_something_to_judge():
    passed, model = [], Wavy()
    model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
    found = evaluated(model, wavy_images(), PGD(1e-4, 1e-4, 6, 2), 8, precision(amp=True))
    assert found.metrics()["robust_acc"] > 0.5 and min(passed) > 0


@pytest.mark.parametrize("kind", [FLOAT32, precision(True), precision(True, "float16")])
@pytest.mark.parametrize("batch_size, sizes", [(512, {64, 128, 256, 512}), (100, {64, 100}), (32, {32})])
def test_on_a_gpu_an_evaluation_has_batches_of_few_sizes_and_the_same_results(batch_size, sizes, kind, monkeypatch):
    """Called as on CUDA; on a CPU, batches of all sizes stay as they are."""
    model, images, attack, seen = Wavy(), wavy_images(400), PGD(EPSILON, EPSILON / 20, 8, 2), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    plain, plain_sizes = evaluated(model, images, attack, batch_size, kind), set(seen)
    seen.clear()
    cuda = torch.device("cuda")
    monkeypatch.setattr(robustness, "padded", lambda model, batch_size, device: padded(model, batch_size, cuda))
    found = evaluated(model, images, attack, batch_size, kind)
    assert set(seen) == sizes and len(plain_sizes - sizes) > 5
    assert torch.equal(found.robust, plain.robust) and 0.05 < found.robust.mean() < 0.9
    torch.testing.assert_close(found.robust_loss, plain.robust_loss)


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a GPU."""

    CALLS = {getattr(Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "__bool__",
                                                "__int__", "__float__", "__index__")} | {torch.nonzero, torch.equal}
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        masked = function in (Tensor.__getitem__, Tensor.__setitem__) and any(
            isinstance(index, Tensor) and index.dtype is torch.bool for index in args[1:2])
        self.count += function in self.CALLS or masked
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kind, waits_a_step", [(FLOAT32, 1), (precision(amp=True), 2)])
def test_a_step_of_an_evaluation_waits_for_the_device_once_for_every_decision(kind, waits_a_step):
    images, counts = wavy_images(40), []

    with Waits() as waits:
        assert bool(torch.ones(3)[torch.ones(3).bool()].sum()) and waits.count == 2  # it does count
        for event in attack_steps(Wavy(), images, PGD(EPSILON, EPSILON / 20, 10, 3), 16, kind):
            if isinstance(event, AttackStep):
                counts.append(waits.count)
                waits.count = 0
    _, *steps = counts
    assert len(steps) > 5 and sum(steps) <= waits_a_step * len(steps) + 3  # one before a restart: what to attack
    assert statistics.median(steps) == waits_a_step


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attacks_use_the_low_precision_and_accuracy_is_judged_in_float32(dtype):
    seen, low = [], precision(True, dtype)

    class Net(nn.Module):
        """Wrong at every point in the low precision, right at every one in float32."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3072, 2)

        def forward(self, x):
            hidden = self.linear(x.flatten(1))
            seen.append((hidden.dtype, torch.is_grad_enabled()))
            sign = 1 if hidden.dtype == torch.float32 else -1
            return hidden.float() + torch.tensor([100.0 * sign, 0.0])

    images = wavy_images(24)
    images.labels.zero_()
    found = evaluated(Net(), images, PGD(EPSILON, EPSILON, 2, 2), 16, low)
    assert {kind for kind, attacking in seen if attacking} == {low.dtype}
    assert {kind for kind, attacking in seen if not attacking} == {torch.float32}
    assert found.right.all() and found.robust.all()


def test_evaluation_leaves_the_model_as_it_was_and_wants_no_gradient_of_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 3)).train()
    before, wanted = {key: value.clone() for key, value in model.state_dict().items()}, []
    model.register_forward_pre_hook(lambda module, inputs: wanted.append(
        torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())))
    evaluated(model, wavy_images(), PGD(EPSILON, EPSILON, 2, 2), 16, FLOAT32)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert len(wanted) > 3 and not any(wanted)


class Certain(nn.Module):
    """At a high scale, so sure that the cross-entropy and its gradient round to 0; at scale 0, without a gradient."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        z = self.scale * (x.flatten(1).mean(dim=1) - 0.4)
        return torch.stack([0 * z, z + 1e-3], dim=1)


def test_certainty_hides_no_gradient_and_an_attack_without_one_is_told_of():
    images = Images(torch.full((4, 32, 32, 3), 104, dtype=torch.uint8), torch.tensor([1, 1, 1, 0]))
    found = evaluated(Certain(1e5), images, PGD(EPSILON, 2 / 255, 10, 1), 4, FLOAT32).metrics()
    assert (found["clean_acc"], found["robust_acc"], found["no_gradient"]) == (0.75, 0, 0)
    found = evaluated(Certain(0.0), images, PGD(EPSILON, 2 / 255, 10, 1), 4, FLOAT32).metrics()
    assert (found["clean_acc"], found["robust_acc"], found["no_gradient"]) == (0.75, 0.75, 1)
    x, y = images.batch(slice(None))
    for attack in (PGD(EPSILON, EPSILON, 1, 1, init="zero"), PGD(EPSILON, 2 / 255, 10, 1),
                   PGD(EPSILON, 2 / 255, 10, 1, loss="cw")):
        with pytest.warns(UserWarning, match="a gradient of 0 for 100% of the images"):
            evaluate(Certain(0.0), x, y, attack)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluate(Certain(1e5), x, y, attack)
