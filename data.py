"""The data sets: read by torchvision, held on the device as uint8, augmented there a batch at a time."""
import contextlib
import io
import math
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.utils import check_integrity

from utils import UsageError, one_at_a_time

SIZE = 32  # the height and width of every image, in pixels
DUMMY_SIZES = {True: 2048, False: 512}  # synthetic images to train and to test on


@dataclass(frozen=True)
class Augmentation:
    """A random crop of the padded image, a left-right flip and a rotation, in this order, each optional.

    Every output pixel is a copy of one input pixel (or 0), so a batch is augmented by one look-up, and equals what
    torchvision's RandomCrop, RandomHorizontalFlip and RandomRotation (nearest neighbour) make of PIL images.

    padding: pixels added on every side before the crop; pad_mode: "reflect" or "zero"; flip: half the images;
    degrees: the largest angle.
    """

    padding: int = 0
    pad_mode: str = "reflect"
    flip: bool = False
    degrees: float = 0.0

    def draw(self, n: int) -> dict[str, Tensor]:
        """Random parameters for n images: the crop's top and left, whether to flip, the angle in degrees."""
        return {
            "top": torch.randint(2 * self.padding + 1, (n,)),
            "left": torch.randint(2 * self.padding + 1, (n,)),
            "flip": torch.rand(n) < (0.5 if self.flip else 0.0),
            "angle": torch.empty(n, dtype=torch.float64).uniform_(-self.degrees, self.degrees),
        }

    def apply(self, images: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, angle: Tensor) -> Tensor:
        """The images (N, 32, 32, 3) at `index` (B,), augmented: (B, 32, 32, 3); the parameters are as `draw` gives."""
        side = torch.arange(SIZE, device=images.device)
        rows, cols = side.view(1, -1, 1), side.view(1, 1, -1)
        if self.degrees:
            rows, cols = rotated(rows, cols, angle)
        inside = _inside(rows) & _inside(cols)
        cols = torch.where(flip.view(-1, 1, 1), SIZE - 1 - cols, cols)
        rows = rows + top.view(-1, 1, 1) - self.padding
        cols = cols + left.view(-1, 1, 1) - self.padding
        if self.pad_mode == "reflect":
            rows, cols = _reflected(rows), _reflected(cols)
        else:
            inside = inside & _inside(rows) & _inside(cols)
        rows, cols = rows.clamp(0, SIZE - 1), cols.clamp(0, SIZE - 1)
        pixels = images[index.view(-1, 1, 1), rows, cols]
        return pixels if self.pad_mode == "reflect" and not self.degrees else pixels * inside.unsqueeze(-1)


def rotated(rows: Tensor, cols: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Where the pixels at (rows, cols) come from when images turn by `angle` degrees about their centre.

    PIL's arithmetic, on which torchvision's RandomRotation rests: coordinates in 1/65536 of a pixel, rounded down.
    """
    def fixed(value: Tensor) -> Tensor:
        return (value * 65536 + 0.5).floor().long().view(-1, 1, 1)

    radians, centre = -angle * (math.pi / 180), SIZE / 2
    cos, sin = radians.cos(), radians.sin()
    from_col = centre - cos * centre - sin * centre + 0.5 * cos + 0.5 * sin
    from_row = centre + sin * centre - cos * centre - 0.5 * sin + 0.5 * cos
    cols_from = fixed(from_col) + cols * fixed(cos) + rows * fixed(sin)
    rows_from = fixed(from_row) - cols * fixed(sin) + rows * fixed(cos)
    return rows_from >> 16, cols_from >> 16


def _inside(position: Tensor) -> Tensor:
    return (position >= 0) & (position < SIZE)


def _reflected(position: Tensor) -> Tensor:
    return SIZE - 1 - (SIZE - 1 - position.abs()).abs()


@dataclass
class Images:
    """Images on a device, uint8 of shape (N, 32, 32, 3), their labels (N,), and how batches of them are laid out."""

    pixels: Tensor
    labels: Tensor
    memory_format: torch.memory_format = torch.channels_last

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> "Images":
        return Images(self.pixels[part], self.labels[part], self.memory_format)

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.channels_last) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device), memory_format)

    def batch(self, index: Tensor | slice, augmentation: Augmentation = Augmentation(), drawn=None):
        """x in [0, 1], float32 (B, 3, 32, 32), and y (B,); augmented where `drawn` is given."""
        pixels = self.pixels[index] if drawn is None else augmentation.apply(self.pixels, index, **drawn)
        x = pixels.permute(0, 3, 1, 2).float().div_(255)
        return x.contiguous(memory_format=self.memory_format), self.labels[index]


@dataclass(frozen=True)
class DataSet:
    """What tells one data set from another; a training script states one and hands it to `run.main`.

    name: as users write it; read: (data_dir, train) -> (pixels uint8 (N, 32, 32, 3), labels); mean, std: of the pixels
    in [0, 1], per channel; augmentation: of the training images; peak: (epochs) -> the epoch at which the cyclic
    learning rate is highest; validate: whether the best checkpoint is chosen on images from the training set even
    without --val-size; defaults: those of the command line that are this data set's own.
    """

    name: str
    read: Callable[[str, bool], tuple[np.ndarray, Any]]
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    defaults: dict[str, Any]
    augmentation: Augmentation = Augmentation()
    peak: Callable[[int], int] = lambda epochs: epochs // 2
    validate: bool = False


def load(dataset: DataSet, args) -> tuple[Images, Images, Images]:
    """The images to train on, those held out of the training set to choose the best checkpoint on, and the test set.

    Training takes the first --train-samples of the training set, validation the last --val-size of it.
    """
    if args.dummy:
        train, test = (dummy(dataset.classes, train) for train in (True, False))
    else:
        train, test = (_images(dataset, args.data_dir, train) for train in (True, False))
    most = len(train) - args.val_size
    if most < 1:
        raise UsageError(f"--val-size must leave images to train on: {len(train) - 1} or less, not {args.val_size}")
    if args.train_samples is not None and args.train_samples > most:
        raise UsageError(f"--train-samples must be from 1 to {most} (all but --val-size), not {args.train_samples}")
    return train[:args.train_samples or most], train[len(train) - args.val_size:], test


def dummy(classes: int, train: bool) -> Images:
    """Synthetic images that can be learnt: a coarse pattern for each class, shifted in brightness, under noise."""
    generator = torch.Generator().manual_seed(classes)
    patterns = torch.rand(classes, 4, 4, 3, generator=generator)
    patterns = patterns.repeat_interleave(SIZE // 4, dim=1).repeat_interleave(SIZE // 4, dim=2)
    generator.manual_seed(classes * 2 + train)
    labels = torch.arange(DUMMY_SIZES[train]) % classes
    shift = 0.2 * torch.rand(len(labels), 1, 1, 1, generator=generator) - 0.1
    noise = 0.1 * torch.randn(len(labels), SIZE, SIZE, 3, generator=generator)
    return Images(((patterns[labels] + shift + noise).clamp(0, 1) * 255).round().byte(), labels)


def cifar(source: type) -> Callable[[str, bool], tuple[np.ndarray, Any]]:
    """A reader for torchvision's CIFAR10 or CIFAR100. Their files are pickles: checked before they are opened."""
    def read(data_dir: str, train: bool):
        listed = source.train_list + source.test_list + [(source.meta["filename"], source.meta["md5"])]
        files = {Path(data_dir, source.base_folder, name): md5 for name, md5 in listed}
        held = _verified(files, data_dir, partial(source, data_dir, train))
        return held.data, held.targets
    return read


def svhn(source: type) -> Callable[[str, bool], tuple[np.ndarray, Any]]:
    """A reader for torchvision's SVHN (cropped digits; the label of the digit 0 is 0)."""
    def read(data_dir: str, train: bool):
        split = "train" if train else "test"
        _, name, md5 = source.split_list[split]
        held = _verified({Path(data_dir, name): md5}, data_dir, partial(source, data_dir, split))
        return held.data.transpose(0, 2, 3, 1), held.labels
    return read


def _verified(files: dict[Path, str], data_dir: str, source: Callable):
    """`source()`, torchvision's data set, once all its files are there with the right sums; downloads if none is."""
    try:
        missing = not any(file.exists() for file in files)
    except (OSError, ValueError):  # a name that is no name to the system
        raise UsageError(f"--data-dir {data_dir} cannot be read") from None
    if missing:
        new = [folder for folder in (Path(data_dir), *Path(data_dir).parents) if not folder.exists()]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return source(download=True)
        except (OSError, RuntimeError, urllib.error.URLError) as error:
            for folder in new:  # torchvision makes them before it tries
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise UsageError(f"--data-dir {data_dir} has no {next(iter(files))}, and the download failed "
                             f"({_one_line(error)}): put the files there, or use --dummy") from None
    for file, md5 in files.items():
        if not file.exists():
            raise UsageError(f"--data-dir {data_dir} lacks {file}: put it there, or delete {file.parent} to download")
        if not check_integrity(str(file), md5):
            raise UsageError(f"--data-dir {data_dir}: {file} is cut short or altered (its MD5 sum should be {md5}): "
                             f"replace it, or delete {file if len(files) == 1 else file.parent} to download")
    try:
        return source()
    except Exception as error:  # whatever a parser raises at a file that it cannot read
        raise UsageError(f"--data-dir {data_dir}: its files cannot be read ({_one_line(error)})") from None


def _images(dataset: DataSet, data_dir: str, train: bool) -> Images:
    with one_at_a_time(data_dir):
        pixels, labels = (np.asarray(part) for part in dataset.read(data_dir, train))
    if pixels.dtype != np.uint8 or pixels.shape != (len(pixels), SIZE, SIZE, 3) or not len(pixels) or \
            labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or \
            labels.min() < 0 or labels.max() >= dataset.classes:
        raise UsageError(f"--data-dir {data_dir} does not hold {dataset.name}: its files have other images or labels")
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels.astype(np.int64)))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
