"""Train with an older commit and with this working tree, and compare the networks bit by bit.

    python tests/same_bits.py e9f773c                 # fgsm, zerograd, multigrad, pgd, pgi, trades
    python tests/same_bits.py e9f773c zerograd sora

Each method trains two epochs on synthetic images at width 16, four times: by the old code without a break; by the old
code and by the new code, stopped in the second epoch and resumed; and begun by the old code and finished by the new
code. The four last networks, optimizers' momenta and logs must be equal. Use it for a change that must not change a
number. Needs a clone with that commit; 5 to 20 minutes.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch

NEW = Path(__file__).resolve().parent.parent
METHODS = ("fgsm", "zerograd", "multigrad", "pgd", "pgi", "trades")
FLAGS = ("--dummy --device=cpu --base-width=16 --epochs=2 --lr-schedule=cyclic --lr-max=0.2 --train-samples=640 "
         "--test-samples=64 --last-samples=64 --final-iters=2 --final-restarts=2 --final-samples=64 --chkpt-steps=1 "
         "--resume=auto --quiet")
NOT_COMPARED = {"train_time", "test_time", "peak_memory", "train_memory", "test_memory", "rollbacks"}


def command(method: str, folder: Path) -> list[str]:
    return [sys.executable, "train_cifar.py", *FLAGS.split(), f"--method={method}", f"--fname={folder}"]


def train(code: Path, method: str, folder: Path) -> None:
    """Train to the end, or continue the run in `folder`."""
    subprocess.run(command(method, folder), cwd=code, check=True)


def train_half(code: Path, method: str, folder: Path) -> None:
    """Train, and stop the run by SIGTERM in its second epoch."""
    process = subprocess.Popen(command(method, folder), cwd=code)
    log = folder / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.02)
    state = (folder / "state.pth").stat().st_mtime_ns
    while process.poll() is None and (folder / "state.pth").stat().st_mtime_ns == state:
        time.sleep(0.02)  # the next state is saved after the second epoch's first step
    process.send_signal(signal.SIGTERM)
    if process.wait() != 128 + signal.SIGTERM:
        raise SystemExit(f"{method}: the run ended before it could be stopped")


def result(folder: Path) -> dict:
    """What must be equal: tensors of the last checkpoint, numbers of the logs."""
    model, optimizer = (torch.load(folder / f"{name}_1.pth", weights_only=True) for name in ("model", "opt"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    final = json.loads((folder / "final.json").read_text())
    found = {f"model {name}": value for name, value in model.items()}
    found |= {f"momentum {i}": each["momentum_buffer"] for i, each in optimizer["state"].items()}
    found |= {f"kept {name}": value for name, value in optimizer["run"]["kept"].items()}
    found |= {f"epoch {record['epoch']} {name}": value for record in records for name, value in record.items()
              if name not in NOT_COMPARED}
    return found | {f"final {name}": final[name] for name in ("clean_acc", "robust_acc", "robust_loss")}


def different(first: dict, second: dict) -> list[str]:
    """The names under which two results differ, or which one of them lacks."""
    def equal(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    return [name for name in sorted(first.keys() | second.keys())
            if name not in first or name not in second or not equal(first[name], second[name])]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("commit", help="the older commit")
    p.add_argument("methods", nargs="*", default=METHODS, help="names of --method")
    args = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the order of sums
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        old, runs = Path(temporary, "old"), Path(temporary, "runs")
        with subprocess.Popen(["git", "archive", args.commit], cwd=NEW, stdout=subprocess.PIPE) as archive, \
                tarfile.open(fileobj=archive.stdout, mode="r|") as files:
            files.extractall(old, filter="data")
        for method in args.methods:
            cases = {name: runs / method / name for name in ("unbroken", "old", "new", "begun by old")}
            train(old, method, cases["unbroken"])
            for name, first, second in (("old", old, old), ("new", NEW, NEW), ("begun by old", old, NEW)):
                train_half(first, method, cases[name])
                train(second, method, cases[name])
            expected = result(cases["unbroken"])
            for name, folder in list(cases.items())[1:]:
                differing = different(expected, result(folder))
                failed |= bool(differing)
                print(f"{method:10} {name:12} " + (f"DIFFERS: {', '.join(differing[:5])}" if differing else
                                                   f"{len(expected)} tensors and numbers equal"), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
