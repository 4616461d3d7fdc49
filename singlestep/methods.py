"""What the command line offers by name: attacks, objectives, published methods, networks. Records, data only.

The key of an attack, an objective or a network is the name of its function or class in attacks.py, objectives.py or
networks.py. `keywords` says which flag each of its keywords gets its value from, in the unit that `options.Args`
states for the flag. To add a method, add its function, its record here and, if it has one, its flag in options.py.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Attack:
    """A perturbation of attacks.py.

    keywords: keyword of the function -> flag; start: the attack computes logits and gradient at its starting point,
    which an objective may use; update: function of attacks.py for the gradient that the backward pass leaves in delta;
    replays: flag that says how many steps train on one batch; defaults: flags whose default is another with this
    attack; requires: flags that must have these values.
    """

    keywords: dict[str, str] = field(default_factory=dict)
    start: bool = True
    update: str | None = None
    replays: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, Any] = field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        """The flags that this attack reads, beside --epsilon."""
        return [*self.keywords.values(), *([self.replays] if self.replays else [])]


@dataclass(frozen=True)
class Objective:
    """A loss of objectives.py.

    keywords: keyword of the function -> flag; start: it needs what the attack computed at its start; graph: and the
    graph behind those logits; second_derivative: it differentiates an input gradient; whole_batch: it is no mean over
    images, so that a process's share of a batch has another value than the whole batch.
    """

    keywords: dict[str, str] = field(default_factory=dict)
    start: bool = False
    graph: bool = False
    second_derivative: bool = False
    whole_batch: bool = False

    @property
    def flags(self) -> list[str]:
        """The flags that this objective reads, beside --epsilon."""
        return list(self.keywords.values())

    @property
    def compiles(self) -> bool:
        """Whether torch.compile can take it: it cannot keep a graph, nor differentiate twice."""
        return not (self.graph or self.second_derivative)


@dataclass(frozen=True)
class Method:
    """A published pair of attack and objective.

    flags: the flags that it sets; passes: forward and backward passes of a training step, counted as one each pair;
    source: its paper; on: flags that it sets on one data set alone, by the data set's name.
    """

    flags: dict[str, Any]
    passes: str
    source: str
    on: dict[str, dict[str, Any]] = field(default_factory=dict)

    def flags_on(self, data_set: str) -> dict[str, Any]:
        """The flags that it sets on a data set."""
        return {**self.flags, **self.on.get(data_set, {})}


ATTACKS: dict[str, Attack] = {
    "multigrad": Attack(dict(alpha="fgsm_alpha", samples="multi_samps", threshold="multi_th",
                             parallel="multi_parallel")),
    "zerograd": Attack(dict(alpha="fgsm_alpha", q="zero_qval", steps="zero_iters", init="fgsm_init")),
    "fgsm": Attack(dict(alpha="fgsm_alpha", init="fgsm_init")),
    "pgd": Attack(dict(alpha="pgd_alpha", steps="pgd_iters")),
    "none": Attack(start=False),
    "nfgsm": Attack(dict(alpha="fgsm_alpha", k="noise_k"), defaults=dict(fgsm_alpha=1.0)),
    "sora": Attack(update="sora_update", requires=dict(objective="ce", label_smoothing=0.0, amp_impl="native")),
    "ckpt": Attack(dict(alpha="fgsm_alpha", count="ckpt_count"), defaults=dict(fgsm_alpha=1.25)),
    "free": Attack(start=False, update="free_update", replays="free_replays"),
    "pgi": Attack(dict(alpha="fgsm_alpha", reset="pgi_reset", smoothing="label_smoothing"),
                  defaults=dict(fgsm_alpha=1.0)),
    "kl": Attack(dict(alpha="pgd_alpha", steps="pgd_iters"), start=False),
    "nuclear": Attack(dict(alpha="fgsm_alpha", weight="nuclear_lambda"), start=False, defaults=dict(fgsm_alpha=1.0)),
}

OBJECTIVES: dict[str, Objective] = {
    "ce": Objective(dict(smoothing="label_smoothing")),
    "gradalign": Objective(dict(smoothing="label_smoothing", weight="gradalign_lambda"), start=True,
                           second_derivative=True),
    "elle": Objective(dict(smoothing="label_smoothing", weight="elle_lambda", adaptive="elle_adaptive")),
    "aaer": Objective(dict(smoothing="label_smoothing", weights="aaer_lambdas"), start=True, whole_batch=True),
    "trades": Objective(dict(smoothing="label_smoothing", beta="trades_beta")),
    "nuclear": Objective(dict(smoothing="label_smoothing", weight="nuclear_lambda"), whole_batch=True),
    "logits": Objective(dict(smoothing="label_smoothing", weight="logits_lambda"), start=True, graph=True),
}

METHODS: dict[str, Method] = {
    "fgsm": Method(dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.0), "2", "arXiv 1412.6572"),
    "fgsm-rs": Method(dict(attack="fgsm", fgsm_alpha=1.25), "2", "arXiv 2001.03994"),
    "zerograd": Method(dict(attack="zerograd"), "2", "arXiv 2103.15476"),
    "multigrad": Method(dict(attack="multigrad"), "4", "arXiv 2103.15476"),
    "pgd": Method(dict(attack="pgd"), "11", "arXiv 1706.06083"),
    "n-fgsm": Method(dict(attack="nfgsm", fgsm_alpha=1.0), "2", "arXiv 2202.01181"),
    "n-aaer": Method(dict(attack="nfgsm", fgsm_alpha=1.0, objective="aaer"), "2", "arXiv 2404.08154"),
    "rs-aaer": Method(dict(attack="fgsm", fgsm_alpha=1.25, objective="aaer"), "2", "arXiv 2404.08154"),
    "gradalign": Method(dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.25, objective="gradalign"), "5",
                        "arXiv 2007.02617"),
    "elle": Method(dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.0, objective="elle"), "5", "arXiv 2401.11618"),
    "elle-a": Method(dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.0, objective="elle", elle_adaptive=True), "5",
                     "arXiv 2401.11618"),
    "free": Method(dict(attack="free"), "1", "arXiv 1904.12843"),
    "ckpt": Method(dict(attack="ckpt", fgsm_alpha=1.25), "2.7", "arXiv 2010.01799"),
    "pgi": Method(dict(attack="pgi", fgsm_alpha=1.0, objective="logits", label_smoothing=4 / 9), "2.7",
                  "arXiv 2207.08859", {"CIFAR-100": dict(label_smoothing=40 / 99, pgi_reset=10)}),
    "nuat": Method(dict(attack="nuclear", fgsm_alpha=1.0, objective="nuclear"), "3.3", "NeurIPS 2021"),
    "trades": Method(dict(attack="kl", objective="trades"), "12.3", "arXiv 1901.08573"),
    "sora": Method(dict(attack="sora"), "2", "arXiv 2606.00738"),
}

# The training protocols of other comparisons: the flags that each sets.
RECIPES: dict[str, dict[str, Any]] = {
    # github.com/fzjcdt/FastAT_Benchmark, but for its learning rate, which moves once an epoch
    "fastat": dict(model="ResNet18", epochs=100, lr_schedule="onecycle", lr_max=0.1, label_smoothing=0.4, ema=0.9995,
                   val_size=1000, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), final_model="best"),
}

# The networks: keyword of the class -> flag.
MODELS: dict[str, dict[str, str]] = {
    **{f"PreActResNet{depth}": dict(base_width="base_width", shortcut="shortcut") for depth in (18, 34, 50, 101, 152)},
    "ResNet18": dict(base_width="base_width"),
    "WideResNet": dict(width_factor="width_factor"),
}


# Weights as published, which depend on other flags: of `args`, an options.Args.


def gradalign_lambda(args) -> float:
    """Log-linear in epsilon, on SVHN from another point (arXiv 2007.02617)."""
    return 2.5 * 10 ** ((args.epsilon - 8) / 39.2) if args.data_set == "SVHN" else 0.2 * 10 ** ((args.epsilon - 8) / 8)


def elle_lambda(args) -> float:
    """By epsilon (arXiv 2401.11618)."""
    return 4000.0 if args.elle_adaptive else 1000.0 if args.epsilon <= 8 else 5000.0 if args.epsilon <= 20 else 10000.0


def aaer_lambdas(args) -> tuple[float, float, float]:
    """For the nearest of the published epsilons, by data set, and by whether delta is clipped to the ball
    (arXiv 2404.08154)."""
    table = {("CIFAR-10", True): {8: (2.5, 1.5), 12: (5, 2.75), 16: (7, 3.25), 32: (5.75, 1.5)},
             ("CIFAR-10", False): {8: (1.5, 0.15), 12: (5, 0.55), 16: (8.5, 1.5), 32: (2.75, 0.75)},
             ("CIFAR-100", True): {8: (3.5, 1.5), 12: (3.5, 2.75), 16: (6, 2.25), 32: (5, 0.75)},
             ("CIFAR-100", False): {8: (1.5, 0.15), 12: (3.5, 0.3), 16: (6, 0.5), 32: (3.5, 0.5)}}
    values = table["CIFAR-100" if args.data_set == "CIFAR-100" else "CIFAR-10", args.attack != "nfgsm"]
    return (1.0, *values[min(values, key=lambda epsilon: abs(epsilon - args.epsilon))])


def fgsm_alpha(args) -> float:
    """The attack's own, else 2, as in arXiv 2103.15476."""
    return ATTACKS[args.attack].defaults.get("fgsm_alpha", 2.0)


# Flags whose default depends on others.
DEPENDENT: dict[str, Callable[[Any], Any]] = {
    "gradalign_lambda": gradalign_lambda, "elle_lambda": elle_lambda, "aaer_lambdas": aaer_lambdas,
    "fgsm_alpha": fgsm_alpha,
}
