"""The public interface: training, evaluating and the rule of collapse from Python."""
import ast
import inspect
import os
import re

import pytest
import torch
from helpers import ROOT, epochs_of, write_cifar10
from torch import nn

import singlestep
from singlestep import collapse, data, options
from singlestep.attacks import fgsm, kl
from singlestep.networks import PreActResNet18
from singlestep.run.console import UsageError
from singlestep.run.device import seed_everything
from singlestep.train import WEIGHTS, train

FLAGS = dict(lr_schedule="cyclic", lr_max=0.1, batch_size=32, train_samples=80, test_iters=2, device="cpu")
CIFAR10 = options.CIFAR10


def network_of_seed(seed: int) -> PreActResNet18:
    seed_everything(WEIGHTS, seed)
    return PreActResNet18(10, base_width=4, mean=CIFAR10.mean, std=CIFAR10.std)


def tensors(images: data.Images) -> tuple[torch.Tensor, torch.Tensor]:
    return images.pixels.permute(0, 3, 1, 2), images.labels


@pytest.mark.parametrize("method, more", [("zerograd", {}), ("pgi", {"ema": 0.9}), ("free", {"free_replays": 2})])
def test_a_call_ends_with_the_scripts_bits(method, more, tmp_path, call, small_dummy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in {**FLAGS, **more}.items()]
    assert call("train_cifar.py", "--dummy", "--epochs=2", "--base-width=4", "--final-iters=0", f"--method={method}",
                "--seed=3", "--fname=script", *argv)[0] == 0
    before = sorted(os.listdir(tmp_path))
    images, test = map(tensors, data.dummy(10))
    for given in (images[0], images[0].float() / 255):
        network = network_of_seed(3)
        history = train(network, given, images[1], method, epochs=2, seed=3, augment=CIFAR10.augmentation, test=test,
                        **FLAGS, **more)
        saved = torch.load(tmp_path / "script" / "state.pth", weights_only=True)
        assert all(torch.equal(value, saved["model"][name]) for name, value in network.state_dict().items())
        assert not network.training
        seconds = {"train_time", "test_time"}
        assert [{name: value for name, value in record.items() if name not in seconds} for record in history] == [
            {name: value for name, value in record.items() if name not in seconds}
            for record in epochs_of(tmp_path / "script")]
    assert sorted(os.listdir(tmp_path)) == before  # nothing was written


def test_without_test_images_no_epoch_is_evaluated_and_a_folder_can_be_resumed(tmp_path, small_dummy):
    images, labels = tensors(data.dummy(10)[0])
    network = network_of_seed(0)
    keywords = dict(folder=tmp_path / "run", resume="auto", **FLAGS)
    history = train(network, images, labels, "fgsm", epochs=1, **keywords)
    assert history[0]["train_images"] == 80 and "test_acc" not in history[0]
    again = train(network_of_seed(0), images, labels, "fgsm", epochs=2, allow_changes=True, **keywords)
    assert again[0] == history[0] and len(again) == 2
    assert (tmp_path / "run" / "model_1.pth").exists() and epochs_of(tmp_path / "run") == again
    with pytest.raises(UsageError, match="a network of your own"):  # its normalization is not recorded
        singlestep.load_run(tmp_path / "run")
    with pytest.raises(UsageError, match=r"only train\(\) in Python"):
        options.arguments(options.CIFAR10, {"like": str(tmp_path / "run")})


def test_a_network_of_ones_own_is_named_as_it_is(tmp_path, capsys):
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 2
    train(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), images, labels, "fgsm", epochs=1, test=(images, labels),
          folder=tmp_path / "run", quiet=False)
    output = capsys.readouterr().out
    assert "network  Sequential, 0.0 M parameters" in output and "base-width" not in output
    assert f"evaluate.py --network=MODULE:FUNCTION --weights={tmp_path}/run/model_0.pth --data-set=NAME" in output
    assert "--epsilons=8 --norm=l_inf" in output
    assert "--samples=8" in output


@pytest.mark.parametrize("flags, named", [
    ({"method": "zerogad"}, "--method must be one of"), ({"lr_mx": 0.1}, "did you mean --lr-max"),
    ({"zero_qval": 7}, "--zero-qval must be a number, from 0 to 1"), ({"multi_th": 4}, "--multi-th must be from 1"),
    ({"epochs": 0}, "--epochs must be a whole number")])
def test_a_wrong_flag_is_an_error_that_names_it(flags, named):
    images, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    given = {"method": "zerograd", "epochs": 1, **flags}
    with pytest.raises(UsageError, match=named):
        train(network_of_seed(0), images, labels, given.pop("method"), **given)


def test_an_epsilon_in_the_unit_of_functions_is_warned_of(capsys):
    """Although train() is quiet: its flags are in 1/255."""
    images, labels = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    train(network_of_seed(0), images, labels, "fgsm", epochs=1, epsilon=8 / 255)
    assert "# warning: --epsilon=0.0313725 means 0.0313725/255: did you mean 8?" in capsys.readouterr().out


def test_images_of_another_form_are_refused():
    labels = torch.zeros(4, dtype=torch.long)
    for images in (torch.zeros(4, 3, 8), torch.full((4, 3, 8, 8), 255.0), torch.zeros(4, 3, 8, 8, dtype=torch.int32),
                   torch.zeros(3, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"images|labels"):
            singlestep.evaluate(network_of_seed(0), images, labels, singlestep.PGD(0.1, 0.1, 1, 1))
    for images, message in ((torch.rand(4, 3, 8, 8) - 2, r"not from -\d"),
                            (torch.full((4, 3, 8, 8), torch.nan), "nan")):
        with pytest.raises(ValueError, match=message):
            train(network_of_seed(0), images, labels, "fgsm", epochs=1)
    for wrong in (torch.zeros(4), torch.full((4,), -1)):
        with pytest.raises(ValueError, match="integers, 0 or more"):
            train(network_of_seed(0), torch.rand(4, 3, 8, 8), wrong, "fgsm", epochs=1)
    with pytest.raises(ValueError, match="8/255, not 8"):
        singlestep.evaluate(network_of_seed(0), torch.zeros(4, 3, 8, 8), labels, singlestep.PGD(8, 2, 1, 1))


def test_every_module_has_its_own_mode_after_an_evaluation_and_an_attack_in_eval_mode():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4).eval(), torch.nn.Flatten(),
                                  torch.nn.Linear(4 * 36, 3)).train()
    network[1].eval()
    x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    singlestep.evaluate(network, x, y, singlestep.PGD(0.1, 0.1, 1, 1))
    kl(network, x, y, 0.1, 0.1, 2)
    collapse.signs(network, x, y, 0.1)
    assert [module.training for module in network.modules()] == [True, True, False, True, True]


def test_inference_mode_is_named():
    network, images, labels = network_of_seed(0), torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside torch\.inference_mode"):
        train(network, images, labels, "fgsm", epochs=1)


def test_another_default_dtype_changes_no_image_and_no_start(small_dummy):
    def found():
        x, y = singlestep.load_test("cifar10", n=32, synthetic=True)
        result = singlestep.evaluate(network, x, y, singlestep.PGD(8 / 255, 2 / 255, 2, 2))
        return x, y, result.robust_loss, data.Augmentation(flip=True).draw(20)["flip"]

    network = network_of_seed(1)
    expected = found()
    torch.set_default_dtype(torch.float64)
    try:
        assert all(map(torch.equal, found(), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_evaluate_counts_what_the_attack_leaves(small_dummy):
    network, (images, labels) = network_of_seed(1).train(), tensors(data.dummy(10)[1])
    result = singlestep.evaluate(network, images, labels, singlestep.PGD(4 / 255, 4 / 255, 1, 1, init="zero"), 24)
    assert network.training
    network.eval()
    x = images / 255
    delta = fgsm(network, x, labels, 4 / 255, 4 / 255, init="zero")
    with torch.no_grad():
        clean, attacked = (network(x + shift).argmax(dim=1) == labels for shift in (0, delta))
    assert torch.equal(result.right.bool(), clean) and torch.equal(result.robust.bool(), clean & attacked)
    assert result.metrics()["robust_acc"] == pytest.approx((clean & attacked).double().mean().item())


def test_the_page_works_block_by_block(tmp_path, call, small_dummy, monkeypatch):
    """With few images and one epoch; its signatures are compared with the code."""
    write_cifar10(tmp_path / "cifar-data", monkeypatch, n=10)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert call("train_cifar.py", "--dummy", "--epochs=1", "--base-width=4", "--final-iters=0", "--fname=runs/first",
                "--test-iters=1", "--device=cpu")[0] == 0
    page = (ROOT / "docs/python.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        imports = "\n".join(line for line in block.splitlines() if line.startswith("from "))
        shorter = re.sub(r"epochs=\d+", "epochs=1", block)
        exec(shorter if "def " not in block and "class " not in block else imports, names)
        stubs = ast.parse(block) if "def " in block else None
        for stub in stubs.body if stubs else ():
            if isinstance(stub, ast.FunctionDef):  # a signature
                stated = [each.arg for each in (*stub.args.args, *stub.args.kwonlyargs)]
                actual = [name for name, each in inspect.signature(names[stub.name]).parameters.items()
                          if each.kind is not each.VAR_KEYWORD]
                assert stated == actual, stub.name
    assert names["images"].shape == (50, 3, 32, 32) and names["images"].dtype == torch.uint8
    records = names["history"]  # of the loop
    assert len(records) == 2 and len(collapse.collapsed(records)) == 2
    assert all(0 <= record[key] <= 1 for record in records for key in ("test_acc", "fgsm_acc", "test_robust_acc"))
    assert collapse.collapsed([{"fgsm_acc": 0.4, "test_robust_acc": 0.35},
                               {"fgsm_acc": 0.8, "test_robust_acc": 0.02}]) == [False, True]
