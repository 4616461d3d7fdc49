"""The command line: every flag of every script, grouped, with its default, its unit and the values it may have."""
import argparse
import os
from typing import NoReturn

import preactresnet
from attacks import ATTACKS, from_args
from data import DataSet
from precision import DTYPES
from utils import UsageError, cyclic_lr, number, onedrop_lr
from wideresnet import WideResNet

# A model by name: (arguments, num_classes=, mean=, std=) -> network.
MODELS = {
    **{f"PreActResNet{depth}": lambda args, depth=depth, **kwargs: getattr(preactresnet, f"PreActResNet{depth}")(
        base_width=args.base_width, **kwargs) for depth in (18, 34, 50, 101, 152)},
    "WideResNet": lambda args, **kwargs: WideResNet(34, args.width_factor, **kwargs),
}

# A learning-rate schedule by name: (arguments, data set) -> function of the time in epochs.
SCHEDULES = {
    "cyclic": lambda args, dataset: lambda t: cyclic_lr(t, args.lr_max, dataset.peak(args.epochs), args.epochs),
    "onedrop": lambda args, dataset: lambda t: onedrop_lr(t, args.lr_max, args.lr_drop),
}


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line and no usage text."""

    def parse_args(self, *args, **kwargs):
        parsed = super().parse_args(*args, **kwargs)
        for action in self._actions:  # argparse leaves an unchecked list where a flag's value is "--"
            if action.nargs is None and isinstance(getattr(parsed, action.dest, None), list):
                self.error(f"argument {action.option_strings[0]}: expected one argument")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parser(dataset: DataSet, description: str | None) -> Parser:
    """The command line of the script that trains on `dataset`."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.set_defaults(data_set=dataset.name)

    def add(group, flag: str, **options) -> None:
        name = flag[2:].replace("-", "_")
        default = options["default"] = dataset.defaults.get(name, options.get("default"))
        if options.get("action") == "store_true":
            options["default"] = False
        elif default is not None:
            options["help"] += f" (default: {default})"
        group.add_argument(flag, **options)

    group = p.add_argument_group("data")
    add(group, "--data-dir", type=os.path.expanduser, help="torchvision's root; what is missing is downloaded")
    add(group, "--dummy", action="store_true", help="learnable synthetic images instead: no files, no network")
    add(group, "--train-samples", type=number(int, 1), metavar="N", help="the first N training images only")
    add(group, "--val-size", type=number(int, 0), default=0, metavar="N",
        help="hold the last N training images out and choose the best checkpoint on them")

    group = p.add_argument_group("model")
    add(group, "--model", choices=MODELS, default="PreActResNet18", help="PreActResNet by depth, or WideResNet-34")
    add(group, "--base-width", type=number(int, 1, 1024), default=64, help="width of PreActResNet's stem")
    add(group, "--width-factor", type=number(int, 1, 64), default=10, help="width of WideResNet")

    group = p.add_argument_group("training")
    add(group, "--epochs", type=number(int, 1, 10**6), help="passes over the training images")
    add(group, "--batch-size", type=number(int, 1, 10**6), default=128, help="images a step, over all processes")
    add(group, "--lr-schedule", choices=SCHEDULES, help="cyclic: up and down; onedrop: constant, then a tenth")
    add(group, "--lr-max", type=number(float, 0), help="the highest learning rate")
    add(group, "--lr-drop", type=number(float, 0), default=50, help="the epoch of onedrop's drop")
    add(group, "--seed", type=number(int, 0, 2**32 - 1), default=0, help="of everything random")

    group = p.add_argument_group("attack to train on")
    add(group, "--attack", choices=ATTACKS, default="multigrad", help="how training images are perturbed")
    add(group, "--epsilon", type=number(float, 0, 255), default=8.0,
        help="radius of the l_inf ball in 1/255, in training and in evaluation")
    for flag, options in {f.name: f.options for _, flags in ATTACKS.values() for f in flags}.items():
        add(group, flag, **options)

    group = p.add_argument_group("evaluation")
    add(group, "--full-test", action="store_true", help="every epoch on the whole test set, not a tenth of it")
    add(group, "--test-iters", type=number(int, 1), default=10, help="PGD's steps in an epoch's evaluation")
    add(group, "--test-restarts", type=number(int, 1), default=1, help="its restarts")
    add(group, "--final-iters", type=number(int, 1), default=50, help="PGD's steps in the closing attack")
    add(group, "--final-restarts", type=number(int, 1), default=10, help="its restarts")
    add(group, "--final-samples", type=number(int, 1), metavar="N", help="only the first N test images in it")
    add(group, "--final-model", choices=("last", "best"), default="last", help="which model the closing attack is on")
    add(group, "--eval", action="store_true",
        help="evaluate the resumed model, attack --final-model (last: the resumed one), and stop")

    group = p.add_argument_group("files")
    add(group, "--fname", type=os.path.expanduser, help="folder of the logs and checkpoints")
    add(group, "--resume", type=number(int, 0, also=("auto",)), default=0, metavar="N|auto",
        help="N: go on from model_{N-1}.pth and opt_{N-1}.pth; auto: from the newest complete state, if there is one")
    add(group, "--allow-changes", action="store_true", help="go on although flags differ from the run's")
    add(group, "--chkpt-iters", type=number(int, 1), default=10, help="epochs between model_E.pth files")
    add(group, "--chkpt-steps", type=number(int, 1), metavar="N", help="also save the state every N steps")

    group = p.add_argument_group("machine")
    add(group, "--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False,
                       help="mixed precision in training and in attacks (default: off)")
    add(group, "--amp-dtype", choices=DTYPES, default="bfloat16", help="its lower precision")
    add(group, "--amp-impl", choices=("native", "apex"), default="native", help="whose: torch.amp or apex.amp")
    add(group, "--tf32", action="store_true", help="on CUDA, float32 products in training and in attacks as TF32")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                       help="torch.compile the network (default: on CUDA without --deterministic, --sync-bn or apex)")
    add(group, "--compile-mode", choices=("default", "reduce-overhead", "max-autotune"), default="default",
        help="torch.compile's; all but the default use CUDA graphs")
    add(group, "--deterministic", action="store_true", help="on CUDA, too: same seed, same bits; slower")
    add(group, "--sync-bn", action="store_true", help="under torchrun on CUDA: BatchNorm over all processes")
    return p


def flag_of(p: argparse.ArgumentParser) -> dict[str, str]:
    """The flag that each argument of the command line comes from."""
    return {action.dest: action.option_strings[0] for action in p._actions if action.option_strings}


def check(args) -> None:
    """Raise UsageError where flags do not go together."""
    for attack in ATTACKS:  # also those flags that this run does not use
        from_args(argparse.Namespace(**{**vars(args), "attack": attack}))
    if args.eval and args.resume == 0:
        raise UsageError("--eval needs a model: --resume N for model_{N-1}.pth, or --resume auto")
    if isinstance(args.resume, int) and args.resume > args.epochs and not args.eval:
        raise UsageError(f"--resume must be from 0 to --epochs ({args.epochs}), or auto, not {args.resume}")

