"""Images that stay on disk: files mapped into memory, and batches gathered from them.

Mapped memory is the system's cache of the file: it is read when it is touched, all processes share it, and what is not
in use is given up when memory is short, so a file may be far larger than the memory.
"""
import ctypes
import mmap
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python has a name for from 3.13 on


def map_file(path: Path) -> Tensor:
    """The file's content, (bytes,) uint8. Whoever writes to it changes a copy of his own, never the file."""
    if not os.path.getsize(path):
        return torch.empty(0, dtype=torch.uint8)
    how = dict(access=mmap.ACCESS_COPY)
    if LIBC:  # without NO_RESERVE Linux refuses to map more than there is memory
        how = dict(flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with open(path, "rb") as f:
        return torch.from_numpy(np.frombuffer(mmap.mmap(f.fileno(), 0, **how), np.uint8))


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
