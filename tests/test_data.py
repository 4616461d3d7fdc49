"""The data: augmentation against torchvision's own, files in the true formats, downloads, splits, dummy images."""
import collections
import contextlib
import dataclasses
import errno
import hashlib
import http.server
import importlib
import io
import json
import os
import signal
import socket
import tarfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets.utils
import torchvision.transforms.functional as TF
from helpers import (
    DATASETS,
    SMALL,
    assert_same_run,
    epochs_of,
    interrupt,
    one_line,
    rows_of,
    write_cifar10,
    write_svhn,
    write_tiny_imagenet,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import Started
from torchvision import datasets

from singlestep import data, networks, options
from singlestep.data import Augmentation, Images, dummy, read_tiny_imagenet, read_torchvision
from singlestep.run.console import UsageError
from singlestep.run.folder import lock
from singlestep.train import augmentation as augmentation_of


def noise_images(n: int, seed: int = 0, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randint(256, (n, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_torchvision(image: torch.Tensor, augmentation: Augmentation, top, left, flip, angle) -> np.ndarray:
    """One image through the published transforms, on PIL images, with given parameters."""
    picture = Image.fromarray(image.numpy())
    mode = {"reflect": "reflect", "zero": "constant"}[augmentation.pad_mode]
    picture = TF.crop(TF.pad(picture, augmentation.padding, padding_mode=mode), int(top), int(left), *image.shape[:2])
    if flip:
        picture = TF.hflip(picture)
    if augmentation.degrees:
        picture = TF.rotate(picture, float(angle))
    return np.asarray(picture)


@pytest.mark.parametrize("size", [(32, 32), (16, 25)])
@pytest.mark.parametrize("augmentation", [
    *(Augmentation(**dataset.augmentation) for dataset in DATASETS.values()), Augmentation(4, "reflect", True, 15)])
def test_augmentation_is_torchvisions_pixel_by_pixel(augmentation, size):
    images = noise_images(200, size=size)
    index = torch.randperm(200)
    torch.manual_seed(0)
    drawn = augmentation.draw(200)
    found = augmentation.apply(images, index, **drawn)
    for i in range(200):
        expected = by_torchvision(images[index[i]], augmentation, *(drawn[name][i] for name in
                                                                    ("top", "left", "flip", "angle")))
        assert np.array_equal(found[i].numpy(), expected), f"image {i}: {({k: v[i] for k, v in drawn.items()})}"


@settings(max_examples=100, deadline=None)
@given(top=st.integers(0, 8), left=st.integers(0, 8), flip=st.booleans(), angle=st.floats(-180, 180))
def test_augmentation_is_torchvisions_at_any_angle(top, left, flip, angle):
    augmentation, images = Augmentation(4, "zero", True, 180), noise_images(1, seed=5)
    found = augmentation.apply(images, torch.tensor([0]), torch.tensor([top]), torch.tensor([left]),
                               torch.tensor([flip]), torch.tensor([angle], dtype=torch.float64))
    assert np.array_equal(found[0].numpy(), by_torchvision(images[0], augmentation, top, left, flip, angle))


def test_augmentation_parameters_have_the_published_distribution():
    torch.manual_seed(0)
    drawn = Augmentation(**options.CIFAR100.augmentation).draw(90_000)
    for name in ("top", "left"):
        counts = torch.bincount(drawn[name], minlength=9)
        assert len(counts) == 9 and ((counts - 10_000).abs() < 500).all()
    assert abs(drawn["flip"].double().mean() - 0.5) < 0.01
    angle = drawn["angle"]
    assert angle.min() >= -15 and angle.max() <= 15 and angle.mean().abs() < 0.15
    assert abs(angle.std() - 30 / 12**0.5) < 0.1
    pairs = torch.stack([drawn["top"].double(), drawn["left"].double(), drawn["flip"].double(), angle])
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 0.02


def test_a_batch_is_totensor():
    images = Images(noise_images(5), torch.arange(5))
    x, y = images.batch(torch.tensor([3, 1]))
    assert x.is_contiguous(memory_format=torch.channels_last) and y.tolist() == [3, 1]
    assert torch.equal(x[1], TF.to_tensor(Image.fromarray(images.pixels[1].numpy())))


def test_cifar_files_are_read_upright_and_in_order(tmp_path, monkeypatch):
    _, batch = write_cifar10(tmp_path, monkeypatch)
    (pixels, labels), (test, _) = read_torchvision("CIFAR10", str(tmp_path))
    assert pixels.shape == (30, 32, 32, 3) and list(labels) == list(range(6)) * 5
    assert np.array_equal(pixels[7], batch(2)["data"][1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert np.array_equal(test[5], batch(0)["data"][5].reshape(3, 32, 32).transpose(1, 2, 0)) and len(test) == 6


def test_svhn_files_are_read_upright_and_ten_is_zero(tmp_path, monkeypatch):
    pixels, labels = write_svhn(tmp_path, monkeypatch)
    for found, classes in read_torchvision("SVHN", str(tmp_path)):
        assert found.shape == (12, 32, 32, 3) and np.array_equal(found[3], pixels[..., 3])
        assert list(classes) == [int(label) % 10 for label in labels.flatten()]


def decoded(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def test_tiny_imagenet_is_shuffled_image_by_image_and_labelled_by_the_sorted_classes(tmp_path, monkeypatch):
    files = write_tiny_imagenet(tmp_path, monkeypatch)
    parts = (train, labels), (test, test_labels) = read_tiny_imagenet(str(tmp_path))
    names = sorted(name for name in files if name.startswith("train/") and name.endswith(".JPEG"))
    for image, label, i in zip(train, labels, np.random.RandomState(0).permutation(32), strict=True):
        assert np.array_equal(image, decoded(files[names[i]])) and names[i].startswith(f"train/n0{label + 1}/")
    assert {*labels[:12]} == {*labels[-12:]} == {0, 1, 2, 3} and test_labels.tolist() == [3, 0, 2, 1] * 4
    assert all(np.array_equal(image, decoded(files[f"val/images/val_{i}.JPEG"])) for i, image in enumerate(test))
    assert train.dtype == np.uint8 and (test[1] == test[1][..., :1]).all() and not (test[2] == test[2][..., :1]).all()
    monkeypatch.setattr(data, "_decoded", None)  # the second time, they come from the cache
    for (images, numbers), (again, same) in zip(parts, read_tiny_imagenet(str(tmp_path)), strict=True):
        assert np.array_equal(images, again) and np.array_equal(numbers, same)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-imagenet-200.npz", "tiny-imagenet-200.zip"]


@pytest.mark.parametrize("changes, named", [
    (dict(without=["val/images/val_3.JPEG"]), "no item named 'tiny-imagenet-200/val/images/val_3.JPEG'"),
    (dict(without=["wnids.txt"]), "no item named 'tiny-imagenet-200/wnids.txt'"),
    (dict(extra=["train/n05/images/n05_0.JPEG"]), "images of class n05, which its wnids.txt does not list")])
def test_a_zip_of_tiny_imagenet_with_other_files_is_one_line(changes, named, tmp_path, call, monkeypatch):
    write_tiny_imagenet(tmp_path / "data", monkeypatch, **changes)
    flags = ["--quiet", "--device=cpu", "--base-width=4", "--data-dir", tmp_path / "data", "--fname", tmp_path / "run"]
    one_line(call("train_tiny.py", *flags), named)
    (tmp_path / "data/tiny-imagenet-200.zip").write_bytes(b"PK")
    one_line(call("train_tiny.py", *flags), "tiny-imagenet-200.zip is truncated or altered")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "tiny-imagenet-200.zip"]


def test_tiny_imagenet_is_downloaded_as_one_file(tmp_path, monkeypatch):
    write_tiny_imagenet(tmp_path / "source", monkeypatch)
    with serving(sending((tmp_path / "source/tiny-imagenet-200.zip").read_bytes())) as (address, _):
        monkeypatch.setattr(data, "TINY_IMAGENET_URL", f"{address}/tiny-imagenet-200.zip")
        assert len(read_tiny_imagenet(str(tmp_path / "data"))[0][0]) == 32


def test_tiny_imagenet_is_trained_on_resumed_and_evaluated(tmp_path, call, evaluates, monkeypatch):
    write_tiny_imagenet(tmp_path / "data", monkeypatch)
    small = [flag for flag in SMALL if flag != "--dummy" and "samples" not in flag]
    flags = [*small, "--method=n-fgsm", "--val-size=8", "--batch-size=8", "--data-dir", tmp_path / "data"]
    status, output, _ = call("train_tiny.py", *flags, "--fname", tmp_path / "whole")
    assert status == 0 and output.startswith("# Tiny-ImageNet: its images take 1.35 GB, in memory and on the device\n")
    assert [(record["train_images"], record["val_images"], record["test_images"])
            for record in epochs_of(tmp_path / "whole")] == [(24, 8, 16)] * 2
    interrupt(monkeypatch, at=4)
    assert call("train_tiny.py", *flags, "--fname", tmp_path / "part")[0] == 128 + signal.SIGTERM
    assert call("train_tiny.py", *flags, "--fname", tmp_path / "part", "--resume=auto")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    for more in [], ["--data-set=tiny"]:
        status, output, _ = evaluates(tmp_path / "whole", "--device=cpu", "--attacks=clean,fgsm", *more)
        assert status == 0 and [row[3] for row in rows_of(output)] == ["16", "16"]


@pytest.mark.parametrize("name, script", [("cifar10", "train_cifar.py"), ("svhn", "train_svhn.py")])
def test_test_images_are_had_in_one_line(name, script, tmp_path, monkeypatch):
    {"cifar10": write_cifar10, "svhn": write_svhn}[name](tmp_path, monkeypatch)
    pixels, labels = read_torchvision(DATASETS[script].source, str(tmp_path))[1]
    x, y = data.load_test(name, str(tmp_path))
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and y.tolist() == list(labels)
    assert np.array_equal((255 * x).round().byte().permute(0, 2, 3, 1).numpy(), pixels) and x.max() <= 1
    first, few = data.load_test(DATASETS[script].name, tmp_path, n=3)  # as a run's args.data_set has it
    assert torch.equal(first, x[:3]) and torch.equal(few, y[:3])
    monkeypatch.setitem(DATASETS[script].defaults, "data_dir", str(tmp_path))
    assert torch.equal(data.load_test(name, n=1)[0], x[:1])


def test_test_images_of_no_data_set_or_of_files_that_are_not_there_end_in_one_line(tmp_path):
    with pytest.raises(UsageError, match="must be cifar10, cifar100, svhn, tiny, not mnist"):
        data.load_test("mnist")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/test_batch").touch()
    with pytest.raises(UsageError, match=r"lacks .*data_batch_1: "):
        data.load_test("cifar10", tmp_path)


@pytest.mark.parametrize("name, write", [("CIFAR10", write_cifar10), ("SVHN", write_svhn)])
def test_every_file_is_hashed_once_and_a_folder_that_is_read_only_stays_as_it_is(name, write, tmp_path, monkeypatch):
    write(tmp_path, monkeypatch)
    before, hashed = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, collections.Counter()
    calculate = torchvision.datasets.utils.calculate_md5
    monkeypatch.setattr(torchvision.datasets.utils, "calculate_md5",
                        lambda path, **rest: (hashed.update([path]), calculate(path, **rest))[1])
    for path in (tmp_path, *before):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        read_torchvision(name, str(tmp_path))
    finally:
        for path in (tmp_path, *before):
            path.chmod(0o755)
    hashed.pop(str(tmp_path / "cifar-10-batches-py/batches.meta"), None)  # a few bytes, which torchvision itself checks
    assert set(hashed.values()) == {1} and len(hashed) == {"CIFAR10": 6, "SVHN": 2}[name]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@contextlib.contextmanager
def serving(answer):
    """A server on this machine that answers every GET by `answer(handler)`: its address, and the paths asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            with contextlib.suppress(OSError):  # torchvision looks where a first request leads to, and hangs up
                answer(self)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


def sending(content: bytes, announced: int | None = None):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content) if announced is None else announced))
        handler.end_headers()
        handler.wfile.write(content)
    return answer


def archived(tmp_path, monkeypatch) -> bytes:
    """CIFAR-10's archive, small, whose sum torchvision expects."""
    folder, _ = write_cifar10(tmp_path / "source", monkeypatch)
    with io.BytesIO() as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(folder, folder.name)
        archive.close()
        content = file.getvalue()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    return content


CIFAR_FILES = ["batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("fault", ["cut off", "nothing", "another page", "not found", "SSH"])
def test_a_download_that_fails_is_one_line_and_leaves_nothing(fault, there, tmp_path, monkeypatch):
    content, root = archived(tmp_path, monkeypatch), tmp_path / "new" / "data"
    if there:
        root.mkdir(parents=True)
    answer = {"cut off": sending(content[:-50], len(content)), "nothing": lambda handler: None,
              "another page": sending(b"<html>Sign in</html>"), "not found": lambda handler: handler.send_error(404),
              "SSH": lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")}[fault]
    with serving(answer) as (address, _):
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
        with pytest.raises(UsageError, match=r"--data-dir .*/data has no .*download failed .* use --dummy") as error:
            read_torchvision("CIFAR10", str(root))
        assert "\n" not in str(error.value)
    assert (tmp_path / "new").exists() == there and [path.name for path in root.glob("*")] in ([], [".lock"])
    with serving(sending(content)) as (address, _):  # and the next one is not disturbed
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
        assert len(read_torchvision("CIFAR10", str(root))[0][0]) == 30
    assert sorted(path.name for path in root.iterdir()) == [".lock", "cifar-10-batches-py"]
    assert sorted(path.name for path in (root / "cifar-10-batches-py").iterdir()) == CIFAR_FILES


def test_svhn_whose_second_file_does_not_arrive_leaves_no_first_one(tmp_path, monkeypatch):
    write_svhn(tmp_path / "source", monkeypatch)
    root, arrives = tmp_path / "data", {"train_32x32.mat"}

    def answer(handler):
        name = handler.path[1:]
        sending((tmp_path / "source" / name).read_bytes() if name in arrives else b"")(handler)

    with serving(answer) as (address, _):
        monkeypatch.setattr(datasets.SVHN, "split_list", {
            split: [f"{address}/{name}", name, md5] for split, (_, name, md5) in datasets.SVHN.split_list.items()})
        with pytest.raises(UsageError, match="download failed"):
            read_torchvision("SVHN", str(root))
        assert not root.exists()
        arrives.add("test_32x32.mat")
        assert [len(labels) for _, labels in read_torchvision("SVHN", str(root))] == [12, 12]
    assert sorted(path.name for path in root.iterdir()) == [".lock", "test_32x32.mat", "train_32x32.mat"]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **keywords):
        raise AssertionError("the network was used")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_a_server_that_stalls_fails_and_the_next_download_removes_what_a_killed_one_left(tmp_path, monkeypatch):
    content, root, go = archived(tmp_path, monkeypatch), tmp_path / "data", threading.Event()
    (root / ".download-killed").mkdir(parents=True)
    monkeypatch.setattr(data, "STALLED", 0.2)

    def stall(handler):
        sending(content[:50], len(content))(handler)
        handler.wfile.flush()
        assert go.wait(60)

    with serving(stall) as (address, _):
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
        with pytest.raises(UsageError, match=r"the download failed \(TimeoutError: timed out\)"):
            read_torchvision("CIFAR10", str(root))
        go.set()
    assert [path.name for path in root.iterdir()] == [".lock"] and socket.getdefaulttimeout() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["train", "eval", "evaluate"])
def test_a_signal_during_a_download_ends_at_once_and_leaves_nothing(command, number, tmp_path, call, evaluates,
                                                                    monkeypatch):
    archived(tmp_path, monkeypatch)
    given, go = signal.signal(signal.SIGHUP, signal.SIG_DFL), threading.Event()  # the tests may be run under nohup
    torch.save(networks.PreActResNet18(10, base_width=4).state_dict(), tmp_path / "model_0.pth")

    def stop(handler):
        os.kill(os.getpid(), number)
        go.wait(60)

    flags = ["--device=cpu", "--base-width=4", "--data-dir", tmp_path / "new" / "data"]
    with serving(stop) as (address, _):
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
        if command == "evaluate":
            status, output, error = evaluates(tmp_path / "model_0.pth", "--data-set=cifar10", *flags)
        else:
            more = ["--eval", "--resume=1", "--fname", tmp_path] if command == "eval" else ["--fname", tmp_path / "run"]
            status, output, error = call("train_cifar.py", *flags, *more)
        go.set()
    signal.signal(signal.SIGHUP, given)
    assert (status, output) == (128 + number, "") and error.endswith(f": stopped by {number.name}\n")
    assert error.count("\n") == 1 and {path.name for path in tmp_path.iterdir()} == {"source", "model_0.pth"}


def test_no_process_waits_for_another_download_without_end(tmp_path, monkeypatch, no_network):
    archived(tmp_path, monkeypatch)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(data, "WAIT", 0.2)
    with lock(tmp_path / "data" / ".lock"), pytest.raises(UsageError, match=r"another process keeps .*\.lock locked"):
        read_torchvision("CIFAR10", str(tmp_path / "data"))


def cifar100(content: bytes, monkeypatch) -> None:
    """Have CIFAR-100 be the small CIFAR-10 under names of its own."""
    for name in ("train_list", "test_list", "meta", "base_folder"):
        monkeypatch.setattr(datasets.CIFAR100, name, getattr(datasets.CIFAR10, name))
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", hashlib.md5(content).hexdigest())


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_an_archive_in_the_folder_is_checked_and_unpacked(name, tmp_path, monkeypatch, no_network):
    content, root = archived(tmp_path, monkeypatch), tmp_path / "data"
    cifar100(content, monkeypatch)
    root.mkdir()
    archive = root / getattr(datasets, name).filename
    archive.write_bytes(content[:-1])
    with pytest.raises(UsageError, match=rf"{archive.name} is truncated or altered .* or delete it to download"):
        read_torchvision(name, str(root))
    assert [path.name for path in root.iterdir()] == [archive.name]
    archive.write_bytes(content)
    assert len(read_torchvision(name, str(root))[0][0]) == 30
    assert sorted(path.name for path in root.iterdir()) == [".lock", "cifar-10-batches-py", archive.name]


def test_an_archive_that_cannot_be_unpacked_is_named(tmp_path, monkeypatch, no_network):
    content, root = archived(tmp_path, monkeypatch), tmp_path / "data"
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(content)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torchvision.datasets.utils, "extract_archive", full)
    with pytest.raises(UsageError, match=r"data/cifar-10-python\.tar\.gz cannot be unpacked \(OSError.*No space left"):
        read_torchvision("CIFAR10", str(root))


@pytest.mark.parametrize("name, there, given, advice", [
    ("CIFAR10", "data/cifar-10-python.tar.gz", "data/cifar-10-python.tar.gz", "is a file: give its folder, {}/data"),
    ("SVHN", "data/train_32x32.mat", "data/train_32x32.mat", "is a file: give its folder, {}/data"),
    ("CIFAR10", "data/cifar-10-batches-py/test_batch", "data/cifar-10-batches-py",
     "is one level too deep: give its parent folder, {}/data"),
    ("CIFAR10", "data/cifar-10-batches-py/test_batch", "", "is one level too high: give {}/data"),
    ("CIFAR10", "data/cifar-10-python.tar.gz", "", "is one level too high: give {}/data"),
    ("CIFAR100", "data/cifar-100-python/train", "", "is one level too high: give {}/data"),
    ("CIFAR100", "data/cifar-100-python.tar.gz", "", "is one level too high: give {}/data"),
    ("SVHN", "data/test_32x32.mat", "", "is one level too high: give {}/data")])
def test_a_data_set_in_another_folder_is_named(name, there, given, advice, tmp_path, no_network):
    (tmp_path / there).parent.mkdir(parents=True)
    (tmp_path / there).write_bytes(b"")
    with pytest.raises(UsageError) as error:
        read_torchvision(name, str(tmp_path / given))
    assert str(error.value) == f"--data-dir {tmp_path / given} {advice.format(tmp_path)}"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("name", ["CIFAR10", "SVHN"])
def test_other_entries_of_the_folder_do_not_stop_a_download(name, tmp_path, no_network, monkeypatch):
    """Another file, and a folder that may not be read."""
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "private").mkdir()
    is_file = Path.is_file

    def refused(path):
        if path.parent.name == "private":
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(AssertionError, match="the network was used"):
        read_torchvision(name, str(tmp_path))


@pytest.mark.parametrize("script, package, fault", [
    ("train_cifar.py", "torchvision", RuntimeError("operator torchvision::nms does not exist")),
    ("train_cifar100.py", "torchvision", ModuleNotFoundError("No module named '_lzma'")),
    ("train_svhn.py", "scipy", ModuleNotFoundError("No module named 'scipy'")),
    ("train_svhn.py", "scipy", ValueError("numpy.dtype size changed, may indicate binary incompatibility"))])
def test_a_broken_package_is_named(script, package, fault, tmp_path, call, monkeypatch, no_network):
    import_module = importlib.import_module

    def broken(module):
        if module.startswith(package):
            raise fault
        return import_module(module)

    monkeypatch.setattr(importlib, "import_module", broken)
    flags = ["--device=cpu", "--base-width=4", "--data-dir", tmp_path / "data", "--fname", tmp_path / "run"]
    status, _, error = call(script, *flags)
    assert status == 2 and not list(tmp_path.iterdir())
    assert error.endswith(f"error: the package {package} cannot be used ({type(fault).__name__}: {fault}): install or "
                          f"repair it\n")


@pytest.mark.parametrize("source, message", [
    ("no_such_module:images", "the package no_such_module cannot be used (ModuleNotFoundError: No module named"),
    ("json:images", "the package json cannot be used (AttributeError: module 'json' has no attribute 'images')"),
    (lambda data_dir: importlib.import_module("no_such_module"),
     "CIFAR-10 needs a package that cannot be imported (ModuleNotFoundError: No module named 'no_such_module')")])
def test_a_source_that_cannot_be_imported_is_named(source, message):
    with pytest.raises(UsageError) as error:
        data.load_test(dataclasses.replace(options.CIFAR10, source=source))
    assert str(error.value).startswith(message)


def test_of_two_processes_that_lack_the_same_files_one_downloads_and_one_waits(tmp_path, monkeypatch):
    content, go = archived(tmp_path, monkeypatch), threading.Event()
    (tmp_path / "program.py").write_text("""
import json, sys
from torchvision import datasets
from singlestep import data
for name, value in json.loads(sys.argv[1]).items():
    setattr(datasets.CIFAR10, name, value)
open(sys.argv[3], "w").close()
print(len(data.read_torchvision("CIFAR10", sys.argv[2])[0][0]))
""")

    def answer(handler):
        assert go.wait(120)
        sending(content)(handler)

    def begun(name):
        process = Started(tmp_path / "program.py", json.dumps(attributes), tmp_path / "data", tmp_path / name)
        process.wait_for(tmp_path / name)
        return process

    with serving(answer) as (address, asked):
        attributes = {name: getattr(datasets.CIFAR10, name) for name in ("train_list", "test_list", "meta", "tgz_md5")}
        attributes["url"] = f"{address}/cifar-10-python.tar.gz"
        first = begun("first")
        while not asked:
            time.sleep(0.01)
        second = begun("second")
        time.sleep(1)
        assert len(asked) == 1 and second.running
        go.set()
        for process in (first, second):
            done = process.finish(timeout=120)
            assert (done.returncode, done.stdout) == (0, "30\n"), done.stderr
        assert len(asked) == 2  # torchvision first asks where the address leads to


def test_the_size_of_images_is_that_of_the_data(tmp_path, call, monkeypatch):
    def read(data_dir: str):
        rng, labels = np.random.default_rng(0), np.arange(48) % 10
        return [(rng.integers(0, 256, (48, 16, 16, 3), dtype=np.uint8), labels) for _ in range(2)]

    for name in DATASETS:  # with every augmentation
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], source=read))
        flags = [flag for flag in SMALL if flag != "--dummy" and "samples" not in flag]
        assert call(name, *flags, "--epochs=1", "--attack=zerograd", "--fname", tmp_path / name)[0] == 0
        record, = epochs_of(tmp_path / name)
        assert record["train_images"] == record["test_images"] == 48


@pytest.mark.parametrize("pixels, labels", [
    (np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, int)), (np.zeros((4, 8, 8, 3), np.float32), np.zeros(4, int)),
    (np.zeros((4, 8, 8, 3), np.uint8), np.full(4, 10)), (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3, int)),
    (np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, int)), (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4))])
def test_images_and_labels_of_another_kind_are_refused(pixels, labels, tmp_path, call, monkeypatch):
    source = dataclasses.replace(options.CIFAR10, source=lambda data_dir: [(pixels, labels)] * 2)
    monkeypatch.setitem(DATASETS, "train_cifar.py", source)
    status, output, error = call("train_cifar.py", "--device=cpu", "--base-width=4", "--fname", tmp_path / "run")
    assert (status, output) == (2, "") and error.count("\n") == 1 and "does not contain CIFAR-10" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dataset", DATASETS.values())
def test_dummy_images_come_in_the_data_sets_shape_and_all_its_classes(dataset):
    side = 64 if dataset.name == "Tiny-ImageNet" else 32
    pairs = zip(*(dummy(dataset.classes, dataset.side) for _ in range(2)))
    for train, (images, again) in zip((True, False), pairs):
        assert images.pixels.shape == (data.DUMMY_SIZES[train], side, side, 3) and images.pixels.dtype == torch.uint8
        assert len(images.labels.unique()) == dataset.classes
        assert torch.equal(images.pixels, again.pixels) and torch.equal(images.labels, again.labels)
    # A test image is nearest to the training images of its own class: the classes can be learnt.
    train, test = dummy(dataset.classes, dataset.side)
    means = torch.stack([train.pixels[train.labels == c].float().mean(dim=0).flatten() for c in range(dataset.classes)])
    nearest = torch.cdist(test.pixels.float().flatten(1), means).argmin(dim=1)
    assert (nearest == test.labels).float().mean() > 0.95


def test_training_takes_the_first_images_and_validation_the_last(small_dummy):
    class Args:
        dummy, data_dir, train_samples, val_size = True, "", 50, 20

    whole, _ = dummy(10)
    train, held_out, test = data.load(options.CIFAR10, Args)
    assert torch.equal(train.pixels, whole.pixels[:50]) and torch.equal(held_out.pixels, whole.pixels[-20:])
    Args.train_samples, Args.val_size = None, 0
    train, held_out, test = data.load(options.CIFAR10, Args)
    assert (len(train), len(held_out), len(test)) == (96, 0, 64)
    train, held_out, test = data.load(options.SVHN, Args)  # a fiftieth of the images that it trains on
    assert (len(train), len(held_out)) == (96, 2) and torch.equal(held_out.pixels, train.pixels[:2])
    Args.val_size = 20
    assert torch.equal(data.load(options.SVHN, Args)[1].pixels, whole.pixels[-20:])


def test_a_missing_file_of_svhn_says_which_files_to_delete_for_a_download(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(UsageError, match=r"or delete .*train_32x32\.mat to download") as error:
        read_torchvision("SVHN", str(tmp_path))
    assert "delete " + str(tmp_path / "train_32x32.mat") in str(error.value)


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=lambda dataset: dataset.name)
def test_flags_change_the_data_sets_augmentation(dataset):
    """The padding's mode and the rotation; without them, it is the data set's own; a rotation of 0 is none."""
    def augmentation(*flags: str) -> Augmentation:
        return augmentation_of(options.parse(dataset, argv=list(flags)), dataset)

    own = Augmentation(**dataset.augmentation)
    assert augmentation() == own
    assert augmentation("--rotate=0") == dataclasses.replace(own, degrees=0.0)
    assert augmentation("--pad-mode=zero", "--rotate=20") == dataclasses.replace(own, pad_mode="zero", degrees=20.0)
    assert augmentation("--pad-mode=reflect") == dataclasses.replace(own, pad_mode="reflect")
