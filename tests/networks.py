"""Networks that know the answer, by each paper's own formulas, and batches to ask them about."""
import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from images.corruptions import Batch
from methods.edm import EDM
from methods.i2sb import BETA_MIN, I2SB
from methods.interpolant import Interpolant
from methods.regression import Regression
from methods.sr3 import SR3
from methods.udpm import UDPM
from ode_int import solve


class Spy:
    """A function net(x, t, y, cond) with what unet.Network has beside its call. It remembers what it was given."""

    num_classes, upscale = 0, 1

    def __init__(self, function):
        self.function, self.seen = function, []

    def __call__(self, x, t, y=None, cond=None):
        self.seen.append((x.detach().clone(), t.detach().clone(), y, cond))
        return self.function(x, t, y, cond)


def make_batch(task="restore", size=2, channels=2, side=8, y=None, dtype=torch.float32) -> Batch:
    """restore: all pixels are made, seeing zlo; inpaint: a random half of them; generate: nothing is seen."""
    generator = torch.Generator().manual_seed(3)
    z1 = torch.rand(size, channels, side, side, generator=generator).to(dtype) * 1.8 - 0.9
    ones = torch.ones(size, 1, side, side, dtype=dtype)
    if task == "generate":
        return Batch(z1, 0 * z1, ones, ones, None, y)
    if task == "restore":
        zlo = (z1 + 0.3 * torch.randn(z1.shape, generator=generator)).clamp(-1, 1)
        return Batch(z1, zlo, ones, 0 * ones, zlo, y)
    hole = (torch.rand(ones.shape, generator=generator) < 0.5).to(dtype)
    zlo = z1 * (1 - hole)
    return Batch(z1, zlo, hole, hole, torch.cat([zlo, hole], dim=1), y)


def sample_by(method, solver, steps, net, batch: Batch, trace=None, seed=4) -> Tensor:
    """By the method's own sampler where no solver is named."""
    torch.manual_seed(seed)
    if solver is None:
        return method.sample(net, batch, steps, trace)
    return solve(method.velocity(net, batch), solver, steps, trace=trace)


@cache
def s2_table(method: I2SB) -> np.ndarray:
    """I2SB's variances from the definition, one interval after another."""
    low, high = BETA_MIN**0.5, (method.beta_max / method.n) ** 0.5
    i = np.arange(method.n)
    from_end = np.minimum(i, i[::-1])
    return np.append(0, np.cumsum((low + (high - low) * from_end / (method.n - 1)) ** 2))


def s2_at(method: I2SB, t: Tensor) -> Tensor:
    """s2 at the network's times k/n, also between two of the table's."""
    k = t.double().numpy() * method.n
    k = np.where(abs(k - k.round()) < 1e-4, k.round(), k)  # t is float32
    return torch.from_numpy(np.interp(k, np.arange(method.n + 1), s2_table(method)))


def curve(path: str, t: Tensor):
    """alpha, beta, alpha', beta' of the interpolant."""
    if path == "linear":
        return 1 - t, t, 0 * t - 1, 0 * t + 1
    a = math.pi * t / 2
    return a.cos(), a.sin(), -math.pi / 2 * a.sin(), math.pi / 2 * a.cos()


def path(method, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, std of x = a z1 + b zlo + std noise, which the network sees at its time t, where pixels are to be made and
    zlo is known; float64, of t's shape."""
    t = t.double()
    match method:
        case Interpolant():
            alpha, beta, _, _ = curve(method.path, t)
            return beta, alpha * (method.coupling == "dependent"), method.sigma * alpha
        case SR3():
            return t.sqrt(), 0 * t, (1 - t).sqrt()
        case EDM():
            sigma = (4 * t).exp()
            size = (sigma**2 + method.sigma_data**2).sqrt()
            return 1 / size, 0 * t, sigma / size
        case I2SB():
            s2 = s2_at(method, t)
            u = s2 / s2_table(method)[-1]
            return 1 - u, u, (s2 * (1 - u)).sqrt() * (not method.ot_ode)
        case Regression():
            return 0 * t, 0 * t + 1, 0 * t


def answer(method, x: Tensor, t: Tensor, z1) -> Tensor:
    """The output, in x's type, of a network that sees x (B, C, H, W) at t (B,) and takes z1 for the clean image."""
    time = t.double()[:, None, None, None]
    match method:
        case Interpolant():
            alpha, beta, d_alpha, d_beta = curve(method.path, time)
            out = d_alpha * (x - beta * z1) / alpha + d_beta * z1
        case SR3():
            out = (x - time.sqrt() * z1) / (1 - time).sqrt()
        case EDM():
            sigma, sd = (4 * time).exp(), method.sigma_data
            total = (sigma**2 + sd**2).sqrt()
            out = (z1 - sd**2 / total**2 * x * total) * total / (sigma * sd)
        case I2SB():
            out = (x - z1) / s2_at(method, t).sqrt()[:, None, None, None]
        case UDPM():
            level = round(t[0].item() * method.levels + 0.5)
            out = F.avg_pool2d(z1, 2 ** (level - 1))
        case Regression():
            out = z1 - x
    return out.to(x.dtype)


def oracle(method, z1: Tensor):
    return lambda x, t, y, cond: answer(method, x, t, z1)


def expected(method, x: Tensor, t: Tensor, mean, cov) -> Tensor:
    """E[z1 | x], float64, where each pixel's (z1, zlo) is normal with this mean and this ((v1, c), (c, v0))."""
    a, b, std = (c.view(-1, 1, 1, 1) for c in path(method, t))
    (v1, c), (_, v0) = cov
    var = a**2 * v1 + 2 * a * b * c + b**2 * v0 + std**2
    return mean[0] + (a * v1 + b * c) / var.clamp(min=1e-30) * (x.double() - a * mean[0] - b * mean[1])


def gaussian(method, mean, cov):
    """The exact network for such data."""
    return lambda x, t, y, cond: answer(method, x, t, expected(method, x, t, mean, cov))


def wiggly(x, t, y, cond):
    """Any smooth network, of all its inputs."""
    out = 1.5 * (x + t[:, None, None, None]).sin()
    out = out if y is None else out + 0.1 * y[:, None, None, None]
    return out if cond is None else out + 0.3 * cond[:, :2] * x
