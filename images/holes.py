"""The holes of the task `inpaint`."""
import math

import torch
from torch import Tensor

FREEFORM = {"freeform-10-20": (0.1, 0.2), "freeform-20-30": (0.2, 0.3)}  # least and largest share of the pixels


def center(z1: Tensor) -> Tensor:
    """The rectangle of half the height and half the width in the middle -> (B, 1, H, W), 1 in it."""
    height, width = z1.shape[2:]
    hole = torch.zeros_like(z1[:, :1])
    hole[:, :, height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = 1
    return hole


def freeform(z1: Tensor, least: float, most: float, draws, strokes=4, bends=6) -> Tensor:
    """Brush strokes -> (B, 1, H, W), 1 on them, over a share of the pixels uniform between `least` and `most`.

    A stroke is the set of points within some distance of a polyline, whose vertices walk at random and are folded back
    at the image's edges. That distance follows from the share: the pixels are ranked by their distance from the
    polylines, and the nearest ones are taken. draws: an images.corruptions.Draws.
    """
    (batch, _, height, width), device = z1.shape, z1.device

    def rand(*shape):
        return draws.rand(z1, strokes, *shape)

    heading = 2 * math.pi * rand(1) + (2 * (rand(bends) - 0.5)).cumsum(-1)
    step = 0.05 + 0.2 * rand(bends)
    x = torch.cat((rand(1), step * heading.cos()), -1).cumsum(-1)  # (B, strokes, bends + 1) in image widths
    y = torch.cat((rand(1), step * heading.sin()), -1).cumsum(-1)
    x, y = width * (1 - (x % 2 - 1).abs()), height * (1 - (y % 2 - 1).abs())
    thickness, away = 0.5 + rand(), 1e6 * (rand() < 0.5)
    away[:, :2] = 0  # two strokes always, and each further one in half of the images

    py = torch.arange(height, device=device).view(1, -1, 1) + 0.5
    px = torch.arange(width, device=device).view(1, 1, -1) + 0.5
    distance = torch.full((batch, height, width), math.inf, device=device)
    for s in range(strokes):
        for k in range(bends):
            x0, y0, dx, dy = (p[:, s, k, None, None] for p in (x[..., :-1], y[..., :-1], x.diff(), y.diff()))
            along = (((px - x0) * dx + (py - y0) * dy) / (dx**2 + dy**2 + 1e-8)).clamp(0, 1)
            near = torch.hypot(px - x0 - along * dx, py - y0 - along * dy) / thickness[:, s, None, None]
            distance = torch.minimum(distance, near + away[:, s, None, None])
    rank = distance.flatten(1).argsort(1).argsort(1)
    pixels = height * width
    count = draws.randint(math.ceil(least * pixels), math.floor(most * pixels) + 1, z1, 1)
    return (rank < count).view(batch, 1, height, width).to(z1.dtype)
