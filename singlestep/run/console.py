"""Console output (lines, progress bars, one-line errors) and stop signals."""
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

MINUTES = 3  # between two progress lines if there is no terminal


class UsageError(Exception):
    """An error that the user can correct: one line that names the flag or file and says what to give instead."""

    printed_elsewhere = False  # another process prints this error


class Failure(Exception):
    """A failure at run time (out of memory, non-finite loss, collapse): one line, exit status 1."""


class Stopped(BaseException):  # like KeyboardInterrupt: `except Exception` must not catch it
    """A signal stopped the run. `midway`: the signal interrupted a step, so the state must not be saved."""

    def __init__(self, number: signal.Signals, how: str = "", midway: bool = False):
        super().__init__(f"stopped by {number.name}{how}")
        self.number, self.midway = number, midway


def printable(text: str) -> str:
    """Escape characters that could control a terminal, as `repr` does; keep tabs and newlines."""
    return "".join(c if c.isprintable() or c in "\t\n" else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in text)


def say(text: str, error: bool = False, needed: bool = False) -> None:
    """Print a line, above the progress bar if there is one.

    Characters that the stream cannot encode, or that could control a terminal, are escaped. If the stream cannot be
    written (a full disk, a closed terminal), print a warning, and do not use the stream again.

    Args:
        error: print to standard error.
        needed: no file holds the text: raise an error if the text cannot be written.

    Raises:
        BrokenPipeError: the reader of standard output is gone.
        OSError: the text is `needed` and cannot be written.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    line = f"{printable(text)}\n".encode(encoding, "backslashreplace").decode(encoding)
    try:
        tqdm.write(line, stream, end="")  # text and newline in one write, even if unbuffered
        stream.flush()
    except OSError as fault:
        discard(stream)
        if error:
            return
        if needed or isinstance(fault, BrokenPipeError):
            fault.filename = "standard output"
            raise
        say(f"warning: standard output cannot be written ({fault.strerror}): continuing without it", error=True)


def discard(stream: TextIO) -> None:
    """Redirect the stream to the null device, with the content of its buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class StopSignals:
    """Context in which SIGINT, SIGTERM and SIGHUP stop a run.

    While `deferred` is set, a signal is only recorded, and loops stop between two steps; otherwise a signal raises
    Stopped at once. A second signal of the same kind ends the process, except under torchrun. Signals that the process
    ignores stay ignored, as SIGHUP under nohup. Signals are handled in the main thread only.
    """

    received: signal.Signals | None = None
    deferred = False

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
        again, self.received = self.received, signal.Signals(number)
        if "WORLD_SIZE" not in os.environ:  # a scheduler and torchrun may both forward the same signal
            signal.signal(number, signal.SIG_DFL)
        if not self.deferred and not again:
            raise Stopped(self.received)


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process at once, because a KeyboardInterrupt during PyTorch's import can get lost."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def one_line_errors(folder: str = "") -> Iterator[None]:
    """On an error of this module, of the system or of an import, print one line to standard error and end the process.

    Exit status: 2 for UsageError, 1 for Failure, OSError and ImportError, 128 + signal number for Stopped.
    """
    def end(status: int, text: str) -> NoReturn:
        if text:
            say(f"{Path(sys.argv[0]).name}: {text}", error=True)
        sys.exit(status)

    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # a closed stream: the next file to be opened would get its descriptor
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    try:
        yield
    except UsageError as error:
        end(2, "" if error.printed_elsewhere else f"error: {' '.join(str(error).split())}")
    except Failure as error:
        end(1, f"error: {error}")
    except Stopped as stop:
        end(128 + stop.number, str(stop))
    except KeyboardInterrupt:  # outside StopSignals, or a second SIGINT
        end(128 + signal.SIGINT, "stopped by SIGINT")
    except BrokenPipeError:
        end(1, f"error: standard output was closed{'; --resume auto continues this run' if folder else ''}")
    except ImportError as error:
        end(1, f"error: {error}: install or repair this package")
    except OSError as error:
        end(1, ": ".join(filter(None, ["error", str(error.filename or folder), error.strerror or str(error)])))


class Screen:
    """Console of a process. Only rank 0 prints; with --quiet, it prints only warnings."""

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
        """Show a progress bar of `total` units, of which `done` are complete. Without a total, show elapsed time."""
        bar = Progress(self, what, total, unit, done)
        try:
            yield bar
        finally:
            bar.close()


class Progress:
    """Progress bar whose clock also runs between updates. Without a terminal, print a line every MINUTES."""

    def __init__(self, screen: Screen, what: str, total: int | None, unit: str, done: int):
        self.screen, self.what, self.total, self.unit = screen, what, total, unit
        self.done, self.first = done, done
        self.said, self.values, self.over = time.monotonic(), "", threading.Event()
        self.timed: tuple[float, int] | None = None  # time and units after the first step, which may compile
        self.bar = tqdm(desc=printable(what), total=total, unit=unit, initial=done, leave=False, dynamic_ncols=True,
                        bar_format=None if total else "{desc} {elapsed}", disable=not (screen.shown and drawable()))
        if not self.bar.disable:
            threading.Thread(target=self._move, daemon=True).start()

    def _move(self) -> None:
        while not self.over.wait(1):
            self.bar.refresh()

    def tell(self, what: str, **values: str) -> None:
        """Set the description in front of the bar and the values behind it."""
        self.what, self.values = what, "".join(f", {name} {value}" for name, value in values.items())
        self.bar.set_description(printable(what), refresh=False)
        self.bar.set_postfix(values, refresh=False)

    def update(self, n: int = 1, left: int | None = None) -> None:
        """Add n complete units, up to `total`. left: units that remain after this update, if `total` has changed."""
        if left is not None:
            self.total = self.bar.total = self.done + n + left
        n = n if self.total is None else min(n, self.total - self.done)
        self.done += n
        self.bar.update(n)
        if self.done == self.total:  # tqdm may skip drawing the last step if it follows another too soon
            self.bar.refresh()
        now = time.monotonic()
        self.timed = self.timed or (now, self.done)
        if self.bar.disable and now - self.said > 60 * MINUTES:
            self.said = now
            self.screen.say(f"# {self.what}: {self.done:,} of {self.total:,} {self.unit}s{self.values}, {self.left()}")

    def left(self) -> str:
        """Return an estimate of the remaining time, as text."""
        since, then = self.timed or (0.0, self.done)
        if self.total is None or self.done == then:
            return "time left unknown"
        return f"about {duration((time.monotonic() - since) / (self.done - then) * (self.total - self.done))} left"

    def close(self) -> None:
        self.over.set()
        self.bar.close()


def drawable() -> bool:
    """Return whether standard error is a terminal that can show bars. In containers and jobs, it may have 0 columns."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):  # no stream, a closed stream, or no terminal
        return False


def count(number: int, noun: str) -> str:
    """Format a number with its noun: 1 epoch, 2 epochs, 1,000 images."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Format a rounded duration: 95 s, 12 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def clock(seconds: float) -> str:
    """Format a duration like a clock: 2:04, 1:02:11."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def banner(args, method: str, network: str, compiled: bool, start: dict[str, Any], images: tuple[int, int, int],
           steps: int) -> str:
    """Return the first lines that a run prints: method, data, network and hardware, folder.

    Args:
        method: flags of the method.
        network: architecture and number of parameters.
        start: dict from `device.describe`.
        images: numbers of training, validation and test images.
        steps: steps in an epoch.
    """
    train, held_out, test = images
    first = test if args.full_test else min(args.test_samples, test)
    last = min(max(first, args.last_samples or test), test)
    precision = args.amp_dtype if args.amp else "float32"
    return "\n".join([
        f"method   {args.method + ': ' if args.method else ''}{method}",
        f"data     {args.data_set}{' (synthetic)' if args.dummy else ''}: {train:,} training images, "
        f"{count(args.epochs, 'epoch')} of {count(steps, 'step')}; evaluated on "
        f"{f'{held_out:,} validation and ' if held_out else ''}{first:,} test images after an epoch, {last:,} after "
        f"the last",
        f"network  {network}, {precision}{', compiled' * compiled}, on {start['device']}, threads: {start['threads']}, "
        f"processes: {start['processes']}",
        f"folder   {args.fname}"])


def epoch_line(record: dict[str, Any], history: list[dict[str, Any]], epochs: int) -> str:
    """Return an epoch's line: accuracy in % on training images, clean test images, and under FGSM and PGD."""
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
    """Return the line of the final evaluation, with accuracy in %."""
    return (f"final evaluation of the {final['model']} model, {final['images']:,} images, "
            f"PGD-{final['iters']}-{final['restarts']}: clean {100 * final['clean_acc']:.2f}  "
            f"robust {100 * final['robust_acc']:.2f}  {clock(final['seconds'])}")


def final_estimate(args, seconds: float, evaluated: int, images: int) -> str:
    """Estimate the duration of the final evaluation, on the assumption that 40% of the images stay robust.

    Args:
        seconds, evaluated: duration and number of images of the evaluation after an epoch.
        images: number of images of the final evaluation.

    Returns:
        A line to print; empty if the estimate is under 5 minutes.
    """
    expected = pgd_seconds(args, seconds / evaluated, args.final_iters, args.final_restarts, images)
    if expected < 300:
        return ""
    return (f"# the final evaluation (PGD-{args.final_iters}-{args.final_restarts} on {images:,} images) may take "
            f"{duration(expected)}; to shorten it, lower --final-iters, --final-restarts or --final-samples")


def pgd_seconds(args, seconds: float, steps: int, restarts: int, images: int) -> float:
    """Estimate the duration of PGD, on the assumption that 40% of the images stay robust.

    seconds: seconds per image of PGD in the evaluation after an epoch.
    """
    return seconds * images * steps * (1 + 0.4 * (restarts - 1)) / (args.test_iters * args.test_restarts)


def results_lines(args, record: dict[str, Any], images: int) -> str:
    """Return lines that name the folder of the results and the next commands.

    The first command is limited to the images that take about a minute, from 10 to 1,000.

    Args:
        record: record of the last epoch; without test images in it, the first command has no limit.
        images: number of test images.
    """
    flags, full, evaluated = "", "", shlex.quote(args.fname)
    if args.data_set == "own":  # the network is not an architecture of --model
        file = shlex.quote(f"{args.fname}/model_{args.epochs - 1}.pth")
        evaluated = (f"--network=MODULE:FUNCTION --weights={file} --data-set=NAME --epsilons={args.epsilon:g} "
                     f"--norm={args.norm}")
    if record.get("test_images"):
        seconds = record["test_time"] / record["test_images"]
        within = int(60 / max(pgd_seconds(args, seconds, 10, 1, 1), 1e-9))  # how many images take a minute
        flags = f" --attacks=clean,fgsm,pgd-10-1 --samples={min(max(10, min(1000, within // 10 * 10)), images)}"
        full = (f"# (without these flags: PGD-50-10 on all {images:,} test images, about "
                f"{duration(pgd_seconds(args, seconds, 50, 10, images))})\n")
    return (f"# results are in {args.fname}\n"
            f"# evaluate the model:  python evaluate.py {evaluated}{flags}\n{full}"
            f"# plot the run:        python plot.py {shlex.quote(args.fname)} "
            f"--out={shlex.quote(args.fname + '/curves.png')}")


def collapse_line(record: dict[str, Any]) -> str:
    """Return the message about an epoch in collapse."""
    line = (f"catastrophic overfitting in epoch {1 + record['epoch']}: accuracy {100 * record['fgsm_acc']:.1f}% under "
            f"FGSM, {100 * record['test_robust_acc']:.1f}% under PGD")
    easier = record.get("abnormal") or 0.0
    return line + (f"; the training attack lowered the loss of {100 * easier:.1f}% of the images" if easier > 0.5
                   else "")


def summary_line(summary: dict[str, Any], epochs: int) -> str:
    """Return the message about a whole run of `epochs` epochs; `summary` is from `collapse.summary`."""
    if not epochs:  # checkpoints of the published scripts have no history
        return "no epochs recorded"
    first, best, last = (summary[name] for name in ("collapse_epoch", "best_robust_acc", "last_robust_acc"))
    share = f"{summary['collapsed_epochs']} of {count(epochs, 'epoch')}"
    line = "no catastrophic overfitting" if first is None else \
        f"catastrophic overfitting in {share}, first in epoch {first + 1}"
    return f"{line}; PGD accuracy: best {100 * best:.1f}%, last {100 * last:.1f}%"
