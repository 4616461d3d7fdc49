"""Run folder: atomic writes, file locks, logs, TensorBoard."""
import contextlib
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from .console import UsageError, collapse_line, count, say


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open `path` for binary writing. The file is replaced atomically, even if the machine crashes."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = path  # the error of a full disk has no file name
        raise
    with contextlib.suppress(OSError):  # a shared file system may not support flushing a directory
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def link(source: Path, path: Path) -> None:
    """Hard-link `path` to `source` atomically, or copy the file if the file system has no hard links.

    Files are replaced, never modified, so replacing `source` later does not change `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with atomic_write(path) as file:
            file.write(source.read_bytes())
    else:
        os.replace(temporary, path)


def lock(path: str | Path, wait: float = 0) -> IO[str] | None:
    """Lock the file `path`. If another process holds the lock, wait for up to `wait` seconds.

    Returns:
        The file, whose closing releases the lock; None, after a warning, if its file system has no locks.

    Raises:
        TimeoutError: another process still holds the lock.
    """
    file, end = open(path, "a"), time.monotonic() + wait  # noqa: SIM115
    while True:
        try:
            import fcntl  # does not exist on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= end:
                file.close()
                raise TimeoutError(f"another process keeps {path} locked") from None
            time.sleep(0.1)
        except (ImportError, OSError):  # NFS and Lustre may answer ENOLCK, EOPNOTSUPP or ENOSYS
            file.close()
            warn_of_no_locks(Path(path).parent)
            return None


@functools.cache
def warn_of_no_locks(folder: Path) -> None:
    """Warn, once per folder, that the file system has no file locks."""
    say(f"warning: {folder} is on a file system without file locks: two runs in this folder could overwrite each "
        f"other's files", error=True)


class Folder:
    """Folder of a run at `path`; None: the run writes no files."""

    def __init__(self, path: str | Path | None):
        self.exists = path is not None
        self.path = Path(os.devnull if path is None else path)
        self._lock: IO[str] | None = None

    def is_writable(self) -> bool:
        """Return whether the folder is writable or can be created. Writes nothing."""
        there = self.path
        try:
            str(there).encode()  # fails if the name cannot be written to a log
            while not there.exists() and there != there.parent:
                there = there.parent
            return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        except (OSError, ValueError):  # not a valid name for the system
            return False

    def require_writable(self, flag: str = "--fname") -> None:
        """Raise UsageError, naming `flag`, unless the folder is writable or can be created. Writes nothing."""
        if not self.is_writable():
            raise UsageError(f"{flag} {self.path} cannot be written: it must be a writable folder or a new one")

    def lock(self) -> None:
        """Create the folder and lock it until `release`. Raises UsageError if another run uses it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock or lock(self.path / ".lock")
        except TimeoutError:
            raise UsageError(f"--fname {self.path} is in use by another run: choose another folder, or wait") from None
        except OSError as error:
            raise UsageError(f"--fname {self.path} cannot be written ({error.strerror})") from None

    def release(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def file(self, name: str, epoch: int | str) -> Path:
        return self.path / f"{name}_{epoch}.pth"

    def names(self, pattern: str) -> list[str]:
        """Return the names of files in the folder that fully match the regular expression, sorted."""
        there = sorted(os.listdir(self.path)) if self.path.is_dir() else []
        return [name for name in there if re.fullmatch(pattern, name)]

    def epochs(self, name: str) -> list[int]:
        """Return the epochs E for which the file {name}_E.pth exists, newest first."""
        return sorted((int(file[len(name) + 1:-4]) for file in self.names(rf"{name}_\d+\.pth")), reverse=True)

    def write(self, name: str, text: str) -> None:
        with atomic_write(self.path / name) as file:
            file.write(text.encode())

    def move_to_earlier(self, names: Iterable[str]) -> str | None:
        """Move the files to a new subfolder earlier_N/. Returns its path; None if none of the files exists."""
        names = [name for name in names if (self.path / name).exists()]
        if not names:
            return None
        number = 1
        while (earlier := self.path / f"earlier_{number}").exists():
            number += 1
        earlier.mkdir()
        for name in names:
            os.rename(self.path / name, earlier / name)
        return str(earlier)


TITLES = ("Epoch", "Train Time", "Test Time", "LR", "Train Robust Loss", "Train Robust Acc", "Test Loss", "Test Acc",
          "Test Robust Loss", "Test Robust Acc", "Val Robust Acc", "Defence Mean", "Attack Mean")


def write_logs(folder: Folder, state, args) -> None:
    """Write args.json, output.log, metrics.jsonl and final.json from `state`."""
    started = {"data_set": args.data_set, "statement": args.statement, "args": args.flags(), "starts": state.starts}
    folder.write("args.json", json.dumps(started, indent=1) + "\n")
    rows = [(start["epoch"], 0, resumed_line(start)) for start in state.starts if start.get("source")]
    rows += [(record["epoch"], 2, "# " + collapse_line(record)) for record in state.history if record.get("collapsed")]
    validated = any("val_robust_acc" in record for record in state.history)
    rows += [(record["epoch"], 1, log_line(record, validated)) for record in state.history]
    lines = [header(validated),
             *(line for _, _, line in sorted(rows, key=lambda row: row[:2]))]
    if state.final:
        lines.append(final_line(state.final))
    folder.write("output.log", "".join(f"{line}\n" for line in lines))
    folder.write("metrics.jsonl", "".join(f"{json.dumps(record)}\n" for record in state.history))
    if state.final:  # last, so that final.json exists only if all other logs are complete
        folder.write("final.json", json.dumps(state.final, indent=1) + "\n")


def evaluations(folder: Folder) -> list[dict[str, Any]]:
    """Return the records in evaluation.json. Raises UsageError if the file is damaged."""
    path = folder.path / "evaluation.json"
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError
        return records
    except ValueError:
        raise damaged_evaluations(folder) from None


def damaged_evaluations(folder: Folder) -> UsageError:
    """Return the error about an evaluation.json that cannot be used."""
    return UsageError(f"{folder.path / 'evaluation.json'} is damaged: repair it, or move it to another folder")


def add_evaluation(folder: Folder, record: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Append a record to evaluation.json, and rewrite eval.log from the records of --eval.

    Concurrent evaluations wait for each other, for ten seconds at most.

    Args:
        before: record to replace, as an earlier call returned it.

    Returns:
        The record as stored in the file.
    """
    record = json.loads(json.dumps(record))
    held = None
    with contextlib.suppress(TimeoutError):
        held = lock(folder.path / ".evaluation.lock", wait=10)
    try:
        records = evaluations(folder)
        if before in records:
            records[records.index(before)] = record
        else:
            records.append(record)
        lines: list[str] = []
        above = ""
        for each in (each for each in records if "epoch" in each):
            validated = "val_robust_acc" in each
            if header(validated) != above:
                above = header(validated)
                lines.append(above)
            lines += [log_line(each, validated), *([final_line(each["final"])] if "final" in each else [])]
        folder.write("evaluation.json", json.dumps(records, indent=1) + "\n")
        if lines:
            folder.write("eval.log", "".join(f"{line}\n" for line in lines))
        return record
    finally:
        if held:
            held.close()


def header(validated: bool) -> str:
    return "\t".join(title for title in TITLES if validated or title != "Val Robust Acc")


def log_line(record: dict[str, Any], validated: bool) -> str:
    """Return an epoch's line of output.log. The keys of `record` are the TITLES in lower case, with underscores."""
    def cell(title: str) -> str:
        value = record.get(title.lower().replace(" ", "_"))
        if title == "Epoch" or value is None:
            return str(value) if title == "Epoch" else "nan"
        return f"{value:.1f}" if title.endswith("Time") else f"{value:.6f}" if title == "LR" else f"{value:.4f}"

    return "\t".join(cell(title) for title in TITLES if validated or title != "Val Robust Acc")


def resumed_line(start: dict[str, Any]) -> str:
    steps = f" and {count(start['step'], 'step')}" if start["step"] else ""
    return f"# resumed after {count(start['epoch'], 'epoch')}{steps}, from {start['source']}"


def final_line(final: dict[str, Any]) -> str:
    metrics = (f"{name.replace('_', ' ')}: {final[name]:.4f}" for name in
               ("clean_loss", "clean_acc", "robust_loss", "robust_acc"))
    return "\t".join([f"PGD{final['iters']}", f"time: {final['seconds']:.1f}", *metrics])


def read_records(folder: Folder) -> list[dict]:
    """Return the records in metrics.jsonl, one for each epoch. Raises ValueError if the file is damaged."""
    path = folder.path / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("epoch"), int) or not all(
                isinstance(value, (int, float, type(None))) for value in record.values()):
            raise ValueError
    return records


# TensorBoard tag -> key in an epoch's record
SCALARS = {
    "accuracy/train": "train_robust_acc", "accuracy/clean": "test_acc", "accuracy/fgsm": "fgsm_acc",
    "accuracy/pgd": "test_robust_acc", "accuracy/validation": "val_robust_acc", "loss/train": "train_robust_loss",
    "loss/clean": "test_loss", "loss/pgd": "test_robust_loss", "perturbation/train": "defence_mean",
    "perturbation/pgd": "attack_mean", "watch/alignment": "alignment", "watch/participation": "participation",
    "watch/abnormal": "abnormal", "watch/collapsed": "collapsed", "lr": "lr"}


class EventFiles:
    """TensorBoard files of a run in `folder`, which must contain no other files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer: Any = None
        self.drawn: list[dict[str, Any]] = []

    def draw(self, history: list[dict[str, Any]]) -> None:
        """Write the epochs that are not yet in the files. After a new launch, write all epochs to new files."""
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        if self.writer is None or self.drawn != history[:len(self.drawn)]:
            self.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.writer, self.drawn = SummaryWriter(self.folder), []
        for record in history[len(self.drawn):]:
            for tag, name in SCALARS.items():
                if record.get(name) is not None:
                    self.writer.add_scalar(tag, float(record[name]), record["epoch"])
        self.writer.flush()
        self.drawn = list(history)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
