"""State of a run and the files in its folder.

    state.pth            newest complete state, from which --resume auto continues
    model_E.pth          state dict of the network after epoch E, counted from 0
    opt_E.pth            state dict of the optimizer after epoch E and, under "run", the rest of the state
    model_best.pth       state dict of the network with the highest score so far: PGD accuracy on the validation
                         images or, without any, on the first --test-samples test images
    model_healthy.pth    state dict of the newest network that was not in collapse
    final.pth            progress of an interrupted final evaluation
    args.json, output.log, metrics.jsonl, final.json    logs, rewritten from the state on every save
    evaluation.json, eval.log    results of evaluate.py and of --eval
    tensorboard/         event files of --tensorboard

Checkpoints contain only tensors and plain values and are loaded with weights_only=True. Every file but
the event files is written atomically. Files of another, earlier run are moved to earlier_N/, never overwritten. A
network that is saved under several names is one file (hard links).
"""
import argparse
import copy
import io
import math
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .console import UsageError
from .device import Precision
from .folder import Folder, atomic_write, link, read_records, write_logs

# Sums over the images of an epoch: loss, correct images, images, mean abs(delta); images whose loss the attack lowered,
# images for which this is known; correct images and images in the first half of the epoch.
SUMS = ("loss", "correct", "images", "perturbation", "abnormal", "compared", "early_correct", "early_images")


class Average:
    """Exponential moving average of a network's parameters and BatchNorm statistics, in `module`.

    Update: module <- decay * module + (1 - decay) * model. The first update copies `model`. Integer buffers are copied
    from `model` in every update.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.decay, self.updates = copy.deepcopy(model), decay, 0
        own, new = ([*each.parameters(), *each.buffers()] for each in (self.module, model))
        self.floats, self.new_floats = ([each for each in part if each.is_floating_point()] for part in (own, new))
        self.integers, self.new_integers = ([each for each in part if not each.is_floating_point()]
                                            for part in (own, new))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average toward the network."""
        torch._foreach_lerp_(self.floats, self.new_floats, 1 - self.decay if self.updates else 1.0)
        if self.integers:
            torch._foreach_copy_(self.integers, self.new_integers)
        self.updates += 1


@dataclass
class State:
    """Everything that changes during a run: network, optimizer and progress.

    Attributes:
        ema: moving average of the network's weights; None without --ema.
        kept: tensors of the training method, by name (see `attacks.Step`).
        epoch, step: the next training step; both count from 0.
        best: highest score of an epoch so far; -1 if there is none.
        seconds: training time of the current epoch.
        sums: this process's sums over the images of the current epoch, in the order of SUMS.
        first_fault: first step of the current epoch with a non-finite loss or gradient; inf if there is none.
        history: one record for each completed epoch.
        starts: one record for each launch of the run.
        final: record of the final evaluation; None before it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    ema: Average | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    best: float = -1.0
    seconds: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(len(SUMS), dtype=torch.float64))
    first_fault: Tensor = field(default_factory=lambda: torch.tensor(math.inf))
    history: list[dict] = field(default_factory=list)
    starts: list[dict] = field(default_factory=list)
    final: dict | None = None

    PLAIN = ("epoch", "step", "best", "seconds", "sums", "first_fault", "history", "starts", "final")

    @property
    def evaluated(self) -> nn.Module:
        """Network to evaluate and save: the moving average if there is one, else the network itself."""
        return self.ema.module if self.ema else self.model

    def begin_epoch(self, epoch: int) -> None:
        """Move to the first step of `epoch`."""
        self.epoch, self.step, self.seconds, self.sums = epoch, 0, 0.0, torch.zeros_like(self.sums)

    def add(self, **values: Tensor) -> None:
        """Add the values of one step, named as in SUMS, to the sums of the epoch."""
        self.sums += torch.stack([values[name] for name in SUMS])

    def training(self, args, sums: Tensor) -> dict:
        """Return the optimizer's state dict and, under "run", the rest of the state; `sums` are over all processes."""
        plain = {name: getattr(self, name) for name in self.PLAIN}
        raw = {"raw": self.model.state_dict(), "averaged": self.ema.updates} if self.ema else {}
        return {**self.optimizer.state_dict(), "run": {
            **plain, **raw, "sums": sums, "kept": self.kept, "precision": self.precision.state_dict(),
            "args": args.flags()}}

    def load_training(self, saved: dict, source: str) -> dict:
        """Load a dict from `training`, or the state dict of an optimizer alone.

        Only the momentum buffers and the last learning rate are loaded into the optimizer; --momentum and
        --weight-decay come from the command line. The buffers are copied into the existing ones, whose memory layout
        stays the same.

        Args:
            saved: the dict.
            source: name of its file, for error messages.

        Returns:
            The flags of the saved run; empty if the file has none.

        Raises:
            UsageError: `saved` does not fit the network, or is of a version that is no longer supported.
        """
        run = saved.get("run", {})
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        try:
            if len(saved["param_groups"]) != 1:
                raise UsageError(f"--resume: {source} has {len(saved['param_groups'])} parameter groups, not one: "
                                 f"it was not written by these scripts")
            for i, parameter in enumerate(parameters if saved["state"] else ()):  # empty before the first step
                momentum = saved["state"][i]["momentum_buffer"]
                if momentum.shape != parameter.shape or not momentum.isfinite().all():
                    raise ValueError
                self.optimizer.state[parameter]["momentum_buffer"].copy_(momentum)
            self.optimizer.param_groups[0]["lr"] = float(saved["param_groups"][0]["lr"])
            self.precision.load_state_dict(run.get("precision", {}))
            if run.get("rate", 1.0) != 1.0:
                raise UsageError(f"--resume: {source} was rolled back by --on-collapse=rollback, which is no longer "
                                 f"supported: finish this run with the version that started it, or start a new run")
            if "args" in run and "history" not in run:
                raise UsageError(f"--resume: {source} is of an older version that is no longer supported: finish this "
                                 f"run with that version, or start a new run")
            for name in self.PLAIN:
                setattr(self, name, run.get(name, getattr(self, name)))
            self.kept = {name: value.to(parameters[0].device) for name, value in run.get("kept", {}).items()}
            if self.ema and "raw" in run:
                self.model.load_state_dict(run["raw"])
                self.ema.updates = int(run["averaged"])
            return dict(run.get("args", {}))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError):
            raise UsageError(f"--resume: {source} contains no optimizer state for this network") from None


def named_sums(sums: Tensor) -> dict[str, float]:
    """Return the sums of an epoch as a dict with the names in SUMS."""
    return dict(zip(SUMS, sums.tolist()))


class Checkpoint(NamedTuple):
    """Content of a checkpoint.

    Attributes:
        model: state dict of the network.
        training: dict from `State.training`; None if only a network was found, which suffices for an evaluation.
        epoch: the next epoch, from the names of the files; None if they do not contain it, as for state.pth.
        source: names of the files, for messages.
    """

    model: dict
    training: dict | None
    epoch: int | None
    source: str

    @property
    def newest(self) -> int | None:
        """Index (from 0) of the epoch during or after which the network was saved; None if unknown."""
        if self.epoch is not None:
            return self.epoch - 1
        run = (self.training or {}).get("run", {})
        return run["epoch"] if run.get("step") else max(run["epoch"] - 1, 0) if "epoch" in run else None


def find_checkpoint(folder: Folder, resume: int | str, evaluation: bool = False) -> Checkpoint | None:
    """Read the checkpoint to resume from.

    Args:
        resume: N > 0 for the checkpoint after N epochs, or "auto" for the newest one that can be read.
        evaluation: accept a network without training state.

    Returns:
        The checkpoint; None if `resume` is "auto" and the folder has no checkpoint.

    Raises:
        UsageError: the checkpoint is missing or cannot be read or, with "auto", a candidate file contains code.
    """
    if resume != "auto":
        return _pair(folder, int(resume) - 1)
    candidates: list[tuple[str, Callable[[], Checkpoint]]] = []
    if (folder.path / "state.pth").exists():
        candidates.append(("state.pth", partial(_state, folder)))
    both = [epoch for epoch in folder.epochs("opt") if folder.file("model", epoch).exists()]
    candidates += [(f"model_{epoch}.pth or opt_{epoch}.pth", partial(_pair, folder, epoch)) for epoch in both]
    if evaluation:
        candidates += [(f"model_{epoch}.pth", partial(_lone, folder, epoch)) for epoch in folder.epochs("model")]
        candidates += [("model_best.pth", partial(_lone, folder, "best"))] if folder.names(r"model_best\.pth") else []
    fault = None
    for files, read in candidates:
        try:
            found = read()
        except UsageError as error:
            if isinstance(error, CodeRefused):
                raise
            fault = fault or (error, files)
            continue
        return found._replace(source=f"{found.source}, because {fault[1]} is damaged") if fault else found
    if fault:
        raise fault[0]
    return None


def _state(folder: Folder) -> Checkpoint:
    saved = read_checkpoint(folder.path / "state.pth")
    if not all(isinstance(saved.get(part), dict) for part in ("model", "opt")):
        raise UsageError(f"--resume: {folder.path / 'state.pth'} contains no training state")
    return Checkpoint(saved["model"], _scored(saved["opt"], folder), None, str(folder.path / "state.pth"))


def _pair(folder: Folder, epoch: int) -> Checkpoint:
    model, optimizer = folder.file("model", epoch), folder.file("opt", epoch)
    network = read_checkpoint(model)
    return Checkpoint(network, _scored(read_checkpoint(optimizer), folder), epoch + 1, f"{model} and {optimizer.name}")


def _lone(folder: Folder, epoch: int | str) -> Checkpoint:
    path = folder.file("model", epoch)
    return Checkpoint(read_checkpoint(path), None, epoch + 1 if isinstance(epoch, int) else None, str(path))


def _scored(training: dict, folder: Folder) -> dict:
    """Return `training` with the best score under run["best"]; -1 if model_best.pth does not exist.

    These scripts store the best score in `training`, the published scripts in model_best.pth.
    """
    run, best = training.get("run", {}), folder.file("model", "best")
    if not best.exists():
        return {**training, "run": {**run, "best": -1.0}}
    try:
        return training if run else {
            **training, "run": {"best": float(read_checkpoint(best).get("test_robust_acc", -1.0))}}
    except (ValueError, TypeError):
        raise UsageError(f"--resume: {best} is damaged: move it away") from None


def resume(state: State, found: Checkpoint, args) -> list[str]:
    """Load the training state of the checkpoint into `state`, whose network is already loaded.

    Returns:
        Notes to print.

    Raises:
        UsageError: the checkpoint does not fit the run.
    """
    before = state.load_training(found.training, found.source) if found.training is not None else {}
    notes = args.keep_defaults(before)
    before = args.completed(before)
    if before.get("data_set", args.data_set) != args.data_set:
        raise UsageError(f"--resume: {found.source} is from a run on {before['data_set']}, not {args.data_set}")
    if found.epoch is not None:
        state.begin_epoch(found.epoch)
        state.final = None
    if before.get("on_collapse") == "rollback":
        notes.append("--on-collapse=rollback is no longer supported: the run continues with --on-collapse="
                     f"{args.on_collapse}")
    if state.epoch > args.epochs:
        raise UsageError(f"--resume: {found.source} is at epoch {state.epoch}, beyond --epochs {args.epochs}")
    if not args.allow_changes:
        for name in args.changed(before, "fixed"):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"--resume: the run in --fname {args.fname} has {flag} {before[name]}, not "
                             f"{getattr(args, name)}: use the same flags, another --fname, or --allow-changes")
    if args.changed(before, "scores"):
        state.best = -1.0
    if args.changed(before, "orders"):
        state.begin_epoch(state.epoch)
    return notes


def remove_unfinished(folder: Folder) -> None:
    """Remove partly written files of a killed run; keep those of a running evaluation or plot."""
    for name in folder.names(r"\.(args|final|metrics|model_\w+|opt_\d+|output|state)\.\w+\.\d+\.part"):
        (folder.path / name).unlink(missing_ok=True)


def move_old_files(folder: Folder, state: State, found: Checkpoint | None) -> tuple[str | None, bool]:
    """Move files that this run would overwrite to earlier_N/.

    Returns:
        The path of earlier_N/, None if no file was moved; and whether the best network was saved after an epoch that
        will be trained again.
    """
    remove_unfinished(folder)
    if found is None:
        return folder.move_to_earlier(folder.names(
            r"(output|eval)\.log|metrics\.jsonl|(args|final|evaluation)\.json|tensorboard|"
            r"(state|final)\.pth|(model|opt)_(\d+|best|healthy)\.pth")), False
    if found.epoch is None:  # the run continues from state.pth
        other_final = state.final is None and (folder.path / "final.json").exists()
        other_best = ["model_best.pth"] if state.best == -1 else []  # its score was computed with other flags
        return folder.move_to_earlier((["final.json", "output.log"] if other_final else []) + other_best), False
    later = [f"{name}_{epoch}.pth" for name in ("model", "opt") for epoch in folder.epochs(name)
             if epoch >= state.epoch]
    later += ["state.pth", "final.json", "final.pth", "model_healthy.pth"]
    try:
        made = [record["epoch"] for record in read_records(folder)]
        best = max((record["epoch"] for record in read_records(folder) if record.get("best")), default=-1)
    except ValueError:  # unreadable log: assume that it covers epochs that will be trained again
        made, best = [state.epoch], state.epoch
    if best >= state.epoch or state.best == -1:
        later.append("model_best.pth")
    if any(epoch >= state.epoch for epoch in made):
        later += ["output.log", "metrics.jsonl"]
    return folder.move_to_earlier(later), best >= state.epoch


def save(path: Path, content: dict) -> None:
    """Write a checkpoint atomically."""
    written = io.BytesIO()  # if the disk is full, torch.save's own error would hide the system's
    torch.save(content, written)
    with atomic_write(path) as file:
        file.write(written.getbuffer())


def save_network(folder: Folder, network: dict, names: list[str | int]) -> None:
    """Write a state dict as model_{name}.pth for every name: one file, and hard links to this file."""
    files = [folder.file("model", name) for name in names]
    for i, file in enumerate(files):
        if i:
            link(files[0], file)
        else:
            save(file, network)


def save_state(folder: Folder, state: State, args, sums: Tensor) -> None:
    """Write the state to state.pth, from which --resume auto continues, and rewrite the logs."""
    save(folder.path / "state.pth", {"model": state.evaluated.state_dict(), "opt": state.training(args, sums)})
    write_logs(folder, state, args)


class CodeRefused(UsageError):
    """Error about a file that could run code when it is loaded."""


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint or a safetensors file. Raises UsageError if it is missing, damaged, or not only tensors and
    plain values."""
    if not path.exists():
        raise UsageError(f"--resume: {path} is missing")
    try:
        if is_safetensors(path):
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch.load does not verify checksums
                    raise ValueError
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds of errors for unreadable files
        raise _refused(path, str(error)) from None
    if not isinstance(content, dict):
        raise UsageError(f"--resume: {path} contains no state dict")
    return content


def is_safetensors(path: Path) -> bool:
    """Return whether the file starts like a safetensors file: 8 bytes of header length, then JSON."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(10)[8:] == b'{"'


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; other files have none. Raises UsageError if it is damaged."""
    if not is_safetensors(path):
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise _refused(path, str(error)) from None


def _refused(path: Path, reason: str) -> UsageError:
    """Return the error about an unreadable file: CodeRefused if the file contains code. reason: text of the cause."""
    beginning = b""
    if path.is_file():
        with open(path, "rb") as file:
            beginning = file.read(200)
    foreign = re.search(r"GLOBAL (\w+(?:\.\w+)*)\s|(?:Unsupported|but got <)class '?([\w.]+)", reason)
    if foreign or beginning[:2] in (b"\x80\x03", b"\x80\x04", b"\x80\x05"):  # pickles, but not torch.save's
        name = (foreign[1] or foreign[2]) if foreign else "a pickle"
        return CodeRefused(f"--resume: {path} contains {name}, which could run code of its own when it is loaded: save "
                           f"only the state dict to a new file, and use that file")
    kind = "truncated, altered or not a PyTorch checkpoint"
    if "TorchScript" in reason:
        kind = "a TorchScript program: save the state dict of torch.jit.load(FILE) to a new file, and use that file"
    elif is_safetensors(path):
        kind = "a safetensors file that was truncated or altered"
    elif beginning.startswith(b"version https://git-lfs"):
        kind = "a pointer of Git LFS, not the file itself: fetch it with git lfs pull"
    elif beginning.lstrip()[:1] == b"<":
        kind = "a web page, not a checkpoint: download the file behind the page's download link"
    return UsageError(f"--resume: {path} is {kind}")


# Classes that a checkpoint may contain besides tensors and plain values: namespaces of flags, paths, and NumPy's arrays
# and numbers, under their names in NumPy 1 and 2 and in all versions of Python.
PLAIN: list = [argparse.Namespace, SimpleNamespace, np.dtype, np.ndarray, *(
    type(np.dtype(kind)) for kind in "?bhilqBHILQefdg"), *(
    (function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for function, name in
    ((np.float64().__reduce__()[0], "scalar"), (np.empty(0).__reduce__()[0], "_reconstruct"))), *(
    (PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local"))]
