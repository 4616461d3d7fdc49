"""Definitions of the tables: the runs of each, at every scale.

The command of a run has the flags of its data set, of the scale, of the table's row, and a seed, in this order; a later
flag overrides an earlier one. A run of two tables is trained once. To add a table, add it to TABLES: `reproduce.py`
trains its runs, and `report.py` shows them.
"""
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The ZeroGrad paper's commands, up to the attack.
DATASETS = {
    "cifar10": "train_cifar.py --epochs=30 --lr-schedule=cyclic --lr-max=0.2",
    "cifar100": "train_cifar100.py --epochs=30 --lr-schedule=cyclic --lr-max=0.2",
    "svhn": "train_svhn.py --epochs=15 --lr-schedule=cyclic --lr-max=0.01 --full-test",
}


@dataclass(frozen=True)
class Scale:
    """Size of the runs: a description, the `flags` of every run, and the seeds of each row."""

    about: str
    flags: str
    seeds: tuple[int, ...]


SMALL = "--base-width=16 --epochs=15 --final-iters=10 --final-restarts=1 --final-samples=1000"
CPU = f"--device=cpu {SMALL}"
CPU_SHORT = f"{CPU} --epochs=5 --train-samples=20000 --last-samples=1000 --final-iters=50"
SHORT = "--base-width=16 --epochs=2 --train-samples=20000 --last-samples=1000 --final-iters=0"
DEMO = "--base-width=16 --epochs=8 --train-samples=5000 --test-samples=500 --last-samples=500 --final-iters=0"
SCALES = {
    "paper": Scale("the ZeroGrad paper's commands, in bfloat16, for a GPU", "--amp", (0, 1, 2)),
    "cpu": Scale("base width 16 (full: 64), 15 epochs and the whole training set, unless a table says otherwise; for "
                 "CPUs", CPU, (0,)),
    "cpu-short": Scale("base width 16, 20,000 training images and 5 epochs, so that a CPU can train several seeds",
                       CPU_SHORT, (0, 1, 2)),
    "cpu-short-bf16": Scale("the scale cpu-short in bfloat16 and compiled, for CPUs with AVX-512 BF16 or AMX; "
                            "needs a C++ compiler", f"{CPU_SHORT} --amp --compile", (0, 1, 2)),
    "short": Scale("base width 16, 20,000 training images and 2 epochs, to see every method work; no final "
                   "evaluation", SHORT, (0,)),
    "seeds": Scale("the scale cpu with two seeds, only for ZeroGrad with q = 0.35", CPU, (0, 1)),
    "cpu-bf16": Scale("the scale cpu in bfloat16 and compiled, for CPUs with AVX-512 BF16 or AMX; needs a C++ "
                      "compiler", f"--device=cpu --amp --compile {SMALL}", (0,)),
    "cpu-paper": Scale("the ZeroGrad paper's commands (base width 64), in bfloat16 and compiled, for CPUs with AMX; "
                       "the final evaluation on 1,000 images",
                       "--device=cpu --amp --compile --final-samples=1000", (0,)),
    "demo": Scale("base width 16, 5,000 training images, 8 epochs and 500 test images, to see FGSM collapse in "
                  "minutes; no final evaluation", DEMO, (0, 1, 2, 3, 4)),
    "demo-bf16": Scale("the scale demo in bfloat16 and compiled, for CPUs with AVX-512 BF16 or AMX; needs a C++ "
                       "compiler", f"{DEMO} --amp --compile", (0, 1, 2, 3, 4)),
    "smoke": Scale("seconds for each run, on synthetic images: only to see that everything works",
                   "--dummy --device=cpu --base-width=4 --epochs=2 --batch-size=32 --train-samples=96 --test-iters=2 "
                   "--test-samples=64 --last-samples=64 --final-iters=2 --final-restarts=1 --final-samples=64", (0,)),
}


@dataclass(frozen=True)
class Row:
    """Row of a table: one run, or several seeds of it. `cells` has a text for each column.

    `attacks`: attacks of evaluate.py on the last network, separated by commas.
    """

    cells: tuple[str, ...]
    dataset: str
    flags: str
    published: str = ""
    scales: tuple[str, ...] = tuple(name for name in SCALES if name not in ("short", "seeds", "demo", "demo-bf16"))
    attacks: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def at(self, scale: str) -> tuple[Row, ...]:
        """Return the rows that are made at a scale."""
        return tuple(row for row in self.rows if scale in row.scales)


METHODS = {
    "FGSM from zero": "--attack=fgsm --fgsm-init=zero --fgsm-alpha=1",
    "FGSM-RS": "--attack=fgsm --fgsm-alpha=1.25",
    "ZeroGrad, q = 0.35": "--attack=zerograd --zero-qval=0.35",
    "ZeroGrad, q = 0.7": "--attack=zerograd --zero-qval=0.7",
    "MultiGrad": "--attack=multigrad --multi-samps=3",
    "PGD-10": "--attack=pgd",
}
CIFAR100_METHODS = {**{name: METHODS[name] for name in ("FGSM from zero", "FGSM-RS")},
                    "ZeroGrad, q = 0.45": "--attack=zerograd --zero-qval=0.45",
                    **{name: METHODS[name] for name in ("ZeroGrad, q = 0.7", "MultiGrad", "PGD-10")}}
SVHN_METHODS = {name: flags for name, flags in METHODS.items() if name != "ZeroGrad, q = 0.35"}
PARALLEL = {"MultiGrad, parallel": "--attack=multigrad --multi-samps=3 --multi-parallel"}
RIVALS = {
    **METHODS,
    "N-FGSM": "--method=n-fgsm", "N-AAER": "--method=n-aaer", "RS-AAER": "--method=rs-aaer", "SORA": "--method=sora",
    "Free": "--method=free", "ckpt": "--method=ckpt", "FGSM-MEP": "--method=pgi", "NuAT": "--method=nuat",
    "GradAlign": "--method=gradalign", "ELLE": "--method=elle", "ELLE-A": "--method=elle-a",
}
# The methods of --method in the short runs; GradAlign also with ten times its published weight.
BY_NAME = ("fgsm", "fgsm-rs", "zerograd", "multigrad", "n-fgsm", "rs-aaer", "n-aaer", "gradalign",
           "gradalign --gradalign-lambda=2", "elle", "elle-a", "ckpt", "pgi", "nuat", "sora", "liet", "uap", "cuap",
           "fuap", "n-lap", "r-lap", "atas", "pgd-2", "rs-cs", "mep-cs", "gat", "pco", "free", "trades", "pgd")
ZEROGRAD = METHODS["ZeroGrad, q = 0.35"]

# RobustBench's model cards, of runs by other recipes: clean / robust as its authors report it / under AutoAttack.
PUBLISHED = {
    ("cifar10", "FGSM-RS"): "83.34 / 46.06 / 43.21, Wong2020Fast",
    ("cifar100", "PGD-10"): "53.83 / / 18.95, Rice2020Overfitting",
}


def _methods(dataset: str, methods: dict[str, str]) -> tuple[Row, ...]:
    return tuple(Row((name,), dataset, flags, PUBLISHED.get((dataset, name), "")) for name, flags in methods.items())


def _epsilon(value: int) -> str:
    # 8 and 2 are the defaults: those runs are in other tables, too.
    return "" if value == 8 else f" --epsilon={value} --pgd-alpha={value / 4:g}"


def _threshold(samples: int, agree: int) -> str:
    return "" if agree == samples else f" --multi-th={agree}"  # the default, too


def _what_decides(epsilon: int) -> Table:
    changes = {"nothing: as published": "", "step of 1.25 epsilon, not 2": " --fgsm-alpha=1.25",
               "start from zero": " --fgsm-init=zero", "highest learning rate 0.05, not 0.2": " --lr-max=0.05",
               "base width 32": " --base-width=32"}
    rows = (Row((change,), "cifar10", ZEROGRAD + _epsilon(epsilon) + flags) for change, flags in changes.items())
    return Table(f"CIFAR-10, epsilon {epsilon}/255: what decides whether ZeroGrad with q = 0.35 collapses",
                 ("changed",), tuple(rows))


def _from_zero() -> Table:
    # Short, so that CPUs can afford a wider network, yet with a whole cycle of the learning rate.
    zero = f"{ZEROGRAD} --fgsm-init=zero"
    changes = {"nothing: from random points": ZEROGRAD, "step of 1.25 epsilon, not 2": f"{ZEROGRAD} --fgsm-alpha=1.25",
               "from zero": zero, "from zero, highest learning rate 0.05, not 0.2": f"{zero} --lr-max=0.05",
               "from zero, base width 32": f"{zero} --base-width=32",
               "from zero, q = 0.7": f"{METHODS['ZeroGrad, q = 0.7']} --fgsm-init=zero"}
    return Table("CIFAR-10, epsilon 8/255, 5 epochs: ZeroGrad with q = 0.35 started from zero", ("changed",), tuple(
        Row((change,), "cifar10", f"{flags} --epochs=5", scales=("cpu", "cpu-bf16"))
        for change, flags in changes.items()))


def _papers_commands() -> Table:
    rows = [(dataset, name, methods[name]) for dataset, quantile, methods in (
        ("cifar10", "0.35", METHODS), ("cifar100", "0.45", CIFAR100_METHODS), ("svhn", "0.7", SVHN_METHODS))
        for name in (f"ZeroGrad, q = {quantile}", "MultiGrad")]
    return Table("The ZeroGrad paper's commands", ("data set", "trained with"), tuple(
        Row((dataset, name), dataset, flags, scales=("paper", "smoke")) for dataset, name, flags in rows))


# Most important first: with --budget, the first tables are trained first.
TABLES = {
    "paper": _papers_commands(),
    "cifar10": Table("CIFAR-10, epsilon 8/255", ("trained with",), _methods("cifar10", {**METHODS, **PARALLEL})),
    "rivals": Table("CIFAR-10: the methods against catastrophic overfitting, at epsilon 8/255 and 16/255",
                    ("epsilon", "trained with"), tuple(
                        Row((str(value), name), "cifar10", flags + _epsilon(value))
                        for value in (8, 16) for name, flags in RIVALS.items())),
    "quantile": Table("CIFAR-10: ZeroGrad over q", ("q",), tuple(
        Row((q,), "cifar10", f"--attack=zerograd --zero-qval={q}") for q in ("0", "0.2", "0.35", "0.5", "0.7", "0.9"))),
    "cifar100": Table("CIFAR-100, epsilon 8/255", ("trained with",), _methods("cifar100", CIFAR100_METHODS)),
    "epsilon": Table("CIFAR-10: epsilon, 1/255; PGD's step is a quarter of it", ("epsilon", "trained with"), tuple(
        Row((str(value), name), "cifar10", flags + _epsilon(value))
        for value in (4, 8, 12, 16, 2) for name, flags in METHODS.items())),
    "multigrad": Table("CIFAR-10: MultiGrad over its samples and how many must agree", ("samples", "agree"), tuple(
        Row((str(n), str(agree)), "cifar10", f"--attack=multigrad --multi-samps={n}{_threshold(n, agree)}")
        for n, agree in ((2, 2), (3, 3), (3, 2), (5, 5), (5, 4), (5, 3)))),
    "precision": Table("CIFAR-10: the cost of a lower precision, ZeroGrad, q = 0.35", ("precision",), (
        Row(("float32",), "cifar10", f"{ZEROGRAD} --no-amp --no-tf32", scales=("paper", "smoke")),
        Row(("TF32",), "cifar10", f"{ZEROGRAD} --no-amp", scales=("paper",)),  # CUDA's default
        Row(("bfloat16",), "cifar10", f"{ZEROGRAD} --amp", scales=("paper", "smoke")))),
    "svhn": Table("SVHN, epsilon 8/255", ("trained with",), _methods("svhn", SVHN_METHODS)),
    "collapse": _what_decides(8),
    "collapse12": _what_decides(12),
    "from_zero": _from_zero(),
    "methods": Table("CIFAR-10, epsilon 8/255: every `--method`", ("`--method`",), tuple(
        Row((f"`{name}`",), "cifar10", f"--method={name}", scales=("short",)) for name in BY_NAME)),
    "attacks": Table("CIFAR-10, epsilon 8/255: two networks under many attacks, after 5 epochs",
                     ("trained with",), tuple(
        Row((name,), "cifar10", f"--method={method} --epochs=5", scales=("short",),
            attacks="clean,fgsm,pgd-10-1,pgd-50-10,cw,autoattack")
        for name, method in (("N-FGSM", "n-fgsm"), ("FGSM from zero", "fgsm")))),
    "seeds": Table("CIFAR-10, epsilon 8/255: ZeroGrad with q = 0.35 again", ("trained with",), (
        Row(("ZeroGrad, q = 0.35",), "cifar10", ZEROGRAD, scales=("seeds",)),)),
    "demo": Table("CIFAR-10, epsilon 16/255: FGSM collapses, N-FGSM does not", ("trained with",), tuple(
        Row((name,), "cifar10", f"--method={method}{_epsilon(16)}", scales=("demo", "demo-bf16", "smoke"))
        for name, method in (("FGSM from zero", "fgsm"), ("N-FGSM", "n-fgsm")))),
}


@dataclass(frozen=True)
class Experiment:
    """One run of a row at a scale. `name` names its folder and its result."""

    scale: str
    dataset: str
    flags: str
    seed: int
    attacks: str = ""

    @classmethod
    def of(cls, row: Row, scale: str, seed: int) -> "Experiment":
        """Return the run of a row, without flags that the scale also sets."""
        given = SCALES[scale].flags.split()

        def holds(flag: str) -> bool:
            return flag in given or (flag == "--no-amp" and "--amp" not in given)

        flags = " ".join(flag for flag in row.flags.split() if not holds(flag))
        return cls(scale, row.dataset, flags, seed, row.attacks)

    @property
    def name(self) -> str:
        words = [word.removeprefix("--").removeprefix("attack=") for word in self.flags.split()]
        return "_".join([self.dataset, *words, f"seed={self.seed}"])

    @property
    def command(self) -> list[str]:
        """Return script and flags, each flag once, without --data-dir, --fname and --resume."""
        script, *flags = DATASETS[self.dataset].split()
        flags += [*SCALES[self.scale].flags.split(), *self.flags.split(), f"--seed={self.seed}"]
        return [script, *{flag.split("=")[0].replace("--no-", "--"): flag for flag in flags}.values()]

    @property
    def evaluation(self) -> list[str]:
        """Return script and flags of the evaluation, without the run's folder; empty for a table without attacks."""
        return ["evaluate.py", f"--attacks={self.attacks}", "--samples=1000"] if self.attacks else []

    @property
    def epochs(self) -> int:
        return next(int(flag.split("=")[1]) for flag in self.command if flag.startswith("--epochs="))


def experiments(tables: list[str], scale: str, seeds: tuple[int, ...]) -> list[Experiment]:
    """Return the runs of `tables`, each once: table by table, and within a table seed by seed."""
    return list(dict.fromkeys(Experiment.of(row, scale, seed)
                              for table in tables for seed in seeds for row in TABLES[table].at(scale)))
