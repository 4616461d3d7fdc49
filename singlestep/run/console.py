"""What a run prints: lines, bars and one-line errors; and the signals that stop it."""
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

MINUTES = 3  # off a terminal, a long wait prints a line this often


class UsageError(Exception):
    """A mistake the user can mend: one line that names the flag or file and says what would be right."""

    told = False  # by another process


class Failure(Exception):
    """What ends a run though no flag or file is wrong: one line, exit status 1."""


class Stopped(Exception):
    """A signal asked the run to end; `midway`: within a step, so that the state is not one to save."""

    def __init__(self, number: signal.Signals, how: str = "", midway: bool = False):
        super().__init__(f"stopped by {number.name}{how}")
        self.number, self.midway = number, midway


def say(text: str, error: bool = False) -> None:
    """Print a line, above a progress bar if there is one. A stream that is closed or that a letter does not fit into
    is no reason to end."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    line = f"{text}\n".encode(encoding, "backslashreplace").decode(encoding)
    tqdm.write(line, stream, end="")  # at once, also where nothing is buffered
    stream.flush()


class StopSignals:
    """Within `with`, notes SIGINT, SIGTERM and SIGHUP, for loops to obey between two steps; a second one acts at once.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored. Only a program's main thread can do this; in
    another one nothing changes.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number)
        if "WORLD_SIZE" not in os.environ:  # a scheduler and torchrun may both pass on the same signal
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def one_line_errors(folder: str = "") -> Iterator[None]:
    """Errors of the kinds above, and those of the system, end the process with a line on standard error."""
    def end(status: int, text: str) -> NoReturn:
        if text:
            say(f"{Path(sys.argv[0]).name}: {text}", error=True)
        sys.exit(status)

    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed: else the next file would take its place
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    try:
        yield
    except UsageError as error:
        end(2, "" if error.told else f"error: {' '.join(str(error).split())}")
    except Failure as error:
        end(1, f"error: {error}")
    except Stopped as stop:
        end(128 + stop.number, str(stop))
    except KeyboardInterrupt:  # before there was anything to save
        end(128 + signal.SIGINT, "stopped by SIGINT")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python, at its end, would fail again
        end(1, f"error: standard output was closed{'; --resume auto goes on' if folder else ''}")
    except OSError as error:
        end(1, f"error: {error.filename or folder}: {error.strerror or error}")


class Screen:
    """Of a run's first process; those of the others show nothing, and that of --quiet warnings alone."""

    def __init__(self, is_main: bool = True, quiet: bool = False):
        self.is_main, self.shown = is_main, is_main and not quiet

    def say(self, text: str) -> None:
        if self.shown and text:
            say(text)

    def warn(self, text: str) -> None:
        if self.is_main:
            say(f"# warning: {text}")

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None = None, unit: str = "", done: int = 0) -> Iterator["Progress"]:
        """A bar over `total` units, of which some may be done; without a total, the time that has gone by."""
        bar = Progress(self, what, total, unit, done)
        try:
            yield bar
        finally:
            bar.close()


class Progress:
    """A bar that moves while the program waits; off a terminal, a line now and then."""

    def __init__(self, screen: Screen, what: str, total: int | None, unit: str, done: int):
        self.screen, self.what, self.total, self.unit = screen, what, total, unit
        self.done, self.first = done, done
        self.said, self.values, self.over = time.monotonic(), "", threading.Event()
        self.timed: tuple[float, int] | None = None  # after the first step, which may have compiled: when, how many
        self.bar = tqdm(desc=what, total=total, unit=unit, initial=done, leave=False, dynamic_ncols=True,
                        bar_format=None if total else "{desc} {elapsed}", disable=not (screen.shown and drawable()))
        if not self.bar.disable:
            threading.Thread(target=self._move, daemon=True).start()

    def _move(self) -> None:
        while not self.over.wait(1):
            self.bar.refresh()

    def tell(self, what: str, **values: str) -> None:
        """Change what the bar says before and behind itself."""
        self.what, self.values = what, "".join(f", {name} {value}" for name, value in values.items())
        self.bar.total = self.total  # it may have changed
        self.bar.set_description(what, refresh=False)
        self.bar.set_postfix(values, refresh=False)

    def update(self, n: int = 1) -> None:
        """Note that n more are done; never more than there are."""
        n = n if self.total is None else min(n, self.total - self.done)
        self.done += n
        self.bar.update(n)
        if self.done == self.total:  # the last step may have come too soon after one that was drawn
            self.bar.refresh()
        now = time.monotonic()
        self.timed = self.timed or (now, self.done)
        if self.bar.disable and now - self.said > 60 * MINUTES:
            self.said = now
            self.screen.say(f"# {self.what}: {self.done:,} of {self.total:,} {self.unit}s{self.values}, {self.left()}")

    def left(self) -> str:
        """How long the rest will take at the pace so far."""
        since, then = self.timed or (0.0, self.done)
        if self.total is None or self.done == then:
            return "some time left"
        return f"about {duration((time.monotonic() - since) / (self.done - then) * (self.total - self.done))} left"

    def close(self) -> None:
        self.over.set()
        self.bar.close()


def drawable() -> bool:
    """Whether there is a terminal to draw bars on. That of a container or a job can have no columns."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):  # there is no stream, it is closed, or no terminal
        return False


def duration(seconds: float) -> str:
    """Roughly, as one would say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def clock(seconds: float) -> str:
    """As a clock shows it: 2:04, 1:02:11."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def banner(args, method: str, parameters: int, compiled: bool, start: dict[str, Any], images: tuple[int, int, int],
           steps: int) -> str:
    """What is about to run: the method with its numbers, the data, the network and the machine, the folder.

    start: as `device.describe` gives it; images: how many to train, to validate and to test on.
    """
    train, held_out, test = images
    first = test if args.full_test else min(args.test_samples, test)
    last = min(max(first, args.last_samples or test), test)
    width = f" of base width {args.base_width}" if args.model != "WideResNet" else f"-34-{args.width_factor}"
    precision = args.amp_dtype if args.amp else "float32"
    return "\n".join([
        f"method   {args.method + ': ' if args.method else ''}{method}",
        f"data     {args.data_set}{' (synthetic)' if args.dummy else ''}: {train:,} training images, {args.epochs} "
        f"epochs of {steps:,} steps; judged on {f'{held_out:,} validation and ' if held_out else ''}{first:,} test "
        f"images after an epoch, {last:,} after the last",
        f"network  {args.model}{width}, {parameters / 1e6:.1f} M parameters, "
        f"{precision}{', compiled' * compiled}, on {start['device']}, threads: {start['threads']}, "
        f"processes: {start['processes']}",
        f"folder   {args.fname}"])


def epoch_line(record: dict[str, Any], history: list[dict[str, Any]], epochs: int) -> str:
    """An epoch's line: accuracy in %, on training images, clean test images, and those under FGSM and PGD."""
    def percent(name: str) -> str:
        return "    -" if record.get(name) is None else f"{100 * record[name]:5.1f}"

    name = "val_robust_acc" if "val_robust_acc" in record else "test_robust_acc"
    best = max((past for past in history if past.get("best")), key=lambda past: past["epoch"], default=None)
    digits = len(str(epochs))
    cells = [f"{1 + record['epoch']:>{digits}}/{epochs}",
             f"lr {record['lr']:.4f}" if record.get("lr") is not None else "",
             f"train {percent('train_robust_acc')}" if record.get("train_robust_acc") is not None else "",
             f"clean {percent('test_acc')}", f"FGSM {percent('fgsm_acc')}", f"PGD {percent('test_robust_acc')}",
             f"val {percent('val_robust_acc')}" if "val_robust_acc" in record else "",
             f"best {100 * best[name]:5.1f} @{1 + best['epoch']:<{digits}}"
             if best and best.get(name) is not None else "",
             f"{clock((record['train_time'] or 0) + record.get('test_time', 0)):>7}",
             "COLLAPSED" if record.get("collapsed") else ""]
    return "  ".join(cell for cell in cells if cell)


def final_line(final: dict[str, Any]) -> str:
    """That of the final evaluation, in %."""
    return (f"final evaluation of the {final['model']} model, {final['images']:,} images, "
            f"PGD-{final['iters']}-{final['restarts']}: clean {100 * final['clean_acc']:.2f}  "
            f"robust {100 * final['robust_acc']:.2f}  {clock(final['seconds'])}")


def final_estimate(args, seconds: float, judged: int, images: int) -> str:
    """How long the final evaluation will take if four images of ten withstand it, when an epoch's, on `judged` images,
    took `seconds`; empty if it is not worth a word."""
    passes = args.final_iters * (1 + 0.4 * (args.final_restarts - 1)) / (args.test_iters * args.test_restarts)
    expected = seconds / judged * images * passes
    if expected < 300:
        return ""
    return (f"# the final evaluation (PGD-{args.final_iters}-{args.final_restarts} on {images:,} images) may take "
            f"{duration(expected)}; --final-iters, --final-restarts and --final-samples shorten it")


def where(args) -> str:
    """Where everything is, and what to do with it."""
    return (f"# everything is in {args.fname}\n"
            f"# to attack it further:  python evaluate.py {shlex.quote(args.fname)}\n"
            f"# to plot it:            python plot.py {shlex.quote(args.fname)} "
            f"--out={shlex.quote(args.fname + '/curves.png')}")


def collapse_line(record: dict[str, Any]) -> str:
    """What to say of an epoch in collapse."""
    said = (f"catastrophic overfitting in epoch {1 + record['epoch']}: {100 * record['fgsm_acc']:.1f}% right under "
            f"FGSM, {100 * record['test_robust_acc']:.1f}% under PGD")
    easier = record.get("abnormal") or 0.0
    return said + (f"; training's attack made {100 * easier:.1f}% of the images easier" if easier > 0.5 else "")


def summary_line(summary: dict[str, Any], epochs: int) -> str:
    """What to say of a whole run of so many epochs, of which `collapse.summary` tells."""
    if not epochs:  # the run of published files has none
        return "no epoch is on record"
    first, best, last = (summary[name] for name in ("collapse_epoch", "best_robust_acc", "last_robust_acc"))
    said = "no catastrophic overfitting" if first is None else \
        f"catastrophic overfitting in {summary['collapsed_epochs']} of {epochs} epochs, first in epoch {first + 1}"
    return f"{said}; under PGD {100 * best:.1f}% at best, {100 * last:.1f}% at last"
