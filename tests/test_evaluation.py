"""evaluate.py: published files give the logits of their own code, AutoAttack is its authors', doubt is told of."""
import errno
import json
import os
import pickle
import re
import shutil
import signal
import sys
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DATASETS,
    FLOAT32,
    SIDE,
    SMALL,
    TINY,
    epochs_of,
    evaluated,
    linear_network,
    one_line,
    plain_evaluation,
    rows_of,
    write_cifar10,
)
from processes import together
from torch import nn
from tqdm import tqdm

from singlestep import attacks, autoattack, checkpoints, collapse, data, evaluation, figures, options, robustness, train
from singlestep.autoattack import AutoAttack, parts_for
from singlestep.checkpoints import Opened, load_network, load_run, open_run
from singlestep.data import Images
from singlestep.networks import Normalize, PreActResNet18, ResNet18, WideResNet
from singlestep.robustness import PGD, evaluate
from singlestep.run import console, device
from singlestep.run import folder as folders
from singlestep.run import state as states
from singlestep.run.console import Screen, Stopped, StopSignals, UsageError, duration
from singlestep.run.device import Padded, seed_everything
from singlestep.run.distributed import ALONE, Stop
from singlestep.run.folder import Folder

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def trained(network: nn.Module) -> nn.Module:
    """Random weights, and statistics as if it had been trained on noise, so that no layer is trivial."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3), nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


# The published networks, written out from their state dicts.


def norm(state, name, x):
    weights = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *weights)


def preact(state, x, raw=False, short="shortcut.0", stages=("layer1.", "layer2.", "layer3.", "layer4."), final="bn",
           last="linear"):
    """kuangliu's, fast_adversarial's, RobustBench's and TRADES' pre-activation networks."""
    out = F.conv2d(x, state["conv1.weight"], padding=1)
    for number, stage in enumerate(stages):
        blocks = sorted({int(key[len(stage):].split(".")[0]) for key in state if key.startswith(stage)})
        for block in blocks:
            name, stride = f"{stage}{block}", 2 if number and not block else 1
            active = F.relu(norm(state, f"{name}.bn1", out))
            kept = out
            if f"{name}.{short}.weight" in state:
                kept = F.conv2d(out if raw else active, state[f"{name}.{short}.weight"], stride=stride)
            inner = F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            inner = F.relu(norm(state, f"{name}.bn2", inner))
            out = F.conv2d(inner, state[f"{name}.conv2.weight"], padding=1) + kept
    if f"{final}.weight" in state:
        out = F.relu(norm(state, final, out))
    return F.linear(out.mean(dim=(2, 3)), state[f"{last}.weight"], state[f"{last}.bias"])


def wide(state, x):
    return preact(state, x, short="convShortcut", stages=tuple(f"block{i}.layer." for i in (1, 2, 3)), final="bn1",
                  last="fc")


def postact(state, x, rectified=False):
    """kuangliu's ResNet18, and NuAT's, which has a ReLU before the addition, too."""
    out = F.relu(norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for stage in range(4):
        for block in range(2):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            inner = F.conv2d(out, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            inner = F.conv2d(F.relu(norm(state, f"{name}.bn1", inner)), state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.shortcut.0.weight" in state:
                out = F.conv2d(out, state[f"{name}.shortcut.0.weight"], stride=stride)
                out = norm(state, f"{name}.shortcut.1", out)
            inner = norm(state, f"{name}.bn2", inner)
            out = F.relu((F.relu(inner) if rectified else inner) + out)
    return F.linear(out.mean(dim=(2, 3)), state["linear.weight"], state["linear.bias"])


def scaled(x, mean=MEAN, std=STD):
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def narrow(**keywords):
    return trained(PreActResNet18(base_width=4, **keywords)).state_dict()


def wrong_block(state):
    return {**state, "model_preact_hl1.1.weight": state["conv1.weight"]}


WONG = {"mu": torch.tensor((0.5, 0.4, 0.3)).view(1, 3, 1, 1), "sigma": torch.tensor((0.3, 0.2, 0.1)).view(1, 3, 1, 1)}
RN, WRN = dict(model="ResNet18"), dict(model="WideResNet", width_factor=1)
HALF = {"mean": torch.tensor(0.5), "std": torch.tensor([0.25])}  # one value for all channels


def other(state):
    """Other weights of the same network."""
    return {key: 0 * value for key, value in state.items()}


def without_bn(state):
    return {key: value for key, value in state.items() if not key.startswith("bn.")}


def plain(state, x):
    return preact(state, scaled(x))


def halved(state, x):
    return preact(state, scaled(x, (0.5,) * 3, (0.25,) * 3))


# The file's content, flags, its logits on x, what is said of it.
FORMS = {
    "bare": (lambda s: s, {}, plain, "normalized with mean 0.4914,0.4822,0.4465, std 0.2471,0.2435,0.2616 "
             "(CIFAR-10's); to change the normalization: --mean and --std"),
    "module., under state_dict": (lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "test_acc": 0.8},
                                  {}, plain, "network state_dict.module of the file\n"),
    "_orig_mod.module., under net": (lambda s: {"net": {f"_orig_mod.module.{k}": v for k, v in s.items()}, "epoch": 3},
                                     {}, plain, "network net._orig_mod.module of the file\n"),
    "raw shortcut": (lambda s: s, dict(shortcut="raw"), lambda s, x: preact(s, scaled(x), raw=True),
                     "assumed: --model=PreActResNet18 --base-width=4 --shortcut=raw, with ReLU. "),
    "kuangliu without bn": (lambda s: without_bn(s), {}, lambda s, x: plain(without_bn(s), x),
                            "without BatchNorm and ReLU before the last layer"),
    "FastAT_Benchmark's for Tiny-ImageNet": (
        lambda s: without_bn(s), dict(no_final_norm=True), lambda s, x: plain(without_bn(s), x),
        "assumed: --model=PreActResNet18 --base-width=4 --shortcut=activated --no-final-norm, with ReLU. "),
    "mu and sigma": (lambda s: {**s, **WONG}, dict(shortcut="raw"),
                     lambda s, x: preact(s, scaled(x, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)), raw=True),
                     "normalized as in the file: mean 0.5,0.4,0.3, std 0.3,0.2,0.1"),
    "Sequential(normalize, model)": (
        lambda s: {"normalize.mean": WONG["mu"], "normalize.std": WONG["sigma"],
                   **{f"model.{k}": v for k, v in s.items()}}, {},
        lambda s, x: preact(s, scaled(x, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))), "normalized as in the file"),
    "a flag over mu and sigma": (lambda s: {**s, **WONG}, dict(mean=(0.0,) * 3, std=(1.0,) * 3),
                                 lambda s, x: preact(s, x), "is overridden by --mean and --std"),
    "last and best": (lambda s: {"last": wrong_block(s), "best": {k: 0 * v for k, v in s.items()}}, {},
                      plain, "unused in the file: model_preact_hl1"),
    "half": (lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}, {},
             lambda s, x: preact({k: v.half().float() for k, v in s.items()}, scaled(x)), "weights in float16"),
    "kuangliu's ResNet18": (lambda s: {"net": {f"module.{k}": v for k, v in s.items()}}, RN,
                            lambda s, x: postact(s, scaled(x)),
                            "assumed: --model=ResNet18 --base-width=4 --block=standard, with ReLU. "),
    "NuAT's ResNet18": (lambda s: {"state_dict": s}, RN | dict(block="nuat", mean=(0.0,) * 3, std=(1.0,) * 3),
                        lambda s, x: postact(s, x, rectified=True), "normalized with mean 0,0,0, std 1,1,1; to"),
    "a constant for all channels": (lambda s: {**s, **HALF}, {}, halved,
                                    "normalized as in the file: mean 0.5,0.5,0.5, std 0.25,0.25,0.25"),
    "constants beside the network": (lambda s: {"net": s, **HALF}, {}, halved, "normalized as in the file"),
    "a map of constants under a flag": (lambda s: {**s, "mean": torch.zeros(1, 3, 32, 32)},
                                        dict(mean=MEAN, std=STD), plain, "(mean) is overridden by --mean and --std"),
    "MAIR": (lambda s: {"rmodel": {"n_classes": torch.tensor(10), **HALF, **{f"model.{k}": v for k, v in s.items()}},
                        "record_info": {"Best": 1.0}}, {}, halved, "network rmodel.model of the file\n"),
    **{f"under {key}": (lambda s, key=key: {"epoch": 3, key: s}, {}, plain, f"network {key} of the file\n")
       for key in ("weights", "params", "network", "ema", "model_state")},
    "a number under a known key": (lambda s: {"state_dict": s, "last": 1, "model": None}, {}, plain,
                                   "network state_dict of the file\n"),
    "nothing under a known key": (lambda s: {"state_dict": None, "net": s}, {}, plain, "network net of the file\n"),
    "two networks": (lambda s: {"state_dict": s, "state_dict_ema": other(s)}, {}, plain,
                     "network state_dict of the file; for the others: --which=state_dict_ema\n"),
    "two networks, by key": (lambda s: {"state_dict": other(s), "state_dict_ema": {f"module.{k}": s[k] for k in s}},
                             dict(which="state_dict_ema"), plain,
                             "network state_dict_ema.module of the file; for the others: --which=state_dict\n"),
    "two networks, by prefix": (lambda s: {f"{name}.{k}": v for name, values in (("teacher", other(s)), ("student", s))
                                           for k, v in values.items()}, dict(which="student"), plain,
                                "network student of the file; for the others: --which=teacher\n"),
    "last before the first": (lambda s: {"best": other(s), "last": s}, {}, plain,
                              "network last of the file; for the others: --which=best\n"),
    **{f"WideResNet-{depth}": (lambda s: s, WRN | dict(depth=depth), lambda s, x: wide(s, scaled(x)),
                               f"assumed: --model=WideResNet --depth={depth} --width-factor=1, with ReLU. ")
       for depth in (28, 40)},
    "TRADES' WideResNet": (lambda s: {**s, **{k.replace("block1", "sub_block1"): v for k, v in s.items()
                                              if k.startswith("block1")}}, WRN | dict(mean=(0.0,) * 3, std=(1.0,) * 3),
                           lambda s, x: wide(s, x), "unused in the file: sub_block1"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_published_file_gives_the_logits_of_its_own_network(form, tmp_path, capsys):
    content, flags, logits, said = FORMS[form]
    wide_resnet = partial(WideResNet, flags.get("depth", 34), 1)
    network = {"ResNet18": partial(ResNet18, base_width=4), "WideResNet": wide_resnet}.get(
        flags.get("model"), partial(PreActResNet18, base_width=4))
    state = trained(network()).state_dict()
    torch.save(content(state), tmp_path / "model.pt")
    model, args = load_run(tmp_path / "model.pt", data_set="cifar10", base_width=4, **flags)
    x = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), logits(state, x), rtol=1e-4, atol=1e-4)
    output = capsys.readouterr().out
    assert said in output and output.count("compare the clean accuracy with the published one") == 1
    assert "normalized" in output or "overridden by --mean and --std" in output
    assert not model.training and args.data_set == "CIFAR-10"


def test_a_deeper_network_and_foreign_constants_are_refused():
    from singlestep.networks import PreActResNet34
    with pytest.raises(UsageError, match=r"another architecture: layer1\.2"):
        load_network(PreActResNet18(base_width=4), PreActResNet34(base_width=4).state_dict(), "a file")
    with pytest.raises(UsageError, match="invalid normalization constants"):
        load_network(PreActResNet18(base_width=4), {**narrow(), **WONG, "sigma": torch.zeros(3)}, "a file")
    pair = {"mean": torch.zeros(3), "std": torch.ones(3)}
    for constants, named in (({"normalize.mean": torch.zeros(1, 3, 32, 32), "normalize.std": torch.ones(3)},
                              "normalize.mean of shape \\(1, 3, 32, 32\\)"), ({"mu": torch.zeros(3)}, "mu of shape"),
                             ({**pair, "teacher.mean": torch.ones(3)}, "teacher.mean")):
        with pytest.raises(UsageError, match=f"not one mean and one std .*{named}.*: give --mean and --std"):
            load_network(PreActResNet18(base_width=4), {**narrow(), **constants}, "a file")


def test_a_network_that_the_file_does_not_have_is_refused(tmp_path):
    torch.save({"state_dict": narrow(), "ema": narrow()}, tmp_path / "two.pt")
    torch.save(narrow(), tmp_path / "model_best.pth")
    flags = dict(data_set="cifar10", base_width=4)
    for name, action in (("two.pt", "its networks: state_dict, ema"), ("model_best.pth", "leave --which out")):
        with pytest.raises(UsageError, match=f"has no network best; {action}"):
            load_run(tmp_path / name, which="best", **flags)
    with pytest.raises(UsageError, match="--which must be last, best, healthy for the folder of a run, not ema"):
        load_run(tmp_path, which="ema", **flags)


def test_robustbenchs_wideresnet_28_10_gives_its_own_logits():
    from robustbench.model_zoo.architectures import wide_resnet

    published, x = trained(wide_resnet.WideResNet(28, 10, 10)), torch.rand(2, 3, 32, 32)
    network = WideResNet(28, 10).eval()
    load_network(network, published.state_dict(), "a file")
    with torch.no_grad():
        torch.testing.assert_close(network(x), published(x))
    with pytest.raises(UsageError, match=r"another architecture: .* --depth and --width-factor require"):
        load_network(WideResNet(34, 1), WideResNet(28, 1).state_dict(), "a file")


def test_a_final_norm_of_the_file_is_not_left_out():
    with pytest.raises(UsageError, match="has BatchNorm before the last layer: leave --no-final-norm out"):
        load_network(PreActResNet18(base_width=4, final_norm=False), narrow(), "a file")


@pytest.mark.parametrize("flags, named", [
    (dict(model="ResNet18", no_final_norm=True), "--no-final-norm is for PreActResNets, not ResNet18"),
    (dict(model="ResNet18", shortcut="raw"), "--shortcut raw is for PreActResNet18"),
    (dict(block="nuat"), "--block nuat is for ResNet18, not PreActResNet18"),
    (dict(modle="ResNet18"), "no flag --modle; did you mean --model?")])
def test_a_flag_that_the_network_does_not_have_is_refused(flags, named, tmp_path):
    network = (ResNet18 if flags.get("model") else PreActResNet18)(base_width=4)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    with pytest.raises(UsageError, match=re.escape(named)):
        load_run(tmp_path / "model.pt", data_set="cifar10", base_width=4, **flags)


# A run


RUN = [*SMALL, "--attack=fgsm", "--epsilon=4", "--lr-max=0"]


@pytest.fixture
def run(tmp_path, call, small_dummy, monkeypatch):
    """The folder of a run whose weights are written down, and so what its network finds."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "new_network", linear_network)
        assert call("train_cifar.py", *RUN, "--fname", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def edit(folder, **changes):
    """Change entries of a run's args.json."""
    saved = json.loads((folder / "args.json").read_text())
    for part, values in changes.items():
        saved[part].update(values)
    (folder / "args.json").write_text(json.dumps(saved))


def test_a_run_is_opened_in_one_line_and_judged_as_it_was(run, evaluates):
    model, args = load_run(run)
    assert (args.epsilon, args.base_width, args.attack) == (4, 4, "fgsm")
    x, y = data.load_test("CIFAR-10", n=48, synthetic=True)
    assert x.shape == (48, 3, SIDE, SIDE) and x.dtype == torch.float32
    final = json.loads((run / "final.json").read_text())
    with torch.no_grad():
        assert (model(x).argmax(dim=1) == y).float().mean().item() == pytest.approx(final["clean_acc"])
    for source in (run / "model_1.pth", run / "state.pth"):
        assert checkpoints.fingerprint(load_run(source)[0]) == checkpoints.fingerprint(model)
    load_run(run, which="best"), load_run(run, which="healthy")
    status, output, error = evaluates(run, "--device=cpu", "--samples=48", "--attacks=clean,fgsm,pgd-2-2",
                                   "--epsilons=4/255,8")
    assert (status, error) == (0, "") and ["worst case", "8", "", "48"] in [row[:4] for row in rows_of(output)]
    assert "instead of the run" not in output
    record, = json.loads((run / "evaluation.json").read_text())
    rows = {(row["attack"], row["epsilon"]): row for row in record["attacks"]}
    assert rows["clean", 0]["accuracy"] == pytest.approx(final["clean_acc"])
    worst = rows["worst case", 8]["robust"]
    assert worst <= min(rows["fgsm", 8]["robust"], rows["pgd-2-2", 8]["robust"]) and len(rows) == 7
    assert record["base_width"] == 4 and record["mean"] == pytest.approx(MEAN) and record["seed"] == 0


def test_flags_win_over_the_runs_and_are_said(run, evaluates):
    flags = ["--device=cpu", "--samples=8", "--attacks=fgsm"]
    status, output, _ = evaluates(run, *flags, "--epsilons=2", "--seed=3", "--mean=0.5,0.5,0.5")
    assert status == 0 and "epsilon 2 instead of the run's 4" in output
    assert "--seed 3 instead of the run's 0" in output
    assert "--mean 0.5,0.5,0.5 instead of the run's default" in output
    assert rows_of(output)[0][:4] == ["fgsm", "2", "2", "8"]
    status, output, _ = evaluates(run, *flags)
    assert rows_of(output)[0][:4] == ["fgsm", "4", "4", "8"] and "instead of the run" not in output
    assert len(json.loads((run / "evaluation.json").read_text())) == 2 and not (run / "eval.log").exists()


def test_an_l2_run_is_trained_and_evaluated_in_l2(tmp_path, call, evaluates, short, small_dummy, monkeypatch):
    folder, flags = tmp_path / "run", [*SMALL, "--method=fgsm-rs", "--norm=l_2", "--epsilon=128"]
    attacked, watched, steps, signs = [], [], robustness.attack_steps, collapse.signs
    monkeypatch.setattr(robustness, "attack_steps", lambda model, images, attack, *rest: (
        attacked.append((attack.steps, attack.norm)), steps(model, images, attack, *rest))[1])
    monkeypatch.setattr(collapse, "signs", lambda *given: (watched.append(given[4]), signs(*given))[1])
    status, output, _ = call("train_cifar.py", *flags, "--test-samples=8", "--last-samples=8", "--fname", folder)
    assert status == 0 and "--norm=l_2" in output.splitlines()[0]
    assert attacked == [(2, "l_2"), (1, "l_2")] * 2 + [(2, "l_2")] and watched == ["l_2"] * 2
    for record in epochs_of(folder):  # the mean l_2 norm, in 1/255; in 1/255 a pixel, they would be under 5
        assert 40 < record["defence_mean"] < 128.1 and 0 <= record["attack_mean"] < 128.1
    assert json.loads((folder / "final.json").read_text())["norm"] == "l_2"
    assert "is complete" in call("train_cifar.py", *flags, "--test-samples=8", "--last-samples=8", "--fname", folder,
                                 "--resume=auto")[1]
    status, output, _ = evaluates(folder, "--device=cpu", "--samples=8", "--attacks=clean,fgsm,pgd-2-1,cw,apgd-ce")
    assert status == 0 and f"\n{folder}/state.pth, norm l_2\n" in output
    assert [row[:2] for row in rows_of(output)] == [
        ["clean", ""], *([name, "128"] for name in ("fgsm", "pgd-2-1", "cw", "apgd-ce", "worst case"))]
    status, output, _ = evaluates(folder, "--device=cpu", "--samples=8", "--attacks=fgsm", "--norm=l_inf",
                                  "--epsilons=8")
    assert status == 0 and "--norm l_inf instead of the run's l_2" in output and ", norm" not in output
    first, second = json.loads((folder / "evaluation.json").read_text())
    assert (first["norm"], second["norm"]) == ("l_2", "l_inf")


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_attacks_take_the_norm_of_the_run(norm, tmp_path, monkeypatch):
    seen, job = [], job_of(mixed(), tmp_path, 4)
    job.opened.args.norm = norm
    attacked = evaluation.attacked
    monkeypatch.setattr(evaluation, "attacked", lambda job, title, pgd: (
        seen.append(pgd.norm), attacked(job, title, replace(pgd, steps=0)))[1])
    for attack in ("fgsm", "pgd-2-1", "cw"):
        evaluation.measure_pgd(job, attack, 8)
    assert seen == [norm] * 3


@pytest.mark.parametrize("content", ['[{"a": 1},', "{}", "[1]"])
def test_damaged_evaluations_are_found_before_anything_is_measured(content, run, evaluates, call, monkeypatch):
    (run / "evaluation.json").write_text(content)
    monkeypatch.setattr(evaluation, "attack_steps", None)
    shutil.copytree(run, run.parent / "sound").joinpath("evaluation.json").unlink()
    for networks in ([run], [run.parent / "sound", run]):
        one_line(evaluates(*networks, "--device=cpu", "--samples=8", "--attacks=clean"), "evaluation.json is damaged")
    one_line(evaluates(run.parent / "sound", run / "model_7.pth", "--device=cpu"), "model_7.pth is missing")
    one_line(call("train_cifar.py", "--eval", "--resume=auto", "--device=cpu", "--fname", run),
             "evaluation.json is damaged")
    assert (run / "evaluation.json").read_text() == content


@pytest.mark.parametrize("robust_images", ["zz", "ff00ff", "07ff", "", None, ["ff"], "00"])
def test_damaged_robust_images_are_one_line_of_error(robust_images, run, evaluates):
    flags = [run, "--device=cpu", "--samples=8", "--attacks=clean,fgsm"]
    assert evaluates(*flags)[0] == 0
    record, = json.loads((run / "evaluation.json").read_text())
    record["attacks"][0] |= {"robust_images": robust_images, "robust": 3}
    (run / "evaluation.json").write_text(json.dumps([record]))
    one_line(evaluates(*flags), "evaluation.json is damaged")
    assert evaluates(*flags, "--again")[0] == 0


def test_at_a_full_disk_what_was_measured_is_shown_and_autoattacks_work_is_kept(run, evaluates, short, monkeypatch):
    def full(folder, record, before):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run / "evaluation.json"))
    flags = [run, "--device=cpu", "--samples=8", "--attacks=clean,apgd-ce"]
    with monkeypatch.context() as patch:
        patch.setattr(folders, "add_evaluation", full)
        status, output, error = evaluates(*flags)
    assert status == 1 and [row[0] for row in rows_of(output)] == ["clean", "apgd-ce"] and "No space left" in error
    assert (run / ".apgd-ce-4.json").exists()
    assert evaluates(*flags)[0] == 0 and not (run / ".apgd-ce-4.json").exists()


def test_each_row_is_printed_and_kept_when_it_is_known(run, evaluates, monkeypatch):
    """A signal during the third attack costs that attack alone."""
    flags = [run, "--device=cpu", "--samples=8", "--attacks=clean,fgsm,pgd-5-2"]
    steps = evaluation.attack_steps

    def stopped(model, images, attack, *rest):
        if attack.steps == 5:
            raise Stopped(signal.SIGINT)
        yield from steps(model, images, attack, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "attack_steps", stopped)
        status, output, error = evaluates(*flags)
    assert (status, error) == (130, "evaluate.py: stopped by SIGINT\n".replace("evaluate.py", Path(sys.argv[0]).name))
    assert [row[0] for row in rows_of(output)] == ["clean", "fgsm"]
    partial, = json.loads((run / "evaluation.json").read_text())
    assert [row["attack"] for row in partial["attacks"]] == ["clean", "fgsm"]
    status, output, _ = evaluates(*flags)
    kept, whole = json.loads((run / "evaluation.json").read_text())
    assert status == 0 and kept == partial and len({len(line) for line in output.splitlines() if "|" in line}) == 1
    assert [row["attack"] for row in whole["attacks"]] == ["clean", "fgsm", "pgd-5-2", "worst case"]


def test_a_stopped_eval_keeps_the_epochs_evaluation(run, call, monkeypatch):
    measure = evaluation.measure_pgd

    def stopped(job, attack, *rest):
        if attack == "pgd-3-2":
            raise Stopped(signal.SIGTERM)
        return measure(job, attack, *rest)

    monkeypatch.setattr(evaluation, "measure_pgd", stopped)
    flags = ["--eval", "--resume=auto", "--device=cpu", "--final-iters=3", "--final-restarts=2", "--fname", run]
    assert call("train_cifar.py", *flags)[0] == 143
    record, = json.loads((run / "evaluation.json").read_text())
    assert [row["attack"] for row in record["attacks"]] == ["clean", "fgsm", "pgd-2-1"] and record["epoch"] == 1
    assert len((run / "eval.log").read_text().splitlines()) == 2


def test_a_disk_that_is_full_for_a_while_costs_no_row(run, evaluates, monkeypatch):
    write, failures = Folder.write, [True]

    def full_once(folder, name, text):
        if failures:
            failures.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        write(folder, name, text)

    monkeypatch.setattr(Folder, "write", full_once)
    status, output, _ = evaluates(run, "--device=cpu", "--samples=8", "--attacks=clean,fgsm")
    record, = json.loads((run / "evaluation.json").read_text())
    assert status == 0 and "cannot be written: No space left" in output and len(record["attacks"]) == 2


def test_a_network_in_a_folder_that_cannot_be_written_is_measured(run, evaluates, call, short, monkeypatch, tmp_path):
    before = sorted(path.name for path in run.iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(run)))
    flags = [run, "--device=cpu", "--samples=8", "--attacks=clean,apgd-ce"]
    status, output, error = evaluates(*flags)
    assert (status, error) == (0, "") and "will not be saved" in output and len(rows_of(output)) == 2
    status, output, error = call("train_cifar.py", "--eval", "--resume=auto", "--device=cpu", "--fname", run)
    assert (status, error) == (0, "") and "will not be saved" in output and len(rows_of(output)) == 4
    for _ in range(2):
        status, output, _ = evaluates(*flags, "--again", "--out", tmp_path / "new" / "folder")
        assert status == 0 and "will not be saved" not in output
    assert [path.name for path in (tmp_path / "new" / "folder").glob("[!.]*")] == ["evaluation.json"]
    assert len(json.loads((tmp_path / "new" / "folder" / "evaluation.json").read_text())) == 2
    assert sorted(path.name for path in run.iterdir()) == before
    one_line(evaluates(*flags, "--out", run / "results"), "--out")


@pytest.mark.parametrize("fault, writable, status, kept", [
    (errno.EPIPE, True, 1, ["clean", "fgsm"]), (errno.ENOSPC, True, 0, ["clean", "fgsm", "cw", "worst case"]),
    (errno.ENOSPC, False, 1, None)])
def test_a_row_that_cannot_be_printed_is_kept(fault, writable, status, kept, run, evaluates, monkeypatch):
    """Where there is no record either, the program ends."""
    flags = [run, "--device=cpu", "--samples=8", "--attacks=clean,fgsm,cw"]
    write = tqdm.write

    def fail(text, *rest, **keywords):
        if "| fgsm" in text:
            raise OSError(fault, os.strerror(fault))
        write(text, *rest, **keywords)

    monkeypatch.setattr(tqdm, "write", fail)
    monkeypatch.setattr(console, "discard", lambda stream: None)
    if not writable:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert evaluates(*flags)[0] == status
    assert (run / "evaluation.json").exists() == bool(kept)
    if kept:
        record, = json.loads((run / "evaluation.json").read_text())
        assert [row["attack"] for row in record["attacks"]] == kept


def test_a_step_is_shown_and_can_be_given(run, evaluates):
    status, output, _ = evaluates(run, "--device=cpu", "--samples=24", "--epsilons=4,8",
                               "--attacks=clean,fgsm,cw,pgd-5-1,pgd-5-1-1,pgd-5-1-2.5")
    steps = {(row[0], row[1]): row[2] for row in rows_of(output)}
    assert status == 0 and steps == {
        ("clean", ""): "", **{("worst case", epsilon): "" for epsilon in "48"},
        **{("fgsm", epsilon): epsilon for epsilon in "48"},
        **{(name, epsilon): step for epsilon, step in (("4", "1"), ("8", "2")) for name in ("cw", "pgd-5-1")},
        **{(f"pgd-5-1-{step}", epsilon): step for epsilon in "48" for step in ("1", "2.5")}}
    record, = json.loads((run / "evaluation.json").read_text())
    rows = {(row["attack"], row["epsilon"]): row for row in record["attacks"]}
    assert rows["pgd-5-1-2.5", 8]["step"] == pytest.approx(2.5) and rows["clean", 0]["step"] is None
    assert rows["pgd-5-1", 4]["robust"] == rows["pgd-5-1-1", 4]["robust"]
    for wrong in ("pgd-5-1-x", "pgd-5-1-1-1", "pgd-5-1-"):
        one_line(evaluates(run, f"--attacks={wrong}"), "pgd-STEPS-RESTARTS-SIZE")


@pytest.mark.parametrize("attack, epsilon, weak", [
    ("pgd-1-1", 4, True), ("pgd-3-1-2", 8, True), ("pgd-2-9-3.9", 8, True), ("pgd-4-1", 0.7, False),
    ("pgd-10-1-0.8", 8, False), ("fgsm", 4, False), ("cw", 4, False), ("pgd-1-1", 0, False)])
def test_pgd_that_cannot_cross_the_ball_gets_a_note(attack, epsilon, weak, run, evaluates):
    status, output, _ = evaluates(run, "--device=cpu", "--samples=8", f"--attacks={attack}", f"--epsilons={epsilon}")
    assert status == 0 and (f"# {attack}, epsilon {epsilon}: " in output) == ("cannot reach" in output) == weak


def test_an_attack_that_may_take_minutes_is_announced(run, evaluates, short, monkeypatch):
    """With a second a pass: 8 images, then those that the attacks before left robust."""
    monkeypatch.setattr(evaluation, "pace", lambda job: 1.0)
    flags = [run, "--device=cpu", "--samples=8", "--attacks=clean,fgsm,pgd-5-20,pgd-5-20-2,apgd-ce", "--epsilons=4"]
    status, output, _ = evaluates(*flags)
    _, fgsm, pgd, *_ = (int(8 * float(row[4].rstrip("%")) / 100 + 0.5) for row in rows_of(output))
    lines = [line for line in output.splitlines() if line.startswith("# ")]
    assert status == 0 and 0 < pgd <= fgsm < 8 and lines == [
        f"# pgd-5-20, epsilon 4: may take {duration(300 * fgsm)}",
        f"# pgd-5-20-2, epsilon 4: may take {duration(300 * pgd)}",
        f"# apgd-ce, epsilon 4: may take {duration(300 * pgd)}"]
    monkeypatch.setattr(evaluation, "pace", lambda job: 1e-4)
    assert "may take" not in evaluates(*flags, "--again")[1]


def test_a_mistake_is_one_line(run, evaluates, tmp_path, monkeypatch):
    torch.save(narrow(), tmp_path / "alone.pt")
    (tmp_path / "empty").mkdir()
    for flags, told in (([tmp_path / "alone.pt"], "add --data-set"), ([tmp_path / "none.pt"], "none.pt is missing"),
                        ([tmp_path / "alon.pt"], f"alon.pt is missing; did you mean {tmp_path / 'alone.pt'}?"),
                        ([tmp_path / "none.pt", "--data-set=svhn"], "none.pt is missing"),
                        ([tmp_path / "empty", "--data-set=svhn"], "empty is not the folder of a run"),
                        ([tmp_path / "alone.pt", "--data-set=cifar10"], "another architecture: bn.bias"),
                        ([run, "--attacks=pgd-0-3"], "one of clean"), ([run, "--epsilons=8,x"], "must be a number"),
                        ([run, "--std=0.5,0,0.5"], "must be three numbers above 0"),
                        ([run, "--model=WideResNet"], "another architecture"),
                        ([run, "--model=WideResNet", "--shortcut=raw"], "--shortcut raw is for PreActResNet18")):
        status, _, error = evaluates(*flags)
        assert status == 2 and told in error and error.count("\n") == 1 and "--resume" not in error, error
    for file in run.glob("*.pth"):
        file.unlink()
    one_line(evaluates(run), "neither state.pth nor model_E.pth")
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    status, _, error = evaluates(run, "--attacks=square")
    assert status == 2 and error.endswith("pip install pyautoattack\n")


@pytest.mark.parametrize("flags, hint", [
    (["--epsilons=0.031"], "--epsilons=0.031 means 0.031/255: did you mean 7.9"),
    (["--mean=125.3,123,113.9", "--std=63,62.1,66.7"], "--mean is of pixels in [0, 1]: did you mean 0.491,0.482"),
    (["--epsilons=1", "--mean=1,0,0"], "")])
def test_a_value_in_another_unit_gets_a_hint(flags, hint, run, evaluates):
    status, output, _ = evaluates(run, "--device=cpu", "--samples=8", "--attacks=fgsm", *flags)
    assert status == 0 and (f"# warning: {hint}" in output if hint else "did you mean" not in output)


def test_a_network_without_finite_outputs_is_refused_and_never_right(run, evaluates, call):
    for name in ("state.pth", "model_1.pth"):
        saved = torch.load(run / name, weights_only=True)
        weights = saved.get("model", saved)
        weights["conv1.weight"] *= 1e37
        weights["linear.weight"] += 1e37
        torch.save(saved, run / name)
    for flags in (["--attacks=clean"], ["--attacks=fgsm"], ["--attacks=square"]):
        one_line(evaluates(run, "--device=cpu", "--samples=8", *flags), "produces non-finite outputs")
    one_line(call("train_cifar.py", "--eval", "--resume=auto", "--device=cpu", "--fname", run), "non-finite outputs")

    class Nothing(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * torch.nan

    x, y = torch.rand(6, 3, 4, 4), torch.arange(6) % 3
    for restarts in (0, 1):
        assert not evaluate(Nothing(), x, y, PGD(0.1, 0.1, 1, restarts)).right.any()


@pytest.mark.parametrize("flags, doubted", [
    (["--epsilons=2"], False), (["--seed=3"], False), (["--data-set=cifar10"], False), (["--mean=0.5,0.5,0.5"], True)])
def test_only_flags_that_change_the_network_have_it_checked(flags, doubted, run, evaluates):
    status, output, _ = evaluates(run, "--device=cpu", "--samples=8", "--attacks=clean", *flags)
    assert status == 0 and ("BatchNorm" in output) == doubted


def test_an_edited_flag_of_a_run_is_one_line_that_names_it(run, evaluates, call, call_main):
    whole = (run / "args.json").read_text()
    for name, value in (("model", "PreActResNet19"), ("epsilon", "x"), ("epsilon", -1), ("base_width", 0),
                        ("shortcut", "x"), ("mean", [0.5, 0.5]), ("std", [0.5, 0, 0.5]), ("seed", -1),
                        ("epsilon", None), ("epochs", None), ("model", {}), ("test_iters", -1), ("batch_size", 1.5),
                        ("attack", "x"), ("dummy", "yes"), ("amp", 1), ("lr_max", True)):
        edit(run, args={name: value})
        for result in (evaluates(run, "--device=cpu", "--samples=8", "--attacks=clean"), call_main(figures, run),
                       call("train_cifar.py", "--eval", "--resume=auto", "--device=cpu", "--fname", run)):
            one_line(result, f"{run / 'args.json'}: --{name.replace('_', '-')} ")
        (run / "args.json").write_text(whole)
    for statement in ({"mean": "x"}, {"std": [1, 0, 1]}, {"classes": 0}, {"classes": [10]}, {"mean": 1}, {"source": 1},
                      {"source": "os:system"}, {"side": "x"}, {"side": 1}):
        edit(run, statement=statement)
        one_line(evaluates(run, "--device=cpu", "--samples=8", "--attacks=clean"), "args.json is damaged")
        (run / "args.json").write_text(whole)
    edit(run, args={"epsilon": "4/255", "seed": "0"})  # numbers all the same
    status, output, _ = evaluates(run, "--device=cpu", "--samples=8", "--attacks=fgsm")
    assert status == 0 and rows_of(output)[0][:4] == ["fgsm", "4", "4", "8"]


def test_the_state_of_a_run_is_believed_before_an_edited_args_json(run, evaluates, call):
    expected = {which: checkpoints.fingerprint(load_run(run, which)[0]) for which in ("last", "best")}
    edit(run, args={"epsilon": 2, "mean": [0.5, 0.5, 0.5], "shortcut": "raw"})
    for which in ("last", "best"):
        model, args = load_run(run, which)
        assert checkpoints.fingerprint(model) == expected[which]
        assert (args.epsilon, args.mean, args.shortcut) == (4, None, "activated")
    status, output, _ = evaluates(run, "--device=cpu", "--samples=8", "--attacks=fgsm")
    assert status == 0 and rows_of(output)[0][:4] == ["fgsm", "4", "4", "8"] and "BatchNorm" not in output
    assert "--mean is None, from the checkpoint; args.json says (0.5, 0.5, 0.5)" in output
    status, output, _ = call("train_cifar.py", "--eval", "--resume=auto", "--device=cpu", "--fname", run)
    assert status == 0 and "--epsilon is 4.0, from the checkpoint; args.json says 2.0" in output
    record = json.loads((run / "evaluation.json").read_text())[1]
    assert record["network"] == expected["last"] and record["final"]["epsilon"] == 4


def test_eval_takes_its_flags_from_the_run_and_says_which_ones_win(run, call):
    small = ["--device=cpu", "--eval", "--resume=auto", "--fname", run]
    final = json.loads((run / "final.json").read_text())
    status, _, error = call("train_cifar.py", *small)
    assert (status, error) == (0, "")
    first, = json.loads((run / "evaluation.json").read_text())
    for key in ("iters", "restarts", "epsilon", "images", "robust_acc", "clean_acc"):
        assert first["final"][key] == final[key]
    status, _, error = call("train_cifar.py", *small, "--epsilon=2", "--final-iters=1", "--seed=0")
    assert status == 0 and sorted(error.splitlines()) == ["# --final-iters 1 instead of the run's 2",
                                                          "# epsilon 2 instead of the run's 4"]
    second = json.loads((run / "evaluation.json").read_text())[1]
    assert second["final"]["epsilon"] == 2 and [row["attack"] for row in second["attacks"]] == [
        "clean", "fgsm", "pgd-2-1", "pgd-1-2"]
    assert [row["step"] for row in second["attacks"]] == [None, *[pytest.approx(2)] * 3]
    assert call("train_cifar.py", *small, "--final-model=best")[0] == 0
    third = json.loads((run / "evaluation.json").read_text())[2]
    assert [row["file"] for row in third["attacks"]] == [*[str(run / "state.pth")] * 3, str(run / "model_best.pth")]


@pytest.mark.parametrize("more, name", [(["--eval"], "evaluation.json"), ([], "final.json")])
def test_the_final_evaluation_is_of_the_best_model_if_asked(more, name, run, call):
    """Here, the best model answers 3 whatever the image, and the last one does not."""
    best = torch.load(run / "model_best.pth", weights_only=True)
    best["linear.weight"].zero_()
    best["linear.bias"].copy_(torch.eye(10)[3])
    torch.save(best, run / "model_best.pth")
    for model in ("best", "last"):
        assert call("train_cifar.py", *RUN, *more, "--fname", run, "--resume=auto", f"--final-model={model}")[0] == 0
        found = json.loads((run / name).read_text())
        final = found[-1]["final"] if more else found
        _, labels = data.load_test("CIFAR-10", n=48, synthetic=True)
        constant = (labels == 3).double().mean().item()
        assert final["model"] == model and constant > 0
        assert (final["clean_acc"] == final["robust_acc"] == constant) == (model == "best")


# Several networks


def test_what_evaluation_json_holds_is_not_measured_again(run, evaluates, short, monkeypatch, capsys):
    flags = [run, "--device=cpu", "--samples=24", "--attacks=clean,fgsm,pgd-2-2,apgd-ce", "--epsilons=4,8"]
    _, first, _ = evaluates(*flags)
    file = run / "evaluation.json"
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "attack_steps", None), patch.setattr(evaluation, "AutoAttack", None)
        status, output, _ = evaluates(*flags)
        assert status == 0 and rows_of(output) == rows_of(first) and len(rows_of(first)) == 9
        assert "--again): clean; fgsm, epsilon 4; fgsm, epsilon 8; pgd-2-2, eps" in output
        assert evaluates(run, "--device=cpu", "--samples=24", "--attacks=fgsm", "--epsilons=8")[0] == 0
        saved = torch.load(run / "state.pth", weights_only=True)
        shutil.copytree(run, run.parent / "other")
        saved["model"]["linear.bias"] += 1
        torch.save(saved, run.parent / "other/state.pth")
        for other in ([run, "--again"], [run, "--seed=9"], [run, "--samples=23"], [run, "--epsilons=5"],
                      [run, "--attacks=clean,pgd-2-3"], [run, "--mean=0.5,0.5,0.5"], [run, "--amp"],
                      [run.parent / "other"]):
            with pytest.raises(TypeError, match="'NoneType' object is not callable"):
                evaluates(other[0], *flags[1:], *other[1:])
    assert file.read_bytes() == before and capsys.readouterr()
    seen = []
    steps = evaluation.attack_steps
    monkeypatch.setattr(evaluation, "attack_steps", lambda model, images, attack, *rest: (
        seen.append(attack.loss), steps(model, images, attack, *rest))[1])
    _, output, _ = evaluates(*flags[:-2], "--attacks=clean,fgsm,cw", "--epsilons=8")
    assert seen == ["cw"] and [row[0] for row in rows_of(output)] == ["clean", "fgsm", "cw", "worst case"]
    _, again, _ = evaluates(*flags[:-2], "--attacks=clean,fgsm,cw", "--epsilons=8", "--again")
    assert [row[:-1] for row in rows_of(output)] == [row[:-1] for row in rows_of(again)]  # but for the seconds
    assert len(json.loads(file.read_text())) == 3


def test_a_row_of_another_step_or_another_network_of_the_record_is_not_taken(run, evaluates, call, monkeypatch):
    """--eval takes --pgd-alpha as its step, and its final evaluation may be of the best model."""
    flags = ["--eval", "--resume=auto", "--device=cpu", "--pgd-alpha=3", "--last-samples=48", "--test-samples=48"]
    assert call("train_cifar.py", *flags, "--fname", run)[0] == 0
    record, = json.loads((run / "evaluation.json").read_text())
    record["attacks"][1]["file"] = "model_best.pth"
    (run / "evaluation.json").write_text(json.dumps([record]))
    _, output, _ = evaluates(run, "--device=cpu", "--samples=48", "--attacks=clean,fgsm,pgd-2-1")
    assert "--again): clean\n" in output


@pytest.mark.parametrize("n", [1, 8, 13])
def test_which_images_are_robust_is_kept_in_few_digits(n):
    robust = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
    text = evaluation.packed(robust)
    row = {"robust_images": text, "n": n, "robust": int(robust.sum())}
    assert torch.equal(evaluation.unpacked(row), robust) and len(text) == 2 * -(-n // 8)
    assert evaluation.packed(torch.tensor([True] + 7 * [False] + [True])) == "8080"


def evaluated_as(name: str, counts: dict, **flags) -> evaluation.Evaluated:
    """The results of a network: (attack, epsilon) -> how many of 200 images stay."""
    rows = [evaluation.row(attack, epsilon, count, 200) for (attack, epsilon), count in counts.items()]
    run = options.arguments(options.CIFAR10, flags).flags() if flags else {}
    return evaluation.Evaluated(Path(name), run, rows)


def test_networks_are_compared_in_one_table_a_row_for_runs_that_differ_in_the_seed():
    keys = ("clean", 0.0), ("fgsm", 4.0), ("fgsm", 8.0), ("pgd-10-1", 4.0), ("pgd-10-1", 8.0), ("worst case", 8.0)
    networks = [evaluated_as(f"n{seed}", dict(zip(keys, (100 + seed, 90, 80, 70, 60, 50))), method="n-fgsm", seed=seed)
                for seed in (0, 2, 4)]
    networks += [evaluated_as("p", dict(zip(keys[:3], (20, 10, 4))), method="pgd"),
                 evaluated_as("a/published.pt", {("clean", 0.0): 199, ("pgd-10-1", 16.0): 1})]
    (head, *rows), caption = evaluation.comparison(networks)
    assert head == ["network", "images", "clean", "fgsm, epsilon 4", "fgsm, epsilon 8", "pgd-10-1, epsilon 4",
                    "pgd-10-1, epsilon 8", "pgd-10-1, epsilon 16", "worst case, epsilon 8"]
    low, high = (100 * evaluation.row("clean", 0, 20, 200)[name] for name in ("low", "high"))
    assert [[str(cell) for cell in row[:4]] for row in rows] == [
        ["n-fgsm (3 seeds)", "200", "51.00 ± 1.00", "45.00 ± 0.00"],
        ["pgd", "200", f"10.00 ({low:.2f}-{high:.2f})", str(rows[1][3])],
        ["a/published.pt", "200", str(rows[2][2]), "-"]]
    assert str(rows[1][5]) == "-" and str(rows[2][7]).startswith("0.50 (") and "mean ± deviation" in caption
    (head, *_), _ = evaluation.comparison([*networks, networks[0]._replace(norm="l_2", folder=Path("l_2"), flags={})])
    assert head[2:6] == ["clean", "fgsm, epsilon 4, l_2", "fgsm, epsilon 4", "fgsm, epsilon 8, l_2"]
    (_, *apart), caption = evaluation.comparison(networks, by_seed=True)
    assert [row[0] for row in apart] == ["n-fgsm, seed=0", "n-fgsm, seed=2", "n-fgsm, seed=4", "pgd", "a/published.pt"]
    assert "deviation" not in caption and str(apart[1][2]).startswith("51.00 (")


def test_evaluate_ends_with_the_table_and_reads_the_test_set_once(run, evaluates, monkeypatch, tmp_path):
    for seed in (1, 2):
        shutil.copytree(run, tmp_path / f"{seed}")
        edit(tmp_path / f"{seed}", args={"seed": seed})
    torch.save(torch.load(run / "model_1.pth", weights_only=True), tmp_path / "published.pt")
    read, testing = [], evaluation.testing
    monkeypatch.setattr(evaluation, "testing", lambda *which: (read.append(which), testing(*which))[1])
    flags = [run, tmp_path / "1", tmp_path / "2", tmp_path / "published.pt", run, "--device=cpu", "--samples=24",
             "--attacks=clean,fgsm", "--epsilons=8", "--data-set=cifar10", "--dummy", "--base-width=4"]
    tables = [f"--csv={tmp_path / 'x.csv'}", f"--latex={tmp_path / 'x.tex'}"]
    status, output, error = evaluates(*flags, *tables)
    assert (status, error, len(read)) == (0, "", 1)
    head, seeds, published, caption = output.splitlines()[-4:]
    assert head.split()[:3] == ["network", "images", "clean"] and re.search(r"\(3 seeds\) +24 ", seeds)
    assert seeds.count(" ± 0.00") == 2 and caption.startswith("# accuracy in %")
    assert published.startswith(str(tmp_path / "published.pt")) and published.count("(") == 2
    clean = [row for row in rows_of(output) if row[0] == "clean"]
    assert len(clean) == 4 and clean[0][4].rstrip("%") in seeds  # the run that is named twice is measured once
    lines = [line.split(",") for line in (tmp_path / "x.csv").read_text().replace(", ", " ").splitlines()]
    assert lines[0][:5] == ["network", "images", "clean", "clean deviation", "clean low"] and len(lines) == 3
    assert lines[1][2:4] == [clean[0][4].rstrip("%"), "0.00"] and lines[1][4] == "" != lines[2][4]
    assert r"(3 seeds) & 24 & " in (tmp_path / "x.tex").read_text()
    one_line(evaluates(*flags, f"--csv={tmp_path / 'none' / 'x.csv'}"), "--csv: must be a file in a folder")


def test_a_table_of_different_test_images_has_a_warning(run, call, evaluates, tmp_path):
    assert call("train_cifar100.py", *RUN, "--fname", tmp_path / "other")[0] == 0
    flags = ["--device=cpu", "--samples=8", "--attacks=clean"]
    status, output, _ = evaluates(run, tmp_path / "other", *flags)
    warning = output.splitlines()[-1]
    assert status == 0 and "# warning: " in warning and "synthetic CIFAR-10, synthetic CIFAR-100" in warning
    assert "test images differ" not in evaluates(run, run / "model_1.pth", *flags)[1]


# A network of one's own

OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.bn, self.linear = nn.BatchNorm2d(3), nn.Linear(3, classes)

    def forward(self, x):
        return self.linear(self.bn(x).mean(dim=(2, 3)))

def sized(num_classes):
    return Net(num_classes)

def narrow(**more):
    return Net(more["num_classes"] - 1)

def linear():
    return nn.Linear(3, 3)

def number():
    return 3

built = Net()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module with networks, which lies in the current folder."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def test_a_network_of_ones_own_is_judged_and_compared(own, run, evaluates, tmp_path):
    flags = ["--data-set=cifar10", "--dummy", "--device=cpu", "--samples=48", "--attacks=clean,pgd-3-2", "--epsilons=2"]
    status, output, _ = evaluates(f"--network={own}:Net", *flags)  # imports the module
    assert status == 0 and "in [0, 1]" in output and "will not be saved" in output
    network = trained(sys.modules[own].Net())
    torch.save({"net": {f"module.{name}": value for name, value in network.state_dict().items()}}, "weights.pt")
    flags += ["--mean=0.5,0.4,0.3", "--std=0.5,0.25,0.125"]
    status, output, error = evaluates(run, f"--network={own}:sized", "--weights=weights.pt", *flags)
    assert (status, error) == (0, "") and output.splitlines()[-2].startswith(f"{own}:sized  48 ")
    images = data.testing(options.CIFAR10, "", True)[:48]
    model = nn.Sequential(Normalize((0.5, 0.4, 0.3), (0.5, 0.25, 0.125)), network)
    result = evaluated(model, images, PGD(2 / 255, 0.5 / 255, 3, 2), 48, FLOAT32)
    record, = json.loads((tmp_path / "evaluation.json").read_text())
    rows = {row["attack"]: row["robust"] for row in record["attacks"]}
    assert rows["clean"] == result.right.sum() and rows["pgd-3-2"] == result.robust.sum() < rows["clean"]
    assert (record["model"], record["mean"]) == (f"{own}:sized", pytest.approx([0.5, 0.4, 0.3]))
    assert "base_width" not in record and record["file"] == f"{own}:sized, weights.pt"
    assert "clean; pgd-3-2, epsilon 2" in evaluates(f"--network={own}:sized", "--weights=weights.pt", *flags)[1]


def test_torchvisions_network_has_its_weights(tmp_path):
    from torchvision.models import resnet18
    network = trained(resnet18(num_classes=10))
    torch.save(network.state_dict(), tmp_path / "tv.pt")
    opened = checkpoints.open_network("torchvision.models:resnet18", str(tmp_path / "tv.pt"), data_set="cifar10")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(opened.model(x), network(x)) and not opened.model.training


@pytest.mark.parametrize("flags, told", [
    (["--network={own}:sized"], "--network needs --data-set"), (["--weights=x.pt", "x"], "--weights works only with"),
    ([], "RUN_OR_FILE, or --network"), (["--network={own}"], "must be PACKAGE.MODULE:FUNCTION"),
    (["--network={own}:Nets", "--data-set=cifar10"], "has no attribute 'Nets'"),
    (["--network=nowhere.at_all:net", "--data-set=cifar10"], "No module named 'nowhere'"),
    (["--network={own}:built", "--data-set=cifar10"], "is a network (Net), not a function that returns one"),
    (["--network={own}:number", "--data-set=cifar10"], "must return a torch.nn.Module, not int"),
    (["--network={own}:linear", "--data-set=cifar10", "--dummy"], "fails on images of shape (2, 3, 16, 16): R"),
    (["--network={own}:narrow", "--data-set=cifar10", "--dummy"], "to (2, 9), not to (2, 10): the logits of CIFAR-10"),
    (["--network={own}:Net", "--data-set=cifar10", "--base-width=16"], "--base-width is for the networks of --model"),
    (["--network={own}:Net", "--data-set=cifar10", "--weights=none.pt"], "none.pt is missing"),
    (["--network={own}:Net", "--data-set=cifar10", "--weights=other.pt"], "other.pt is of another architecture: li"),
    (["--network={own}:Net", "--data-set=cifar10", "--weights=bare.pt"], "bare.pt is of another architecture: bn.")])
def test_a_mistake_about_a_network_of_ones_own_is_one_line(flags, told, own, evaluates, small_dummy):
    torch.save({"linear.weight": torch.zeros(4, 3), "linear.bias": torch.zeros(4)}, "other.pt")
    torch.save({"linear.weight": torch.zeros(10, 3), "linear.bias": torch.zeros(10)}, "bare.pt")
    one_line(evaluates(*(flag.format(own=own) for flag in flags), "--device=cpu"), told)


def test_batchnorm_layers_of_other_kinds_are_not_compared():
    """A subclass may compute more, and a layer may have no running statistics."""
    class Rectified(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    plain, x = nn.BatchNorm2d(3), 9 + torch.rand(64, 3, 4, 4)
    plain.running_mean += 0.5
    plain.running_var.fill_(1 / 12)
    network = nn.Sequential(Rectified(3), nn.BatchNorm2d(3, track_running_stats=False), nn.Sigmoid(), plain).eval()
    assert evaluation.batchnorm_mismatch(network[:2], x) == 0
    assert evaluation.batchnorm_mismatch(network, x) > 0 and evaluation.batchnorm_mismatch(plain, x - 9) < 0.2


# AutoAttack


def mixed(seed=0):
    """A small convolutional network of ten classes in float32, without BatchNorm."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Conv2d(8, 8, 3, 2), nn.Tanh(), nn.Flatten(),
                         nn.Linear(392, 10)).eval()


def job_of(model, folder, n=60, batch_size=16, pixels=None) -> evaluation.Job:
    """A job on images that the network is mostly right on."""
    torch.manual_seed(1)
    pixels = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8) if pixels is None else pixels
    images = Images(pixels, torch.zeros(len(pixels), dtype=torch.long), torch.contiguous_format)
    with torch.no_grad():
        labels = model(images.batch(slice(None))[0]).float().argmax(dim=1)
    labels[::15] = (labels[::15] + 1) % 10
    args = SimpleNamespace(seed=7, data_set="own", dummy=False, norm="l_inf",
                           **{name: options.FLAGS[name].default for name in options.NETWORK})
    opened = Opened(model, args, DATASETS["train_cifar.py"], "own", Folder(folder), {}, [])
    images = Images(pixels, labels, torch.contiguous_format)
    return evaluation.Job(opened, images, batch_size, FLOAT32, Stop(StopSignals()), Screen())


def checked_by(check) -> SimpleNamespace:
    """A Stop whose check before each batch is this one."""
    return SimpleNamespace(world=ALONE, together=check, alone=lambda: None)


EPSILON = 0.7  # in 1/255: of which about half of the images are broken


@pytest.mark.parametrize("batch_size, norm, name, epsilon", [
    (16, "l_inf", "Linf", EPSILON), (60, "l_inf", "Linf", EPSILON), (60, "l_2", "L2", 32)])
def test_autoattack_finds_what_its_authors_evaluation_finds(batch_size, norm, name, epsilon, tmp_path, short):
    model = nn.Sequential(OrderedDict(normalize=Normalize((0.4, 0.5, 0.6), (0.9, 0.8, 0.7)), network=mixed()))
    job = job_of(model, tmp_path, batch_size=batch_size)
    job.opened.args.norm = norm
    left, _, more = evaluation.auto_attack(job, "autoattack", epsilon)
    x, y = job.images.batch(slice(None))
    whole = short(model, norm=name, eps=epsilon / 255, seed=7, device="cpu", version="standard")
    _, predicted = whole.run_standard_evaluation(x, y, batch_size=batch_size)
    assert torch.equal(left, predicted == y) and 5 < left.sum() < 51
    assert sum(more["parts"].values()) == 56 - left.sum() and list(tmp_path.iterdir()) == job.unfinished
    alone, _, _ = evaluation.auto_attack(job, "apgd-ce", epsilon)
    assert alone.sum() == 56 - more["parts"]["apgd-ce"]


@pytest.mark.parametrize("flags, low", [([], "float32"), (["--amp"], "bfloat16"), (["--tf32"], "float32"),
                                        (["--amp", "--amp-dtype=float16"], "float16")])
def test_attacks_run_in_a_lower_precision_where_asked(flags, low, tmp_path, evaluates, short, monkeypatch):
    """On a CPU, TF32 does not exist; AutoAttack is in float32 always."""
    seen, convolve = set(), nn.Conv2d.forward

    def spy(layer, x):
        output = convolve(layer, x)
        seen.add((str(output.dtype).removeprefix("torch."), torch.is_grad_enabled()))
        return output

    torch.save(PreActResNet18(base_width=4).state_dict(), tmp_path / "model.pth")
    monkeypatch.setattr(nn.Conv2d, "forward", spy)
    monkeypatch.setattr(device, "slowdown", lambda dtype: 1.0)
    command = [tmp_path / "model.pth", "--data-set=cifar10", "--dummy", "--base-width=4", "--device=cpu",
               "--samples=32"]
    for attack, precision in (("pgd-1-1", low), ("apgd-ce", "float32")):
        seen.clear()
        assert evaluates(*command, f"--attacks={attack}", *flags)[0] == 0
        assert {name for name, attacking in seen if attacking} == {precision}
        assert {name for name, attacking in seen if not attacking} == {"float32"}
        assert json.loads((tmp_path / "evaluation.json").read_text())[-1]["precision"] == low


def test_on_a_gpu_autoattack_has_batches_of_few_sizes(tmp_path, short, monkeypatch):
    """Called as on CUDA."""
    model, seen = mixed(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    job = job_of(model, tmp_path)
    plain, _, _ = evaluation.auto_attack(job, "apgd-ce", EPSILON)
    job.unfinished.pop().unlink()
    assert len(set(seen)) > 2
    seen.clear()
    monkeypatch.setattr(autoattack, "padded", lambda model, batch_size, device: Padded(model, batch_size))
    found, _, _ = evaluation.auto_attack(job, "apgd-ce", EPSILON)
    assert torch.equal(found, plain) and seen.count(16) > len(seen) - 3


def test_a_broken_off_autoattack_goes_on_and_finds_the_same(tmp_path, short):
    job = job_of(mixed(), tmp_path)
    unbroken, _, more = evaluation.auto_attack(job, "autoattack", EPSILON)
    job.unfinished.pop().unlink()
    for after in (0, 2, 3):
        checks = []

        def check(checks=checks, after=after):
            checks.append(1)
            if len(checks) > after:
                raise Stopped(signal.SIGTERM)

        job.stop = checked_by(check)
        with pytest.raises(Stopped):
            evaluation.auto_attack(job, "autoattack", EPSILON)
    rest: list[int] = []
    job.stop = checked_by(lambda: rest.append(1))
    found, _, again = evaluation.auto_attack(job, "autoattack", EPSILON)
    assert torch.equal(found, unbroken) and again == more and list(tmp_path.iterdir()) == job.unfinished
    job.stop = checked_by(lambda: rest.append(-1))
    evaluation.auto_attack(job, "autoattack", EPSILON)  # what it found is there until it is recorded
    assert -1 not in rest
    job.unfinished.pop().unlink()
    evaluation.auto_attack(job, "autoattack", EPSILON)  # from the start again: five batches more
    assert sum(rest) == -5


def test_another_block_does_not_go_on_with_what_an_autoattack_found(tmp_path, short):
    """The two kinds of block have the same parameters."""
    job, checks = job_of(mixed(), tmp_path), []
    job.stop = checked_by(lambda: checks.append(1))
    evaluation.auto_attack(job, "apgd-ce", EPSILON)
    whole = len(checks)
    evaluation.auto_attack(job, "apgd-ce", EPSILON)
    assert whole and len(checks) == whole
    job.opened.args.shortcut = "raw"
    evaluation.auto_attack(job, "apgd-ce", EPSILON)
    assert len(checks) == 2 * whole


@pytest.mark.parametrize("norm, size", [("l_inf", EPSILON / 255), ("l_2", 60 / 255)])
def test_what_leaves_the_ball_breaks_nothing(norm, size, tmp_path):
    job = job_of(mixed(), tmp_path, pixels=torch.randint(64, 192, (60, 32, 32, 3), dtype=torch.uint8))
    x, y = job.images.batch(slice(1, 15))
    for far, counted in ((1.0, True), (1.01, False)):
        def perturb(x, y, far=far):
            delta = x.detach().requires_grad_()
            grad, = torch.autograd.grad(F.cross_entropy(job.opened.model(delta), y), delta)
            length = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            return (x + far * size * (grad.sign() if norm == "l_inf" else grad / length)).clamp(0, 1)

        attack = AutoAttack(job.opened.model, job.images, ("square",), size, 0, 8, job.precision,
                            tmp_path / "x.json", {}, norm=norm)
        attack.perturb["square"] = perturb
        assert attack.breaks("square", x, y).any() == counted


@pytest.mark.parametrize("classes", [2, 3, 4, 8])
def test_autoattack_is_for_few_classes_too(classes, tmp_path, short):
    """It aims at all other classes; apgd-t compares four logits."""
    network = nn.Sequential(*mixed(), nn.Linear(10, classes, bias=False))
    job = job_of(network, tmp_path, 24, 24)
    job.opened = job.opened._replace(dataset=replace(job.opened.dataset, classes=classes))
    job.images.labels.remainder_(classes)
    parts, notes = parts_for("autoattack", classes)
    assert (parts == options.PARTS and not notes) if classes > 3 else (
        parts == ("apgd-ce", "fab-t", "square") and notes == ["autoattack is apgd-ce, fab-t, square: apgd-t needs four "
                                                              "classes"])
    robust, _, more = evaluation.auto_attack(job, "autoattack", EPSILON)
    assert tuple(more["parts"]) == parts and robust.sum() < 24
    if classes < 4:
        with pytest.raises(UsageError, match="--attacks: apgd-t needs four classes, and the data set has"):
            parts_for("apgd-t", classes)
        return
    whole = short(network, eps=EPSILON / 255, seed=7, device="cpu", version="standard")
    whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = classes - 1
    x, y = job.images.batch(slice(None))
    assert torch.equal(robust, whole.run_standard_evaluation(x, y, batch_size=24)[1] == y)


def test_a_part_for_more_classes_is_refused_before_the_first_attack(run, evaluates, short, monkeypatch):
    open_run = evaluation.open_run

    def three(*given, **flags):
        opened = open_run(*given, **flags)
        return opened._replace(dataset=replace(opened.dataset, classes=3))

    monkeypatch.setattr(evaluation, "open_run", three)
    one_line(evaluates(run, "--attacks=clean,apgd-t", "--device=cpu"), "apgd-t needs four classes")
    status, output, _ = evaluates(run, "--attacks=autoattack", "--device=cpu", "--samples=4")
    assert status == 0 and "autoattack is apgd-ce, fab-t, square: apgd-t needs four classes" in output


@pytest.mark.parametrize("part", options.PARTS)
def test_a_signal_within_a_batch_of_autoattack_is_answered_at_the_next_pass(part, run, evaluates, short, monkeypatch):
    calls, logits = [], AutoAttack.logits

    def signalled(attack, x):
        calls.append(len(x))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return logits(attack, x)

    monkeypatch.setattr(AutoAttack, "logits", signalled)
    status, output, error = evaluates(run, "--device=cpu", "--samples=8", f"--attacks=clean,{part}")
    assert status == 143 and error.endswith("stopped by SIGTERM\n") and len(calls) == 3
    assert [row[0] for row in rows_of(output)] == ["clean"]


def test_the_worst_case_counts_images_that_no_attack_breaks(tmp_path):
    job = job_of(mixed(), tmp_path, 4)
    job.robust = {("fgsm", 4.0): torch.tensor([1, 1, 0, 1]).bool(), ("cw", 4.0): torch.tensor([1, 0, 1, 1]).bool(),
                  ("fgsm", 8.0): torch.zeros(4).bool()}
    row, = evaluation.worst(job, (4.0, 8.0))
    assert (row["epsilon"], row["robust"], row["n"]) == (4, 2, 4)


# Doubt


class Masked(nn.Module):
    """A network behind what hides its gradient: a quantized input, or logits of float16 a thousand times as large."""

    def __init__(self, how):
        super().__init__()
        self.net, self.how = mixed(), how

    def forward(self, x):
        return self.net((x * 255).round() / 255) if self.how == "quantized" else (1000 * self.net(x)).half()


def test_a_quantized_input_is_told_of_and_square_sees_through_it(tmp_path, short, monkeypatch):
    monkeypatch.setattr(short, "queries", 1000)
    job = job_of(Masked("quantized"), tmp_path, 40, 40)
    for attack in ("pgd-5-1", "square", "apgd-ce"):
        evaluation.measure(job, attack, 4.0)
    rows = {row["attack"]: row for row in job.rows}
    assert rows["pgd-5-1"]["no_gradient"] == 1 and rows["square"]["robust"] < rows["apgd-ce"]["robust"]
    told = " ".join(evaluation.suspicions(job))
    assert "misclassified under Square" in told and "pgd-5-1 had a gradient of 0 for 100%" in told


@pytest.mark.parametrize("attack", ["fgsm", "cw", "pgd-2-1", "apgd-ce", "apgd-t", "fab-t", "square"])
def test_every_attack_that_needs_a_gradient_says_where_there_is_none(attack, tmp_path, short):
    for how, blind in (("quantized", attack != "square"), ("sure", attack == "apgd-ce")):
        job = job_of(Masked(how), tmp_path / how, 20, 20)
        (tmp_path / how).mkdir()
        evaluation.measure(job, attack, 4.0)
        told = [warning for warning in evaluation.suspicions(job) if "had a gradient of 0" in warning]
        assert len(told) == blind and all(warning.startswith(f"at epsilon 4, {attack} had") for warning in told)
        record, = json.loads((tmp_path / how / "evaluation.json").read_text())
        assert [warning for warning in record["warnings"] if warning in told] == told


def test_a_quantized_input_is_warned_of_where_autoattack_is_far_under_pgd(tmp_path, evaluates, short, monkeypatch):
    job = job_of(Masked("quantized"), tmp_path, 40)
    args = options.parse(job.opened.dataset, argv=[])
    monkeypatch.setattr(short, "queries", 1000)
    monkeypatch.setattr(evaluation, "open_run", lambda *given, **flags: job.opened._replace(args=args))
    monkeypatch.setattr(evaluation, "testing", lambda *given: job.images)
    status, output, error = evaluates("own", "--attacks=pgd-10-2,autoattack", "--epsilons=4", "--device=cpu")
    assert (status, error) == (0, "")
    record, = json.loads((tmp_path / "evaluation.json").read_text())
    pgd, autoattack, _ = record["attacks"]
    assert pgd["accuracy"] > autoattack["accuracy"] + 0.3 and pgd["no_gradient"] == 1
    for told in ("points below PGD-10-2 accuracy: gradients may be masked", "are misclassified under Square",
                 "pgd-10-2 had a gradient of 0 for 100% of the images"):
        assert sum(told in line for line in output.splitlines() if "warning: " in line) == 1


def test_surer_logits_hide_nothing_from_pgd_and_autoattack(tmp_path, short):
    """Of logits a thousand times as large, in float16, most images' cross-entropy has no gradient. The evaluator's loss
    becomes the margin to the highest of the others, and finds what that finds of the network itself."""
    plain, sure = (job_of(model, tmp_path) for model in (mixed(), Masked("sure")))
    x, y = plain.images.batch(slice(None))
    gradient, _ = attacks.input_gradient(sure.opened.model, x, y, torch.zeros_like(x))
    right = torch.arange(60) % 15 != 0
    assert (~gradient[right].flatten(1).any(dim=1)).float().mean() > 0.7
    for steps, restarts in ((10, 1), (20, 3)):
        expected = evaluated(plain.opened.model, plain.images, PGD(EPSILON / 255, EPSILON / 1020, steps,
                                                                           restarts, 7, loss="cw"), 16, FLOAT32)
        evaluation.measure(sure, f"pgd-{steps}-{restarts}", EPSILON)
        other = sure.robust[f"pgd-{steps}-{restarts}", EPSILON] != expected.robust.bool()
        assert other.sum() <= 1  # where float16 rounds two logits to one
        evaluation.measure(plain, f"pgd-{steps}-{restarts}", EPSILON)
        assert sure.rows[-1]["robust"] <= plain.rows[-1]["robust"] and sure.rows[-1]["no_gradient"] == 0
        assert 5 < sure.rows[-1]["robust"] < 51
    for job in (plain, sure):
        evaluation.measure(job, "autoattack", EPSILON)
    assert abs(plain.rows[-1]["robust"] - sure.rows[-1]["robust"]) <= 3
    assert evaluation.suspicions(plain) == []


def test_a_gap_under_pgd_is_told_of(tmp_path):
    job = job_of(mixed(), tmp_path)
    job.rows = [evaluation.row("pgd-50-10", 8.0, 30, 60), evaluation.row("pgd-2-1", 8.0, 20, 60),
                {**evaluation.row("autoattack", 8.0, 25, 60), "parts": {"square": 0}}]
    told, = evaluation.suspicions(job)
    assert all(part in told for part in ("epsilon 8,", "8.3 points", "PGD-50-10", "masked"))
    job.rows[2]["robust"], job.rows[2]["accuracy"] = 26, 26 / 60
    assert evaluation.suspicions(job) == []
    job.rows[2]["parts"]["square"] = 1
    assert "1 of 60 images" in evaluation.suspicions(job)[0]


@pytest.mark.parametrize("shortcut, other", [("activated", "raw"), ("raw", "activated")])
def test_statistics_that_do_not_fit_are_told_of(shortcut, other, tmp_path):
    """With the statistics of training images, a network finds test images usual. Those of another block or another
    normalization are far off. No step moves the weights: they are those of the seed, on every processor."""
    def network(shortcut, **constants):
        return PreActResNet18(base_width=8, shortcut=shortcut, **constants)

    train, test = data.dummy(10)
    model = trained(network(shortcut, mean=MEAN, std=STD)).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
    with torch.no_grad():
        for start in range(0, 512, 64):
            model(train.batch(slice(start, start + 64))[0])
    for wrong, candidate in ((False, model), (True, network(other, mean=MEAN, std=STD)), (True, network(shortcut))):
        candidate.load_state_dict(model.state_dict())
        told = evaluation.mismatch(job_of(candidate.eval(), tmp_path, pixels=test.pixels[:256]))
        assert len(told) == wrong, told
        assert not wrong or "--mean, --std" in told[0]


def test_the_interval_is_wilsons():
    for robust, n, low, high in ((4432, 10000, 0.433487, 0.452956), (0, 1000, 0, 0.003827),
                                 (50, 100, 0.403832, 0.596168), (1000, 1000, 0.996173, 1)):
        row = evaluation.row("clean", 0, robust, n)
        assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-6) and row["accuracy"] == robust / n


class Double(nn.Module):
    """A network in float64, in which rounding turns over no sign of a gradient and no decision."""

    def __init__(self, network):
        super().__init__()
        self.network = network.double()

    def forward(self, x):
        return self.network(x.double())


@pytest.mark.parametrize("attack", ["fgsm", "pgd-4-2", "cw"])
def test_the_batch_size_changes_no_count(attack, tmp_path):
    found = []
    for batch_size in (1, 7, 512):
        job = job_of(Double(mixed()), tmp_path, 12, batch_size)
        evaluation.measure(job, attack, EPSILON)
        found.append(job.robust[attack, EPSILON])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and 0 < found[0].sum() < 11


def test_one_process_and_two_find_the_same_counts_in_batches_of_any_size(run, evaluates):
    flags = [run, "--device=cpu", "--samples=40", "--attacks=clean,fgsm,pgd-3-2", "--epsilons=4", "--again"]
    for batch_size in (1, 37, 512):
        assert evaluates(*flags, f"--batch-size={batch_size}")[0] == 0
    done = together("evaluate.py", *flags, "--batch-size=37")
    assert done.returncode == 0, done.stderr
    records = json.loads((run / "evaluation.json").read_text())
    counts = [[(row["attack"], row["epsilon"], row["n"], row["robust"]) for row in record["attacks"]]
              for record in records]
    assert [record["processes"] for record in records] == [1, 1, 1, 2]
    assert counts[1:] == counts[:1] * 3
    clean, fgsm, pgd, worst = (robust for *_, robust in counts[0])
    assert 0 < worst == fgsm < pgd < clean < 40  # PGD's three steps of a quarter do not cross the ball
    assert [row[:4] for row in rows_of(done.stdout)].count(["worst case", "4", "", "40"]) == 1


def test_the_margin_of_carlini_and_wagner_is_followed():
    """Where two other classes pull in different directions, the step is away from the label and to the higher one."""
    class Linear(nn.Module):
        def forward(self, x):
            a, b = x[:, 0].mean(dim=(1, 2)), x[:, 1].mean(dim=(1, 2))
            return torch.stack([0 * a + 2, a, b - 0.1], dim=1)

    x, y = torch.full((1, 3, 4, 4), 0.5), torch.tensor([0])
    for loss, moved in (("ce", 2), ("cw", 1)):
        grad, _ = attacks.confident_gradient(Linear(), x, y, torch.zeros_like(x), loss)
        assert int(grad.flatten(2).any(dim=2).sum()) == moved


def margin(logits, y, reduction):
    """Carlini and Wagner's loss: the highest logit of another class minus the label's."""
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf)
    return (others.amax(dim=1) - logits[range(len(y)), y]).sum()


@pytest.mark.parametrize("attack, form", [
    ("fgsm", dict(alpha=EPSILON / 255, steps=1, restarts=1, init="zero")),
    ("pgd-4-2", dict(alpha=EPSILON / 1020, steps=4, restarts=2)),
    ("cw", dict(alpha=EPSILON / 1020, steps=50, restarts=10, loss_of=margin))])
def test_an_attack_finds_what_a_plain_loop_finds(attack, form, tmp_path):
    job = job_of(Double(mixed()), tmp_path, 12)
    found = evaluation.measure_pgd(job, attack, EPSILON)
    robust, loss = plain_evaluation(job.opened.model, job.images, EPSILON / 255, seed=7, **form)
    assert torch.equal(found.robust, robust) and 0 < robust.sum() < 11
    torch.testing.assert_close(found.robust_loss.double(), loss, rtol=1e-5, atol=1e-6)


def test_results_are_those_of_robustbench_and_torchattacks(tmp_path):
    """Image by image: torchattacks' PGD, too, is checked at every point, and has our random starts."""
    import robustbench.utils
    import torchattacks

    job = job_of(Double(mixed()), tmp_path, 120, 40)
    model, (x, y) = job.opened.model, job.images.batch(slice(None))
    evaluation.measure(job, "clean", 0.0)
    assert robustbench.utils.clean_accuracy(model, x, y) == pytest.approx(job.rows[0]["accuracy"])
    for steps in (10, 50):
        evaluation.measure(job, f"pgd-{steps}-1", EPSILON)
        right = []
        hook = model.register_forward_hook(lambda model, inputs, logits, right=right: right.append(
            logits.argmax(dim=1) == y))
        seed_everything(robustness.STARTS, job.opened.args.seed, 0)
        attack = torchattacks.PGD(model, EPSILON / 255, EPSILON / 1020, steps)
        model(attack(x.contiguous(memory_format=torch.channels_last), y))
        hook.remove()
        robust = torch.stack(right).all(dim=0) & job.robust["clean", 0.0]
        assert torch.equal(job.robust[f"pgd-{steps}-1", EPSILON], robust) and 10 < robust.sum() < 102


def test_counts_in_l2_are_those_of_torchattacks(tmp_path):
    """With starts of its own, and checked at every point."""
    import torchattacks

    job = job_of(Double(mixed()), tmp_path, 300, 100)
    job.opened.args.norm = "l_2"
    model, (x, y) = job.opened.model, job.images.batch(slice(None))
    ours = evaluation.measure_pgd(job, "pgd-50-1", 32).robust.bool()
    right = []
    hook = model.register_forward_hook(lambda model, inputs, logits: right.append(logits.argmax(dim=1) == y))
    model(torchattacks.PGDL2(model, 32 / 255, 8 / 255, 50)(x, y))
    hook.remove()
    theirs = torch.stack(right).all(dim=0)
    assert abs(int(ours.sum()) - int(theirs.sum())) <= 3 and 75 < ours.sum() < 225


# The final evaluation


def test_a_final_evaluation_goes_on_at_its_restart_and_finds_the_same(tmp_path, call, small_dummy, monkeypatch):
    flags = [*SMALL, "--final-restarts=4", "--epsilon=2"]
    call("train_cifar.py", *flags, "--fname", tmp_path / "whole")
    saved, save = [], states.save

    def stopping(path, content):
        save(path, content)
        if path.name == "final.pth":
            saved.append(content["restart"])
            if saved == [1, 2]:
                raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(states, "save", stopping)
        assert call("train_cifar.py", *flags, "--fname", tmp_path / "run")[0] == 143
    assert not (tmp_path / "run" / "final.json").exists()
    restarts, restart = [], robustness._restart
    monkeypatch.setattr(robustness, "_restart", lambda *args: (restarts.append(args[4]), restart(*args))[1])
    assert call("train_cifar.py", *flags, "--fname", tmp_path / "run", "--resume=auto")[0] == 0
    assert restarts == [2, 3] and not (tmp_path / "run" / "final.pth").exists()
    whole, broken = (json.loads((tmp_path / name / "final.json").read_text()) for name in ("whole", "run"))
    whole.pop("seconds"), broken.pop("seconds")
    assert whole == broken


def test_without_a_final_evaluation_a_run_is_complete(tmp_path, call, small_dummy):
    flags = [*SMALL, "--final-iters=0", "--test-samples=24", "--fname", tmp_path / "run"]
    assert call("train_cifar.py", *flags)[0] == 0
    assert [record["test_images"] for record in epochs_of(tmp_path / "run")] == [24, 64]
    assert not (tmp_path / "run" / "final.json").exists()
    status, output, _ = call("train_cifar.py", *flags, "--resume=auto")
    assert status == 0 and "nothing to do" in output
    assert call("train_cifar.py", *flags, "--resume=auto", "--eval")[0] == 0
    assert len((tmp_path / "run" / "eval.log").read_text().splitlines()) == 2
    assert call("train_cifar.py", *flags, "--resume=auto", "--final-iters=1")[0] == 0
    assert json.loads((tmp_path / "run" / "final.json").read_text())["iters"] == 1


@pytest.mark.parametrize("older", [False, True])
def test_a_relative_data_dir_is_resolved_from_where_the_run_was_started(older, tmp_path, call, evaluates, monkeypatch):
    project, other, moved = (tmp_path / name for name in ("project", "other", "moved"))
    write_cifar10(project / "data", monkeypatch)
    other.mkdir()
    monkeypatch.chdir(project)
    flags = [flag for flag in TINY if flag not in ("--dummy", "--epochs=2")]
    run = tmp_path / "runs" / "a"
    assert call("train_cifar.py", *flags, "--epochs=1", "--data-dir=data", "--fname", run)[0] == 0
    evaluate = ["--attacks=clean", "--device=cpu"]
    assert evaluates(run, *evaluate, "--data-dir=data")[1].count("#") == 0  # not said to override the run's
    if older:
        saved = json.loads((run / "args.json").read_text())
        del saved["starts"][0]["folder"]
        (run / "args.json").write_text(json.dumps(saved))
    else:
        monkeypatch.chdir(other)
        assert evaluates(f"../runs/{run.name}", *evaluate)[0] == 0
        assert call("train_cifar.py", *flags, "--eval", "--resume=auto", "--fname=../runs/a")[0] == 0
        assert load_run(run)[1].data_dir == "../project/data"
        assert not list(other.iterdir())
    project.rename(moved)
    monkeypatch.chdir(moved)
    assert evaluates(run, *evaluate)[0] == 0


def test_what_is_read_can_be_sent_to_other_processes(tmp_path, call, small_dummy):
    """Also where the data set has functions that cannot."""
    assert call("train_cifar.py", *TINY, "--epochs=1", "--fname", tmp_path)[0] == 0
    own = replace(options.CIFAR10, source=lambda data_dir: None, peak=lambda epochs: 1)
    opened, _ = pickle.loads(pickle.dumps(evaluation.read(partial(open_run, tmp_path, data_set=own))))
    assert (opened.dataset.name, opened.dataset.classes) == ("CIFAR-10", 10)
