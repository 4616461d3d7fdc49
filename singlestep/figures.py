"""Tables and figures of runs: how they ended, and their curves.

A run is named by the flags in which it differs from the others. Runs that differ in the seed alone become one: the
mean, and from the lowest to the highest as a band. Epochs count from 1 here, from 0 in a run's files.
"""
import difflib
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from . import options
from .methods import ATTACKS, DEPENDENT, METHODS, OBJECTIVES
from .options import FLAGS
from .run.console import UsageError, one_line_errors, say
from .run.folder import whole_file

PGD, FGSM, CLEAN = "test_robust_acc", "fgsm_acc", "test_acc"
# What curves are called, where the name in metrics.jsonl says too little.
TITLES = {PGD: "accuracy under PGD, %", FGSM: "accuracy under FGSM, %", CLEAN: "clean accuracy, %",
          "train_robust_acc": "accuracy on training images under their attack, %",
          "val_robust_acc": "accuracy under PGD on validation images, %", "lr": "learning rate",
          "abnormal": "abnormal training images, %", "defence_mean": "mean absolute perturbation, 1/255"}
IN_PERCENT = ("_acc", "abnormal", "train_rise")
NAMED = {name for name, each in FLAGS.items() if each.metadata["named"]}
SYMBOLS = {"zero_qval": "q", "multi_samps": "samples", "multi_th": "agree"}


@dataclass(frozen=True)
class Run:
    """A run as its files tell it: its flags, a record for each epoch, and the final evaluation if there was one."""

    folder: Path
    flags: dict[str, Any]
    epochs: list[dict[str, Any]]
    final: dict[str, Any] | None


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises UsageError where there is none, where it is damaged, or has no epoch behind it."""
    if not (folder / "args.json").is_file():
        raise UsageError(f"{folder} is not the folder of a run: it has no args.json")
    flags, file = options.run_flags(folder), folder / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        epochs = [json.loads(line) for line in lines]
        if any(not math.isfinite(record[name]) for record in epochs for name in ("epoch", PGD, CLEAN)):
            raise ValueError
        file = folder / "final.json"
        final = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if final is not None and not math.isfinite(final["robust_acc"] + final["iters"] + final["restarts"]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{file} is damaged: mend it, or leave this run out") from None
    if not epochs:
        raise UsageError(f"{folder}: no epoch is complete yet")
    return Run(folder, defaults(flags), epochs, final)


def collapsed(epochs: list[dict[str, Any]]) -> list[bool]:
    """For each epoch whether the run is in collapse after it; older runs do not say so."""
    if all("collapsed" in record for record in epochs):
        return [bool(record["collapsed"]) for record in epochs]
    from . import collapse  # with PyTorch

    return collapse.collapsed(epochs)


def defaults(flags: dict[str, Any]) -> dict[str, Any]:
    """All flags of a run, at their defaults where it was made before there were such flags."""
    try:
        dataset = options.data_set(flags["data_set"])
    except UsageError:  # a data set of the user's own
        dataset = options.CIFAR10
    args = options.arguments(dataset, {}).flags()
    return {**args, **dependent({**args, **flags}), **flags}


def dependent(flags: dict[str, Any]) -> dict[str, Any]:
    """The defaults that depend on other flags."""
    return {name: default(SimpleNamespace(**flags)) for name, default in DEPENDENT.items()}


def method(flags: dict[str, Any]) -> tuple[str, set[str]]:
    """The published method that flags make, else the attack and the objective; and the flags that this tells."""
    usual: dict[str, Any] = {"fgsm_init": "random", "objective": "ce", "elle_adaptive": False, "label_smoothing": 0.0}
    for name, published in METHODS.items():
        stands_for = published.flags_on(flags.get("data_set", ""))
        if all(flags.get(flag) == value for flag, value in {**usual, **stands_for}.items()):
            return name, {*usual, *stands_for}
    objective = flags["objective"]
    return flags["attack"] + (f" + {objective}" if objective != "ce" else ""), {"attack", "objective"}


def without_effect(flags: dict[str, Any]) -> set[str]:
    """Flags of attacks and objectives other than the run's."""
    attack, objective = ATTACKS.get(flags["attack"]), OBJECTIVES.get(flags["objective"])
    if attack is None or objective is None:  # of another version
        return set()
    every = {name for each in ATTACKS.values() for name in each.flags}
    every |= {name for each in OBJECTIVES.values() for name in each.flags}
    return every - {*attack.flags, *objective.flags, "pgd_alpha"}


def differing(runs: list[dict[str, Any]]) -> list[str]:
    """The flags in which runs differ, but for those that say nothing of what is trained."""
    return [name for name in runs[0] if name in NAMED and any(run.get(name) != runs[0][name] for run in runs)]


def ordered(runs: list[dict[str, Any]], among: list[str]) -> list[tuple[float, ...]] | None:
    """The numbers in which runs differ, if they differ in numbers alone."""
    values = [tuple(run[flag] for flag in among) for run in runs]
    numbers = all(type(each) in (int, float) for value in values for each in value)
    return values if among and numbers else None


def name(flags: dict[str, Any], among: list[str], by_method: bool) -> str:
    """What a run is called among others, from which it differs in these flags, and perhaps in the method."""
    words, told = [], without_effect(flags)
    usual = {flag for flag, value in dependent(flags).items() if flags[flag] == value}
    if by_method:
        word, own = method(flags)
        words, told = [word], told | own | usual
    if "epsilon" in among:
        told |= usual - {"fgsm_alpha"} | ({"pgd_alpha"} if flags["pgd_alpha"] == flags["epsilon"] / 4 else set())
    words += [_word(flag, flags[flag]) for flag in among if flag not in told]
    return ", ".join(words)


def _word(flag: str, value: Any) -> str:
    shown = SYMBOLS.get(flag, flag.replace("_", "-"))
    if value is None or isinstance(value, bool):
        return shown if value else f"no {shown}"
    values = value if isinstance(value, (tuple, list)) else (value,)
    text = ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in values)
    return f"{shown} = {text}" if flag in SYMBOLS else f"{shown}={text}"


def named(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs by name, in order if they differ in numbers; those that differ in the seed alone have one name."""
    among = differing([run.flags for run in runs])
    values = ordered([run.flags for run in runs], among)
    if values:
        runs = [run for _, run in sorted(zip(values, runs), key=lambda each: each[0])]
    by_method = len({method(run.flags)[0] for run in runs}) > 1
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(name(run.flags, among, by_method), []).append(run)
    told: dict[str, list[Run]] = {}
    for title, own in by_name.items():
        if len({run.flags["seed"] for run in own}) == len(own) and (title or len(own) > 1):
            told[title or method(own[0].flags)[0]] = own
        else:  # nothing but where they are tells them apart
            paths = [run.folder.resolve() for run in own]
            unique = len({path.name for path in paths}) == len(own)
            told |= {", ".join(filter(None, (title, path.name if unique else str(path)))): [run]
                     for path, run in zip(paths, own)}
    return told


def mean(values: list[float], scale: float = 100) -> str:
    """The mean, and from two values on the sample's standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.1f}{deviation}"


def span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def best(epochs: list[dict[str, Any]]) -> int:
    """The epoch, from 1, after which accuracy under PGD was highest, of those judged on as many images as the first."""
    alike = [i for i, record in enumerate(epochs) if record.get("test_images") == epochs[0].get("test_images")]
    return 1 + max(alike, key=lambda i: epochs[i][PGD])


def collapse(runs: Iterable[list[dict[str, Any]]]) -> str:
    """Of a run, the first epoch in collapse, from 1, and whether the last one is sound again; of several, how many."""
    runs = list(runs)
    states = [collapsed(epochs) for epochs in runs]
    first = [state.index(True) + 1 for state in states if any(state)]
    if len(states) > 1:
        return f"{len(first)} of {len(states)}" + (f", epoch {span(first)}" if first else "")
    return f"epoch {first[0]}{'' if states[0][-1] else ', then sound'}" if first else "no"


def row(title: str, runs: list[Run]) -> list[str]:
    """A line of the table."""
    last = [run.epochs[-1] for run in runs]
    shown = [mean([record[key] for record in last if record.get(key) is not None]) for key in (CLEAN, FGSM, PGD)]
    peaks = [best(run.epochs) for run in runs]
    highest = mean([run.epochs[peak - 1][PGD] for run, peak in zip(runs, peaks)])
    finals = [run.final for run in runs if run.final]
    final = [mean([each["robust_acc"] for each in finals]),
             *sorted({f"PGD-{each['iters']}-{each['restarts']}" for each in finals}),
             *([f"({len(finals)} of {len(runs)} runs)"] if 0 < len(finals) < len(runs) else [])]
    done, wanted = span([len(run.epochs) for run in runs]), span([run.flags["epochs"] for run in runs])
    return [title + (f" ({len(runs)} seeds)" if len(runs) > 1 else ""),
            done if done == wanted else f"{done} of {wanted}", *shown, f"{highest} @ {span(peaks)}",
            collapse(run.epochs for run in runs), " ".join(final)]


def table(groups: dict[str, list[Run]]) -> str:
    """How the runs ended, in aligned columns; a column that is empty is left out."""
    heads = ["run", "epochs", "clean", "FGSM", "PGD", "best PGD @ epoch", "collapse", "final evaluation"]
    columns = [column for column in zip(heads, *(row(title, runs) for title, runs in groups.items()))
               if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in zip(*columns)]
    several = ", mean ± deviation" if any(len(runs) > 1 for runs in groups.values()) else ""
    lines.append(f"# accuracy on test images in %, after the last epoch{several}; epochs count from 1")
    return "\n".join(lines)


class Style(NamedTuple):
    colour: Any
    marker: str
    dash: str = "-"


# A colour and a marker for each method, told apart without red and green, and in grey by the markers.
STYLES = {
    "fgsm": Style("#d55e00", "X"), "fgsm-rs": Style("#e69f00", "s"), "zerograd": Style("#0072b2", "o"),
    "zerograd, large q": Style("#56b4e9", "d"), "multigrad": Style("#009e73", "^"),
    "multigrad, parallel": Style("#44aa99", "v", "--"), "pgd": Style("#222222", "D"),
    "n-fgsm": Style("#cc79a7", "P"), "n-aaer": Style("#aa4499", "P", "--"), "rs-aaer": Style("#b8860b", "s", "--"),
    "sora": Style("#999933", "*"), "free": Style("#888888", "h"), "ckpt": Style("#117733", "p"),
    "pgi": Style("#332288", "<"), "nuat": Style("#661100", ">"), "gradalign": Style("#cc6677", "v"),
    "elle": Style("#7a5cc2", "8"), "elle-a": Style("#b199e8", "8", "--"), "trades": Style("#555555", "D", "--"),
}
# For runs of one method that differ in this and that.
OTHERS = (Style("#0077bb", "o"), Style("#ee7733", "s"), Style("#009988", "^"), Style("#cc3311", "D"),
          Style("#33bbee", "v"), Style("#ee3377", "P"), Style("#555555", "*"))


def pyplot() -> Any:
    """matplotlib.pyplot in the style of all figures. Raises UsageError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("a figure needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "figure.dpi": 150, "savefig.dpi": 150, "font.size": 9, "axes.titlesize": 9, "lines.markersize": 4,
        "lines.linewidth": 1.4, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "text.parse_math": False, "pdf.fonttype": 42,
        "svg.hashsalt": "plot"})
    return plt


def styles(runs: list[dict[str, Any]]) -> list[Style]:
    """One for each run of these flags: from dark to light where they differ in numbers, else by method if that tells
    them apart, else any."""
    values = ordered(runs, [flag for flag in differing(runs) if any(flag not in without_effect(run) for run in runs)])
    if values:
        shades, places = pyplot().get_cmap("viridis"), [sorted(set(values)).index(value) for value in values]
        return [Style(shades(0.88 * place / max(1, *places)), "osD^vP*X"[place % 8]) for place in places]
    own = [style for run in runs if (style := style_of_method(run))]
    return own if len(set(own)) == len(runs) else list(islice(cycle(OTHERS), len(runs)))


def style_of_method(flags: dict[str, Any]) -> Style | None:
    """That of a published method, everywhere the same; None where flags make none."""
    title, _ = method(flags)
    if title == "zerograd" and (flags["zero_qval"] or 0) > 0.6:
        title = "zerograd, large q"
    if title == "multigrad" and flags["multi_parallel"]:
        title = "multigrad, parallel"
    return STYLES.get(title)


def curve(axes, title: str, style: Style, runs: list[list[dict[str, Any]]], key: str) -> None:
    """A curve over epochs: the mean of the runs, a band from the lowest to the highest, a cross where one collapses."""
    scale, found = 100 if key.endswith(IN_PERCENT) else 1, {}
    for i in range(max(map(len, runs))):
        values = [scale * epochs[i][key] for epochs in runs if i < len(epochs) and epochs[i].get(key) is not None]
        if values:
            found[i + 1] = values
    means = {epoch: statistics.mean(values) for epoch, values in found.items()}
    axes.plot(list(means), list(means.values()), color=style.colour, marker=style.marker, linestyle=style.dash,
              label=title, zorder=3, clip_on=False)
    if len(runs) > 1:
        axes.fill_between(list(found), [min(values) for values in found.values()],
                          [max(values) for values in found.values()], color=style.colour, alpha=0.2, linewidth=0)
    for epochs in runs:
        states = collapsed(epochs)
        if any(states) and epochs[states.index(True)].get(key) is not None:
            first = states.index(True)
            axes.plot(first + 1, scale * epochs[first][key], marker="x", markersize=10, markeredgewidth=2,
                      color=style.colour, zorder=4, clip_on=False)


def curves(axes, groups: dict[str, list[list[dict[str, Any]]]], which: list[Style], key: str) -> None:
    """A panel of curves over epochs."""
    from matplotlib.ticker import MaxNLocator

    for (title, runs), style in zip(groups.items(), which):
        if any(record.get(key) is not None for epochs in runs for record in epochs):
            curve(axes, title, style, runs, key)
    cross = any(line.get_marker() == "x" for line in axes.lines)
    axes.set_xlabel("epoch (cross: collapse begins)" if cross else "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if key.endswith("_acc"):
        axes.set_ylim(bottom=0)


def label_at_the_ends(figure, size: float = 8) -> None:
    """Name each curve of each panel at its right end, in the order of the ends and one above the other where they lie
    together, with a line to its end."""
    texts = {}
    for axes in figure.axes:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high)
        axes.set_xlim(axes.get_xlim())
        lines = [line for line in axes.lines if not line.get_label().startswith("_") and len(line.get_xdata())]
        texts[axes] = [(line, axes.text(1.06, line.get_ydata()[-1], line.get_label(), fontsize=size, va="center",
                                        transform=axes.get_yaxis_transform())) for line in lines]
    figure.draw_without_rendering()  # the layout makes room for the names, and the panels' heights are known
    for axes, named_lines in texts.items():
        low, high = axes.get_ylim()
        height = axes.get_window_extent().height * 72 / figure.dpi
        gap = min(1.15 * size / height, 1 / max(1, len(named_lines))) * (high - low)
        places = _apart([text.get_position()[1] for _, text in named_lines], gap, low, high)
        for (line, text), place in zip(named_lines, places):
            text.set_y(place)
            style = {"color": line.get_color(), "transform": axes.get_yaxis_transform(), "clip_on": False}
            end = axes.transAxes.inverted().transform(axes.transData.transform((line.get_xdata()[-1], low)))[0]
            axes.plot([end, 1.03], [line.get_ydata()[-1], place], linewidth=0.5, **style)
            axes.plot(1.03, place, marker=line.get_marker(), **style)


def _apart(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places within (low, high), in the order of those wanted and close to them, but no two closer than the gap."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[float]] = []  # less a gap for each one below, they may not fall: those that do share their mean
    for below, i in enumerate(order):
        blocks.append([wanted[i] - gap * below])
        while len(blocks) > 1 and statistics.mean(blocks[-2]) > statistics.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = [statistics.mean(block) for block in blocks for _ in block]
    top = high - gap * (len(wanted) - 1)
    places = {i: gap * below + max(low, min(top, level[below])) for below, i in enumerate(order)}
    return [places[i] for i in range(len(wanted))]


def save(figure, path: Path) -> None:
    """Write a figure in the format that its name ends with; the same figure makes the same file."""
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    kind = path.suffix[1:].lower()
    with whole_file(path) as file:
        figure.savefig(file, format=kind, metadata=metadata[kind])


def draw(groups: dict[str, list[Run]], keys: list[str]) -> Any:
    """The figure of these runs: a panel for each of the keys."""
    plt = pyplot()
    columns = min(2, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(5.5 * columns, 3.6 * lines), squeeze=False,
                                layout="constrained")
    which = styles([runs[0].flags for runs in groups.values()])
    for axes, key in zip(grid.flat, keys):
        curves(axes, {title: [run.epochs for run in runs] for title, runs in groups.items()}, which, key)
        axes.set_ylabel(TITLES.get(key, f"{key}, %" if key.endswith(IN_PERCENT) else key))
    for axes in grid.flat[len(keys):]:
        axes.remove()
    label_at_the_ends(figure)
    return figure


def keys_of(text: str, groups: dict[str, list[Run]]) -> list[str]:
    """The names in --y. Raises UsageError where no run has one of them."""
    records = [record for runs in groups.values() for run in runs for record in run.epochs]
    known = {key for record in records for key, value in record.items()
             if isinstance(value, (int, float)) and not isinstance(value, bool)} - {"epoch"}
    keys = list(dict.fromkeys(text.split(",")))
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UsageError(f"--y {key}: {f'did you mean {near[0]}? ' if near else ''}these runs have "
                             f"{', '.join(sorted(known))}")
    return keys


def read_runs(folders: list[str]) -> list[Run]:
    """The runs in these folders; says which are left out, and why. Raises UsageError where none is left."""
    runs: list[Run] = []
    for folder in dict.fromkeys(map(Path, folders)):
        try:
            if not folder.exists():
                raise UsageError(f"there is no folder {folder}")
            runs.append(read_run(folder))
        except UsageError as error:
            if len(folders) == 1 or not folder.exists():
                raise
            say(f"# left out: {error}", error=True)
    if not runs:
        raise UsageError("none of these is the folder of a run with a complete epoch")
    return runs


def main(description: str | None = None) -> None:
    """plot.py: print the table of runs, and draw their curves."""
    p = options.Parser(description)
    p.add_argument("runs", nargs="+", type=options.path, metavar="RUN", help="a run's folder")
    p.add_argument("--y", default=PGD, metavar="NAME,...", help="what is drawn over the epochs, by its names in "
                   "metrics.jsonl")
    p.add_argument("--out", type=options.figure_path, metavar="FILE", help="the figure: .png, .pdf or .svg")
    args = p.parse_args()
    with one_line_errors():
        out = Path(args.out) if args.out else None
        groups = named(read_runs(args.runs))
        keys = keys_of(args.y, groups)
        say(table(groups))
        if not out:
            say("# with --out=curves.png, their curves are drawn")
            return
        figure = draw(groups, keys)
        try:
            save(figure, out)
        except OSError as error:
            raise UsageError(f"--out {out} cannot be written ({error.strerror})") from None
        say(f"# the curves are in {out}")
