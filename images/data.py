"""Data sets: images and labels as uint8 tensors: CIFAR-10, Fashion-MNIST, CelebA, a folder, or `shapes`, drawn here."""
import io
import os
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from images import DatasetError, SettingsError
from images.files import few, fit, list_images, open_image
from images.pictures import to_float
from images.shapes import SHAPES, draw_shapes

DOWNLOADS = {  # name: its class in torchvision.datasets, and how to get it by hand; {} is data_path
    "cifar10": ("CIFAR10", "put cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html into {}"),
    "fashion-mnist": ("FashionMNIST", "put the four .gz files listed at "
                      "https://github.com/zalandoresearch/fashion-mnist into {}/FashionMNIST/raw"),
    "celeba": ("CelebA", "pip install gdown and run again, or put img_align_celeba.zip and the five .txt files "
               "of https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into {}/celeba"),
}
TIMEOUT = 20  # seconds without an answer after which a download is given up


@dataclass
class Images:
    train: Tensor  # (N, C, H, W) uint8
    test: Tensor  # (M, C, H, W) uint8, held out
    train_y: Tensor | None  # (N,) int64; None where the set has no classes
    test_y: Tensor | None  # (M,)
    classes: list[str]  # their names, [] without classes
    train_lo: Tensor | None = None  # damaged partners of train on the same grid, only with `paired_path`
    test_lo: Tensor | None = None  # of test
    name: str = ""

    def to(self, device) -> "Images":
        """All tensors onto `device`; on CUDA only where they leave half of its free memory, else they stay here."""
        tensors = {key: value for key, value in vars(self).items() if torch.is_tensor(value)}
        if torch.device(device).type == "cuda":
            if sum(t.nbytes for t in tensors.values()) > torch.cuda.mem_get_info(device)[0] // 2:
                return self
        return replace(self, **{key: value.to(device) for key, value in tensors.items()})

    def batch(self, index: Tensor, device, split: str = "train") -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows `index` (B,) of "train" or "test", on `device`: x (B, C, H, W) in [-1, 1], y (B,), damaged x or None."""

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else move(t[move(index, t.device)], device)

        x, y, lo = (rows(getattr(self, split + end)) for end in ("", "_y", "_lo"))
        return to_float(x), y, None if lo is None else to_float(lo)


def move(t: Tensor, device) -> Tensor:
    """t on `device`. Copying from memory that isn't pinned, the host would wait until the GPU has finished its work."""
    if torch.device(device).type == "cuda" and not t.is_cuda:
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The step's piece (batch_size,) int64 of the endless stream of shuffled epochs: a pure function of its arguments.

    Epochs follow each other without a gap, so each covers every index once, even where batch_size is above n.
    """
    start, end = step * batch_size, (step + 1) * batch_size
    epochs = range(start // n, (end - 1) // n + 1)
    return torch.cat([_permutation(n, seed, e)[max(start - e * n, 0):end - e * n] for e in epochs])


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def load(dataset: str | None, side: int, channels: int = 3, data_path: str = "data", paired_path: str | None = None,
         limit: int | None = None, or_shapes: bool = False) -> Images:
    """The data set as square images of `side` pixels, 1 (grey) or 3 (RGB) channels.

    dataset: cifar10, fashion-mnist, celeba (in data_path, else downloaded there), shapes, or a folder's path. None is
    cifar10; where it is missing and can't be downloaded, or_shapes takes shapes instead, under a banner.
    paired_path: folder of damaged images with the names of dataset's (the endings may differ).
    limit: at most so many images a split, evenly spread (of shapes the first ones).
    Raises DatasetError, and SettingsError for a number out of range. Images left out are named in a warning.
    """
    if dataset is None:
        try:
            return load("cifar10", side, channels, data_path, paired_path, limit)
        except DatasetError as failure:
            if not or_shapes:
                raise
            line = "*" * 100
            print(f"{line}\n  No CIFAR-10: {failure}\n"
                  f"  This demo runs on drawn shapes instead; --dataset FOLDER takes your own images.\n{line}")
            return load("shapes", side, channels, data_path, paired_path, limit)
    if side < 1 or (limit is not None and limit < 1):
        raise SettingsError(f"side = {side}, limit = {limit}: both must be at least 1")
    if channels not in (1, 3):
        raise SettingsError(f"channels = {channels}: allowed are 1 (grey) and 3 (RGB)")
    if paired_path is not None and (dataset == "shapes" or dataset in DOWNLOADS):
        raise DatasetError(f"paired_path = {paired_path} needs a folder of clean images as dataset, which is {dataset}")
    if dataset == "shapes":
        train, y = draw_shapes(10_000, 0, side, channels, limit)
        test, test_y = draw_shapes(1_000, 1, side, channels, limit)
        return Images(train, test, y, test_y, list(SHAPES), name="shapes")
    if dataset in DOWNLOADS:
        return _download(dataset, side, channels, data_path, limit)
    return _folder(dataset, side, channels, paired_path, limit)


def _spread(items: list, limit: int | None) -> list:
    return items if limit is None or limit >= len(items) else [items[i * len(items) // limit] for i in range(limit)]


# ------------------------------------------------------------------------------------------------------------- files

def _folder(dataset: str, side: int, channels: int, paired_path: str | None, limit: int | None) -> Images:
    root = Path(dataset).expanduser()
    if not root.is_dir():
        raise DatasetError(f"dataset = {dataset} is no folder and none of {', '.join([*DOWNLOADS, 'shapes'])}")
    names, partners = list_images(root), {}
    if paired_path is not None:
        partners = _partners(root, names, Path(paired_path).expanduser())
        names = [name for name in names if name in partners]
    train, test, level, own = _split(names)

    def label(name: str) -> str | None:  # the class folder, if the image is in one
        return name.split("/")[level] if name.count("/") > level else None

    found = {label(name) for name in train + test}
    classes = sorted(found) if None not in found and len(found) > 1 else []
    loaded = []
    for split in (train, test):
        split = _spread(split or names, limit)
        files = [(root / n, *([Path(paired_path).expanduser() / partners[n]] if partners else [])) for n in split]
        columns, kept = _decode(files, side, channels)
        y = torch.tensor([classes.index(label(split[i])) for i in kept], dtype=torch.int64) if classes else None
        loaded.append((columns[0], y, columns[1] if partners else None))
    if not own and not len(loaded[0][0]):
        loaded.reverse()  # the only good images were held out
    (x, y, lo), (test_x, test_y, test_lo) = loaded
    if not len(x):
        raise DatasetError(f"none of the {len(train)} training images in {root} can be read")
    if not test or not len(test_x):
        warnings.warn(f"{root}: no image is left to hold out, so the training images are the test images too")
        test_x, test_y, test_lo = x, y, lo
    return Images(x, test_x, y, test_y, classes, lo, test_lo, name=root.resolve().name)


def _partners(root: Path, names: list[str], paired: Path) -> dict[str, str]:
    """Clean path -> damaged path, for the pairs of files whose names differ in the ending only."""
    others = list_images(paired)
    clean, damaged = ({os.path.splitext(n)[0]: n for n in some} for some in (names, others))
    for folder, stems, some in ((root, clean, names), (paired, damaged, others)):
        if twins := set(some) - set(stems.values()):
            raise DatasetError(f"{folder}: more than one image is called {few(twins)} but for the ending")
    both, lone = clean.keys() & damaged.keys(), clean.keys() ^ damaged.keys()
    if not both:
        raise DatasetError(f"no image has the same name in {root} and {paired}: {few(lone)}")
    if lone:
        warnings.warn(f"{len(lone)} images are in only one of {root} and {paired} and left out: {few(lone)}")
    return {clean[stem]: damaged[stem] for stem in both}


def _split(names: list[str]) -> tuple[list[str], list[str], int, bool]:
    """-> train, test, level of the class folders, whether the splits are the folder's own.

    They are train/ and test/ (or val/) where both exist. Else a tenth of the images is held out, evenly spread: 1 to
    1,000 of them, but none where there is only one image.
    """
    tops = {name.split("/")[0] for name in names if "/" in name}
    held_out = next((top for top in ("test", "val", "valid", "validation") if top in tops), None)
    if "train" in tops and held_out:
        train, test = ([n for n in names if n.startswith(top + "/")] for top in ("train", held_out))
        return train, test, 1, True
    count = min(max(1, len(names) // 10), 1000, len(names) - 1)
    rows = {(2 * i + 1) * len(names) // (2 * count) for i in range(count)}
    train, test = ([n for i, n in enumerate(names) if (i in rows) == held] for held in (False, True))
    return train, test, int(all(n.startswith("train/") for n in names)), False


def _decode(files: list[tuple[Path, ...]], side: int, channels: int) -> tuple[list[Tensor], list[int]]:
    """Files [(clean,) or (clean, damaged)] -> a tensor (kept, C, side, side) for each column, and the rows kept: those
    that can't be read are named in a warning."""
    columns = [np.empty((len(files), channels, side, side), np.uint8) for _ in files[0]]
    broken = {}

    def read(row: int) -> None:
        try:
            image, *damaged = (open_image(path, channels) for path in files[row])
            for i, lo in enumerate(damaged):
                # the same shape to within a pixel of the damaged image: else it belongs to another picture
                if abs(lo.width * image.height - lo.height * image.width) > max(image.size):
                    raise DatasetError(f"{files[row][1]} is {lo.size}, its partner {image.size}: not the same shape")
                damaged[i] = lo if lo.size == image.size else lo.resize(image.size, Image.Resampling.BICUBIC)
            for column, picture in zip(columns, (image, *damaged)):
                column[row] = np.asarray(fit(picture, side)).reshape(side, side, channels).transpose(2, 0, 1)
        except DatasetError as error:
            broken[row] = str(error)

    def chunk(rows: range) -> int:
        for row in rows:
            read(row)
        return len(rows)

    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        bar = tqdm(total=len(files), desc="images", disable=None, delay=2, leave=False)
        for done in pool.map(chunk, [range(i, min(i + 64, len(files))) for i in range(0, len(files), 64)]):
            bar.update(done)
        bar.close()
    if broken:
        warnings.warn(f"{len(broken)} images are left out: {few(broken.values())}")
    kept = [row for row in range(len(files)) if row not in broken]
    return [torch.from_numpy(c[kept] if broken else c) for c in columns], kept


# ------------------------------------------------------------------------------------------------------ by torchvision

def _download(name: str, side: int, channels: int, data_path: str, limit: int | None) -> Images:
    from torchvision import datasets  # a second to import

    kind, by_hand = DOWNLOADS[name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with redirect_stdout(io.StringIO()):  # the progress bar is still seen: it goes to stderr
            choices = [{"split": s} if name == "celeba" else {"train": s == "train"} for s in ("train", "test")]
            parts = [getattr(datasets, kind)(data_path, download=True, **choice) for choice in choices]
    except Exception as error:  # no network, no gdown, a damaged file: each library raises its own kinds of exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DatasetError(f"{name} is not in {data_path}, or not whole, and can't be downloaded ({reason[:160]}). "
                           f"To get it, {by_hand.format(data_path)}; or take --dataset shapes or a folder") from error
    finally:
        socket.setdefaulttimeout(before)
    if name == "celeba":  # 40 attributes and 10,000 identities, but no classes
        folder = Path(parts[0].root) / "celeba" / "img_align_celeba"
        files = ([(folder / name,) for name in _spread(part.filename, limit)] for part in parts)
        train, test = (_decode(split, side, channels)[0][0] for split in files)
        return Images(train, test, None, None, [], name=name)
    rows = [_spread(list(range(len(part))), limit) for part in parts]
    train, test = (_resize(np.asarray(part.data)[r], side, channels) for part, r in zip(parts, rows))
    y, test_y = (torch.as_tensor(part.targets)[r] for part, r in zip(parts, rows))
    return Images(train, test, y, test_y, list(parts[0].classes), name=name)


def _resize(pixels: np.ndarray, side: int, channels: int) -> Tensor:
    """(N, h, w[, 3]) uint8 -> (N, channels, side, side). A side of 28 (Fashion-MNIST) gets a black margin up to 32."""
    if pixels.shape[1] == 28 < side <= 32:
        margin = side - 28
        pixels = np.pad(pixels, ((0, 0),) + ((margin // 2, margin - margin // 2),) * 2)
    if pixels.shape[1] != side or pixels.ndim != (4 if channels == 3 else 3):
        mode = "RGB" if channels == 3 else "L"
        pixels = np.stack([np.asarray(fit(Image.fromarray(p).convert(mode), side)) for p in pixels])
    return torch.from_numpy(pixels.reshape(-1, side, side, channels).transpose(0, 3, 1, 2).copy())
