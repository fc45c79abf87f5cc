"""The data set `shapes`: drawings of ten classes that need no download."""
import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from images.pictures import to_uint8

SHAPES = ["disc", "ring", "square", "triangle", "star", "cross", "moon", "stripes", "checks", "waves"]


def draw_shapes(count: int, seed: int, side: int, channels: int, limit: int | None) -> tuple[Tensor, Tensor]:
    """(N, C, side, side) uint8 and labels (N,): the first `limit` of `count` drawings, the same for any limit."""
    random = torch.rand(count, 17, generator=torch.Generator().manual_seed(seed))[:limit]
    y = torch.arange(len(random)) % len(SHAPES)
    x = torch.empty(len(random), channels, side, side, dtype=torch.uint8)
    for label, shape in enumerate(SHAPES):
        for rows in (y == label).nonzero()[:, 0].split(max(1, 2**13 // side**2)):  # few enough for the cache
            x[rows] = to_uint8(paint(shape, random[rows], side, channels))
    return x, y


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """(B, H, W) signed distance to the shape's edge, negative inside; x, y in its own axes, where its radius is 1."""
    def stripes(v, period):  # the edges of bars half a period wide
        return ((v / period) % 1 - 0.5).abs().sub(0.25) * period

    r = (x * x + y * y).sqrt()
    if shape == "disc":
        return r - 0.9
    if shape == "ring":
        return (r - 0.75).abs() - 0.22
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.78
    if shape == "triangle":
        return torch.maximum(-y, (y + math.sqrt(3) * x.abs()) / 2) - 0.55
    if shape == "cross":
        return torch.maximum(torch.minimum(x.abs(), y.abs()) - 0.28, torch.maximum(x.abs(), y.abs()) - 0.95)
    if shape == "moon":
        return torch.maximum(r - 0.95, 0.78 - ((x - 0.42) ** 2 + y * y).sqrt())
    if shape == "star":  # fold the plane onto one of ten wedges: the edge is the line from a tip to the notch beside it
        wedge = torch.pi / 5
        angle = (torch.atan2(y, x) % (2 * wedge) - wedge).abs()  # 0 at a notch, `wedge` at a tip
        u, v = r * angle.cos(), r * angle.sin()
        edge = complex(math.cos(wedge), math.sin(wedge)) * 1.1 - 0.48
        return ((u - 0.48) * edge.imag - v * edge.real) / abs(edge)
    if shape == "stripes":
        return stripes(y, 0.8)
    if shape == "checks":
        a, b = stripes(x, 1.1), stripes(y, 1.1)
        return torch.where((a < 0) == (b < 0), -1, 1) * torch.minimum(a.abs(), b.abs())
    assert shape == "waves"
    return stripes(y + 0.28 * torch.sin(3.5 * x), 0.9) / (1 + (0.98 * torch.cos(3.5 * x)) ** 2).sqrt()


def paint(shape: str, random: Tensor, side: int, channels: int, oversample: int = 2) -> Tensor:
    """random (B, 17) in [0, 1) -> (B, C, side, side) in [-1, 1]: a textured, outlined shape on a textured ground."""
    u = iter(random.T[:, :, None, None])  # each next(u) is (B, 1, 1)
    n, pixel = side * oversample, 2 / side
    gx = ((torch.arange(n) + 0.5) / n * 2 - 1).expand(1, n, n)
    gy = gx.transpose(1, 2)

    def turned(angle):
        return gx * angle.cos() + gy * angle.sin(), gy * angle.cos() - gx * angle.sin()

    def texture():  # stripes or a weave in [-1, 1], their period from 3.5 pixels to a fifth of the side
        a, b = turned(next(u) * torch.pi)
        wave = 2 * torch.pi / (pixel * 3.5 * max(side / 17.5, 1) ** next(u))
        weave = (next(u) < 0.5).float()
        return (torch.sin(a * wave) + weave * torch.sin(b * wave)) / (1 + weave)

    def colour(hue, light):  # (B, 1, 1) -> (B, 3, 1, 1), a saturated colour of mean `light`
        shift = torch.tensor([0, 1 / 3, 2 / 3]).view(3, 1, 1)
        return light[:, None] + 0.3 * torch.cos(2 * torch.pi * (hue[:, None] - shift))

    def painted(hue, light, shade):
        return colour(hue, light) + ((0.05 + 0.13 * next(u)) * texture() + shade * gy)[:, None]

    size = 0.5 + 0.3 * next(u)
    x, y = turned(next(u) * 2 * torch.pi)
    cx, cy = ((next(u) - 0.5) * 0.5 for _ in range(2))
    d = signed_distance(shape, x / size - cx, y / size - cy) * size
    sub = pixel / oversample
    inside = (0.5 - d / sub).clamp(0, 1)
    line = (0.5 - (d.abs() - (0.4 + 0.5 * next(u)) * pixel) / sub).clamp(0, 1)

    hue, dark = next(u), (next(u) < 0.5).float()  # ground and shape far apart in hue and in lightness
    ground = painted(hue, 0.68 - 0.4 * dark, 0.15)
    filling = painted(hue + 0.3 + 0.4 * next(u), 0.3 + 0.4 * dark, -0.15)
    image = torch.lerp(ground, filling, inside[:, None])
    image = torch.lerp(image, (next(u) < 0.5).float()[:, None], line[:, None])  # outlined in black or white
    image = avg_pool2d(image.clamp(0, 1), oversample)
    if channels == 1:
        image = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    return image * 2 - 1
