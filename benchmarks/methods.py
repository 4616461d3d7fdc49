"""Time a training step of every method, relative to FGSM-RS.

    python benchmarks/methods.py --base-width=16 --json=benchmarks/results/methods.json

Each round times every method once, so that a drifting clock speed affects all methods alike; a ratio is the median over
the rounds. Flags of train_cifar.py (network, batch, precision, device) apply to all methods.
"""
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from speed import seconds

from singlestep import methods, options, train
from singlestep.data import Images
from singlestep.options import CIFAR10
from singlestep.run.console import StopSignals, one_line_errors
from singlestep.run.device import describe
from singlestep.run.distributed import World
from singlestep.run.folder import Folder, atomic_write

BASE = "fgsm-rs"


def steps_of(method: str, argv: list[str], device: torch.device, images: Images) -> train.Run:
    """Return a run of the method on random images, whose epoch has the training steps to time."""
    args = options.parse(CIFAR10, argv=[*argv, f"--method={method}"])
    state, layout = train.build(CIFAR10, args, device, World(device=device))
    images = images.to(device, layout)
    # An epoch ends with an evaluation on test images: use one image.
    return train.assemble(CIFAR10, args, state, Folder(args.fname), World(device=device), StopSignals(),
                          [images, images[:0], images[:1]])


def measure(args, argv: list[str]) -> None:
    device = train.choose_device(args)
    n = args.batch_size * args.steps
    images = Images(torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (n,)))
    runs = {method: steps_of(method, argv, device, images) for method in dict.fromkeys([BASE, *args.methods])}
    taken: dict[str, list[float]] = {method: [] for method in runs}
    for counted in range(args.rounds + 1):
        for method, run in runs.items():
            run.state.begin_epoch(0)
            took = seconds(lambda run=run: train.train_epoch(run), device)
            if counted:  # the first round warms up
                taken[method].append(took)
    print(f"{describe(device)['device']}, {torch.get_num_threads()} threads, width {args.base_width}, "
          f"batch {args.batch_size}; medians of {args.rounds} rounds of {args.steps} steps\n")
    print(f"{'method':12s} {'s a step':>9s} {'over ' + BASE:>14s} {'lowest':>7s} {'highest':>7s}")
    result = {**describe(device), "base_width": args.base_width, "batch_size": args.batch_size, "methods": {}}
    for method, times in taken.items():
        ratios = [mine / base for mine, base in zip(times, taken[BASE])]
        result["methods"][method] = {"ratio": statistics.median(ratios), "seconds": times}
        print(f"{method:12s} {statistics.median(times) / args.steps:9.3f} {statistics.median(ratios):14.2f} "
              f"{min(ratios):7.2f} {max(ratios):7.2f}")
    if args.json:
        with atomic_write(args.json) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())


def main() -> None:
    p = options.Parser(__doc__)
    p.add_argument("--methods", nargs="*", default=list(methods.METHODS), choices=list(methods.METHODS),
                   help="methods to time")
    p.add_argument("--rounds", type=options.number(int, 1), default=5, help="rounds")
    p.add_argument("--steps", type=options.number(int, 1), default=2,
                   help="training steps per method and round; even, since NuAT alternates two kinds of steps")
    p.add_argument("--json", type=options.path, help="JSON file for the measured times")
    own, argv = p.parse_known_args()
    args = options.parse(CIFAR10, argv=argv)
    vars(args).update(vars(own))
    with one_line_errors():
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # before an hour of measurements
        measure(args, argv)


if __name__ == "__main__":
    main()
