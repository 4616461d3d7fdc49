"""Turn results into tables and figures.

    python experiments/report.py --scale=cpu

The command reads the results that reproduce.py wrote, experiments/results/SCALE/*.json. It writes all tables to
experiments/report/SCALE.md, and the figures SCALE_*.png and SCALE_*.pdf. Rows without results are omitted.
"""
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from definitions import ROOT, SCALES, TABLES, Experiment, Row, Table, experiments
from results import Result, read_result

sys.path.insert(0, str(ROOT))
from singlestep import figures, options
from singlestep.figures import CLEAN, FGSM, PGD
from singlestep.run.console import UsageError, one_line_errors, say
from singlestep.run.folder import atomic_write

TRAINING = "train_robust_acc"

NOTES = """
* Accuracies are in %, on test images. With several seeds, a cell has the mean ± the sample standard deviation. The
  choice of test images alone gives a standard error of up to 0.5 with 10,000 images, and of 1.6 with 1,000.
* PGD-10-1 has 10 attack steps and 1 restart. PGD accuracies are every-step accuracies: an image is robust if it is
  correct after every attack step. In older runs (without `fgsm_acc` in their files), PGD-10 after an epoch is last-step
  accuracy: an image is robust if it is correct after the last attack step.
* The column titles say on how many test images the last epoch and the earlier epochs are evaluated. The best earlier
  epoch is chosen on the same test images that it is reported on.
* *flagged* is the first epoch that the [rule](../../docs/collapse.md#the-rule) flags as catastrophic overfitting
  ("collapse") or, with several seeds, how many runs it flags in some epoch. "then healthy" means that the rule does not
  flag the last epoch. In the figures, a cross marks the first flagged epoch, and a band spans the seeds. Epochs count
  from 1.
* [experiments/report/collapses.md](collapses.md) counts runs that we labelled as collapsed by eye. Its counts may
  differ from those here, since the rule errs on some runs; that page lists them.
* Seconds are medians over a run's epochs, on machines that also did other work. They are orders of magnitude; for
  ratios, see benchmarks/README.md. A table whose runs come from several kinds of machine has no such column.
"""
ELSEWHERE = """\
* *published elsewhere*: from RobustBench's model cards, with other recipes: clean / PGD accuracy as its authors report
  it / AutoAttack.
"""

class Results:
    """Results of a scale, by row. `refused` lists files that are damaged or belong to none of its runs."""

    def __init__(self, folder: Path, scale: str):
        self.scale = scale
        self.by_name: dict[str, Result] = {}
        files = {path.stem: path for path in sorted((folder / scale).glob("*.json"))}
        seeds = {int(seed) for name in files if (seed := name.rpartition("seed=")[2]).isdecimal()}
        for experiment in experiments(list(TABLES), scale, tuple(sorted(seeds))):
            if experiment.name in files and (result := read_result(folder, experiment)):
                self.by_name[experiment.name] = result
        self.seeds, self.refused = sorted(seeds), [path for name, path in files.items() if name not in self.by_name]

    def flags(self, row: Row) -> dict[str, Any]:
        """Return all flags of a row's runs, without the seed."""
        experiment = Experiment.of(row, self.scale, 0)
        return options.parse(options.data_set(experiment.dataset), argv=experiment.command[1:]).flags()

    def of(self, row: Row) -> dict[int, Result]:
        """Return the results of a row by seed."""
        names = {seed: Experiment.of(row, self.scale, seed).name for seed in self.seeds}
        return {seed: self.by_name[name] for seed, name in names.items() if name in self.by_name}


def last(key: str) -> Callable[[Result], float]:
    return lambda record: 100 * record["epochs"][-1][key]


def best(record: Result) -> float:
    """Return the highest PGD accuracy before the last epoch, which may have more test images."""
    return 100 * max(epoch[PGD] for epoch in record["epochs"][:-1])


def final(record: Result) -> float:
    return 100 * record["final"]["robust_acc"]


def seconds(record: Result) -> float:
    return statistics.median(epoch["train_time"] for epoch in record["epochs"])


def label(table: Table, row: Row) -> str:
    """Return the name of a row in a figure: its numbers with their columns, else its last cell."""
    if all(cell.replace(".", "", 1).isdecimal() for cell in row.cells):
        return ", ".join(f"{column} = {cell}" for column, cell in zip(table.columns, row.cells))
    return row.cells[-1]


def size(row: Row) -> float:
    """Return the sort key of a row: the number in its first cell, else 0."""
    try:
        return float(row.cells[0])
    except ValueError:
        return 0.0


def table_text(table: Table, results: Results) -> str:
    """Return the table in Markdown; accuracies in %, as means over the seeds with their standard deviation.

    If runs were stopped early, every run has a row of its own, since their last epochs differ.
    """
    rows = sorted(measured(table, results), key=size)
    found = [results.of(row) for row in rows]
    missing = len(table.at(results.scale)) - len(rows)
    if any("stopped" in record for by_seed in found for record in by_seed.values()):  # runs of different length
        rows, found = zip(*((row, {seed: record}) for row, by_seed in zip(rows, found)
                            for seed, record in by_seed.items()))
    records = [record for by_seed in found for record in by_seed.values()]
    ended, epoch = records[0]["final"], records[0]["epochs"][-1]
    flags = SCALES[results.scale].flags.split()
    steps = next((flag.split("=")[1] for flag in flags if flag.startswith("--test-iters=")), 10)
    images = f"{epoch['test_images']:,} images"
    best_of = " or ".join(f"{n:,}" for n in sorted({record["epochs"][0]["test_images"] for record in records}))
    best_of = f"best @ earlier epoch, {best_of} images"
    columns: dict[str, Callable[[Result], float]] = {
        f"clean, {images}": last(CLEAN),
        **({f"FGSM, {images}": last(FGSM)} if all(FGSM in record["epochs"][-1] for record in records) else {}),
        f"PGD-{steps}, {images}": last(PGD),
        f"PGD-{steps}, {best_of}": best,
    }
    if ended:
        columns[f"PGD-{ended['iters']}-{ended['restarts']}, {ended['images']:,} images"] = final
    if ended and ended["model"] == "best":  # the final evaluation is on another network than the columns before it
        attack = list(columns)[-1]
        columns[f"best model: clean, {ended['images']:,} images"] = lambda record: 100 * record["final"]["clean_acc"]
        columns[f"best model: {attack}"] = columns.pop(attack)
    if len({(start["device"], start["threads"], record.get("jobs")) for record in records
            for start in record["starts"]}) == 1:
        columns["training, s an epoch"] = seconds
    published = any(row.published for row in table.at(results.scale)) and results.scale == "paper"
    heads = [*table.columns, *columns, "flagged", "seeds"] + (["published elsewhere"] if published else [])
    lines = [heads, ["---"] * len(heads)]
    for row, by_seed in zip(rows, found):
        found_in = [record["epochs"] for record in by_seed.values()]
        earlier = [epochs[:-1] for epochs in found_in if epochs[:-1]]
        peaks = f" @ {figures.span(list(map(figures.best, earlier)))}" if earlier else ""
        cells = ["-" if value is best and not earlier else
                 figures.mean([value(record) for record in by_seed.values()], 1) + (peaks if value is best else "")
                 for value in columns.values()]
        lines.append([*row.cells, *cells, figures.collapse(found_in), ", ".join(map(str, by_seed))])
        lines[-1] += [row.published] if published else []
    return markdown(lines) + attacked(table, results) + (
        f"\n{missing} of the {len(rows) + missing} rows of this table are not measured yet.\n" if missing else "")


def attacked(table: Table, results: Results) -> str:
    """Return evaluate.py's accuracies of the last networks, in Markdown; empty if the table has no attacks."""
    lines: list[list[str]] = []
    for row in (row for row in measured(table, results) if row.attacks):
        names = row.attacks.split(",")
        lines = lines or [[*table.columns, "seed", *names], ["---"] * (len(table.columns) + 1 + len(names))]
        for seed, result in results.of(row).items():
            found = {each["attack"]: each for record in result["evaluations"] for each in record["attacks"]}
            shares = [[100 * found[name][key] for key in ("accuracy", "low", "high")] for name in names]
            lines.append([*row.cells, str(seed), *("{:.1f} ({:.1f} to {:.1f})".format(*share) for share in shares)])
    return "" if not lines else (
        "\nThe last network under evaluate.py's attacks, with Wilson's 95% intervals (the commands are in the results, "
        "`experiments/results/`):\n\n"
        + markdown(lines))


def markdown(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def common(results: Results) -> list[str]:
    """Return the flags that all runs have."""
    commands = [shlex.split(result["command"]) for result in results.by_name.values()]
    return [flag for flag in commands[0][2:] if all(flag in command for command in commands)]


def run_list(results: Results) -> str:
    """Return a table of the runs: command, commits and machines."""
    shared = common(results)
    lines = ["| run | commit | machine | `--jobs` | PyTorch |\n| --- | --- | --- | --- | --- |\n"]
    for result in results.by_name.values():
        starts = [{**start, "machine": f"{start['device']}, threads: {start['threads']}"} for start in result["starts"]]
        commit, machine, version = ("; ".join(dict.fromkeys(str(start[key])[:length] for start in starts))
                                    for key, length in (("commit", 12), ("machine", None), ("torch", None)))
        own = shlex.join(word for word in shlex.split(result["command"])[1:] if word not in shared)
        ended = f", stopped after epoch {result['stopped']}" if "stopped" in result else ""
        lines.append(f"| `{own}`{ended} | {commit} | {machine} | {result.get('jobs', '-')} | {version} |\n")
    return "".join(lines)


def measured(table: Table, results: Results) -> list[Row]:
    return [row for row in table.at(results.scale) if results.of(row)]


def over_epochs(axes, table: Table, rows: list[Row], results: Results, key: str) -> None:
    """Draw a curve for each row."""
    groups = {label(table, row): [record["epochs"] for record in results.of(row).values()] for row in rows}
    figures.curves(axes, groups, styles(table, rows, results), key)


def styles(table: Table, rows: list[Row], results: Results) -> list[figures.Style]:
    """Return a style for each row: that of its method, in a table of methods."""
    flags = [results.flags(row) for row in rows]
    own = [style for each in flags if (style := figures.style_of_method(each))]
    return own if table.columns[-1] == "trained with" and len(own) == len(rows) else figures.styles(flags)


def points(axes, x: list[float], found: list[dict[int, Result]], value: Callable[[Result], float], name: str,
           style: figures.Style) -> None:
    """Draw a line through the means over the seeds, with the standard deviation as bars."""
    values = [[value(record) for record in by_seed.values()] for by_seed in found]
    means = [statistics.mean(v) for v in values]
    axes.plot(x, means, color=style.colour, marker=style.marker, linestyle=style.dash, label=name)
    if any(len(v) > 1 for v in values):
        axes.errorbar(x, means, [statistics.stdev(v) if len(v) > 1 else 0 for v in values], fmt="none", capsize=2,
                      ecolor=style.colour)


@figures.own_style()
def figure_of_epochs(name: str, results: Results) -> Any:
    """Draw PGD accuracy and training accuracy over epochs: a collapse separates them."""
    table = TABLES[name]
    rows = sorted(measured(table, results), key=size)
    if len(rows) < 2:
        return None
    figure, panels = figures.subplots(1, 2, figsize=(9.5, 3.4))
    titles = {PGD: "test images under PGD", TRAINING: "training images under the training attack"}
    for axes, (key, title) in zip(panels, titles.items()):
        over_epochs(axes, table, rows, results, key)
        axes.set_title(title)
        axes.set_ylabel("accuracy, %")
    figures.legend_below(figure)
    return figure


@figures.own_style()
def figure_of_quantiles(name: str, results: Results) -> Any:
    rows = sorted(measured(TABLES[name], results), key=size)
    if len(rows) < 2:
        return None
    figure, axes = figures.subplots(figsize=(5.5, 3.4))
    x, found = [size(row) for row in rows], [results.of(row) for row in rows]
    points(axes, x, found, last(CLEAN), "clean", figures.Style("#888888", "s"))
    points(axes, x, found, last(PGD), "PGD, last epoch", figures.STYLES["zerograd"])
    points(axes, x, found, best, "PGD, best earlier epoch", figures.Style("#0072b2", "v", ":"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("q, the fraction of each image's gradient that is zeroed")
    axes.set_ylabel("accuracy on test images, %")
    figures.legend_below(figure)
    return figure


@figures.own_style()
def figure_of_epsilons(name: str, results: Results) -> Any:
    """Draw accuracy over epsilon: a curve for each method with two or more epsilons."""
    table = TABLES[name]
    by_method: dict[str, list[Row]] = {}
    for row in sorted(measured(table, results), key=size):
        by_method.setdefault(row.cells[1], []).append(row)
    by_method = {method: rows for method, rows in by_method.items() if len(rows) > 1}
    if not by_method:
        return None
    figure, panels = figures.subplots(1, 2, figsize=(9.5, 3.4))
    for axes, value, title in zip(panels, (last(CLEAN), last(PGD)), ("clean", "under PGD, last epoch")):
        which = styles(table, [rows[0] for rows in by_method.values()], results)
        for (method, rows), style in zip(by_method.items(), which):
            points(axes, [size(row) for row in rows], [results.of(row) for row in rows], value, method, style)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epsilon, 1/255")
        axes.set_ylabel("accuracy, %")
        axes.set_title(f"test images, {title}")
    figures.legend_below(figure)
    return figure


@figures.own_style()
def figure_of_epsilons_over_epochs(name: str, results: Results) -> Any:
    """Draw PGD accuracy over epochs: a panel for each epsilon with two or more methods."""
    rows = sorted(measured(TABLES[name], results), key=size)
    panels = {epsilon: [row for row in rows if row.cells[0] == epsilon] for epsilon, _ in (row.cells for row in rows)}
    panels = {epsilon: own for epsilon, own in panels.items() if len(own) > 1}
    if len(panels) < 2:
        return None
    lines = (len(panels) + 1) // 2
    figure, grid = figures.subplots(lines, 2, figsize=(9.5, 3.4 * lines), sharey=True)
    for axes, (epsilon, own) in zip(grid.flat, panels.items()):
        over_epochs(axes, TABLES[name], own, results, PGD)
        axes.set_title(f"epsilon = {epsilon}/255")
        axes.set_ylabel("accuracy under PGD, %")
    for axes in grid.flat[len(panels):]:
        axes.remove()
    figures.legend_below(figure)
    return figure


# Figures by name: their table and their function.
FIGURES = {
    **{name: (name, figure_of_epochs) for name in ("cifar10", "cifar100", "svhn", "multigrad", "collapse", "collapse12",
                                                   "from_zero", "demo")},
    "rivals": ("rivals", figure_of_epsilons_over_epochs),
    "quantile": ("quantile", figure_of_quantiles), "quantile_epochs": ("quantile", figure_of_epochs),
    "epsilon": ("epsilon", figure_of_epsilons), "epsilon_epochs": ("epsilon", figure_of_epsilons_over_epochs)}


def write_report(results: Results, out: Path) -> Path:
    """Write the tables and figures; returns the Markdown file."""
    out.mkdir(parents=True, exist_ok=True)
    scale = SCALES[results.scale]
    notes = NOTES + (ELSEWHERE if results.scale == "paper" else "")
    text = [f"# Results at the scale `{results.scale}`\n\n"
            f"{scale.about[0].upper() + scale.about[1:]}. All runs have these flags: `{shlex.join(common(results))}`.\n"
            f"The list [at the end](#the-runs) has the other flags of each run, and the machine and commit of each.\n"
            f"{notes}* Written by `python experiments/report.py --scale={results.scale}`.\n"]
    for name, table in TABLES.items():
        if not measured(table, results):
            continue
        text.append(f"\n## {table.title}\n\n{table_text(table, results)}")
        for key, draw in ((key, draw) for key, (of, draw) in FIGURES.items() if of == name):
            image = out / f"{results.scale}_{key}.png"
            figure = draw(name, results)
            if figure is None:
                image.unlink(missing_ok=True)
                image.with_suffix(".pdf").unlink(missing_ok=True)
                continue
            figures.save(figure, image)
            figures.save(figure, image.with_suffix(".pdf"))
            over = ", over epochs" if draw in (figure_of_epochs, figure_of_epsilons_over_epochs) else ""
            text.append(f"\n![{table.title}{over}]({image.name})\n")
    text.append(f"\n## The runs\n\n{run_list(results)}")
    path = out / f"{results.scale}.md"
    with atomic_write(path) as file:
        file.write("".join(text).encode())
    return path


def main() -> None:
    p = options.Parser(__doc__)
    p.add_argument("--scale", choices=SCALES, help="scale to report (default: every scale with results)")
    p.add_argument("--results", type=options.path, default=str(ROOT / "experiments/results"),
                   help="folder of the results")
    p.add_argument("--out", type=options.path, default=str(ROOT / "experiments/report"), help="folder of the report")
    args = p.parse_args()
    with one_line_errors():
        found = [Results(Path(args.results), scale) for scale in ([args.scale] if args.scale else SCALES)]
        for path in (path for results in found for path in results.refused):
            say(f"# left out: {path} is damaged, or its command is not in definitions.py", error=True)
        if not any(results.by_name for results in found):
            where = f" at --scale {args.scale}" if args.scale else ""
            raise UsageError(f"--results {args.results} holds no results{where}: make them with reproduce.py")
        try:
            for results in found:
                if results.by_name:
                    say(str(write_report(results, Path(args.out))))
        except OSError as error:
            raise UsageError(f"--out {args.out} cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    main()
