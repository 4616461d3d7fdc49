"""Compare the accuracies that a public benchmark reports with the last epochs in its logs.

    python experiments/public_logs/table.py

The command reads curves.jsonl.gz, and writes README.md (the tables) and ranks.png (the figure) into the same folder.
Every line of curves.jsonl.gz is a run: data set, method, seed; `reported`: the accuracies that the benchmark reports of
the run's best checkpoint, in %; and lists with one value per epoch, in hundredths of a percent: `train` (accuracy under
the training attack) and, on validation images, `clean`, `fgsm`, `pgd10` (last-step accuracy) and `average_pgd10` (of
the averaged weights; empty if the run has none).
"""
import gzip
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from singlestep import figures
from singlestep.collapse import collapsed
from singlestep.run.folder import atomic_write

FOLDER = Path(__file__).resolve().parent
DATA_SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny-imagenet": "Tiny-ImageNet"}
METHODS = {
    "elle": "ELLE*", "fgsm_at": "FGSM", "fgsm_cuap": "FGSM-CUAP", "fgsm_fuap": "FGSM-FUAP", "fgsm_mep_cs": "MEP-CS*",
    "fgsm_pco": "FGSM-PCO*", "fgsm_pgi": "FGSM-MEP", "fgsm_rs": "FGSM-RS", "fgsm_rs_cs": "RS-CS*",
    "fgsm_uap": "FGSM-UAP", "free_at": "Free*", "gat": "GAT*", "grad_align": "GradAlign", "liet": "LIET",
    "n_aaer": "N-AAER", "n_fgsm": "N-FGSM", "nu_at": "NuAT", "pgd_at": "PGD", "pgd_at_wa": "PGD, averaged",
    "ssat": "ckpt", "zero_grad": "ZeroGrad"}

TEXT = """\
# What a leaderboard of fast adversarial training hides

[FastAT_Benchmark](https://github.com/fzjcdt/FastAT_Benchmark) (arXiv 2604.22853) publishes the logs of {runs}
training runs: 21 methods on CIFAR-10 and CIFAR-100, 20 on Tiny-ImageNet, three seeds each. The recipe differs from
ours: ResNet18 (Tiny-ImageNet: PreActResNet18), epsilon 8/255, 100 epochs (Free: 50), OneCycle with a peak of 0.1, label
smoothing 0.4, weight averaging. The benchmark evaluates epochs on 1,000 validation images (Tiny-ImageNet: 2,000); its
PGD-10 accuracy is last-step accuracy. An asterisk marks methods that the benchmark trains differently from their
authors: ELLE with lambda 1 (authors: 1000); Free with a learning rate that never decreases; PCO, RS-CS and MEP-CS with
labels smoothed twice; GAT with an attack on a softmax of a softmax in every other batch. The numbers are from the logs
at commit b99c0de (2026-05-06), rounded to 0.01; [curves.jsonl.gz](curves.jsonl.gz) holds them.

The benchmark reports each run's best checkpoint, chosen by PGD-10 on the validation images (for PGD: the last). So the
leaderboard shows no collapse. [Our rule](../../docs/collapse.md#the-rule) flags {ever} of the {runs} runs as collapsed
in some epoch, and {end} of the {runs} runs in the last epoch. On these runs, the labels by eye agree with the rule
([errors of the rule](../report/collapses.md#errors-of-the-rule)).

![Flagged epochs by method](ranks.png)

Each line is a run, from the first epoch to the last; epochs that the rule flags are red. Methods are ordered by the
reported PGD-50. The number on the right is the method's rank by PGD-10 after the last epoch.

In the tables, *reported* is what the benchmark reports on the test set (`benchmark_data.json`): the mean ± sample
standard deviation over the seeds. *Last epoch* is PGD-10 on the validation images after the last epoch, of the network
and of the averaged weights. Ranks are in parentheses; they compare methods by their means. *Flagged epochs* lists, for
each seed that the rule flags, the epochs (from 1). The rule does not flag a network that also loses its FGSM accuracy:
NuAT on Tiny-ImageNet ends with almost no FGSM accuracy.
"""


class Run(NamedTuple):
    """A run of the logs. `epochs` has the records that `collapse.collapsed` reads."""

    data_set: str
    method: str
    seed: int
    reported: dict[str, float]
    epochs: list[dict[str, float]]

    @property
    def name(self) -> str:
        return f"{self.data_set}_{self.method}_seed={self.seed}"


def read_runs() -> list[Run]:
    """Return all runs of curves.jsonl.gz."""
    runs = []
    with gzip.open(FOLDER / "curves.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            run = json.loads(line)
            keys = {"train_robust_acc": "train", "test_acc": "clean", "fgsm_acc": "fgsm", "test_robust_acc": "pgd10",
                    "average_robust_acc": "average_pgd10"}
            columns = {key: run[name] for key, name in keys.items() if run[name]}
            epochs = [dict(zip(columns, (value / 10_000 for value in values))) for values in zip(*columns.values())]
            runs.append(Run(run["data_set"], run["method"], run["seed"], run["reported"], epochs))
    return runs


def spans(states: list[bool]) -> list[tuple[int, int]]:
    """Return the first and the last epoch, from 1, of every series of flagged epochs."""
    found: list[tuple[int, int]] = []
    for epoch, state in enumerate(states, start=1):
        if state and found and found[-1][1] == epoch - 1:
            found[-1] = (found[-1][0], epoch)
        elif state:
            found.append((epoch, epoch))
    return found


def spans_text(states: list[bool]) -> str:
    return ", ".join(figures.span(list(each)) for each in spans(states))


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """Group the runs of one data set by method, in the order of the reported PGD-50."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return dict(sorted(groups.items(), key=lambda each: -reported(each[1])))


def reported(runs: list[Run]) -> float:
    return statistics.mean(run.reported["pgd50"] for run in runs)


def last(runs: list[Run], key: str = figures.PGD) -> float:
    """Return the mean accuracy after the last epoch, in %; -1 if the runs do not have it."""
    values = [100 * run.epochs[-1][key] for run in runs if key in run.epochs[-1]]
    return statistics.mean(values) if values else -1.0


def ranks(groups: dict[str, list[Run]], key: str = figures.PGD) -> dict[str, int]:
    """Return each method's rank by its accuracy after the last epoch."""
    order = sorted(groups, key=lambda method: -last(groups[method], key))
    return {method: order.index(method) + 1 for method in order}


def table(groups: dict[str, list[Run]]) -> str:
    """Return the table of one data set, in Markdown."""
    network, average = ranks(groups), ranks(groups, "average_robust_acc")
    lines = ["| method | reported clean | reported PGD-50 | last epoch, network | last epoch, average "
             "| flagged epochs |",
             "| --- | --- | --- | --- | --- | --- |"]
    for place, (method, runs) in enumerate(groups.items(), start=1):
        fallen = [f"seed {run.seed}: {text}" for run in runs if (text := spans_text(collapsed(run.epochs)))]
        averages = [run.epochs[-1]["average_robust_acc"] for run in runs if "average_robust_acc" in run.epochs[-1]]
        lines.append(f"| {METHODS[method]} | {figures.mean([run.reported['clean'] for run in runs], 1)} "
                     f"| {figures.mean([run.reported['pgd50'] for run in runs], 1)} ({place}) "
                     f"| {figures.mean([run.epochs[-1][figures.PGD] for run in runs])} ({network[method]}) "
                     f"| {figures.mean(averages)}{f' ({average[method]})' if averages else ''} "
                     f"| {'; '.join(fallen) or 'none'} |")
    return "\n".join(lines)


@figures.own_style()
def figure(runs: list[Run]) -> Any:
    """Draw a line for each run, red in flagged epochs; a panel for each data set."""
    drawn, panels = figures.subplots(1, 3, figsize=(12, 5.2))
    for axes, (data_set, title) in zip(panels, DATA_SETS.items()):
        groups = by_method([run for run in runs if run.data_set == data_set])
        last_ranks = ranks(groups)
        for place, own in enumerate(groups.values(), start=1):
            for offset, run in zip((-0.22, 0.0, 0.22), own):
                height = place + offset
                axes.plot([1, len(run.epochs)], [height, height], color="#bbbbbb", linewidth=1.2, solid_capstyle="butt")
                for begin, end in spans(collapsed(run.epochs)):
                    axes.plot([begin - 0.5, end + 0.5], [height, height], color="#cc3311", linewidth=2.6,
                              solid_capstyle="butt")
        axes.set_yticks(range(1, len(groups) + 1), [f"{METHODS[name]}  {i}" for i, name in enumerate(groups, 1)])
        axes.set_ylim(len(groups) + 0.6, 0.4)
        axes.set_title(title)
        axes.set_xlabel("epoch (red: flagged)")
        axes.grid(axis="y", visible=False)
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(1, len(groups) + 1), [str(last_ranks[name]) for name in groups])
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)
    panels[0].set_ylabel("method and its rank by reported PGD-50")
    panels[-1].text(1.16, 0.5, "rank by PGD-10 after the last epoch", transform=panels[-1].transAxes, rotation=-90,
                    va="center")
    return drawn


def main() -> None:
    runs = read_runs()
    states = [collapsed(run.epochs) for run in runs]
    text = [TEXT.format(runs=len(runs), ever=sum(map(any, states)), end=sum(state[-1] for state in states))]
    for data_set, title in DATA_SETS.items():
        text.append(f"\n## {title}\n\n{table(by_method([run for run in runs if run.data_set == data_set]))}\n")
    text.append("\nWritten by `python experiments/public_logs/table.py`.\n")
    figures.save(figure(runs), FOLDER / "ranks.png")
    with atomic_write(FOLDER / "README.md") as file:
        file.write("".join(text).encode())


if __name__ == "__main__":
    main()
