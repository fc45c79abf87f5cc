"""Large images go in tiles, without a seam and at no more network evaluations."""
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from methods.i2sb import I2SB
from networks import Spy
from pixels import photo
from sample import open_model
from unet import Tiled, windows
from untrained import METHODS, make_run


class Local(torch.nn.Module):
    """Looks `reach` pixels far, at x, t, y and cond; its output is `upscale` times as large, as a Unet's."""

    def __init__(self, reach=2, upscale=1):
        super().__init__()
        self.upscale, self.num_classes, self.most = upscale, 5, 0
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(4, 3 * upscale**2, 2 * reach + 1, padding=reach)

    def forward(self, x, t, y=None, cond=None):
        self.most = max(self.most, len(x))
        out = self.conv(torch.cat([x, cond], 1)) * (1 + t + y)[:, None, None, None]
        return F.pixel_shuffle(out, self.upscale)


@pytest.mark.parametrize("sides, shrunk, upscale, reach", [
    ((48, 64), 1, 1, 2), ((16, 80), 1, 1, 4), ((64, 32), 2, 2, 2), ((96, 64), 4, 2, 1)])
def test_tiles_give_what_one_piece_gives(sides, shrunk, upscale, reach):
    net, (height, width) = Local(reach, upscale), (side // shrunk for side in sides)
    x, cond = torch.randn(2, 3, height, width), torch.randn(2, 1, height, width)
    t, y = torch.tensor([0.2, 0.7]), torch.tensor([3, 1])
    with torch.no_grad():
        whole, tiled = net(x, t, y, cond), Tiled(net, sides[0], 32, 8, 4)
        net.most = 0
        torch.testing.assert_close(tiled(x, t, y, cond), whole, atol=1e-5, rtol=1e-5)
    assert net.most == 4  # tiles at a time, and not one piece


@pytest.mark.parametrize("side, tile, align", [
    (100, 20, 1), (160, 32, 16), (72, 32, 8), (24, 32, 8), (65, 32, 1), (16, 4, 2)])
def test_tiles_cover_the_image_and_count_one_in_all(side, tile, align):
    total, full = torch.zeros(side), min(tile, side)
    tiles = windows(side, tile, align)
    for where, weights in tiles:
        assert where.start % align == 0 and where.stop - where.start == len(weights) == full and weights.min() >= 0
        total[where] += weights
    torch.testing.assert_close(total, torch.ones(side))
    for (a, v), (b, w) in pairwise(tiles):
        assert a.stop - b.start >= 3 * tile // 8 and not v[tile - tile // 8:].any() | w[:tile // 8].any()


def test_no_seam_where_tiles_disagree():
    def net(x, t, y, cond):
        return x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:])

    x = torch.zeros(1, 1, 64, 256)
    x[..., 128:] = 1
    out = Tiled(Spy(net), 64, 64, 1, 64)(x, torch.zeros(1))
    assert out[..., 0, 0].item() == 0 and out[..., -1].mean() == 1  # tiles differ by up to 40/64 ...
    assert out.diff(dim=3).abs().max() < 40 / 64 * 1.6 / 8  # ... and a smooth step over 8 pixels is at most 1.5/8 steep


def test_much_larger_images_go_in_tiles_at_no_more_nfe(tmp_path):
    path = make_run(tmp_path / "run", method="i2sb", i2sb=I2SB(n=4), task="blur")
    for side in (32, 33):  # one piece up to twice the side trained on
        made = []
        for how in (dict(), dict(batch_size=1), dict(tile=0)):
            model = open_model(path, **how)
            made.append(np.asarray(model.restore(Image.fromarray(photo(side, 20)))).astype(int))
            assert model.rows == 4 and made[-1].shape == (20, side, 3)
        tiles, few, whole = made
        assert abs(tiles - few).max() <= 1 and (abs(tiles - whole).max() > 1) == (side > 32)


@pytest.mark.parametrize("tile", [None, 5])
def test_tiles_of_whole_jpeg_blocks_have_no_gap(tmp_path, tile):
    path = make_run(tmp_path / "run", identity=True, task="jpeg", image_size=16)  # a block's side: tiles overlap anyway
    made = open_model(path, tile=tile).restore(Image.fromarray(photo(70, 37)))
    np.testing.assert_array_equal(np.asarray(made), photo(70, 37))


def test_udpm_takes_any_sides(tmp_path):
    model = open_model(make_run(tmp_path / "run", method="udpm", task="blur", **METHODS["udpm"]))
    images = [Image.fromarray(photo(*sides)) for sides in ((13, 21), (7, 70), (1, 1))]
    assert [made.size for made in model.restore(images)] == [image.size for image in images]


def test_strips_and_single_pixels_are_restored_in_bf16_too(tmp_path):
    settings = dict(solver="midpoint", sample_steps=1, unet_dim_mults=(1, 2, 2), precision="bf16")
    model = open_model(make_run(tmp_path / "run", **settings))
    for width, height in ((1, 900), (500, 1), (1, 1), (2, 3)):  # none is refused as not finite
        assert model.restore(Image.fromarray(photo(width, height))).size == (2 * width, 2 * height)
