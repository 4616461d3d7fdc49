"""The watch: the rule of collapse on curves known beforehand and on every committed one, its signs, what follows."""
import json

import pytest
import torch
from helpers import ROOT, SMALL, SmallNet, epochs_of, linear_network, one_line

from singlestep import collapse, train
from singlestep.run import console

pytestmark = pytest.mark.usefixtures("shallow")


def curve(*pairs: tuple[float, float]) -> list[dict]:
    return [{"epoch": i, "fgsm_acc": fgsm, "test_robust_acc": pgd} for i, (fgsm, pgd) in enumerate(pairs)]


@pytest.mark.parametrize("pairs, expected", [
    ([(0.3, 0.2), (0.5, 0.4), (0.9, 0.05), (0.95, 0.0)], [False, False, True, True]),
    ([(0.3, 0.2), (0.35, 0.15), (0.2, 0.09)], [False, False, False]),  # low, and yet no gap: a bad epoch
    ([(0.5, 0.4), (0.5, 0.28)], [False, False]),  # a gap, and yet above the half
    ([(0.5, 0.4), (0.7, 0.28)], [False, True]),  # above the half of the best, and not of FGSM's
    ([(0.5, 0.4), (0.9, 0.1), (0.9, 0.3), (0.45, 0.3)], [False, True, True, False]),  # sound once neither holds
    ([(0.5, 0.4), (0.9, 0.1), (0.25, 0.1)], [False, True, True]),
    ([(0.25, 0.12), (0.17, 0.1), (0.26, 0.09), (0.39, 0.12), (0.43, 0.11)], [False] * 3 + [True] * 2),  # never sound
    ([(0.9, 0.0)], [True])])
def test_the_rule_on_curves_known_beforehand(pairs, expected):
    assert collapse.collapsed(curve(*pairs)) == expected


@pytest.mark.parametrize("abnormal, expected", [
    ((0.36, 0.76), [False, True]),  # GradAlign over two short epochs, as it was
    ((0.36, 0.45), [False, False]), ((None, None), [False, False])])
def test_an_attack_that_helps_most_images_misleads_whatever_fgsm_finds(abnormal, expected):
    pairs = curve((0.076, 0.055), (0.111, 0.016))
    assert collapse.collapsed([{**record, "abnormal": share} for record, share in zip(pairs, abnormal)]) == expected


def test_the_line_says_what_gave_a_collapse_away():
    record = {"epoch": 1, "fgsm_acc": 0.111, "test_robust_acc": 0.016, "abnormal": 0.763}
    said = "catastrophic overfitting in epoch 2: accuracy 11.1% under FGSM, 1.6% under PGD"
    assert console.collapse_line(record) == f"{said}; the training attack lowered the loss of 76.3% of the images"
    for abnormal in (None, 0.2):
        assert console.collapse_line({**record, "abnormal": abnormal}) == said


def test_ordinary_training_cannot_overfit_to_an_attack():
    ordinary = [{**record, "defence_mean": 0.0} for record in curve((0.3, 0.01), (0.4, 0.0))]
    assert collapse.collapsed(ordinary) == [False, False]


def test_a_whole_run_is_summed_up_in_a_line():
    def line(history):
        return console.summary_line(collapse.summary(history), len(history))

    fell = curve((0.3, 0.2), (0.5, 0.412), (0.9, 0.1), (0.9, 0.05), (0.45, 0.3))
    assert line(fell) == \
        "catastrophic overfitting in 2 of 5 epochs, first in epoch 3; PGD accuracy: best 41.2%, last 30.0%"
    assert line(fell[:2]) == "no catastrophic overfitting; PGD accuracy: best 41.2%, last 41.2%"
    assert line([]) == "no epochs recorded"


# Of every committed run that fell, the epochs (from 1) in which the rule says that it is in collapse.
FELL = {
    "cpu-bf16/cifar100_fgsm_fgsm-init=zero_fgsm-alpha=1_seed=0": (12, 15),
    "cpu-bf16/cifar10_fgsm_fgsm-alpha=1.25_epsilon=12_pgd-alpha=3_seed=0": (3, 7),
    "cpu-bf16/cifar10_fgsm_fgsm-alpha=1.25_epsilon=16_pgd-alpha=4_seed=0": (3, 14),
    "cpu-bf16/cifar10_fgsm_fgsm-init=zero_fgsm-alpha=1_epsilon=12_pgd-alpha=3_seed=0": (2, 15),
    "cpu-bf16/cifar10_fgsm_fgsm-init=zero_fgsm-alpha=1_epsilon=16_pgd-alpha=4_seed=0": (2, 15),
    "cpu-bf16/cifar10_multigrad_multi-samps=3_epsilon=16_pgd-alpha=4_seed=0": (14, 15),
    "cpu-bf16/cifar10_zerograd_zero-qval=0.35_epsilon=12_pgd-alpha=3_seed=0": (2, 15),
    "cpu-bf16/cifar10_zerograd_zero-qval=0.35_epsilon=16_pgd-alpha=4_seed=0": (2, 15),
    "cpu-bf16/cifar10_zerograd_zero-qval=0.7_epsilon=16_pgd-alpha=4_seed=0": (3, 5),
    "cpu/cifar10_fgsm_fgsm-init=zero_fgsm-alpha=1_seed=0": (2, 15),
    "cpu/cifar10_zerograd_zero-qval=0.35_epsilon=16_pgd-alpha=4_seed=0": (2, 7),
    "cpu/cifar10_zerograd_zero-qval=0.35_fgsm-init=zero_epochs=5_seed=0": (2, 5),
    "cpu/cifar10_zerograd_zero-qval=0.35_fgsm-init=zero_lr-max=0.05_epochs=5_seed=0": (2, 5),
    "cpu/cifar10_zerograd_zero-qval=0.35_fgsm-init=zero_seed=0": (2, 15),
    "short/cifar10_method=fgsm_epochs=5_seed=0": (4, 5),
    "short/cifar10_method=gradalign_seed=0": (2, 2)}


def test_the_rule_flags_every_committed_run_that_fell_and_no_other():
    """Older runs log nothing of it or, at the scale short, an older rule's verdict; newer ones log this rule's."""
    found = {}
    for path in sorted((ROOT / "experiments/results").glob("*/*.json")):
        epochs = json.loads(path.read_text())["epochs"]
        states = collapse.collapsed(epochs)
        if "fgsm_acc" in epochs[0] and path.parent.name != "short":
            assert states == [epoch["collapsed"] for epoch in epochs]
        elif any(states):
            fallen = [i + 1 for i, state in enumerate(states) if state]
            found[f"{path.parent.name}/{path.stem}"] = (fallen[0], fallen[-1])
    assert found == FELL


def test_the_signs_are_their_formulas():
    torch.manual_seed(0)
    model, x, y = SmallNet().double(), torch.rand(6, 3, 5, 5, dtype=torch.float64), torch.randint(4, (6,))

    def gradient(delta):
        delta = delta.clone().requires_grad_()
        torch.nn.functional.cross_entropy(model.eval()(x + delta), y).backward()
        return delta.grad.flatten(1)

    torch.manual_seed(1)
    found = collapse.signs(model, x, y, 0.1)
    torch.manual_seed(1)
    g, other = gradient(torch.zeros_like(x)), gradient(torch.empty_like(x).uniform_(-0.1, 0.1))
    cosine = (g * other).sum(1) / g.square().sum(1).sqrt() / other.square().sum(1).sqrt()
    ratio = g.abs().sum(1) ** 2 / g.square().sum(1) / 75
    assert found["alignment"] == pytest.approx(cosine.mean().item(), rel=1e-5)
    assert found["participation"] == pytest.approx(ratio.mean().item(), rel=1e-5)


def test_abnormal_images_are_those_that_the_attack_made_easier():
    y = torch.tensor([0, 1, 1])
    at_start = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    after = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    easier, known = collapse.abnormal(at_start, after, y)
    assert (easier.item(), known) == (1, 3) and collapse.abnormal(None, after, y)[1] == 0


def test_a_run_logs_its_signs_and_its_summary(tmp_path, call, small_dummy, monkeypatch):
    monkeypatch.setattr(train, "new_network", linear_network)  # no attack can mislead one
    assert call("train_cifar.py", *SMALL, "--attack=fgsm", "--lr-max=0", "--fname", tmp_path / "run")[0] == 0
    for record in epochs_of(tmp_path / "run"):
        assert record["fgsm_acc"] >= 0 and -1 <= record["alignment"] <= 1 and 0 < record["participation"] <= 1
        assert 0 <= record["abnormal"] <= 1 and -1 <= record["train_rise"] <= 1 and record["collapsed"] is False
    final, records = json.loads((tmp_path / "run" / "final.json").read_text()), epochs_of(tmp_path / "run")
    assert final["collapse_epoch"] is None and final["last_robust_acc"] == records[-1]["test_robust_acc"]
    assert final["best_robust_acc"] == max(record["test_robust_acc"] for record in records)


def fall(monkeypatch, *epochs: int) -> None:
    """Have the run's evaluation find a collapse, the first time that it comes to each of the epochs."""
    measure, left = train.measure, list(epochs)

    def found(run):
        metrics = {**measure(run), "fgsm_acc": 0.7, "test_robust_acc": 0.6, "abnormal": 0.0}
        if run.state.epoch in left:
            left.remove(run.state.epoch)
            metrics |= {"fgsm_acc": 0.9, "test_robust_acc": 0.1}
        return metrics

    monkeypatch.setattr(train, "measure", found)


FOUR = [*SMALL, "--attack=fgsm", "--epochs=4", "--lr-schedule=onedrop", "--lr-max=0.1"]


def test_a_collapse_is_said_and_kept(tmp_path, call, small_dummy, monkeypatch):
    fall(monkeypatch, 1, 2)
    status, output, _ = call("train_cifar.py", *FOUR, "--fname", tmp_path / "run")
    assert status == 0 and output.count("catastrophic overfitting in epoch ") == 2
    assert "# catastrophic overfitting in 2 of 4 epochs, first in epoch 2; PGD accuracy: best" in output
    assert "catastrophic overfitting in epoch 2: accuracy 90.0% under FGSM, 10.0% under PGD" in output
    assert "catastrophic overfitting in epoch 3" in (tmp_path / "run" / "output.log").read_text()
    assert [record["collapsed"] for record in epochs_of(tmp_path / "run")] == [False, True, True, False]
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert (final["collapse_epoch"], final["collapsed_epochs"]) == (1, 2)
    healthy, last = (torch.load(tmp_path / "run" / f"model_{name}.pth", weights_only=True) for name in ("healthy", 3))
    assert all(torch.equal(healthy[key], last[key]) for key in last)  # sound again in the end


def test_a_run_can_stop_at_its_collapse(tmp_path, call, small_dummy, monkeypatch):
    fall(monkeypatch, 1)
    flags = [*FOUR, "--on-collapse=stop", "--fname", tmp_path / "run"]
    status, _, error = call("train_cifar.py", *flags)
    assert status == 1 and error.count("\n") == 1 and "collapsed in epoch 2" in error and "model_healthy.pth" in error
    assert call("train_cifar.py", *flags, "--resume=auto")[0] == 1
    assert len(epochs_of(tmp_path / "run")) == 2
    assert call("train_cifar.py", *flags, "--on-collapse=warn", "--resume=auto")[0] == 0
    assert len(epochs_of(tmp_path / "run")) == 4


def test_a_run_that_asked_for_the_former_rollback_continues_as_warn_and_one_rolled_back_is_refused(
        tmp_path, call, small_dummy):
    flags = [*FOUR, "--fname", tmp_path / "run", "--resume=auto", "--allow-changes"]
    assert call("train_cifar.py", *flags, "--epochs=1")[0] == 0
    state = torch.load(tmp_path / "run" / "state.pth", weights_only=True)
    state["opt"]["run"]["args"]["on_collapse"], state["opt"]["run"]["rate"] = "rollback", 1.0
    torch.save(state, tmp_path / "run" / "state.pth")
    status, output, _ = call("train_cifar.py", *flags, "--epochs=2")
    assert status == 0 and "--on-collapse=rollback is no longer supported: the run continues" in output
    state["opt"]["run"]["rate"] = 0.5
    torch.save(state, tmp_path / "run" / "state.pth")
    one_line(call("train_cifar.py", *flags, "--epochs=3"), "was rolled back by --on-collapse=rollback")


def test_an_unknown_answer_to_a_collapse_is_refused(tmp_path, call):
    one_line(call("train_cifar.py", *SMALL, "--on-collapse=panic", "--fname", tmp_path / "run"), "--on-collapse")
