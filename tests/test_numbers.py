"""Every number in README.md and experiments/README.md that comes from a result is the one in its file, and every result
names a commit that exists."""
import json
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
from definitions import METHODS, RIVALS

import options
import plot
import watch

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "experiments/README.md")}
RESULTS = {f"{path.parent.name}/{path.stem}": json.loads(path.read_text())
           for path in sorted((ROOT / "experiments/results").glob("*/*.json"))}


def test_every_result_was_made_at_a_commit_of_this_history():
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout
    if git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("needs a clone with its whole history")
    history = set(git("rev-list", "HEAD").split())
    lost = {name for name, result in RESULTS.items()
            if not {start["commit"].removesuffix("-dirty") for start in result["starts"]} <= history}
    assert not lost


# Results, in %


def series(name: str, key: str = "test_robust_acc", scale: str = "cpu-bf16") -> list[float]:
    """A number of every epoch; `name` is that of the result, without its scale and seed."""
    return [100 * epoch[key] for epoch in RESULTS[f"{scale}/{name}_seed=0"]["epochs"]]


def pgd(name: str, epoch: int = 0, scale: str = "cpu-bf16") -> float:
    """Accuracy under PGD-10 after an epoch, counted from 1; 0: the last one."""
    return series(name, scale=scale)[epoch - 1]


def training(name: str, epoch: int = 0, scale: str = "cpu-bf16") -> float:
    return series(name, "train_robust_acc", scale)[epoch - 1]


def clean(name: str, scale: str = "cpu-bf16") -> float:
    return series(name, "test_acc", scale)[-1]


def stem(method: str, data_set: str = "cifar10", epsilon: int = 8, rest: str = "") -> str:
    """The name of the result of a method, as tables call it."""
    flags = RIVALS.get(method) or method.replace("ZeroGrad, q = ", "--attack=zerograd --zero-qval=")
    if epsilon != 8:
        flags += f" --epsilon={epsilon} --pgd-alpha={epsilon / 4:g}"
    return "_".join([data_set, *flags.replace("--attack=", "").replace("--", "").split()]) + rest


def seeds(method: str) -> list[list[dict]]:
    """The epochs of a method's short runs, seed by seed."""
    return [result["epochs"] for key, result in RESULTS.items() if key.startswith(f"cpu-short/{stem(method)}_seed=")]


ZERO, ZEROGRAD, MULTI, PGD10 = (stem(name) for name in (
    "FGSM, zero initialization", "ZeroGrad, q = 0.35", "MultiGrad", "PGD-10"))


def at(epsilon: int, method: str) -> str:
    return stem(method, epsilon=epsilon)


# Tables

FROM_ZERO = {"from random points, as published": "", "from random points, step of 1.25 epsilon, not 2":
             "_fgsm-alpha=1.25", "from zero": "_fgsm-init=zero", "from zero, highest learning rate 0.05, not 0.2":
             "_fgsm-init=zero_lr-max=0.05", "from zero, base width 32, not 16": "_fgsm-init=zero_base-width=32",
             "from zero, q = 0.7": "_fgsm-init=zero"}


def result_of(cells: dict[str, str]) -> tuple[str, str]:
    """The scale and the result that a row, its cells by their titles, is of."""
    titles, (first, *_) = list(cells), cells.values()
    if titles[0] == "`--method`":
        return "short", f"cifar10_method={first.strip('`').replace(' --', '_')}"
    if titles[0] == "ZeroGrad, q = 0.35, at epsilon 8/255":
        return "cpu", stem("ZeroGrad, q = 0.7" if first.endswith("q = 0.7") else "ZeroGrad, q = 0.35",
                           rest=f"{FROM_ZERO[first]}_epochs=5")
    method = re.sub(r"^(epsilon \d+/255|CIFAR-100): |, (collapsed|in bfloat16).*", "", cells.get("trained on", first))
    given = re.match(r"epsilon (\d+)/255", first)
    epsilon = int(given[1] if given else cells.get("epsilon", 8))
    cifar100 = "CIFAR-100" in titles[0] + first
    scale = "cpu-bf16" if cifar100 or epsilon != 8 or first.endswith(", in bfloat16") else "cpu"
    return scale, stem(method, "cifar100" if cifar100 else "cifar10", epsilon)


COLUMNS: dict[str, Callable[[str, str], float]] = {
    "training images under that attack": lambda scale, name: training(name, scale=scale),
    "clean test images": lambda scale, name: clean(name, scale),
    "test images under FGSM": lambda scale, name: series(name, "fgsm_acc", scale)[-1],
    "test images under PGD-10": lambda scale, name: pgd(name, scale=scale),
    "highest in an earlier epoch": lambda scale, name: max(series(name, scale=scale)[:-1]),
    "after the first epoch": lambda scale, name: pgd(name, 1, scale),
    "clean, float32": lambda scale, name: clean(name, "cpu"),
    "clean, bfloat16": lambda scale, name: clean(name),
    "PGD-10, float32": lambda scale, name: pgd(name, scale="cpu"),
    "PGD-10, bfloat16": lambda scale, name: pgd(name),
}


EACH = "short runs: PGD-10, each seed"

# CIFAR-10, epsilon 8/255, from FastAT_Benchmark's benchmark_data.json.
PUBLISHED = {"FGSM, zero initialization": "69.17 / 42.49", "FGSM-RS": "77.66 / 48.27",
             "ZeroGrad, q = 0.35": "75.85 / 51.06", "N-FGSM": "78.59 / 53.07", "PGD-10": "82.36 / 54.17"}


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a page: of each the rows, their cells by their titles."""
    found = []
    for block in re.findall(r"(?:^ *\|.*\|\n)+", text, re.M):
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(lines[0], line)) for line in lines[2:]])
    return found


def rows_of(several: bool) -> list:
    """The rows of results, of one run each or of several seeds."""
    return [pytest.param(cells, id=f"{page}: {' / '.join(list(cells.values())[:2])}") for page, text in PAGES.items()
            for rows in tables(text) for cells in rows
            if COLUMNS.keys() & cells.keys() and ("collapsed" in cells) == several]


@pytest.mark.parametrize("cells", rows_of(several=False))
def test_a_row_says_what_its_result_says(cells):
    scale, name = result_of(cells)
    assert cells.keys() <= COLUMNS.keys() | {*list(cells)[:1], "trained on", "published: clean / PGD-50", EACH}
    published = PUBLISHED.get(next(iter(cells.values())).removesuffix(", in bfloat16"))
    assert cells.get("published: clean / PGD-50", "") in ("", published)
    if EACH in cells:
        assert cells[EACH] == ", ".join(f"{100 * run[-1]['test_robust_acc']:.1f}"
                                        for run in seeds(next(iter(cells.values())).removesuffix(", in bfloat16")))
    for title in COLUMNS.keys() & cells.keys():
        assert float(cells[title]) == pytest.approx(COLUMNS[title](scale, name), abs=0.05 + 1e-9), title


KEYS = {"training images under that attack": "train_robust_acc", "clean test images": "test_acc",
        "test images under FGSM": "fgsm_acc", "test images under PGD-10": "test_robust_acc"}


@pytest.mark.parametrize("cells", rows_of(several=True))
def test_a_row_of_several_seeds_has_their_mean_and_deviation(cells):
    epochs = seeds(cells["trained on"])
    assert {len(run) for run in epochs} == {5}
    assert cells["collapsed"] == f"{sum(any(watch.collapsed(run)) for run in epochs)} of {len(epochs)}"
    for title in KEYS.keys() & cells.keys():
        assert cells[title] == plot.mean([100 * run[-1][KEYS[title]] for run in epochs], 1), title
    assert cells["PGD-10, each seed"] == ", ".join(f"{100 * run[-1]['test_robust_acc']:.1f}" for run in epochs)


def test_every_method_of_several_seeds_has_its_row_and_the_collapse_is_that_of_the_text():
    methods = {key.rpartition("_seed=")[0] for key in RESULTS if key.startswith("cpu-short/")}
    assert len(rows_of(several=True)) == len(methods) > 1
    assert [run[-1]["collapsed"] for run in seeds("ZeroGrad, q = 0.35")] == [False, False, True]


def test_the_minutes_of_a_run_are_those_of_the_results():
    rows, = (rows for rows in tables(PAGES["experiments/README.md"]) if "scale, processor" in rows[0])
    found: dict[tuple[str, str], list[float]] = {}
    for name, result in RESULTS.items():
        words = re.split("_|/", name)
        whole = len(result["epochs"]) == {"cpu-short": 5, "short": 0}.get(words[0], 15)
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


# Sentences: each # is a number, and stands beside what it is to be: a value to its last digit, or a check of its own.

def below(*values: float) -> Callable[[float], bool]:
    return lambda shown: max(values) < shown


def above(*values: float) -> Callable[[float], bool]:
    return lambda shown: min(values) >= shown


def about(*values: float) -> Callable[[float], bool]:
    """Each of them, rounded to a whole number."""
    return lambda shown: all(abs(value - shown) <= 0.5 for value in values)


ZERO100, BACK = stem("FGSM, zero initialization", "cifar100"), stem("ZeroGrad, q = 0.35", rest="_fgsm-init=zero")
SHORT = {name.removeprefix("short/cifar10_method=").removesuffix("_seed=0"): result["epochs"][-1]
         for name, result in RESULTS.items() if name.startswith("short/") and len(result["epochs"]) == 2}
LOSS = {name: 100 * (epoch["fgsm_acc"] - epoch["test_robust_acc"]) for name, epoch in SHORT.items()}
STEEP = ("fgsm", "fgsm-rs", "zerograd")
LUCK = [epochs[-1] for epochs in seeds("ZeroGrad, q = 0.35")]
SENTENCES: dict[str, list[tuple[str, list]]] = {"README.md": [], "experiments/README.md": [
    *[(sentence, [100 * LUCK[seed]["fgsm_acc"], 100 * LUCK[seed]["test_robust_acc"], LUCK[seed]["alignment"]])
      for seed, sentence in (
          (1, "With seed 1, the network has #% under FGSM and #% under PGD-10, and its gradients at two points of the "
              "ball have a mean cosine of #"),
          (2, "With seed 2, it has #% and #%, and a mean cosine of #: a collapse"),
          (0, "With seed 0, it has #% and #%, and a mean cosine of #. The watch does not call that a collapse"))],
    ("the training accuracy is #%, against #% with seed 1", [100 * each["train_robust_acc"] for each in LUCK[:2]]),
    ("MultiGrad and N-FGSM lose less than #% from FGSM to PGD-10", [below(*(
        100 * (epochs[-1]["fgsm_acc"] - epochs[-1]["test_robust_acc"])
        for name in ("FGSM-RS", "ZeroGrad, q = 0.7", "MultiGrad", "N-FGSM") for epochs in seeds(name)))]),
    ("Most lose less than #% from FGSM to PGD-10", [below(*(
        loss for name, loss in LOSS.items() if name not in (*STEEP, "gradalign")))]),
    ("FGSM-RS and ZeroGrad (q = 0.35) lose #% to #%", [above(*(LOSS[name] for name in STEEP)),
                                                       below(*(LOSS[name] for name in STEEP))]),
    ("its perturbation made #% of the training images easier", [100 * SHORT["gradalign"]["abnormal"]]),
    ("had #% under PGD-10 after its first epoch with seed 0, and #% with seed 1, where the table's had #%",
     [100 * RESULTS[f"seeds/{ZEROGRAD}_seed={seed}"]["epochs"][0]["test_robust_acc"] for seed in (0, 1)]
     + [pgd(ZEROGRAD, 1, "cpu")]),
    ("a standard error of up to #%", [100 * (0.25 / 1000) ** 0.5]),
    ("clean accuracy differs by #% and that under PGD-10 by less than #%",
     [abs(clean(at(16, "ZeroGrad, q = 0.7")) - clean(at(16, "ZeroGrad, q = 0.7"), "cpu")),
      below(abs(pgd(at(16, "ZeroGrad, q = 0.7")) - pgd(at(16, "ZeroGrad, q = 0.7"), scale="cpu")))]),
    ("is #% after the first epoch and #% after the second; it comes back once, to #% after the sixth, and is under #% "
     "from the seventh on", [pgd(ZERO, 1, "cpu"), pgd(ZERO, 2, "cpu"), max(series(ZERO, scale="cpu")[2:]),
                             below(*series(ZERO, scale="cpu")[6:])]),
    ("keeps #% under PGD-10, nearly as much as one that is trained on PGD-10 itself (#%, in bfloat16)",
     [about(pgd(MULTI, scale="cpu"), pgd(ZEROGRAD, scale="cpu")), pgd(PGD10)]),
    ("in the twelfth, its accuracy under PGD-10 falls from #% to #%, while its training accuracy jumps from #% to #%",
     [pgd(ZERO100, 11), pgd(ZERO100, 12), training(ZERO100, 11), training(ZERO100, 12)]),
    ("when its 15 epochs were over (clean #%, PGD-10 #%)", [clean(ZERO100, "cpu"), pgd(ZERO100, scale="cpu")]),
    ("as at 8/255: #%, with the highest clean accuracy of all (#%)",
     [pgd(at(4, "ZeroGrad, q = 0.7")), lambda shown: shown == round(max(clean(at(4, m)) for m in METHODS), 1)]),
    ("in the twelfth falls again, from #% to #%, while its training accuracy goes from #% up to #% by the end",
     [pgd(at(12, "ZeroGrad, q = 0.35"), 11), pgd(at(12, "ZeroGrad, q = 0.35"), 12),
      training(at(12, "ZeroGrad, q = 0.35"), 11), training(at(12, "ZeroGrad, q = 0.35"))]),
    ("FGSM-RS is under #% from the third to the seventh epoch", [below(*series(at(12, "FGSM-RS"))[2:7])]),
    ("MultiGrad ends about #% below its #%, with a higher clean accuracy (#% to #%)",
     [about(pgd(at(12, "PGD-10")) - pgd(at(12, "MultiGrad"))), pgd(at(12, "PGD-10")), clean(at(12, "MultiGrad")),
      clean(at(12, "PGD-10"))]),
    ("falls in the last three, from #% to #%, while its training accuracy goes up from #% to #%",
     [pgd(at(16, "MultiGrad"), 12), pgd(at(16, "MultiGrad")), training(at(16, "MultiGrad"), 12),
      training(at(16, "MultiGrad"))]),
    ("ZeroGrad with q = 0.7 is at #% after the third epoch", [pgd(at(16, "ZeroGrad, q = 0.7"), 3)]),
    ("never collapses, and ends at #%, with a clean accuracy of #%", [pgd(at(16, "PGD-10")), clean(at(16, "PGD-10"))]),
    ("q = 0.7 never falls below #% and ends at the same #%",
     [above(*series(at(16, "ZeroGrad, q = 0.7"), scale="cpu")), pgd(at(16, "ZeroGrad, q = 0.7"), scale="cpu")]),
    ("falls to #% in the seventh, and ends at #% (clean: #%)",
     [pgd(at(16, "ZeroGrad, q = 0.35"), 7, "cpu"), pgd(at(16, "ZeroGrad, q = 0.35"), scale="cpu"),
      clean(at(16, "ZeroGrad, q = 0.35"), "cpu")]),
    ("#% under PGD-10 after the third epoch, and, but for one epoch at #%, under #% from then on",
     [pgd(BACK, 3, "cpu"), max(series(BACK, scale="cpu")[3:]), below(*sorted(series(BACK, scale="cpu")[3:])[:-1])]),
]}
NOT_OF_RESULTS = {"README.md": [], "experiments/README.md": ["the 70% of an image's entries", "q = 0.5 and 0.9"]}


def prose(page: str) -> str:
    """The text of a page without tables and blocks of code, in one line."""
    return " ".join(re.sub(r"^ *```[\s\S]*?^ *```|^ *\|.*\|$", "", PAGES[page], flags=re.M).split())


def pattern(sentence: str) -> str:
    return r"(\d+(?:\.\d+)?)".join(map(re.escape, sentence.split("#")))


@pytest.mark.parametrize("page, sentence, expected", [
    pytest.param(page, *pair, id=pair[0][:60]) for page, pairs in SENTENCES.items() for pair in pairs])
def test_a_sentence_says_what_its_results_say(page, sentence, expected):
    found = re.search(pattern(sentence), prose(page))
    assert found, "gone from the page: mend or remove it here"
    assert len(found.groups()) == len(expected)
    for shown, value in zip(found.groups(), expected):
        digits = len(shown.partition(".")[2])
        right = value(float(shown)) if callable(value) else abs(value - float(shown)) <= 0.5 * 10**-digits + 1e-9
        assert right, f"{shown}, where the results have {value}"


ATTACKS = {"clean": "clean", "FGSM": "fgsm", "PGD-10": "pgd-10-1", "PGD-50-10": "pgd-50-10", "CW": "cw",
           "AutoAttack": "autoattack"}


def test_the_judged_networks_are_those_of_the_evaluations():
    rows, = (rows for rows in tables(PAGES["README.md"]) if "CW" in rows[0])
    assert len(rows) == 2
    for row in rows:
        name, _, collapsed = next(iter(row.values())).partition(": ")
        method = {"FGSM, zero initialization": "fgsm"}.get(name, name.lower())
        result = RESULTS[f"short/cifar10_method={method}_epochs=5_seed=0"]
        found = {each["attack"]: each for record in result["evaluations"] for each in record["attacks"]}
        assert watch.collapsed(result["epochs"])[-1] == bool(collapsed)
        for title, attack in ATTACKS.items():
            assert found[attack]["n"] == 1000 and f"{100 * found[attack]['accuracy']:.1f}" == row[title], (name, title)


@pytest.mark.parametrize("page", PAGES)
def test_no_percentage_goes_unchecked(page):
    checked = COLUMNS.keys() | {"CW", "forward and backward passes per step"}
    cells = " ".join(cell for rows in tables(PAGES[page]) for row in rows if not checked & row.keys()
                     for cell in row.values())
    text = prose(page)
    for sentence, _ in SENTENCES[page]:
        text = re.sub(pattern(sentence), "", text)
    for known in NOT_OF_RESULTS[page]:
        text, cells = text.replace(known, ""), cells.replace(known, "")
    assert re.findall(r".{40}\b\d+(?:\.\d+)?%.{10}", text) == []
    assert re.findall(r".{0,40}(?<![\d.])\d+\.\d(?![\d.]).{0,10}", cells) == []


def test_the_passes_of_a_method_are_those_that_its_line_in_options_has():
    title = "forward and backward passes per step"
    rows, = (rows for rows in tables(PAGES["README.md"]) if title in rows[0])
    for row in rows:
        names, passes = re.findall(r"`(.+?)`", row["`--method`"]), row[title].split(", ")
        for name, shown in zip(names, passes * len(names) if len(passes) == 1 else passes, strict=True):
            assert options.METHODS[name].passes == shown, name


def test_every_commit_that_a_page_names_has_results():
    commits = {start["commit"][:7] for result in RESULTS.values() for start in result["starts"]}
    named = set(re.findall(r"\b(?=[a-f]*\d)[0-9a-f]{7}\b", "".join(PAGES.values())))
    assert named <= commits
