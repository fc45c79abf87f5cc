"""Packs: image files decoded once, into raw arrays on disk that every later start maps into its memory.

A pack is a folder, data_path/packs/NAME-KEY, which may be deleted at any time: the next start makes it again. It holds

    clean.u8    the pixels, (N, C, side, side) uint8; for --crop random whole photographs (C, H, W), one after the other
    damaged.u8  the same of their damaged partners, where the files are pairs
    sizes.i32   (N, 2) int32: H and W of each photograph, for --crop random only
    index.json  what the arrays were made of, which files could not be used, and how many files are done

Mapped memory is the system's cache of the file: it is read when it is touched, all processes share it, and what is not
in use is given up when memory is short, so a pack may be far larger than the memory.
"""
import ctypes
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from images import DatasetError, SettingsError, one_line
from images.files import cover, fit, open_image
from images.pairs import check_shape, factor_of
from support.disk import write_atomically

VERSION = 1  # of the arrays' layout and of what `fit` and `cover` make of a file: raise it when one of them changes
RECORD_EVERY = 15  # seconds of packing that a kill can cost
BLOCK = 2**20  # bytes of pixels that a thread decodes at a time
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Form:
    """How a file's picture is kept: `center` its middle square of `side` pixels, `random` whole, for crops of it."""

    side: int
    channels: int
    crop: str = "center"


@dataclass
class Photos:
    """Photographs of any size that stay on disk. Indexed as a tensor of images would be, it gives their middles."""

    flat: Tensor  # (bytes,) uint8: (C, H, W) of each photograph
    start: Tensor  # (N,) int64: where they begin in it
    sizes: Tensor  # (N, 2) int32: H, W, neither below `side`
    channels: int
    side: int
    device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self.channels, self.side, self.side

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows):
        """Of a slice: those Photos. Of an index (B,): their middle crops (B, C, side, side)."""
        if isinstance(rows, slice):
            return Photos(self.flat, self.start[rows], self.sizes[rows], self.channels, self.side)
        return take(self, rows)

    def crops(self, index: Tensor, places: Tensor | None) -> list[Tensor]:
        """Views (C, side, side) into the photographs `index` (B,). places: see `take`."""
        s, views = self.side, []
        room = self.sizes[index].long() - s  # (B, 2): how far down and to the right a crop can lie
        corners = room // 2 if places is None else (places * (room + 1)).long()
        for begin, (h, w), (top, left) in zip(self.start[index].tolist(), self.sizes[index].tolist(), corners.tolist()):
            photo = self.flat[begin:begin + self.channels * h * w].view(self.channels, h, w)
            views.append(photo[:, top:top + s, left:left + s])
        return views


@dataclass
class Pack:
    clean: Tensor | Photos  # a row for each file kept
    damaged: Tensor | Photos | None  # their partners, where the files are pairs
    kept: np.ndarray  # places in the list of the files that could be used
    left_out: dict[int, str]  # place of each other file: a line that says which one it is, and why it is left out
    pairs: list[tuple]  # a pair for each factor that there is, as pair_factor takes them


# ------------------------------------------------------------------------------------------------------------- reading

def take(images: Tensor | Photos, index: Tensor, places: Tensor | None = None, pinned: bool = False) -> Tensor:
    """Rows `index` (B,) -> (B, C, side, side) uint8, on the images' device. pinned: in memory that a GPU copies from.

    places: (B, 2) in [0, 1), where in each photograph its crop lies, downwards and to the right; None: in the middle.

    Numpy copies, for on a busy machine torch's threads, which wait for the slowest of them, take thirty times as long.
    """
    if images.device.type != "cpu":
        return images[index]
    views = images.crops(index, places) if isinstance(images, Photos) else [images[row] for row in index.tolist()]
    for view in views:
        prefetch(view)
    out = torch.empty(len(views), *images.shape[1:], dtype=torch.uint8, pin_memory=pinned)
    for row, view in zip(out.numpy(), views):
        row[:] = view.numpy()
    return out


def prefetch(picture: Tensor):
    """Lets the disk fetch a part of a mapped file meanwhile, (C, H, W) uint8. Told of a whole batch, it has much to do
    at a time, where it would fetch one page after the other: nine times as many images a second from a cold disk."""
    if LIBC:
        for plane in [picture.view(1, -1)] if picture.is_contiguous() else picture:
            begin = plane.data_ptr()
            end = begin + (len(plane) - 1) * plane.stride(0) + plane.shape[1]
            begin -= begin % mmap.PAGESIZE
            LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_WILLNEED)


def _map(path: Path, dtype=np.uint8) -> Tensor:
    """The file's content as a tensor (n,) that is not to be written to: the system would end the program."""
    if not os.path.getsize(path):
        return torch.from_numpy(np.empty(0, dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        # not mode "c", of which Linux grants no more than there is memory
        return torch.from_numpy(np.memmap(path, dtype, mode="r"))


# ------------------------------------------------------------------------------------------------------------- packing

@dataclass
class Index:
    """index.json. The pack is whole when all files are done."""

    stamp: dict  # what the pack is made of
    done: int = 0  # files that were looked at, from the first one on
    size: dict[str, int] = field(default_factory=dict)  # bytes of each array that belong to them
    left_out: dict[int, str] = field(default_factory=dict)  # as in Pack
    factors: dict[int, tuple] = field(default_factory=dict)  # as in Pack.pairs, by their factor

    @classmethod
    def read(cls, folder: Path, stamp: dict) -> "Index":
        """An empty one where there is none, or one of other files."""
        try:
            index = cls(**json.loads((folder / "index.json").read_text()))
            index.left_out = {int(row): line for row, line in index.left_out.items()}  # JSON's keys are text
            index.factors = {int(factor): pair for factor, pair in index.factors.items()}
            whole = all(os.path.getsize(folder / name) >= size for name, size in index.size.items())
        except (OSError, ValueError, TypeError, AttributeError):
            return cls(stamp)
        return index if index.stamp == stamp and whole else cls(stamp)

    def write(self, folder: Path, arrays: dict):
        for name, file in arrays.items():
            file.flush()
            os.fsync(file.fileno())  # first the arrays, then what says so
            self.size[name] = file.tell()
        write_atomically(folder / "index.json", lambda f: f.write(json.dumps(asdict(self)).encode()))


def open_pack(files: list[tuple[str, str | None]], form: Form, name: str, data_path: str, source: list) -> Pack:
    """The pack of the files (clean, damaged or None), made first unless there is one of exactly these.

    Files are the same by path, size and time of change. A pack of the same name, form and source is replaced.
    Raises DatasetError for pairs that do not fit each other, SettingsError where the pack can't be written.
    """
    key = hashlib.sha256(json.dumps([source, asdict(form)]).encode()).hexdigest()[:10]
    folder = Path(data_path).expanduser() / "packs" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:60]}-{key}"
    stamp = dict(version=VERSION, form=asdict(form), files=len(files), digest=_digest(files))
    index = Index.read(folder, stamp)
    if index.done < len(files):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(folder):
                index = Index.read(folder, stamp)  # another process may have made it meanwhile
                if index.done < len(files):
                    _make(index, folder, files, form)
        except OSError as error:
            raise SettingsError(f"data_path = {data_path}: the pack of {name} can't be written there "
                                f"({error.strerror or one_line(error)}); name a folder with room for it") from error
    kept = np.delete(np.arange(len(files)), list(index.left_out))
    clean, damaged = (_open_column(folder, column, form) if f"{column}.u8" in index.size else None
                      for column in ("clean", "damaged"))
    return Pack(clean, damaged, kept, index.left_out, list(index.factors.values()))


def _open_column(folder: Path, column: str, form: Form) -> Tensor | Photos:
    flat = _map(folder / f"{column}.u8")
    if form.crop == "center":
        return flat.view(-1, form.channels, form.side, form.side)
    sizes = _map(folder / "sizes.i32", np.int32).view(-1, 2)
    lengths = sizes.long().prod(1) * form.channels
    return Photos(flat, lengths.cumsum(0) - lengths, sizes, form.channels, form.side)


def _digest(files: list[tuple[str, str | None]]) -> str:
    """Of the paths, sizes and times of change of all files."""
    total = hashlib.sha256()
    for path in (path for pair in files for path in pair if path):
        try:
            stat = os.stat(path)
            known = stat.st_size, stat.st_mtime_ns
        except OSError:  # a link that leads nowhere: reading it will tell
            known = None
        total.update(repr((path, known)).encode())
    return total.hexdigest()


@contextmanager
def _lock(folder: Path):
    """One process packs, and others wait for it. A disk that knows no locks is used without."""
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl  # not on Windows
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that packs {folder}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def _make(index: Index, folder: Path, files: list[tuple[str, str | None]], form: Form):
    """Decodes the files that `index` has not, in their order, onto the ends of the arrays."""
    if not index.done:
        for old in folder.iterdir():  # removed, not written over: a run may still be reading it
            if old.name != ".lock":
                old.unlink()
    columns = [f"{column}.u8" for column, path in zip(("clean", "damaged"), files[0]) if path]
    _check_room(folder, (len(files) - index.done) * len(columns), form)
    first, started = index.done, time.monotonic()
    recorded, title = started, f"packing {folder.name}"
    size = max(1, BLOCK // (form.channels * form.side**2)) if form.crop == "center" else 1  # files a block
    blocks = [files[i:i + size] for i in range(first, len(files), size)]
    with ExitStack() as stack:
        arrays = {}
        for name in [*columns, *(["sizes.i32"] if form.crop == "random" else [])]:
            arrays[name] = stack.enter_context(open(folder / name, "ab"))
            arrays[name].truncate(index.size.get(name, 0))  # what a killed process wrote after its last record
            arrays[name].seek(0, os.SEEK_END)
        bar = stack.enter_context(tqdm(total=len(files), initial=first, desc=title, unit="image", disable=None,
                                       delay=1, leave=False))
        pool = stack.enter_context(ThreadPoolExecutor(min(16, os.cpu_count())))
        for done in _in_order(pool, partial(_read_some, form=form), blocks):
            for pictures, pair, reason in done:
                if reason:
                    index.left_out[index.done] = reason
                for name, picture in zip(columns, pictures):
                    arrays[name].write(picture)
                if pictures and form.crop == "random":
                    arrays["sizes.i32"].write(np.array(pictures[0].shape[1:], np.int32))
                if pair:
                    index.factors.setdefault(factor_of(*pair[:2]), pair)
                index.done += 1
            bar.update(len(done))
            if time.monotonic() >= recorded + RECORD_EVERY:
                index.write(folder, arrays)
                recorded = time.monotonic()
                if bar.disable:
                    rate = (index.done - first) / (recorded - started)
                    print(f"{title}: {index.done:,} of {len(files):,} images, {rate:,.0f} a second", flush=True)
        index.write(folder, arrays)


def _check_room(folder: Path, count: int, form: Form):
    """SettingsError where the disk has no room for `count` more images. How large photographs are shows on the way."""
    size, free = count * form.channels * form.side**2, shutil.disk_usage(folder).free
    if form.crop == "center" and size > free:
        raise SettingsError(f"image_size = {form.side}: {count:,} images need {size / 1e9:,.1f} GB of disk, and "
                            f"{free / 1e9:,.1f} GB are free in {folder}; lower image_size, or name another data_path")


def _in_order(pool: ThreadPoolExecutor, work, items: list) -> Iterator:
    """work(item) of each, in their order. Few are in work at a time, for the results of all would fill the memory."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 32:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read_some(files: list[tuple[str, str | None]], form: Form) -> list[tuple]:
    """Of each file: its pictures, of a pair what pair_factor takes, and why it is left out, if it is."""
    done = []
    for path, partner in files:
        try:
            done.append((*_read(path, partner, form), None))
        except DatasetError as error:
            done.append(((), None, one_line(error)))
    return done


def _read(path: str, partner: str | None, form: Form) -> tuple[list[np.ndarray], tuple | None]:
    image = open_image(path, form.channels)
    if partner is None:
        return [_pixels(image, form)], None
    lo = open_image(partner, form.channels)
    check_shape(image.size, lo.size, partner)
    pair = image.size, lo.size, partner
    if lo.size != image.size:
        lo = lo.resize(image.size, Image.Resampling.BICUBIC)  # as files.enlarge does
    return [_pixels(image, form), _pixels(lo, form)], pair


def _pixels(image: Image.Image, form: Form) -> np.ndarray:
    """(C, H, W) uint8. By numpy: torch would start all its threads in each of the pool's."""
    image = fit(image, form.side) if form.crop == "center" else cover(image, form.side)
    return np.ascontiguousarray(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1))
