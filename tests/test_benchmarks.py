"""The benchmarks run, also where streams and names are odd, and write what they measured."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

SMALL = {"speed.py": ["--attacks", "fgsm", "--eval-images=8", "--eval-iters=1", "--eval-restarts=1"],
         "methods.py": ["--methods", "fgsm"]}


def benchmark(name: str, *flags: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--base-width=4", "--batch-size=8", "--rounds=1",
               "--device=cpu", *SMALL[name], *flags]
    return subprocess.run(command, text=True, **{"capture_output": True, **options})


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_writes_what_it_measured(name, tmp_path):
    path = tmp_path / "l\xe4ufe.json"
    done = benchmark(name, f"--json={path}", env={"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr and "fgsm" in done.stdout
    found = json.loads(path.read_text())
    assert found["base_width"] == 4 and found["batch_size"] == 8 and found["threads"] == 1
    if name == "methods.py":
        assert found["methods"]["fgsm-rs"]["ratio"] == 1 and found["methods"]["fgsm"]["ratio"] > 0


@pytest.mark.parametrize("name", SMALL)
def test_a_place_for_the_figures_that_is_none_is_told_before_they_are_measured(name):
    done = benchmark(name, "--json=/proc/nowhere/x.json")
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1 and "/proc/nowhere" in done.stderr
    done = benchmark(name, "--json=")
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1 and "--json" in done.stderr


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_without_a_standard_output_ends_well(name):
    assert benchmark(name, capture_output=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                     preexec_fn=lambda: __import__("os").close(1)).returncode == 0
