"""The attacks against the paper's formulas, written out again here in float64."""
import copy
import inspect
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SmallNet, a_step
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from singlestep import attacks, collapse, methods, objectives, options
from singlestep.attacks import Step, confident_gradient, fgsm, multigrad, pgd, quantile_mask, sign_consensus, zerograd

EPSILON = 8 / 255


class TiedNet(nn.Module):
    """Linear in small whole numbers: many entries of its gradient are equal, and many are exactly zero."""

    def __init__(self, features: int):
        super().__init__()
        weight = torch.randint(-2, 3, (2, features), generator=torch.Generator().manual_seed(3))
        self.weight = nn.Parameter(weight.double())

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def reference_gradient(model, x, delta, y):
    """The gradient of the cross-entropy with respect to delta, by a full backward pass through a copy."""
    model = copy.deepcopy(model)
    delta = delta.clone().requires_grad_()
    log_p = torch.log_softmax(model(x + delta), dim=1)
    (-log_p[torch.arange(len(y)), y].mean()).backward()
    return delta.grad


def reference_box(delta, x, epsilon):
    return torch.max(torch.min(delta.clamp(-epsilon, epsilon), 1 - x), -x)


def reference_start(x, epsilon, init="random"):
    delta = torch.zeros_like(x)
    if init == "random":
        delta.uniform_(-epsilon, epsilon)
    return torch.max(torch.min(delta, 1 - x), -x)


def reference_zerograd(model, x, y, epsilon, alpha, q, steps, init):
    delta = reference_start(x, epsilon, init)
    for _ in range(steps):
        g = reference_gradient(model, x, delta, y)
        for image in g:
            magnitude = image.abs().numpy()
            image[torch.from_numpy(magnitude < np.quantile(magnitude, q))] = 0
        delta = reference_box(delta + alpha * torch.sign(g), x, epsilon)
    return delta


def reference_multigrad(model, x, y, epsilon, alpha, n, threshold, parallel):
    if parallel:
        xs = torch.cat([x for _ in range(n)])
        g = reference_gradient(model, xs, reference_start(xs, epsilon), torch.cat([y for _ in range(n)]))
        signs = [torch.sign(g[i * len(x):(i + 1) * len(x)]) for i in range(n)]
    else:
        signs = [torch.sign(reference_gradient(model, x, reference_start(x, epsilon), y)) for _ in range(n)]
    s = sum(signs)
    s[s.abs() < threshold - (n - threshold)] = 0
    return reference_box(alpha * torch.sign(s), x, epsilon)


def problem(kind: str, batch: int, seed: int = 0):
    torch.manual_seed(seed)
    x = torch.rand(batch, 3, 5, 5, dtype=torch.float64)
    x[:, :, 0] = x[:, :, 0].round()  # some pixels at the edge of the box
    y = torch.randint(2, (batch,))
    model = TiedNet(75) if kind == "tied" else SmallNet().double()
    return model.train(), x, y


def same_draws(attack, reference):
    """The results of both, from the same random state."""
    torch.manual_seed(7)
    found = attack()
    torch.manual_seed(7)
    return found, reference()


problems = pytest.mark.parametrize("kind, batch", [("smooth", 4), ("tied", 4), ("smooth", 1), ("tied", 1)])


# Name: the attack, and the quantile and steps at which ZeroGrad's formula gives it.
SINGLE_STEP = {
    **{f"fgsm {alpha}": (fgsm, alpha, {}, 0.0, 1) for alpha in (1.0, 1.25, 2.0)},
    **{f"zerograd {q} {steps}": (zerograd, 2.0, {"q": q, "steps": steps}, q, steps)
       for q in (0.0, 0.35, 0.7, 1.0) for steps in (1, 3)},
}


@problems
@pytest.mark.parametrize("init", ["zero", "random"])
@pytest.mark.parametrize("name", SINGLE_STEP)
def test_fgsm_and_zerograd_are_the_formula(kind, batch, init, name):
    attack, alpha, options, q, steps = SINGLE_STEP[name]
    model, x, y = problem(kind, batch)
    found, expected = same_draws(
        lambda: attack(model, x, y, EPSILON, alpha * EPSILON, init=init, **options),
        lambda: reference_zerograd(model, x, y, EPSILON, alpha * EPSILON, q, steps, init))
    assert torch.equal(found, expected)


@problems
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("n, threshold", [(1, 1), (3, 1), (3, 2), (3, 3), (4, 3), (5, 4)])
def test_multigrad_is_the_formula(kind, batch, parallel, n, threshold):
    model, x, y = problem(kind, batch)
    found, expected = same_draws(
        lambda: multigrad(model, x, y, EPSILON, 2 * EPSILON, n, threshold, parallel),
        lambda: reference_multigrad(model, x, y, EPSILON, 2 * EPSILON, n, threshold, parallel))
    assert torch.equal(found, expected)


def test_multigrad_asks_all_samples_to_agree_by_default():
    model, x, y = problem("smooth", 4)
    found, expected = same_draws(lambda: multigrad(model, x, y, EPSILON, EPSILON, 4),
                                 lambda: multigrad(model, x, y, EPSILON, EPSILON, 4, threshold=4))
    assert torch.equal(found, expected) and (found == 0).any() and (found != 0).any()


@problems
@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("restarts", [1, 3])
def test_linf_pgd_is_the_formula(kind, batch, early_stop, restarts):
    model, x, y = problem(kind, batch)
    model.eval()

    def reference():
        best, best_loss = torch.zeros_like(x), torch.full((batch,), -torch.inf, dtype=x.dtype)
        for _ in range(restarts):
            delta = reference_start(x, EPSILON)
            for _ in range(6):
                moves = torch.ones(batch, dtype=torch.bool)
                if early_stop:
                    moves = model(x + delta).argmax(dim=1) == y
                step = EPSILON / 4 * torch.sign(reference_gradient(model, x, delta, y))
                delta = torch.where(moves.view(-1, 1, 1, 1), reference_box(delta + step, x, EPSILON), delta)
            loss = F.cross_entropy(model(x + delta), y, reduction="none").detach()
            best[loss >= best_loss] = delta[loss >= best_loss]
            best_loss = torch.max(best_loss, loss)
        return best

    found, expected = same_draws(
        lambda: pgd(model, x, y, EPSILON, EPSILON / 4, 6, restarts, early_stop=early_stop), reference)
    assert torch.equal(found, expected)


def test_l2_pgd_is_the_formula():
    model, x, y = problem("smooth", 4)
    model.eval()
    epsilon, alpha = 0.5, 0.2

    def reference():
        delta = torch.randn_like(x)
        radius = epsilon * torch.rand(4, dtype=x.dtype)
        for image, r in zip(delta, radius):
            image *= r / image.norm()
        delta = torch.max(torch.min(delta, 1 - x), -x)
        for _ in range(6):
            g = reference_gradient(model, x, delta, y)
            for i in range(4):
                delta[i] += alpha * g[i] / g[i].norm()
                delta[i] *= min(1, epsilon / delta[i].norm())
            delta = torch.max(torch.min(delta, 1 - x), -x)
        return delta

    found, expected = same_draws(lambda: pgd(model, x, y, epsilon, alpha, 6, norm="l_2"), reference)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    norms = found.flatten(1).norm(dim=1)
    assert (norms <= epsilon * (1 + 1e-9)).all() and (norms > 0.3 * epsilon).all()


def test_l2_pgd_is_torchattacks():
    """In float64, from the start that both draw from one seed."""
    import torchattacks

    model, x, y = problem("smooth", 6)
    attack = torchattacks.PGDL2(model.eval(), 0.5, 0.12, 5)
    found, expected = same_draws(lambda: pgd(model, x, y, 0.5, 0.12, 5, norm="l_2"), lambda: attack(x, y) - x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found.flatten(1).norm(dim=1) > 0.3).all()


def test_pgd_keeps_the_restart_of_the_highest_loss():
    model, x, y = problem("smooth", 8)
    model.eval()
    torch.manual_seed(7)
    singles = [pgd(model, x, y, 0.2, 0.02, 1) for _ in range(5)]
    losses = torch.stack([F.cross_entropy(model(x + delta), y, reduction="none") for delta in singles])
    torch.manual_seed(7)
    best = pgd(model, x, y, 0.2, 0.02, 1, restarts=5)
    torch.testing.assert_close(F.cross_entropy(model(x + best), y, reduction="none"), losses.amax(dim=0))
    assert len(losses.argmax(dim=0).unique()) > 1


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.integers(-4, 4), min_size=1, max_size=40), q=st.floats(0, 1))
def test_quantile_mask_drops_exactly_what_lies_below_the_interpolated_quantile(values, q):
    ordered = sorted(abs(value) for value in values)
    position = q * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    quantile = ordered[low] + (Fraction(position) - low) * (ordered[high] - ordered[low])
    expected = [0 if abs(value) < quantile else value for value in values]
    grad = torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)
    assert quantile_mask(grad, q).flatten().tolist() == expected


@pytest.mark.parametrize("q", [0.0, 0.2, 0.35, 0.45, 0.7, 0.95, 1.0])
def test_quantile_mask_agrees_with_torch_quantile_image_by_image(q):
    grad = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    grad[0] = grad[0].round()
    grad[1] = 0
    threshold = torch.quantile(grad.abs().flatten(1), q, dim=1).view(-1, 1, 1, 1)
    assert torch.equal(quantile_mask(grad, q), torch.where(grad.abs() < threshold, 0, grad))


@settings(max_examples=100, deadline=None)
@given(signs=st.lists(st.sampled_from((-1, 0, 1)), min_size=1, max_size=7), data=st.data())
def test_sign_consensus_counts_votes(signs, data):
    threshold = data.draw(st.integers(1, len(signs)))
    total = sum(signs)
    expected = 0 if abs(total) < 2 * threshold - len(signs) else (total > 0) - (total < 0)
    grads = torch.tensor(signs, dtype=torch.float32).view(-1, 1, 1, 1, 1) * 0.3
    assert sign_consensus(grads, threshold).item() == expected


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ALL = {
    "fgsm zero": lambda *a: fgsm(*a, alpha=1.5 * a[-1], init="zero"),
    "fgsm random": lambda *a: fgsm(*a, alpha=2 * a[-1]),
    "zerograd": lambda *a: zerograd(*a, alpha=2 * a[-1], q=0.4, steps=2),
    "multigrad": lambda *a: multigrad(*a, alpha=2 * a[-1], samples=3, threshold=2),
    "multigrad parallel": lambda *a: multigrad(*a, alpha=2 * a[-1], samples=3, parallel=True),
    "pgd": lambda *a: pgd(*a, alpha=a[-1] / 3, steps=3, restarts=2),
    "pgd stopped": lambda *a: pgd(*a, alpha=a[-1] / 3, steps=3, early_stop=True),
    "pgd l_2": lambda *a: pgd(*a, alpha=a[-1] / 3, steps=3, restarts=2, norm="l_2"),
    "fgsm random l_2": lambda *a: fgsm(*a, alpha=2 * a[-1], norm="l_2"),
}


@pytest.mark.filterwarnings("ignore:the gradient is 0")
@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@example(batch=1, channels=1, side=1, dtype=torch.float32, device="cpu", train=False, flat=True, scale=1.0,
         epsilon=0.03, corner=False, seed=0)
@example(batch=5, channels=1, side=1, dtype=torch.float16, device="cpu", train=False, flat=False, scale=1e4,
         epsilon=0.03, corner=False, seed=2)
@given(batch=st.integers(1, 5), channels=st.integers(1, 3), side=st.integers(1, 6),
       dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
       device=st.sampled_from(DEVICES), train=st.booleans(), flat=st.booleans(), scale=st.sampled_from((1.0, 1e4)),
       epsilon=st.sampled_from((0.0, 1 / 255, 0.03, 0.5, 1.0)), corner=st.booleans(), seed=st.integers(0, 2**31))
def test_every_attack_stays_inside_and_leaves_the_model_alone(name, batch, channels, side, dtype, device, train, flat,
                                                              scale, epsilon, corner, seed):
    torch.manual_seed(seed)
    if train and batch * side * side == 1:
        batch = 2  # BatchNorm itself refuses to normalize one value
    model = SmallNet(channels).to(device, dtype).train(train)
    with torch.no_grad():
        model.linear.weight *= 0 if flat else scale  # no gradient at all; at 1e4, logits that saturate
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model.bn.weight.requires_grad_(False)
    before = {key: value.grad.clone() for key, value in model.named_parameters()}
    wanted = {key: value.requires_grad for key, value in model.named_parameters()}
    weights = {key: value.clone() for key, value in model.named_parameters()}
    x = torch.rand(batch, channels, side, side, dtype=dtype, device=device)
    if corner:
        x = x.round()
    y = torch.randint(4, (batch,), device=device)
    delta = ALL[name](model, x, y, epsilon)
    if flat and (name == "fgsm zero" or "multigrad" in name):
        assert (delta == 0).all()  # the sign of 0 is 0
    rounding = 4 * torch.finfo(dtype).eps
    assert delta.shape == x.shape and delta.dtype == dtype and not delta.requires_grad and delta.isfinite().all()
    size = delta.flatten(1).norm(dim=1) if name.endswith("l_2") else delta.abs()
    assert (size <= epsilon * (1 + rounding)).all()
    assert (x + delta >= -rounding).all() and (x + delta <= 1 + rounding).all()
    if epsilon == 0:
        assert (delta == 0).all()
    assert model.training == train and model.bn.training == train
    for key, value in model.named_parameters():
        assert torch.equal(value.grad, before[key]) and torch.equal(value, weights[key])
        assert value.requires_grad == wanted[key]


@pytest.mark.parametrize("name", ALL)
def test_a_delta_carries_no_graph_even_where_the_image_does(name):
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    delta = ALL[name](SmallNet(), x, torch.tensor([0, 1]), 0.03)
    assert not delta.requires_grad and x.grad is None


@problems
def test_the_confident_gradient_is_that_of_each_images_own_loss_but_for_a_positive_factor(kind, batch):
    model, x, y = problem(kind, batch)
    model.eval()
    delta = reference_start(x, EPSILON)
    found, logits = confident_gradient(model, x, y, delta)
    expected = reference_gradient(model, x, delta, y)
    factor = found.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert (factor > 0).all() and torch.equal(logits, model(x + delta))
    torch.testing.assert_close(found, expected * factor.view(-1, 1, 1, 1))


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e4), (torch.bfloat16, 1e3)])
def test_the_confident_gradient_does_not_vanish_where_that_of_the_loss_does(dtype, scale):
    torch.manual_seed(0)
    model, x = SmallNet().eval(), torch.rand(4, 3, 5, 5)
    expected, _ = confident_gradient(model, x, y := model(x).argmax(dim=1), torch.zeros_like(x))
    with torch.no_grad():
        model.linear.weight *= scale
        model.linear.bias *= scale
    model, x = model.to(dtype), x.to(dtype)
    assert (attacks.input_gradient(model, x, y, torch.zeros_like(x))[0] == 0).all()
    found, _ = confident_gradient(model, x, y, torch.zeros_like(x))
    assert found.isfinite().all() and found.flatten(1).any(dim=1).all()
    assert F.cosine_similarity(found.float().flatten(1), expected.flatten(1)).min() > 0.5


@pytest.mark.parametrize("name", ["fgsm", "zerograd", "multigrad", "pgd"])
def test_a_step_is_told_where_the_first_forward_pass_was_and_what_it_found(name):
    model, x, y = problem("smooth", 4)
    step, further = Step(model, 4, torch.arange(4)), {"pgd": dict(steps=3), "zerograd": dict(q=0.4, steps=2)}
    found, start = same_draws(
        lambda: getattr(attacks, name)(model.eval(), x, y, EPSILON, 2 * EPSILON, step=step, **further.get(name, {})),
        lambda: reference_start(x, EPSILON))
    assert torch.equal(step.start, start) and torch.equal(step.logits, model(x + start))
    assert not step.start.requires_grad and not step.logits.requires_grad and not torch.equal(found, start)


@pytest.mark.parametrize("name, forward_passes", [
    ("fgsm zero", 1), ("fgsm random", 1), ("zerograd", 2), ("multigrad", 3), ("multigrad parallel", 1), ("pgd", 8),
    ("pgd stopped", 3)])
def test_batchnorm_moves_once_per_forward_pass_in_training_and_never_in_evaluation(name, forward_passes):
    model, x, y = problem("smooth", 4)
    before = copy.deepcopy(model.bn.state_dict())
    ALL[name](model.eval(), x, y, EPSILON)
    assert all(torch.equal(value, before[key]) for key, value in model.bn.state_dict().items())
    ALL[name](model.train(), x, y, EPSILON)
    moved = model.bn.num_batches_tracked.item()
    assert moved == forward_passes or (name == "pgd stopped" and 1 <= moved <= forward_passes)
    assert not torch.equal(model.bn.running_mean, before["running_mean"])


def test_parallel_multigrad_normalizes_over_all_samples_at_once():
    model, x, y = problem("smooth", 4)
    seen = []
    model.bn.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    multigrad(model, x, y, EPSILON, EPSILON, 3, parallel=True)
    multigrad(model, x, y, EPSILON, EPSILON, 3)
    assert seen == [12, 4, 4, 4]


def test_single_restart_pgd_ends_on_its_last_step():
    model, x, y = problem("smooth", 4)
    pgd(model, x, y, EPSILON, EPSILON, 5)
    assert model.bn.num_batches_tracked == 5


def test_no_parameter_gradient_is_computed():
    model, x, y = problem("smooth", 4)
    computed = []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: computed.append(grad))
    fgsm(model, x, y, EPSILON, EPSILON)
    assert not computed


@pytest.mark.parametrize("wrong, message", [
    (lambda *a: zerograd(*a, EPSILON, EPSILON, q=1.5), "q must be"),
    (lambda *a: zerograd(*a, EPSILON, EPSILON, q=-0.1), "q must be"),
    (lambda *a: multigrad(*a, EPSILON, EPSILON, samples=0), "samples must be"),
    (lambda *a: multigrad(*a, EPSILON, EPSILON, samples=3, threshold=4), "threshold must be"),
    (lambda *a: multigrad(*a, EPSILON, EPSILON, samples=3, threshold=0), "threshold must be"),
    (lambda *a: fgsm(*a, EPSILON, EPSILON, init="ones"), "init must be"),
    (lambda *a: pgd(*a, EPSILON, EPSILON, 1, norm="l_1"), "norm")])
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(*problem("smooth", 2))


@pytest.mark.parametrize("norm, rule", [("l_inf", "from 0 to 1"), ("l_2", "0 or more")])
def test_epsilon_out_of_range_names_the_range_of_its_norm(norm, rule):
    with pytest.raises(ValueError, match=rf"{rule}.*, not -1"):
        fgsm(*problem("smooth", 2), -1, EPSILON, norm=norm)


def test_the_tables_name_functions_and_give_them_their_keywords():
    assert {"multigrad", "zerograd", "fgsm", "pgd"} <= set(methods.ATTACKS) and "ce" in methods.OBJECTIVES
    args = options.parse(options.CIFAR10, argv=[])
    for module, table, arguments in ((attacks, methods.ATTACKS, 4), (objectives, methods.OBJECTIVES, 5)):
        for name, record in table.items():
            signature = inspect.signature(getattr(module, name))
            signature.bind(*[None] * arguments, step=None, **args.keywords(record.keywords))


# What users give to attacks and objectives of their own programs


def called(kind: str, name: str, model, x, y, epsilon=EPSILON, **more):
    """The attack or objective of that name with the command line's keywords, as a user calls it."""
    args = options.parse(options.CIFAR10, argv=["--pgd-iters=2", "--liet-smoothing=0"])
    step = a_step(model, len(x), **more)
    if kind == "attack":
        return getattr(attacks, name)(model, x, y, epsilon, step=step, **args.keywords(methods.ATTACKS[name].keywords))
    if methods.OBJECTIVES[name].start:
        step.gradient = step.start = x.detach().double()
        step.logits = model(step.start)
    keywords = args.keywords(methods.OBJECTIVES[name].keywords)
    return getattr(objectives, name)(model, x, y, 0 * x, epsilon, step=step, **keywords)


EVERY = [*(("attack", name) for name in methods.ATTACKS), *(("objective", name) for name in methods.OBJECTIVES)]


@pytest.mark.parametrize("kind, name", EVERY)
def test_images_and_epsilon_out_of_range_are_refused_by_every_attack_and_objective(kind, name):
    model, x, y = problem("smooth", 4)
    for wrong, message in (((x - 0.5) / 0.25, r"in \[0, 1\], not from -2 to 2: "), (255 * x, "not from 0 to 255: "),
                           (x.where(x < 0.9, torch.nan), "not from nan to nan"), ((255 * x).byte(), "not torch.uint8")):
        with pytest.raises(ValueError, match=message):
            called(kind, name, model, wrong, y)
    for epsilon in (8, -EPSILON, float("nan")):
        with pytest.raises(ValueError, match=f"8/255, not {epsilon}"):
            called(kind, name, model, x, y, epsilon)
    called(kind, name, model, (x * (1 + 1e-7)).requires_grad_(), y, 1)  # rounding is no mistake
    called(kind, name, model, (x - 0.5) / 0.25, y, checks=False)


def test_every_measure_from_python_refuses_images_and_epsilon_out_of_range():
    model, x, y = problem("smooth", 4)
    with pytest.raises(ValueError, match="not from -2 to 2: "):
        collapse.signs(model, (x - 0.5) / 0.25, y, EPSILON)
    with pytest.raises(ValueError, match="8/255, not 8"):
        collapse.signs(model, x, y, 8)
    assert pgd(model, x, y, 1.5, 0.5, 2, norm="l_2").abs().max() <= 1
    with pytest.raises(ValueError, match="8/255, not -1"):
        pgd(model, x, y, -1, 0.5, 2, norm="l_2")


RUNS_THE_NETWORK = [name for name in methods.ATTACKS if name not in ("none", "free")]


@pytest.mark.parametrize("name", RUNS_THE_NETWORK)
def test_outputs_that_are_not_finite_are_refused_by_every_attack(name):
    for wrong in (torch.nan, torch.inf):
        model, x, y = problem("smooth", 4)
        model.linear.bias.data[1] = wrong
        with pytest.raises(ValueError, match="not finite"):
            called("attack", name, model, x, y)
        assert not model._forward_hooks and not model._forward_pre_hooks
    model, x, y = problem("smooth", 4)
    model.linear.bias.data[1] = torch.nan
    for early_stop in (False, True):
        with pytest.raises(ValueError, match="not finite"):
            pgd(model, x, y, EPSILON, EPSILON, 2, restarts=3, early_stop=early_stop)


@pytest.mark.parametrize("name", RUNS_THE_NETWORK)
def test_every_attack_warns_where_there_is_no_gradient_to_follow(name):
    """The network that decides as before, but whose probabilities round to 0 and 1."""
    model, x, y = problem("smooth", 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        called("attack", name, model.eval(), x, y)
        assert not caught
        model.linear.weight.data *= 1e6
        model.linear.bias.data *= 1e6
        called("attack", name, model, x, model(x).argmax(dim=1))
    assert [str(each.message).startswith("the gradient is 0 for") for each in caught] == [True]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", RUNS_THE_NETWORK)
def test_a_record_says_whether_its_attack_runs_the_network_in_eval_mode(name):
    model, x, y = problem("smooth", 4)
    modes = set()
    model.train().register_forward_pre_hook(lambda module, inputs: modes.add(module.training))
    called("attack", name, model, x, y)
    assert (False in modes) == methods.ATTACKS[name].eval_mode


def test_inference_mode_is_named():
    model, x, y = problem("smooth", 4)
    with torch.no_grad():
        fgsm(model, x, y, EPSILON, EPSILON)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside torch\.inference_mode"):
        fgsm(model, x, y, EPSILON, EPSILON)
