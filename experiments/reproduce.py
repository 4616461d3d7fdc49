"""Make the runs that tables and figures are built from, as far as they are missing.

    python experiments/reproduce.py cifar10 quantile --scale=cpu --jobs=2 --data-dir=../cifar-data
    python experiments/reproduce.py --scale=paper --budget=60         # everything, in order of worth, for an hour
    python experiments/reproduce.py --scale=cpu --list                # what is there and what is missing

A run's files are in runs/SCALE/NAME; once it is complete, its result is written to experiments/results/SCALE/NAME.json,
and it is not made again while that is there. A run that was cut off goes on where it was. Ctrl-C, SIGTERM and the end
of the budget have the runs save their state and stop; a run that fails is named, and the others go on. On several
GPUs, jobs are dealt out to them; on a CPU, they share its cores.
"""
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from definitions import ROOT, SCALES, TABLES, Experiment, experiments
from results import collect, read_result, write_result
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from checkpoint import Folder
from machine import cuda_devices
from options import Parser, number
from utils import UsageError

POLL = 0.5  # seconds between two looks at the runs
GRACE = 120  # seconds that a run has to save its state and stop


@dataclass
class Job:
    """A run under way, in one of the slots."""

    experiment: Experiment
    slot: int
    process: subprocess.Popen


class Runner:
    """Makes `missing` runs, `--jobs` at a time."""

    def __init__(self, missing: list[Experiment], args):
        self.args = args
        self.missing = missing
        self.waiting, self.running = deque(missing), []
        self.made, self.failed, self.elsewhere = [], [], []
        self.stop: str | None = None  # why, once it has been decided
        self.signals: list[signal.Signals] = []
        self.deadline = time.monotonic() + 60 * args.budget
        self.gpus = gpus()

    def run(self) -> int:
        """Make the runs; returns the exit status."""
        for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(which, lambda received, frame: self.signals.append(signal.Signals(received)))
        try:
            with tqdm(total=sum(e.epochs for e in self.missing), initial=self.epochs_done(), unit="epoch", disable=None,
                      dynamic_ncols=True) as bar:
                while self.running or (self.waiting and not self.stop):
                    self.stop_if_asked()
                    while self.waiting and len(self.running) < self.args.jobs and not self.stop:
                        self.start(self.waiting.popleft())
                    time.sleep(POLL)
                    for job in [job for job in self.running if job.process.poll() is not None]:
                        self.running.remove(job)
                        self.finish(job)
                    bar.n = self.epochs_done()
                    bar.set_postfix(runs=f"{len(self.made)}/{len(self.missing)}", failed=len(self.failed))
        finally:  # whatever happens here, no run is left behind
            for job in self.running:
                job.process.terminate()
        for experiment in self.failed:
            print(f"failed: {experiment.name}: see {self.folder(experiment) / 'console.log'}", file=sys.stderr)
        left = [e for e in self.missing if read_result(self.args.results, e) is None]
        if self.stop:
            print(f"{self.stop}: {len(self.made)} runs made, {len(left)} left; the same command goes on")
        elif self.elsewhere:
            print(f"{len(self.elsewhere)} runs were left to another process: call again when it has ended")
        if self.signals:
            return 128 + self.signals[0]
        return 1 if self.failed or (left and not self.stop) else 0

    def folder(self, experiment: Experiment) -> Path:
        return self.args.runs / experiment.scale / experiment.name

    def epochs_done(self) -> int:
        return sum(epochs_done(self.folder(e)) for e in self.missing)

    def start(self, experiment: Experiment) -> None:
        """Start a run, unless another process is about it or has made it by now."""
        if read_result(self.args.results, experiment):
            return
        folder = self.folder(experiment)
        slot = min(set(range(self.args.jobs)) - {job.slot for job in self.running})
        command = [sys.executable, *experiment.command, f"--fname={folder}", "--resume=auto"]
        if self.args.data_dir:
            command.append(f"--data-dir={self.args.data_dir}")
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // self.args.jobs)))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "console.log", "a") as console:
                if self.is_elsewhere(experiment):
                    return
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=console,
                                           stderr=console, start_new_session=True)
        except OSError as error:
            return self.fail(experiment, f"{error.filename}: {error.strerror}")
        self.running.append(Job(experiment, slot, process))

    def is_elsewhere(self, experiment: Experiment) -> bool:
        """Whether another process is about this run, to which it is then left."""
        folder = Folder(self.folder(experiment))
        try:
            folder.lock()
        except UsageError:
            self.elsewhere.append(experiment)
            say(f"{experiment.name} is being made by another process: left to it")
            return True
        folder.release()
        return False

    def finish(self, job: Job) -> None:
        """Write the result of a run that has ended."""
        experiment, status = job.experiment, job.process.returncode
        if self.stop and status in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT,
                                    -signal.SIGKILL):
            return
        if status:
            if self.is_elsewhere(experiment):  # another runner's run was in the folder a moment before ours
                return
            return self.fail(experiment, f"status {status}: {last_line(self.folder(experiment))}")
        try:
            result = collect(experiment, self.folder(experiment), self.args.jobs)
            write_result(self.args.results, experiment, result)
        except (OSError, ValueError, KeyError) as error:
            return self.fail(experiment, f"its result cannot be read or written ({type(error).__name__}: {error})")
        self.made.append(experiment)
        say(f"{experiment.name}: clean {result['epochs'][-1]['test_acc']:.1%}, final evaluation "
            f"{result['final']['robust_acc']:.1%}")

    def fail(self, experiment: Experiment, why: str) -> None:
        self.failed.append(experiment)
        say(f"{experiment.name} failed: {why}")

    def stop_if_asked(self) -> None:
        """If a signal or the budget asks for it, have the runs save their state and stop; later, kill them."""
        now = time.monotonic()
        if not self.stop and (self.signals or now > self.deadline):
            self.stop = f"stopped by {self.signals[0].name}" if self.signals else "the budget is spent"
            self.deadline = now
            for job in self.running:
                job.process.terminate()
        if self.stop and (len(self.signals) > 1 or now > self.deadline + GRACE):
            for job in self.running:
                job.process.kill()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    count = cuda_devices()
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]


def epochs_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def last_line(folder: Path) -> str:
    lines = (folder / "console.log").read_text().strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def say(text: str) -> None:
    tqdm.write(text)
    sys.stdout.flush()


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (default: all, in this order)")
    p.add_argument("--scale", choices=SCALES, default="paper",
                   help="; ".join(f"{name}: {scale.about}" for name, scale in SCALES.items()))
    p.add_argument("--seeds", type=number(int, 1, 1000), metavar="N",
                   help="seeds 0 to N-1 of each row (default: the scale's)")
    p.add_argument("--only", metavar="TEXT", default="", help="only the runs with this in their names")
    p.add_argument("--jobs", type=number(int, 1, 1000), default=1, metavar="K", help="runs at once")
    p.add_argument("--budget", type=number(float, 0), default=float("inf"), metavar="MINUTES",
                   help="stop after this time")
    p.add_argument("--data-dir", help="torchvision's root, for all data sets (default: the scripts')")
    p.add_argument("--runs", default=ROOT / "runs", help="where the runs' folders are")
    p.add_argument("--results", default=ROOT / "experiments/results", help="where the results are")
    p.add_argument("--list", action="store_true", help="only say what is there and what is missing")
    tables = vars(args := p.parse_args()).pop("tables")
    try:
        unknown = [table for table in tables if table not in TABLES]
        if unknown:
            raise UsageError(f"there is no table {unknown[0]}: take some of {', '.join(TABLES)}")
        for name in ("data_dir", "runs", "results"):  # the runs start in another directory
            if vars(args)[name]:
                setattr(args, name, Path(vars(args)[name]).expanduser().resolve())
        seeds = tuple(range(args.seeds)) if args.seeds else SCALES[args.scale].seeds
        listed = experiments(tables or list(TABLES), args.scale, seeds)
        if not listed:
            raise UsageError(f"{' '.join(tables)}: there are no runs at --scale {args.scale}")
        wanted = [e for e in listed if args.only in e.name]
        if not wanted:
            raise UsageError(f"no run of these tables at --scale {args.scale} has --only {args.only!r} in its name")
        if args.scale == "paper" and not args.list and not gpus():
            raise UsageError("--scale paper needs a GPU, and there is none here: take --scale=cpu")
        for name in ("runs", "results"):
            Folder(vars(args)[name]).require_writable(f"--{name}")
    except UsageError as error:
        p.error(str(error))
    missing = [e for e in wanted if read_result(args.results, e) is None]
    if args.list:
        for e in wanted:
            done = f"{epochs_done(args.runs / e.scale / e.name)}/{e.epochs} epochs" if e in missing else "there"
            print(f"{done:>12}  {shlex.join(e.command)}")
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there", flush=True)
    if missing and not args.list:
        sys.exit(Runner(missing, args).run())


if __name__ == "__main__":
    main()
