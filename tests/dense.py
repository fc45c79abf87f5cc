"""UDPM's operators as dense matrices, and the batches, toy network and draws that its tests share."""
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

import networks
from images.corruptions import Batch, Draws
from methods.udpm import UDPM

PLAIN = UDPM(lpips_weight=(0, 0, 0), disc_channels=8)


def dense_H(side: int) -> np.ndarray:
    """(side^2 / 4, side^2): taps 1/2 on each 2x2 block."""
    half = np.kron(np.eye(side // 2), [[1.0, 1.0]]) / 2**0.5
    return np.kron(half, half)


def dense_powers(side: int, times: int) -> list[np.ndarray]:
    """H^0 .. H^times on images of that side."""
    powers = [np.eye(side**2)]
    for k in range(times):
        powers.append(dense_H(side >> k) @ powers[-1])
    return powers


def flat(x: Tensor) -> np.ndarray:
    """(B, 1, H, W) -> (pixels, B)."""
    return x.flatten(1).double().numpy().T


def image(x: np.ndarray) -> Tensor:
    side = round(x.shape[0] ** 0.5)
    return torch.from_numpy(np.ascontiguousarray(x.T)).reshape(-1, 1, side, side)


def make_batch(task="generate", channels=1, **more) -> Batch:
    return networks.make_batch(task, channels=channels, **more)


class Toy(nn.Module):
    """A network with every argument in it, and a record of what it was given."""

    def __init__(self, channels=1):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.seen = []

    def forward(self, x, t, y=None, cond=None):
        self.seen.append((x, t, y, cond))
        return self.up(x) + t[:, None, None, None]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def at_level(level: int, batch: Batch) -> Batch:
    """The batch, of which a loss takes that level, with the noise of seeded()."""
    draws = Draws(seeded())
    draws.one = lambda low, high: {(1, 4): level}[low, high]
    return replace(batch, draws=draws)
