"""Training steps against those that the methods' authors' own code took: see golden/README.md.

The product's `train_step` gets the recorded images and, in place of random numbers, the recorded draws.
"""
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT
from torch import Tensor, nn

from singlestep import options, train
from singlestep.data import Images
from singlestep.run.console import StopSignals
from singlestep.run.distributed import CPU, World
from singlestep.run.folder import Folder
from singlestep.run.state import named_sums

close = torch.testing.assert_close
Arrays = dict[str, Tensor]


class Network(nn.Module):
    """The network of the recorded steps."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.linear = nn.Linear(12, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.linear(x.mean(dim=(2, 3)))


class Draws:
    """PyTorch's random numbers, replaced by given ones in the order of the calls."""

    def __init__(self, monkeypatch):
        self.left: list[Tensor] = []
        for name in ("rand", "rand_like", "randn_like", "randint"):
            monkeypatch.setattr(torch, name, self.next)
        monkeypatch.setattr(Tensor, "uniform_", lambda values, *bounds: values.copy_(self.next()))

    def next(self, *args, **kwargs) -> Tensor:
        return self.left.pop(0)


def under(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays whose name begins with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def follow(monkeypatch, name: str, flags: str, passes: str, draws: Callable[[Arrays, Arrays], list[Tensor]],
           kept: Callable[[Arrays], Arrays] = lambda arrays: {}, images: int = 6, padding: int = 0,
           moved: bool = False, first_epoch: int = 0, lazily: bool = False) -> None:
    """Take the recorded steps, and compare each with what the authors' code computed.

    Args:
        flags: of the training script, beside those of the recorded optimizer.
        passes: what is added to x in each forward pass of a step, by the recorded name; "-" for a pass not recorded,
            "0" for a clean one.
        draws: (arrays of the step, hyperparameters) -> the random numbers of the step, in the order of the calls.
        kept: the arrays under "kept." -> the tensors of `state.kept` that they are; also what is kept at first.
        images: number of training images.
        moved: whether the last pass is made with the weights recorded as "moved".
        first_epoch: the number of the first epoch in the recorded numbers.
        lazily: whether what is kept for an image is compared only in the steps on that image.
    """
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(np.array(file[key])) for key in file.files}
    hyper = under(arrays, "hp.")
    epochs = int(hyper.get("epochs", torch.tensor(30)))
    args = options.parse(options.CIFAR10, argv=[
        *f"--lr-schedule=onedrop --lr-drop=99 --lr-max=0.1 --batch-size=6 --epochs={epochs}".split(),
        f"--epsilon={255 * hyper['eps'].item():g}", *flags.split()])
    network = Network().double()
    network.load_state_dict(under(arrays, "init."))
    state, _ = train.build(options.CIFAR10, args, CPU, World(), network)
    state.model.train()
    state.kept.update(kept(under(arrays, "kept0.")))
    own = Images.of(torch.zeros(images, 3, 8, 8), torch.zeros(images, dtype=torch.long))
    dataset = replace(options.CIFAR10, augmentation=dict(padding=padding, pad_mode="zero"))
    run = train.assemble(dataset, args, state, Folder(None), World(), StopSignals(), [own] * 3)
    seen: list[tuple[Tensor, Arrays]] = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(
        (inputs[0].detach().clone(), {key: value.detach().clone() for key, value in module.named_parameters()})))
    random = Draws(monkeypatch)
    for number in range(1, int(hyper["steps"]) + 1):
        step = under(arrays, f"s{number}.")
        x, y = step["x"], step["y"]
        state.begin_epoch(int(step.get("epoch", torch.tensor(first_epoch))) - first_epoch)
        random.left = draws(step, hyper)
        seen.clear()
        drawn = {key: step[key] for key in ("top", "left", "flip") if key in step}
        batch = int(step.get("batch", torch.tensor(number - 1)))
        train.train_step(run, train.Batch(x, y, step.get("index", torch.arange(6)), drawn, batch))
        assert not random.left, "not all draws were used"
        recorded = passes.split()[-len(seen):]  # a pass at the beginning may be made in some steps only
        assert len(seen) == len(recorded)
        for (image, _), delta in zip(seen, recorded):
            if delta != "-":
                close(image, x + (step[delta] if delta != "0" else 0), rtol=0, atol=1e-6)
        if moved:
            close(seen[-1][1], under(step, "moved."), rtol=1e-6, atol=1e-6)
        close(named_sums(state.sums)["loss"] / 6, step["loss"].item(), rtol=1e-6, atol=1e-6)
        close(dict(network.state_dict()), under(step, "state."), rtol=1e-6, atol=1e-6)
        for key, value in kept(under(step, "kept.")).items():
            rows = step["index"] if lazily else slice(None)
            close(state.kept[key][rows], value[rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name, flags", [("lap_n", "--method=n-lap --lap-beta=0.05"),
                                         ("lap_r", "--method=r-lap --lap-beta=0.05"),
                                         ("lap_v", "--method=r-lap --fgsm-init=zero --lap-beta=0.07")])
def test_laps_steps(name, flags, monkeypatch):
    follow(monkeypatch, name, flags, "eta delta", lambda step, hyper: [step["noise"]] if "noise" in step else [],
           moved=True)


@pytest.mark.parametrize("name, noise", [("liet", (0.1, 0.5)), ("liet_eps16", (0.0, 1.0))])
def test_liet(name, noise, monkeypatch):
    def draws(step, hyper):
        """Two numbers for rho and the coin; a number below rho where the entry is replaced."""
        low, high = noise
        u = torch.stack([(step["rho"] - low) / (high - low), (step["coin"] + 2) / 4])
        made = [step["r_L"]] if "r_L" in step else []
        return [*made, u, 1 - step["mask"].double(), step["noise"], step["r_attack"], step["r_train"]]

    follow(monkeypatch, name, "--method=liet --liet-every=2", "- eta delta", draws,
           lambda kept: {"liet": kept["L"].sign()} if kept else {})


def test_atass_steps(monkeypatch):
    """Epochs 5, 6, 7 and 10, counted from 1; before the last, all is drawn anew."""
    share = 6 / 128  # the recorded norms are of a mean over 6 images
    follow(monkeypatch, "atas", f"--method=atas --atas-c={0.01 * share}", "eta delta",
           lambda step, hyper: [step["redrawn.D"][step["index"]]] if "redrawn.D" in step else [],
           lambda kept: {"atas v": share**2 * kept["v"], **({"atas": kept["D"]} if "D" in kept else {})}, images=12,
           padding=2, first_epoch=1, lazily=True)


def test_fuap(monkeypatch):
    def kept(arrays):
        """The product keeps u in units of a, and the head's weights as one vector; Adam's moments are 0 at first."""
        head = torch.cat([arrays[f"{layer}.{name}"].flatten() for layer in ("h1", "h2") for name in ("weight", "bias")])
        found = {"uap": arrays["u"].sign(), "uap momentum": arrays["m"], "fuap head": head}
        if not arrays["m"].any():
            found |= {"fuap moments": torch.zeros(2, len(head)).double(), "fuap steps": torch.zeros(()).double()}
        return found

    follow(monkeypatch, "fuap", "--method=fuap --fuap-rows=5", "- eta delta", lambda step, hyper: [step["noise"]], kept)


def test_pco(monkeypatch):
    """The stored perturbations of the first epoch are drawn anew there: as recorded."""
    follow(monkeypatch, "pco", "--method=pco", "eta delta F", images=12,
           draws=lambda step, hyper: [(step["eta"] / hyper["eps"] + 1) / 2] if step["epoch"] == 0 else [],
           kept=lambda arrays: {"pco": arrays["D"]})
