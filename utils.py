"""What every module may need: errors of one line, signals, seeds, locks, and files that are written whole."""
import contextlib
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # the command line answers without what takes long to import
    import filelock


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


def seed_everything(*key: int) -> None:
    """Make all random numbers from here on a function of `key` (whole numbers, 0 or more) alone.

    Every training step and every evaluated batch starts with this, so that a run that goes on from any step draws
    what an unbroken run draws, and no random state needs saving. NumPy fills a short key up with zeros: (5,) is the
    same as (5, 0, 0, 0), so that every purpose needs a first number of its own.
    """
    import numpy as np
    import torch

    state = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(state[0])
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open `path` for binary writing so that it changes whole or not at all, also when the machine goes down."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # shared folders may not know how to flush a directory
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def lock(path: str | Path, wait: float = -1) -> "filelock.BaseFileLock | None":
    """Lock the file `path` until the returned lock is released; None if another process has it for `wait` seconds.

    A wait of -1 has no end. Where the file system knows no locks, a warning says so and nothing is locked.
    """
    import filelock

    held = filelock.FileLock(path)
    try:
        held.acquire(timeout=wait)
    except filelock.Timeout:
        return None
    except NotImplementedError:
        say(f"warning: {Path(path).parent} is on a file system without locks: two runs there could overwrite each "
            f"other's files", error=True)
    return held


def say(text: str, error: bool = False) -> None:
    """Print a line, above a progress bar if there is one. A stream that is closed or that a letter does not fit into
    is no reason to end."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    from tqdm import tqdm

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
