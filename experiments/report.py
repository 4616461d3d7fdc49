"""Turn results into tables and figures.

    python experiments/report.py --scale=cpu

reads experiments/results/SCALE/*.json, as reproduce.py writes them, and writes experiments/report/SCALE.md with every
table, and the figures SCALE_*.png. A row that was not measured is left out.
"""
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from definitions import ROOT, SCALES, TABLES, Experiment, Row, Table, experiments
from results import Result, read_result

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(ROOT))
import watch
from options import Parser
from utils import whole_file

COLOURS = {"FGSM from zero": "#d62728", "FGSM-RS": "#ff7f0e", "ZeroGrad, q = 0.35": "#9467bd",
           "ZeroGrad, q = 0.45": "#9467bd", "ZeroGrad, q = 0.7": "#1f77b4", "MultiGrad": "#2ca02c",
           "MultiGrad, parallel": "#17becf", "PGD-10": "#444444",
           "0": "#8c564b", "0.2": "#e377c2", "0.35": "#9467bd", "0.5": "#bcbd22", "0.7": "#1f77b4", "0.9": "#17becf"}
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                     "axes.spines.right": False, "legend.frameon": False})

NOTES = """
* Accuracies are in % on test images; after ±, the sample's standard deviation over the seeds, where there are several.
  The choice of images alone makes a standard error of up to 0.5 with 10,000 of them, and 1.6 with 1,000.
* The second number of PGD-10-1 and the like counts restarts. An image is robust if it is right at every step; in runs
  from before the watch (without FGSM's accuracy in their files), PGD-10 after an epoch is judged at its end alone.
* In the curves, the last epoch is on all test images, the others (but for SVHN) are on a part; the best of these, in a
  column of its own, is chosen on the test images that it is reported on.
* Collapsed: the first epoch in which catastrophic overfitting was found (`watch.py`), over several seeds how many
  of the runs collapsed at some time; "then sound" where the last epoch is sound again.
* Seconds are the median over a run's epochs, beside whatever else the machine did (`--jobs` is of one command: there
  may have been others); they tell orders of magnitude, benchmarks/speed.py tells ratios. A table whose runs were made
  on several kinds of machine has none.
"""
ELSEWHERE = """\
* What was published elsewhere is from RobustBench's model cards, of other recipes: clean / robust as its authors report
  it / under AutoAttack.
"""

PGD, CLEAN, TRAINING = "test_robust_acc", "test_acc", "train_robust_acc"


class Results:
    """The results of a scale, by row; `refused` lists the files that are none of its runs' or are damaged."""

    def __init__(self, folder: Path, scale: str):
        self.scale = scale
        self.by_name: dict[str, Result] = {}
        files = {path.stem: path for path in sorted((folder / scale).glob("*.json"))}
        seeds = {int(seed) for name in files if (seed := name.rpartition("seed=")[2]).isdecimal()}
        for experiment in experiments(list(TABLES), scale, tuple(sorted(seeds))):
            if experiment.name in files and (result := read_result(folder, experiment)):
                self.by_name[experiment.name] = result
        self.seeds, self.refused = sorted(seeds), [path for name, path in files.items() if name not in self.by_name]

    def of(self, row: Row) -> dict[int, Result]:
        """The results of a row by seed."""
        names = {seed: Experiment.of(row, self.scale, seed).name for seed in self.seeds}
        return {seed: self.by_name[name] for seed, name in names.items() if name in self.by_name}


def last(key: str) -> Callable[[Result], float]:
    return lambda record: 100 * record["epochs"][-1][key]


def best(record: Result) -> float:
    """The highest accuracy of an epoch before the last, which may be on more images."""
    return 100 * max(epoch[PGD] for epoch in record["epochs"][:-1])


def final(record: Result) -> float:
    return 100 * record["final"]["robust_acc"]


def collapse(records: list[Result]) -> str:
    """When a run collapsed, epochs counted from 1; of several runs, how many did."""
    states = [watch.collapsed(record["epochs"]) for record in records]
    fallen = [state for state in states if any(state)]
    if len(records) > 1:
        return f"{len(fallen)} of {len(records)}"
    if not fallen:
        return "no"
    return f"epoch {fallen[0].index(True) + 1}" + ("" if fallen[0][-1] else ", then sound")


def seconds(record: Result) -> float:
    return statistics.median(epoch["train_time"] for epoch in record["epochs"])


def mean_and_deviation(values: list[float]) -> str:
    """As a table shows them: the mean, and from two values on the sample's standard deviation."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def size(row: Row) -> float:
    """What a row is sorted by: the number in its first cell, if it is one."""
    try:
        return float(row.cells[0])
    except ValueError:
        return 0.0


def table_text(table: Table, results: Results) -> str:
    """The table in Markdown; accuracies in %, as means over the seeds with their standard deviation."""
    rows = sorted(measured(table, results), key=size)
    found = [results.of(row) for row in rows]
    records = [record for by_seed in found for record in by_seed.values()]
    judged, epoch = records[0]["final"], records[0]["epochs"][-1]
    flags = SCALES[results.scale].flags.split()
    steps = next((flag.split("=")[1] for flag in flags if flag.startswith("--test-iters=")), 10)
    images = f"{epoch['test_images']:,} images"
    best_of = f"best earlier epoch, {records[0]['epochs'][0]['test_images']:,} images"
    columns: dict[str, Callable[[Result], float]] = {
        f"clean, {images}": last(CLEAN),
        f"PGD-{steps}, {images}": last(PGD),
        f"PGD-{steps}, {best_of}": best,
        f"PGD-{judged['iters']}-{judged['restarts']}, {judged['images']:,} images": final,
    }
    if judged["model"] == "best":  # the final evaluation is of another network than the columns before it
        attack = list(columns)[-1]
        columns[f"best model: clean, {judged['images']:,} images"] = lambda record: 100 * record["final"]["clean_acc"]
        columns[f"best model: {attack}"] = columns.pop(attack)
    if len({(start["device"], start["threads"], record["jobs"]) for record in records
            for start in record["starts"]}) == 1:
        columns["training, s an epoch"] = seconds
    published = any(row.published for row in table.at(results.scale)) and results.scale == "paper"
    heads = [*table.columns, *columns, "collapsed", "seeds"] + (["published elsewhere"] if published else [])
    lines = [heads, ["---"] * len(heads)]
    for row, by_seed in zip(rows, found):
        cells = [mean_and_deviation([value(record) for record in by_seed.values()]) for value in columns.values()]
        lines.append([*row.cells, *cells, collapse(list(by_seed.values())), ", ".join(map(str, by_seed))])
        lines[-1] += [row.published] if published else []
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run_list(results: Results) -> str:
    """Every run that the numbers come from: its command, and the commits and machines it was made with."""
    lines = ["| command | commit | machine | `--jobs` | PyTorch |\n| --- | --- | --- | --- | --- |\n"]
    for result in results.by_name.values():
        starts = [{**start, "machine": f"{start['device']}, threads: {start['threads']}"} for start in result["starts"]]
        commit, machine, version = ("; ".join(dict.fromkeys(str(start[key]) for start in starts))
                                    for key in ("commit", "machine", "torch"))
        lines.append(f"| `{result['command']}` | {commit} | {machine} | {result['jobs']} | {version} |\n")
    return "".join(lines)


def lines_over_epochs(axes, rows: list[Row], results: Results, key: str, prefix: str) -> None:
    """A line a row, named by its last cell after `prefix`: the mean over the seeds, and each seed thinly behind it."""
    for i, row in enumerate(rows):
        curves = [[100 * epoch[key] for epoch in record["epochs"]] for record in results.of(row).values()]
        epochs = range(1, len(curves[0]) + 1)
        colour = COLOURS.get(row.cells[-1], f"C{i}")
        for curve in curves:
            axes.plot(epochs, curve, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(epochs, [statistics.mean(values) for values in zip(*curves)], color=colour, marker="o", markersize=3,
                  label=prefix + row.cells[-1])
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)


def points(axes, x: list[float], found: list[dict[int, Result]], value: Callable[[Result], float], **style) -> None:
    """A line through the means over the seeds, with the standard deviation as bars."""
    values = [[value(record) for record in by_seed.values()] for by_seed in found]
    deviations = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
    axes.errorbar(x, [statistics.mean(v) for v in values], deviations if any(deviations) else None, marker="o",
                  markersize=4, capsize=2, **style)


def measured(table: Table, results: Results) -> list[Row]:
    return [row for row in table.at(results.scale) if results.of(row)]


def figure_of_epochs(name: str, results: Results) -> plt.Figure | None:
    """PGD accuracy over epochs, in which a collapse shows, beside the accuracy on what is trained on."""
    rows = sorted(measured(TABLES[name], results), key=size)
    if len(rows) < 2:
        return None
    prefix = f"{TABLES[name].columns[0]} = " if any(map(size, rows)) else ""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    lines_over_epochs(left, rows, results, PGD, prefix)
    lines_over_epochs(right, rows, results, TRAINING, prefix)
    left.set_title("test images under PGD (last epoch: all of them)")
    right.set_title("training images under the attack trained on")
    left.set_ylabel("accuracy, %")
    longest = max(len(row.cells[-1]) for row in rows)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4 if longest < 30 else 2)
    figure.suptitle(f"{TABLES[name].title}, scale {results.scale}")
    return figure


def figure_of_quantiles(name: str, results: Results) -> plt.Figure | None:
    rows = measured(TABLES[name], results)
    if len(rows) < 2:
        return None
    figure, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    x, found = [size(row) for row in rows], [results.of(row) for row in rows]
    points(axes, x, found, last(CLEAN), label="clean", color="#888888")
    points(axes, x, found, last(PGD), label="PGD, last epoch", color="#1f77b4")
    points(axes, x, found, best, label="PGD, best earlier epoch", color="#1f77b4", linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("q, the fraction of each image's gradient that is zeroed")
    axes.set_ylabel("accuracy on test images, %")
    axes.set_title(f"{TABLES[name].title}, scale {results.scale}")
    axes.legend()
    return figure


def figure_of_epsilons(name: str, results: Results) -> plt.Figure | None:
    rows = measured(TABLES[name], results)
    if len({row.cells[0] for row in rows}) < 2:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for axes, value, title in zip(panels, (last(CLEAN), last(PGD)), ("clean", "under PGD, last epoch")):
        for method in dict.fromkeys(row.cells[1] for row in rows):
            own = sorted((row for row in rows if row.cells[1] == method), key=size)
            points(axes, [size(row) for row in own], [results.of(row) for row in own], value, label=method,
                   color=COLOURS.get(method))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epsilon, 1/255")
        axes.set_title(f"test images, {title}")
    panels[0].set_ylabel("accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(f"{TABLES[name].title}, scale {results.scale}")
    return figure


def figure_of_epsilons_over_epochs(name: str, results: Results) -> plt.Figure | None:
    """PGD accuracy over epochs, a panel for each epsilon at which there is something to compare."""
    rows = sorted(measured(TABLES[name], results), key=size)
    panels = {epsilon: [row for row in rows if row.cells[0] == epsilon] for epsilon, _ in (row.cells for row in rows)}
    panels = {epsilon: own for epsilon, own in panels.items() if len(own) > 1}
    if len(panels) < 2:
        return None
    figure, (line,) = plt.subplots(1, len(panels), figsize=(4.75 * len(panels), 3.8), squeeze=False, sharey=True,
                                   layout="constrained")
    for axes, (epsilon, own) in zip(line, panels.items()):
        lines_over_epochs(axes, own, results, PGD, "")
        axes.set_title(f"epsilon = {epsilon}/255")
    line[0].set_ylabel("accuracy under PGD, %")
    handles = {label: handle for axes in line for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6)
    figure.suptitle(f"CIFAR-10, test images (last epoch: all of them), scale {results.scale}")
    return figure


# The figures by name: the table that each is of, and how it is drawn.
FIGURES = {
    "cifar10": ("cifar10", figure_of_epochs), "cifar100": ("cifar100", figure_of_epochs),
    "svhn": ("svhn", figure_of_epochs), "collapse": ("collapse", figure_of_epochs),
    "collapse12": ("collapse12", figure_of_epochs), "from_zero": ("from_zero", figure_of_epochs),
    "quantile": ("quantile", figure_of_quantiles), "quantile_epochs": ("quantile", figure_of_epochs),
    "epsilon": ("epsilon", figure_of_epsilons), "epsilon_epochs": ("epsilon", figure_of_epsilons_over_epochs)}


def write_report(results: Results, out: Path) -> Path:
    """Write the tables and figures; returns the Markdown file."""
    out.mkdir(parents=True, exist_ok=True)
    scale = SCALES[results.scale]
    notes = NOTES + (ELSEWHERE if results.scale == "paper" else "")
    text = [f"# Results at the scale `{results.scale}`\n\n"
            f"{scale.about[0].upper() + scale.about[1:]}: `{scale.flags}`.\n"
            f"{notes}* Written by `python experiments/report.py --scale={results.scale}`.\n"]
    for name, table in TABLES.items():
        if not measured(table, results):
            continue
        text.append(f"\n## {table.title}\n\n{table_text(table, results)}")
        for image, draw in [(f"{results.scale}_{key}.png", draw) for key, (of, draw) in FIGURES.items() if of == name]:
            (out / image).unlink(missing_ok=True)
            figure = draw(name, results)
            if figure is None:
                continue
            with whole_file(out / image) as file:
                figure.savefig(file, format="png", metadata={"Software": None})
            plt.close(figure)
            text.append(f"\n![{table.title}]({image})\n")
    text.append(f"\n## The runs\n\n{run_list(results)}")
    path = out / f"{results.scale}.md"
    with whole_file(path) as file:
        file.write("".join(text).encode())
    return path


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--scale", choices=SCALES, default="paper", help="of which runs")
    p.add_argument("--results", type=Path, default=ROOT / "experiments/results", help="where the results are")
    p.add_argument("--out", type=Path, default=ROOT / "experiments/report", help="where the report goes")
    args = p.parse_args()
    results = Results(args.results, args.scale)
    for path in results.refused:
        print(f"left out: {path} is damaged, or of another command than definitions.py has", file=sys.stderr)
    if not results.by_name:
        p.error(f"--results {args.results} holds no results at --scale {args.scale}: reproduce.py makes them")
    try:
        print(write_report(results, args.out))
    except OSError as error:
        p.error(f"--out {args.out} cannot be written ({error.strerror})")


if __name__ == "__main__":
    main()
