"""The state of a run, and the folder that it is saved in.

    state.pth                 the newest complete state, from which --resume auto goes on
    model_E.pth, opt_E.pth    the network's state dict after epoch E; the optimizer's and, under "run", all the rest
    model_best.pth            the state dict of the best network so far
    output.log, metrics.jsonl, final.json, args.json    what a state tells, rendered anew whenever one is saved

Checkpoints hold tensors and plain values alone and are read with weights_only=True. Every file is written whole or not
at all, and what an earlier run left is set aside, never overwritten.
"""
import io
import math
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .console import UsageError
from .device import Precision
from .folder import Folder, read_records, render, whole_file

# What is summed over the images of an epoch: the loss, correct images, images, mean abs(delta); images whose loss the
# attack lowered, images for which that is known; correct images and images in the epoch's first half.
SUMS = ("loss", "correct", "images", "perturbation", "abnormal", "compared", "early_correct", "early_images")


@dataclass
class State:
    """All that a run is at a moment: the network, its optimizer, and how far it has come.

    ema: the average of the network's weights, if one is kept; kept: the method's own, by name; epoch, step: the next
    step; best: the highest score of an epoch so far; seconds: those of this epoch; first_fault: this epoch's first step
    that was not finite; history: a record for each epoch; starts: one for each time that the run was started; final:
    that of the final evaluation.

    sums: this process's sums over the epoch's images, in the order of SUMS.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    ema: AveragedModel | None = None
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
        """The network that is evaluated and saved: the moving average, if there is one."""
        return self.ema.module if self.ema else self.model

    def begin_epoch(self, epoch: int) -> None:
        """Be before the first step of `epoch`."""
        self.epoch, self.step, self.seconds, self.sums = epoch, 0, 0.0, torch.zeros_like(self.sums)

    def add(self, **values: Tensor) -> None:
        """Add a step's values, by their names in SUMS, to the epoch's."""
        self.sums += torch.stack([values[name] for name in SUMS])

    def training(self, args, sums: Tensor) -> dict:
        """The optimizer's state dict and, under "run", the rest; `sums` are those of all processes."""
        plain = {name: getattr(self, name) for name in self.PLAIN}
        raw = {"raw": self.model.state_dict(), "averaged": int(self.ema.n_averaged)} if self.ema else {}
        return {**self.optimizer.state_dict(), "run": {
            **plain, **raw, "sums": sums, "kept": self.kept, "precision": self.precision.state_dict(),
            "args": args.flags()}}

    def load_training(self, saved: dict, source: str) -> dict:
        """Load what `training` gave, or a bare optimizer's state dict; returns the arguments of that run.

        Of the optimizer's, only the momentum is taken, into buffers of the layout that this run computes in, and the
        last learning rate: how it steps is the command line's.
        """
        run = saved.get("run", {})
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        try:
            if len(saved["param_groups"]) != 1:
                raise UsageError(f"--resume: {source} has {len(saved['param_groups'])} parameter groups, where here "
                                 f"all parameters are in one: it was not written by these scripts")
            for i, parameter in enumerate(parameters if saved["state"] else ()):  # it is empty before the first step
                momentum = saved["state"][i]["momentum_buffer"]
                if momentum.shape != parameter.shape or not momentum.isfinite().all():
                    raise ValueError
                self.optimizer.state[parameter]["momentum_buffer"].copy_(momentum)
            self.optimizer.param_groups[0]["lr"] = float(saved["param_groups"][0]["lr"])
            self.precision.load_state_dict(run.get("precision", {}))
            if run.get("rate", 1.0) != 1.0:
                raise UsageError(f"--resume: {source} was rolled back by --on-collapse=rollback, which is no longer "
                                 f"supported: finish this run with the version that began it, or train anew")
            if "args" in run and "history" not in run:
                raise UsageError(f"--resume: {source} is of an older version, which these scripts no longer read")
            for name in self.PLAIN:
                setattr(self, name, run.get(name, getattr(self, name)))
            self.kept = {name: value.to(parameters[0].device) for name, value in run.get("kept", {}).items()}
            if self.ema and "raw" in run:
                self.model.load_state_dict(run["raw"])
                self.ema.n_averaged.fill_(run["averaged"])
            return dict(run.get("args", {}))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError):
            raise UsageError(f"--resume: {source} holds no optimizer state for this network") from None


def named(sums: Tensor) -> dict[str, float]:
    """The sums of an epoch by name."""
    return dict(zip(SUMS, sums.tolist()))


class Found(NamedTuple):
    """A checkpoint: the network's state dict, what `State.training` gave (an evaluation does without), the next epoch
    as the files' names tell it (None for state.pth), and what to call it."""

    model: dict
    training: dict | None
    epoch: int | None
    source: str

    @property
    def newest(self) -> int | None:
        """The epoch, counted from 0, that the network was saved in or after; None if it is not known."""
        if self.epoch is not None:
            return self.epoch - 1
        run = (self.training or {}).get("run", {})
        return run["epoch"] if run.get("step") else max(run["epoch"] - 1, 0) if "epoch" in run else None


def find(folder: Folder, resume: int | str, evaluation: bool = False) -> Found | None:
    """The checkpoint that `resume` (an epoch above 0, or "auto") asks for; None where auto finds no run.

    Raises UsageError where it is missing or cannot be read. An evaluation is content with a network alone.
    """
    if resume != "auto":
        return _pair(folder, int(resume) - 1, evaluation)
    candidates: list[tuple[str, Callable[[], Found]]] = []
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
            fault = fault or (error, files)
            continue
        return found._replace(source=f"{found.source}, as {fault[1]} is damaged") if fault else found
    if fault:
        raise fault[0]
    return None


def _state(folder: Folder) -> Found:
    saved = read_checkpoint(folder.path / "state.pth")
    if not all(isinstance(saved.get(part), dict) for part in ("model", "opt")):
        raise UsageError(f"--resume: {folder.path / 'state.pth'} holds no training state")
    return Found(saved["model"], _scored(saved["opt"], folder), None, str(folder.path / "state.pth"))


def _pair(folder: Folder, epoch: int, evaluation: bool = False) -> Found:
    model, optimizer = folder.file("model", epoch), folder.file("opt", epoch)
    if evaluation and not optimizer.exists():  # where it is, it tells of which data set the run was
        return _lone(folder, epoch)
    network = read_checkpoint(model)
    return Found(network, _scored(read_checkpoint(optimizer), folder), epoch + 1, f"{model} and {optimizer.name}")


def _lone(folder: Folder, epoch: int | str) -> Found:
    path = folder.file("model", epoch)
    return Found(read_checkpoint(path), None, epoch + 1 if isinstance(epoch, int) else None, str(path))


def _scored(training: dict, folder: Folder) -> dict:
    """What `State.training` gave. The published scripts keep the best score in the best model's file; without that
    file, there is no best score."""
    run, best = training.get("run", {}), folder.file("model", "best")
    if not best.exists():
        return {**training, "run": {**run, "best": -1.0}}
    try:
        return training if run else {
            **training, "run": {"best": float(read_checkpoint(best).get("test_robust_acc", -1.0))}}
    except (ValueError, TypeError):
        raise UsageError(f"--resume: {best} is damaged: move it away") from None


def resume(state: State, found: Found, args) -> list[str]:
    """Load the checkpoint into `state`, whose network is loaded already. Returns notes to print. Raises UsageError if
    the checkpoint does not fit the run."""
    notes: list[str] = []
    before = state.load_training(found.training, found.source) if found.training is not None else {}
    if before.get("data_set", args.data_set) != args.data_set:
        raise UsageError(f"--resume: {found.source} is of a run on {before['data_set']}, not {args.data_set}")
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
                             f"{getattr(args, name)}; repeat its flags, take another --fname, or add --allow-changes")
    if args.changed(before, "scores"):
        state.best = -1.0
    if args.changed(before, "orders"):
        state.begin_epoch(state.epoch)
    return notes


def remove_unfinished(folder: Folder) -> None:
    """Remove files that a killed run had begun to write, and none of an evaluation or a plot under way."""
    for name in folder.names(r"\.(args|final|metrics|model_\w+|opt_\d+|output|state)\.\w+\.\d+\.part"):
        (folder.path / name).unlink(missing_ok=True)


def make_ready(folder: Folder, state: State, found: Found | None) -> tuple[str | None, bool]:
    """Set aside what is of no run, or of epochs that are about to be made again.

    Returns where that is now, if there was anything, and whether the best model is gone.
    """
    remove_unfinished(folder)
    if found is None:
        return folder.set_aside(folder.names(
            r"(output|eval)\.log|metrics\.jsonl|(args|final|evaluation)\.json|tensorboard|"
            r"(state|final)\.pth|(model|opt)_(\d+|best|healthy)\.pth")), False
    if found.epoch is None:  # the run goes on from its newest state
        other_final = state.final is None and (folder.path / "final.json").exists()
        other_best = ["model_best.pth"] if state.best == -1 else []  # by other measure, if there is one
        return folder.set_aside((["final.json", "output.log"] if other_final else []) + other_best), False
    later = [f"{name}_{epoch}.pth" for name in ("model", "opt") for epoch in folder.epochs(name)
             if epoch >= state.epoch]
    later += ["state.pth", "final.json", "final.pth", "model_healthy.pth"]
    try:
        made = [record["epoch"] for record in read_records(folder)]
        best = max((record["epoch"] for record in read_records(folder) if record.get("best")), default=-1)
    except (ValueError, KeyError, TypeError):  # a log that cannot be read: what it was of is not known
        made, best = [state.epoch], state.epoch
    if best >= state.epoch or state.best == -1:
        later.append("model_best.pth")
    if any(epoch >= state.epoch for epoch in made):
        later += ["output.log", "metrics.jsonl"]
    return folder.set_aside(later), best >= state.epoch


def save(path: Path, content: dict) -> None:
    """Write a checkpoint."""
    written = io.BytesIO()  # at a full disk, torch.save's own error would hide the system's
    torch.save(content, written)
    with whole_file(path) as file:
        file.write(written.getbuffer())


def save_state(folder: Folder, state: State, args, sums: Tensor) -> None:
    """Save all that --resume auto needs, and render what there is to be read of it."""
    save(folder.path / "state.pth", {"model": state.evaluated.state_dict(), "opt": state.training(args, sums)})
    render(folder, state, args)


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint. Raises UsageError where it is missing, cut short, or not to be trusted."""
    if not path.exists():
        raise UsageError(f"--resume: {path} is missing")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch.load does not look at the checksums
                    raise ValueError
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_SCALARS):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of many kinds at a file that it cannot read
        foreign = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)|GLOBAL (\S+) was not an allowed", str(error))
        if foreign:
            raise UsageError(f"--resume: {path} holds {foreign[1] or foreign[2]}, which is no plain value and could "
                             f"run code of its own: save the state dict alone, and take that") from None
        raise UsageError(f"--resume: {path} is cut short, altered or no PyTorch checkpoint") from None
    if not isinstance(content, dict):
        raise UsageError(f"--resume: {path} holds no state dict")
    return content


# A numpy.float64, as the published scripts write it, by its names under NumPy 1 and 2.
NUMPY_SCALARS: list = [np.dtype, type(np.dtype("float64")), *(
    (np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]
