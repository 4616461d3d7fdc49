"""The command line: the data sets, every flag with its default, unit and range, and the checks of their values.

`Args` defines the flags of a training script, one field per flag; argparse's parser is made from it. Nothing here
imports PyTorch, so --help and errors about flags appear at once.
"""
import argparse
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .methods import ATTACKS, DEPENDENT, METHODS, MODELS, NORMS, OBJECTIVES, RECIPES
from .run.console import UsageError, end_on_interrupt, one_line_errors, printable, say

# Data sets


def half(epochs: int) -> int:
    return epochs // 2


def two_fifths(epochs: int) -> int:
    return epochs * 2 // 5


@dataclass(frozen=True)
class DataSet:
    """Definition of a data set.

    Attributes:
        name: name for users.
        source: CIFAR10, CIFAR100 or SVHN, of torchvision.datasets, or a function of yours, best as
            "package.module:function": (data_dir) -> (training images, labels), (test images, labels), with images
            uint8 (N, H, W, 3).
        classes: number of classes.
        mean, std: of the pixels in [0, 1], per channel.
        defaults: flag -> default on this data set.
        augmentation: keywords of `data.Augmentation` for the training images.
        peak: number of epochs -> epoch at which the cyclic learning rate is highest.
        validate: without --val-size, choose the best checkpoint on the first 2% of the training images, not on test
            images.
        side: width and height of the synthetic images, a multiple of 4; None: data.DUMMY_SIDE.
        memory: bytes of all images, printed before the images are read; 0: print nothing.
    """

    name: str
    source: str | Callable[[str], tuple]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    peak: Callable[[int], int] = half
    validate: bool = False
    side: int | None = None
    memory: int = 0

    def flags(self) -> dict[str, Any]:
        """Return this data set's flag defaults: `defaults`, completed by CIFAR-10's; --fname is made from the name."""
        slug = re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")
        return {**CIFAR10.defaults, "fname": f"{slug}_model", **self.defaults}

    def statement(self) -> dict[str, Any]:
        """Return the description of this data set for args.json; with it, evaluate.py needs no training script."""
        source = self.source
        if not isinstance(source, str):
            source = f"{source.__module__}:{source.__qualname__}"
        return {"name": self.name, "source": source, "classes": self.classes, "mean": self.mean, "std": self.std,
                "side": self.side}

    @classmethod
    def stated(cls, statement: dict[str, Any]) -> "DataSet":
        """Return the data set that a run recorded.

        Raises ValueError, KeyError, TypeError, AttributeError or argparse.ArgumentTypeError if `statement` is damaged.
        """
        module = str.partition(statement["source"], ":")[0]
        if module.partition(".")[0] in sys.stdlib_module_names:  # no data set, but os.system and the like
            raise ValueError
        known = next((dataset for dataset in DATA_SETS.values() if dataset.name == statement["name"]), None)
        side = statement.get("side")  # older runs have none
        mean, std = (",".join(map(str, statement[name])) for name in ("mean", "std"))
        return cls(str(statement["name"]), statement["source"], int(number(int, 1)(str(statement["classes"]))),
                   triple(mean), positive_triple(std), known.defaults if known else {},
                   side=side and int(number(int, 4)(str(side))))


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
    peak=two_fifths,
    validate=True,
    defaults=dict(data_dir="../svhn-data", fname="svhn_model", epochs=15, lr_schedule="cyclic", lr_max=0.01,
                  zero_qval=0.7, final_model="best"),
)

TINY = DataSet(
    name="Tiny-ImageNet",
    source="singlestep.data:read_tiny_imagenet",
    classes=200,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    augmentation=dict(padding=4, pad_mode="zero", flip=True),
    side=64,
    memory=110_000 * 64 * 64 * 3,
    defaults=dict(data_dir="../tiny-imagenet-data", fname="tiny_model", epochs=30, lr_schedule="cyclic", lr_max=0.2,
                  zero_qval=0.35),
)

OWN = "own"  # name and source of the data set of `train.train`, whose network is the user's

DATA_SETS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "svhn": SVHN, "tiny": TINY}


def data_set(name: str) -> DataSet:
    """Return the data set with this name: a key of `DATA_SETS`, or `DataSet.name`."""
    for short, dataset in DATA_SETS.items():
        if name in (short, dataset.name):
            return dataset
    raise UsageError(f"--data-set must be {', '.join(DATA_SETS)}, not {name}")


# Values of flags


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


def wide_depth(text: str) -> int:
    """An argparse type: the layers of a WideResNet, 6n + 4."""
    value = int(number(int, 10, 1000)(text))
    if (value - 4) % 6:
        raise argparse.ArgumentTypeError(f"must be 6n + 4, such as 28, 34 or 40, not {text}; only WideResNet has it")
    return value


def in_255ths(text: str) -> float:
    """An argparse type: a number from 0 to 255, in 1/255, written as 8 or as 8/255."""
    return number(float, 0, 255)(text.removesuffix("/255"))


def triple(text: str) -> tuple[float, ...]:
    """An argparse type: three numbers, separated by commas."""
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"must be three numbers, such as 0.5,0.5,0.5, not {text!r}")
    return values


def positive_triple(text: str) -> tuple[float, ...]:
    """An argparse type: three numbers above 0, separated by commas."""
    values = triple(text)
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"must be three numbers above 0, such as 0.25,0.25,0.25, not {text!r}")
    return values


def shares(text: str) -> tuple[float, ...]:
    """An argparse type: lower and upper bound of a random fraction, separated by a comma."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"must be two numbers from 0 to 1, the lower first, such as 0.1,0.5, not "
                                         f"{text!r}")
    return low, high


def path(text: str) -> str:
    """An argparse type: a path, in which ~ is the home folder. An empty path, usually an unset variable, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not empty")
    return os.path.expanduser(text)


def new_file(text: str) -> str:
    """An argparse type: the path of a file that can be written."""
    file = Path(path(text))
    if file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that can be written, not {text}")
    return str(file)


def figure_path(text: str) -> str:
    """An argparse type: the path of a figure, ending in .png, .pdf or .svg."""
    if not text.lower().endswith((".png", ".pdf", ".svg")):
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf or .svg, not {text}")
    return path(text)


def function_name(text: str) -> str:
    """An argparse type: a function in a module."""
    if not re.fullmatch(r"[\w.]+:\w+", text):
        raise argparse.ArgumentTypeError(f"must be PACKAGE.MODULE:FUNCTION, such as torchvision.models:resnet18, not "
                                         f"{text!r}")
    return text


PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")  # of AutoAttack's standard version, in its order
AUTOATTACK = (*PARTS, "autoattack")


def attack_names(text: str) -> tuple[str, ...]:
    """An argparse type: names of evaluation attacks, separated by commas."""
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        known = name in ("clean", "fgsm", "cw", "autoattack", *PARTS)
        if not known and not re.fullmatch(r"pgd-[1-9]\d*-[1-9]\d*(-\d+(\.\d+)?)?", name):
            raise argparse.ArgumentTypeError(f"must be one of clean, fgsm, pgd-STEPS-RESTARTS, "
                                             f"pgd-STEPS-RESTARTS-SIZE, cw, autoattack, {', '.join(PARTS)}, not "
                                             f"{name!r}")
    return names


def radii(text: str) -> tuple[float, ...]:
    """An argparse type: radii as in `in_255ths`, separated by commas."""
    return tuple(dict.fromkeys(map(in_255ths, text.split(","))))


# The flags of a training script

GROUPS = {"method": "method (flags that you give take precedence over the defaults that --method and --recipe set)",
          "data": "data", "model": "model", "training": "training", "attack": "attack to train on",
          "evaluation": "evaluation", "files": "files", "machine": "machine"}
SCIENCE = ("data", "model", "training", "attack")


def flag(group: str, help: str, default: Any = None, parse: Callable[[str], Any] | None = None,
         choices: Collection[str] | None = None, metavar: str | None = None, negatable: bool = False,
         fixed: bool | None = None, scores: bool = False, orders: bool = False, named: bool | None = None,
         convert: Callable[[Any, Any], Any] | None = None) -> Any:
    """Return a field of `Args`.

    Args:
        group: key of `GROUPS`.
        parse: argparse's type.
        negatable: add a --no- form.
        fixed: the flag affects the weights or the scores; --resume with another value needs --allow-changes
            (default: all flags of the groups in `SCIENCE`).
        scores: the flag affects an epoch's score; a change resets the best score.
        orders: the flag affects the order of the training images; a change restarts the epoch.
        named: the flag is part of a run's name in plots (default: all but those of the group files).
        convert: (value, args) -> value in the unit of the function.
    """
    science = group in SCIENCE
    return field(default=default, metadata=dict(
        group=group, help=help, parse=parse, choices=choices, metavar=metavar, negatable=negatable,
        fixed=science if fixed is None else fixed, scores=scores, orders=orders,
        named=group != "files" if named is None else named, convert=convert))


@dataclass
class Args:
    """The flags of a training script. Epsilon, step sizes and radii have the command line's units: 1/255 or epsilons.

    Attributes beyond the flags:
        data_set, statement: name of the data set, and its description (see `DataSet.statement`).
        given: names of the flags that the user gave or that --like took from a run.
        dropped: flags of the recipe that conflict with values that the attack or the objective requires.
    """

    method: str | None = flag("method", "published method, such as n-fgsm or zerograd: sets the defaults of the "
                              "attack, the loss and their flags. list: print all methods. NAME --help: print the flags "
                              "of this method", choices=(*METHODS, "list"), metavar="NAME", fixed=False, named=False)
    recipe: str | None = flag("method", "training protocol. paper: epochs and learning rate of the ZeroGrad paper; "
                              "fastat: all hyperparameters of FastAT_Benchmark (see docs/methods.md). If --method and "
                              "--recipe set the same flag, --recipe decides", choices=RECIPES, fixed=False, named=False)

    data_dir: str = flag("data", "folder of the data set; if it holds none of the files, they are downloaded to it", "",
                         path, fixed=False, named=False)
    dummy: bool = flag("data", "use synthetic images instead of the data set: no files, no download", False,
                       scores=True, orders=True)
    train_samples: int | None = flag("data", "train on the first N training images only", None, number(int, 1),
                                     metavar="N", orders=True)
    val_size: int = flag("data", "hold the last N training images out and choose the best checkpoint on them; 0: "
                         "choose it on test images or, on SVHN, on the first 2%% of the training images, which are "
                         "trained on as well, as in the authors' scripts", 0,
                         number(int, 0), metavar="N", scores=True, orders=True)

    model: str = flag("model", "PreActResNet by depth, ResNet18, or WideResNet", "PreActResNet18",
                      choices=MODELS)
    base_width: int = flag("model", "channels of the first layer of PreActResNet and ResNet18", 64,
                           number(int, 1, 1024))
    depth: int = flag("model", "layers of WideResNet: 6n + 4, such as 28, 34 or 40", 34, wide_depth)
    width_factor: int = flag("model", "width of WideResNet", 10, number(int, 1, 64))
    shortcut: str = flag("model", "input of the convolutions in PreActResNet's shortcuts: activated (after BatchNorm "
                         "and ReLU) or raw (before them, as in fast_adversarial; only PreActResNet18 and 34)",
                         "activated",
                         choices=("activated", "raw"))
    no_final_norm: bool = flag("model", "PreActResNet without BatchNorm and ReLU before its last layer", False,
                               convert=lambda value, args: not value)
    block: str = flag("model", "block of ResNet18: standard, or nuat (a ReLU also before the addition, as in NuAT)",
                      "standard", choices=("standard", "nuat"))
    mean: tuple[float, ...] | None = flag("model", "normalization: subtracted from the pixels (default: the data "
                                          "set's)", None, triple, metavar="R,G,B")
    std: tuple[float, ...] | None = flag("model", "normalization: divides the centered pixels (default: the data "
                                         "set's)", None, positive_triple, metavar="R,G,B")

    epochs: int = flag("training", "number of epochs", None, number(int, 1, 10**6))
    batch_size: int = flag("training", "images in a training step, over all processes", 128, number(int, 1, 10**6),
                           orders=True)
    pad_mode: str | None = flag("training", "padding of the images before the crop (default: the data set's)", None,
                                choices=("reflect", "zero"))
    rotate: float | None = flag("training", "random rotation by up to ±DEGREES (default: the data set's)", None,
                                number(float, 0, 180), metavar="DEGREES")
    lr_schedule: str = flag("training", "learning rate over time. cyclic: linear up and down; onedrop: constant, then "
                            "a tenth; onecycle: PyTorch's OneCycleLR; onecycle-epoch: OneCycleLR, advanced once per "
                            "epoch instead of once per step",
                            choices=("cyclic", "onedrop", "onecycle", "onecycle-epoch"))
    lr_max: float = flag("training", "highest learning rate", None, number(float, 0))
    lr_drop: float = flag("training", "epoch at which the schedule onedrop drops", 50, number(float, 0))
    momentum: float = flag("training", "SGD's momentum (default: 0.9; with onecycle and onecycle-epoch 0.95)", None,
                           number(float, 0, 1))
    momentum_low: float = flag("training", "momentum at the highest learning rate: with all schedules but onedrop, the "
                               "momentum falls while the learning rate rises, and rises while the learning rate "
                               "falls (default: --momentum; with onecycle and onecycle-epoch 0.85)", None,
                               number(float, 0, 1))
    weight_decay: float = flag("training", "SGD's weight decay, on all parameters", 5e-4, number(float, 0))
    seed: int = flag("training", "seed of all random numbers", 0, number(int, 0, 2**32 - 1), orders=True, named=False)
    objective: str = flag("training", "training loss", "ce", choices=OBJECTIVES)
    gradalign_lambda: float = flag("training", "gradalign: weight of the penalty (default: as published for "
                                   "the data set and --epsilon)", None, number(float, 0))
    elle_lambda: float = flag("training", "elle: weight of the penalty (default: as published for --epsilon; with "
                              "--elle-adaptive, 4000)", None, number(float, 0))
    elle_adaptive: bool = flag("training", "ELLE-A: the penalty weight of elle starts at 0. A batch whose penalty "
                               "exceeds the mean of the earlier batches' penalties (three or more) by more than 2 "
                               "standard deviations sets it to --elle-lambda; any other batch multiplies it by 0.99",
                               False)
    aaer_lambdas: tuple[float, ...] = flag("training", "aaer: weights lambda_1 of the penalty, lambda_2 of its loss "
                                           "term, lambda_3 of its logit term (default: the published values: "
                                           "on CIFAR-100 and Tiny-ImageNet those for CIFAR-100, else those for "
                                           "CIFAR-10; for the published epsilon nearest to --epsilon; attacks that "
                                           "clip to the ball have other values than attacks that do not)", None, triple,
                                           metavar="L1,L2,L3")
    trades_beta: float = flag("training", "trades: weight of the divergence", 6.0, number(float, 0))
    nuclear_lambda: float = flag("training", "weight of the nuclear norm in NuAT's attack (nuclear) and in its loss",
                                 4.5, number(float, 0))
    guided_lambda: float = flag("training", "weight of the change of probabilities in GAT's attack (guided) and in "
                                "its loss", 10.0, number(float, 0))
    logits_lambda: float = flag("training", "weight of the difference of logits in the loss of FGSM-MEP (pgi) and "
                                "FGSM-UAP (uap, cuap, fuap)", 10.0, number(float, 0))
    liet_smoothing: float = flag("training", "non-uniform label smoothing in LIET's attack and in its loss (default: "
                                 "0.6; on CIFAR-100 0.8; above epsilon 8, 0.4)", None, number(float, 0, 1))
    liet_lambda: float = flag("training", "LIET: weight of the divergence; it grows linearly from epoch to epoch and "
                              "reaches this value in the last epoch (default: 100; on CIFAR-100 200; above epsilon 8, "
                              "20)", None, number(float, 0))
    pco_lambda: float = flag("training", "weight of the difference of logits in FGSM-PCO's loss", 10.0,
                             number(float, 0))
    pco_scale: float = flag("training", "factor of the new perturbation in FGSM-PCO's blend with the previous one", 1.5,
                            number(float, 0))
    smooth_lambda: float = flag("training", "smooth (ConvergeSmooth): weight of the penalty on a change of the loss L "
                                "from its mean in the previous epoch", 1.0, number(float, 0))
    smooth_gap: float = flag("training", "smooth: no penalty while L differs from its mean in the previous epoch by "
                             "this or less", 0.03, number(float, 0))
    smooth_at: str = flag("training", "smooth: where L is computed: at clean images, or at the attack's starting point",
                          "clean", choices=("clean", "start"))
    label_smoothing: float = flag("training", "label smoothing of the training loss and, for pgi, pco, uap, cuap and "
                                  "fuap, of the attack's loss", 0.0, number(float, 0, 1))
    ema: float = flag("training", "decay of an exponential moving average of the weights and BatchNorm's statistics; "
                      "the average is evaluated and saved; 0: no average", 0.0, number(float, 0, 1), metavar="DECAY")

    attack: str = flag("attack", "perturbation of the training images", "multigrad", choices=ATTACKS)
    epsilon: float = flag("attack", "radius of the ball in 1/255, in training and in evaluation", 8.0, in_255ths,
                          scores=True)
    norm: str = flag("attack", "norm of the ball, in training and in evaluation; l_2 works with the attacks fgsm, pgd, "
                     "none and sora, and with the objective ce", "l_inf", choices=NORMS, scores=True)
    eps_warmup: float = flag("attack", "epochs over which epsilon and the attack's step size grow linearly from 0 (not "
                             "--uap-alpha; the step size of atas only in its first --atas-warmup epochs)", 0.0,
                             number(float, 0), metavar="EPOCHS")
    fgsm_alpha: float = flag("attack", "step size of single-step attacks, in epsilons (default: 2; 1 for nfgsm, pgi, "
                             "pco, nuclear, guided, n_lap, liet, uap, cuap, fuap; 1.25 for ckpt, r_lap)", None,
                             number(float, 0), convert=lambda value, args: value * args.epsilon / 255)
    attack_smoothing: float = flag("attack", "label smoothing of the attack's loss, for fgsm, zerograd, multigrad, "
                                   "nfgsm, ckpt, nuclear and guided", 0.0, number(float, 0, 1))
    fgsm_init: str = flag("attack", "starting point of fgsm, zerograd, r_lap and, in training, pgd", "random",
                          choices=("zero", "random"))
    zero_qval: float = flag("attack", "zerograd: fraction of each image's gradient entries that are set to 0", None,
                            number(float, 0, 1))
    zero_iters: int = flag("attack", "attack steps of zerograd", 1, number(int, 1))
    multi_samps: int = flag("attack", "number of random points at which multigrad computes gradients", 3,
                            number(int, 1, 1000))
    multi_th: int = flag("attack", "number of multigrad's gradients that must agree in sign; -1: all", -1,
                         number(int, 1, also=(-1,)),
                         convert=lambda value, args: args.multi_samps if value == -1 else value)
    multi_parallel: bool = flag("attack", "compute the gradients of multigrad at all random points as one batch", False)
    pgd_alpha: float = flag("attack", "PGD's step size in 1/255, in training and in evaluation (default: 2; for l_2 "
                            "15)", None, number(float, 0), scores=True,
                            convert=lambda value, args: trained_step(args) / 255)
    pgd_step: float | None = flag("attack", "step size of pgd and kl (TRADES) in training, in epsilons (default: "
                                  "--pgd-alpha, which is in 1/255)", None, number(float, 0))
    pgd_iters: int = flag("attack", "attack steps of pgd and kl (TRADES) in training", 10, number(int, 1))
    noise_k: float = flag("attack", "radius of the noise of nfgsm and n_lap, in epsilons (default: 2; 3 on SVHN if "
                          "epsilon >= 12; 4 for WideResNet if epsilon >= 16)", None, number(float, 0))
    ckpt_count: int = flag("attack", "ckpt: number of parts into which the perturbation is divided", 3, number(int, 2))
    ckpt_mode: str = flag("attack", "ckpt: mode of the network in the forward and backward pass at the starting point; "
                          "train: as in FastAT_Benchmark", "eval", choices=("eval", "train"))
    free_replays: int = flag("attack", "free: training steps per batch; an epoch keeps its number of training steps, "
                             "so it covers fewer images", 8, number(int, 1))
    pgi_reset: int = flag("attack", "pgi (FGSM-MEP): number of epochs between two resets of the stored perturbations",
                          40, number(int, 1))
    atas_c: float = flag("attack", "atas: c in the step size 16/255 / (1 + sqrt(v) / c); v: moving average of the "
                         "squared norm of an image's gradient", 0.01, number(float, 1e-9))
    atas_warmup: int = flag("attack", "atas: number of first epochs in which the step size is epsilon", 5,
                            number(int, 0))
    atas_reset: int = flag("attack", "atas: number of epochs between two resets of the stored perturbations", 10,
                           number(int, 1))
    uap_alpha: float = flag("attack", "uap, cuap, fuap: step size of the universal perturbations and bound "
                            "on their entries, in 1/255", 10.0, in_255ths, convert=lambda value, args: value / 255)
    uap_decay: float = flag("attack", "uap, cuap, fuap: decay of the momentum of the universal perturbations", 0.3,
                            number(float, 0, 1))
    fuap_rows: int = flag("attack", "fuap: number of universal perturbations, one for each group of similar "
                          "features", 50, number(int, 1))
    lap_beta: float = flag("attack", "LAP: length of the first layer's move, as a fraction of the norm of its weights "
                           "(default: as published for --epsilon)", None, number(float, 0))
    lap_up: bool = flag("attack", "LAP: move the weights up the loss, as in LAP's paper (default: down, as in its "
                        "authors' code)", False)
    liet_noise: tuple[float, ...] = flag("attack", "LIET: range of the fraction of noise entries in the starting "
                                         "point; the fraction is drawn for each batch (default: 0.1 to 0.5; above "
                                         "epsilon 8, 0 to 1)", None, shares, metavar="LO,HI")
    liet_every: int = flag("attack", "LIET: number of batches between two updates of the classes' perturbations "
                           "(default: 20; on CIFAR-10 above epsilon 8, 10)", None, number(int, 1))

    test_samples: int = flag("evaluation", "number of test images in the evaluation after each epoch", 1000,
                             number(int, 1), metavar="N", fixed=True, scores=True)
    last_samples: int | None = flag("evaluation", "number of test images in the evaluation after the last epoch, "
                                    "--test-samples or more (default: all)", None, number(int, 1), metavar="N",
                                    named=False)
    full_test: bool = flag("evaluation", "evaluate on all test images after every epoch", False, fixed=True,
                           scores=True)
    test_iters: int = flag("evaluation", "PGD steps in the evaluation after each epoch", 10, number(int, 1), fixed=True,
                           scores=True)
    test_restarts: int = flag("evaluation", "PGD restarts in the evaluation after each epoch", 1, number(int, 1),
                              fixed=True, scores=True)
    final_iters: int = flag("evaluation", "PGD steps in the final evaluation, which follows the evaluation after the "
                            "last epoch; 0: no final evaluation", 50,
                            number(int, 0), named=False)
    final_restarts: int = flag("evaluation", "PGD restarts in the final evaluation", 10, number(int, 1), named=False)
    final_samples: int | None = flag("evaluation", "number of test images in the final evaluation (default: all)", None,
                                     number(int, 1), metavar="N", named=False)
    on_collapse: str = flag("evaluation", "on catastrophic overfitting, print a warning and continue, or stop the run "
                            "with exit status 1", "warn", choices=("warn", "stop"), named=False)
    final_model: str = flag("evaluation", "network for the final evaluation: last, or best (highest PGD accuracy after "
                            "an epoch)", "last", choices=("last", "best"))
    eval: bool = flag("evaluation", "do not train: evaluate the network that --resume names", False, named=False)

    fname: str = flag("files", "folder of the logs and checkpoints, created if it is missing; every run needs its own. "
                       "Files of an earlier run in it are moved to earlier_N/", "", path)
    like: str | None = flag("files", "repeat this run: take its flags that differ from the defaults of its method, "
                            "recipe and data set, except --data-dir and the flags of the groups files and machine. "
                            "Given flags override the run's. With --method, the run's "
                            "--attack, --objective and all flags that attacks or objectives read are not taken, except "
                            "--epsilon, --norm and --pgd-alpha", None, path, metavar="RUN")
    resume: int | str = flag("files", "N: continue after N epochs, from model_{N-1}.pth and opt_{N-1}.pth; auto: "
                             "continue from the newest complete state, or begin a new run if there is none", 0,
                             number(int, 0, also=("auto",)), metavar="N|auto")
    quiet: bool = flag("files", "print warnings and errors only", False)
    tensorboard: bool = flag("files", "also write the metrics of every epoch for TensorBoard", False)
    allow_changes: bool = flag("files", "allow --resume with flags that differ from the run's", False)
    chkpt_iters: int = flag("files", "number of epochs between two files model_E.pth", 10, number(int, 1))
    chkpt_steps: int | None = flag("files", "also save the state every N training steps", None, number(int, 1),
                                   metavar="N")

    device: str = flag("machine", "auto, cpu, cuda or cuda:N", "auto", named=False)
    amp: bool = flag("machine", "mixed precision in training and in attacks", False, negatable=True, fixed=True)
    amp_dtype: str = flag("machine", "the lower precision of --amp", "bfloat16", choices=("bfloat16", "float16"),
                          fixed=True)
    amp_impl: str = flag("machine", "library of --amp: torch.amp or apex.amp", "native", choices=("native", "apex"),
                         fixed=True)
    tf32: bool = flag("machine", "on CUDA, train with convolutions in TF32, as PyTorch does by default; --no-tf32: in "
                      "full float32", True, negatable=True)
    compile: bool = flag("machine", "compile the network with torch.compile for training", False, negatable=True,
                         named=False)
    compile_mode: str = flag("machine", "mode of torch.compile; all but the default use CUDA graphs", "default",
                             choices=("default", "reduce-overhead", "max-autotune"), named=False)
    deterministic: bool = flag("machine", "make runs on CUDA bit-identical for a given seed, as runs on a CPU are; "
                               "slower", False, named=False)
    sync_bn: bool = flag("machine", "under torchrun on CUDA: BatchNorm over the images of all processes", False,
                         fixed=True)

    data_set: str = ""
    statement: dict[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    dropped: dict[str, Any] = field(default_factory=dict)

    def flags(self) -> dict[str, Any]:
        """Return all flags by name, and the data set."""
        return {name: value for name, value in vars(self).items() if name in FLAGS or name == "data_set"}

    def keywords(self, keywords: dict[str, str]) -> dict[str, Any]:
        """Return the values of keywords (keyword -> flag, see methods.py), each in the unit of the function."""
        values = {}
        for keyword, name in keywords.items():
            convert = FLAGS[name].metadata["convert"]
            values[keyword] = convert(getattr(self, name), self) if convert else getattr(self, name)
        return values

    def keep_defaults(self, before: dict[str, Any]) -> list[str]:
        """For flags that the user did not give, take the defaults of the version that began the run. Returns notes.

        before: flags of the run.
        """
        same = all(before.get(name) == getattr(self, name) for name in ("method", "recipe"))
        if not before or "ckpt_mode" in before or not same:
            return []
        defaults = {name: each.default for name, each in FLAGS.items() if name not in before} | FORMER_DEFAULTS
        values = {**defaults, **{name: before[name] for name in CHANGED_DEFAULTS if name in before}}
        notes = []
        for name in values.keys() - self.given:
            value = DEPENDENT[name](self) if values[name] is None and name in DEPENDENT else values[name]
            if value != getattr(self, name) and name not in method_flags() - in_effect(self).keys():
                notes.append(f"{option(name)}={value}, as in the version that started the run")
            setattr(self, name, value)
        return sorted(notes)

    @staticmethod
    def completed(before: dict[str, Any]) -> dict[str, Any]:
        """Return a run's flags, completed by the defaults of missing flags, unless these depend on other flags."""
        defaults = {name: each.default for name, each in FLAGS.items() if each.default is not None}
        return {**defaults, **FORMER_DEFAULTS, **before} if before else {}

    def changed(self, before: dict[str, Any], trait: str) -> list[str]:
        """Return the flags with `trait` (see `flag`) whose value differs from `before`, the flags of the saved run.

        Flags that `before` lacks count as equal. Flags that the user gave come first, flags whose default depends on
        other flags last.
        """
        names = [name for name, each in FLAGS.items() if each.metadata[trait]
                 and before.get(name, getattr(self, name)) != getattr(self, name)]
        return sorted(names, key=lambda name: (name not in self.given, name in DEPENDENT))


FLAGS = {each.name: each for each in dataclasses.fields(Args) if each.metadata}
# Flags whose default, set by a method or a recipe, was different in older versions; and flags that older versions
# lacked, with the value that reproduces their runs.
CHANGED_DEFAULTS = ("eps_warmup", "lr_max", "lr_schedule", "noise_k")
FORMER_DEFAULTS = {"ckpt_mode": "train"}
NETWORK = tuple(name for name, each in FLAGS.items() if each.metadata["group"] == "model")


def option(name: str) -> str:
    """Return the spelling of a flag on the command line."""
    return f"--{name.replace('_', '-')}"


def trained_step(args: Args) -> float:
    """Return the step size of pgd and kl in training, in 1/255."""
    return args.pgd_alpha if args.pgd_step is None else args.pgd_step * args.epsilon


# The parser


class Help(argparse.RawDescriptionHelpFormatter):
    """Keep the description's line breaks; append informative defaults."""

    def _get_help_string(self, action: argparse.Action) -> str:
        # "(default: ": also because BooleanOptionalAction of Python 3.10 appends its default to the help
        silent = action.default is None or action.default is False or action.default in ("", argparse.SUPPRESS)
        unstated = action.option_strings and not silent and "(default: " not in (action.help or "")
        return (action.help or "") + (" (default: %(default)s)" if unstated else "")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without a usage text."""

    def __init__(self, description: str | None, **options: Any):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            message += did_you_mean(similar(unknown[1], self._option_string_actions))
        self.exit(2, printable(f"{self.prog}: error: {' '.join(message.split())}\n"))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, not_a_choice(action.dest, value, list(action.choices)))

    def print_help(self, file=None) -> None:
        print_answer(self.format_help().rstrip())


# Common flag of other programs -> flag of this project, for "did you mean".
FOREIGN = {"gpu": "device", "gpus": "device", "cuda": "device", "arch": "model", "dataset": "data-dir",
           "learning-rate": "lr-max", "output": "fname", "out": "fname"}


def similar(name: str, names: Iterable[str]) -> list[str]:
    """Return the names closest to an unknown `name`: words that begin with it, else the nearest spelling."""
    plain = {each.strip("-").lower(): each for each in names}
    word = name.strip("-").lower().replace("_", "-")
    if FOREIGN.get(word) in plain:
        return [plain[FOREIGN[word]]]
    longer = [each for short, each in plain.items() if f"-{word}" in f"-{short}"]
    near = difflib.get_close_matches(word, plain, 1, 0.7)
    return longer[:3] or [plain[each] for each in near]


def did_you_mean(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def absent(path: Path) -> UsageError:
    """Return the error about a path that does not exist."""
    near = similar(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])
    return UsageError(f"{path} is missing{did_you_mean([str(path.parent / name) for name in near])}")


def not_a_choice(name: str, value: Any, choices: list[str]) -> str:
    """Return the error about an invalid choice. It suggests flags (method, attack, objective) that have this value."""
    def plain(text: Any) -> str:
        return re.sub("[-_]", "", str(text).lower())

    swapped = ("method", "attack", "objective")
    meant = [f"{option(other)}={choice}" for other in dict.fromkeys((name, *(swapped if name in swapped else ())))
             for choice in (choices if other == name else FLAGS[other].metadata["choices"])
             if plain(choice) == plain(value)]
    near = difflib.get_close_matches(str(value), choices, 1, 0.7)
    return (f"must be one of {', '.join(choices)}, not {value}"
            + did_you_mean(meant or [f"{option(name)}={each}" for each in near]))


def print_answer(text: str) -> None:
    """Print what the user asked for; if standard output cannot be written, end the process."""
    with one_line_errors():
        say(text, needed=True)


def add_flags(p: Parser, names: Collection[str] = FLAGS, one_group: Callable[..., Any] | None = None) -> None:
    """Add flags of `Args` in their groups or, if `one_group` is given (add_argument of a group), all to that group."""
    for group, title in GROUPS.items():
        chosen = [each for name, each in FLAGS.items() if name in names and each.metadata["group"] == group]
        if not chosen:
            continue
        add = one_group or p.add_argument_group(title).add_argument
        for each in chosen:
            settings = {name: each.metadata[name] for name in ("parse", "choices", "metavar")}
            common = dict(default=each.default, help=each.metadata["help"])
            if isinstance(each.default, bool):
                action = argparse.BooleanOptionalAction if each.metadata["negatable"] else "store_true"
                add(option(each.name), action=action, **common)
            else:
                add(option(each.name), type=settings.pop("parse"), **settings, **common)


def add_table_flags(add: Callable[..., Any]) -> None:
    """Add the flags of tables that compare runs. add: add_argument of a parser or of one of its groups."""
    add("--by-seed", action="store_true", help="print one row per seed (default: runs that differ only in the "
        "seed share a row, mean ± deviation)")
    add("--csv", type=new_file, metavar="FILE", help="also write the table to this file, as CSV")
    add("--latex", type=new_file, metavar="FILE", help="also write the table to this file, for LaTeX")


def parser(dataset: DataSet, description: str | None) -> Parser:
    """Return the command-line parser of the script that trains on `dataset`."""
    p = Parser(description, add_help=False, usage="%(prog)s [flags]")
    p.add_argument("-h", "--help", action="store_true", help="print this text; with --method NAME, that method's flags")
    add_flags(p)
    p.set_defaults(data_set=dataset.name, **dataset.flags())
    return p


def parse(dataset: DataSet, description: str | None = None, argv: list[str] | None = None) -> Args:
    """Parse the command line of the script that trains on `dataset`. Exits on --help, --method list and wrong flags."""
    if argv is None:
        end_on_interrupt()
    p = parser(dataset, description)
    named, _ = p.parse_known_args(argv)
    if named.help or named.method == "list":
        print_answer(methods_table(dataset) if named.method == "list" else
                     method_help(dataset, argv) if named.method else p.format_help().rstrip())
        p.exit()
    unset = object()
    values = vars(p.parse_args(argv, argparse.Namespace(**dict.fromkeys(FLAGS, unset))))
    given = {name: values[name] for name in FLAGS if values[name] is not unset}
    try:
        run = evaluated_flags(dataset, named.fname) if named.eval else {}
        for line in differing({name: given[name] for name in given.keys() - {*RUNS, "seed"}}, run):
            say(f"# {line}", error=True)
        return arguments(dataset, given, run)
    except UsageError as error:
        p.error(str(error))


def arguments(dataset: DataSet, given: dict[str, Any], run: dict[str, Any] | None = None) -> Args:
    """Return the arguments of a run. Raises UsageError if a flag is wrong.

    Precedence, highest first: given flags; flags of the run that --like names; --recipe; --method; `run`; the data set;
    the field's default. A value that the attack or the objective requires replaces the recipe's value, and fills in a
    flag that has no value from any of these; it replaces nothing else.

    Args:
        given: flags of the user.
        run: flags of the run that is evaluated (see `evaluated_flags`).
    """
    if given.get("like"):
        given = {**flags_like(given["like"], dataset, "method" in given), **given}
    given = {name: valid(name, value) for name, value in given.items()}
    method, recipe = given.get("method"), given.get("recipe")
    of_method = METHODS[method].flags_on(dataset.name) if method else {}
    of_recipe = RECIPES[recipe].flags_on(dataset.name, method) if recipe else {}
    values = {**{name: each.default for name, each in FLAGS.items()}, **dataset.flags(), **(run or {}), **of_method,
              **of_recipe, **given}
    required = {**ATTACKS[values["attack"]].requires, **OBJECTIVES[values["objective"]].requires}
    dropped = {name: value for name, value in of_recipe.items()
               if name not in given and required.get(name, value) != value}
    values |= {name: value for name, value in required.items() if name in dropped or values[name] is None}
    args = Args(**values, data_set=dataset.name, statement=dataset.statement(), given=frozenset(given), dropped=dropped)
    for name, default in DEPENDENT.items():
        if getattr(args, name) is None:
            setattr(args, name, default(args))
    check(args)
    return args


def valid(name: str, value: Any) -> Any:
    """Convert and check a flag's value, as the command line does. Raises UsageError if the value is wrong."""
    if name not in FLAGS:
        raise UsageError(f"there is no flag {option(name)}" + did_you_mean(similar(name, map(option, FLAGS))))
    settings, usual = FLAGS[name].metadata, FLAGS[name].default
    if value is None and usual is None:
        return None
    if isinstance(usual, bool):
        if not isinstance(value, bool):
            raise UsageError(f"{option(name)} must be true or false, not {value}")
        return value
    if settings["choices"]:
        if value not in tuple(settings["choices"]):
            raise UsageError(f"{option(name)} {not_a_choice(name, value, list(settings['choices']))}")
        return value
    try:
        return (settings["parse"] or str)(",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{option(name)} {error}") from None


def recorded_flags(flags: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Convert and check the flags of a run, read from the file `source`. Raises UsageError if a value is wrong."""
    needed = vars(arguments(CIFAR10, {}))
    for name in flags.keys() & FLAGS.keys() - {"on_collapse"}:  # older runs may have a choice that no longer exists
        if flags[name] is None and needed[name] is not None:
            raise UsageError(f"{source}: {option(name)} has no value")
        try:
            flags = {**flags, name: valid(name, flags[name])}
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None
    return flags


def evaluated_flags(dataset: DataSet, folder: str) -> dict[str, Any]:
    """Return the flags that --eval takes from the run in `folder`; {} if the run is on another data set."""
    run = run_flags(folder)
    if run.get("data_set") != dataset.name:
        return {}
    own = {name for name, each in FLAGS.items() if each.metadata["group"] in ("files", "machine")}
    return {name: value for name, value in run.items() if name in FLAGS.keys() - own - {"eval", "method", "recipe"}}


def flags_like(source: str, dataset: DataSet, new_method: bool) -> dict[str, Any]:
    """Return the flags that repeat a run: those that differ from the defaults of its method, recipe and data set.

    Args:
        source: folder of the run, or its args.json.
        dataset: data set of the script.
        new_method: leave out the run's attack and objective, with their flags, except norm and pgd_alpha.

    Raises:
        UsageError: there is no such run, or a flag is wrong.
    """
    if not Path(source).exists():
        raise absent(Path(source))
    run, stated = recorded(source)
    if not run:
        raise UsageError(f"--like {source} is not the folder of a run: it has no args.json")
    if run["data_set"] == OWN != dataset.name:
        raise UsageError(f"--like {source}: this run is on a network and images of your own; only train() in "
                         f"Python can repeat it")
    gone = [option(name) for name in run if name not in (*FLAGS, "data_set")]
    if gone:
        say(f"# --like {source}: {', '.join(gone)} ignored: no longer supported", error=True)
    own = dataset if run["data_set"] == dataset.name else stated or data_set(run["data_set"])
    try:
        chosen = repeated(run, own)
    except UsageError as error:
        raise UsageError(f"--like {source}: {error}") from None
    if not new_method:
        return chosen
    of_method = {"method", "attack", "objective", *method_flags()} - {*NETWORK, "norm", "pgd_alpha"}
    return {name: value for name, value in chosen.items() if name not in of_method}


def repeated(run: dict[str, Any], dataset: DataSet) -> dict[str, Any]:
    """Return the flags of a run that differ from the defaults of its method, recipe and data set.

    Leaves out the flags of files and machine. Raises UsageError if a flag is wrong.
    """
    flags = {name: run[name] for name, each in FLAGS.items()
             if name in run and each.metadata["group"] not in ("files", "machine") and name not in ("data_dir", "eval")}
    chosen: dict[str, Any] = {name: flags[name] for name in ("method", "recipe") if name in flags}
    for names in ([name for name in FLAGS if name not in DEPENDENT], DEPENDENT):  # those depend on the other flags
        usual = arguments(dataset, chosen)
        chosen |= {name: flags[name] for name in names if name in flags and flags[name] != getattr(usual, name)}
    return chosen


def run_flags(folder: str | Path) -> dict[str, Any]:
    """Return the flags in args.json of the run in `folder`; {} without args.json."""
    return recorded(folder)[0]


def recorded(folder: str | Path) -> tuple[dict[str, Any], DataSet | None]:
    """Return flags and data set in args.json of the run in `folder`; {} and None without args.json.

    `folder` can also be the path of an args.json.
    """
    file = Path(folder) if Path(folder).is_file() else Path(folder) / "args.json"
    wrong = UsageError(f"{file} is damaged: repair it, or move it away and give the run's flags")
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError):
        raise wrong from None
    return described(text, file, wrong)


def described(text: str, source: str | Path, wrong: UsageError) -> tuple[dict[str, Any], DataSet | None]:
    """Return flags and data set of a run from `text`, the content of `source`. Raises `wrong` if it is damaged.

    A relative --data-dir is resolved from the folder in which the run was launched, if that folder exists. Older runs
    recorded neither this folder nor the description of their data set; the returned data set is then None.
    """
    try:
        saved = json.loads(text)
        flags = {**saved["args"], "data_set": str(saved["data_set"])}
        started_in = [start["folder"] for start in saved.get("starts", ()) if "folder" in start]
        if started_in and os.path.isdir(started_in[-1]) and not os.path.isabs(flags["data_dir"]):
            flags["data_dir"] = os.path.relpath(os.path.join(started_in[-1], flags["data_dir"]))
        dataset = DataSet.stated(saved["statement"]) if "statement" in saved else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, argparse.ArgumentTypeError):
        raise wrong from None
    return recorded_flags(flags, source), dataset


def differing(given: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """Return lines to print about given flags that override those of a run."""
    def text(value: Any) -> str:
        if value is None or isinstance(value, bool):
            return {None: "default", True: "on", False: "off"}[value]
        return ",".join(map(text, value)) if isinstance(value, (tuple, list)) else \
            f"{value:g}" if isinstance(value, float) else str(value)

    # evaluate.py gives epsilon as --epsilons, so epsilon has no dashes.
    return [f"{'epsilon' if name == 'epsilon' else option(name)} {text(value)} instead of the run's {text(run[name])}"
            for name, value in given.items() if name in run and run[name] != value]


def parse_evaluation(description: str | None = None, argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of evaluate.py; flags of the run that were not given are None."""
    if argv is None:
        end_on_interrupt()
    p = Parser(description)
    p.add_argument("runs", nargs="*", type=path, metavar="RUN_OR_FILE", help="folder of a run, or file of a network")
    add = p.add_argument_group("a network of your own").add_argument
    add("--network", type=function_name, metavar="PACKAGE.MODULE:FUNCTION", help="function that returns a network, "
        "whose input is images in [0, 1], or images normalized by --mean and --std; needs --data-set")
    add("--weights", type=path, metavar="FILE", help="state dict of --network (default: the function's weights)")
    add = p.add_argument_group("measurement").add_argument
    add("--attacks", type=attack_names, default="clean,fgsm,pgd-50-10", metavar="NAME,...",
        help="clean, fgsm (from zero, a step of epsilon), pgd-STEPS-RESTARTS (steps of epsilon/4), "
        "pgd-STEPS-RESTARTS-SIZE (SIZE: step size in 1/255), cw (PGD-50-10 on the margin), autoattack, or one of its "
        "parts: apgd-ce, apgd-t, fab-t, square")
    add("--epsilons", type=radii, metavar="E,...", help="radii of the ball in 1/255 (default: the run's, or 8)")
    add("--norm", choices=NORMS, help="norm of the ball (default: the run's, or l_inf)")
    add("--samples", type=number(int, 1), metavar="N", help="the first N test images (default: all)")
    add("--seed", type=number(int, 0, 2**32 - 1), help="seed of the random starts (default: the run's, or 0)")
    add("--which", default="last", metavar="NAME", help="network to load. Of a run: last (the default), best "
        "(model_best.pth) or healthy (newest that is not in collapse). Of a file with several networks: the network's "
        "key (default: last, if there is this key, else the first network)")
    add("--out", type=path, metavar="FOLDER", help="folder of evaluation.json (default: the run's, or the file's)")
    add("--again", action="store_true", help="rerun attacks that already have a result in evaluation.json")
    add_table_flags(p.add_argument_group("table that compares the networks").add_argument)
    add = p.add_argument_group(DATA_AND_MODEL).add_argument
    add("--data-set", choices=DATA_SETS, help="data set on which the network was trained")
    add_flags(p, RUNS, add)
    p.set_defaults(**dict.fromkeys(RUNS))
    add = p.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--batch-size", type=number(int, 1, 10**6), help="images in an evaluation batch (default: 128; on CUDA up "
        "to 512, as its memory allows)")
    add("--amp", action="store_true", help="run PGD, FGSM and CW in mixed precision; results are confirmed in float32")
    add("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="the lower precision of --amp")
    add("--tf32", action="store_true", help="on CUDA, run PGD, FGSM and CW with convolutions in TF32; results are "
        "confirmed in float32")
    p.set_defaults(amp_impl="native", deterministic=False)
    args = p.parse_args(argv)
    if not args.runs and not args.network:
        p.error("the following arguments are required: RUN_OR_FILE, or --network")
    if args.weights and not args.network:
        p.error("--weights works only with --network: give the file of a network as RUN_OR_FILE instead")
    return args


DATA_AND_MODEL = ("data and model (default: as recorded in the run or the file; without a record, --data-set is "
                  "required, and the default network is PreActResNet18 of base width 64)")

# Flags of data and model that evaluate.py takes from a run.
RUNS = ("data_dir", "dummy", *NETWORK)


def export_path(text: str) -> str:
    """An argparse type: the path of a safetensors file, or of a folder, ending in a slash."""
    if not text.endswith((".safetensors", "/")):
        raise argparse.ArgumentTypeError(f"must end in .safetensors, or be a folder that ends in /, not {text!r}")
    return path(text)


def identifier(text: str) -> str:
    """An argparse type: a Python identifier."""
    if not text.isidentifier():
        raise argparse.ArgumentTypeError(f"must be of letters, digits and _, such as Author2026Title, not {text!r}")
    return text


def parse_export(description: str | None = None, argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of export.py; flags of the run that were not given are None."""
    if argv is None:
        end_on_interrupt()
    p = Parser(description)
    p.add_argument("run", type=path, metavar="RUN_OR_FILE", help="folder of a run, or file of a network")
    p.add_argument("--to", type=export_path, required=True, metavar="FILE.safetensors|FOLDER/",
                   help="FILE.safetensors: write the weights, with the metadata to rebuild the network, and a model "
                   "card FILE.md. FOLDER/: write a folder in RobustBench's layout")
    p.add_argument("--half", action="store_true",
                   help="FILE.safetensors: write the weights in float16, which halves the file")
    p.add_argument("--name", type=identifier, help="name of the network in RobustBench, such as Author2026Title "
                   "(default: from the method and the network)")
    p.add_argument("--which", default="last", metavar="NAME", help="network to load. Of a run: last (the default), "
                   "best (model_best.pth) or healthy (newest that is not in collapse). Of a file with several "
                   "networks: the network's key (default: last, if there is this key, else the first network)")
    add = p.add_argument_group(DATA_AND_MODEL).add_argument
    add("--data-set", choices=DATA_SETS, help="data set on which the network was trained")
    add_flags(p, NETWORK, add)
    p.set_defaults(**dict.fromkeys(NETWORK))
    args = p.parse_args(argv)
    if args.half and args.to.endswith("/"):
        p.error("--half works only with --to=FILE.safetensors: leave it out")
    return args


# What flags mean for one run


def in_effect(args: Args) -> dict[str, Any]:
    """Return attack and objective of a run, with the flags that they read."""
    names = ["attack", *ATTACKS[args.attack].flags, "epsilon", "objective", *OBJECTIVES[args.objective].flags]
    return {name: getattr(args, name) for name in dict.fromkeys(names)}


def idle_flags(args: Args) -> list[str]:
    """Return notes about given flags that this run ignores, and about values that exceed --epochs."""
    used = {*in_effect(args), *MODELS[args.model].values(), "pgd_alpha", "norm"}
    ignored = {
        f"with --attack={args.attack}, --objective={args.objective}, --model={args.model}": method_flags() - used,
        f"with --lr-schedule={args.lr_schedule}": {"momentum_low" if args.lr_schedule == "onedrop" else "lr_drop"},
        "without --amp": {"amp_dtype", "amp_impl"} if not args.amp else {},
        "without --compile": {"compile_mode"} if not args.compile else {},
        "with --final-iters=0": {"final_restarts", "final_samples", "final_model"} if not args.final_iters else {},
        "with --full-test": {"test_samples", "last_samples"} if args.full_test else {},
        "with --dummy": {"data_dir"} if args.dummy else {},
        "with --attack=none": {"eps_warmup"} if args.attack == "none" and args.objective != "elle" else {}}
    lines = [f"{option(name)} has no effect {why}" for why, names in ignored.items()
             for name in sorted(args.given.intersection(names))]
    if args.lr_schedule == "onedrop" and args.lr_drop >= args.epochs:
        lines.append(f"the learning rate never drops: --lr-drop={args.lr_drop:g} is not below --epochs={args.epochs}")
    if args.eps_warmup > args.epochs:
        lines.append(f"--eps-warmup={args.eps_warmup:g} exceeds --epochs={args.epochs}: training ends at epsilon "
                     f"{args.epsilon * args.epochs / args.eps_warmup:.3g}, and is evaluated at {args.epsilon:g}")
    return lines


def unit_hints(values: dict[str, Any]) -> list[str]:
    """Return warnings about values that look like the wrong unit. values: flag -> value."""
    hints = []
    for name, least in (("epsilon", 1.0), ("pgd_alpha", 0.05)):
        if 0 < (values.get(name) or 0) < least:
            hints.append(f"{option(name)}={values[name]:g} means {values[name]:g}/255: did you mean "
                         f"{255 * values[name]:.3g}?")
    if values.get("norm") == "l_2" and 1 <= values["epsilon"] < 32:
        hints.append(f"--epsilon={values['epsilon']:g} means {values['epsilon']:g}/255, a small radius for "
                     f"--norm=l_2: 128 is usual")
    epsilon = values.get("epsilon") or 8.0
    for name in ("fgsm_alpha", "pgd_step"):
        step = values.get(name) or 0
        in_pixels = 0 < step < 0.1 and (name == "fgsm_alpha" or step * (values.get("pgd_iters") or 1) < 1)
        if step > 4 or in_pixels:
            meant = 255 * step / epsilon if in_pixels and epsilon >= 1 else step / epsilon
            hints.append(f"{option(name)}={step:g} means {step:g} epsilons: did you mean {meant:.3g}?")
    for name in ("mean", "std"):
        if max(values.get(name) or (0,)) > 1:
            hints.append(f"{option(name)} is of pixels in [0, 1]: did you mean "
                         f"{','.join(f'{value / 255:.3g}' for value in values[name])}?")
    return hints


def reach_hints(attack: str, steps: int, alpha: float, epsilon: float) -> list[str]:
    """Return a note if PGD cannot reach the surface of the ball from its center, else []."""
    if steps * alpha >= epsilon * (1 - 1e-9) or not steps:
        return []
    return [f"{attack}: attack steps of {alpha:g}/255 cannot reach the surface of the ball, {epsilon:g}/255 from its "
            f"center, so the accuracy may be too high: use more or larger attack steps"]


def pgd_hints(args: Args) -> list[str]:
    """Return notes about PGD that is too weak, in training and in evaluation."""
    step = f"--pgd-alpha={args.pgd_alpha:g}"
    uses = [("test_iters", step, args.pgd_alpha), ("final_iters", step, args.pgd_alpha)]
    if "pgd_iters" in in_effect(args) and not args.eval:
        own = step if args.pgd_step is None else f"--pgd-step={args.pgd_step:g}"
        uses = [("pgd_iters", own, trained_step(args)), *uses]
    return [hint for name, shown, alpha in uses for hint in reach_hints(
        f"{option(name)}={getattr(args, name)} {shown}", getattr(args, name), alpha, args.epsilon)]


def method_flags() -> set[str]:
    """Return the flags that only some attacks, objectives or networks read."""
    attacks = {name for attack in ATTACKS.values() for name in attack.flags}
    objectives = {name for objective in OBJECTIVES.values() for name in objective.flags}
    return attacks | objectives | {name for keywords in MODELS.values() for name in keywords.values()}


def as_flags(values: dict[str, Any]) -> str:
    """Format flags as on the command line, without switches that are off and flags without a value."""
    def text(value: Any) -> str:
        return ",".join(map(text, value)) if isinstance(value, (tuple, list)) else \
            f"{value:.4g}" if isinstance(value, float) else str(value)

    return " ".join(option(name) + ("" if value is True else f"={text(value)}")
                    for name, value in values.items() if value is not False and value is not None)


PASSES = "a pass is one forward and one backward pass; a forward pass alone counts 1/3"


def methods_table(dataset: DataSet) -> str:
    """Return two lines for each method: its description, and the flags that it sets."""
    lines = [f"Passes: in a training step; {PASSES}.", "",
             f"{'--method':10} {'passes':>6}  {'source':17} description; flags that the method sets on {dataset.name}"]
    for name, method in METHODS.items():
        lines += [f"{name:10} {method.passes:>6}  {method.source:17} {method.text}",
                  f"{'':36}{as_flags(method.flags_on(dataset.name))}"]
    return "\n".join(lines)


def method_help(dataset: DataSet, argv: list[str] | None) -> str:
    """Return a method's description, source and passes, the flags that it sets, and the flags that it reads.

    argv: a command line with --method and --help; None: sys.argv[1:].
    """
    words = sys.argv[1:] if argv is None else argv
    args = parse(dataset, argv=[word for word in words if word not in ("-h", "--help")])
    assert args.method
    name, method = args.method, METHODS[args.method]
    schedule = {each: getattr(args, each) for each in ("epochs", "lr_schedule", "lr_max")}
    lines = [f"{name}: {method.text} ({method.source}).", f"Passes in a training step: {method.passes} ({PASSES}).", "",
             f"--method={name} sets on {dataset.name}:", "", f"  {as_flags(method.flags_on(dataset.name))}", "",
             f"With this command line, it trains on {dataset.name} with", "", f"  {as_flags(schedule)}", "",
             "and reads these flags:", ""]
    for each, value in in_effect(args).items():
        text = FLAGS[each].metadata["help"]
        if value is None or value is False:
            lines += [f"  {option(each)}", f"      {text}"]
        else:
            lines += [f"  {as_flags({each: value})}", f"      {text.partition(' (default: ')[0]}"]
    return "\n".join(lines)


def check(args: Args) -> None:
    """Raise UsageError if flags conflict, tensorboard is not installed or no folder for temporary files is writable."""
    try:
        tempfile.gettempdir()
    except OSError:
        raise UsageError("no folder for temporary files is writable: set TMPDIR to a writable folder") from None
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UsageError("--tensorboard needs the package tensorboard: pip install tensorboard")
    check_network(args)
    if args.multi_th > args.multi_samps:
        raise UsageError(f"--multi-th must be from 1 to --multi-samps ({args.multi_samps}), or -1, not {args.multi_th}")
    if args.sync_bn and args.compile:
        raise UsageError("--sync-bn does not work with --compile: leave one of them out")
    attack, objective = ATTACKS[args.attack], OBJECTIVES[args.objective]
    parallel = args.attack == "multigrad" and args.multi_parallel
    if objective.start and (not attack.start or parallel):
        raise UsageError(f"--objective {args.objective} needs the attack's starting point, with its logits; --attack "
                         f"{args.attack}{' --multi-parallel' if parallel else ''} has none: use --attack fgsm "
                         f"or nfgsm, for example")
    for name, record in ((f"--attack {args.attack}", attack), (f"--objective {args.objective}", objective)):
        if any(getattr(args, flag) != value for flag, value in record.requires.items()):
            needed = " and ".join(f"{option(flag)} {value:g}" if isinstance(value, float) else f"{option(flag)} {value}"
                                  for flag, value in record.requires.items())
            raise UsageError(f"{name} needs {needed}")
    if args.norm not in attack.norms or args.norm not in objective.norms:
        usable = ["/".join(name for name, each in records.items() if args.norm in each.norms)
                  for records in (ATTACKS, OBJECTIVES)]
        raise UsageError(f"--norm {args.norm} works only with --attack {usable[0]} and --objective {usable[1]}: the "
                         f"others have no published form for this norm")
    if attack.moves_weights and objective.start:
        raise UsageError(f"--objective {args.objective} needs the logits at the attack's starting point, but --attack "
                         f"{args.attack} changes the weights after it computes them: use --objective ce")
    if args.eval and args.resume == 0:
        raise UsageError("--eval needs a checkpoint: --resume N for model_{N-1}.pth, or --resume auto")
    if isinstance(args.resume, int) and args.resume > args.epochs and not args.eval:
        raise UsageError(f"--resume must be from 0 to --epochs ({args.epochs}), or auto, not {args.resume}")


def check_network(args: Args) -> None:
    """Raise UsageError if --shortcut, --block or --no-final-norm does not fit the network."""
    if args.shortcut == "raw" and args.model not in ("PreActResNet18", "PreActResNet34"):
        raise UsageError(f"--shortcut raw is for PreActResNet18 and 34, not {args.model}")
    if args.block == "nuat" and args.model != "ResNet18":
        raise UsageError(f"--block nuat is for ResNet18, not {args.model}")
    if args.no_final_norm and "final_norm" not in MODELS[args.model]:
        raise UsageError(f"--no-final-norm is for PreActResNets, not {args.model}")
