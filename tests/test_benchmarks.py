"""The benchmarks run, also where streams and names are odd, and write what they measured."""
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

PEERS = [name for name, package in (("torchattacks", "torchattacks"), ("art", "adversarial-robustness-toolbox"))
         if any(importlib.metadata.distributions(name=package))]
PEER = ["--peer"] if PEERS else []
SMALL = {"speed.py": ["--attacks", "fgsm", "--eval-images=8", "--eval-iters=1", "--eval-restarts=1", *PEER],
         "methods.py": ["--methods", "fgsm"]}


@pytest.mark.parametrize("name, closed", [*((name, False) for name in SMALL), ("methods.py", True)])
def test_a_benchmark_writes_what_it_measured(name, closed, tmp_path):
    """Also without a standard output."""
    path = tmp_path / "l\xe4ufe.json"
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--base-width=4", "--batch-size=8", "--rounds=1",
               "--device=cpu", *SMALL[name], f"--json={path}"]
    done = subprocess.run(command, text=True, capture_output=True, preexec_fn=lambda: os.close(1) if closed else None,
                          env={"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr and ("batch 8" in done.stdout) != closed, done.stderr
    found = json.loads(path.read_text())
    assert found["base_width"] == 4 and found["batch_size"] == 8 and found["threads"] == 1
    if name == "speed.py":
        peers = found["step"]["fgsm"]["peers"]
        assert [peer.split()[0] for peer in peers] == PEERS and all(ratio > 0 for ratio in peers.values())
        assert 0 < found["start_up_seconds"]["--help"] < found["start_up_seconds"]["first step"]
    if name == "methods.py":
        assert found["methods"]["fgsm-rs"]["ratio"] == 1 and found["methods"]["fgsm"]["ratio"] > 0


def test_a_peer_that_is_not_installed_is_told_of(call_main, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("speed")
    monkeypatch.setattr(module, "installed", lambda package: False)
    status, output, error = call_main(module, "--device=cpu", "--peer")
    assert status == 2 and not output and error.endswith(
        "--peer needs at least one of these packages: pip install torchattacks adversarial-robustness-toolbox\n")


@pytest.mark.parametrize("name", SMALL)
def test_a_place_for_the_figures_that_is_none_is_told_before_they_are_measured(name, call_main, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(name.removesuffix(".py"))
    status, output, error = call_main(module, "--device=cpu", "--json=/proc/nowhere/x.json")
    assert status == 1 and not output and error.count("\n") == 1 and "/proc/nowhere" in error
    status, output, error = call_main(module, "--json=")
    assert status == 2 and not output and error.count("\n") == 1 and "--json" in error
