"""The data: augmentation against torchvision's own, the readers on files in the true formats, splits, dummy images."""
import hashlib
import pickle

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

import data
import train_cifar
import train_cifar100
import train_svhn
from data import Augmentation, Images, dummy


def noise_images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_torchvision(image: torch.Tensor, augmentation: Augmentation, top, left, flip, angle) -> np.ndarray:
    """One image through the published transforms, on PIL images, with given parameters."""
    picture = Image.fromarray(image.numpy())
    mode = {"reflect": "reflect", "zero": "constant"}[augmentation.pad_mode]
    picture = TF.crop(TF.pad(picture, augmentation.padding, padding_mode=mode), int(top), int(left), 32, 32)
    if flip:
        picture = TF.hflip(picture)
    if augmentation.degrees:
        picture = TF.rotate(picture, float(angle))
    return np.asarray(picture)


@pytest.mark.parametrize("augmentation", [train_cifar.DATASET.augmentation, train_cifar100.DATASET.augmentation,
                                          train_svhn.DATASET.augmentation, Augmentation(4, "reflect", True, 15)])
def test_augmentation_is_torchvisions_pixel_by_pixel(augmentation):
    images = noise_images(200)
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
    drawn = train_cifar100.DATASET.augmentation.draw(90_000)
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


def test_cifar_files_are_read_upright_and_in_order(tmp_path, monkeypatch):
    _, batch = write_cifar10(tmp_path, monkeypatch)
    pixels, labels = train_cifar.DATASET.read(str(tmp_path), True)
    assert pixels.shape == (30, 32, 32, 3) and list(labels) == list(range(6)) * 5
    assert np.array_equal(pixels[7], batch(2)["data"][1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert train_cifar.DATASET.read(str(tmp_path), False)[0].shape == (6, 32, 32, 3)


def test_svhn_files_are_read_upright_and_ten_is_zero(tmp_path, monkeypatch):
    pixels, labels = write_svhn(tmp_path, monkeypatch)
    found, classes = train_svhn.DATASET.read(str(tmp_path), True)
    assert found.shape == (12, 32, 32, 3) and np.array_equal(found[3], pixels[..., 3])
    assert list(classes) == [int(label) % 10 for label in labels.flatten()]


@pytest.mark.parametrize("dataset", [train_cifar.DATASET, train_cifar100.DATASET, train_svhn.DATASET])
def test_dummy_images_come_in_the_data_sets_shape_and_all_its_classes(dataset):
    for train in (True, False):
        images = dummy(dataset.classes, train)
        assert images.pixels.shape == (data.DUMMY_SIZES[train], 32, 32, 3) and images.pixels.dtype == torch.uint8
        assert len(images.labels.unique()) == dataset.classes
        again = dummy(dataset.classes, train)
        assert torch.equal(images.pixels, again.pixels) and torch.equal(images.labels, again.labels)
    # A test image is nearest to the training images of its own class: the classes can be learnt.
    train, test = (dummy(dataset.classes, part) for part in (True, False))
    means = torch.stack([train.pixels[train.labels == c].float().mean(dim=0).flatten() for c in range(dataset.classes)])
    nearest = torch.cdist(test.pixels.float().flatten(1), means).argmin(dim=1)
    assert (nearest == test.labels).float().mean() > 0.95


def test_training_takes_the_first_images_and_validation_the_last(small_dummy):
    class Args:
        dummy, data_dir, train_samples, val_size = True, "", 50, 20

    whole = dummy(10, True)
    train, held_out, test = data.load(train_cifar.DATASET, Args)
    assert torch.equal(train.pixels, whole.pixels[:50]) and torch.equal(held_out.pixels, whole.pixels[-20:])
    Args.train_samples, Args.val_size = None, 0
    train, held_out, test = data.load(train_cifar.DATASET, Args)
    assert (len(train), len(held_out), len(test)) == (96, 0, 64)
