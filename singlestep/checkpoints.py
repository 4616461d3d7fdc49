"""A network from any file: a run's folder, a state dict of ours, or a published one."""
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
from .run.state import find, read_checkpoint


class Opened(NamedTuple):
    """A network in eval mode.

    args, dataset: those of its run; source: the file that it was read from; folder: that file's folder; run: the run's
    own flags; notes: lines to print; epoch: the epoch, counted from 0, in or after which the network was saved.
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
    """The network in a run's folder, or in a model's file, ours or published, with the arguments of its run.

    A run's args.json, in the folder or beside the file, tells of model and data set, and `flags` (data_set, model,
    base_width, mean, ...) do where there is none; a flag that is not None wins. `which` is last, best or healthy.
    """
    path = Path(path)
    folder = Folder(path if path.is_dir() else path.parent)
    (run, recorded), given = options.recorded(folder.path), {k: v for k, v in flags.items() if v is not None}
    named = given.pop("data_set", None) or run.get("data_set")
    if named is None:
        raise UsageError(f"{path}: no args.json tells which data set it is of: add --data-set")
    if isinstance(named, options.DataSet):
        dataset = named
    else:
        dataset = recorded if recorded and recorded.name == named else options.data_set(named)
    if dataset.source == options.OWN:
        raise UsageError(f"{path}: the run trained a network of yours: load its state dict into that network")
    args = options.arguments(dataset, {})
    given["data_set"] = dataset.name
    for name, value in {**run, **given}.items():
        if name in args.flags():
            setattr(args, name, value)
    try:
        if path.is_dir() and which == "last":
            found = find(folder, "auto", evaluation=True)
            if found is None:
                raise UsageError(f"{path} holds no model: it has neither state.pth nor a model_E.pth")
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
    """A network in eval mode, images in [0, 1] to logits, and the arguments of its run; see `open_run`.

        model, args = load_run("runs/x")
        model, args = load_run("published.pt", data_set="cifar10", model="WideResNet")
    """
    opened = open_run(path, which, **flags)
    for note in opened.notes:
        say(f"# {opened.source}: {note}")
    return opened.model, opened.args


WRAPPERS = ("state_dict", "net", "model", "model_state_dict", "last", "best")
CONSTANT = re.compile(r"(^|\.)(?:(mu|mean|new_mean)|(sigma|std|new_std))$")


def load_network(model: nn.Module, content: dict, source: str, normalize: bool = True) -> list[str]:
    """Load a state dict, bare or as others wrap it: under a key of its own, every name behind `module.` or the like.

    Normalization constants in the file become the network's, unless `normalize` is False. A PreActResNet loses the
    final BatchNorm and ReLU where the file has none. Entries that belong to no layer of the network are left out.
    Returns what there is to say of all this. Raises UsageError where the rest does not fit.
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
            raise UsageError(f"--resume: {source} is of another architecture: at {key} it has {found}, where --model, "
                             f"--base-width and --width-factor ask for {shape}")
    try:
        model.load_state_dict({**wanted, **state})
    except (RuntimeError, TypeError, AttributeError):
        raise UsageError(f"--resume: {source} holds values that are no real tensors") from None
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise UsageError(f"--resume: {source} holds weights that are not finite")
    if isinstance(model, PreActResNet) and model.bn is None:
        notes.append("without BatchNorm and ReLU before the last layer, as in the file")
    if any(value.dtype is torch.float16 for value in state.values()):
        notes.append("weights in float16, computed with in float32")
    if unused:
        notes.append(f"unused in the file: {', '.join(sorted({key.partition('.')[0] for key in unused}))} "
                     f"({len(unused)} entries)")
    return notes + _normalized(model, constants, source, normalize)


def _unwrapped(content: dict) -> dict[str, Tensor]:
    while key := next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None):
        content = content[key]
    return {str(key): value for key, value in content.items()}


def _normalized(model: nn.Module, constants: dict[str, Tensor], source: str, wanted: bool) -> list[str]:
    """Have the network subtract and divide by the file's constants, where it has three of each."""
    found: dict[str, Tensor] = {}
    for key, value in constants.items():
        kind = CONSTANT.search(key)
        if kind and isinstance(value, Tensor) and value.numel() == 3:
            found.setdefault("mean" if kind[2] else "std", value.float().view(1, 3, 1, 1))
    if not found:
        return []
    said = ", ".join(f"{name} {','.join(f'{number:.4g}' for number in value.flatten().tolist())}"
                     for name, value in found.items())
    if not wanted:
        return [f"the file's normalization ({said}) gives way to the flags'"]
    if not all(value.isfinite().all() for value in found.values()) or not (found.get("std", torch.ones(1)) > 0).all():
        raise UsageError(f"--resume: {source} has normalization constants that make no sense: {said}")
    for name, value in found.items():
        model.get_buffer(f"normalize.{name}").copy_(value)
    return [f"normalized as in the file: {said}"]


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that tell networks of different weights or normalization apart."""
    digest = hashlib.sha256()
    for name, value in (*model.state_dict().items(), *model.named_buffers()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()[:16]
