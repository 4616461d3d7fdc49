"""Test what decides whether a seed collapses: initial weights, order of the images or random starting points.

    python experiments/mixed.py --data-dir=../cifar-data

The command trains with ZeroGrad (q = 0.35) at epsilon 8/255. For each pair of seeds, it trains all 8 combinations: the
initial weights, the image order (with crops and flips) and the random starting points are each seeded by one seed of
the pair. The 2 runs of a pair that are not mixed are those of reproduce.py. Runs with a result are skipped; --budget
and signals work as for reproduce.py. At the end, the command writes report/mixed.md with the complete pairs.

    python experiments/mixed.py train WEIGHTS ORDER STARTS --epochs=5 ...

This form trains one run with these three seeds; the other flags are those of train_cifar.py.
"""
import itertools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from definitions import ROOT, SCALES, ZEROGRAD, Experiment
from reproduce import Runner
from results import read_result

sys.path.insert(0, str(ROOT))
from singlestep import figures, options, train
from singlestep.run.console import one_line_errors, say
from singlestep.run.folder import atomic_write

PAIRS = ((0, 1), (2, 3), (4, 1))
SOURCES = ("initial weights", "order", "random starts")

TEXT = """\
# What decides whether ZeroGrad with q = 0.35 collapses

A seed decides the initial weights, the order of the images (with their crops and flips) and the random starts. Here,
each comes from one seed of a pair. A row has accuracy under PGD-10 in %, on {images:,} test images after the last
epoch, at the scale `{scale}`, epsilon 8/255.

{outcomes}

The share of the variance within a pair that each of the three explains by itself (the main effects of the 2 x 2 x 2
outcomes), and the share of their interactions:

{shares}

Written by `python experiments/mixed.py --scale={scale}`.
"""


@dataclass(frozen=True)
class Mixed(Experiment):
    """A run with a seed of its own for the order and for the random starts; `seed` is that of the initial weights."""

    order: int = 0
    starts: int = 0

    @property
    def name(self) -> str:
        return f"{super().name}_order={self.order}_starts={self.starts}"

    @property
    def command(self) -> list[str]:
        _, *flags = super().command
        return ["experiments/mixed.py", "train", *map(str, (self.seed, self.order, self.starts)), *flags]


def mixture(scale: str, seeds: tuple[int, int, int]) -> Experiment:
    """Return the run with these seeds of weights, order and starts."""
    weights, order, starts = seeds
    if weights == order == starts:
        return Experiment(scale, "cifar10", ZEROGRAD, weights)
    return Mixed(scale, "cifar10", ZEROGRAD, weights, order=order, starts=starts)


def train_mixed(weights: int, order: int, starts: int, flags: list[str]) -> None:
    """Train as train_cifar.py does, with a seed for each purpose."""
    seeds = {train.WEIGHTS: weights, train.ORDER: order, train.STEP: starts}
    seed_everything = train.seed_everything
    train.seed_everything = lambda purpose, seed, *rest: seed_everything(purpose, seeds.get(purpose, seed), *rest)
    train.main(options.CIFAR10, options.parse(options.CIFAR10, argv=flags))


def outcome(results: Path, experiment: Experiment) -> float | None:
    """Return a run's accuracy under PGD after the last epoch, in %; None if there is no result."""
    place = results / "mixed" if isinstance(experiment, Mixed) else results
    result = read_result(place, experiment)
    return None if result is None else 100 * result["epochs"][-1][figures.PGD]


def shares(outcomes: dict[tuple[int, ...], float]) -> dict[str, float]:
    """Return the share of the outcomes' sum of squares that each main effect and all interactions explain.

    Args:
        outcomes: (weights, order, starts), each 0 or 1 for the seed of the pair -> outcome; all eight.
    """
    total = sum((value - statistics.mean(outcomes.values())) ** 2 for value in outcomes.values())
    found = {}
    for source, title in enumerate(SOURCES):
        first, second = (statistics.mean(value for key, value in outcomes.items() if key[source] == i) for i in (0, 1))
        found[title] = 2 * (second - first) ** 2 / total if total else 0.0
    return {**found, "interactions": 1 - sum(found.values()) if total else 0.0}


def write_report(scale: str, results: Path, out: Path) -> None:
    """Write mixed.md with the pairs all of whose runs have a result."""
    lines = [["pair of seeds", *SOURCES, "PGD-10"], ["---"] * 5]
    parts = [["pair of seeds", *SOURCES, "interactions"], ["---"] * 5]
    for pair in PAIRS:
        found = {key: outcome(results, mixture(scale, (pair[key[0]], pair[key[1]], pair[key[2]])))
                 for key in itertools.product((0, 1), repeat=3)}
        known = {key: value for key, value in found.items() if value is not None}
        if len(known) == len(found):
            lines += [[f"{pair[0]}, {pair[1]}", *(str(pair[i]) for i in key), f"{value:.1f}"]
                      for key, value in known.items()]
            parts.append([f"{pair[0]}, {pair[1]}", *(f"{share:.0%}" for share in shares(known).values())])
    images = options.parse(options.CIFAR10, argv=mixture(scale, (0, 0, 0)).command[1:]).last_samples
    tables = ("\n".join(f"| {' | '.join(line)} |" for line in each) for each in (lines, parts))
    with atomic_write(out / "mixed.md") as file:
        file.write(TEXT.format(scale=scale, images=images, outcomes=next(tables), shares=next(tables)).encode())


def main() -> None:
    if sys.argv[1:2] == ["train"]:
        return train_mixed(*map(int, sys.argv[2:5]), sys.argv[5:])
    p = options.Parser(__doc__)
    p.add_argument("--scale", choices=SCALES, default="cpu-short-bf16", help="scale of the runs")
    p.add_argument("--jobs", type=options.number(int, 1, 1000), default=1, metavar="K", help="runs at once")
    p.add_argument("--budget", type=options.number(float, 0), default=float("inf"), metavar="MINUTES",
                   help="stop after this time")
    p.add_argument("--data-dir", type=options.path, help="folder of the data set")
    p.add_argument("--runs", type=options.path, default=str(ROOT / "runs"), help="folder of the runs")
    p.add_argument("--results", type=options.path, default=str(ROOT / "experiments/results"), help="folder of results")
    p.add_argument("--out", type=options.path, default=str(ROOT / "experiments/report"), help="folder of the report")
    args = p.parse_args()
    for name in ("data_dir", "runs", "results", "out"):
        if vars(args)[name]:
            setattr(args, name, Path(vars(args)[name]).resolve())
    results = args.results
    every = dict.fromkeys(mixture(args.scale, seeds) for pair in PAIRS for seeds in itertools.product(pair, repeat=3))
    with one_line_errors():
        missing = [e for e in every if isinstance(e, Mixed) and outcome(results, e) is None]
        say(f"{len(missing)} mixed runs are missing")
        args.results = results / "mixed"
        status = Runner(missing, args).run() if missing else 0
        args.out.mkdir(parents=True, exist_ok=True)
        write_report(args.scale, results, args.out)
    sys.exit(status)


if __name__ == "__main__":
    main()
