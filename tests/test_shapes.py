"""Drawn shapes against closed forms, and what makes them worth restoring."""
import math

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from images import shapes
from images.data import load
from images.pictures import psnr, to_float


def lens(r, s, d):
    """Area that discs of radius r and s, d apart, have in common."""
    a, b = math.acos((d * d + r * r - s * s) / (2 * d * r)), math.acos((d * d + s * s - r * r) / (2 * d * s))
    return r * r * (a - math.sin(2 * a) / 2) + s * s * (b - math.sin(2 * b) / 2)


AREAS = {"disc": math.pi * 0.9**2, "ring": math.pi * (0.97**2 - 0.53**2), "square": 1.56**2,
         "triangle": 3 * math.sqrt(3) * 0.55**2, "star": 5 * 1.1 * 0.48 * math.sin(math.pi / 5),
         "cross": 2 * 1.9 * 0.56 - 0.56**2, "moon": math.pi * 0.95**2 - lens(0.95, 0.78, 0.42),
         "stripes": 17.6**2 / 2, "checks": 17.6**2 / 2, "waves": None}


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_distances(shape):
    """The area inside is the shape's, and |grad d| = 1 near its edge but for creases: d is a distance there."""
    n, half = (1600, 8.8) if shape in ("stripes", "checks") else (800, 1.8)  # whole periods of the patterns
    y, x = torch.meshgrid(*[((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1) * half] * 2, indexing="ij")
    d, h = shapes.signed_distance(shape, x[None], y[None])[0], 2 * half / n
    if AREAS[shape]:
        assert (d < 0).double().mean() * (2 * half) ** 2 == pytest.approx(AREAS[shape], rel=5e-3)
    slope = torch.hypot(*torch.gradient(d, spacing=h))
    near = d.abs() < 0.05
    assert ((slope[near] - 1).abs() < 0.06).double().mean() > 0.9


def test_shapes_are_the_same_every_time_and_differ_by_class():
    one = load("shapes", 32, limit=60)
    torch.manual_seed(5)
    two = load("shapes", 32, limit=100)
    assert torch.equal(one.train, two.train[:60]) and torch.equal(one.test_y, two.test_y[:60])
    assert two.train_y.bincount().tolist() == [10] * 10 and len(two.classes) == 10
    assert len(torch.cat([two.train, two.test]).flatten(1).unique(dim=0)) == 200  # no test image is a training image
    assert len(shapes.draw_shapes(5, 0, 8, 1, 10**20)[0]) == 5
    grey = load("shapes", 32, channels=1, limit=100).train.float()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert (grey - (two.train.float() * weights).sum(1, keepdim=True)).abs().max() <= 1.01
    random = torch.rand(1, 17)  # the same colours, place and textures: the class alone makes the difference
    drawn = torch.cat([shapes.paint(shape, random, 32, 3) for shape in shapes.SHAPES])
    assert (torch.cdist(drawn.flatten(1), drawn.flatten(1)) / drawn[0].numel() ** 0.5 + torch.eye(10)).min() > 0.1


def test_outline_has_its_width():
    """White ink less black shows the outline alone: it covers the annulus that its width in pixels makes."""
    random = torch.full((2, 17), 0.5)
    random[:, -1] = torch.tensor([0.4, 0.6])
    white, black = shapes.paint("disc", random, 64, 3)
    covered = ((white - black) / 2).mean(0).sum().item()
    assert covered == pytest.approx(2 * math.pi * (0.9 * 0.65 * 32) * 1.3, rel=0.03)


def test_shapes_are_antialiased_and_have_detail():
    random = torch.rand(4, 17)
    for shape in shapes.SHAPES:
        fine = shapes.paint(shape, random, 32, 3, oversample=8)
        assert (shapes.paint(shape, random, 32, 3) - fine).square().mean().sqrt() < 0.05, shape
    x = to_float(load("shapes", 32, limit=200).train)
    low = interpolate(avg_pool2d(x, 2), scale_factor=2, mode="bicubic").clamp(-1, 1)
    assert 15 < psnr(low, x) < 26  # CIFAR-10 has 23 to 24: there is something to restore
