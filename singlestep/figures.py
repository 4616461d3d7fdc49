"""Tables and figures of runs: final accuracies, and curves over epochs.

Runs are named by the flags in which they differ. Runs that differ only in the seed are averaged; a band shows their
minimum and maximum. Epochs count from 1 here, from 0 in the files of a run.
"""
import contextlib
import json
import math
import os
import statistics
import textwrap
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, TypeVar
from unittest import mock

from . import options, tables
from .methods import ATTACKS, DEPENDENT, METHODS, OBJECTIVES
from .options import FLAGS
from .run.console import UsageError, one_line_errors, say
from .run.folder import Folder, atomic_write, read_records
from .tables import Accuracy

PGD, FGSM, CLEAN = "test_robust_acc", "fgsm_acc", "test_acc"
# Axis labels that differ from the metric's name in metrics.jsonl.
TITLES = {PGD: "accuracy under PGD, %", FGSM: "accuracy under FGSM, %", CLEAN: "clean accuracy, %",
          "train_robust_acc": "training accuracy under the run's own attack, %",
          "val_robust_acc": "accuracy under PGD on validation images, %", "lr": "learning rate",
          "abnormal": "abnormal training images, %", "defence_mean": "mean absolute perturbation in training, 1/255",
          "attack_mean": "mean absolute perturbation of PGD, 1/255"}
IN_PERCENT = ("_acc", "abnormal", "train_rise")
NAMED = {"data_set", *(name for name, each in FLAGS.items() if each.metadata["named"])}
SYMBOLS = {"zero_qval": "q", "multi_samps": "samples", "multi_th": "agree"}


class Flagged(Protocol):
    """Object with the flags and the folder of a run."""

    @property
    def folder(self) -> Path: ...

    @property
    def flags(self) -> dict[str, Any]: ...


AnyRun = TypeVar("AnyRun", bound=Flagged)


@dataclass(frozen=True)
class RunRecord:
    """A run's files: flags, one record for each epoch, and the record of the final evaluation, None without it."""

    folder: Path
    flags: dict[str, Any]
    epochs: list[dict[str, Any]]
    final: dict[str, Any] | None


def read_run(folder: Path) -> RunRecord:
    """Read the run in `folder`. Raises UsageError if the run is missing or damaged, or has no complete epoch."""
    if not (folder / "args.json").is_file():
        raise UsageError(f"{folder} is not the folder of a run: it has no args.json")
    flags, file = options.run_flags(folder), folder / "metrics.jsonl"
    try:
        epochs = read_records(Folder(folder))
        if not all(math.isfinite(record[PGD] + record[CLEAN]) for record in epochs):
            raise ValueError
        file = folder / "final.json"
        final = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if final is not None and not math.isfinite(final["robust_acc"] + final["iters"] + final["restarts"]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{file} is damaged: repair it, or omit this run") from None
    if not epochs:
        raise UsageError(f"{folder}: no epoch is complete yet")
    return RunRecord(folder, defaults(flags), epochs, final)


def collapsed(epochs: list[dict[str, Any]]) -> list[bool]:
    """Return for each epoch whether the run is in collapse after it."""
    from . import collapse  # imports PyTorch

    return collapse.collapsed(epochs)


def defaults(flags: dict[str, Any]) -> dict[str, Any]:
    """Return a run's flags, completed by the defaults of flags that are newer than the run.

    A mean or std that only repeats the data set's becomes None, the default, as in args.json of most runs.
    """
    try:
        dataset = options.data_set(flags["data_set"])
    except UsageError:  # the user's own data set
        dataset = options.CIFAR10
    args = options.arguments(dataset, {}).flags()
    usual = {name for name in ("mean", "std") if tuple(flags.get(name) or ()) == getattr(dataset, name)}
    return {**args, **dependent({**args, **flags}), **flags, **dict.fromkeys(usual)}


def dependent(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults that depend on other flags."""
    return {name: default(SimpleNamespace(**flags)) for name, default in DEPENDENT.items()}


def method(flags: dict[str, Any]) -> tuple[str, set[str]]:
    """Return the name of the published method with these flags, and the flags that the name implies.

    If several methods fit, the name is that of the method that sets the most flags. If no method fits, the name is
    ATTACK, or ATTACK + OBJECTIVE if the objective is not ce. If a method also has this name (attack fgsm, method fgsm),
    the name is ATTACK with FLAGS: the flags that differ from that method.
    """
    usual: dict[str, Any] = {"fgsm_init": "random", "objective": "ce", "elle_adaptive": False, "label_smoothing": 0.0}
    stated = {name: published.flags_on(flags.get("data_set", "")) for name, published in METHODS.items()}
    fitting = [name for name, stands_for in stated.items()
               if all(flags.get(flag) == value for flag, value in {**usual, **stands_for}.items())]
    if fitting:
        name = max(fitting, key=lambda name: len(stated[name]))
        return name, {*usual, *stated[name]}
    objective = flags["objective"]
    title = flags["attack"] + (f" + {objective}" if objective != "ce" else "")
    departs = {}
    if title in METHODS:
        stands_for = {**usual, **stated[title]}
        departs = {flag: flags.get(flag) for flag, value in stands_for.items() if flags.get(flag) != value}
        title += " with " + ", ".join(_word(flag, value) for flag, value in departs.items())
    return title, {"attack", "objective", *departs}


def without_effect(flags: dict[str, Any]) -> set[str]:
    """Return the flags that belong to attacks and objectives other than those of the run."""
    attack, objective = ATTACKS[flags["attack"]], OBJECTIVES[flags["objective"]]
    every = {name for each in ATTACKS.values() for name in each.flags}
    every |= {name for each in OBJECTIVES.values() for name in each.flags}
    return every - {*attack.flags, *objective.flags, "pgd_alpha"}


def differing(runs: list[dict[str, Any]]) -> list[str]:
    """Return the flags in which runs differ, of those that are part of a run's name (see `options.flag`)."""
    return [name for name in runs[0] if name in NAMED and any(run.get(name) != runs[0][name] for run in runs)]


def ordered(runs: list[dict[str, Any]], among: list[str]) -> list[tuple[float, ...]] | None:
    """Return each run's values of the flags `among`, to sort by; None if a value is not a number."""
    values = [tuple(run[flag] for flag in among) for run in runs]
    numbers = all(type(each) in (int, float) for value in values for each in value)
    return values if among and numbers else None


def name(flags: dict[str, Any], among: list[str], by_method: bool) -> str:
    """Return the name of a run in a comparison.

    Args:
        among: flags in which the compared runs differ.
        by_method: the compared runs differ in the method: begin the name with the method.
    """
    words, omitted = [], without_effect(flags)
    usual = {flag for flag, value in dependent(flags).items() if flags[flag] == value}
    if by_method:
        word, own = method(flags)
        words, omitted = [word], omitted | own | usual
    if "epsilon" in among:
        omitted |= usual - {"fgsm_alpha"} | ({"pgd_alpha"} if flags["pgd_alpha"] == flags["epsilon"] / 4 else set())
    words += [_word(flag, flags[flag]) for flag in among if flag not in omitted]
    return ", ".join(words)


def _word(flag: str, value: Any) -> str:
    shown = SYMBOLS.get(flag, flag.replace("_", "-"))
    if value is None or isinstance(value, bool):
        return shown if value else f"no {shown}"
    values = value if isinstance(value, (tuple, list)) else (value,)
    text = ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in values)
    return f"{shown} = {text}" if flag in SYMBOLS else f"{shown}={text}"


def named(runs: list[AnyRun], by_seed: bool = False) -> dict[str, list[AnyRun]]:
    """Group runs by name. Runs that differ only in the seed share a name, unless `by_seed`; runs that differ in numbers
    are sorted."""
    among = differing([run.flags for run in runs])
    values = ordered([run.flags for run in runs], among)
    if values:
        runs = [run for _, run in sorted(zip(values, runs), key=lambda each: each[0])]
    by_method = len({method(run.flags)[0] for run in runs}) > 1
    by_name: dict[str, list[AnyRun]] = {}
    for run in runs:
        by_name.setdefault(name(run.flags, among, by_method), []).append(run)
    groups: dict[str, list[AnyRun]] = {}
    for title, own in by_name.items():
        if len({run.flags["seed"] for run in own}) == len(own) and (title or len(own) > 1):
            title = title or method(own[0].flags)[0]
            apart = by_seed and len(own) > 1
            groups |= {f"{title}, seed={run.flags['seed']}": [run] for run in own} if apart else {title: own}
        else:  # the runs differ only in their folders
            paths = [run.folder.resolve() for run in own]
            unique = len({path.name for path in paths}) == len(own)
            groups |= {", ".join(filter(None, (title, path.name if unique else str(path)))): [run]
                     for path, run in zip(paths, own)}
    return groups


def mean(values: list[float], scale: float = 100) -> str:
    """Format the mean and, for two or more values, the sample standard deviation; "-" without values."""
    return str(Accuracy([scale * value for value in values]))


def span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def best(epochs: list[dict[str, Any]]) -> int:
    """Return the epoch, from 1, with the highest PGD accuracy among those with as many test images as epoch 1."""
    alike = [i for i, record in enumerate(epochs) if record.get("test_images") == epochs[0].get("test_images")]
    return 1 + max(alike, key=lambda i: epochs[i][PGD])


def collapse(runs: Iterable[list[dict[str, Any]]]) -> str:
    """Describe the collapse of runs: "no", "epoch 5", "epoch 5, then healthy" for one; "2 of 3, epoch 5-7" for several.

    Epochs count from 1; each is a run's first epoch in collapse. "then healthy": the last epoch is not in collapse.
    """
    runs = list(runs)
    states = [collapsed(epochs) for epochs in runs]
    first = [state.index(True) + 1 for state in states if any(state)]
    if len(states) > 1:
        return f"{len(first)} of {len(states)}" + (f", epoch {span(first)}" if first else "")
    return f"epoch {first[0]}{'' if states[0][-1] else ', then healthy'}" if first else "no"


def row(title: str, runs: list[RunRecord]) -> list[Any]:
    """Return the cells of one row of the table, for runs that differ only in the seed."""
    def accuracy(values: list[float], note: str = "") -> Accuracy:
        return Accuracy([100 * value for value in values], note=note)

    last = [run.epochs[-1] for run in runs]
    shown = [accuracy([record[key] for record in last if record.get(key) is not None]) for key in (CLEAN, FGSM, PGD)]
    peaks = [best(run.epochs) for run in runs]
    highest = accuracy([run.epochs[peak - 1][PGD] for run, peak in zip(runs, peaks)], f"@ {span(peaks)}")
    finals = [run.final for run in runs if run.final]
    notes = [*sorted({f"PGD-{each['iters']}-{each['restarts']}" for each in finals}),
             *([f"({len(finals)} of {len(runs)} runs)"] if 0 < len(finals) < len(runs) else [])]
    done, wanted = span([len(run.epochs) for run in runs]), span([run.flags["epochs"] for run in runs])
    return [titled(title, runs), done if done == wanted else f"{done} of {wanted}", *shown, highest,
            collapse(run.epochs for run in runs), accuracy([each["robust_acc"] for each in finals], " ".join(notes))]


def titled(title: str, runs: Collection[Any]) -> str:
    """Return the first cell of a row: the name, and the number of seeds if there are several."""
    return title + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")


def table(groups: dict[str, list[RunRecord]]) -> tuple[tables.Table, str]:
    """Return the table of the runs' results and its caption."""
    heads = ["run", "epochs", "clean", "FGSM", "PGD", "best PGD @ epoch", "collapse", "final evaluation"]
    several = ", mean ± deviation" if any(len(runs) > 1 for runs in groups.values()) else ""
    return ([heads, *(row(title, runs) for title, runs in groups.items())],
            f"accuracy on test images in %{several}; clean, FGSM, PGD: after the last epoch; epochs count from 1")


class Style(NamedTuple):
    colour: Any
    marker: str
    dash: str = "-"


# Style of each method. Colors do not rely on red against green; markers distinguish the curves in gray.
STYLES = {
    "fgsm": Style("#d55e00", "X"), "fgsm-rs": Style("#e69f00", "s"), "zerograd": Style("#0072b2", "o"),
    "zerograd, large q": Style("#56b4e9", "d"), "multigrad": Style("#009e73", "^"),
    "multigrad, parallel": Style("#44aa99", "v", "--"), "pgd": Style("#222222", "D"),
    "n-fgsm": Style("#cc79a7", "P"), "n-aaer": Style("#aa4499", "P", "--"), "rs-aaer": Style("#b8860b", "s", "--"),
    "sora": Style("#999933", "*"), "free": Style("#888888", "h"), "ckpt": Style("#117733", "p"),
    "pgi": Style("#332288", "<"), "nuat": Style("#661100", ">"), "gradalign": Style("#cc6677", "v"),
    "elle": Style("#7a5cc2", "8"), "elle-a": Style("#b199e8", "8", "--"), "trades": Style("#555555", "D", "--"),
    "n-lap": Style("#2a9d8f", "P", ":"), "r-lap": Style("#bc6c25", "s", ":"),
    "liet": Style("#0b8f5a", "H"), "atas": Style("#3a86ff", ">", ":"), "uap": Style("#3a7ca5", "p", "-."),
    "cuap": Style("#6aa6cf", "p", "--"), "fuap": Style("#1d4e73", "p", ":"),
    "pgd-2": Style("#4d4d4d", "D", ":"), "rs-cs": Style("#8c564b", "^", "--"), "mep-cs": Style("#5e4fa2", "<", "--"),
    "gat": Style("#a83232", ">", "--"), "pco": Style("#2f4b7c", "<", ":"),
}
# Styles for runs that the styles of their methods do not distinguish: all pairs of a color and a marker.
COLORS = ("#0077bb", "#ee7733", "#009988", "#cc3311", "#33bbee", "#ee3377", "#555555")
OTHERS = tuple(Style(color, marker) for color, marker, _ in zip(cycle(COLORS), cycle("os^DvP*X"), range(7 * 8)))


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Draw in the style of all figures, independent of matplotlibrc. The user's settings are restored afterwards.

    Raises UsageError if matplotlib is not installed.
    """
    with mock.patch.dict(os.environ):
        os.environ.pop("MPLBACKEND", None)  # may name a backend that is not installed; figures are drawn without one
        try:
            import matplotlib
        except ImportError:
            raise UsageError("a figure needs matplotlib: pip install matplotlib") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "figure.dpi": 150, "savefig.dpi": 150, "font.size": 9, "axes.titlesize": 9, "lines.markersize": 4,
            "lines.linewidth": 1.4, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False,
            "axes.spines.right": False, "legend.frameon": False, "text.parse_math": False, "pdf.fonttype": 42,
            "svg.hashsalt": "plot"})
        yield


def subplots(lines: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Create a figure with a grid of panels, outside pyplot: no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(lines, columns, **options)


def shade(place: int, last: int) -> Any:
    """Return the color at `place` of 0 .. last on a scale from dark to light."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.88 * place / max(1, last))


def styles(runs: list[dict[str, Any]]) -> list[Style]:
    """Choose a style for each run: a color scale if the runs differ in numbers, else the styles of their methods.

    If the methods' styles are not distinct, return styles from OTHERS.
    """
    values = ordered(runs, [flag for flag in differing(runs) if any(flag not in without_effect(run) for run in runs)])
    if values:
        places = [sorted(set(values)).index(value) for value in values]
        return [Style(shade(place, max(places)), "osD^vP*X"[place % 8]) for place in places]
    own = [style for run in runs if (style := style_of_method(run))]
    return own if len(set(own)) == len(runs) else list(islice(cycle(OTHERS), len(runs)))


def style_of_method(flags: dict[str, Any]) -> Style | None:
    """Return the style of the published method with these flags; None if there is no such method."""
    title, _ = method(flags)
    if title == "zerograd" and (flags["zero_qval"] or 0) > 0.6:
        title = "zerograd, large q"
    if title == "multigrad" and flags["multi_parallel"]:
        title = "multigrad, parallel"
    return STYLES.get(title)


def curve(axes, title: str, style: Style, runs: list[list[dict[str, Any]]], key: str) -> None:
    """Draw the mean of the runs over epochs, a band from minimum to maximum, and a cross where a run collapses."""
    scale, values_at = 100 if key.endswith(IN_PERCENT) else 1, {}
    for i in range(max(map(len, runs))):
        values = [scale * epochs[i][key] for epochs in runs if i < len(epochs) and epochs[i].get(key) is not None]
        if values:
            values_at[i + 1] = values
    means = {epoch: statistics.mean(values) for epoch, values in values_at.items()}
    axes.plot(list(means), list(means.values()), color=style.colour, marker=style.marker, linestyle=style.dash,
              label=title, zorder=3, clip_on=False)
    if len(runs) > 1:
        axes.fill_between(list(values_at), [min(values) for values in values_at.values()],
                          [max(values) for values in values_at.values()], color=style.colour, alpha=0.2, linewidth=0)
    for epochs in runs:
        states = collapsed(epochs)
        if any(states) and epochs[states.index(True)].get(key) is not None:
            first = states.index(True)
            axes.plot(first + 1, scale * epochs[first][key], marker="x", markersize=10, markeredgewidth=2,
                      color=style.colour, zorder=4, clip_on=False)


def curves(axes, groups: dict[str, list[list[dict[str, Any]]]], which: list[Style], key: str) -> None:
    """Draw a panel of curves over epochs."""
    for (title, runs), style in zip(groups.items(), which):
        if any(record.get(key) is not None for epochs in runs for record in epochs):
            curve(axes, title, style, runs, key)
    finish(axes, key)


def finish(axes, key: str) -> None:
    """Set the axes of a panel after its curves are drawn. key: metric of the curves."""
    from matplotlib.ticker import MaxNLocator

    cross = any(line.get_marker() == "x" for line in axes.lines)
    axes.set_xlabel("epoch (cross: collapse begins)" if cross else "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if key.endswith("_acc"):
        axes.set_ylim(bottom=0)


@own_style()
def save(figure, path: Path) -> None:
    """Save a figure in the format given by the file name. Equal figures give identical files."""
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    kind = path.suffix[1:].lower()
    with atomic_write(path) as file:
        figure.savefig(file, format=kind, metadata=metadata[kind])


def legend_below(figure, size: float = 7) -> None:
    """Add a legend below all panels and enlarge the figure by the legend's height. Long names are wrapped."""
    width, height = figure.get_size_inches()
    room = int(72 * width / (0.55 * size))  # in letters; a curve's sample takes about 8
    named = {textwrap.fill(line.get_label(), room - 8, break_on_hyphens=False): line
             for axes in figure.axes for line in axes.lines if not line.get_label().startswith("_")}
    columns = max(1, room // (8 + max(len(part) for name in named for part in name.splitlines())))
    rows, deepest = math.ceil(len(named) / columns), 1 + max(name.count("\n") for name in named)
    figure.set_size_inches(width, height + rows * (1.2 * deepest + 0.5) * size / 72)
    figure.legend(named.values(), named, loc="outside lower center", ncols=columns, fontsize=size)


@own_style()
def draw(groups: dict[str, list[RunRecord]], keys: list[str]) -> Any:
    """Draw a figure of the runs with one panel for each key."""
    columns = min(2, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure, grid = subplots(lines, columns, figsize=(5.5 * columns, 3.6 * lines), squeeze=False)
    which = styles([runs[0].flags for runs in groups.values()])
    for axes, key in zip(grid.flat, keys):
        curves(axes, {title: [run.epochs for run in runs] for title, runs in groups.items()}, which, key)
        axes.set_ylabel(TITLES.get(key, f"{key}, %" if key.endswith(IN_PERCENT) else key))
    for axes in grid.flat[len(keys):]:
        axes.remove()
    legend_below(figure)
    return figure


# The curves of runs that are drawn alone, by metric: name and style.
ALONE = {CLEAN: ("clean", Style("#888888", "s")), FGSM: ("FGSM", Style("#d55e00", "X")),
         PGD: ("PGD", Style("#0072b2", "o"))}


@own_style()
def draw_alone(runs: list[RunRecord]) -> Any:
    """Draw a figure of one run, or of runs that differ only in the seed: accuracy on clean images, under FGSM and under
    PGD, in one panel."""
    figure, axes = subplots(figsize=(5.5, 3.6))
    for key, (title, style) in ALONE.items():
        curve(axes, title, style, [run.epochs for run in runs], key)
    finish(axes, PGD)
    flags = runs[0].flags
    axes.set_title(f"{flags['data_set']}, {titled(method(flags)[0], runs)}, epsilon = {flags['epsilon']:g}/255")
    axes.set_ylabel("accuracy on test images, %")
    legend_below(figure)
    return figure


def keys_of(text: str, groups: dict[str, list[RunRecord]]) -> list[str]:
    """Parse --y, metric names separated by commas. Raises UsageError if a metric is in no run."""
    records = [record for runs in groups.values() for run in runs for record in run.epochs]
    known = {key for record in records for key, value in record.items()
             if isinstance(value, (int, float)) and not isinstance(value, bool)} - {"epoch"}
    keys = list(dict.fromkeys(text.split(",")))
    for key in keys:
        if key not in known:
            raise UsageError(f"--y {key}: must be one of {', '.join(sorted(known))}"
                             f"{options.did_you_mean(options.similar(key, known))}")
    return keys


def read_runs(folders: list[str]) -> list[RunRecord]:
    """Read the runs in these folders. Prints the skipped folders and why; raises UsageError if a folder is
    missing or all are skipped."""
    runs: list[RunRecord] = []
    for folder in dict.fromkeys(map(Path, folders)):
        try:
            if not folder.exists():
                raise options.absent(folder)
            runs.append(read_run(folder))
        except UsageError as error:
            if len(folders) == 1 or not folder.exists():
                raise
            say(f"# skipped: {error}", error=True)
    if not runs:
        raise UsageError("none of these folders has a run with a complete epoch")
    return runs


def main(description: str | None = None) -> None:
    """Run plot.py: print a table of runs, and draw their curves."""
    p = options.Parser(description)
    p.add_argument("runs", nargs="+", type=options.path, metavar="RUN", help="folder of a run")
    p.add_argument("--y", metavar="NAME,...", help=f"metrics to plot over the epochs, one panel each, as named in "
                   f"metrics.jsonl (default: {PGD}; for a single run, or runs that differ only in the seed, "
                   f"{', '.join(ALONE)}, in one panel)")
    p.add_argument("--out", type=options.figure_path, metavar="FILE", help="file of the figure: .png, .pdf or .svg")
    options.add_table_flags(p.add_argument)
    args = p.parse_args()
    with one_line_errors():
        out = Path(args.out) if args.out else None
        groups = named(read_runs(args.runs), args.by_seed)
        keys = keys_of(args.y or PGD, groups)
        results, caption = table(groups)
        say(f"{tables.aligned(results)}\n# {caption}", needed=not (out or args.csv or args.latex))
        tables.write(results, caption, args)
        if not out:
            say("# to draw the curves of these runs, add --out=curves.png")
            return
        figure = draw(groups, keys) if args.y or len(groups) > 1 else draw_alone(*groups.values())
        try:
            save(figure, out)
        except OSError as error:
            raise UsageError(f"--out {out} cannot be written ({error.strerror})") from None
        say(f"# saved the curves to {out}")
