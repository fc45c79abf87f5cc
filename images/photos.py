"""Images that stay on disk: files mapped into memory, checksums of them, and batches gathered from them.

Mapped memory is the system's cache of the file: it is read when it is touched, all processes share it, and what is not
in use is given up when memory is short, so a file may be far larger than the memory. Whoever writes to it changes a
copy of his own, never the file.
"""
import ctypes
import mmap
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from images import DatasetError

BLOCK = 2**20  # bytes that have a checksum
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, which Python has a name for from 3.13 on


def map_file(path: Path, dtype=np.uint8) -> np.ndarray:
    """The file's content, (n,). What is written to the array changes a copy of the page: the file stays as it is."""
    if not os.path.getsize(path):
        return np.empty(0, dtype)
    with open(path, "rb") as f:
        if not LIBC:
            return np.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY), dtype)
        flags = mmap.MAP_PRIVATE | NO_RESERVE  # else Linux refuses to map more than there is memory
        return np.frombuffer(mmap.mmap(f.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE), dtype)


def checksums(content: np.ndarray) -> list[int]:
    """CRC-32 of each block of (bytes,) uint8. A core reads about a gigabyte per second."""
    with ThreadPoolExecutor(min(16, os.cpu_count())) as pool:
        return list(pool.map(zlib.crc32, (content[i:i + BLOCK] for i in range(0, len(content), BLOCK))))


class Blocks:
    """A column, each block of which is compared with its checksum when it is first read."""

    def __init__(self, path: Path, content: np.ndarray, checksums: list[int], good: bool):
        """content: (bytes,) uint8. good: whether all of it has been compared already."""
        self.path, self.content, self.checksums = path, content, checksums
        self.good = np.full(len(checksums), good)

    def check(self, begin: int, end: int):
        """Raises DatasetError where the bytes from `begin` to `end` are not those that were written."""
        for number in range(begin // BLOCK, -(-end // BLOCK)):
            if not self.good[number]:
                if zlib.crc32(self.content[number * BLOCK:(number + 1) * BLOCK]) != self.checksums[number]:
                    (self.path.parent / "index.json").unlink(missing_ok=True)
                    raise DatasetError(f"{self.path}: is damaged; start again, and the images are packed again")
                self.good[number] = True


@dataclass
class Photos:
    """Images that stay on disk, of any size. photos[index] gives centre crops, photos[begin:end] fewer Photos."""

    flat: Tensor  # (bytes,) uint8: (C, H, W) of each photograph
    start: Tensor  # (N,) int64: where they begin in it
    sizes: Tensor  # (N, 2) int32: H, W, neither below `side`
    channels: int
    side: int
    blocks: Blocks
    device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self.channels, self.side, self.side

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows):
        """Of a slice: those Photos. Of an index (B,): their centre crops (B, C, side, side)."""
        if isinstance(rows, slice):
            return Photos(self.flat, self.start[rows], self.sizes[rows], self.channels, self.side, self.blocks)
        return gather_rows(self, rows)

    def crops(self, index: Tensor, crop_corners: Tensor | None) -> list[Tensor]:
        """Views (C, side, side) into the photographs `index` (B,). crop_corners: see `gather_rows`."""
        s, views = self.side, []
        room = self.sizes[index].long() - s  # (B, 2): how far down and to the right a crop can lie
        corners = room // 2 if crop_corners is None else (crop_corners * (room + 1)).long()
        for begin, (h, w), (top, left) in zip(self.start[index].tolist(), self.sizes[index].tolist(), corners.tolist()):
            photo = self.flat[begin:begin + self.channels * h * w].view(self.channels, h, w)
            views.append(photo[:, top:top + s, left:left + s])
        return views

    def check(self, view: Tensor):
        """Raises DatasetError where a crop's bytes are not those that were written."""
        for plane in view:
            begin = plane.data_ptr() - self.flat.data_ptr()
            self.blocks.check(begin, begin + (self.side - 1) * plane.stride(0) + self.side)


def gather_rows(images: Tensor | Photos, index: Tensor, crop_corners: Tensor | None = None,
                pinned: bool = False) -> Tensor:
    """Rows `index` (B,) -> (B, C, side, side) uint8, on the images' device. pinned: in memory that a GPU copies from.

    crop_corners: (B, 2) in [0, 1), where in each photograph its crop lies, downwards and to the right; None: in the
    middle. Copied by numpy: torch's copy is 30 times slower when other processes use the cores.
    """
    if images.device.type != "cpu":
        return images[index]
    photos = isinstance(images, Photos)
    views = images.crops(index, crop_corners) if photos else [images[row] for row in index.tolist()]
    for view in views:
        prefetch(view)
    out = torch.empty(len(views), *images.shape[1:], dtype=torch.uint8, pin_memory=pinned)
    for row, view in zip(out.numpy(), views):
        if photos:
            images.check(view)
        row[:] = view.numpy()
    return out


def prefetch(picture: Tensor):
    """Lets the disk fetch a part of a mapped file meanwhile, (C, H, W) uint8. Told of a whole batch, it has much to do
    at a time, where it would fetch one page after the other: nine times as many images per second from a cold disk."""
    if not LIBC:
        return
    planes = picture.view(1, 1, -1) if picture.is_contiguous() else picture
    for plane in planes:
        begin = plane.data_ptr()
        end = begin + (len(plane) - 1) * plane.stride(0) + plane.shape[1]
        begin -= begin % mmap.PAGESIZE
        LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_WILLNEED)
