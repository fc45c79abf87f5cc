"""Data sets: images and labels as uint8 tensors: CIFAR-10, Fashion-MNIST, CelebA, a folder, or `shapes`, drawn here."""
import io
import os
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from images import DatasetError, SettingsError, one_line
from images.files import few, fit, list_images, open_image, to_tensor
from images.pairs import check_shape, pair_factor, partners
from images.pictures import to_float
from images.shapes import FLOATS_A_PIXEL, SHAPES, draw_shapes

DOWNLOADS = {  # name: its class in torchvision.datasets, and how to get it by hand; {} is data_path
    "cifar10": ("CIFAR10", "put cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html into {}"),
    "fashion-mnist": ("FashionMNIST", "put the four .gz files listed at "
                      "https://github.com/zalandoresearch/fashion-mnist into {}/FashionMNIST/raw"),
    "celeba": ("CelebA", "pip install gdown and run again, or put img_align_celeba.zip and the five .txt files "
               "of https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into {}/celeba"),
}
TIMEOUT = 20  # seconds without an answer after which a download is given up
MAX_SIDE = 8192  # pixels: Pillow takes a square of many more for an attack
MAX_BATCH = 2**20  # images


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
    left_out: list[str] = field(default_factory=list)  # a line for each file that is not used: which one, and why
    pair_factor: int = 1  # sides of the clean images / sides of their damaged partners, as the files have them

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

        if split == "train":
            x, y, lo = rows(self.train), rows(self.train_y), rows(self.train_lo)
        else:
            x, y, lo = rows(self.test), rows(self.test_y), rows(self.test_lo)
        return to_float(x), y, None if lo is None else to_float(lo)


def move(t: Tensor, device) -> Tensor:
    """t on `device`. Copying from memory that isn't pinned, the host would wait until the GPU has finished its work."""
    if torch.device(device).type == "cuda" and not t.is_cuda:
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The step's piece (batch_size,) int64 of the endless stream of shuffled epochs: a pure function of its arguments.

    Epochs follow each other without a gap, so each covers every index once, even where batch_size is above n.
    Raises SettingsError for a batch of more images than anyone can mean.
    """
    if not 1 <= batch_size <= MAX_BATCH:
        raise SettingsError(f"images in a batch = {batch_size}: allowed is 1 to {MAX_BATCH:,}")
    start = step * batch_size
    end = start + batch_size
    pieces = []
    for epoch in range(start // n, (end - 1) // n + 1):
        begin = epoch * n  # the epoch's first place in the stream
        pieces.append(_permutation(n, seed, epoch)[max(start - begin, 0):end - begin])
    return torch.cat(pieces)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def load(dataset: str | None, side: int, channels: int = 3, data_path: str = "data", paired_path: str | None = None,
         limit: int | None = None, or_shapes: bool = False) -> Images:
    """The data set as square images of `side` pixels, 1 (grey) or 3 (RGB) channels.

    dataset: cifar10, fashion-mnist, celeba (in data_path, else downloaded there), shapes, or a folder's path. None is
    cifar10; where it is missing and can't be downloaded, or_shapes takes shapes instead, under a banner.
    paired_path: folder of damaged images with the names of dataset's (the endings may differ), as large as those or
    all the same whole number of times smaller.
    limit: at most so many images a split, evenly spread (of shapes the first ones).
    Raises DatasetError, and SettingsError for a number out of range or where memory is short. Of the images left out
    a warning names the first and Images.left_out all.
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
    if not 1 <= side <= MAX_SIDE:
        raise SettingsError(f"side = {side}: allowed is 1 to {MAX_SIDE:,} pixels")
    if limit is not None and limit < 1:
        raise SettingsError(f"limit = {limit}: allowed is 1 or more, or None")
    if channels not in (1, 3):
        raise SettingsError(f"channels = {channels}: allowed is 1 (grey) or 3 (RGB)")
    if paired_path is not None and (dataset == "shapes" or dataset in DOWNLOADS):
        raise DatasetError(f"paired_path = {paired_path}: its partners must be in a folder too, not in {dataset}; "
                           "name that folder as dataset")
    try:
        if dataset == "shapes":
            return _draw(side, channels, limit)
        if dataset in DOWNLOADS:
            return _download(dataset, side, channels, data_path, limit)
        return _folder(dataset, side, channels, paired_path, limit)
    except MemoryError as error:
        raise SettingsError(f"image_size = {side}: too little memory for the images of {dataset}; lower image_size, "
                            "or take fewer images") from error


def _draw(side: int, channels: int, limit: int | None) -> Images:
    """The data set `shapes`."""
    count = 11_000 if limit is None else min(limit, 10_000) + min(limit, 1_000)
    _check_memory(count, side, channels, more=4 * FLOATS_A_PIXEL * side**2)
    train, y = draw_shapes(10_000, 0, side, channels, limit)
    test, test_y = draw_shapes(1_000, 1, side, channels, limit)
    return Images(train, test, y, test_y, list(SHAPES), name="shapes")


def _spread(items: list, limit: int | None) -> list:
    """At most `limit` of the items, evenly spread."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _check_memory(count: int, side: int, channels: int, more: int = 0) -> None:
    """SettingsError where `count` images, and `more` bytes beside them, are more than the memory that is free."""
    size = count * channels * side**2 + more
    free = free_memory()
    if free is not None and size > free:
        raise SettingsError(f"image_size = {side}: {count:,} images need {size / 1e9:,.1f} GB of memory, and "
                            f"{free / 1e9:,.1f} GB are free; lower image_size, or take fewer images")


def free_memory() -> int | None:
    """Bytes of this machine's memory that programs can still take; None where the system is not Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


# ------------------------------------------------------------------------------------------------------------- files

@dataclass
class Decoded:
    """What `_decode` made of a list of files."""

    clean: Tensor  # (kept, C, side, side) uint8
    damaged: Tensor | None  # their partners, of the same shape, where the files are pairs
    kept: list[int]  # places in the list of the files that could be used
    left_out: list[str]  # why the others could not: a line for each
    sizes: list[tuple]  # of each pair kept: see pair_factor


def _folder(dataset: str, side: int, channels: int, paired_path: str | None, limit: int | None) -> Images:
    root = Path(os.path.expanduser(dataset))
    if not dataset or not os.path.isdir(root):
        raise DatasetError(f"dataset = {dataset}: is not a folder; name one, or {', '.join([*DOWNLOADS, 'shapes'])}")
    names = list_images(root)
    paired = None
    left_out = []
    if paired_path is not None:
        paired = Path(os.path.expanduser(paired_path))
        partner, left_out = partners(root, names, paired)
        names = sorted(partner)
    train_names, test_names, level, own = _split(names)

    def label(name: str) -> str | None:  # the class folder, if the image is in one
        return name.split("/")[level] if name.count("/") > level else None

    labels = {label(name) for name in train_names + test_names}
    classes = [] if None in labels or len(labels) == 1 else sorted(labels)
    train_names, test_names = _spread(train_names, limit), _spread(test_names, limit)
    count = len(train_names) + len(test_names)
    _check_memory(2 * count if paired else count, side, channels)

    def read(names: list[str]) -> tuple[Decoded, Tensor | None]:
        images = _decode([(root / name, paired / partner[name] if paired else None) for name in names], side, channels)
        if not classes:
            return images, None
        return images, torch.tensor([classes.index(label(names[i])) for i in images.kept], dtype=torch.int64)

    train, y = read(train_names)
    test, test_y = read(test_names)
    broken = train.left_out + test.left_out
    factor = 1
    if paired:
        good = len(train.kept) + len(test.kept)
        if 2 * good < count:
            raise DatasetError(f"{paired}: only {good} of its {count} pairs with {root} can be used; check that these "
                               f"are the same pictures: {few(broken, 3)}")
        factor = pair_factor(train.sizes + test.sizes)
    if not own and not train.kept:  # the only good images were held out
        train, y, test, test_y = test, test_y, train, y
    if not train.kept:
        raise DatasetError(f"{root}: none of the {len(train_names)} training images can be read; replace them: "
                           f"{few(broken, 3)}")
    _warn_of(root, broken)
    if not test.kept:
        warnings.warn(f"{root}: no image is left to hold out, so the training images are the test images too")
        test, test_y = train, y
    return Images(train.clean, test.clean, y, test_y, classes, train.damaged, test.damaged,
                  name=os.path.basename(os.path.realpath(root)), left_out=left_out + broken, pair_factor=factor)


def _warn_of(folder: Path, left_out: list[str]) -> None:
    """Names the first of the images left out."""
    if left_out:
        rest = ", which a run lists in left_out.txt" if len(left_out) > 3 else ""
        warnings.warn(f"{folder}: {len(left_out)} images are left out{rest}: {few(left_out, 3)}")


def _split(names: list[str]) -> tuple[list[str], list[str], int, bool]:
    """-> train, test, level of the class folders, whether the splits are the folder's own.

    They are train/ and test/ (or val/) where both exist. Else a tenth of the images is held out, evenly spread: 1 to
    1,000 of them, but none where there is only one image.
    """
    tops = {name.split("/")[0] for name in names if "/" in name}
    held_out = next((top for top in ("test", "val", "valid", "validation") if top in tops), None)
    if "train" in tops and held_out:
        train = [name for name in names if name.startswith("train/")]
        test = [name for name in names if name.startswith(held_out + "/")]
        return train, test, 1, True
    count = min(max(1, len(names) // 10), 1000, len(names) - 1)
    rows = {(2 * i + 1) * len(names) // (2 * count) for i in range(count)}
    train = [name for i, name in enumerate(names) if i not in rows]
    test = [name for i, name in enumerate(names) if i in rows]
    level = 1 if all(name.startswith("train/") for name in names) else 0
    return train, test, level, False


def _decode(files: list[tuple[Path, Path | None]], side: int, channels: int) -> Decoded:
    """Reads files (clean, damaged or None)."""

    def empty() -> Tensor:  # by numpy, which raises MemoryError where torch raises RuntimeError
        return torch.from_numpy(np.empty((len(files), channels, side, side), np.uint8))

    clean = empty()
    damaged = empty() if any(partner for _, partner in files) else None
    sizes = {}  # by place in `files`, as is the next
    broken = {}

    def read(row: int) -> None:
        path, partner = files[row]
        image = open_image(path, channels)
        clean[row] = to_tensor(fit(image, side))
        if partner:
            lo = open_image(partner, channels)
            check_shape(image.size, lo.size, partner)
            sizes[row] = image.size, lo.size, partner
            if lo.size != image.size:
                lo = lo.resize(image.size, Image.Resampling.BICUBIC)  # as files.enlarge does
            damaged[row] = to_tensor(fit(lo, side))

    def read_some(rows: range) -> int:
        for row in rows:
            try:
                read(row)
            except DatasetError as error:
                broken[row] = one_line(error)
        return len(rows)

    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        bar = tqdm(total=len(files), desc="images", disable=None, delay=2, leave=False)
        for done in pool.map(read_some, [range(i, min(i + 64, len(files))) for i in range(0, len(files), 64)]):
            bar.update(done)
        bar.close()
    kept = [row for row in range(len(files)) if row not in broken]
    for column in (clean, damaged):
        if broken and column is not None:
            for new, old in enumerate(kept):  # in place: there may be no memory for a second copy
                column[new] = column[old]
    if damaged is not None:
        damaged = damaged[:len(kept)]
    return Decoded(clean[:len(kept)], damaged, kept, left_out=[broken[row] for row in sorted(broken)],
                   sizes=[sizes[row] for row in kept if row in sizes])


# ------------------------------------------------------------------------------------------------------ by torchvision

def _download(name: str, side: int, channels: int, data_path: str, limit: int | None) -> Images:
    from torchvision import datasets  # a second to import

    kind, by_hand = DOWNLOADS[name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with redirect_stdout(io.StringIO()):  # the progress bar is still seen: it goes to stderr
            choices = [{"split": s} if name == "celeba" else {"train": s == "train"} for s in ("train", "test")]
            train, test = (getattr(datasets, kind)(data_path, download=True, **choice) for choice in choices)
    except Exception as error:  # no network, no gdown, a damaged file: each library raises its own kinds of exception
        reason = f"{type(error).__name__}: {one_line(error)}"[:160]
        raise DatasetError(f"dataset = {name}: is not in {data_path}, or not whole, and can't be downloaded "
                           f"({reason}); {by_hand.format(data_path)}; or take --dataset shapes or a folder") from error
    finally:
        socket.setdefaulttimeout(before)
    rows = _spread(list(range(len(train))), limit)
    test_rows = _spread(list(range(len(test))), limit)
    _check_memory(len(rows) + len(test_rows), side, channels)
    if name == "celeba":  # 40 attributes and 10,000 identities, but no classes
        folder = Path(train.root) / "celeba" / "img_align_celeba"
        x = _decode([(folder / train.filename[i], None) for i in rows], side, channels)
        test_x = _decode([(folder / test.filename[i], None) for i in test_rows], side, channels)
        broken = x.left_out + test_x.left_out
        if not x.kept or not test_x.kept:
            raise DatasetError(f"{folder}: no training or no test image can be read; get it anew: {few(broken, 3)}")
        _warn_of(folder, broken)
        return Images(x.clean, test_x.clean, None, None, [], name=name, left_out=broken)
    x = _resize(np.asarray(train.data)[rows], side, channels)
    test_x = _resize(np.asarray(test.data)[test_rows], side, channels)
    y = torch.as_tensor(train.targets)[rows]
    test_y = torch.as_tensor(test.targets)[test_rows]
    return Images(x, test_x, y, test_y, list(train.classes), name=name)


def _resize(pixels: np.ndarray, side: int, channels: int) -> Tensor:
    """(N, h, w[, 3]) uint8 -> (N, channels, side, side). A side of 28 (Fashion-MNIST) gets a black margin up to 32."""
    if pixels.shape[1] == 28 < side <= 32:
        before = (side - 28) // 2
        after = side - 28 - before
        pixels = np.pad(pixels, ((0, 0), (before, after), (before, after)))
    if pixels.shape[1] == side and pixels.ndim == (4 if channels == 3 else 3):
        return torch.from_numpy(pixels.reshape(-1, side, side, channels).transpose(0, 3, 1, 2).copy())
    mode = "RGB" if channels == 3 else "L"
    x = torch.from_numpy(np.empty((len(pixels), channels, side, side), np.uint8))
    for row, picture in zip(x, pixels):
        row.copy_(to_tensor(fit(Image.fromarray(picture).convert(mode), side)))
    return x
