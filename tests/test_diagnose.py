"""experiments/diagnose.py: magnitudes and flips of networks for which they are known, and the script on a run."""
import json
import sys
from functools import partial

import pytest
import torch
from helpers import ROOT, SMALL, epochs_of
from torch import nn

from singlestep import train

sys.path.insert(0, str(ROOT / "experiments"))
import batchnorm
import diagnose

EPSILON = 8 / 255
ENTRIES = 300  # of an image of 3 x 10 x 10


class Known(nn.Module):
    """Two classes, and a difference between their logits whose gradient is slope + bend (x - 1/2), entry by entry."""

    def __init__(self, slope, bend):
        super().__init__()
        self.slope, self.bend = slope, bend

    def forward(self, x):
        x = x.flatten(1) - 0.5
        difference = (self.slope * x + self.bend * x.square() / 2).sum(dim=1)
        return torch.stack([difference, torch.zeros_like(difference)], dim=1)


def found(model, q, n=20):
    x, y = torch.full((n, 3, 10, 10), 0.5), torch.arange(n) % 2
    torch.manual_seed(0)
    points = tuple(torch.empty_like(x).uniform_(-EPSILON, EPSILON) for _ in range(2))
    return diagnose.diagnose(model, x, y, points, q)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_a_linear_network_flips_no_sign_and_its_magnitudes_are_its_weights(scale):
    """However large they are, and so however sure it is: what is measured is relative to the image's mean."""
    torch.manual_seed(1)
    weights = torch.randn(ENTRIES)
    magnitudes, flips, groups = found(Known(scale * weights, torch.zeros(ENTRIES)), 0.35)
    expected = (weights.abs() / weights.abs().mean()).quantile(torch.tensor(diagnose.LEVELS))
    assert magnitudes == pytest.approx(expected.tolist(), rel=1e-4)
    assert flips == [0] * 10 and groups == [0, 0]


def test_entries_whose_gradient_crosses_zero_within_the_ball_flip_every_other_time():
    """For 40% of the entries, the gradient is that of a parabola around the image; for the others, far from it."""
    slope, bend = torch.full((ENTRIES,), 3 * EPSILON), torch.ones(ENTRIES)
    slope[torch.randperm(ENTRIES)[:120]] = 0
    _, flips, groups = found(Known(slope, bend), 0.4, n=100)
    assert flips[:4] == pytest.approx([0.5] * 4, abs=0.05) and flips[4:] == [0] * 6
    assert groups == pytest.approx([0.5, 0], abs=0.02) and groups[1] == 0
    _, _, groups = found(Known(slope, bend), 0.0)
    assert groups[0] != groups[0] and groups[1] == pytest.approx(0.2, abs=0.02)  # nothing is below


@pytest.fixture
def run(tmp_path, call, small_dummy, monkeypatch):
    """The folder of a run whose best model is that of its last epoch, whatever the weights."""
    measure = train.measure
    monkeypatch.setattr(train, "measure", lambda run: {**measure(run), "score": run.state.epoch})
    flags = [*SMALL, "--attack=zerograd", "--epochs=3", "--chkpt-iters=2", "--final-iters=0", "--fname"]
    assert call("train_cifar.py", *flags, tmp_path / "run")[0] == 0
    return tmp_path / "run"


@pytest.fixture
def told(call_main):
    """diagnose.py in this process: told(*flags) -> (status, output, error output)."""
    return partial(call_main, diagnose)


def test_a_run_is_told_of_and_drawn_and_twice_the_same(run, told, tmp_path):
    pytest.importorskip("matplotlib")
    flags = [run, "--samples=16"]
    status, output, error = told(*flags)
    assert (status, error) == (0, "") and output.count("| model_1.pth |") == output.count("| model_2.pth |") == 2
    assert "quantile q = 0.35" in output and told(*flags)[1] == output
    other = told(*flags, "--seed=1", "--zero-qval=0.5", f"--out={tmp_path / 'x.png'}")[1]
    assert other.partition("Signs")[0] == output.partition("Signs")[0] and "quantile q = 0.5" in other
    for name in ("x_magnitudes.png", "x_flips.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"# drawn in {tmp_path / name}" in other


def test_networks_are_those_of_every_epoch_and_the_last_best_and_healthy_ones_of_others(tmp_path):
    for name in ("model_1", "model_3", "model_best", "model_healthy"):
        (tmp_path / f"{name}.pth").touch()
    records = [f'{{"epoch": {epoch}, "best": {str(epoch in (0, 2)).lower()}, "collapsed": {str(epoch > 3).lower()}}}\n'
               for epoch in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(records))
    for step, last in ((7, []), (0, [(5, "state")])):  # an epoch under way is none of those on record
        torch.save({"opt": {"run": {"step": step}}}, tmp_path / "state.pth")
        networks = diagnose.networks(diagnose.Folder(tmp_path))
        assert [(each.epoch, each.file.stem) for each in networks] == [
            (2, "model_1"), (3, "model_best"), (4, "model_3"), *last]


def test_mistakes_are_one_line(run, told, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for flags, named in (([tmp_path / "empty"], "has no network"), ([run, "--out=x.gif"], "must end in .png"),
                         ([run, f"--out={tmp_path}/none/x.png", "--samples=2"], "x_magnitudes.png cannot be written")):
        status, _, error = told(*flags)
        assert status == 2 and error.count("\n") == 1 and named in error, error
    (run / "metrics.jsonl").write_text("{")
    status, _, error = told(run)
    assert status == 2 and error.count("\n") == 1 and "metrics.jsonl is damaged" in error
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, error = told(run, "--out=x.png")
    assert status == 2 and error.count("\n") == 1 and "pip install matplotlib" in error


def test_statistics_estimated_anew_are_those_of_the_training_images(tmp_path, call, call_main, small_dummy, shallow):
    """A network saved with ruined statistics gets the accuracy back that sound statistics give it."""
    run = tmp_path / "run"
    assert call("train_cifar.py", *SMALL, "--epochs=1", "--chkpt-iters=1", "--fname", run)[0] == 0
    file = run / "model_0.pth"
    state = torch.load(file, weights_only=True)
    (run / "state.pth").unlink()
    outputs = []
    for factor in (1.0, 1e4):
        torch.save({key: factor * value if key.endswith("running_mean") else value for key, value in state.items()},
                   file)
        status, output, error = call_main(batchnorm, run, "--samples=20", f"--out={tmp_path / 'found.json'}")
        assert status == 0, error
        outputs.append(output.splitlines()[-2:])
    (saved, anew), (ruined, again) = outputs
    assert anew == again and ruined != saved and "as saved" in ruined and "anew" in anew
    kept = json.loads((tmp_path / "found.json").read_text())
    assert [f"{100 * row[name]:.1f}" for row in kept["networks"] for name in ("clean", "FGSM", "PGD-10")] == [
        cell.strip() for line in (ruined, again) for cell in line.strip("|").split("|")[2:]]
    assert kept["epochs"] == epochs_of(run) and len(kept["starts"]) == 2
