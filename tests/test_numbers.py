"""Every number in README.md, experiments/README.md and docs/ that comes from a result is the one in its file.

Tables are compared by their cells. A number in prose has a mark, an HTML comment that readers do not see:

    12.8%<!-- = pgd(zero, 1) --> after the first epoch, and under 2%<!-- > pgd(zero, 7, 15) --> from the seventh on

The mark compares the number with every value of an expression: `=` to the number's last digit, `>` above, `<=` at most.
Of runs, `clean`, `fgsm`, `pgd` and `train` are accuracies in %, `abnormal` is a share in %, `alignment` a cosine: after
the last epoch, after epoch N, or after epochs N to M, counted from 1. A page names its runs in a comment:

    <!-- runs
    zero = cpu/cifar10_fgsm_fgsm-init=zero_fgsm-alpha=1_seed=0
    most = short/* but short/*_epochs=5_* zero
    -->

by their files in experiments/results/, with wildcards, or by names from above.
"""
import json
import operator
import re
import subprocess
import sys
from collections.abc import Callable
from fnmatch import filter as matching

import pytest
import torch
from helpers import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "experiments"))
from collapses import Run, fell, read_all
from definitions import RIVALS
from public_logs.table import read_runs
from scipy.stats import binomtest

from singlestep import collapse, figures, methods

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "experiments/README.md", *sorted(ROOT.glob("docs/*.md")))}
MEASURED = ("README.md", "experiments/README.md")  # where every percentage is a result's
RESULTS = {f"{path.parent.name}/{path.stem}": json.loads(path.read_text())
           for path in (*sorted((ROOT / "experiments/results").glob("*/*.json")),
                        ROOT / "experiments/report/batchnorm.json")}


def test_every_result_was_made_at_a_commit_of_this_history():
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout
    if git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("needs a clone with its whole history")
    history = set(git("rev-list", "HEAD").split())
    lost = {name for name, result in RESULTS.items()
            if not {start["commit"].removesuffix("-dirty") for start in result["starts"]} <= history}
    assert not lost


# Results: the values of runs, by name


def values(key: str, scale: float = 100) -> Callable[..., Tensor]:
    """of(runs, first, last): a number of every epoch, run by run; counted from 1, by default the last epoch alone."""
    def of(runs: list[str], first: int = 0, last: int = 0) -> Tensor:
        epochs = [RESULTS[run]["epochs"][first - 1:(last or first) or None] for run in runs]
        return torch.tensor([scale * epoch[key] for part in epochs for epoch in part], dtype=torch.float64)
    return of


LABELLED = {f"{run.group.partition(',')[0]}/{run.name}": run for run in read_all()}


def fallen(runs: list[str]) -> int:
    """How many runs collapsed: by their labels, else by the rule."""
    return sum(fell(LABELLED.get(run) or Run("", run, 0, RESULTS[run]["epochs"])) for run in runs)


def upper(runs: list[str]) -> float:
    """The upper end of Wilson's 95% interval of the share of runs that collapse, in %."""
    return 100 * binomtest(fallen(runs), len(runs)).proportion_ci(0.95, method="wilson").high


def logged(method: str, data_set: str = "") -> int:
    """How many of a method's runs in the public logs collapse."""
    runs = [run for run in read_runs() if run.method == method and data_set in ("", run.data_set)]
    assert len(runs) == (3 if data_set else 9)
    return sum(any(collapse.collapsed(run.epochs)) for run in runs)


def reported(method: str) -> float:
    """The mean PGD-50 accuracy that the public logs report for a method on CIFAR-10, in %; LIET's is the highest."""
    found = {name: [run.reported["pgd50"] for run in read_runs() if (run.method, run.data_set) == (name, "cifar10")]
             for name in {run.method for run in read_runs()}}
    means = {name: sum(each) / len(each) for name, each in found.items() if each}
    assert max(means, key=means.__getitem__) == "liet"
    return means[method]


def anew(runs: list[str], attack: str) -> float:
    """Accuracy of a run's network with BatchNorm's statistics estimated anew, in %, as batchnorm.py found it."""
    found, = (row[attack] for run in runs for row in RESULTS[run]["networks"] if row["statistics"] == "anew")
    return 100 * found


clean, fgsm, pgd, train = map(values, ("test_acc", "fgsm_acc", "test_robust_acc", "train_robust_acc"))
FUNCTIONS = {"clean": clean, "fgsm": fgsm, "pgd": pgd, "train": train, "abnormal": values("abnormal"),
             "alignment": values("alignment", 1), "max": max, "abs": abs, "sorted": sorted,
             "upper": upper, "logged": logged, "reported": reported, "anew": anew}


# Marks

MARK = re.compile(r"(\d+(?:\.\d+)?)%?<!-- (=|>|<=) (.+?) -->", re.S)


def runs_of_a_page(text: str) -> dict[str, list[str]]:
    """The runs that a page names."""
    named: dict[str, list[str]] = {}

    def found(words: str) -> list[str]:
        return [run for word in words.split() for run in named.get(word) or matching(RESULTS, word)]

    for line in "\n".join(re.findall(r"^<!-- runs\n(.*?)\n-->$", text, re.M | re.S)).splitlines():
        name, _, words = line.partition(" = ")
        wanted, _, others = words.partition(" but ")
        left_out = found(others)
        named[name] = [run for run in found(wanted) if run not in left_out]
        assert named[name] and all(map(found, words.replace(" but ", " ").split())), f"no such runs: {line}"
    return named


def wrong(text: str) -> list[str]:
    """The marks of a page that their numbers do not agree with."""
    names = {"__builtins__": {}, **FUNCTIONS, **runs_of_a_page(text)}
    return [f"{shown} {sign} {expression}" for shown, sign, expression in MARK.findall(text)
            if not agrees(shown, sign, eval(" ".join(expression.split()), names))]


def agrees(shown: str, sign: str, value) -> bool:
    digits, each = len(shown.partition(".")[2]), torch.as_tensor(value, dtype=torch.float64)
    assert each.numel(), "there is no such epoch"
    if sign == "=":
        return bool(((each - float(shown)).abs() <= 0.5 * 10**-digits + 1e-9).all())
    return bool({">": operator.lt, "<=": operator.ge}[sign](each, float(shown)).all())


def prose(page: str) -> str:
    """The text of a page without tables and blocks of code."""
    return re.sub(r"^ *```[\s\S]*?^ *```|^ *\|.*\|$", "", PAGES[page], flags=re.M)


@pytest.mark.parametrize("page", PAGES)
def test_every_marked_number_is_its_results(page):
    assert wrong(PAGES[page]) == []
    comments = re.findall(r"<!--(?! runs\n| [\w: .]+ -->)", PAGES[page])
    assert len(comments) == len(MARK.findall(prose(page))), "a mark is misspelt, or in a table or code"


def test_there_are_marks_and_a_wrong_number_fails():
    assert len(MARK.findall("".join(PAGES.values()))) >= 61
    runs = "<!-- runs\nzero = cpu/cifar10_fgsm_fgsm-init=zero_fgsm-alpha=1_seed=0\n-->\n"
    for mark, right, *others in (
            ("%<!-- = pgd(zero, 1) -->", "12.8", "12.7", "12.9", "13.0"),
            ("<!-- > pgd(zero, 7,\n15) -->", "2", "1"), ("%<!-- <= train(zero, 2, 15) -->", "36", "37")):
        assert wrong(f"{runs}It has {right}{mark} after it.") == []
        assert all(len(wrong(f"{runs}It has {other}{mark} after it.")) == 1 for other in others)
    with pytest.raises(NameError):
        wrong("12.8%<!-- = pgd(zero, 1) -->")
    with pytest.raises(AssertionError, match="no such runs"):
        wrong("<!-- runs\nzero = cpu/none\n-->\n12.8%<!-- = pgd(zero, 1) -->")


@pytest.mark.parametrize("page", MEASURED)
def test_no_percentage_goes_unchecked(page):
    checked = COLUMNS.keys() | {"passes per training step (standard training: 1)"}
    cells = [cell for rows in tables(PAGES[page]) for row in rows if not checked & row.keys() for cell in row.values()]
    assert re.findall(r".{0,40}\d%", MARK.sub("", " ".join(prose(page).split()))) == []
    assert [cell for cell in cells if re.match(r"\d+\.\d(?![\d.])", cell)] == []


# Tables

FROM_ZERO = {"from random points, as published": "", "from random points, step of 1.25 epsilon, not 2":
             "_fgsm-alpha=1.25", "from zero": "_fgsm-init=zero", "from zero, highest learning rate 0.05, not 0.2":
             "_fgsm-init=zero_lr-max=0.05", "from zero, base width 32, not 16": "_fgsm-init=zero_base-width=32",
             "from zero, q = 0.7": "_fgsm-init=zero"}
# CIFAR-10, epsilon 8/255, from FastAT_Benchmark's benchmark_data.json.
PUBLISHED = {"FGSM from zero": "69.17 / 42.49", "FGSM-RS": "77.66 / 48.27",
             "ZeroGrad, q = 0.35": "75.85 / 51.06", "N-FGSM": "78.59 / 53.07", "PGD-10": "82.36 / 54.17"}


def stem(method: str, data_set: str = "cifar10", epsilon: int = 8) -> str:
    """The name, without its seed, of the result of a method, as tables call it."""
    flags = RIVALS.get(method) or method.replace("ZeroGrad, q = ", "--attack=zerograd --zero-qval=")
    if epsilon != 8:
        flags += f" --epsilon={epsilon} --pgd-alpha={epsilon / 4:g}"
    return "_".join([data_set, *flags.replace("--attack=", "").replace("--", "").split()])


def short_runs(method: str) -> list[str]:
    """The runs of a method at the scale cpu-short, seed by seed."""
    return matching(RESULTS, f"cpu-short/{stem(method)}_seed=*")


def study_runs(cells: dict[str, str], epsilon: int) -> list[str]:
    """The runs of a row of README.md's first table."""
    return matching(RESULTS, f"cpu-short-bf16/{stem(next(iter(cells.values())), epsilon=epsilon)}_seed=*")


def study(show: Callable[[list[str]], str], epsilon: int) -> Callable[[dict[str, str]], str]:
    return lambda cells: show(study_runs(cells, epsilon))


def shown_mean(values: Callable[..., Tensor]) -> Callable[[list[str]], str]:
    return lambda runs: figures.mean(values(runs).tolist(), 1)


def shown_collapses(runs: list[str]) -> str:
    return f"{fallen(runs)} of {len(runs)}"


def runs_of_a_row(cells: dict[str, str], scale: str = "") -> list[str]:
    """The runs that a row, its cells by their titles, is of; `scale`: where a column says so."""
    title, first = next(iter(cells.items()))
    if "collapsed" in cells:
        return short_runs(first)
    if title == "`--method`":
        return [f"short/cifar10_method={first.strip('`').replace(' --', '_')}_seed=0"]
    if title == "ZeroGrad, q = 0.35, at epsilon 8/255":
        method = "ZeroGrad, q = 0.7" if first.endswith("q = 0.7") else "ZeroGrad, q = 0.35"
        return [f"cpu/{stem(method)}{FROM_ZERO[first]}_epochs=5_seed=0"]
    given = re.match(r"epsilon (\d+)/255", first)
    epsilon = int(given[1] if given else cells.get("epsilon", 8))
    cifar100 = "CIFAR-100" in title + first
    scale = scale or ("cpu-bf16" if cifar100 or epsilon != 8 or first.endswith(", in bfloat16") else "cpu")
    method = re.sub(r"^(epsilon \d+/255|CIFAR-100): |, (collapsed|in bfloat16).*", "", cells.get("trained with", first))
    return [f"{scale}/{stem(method, 'cifar100' if cifar100 else 'cifar10', epsilon)}_seed=0"]


def method_of(cells: dict[str, str]) -> str:
    return next(iter(cells.values())).removesuffix(", in bfloat16")


def each_seed(cells: dict[str, str]) -> str:
    return ", ".join(f"{value:.1f}" for value in pgd(short_runs(method_of(cells))))


def mean(values: Callable[..., Tensor], scale: str = "") -> Callable[[dict[str, str]], str]:
    return lambda cells: figures.mean(values(runs_of_a_row(cells, scale)).tolist(), 1)


COLUMNS: dict[str, Callable[[dict[str, str]], str]] = {
    "training images under that attack": mean(train), "clean test images": mean(clean),
    "test images under FGSM": mean(fgsm), "test images under PGD-10": mean(pgd),
    "highest in an earlier epoch": mean(lambda runs: pgd(runs, 1, 14).max().view(1)),
    "after the first epoch": mean(lambda runs: pgd(runs, 1)),
    "clean, float32": mean(clean, "cpu"), "clean, bfloat16": mean(clean, "cpu-bf16"),
    "PGD-10, float32": mean(pgd, "cpu"), "PGD-10, bfloat16": mean(pgd, "cpu-bf16"),
    "PGD-10, each seed": each_seed, "collapsed": lambda cells: shown_collapses(runs_of_a_row(cells)),
    "best checkpoint published, 8/255: clean / PGD-50": lambda cells: PUBLISHED.get(method_of(cells), ""),
    **{f"{title}, {epsilon}/255": study(show, epsilon) for epsilon in (8, 16) for title, show in (
        ("clean", shown_mean(clean)), ("PGD-10", shown_mean(pgd)), ("collapsed", shown_collapses))},
}


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a page: of each the rows, their cells by their titles."""
    found = []
    for block in re.findall(r"(?:^ *\|.*\|\n)+", text, re.M):
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(lines[0], line)) for line in lines[2:]])
    return found


ROWS = [pytest.param(cells, id=f"{page}: {' / '.join(list(cells.values())[:2])}") for page in MEASURED
        for rows in tables(PAGES[page]) for cells in rows if COLUMNS.keys() & cells.keys()]


@pytest.mark.parametrize("cells", ROWS)
def test_a_row_says_what_its_results_say(cells):
    assert cells.keys() <= COLUMNS.keys() | {*list(cells)[:1], "trained with"}
    assert cells == {title: COLUMNS[title](cells) if title in COLUMNS else cell for title, cell in cells.items()}


def test_every_method_of_several_seeds_has_its_row():
    rows = [cells for row in ROWS for cells in row.values if "collapsed" in cells]
    assert {run for cells in rows for run in runs_of_a_row(cells)} == set(matching(RESULTS, "cpu-short/*"))


def test_the_minutes_of_a_run_are_those_of_the_results():
    rows, = (rows for rows in tables(PAGES["experiments/README.md"]) if "scale, processor" in rows[0])
    found: dict[tuple[str, str], list[float]] = {}
    for name, result in RESULTS.items():
        words = re.split("_|/", name)
        whole = len(result["epochs"]) == {"cpu-short": 5}.get(words[0], 15)
        if whole and words[2] in ("fgsm", "zerograd", "multigrad", "pgd"):
            seconds = sum(epoch["train_time"] + epoch["test_time"] for epoch in result["epochs"])
            maker = re.match(r"AMD|Intel", result["starts"][0]["device"])[0]
            method = {"multigrad": "MultiGrad", "pgd": "PGD-10"}.get(words[2], "FGSM or ZeroGrad")
            found.setdefault((f"{name.split('/')[0]}, {maker}", method), []).append(
                (seconds + result["final"]["seconds"]) / 60)
    shown = {(re.match(r"`(\S+)`, \w+", row["scale, processor"])[0].replace("`", ""), method): row[method]
             for row in rows for method in ("FGSM or ZeroGrad", "MultiGrad", "PGD-10") if row.get(method)}
    assert shown.keys() == found.keys()
    for key, minutes in found.items():
        low, *high = map(float, shown[key].split(" to "))
        assert (low, high[0] if high else low) == pytest.approx((min(minutes), max(minutes)), abs=2.5), key


def test_the_attacked_networks_have_the_accuracies_of_their_evaluations():
    attacks = {"clean": "clean", "FGSM": "fgsm", "PGD-10": "pgd-10-1", "PGD-50-10": "pgd-50-10", "CW": "cw",
               "AutoAttack": "autoattack"}
    rows, = (rows for rows in tables(PAGES["docs/accuracy.md"]) if "CW" in rows[0])
    assert len(rows) == len(matching(RESULTS, "short/*_epochs=5_*"))
    for row in rows:
        name, _, collapsed = next(iter(row.values())).partition(": ")
        result = RESULTS[{"FGSM from zero": "short/cifar10_method=fgsm_epochs=5_seed=0",
                          "N-FGSM": "short/cifar10_method=n-fgsm_epochs=5_seed=0"}[name]]
        found = {each["attack"]: each for record in result["evaluations"] for each in record["attacks"]}
        assert any(collapse.collapsed(result["epochs"])) == bool(collapsed)
        for title, attack in attacks.items():
            assert found[attack]["n"] == 1000 and f"{100 * found[attack]['accuracy']:.1f}" == row[title], (name, title)


def test_the_passes_of_a_method_are_those_that_its_line_in_options_has():
    title = "passes per training step (standard training: 1)"
    rows, = (rows for rows in tables(PAGES["README.md"]) if title in rows[0])
    for row in rows:
        names, passes = re.findall(r"`(.+?)`", row["`--method`"]), row[title].split(", ")
        for name, shown in zip(names, passes * len(names) if len(passes) == 1 else passes, strict=True):
            assert methods.METHODS[name].passes == shown, name


def test_every_commit_that_a_page_names_has_results():
    commits = {start["commit"][:7] for result in RESULTS.values() for start in result["starts"]}
    named = set(re.findall(r"\b(?=[a-f]*\d)[0-9a-f]{7}\b", "".join(PAGES[page] for page in MEASURED)))
    assert named <= commits
