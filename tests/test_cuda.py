"""The scripts on a GPU, as users run them; without one, nothing here runs."""
import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from helpers import ROOT, SMALL, assert_same_run, epochs_of, script

from singlestep.run.device import cuda_devices

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800),
              pytest.mark.skipif(cuda_devices() == 0, reason="needs a GPU")]

TIMEOUT = 600  # the compiler may take minutes
train = partial(script, "train_cifar.py", timeout=TIMEOUT)

ON_CUDA = [*SMALL, "--device=cuda"]
LEARNING = [*ON_CUDA, "--train-samples=768", "--epochs=4", "--lr-schedule=cyclic", "--lr-max=0.2", "--base-width=8"]


def require_learnt(folder, done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stderr
    last, final = epochs_of(folder)[-1], json.loads((folder / "final.json").read_text())
    assert last["test_acc"] > 0.8 and last["test_images"] == 512
    assert final["clean_acc"] >= final["robust_acc"] > 0.5
    assert all(record[name] > 0 for record, name in (
        (last, "train_memory"), (last, "test_memory"), (final, "memory")))
    state = torch.load(folder / "state.pth", map_location="cpu", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("attack", ["fgsm", "zerograd", "multigrad", "pgd"])
def test_every_attack_trains(attack, tmp_path):
    done = train(*LEARNING, f"--attack={attack}", "--fname", tmp_path / "run")
    require_learnt(tmp_path / "run", done)


@pytest.mark.parametrize("flags", [
    [], ["--compile"], ["--amp"], ["--amp", "--compile"], ["--amp", "--amp-dtype=float16"], ["--no-tf32"],
    ["--no-tf32", "--compile"], ["--deterministic"], ["--compile", "--compile-mode=reduce-overhead"],
    ["--amp", "--compile", "--compile-mode=reduce-overhead"]], ids=lambda flags: " ".join(flags))
def test_every_precision_and_way_to_compile_trains(flags, tmp_path):
    folder = tmp_path / "run"
    require_learnt(folder, train(*LEARNING, "--attack=zerograd", *flags, "--fname", folder))
    done = train(*LEARNING, *flags, "--fname", folder, "--eval", "--resume=auto")
    assert done.returncode == 0, done.stderr
    evaluations, final = (json.loads((folder / name).read_text()) for name in ("evaluation.json", "final.json"))
    evaluated = evaluations[-1]["final"]
    assert evaluated["clean_acc"] == pytest.approx(final["clean_acc"], abs=0.05)
    assert evaluated["robust_acc"] == pytest.approx(final["robust_acc"], abs=0.1)


def test_deterministic_runs_have_the_same_bits_stopped_or_not(tmp_path):
    flags = [*ON_CUDA, "--deterministic", "--epochs=40", "--attack=zerograd", "--resume=auto"]
    whole, again, part = (tmp_path / name for name in ("whole", "again", "part"))
    for folder in (whole, again):
        done = train(*flags, "--fname", folder)
        assert done.returncode == 0, done.stderr
    command = [sys.executable, str(ROOT / "train_cifar.py"), *flags, "--fname", str(part)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (part / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM and len(epochs_of(part)) < 40
    done = train(*flags, "--fname", part)
    assert done.returncode == 0 and "resumed after" in done.stdout, done.stderr
    for folder in (again, part):
        assert_same_run(folder, whole)


@pytest.mark.parametrize("count, flags", [(1, []), (2, []), (2, ["--amp"]), (2, ["--sync-bn"])])
def test_processes_train_together(count, flags, tmp_path):
    if cuda_devices() < count:
        pytest.skip(f"needs {count} GPUs")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "train_cifar.py",
         *LEARNING, "--attack=zerograd", *flags, "--fname", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    require_learnt(tmp_path / "run", done)
