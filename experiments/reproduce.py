"""Make the runs that tables and figures are built from, as far as they are missing.

    python experiments/reproduce.py cifar10 quantile --scale=cpu --jobs=2 --data-dir=../cifar-data
    python experiments/reproduce.py --scale=paper --budget=60         # everything, in order of worth, for an hour
    python experiments/reproduce.py --scale=cpu --list                # what is there and what is missing

A run's files are in runs/SCALE/NAME; once it is complete, its result is written to experiments/results/SCALE/NAME.json,
and is not made again while that is there. A run that was cut off goes on where it was. Ctrl-C, SIGTERM and the end of
the budget have the runs save their state and stop; a run that fails is named, and the others go on. On several GPUs,
jobs are dealt out to them; on a CPU, they share its cores.
"""
import argparse
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from definitions import ROOT, SCALES, TABLES, Experiment, experiments
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from utils import number, whole_file

POLL = 0.5  # seconds between two looks at the runs


@dataclass
class Job:
    """A run under way, in one of the slots."""

    experiment: Experiment
    slot: int
    process: subprocess.Popen


class Runner:
    """Makes `missing` runs, `jobs` at a time."""

    def __init__(self, missing: list[Experiment], args):
        self.args = args
        self.missing = missing
        self.waiting, self.running, self.failed = deque(missing), [], []
        self.elsewhere = 0
        self.stop: str | None = None  # why, once it has been decided
        self.signals: list[signal.Signals] = []
        self.deadline = time.monotonic() + 60 * args.budget
        self.gpus = gpus()

    def run(self) -> int:
        """Make the runs; returns the exit status."""
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, lambda received, frame: self.signals.append(signal.Signals(received)))
        done = 0
        with tqdm(total=sum(e.epochs for e in self.missing), unit="epoch", disable=None, dynamic_ncols=True) as bar:
            while self.running or (self.waiting and not self.stop):
                self.obey()
                while self.waiting and len(self.running) < self.args.jobs and not self.stop:
                    self.start(self.waiting.popleft())
                time.sleep(POLL)
                for job in [job for job in self.running if job.process.poll() is not None]:
                    self.running.remove(job)
                    done += self.finish(job)
                bar.n = sum(epochs_done(self.folder(e)) for e in self.missing)
                bar.set_postfix(runs=f"{done}/{len(self.missing)}", failed=len(self.failed))
        for experiment in self.failed:
            print(f"failed: {experiment.name}: see {self.folder(experiment) / 'console.log'}", file=sys.stderr)
        left = len(self.missing) - done - len(self.failed) - self.elsewhere
        if self.stop:
            print(f"{self.stop}: {done} runs made, {left} left; the same command goes on")
        if self.signals:
            return 128 + self.signals[0]
        return 1 if self.failed else 0

    def folder(self, experiment: Experiment) -> Path:
        return self.args.runs / experiment.scale / experiment.name

    def start(self, experiment: Experiment) -> None:
        folder = self.folder(experiment)
        folder.mkdir(parents=True, exist_ok=True)
        slot = min(set(range(self.args.jobs)) - {job.slot for job in self.running})
        command = [sys.executable, *experiment.command, f"--fname={folder}", "--resume=auto", "--chkpt-steps=100"]
        if self.args.data_dir:
            command.append(f"--data-dir={self.args.data_dir}")
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.args.jobs)))
        # The run inherits the open file and with it the lock, which so lasts as long as the run, not as this process.
        with open(folder / ".lock", "w") as lock, open(folder / "console.log", "a") as console:
            if not locked(lock):
                self.elsewhere += 1
                tqdm.write(f"{experiment.name} is being made by another process: left to it")
                return
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=console,
                                       stderr=console, pass_fds=[lock.fileno()], start_new_session=True)
        self.running.append(Job(experiment, slot, process))

    def finish(self, job: Job) -> bool:
        """Write the result of a run that has ended; returns whether there is one."""
        experiment, status = job.experiment, job.process.returncode
        if status == 0:
            record = result(experiment, self.folder(experiment))
            write_result(self.args.results, experiment, record)
            tqdm.write(f"{experiment.name}: clean {record['epochs'][-1]['test_acc']:.1%}, closing attack "
                       f"{record['final']['robust_acc']:.1%}")
            return True
        if not self.stop:
            self.failed.append(experiment)
            tqdm.write(f"{experiment.name} failed with status {status}: {last_line(self.folder(experiment))}")
        return False

    def obey(self) -> None:
        """Have the runs save their state and stop if a signal or the budget asks for it; at a second signal, kill."""
        if not self.stop and (self.signals or time.monotonic() > self.deadline):
            self.stop = f"stopped by {self.signals[0].name}" if self.signals else "the budget is spent"
            for job in self.running:
                job.process.terminate()
        if len(self.signals) > 1:
            for job in self.running:
                job.process.kill()


def locked(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]


def epochs_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def last_line(folder: Path) -> str:
    lines = (folder / "console.log").read_text().strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def result(experiment: Experiment, folder: Path) -> dict:
    """What a complete run found, and what its numbers stand with."""
    started = json.loads((folder / "args.json").read_text())
    machine = {key: started[key] for key in ("commit", "device", "threads", "torch", "torchvision", "python")}
    return {"name": experiment.name, "command": shlex.join(["python", *experiment.command]), **machine,
            "final": json.loads((folder / "final.json").read_text()),
            "epochs": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]}


def result_file(results: Path, experiment: Experiment) -> Path:
    return results / experiment.scale / f"{experiment.name}.json"


def write_result(results: Path, experiment: Experiment, record: dict) -> None:
    """Write `record`, an epoch a line."""
    path = result_file(results, experiment)
    path.parent.mkdir(parents=True, exist_ok=True)
    *head, last = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items() if key != "epochs")
    epochs = ",\n".join(f"  {json.dumps(epoch)}" for epoch in record["epochs"])
    with whole_file(path) as file:
        file.write(("{\n" + ",\n".join([*head, last, f' "epochs": [\n{epochs}\n ]']) + "\n}\n").encode())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (default: all, in this order)")
    p.add_argument("--scale", choices=SCALES, default="paper",
                   help="; ".join(f"{name}: {scale.about}" for name, scale in SCALES.items()) + " (default: paper)")
    p.add_argument("--seeds", type=number(int, 1, 1000), metavar="N", help="seeds 0 to N-1 of each row (default: the "
                   "scale's)")
    p.add_argument("--only", metavar="TEXT", default="", help="only the runs with this in their names")
    p.add_argument("--jobs", type=number(int, 1, 1000), default=1, metavar="K", help="runs at once (default: 1)")
    p.add_argument("--budget", type=number(float, 0), default=float("inf"), metavar="MINUTES",
                   help="stop after this time")
    p.add_argument("--data-dir", type=Path, help="torchvision's root, for all data sets (default: the scripts')")
    p.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the runs' folders are (default: runs)")
    p.add_argument("--results", type=Path, default=ROOT / "experiments/results",
                   help="where the results are (default: experiments/results)")
    p.add_argument("--list", action="store_true", help="only say what is there and what is missing")
    args = p.parse_args()
    for path in ("data_dir", "runs", "results"):  # the runs start in another directory
        if getattr(args, path):
            setattr(args, path, getattr(args, path).expanduser().resolve())
    unknown = [table for table in args.tables if table not in TABLES]
    if unknown:
        p.exit(2, f"{p.prog}: error: there is no table {unknown[0]}: take some of {', '.join(TABLES)}\n")
    seeds = tuple(range(args.seeds)) if args.seeds else SCALES[args.scale].seeds
    wanted = [e for e in experiments(args.tables or list(TABLES), args.scale, seeds) if args.only in e.name]
    missing = [e for e in wanted if not result_file(args.results, e).exists()]
    if args.list:
        for e in wanted:
            begun = epochs_done(args.runs / e.scale / e.name)
            print(f"{f'{begun}/{e.epochs} epochs' if e in missing else 'there':>12}  {shlex.join(e.command)}")
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there")
    if missing and not args.list:
        sys.exit(Runner(missing, args).run())


if __name__ == "__main__":
    main()
