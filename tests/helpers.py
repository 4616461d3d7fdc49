"""Helpers of several tests: small networks, small runs of the real scripts, their files, and data sets' files."""
import argparse
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image
from processes import IMAGES, ROOT, SIDE
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import datasets

from singlestep import data, networks, options, train
from singlestep.attacks import Step
from singlestep.data import Images
from singlestep.robustness import PGD, Restart, Result, attack_steps
from singlestep.run.device import Precision, seed_everything
from singlestep.run.distributed import ALONE, World

__all__ = ["IMAGES", "ROOT", "SIDE"]

DATASETS = {"train_cifar.py": options.CIFAR10, "train_cifar100.py": options.CIFAR100, "train_svhn.py": options.SVHN,
            "train_tiny.py": options.TINY}
# Added to any command, these make it end in seconds; every part of a run still takes place.
SMALL = ["--dummy", "--device=cpu", "--base-width=4", "--batch-size=32", "--train-samples=80", "--epochs=2",
         "--test-iters=2", "--final-iters=2", "--final-restarts=2", "--final-samples=48"]
TINY = ["--dummy", "--device=cpu", "--base-width=4", "--batch-size=8", "--train-samples=8", "--epochs=2",
        "--test-iters=1", "--test-samples=8", "--last-samples=8", "--final-iters=1", "--final-restarts=1",
        "--final-samples=1", "--chkpt-iters=1", "--attack=fgsm"]


class SmallNet(nn.Module):
    """A network with BatchNorm for images of any size, smooth enough that its gradient has no zeros by chance."""

    def __init__(self, channels: int = 3, classes: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, classes)

    def forward(self, x):
        return self.linear(torch.tanh(self.bn(self.conv(x))).square().mean(dim=(2, 3)))


def linear_network(dataset: options.DataSet, args) -> nn.Module:
    """The network that the arguments name, with weights written down here, under which it is linear.

    Each logit is a whole multiple of each mean colour of a few pixels, since no ReLU meets a negative number. So
    rounding decides neither a class nor a gradient's sign, and counts are the same on every processor. Training with
    --lr-max=0 leaves the network as it is, BatchNorm's running statistics included.
    """
    network = networks.new_network(dataset, args)
    colours = torch.eye(network.conv1.out_channels, 3)
    classes = torch.arange(dataset.classes).view(-1, 1) * torch.tensor([3, 5, 1]) % 11 - 5.0
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.fill_(1), layer.bias.fill_(4)
                layer.momentum = 0.0
            elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                layer.weight[:3, :3, 0, 0] = torch.eye(3)
        network.conv1.weight[:, :, 1, 1] = colours
        network.linear.weight[:, :3] = classes
        network.linear.bias.copy_(-16 * classes.sum(dim=1))  # four BatchNorm layers on the way add 4 each
    return network


def script(name: str, *flags: str, timeout: float = 280, **options) -> subprocess.CompletedProcess:
    """Run a script as a user does."""
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], capture_output=True, text=True,
                          timeout=timeout, **options)


def epochs_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder: Path) -> tuple[list[dict], list[list[str]], dict]:
    """All that a run's logs say but for how long it took, a GPU's memory (of each process), and that it was resumed."""
    records = [{key: value for key, value in record.items() if not key.endswith(("_time", "memory"))}
               for record in epochs_of(folder)]
    lines = [line.split("\t") for line in (folder / "output.log").read_text().splitlines() if not line.startswith("#")]
    rows = [[cell for i, cell in enumerate(line) if i not in (1, 2) and not cell.startswith("time")] for line in lines]
    final = json.loads((folder / "final.json").read_text())
    final = {key: value for key, value in final.items() if key not in ("seconds", "memory")}
    return records, rows, final


def assert_same(left, right) -> None:
    """Equal to the last bit, through nested dicts and lists, but for what may differ between two runs."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - {"args", "starts", "seconds", "train_time", "test_time", "train_memory", "test_memory",
                                  "memory"}:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right):
            assert_same(*pair)
    else:
        assert left == right


def assert_same_run(left: Path, right: Path) -> None:
    """Both folders hold the same weights, optimizer state and logs, bit for bit."""
    assert without_times(left) == without_times(right)
    for name in ("state.pth", "model_best.pth"):
        assert_same(torch.load(left / name, weights_only=True), torch.load(right / name, weights_only=True))


def a_step(network: nn.Module, images: int, **more) -> Step:
    """The context of a step on all of so many images, with an optimizer, and images that are not augmented."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    drawn = {name: torch.zeros(images, dtype=torch.long) for name in ("top", "left")}
    drawn["flip"] = torch.zeros(images, dtype=torch.bool)
    return Step(network, images, torch.arange(images), optimizer=optimizer, drawn=drawn, classes=4, **more)


def precision(amp: bool = False, dtype: str = "bfloat16", tf32: bool = True) -> Precision:
    args = argparse.Namespace(amp=amp, amp_dtype=dtype, amp_impl="native", tf32=tf32)
    return Precision(args, torch.device("cpu"))


FLOAT32 = precision()
EPSILON = 8 / 255


class Calls(TorchDispatchMode):
    """The names of the operations that PyTorch executes."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.name())
        return operation(*args, **kwargs or {})


class Brightness(nn.Module):
    """Says class 1 where the mean pixel is above one half: what PGD does to it can be worked out by hand."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))

    def forward(self, x):
        z = self.scale * (x.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-z, z], dim=1)


class Wavy(nn.Module):
    """A fixed network in float64 whose decisions change within a small ball."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(3072, 16, generator=generator, dtype=torch.float64) / 10)
        self.second = nn.Parameter(torch.randn(16, 3, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return (torch.tanh(x.double().flatten(1) @ self.first) @ self.second).float()


def wavy_images(n=40):
    pixels = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = Images(pixels, torch.zeros(n, dtype=torch.long))
    labels = Wavy()(images.batch(slice(None))[0]).argmax(dim=1)
    labels[::10] = (labels[::10] + 1) % 3  # some are wrong from the start
    return Images(pixels, labels)


def l2_norm(delta):
    return delta.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()


def plain_start(x, epsilon, seed, restart, norm="l_inf"):
    n, channels, height, width = x.shape
    seed_everything(3, seed, restart)
    start = torch.empty(n, height, width, channels)
    if norm == "l_inf":
        start.uniform_(-epsilon, epsilon)
    else:
        start.normal_()
        start *= epsilon * torch.rand(n, 1, 1, 1) / l2_norm(start)
    return start.permute(0, 3, 1, 2).clamp(-x, 1 - x)


def plain_evaluation(network, images, epsilon, alpha, steps, restarts, seed, init="random", loss_of=F.cross_entropy,
                     norm="l_inf"):
    """Which images PGD leaves right at every point of every restart, and their losses there or where they broke.

    loss_of: the loss that the attack maximizes.
    """
    x, y = images.batch(slice(None))
    robust = network(x).argmax(dim=1) == y
    loss = torch.where(robust, 0, F.cross_entropy(network(x), y, reduction="none")).detach()
    for restart in range(restarts):
        delta = plain_start(x, epsilon, seed, restart, norm) if init == "random" else torch.zeros_like(x)
        for step in range(steps + 1):
            delta = delta.requires_grad_()
            logits = network(x + delta)
            losses = F.cross_entropy(logits, y, reduction="none")
            grad, = torch.autograd.grad(loss_of(logits, y, reduction="sum"), delta)
            broken = robust & (logits.argmax(dim=1) != y)
            losses, ends = losses.detach(), robust & (step == steps)
            loss = torch.where(broken, losses, torch.where(ends, loss.maximum(losses), loss))
            robust &= ~broken
            delta = delta.detach()
            if norm == "l_2":
                delta = delta + alpha * grad / l2_norm(grad)
                delta = (delta * (epsilon / l2_norm(delta)).clamp(max=1)).clamp(-x, 1 - x)
            else:
                delta = (delta + alpha * grad.sign()).clamp(-epsilon, epsilon).clamp(-x, 1 - x)
    return robust, loss


def rows_of(output: str) -> list[list[str]]:
    """The rows of evaluate.py's tables, each with its cells, the headers aside."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()
            if line.startswith("| ")]
    return [row for row in rows if row[0] != "attack"]


def one_line(result, named: str) -> None:
    status, output, error = result
    assert status == 2 and not output
    assert error.startswith("train_") or error.startswith(os.path.basename(error.split(":")[0]))
    assert error.count("\n") == 1 and error.endswith("\n") and named in error and "Traceback" not in error, error


def write_cifar10(root, monkeypatch, n=6):
    """Small files in CIFAR-10's format, and their sums where torchvision looks for them."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(seed):
        rng = np.random.default_rng(seed)
        return {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": list(range(n))}

    train = [[f"data_batch_{i}", write(f"data_batch_{i}", batch(i))] for i in range(1, 6)]
    test = [["test_batch", write("test_batch", batch(0))]]
    meta = {"filename": "batches.meta", "key": "label_names",
            "md5": write("batches.meta", {"label_names": [str(i) for i in range(10)]})}
    for name, value in (("train_list", train), ("test_list", test), ("meta", meta)):
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    return folder, batch


def write_svhn(root, monkeypatch, n=12):
    """Small files in SVHN's format: Matlab 5, X of (32, 32, 3, n) and y of (n, 1) where 10 stands for the digit 0."""
    root.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    labels = (np.arange(n, dtype=np.uint8) % 10 + 1).reshape(-1, 1)
    sums = {}
    for split in ("train", "test"):
        path = root / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels, "y": labels})
        sums[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", sums)
    return pixels, labels


def write_tiny_imagenet(root, monkeypatch, n=8, without=(), extra=()):
    """A small zip in Tiny-ImageNet's layout: n training images of each of four classes, 2n for validation.

    without, extra: names of files that it lacks, and of JPEGs that it has besides. Returns the content of its files.
    """
    root.mkdir(parents=True, exist_ok=True)
    rng, wnids = np.random.default_rng(0), ["n04", "n01", "n03", "n02"]

    def jpeg(grey: bool) -> bytes:
        coarse = rng.integers(0, 256, (4, 4) if grey else (4, 4, 3), dtype=np.uint8)
        with io.BytesIO() as file:
            Image.fromarray(coarse.repeat(16, axis=0).repeat(16, axis=1)).save(file, "JPEG")
            return file.getvalue()

    files = {"wnids.txt": "\n".join(wnids), "words.txt": "n01\tgoldfish\nn05\tno class of these",
             "val/val_annotations.txt": "".join(f"val_{i}.JPEG\t{wnids[i % 4]}\t0\t0\t63\t63\n" for i in range(2 * n)),
             "test/images/test_0.JPEG": jpeg(False)}
    for wnid in sorted(wnids):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = "".join(f"{wnid}_{i}.JPEG\t0\t0\t63\t63\n" for i in range(n))
        files |= {f"train/{wnid}/images/{wnid}_{i}.JPEG": jpeg(i == 1) for i in range(n)}
    files |= {f"val/images/val_{i}.JPEG": jpeg(i == 1) for i in range(2 * n)}
    files |= {name: jpeg(False) for name in extra}
    with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as archive:
        for name, content in files.items():
            if name not in without:
                archive.writestr(f"tiny-imagenet-200/{name}", content)
    digest = hashlib.md5((root / "tiny-imagenet-200.zip").read_bytes()).hexdigest()
    monkeypatch.setattr(data, "TINY_IMAGENET_MD5", digest)
    return files


def evaluated(model, images: Images, attack: PGD, batch_size: int, precision: Precision, world: World = ALONE,
              begun: Restart | None = None) -> Result:
    """The result of an attack."""
    *_, last = attack_steps(model, images, attack, batch_size, precision, world, begun)
    return last.result.sums(world)


def interrupt(monkeypatch, at: int, number=signal.SIGTERM) -> None:
    """Have the signal arrive during the run's step `at`, counted over epochs; later steps are not interrupted."""
    count = 0

    class Counted(train.AfterStep):
        def __call__(self):
            nonlocal count
            count += 1
            if count == at:
                self.run.signals.received = signal.Signals(number)
            super().__call__()

    monkeypatch.setattr(train, "AfterStep", Counted)
