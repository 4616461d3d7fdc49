"""Load networks from run folders and from checkpoint files, of these scripts or published ones."""
import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import options
from .networks import PreActResNet, new_network
from .run.console import UsageError, say
from .run.folder import Folder
from .run.state import find_checkpoint, read_checkpoint


class Opened(NamedTuple):
    """A loaded network.

    Attributes:
        model: the network, in eval mode.
        args, dataset: arguments and data set of its run.
        source: file or files that it was read from.
        folder: folder of `source`.
        run: flags recorded in args.json; empty without args.json.
        notes: lines to print.
        epoch: epoch, counted from 0, in or after which the network was saved; None if unknown.
    """

    model: nn.Module
    args: Any
    dataset: options.DataSet
    source: str
    folder: Folder
    run: dict[str, Any]
    notes: list[str]
    epoch: int | None = None


def open_run(path: str | Path, which: str = "last", **flags: Any) -> Opened:
    """Load the network in a run folder or in a checkpoint file, with the arguments of its run.

    The arguments are those in args.json, in the folder or in that of the file. Without args.json, give `flags`.

    Args:
        path: folder of a run, or checkpoint file of these scripts or a published one.
        which: "last", "best" or "healthy".
        flags: data_set, model, base_width, mean, ...; a flag that is not None overrides args.json.

    Raises:
        UsageError: there is no such network, it does not fit the flags, or its data set is unknown.
    """
    path = Path(path)
    folder = Folder(path if path.is_dir() else path.parent)
    (run, recorded), given = options.recorded(folder.path), {k: v for k, v in flags.items() if v is not None}
    named = given.pop("data_set", None) or run.get("data_set")
    if named is None:
        raise UsageError(f"{path} has no args.json that names its data set: add --data-set")
    if isinstance(named, options.DataSet):
        dataset = named
    else:
        dataset = recorded if recorded and recorded.name == named else options.data_set(named)
    if dataset.source == options.OWN:
        raise UsageError(f"{path}: the run trained a network of yours: load its state dict into that network")
    args = options.arguments(dataset, {})
    given["data_set"] = dataset.name
    for name, value in {**run, **given}.items():
        if name in options.FLAGS and name != "on_collapse":  # older runs have another choice of it
            options.require_valid(name, value)
        if name in args.flags():
            setattr(args, name, value)
    try:
        if path.is_dir() and which == "last":
            found = find_checkpoint(folder, "auto", evaluation=True)
            if found is None:
                raise UsageError(f"{path} contains no model: neither state.pth nor model_E.pth")
            content, source, epoch = found.model, found.source, found.newest
        else:
            file = folder.file("model", which) if path.is_dir() else path
            number = re.fullmatch(r"model_(\d+)\.pth", file.name)
            content, source, epoch = read_checkpoint(file), str(file), int(number[1]) if number else None
        model = new_network(dataset, args)
        notes = load_network(model, content.get(which, content), source, "mean" not in given and "std" not in given)
    except UsageError as error:
        raise UsageError(str(error).removeprefix("--resume: ")) from None
    return Opened(model.eval(), args, dataset, source, folder, run, options.differing(given, run) + notes, epoch)


def load_run(path: str | Path, which: str = "last", **flags: Any) -> tuple[nn.Module, Any]:
    """Load a network, and print notes about it. The arguments are those of `open_run`.

        model, args = load_run("runs/x")
        model, args = load_run("published.pt", data_set="cifar10", model="WideResNet")

    Returns:
        The network, in eval mode, from images in [0, 1] to logits; and the arguments of its run.
    """
    opened = open_run(path, which, **flags)
    for note in opened.notes:
        say(f"# {opened.source}: {note}")
    return opened.model, opened.args


WRAPPERS = ("state_dict", "net", "model", "model_state_dict", "last", "best")
CONSTANT = re.compile(r"(^|\.)(?:(mu|mean|new_mean)|(sigma|std|new_std))$")


def load_network(model: nn.Module, content: dict, source: str, normalize: bool = True) -> list[str]:
    """Load a state dict of these scripts or of published code into `model`.

    The state dict may be nested under a key of WRAPPERS, and its names may share a prefix such as `module.`. A
    PreActResNet loses its final BatchNorm and ReLU if the state dict has none. Entries of layers that the network does
    not have are ignored.

    Args:
        content: the state dict, or the content of its file.
        source: name of the file, for error messages.
        normalize: use the normalization constants in the file, if there are any.

    Returns:
        Notes to print.

    Raises:
        UsageError: the state dict does not fit the network.
    """
    notes, state = [], _unwrapped(content)
    if isinstance(model, PreActResNet) and not any(re.search(r"(^|\.)bn\.weight$", key) for key in state):
        model.bn = None
    wanted = model.state_dict()
    first = next(iter(wanted))
    prefixes = [key.removesuffix(first) for key in state if key.endswith(first)]
    prefix = max(prefixes, key=lambda prefix: sum(prefix + key in state for key in wanted), default="")
    constants = {key: value for key, value in state.items() if CONSTANT.search(key)}
    state = {key.removeprefix(prefix): value for key, value in state.items() if key not in constants}
    layers = {key.partition(".")[0] for key in wanted}
    unused = {key for key in state if key.partition(".")[0] not in layers}
    state = {key: value for key, value in state.items() if key not in unused}
    for key in sorted(wanted.keys() | state.keys()):
        shape = tuple(wanted[key].shape) if key in wanted else "nothing"
        found = tuple(getattr(state[key], "shape", ())) if key in state else "nothing"
        if shape != found and not (found == "nothing" and key.endswith("num_batches_tracked")):
            raise UsageError(f"--resume: {source} is of another architecture: at {key} it has {found}, but --model, "
                             f"--base-width and --width-factor require {shape}")
    try:
        model.load_state_dict({**wanted, **state})
    except (RuntimeError, TypeError, AttributeError):
        raise UsageError(f"--resume: {source} contains values that are not real tensors") from None
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise UsageError(f"--resume: {source} contains non-finite weights")
    if isinstance(model, PreActResNet) and model.bn is None:
        notes.append("without BatchNorm and ReLU before the last layer, as in the file")
    if any(value.dtype is torch.float16 for value in state.values()):
        notes.append("weights in float16, converted to float32")
    if unused:
        notes.append(f"unused in the file: {', '.join(sorted({key.partition('.')[0] for key in unused}))} "
                     f"({len(unused)} entries)")
    return notes + _normalized(model, constants, source, normalize)


def _unwrapped(content: dict) -> dict[str, Tensor]:
    while key := next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None):
        content = content[key]
    return {str(key): value for key, value in content.items()}


def _normalized(model: nn.Module, constants: dict[str, Tensor], source: str, wanted: bool) -> list[str]:
    """Set the network's mean and std to those constants of the file that have three values. Returns notes to print."""
    own: dict[str, Tensor] = {}
    for key, value in constants.items():
        kind = CONSTANT.search(key)
        if kind and isinstance(value, Tensor) and value.numel() == 3:
            own.setdefault("mean" if kind[2] else "std", value.float().view(1, 3, 1, 1))
    if not own:
        return []
    shown = ", ".join(f"{name} {','.join(f'{number:.4g}' for number in value.flatten().tolist())}"
                      for name, value in own.items())
    if not wanted:
        return [f"the file's normalization ({shown}) is overridden by --mean and --std"]
    if not all(value.isfinite().all() for value in own.values()) or not (own.get("std", torch.ones(1)) > 0).all():
        raise UsageError(f"--resume: {source} has invalid normalization constants: {shown}")
    for name, value in own.items():
        model.get_buffer(f"normalize.{name}").copy_(value)
    return [f"normalized as in the file: {shown}"]


def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that identify the weights and the normalization of a network."""
    digest = hashlib.sha256()
    for name, value in (*model.state_dict().items(), *model.named_buffers()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()[:16]
