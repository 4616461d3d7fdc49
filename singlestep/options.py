"""The command line: what can be chosen by name, every flag with its default and unit, and the checks of their values.

Nothing here needs PyTorch, so that --help and a refused flag answer at once.
"""
import argparse
import difflib
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .run.console import UsageError, say


@dataclass(frozen=True)
class DataSet:
    """What tells one data set from another; a training script states one.

    name: as users write it; source: the class in torchvision.datasets, or a function (data_dir) -> (training images,
    labels), (test images, labels), the images uint8 (N, H, W, 3); mean, std: of the pixels in [0, 1], per channel;
    defaults: those of the command line that are this data set's own; augmentation: keywords of `data.Augmentation`, for
    the training images; peak: (epochs) -> the epoch at which the cyclic learning rate is highest; validate: whether the
    best checkpoint is chosen on training images even without --val-size.
    """

    name: str
    source: str | Callable[[str], tuple]
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    defaults: dict[str, Any]
    augmentation: dict[str, Any] = field(default_factory=dict)
    peak: Callable[[int], int] = lambda epochs: epochs // 2
    validate: bool = False


CIFAR10 = DataSet(
    name="CIFAR-10",
    source="CIFAR10",
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
    augmentation=dict(padding=4, pad_mode="reflect", flip=True),
    defaults=dict(data_dir="../cifar-data", fname="cifar_model", epochs=52, lr_schedule="onedrop", lr_max=0.1,
                  zero_qval=0.35),
)

CIFAR100 = DataSet(
    name="CIFAR-100",
    source="CIFAR100",
    classes=100,
    mean=(0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    std=(0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
    augmentation=dict(padding=4, pad_mode="zero", flip=True, degrees=15),
    defaults=dict(data_dir="../cifar100-data", fname="cifar100_model", epochs=52, lr_schedule="onedrop", lr_max=0.1,
                  zero_qval=0.45),
)

SVHN = DataSet(
    name="SVHN",
    source="SVHN",
    classes=10,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    peak=lambda epochs: epochs * 2 // 5,
    validate=True,
    defaults=dict(data_dir="../svhn-data", fname="svhn_model", epochs=15, lr_schedule="cyclic", lr_max=0.01,
                  zero_qval=0.7, final_model="best"),
)

DATA_SETS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "svhn": SVHN}


def data_set(name: str) -> DataSet:
    """The data set of that name, as the command line or as runs have it."""
    for short, dataset in DATA_SETS.items():
        if name in (short, dataset.name):
            return dataset
    raise UsageError(f"--data-set must be {', '.join(DATA_SETS)}, not {name}")


# Each name is that of a function: of attacks.py, objectives.py, train.py or networks.py. What it is called with,
# beside images, labels and epsilon, is what its line here takes from the arguments. Pixel units begin here: 8 becomes
# 8/255.

ATTACKS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "multigrad": lambda a: dict(alpha=_step(a), samples=a.multi_samps, threshold=_threshold(a),
                                parallel=a.multi_parallel),
    "zerograd": lambda a: dict(alpha=_step(a), q=a.zero_qval, steps=a.zero_iters, init=a.fgsm_init),
    "fgsm": lambda a: dict(alpha=_step(a), init=a.fgsm_init),
    "pgd": lambda a: dict(alpha=a.pgd_alpha / 255, steps=a.pgd_iters),
    "none": lambda a: {},
    "nfgsm": lambda a: dict(alpha=_step(a), k=a.noise_k),
    "sora": lambda a: {},
    "ckpt": lambda a: dict(alpha=_step(a), count=a.ckpt_count),
    "free": lambda a: {},
    "pgi": lambda a: dict(alpha=_step(a), reset=a.pgi_reset, smoothing=a.label_smoothing),
    "kl": lambda a: dict(alpha=a.pgd_alpha / 255, steps=a.pgd_iters),
    "nuclear": lambda a: dict(alpha=_step(a), weight=a.nuclear_lambda),
}
OBJECTIVES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "ce": lambda a: dict(smoothing=a.label_smoothing),
    "gradalign": lambda a: dict(smoothing=a.label_smoothing, weight=a.gradalign_lambda),
    "elle": lambda a: dict(smoothing=a.label_smoothing, weight=a.elle_lambda, adaptive=a.elle_adaptive),
    "aaer": lambda a: dict(smoothing=a.label_smoothing, weights=a.aaer_lambdas),
    "trades": lambda a: dict(smoothing=a.label_smoothing, beta=a.trades_beta),
    "nuclear": lambda a: dict(smoothing=a.label_smoothing, weight=a.nuclear_lambda),
    "logits": lambda a: dict(smoothing=a.label_smoothing, weight=a.logits_lambda),
}
SCHEDULES = ("cyclic", "onedrop", "onecycle")

MODELS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **{f"PreActResNet{depth}": lambda a: dict(base_width=a.base_width, shortcut=a.shortcut)
       for depth in (18, 34, 50, 101, 152)},
    "ResNet18": lambda a: dict(base_width=a.base_width),
    "WideResNet": lambda a: dict(depth=34, width_factor=a.width_factor),
}

# Objectives that compare with the start of the attack, the attacks that have none, and objectives that torch.compile
# cannot take: they need a second derivative, or a graph twice.
WITH_START, WITHOUT_START = ("gradalign", "aaer", "logits"), ("none", "free", "kl", "nuclear")
OF_THE_BATCH = ("nuclear", "aaer")  # no mean over images: a process's share has another term than the whole batch
EAGER = ("gradalign", "logits")


@dataclass(frozen=True)
class Method:
    """A published method: the flags that it stands for, its forward and backward passes a training step, its source,
    and the flags that are others on a data set."""

    flags: dict[str, Any]
    passes: str
    source: str
    on: dict[str, dict[str, Any]] = field(default_factory=dict)


METHODS = {
    "fgsm": Method(dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.0), "2", "arXiv 1412.6572"),
    "fgsm-rs": Method(dict(attack="fgsm", fgsm_alpha=1.25), "2", "arXiv 2001.03994"),
    "zerograd": Method(dict(attack="zerograd"), "2", "arXiv 2103.15476"),
    "multigrad": Method(dict(attack="multigrad"), "4", "arXiv 2103.15476"),
    "pgd": Method(dict(attack="pgd"), "11", "arXiv 1706.06083"),
    "n-fgsm": Method(dict(attack="nfgsm", fgsm_alpha=1.0), "2", "arXiv 2202.01181"),
    "n-aaer": Method(dict(attack="nfgsm", fgsm_alpha=1.0, objective="aaer"), "2", "arXiv 2404.08154"),
    "rs-aaer": Method(dict(attack="fgsm", fgsm_alpha=1.25, objective="aaer"), "2", "arXiv 2404.08154"),
    "gradalign": Method(dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.25, objective="gradalign"), "5",
                        "arXiv 2007.02617"),
    "elle": Method(dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.0, objective="elle"), "5", "arXiv 2401.11618"),
    "elle-a": Method(dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.0, objective="elle", elle_adaptive=True), "5",
                     "arXiv 2401.11618"),
    "free": Method(dict(attack="free"), "1", "arXiv 1904.12843"),
    "ckpt": Method(dict(attack="ckpt", fgsm_alpha=1.25), "2.7", "arXiv 2010.01799"),
    "pgi": Method(dict(attack="pgi", fgsm_alpha=1.0, objective="logits", label_smoothing=4 / 9), "2.7",
                  "arXiv 2207.08859", {"CIFAR-100": dict(label_smoothing=40 / 99, pgi_reset=10)}),
    "nuat": Method(dict(attack="nuclear", fgsm_alpha=1.0, objective="nuclear"), "3.3", "NeurIPS 2021"),
    "trades": Method(dict(attack="kl", objective="trades"), "12.3", "arXiv 1901.08573"),
    "sora": Method(dict(attack="sora"), "2", "arXiv 2606.00738"),
}
RECIPES: dict[str, dict[str, Any]] = {
    # github.com/fzjcdt/FastAT_Benchmark, but for its learning rate, which moves once an epoch
    "fastat": dict(model="ResNet18", epochs=100, lr_schedule="onecycle", lr_max=0.1, label_smoothing=0.4, ema=0.9995,
                   val_size=1000, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), final_model="best"),
}
# The step that an attack of another paper takes where --fgsm-alpha says nothing, in epsilons.
STEPS = {"nfgsm": 1.0, "pgi": 1.0, "nuclear": 1.0, "ckpt": 1.25}


def _step(a) -> float:
    """The step of the single-step attacks, given in epsilons."""
    return a.fgsm_alpha * a.epsilon / 255


def _threshold(a) -> int:
    return a.multi_samps if a.multi_th == -1 else a.multi_th


def _gradalign_lambda(a) -> float:
    """As published, by epsilon: log-linear, on SVHN from another point."""
    return 2.5 * 10 ** ((a.epsilon - 8) / 39.2) if a.data_set == "SVHN" else 0.2 * 10 ** ((a.epsilon - 8) / 8)


def _elle_lambda(a) -> float:
    return 4000.0 if a.elle_adaptive else 1000.0 if a.epsilon <= 8 else 5000.0 if a.epsilon <= 20 else 10000.0


def _aaer_lambdas(a) -> tuple[float, float, float]:
    """As published, for the nearest of its epsilons, by data set, and by whether delta is clipped to the ball."""
    table = {("CIFAR-10", True): {8: (2.5, 1.5), 12: (5, 2.75), 16: (7, 3.25), 32: (5.75, 1.5)},
             ("CIFAR-10", False): {8: (1.5, 0.15), 12: (5, 0.55), 16: (8.5, 1.5), 32: (2.75, 0.75)},
             ("CIFAR-100", True): {8: (3.5, 1.5), 12: (3.5, 2.75), 16: (6, 2.25), 32: (5, 0.75)},
             ("CIFAR-100", False): {8: (1.5, 0.15), 12: (3.5, 0.3), 16: (6, 0.5), 32: (3.5, 0.5)}}
    values = table["CIFAR-100" if a.data_set == "CIFAR-100" else "CIFAR-10", a.attack != "nfgsm"]
    return (1.0, *values[min(values, key=lambda epsilon: abs(epsilon - a.epsilon))])


# Flags whose default depends on others.
DEPENDENT: dict[str, Callable[[Any], Any]] = {
    "gradalign_lambda": _gradalign_lambda, "elle_lambda": _elle_lambda, "aaer_lambdas": _aaer_lambdas,
    "fgsm_alpha": lambda a: STEPS.get(a.attack, 2.0),
}


def number(kind: type, low: float, high: float = float("inf"), also: tuple = ()) -> Callable[[str], float]:
    """An argparse type: a finite `kind` (int or float) from `low` to `high`, or one of the values in `also`."""
    noun = "a whole number" if kind is int else "a number"
    span = f"{low} or more" if high == float("inf") else f"from {low} to {high}"
    rule = f"must be {noun}, {span}" + "".join(f", or {value}" for value in also)

    def parse_number(text: str):
        for value in also:
            if text == str(value):
                return value
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{rule}, not {text!r}") from None
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{rule}, not {text}")
        if value > sys.maxsize and kind is int:
            raise argparse.ArgumentTypeError(f"{rule}, and at most {sys.maxsize}, not {text}")
        return value

    return parse_number


def in_255ths(text: str) -> float:
    """An argparse type: a number of 255ths, from 0 to 255, which may be written as 8 or as 8/255."""
    return number(float, 0, 255)(text.removesuffix("/255"))


def triple(text: str) -> tuple[float, ...]:
    """An argparse type: three numbers, with commas between them."""
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"must be three numbers, such as 0.5,0.5,0.5, not {text!r}")
    return values


def positive_triple(text: str) -> tuple[float, ...]:
    """An argparse type: three numbers above 0, with commas between them."""
    values = triple(text)
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"must be three numbers above 0, such as 0.25,0.25,0.25, not {text!r}")
    return values


def path(text: str) -> str:
    """An argparse type: a path, in which ~ is the home folder; an empty one is most likely an unset variable."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, and is empty")
    return os.path.expanduser(text)


def figure_path(text: str) -> str:
    """An argparse type: the path of a figure, whose name ends with a format that plots can be in."""
    if not text.lower().endswith((".png", ".pdf", ".svg")):
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf or .svg, not {text}")
    return path(text)


class Help(argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and every default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or action.default is False or action.default in ("", argparse.SUPPRESS)
        untold = action.option_strings and not silent and "(default: " not in (action.help or "")  # Python 3.10's is
        return (action.help or "") + (" (default: %(default)s)" if untold else "")


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line and no usage text."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parse(dataset: DataSet, description: str | None = None, argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of the script that trains on `dataset`; --help and a mistake end the process."""
    p = parser(dataset, description)
    named, _ = p.parse_known_args(argv)
    if named.method == "list":
        print(methods_table())
        p.exit()
    if named.eval:
        _take_from_run(p, dataset, named.fname, argv)
    # They set defaults and nothing else: what is given beside them wins, and a recipe's default over a method's.
    if named.method:
        p.set_defaults(**{**METHODS[named.method].flags, **METHODS[named.method].on.get(dataset.name, {})})
    p.set_defaults(**RECIPES.get(named.recipe, {}))
    args = p.parse_args(argv)
    for name, default in DEPENDENT.items():
        if getattr(args, name) is None:
            setattr(args, name, default(args))
    try:
        check(args)
    except UsageError as error:
        p.error(str(error))
    return args


# What an evaluation by --eval does not take from the run: it depends on the machine, or is of no matter to it.
NOT_TAKEN = {"fname", "resume", "eval", "quiet", "allow_changes", "method", "recipe", "tensorboard", "device", "amp",
             "amp_dtype", "amp_impl", "tf32", "compile", "compile_mode", "deterministic", "sync_bn"}


def _take_from_run(p: Parser, dataset: DataSet, folder: str, argv: list[str] | None) -> None:
    """Make the flags of the run in `folder` the defaults, and say which of them the command line overrides."""
    try:
        run = run_flags(folder)
    except UsageError as error:
        p.error(str(error))
    if run.get("data_set") != dataset.name:
        return
    names, unset = vars(p.parse_known_args([])[0]).keys() - NOT_TAKEN, object()
    taken = {name: value for name, value in run.items() if name in names}
    p.set_defaults(**taken)
    given = vars(p.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(taken, unset)))[0])
    for line in differing({name: given[name] for name in taken if given[name] is not unset}, taken):
        say(f"# {line}", error=True)


def run_flags(folder: str | Path) -> dict[str, Any]:
    """The flags of the run in `folder`, as its args.json has them; none where there is no such file."""
    try:
        saved = json.loads((Path(folder) / "args.json").read_text(encoding="utf-8"))
        flags = {**saved["args"], "data_set": saved["data_set"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{Path(folder) / 'args.json'} is damaged: mend it, or move it away and give the run's "
                         f"flags") from None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}


def differing(given: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """What there is to say of flags that win over those of a run."""
    return [f"--{name.replace('_', '-')} {value}, where the run has {run[name]}" for name, value in given.items()
            if name in run and run[name] != value]


def parse_evaluation(description: str | None = None, argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of evaluate.py; what is not given and a run may tell is None."""
    p = Parser(description)
    p.add_argument("runs", nargs="+", type=path, metavar="RUN_OR_FILE", help="a run's folder, or a model's file")
    add = p.add_argument_group("what is measured").add_argument
    add("--attacks", type=attack_names, default="clean,fgsm,pgd-50-10", metavar="NAME,...",
        help="clean, fgsm (from zero, a step of epsilon), pgd-STEPS-RESTARTS (steps of epsilon/4), cw (PGD-50-10 on "
        "the margin), autoattack, or a part of it: apgd-ce, apgd-t, fab-t, square")
    add("--epsilons", type=radii, metavar="E,...", help="radii of the l_inf ball in 1/255 (default: the run's, or 8)")
    add("--samples", type=number(int, 1), metavar="N", help="the first N test images (default: all)")
    add("--seed", type=number(int, 0, 2**32 - 1), help="of random starts (default: the run's, or 0)")
    add("--which", choices=("last", "best", "healthy"), default="last", help="which network of a run")
    add = p.add_argument_group("data (default: the run's)").add_argument
    add("--data-set", choices=DATA_SETS, help="on which the network was trained")
    add("--data-dir", type=path, help="folder of the data set; if none of its files is there, they are downloaded")
    add("--dummy", action="store_true", default=None, help="synthetic images that can be learned")
    _model(p)
    p.set_defaults(**dict.fromkeys(("model", "base_width", "width_factor", "shortcut")))  # a run's, or the scripts'
    add = p.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--batch-size", type=number(int, 1, 10**6), default=128, help="images at once")
    return p.parse_args(argv)


PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")  # of AutoAttack's standard version, in its order


def attack_names(text: str) -> tuple[str, ...]:
    """An argparse type: evaluation attacks by name, with commas between them."""
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        known = name in ("clean", "fgsm", "cw", "autoattack", *PARTS)
        if not known and not re.fullmatch(r"pgd-[1-9]\d*-[1-9]\d*", name):
            raise argparse.ArgumentTypeError(f"must be of clean, fgsm, pgd-STEPS-RESTARTS, cw, autoattack, "
                                             f"{', '.join(PARTS)}, not {name!r}")
    return names


def radii(text: str) -> tuple[float, ...]:
    """An argparse type: as `in_255ths`, with commas between them."""
    return tuple(dict.fromkeys(map(in_255ths, text.split(","))))


class Reader:
    """Notes which arguments are read from it."""

    def __init__(self, args):
        self.args, self.read = args, {}

    def __getattr__(self, name: str):
        self.read[name] = getattr(self.args, name)
        return self.read[name]


def in_effect(args) -> dict[str, Any]:
    """Attack and objective of a run, with the flags that each of them reads."""
    attack, objective = Reader(args), Reader(args)
    ATTACKS[args.attack](attack)
    OBJECTIVES[args.objective](objective)
    return {"attack": args.attack, **attack.read, "epsilon": args.epsilon, "objective": args.objective,
            **objective.read}


def without_effect(dataset: DataSet, args) -> list[str]:
    """The flags that were set, though neither the attack nor the objective nor the network of this run reads them."""
    used, every = Reader(args), Reader(args)
    for table, chosen in ((ATTACKS, args.attack), (OBJECTIVES, args.objective),
                          (MODELS, args.model)):
        table[chosen](used)
        for line in table.values():
            line(every)
    defaults = vars(parser(dataset, None).parse_args([]))
    defaults |= {name: default(args) for name, default in DEPENDENT.items()}
    evaluation = {"epsilon", "pgd_alpha"}
    return [f"--{name.replace('_', '-')}" for name in sorted(every.read.keys() - used.read.keys() - evaluation)
            if getattr(args, name) != defaults[name]]


def as_flags(values: dict[str, Any]) -> str:
    """Arguments as one writes them on the command line; switches that are off are left out."""
    def text(value: Any) -> str:
        return ",".join(map(text, value)) if isinstance(value, (tuple, list)) else \
            f"{value:.4g}" if isinstance(value, float) else str(value)

    return " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f"={text(value)}")
                    for name, value in values.items() if value is not False)


def methods_table() -> str:
    """The methods by name, a line each."""
    rows = [("--method", "passes", "source", "stands for")]
    rows += [(name, method.passes, method.source, as_flags(method.flags)) for name, method in METHODS.items()]
    return "\n".join(f"{name:10} {passes:>6}  {source:17} {flags}" for name, passes, source, flags in rows)


def parser(dataset: DataSet, description: str | None) -> Parser:
    """The command line of the script that trains on `dataset`."""
    p = Parser(description)
    for add_group in (_data, _model, _training, _attack, _evaluation, _files, _machine):
        add_group(p)
    p.set_defaults(data_set=dataset.name, **dataset.defaults)
    return p


def _data(p: Parser) -> None:
    add = p.add_argument_group("data").add_argument
    add("--data-dir", type=path, help="folder of the data set; if none of its files is there, they are downloaded")
    add("--dummy", action="store_true", help="synthetic images that can be learned: no files, no download")
    add("--train-samples", type=number(int, 1), metavar="N", help="the first N training images only")
    add("--val-size", type=number(int, 0), default=0, metavar="N",
        help="hold the last N training images out and choose the best checkpoint on them")


def _model(p: Parser) -> None:
    add = p.add_argument_group("model").add_argument
    add("--model", choices=MODELS, default="PreActResNet18", help="PreActResNet by depth, ResNet18, or WideResNet-34")
    add("--base-width", type=number(int, 1, 1024), default=64, help="width of the stem of PreActResNet and ResNet")
    add("--width-factor", type=number(int, 1, 64), default=10, help="width of WideResNet")
    add("--shortcut", choices=("activated", "raw"), default="activated", help="what the convolutions in PreActResNet's "
        "shortcuts read: the input after BatchNorm and ReLU, or, as in fast_adversarial, before")
    add("--mean", type=triple, metavar="R,G,B", help="what is subtracted from the pixels (default: the data set's)")
    add("--std", type=positive_triple, metavar="R,G,B",
        help="what the difference is divided by (default: the data set's)")


def _training(p: Parser) -> None:
    add = p.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1, 10**6), help="passes over the training images")
    add("--batch-size", type=number(int, 1, 10**6), default=128, help="images a step, over all processes")
    add("--recipe", choices=RECIPES, help="the training protocol of another comparison: sets defaults of other flags")
    add("--lr-schedule", choices=SCHEDULES, help="cyclic: up and down; onedrop: constant, then a tenth; onecycle: "
        "PyTorch's")
    add("--lr-max", type=number(float, 0), help="the highest learning rate")
    add("--lr-drop", type=number(float, 0), default=50, help="the epoch of onedrop's drop")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of all random numbers")
    add("--objective", choices=OBJECTIVES, default="ce", help="what is minimized at the perturbed images")
    add("--gradalign-lambda", type=number(float, 0), help="weight of gradalign's term (default: as published for "
        "--epsilon)")
    add("--elle-lambda", type=number(float, 0), help="weight of elle's term (default: as published for --epsilon)")
    add("--elle-adaptive", action="store_true", help="ELLE-A: the weight decays, and is reset when the term jumps")
    add("--aaer-lambdas", type=triple, metavar="L1,L2,L3", help="weights of aaer's terms (default: as published for "
        "--epsilon)")
    add("--trades-beta", type=number(float, 0), default=6.0, help="weight of trades' divergence")
    add("--nuclear-lambda", type=number(float, 0), default=4.5, help="the nuclear norm's weight, in both places")
    add("--logits-lambda", type=number(float, 0), default=10.0, help="weight of the difference between logits")
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, help="label smoothing of the training loss")
    add("--ema", type=number(float, 0, 1), default=0.0, metavar="DECAY",
        help="judge a moving average of the network, BatchNorm's statistics included; 0: the network itself")


def _attack(p: Parser) -> None:
    add = p.add_argument_group("attack to train on").add_argument
    add("--method", choices=(*METHODS, "list"), metavar="NAME",
        help="a published method: sets the defaults of other flags; list: show them all")
    add("--attack", choices=ATTACKS, default="multigrad", help="how training images are perturbed")
    add("--epsilon", type=in_255ths, default=8.0,
        help="radius of the l_inf ball in 1/255, in training and in evaluation")
    add("--eps-warmup", type=number(float, 0), default=0.0, metavar="EPOCHS",
        help="epochs over which --epsilon and the attack's step grow from 0")
    add("--fgsm-alpha", type=number(float, 0), help="step of the single-step attacks, in epsilons (default: 2; of "
        "nfgsm, pgi, nuclear 1, of ckpt 1.25)")
    add("--fgsm-init", choices=("zero", "random"), default="random", help="start of fgsm, zerograd")
    add("--zero-qval", type=number(float, 0, 1), help="fraction of an image's gradient to zero")
    add("--zero-iters", type=number(int, 1), default=1, help="ZeroGrad's steps")
    add("--multi-samps", type=number(int, 1, 1000), default=3, help="MultiGrad's random starts")
    add("--multi-th", type=number(int, 1, also=(-1,)), default=-1, help="how many must agree on a sign; -1: all")
    add("--multi-parallel", action="store_true", help="all starts as one batch")
    add("--pgd-alpha", type=number(float, 0), default=2.0, help="PGD's step in 1/255, in training and in evaluation")
    add("--pgd-iters", type=number(int, 1), default=10, help="steps of pgd and kl in training")
    add("--noise-k", type=number(float, 0), default=2.0, help="nfgsm's noise, in epsilons")
    add("--ckpt-count", type=number(int, 2), default=3, help="parts into which ckpt divides its perturbation")
    add("--free-replays", type=number(int, 1), default=8, help="how often free uses a batch; an epoch has as many "
        "steps as any, and so fewer images")
    add("--pgi-reset", type=number(int, 1), default=40, help="epochs between two resets of pgi's perturbations")


def _evaluation(p: Parser) -> None:
    add = p.add_argument_group("evaluation").add_argument
    add("--test-samples", type=number(int, 1), default=1000, metavar="N", help="test images that an epoch is judged on")
    add("--last-samples", type=number(int, 1), metavar="N", help="likewise after the last epoch (default: all; never "
        "fewer than --test-samples)")
    add("--full-test", action="store_true", help="judge every epoch on the whole test set")
    add("--test-iters", type=number(int, 1), default=10, help="PGD's steps in an epoch's evaluation")
    add("--test-restarts", type=number(int, 1), default=1, help="PGD's restarts there")
    add("--final-iters", type=number(int, 0), default=50, help="PGD's steps in the final evaluation; 0: there is none")
    add("--final-restarts", type=number(int, 1), default=10, help="PGD's restarts there")
    add("--final-samples", type=number(int, 1), metavar="N", help="only the first N test images there")
    add("--on-collapse", choices=("warn", "stop"), default="warn", help="on catastrophic overfitting, print a warning "
        "and continue, or stop the run with exit status 1")
    add("--final-model", choices=("last", "best"), default="last", help="the model of the final evaluation")
    add("--eval", action="store_true", help="evaluate the resumed model (--final-model=best: the best one), and stop")


def _files(p: Parser) -> None:
    add = p.add_argument_group("files").add_argument
    add("--fname", type=path, help="folder of the logs and checkpoints")
    add("--resume", type=number(int, 0, also=("auto",)), default=0, metavar="N|auto",
        help="N: go on from model_{N-1}.pth and opt_{N-1}.pth; auto: from the newest complete state, if there is one")
    add("--quiet", action="store_true", help="show warnings and errors alone; the files say the rest")
    add("--tensorboard", action="store_true", help="write the epochs' numbers for TensorBoard, too")
    add("--allow-changes", action="store_true", help="resume although flags differ from the run's")
    add("--chkpt-iters", type=number(int, 1), default=10, help="epochs between model_E.pth files")
    add("--chkpt-steps", type=number(int, 1), metavar="N", help="also save the state every N steps")


def _machine(p: Parser) -> None:
    add = p.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", action=argparse.BooleanOptionalAction, default=False,
        help="mixed precision in training and in attacks")
    add("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="the lower precision of --amp")
    add("--amp-impl", choices=("native", "apex"), default="native", help="library of --amp: torch.amp or apex.amp")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True,
        help="on CUDA, train with convolutions in TF32, as PyTorch does by default; --no-tf32: in full float32")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the training step")
    add("--compile-mode", choices=("default", "reduce-overhead", "max-autotune"), default="default",
        help="mode of torch.compile; all but the default use CUDA graphs")
    add("--deterministic", action="store_true", help="the same bits from the same seed on CUDA, too; slower")
    add("--sync-bn", action="store_true", help="under torchrun on CUDA: BatchNorm over the images of all processes")


def check(args: argparse.Namespace) -> None:
    """Raise UsageError where flags do not go together, or there is nowhere for PyTorch to put a temporary file."""
    try:
        tempfile.gettempdir()
    except OSError:
        raise UsageError("no folder for temporary files can be written: set TMPDIR to one") from None
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UsageError("--tensorboard needs the package tensorboard: pip install tensorboard")
    if args.shortcut == "raw" and args.model not in ("PreActResNet18", "PreActResNet34"):
        raise UsageError(f"--shortcut raw is for PreActResNet18 and 34, not {args.model}")
    if args.multi_th > args.multi_samps:
        raise UsageError(f"--multi-th must be from 1 to --multi-samps ({args.multi_samps}), or -1, not {args.multi_th}")
    parallel = args.attack == "multigrad" and args.multi_parallel
    if args.objective in WITH_START and (args.attack in WITHOUT_START or parallel):
        raise UsageError(f"--objective {args.objective} compares with the attack's start, and --attack {args.attack}"
                         f"{' --multi-parallel' if parallel else ''} has none: take fgsm or nfgsm, say")
    if args.attack == "sora" and (args.objective != "ce" or args.label_smoothing or args.amp_impl == "apex"):
        raise UsageError("--attack sora compares gradients of the plain cross-entropy: it needs --objective ce, "
                         "--label-smoothing 0 and --amp-impl native")
    if args.eval and args.resume == 0:
        raise UsageError("--eval needs a model: --resume N for model_{N-1}.pth, or --resume auto")
    if isinstance(args.resume, int) and args.resume > args.epochs and not args.eval:
        raise UsageError(f"--resume must be from 0 to --epochs ({args.epochs}), or auto, not {args.resume}")
