"""Data sets: images and labels as uint8 tensors: CIFAR-10, Fashion-MNIST, CelebA, a folder, or a set of our own."""
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

from images import DatasetError, SettingsError, one_line
from images.files import first_few, fit, list_images, to_tensor, user_path
from images.folders import partners, split_names
from images.packs import Decoding, Photos, check_room, gather_rows, open_pack
from images.pictures import to_float
from images.shapes import SHAPES, draw_shapes
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
# what our own faults raise while torchvision downloads and reads; networks and damaged files raise all else
OUR_FAULTS = (AttributeError, NameError, TypeError)
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
    train_names: list[str] = field(default_factory=list)  # paths of the images below a folder, else []
    test_names: list[str] = field(default_factory=list)
    pair_factor: int = 1  # sides of the clean images / sides of their damaged partners, as the files have them

    def to(self, device) -> "Images":
        """All tensors onto `device`; on CUDA only where they leave half of its free memory, else they stay here."""
        tensors = {key: value for key, value in vars(self).items() if torch.is_tensor(value)}
        size = sum(t.nbytes for t in tensors.values())
        if torch.device(device).type == "cuda" and (
                isinstance(self.train, Photos) or size > torch.cuda.mem_get_info(device)[0] // 2):
            return self
        return replace(self, **{key: value.to(device) for key, value in tensors.items()})

    def rows(self, index: Tensor, split: str = "train", crop_corners: Tensor | None = None,
             pinned: bool = False) -> list:
        """Rows `index` (B,) of "train" or "test" where they lie: x (B, C, H, W) uint8, y (B,), damaged x or None.

        crop_corners, pinned: see packs.gather_rows.
        """
        x, y, lo = (getattr(self, split + part) for part in ("", "_y", "_lo"))
        index = move(index, x.device)
        x, lo = (None if images is None else gather_rows(images, index, crop_corners, pinned) for images in (x, lo))
        return [x, None if y is None else y[index], lo]

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
    """
    epoch, start = divmod(step * batch_size, n)
    stream = [permutation(n, seed, epoch + i) for i in range((start + batch_size - 1) // n + 1)]
    return torch.cat(stream)[start:start + batch_size]


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order (n,) int64 of an epoch's images."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def crop_corners(batch_size: int, seed: int, step: int) -> Tensor:
    """Where in its photograph each row of the step's batch lies: (batch_size, 2) in [0, 1), downwards, to the right."""
    # with the 1 it is not the stream of `permutation`
    return torch.from_numpy(np.random.default_rng((seed, step, 1)).random((batch_size, 2)))


class Feed:
    """A run's training batches: feed(step) is this process's share of the step's, on its device.

    Where the set is not on the device, a thread gathers the next `ahead` batches meanwhile. When overfitting, each step
    has the first batch, and crops from the middle.
    """

    def __init__(self, images: Images, device, batch_size: int, seed: int, rank: int = 0, world: int = 1,
                 overfit: bool = False, ahead: int | None = None):
        self.images, self.device, self.overfit = images, torch.device(device), overfit
        self.batch_size, self.seed, self.share = batch_size, seed, slice(rank, None, world)
        self.pinned = self.device.type == "cuda"
        near = images.train.device.type == self.device.type
        self.ahead = ahead if ahead is not None else 0 if near else 3
        self.waiting = {}  # step -> its rows, which the thread gathers or has gathered
        # or the thread would take memory on the first GPU
        enter = dict(initializer=torch.cuda.set_device, initargs=(self.device,)) if self.pinned else {}
        self.thread = ThreadPoolExecutor(1, "feed", **enter)

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
    paired_path: folder of damaged images with the names of dataset's, see folders.partners and folders.factor_of.
    limit: at most so many images a split, evenly spread (of shapes the first ones).
    crop: "center" cuts and resizes each image; "random", for folders, keeps photographs at their own size to take crops
    of, from anywhere in training and from the middle else.
    Of the images left out a warning names the first and Images.left_out all. Raises SettingsError.
    """
    name, decoding = "cifar10" if dataset is None else dataset, Decoding(side, channels, crop)
    if crop == "random" and (name in WITH_THE_CLONE or name in DOWNLOADS and not DOWNLOADS[name].files):
        raise SettingsError(f"crop = random: allowed is center for {name}; random is for folders of photographs")
    if paired_path is not None and name in (*WITH_THE_CLONE, *DOWNLOADS):
        raise DatasetError(f"paired_path = {paired_path}: name the folder of its partners as dataset, not {name}")
    try:
        if name == "demo":
            return _demo(decoding, limit)
        if name == "shapes":
            return _draw(decoding, limit)
        images = (_download(name, decoding, data_path, limit) if name in DOWNLOADS else
                  _folder(name, decoding, data_path, paired_path, limit))
    except DatasetError as failure:
        if dataset is not None or not or_demo:
            raise
        print("*" * 100, f"No CIFAR-10: {failure}", "This demo runs on sixteen photographs that come with it instead; "
              "--dataset FOLDER takes your own images.", "*" * 100, sep="\n")
        return _demo(decoding, limit)
    except MemoryError as error:
        raise SettingsError(f"image_size = {side}: too little memory for the images of {name}; lower it") from error
    if images.left_out:
        warnings.warn(f"{name}: {len(images.left_out)} images are left out, which a run lists in left_out.txt: "
                      f"{first_few(images.left_out, 3)}")
    return images


def _demo(decoding: Decoding, limit: int | None) -> Images:
    """The photographs in images/demo, which are the test images too: they are there to be overfitted."""
    paths = _spread(sorted((Path(__file__).parent / "demo").glob("*.png")), limit)
    x = _resize(np.stack([np.asarray(Image.open(path)) for path in paths]), decoding)
    return Images(x, x, None, None, [], name="demo")


def _draw(decoding: Decoding, limit: int | None) -> Images:
    """The data set `shapes`."""
    count = 11_000 if limit is None else min(limit, 10_000) + min(limit, 1_000)
    check_room(decoding, count, free_memory(), "memory")
    (train, y), (test, test_y) = (draw_shapes(count, seed, decoding.side, decoding.channels, limit)
                                  for seed, count in enumerate((10_000, 1_000)))
    return Images(train, test, y, test_y, list(SHAPES), name="shapes")


def _spread(items, limit: int | None):
    """At most `limit` of the items, evenly spread."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


# ------------------------------------------------------------------------------------------------------------- files

def _folder(dataset: str, decoding: Decoding, data_path: str, paired_path: str | None, limit: int | None) -> Images:
    root = user_path(dataset)
    if not dataset or not os.path.isdir(root):
        raise DatasetError(f"dataset = {dataset}: is not a folder; name one, or "
                           f"{', '.join([*DOWNLOADS, *WITH_THE_CLONE])}")
    names, left_out, paired, pairs = list_images(root), [], None, {}
    if paired_path is not None:
        paired = user_path(paired_path)
        pairs, left_out = partners(root, names, paired)
        names = sorted(pairs)
    train, test, label = split_names(names)
    left_out += [f"{root / name}: is neither in the folder of training images nor in that of test images"
                 for name in set(names).difference(train, test)]
    here = os.path.realpath(root)
    images = _packed(os.path.basename(here), here, train, test, decoding, data_path, limit, paired, pairs)
    images.left_out = sorted(left_out + images.left_out)
    labels = {label[name] for name in train + test}
    if None not in labels and len(labels) > 1:
        images.classes = sorted(labels)
        images.train_y, images.test_y = (torch.tensor([images.classes.index(label[name]) for name in names])
                                         for names in (images.train_names, images.test_names))
    return images


def _packed(name: str, root: str, train: list[str], test: list[str], decoding: Decoding, data_path: str,
            limit: int | None, paired: Path | None = None, pairs: dict[str, str] | None = None) -> Images:
    """Images of the files `train` and `test`, paths below root, out of their pack. pairs: for each the path below
    `paired` of its damaged partner."""
    train, test = _spread(train, limit), _spread(test, limit)
    names, damaged_root = [*train, *test], paired and os.path.realpath(paired)
    files = [(f"{root}/{name}", f"{damaged_root}/{pairs[name]}") if paired else (f"{root}/{name}",) for name in names]
    # by their real paths, so that it is the same pack by whatever way one comes to the folder
    index, clean, damaged = open_pack(name, [root, damaged_root, limit], files, decoding, data_path)
    left_out, factors = dict(index["left_out"]), dict(index["factors"])
    used = [names[row] for row in range(len(names)) if row not in left_out]
    count = sum(row not in left_out for row in range(len(train)))  # training images that could be read
    if not count or paired and 2 * count < len(train):  # most pairs are no pairs: the other folder is another's
        raise DatasetError(f"{damaged_root or root}: only {count} of {len(train)} training images can be used; check "
                           f"these: {first_few(left_out.values(), 3)}")
    least, most = min(factors), max(factors)
    if least < most:
        raise DatasetError(f"{factors[most]}: is {most} times smaller than its partner, but {factors[least]} {least} "
                           "times; make it the same number for all")
    if count == len(used):
        warnings.warn(f"{root}: no image is left to hold out, so the training images are the test images too")
    held_out = slice(count if count < len(used) else 0, None)
    train_lo, test_lo = (damaged[:count], damaged[held_out]) if paired else (None, None)
    return Images(clean[:count], clean[held_out], None, None, [], train_lo, test_lo, name, [*left_out.values()],
                  used[:count], used[held_out], most)


def _download(name: str, decoding: Decoding, data_path: str, limit: int | None) -> Images:
    from torchvision import datasets  # a second to import

    download = DOWNLOADS[name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with redirect_stdout(io.StringIO()):  # the progress bar is still seen: it goes to stderr
            train, test = (getattr(datasets, download.kind)(data_path, download=True, **which)
                           for which in (download.train, download.test))
    except OUR_FAULTS:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"[:160]
        raise DatasetError(f"dataset = {name}: is not in {data_path}, or not whole, and can't be downloaded "
                           f"({reason}); {download.by_hand.format(data_path)}; or take --dataset shapes or a "
                           "folder") from error
    finally:
        socket.setdefaulttimeout(before)
    if download.files:  # CelebA has 40 attributes and 10,000 identities, but no classes
        folder = os.path.realpath(Path(train.root) / download.files)
        return _packed(name, folder, train.filename, test.filename, decoding, data_path, limit)
    rows, test_rows = (_spread(range(len(part)), limit) for part in (train, test))
    check_room(decoding, len(rows) + len(test_rows), free_memory(), "memory")
    (x, y), (test_x, test_y) = (
        (_resize(np.asarray(part.data)[rows], decoding), torch.as_tensor(part.targets)[rows])
        for part, rows in ((train, list(rows)), (test, list(test_rows))))
    return Images(x, test_x, y, test_y, list(train.classes), name=name)


def _resize(pixels: np.ndarray, decoding: Decoding) -> Tensor:
    """(N, h, w[, 3]) uint8 -> (N, channels, side, side). A side of 28 (Fashion-MNIST) gets a black margin up to 32."""
    side, channels = decoding.side, decoding.channels
    if pixels.shape[1] == 28 < side <= 32:
        margin = (side - 28) // 2, (side - 27) // 2
        pixels = np.pad(pixels, ((0, 0), margin, margin))
    if pixels.shape[1] == side and pixels.ndim == (4 if channels == 3 else 3):
        return torch.from_numpy(pixels.reshape(-1, side, side, channels).transpose(0, 3, 1, 2).copy())
    mode = "RGB" if channels == 3 else "L"
    return torch.stack([to_tensor(fit(Image.fromarray(picture).convert(mode), side)) for picture in pixels])
