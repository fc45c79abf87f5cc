"""Data sets: images and labels as uint8 tensors: CIFAR-10, Fashion-MNIST, CelebA, a folder, or a set of our own."""
import http.client
import io
import lzma
import os
import pickle
import socket
import tarfile
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from images import DatasetError, SettingsError, one_line
from images.files import first_few, fit, list_images, to_tensor, user_path
from images.packs import Decoding, Pack, open_pack, pack_folder
from images.pairs import pair_factor, partners
from images.photos import Photos, gather_rows
from images.pictures import to_float
from images.shapes import FLOATS_A_PIXEL, SHAPES, draw_shapes
from images.splits import known_sides, split_names
from support.disk import free_memory


@dataclass(frozen=True)
class Download:
    """A data set of torchvision's. An entry in DOWNLOADS is all that a new one needs: every command knows its name."""

    kind: str  # its class in torchvision.datasets, which downloads it; has data, targets and classes, or is of files
    by_hand: str  # how to get it otherwise; {} is data_path
    train: dict = field(default_factory=lambda: {"train": True})  # arguments of the class for the training images
    test: dict = field(default_factory=lambda: {"train": False})
    # folder of its image files, below data_path: they are packed, and may be cropped at random; None: small squares
    files: str | None = None


DOWNLOADS = {
    "cifar10": Download("CIFAR10", "put cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html into {}"),
    "fashion-mnist": Download("FashionMNIST", "put the four .gz files listed at "
                              "https://github.com/zalandoresearch/fashion-mnist into {}/FashionMNIST/raw"),
    "celeba": Download("CelebA", "pip install gdown and run again, or put img_align_celeba.zip and the five .txt files "
                       "of https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into {}/celeba",
                       {"split": "train"}, {"split": "test"}, files="celeba/img_align_celeba"),
}
# what libraries, networks and damaged files raise while torchvision downloads and reads
FAILURES = (OSError, RuntimeError, ImportError, EOFError, ValueError, AssertionError, http.client.HTTPException,
            zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, pickle.UnpicklingError)
WITH_THE_CLONE = ("demo", "shapes")  # sixteen photographs; drawings
TIMEOUT = 20  # seconds without an answer after which a download is given up
MAX_SIDE = 8192  # pixels: Pillow takes a square of many more for an attack
MAX_BATCH = 2**20  # images


@dataclass
class Images:
    """A data set. A folder's images are maps of a file: `train[0] += 1` changes a copy in memory, never the file."""

    train: Tensor | Photos  # (N, C, H, W) uint8; Photos where random crops are taken
    test: Tensor | Photos  # (M, C, H, W) uint8, held out
    train_y: Tensor | None  # (N,) int64; None where the set has no classes
    test_y: Tensor | None  # (M,)
    classes: list[str]  # their names, [] without classes
    train_lo: Tensor | Photos | None = None  # damaged partners of train on the same grid, only with `paired_path`
    test_lo: Tensor | Photos | None = None  # of test
    name: str = ""
    left_out: list[str] = field(default_factory=list)  # a line for each file that is not used: which one, and why
    test_names: list[str] = field(default_factory=list)  # paths of the test images below a folder, else []
    pair_factor: int = 1  # sides of the clean images / sides of their damaged partners, as the files have them

    def to(self, device) -> "Images":
        """All tensors onto `device`; on CUDA only where they leave half of its free memory, else they stay here."""
        tensors = {key: value for key, value in vars(self).items() if torch.is_tensor(value)}
        if torch.device(device).type == "cuda":
            if isinstance(self.train, Photos):
                return self
            if sum(t.nbytes for t in tensors.values()) > torch.cuda.mem_get_info(device)[0] // 2:
                return self
        return replace(self, **{key: value.to(device) for key, value in tensors.items()})

    def rows(self, index: Tensor, split: str = "train", crop_corners: Tensor | None = None,
             pinned: bool = False) -> list:
        """Rows `index` (B,) of "train" or "test" where they lie: x (B, C, H, W) uint8, y (B,), damaged x or None.

        crop_corners, pinned: see photos.gather_rows.
        """
        x, y, lo = ((self.train, self.train_y, self.train_lo) if split == "train" else
                    (self.test, self.test_y, self.test_lo))
        index = move(index, x.device)
        return [gather_rows(x, index, crop_corners, pinned), None if y is None else y[index],
                None if lo is None else gather_rows(lo, index, crop_corners, pinned)]

    def batch(self, index: Tensor, device, split: str = "train") -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows `index` (B,) of "train" or "test", on `device`: x (B, C, H, W) in [-1, 1], y (B,), damaged x or None."""
        return on_device(self.rows(index, split), device)


def on_device(rows: list, device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What Images.rows gave, on `device`, the images in [-1, 1]."""
    x, y, lo = (None if t is None else move(t, device) for t in rows)
    return to_float(x), y, None if lo is None else to_float(lo)


def move(t: Tensor, device) -> Tensor:
    """t on `device`. Copying from memory that isn't pinned, the host would wait until the GPU has finished its work."""
    if torch.device(device).type == "cuda" and not t.is_cuda:
        t = t.pin_memory()  # itself where it is pinned already
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
        pieces.append(permutation(n, seed, epoch)[max(start - begin, 0):end - begin])
    return torch.cat(pieces)


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order (n,) int64 of an epoch's images."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def crop_corners(batch_size: int, seed: int, step: int) -> Tensor:
    """Where in its photograph each row of the step's batch lies: (batch_size, 2) in [0, 1), downwards, to the right."""
    random = np.random.default_rng((seed, step, 1))  # with the 1 it is not that of `permutation`
    return torch.from_numpy(random.random((batch_size, 2)))


class Feed:
    """A run's training batches: feed(step) is this process's share of the step's, on its device.

    A function of (seed, step): batch_indices gives the images, crop_corners their crops. Where the set is not on the
    device, a thread gathers the next `ahead` batches meanwhile. When overfitting, each step has the first batch, and
    crops from the middle.
    """

    def __init__(self, images: Images, device, batch_size: int, seed: int, rank: int = 0, world: int = 1,
                 overfit: bool = False, ahead: int | None = None):
        self.images, self.device, self.overfit = images, torch.device(device), overfit
        self.batch_size, self.seed, self.share = batch_size, seed, slice(rank, None, world)
        self.pinned = self.device.type == "cuda"
        near = images.train.device.type == self.device.type
        self.ahead = ahead if ahead is not None else 0 if near else 3
        self.waiting = {}  # step -> its rows, which the thread gathers or has gathered
        self.thread = ThreadPoolExecutor(1, "feed", initializer=self.enter_thread)

    def enter_thread(self):
        if self.pinned:
            torch.cuda.set_device(self.device)  # or the thread would take memory on the first GPU

    def rows(self, step: int) -> list:
        index = batch_indices(len(self.images.train), self.batch_size, self.seed, step)
        corners = None if self.overfit else crop_corners(self.batch_size, self.seed, step)[self.share]
        return self.images.rows(index[self.share], "train", corners, self.pinned)

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        step = 0 if self.overfit else step
        if not self.ahead:
            return on_device(self.rows(step), self.device)
        self.waiting = {s: rows for s, rows in self.waiting.items() if step <= s <= step + self.ahead}
        for s in range(step, step + 1 + self.ahead):
            if s not in self.waiting:
                self.waiting[s] = self.thread.submit(self.rows, s)
        return on_device(self.waiting[step].result(), self.device)


def load(dataset: str | None, side: int, channels: int = 3, data_path: str = "data", paired_path: str | None = None,
         limit: int | None = None, or_demo: bool = False, crop: str = "center") -> Images:
    """The data set as square images of `side` pixels, 1 (grey) or 3 (RGB) channels.

    dataset: cifar10, fashion-mnist, celeba (in data_path, else downloaded there), demo, shapes, or a folder's path.
    None is cifar10; where it is missing and can't be downloaded, or_demo takes demo instead, under a banner.
    paired_path: folder of damaged images with the names of dataset's (the endings may differ), as large as those or
    all the same whole number of times smaller.
    limit: at most so many images a split, evenly spread (of shapes the first ones).
    crop: "center" cuts and resizes each image; "random", for folders, keeps photographs at their own size to take crops
    of, from anywhere in training and from the middle else.
    Image files are decoded once: later starts find them in data_path/packs.
    Raises DatasetError, and SettingsError for a number out of range or where memory is short. Of the images left out
    a warning names the first and Images.left_out all.
    """
    if crop not in ("center", "random"):
        raise SettingsError(f"crop = {crop}: allowed is center or random")
    small = [None, *WITH_THE_CLONE, *(name for name, download in DOWNLOADS.items() if not download.files)]
    if crop == "random" and dataset in small:
        raise SettingsError(f"crop = random: allowed is center for {dataset or 'cifar10'}, whose images are small; "
                            "name a folder of photographs as dataset")
    if dataset is None:
        try:
            return load("cifar10", side, channels, data_path, paired_path, limit)
        except DatasetError as failure:
            if not or_demo:
                raise
            line = "*" * 100
            print(f"{line}\n  No CIFAR-10: {failure}\n"
                  "  This demo runs on sixteen photographs that come with it instead; --dataset FOLDER takes your own "
                  f"images.\n{line}")
            return load("demo", side, channels, data_path, paired_path, limit)
    if not 1 <= side <= MAX_SIDE:
        raise SettingsError(f"side = {side}: allowed is 1 to {MAX_SIDE:,} pixels")
    if limit is not None and limit < 1:
        raise SettingsError(f"limit = {limit}: allowed is 1 or more, or None")
    if channels not in (1, 3):
        raise SettingsError(f"channels = {channels}: allowed is 1 (grey) or 3 (RGB)")
    if paired_path is not None and dataset in (*WITH_THE_CLONE, *DOWNLOADS):
        raise DatasetError(f"paired_path = {paired_path}: its partners must be in a folder too, not in {dataset}; "
                           "name that folder as dataset")
    try:
        if dataset == "demo":
            return _demo(side, channels, limit)
        if dataset == "shapes":
            return _draw(side, channels, limit)
        if dataset in DOWNLOADS:
            return _download(dataset, Decoding(side, channels, crop), data_path, limit)
        return _folder(dataset, Decoding(side, channels, crop), data_path, paired_path, limit)
    except MemoryError as error:
        raise SettingsError(f"image_size = {side}: too little memory for the images of {dataset}; lower image_size, "
                            "or take fewer images") from error


def _demo(side: int, channels: int, limit: int | None) -> Images:
    """The photographs in images/demo, which are the test images too: they are there to be overfitted."""
    _check_memory(16, side, channels)
    paths = _spread(sorted((Path(__file__).parent / "demo").glob("*.png")), limit)
    mode = "RGB" if channels == 3 else "L"
    x = torch.stack([to_tensor(fit(Image.open(path).convert(mode), side)) for path in paths])
    return Images(x, x, None, None, [], name="demo")


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


# ------------------------------------------------------------------------------------------------------------- files

def _folder(dataset: str, decoding: Decoding, data_path: str, paired_path: str | None, limit: int | None) -> Images:
    root = user_path(dataset)
    if not dataset or not os.path.isdir(root):
        raise DatasetError(f"dataset = {dataset}: is not a folder; name one, or "
                           f"{', '.join([*DOWNLOADS, *WITH_THE_CLONE])}")
    names = list_images(root)
    paired, partner = None, {}
    left_out = []
    if paired_path is not None:
        paired = user_path(paired_path)
        partner, left_out = partners(root, names, paired)
        names = sorted(partner)
    # by their real paths, so that it is the same pack by whatever way one comes to the folder
    here, there = os.path.realpath(root), os.path.realpath(paired) if paired else None
    folder = pack_folder(os.path.basename(here), decoding, data_path, [here, there, limit])
    split = split_names(names, known_sides(folder, names, limit))
    if split.left_out:
        left_out += [f"{root / name}: is neither in the folder of training images nor in that of test images"
                     for name in split.left_out]
        warnings.warn(f"{root}: {len(split.left_out)} images are neither in the folder of training images nor in that "
                      f"of test images, and are left out: {first_few(split.left_out)}")

    def label(name: str) -> str | None:  # the class folder, if the image is in one
        return name.split("/")[split.level] if name.count("/") > split.level else None

    labels = {label(name) for name in split.train + split.test}
    classes = [] if None in labels or len(labels) == 1 else sorted(labels)
    number = {name: i for i, name in enumerate(classes)}
    train_names, test_names = _spread(split.train, limit), _spread(split.test, limit)
    names = train_names + test_names
    files = [(f"{here}/{name}", f"{there}/{partner[name]}" if paired else None) for name in names]
    pack = open_pack(folder, files, decoding)

    def part(rows: slice) -> tuple:
        used = [label(names[i]) for i in pack.used[rows]]
        y = torch.tensor([number[each] for each in used], dtype=torch.int64) if classes else None
        return pack.clean[rows], None if pack.damaged is None else pack.damaged[rows], y

    count = int((pack.used < len(train_names)).sum())  # training images that could be read
    (train, train_lo, y), (test, test_lo, test_y) = part(slice(count)), part(slice(count, None))
    factor = 1
    if paired:
        if 2 * len(pack.used) < len(names):
            raise DatasetError(f"{paired}: only {len(pack.used)} of its {len(names)} pairs with {root} can be used; "
                               f"check that these are the same pictures: {first_few(pack.left_out, 3)}")
        factor = pair_factor(pack.index.pairs)
    if not split.own and not len(train):  # no training file could be read: train on the held-out ones
        train, train_lo, y, test, test_lo, test_y = test, test_lo, test_y, train, train_lo, y
    if not len(train):
        raise DatasetError(f"{root}: none of the {len(train_names)} training images can be read; replace them: "
                           f"{first_few(pack.left_out, 3)}")
    _warn_of(root, pack, decoding)
    test_names = [names[i] for i in pack.used][-len(test):]  # -0: all, where no image is left to hold out
    if not len(test):
        warnings.warn(f"{root}: no image is left to hold out, so the training images are the test images too")
        test, test_lo, test_y = train, train_lo, y
    return Images(train, test, y, test_y, classes, train_lo, test_lo, name=os.path.basename(here),
                  left_out=left_out + pack.left_out, test_names=test_names, pair_factor=factor)


def _warn_of(folder: Path, pack: Pack, decoding: Decoding) -> None:
    """Names the first of the images left out, and says how many are enlarged for want of pixels."""
    if pack.left_out:
        rest = ", which a run lists in left_out.txt" if len(pack.left_out) > 3 else ""
        warnings.warn(f"{folder}: {len(pack.left_out)} images are left out{rest}: {first_few(pack.left_out, 3)}")
    if pack.index.enlarged:
        warnings.warn(f"{folder}: {pack.index.enlarged:,} of {len(pack.used):,} images have a side below image_size = "
                      f"{decoding.side} and are enlarged for random crops of it; a lower image_size leaves them as "
                      "they are")


# ------------------------------------------------------------------------------------------------------ by torchvision

def _download(name: str, decoding: Decoding, data_path: str, limit: int | None) -> Images:
    from torchvision import datasets  # a second to import

    download = DOWNLOADS[name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with redirect_stdout(io.StringIO()):  # the progress bar is still seen: it goes to stderr
            train, test = (getattr(datasets, download.kind)(data_path, download=True, **which)
                           for which in (download.train, download.test))
    except FAILURES as error:
        reason = f"{type(error).__name__}: {one_line(error)}"[:160]
        raise DatasetError(f"dataset = {name}: is not in {data_path}, or not whole, and can't be downloaded "
                           f"({reason}); {download.by_hand.format(data_path)}; or take --dataset shapes or a "
                           "folder") from error
    finally:
        socket.setdefaulttimeout(before)
    rows = _spread(list(range(len(train))), limit)
    test_rows = _spread(list(range(len(test))), limit)
    if download.files:  # CelebA has 40 attributes and 10,000 identities, but no classes
        folder = os.path.realpath(Path(train.root) / download.files)
        names = [train.filename[i] for i in rows] + [test.filename[i] for i in test_rows]
        files = [(f"{folder}/{file}", None) for file in names]
        pack = open_pack(pack_folder(name, decoding, data_path, [folder, None, limit]), files, decoding)
        count = int((pack.used < len(rows)).sum())
        if not 0 < count < len(pack.used):
            raise DatasetError(f"{folder}: no training or no test image can be read; get it anew: "
                               f"{first_few(pack.left_out, 3)}")
        _warn_of(folder, pack, decoding)
        return Images(pack.clean[:count], pack.clean[count:], None, None, [], name=name, left_out=pack.left_out)
    side, channels = decoding.side, decoding.channels
    _check_memory(len(rows) + len(test_rows), side, channels)
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
