"""Train the runs behind the tables and figures.

    python experiments/reproduce.py cifar10 quantile --data-dir=../cifar-data
    python experiments/reproduce.py --scale=paper --budget=60         # all tables, most important first, for an hour
    python experiments/reproduce.py --scale=cpu --list                # list finished runs and the time for the rest

A run's files are in runs/SCALE/NAME. After the training (for the table `attacks`, also after evaluate.py), the result
is written to experiments/results/SCALE/NAME.json. Runs with a result are skipped. On Ctrl-C, on SIGTERM and when the
budget is spent, the runs save their state and stop; the same command continues them. If a run fails, its name is
printed and the others continue. Parallel runs are spread over the GPUs, or share the cores of a CPU.
"""
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from definitions import ROOT, SCALES, TABLES, Experiment, experiments
from results import Result, collect, read_result, write_result
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from singlestep.figures import method
from singlestep.options import METHODS, Parser, data_set, number, parse, path
from singlestep.run.console import UsageError, one_line_errors, say
from singlestep.run.device import cuda_devices
from singlestep.run.folder import Folder

POLL = 0.5  # seconds between two looks at the runs
GRACE = 120  # seconds that a run has to save its state and stop
MEMORY = 2 << 30  # bytes that a run on a CPU may need

# Estimate if no result has the time: minutes for each of the `passes` of a run, and for the rest of the run.
ROUGH = {"paper": (0.012, 8.0), "cpu": (3.5, 5.0), "cpu-short": (1.3, 2.0), "cpu-short-bf16": (0.3, 1.0),
         "short": (1.3, 2.0), "seeds": (3.5, 5.0), "cpu-bf16": (1.3, 3.0), "cpu-paper": (2.0, 60.0),
         "demo": (0.25, 1.0), "demo-bf16": (0.1, 0.5), "smoke": (0.01, 0.1)}


@dataclass
class Job:
    """A process: a run's training or, with `evaluates`, its evaluation by evaluate.py. slot: 0 to --jobs - 1."""

    experiment: Experiment
    slot: int
    process: subprocess.Popen
    evaluates: bool = False


class Runner:
    """Train the `missing` runs, `--jobs` in parallel."""

    def __init__(self, missing: list[Experiment], args):
        self.args = args
        self.missing = missing
        self.waiting, self.running = deque(missing), []
        self.made, self.failed, self.elsewhere = [], [], []
        self.stop: str | None = None  # reason for stopping
        self.signals: list[signal.Signals] = []
        self.deadline = time.monotonic() + 60 * args.budget
        self.gpus = gpus()

    def run(self) -> int:
        """Train and evaluate the runs. Returns the exit status."""
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
        finally:  # stop the runs after any error
            for job in self.running:
                job.process.terminate()
        for experiment in self.failed:
            say(f"failed: {experiment.name}: see {self.folder(experiment) / 'console.log'}", error=True)
        left = [e for e in self.missing if read_result(self.args.results, e) is None]
        if self.stop:
            say(f"{self.stop}: {len(self.made)} runs made, {len(left)} left; the same command continues them")
        elif self.elsewhere:
            say(f"{len(self.elsewhere)} runs are running in another process: rerun this command when it has ended")
        if self.signals:
            return 128 + self.signals[0]
        return 1 if self.failed or (left and not self.stop) else 0

    def folder(self, experiment: Experiment) -> Path:
        return self.args.runs / experiment.scale / experiment.name

    def epochs_done(self) -> int:
        return sum(epochs_done(self.folder(e)) for e in self.missing)

    def start(self, experiment: Experiment) -> None:
        """Start a run, unless it has a result by now or another process is training it."""
        if read_result(self.args.results, experiment):
            return
        folder = self.folder(experiment)
        self.launch(experiment, [*experiment.command, f"--fname={folder}", "--resume=auto"])

    def launch(self, experiment: Experiment, words: list[str], evaluates: bool = False) -> None:
        """Start a command for a run, in a free slot. words: script and flags."""
        folder, command = self.folder(experiment), [sys.executable, *words]
        slot = min(set(range(self.args.jobs)) - {job.slot for job in self.running})
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
        self.running.append(Job(experiment, slot, process, evaluates))

    def is_elsewhere(self, experiment: Experiment) -> bool:
        """Return whether another process is training this run; if so, skip the run."""
        folder = Folder(self.folder(experiment))
        try:
            folder.lock()
        except UsageError:
            self.elsewhere.append(experiment)
            say(f"{experiment.name} is skipped: another process is training it")
            return True
        folder.release()
        return False

    def finish(self, job: Job) -> None:
        """Handle the end of a process: start the evaluation that the table wants, or write the result."""
        experiment, status = job.experiment, job.process.returncode
        if self.stop and status in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT,
                                    -signal.SIGKILL):
            return
        if status:
            if self.is_elsewhere(experiment):  # another process locked the folder just before ours
                return
            return self.fail(experiment, f"status {status}: {last_line(self.folder(experiment))}")
        if experiment.evaluation and not job.evaluates:
            script, *flags = experiment.evaluation
            return None if self.stop else self.launch(experiment, [script, str(self.folder(experiment)), *flags], True)
        try:
            result = collect(experiment, self.folder(experiment), self.args.jobs)
            write_result(self.args.results, experiment, result)
        except (OSError, ValueError, KeyError) as error:
            return self.fail(experiment, f"its result cannot be read or written ({type(error).__name__}: {error})")
        self.made.append(experiment)
        last = result["epochs"][-1]
        say(f"{experiment.name}: clean {last['test_acc']:.1%}, " + (
            f"final evaluation {result['final']['robust_acc']:.1%}" if result["final"] else
            f"PGD {last['test_robust_acc']:.1%}"))

    def fail(self, experiment: Experiment, why: str) -> None:
        self.failed.append(experiment)
        say(f"{experiment.name} failed: {why}")

    def stop_if_asked(self) -> None:
        """Send SIGTERM to the runs after a signal or the budget; kill them after GRACE seconds or a second signal."""
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
    """Return the visible GPUs, by their names in CUDA_VISIBLE_DEVICES."""
    count = cuda_devices()
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]


def default_jobs(scale: str) -> int:
    """Return the number of parallel runs: one per GPU; on a CPU, one per core for narrow networks, else 1."""
    flags = SCALES[scale].flags.split()
    if "--device=cpu" not in flags and (count := len(gpus())):
        return count
    narrow = "--base-width=16" in flags or "--base-width=4" in flags
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores(), memory // MEMORY)) if narrow else 1


def default_scale() -> str:
    """Return the scale that suits this machine."""
    if gpus():
        return "paper"
    return "cpu-bf16" if has_bfloat16() and any(map(shutil.which, ("g++", "clang++", "c++"))) else "cpu"


def has_bfloat16() -> bool:
    """Return whether the processor has bfloat16 instructions."""
    names = ("avx512_bf16", "amx_bf16")
    if hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(name) for name in names)
    about = Path("/proc/cpuinfo")
    return about.exists() and any(name in about.read_text(errors="replace").split() for name in names)


@cache
def passes(experiment: Experiment) -> float:
    """Return the cost of a run, in passes of a network of base width 16 over all training images."""
    args = parse(data_set(experiment.dataset), argv=experiment.command[1:])
    name, _ = method(args.flags())
    step = args.multi_samps + 1 if args.attack == "multigrad" else METHODS[name].passes if name in METHODS else 2
    return float(step) * args.epochs * (args.base_width / 16) ** 1.5


def minutes(result: Result) -> float:
    """Return the minutes that a run took."""
    epochs = sum(record["train_time"] + record.get("test_time", 0) for record in result["epochs"])
    return (epochs + (result["final"] or {}).get("seconds", 0)) / 60


def expected(experiment: Experiment, known: dict[Experiment, Result]) -> tuple[float, bool]:
    """Estimate the minutes of a run. Returns them, and whether results of other runs at this scale were used.

    Results of runs with the same passes are preferred; others are scaled by their passes.
    """
    paces = {other: minutes(result) / passes(other) * other.epochs / len(result["epochs"])
             for other, result in known.items()}
    same = [pace for other, pace in paces.items() if passes(other) == passes(experiment)]
    if paces:
        return statistics.median(same or list(paces.values())) * passes(experiment), True
    pace, rest = ROUGH[experiment.scale]
    return pace * passes(experiment) + rest, False


def show(wanted: list[Experiment], tables: list[str], args) -> None:
    """Print a line for each run (table, name, minutes, progress), then the totals."""
    every = experiments(list(TABLES), args.scale, tuple({e.seed for e in wanted}))
    known = {e: result for e in every if (result := read_result(args.results, e))}
    table_of = {e: table for table in reversed(tables) for e in experiments([table], args.scale, tuple(
        {e.seed for e in wanted}))}
    width, longest = max(map(len, table_of.values())), max(len(e.name) for e in wanted)
    left = 0.0
    for e in wanted:
        time_, measured = (minutes(known[e]), True) if e in known else expected(e, known)
        left += 0 if e in known else time_
        done = epochs_done(args.runs / e.scale / e.name)
        progress = "done" if e in known else f"{done} of {e.epochs} epochs" if done else "missing"
        say(f"{table_of[e]:{width}}  {e.name:{longest}}  {'' if measured else '~'}{time_:.0f} min  {progress}")
    missing = sum(e not in known for e in wanted)
    say(f"{len(wanted) - missing} of {len(wanted)} runs have results; the others take about {left / 60:.1f} hours, "
        f"{left / 60 / max(1, min(args.jobs, missing)):.1f} with --jobs={args.jobs}")


def epochs_done(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text(errors="replace").count("\n") if file.exists() else 0


def last_line(folder: Path) -> str:
    lines = (folder / "console.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "without a message"


def main() -> None:
    scales = "".join(f"\n  {name:16}{scale.about}" for name, scale in SCALES.items())
    p = Parser(f"{__doc__}\nScales:\n{scales}\n")
    p.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (default: all, in this order); "
                   "paper, seeds and demo are also scales")
    p.add_argument("--scale", choices=SCALES, help="size of the runs, see above (default: paper with a GPU; "
                   "cpu-bf16 on a CPU with bfloat16 instructions and a C++ compiler; else cpu)")
    p.add_argument("--seeds", type=number(int, 1, 1000), metavar="N",
                   help="seeds 0 to N-1 of each row (default: the scale's)")
    p.add_argument("--only", metavar="TEXT", default="", help="only runs whose name contains TEXT")
    p.add_argument("--jobs", type=number(int, 1, 1000), metavar="K",
                   help="number of parallel runs (default: one per GPU; on a CPU, one per core, as memory "
                   "allows, for networks of --base-width 16 or less, else 1)")
    p.add_argument("--budget", type=number(float, 0), default=float("inf"), metavar="MINUTES",
                   help="stop after this time")
    p.add_argument("--data-dir", type=path, help="folder of all data sets (default: each training script's)")
    p.add_argument("--runs", type=path, default=str(ROOT / "runs"), help="folder of the runs' folders")
    p.add_argument("--results", type=path, default=str(ROOT / "experiments/results"), help="folder of the results")
    p.add_argument("--list", action="store_true", help="list the runs with their progress and times, and exit")
    tables = vars(args := p.parse_args()).pop("tables")
    with one_line_errors():
        wanted = choose(args, tables)
        missing = [e for e in wanted if read_result(args.results, e) is None]
        if args.list:
            return show(wanted, tables or list(TABLES), args)
        say(f"{len(wanted) - len(missing)} of {len(wanted)} runs have results")
        if missing:
            args.jobs = min(args.jobs, len(missing))
            sys.exit(Runner(missing, args).run())


def choose(args, tables: list[str]) -> list[Experiment]:
    """Return the selected runs, and set the defaults in `args`. Raises UsageError for a wrong flag."""
    unknown = [table for table in tables if table not in TABLES]
    if unknown:
        raise UsageError(f"TABLE must be one of {', '.join(TABLES)}, not {unknown[0]}")
    if args.scale is None:
        args.scale = default_scale()
        say(f"# --scale={args.scale}: {SCALES[args.scale].about}")
    args.jobs = args.jobs or default_jobs(args.scale)
    for name in ("data_dir", "runs", "results"):  # the runs start in another directory
        if vars(args)[name]:
            setattr(args, name, Path(vars(args)[name]).resolve())
    listed = experiments(tables or list(TABLES), args.scale,
                         tuple(range(args.seeds)) if args.seeds else SCALES[args.scale].seeds)
    if not listed:
        raise UsageError(f"{' '.join(tables)} has no runs at --scale={args.scale}")
    wanted = [e for e in listed if args.only in e.name]
    if not wanted:
        raise UsageError(f"no run of these tables at --scale={args.scale} has --only={args.only!r} in its name")
    if args.list:
        return wanted
    if args.scale == "paper" and not gpus():
        raise UsageError(f"--scale=paper needs a GPU: use --scale={default_scale()}")
    for name in ("runs", "results"):
        Folder(vars(args)[name]).require_writable(f"--{name}")
    return wanted


if __name__ == "__main__":
    main()
