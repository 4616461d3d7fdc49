"""The fixtures of the tests."""
import os
import signal
import sys
from types import SimpleNamespace

# The tests' networks are too small for more; set before torch is imported, here and in the scripts that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from helpers import DATASETS
from processes import IMAGES, SIDE

from singlestep import autoattack, data, evaluation, networks, options, train

# Where the suite runs in a shell's background, SIGINT is ignored, here and in what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture
def evaluates(capsys):
    """evaluate.py in this process: evaluates(*flags) -> (status, output, error output)."""
    def run_main(*flags):
        status = 0
        try:
            evaluation.main(options.parse_evaluation(argv=[str(flag) for flag in flags]))
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()
    return run_main


@pytest.fixture
def short(monkeypatch):
    """AutoAttack of few steps."""
    import pyautoattack

    class Short(pyautoattack.AutoAttack):
        queries = 100

        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 3
            self.square.n_queries = self.queries

    monkeypatch.setattr(autoattack, "library", lambda: SimpleNamespace(AutoAttack=Short))
    return Short
