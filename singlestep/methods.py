"""Registry of the attacks, objectives, methods, recipes and networks that flags select by name, and the
defaults that depend on other flags.

The key of an attack, an objective or a network is the name of its function or class in attacks.py, objectives.py or
networks.py. `keywords` maps each keyword of the function or class to the flag that gives its value; `Args.keywords`
converts the value from the command line's unit to the function's. To add a method, add its function, its record here
and, if it has one, its flag in options.py.

Attributes marked "text" are for the tables in docs/methods.md, which explains their symbols. `Method.text` is for the
table in README.md and for --method NAME --help; `compared` and `differs` are for docs/comparisons.md. `python
docs/tables.py --write` copies them to the tables.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NORMS = ("l_inf", "l_2")  # of the ball


@dataclass(frozen=True)
class Attack:
    """A perturbation of attacks.py.

    Attributes:
        keywords: keyword of the function -> flag.
        also: other flags on which the value of a keyword depends.
        start: the attack computes logits and gradient at its starting point, which an objective may use.
        eval_mode: the attack runs the network in eval mode.
        update: function of attacks.py, called after the optimizer's step with the gradient of the loss at `update_at`.
        update_at: "delta" or "start".
        update_keywords: keyword of `update` -> flag.
        replays: flag with the number of training steps per batch.
        moves_weights: the attack moves the weights after its first pass, so no objective can use the logits at its
            starting point.
        stored: number of tensors of the shape of a perturbation that are stored for each training image.
        stored_padded: the stored tensors have the shape of padded images.
        norms: norms for which the attack has a published form.
        defaults: flag -> default with this attack.
        requires: flag -> required value.
        starts_at: text: the starting point of delta.
        step: text: formula of the next delta, before the clip.
        clip: text: the set to which the next delta is clipped. AAER's default weights depend on whether it has "ball".
    """

    keywords: dict[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    start: bool = True
    eval_mode: bool = False
    update: str | None = None
    update_at: str = "delta"
    update_keywords: dict[str, str] = field(default_factory=dict)
    moves_weights: bool = False
    stored: int = 0
    stored_padded: bool = False
    norms: tuple[str, ...] = ("l_inf",)
    replays: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, Any] = field(default_factory=dict)
    starts_at: str = ""
    step: str = ""
    clip: str = "ball, pixels"

    @property
    def flags(self) -> list[str]:
        """Flags that this attack reads, besides --epsilon."""
        return [*self.keywords.values(), *self.also, *self.update_keywords.values(),
                *([self.replays] if self.replays else [])]


@dataclass(frozen=True)
class Objective:
    """A loss of objectives.py.

    Attributes:
        keywords: keyword of the function -> flag.
        start: the objective needs the attack's logits and gradient at its starting point.
        graph: the objective backpropagates through those logits.
        second_derivative: the objective differentiates an input gradient.
        whole_batch: the loss is not a mean over images, so it depends on how processes share the batch.
        norms: norms for which the objective has a published form.
        requires: flag -> required value.
        loss: text: formula of the training loss.
        weighting: text: how lambda is chosen.
    """

    keywords: dict[str, str] = field(default_factory=dict)
    start: bool = False
    graph: bool = False
    second_derivative: bool = False
    whole_batch: bool = False
    norms: tuple[str, ...] = ("l_inf",)
    requires: dict[str, Any] = field(default_factory=dict)
    loss: str = ""
    weighting: str = ""

    @property
    def flags(self) -> list[str]:
        """Flags that this objective reads, besides --epsilon."""
        return list(self.keywords.values())

    @property
    def compiles(self) -> bool:
        """Whether torch.compile works with this objective: no kept graph, no double backward pass."""
        return not (self.graph or self.second_derivative)


@dataclass(frozen=True)
class Method:
    """A published pair of attack and objective.

    Attributes:
        flags: flag -> value.
        passes: forward-backward passes in a training step.
        source: the paper.
        on: name of a data set -> flags for this data set only.
        text: one-line description.
        compared: what the implementation was compared with, and how.
        differs: differences from the authors' code.
    """

    flags: dict[str, Any]
    passes: str
    source: str
    on: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: str = ""
    compared: str = "formulas of the authors' code, in float64"
    differs: str = ""

    def flags_on(self, data_set: str) -> dict[str, Any]:
        """Return the flags that this method sets on a data set."""
        return {**self.flags, **self.on.get(data_set, {})}


@dataclass(frozen=True)
class Recipe:
    """The training protocol of a paper or a benchmark, for any method.

    Attributes:
        flags: flag -> value.
        on: name of a data set -> flags for this data set only.
        methods: method -> flags for this method only.
    """

    flags: dict[str, Any]
    on: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)

    def flags_on(self, data_set: str, method: str | None) -> dict[str, Any]:
        """Return the flags that this recipe sets for a method on a data set."""
        return {**self.flags, **self.on.get(data_set, {}), **self.methods.get(method or "", {})}


UAP: dict[str, Any] = dict(  # common to FGSM-UAP, FGSM-CUAP and FGSM-FUAP
    update="uap_update", update_at="start", update_keywords=dict(decay="uap_decay"), defaults=dict(fgsm_alpha=1.0),
    requires=dict(amp_impl="native"))

ATTACKS: dict[str, Attack] = {
    "multigrad": Attack(
        dict(alpha="fgsm_alpha", samples="multi_samps", threshold="multi_th", parallel="multi_parallel",
             smoothing="attack_smoothing"),
        starts_at="0",
        step="delta + alpha s; s: the sign on which at least `--multi-th` (-1: all) of the gradients at "
             "`--multi-samps` points x + U(±epsilon) agree, else 0"),
    "zerograd": Attack(
        dict(alpha="fgsm_alpha", q="zero_qval", steps="zero_iters", init="fgsm_init", smoothing="attack_smoothing"),
        starts_at="0 or U(±epsilon)",
        step="delta + alpha * sign(z), `--zero-iters` times; z: g, but 0 where abs(g) is below the q-quantile of its "
             "image; q: `--zero-qval`"),
    "fgsm": Attack(
        dict(alpha="fgsm_alpha", init="fgsm_init", smoothing="attack_smoothing", norm="norm"), norms=NORMS,
        starts_at="0 or U(±epsilon)", step="delta + alpha * sign(g)"),
    "pgd": Attack(
        dict(alpha="pgd_alpha", steps="pgd_iters", init="fgsm_init", norm="norm"), also=("pgd_step",), norms=NORMS,
        starts_at="0 or U(±epsilon)", step="delta + alpha * sign(g), `--pgd-iters` times"),
    "none": Attack(start=False, norms=NORMS, starts_at="0", step="none", clip="none"),
    "nfgsm": Attack(
        dict(alpha="fgsm_alpha", k="noise_k", smoothing="attack_smoothing"), defaults=dict(fgsm_alpha=1.0),
        starts_at="U(±k * epsilon); k: `--noise-k`", step="delta + alpha * sign(g)", clip="pixels"),
    "sora": Attack(
        dict(norm="norm"), norms=NORMS, update="sora_update",
        requires=dict(objective="ce", label_smoothing=0.0, amp_impl="native"),
        starts_at="U(±epsilon)",
        step="delta + a * r * sign(g); r ~ U(0, 1) for each entry; a = 2 * epsilon * min(1, 0.02 / (1 - v)); v: moving "
             "average (weight of the new value 0.05, initial value 0.99) of the mean over images of sum(sign(g) * g') "
             "/ norm1(g), clipped to ±1; g': the gradient at the next delta",
        clip="pixels"),
    "ckpt": Attack(
        dict(alpha="fgsm_alpha", count="ckpt_count", mode="ckpt_mode", smoothing="attack_smoothing"), eval_mode=True,
        defaults=dict(fgsm_alpha=1.25),
        starts_at="U(±epsilon)",
        step="(k / c) * box(delta + alpha * sign(g)); k: the smallest of 1, ..., c - 1 at which the network in eval "
             "mode misclassifies the image, else c; k = 0 if x + eta is misclassified; c: `--ckpt-count`; g and the "
             "check of x + eta are from a pass in the mode `--ckpt-mode`"),
    "free": Attack(
        start=False, update="free_update", replays="free_replays",
        starts_at="delta of the previous training step",
        step="delta + epsilon * sign(g), for the next training step; g is from the backward pass of the weights"),
    "pgi": Attack(
        dict(alpha="fgsm_alpha", reset="pgi_reset", smoothing="label_smoothing"), stored=2,
        defaults=dict(fgsm_alpha=1.0),
        starts_at="D, stored for each image; every `--pgi-reset` epochs, D = ±epsilon at random and M = 0",
        step="D + alpha * sign(g), g with smoothed labels; then M = 0.3 * M + g / norm1(g), D = box(D + alpha * "
             "sign(M))"),
    "liet": Attack(
        dict(alpha="fgsm_alpha", smoothing="liet_smoothing", noise="liet_noise", every="liet_every"), eval_mode=True,
        defaults=dict(fgsm_alpha=1.0),
        starts_at="t * L_y, in which each entry is replaced by U(±h) with probability rho; t = ±1 at random and rho ~ "
                  "U(`--liet-noise`) for each batch; L_c = epsilon * sign(gradient of nCE at a gray image for class "
                  "c), in eval mode, recomputed every `--liet-every` batches; h = epsilon, or 2 * epsilon above "
                  "epsilon 8",
        step="delta + alpha * sign(g), g with nCE, the objective's", clip="ball (up to epsilon 8), pixels"),
    "uap": Attack(
        dict(alpha="fgsm_alpha", a="uap_alpha", smoothing="label_smoothing"), **UAP,
        starts_at="box(u); u: one for all images, at first ±a at random; a: `--uap-alpha`",
        step="delta + alpha * sign(g), g with smoothed labels; after the weights' step, m = `--uap-decay` * m + "
             "mean(G) / norm1(G), u = u + a * sign(m), clipped to ±a; G: the sum of g and the gradient of the "
             "training loss with respect to eta"),
    "cuap": Attack(
        dict(alpha="fgsm_alpha", a="uap_alpha", smoothing="label_smoothing"), **UAP,
        starts_at="box(u_y), one u for each class",
        step="as `uap`; u_k and m_k of the classes in the batch move, with the mean of G over their images"),
    "fuap": Attack(
        dict(alpha="fgsm_alpha", a="uap_alpha", count="fuap_rows", smoothing="label_smoothing"), **UAP,
        starts_at="box(v + u_j), v ~ U(±epsilon); two linear layers learn to classify the images from the features of "
                  "x + v; the first has `--fuap-rows` outputs, and j is the index of the largest",
        step="as `cuap`, with j in place of y"),
    "pco": Attack(
        dict(alpha="fgsm_alpha", smoothing="label_smoothing"), stored=1, defaults=dict(fgsm_alpha=1.0),
        starts_at="D, stored for each image; in the first epoch ±epsilon at random",
        step="D + alpha * sign(g), g with smoothed labels; then D = the next delta"),
    "kl": Attack(
        dict(alpha="pgd_alpha", steps="pgd_iters"), also=("pgd_step",), start=False, eval_mode=True,
        starts_at="0.001 N(0, 1)",
        step="delta + alpha * sign(h), `--pgd-iters` times; h: the gradient of KL(p(x) ‖ p(x + delta)) in eval mode"),
    "nuclear": Attack(
        dict(alpha="fgsm_alpha", weight="nuclear_lambda", smoothing="attack_smoothing"), start=False, eval_mode=True,
        defaults=dict(fgsm_alpha=1.0),
        starts_at="±epsilon / 2 at random",
        step="delta + alpha * sign(h); h: the gradient of CE(x + delta) and, in every other training step, + lambda * "
             "norm_nuclear(f(x) - f(x + delta)) / B, with f(x + delta) in eval mode; lambda: as in the objective"),
    "n_lap": Attack(
        dict(alpha="fgsm_alpha", k="noise_k", beta="lap_beta", up="lap_up"), moves_weights=True,
        defaults=dict(fgsm_alpha=1.0), requires=dict(amp_impl="native"),
        starts_at="U(±k * epsilon); k: `--noise-k`",
        step="delta + alpha * sign(g); then the weights of layer l = 1, ..., L become w_l - beta * (1 - (ln l / ln "
             "L)^0.3) * norm2(w_l) * b_l / norm2(b_l), with `--lap-up` plus instead of minus; b_l: SGD's next step, "
             "from the gradient of CE(x + eta); beta: `--lap-beta`",
        clip="pixels"),
    "r_lap": Attack(
        dict(alpha="fgsm_alpha", init="fgsm_init", beta="lap_beta", up="lap_up"), moves_weights=True,
        defaults=dict(fgsm_alpha=1.25), requires=dict(amp_impl="native"),
        starts_at="0 or U(±epsilon)", step="delta + alpha * sign(g), and the weights as in `n_lap`"),
    "atas": Attack(
        dict(c="atas_c", warmup="atas_warmup", reset="atas_reset"), start=False, eval_mode=True, stored=1,
        stored_padded=True, requires=dict(pad_mode="zero", rotate=0.0),
        starts_at="D, stored for each padded image, cropped and flipped with it; at first and in every "
                  "`--atas-reset`-th epoch but the last, D = U(±epsilon)",
        step="delta + a * sign(h), also stored in D; h: the gradient in eval mode; a = 16/255 / (1 + sqrt(v) / c), "
             "clipped to [4/255, 14/255]; v: for each image, v = (v + (B * norm2(h) / 128)^2) / 2; c: `--atas-c`; in "
             "the first `--atas-warmup` epochs, a = epsilon and v = 0"),
    "guided": Attack(
        dict(alpha="fgsm_alpha", weight="guided_lambda", smoothing="attack_smoothing"), start=False, eval_mode=True,
        defaults=dict(fgsm_alpha=1.0),
        starts_at="±epsilon / 2 at random",
        step="delta + alpha * sign(h); h: the gradient of CE(x + delta) and, in every other training step, + lambda * "
             "mean(norm2(p(x) - p(x + delta))^2), with f(x + delta) in eval mode; lambda: as in the objective"),
}

OBJECTIVES: dict[str, Objective] = {
    "ce": Objective(dict(smoothing="label_smoothing"), norms=NORMS, loss="CE(x + delta)", weighting="none"),
    "gradalign": Objective(
        dict(smoothing="label_smoothing", weight="gradalign_lambda"), start=True, second_derivative=True,
        loss="CE(x + delta) + lambda * (1 - mean(cos(g(eta), g(u)))); u ~ U(±epsilon); g(eta) is a constant",
        weighting="0.2 · 10^((epsilon - 8) / 8); on SVHN 2.5 · 10^((epsilon - 8) / 39.2), a fit of the published "
                  "values (1.657 at epsilon 1 to 3.162 at 12)"),
    "elle": Objective(
        dict(smoothing="label_smoothing", weight="elle_lambda", adaptive="elle_adaptive"),
        loss="CE(x + delta) + lambda * mean((CE_i(x_c) - (1 - t) * CE_i(x_a) - t * CE_i(x_b))^2); x_a, x_b ~ x + "
             "U(±epsilon); x_c = (1 - t) * x_a + t * x_b; t ~ U(0, 1)",
        weighting="1000 up to epsilon 8, 5000 up to 20, 10000 above; with `--elle-adaptive`, 0 at first, 4000 after a "
                  "batch whose penalty exceeds mean + 2 standard deviations of all earlier batches, 0.99 times the "
                  "previous lambda otherwise"),
    "aaer": Objective(
        dict(smoothing="label_smoothing", weights="aaer_lambdas"), start=True, whole_batch=True,
        loss="CE(x + delta) + lambda_1 * (n_A / B) * (lambda_2 * mean_A(CE_i(x + eta) - CE_i(x + delta)) + lambda_3 * "
             "max(V_A - V_N, 0)); A: the n_A images whose CE_i the attack lowered; N: the others; V: mean of norm2(f(x "
             "+ eta) - f(x + delta))^2; no penalty if A or N is empty; only V_A has a gradient, through f(x + delta)",
        weighting="lambda_1, lambda_2, lambda_3 of the nearest published epsilon (8, 12, 16, 32); `nfgsm` has its own: "
                  "1,1.5,0.15 at epsilon 8; SVHN takes those of CIFAR-10, Tiny-ImageNet those of CIFAR-100"),
    "trades": Objective(
        dict(smoothing="label_smoothing", beta="trades_beta"),
        loss="CE(x) + beta * KL(p(x) ‖ p(x + delta))", weighting="fixed"),
    "nuclear": Objective(
        dict(smoothing="label_smoothing", weight="nuclear_lambda"), whole_batch=True,
        loss="CE(x) + lambda * norm_nuclear(f(x) - f(x + delta)) / B",
        weighting="grows linearly from 0 to `--nuclear-lambda` over the first 0.9 of the epochs"),
    "guided": Objective(
        dict(smoothing="label_smoothing", weight="guided_lambda"),
        loss="CE(x) + lambda * mean(norm2(p(x) - p(x + delta))^2); the mean is over images",
        weighting="`--guided-lambda`, four times as much from 0.86 of the epochs on"),
    "logits": Objective(
        dict(smoothing="label_smoothing", weight="logits_lambda"), start=True, graph=True,
        loss="CE(x + delta) + lambda * mean((f(x + delta) - f(x + eta))^2); the mean is over images and classes",
        weighting="fixed"),
    "liet": Objective(
        dict(smoothing="liet_smoothing", weight="liet_lambda"), start=True, graph=True,
        requires=dict(label_smoothing=0.0),
        loss="nCE(x + delta) + lambda * mean(JSD(p(x + eta), p(x + delta))); nCE: CE with the target 1 - a for the "
             "label; the other labels share a in the proportions of U(0, 1) numbers, drawn for each image in each "
             "call; a: `--liet-smoothing`",
        weighting="`--liet-lambda` divided by the number of epochs in the first epoch, growing linearly to "
                  "`--liet-lambda` in the last; at epsilon above 8, the published values for 16"),
    "pco": Objective(
        dict(smoothing="label_smoothing", weight="pco_lambda", scale="pco_scale"), start=True, graph=True,
        loss="CE(x + d) + lambda * abs(MSE(f(x + delta), f(x + eta)) - MSE(f(x + delta), f(x + d))); d = (1 - q) * eta "
             "+ `--pco-scale` * q * delta, without a clip; q: the label's p(x + eta); MSE: mean over images and "
             "classes",
        weighting="fixed"),
    "smooth": Objective(
        dict(smoothing="label_smoothing", weight="smooth_lambda", gap="smooth_gap", point="smooth_at"), start=True,
        loss="CE(x + delta) + k * lambda * S; S: CE(x), or CE(x + eta) with `--smooth-at=start`; k = sign(S - S_0) if "
             "abs(S - S_0) > `--smooth-gap`, else 0; S_0: mean of S in the previous epoch; k = 0 in the first two "
             "epochs",
        weighting="fixed"),
}

PUBLISHED_CODE = "the code of arXiv 2103.15476: 216 perturbations equal to the bit, training to 1e-14 in float64"
ONE_FORWARD_PASS = ("BatchNorm's running statistics alone: the authors' attack makes one more forward pass, which "
                    "updates them once more")
RECORDED = "training steps of the authors' code, to 1e-6 in float64"
WARM_UP_ON_SVHN = {"SVHN": dict(eps_warmup=5.0, lr_max=0.05)}  # as in the authors' code

METHODS: dict[str, Method] = {
    "fgsm": Method(
        dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.0), "2", "arXiv 1412.6572",
        text="one step along the gradient's sign, from zero",
        compared=PUBLISHED_CODE, differs=ONE_FORWARD_PASS),
    "fgsm-rs": Method(
        dict(attack="fgsm", fgsm_alpha=1.25), "2", "arXiv 2001.03994", text="FGSM from a random starting point",
        compared=PUBLISHED_CODE, differs="as fgsm"),
    "zerograd": Method(
        dict(attack="zerograd"), "2", "arXiv 2103.15476",
        text="FGSM-RS without the smallest entries of each image's gradient",
        compared=PUBLISHED_CODE),
    "multigrad": Method(
        dict(attack="multigrad"), "4", "arXiv 2103.15476",
        text="one step, in the entries where the gradients at several random points agree in sign",
        compared=PUBLISHED_CODE),
    "pgd": Method(dict(attack="pgd"), "11", "arXiv 1706.06083", text="multi-step training: ten attack steps",
        compared=PUBLISHED_CODE, differs="as fgsm"),
    "pgd-2": Method(
        dict(attack="pgd", pgd_iters=2, pgd_step=0.5), "3", "arXiv 1706.06083",
        text="two attack steps of half an epsilon from a random point",
        compared="formulas, in float64",
        differs="starts at a random point, as in SORA's comparison; GradAlign's scripts start at zero "
                "(`--fgsm-init=zero`)"),
    "rs-cs": Method(
        dict(attack="nfgsm", fgsm_alpha=1.0, noise_k=1.0, objective="smooth", smooth_at="start",
             label_smoothing=4 / 9), "3", "arXiv 2308.12857",
        {"CIFAR-100": dict(label_smoothing=40 / 99), "Tiny-ImageNet": dict(label_smoothing=80 / 199)},
        text="ConvergeSmooth: FGSM-RS without the clip to the ball; a penalty keeps the loss at the starting point "
             "near its mean of the previous epoch",
        differs="the penalty is 0 in the first two epochs of the run, as in the authors' code; theirs is also 0 in "
                "the last epoch and, around each drop of the learning rate, in the epoch before and the two after. "
                "Defaults are those of their code, which is set to epsilon 16/255; the paper has more terms and other "
                "values of `--smooth-gap`"),
    "mep-cs": Method(
        dict(attack="pgi", fgsm_alpha=1.0, objective="smooth", smooth_at="clean", label_smoothing=4 / 9), "3",
        "arXiv 2308.12857",
        {"CIFAR-100": dict(label_smoothing=40 / 99), "Tiny-ImageNet": dict(label_smoothing=80 / 199)},
        text="ConvergeSmooth: one step from a perturbation stored for each image; a penalty keeps the clean loss near "
             "its mean of the previous epoch",
        differs="as rs-cs; D and M are stored in half precision and reset every 40 epochs on every data set"),
    "n-fgsm": Method(
        dict(attack="nfgsm", fgsm_alpha=1.0), "2", "arXiv 2202.01181", WARM_UP_ON_SVHN,
        text="FGSM-RS with more noise and without the clip to the epsilon ball"),
    "n-aaer": Method(
        dict(attack="nfgsm", fgsm_alpha=1.0, objective="aaer"), "2", "arXiv 2404.08154", WARM_UP_ON_SVHN,
        text="N-FGSM with a penalty on images whose loss the attack lowers",
        differs="none in training. The term with lambda_2 has no gradient, as in the authors' code: lambda_2 changes "
                "only the logged loss"),
    "rs-aaer": Method(
        dict(attack="fgsm", fgsm_alpha=1.25, objective="aaer"), "2", "arXiv 2404.08154", WARM_UP_ON_SVHN,
        text="FGSM-RS with a penalty on images whose loss the attack lowers",
        differs="as n-aaer"),
    "gradalign": Method(
        dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.25, objective="gradalign"), "5", "arXiv 2007.02617",
        WARM_UP_ON_SVHN,
        text="FGSM with a penalty that aligns the gradients at two points of the ball",
        differs="the authors' clip halves the gradient at pixels that are exactly 0 or 1, 1.2% of the values in "
                "CIFAR-10's training images (counted); here the gradient is not halved"),
    "elle": Method(
        dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.0, objective="elle"), "5", "arXiv 2401.11618",
        WARM_UP_ON_SVHN,
        text="FGSM with a penalty on the deviation of the loss from a linear function",
        differs="the authors do not clip delta. A step of epsilon from zero stays in the ball, so only the clip to the "
                "pixels differs. The authors' loop steps the optimizer twice per batch, and makes one more clean "
                "forward pass in train mode, which changes BatchNorm's running statistics"),
    "elle-a": Method(
        dict(attack="fgsm", fgsm_init="zero", fgsm_alpha=1.0, objective="elle", elle_adaptive=True), "5",
        "arXiv 2401.11618", WARM_UP_ON_SVHN,
        text="ELLE; a jump of the penalty sets its weight, which then decays",
        differs="as elle"),
    "free": Method(
        dict(attack="free"), "1", "arXiv 1904.12843", {"SVHN": dict(lr_max=0.04)},
        text="several training steps on each batch; one backward pass updates both weights and perturbation",
        differs="delta of the previous batch is clipped to the ball and the pixels of the new images. An epoch has as "
                "many steps as with any other method: the network trains on an eighth of the images, for eight "
                "training steps each"),
    "ckpt": Method(
        dict(attack="ckpt", fgsm_alpha=1.25), "2.7", "arXiv 2010.01799",
        text="FGSM-RS, scaled per image to the least length that fools the network",
        differs="none with `--ckpt-mode=eval`, the default: the authors' version of torchattacks attacks in eval mode. "
                "FastAT_Benchmark attacks in train mode (`--ckpt-mode=train`), as this project did in older "
                "versions; a run that an older version began keeps its mode"),
    "pgi": Method(
        dict(attack="pgi", fgsm_alpha=1.0, objective="logits", label_smoothing=4 / 9), "2.7", "arXiv 2207.08859",
        {"CIFAR-100": dict(label_smoothing=40 / 99, pgi_reset=10),
         "Tiny-ImageNet": dict(label_smoothing=80 / 199)},
        text="FGSM-MEP (FGSM-PGI with momentum): one step from a perturbation stored for each image",
        differs="D and M are stored in half precision. Labels are smoothed by 4/9 and D, M reset every 40 epochs, "
                "as published; on CIFAR-100 by 40/99 and every 10 epochs"),
    "pco": Method(
        dict(attack="pco", fgsm_alpha=1.0, objective="pco", label_smoothing=4 / 9), "3.7", "arXiv 2407.12443",
        {"CIFAR-100": dict(label_smoothing=40 / 99), "Tiny-ImageNet": dict(label_smoothing=80 / 199)},
        text="FGSM-PCO: one step from the image's previous perturbation; trained on a blend of both",
        compared=RECORDED,
        differs="none in the formulas; D is stored in half precision. The logged training accuracy is at x + d, as in "
                "the authors' code; the logged mean perturbation is that of delta. d reaches 1.5 epsilon and leaves "
                "the pixel range"),
    "nuat": Method(
        dict(attack="nuclear", fgsm_alpha=1.0, objective="nuclear"), "3.3", "NeurIPS 2021",
        text="one step, and a penalty on the nuclear norm of the change in a batch's logits",
        differs="the authors use batches of 64"),
    "gat": Method(
        dict(attack="guided", fgsm_alpha=1.0, objective="guided"), "3.3", "arXiv 2011.14969",
        text="one step, and a penalty on the change of each image's probabilities",
        differs="the authors use batches of 64. lambda is multiplied by 4 after 86% of the epochs, whatever the "
                "schedule of the learning rate; in the authors' 100 epochs, this is the second drop of the learning "
                "rate"),
    "trades": Method(
        dict(attack="kl", objective="trades"), "12.3", "arXiv 1901.08573",
        text="multi-step training: ten attack steps that maximize a KL divergence, which is also the penalty",
        differs="epsilon and alpha come from the command line; the authors use 0.031 and 0.007, and weight decay 2e-4. "
                "The authors make one more clean forward pass in train mode, whose output is unused: clean images make "
                "up 67% of BatchNorm's running statistics in their code, 47% in this one (computed)"),
    "sora": Method(
        dict(attack="sora"), "2", "arXiv 2606.00738",
        text="a step of random length, shorter as the loss becomes less linear"),
    "liet": Method(
        dict(attack="liet", fgsm_alpha=1.0, objective="liet"), "2.7", "ICCV 2025",
        text="one step from a noisy perturbation of the label's class, random label smoothing, a penalty on the change "
             "of the prediction",
        compared=RECORDED,
        differs="none in the formulas. The paper compares p(x + delta) with p(x) instead of p(x + eta), smooths by 0.6 "
                "on CIFAR-100, and recomputes L every 10 batches on CIFAR-10. The divergence is computed from "
                "logarithms of probabilities; the authors' form has no finite gradient where a probability underflows "
                "at both points. The authors' moving average of the weights belongs to their protocol, "
                "`--recipe=fastat`"),
    "uap": Method(
        dict(attack="uap", fgsm_alpha=1.0, objective="logits", label_smoothing=0.4), "2.7", "AAAI 2024",
        text="FGSM-UAP: one step from a perturbation that is common to all images",
        differs="none in the formulas; the authors' repository calls it fgsm_one_uap. As in that code, u moves along "
                "the sum of two gradients: that of the attack's loss and that of the training loss. The authors' "
                "moving average of the weights (`--ema=0.9995`) and 110 epochs belong to their protocol, not to the "
                "method"),
    "cuap": Method(
        dict(attack="cuap", fgsm_alpha=1.0, objective="logits", label_smoothing=0.4), "2.7", "AAAI 2024",
        text="FGSM-CUAP: one step from a perturbation for each class",
        differs="as uap; the authors' repository calls it fgsm_class_uap"),
    "fuap": Method(
        dict(attack="fuap", fgsm_alpha=1.0, objective="logits", label_smoothing=0.4), "3", "AAAI 2024",
        {"CIFAR-100": dict(fuap_rows=200), "Tiny-ImageNet": dict(fuap_rows=300)},
        text="FGSM-FUAP: one step from noise and a perturbation for each group of similar features",
        compared=RECORDED, differs="as uap; the authors' repository calls it fgsm_uap. LIET's paper reports that "
                                   "FGSM-FUAP collapses at epsilon 16/255"),
    "n-lap": Method(
        dict(attack="n_lap", fgsm_alpha=1.0), "2", "arXiv 2405.16262",
        text="N-FGSM that also moves the weights before each training step, the first layers most",
        compared=RECORDED,
        differs="none in the formulas. The weights move down the loss at the starting point, as in the authors' code; "
                "the paper describes a move up (`--lap-up`). As in the authors' code and paper, the moved weights are "
                "not restored after the training step: the moves accumulate. `--lap-beta` is published for "
                "CIFAR-10 only"),
    "r-lap": Method(
        dict(attack="r_lap", fgsm_alpha=1.25), "2", "arXiv 2405.16262",
        text="FGSM-RS that also moves the weights before each training step, the first layers most",
        compared=RECORDED, differs="as n-lap"),
    "atas": Method(
        dict(attack="atas", pad_mode="zero", rotate=0.0), "2", "arXiv 2206.02417",
        text="one step from a perturbation stored for each image, shorter where the image's gradient is large",
        compared=RECORDED,
        differs="D is stored in half precision. The norm of an image's gradient is multiplied by B / 128, so that the "
                "batch size does not change the step size; the authors' norm carries a factor 1 / B. The authors also "
                "pad the test images. The step size's constants 4/255, 14/255 and 16/255 are the same at every "
                "epsilon, as in the authors' code"),
}

RECIPES: dict[str, Recipe] = {
    # arXiv 2103.15476
    "paper": Recipe(dict(epochs=30, lr_schedule="cyclic", lr_max=0.2), {"SVHN": dict(epochs=15, lr_max=0.01)}),
    # github.com/fzjcdt/FastAT_Benchmark
    "fastat": Recipe(
        dict(model="ResNet18", epochs=100, lr_schedule="onecycle-epoch", lr_max=0.1, label_smoothing=0.4, ema=0.9995,
             val_size=1000, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), pad_mode="zero", rotate=0.0, final_model="best"),
        on={"Tiny-ImageNet": dict(model="PreActResNet18", no_final_norm=True, val_size=2000)},
        methods={**{name: dict(attack_smoothing=0.4) for name in ("fgsm", "fgsm-rs", "n-fgsm", "rs-cs", "nuat", "gat")},
                 "ckpt": dict(attack_smoothing=0.4, ckpt_mode="train")}),
}

# The networks: keyword of the class -> flag.
MODELS: dict[str, dict[str, str]] = {
    **{f"PreActResNet{depth}": dict(base_width="base_width", shortcut="shortcut", final_norm="no_final_norm")
       for depth in (18, 34, 50, 101, 152)},
    "ResNet18": dict(base_width="base_width", block="block"),
    "WideResNet": dict(depth="depth", width_factor="width_factor"),
}


# Published defaults that depend on other flags. `args`: options.Args.


def gradalign_lambda(args) -> float:
    """Return the published weight, whose logarithm is linear in epsilon; SVHN has its own line (arXiv 2007.02617)."""
    return 2.5 * 10 ** ((args.epsilon - 8) / 39.2) if args.data_set == "SVHN" else 0.2 * 10 ** ((args.epsilon - 8) / 8)


def elle_lambda(args) -> float:
    """Return the weight published for epsilon; for ELLE-A, 4000 (arXiv 2401.11618)."""
    return 4000.0 if args.elle_adaptive else 1000.0 if args.epsilon <= 8 else 5000.0 if args.epsilon <= 20 else 10000.0


def aaer_lambdas(args) -> tuple[float, float, float]:
    """Return the weights published for attacks with or without a clip to the ball, at the nearest published epsilon:
    CIFAR-100's also for Tiny-ImageNet, CIFAR-10's for all others (arXiv 2404.08154)."""
    table = {("CIFAR-10", True): {8: (2.5, 1.5), 12: (5, 2.75), 16: (7, 3.25), 32: (5.75, 1.5)},
             ("CIFAR-10", False): {8: (1.5, 0.15), 12: (5, 0.55), 16: (8.5, 1.5), 32: (2.75, 0.75)},
             ("CIFAR-100", True): {8: (3.5, 1.5), 12: (3.5, 2.75), 16: (6, 2.25), 32: (5, 0.75)},
             ("CIFAR-100", False): {8: (1.5, 0.15), 12: (3.5, 0.3), 16: (6, 0.5), 32: (3.5, 0.5)}}
    data_set = "CIFAR-100" if args.data_set in ("CIFAR-100", "Tiny-ImageNet") else "CIFAR-10"
    values = table[data_set, "ball" in ATTACKS[args.attack].clip]
    return (1.0, *values[min(values, key=lambda epsilon: abs(epsilon - args.epsilon))])


def noise_k(args) -> float:
    """Return 2; 3 on SVHN if epsilon >= 12; 4 for WideResNet if epsilon >= 16 (arXiv 2202.01181)."""
    if args.model == "WideResNet" and args.epsilon >= 16:
        return 4.0
    return 3.0 if args.data_set == "SVHN" and args.epsilon >= 12 else 2.0


def momentum(args) -> float:
    """Return 0.9, as in arXiv 2103.15476; with onecycle 0.95, as in PyTorch."""
    return 0.95 if args.lr_schedule.startswith("onecycle") else 0.9


def momentum_low(args) -> float:
    """Return --momentum; with onecycle 0.85, as in PyTorch."""
    return 0.85 if args.lr_schedule.startswith("onecycle") else args.momentum


def lap_beta(args) -> float:
    """Return the value published for CIFAR-10, by attack and starting point, at the nearest published epsilon
    (arXiv 2405.16262)."""
    values = {"noise": {8: 0.001, 12: 0.002, 16: 0.005, 32: 0.75}, "random": {8: 0.002, 12: 0.03, 16: 0.05, 32: 0.3},
              "zero": {8: 0.03, 12: 0.058, 16: 0.07, 32: 0.48}}["noise" if args.attack == "n_lap" else args.fgsm_init]
    return values[min(values, key=lambda epsilon: abs(epsilon - args.epsilon))]


def liet_smoothing(args) -> float:
    """Return 0.6; on CIFAR-100 0.8; above epsilon 8, 0.4 (code of LIET's authors)."""
    return 0.4 if args.epsilon > 8 else 0.8 if args.data_set == "CIFAR-100" else 0.6


def liet_lambda(args) -> float:
    """Return 100; on CIFAR-100 200; above epsilon 8, 20 (code of LIET's authors)."""
    return 20.0 if args.epsilon > 8 else 200.0 if args.data_set == "CIFAR-100" else 100.0


def liet_noise(args) -> tuple[float, float]:
    """Return the range 0.1 to 0.5; above epsilon 8, 0 to 1 (code of LIET's authors)."""
    return (0.0, 1.0) if args.epsilon > 8 else (0.1, 0.5)


def liet_every(args) -> int:
    """Return 20 batches; on CIFAR-10 above epsilon 8, 10 (code of LIET's authors)."""
    return 10 if args.epsilon > 8 and args.data_set == "CIFAR-10" else 20


def pgd_alpha(args) -> float:
    """Return 2, as in arXiv 2103.15476; for l_2 15, as in github.com/locuslab/robust_overfitting."""
    return 15.0 if args.norm == "l_2" else 2.0


def fgsm_alpha(args) -> float:
    """Return the attack's default, else 2, as in arXiv 2103.15476."""
    return ATTACKS[args.attack].defaults.get("fgsm_alpha", 2.0)


# Flags whose default depends on others.
DEPENDENT: dict[str, Callable[[Any], Any]] = {
    "gradalign_lambda": gradalign_lambda, "elle_lambda": elle_lambda, "aaer_lambdas": aaer_lambdas,
    "fgsm_alpha": fgsm_alpha, "pgd_alpha": pgd_alpha, "noise_k": noise_k, "momentum": momentum,
    "momentum_low": momentum_low,
    "lap_beta": lap_beta, "liet_smoothing": liet_smoothing, "liet_lambda": liet_lambda, "liet_noise": liet_noise,
    "liet_every": liet_every,
}
