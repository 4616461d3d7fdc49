"""Data sets: read from their files, stored on the device as uint8, and augmented on the device batch by batch."""
import contextlib
import http.client
import importlib
import io
import math
import os
import re
import shutil
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import options
from .attacks import check_images
from .options import DataSet
from .run.console import UsageError
from .run.folder import atomic_write, lock

DUMMY_SIZES = {True: 2048, False: 512}  # numbers of synthetic training (True) and test (False) images
DUMMY_SIDE = 32

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

STALLED = 60.0  # seconds without an answer after which a download has failed
WAIT = 1800.0  # seconds to wait for another process that downloads


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the padded image, horizontal flip and rotation, in this order, each optional.

    Every output pixel is a copy of one input pixel or 0, so one lookup augments a batch. The result equals that of
    torchvision's RandomCrop, RandomHorizontalFlip and RandomRotation (nearest neighbor) on PIL images.

    Attributes:
        padding: pixels added on each side before the crop.
        pad_mode: "reflect" or "zero".
        flip: flip each image with probability 1/2.
        degrees: maximum angle of the rotation, in either direction.
    """

    padding: int = 0
    pad_mode: str = "reflect"
    flip: bool = False
    degrees: float = 0.0

    def draw(self, n: int) -> dict[str, Tensor]:
        """Draw parameters for n images: top and left of the crop, whether to flip, angle in degrees; each (n,)."""
        return {
            "top": torch.randint(2 * self.padding + 1, (n,)),
            "left": torch.randint(2 * self.padding + 1, (n,)),
            "flip": torch.rand(n, dtype=torch.float32) < (0.5 if self.flip else 0.0),
            "angle": torch.empty(n, dtype=torch.float64).uniform_(-self.degrees, self.degrees),
        }

    def apply(self, images: Tensor, index, top: Tensor, left: Tensor, flip: Tensor, angle: Tensor) -> Tensor:
        """Augment the images (N, H, W, 3) at `index` (B,) with parameters from `draw`. Returns (B, H, W, 3)."""
        _, height, width, _ = images.shape
        rows = torch.arange(height, device=images.device).view(1, -1, 1)
        cols = torch.arange(width, device=images.device).view(1, 1, -1)
        if self.degrees:
            rows, cols = rotated(rows, cols, angle)
        inside = _inside(rows, height) & _inside(cols, width)
        cols = torch.where(flip.view(-1, 1, 1), width - 1 - cols, cols)
        rows = rows + top.view(-1, 1, 1) - self.padding
        cols = cols + left.view(-1, 1, 1) - self.padding
        if self.pad_mode == "reflect":
            rows, cols = _reflected(rows, height), _reflected(cols, width)
        else:
            inside = inside & _inside(rows, height) & _inside(cols, width)
        pixels = images[index.view(-1, 1, 1), rows.clamp(0, height - 1), cols.clamp(0, width - 1)]
        return pixels if self.pad_mode == "reflect" and not self.degrees else pixels * inside.unsqueeze(-1)


def rotated(rows: Tensor, cols: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return the source row and column of the pixels at (rows, cols) in images rotated by `angle` degrees.

    The images are rotated about their center. The arithmetic is that of PIL, which torchvision's RandomRotation uses:
    fixed-point coordinates in 1/65536 of a pixel, rounded down.
    """
    def fixed(value: Tensor) -> Tensor:
        return (value * 65536 + 0.5).floor().long().view(-1, 1, 1)

    radians, y, x = -angle * (math.pi / 180), rows.numel() / 2, cols.numel() / 2
    cos, sin = radians.cos(), radians.sin()
    from_col = x - cos * x - sin * y + 0.5 * cos + 0.5 * sin
    from_row = y + sin * x - cos * y - 0.5 * sin + 0.5 * cos
    cols_from = fixed(from_col) + cols * fixed(cos) + rows * fixed(sin)
    rows_from = fixed(from_row) - cols * fixed(sin) + rows * fixed(cos)
    return rows_from >> 16, cols_from >> 16


def _inside(position: Tensor, size: int) -> Tensor:
    return (position >= 0) & (position < size)


def _reflected(position: Tensor, size: int) -> Tensor:
    return size - 1 - (size - 1 - position.abs()).abs()


@dataclass
class Images:
    """Images and labels on a device.

    Attributes:
        pixels: (N, H, W, C), uint8 or float in [0, 1].
        labels: (N,).
        memory_format: memory layout of batches.
    """

    pixels: Tensor
    labels: Tensor
    memory_format: torch.memory_format = torch.channels_last

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, images: Tensor, labels: Tensor) -> "Images":
        """Create from images (N, C, H, W), uint8 or float in [0, 1], and labels (N,); batches are contiguous.

        Raises:
            ValueError: type, shape or range of the images or of the labels is wrong.
        """
        if images.dim() != 4 or images.dtype not in (torch.uint8, torch.float32, torch.float64):
            raise ValueError(f"images must be (N, C, H, W), uint8 or float, not {images.dtype} {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be ({len(images)},), one for each image, not {tuple(labels.shape)}")
        if labels.is_floating_point() or (len(labels) and labels.min() < 0):
            raise ValueError("labels must be class numbers: integers, 0 or more")
        if images.is_floating_point():
            check_images(images)
        return cls(images.permute(0, 2, 3, 1), labels.long(), torch.contiguous_format)

    def __getitem__(self, part: slice) -> "Images":
        return Images(self.pixels[part], self.labels[part], self.memory_format)

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.channels_last) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device), memory_format)

    def batch(self, index: Tensor | slice, augmentation: Augmentation = Augmentation(), drawn=None):
        """Return x in [0, 1], (B, C, H, W), float32 if the pixels are uint8, and y (B,). With `drawn`, x is augmented.

        drawn: parameters from `Augmentation.draw`, one for each image of the batch.
        """
        pixels = augmentation.apply(self.pixels, index, **drawn) if drawn else self.pixels[index]
        x = pixels.permute(0, 3, 1, 2)
        x = x.float().div_(255) if x.dtype is torch.uint8 else x
        return x.contiguous(memory_format=self.memory_format), self.labels[index]


def load(dataset: DataSet, args) -> tuple[Images, Images, Images]:
    """Load the training, validation and test images.

    Training images: the first --train-samples of the training set. Validation images: the last --val-size. With
    --val-size=0: none or, for a data set with `validate`, the first 2% of the training images, which are also trained
    on.

    Raises:
        UsageError: --val-size or --train-samples is too large, or the data set cannot be read.
    """
    train, test = dummy(dataset.classes, dataset.side) if args.dummy else _read(dataset, args.data_dir)
    most = len(train) - args.val_size
    if most < 1:
        raise UsageError(f"--val-size must leave training images: {len(train) - 1} or less, not {args.val_size}")
    if args.train_samples is not None and args.train_samples > most:
        raise UsageError(f"--train-samples must be from 1 to {most} (all but --val-size), not {args.train_samples}")
    held_out, train = train[most:], train[:args.train_samples or most]
    if dataset.validate and not args.val_size:
        held_out = train[:math.ceil(len(train) / 50)]
    return train, held_out, test


def load_test(data_set: str | DataSet, data_dir: str | None = None, n: int | None = None,
              synthetic: bool = False) -> tuple[Tensor, Tensor]:
    """Load the first n test images (None: all). Returns x in [0, 1], float32 (N, 3, H, W), and labels y (N,)."""
    dataset = data_set if isinstance(data_set, DataSet) else options.data_set(data_set)
    images = testing(dataset, data_dir or dataset.defaults["data_dir"], synthetic)[:n]
    images.memory_format = torch.contiguous_format  # attack libraries call view()
    return images.batch(slice(None))


def testing(dataset: DataSet, data_dir: str, synthetic: bool = False) -> Images:
    """Load the test images of a data set."""
    return (dummy(dataset.classes, dataset.side) if synthetic else _read(dataset, data_dir))[1]


def dummy(classes: int, side: int | None = None) -> tuple[Images, Images]:
    """Create synthetic training and test images: a coarse pattern for each class, random brightness, and noise."""
    side = side or DUMMY_SIDE
    generator = torch.Generator().manual_seed(classes)
    patterns = torch.rand(classes, 4, 4, 3, generator=generator, dtype=torch.float32)
    patterns = patterns.repeat_interleave(side // 4, dim=1).repeat_interleave(side // 4, dim=2)

    def drawn(train: bool) -> Images:
        generator.manual_seed(classes * 2 + train)
        labels = torch.arange(DUMMY_SIZES[train]) % classes
        shift = 0.2 * torch.rand(len(labels), 1, 1, 1, generator=generator, dtype=torch.float32) - 0.1
        shape = (len(labels), side, side, 3)
        noise = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float32)
        return Images(((patterns[labels] + shift + noise).clamp(0, 1) * 255).round().byte(), labels)

    return drawn(True), drawn(False)


def read_torchvision(name: str, data_dir: str):
    """Read torchvision's CIFAR10, CIFAR100 or SVHN. Returns (images, labels) of the training and of the test set."""
    source = imported("torchvision.datasets", name)
    verified = type(name, (source,), {"_check_integrity": lambda self: True})  # `ensure_files` verifies the files
    if name == "SVHN":  # cropped digits; the digit 0 has label 0
        imported("scipy.io", "loadmat")  # fail before the download
        splits = [source.split_list[split] for split in ("train", "test")]
        ensure_files(data_dir, {file: md5 for _, file, md5 in splits},
             lambda folder: [source(folder, split, download=True) for split in ("train", "test")])
        parts = [verified(data_dir, split) for split in ("train", "test")]
        return [(part.data.transpose(0, 2, 3, 1), part.labels) for part in parts]
    listed = [*source.train_list, *source.test_list, [source.meta["filename"], source.meta["md5"]]]
    ensure_files(data_dir, {f"{source.base_folder}/{file}": md5 for file, md5 in listed},
         lambda folder: source(folder, download=True), source.filename, source.tgz_md5)
    return [(part.data, part.targets) for part in (verified(data_dir, train) for train in (True, False))]


def read_tiny_imagenet(data_dir: str):
    """Read Tiny-ImageNet from its zip. Returns (images, labels) of the training set and of the validation set.

    The validation set is used as the test set, since the labels of the real test set are unpublished.

    A label is an index into sorted(wnids.txt). The zip lists the training images class by class; they are shuffled with
    a fixed seed, so that their first and last N images are of all classes. The decoded images are cached beside the
    zip.
    """
    from torchvision.datasets.utils import download_url

    packed = Path(data_dir, TINY_IMAGENET_URL.rpartition("/")[2])
    ensure_files(data_dir, {packed.name: TINY_IMAGENET_MD5}, partial(download_url, TINY_IMAGENET_URL))
    cache = packed.with_suffix(".npz")
    if cache.exists():
        with np.load(cache) as kept:
            return [(kept["train"], kept["train_labels"]), (kept["test"], kept["test_labels"])]
    with zipfile.ZipFile(packed) as archive:
        (train, train_labels), (test, test_labels) = (
            _decoded(archive, entries) for entries in _tiny_imagenet_entries(archive))
    with contextlib.suppress(OSError), atomic_write(cache) as file:  # a full disk, or a folder that is read-only
        np.savez(file, train=train, train_labels=train_labels, test=test, test_labels=test_labels)
    return [(train, train_labels), (test, test_labels)]


def _tiny_imagenet_entries(archive: zipfile.ZipFile) -> Iterator[list[tuple[str, int]]]:
    """Yield (name in the zip, label) of the training images, shuffled, then of the validation images."""
    root = "tiny-imagenet-200"
    classes = sorted(archive.read(f"{root}/wnids.txt").decode().split())

    def labelled(named: Iterable[tuple[str, str]]) -> list[tuple[str, int]]:
        entries = list(named)
        unknown = sorted({wnid for _, wnid in entries} - {*classes})
        if unknown:
            raise UsageError(f"{archive.filename} has images of class {unknown[0]}, which its wnids.txt does not list")
        return [(name, classes.index(wnid)) for name, wnid in entries]

    train = sorted(name for name in archive.namelist() if re.fullmatch(rf"{root}/train/\w+/images/\w+\.JPEG", name))
    order = np.random.RandomState(0).permutation(len(train))
    yield labelled((train[i], train[i].split("/")[2]) for i in order)
    lines = archive.read(f"{root}/val/val_annotations.txt").decode().splitlines()
    yield labelled((f"{root}/val/images/{file}", wnid) for file, wnid, *_ in (line.split("\t") for line in lines))


def _decoded(archive: zipfile.ZipFile, entries: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Decode JPEGs in a zip. Returns uint8 (N, 64, 64, 3) and the labels (N,)."""
    read = imported("PIL.Image", "open")
    pixels = np.empty((len(entries), 64, 64, 3), np.uint8)
    for place, (name, _) in zip(pixels, entries):
        with archive.open(name) as file:
            place[:] = read(file).convert("RGB")  # some are grayscale
    return pixels, np.array([label for _, label in entries])


def imported(module: str, name: str) -> Any:
    """Return `name` of a module. If the import fails, raise a UsageError that names the package."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # packages whose versions do not fit each other raise many kinds of errors
        package = module.partition(".")[0]
        raise UsageError(f"the package {package} cannot be used ({_one_line(error)}): install or repair it") from None


def ensure_files(data_dir: str, files: dict[str, str], download: Callable[[str], Any], archive: str = "",
                 archive_md5: str = "") -> None:
    """Verify the files in `data_dir`. If none of them exists, unpack their archive or download all of them first.

    Args:
        files: file name -> MD5 sum.
        download: downloads the files to a folder.
        archive, archive_md5: name and MD5 sum of the archive of the files, if they are published in one.

    Raises:
        UsageError: a file is missing, damaged or in another folder, or the download failed.
    """
    from torchvision.datasets.utils import check_integrity, extract_archive

    root = Path(data_dir)
    try:
        if not any((root / name).exists() for name in files):
            packed = root / archive
            if archive and packed.is_file():
                if not check_integrity(str(packed), archive_md5):
                    raise UsageError(f"--data-dir {data_dir}: {packed} is truncated or altered (its MD5 sum should be "
                                     f"{archive_md5}): replace it, or delete it to download")
                _place(root, files, partial(extract_archive, packed), f"{packed} cannot be unpacked")
            else:
                require_level(root, files, archive)
                _place(root, files, download, "the download failed")
        present = {root / name.split("/")[0] for name in files if (root / name.split("/")[0]).exists()}
        again = " and ".join(map(str, sorted(present)))  # the files are downloaded if none exists
        for name, md5 in files.items():
            file = root / name
            if not file.exists():
                raise UsageError(f"--data-dir {data_dir} lacks {file}: copy the file to this path, or delete {again} "
                                 f"to download all files again")
            if not check_integrity(str(file), md5):
                raise UsageError(f"--data-dir {data_dir}: {file} is truncated or altered (its MD5 sum should be {md5}):"
                                 f" replace it, or delete {again} to download again")
    except (ValueError, OSError) as error:  # an invalid path, or a file without read permission
        raise UsageError(f"--data-dir {data_dir} cannot be read ({_one_line(error)})") from None


def require_level(root: Path, files: Iterable[str], archive: str) -> None:
    """Raise UsageError if `root` is a file, or if its parent or a subfolder is the folder of the data set."""
    if root.is_file():
        raise UsageError(f"--data-dir {root} is a file: give its folder, {root.parent}")
    if any((root / Path(name).name).exists() for name in files):
        raise UsageError(f"--data-dir {root} is one level too deep: give its parent folder, {root.resolve().parent}")
    for folder in root.glob("[!.]*"):
        if any(os.path.isfile(folder / name) for name in filter(None, (*files, archive))):
            raise UsageError(f"--data-dir {root} is one level too high: give {folder}")


def _place(root: Path, files: Collection[str], make: Callable[[str], Any], failure: str) -> None:
    """Make the files in a temporary folder, then move them to `root`, so that no partial file has a final name.

    A file lock ensures that only one process at a time makes files.
    """
    new, held = [folder for folder in (root, *root.parents) if not folder.exists()], None
    patience = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = lock(root / ".lock", wait=WAIT)
        if any((root / name).exists() for name in files):  # made by another process
            return
        if held:  # without locks, another process may be downloading
            for left in root.glob(".download-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        socket.setdefaulttimeout(STALLED)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as arriving, \
                contextlib.redirect_stdout(io.StringIO()):
            make(arriving)
            for top in dict.fromkeys(name.split("/")[0] for name in files):
                os.replace(Path(arriving, top), root / top)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
        raise UsageError(f"--data-dir {root} has no {next(iter(files))}, and {failure} ({_one_line(error)}): "
                         f"copy the files to this folder, or use --dummy") from None
    finally:
        socket.setdefaulttimeout(patience)
        if held:
            if root in new and not any((root / name).exists() for name in files):
                (root / ".lock").unlink(missing_ok=True)
            held.close()
        for folder in new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _read(dataset: DataSet, data_dir: str) -> tuple[Images, Images]:
    source = dataset.source
    if isinstance(source, str) and ":" in source:
        module, _, name = source.partition(":")
        source = imported(module, name)
    try:
        parts = source(data_dir) if callable(source) else read_torchvision(source, data_dir)
    except UsageError:
        raise
    except ImportError as error:  # in a function of the user
        raise UsageError(f"{dataset.name} needs a package that cannot be imported ({_one_line(error)})") from None
    except Exception as error:  # parsers raise many kinds of errors for unreadable files
        raise UsageError(f"--data-dir {data_dir}: its files cannot be read ({_one_line(error)})") from None
    train, test = (_images(dataset, data_dir, *map(np.asarray, part)) for part in parts)
    return train, test


def _images(dataset: DataSet, data_dir: str, pixels: np.ndarray, labels: np.ndarray) -> Images:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels) or \
            labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or \
            labels.min() < 0 or labels.max() >= dataset.classes:
        raise UsageError(f"--data-dir {data_dir} does not contain {dataset.name}: images are {pixels.dtype} "
                         f"{pixels.shape}, must be uint8 (N, H, W, 3); labels are {labels.dtype} {labels.shape}, must "
                         f"be integers (N,) from 0 to {dataset.classes - 1}")
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels.astype(np.int64)))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
