"""Packs: image files decoded once, into raw arrays on disk that every later start maps, and batches gathered from them.

Mapped memory is the system's cache of the file: all processes share it, and what is not in use is given up when memory
is short, so a file may be far larger than the memory. A pack is a folder, data_path/packs/NAME-KEY, which may be
deleted at any time: the next start makes it again. It holds

    clean.u8    the pixels, (N, C, side, side) uint8; for --crop random whole photographs (C, H, W), one after the other
    damaged.u8  the same of their damaged partners, where the files are pairs
    shapes.npy  (N, 2): H and W of each photograph, for --crop random only
    index.json  written last: `stamp` tells what the pack was made of, `sizes` and `sums` the lengths and CRC-32s of its
                files, `left_out` the place in the list of each image that could not be used, and why, `factors` how
                many times smaller damaged files are, and one that is
"""
import ctypes
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from errno import EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from images import DatasetError, SettingsError, one_line
from images.files import cover, fit, open_image, user_path
from images.folders import factor_of
from support.disk import no_link, read_json, write_atomically

COLUMNS = "clean.u8", "damaged.u8"
VERSION = 3  # of the layout and of what a file becomes in it: raise it when one of them changes
CHECK_UP_TO = 8e9  # bytes of a pack whose checksums are looked at when it is opened; of a larger one the lengths alone
AT_A_TIME = 32  # files that are decoded before their pixels are written
LONGEST = 100  # times as long as wide
LASTING = (ENOENT, ELOOP, EACCES, EPERM, ENOTDIR, EISDIR, ENAMETOOLONG)  # failures that trying again does not mend
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python has a name for from 3.13 on


@dataclass(frozen=True)
class Decoding:
    """How a file's picture is kept: `center` its middle square of `side` pixels, `random` whole, for crops of it."""

    side: int
    channels: int
    crop: str = "center"


@dataclass
class Photos:
    """Images that stay on disk, of any size. photos[index] gives centre crops, photos[begin:end] fewer Photos."""

    flat: Tensor  # (bytes,) uint8: (C, H, W) of each photograph
    start: Tensor  # (N,) int64: where they begin in it
    sizes: Tensor  # (N, 2) int64: H, W, neither below `side`
    channels: int
    side: int
    device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self.channels, self.side, self.side

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows):
        if isinstance(rows, slice):
            return replace(self, start=self.start[rows], sizes=self.sizes[rows])
        return gather_rows(self, rows)

    def crops(self, index: Tensor, crop_corners: Tensor | None) -> list[Tensor]:
        """Views (C, side, side) into the photographs `index` (B,). crop_corners: see `gather_rows`."""
        s, views, start, sizes = self.side, [], self.start[index], self.sizes[index]
        room = sizes - s  # (B, 2): how far down and to the right a crop can lie
        corners = room // 2 if crop_corners is None else (crop_corners * (room + 1)).long()
        for begin, (h, w), (top, left) in zip(start.tolist(), sizes.tolist(), corners.tolist()):
            photo = self.flat[begin:begin + self.channels * h * w].view(self.channels, h, w)
            views.append(photo[:, top:top + s, left:left + s])
        return views


def gather_rows(images: Tensor | Photos, index: Tensor, crop_corners: Tensor | None = None,
                pinned: bool = False) -> Tensor:
    """Rows `index` (B,) -> (B, C, side, side) uint8, on the images' device. pinned: in memory that a GPU copies from.

    crop_corners: (B, 2) in [0, 1), where in each photograph its crop lies, downwards and to the right; None: in the
    middle.
    """
    if images.device.type != "cpu":
        return images[index]
    views = (images.crops(index, crop_corners) if isinstance(images, Photos) else
             [images[row] for row in index.tolist()])
    for view in views:
        prefetch(view)
    out = torch.empty(len(views), *images.shape[1:], dtype=torch.uint8, pin_memory=pinned)
    for row, view in zip(out.numpy(), views):
        row[:] = view.numpy()  # by numpy: torch's copy is 30 times slower when other processes use the cores
    return out


def prefetch(picture: Tensor):
    """Has the disk fetch a part of a mapped file, (C, H, W) uint8. Told of a whole batch, it does not fetch one page
    after the other: nine times as many images per second from a cold disk."""
    for plane in picture if LIBC else ():
        begin = plane.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        end = plane[-1, -1:].data_ptr() + 1
        LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_WILLNEED)


def map_file(path: Path) -> Tensor:
    """The file's content, (bytes,) uint8. Whoever writes to it changes a copy of his own, never the file."""
    if not os.path.getsize(path):
        return torch.empty(0, dtype=torch.uint8)
    how = dict(access=mmap.ACCESS_COPY)
    if LIBC:  # without NO_RESERVE Linux refuses to map more than there is memory
        how = dict(flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with open(path, "rb") as f:
        return torch.from_numpy(np.frombuffer(mmap.mmap(f.fileno(), 0, **how), np.uint8))


def _column(folder: Path, name: str, decoding: Decoding) -> Tensor | Photos:
    flat = map_file(folder / name)
    if decoding.crop == "center":
        return flat.view(-1, decoding.channels, decoding.side, decoding.side)
    shapes = torch.from_numpy(np.load(folder / "shapes.npy"))
    lengths = shapes.prod(1) * decoding.channels
    return Photos(flat, lengths.cumsum(0) - lengths, shapes, decoding.channels, decoding.side)


def open_pack(name: str, source: list, files: list[tuple[str, ...]], decoding: Decoding, data_path: str) -> tuple:
    """The pack's index, its clean images, and their damaged partners or None: a row for each file that could be used.

    Made first unless there is a whole one of exactly these files, each (path,) or (clean path, damaged path): the same
    by path, size, permissions and time of change. It lies where name, source and decoding tell, and replaces what else
    lies there. Raises SettingsError where a file can't be read at the moment, or the pack can't be written.
    """
    key = hashlib.sha256(json.dumps([source, asdict(decoding)]).encode()).hexdigest()[:10]
    folder = user_path(data_path) / "packs" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:60]}-{key}"
    stamp = dict(version=VERSION, decoding=asdict(decoding), digest=_digest(files))
    try:
        index = _read_index(folder, stamp)
        if index is None:
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(folder):  # another process may have made it meanwhile
                index = _read_index(folder, stamp) or _make(folder, stamp, files, decoding)
        return index, *(_column(folder, name, decoding) if name in index["sizes"] else None for name in COLUMNS)
    except OSError as error:
        raise SettingsError(f"data_path = {data_path}: the pack of {folder.name} can't be written there "
                            f"({one_line(error)}); name a folder with room for it") from error


def _read_index(folder: Path, stamp: dict) -> dict | None:
    """What index.json says, or None where there is no whole pack of this stamp."""
    try:
        index = read_json(folder / "index.json")
        sizes, sums = index["sizes"], index["sums"]
        if index["stamp"] != stamp or any(os.path.getsize(folder / name) != size for name, size in sizes.items()):
            return None
        if sum(sizes.values()) <= CHECK_UP_TO and any(checksum(folder / name) != sums[name] for name in sizes):
            warnings.warn(f"{folder} was changed or damaged, and is made again")
            return None
        return index
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def checksum(path: Path) -> int:
    """The CRC-32 of a file's content. A processor core takes a second for a gigabyte, or less."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            total = zlib.crc32(block, total)
    return total


def _digest(files: list[tuple[str, ...]]) -> str:
    """Of the paths, sizes, permissions and times of change of all files."""
    total = hashlib.sha256()
    for path in chain.from_iterable(files):
        known = None  # of a link that leads nowhere: reading it will tell
        with suppress(OSError):
            stat = os.stat(path)
            known = stat.st_size, stat.st_mode, stat.st_mtime_ns
        total.update(repr((path, known)).encode())
    return total.hexdigest()


@contextmanager
def _lock(folder: Path):
    """One process packs, and others wait for it. A disk that knows no locks is used without."""
    with open(folder / ".lock", "w", opener=no_link) as file:
        with suppress(ImportError, OSError):
            import fcntl  # not on Windows
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that packs {folder}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, stamp: dict, files: list[tuple[str, ...]], decoding: Decoding) -> dict:
    """Decodes the files, in their order, onto the ends of the columns -> the index."""
    def clear():
        for old in folder.iterdir():  # removed, not written over: a run may still be reading it
            if old.name != ".lock":
                old.unlink()

    clear()
    names = list(COLUMNS[:len(files[0])])
    if decoding.crop == "center":  # how large photographs are shows on the way
        check_room(decoding, len(files) * len(names), shutil.disk_usage(folder).free, f"disk in {folder}")
    left_out, factors, shapes, sums = [], {}, [], [0] * len(names)
    bar = tqdm(_decode_all(files, decoding), f"packing {folder.name}", len(files), leave=False, unit="image", delay=1,
               mininterval=0.1 if sys.stderr.isatty() else 15)
    try:
        with ExitStack() as stack:
            columns = [stack.enter_context(open(folder / name, "xb")) for name in names]
            for row, (pictures, factor, failure) in enumerate(bar):
                if failure:
                    left_out.append((row, failure))
                    continue
                for i, (column, picture) in enumerate(zip(columns, pictures)):
                    column.write(picture)
                    sums[i] = zlib.crc32(picture, sums[i])
                shapes.append(pictures[0].shape[1:])
                factors.setdefault(factor, files[row][-1])
            for column in columns:
                column.flush()
                os.fsync(column.fileno())  # first the columns, then what says that they are whole
        if decoding.crop == "random":
            names.append("shapes.npy")
            rows = np.array(shapes, np.int64).reshape(-1, 2)
            write_atomically(folder / "shapes.npy", lambda f: np.save(f, rows))
            sums.append(checksum(folder / "shapes.npy"))
        index = dict(stamp=stamp, sizes={name: os.path.getsize(folder / name) for name in names},
                     sums=dict(zip(names, sums)), left_out=left_out, factors=list(factors.items()))
        write_atomically(folder / "index.json", lambda f: f.write(json.dumps(index).encode()))
        return index
    except BaseException:
        clear()
        raise


def check_room(decoding: Decoding, count: int, free: int | None, where: str):
    """SettingsError where `count` images need more than the `free` bytes, if these are known."""
    size = count * decoding.channels * decoding.side**2
    if free is not None and size > free:
        raise SettingsError(f"image_size = {decoding.side}: {count:,} images need {size / 1e9:,.1f} GB of {where}, "
                            f"where {free / 1e9:,.1f} GB are free; lower image_size, or take fewer images")


def _decode_all(files: list[tuple[str, ...]], decoding: Decoding) -> Iterator[tuple[list[np.ndarray], int, str]]:
    """`_decode` of each, in the files' order."""
    with ThreadPoolExecutor(min(16, os.cpu_count())) as pool:
        for begin in range(0, len(files), AT_A_TIME):  # the pictures of all would fill the memory
            yield from pool.map(partial(_decode, decoding=decoding), files[begin:begin + AT_A_TIME])


def _decode(paths: tuple[str, ...], decoding: Decoding) -> tuple[list[np.ndarray], int, str]:
    """The pictures (C, H, W) uint8 of a clean file and its damaged partner, if it has one; how many times smaller the
    partner is; and a line that says why the files can't be used, "" where they can."""
    try:
        images = [open_image(path, decoding.channels) for path in paths]
        size = images[0].size
        factor = factor_of(size, images[-1].size, paths[-1])
    except DatasetError as error:
        failure = error.__cause__
        if isinstance(failure, OSError) and failure.errno not in (None, *LASTING):  # a pack without it would stay wrong
            raise SettingsError(f"{error}, or start again if the disk failed at the moment only") from error
        return [], 1, str(error)
    if max(size) > LONGEST * min(size):
        return [], 1, f"{paths[0]}: has {size[0]}x{size[1]} pixels, more than {LONGEST} times as long as wide; crop it"
    # a smaller partner is brought to the clean image's size, as sample.py does to a file for a run on pairs
    images = [image.resize(size, Image.Resampling.BICUBIC) for image in images]
    images = [(fit if decoding.crop == "center" else cover)(image, decoding.side) for image in images]
    # by numpy: torch would start all its threads in each of the pool's
    pictures = [np.ascontiguousarray(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)) for image in images]
    return pictures, factor, ""
