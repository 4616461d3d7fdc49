"""The watch: the rule of collapse on curves known beforehand and on every labelled one, its signs, what follows."""
import csv
import json
import re
import sys

import pytest
import torch
from helpers import ROOT, SMALL, SmallNet, epochs_of, linear_network, one_line

from singlestep import collapse, train
from singlestep.run import console

sys.path.insert(0, str(ROOT / "experiments"))
import collapses
from public_logs import table as public

pytestmark = pytest.mark.usefixtures("shallow")


def curve(*points: tuple[float, ...]) -> list[dict]:
    """Records of epochs: accuracies under FGSM and PGD, and clean accuracy where it is given."""
    names = ("fgsm_acc", "test_robust_acc", "test_acc")
    return [{"epoch": i, **dict(zip(names, point))} for i, point in enumerate(points)]


@pytest.mark.parametrize("points, expected", [
    ([(0.3, 0.2), (0.5, 0.4), (0.9, 0.05), (0.95, 0.0)], [False, False, True, True]),
    ([(0.5, 0.4), (0.5, 0.25)], [False, False]),  # exactly half of FGSM's
    ([(0.5, 0.4), (0.52, 0.25)], [False, True]),
    ([(0.2, 0.1), (0.2, 0.086), (0.2, 0.0855)], [False, False, False]),  # under half of FGSM's, and hardly fallen
    ([(0.2, 0.1), (0.2, 0.084)], [False, True]),
    ([(0.1, 0.05, 0.6), (0.15, 0.02, 0.61)], [False, False]),  # robust to neither attack: FGSM under a quarter of clean
    ([(0.1, 0.05, 0.6), (0.15, 0.02, 0.59)], [False, True]),
    ([(0.5, 0.4), (0.9, 0.1), (0.9, 0.67), (0.9, 0.68)], [False, True, True, False]),  # until 3/4 of FGSM's
    ([(0.5, 0.4), (0.9, 0.1), (0.1, 0.1), (0.2, 0.2)], [False, True, True, False]),  # and until half of the best
    ([(0.193, 0.003)], [True]), ([(0.3, 0.2)], [False])])  # the first epoch has no earlier one to fall from
def test_the_rule_on_curves_known_beforehand(points, expected):
    assert collapse.collapsed(curve(*points)) == expected


def test_of_a_run_without_fgsm_accuracy_the_best_so_far_decides():
    history = [{"test_robust_acc": pgd} for pgd in (0.0, 0.3, 0.14, 0.16, 0.0)]
    assert collapse.collapsed(history) == [False, False, True, False, True]


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

    fell = curve((0.3, 0.2), (0.5, 0.412), (0.9, 0.1), (0.9, 0.05), (0.39, 0.3))
    assert line(fell) == \
        "catastrophic overfitting in 2 of 5 epochs, first in epoch 3; PGD accuracy: best 41.2%, last 30.0%"
    assert line(fell[:2]) == "no catastrophic overfitting; PGD accuracy: best 41.2%, last 41.2%"
    assert line(curve((0.9, 0.0))) == \
        "catastrophic overfitting in 1 of 1 epoch, first in epoch 1; PGD accuracy: best 0.0%, last 0.0%"
    assert line([]) == "no epochs recorded"


def test_the_rule_errs_on_four_of_the_labelled_runs():
    """The report states these errors. With thresholds chosen anew, or more labels, it is written anew."""
    runs = collapses.read_all()
    labels = [run.label for run in runs]
    assert (labels.count("collapsed"), labels.count("healthy"), labels.count("undecided")) == (81, 244, 4)
    alarms, missed = ([f"{run.group}: {run.name}" for run in each] for each in collapses.mistakes(runs))
    short = "cpu-short-bf16"
    assert alarms == [f"{short}, epsilon 16/255: cifar10_zerograd_zero-qval=0.7_epsilon=16_pgd-alpha=4_seed=0"]
    assert missed == [f"cpu-short: cifar10_zerograd_zero-qval=0.35_seed={seed}" for seed in (0, 2)] + [
        f"{short}: cifar10_zerograd_zero-qval=0.35_seed=4"]
    report = (ROOT / "experiments/report/collapses.md").read_text()
    assert all(each.rpartition(": ")[2] in report.split("Every error:")[1] for each in (*alarms, *missed))


def test_every_label_is_of_a_run_and_gives_its_epochs_and_a_reason():
    with open(ROOT / "experiments/labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {(run.group.partition(",")[0].replace(" ", "_"), run.name): run for run in collapses.read_all()}
    assert len({(row["set"], row["run"]) for row in rows}) == len(rows)
    for row in rows:
        run = runs[row["set"], row["run"]]
        epochs = [int(number) for number in re.findall(r"\d+", row["epochs"])]
        assert bool(epochs) == (row["label"] == "collapsed") and row["reason"]
        assert epochs == sorted(epochs) and all(1 <= epoch <= len(run.epochs) for epoch in epochs)


def test_the_public_logs_collapse_where_their_page_says(tmp_path):
    runs = public.read_runs()
    states = {run.name: collapse.collapsed(run.epochs) for run in runs}
    page = (ROOT / "experiments/public_logs/README.md").read_text()
    for number, where in ((sum(map(any, states.values())), " as collapsed in some epoch"),
                          (sum(state[-1] for state in states.values()), " in the last epoch")):
        assert f" {number} of the {len(runs)} runs{where}" in " ".join(page.split())
    for data_set, title in public.DATA_SETS.items():
        own = public.by_method([run for run in runs if run.data_set == data_set])
        assert f"## {title}\n\n{public.table(own)}\n" in page
    assert public.spans([False, True, True, False, True]) == [(2, 3), (5, 5)]


def test_the_signs_are_their_formulas():
    torch.manual_seed(0)
    model, x, y = SmallNet().double(), torch.rand(6, 3, 5, 5, dtype=torch.float64), torch.randint(4, (6,))

    def gradient(delta):
        delta = delta.clone().requires_grad_()
        torch.nn.functional.cross_entropy(model.eval()(x + delta), y).backward()
        return delta.grad.flatten(1)

    def in_l2():
        direction, length = torch.randn_like(x), torch.rand(6, dtype=torch.float64)
        return 0.1 * length.view(6, 1, 1, 1) * direction / direction.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()

    for norm, point in (("l_inf", lambda: torch.empty_like(x).uniform_(-0.1, 0.1)), ("l_2", in_l2)):
        torch.manual_seed(1)
        found = collapse.signs(model.train(), x, y, 0.1, norm)
        assert model.training  # as before
        torch.manual_seed(1)
        g, other = gradient(torch.zeros_like(x)), gradient(point())
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
