"""Packs: image files decoded once, into raw arrays on disk that every later start maps into its memory.

A pack is a folder, data_path/packs/NAME-KEY, which may be deleted at any time: the next start makes it again. It holds
columns and, written last, what says that they are whole:

    clean.u8    the pixels, (N, C, side, side) uint8; for --crop random whole photographs (C, H, W), one after the other
    damaged.u8  the same of their damaged partners, where the files are pairs
    sizes.i32   (N, 2) int32: H and W of each photograph, for --crop random only
    index.json  what the columns were made of, which files could not be used, and checksums of the columns
    sides.json  see splits.known_sides
"""
import hashlib
import json
import os
import re
import shutil
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from errno import EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from images import DatasetError, SettingsError, one_line
from images.files import cover, fit, open_image, user_path
from images.pairs import check_shape, factor_of
from images.photos import Blocks, Photos, checksums, map_file
from support.disk import parse_json, write_atomically

VERSION = 2  # of the layout and of what a file becomes in it: raise it when one of them changes
CHECK_AT_ONCE = 2**33  # bytes of a pack that are checked when it is opened; of a larger one each block when first read
IN_WORK = 2**26  # bytes of pixels that are decoded before they are written
TELL_EVERY = 15  # seconds of packing, where there is no progress bar
LONGEST = 100  # times as long as wide
LASTING = (ENOENT, ELOOP, EACCES, EPERM, ENOTDIR, EISDIR, ENAMETOOLONG)  # failures that trying again does not mend
PAUSES = (0.1, 1.0)  # seconds before a file that can't be read at the moment is tried again


@dataclass(frozen=True)
class Decoding:
    """How a file's picture is kept: `center` its middle square of `side` pixels, `random` whole, for crops of it."""

    side: int
    channels: int
    crop: str = "center"


@dataclass
class Index:
    """index.json."""

    stamp: dict  # what the pack is made of
    checksums: dict[str, list[int]]  # of each column: CRC-32 of each of its blocks
    sizes: dict[str, int]  # of each column: bytes
    left_out: list[tuple[int, str]]  # files that could not be used: place in the list, and a line that says why
    pairs: list[tuple]  # a pair for each factor that there is, as pair_factor takes them
    enlarged: int  # photographs with a side below that of the crops

    @classmethod
    def read(cls, folder: Path) -> "Index | None":
        """None where there is none, or one of an older layout. Raises ValueError for one that is damaged."""
        try:
            checksum, _, content = (folder / "index.json").read_bytes().partition(b"\n")
        except OSError:
            return None
        if checksum.startswith(b"{"):  # version 1
            return None
        if checksum != b"%d" % zlib.crc32(content):
            raise ValueError("index.json")
        try:
            return cls(**parse_json(content))
        except (ValueError, TypeError):
            raise ValueError("index.json") from None

    def write(self, folder: Path):
        content = json.dumps(asdict(self)).encode()
        write_atomically(folder / "index.json", lambda f: f.write(b"%d\n" % zlib.crc32(content) + content))


@dataclass
class Pack:
    clean: Tensor | Photos  # a row for each file used
    damaged: Tensor | Photos | None  # their partners, where the files are pairs
    used: np.ndarray  # places in the list of the files that could be used
    index: Index

    @property
    def left_out(self) -> list[str]:
        """Of each other file: which one it is, and why it is left out."""
        return sorted(line for _, line in self.index.left_out)


def pack_folder(name: str, decoding: Decoding, data_path: str, source: list) -> Path:
    """Where the pack of the source's files lies. Raises SettingsError."""
    key = hashlib.sha256(json.dumps([source, asdict(decoding)]).encode()).hexdigest()[:10]
    return user_path(data_path) / "packs" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:60]}-{key}"


def open_pack(folder: Path, files: list[tuple[str, str | None]], decoding: Decoding) -> Pack:
    """The pack of the files (clean, damaged or None), made first unless there is one of exactly these.

    Files are the same by path, size, permissions and time of change. Any other pack in `folder` is replaced, and so is
    one that is damaged, under a warning.
    Raises DatasetError for pairs that do not fit each other and for a file that can't be read at the moment,
    SettingsError where the pack can't be written.
    """
    stamp = dict(version=VERSION, decoding=asdict(decoding), files=len(files), digest=_digest(files))
    try:
        if pack := _open(folder, stamp):
            return pack
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if pack := _open(folder, stamp):  # another process has made it meanwhile
                return pack
            _make(folder, stamp, files, decoding)
            return _open(folder, stamp, check=False)
    except OSError as error:
        raise SettingsError(f"data_path = {folder.parent.parent}: the pack of {folder.name} can't be written there "
                            f"({error.strerror or one_line(error)}); name a folder with room for it") from error


def _open(folder: Path, stamp: dict, check: bool = True) -> Pack | None:
    """None where there is no pack of this stamp, or a damaged one, of which a warning tells."""
    try:
        index = Index.read(folder)
        if index is None or index.stamp != stamp:
            return None
        at_once, columns = sum(index.sizes.values()) <= CHECK_AT_ONCE, {}
        for name, size in index.sizes.items():
            if not (folder / name).is_file() or os.path.getsize(folder / name) != size:
                raise ValueError(name)
            content = map_file(folder / name)
            if check and (at_once or name == "sizes.i32") and checksums(content) != index.checksums[name]:
                raise ValueError(name)
            columns[name] = content, Blocks(folder / name, content, index.checksums[name], good=at_once or not check)
    except ValueError as error:
        warnings.warn(f"{folder}: {error} is damaged, so the images are packed again")
        return None
    decoding = Decoding(**stamp["decoding"])
    used = np.delete(np.arange(stamp["files"]), [row for row, _ in index.left_out])
    sizes = None
    if decoding.crop == "random":
        sizes = torch.from_numpy(columns["sizes.i32"][0].view(np.int32)).view(-1, 2)
    elif not at_once:
        sizes = torch.full((len(used), 2), decoding.side, dtype=torch.int32)
    clean, damaged = (_column(*columns[name], sizes, decoding) if name in columns else None
                      for name in ("clean.u8", "damaged.u8"))
    return Pack(clean, damaged, used, index)


def _column(content: np.ndarray, blocks: Blocks, sizes: Tensor | None, decoding: Decoding) -> Tensor | Photos:
    flat = torch.from_numpy(content)
    if sizes is None:
        return flat.view(-1, decoding.channels, decoding.side, decoding.side)
    lengths = sizes.long().prod(1) * decoding.channels
    return Photos(flat, lengths.cumsum(0) - lengths, sizes, decoding.channels, decoding.side, blocks)


def _digest(files: list[tuple[str, str | None]]) -> str:
    """Of the paths, sizes, permissions and times of change of all files."""
    total = hashlib.sha256()
    for path in (path for pair in files for path in pair if path):
        try:
            stat = os.stat(path)
            known = stat.st_size, stat.st_mode, stat.st_mtime_ns
        except OSError:  # a link that leads nowhere: reading it will tell
            known = None
        total.update(repr((path, known)).encode())
    return total.hexdigest()


# ------------------------------------------------------------------------------------------------------------- packing

@contextmanager
def _lock(folder: Path):
    """One process packs, and others wait for it. A disk that knows no locks is used without."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0))
    try:
        try:
            import fcntl  # not on Windows
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that packs {folder}", flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield
    finally:
        os.close(handle)


def _make(folder: Path, stamp: dict, files: list[tuple[str, str | None]], decoding: Decoding):
    """Decodes the files, in their order, onto the ends of the columns. What a killed process left is made again."""
    for old in folder.iterdir():  # removed, not written over: a run may still be reading it
        if old.name not in (".lock", "sides.json"):
            old.unlink()
    names = [name for name, path in zip(("clean.u8", "damaged.u8"), files[0]) if path]
    _check_room(folder, len(files) * len(names), decoding)
    if decoding.crop == "random":
        names.append("sizes.i32")
    index = Index(stamp, {}, {}, [], [], 0)
    try:
        with ExitStack() as stack:
            columns = [stack.enter_context(open(folder / name, "xb")) for name in names]
            _decode_all(files, decoding, columns, index, f"packing {folder.name}")
            for column in columns:
                column.flush()
                os.fsync(column.fileno())  # first the columns, then what says that they are whole
        for name in names:
            content = map_file(folder / name)
            index.sizes[name], index.checksums[name] = len(content), checksums(content)
        index.write(folder)
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        raise


def _decode_all(files: list[tuple[str, str | None]], decoding: Decoding, columns: list, index: Index, title: str):
    factors, done = set(), 0
    told = started = time.monotonic()
    some = max(32, IN_WORK // (decoding.channels * decoding.side**2)) if decoding.crop == "center" else 32
    with (ThreadPoolExecutor(min(16, os.cpu_count())) as pool,
          tqdm(total=len(files), desc=title, unit="image", disable=None, delay=1, leave=False) as bar):
        for begin in range(0, len(files), some):  # the pictures of all would fill the memory
            for pictures, sizes, reason in pool.map(partial(_decode, decoding=decoding), files[begin:begin + some]):
                if reason:
                    index.left_out.append((done, reason))
                for column, pixels in zip(columns, pictures):
                    column.write(pixels)
                if pictures and decoding.crop == "random":
                    columns[-1].write(np.array(pictures[0].shape[1:], np.int32))
                    index.enlarged += min(sizes[0]) < decoding.side
                if len(sizes) == 2 and factor_of(*sizes) not in factors:
                    factors.add(factor_of(*sizes))
                    index.pairs.append((*sizes, files[done][1]))
                done += 1
                bar.update()
                if bar.disable and time.monotonic() > told + TELL_EVERY:
                    told = time.monotonic()
                    rate = done / (told - started)
                    print(f"{title}: {done:,} of {len(files):,} images, {rate:,.0f} per second", flush=True)


def _check_room(folder: Path, count: int, decoding: Decoding):
    """SettingsError where the disk has no room for `count` images. How large photographs are shows on the way."""
    size, free = count * decoding.channels * decoding.side**2, shutil.disk_usage(folder).free
    if decoding.crop == "center" and size > free:
        raise SettingsError(f"image_size = {decoding.side}: {count:,} images need {size / 1e9:,.1f} GB of disk, and "
                            f"{free / 1e9:,.1f} GB are free in {folder}; lower image_size, or name another data_path")


def _decode(paths: tuple[str, str | None], decoding: Decoding) -> tuple[list[np.ndarray], list[tuple], str | None]:
    """A file, or a pair -> its pictures (C, H, W), the files' (width, height), and why it is left out, if it is."""
    try:
        images = [_open_patiently(path, decoding.channels) for path in paths if path]
    except DatasetError as error:
        return [], [], one_line(error)
    sizes = [image.size for image in images]
    for path, (width, height) in zip(paths, sizes):
        if max(width, height) > LONGEST * min(width, height):
            return [], [], f"{path}: its sides are {width}x{height}, more than {LONGEST} times as long as wide; crop it"
    if len(sizes) == 2:
        try:
            check_shape(*sizes, paths[1])
        except DatasetError as error:
            return [], [], one_line(error)
    # a smaller partner is brought to the clean image's size, as sample.py does to a file for a run on pairs
    return [_pixels(image.resize(sizes[0], Image.Resampling.BICUBIC), decoding) for image in images], sizes, None


def _open_patiently(path: str, channels: int) -> Image.Image:
    """open_image, which is tried again where the disk or the system fails at the moment.

    Raises DatasetError for a file that can't be used, SettingsError where the failure stays: such a file is no worse
    than others, so a pack without it would be wrong for ever.
    """
    for pause in (*PAUSES, None):
        try:
            return open_image(path, channels)
        except DatasetError as error:
            failure = error.__cause__
            if not isinstance(failure, OSError) or failure.errno in (None, *LASTING):
                raise
            if pause is None:
                raise SettingsError(f"{path}: can't be read at the moment ({failure.strerror}); start again, and "
                                    "remove the file if that does not help") from error
            time.sleep(pause)


def _pixels(image: Image.Image, decoding: Decoding) -> np.ndarray:
    """(C, H, W) uint8. By numpy: torch would start all its threads in each of the pool's."""
    image = fit(image, decoding.side) if decoding.crop == "center" else cover(image, decoding.side)
    return np.ascontiguousarray(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1))
