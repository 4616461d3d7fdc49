"""Load networks from run folders, and from checkpoint files of these scripts or of third parties."""
import hashlib
import importlib
import inspect
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import options
from .methods import MODELS
from .networks import Normalize, PreActResNet, new_network
from .run.console import UsageError, say
from .run.folder import Folder
from .run.state import Checkpoint, find_checkpoint, read_checkpoint, read_metadata


class Opened(NamedTuple):
    """A loaded network.

    Attributes:
        model: the network, in eval mode.
        args, dataset: arguments and data set of the network's run.
        source: file or files from which the network was read.
        folder: folder of `source`.
        run: flags that the run recorded in args.json, corrected by its newest checkpoint, or in the metadata of an
            exported file; empty if there is neither.
        notes: lines to print.
        epoch: index (from 0) of the epoch during or after which the network was saved; None if unknown.
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

    The arguments are those that the run recorded: in the metadata of an exported file, else in args.json of the folder
    (for a file: of its parent folder). For a folder with args.json, the network's flags, the data set, epsilon and norm
    in its newest checkpoint take precedence. `flags` override all of them.

    Args:
        path: folder of a run, exported file, checkpoint of these scripts, or third-party checkpoint.
        which: "last", "best" (highest score) or "healthy" (newest that is not in collapse); for a file with
            several networks, the network's key.
        flags: data_set, model, base_width, mean, ...; None: as recorded, else the default.

    Raises:
        UsageError: the network does not exist or does not fit the flags, or the data set is unknown.
    """
    path = Path(path)
    if not path.exists():
        raise options.absent(path)
    folder = Folder(path if path.is_dir() else path.parent)
    if path.is_dir() and which not in NETWORKS:
        raise UsageError(f"--which must be {', '.join(NETWORKS)} for the folder of a run, not {which}")
    if path.is_dir() and not folder.names(r"args\.json|state\.pth|model_\w+\.pth"):
        raise UsageError(f"{path} is not the folder of a run: it has neither args.json nor a checkpoint")
    (run, recorded), given = recorded_flags(path, folder), {k: v for k, v in flags.items() if v is not None}
    named = given.pop("data_set", None)
    given = {name: options.valid(name, value) for name, value in given.items()}
    try:
        found = _newest(folder, which) if path.is_dir() else None
        run, notes = _as_saved(run, found)
        named = named or run.get("data_set")
        if named is None:
            raise UsageError(f"{path} has no args.json with a data set: add --data-set")
        if isinstance(named, options.DataSet):
            dataset = named
        else:
            dataset = recorded if recorded and recorded.name == named else options.data_set(named)
        if dataset.source == options.OWN:
            raise UsageError(f"{path}: the run trained a network of your own: load the state dict into it, or "
                             f"evaluate the file with evaluate.py --network=MODULE:FUNCTION --weights=FILE")
        args = options.arguments(dataset, {})
        given["data_set"] = dataset.name
        for name, value in {**run, **given}.items():
            if name in args.flags():
                setattr(args, name, value)
        if path.is_dir() and which == "last":
            if found is None:
                raise UsageError(f"{path} contains no model: neither state.pth nor model_E.pth")
            content, source, epoch = found.model, found.source, found.newest
        else:
            file = folder.file("model", which) if path.is_dir() else path
            number = re.fullmatch(r"model_(\d+)\.pth", file.name)
            content, source, epoch = read_checkpoint(file), str(file), int(number[1]) if number else None
        options.check_network(args)
        model = new_network(dataset, args)
        notes += load_network(model, content, source, not given.keys() & CONSTANTS.keys(),
                              "last" if path.is_dir() else which)
    except UsageError as error:
        raise UsageError(str(error).removeprefix("--resume: ")) from None
    notes += [] if run else assumptions(model, dataset, args)
    return Opened(model.eval(), args, dataset, source, folder, run, options.differing(given, run) + notes, epoch)


def open_network(source: str, weights: str | None, which: str = "last", **flags: Any) -> Opened:
    """Build the user's network, and load its weights.

    Args:
        source: package.module:function. The function is called with num_classes, if it has this parameter, and
            returns the network, which maps images in [0, 1] (with the flags mean and std: normalized images) to logits.
        weights: file of a state dict; None: the function's weights.
        which: the network's key in a file with several networks.
        flags: as in `open_run`; data_set is required.

    Raises:
        UsageError: the function or the file does not exist, or the weights do not fit the network.
    """
    given = {name: options.valid(name, value) for name, value in flags.items()
             if value is not None and name != "data_set"}
    if flags.get("data_set") is None:
        raise UsageError("--network needs --data-set: the images to evaluate it on")
    idle = [options.option(name) for name in options.NETWORK if name in given and name not in CONSTANTS]
    if idle:
        raise UsageError(f"{idle[0]} is for the networks of --model, not for --network")
    dataset = options.data_set(flags["data_set"])
    args = options.arguments(dataset, {})
    for name, value in {**given, "model": source}.items():
        setattr(args, name, value)
    module, _, name = source.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        if isinstance(function, nn.Module):
            raise UsageError(f"--network {source} is a network ({type(function).__name__}), not a function that "
                             f"returns one: define such a function in {module}")
        takes = inspect.signature(function).parameters.values()
        sized = any(each.name == "num_classes" or each.kind is each.VAR_KEYWORD for each in takes)
        model = function(num_classes=dataset.classes) if sized else function()
    except UsageError:
        raise
    except Exception as error:  # the user's code may raise any exception
        raise UsageError(f"--network {source}: {type(error).__name__}: {error}") from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"--network {source} must return a torch.nn.Module, not {type(model).__name__}")
    notes = []
    if weights is not None:
        try:
            notes = load_network(model, read_checkpoint(Path(weights)), weights, which=which)
        except UsageError as error:
            raise UsageError(str(error).removeprefix("--resume: ").replace(SHAPED_BY, "the network requires")) from None
    if args.mean or args.std:
        normalize = Normalize(args.mean or (0.0, 0.0, 0.0), args.std or (1.0, 1.0, 1.0))
        model = nn.Sequential(OrderedDict(normalize=normalize, network=model))
    else:
        notes.append("no normalization: the network's input is images in [0, 1]; to normalize them: --mean and --std")
    return Opened(model.eval(), args, dataset, f"{source}, {weights}" if weights else source,
                  Folder(Path(weights).parent if weights else None), {}, notes)


EXPORTED = "singlestep"  # key of the metadata of an exported file, JSON; see `export.facts`


def recorded_flags(path: Path, folder: Folder) -> tuple[dict[str, Any], options.DataSet | None]:
    """Return the recorded flags ({} if none) and data set (None if none) of the network's run."""
    text = read_metadata(path).get(EXPORTED)
    if text is None:
        return options.recorded(folder.path)
    return options.described(text, path, UsageError(f"the metadata of {path} is damaged: export the network again"))


def _newest(folder: Folder, which: str) -> Checkpoint | None:
    """Return the newest checkpoint of a run.

    If the checkpoint cannot be read, raise UsageError for which="last", and return None for another network.
    """
    try:
        return find_checkpoint(folder, "auto", evaluation=True)
    except UsageError:
        if which == "last":
            raise
        return None


def _as_saved(run: dict[str, Any], found: Checkpoint | None) -> tuple[dict[str, Any], list[str]]:
    """Replace the network's flags from args.json by those in the checkpoint. Returns the flags, and notes to print."""
    if not run or found is None or found.training is None:
        return run, []
    saved = options.recorded_flags(found.training["run"].get("args", {}), found.source)
    names = [name for name in ("data_set", "dummy", "epsilon", "norm", *options.NETWORK)
             if name in saved and run.get(name) != saved[name]]
    notes = [f"{options.option(name)} is {saved[name]}, from the checkpoint; args.json says {run.get(name)}"
             for name in names]
    return {**run, **{name: saved[name] for name in names}}, notes


def assumptions(model: nn.Module, dataset: options.DataSet, args: options.Args) -> list[str]:
    """Return notes that state the assumed normalization and architecture of a file without args.json."""
    constants = {name: model.get_buffer(f"normalize.{name}") for name in CONSTANTS}
    usual = all(value.flatten().equal(torch.tensor(getattr(dataset, name))) for name, value in constants.items())
    whose = f" ({dataset.name}'s)" if usual else ""
    network = options.as_flags({name: getattr(args, name) for name in ("model", *MODELS[args.model].values())})
    return [f"normalized with {_shown(constants)}{whose}; to change the normalization: --mean and --std",
            f"assumed: {network}, with ReLU. Other blocks or activations can have the same keys and shapes, so this "
            f"cannot be verified: compare the clean accuracy with the published one"]


def load_run(path: str | Path, which: str = "last", **flags: Any) -> tuple[nn.Module, Any]:
    """Load a network and print notes about it. Takes the arguments of `open_run`.

        model, args = load_run("runs/x")
        model, args = load_run("published.pt", data_set="cifar10", model="WideResNet")

    Returns:
        The network, in eval mode, which maps images in [0, 1] to logits; and the arguments of its run.
    """
    opened = open_run(path, which, **flags)
    for note in opened.notes:
        say(f"# {opened.source}: {note}")
    return opened.model, opened.args


NETWORKS = ("last", "best", "healthy")  # values of --which for a run
# Keys of normalization constants in checkpoints.
CONSTANTS = {"mean": re.compile(r"(^|\.)(mu|mean|new_mean)$"), "std": re.compile(r"(^|\.)(sigma|std|new_std)$")}

# Subject of an error message about an entry's shape.
SHAPED_BY = "--model, --base-width, --depth and --width-factor require"


class Candidate(NamedTuple):
    """A part of a file's content that may be the network's state dict.

    Attributes:
        name: keys in the file, and the prefix that the names of the entries share: "state_dict.module".
        state: entries of the network's layers, without the prefix.
        unused: for each other entry, the first part of its name.
        constants: normalization constants in the same dict and in those around it.
    """

    name: str
    state: dict[str, Any]
    unused: list[str]
    constants: dict[str, Tensor]


def load_network(model: nn.Module, content: dict, source: str, normalize: bool = True,
                 which: str = "last") -> list[str]:
    """Load a state dict of these scripts or of third-party code into `model`.

    The state dict may be nested under any keys, and its keys may share a prefix such as `module.`. If the state dict of
    a PreActResNet has no final BatchNorm, the network's final BatchNorm and ReLU are removed. Entries of layers that
    the network does not have are ignored, but a final BatchNorm that --no-final-norm leaves out is an error.

    Args:
        content: the state dict, or the content of its file.
        source: name of the file, for error messages.
        normalize: use the normalization constants in the file, if there are any.
        which: the network's key in a file with several networks; for "last", the first network if none has this key.

    Returns:
        Notes to print.

    Raises:
        UsageError: the state dict does not fit the network.
    """
    chosen, others = _choose(content, model.state_dict(), source, which)
    state, notes = chosen.state, []
    if others:
        notes.append(f"network {chosen.name} of the file; for the others: "
                     f"{' or '.join(f'--which={name}' for name in others)}")
    elif chosen.name.partition(".")[0] in content:
        notes.append(f"network {chosen.name} of the file")
    if isinstance(model, PreActResNet) and model.bn is None and "bn" in chosen.unused:
        raise UsageError(f"--resume: {source} has BatchNorm before the last layer: leave --no-final-norm out")
    if isinstance(model, PreActResNet) and model.bn is not None and "bn.weight" not in state:
        model.bn = None
        notes.append("without BatchNorm and ReLU before the last layer, as in the file")
    missing = [name for name in model.state_dict().keys() - state.keys() if not name.endswith("num_batches_tracked")]
    if missing:  # only PreActResNets may lack their final BatchNorm
        raise UsageError(f"--resume: {source} is of another architecture: {min(missing)} is missing")
    try:
        model.load_state_dict({**model.state_dict(), **state})
    except (RuntimeError, TypeError, AttributeError):
        raise UsageError(f"--resume: {source} contains entries that are not real-valued tensors") from None
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise UsageError(f"--resume: {source} contains non-finite weights")
    if any(value.dtype is torch.float16 for value in state.values()):
        notes.append("weights in float16, converted to float32")
    if chosen.unused:
        notes.append(f"unused in the file: {', '.join(sorted(set(chosen.unused)))} ({len(chosen.unused)} entries)")
    return notes + _normalized(model, chosen.constants, source, normalize)


def _choose(content: dict, wanted: dict[str, Tensor], source: str, which: str) -> tuple[Candidate, list[str]]:
    """Return the candidate that fits the network, and the names of other fitting candidates. `which` selects one."""
    candidates = list(_candidates(content, wanted))
    fitting = [each for each in candidates if not _faults(each.state, wanted)]
    if not fitting:
        nearest = max(candidates, key=lambda each: (len(each.state.keys() & wanted), -len(_faults(each.state, wanted))))
        raise UsageError(f"--resume: {source} is of another architecture: {_faults(nearest.state, wanted)[0]}")
    named = [each for each in fitting if f"{each.name}.".startswith(f"{which}.")]
    if which != "last" and not named:
        names = ", ".join(each.name for each in fitting if each.name)
        raise UsageError(f"--which: {source} has no network {which}; "
                         f"{f'its networks: {names}' if names else 'leave --which out'}")
    chosen = (named or fitting)[0]
    return chosen, [each.name for each in fitting if each is not chosen]


def _candidates(content: dict, wanted: dict[str, Tensor], path: tuple[str, ...] = (),
                around: dict[str, Tensor] | None = None) -> Iterator[Candidate]:
    """Yield candidate state dicts from `content` and its nested dicts."""
    entries = {str(key): value for key, value in content.items()}
    constants = {**(around or {}), **{
        key: value for key, value in entries.items() if isinstance(value, Tensor)
        and any(pattern.search(key) for pattern in CONSTANTS.values())}}
    first, layers = next(iter(wanted)), {key.partition(".")[0] for key in wanted}
    for prefix in {"": None, **{key.removesuffix(first): None for key in entries if key.endswith(first)}}:
        state, unused = {}, []
        for key, value in entries.items():
            layer = key.removeprefix(prefix).partition(".")[0]
            if key.startswith(prefix) and layer in layers:
                state[key.removeprefix(prefix)] = value
            elif key not in constants:
                unused.append(layer)
        yield Candidate(".".join((*path, prefix)).strip("."), state, unused, constants)
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _candidates(value, wanted, (*path, key), constants)


def _faults(state: dict[str, Any], wanted: dict[str, Tensor]) -> list[str]:
    """Return messages about entries that do not fit the network. A missing final BatchNorm, `bn`, is accepted."""
    faults = []
    for key in sorted(wanted.keys() | state.keys()):
        shape = tuple(wanted[key].shape) if key in wanted else None
        found = tuple(getattr(state[key], "shape", ())) if key in state else None
        optional = key.endswith("num_batches_tracked") or ("bn.weight" not in state and key.startswith("bn."))
        if shape != found and not (found is None and optional):
            has = "is missing" if found is None else f"has shape {found}"
            faults.append(f"{key} {has}, but {SHAPED_BY} {'no such entry' if shape is None else shape}")
    return faults


def _shown(constants: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {','.join(f'{number:.4g}' for number in value.flatten().tolist())}"
                     for name, value in constants.items())


def _normalized(model: nn.Module, constants: dict[str, Tensor], source: str, wanted: bool) -> list[str]:
    """Set the network's mean and std to the constants of the file. Returns notes to print."""
    if not constants:
        return []
    if not isinstance(getattr(model, "normalize", None), Normalize):
        return [f"the file's normalization ({_shown(constants)}) is not used, because the network has no layer for it: "
                f"give --mean and --std"]
    if not wanted:
        return [f"the file's normalization ({', '.join(constants)}) is overridden by --mean and --std"]
    own = {}
    for name, pattern in CONSTANTS.items():
        found = {tuple(value.flatten().tolist()) for key, value in constants.items() if pattern.search(key)}
        if len(found) != 1 or len(values := found.pop()) not in (1, 3):
            shapes = ", ".join(f"{key} of shape {tuple(value.shape)}" for key, value in constants.items())
            raise UsageError(f"--resume: {source} has normalization constants that are not one mean and one std for "
                             f"the three channels ({shapes}): give --mean and --std")
        own[name] = torch.tensor(values).view(1, -1, 1, 1).expand(1, 3, 1, 1)
    if not all(value.isfinite().all() for value in own.values()) or not (own["std"] > 0).all():
        raise UsageError(f"--resume: {source} has invalid normalization constants: {_shown(own)}")
    for name, value in own.items():
        model.get_buffer(f"normalize.{name}").copy_(value)
    return [f"normalized as in the file: {_shown(own)}"]


def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that identify the weights and the normalization of a network."""
    digest = hashlib.sha256()
    for name, value in (*model.state_dict().items(), *model.named_buffers()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()[:16]
