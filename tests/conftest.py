"""What the tests share: a small network, small runs of the real scripts, and their files."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

# The tests' networks are too small for more; set before torch is imported, here and in the scripts that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from processes import IMAGES, ROOT, SIDE
from torch import nn

from singlestep import data, networks, options, train

# Where the suite runs in a shell's background, SIGINT is ignored, here and in what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

DATASETS = {"train_cifar.py": options.CIFAR10, "train_cifar100.py": options.CIFAR100, "train_svhn.py": options.SVHN}

# Added to any command, these make it end in seconds; every part of a run still takes place.
SMALL = ["--dummy", "--device=cpu", "--base-width=4", "--batch-size=32", "--train-samples=80", "--epochs=2",
         "--test-iters=2", "--final-iters=2", "--final-restarts=2", "--final-samples=48"]
TINY = ["--dummy", "--device=cpu", "--base-width=4", "--batch-size=8", "--train-samples=8", "--epochs=2",
        "--test-iters=1", "--test-samples=8", "--last-samples=8", "--final-iters=1", "--final-restarts=1",
        "--final-samples=1", "--chkpt-iters=1", "--attack=fgsm"]


class SmallNet(nn.Module):
    """A network with BatchNorm for images of any size, smooth enough that its gradient has no zeros by chance."""

    def __init__(self, channels: int = 3, classes: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, classes)

    def forward(self, x):
        return self.linear(torch.tanh(self.bn(self.conv(x))).square().mean(dim=(2, 3)))


def linear_network(dataset: options.DataSet, args) -> nn.Module:
    """The network that the arguments name, with weights written down here, under which it is linear.

    Each logit is a whole multiple of each mean colour of a few pixels, since no ReLU meets a negative number. So
    rounding decides neither a class nor a gradient's sign, and counts are the same on every processor. Training with
    --lr-max=0 leaves the network as it is, BatchNorm's running statistics included.
    """
    network = networks.new_network(dataset, args)
    colours = torch.eye(network.conv1.out_channels, 3)
    classes = torch.arange(dataset.classes).view(-1, 1) * torch.tensor([3, 5, 1]) % 11 - 5.0
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.fill_(1), layer.bias.fill_(4)
                layer.momentum = 0.0
            elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                layer.weight[:3, :3, 0, 0] = torch.eye(3)
        network.conv1.weight[:, :, 1, 1] = colours
        network.linear.weight[:, :3] = classes
        network.linear.bias.copy_(-16 * classes.sum(dim=1))  # four BatchNorm layers on the way add 4 each
    return network


@pytest.fixture
def small_dummy(monkeypatch):
    """Few and small synthetic images, for runs inside the test's own process."""
    monkeypatch.setattr(data, "DUMMY_SIZES", IMAGES)
    monkeypatch.setattr(data, "DUMMY_SIDE", SIDE)


@pytest.fixture
def shallow(monkeypatch):
    """Have PreActResNet18 be of one block a stage, for tests of what happens around a network."""
    monkeypatch.setattr(networks, "PreActResNet18", lambda num_classes, **rest: networks.PreActResNet(
        networks.PreActBlock, (1, 1, 1, 1), num_classes, **rest))


@pytest.fixture
def first_is_best(monkeypatch):
    """Have the first epoch score highest, whatever the weights: a run resumed after that epoch keeps its best model."""
    measure = train.measure
    monkeypatch.setattr(train, "measure", lambda run: {**measure(run), "score": 1 / (1 + run.state.epoch)})


@pytest.fixture
def call(capsys):
    """Run a script's main inside this process: call(script, *flags) -> (exit status, output, error output)."""
    def run_main(script: str, *flags: str):
        status = 0
        try:
            train.main(DATASETS[script], options.parse(DATASETS[script], argv=[str(flag) for flag in flags]))
        except SystemExit as end:
            status = end.code or 0
        output, error = capsys.readouterr()
        return status, output, error
    return run_main


@pytest.fixture
def call_main(capsys, monkeypatch):
    """Run a module's main inside this process: call_main(module, *flags) -> (exit status, output, error output)."""
    def run_main(module, *flags: str):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__.rpartition('.')[2]}.py", *map(str, flags)])
        status = 0
        try:
            module.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()
    return run_main


def script(name: str, *flags: str, timeout: float = 280, **options) -> subprocess.CompletedProcess:
    """Run a script as a user does."""
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], capture_output=True, text=True,
                          timeout=timeout, **options)


def epochs_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder: Path) -> tuple[list[dict], list[list[str]], dict]:
    """All that a run's logs say but for how long it took, a GPU's memory (of each process), and that it was resumed."""
    records = [{key: value for key, value in record.items() if not key.endswith("_time") and key != "peak_memory"}
               for record in epochs_of(folder)]
    lines = [line.split("\t") for line in (folder / "output.log").read_text().splitlines() if not line.startswith("#")]
    rows = [[cell for i, cell in enumerate(line) if i not in (1, 2) and not cell.startswith("time")] for line in lines]
    final = json.loads((folder / "final.json").read_text())
    del final["seconds"]
    return records, rows, final


def assert_same(left, right) -> None:
    """Equal to the last bit, through nested dicts and lists, but for what may differ between two runs."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - {"args", "starts", "seconds", "train_time", "test_time", "peak_memory"}:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right):
            assert_same(*pair)
    else:
        assert left == right


def assert_same_run(left: Path, right: Path) -> None:
    """Both folders hold the same weights, optimizer state and logs, bit for bit."""
    assert without_times(left) == without_times(right)
    for name in ("state.pth", "model_best.pth"):
        assert_same(torch.load(left / name, weights_only=True), torch.load(right / name, weights_only=True))
