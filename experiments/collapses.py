"""Count collapsed runs, and compare the rule that flags collapses with labels by eye.

    python experiments/collapses.py             # write report/collapses.md and report/collapses.png
    python experiments/collapses.py --search    # print the errors of other thresholds on seeds 0 and 1

labels.csv has a line for every run that was labelled by eye from its curves: the set of the run (a folder of results/,
or public_logs), its name, its label (collapsed, healthy, or undecided if the run is too short to tell), the epochs in
collapse (from 1) and the reason. A run without a label counts as collapsed if the rule flags it.
"""
import csv
import itertools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from definitions import ROOT, TABLES, Experiment
from public_logs.table import DATA_SETS, read_runs, spans_text

sys.path.insert(0, str(ROOT))
from scipy.stats import binomtest

from singlestep import collapse, figures
from singlestep.collapse import collapsed
from singlestep.figures import CLEAN, FGSM, PGD
from singlestep.options import Parser
from singlestep.run.console import say
from singlestep.run.folder import atomic_write

HERE = Path(__file__).resolve().parent
SCALE = "cpu-short-bf16"
WARNING = 0.03  # threshold for the gap after the first epoch, as a fraction of the images

TEXT = """\
# How often a method collapses, and how well the rule finds it

On this page, *collapsed* means that we labelled the run by eye, from its curves, as catastrophic overfitting. The pages
of the scales, such as [{scale}.md]({scale}.md), count runs that the [rule](../../docs/collapse.md#the-rule) flags
instead. Their counts may differ from those here, since the rule errs on some runs ([below](#errors-of-the-rule)).

The runs of the first two tables have the scale `{scale}`: CIFAR-10, PreActResNet18 with base width 16 (full: 64),
20,000 training images, 5 epochs, cyclic learning rate with a peak of 0.2, bfloat16. Accuracies are in %, on 1,000 test
images after the last epoch; PGD-50 has one restart. A seed fixes the initial weights and the order of the images
for all methods, so the rows are not independent. [{scale}.md]({scale}.md#the-runs) has the command, commit and
processor of every run; the runs of a method come from two processors.

![PGD-10 accuracy after the last epoch, a dot for each seed](collapses.png)

## Collapses

*Collapsed* counts runs that are labelled as collapsed in some epoch ([labels.csv](../labels.csv)); *95%* is Wilson's
95% interval for the fraction of runs that collapse. Means are over the seeds, ± the sample standard deviation.
A network that also loses its FGSM accuracy has not collapsed: GradAlign at 16/255 does not train at all.

{counts}

## PGD-10 by seed

PGD-10 accuracy of every run after its last epoch, in order of the seeds, from 0. **Bold**: the run collapsed.

{by_seed}

## Errors of the rule

The rule has four chosen thresholds, and a fixed one: half of the best. The four thresholds were chosen on seeds 0 and 1
of the [public logs](../public_logs/README.md) and of `{scale}`; `python experiments/collapses.py --search` repeats the
search. Seeds 2 to 4 and the other sets were not used. A false alarm is a healthy run that the rule flags in some epoch;
a miss is a collapsed run that the rule never flags. Undecided runs are left out.

{errors}

Every error:

{mistakes}

## What the gap after the first epoch predicts

The gap is FGSM accuracy minus PGD-10 accuracy after the first epoch, in percentage points. *Over 3* counts, among the
runs with a gap of more than 3 points, those that collapsed.

{gaps}

In the 5-epoch runs at epsilon 8/255, a gap of more than 3 points after the first epoch predicts most collapses; at
16/255, healthy runs have such a gap, too. In the public logs, whose learning rate rises slowly, no collapsed run had
such a gap after the first epoch. In {at_once} of their {fallen} collapsed runs, the gap does not exceed 3 points before
the epoch in which the collapse begins; in {also} of their {healthy} healthy runs, it exceeds 3 points in some epoch. So
a gap that the rule does not flag is no reason to stop a run, and runs do not warn of it.

Written by `python experiments/collapses.py`.
"""


class Run(NamedTuple):
    """A run with a label, or a run of SCALE without a label (None)."""

    group: str
    name: str
    seed: int
    epochs: list[dict[str, Any]]
    label: str | None = None
    final: dict[str, Any] | None = None


def read_all() -> list[Run]:
    """Return the runs of every set."""
    with open(HERE / "labels.csv", encoding="utf-8", newline="") as file:
        labels = {(row["set"], row["run"]): row["label"] for row in csv.DictReader(file)}
    runs = [Run(f"public logs, {DATA_SETS[run.data_set]}", run.name, run.seed, run.epochs,
                labels["public_logs", run.name]) for run in read_runs()]
    for path in sorted((HERE / "results").glob("*/*.json")):
        result, scale = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        if (scale, path.stem) in labels or scale == SCALE:
            large = ", epsilon 16/255" if "_epsilon=16_" in path.stem else ""
            runs.append(Run(f"{scale}{large}", path.stem, int(path.stem.rpartition("seed=")[2]), result["epochs"],
                            labels.get((scale, path.stem)), result["final"]))
    return runs


def fell(run: Run) -> bool:
    """Return whether a run collapsed in some epoch: by its label, or by the rule if the run has no label."""
    return any(collapsed(run.epochs)) if run.label is None else run.label == "collapsed"


def rows(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """Group the runs at SCALE by epsilon and method, as table `rivals` lists them; seeds in order."""
    by_name = {run.name: run for run in runs if run.group.startswith(SCALE)}
    found = {}
    for row in TABLES["rivals"].rows:
        own = [by_name[name] for seed in range(100)
               if (name := Experiment.of(row, SCALE, seed).name) in by_name]
        if own:
            found[row.cells[0], row.cells[1]] = own
    return found


def counts(groups: dict[tuple[str, str], list[Run]]) -> str:
    lines = [["epsilon", "method", "seeds", "collapsed", "95%", "clean", "PGD-10", "PGD-50"], ["---"] * 8]
    for (epsilon, method), runs in groups.items():
        fallen = sum(map(fell, runs))
        interval = binomtest(fallen, len(runs)).proportion_ci(0.95, method="wilson")
        lines.append([epsilon, method, str(len(runs)), str(fallen), f"{interval.low:.0%} to {interval.high:.0%}",
                      *(figures.mean([run.epochs[-1][key] for run in runs]) for key in (CLEAN, PGD)),
                      figures.mean([run.final["robust_acc"] for run in runs if run.final])])
    return markdown(lines)


def by_seed(groups: dict[tuple[str, str], list[Run]]) -> str:
    lines = [["method", "epsilon 8/255", "epsilon 16/255"], ["---"] * 3]
    for method in dict.fromkeys(method for _, method in groups):
        cells = []
        for epsilon in ("8", "16"):
            values = [(f"{100 * run.epochs[-1][PGD]:.1f}", fell(run)) for run in groups.get((epsilon, method), [])]
            cells.append(" ".join(f"**{text}**" if bold else text for text, bold in values))
        lines.append([method, *cells])
    return markdown(lines)


def mistakes(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Return the healthy runs that the rule flags, and the collapsed runs that it does not."""
    flagged = [any(collapsed(run.epochs)) for run in runs]
    return ([run for run, found in zip(runs, flagged) if found and run.label == "healthy"],
            [run for run, found in zip(runs, flagged) if not found and run.label == "collapsed"])


def errors(runs: list[Run]) -> str:
    lines = [["runs", "seeds 0 and 1: healthy, false alarms", "collapsed, missed",
              "seeds 2 to 4: healthy, false alarms", "collapsed, missed"], ["---"] * 5]
    for group in dict.fromkeys(run.group for run in runs):
        cells = []
        for seeds in ((0, 1), (2, 3, 4)):
            own = [run for run in runs if run.group == group and run.seed in seeds]
            for label, wrong in zip(("healthy", "collapsed"), mistakes(own)):
                number = sum(run.label == label for run in own)
                cells.append(f"{number}, {len(wrong)}" if number else "")
        lines.append([group, *cells])
    return markdown(lines)


def gaps(runs: list[Run]) -> str:
    lines = [["runs", "gap of runs that collapsed", "gap of healthy runs", "over 3"], ["---"] * 4]
    for group in dict.fromkeys(run.group for run in runs):
        own = [run for run in runs if run.group == group and FGSM in run.epochs[0] and run.label != "undecided"]
        fallen, healthy = ([100 * gap(run.epochs[0]) for run in own if fell(run) is state] for state in (True, False))
        over = [run for run in own if gap(run.epochs[0]) > WARNING]
        if own:
            lines.append([group, *(f"{min(each):.1f} to {max(each):.1f}" if each else "" for each in (fallen, healthy)),
                          f"{sum(map(fell, over))} of {len(over)}"])
    return markdown(lines)


def gap(record: dict[str, Any]) -> float:
    return record[FGSM] - record[PGD]


def ahead(run: Run) -> bool:
    """Return whether the gap of a run that collapsed exceeded WARNING in an epoch before the collapse."""
    return any(gap(record) > WARNING for record in run.epochs[:collapsed(run.epochs).index(True)])


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@figures.own_style()
def figure(groups: dict[tuple[str, str], list[Run]]) -> Any:
    """Draw a dot for each seed of each method, a panel for each epsilon."""
    drawn, panels = figures.subplots(1, 2, figsize=(9.5, 4.2), sharey=True)
    methods = list(dict.fromkeys(method for _, method in groups))
    for axes, epsilon in zip(panels, ("8", "16")):
        for state, style, label in ((False, ("o", "#0072b2"), "healthy"), (True, ("X", "#cc3311"), "collapsed")):
            points = [(100 * run.epochs[-1][PGD], methods.index(method)) for (size, method), runs in groups.items()
                      for run in runs if size == epsilon and fell(run) is state]
            axes.plot(*zip(*points), linestyle="", marker=style[0], color=style[1], alpha=0.75, label=label)
        axes.set_title(f"epsilon {epsilon}/255")
        axes.set_xlabel("PGD-10 accuracy after the last epoch, %")
        axes.set_xlim(left=-1)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].invert_yaxis()
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return drawn


def search(runs: list[Run]) -> None:
    """Print the number of errors of other thresholds, on the seeds 0 and 1 that they are chosen on."""
    runs = [run for run in runs if run.seed < 2 and run.group.startswith(("public", SCALE))]
    names = ("MISLED", "AGREES", "LEARNED", "FALLEN")
    grid = ((0.4, 0.5, 0.6, 0.7), (0.75, 0.8), (0.0, 0.2, 0.25, 0.3), (0.7, 0.8, 0.85, 0.9, 1.0))
    found = []
    for values in itertools.product(*grid):
        for name, value in zip(names, values):
            setattr(collapse, name, value)
        found.append((sum(map(len, mistakes(runs))), values))
    for number, values in sorted(found):
        say(f"{number:3} errors  " + "  ".join(f"{name} {value}" for name, value in zip(names, values)))


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--search", action="store_true", help="print the errors of other thresholds; write nothing")
    runs = read_all()
    if p.parse_args().search:
        return search(runs)
    groups = rows(runs)
    alarms, missed = mistakes(runs)
    public = [run for run in runs if run.group.startswith("public")]
    healthy = [run for run in public if not fell(run)]
    text = TEXT.format(
        scale=SCALE, counts=counts(groups), by_seed=by_seed(groups), errors=errors(runs), gaps=gaps(runs),
        mistakes="\n".join([*(f"* false alarm: {run.group}, `{run.name}`, epochs {spans_text(collapsed(run.epochs))}"
                              for run in alarms), *(f"* miss: {run.group}, `{run.name}`" for run in missed)]),
        fallen=len(public) - len(healthy), healthy=len(healthy),
        at_once=sum(not ahead(run) for run in public if fell(run)),
        also=sum(any(gap(record) > WARNING for record in run.epochs) for run in healthy))
    figures.save(figure(groups), HERE / "report/collapses.png")
    with atomic_write(HERE / "report/collapses.md") as file:
        file.write(text.encode())


if __name__ == "__main__":
    main()
