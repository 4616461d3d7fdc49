"""The files of a run, all in one folder: logs, checkpoints, and what a run that goes on needs of them.

    output.log, eval.log      tab-separated, a header, a line an epoch, and a line for the closing attack
    metrics.jsonl, final.json the same and more, by name: one JSON object an epoch; the closing attack
    args.json                 the arguments, and the commit, versions and hardware of every start
    model_E.pth, opt_E.pth    the state dict of the network after epoch E; the optimizer's, and how far the run was
    model_best.pth            the state dict of the best network so far
    state.pth                 the newest complete state, from which --resume auto goes on

Checkpoints hold tensors and plain values alone and are read with weights_only=True. Every file is written whole or not
at all, and what an earlier run left is set aside, never overwritten. (An evaluation adds to eval.log; eval.json is of
the last one.)
"""
import fcntl
import io
import json
import math
import os
import re
import shutil
import sys
import warnings
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import Progress
from precision import Precision
from utils import UsageError, one_at_a_time, whole_file

# Flags that may differ between a run and its continuation: but for rounding, training does not depend on them.
FREE = {"data_dir", "fname", "resume", "eval", "allow_changes", "device", "compile", "compile_mode", "chkpt_iters",
        "chkpt_steps", "final_iters", "final_restarts", "final_samples", "final_model", "deterministic"}

TITLES = ("Epoch", "Train Time", "Test Time", "LR", "Train Robust Loss", "Train Robust Acc", "Test Loss", "Test Acc",
          "Test Robust Loss", "Test Robust Acc", "Val Robust Acc", "Defence Mean", "Attack Mean")


class RunFolder:
    """The folder at `path`; `validated` says whether its logs have a column for the validation accuracy."""

    def __init__(self, path: str, evaluation: bool = False, validated: bool = False):
        self.path, self.evaluation, self.validated = Path(path), evaluation, validated
        self.log = self.path / ("eval.log" if evaluation else "output.log")
        self._lock: int | None = None
        self.titles = [title for title in TITLES if validated or title != "Val Robust Acc"]

    def require_writable(self, flag: str = "--fname") -> None:
        """Raise UsageError, naming the flag, where no such folder could be written to; writes nothing itself."""
        there = self.path
        try:
            str(there).encode()  # or it could not be written into a log
            while not there.exists() and there != there.parent:
                there = there.parent
            writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        except (OSError, ValueError):  # a name that is no name to the system
            writable = False
        if not writable:
            raise UsageError(f"{flag} {self.path} cannot be written: it must be a folder, or a place for a new one")

    def clear_unfinished(self) -> None:
        """Remove what a killed run was just writing."""
        for unfinished in self.path.glob(".*.part"):
            if not unfinished.name.startswith(".eval"):  # that may be of an evaluation going on beside
                unfinished.unlink(missing_ok=True)

    def claim(self) -> None:
        """Before anything is read of the folder, have it for training, if it exists, as `make` does."""
        if self.path.is_dir():
            self.make()

    def make(self) -> None:
        """Make the folder and, for training, lock it until `release`. Raises UsageError where another run has it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            free = self.evaluation or self.lock()  # an evaluation has files of its own
        except OSError as error:
            raise UsageError(f"--fname {self.path} cannot be written ({error.strerror})") from None
        if not free:
            raise UsageError(f"--fname {self.path} is in use by another run: take another, or wait")

    def lock(self) -> bool:
        """Lock the folder, which has to exist, until `release`; returns whether no other run has it."""
        if self._lock is not None:
            return True
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        return True

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # Logs

    def add_line(self, line: str) -> None:
        """Append a line to the log, under a header if it is the first one, or the first of a run with other columns."""
        header = "\t".join(self.titles)
        with one_at_a_time(self.log):  # evaluations may share it
            kept = self.log.read_text() if self.log.exists() else ""
            headers = [kept_line for kept_line in kept.splitlines() if kept_line.startswith(TITLES[0])]
            kept += header + "\n" if headers[-1:] != [header] else ""
            self._write_text(self.log, kept + line + "\n")

    def add_epoch(self, metrics: dict[str, Any]) -> str:
        """Log one epoch's metrics, which go by the titles in lower case; returns the line."""
        line = "\t".join(_cell(title, metrics[name_of(title)]) for title in self.titles)
        self.add_line(line)
        if not self.evaluation:
            kept = self._metrics.read_text() if self._metrics.exists() else ""
            self._write_text(self._metrics, kept + json.dumps(metrics) + "\n")
        return line

    def write_json(self, name: str, record: dict[str, Any]) -> None:
        self._write_text(self.path / name, json.dumps(record, indent=1) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def require_readable_logs(self) -> None:
        """Raise UsageError where what a run that goes on has to read of its logs makes no sense."""
        for path, read in ((self.log, lambda text: text.splitlines()[0]),
                           (self._metrics, lambda text: [json.loads(line)["epoch"] + 0 for line in text.splitlines()]),
                           (self.path / "args.json", lambda text: [*json.loads(text).get("starts", [])]),
                           (self.path / "final.json", lambda text: dict(json.loads(text)))):
            try:
                if path.exists():
                    read(path.read_text())
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                raise UsageError(f"--resume: {path} is damaged: mend it, or move it away") from None

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @staticmethod
    def _write_text(path: Path, text: str) -> None:
        with whole_file(path) as file:
            file.write(text.encode())

    # Checkpoints

    def model_file(self, epoch: int | str) -> Path:
        return self.path / f"model_{epoch}.pth"

    def optimizer_file(self, epoch: int) -> Path:
        return self.path / f"opt_{epoch}.pth"

    @property
    def state_file(self) -> Path:
        return self.path / "state.pth"

    def save_model(self, epoch: int | str, model: nn.Module) -> None:
        self._save(self.model_file(epoch), model.state_dict())

    def save_optimizer(self, epoch: int, optimizer, precision: Precision, progress: Progress, args) -> None:
        self._save(self.optimizer_file(epoch), _training_state(optimizer, precision, progress, args))

    def save_state(self, model: nn.Module, optimizer, precision: Precision, progress: Progress, args) -> None:
        self._save(self.state_file, {"model": model.state_dict(),
                                     "opt": _training_state(optimizer, precision, progress, args)})

    @staticmethod
    def _save(path: Path, content: dict) -> None:
        content_bytes = io.BytesIO()  # at a full disk, torch.save's own error would hide the system's
        torch.save(content, content_bytes)
        with whole_file(path) as file:
            file.write(content_bytes.getbuffer())

    def find(self, resume: int | str) -> tuple[dict, dict | None, int | None, str] | None:
        """The checkpoint that `resume` (an epoch above 0, or "auto") asks for; None where auto finds no run.

        Returns the network's state dict, the optimizer's (an evaluation does without), the next epoch as the files'
        names tell it (None for the state file), and the files' name for messages. Raises UsageError where they are
        missing or cannot be read.
        """
        if resume != "auto":
            return self._pair(resume - 1)
        epochs = sorted((int(match[1]) for name in self._names() if (match := re.fullmatch(r"opt_(\d+)\.pth", name))
                         and self.model_file(match[1]).exists()), reverse=True)
        candidates = [("state.pth", self._state)] if self.state_file.exists() else []
        candidates += [(f"model_{epoch}.pth or opt_{epoch}.pth", partial(self._pair, epoch)) for epoch in epochs]
        fault = None
        for files, read in candidates:
            try:
                *found, source = read()
            except UsageError as error:
                fault = fault or (error, files)
                continue
            return *found, f"{source}, as {fault[1]} is damaged" if fault else source
        if fault:
            raise fault[0]
        return None

    def _state(self) -> tuple[dict, dict, None, str]:
        state = read_checkpoint(self.state_file)
        if not all(isinstance(state.get(part), dict) for part in ("model", "opt")):
            raise UsageError(f"--resume: {self.state_file} holds no training state")
        return state["model"], state["opt"], None, str(self.state_file)

    def _pair(self, epoch: int) -> tuple[dict, dict | None, int, str]:
        model, optimizer = self.model_file(epoch), self.optimizer_file(epoch)
        if self.evaluation and not optimizer.exists():
            return read_checkpoint(model), None, epoch + 1, str(model)
        return read_checkpoint(model), read_checkpoint(optimizer), epoch + 1, f"{model} and {optimizer.name}"

    # Earlier runs

    def set_aside(self) -> Path | None:
        """Move every file of an earlier run into a new folder beside them; returns it, None if there was nothing."""
        names = [name for name in self._names() if re.fullmatch(
            r"(output|eval)\.log|metrics\.jsonl|(args|final|eval)\.json|state\.pth|(model|opt)_(\d+|best)\.pth", name)]
        return self._move_aside(names) if names else None

    def rewind(self, epoch: int, keep_files: bool) -> Path | None:
        """Make the logs end before `epoch`, as a run has to that goes on there.

        With `keep_files` (the state of the run itself goes on) the line of the epoch that was just over is about to be
        written again as it was. Whatever else later epochs left is first set aside, or for the logs copied, and in any
        case the closing attack's; returns where.
        """
        later = ["final.json"] if (self.path / "final.json").exists() else []
        if not keep_files:
            later += [name for name in self._names() if (match := re.fullmatch(r"(?:model|opt)_(\d+)\.pth", name))
                     and int(match[1]) >= epoch]
            later += ["state.pth"] if self.state_file.exists() else []
            if self.best_epoch() >= epoch:
                later.append(self.model_file("best").name)
        kept, dropped = {}, 0
        for log, epoch_of in ((self.log, _epoch_of), (self._metrics, lambda line: json.loads(line)["epoch"])):
            lines = log.read_text().splitlines() if log.exists() else []
            kept[log] = [line for line in lines if epoch_of(line) < epoch]
            dropped = max(dropped, len(lines) - len(kept[log]))
        aside = self._move_aside(later) if later or dropped > (1 if keep_files else 0) else None
        for log, lines in kept.items():
            if log.exists():
                if aside:
                    shutil.copy2(log, aside)
                self._write_text(log, "".join(line + "\n" for line in lines))
        return aside

    def best_epoch(self) -> int:
        """The epoch that model_best.pth is of, as far as it and the log are there; else -1."""
        if not (self._metrics.exists() and self.model_file("best").exists()):
            return -1
        records = map(json.loads, self._metrics.read_text().splitlines())
        return max((record["epoch"] for record in records if record.get("best")), default=-1)

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.path)) if self.path.is_dir() else []

    def _move_aside(self, names: list[str]) -> Path:
        """Move the files into a new folder beside them; returns it."""
        number = 1
        while (aside := self.path / f"earlier_{number}").exists():
            number += 1
        aside.mkdir()
        for name in names:
            os.rename(self.path / name, aside / name)
        return aside


def name_of(title: str) -> str:
    """The name by which metrics.jsonl holds what a log's column of this title shows."""
    return title.lower().replace(" ", "_")


def _cell(title: str, value) -> str:
    if title == "Epoch":
        return str(value)
    if value is None:
        return "nan"
    return f"{value:.1f}" if title.endswith("Time") else f"{value:.6f}" if title == "LR" else f"{value:.4f}"


def _epoch_of(line: str) -> float:
    """The epoch of a log's line; headers and notes stand before every epoch, the closing attack after."""
    first = line.split("\t")[0]
    if first.isdecimal():
        return int(first)
    return -1 if first == TITLES[0] or first.startswith("#") else float("inf")


def _training_state(optimizer, precision: Precision, progress: Progress, args) -> dict:
    """The optimizer's state dict with, under "run", how far the run is and with which arguments."""
    return {**optimizer.state_dict(), "run": {**asdict(progress), "precision": precision.state_dict(),
                                              "args": vars(args)}}


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint. Raises UsageError where it is missing, cut short, or no checkpoint."""
    if not path.exists():
        raise UsageError(f"--resume: {path} is missing")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch.load does not look at the checksums
                    raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises errors of many kinds at a file that it cannot read
        raise UsageError(f"--resume: {path} is cut short, altered or no PyTorch checkpoint") from None
    if not isinstance(content, dict):
        raise UsageError(f"--resume: {path} holds no state dict")
    return content


def load_model(model: nn.Module, state: dict, source: str) -> None:
    """Load a state dict, also one whose keys begin `module.` or one under "state_dict", as published files have it."""
    state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise UsageError(f"--resume: {source} holds no state dict of a network")
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    wanted = model.state_dict()
    for key in sorted(wanted.keys() | state.keys()):
        shape = tuple(wanted[key].shape) if key in wanted else "nothing"
        found = tuple(getattr(state[key], "shape", ())) if key in state else "nothing"
        if shape != found:
            raise UsageError(f"--resume: {source} is of another architecture: at {key} it has {found}, where --model, "
                             f"--base-width and --width-factor ask for {shape}")
    try:
        if any(value.is_complex() for value in state.values()):
            raise TypeError
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):
        raise UsageError(f"--resume: {source} holds values that are no real tensors") from None
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise UsageError(f"--resume: {source} holds weights that are not finite")


def load_training_state(optimizer, precision: Precision, state: dict, source: str) -> tuple[Progress, dict]:
    """Load what `_training_state` gave, or a bare optimizer's state dict; returns the progress and the arguments.

    Of the optimizer's, only the momentum is taken, into buffers of the layout that this run computes in, and the last
    learning rate.
    """
    run = state.get("run", {})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        group, = state["param_groups"]
        if list(group["params"]) != list(range(len(parameters))):
            raise ValueError
        for i, parameter in enumerate(parameters):
            momentum = state["state"][i]["momentum_buffer"]
            if momentum.layout != torch.strided or momentum.shape != parameter.shape or \
                    not momentum.is_floating_point() or not momentum.isfinite().all():
                raise ValueError
            optimizer.state[parameter]["momentum_buffer"].copy_(momentum)
        optimizer.param_groups[0]["lr"] = float(group["lr"])
        precision.load_state_dict(run.get("precision", {}))
        args = dict(run.get("args", {}))
        progress = Progress(**{name: run[name] for name in asdict(Progress()) if name in run})
        for tensor, shape in ((progress.sums, (4,)), (progress.first_fault, ())):
            if tensor.shape != shape or not tensor.is_floating_point() or tensor.isnan().any():
                raise ValueError
        for value, kind, low, high in ((progress.epoch, int, 0, math.inf), (progress.step, int, 0, math.inf),
                                       (progress.seconds, float, 0, sys.float_info.max), (progress.best, float, -1, 1)):
            if type(value) is not kind or not low <= value <= high:
                raise ValueError
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError):
        raise UsageError(f"--resume: {source} holds no optimizer state for this network") from None
    return progress, args


def require_same_run(before: dict, args, flag_of: dict[str, str]) -> None:
    """Raise UsageError at the first flag that differs from the run's; `flag_of` maps arguments to their flags."""
    for name, value in vars(args).items():
        if name in before and name not in FREE and before[name] != value:
            raise UsageError(f"--resume: the run in --fname {args.fname} has {flag_of.get(name, name)} {before[name]}, "
                             f"not {value}; repeat its flags, take another --fname, or add --allow-changes")
