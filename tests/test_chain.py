"""The task chain: each of its steps against PIL, scipy or a formula, and how often it happens."""
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from images.chain import BICUBIC, blur, chain, resize, shifted_jpeg
from images.corruptions import Damage, Draws
from test_corruptions import libjpeg, photos, to_z

PIL_FILTERS = (Image.BOX, Image.BILINEAR, Image.BICUBIC, Image.LANCZOS)  # in the order of images.chain.FILTERS
VISIBLE = dict(chain_blur=(1, 2.5), chain_quality=(30, 60))  # steps that are seen unless they are skipped


def to_levels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


def to_arrays(levels: torch.Tensor) -> np.ndarray:
    return levels.permute(0, 2, 3, 1).double().numpy()


def damaged(levels: torch.Tensor, seed=0, skips=(0, 0, 0, 0), noise=(5, 15), **piece) -> torch.Tensor:
    damage = Damage(**VISIBLE, chain_noise=noise, chain_skips=skips, chain_untouched=0)
    return chain(levels, damage, Draws(torch.Generator().manual_seed(seed), **piece))


@pytest.mark.parametrize("size", [(96, 64), (37, 95)])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_each_image_is_resized_as_pil_does_with_its_filter(size, factor):
    images, small = photos(4, *size), (round(size[0] / factor), round(size[1] / factor))
    ours = to_arrays(resize(to_levels(images), small, torch.arange(4)))
    larger = to_arrays(resize(to_levels(ours), size, BICUBIC))
    for image, mine, enlarged, filter in zip(images, ours, larger, PIL_FILTERS, strict=True):
        error = np.abs(mine - np.asarray(Image.fromarray(image).resize(small[::-1], filter)))
        assert error.max() <= 1 and error.mean() < 0.02, filter
        assert np.abs(enlarged - Image.fromarray(mine.astype(np.uint8)).resize(size[::-1], Image.BICUBIC)).max() <= 1


def test_a_round_blur_is_scipys():
    images = photos(3, 40, 56)
    for sigma in (0.0, 1.0, 2.5):
        ours = to_arrays(blur(to_levels(images), *torch.tensor([sigma, sigma, 1.0]), reach=10))
        exact = scipy.ndimage.gaussian_filter(images.astype(float), sigma, axes=(1, 2), mode="mirror", truncate=6)
        assert np.abs(ours - exact).mean() < 0.26 and np.abs(ours - exact).max() < 0.75  # rounding alone: 0.25, 0.5


def test_a_blur_that_is_not_round_dampens_waves_by_the_gaussians_formula():
    y, x = torch.arange(64.0)[:, None], torch.arange(64.0)
    angle = math.atan2(3, 4)  # of the longer axis: 4 across, 3 down
    for fy, fx in ((0.0, 0.5), (0.5, 0.0), (0.3, 0.4), (-0.4, 0.3)):
        wave = (127 + 120 * torch.cos(fy * y + fx * x))[None, None]
        made = blur(wave, *torch.tensor([2.0, 0.5, angle]), reach=10)[..., 16:48, 16:48]
        along, across = 0.8 * fx + 0.6 * fy, 0.8 * fy - 0.6 * fx
        gain = math.exp(-((2.0 * along) ** 2 + (0.5 * across) ** 2) / 2)
        assert torch.allclose(made, 127 + gain * (wave[..., 16:48, 16:48] - 127), atol=0.6)


def test_a_shifted_jpeg_is_pils_of_a_larger_picture_that_is_cropped():
    images, shift = photos(4, 33, 48), torch.tensor([[0, 0], [3, 0], [5, 12], [15, 8]])
    ours = to_arrays(shifted_jpeg(to_levels(images), torch.full((4,), 40), shift))
    for image, mine, (down, right) in zip(images, ours, shift.tolist()):
        larger = np.pad(image, ((down, 15 - down), (right, 15 - right), (0, 0)), mode="edge")
        pil = np.asarray(libjpeg(Image.fromarray(larger), 40)).astype(float)[down : down + 33, right : right + 48]
        assert ((mine - pil) ** 2).mean() < ((image - pil) ** 2).mean() / 20


@pytest.mark.parametrize("skips, untouched, share", [
    ((0.3, 1, 1, 1), 0, 0.3), ((1, 0.3, 1, 1), 0, 0.3), ((1, 1, 0.3, 1), 0, 0.3), ((1, 1, 1, 0.3), 0, 0.3),
    ((0, 0, 0, 0), 0.1, 0.1),
])
def test_each_step_alone_is_skipped_by_its_share_and_a_tenth_is_untouched_to_the_bit(skips, untouched, share):
    torch.manual_seed(0)
    z1 = to_z(photos(1, 16, 16)).repeat(300, 1, 1, 1)
    damage = Damage(**VISIBLE, chain_noise=(5, 15), chain_skips=skips, chain_untouched=untouched)
    same = (damage("chain", z1).zlo == z1).flatten(1).all(1)
    assert abs(int(same.sum()) - 300 * share) < 4 * (300 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("level", [60.0, 200.0])
def test_noise_has_the_strength_that_was_drawn(level):
    noise = damaged(torch.full((200, 3, 32, 32), level), skips=(1, 1, 0, 1), noise=(8, 8)) - level
    strengths, counts = noise.std((1, 2, 3)), 8 * math.sqrt(level / 127.5)  # the second is Poisson's
    poisson = (strengths - 8).abs() > (strengths - counts).abs()
    assert (strengths / torch.where(poisson, counts, 8) - 1).abs().max() < 0.1 and abs(noise.mean()) < 0.1
    grey = (noise[:, 0] == noise[:, 2]).flatten(1).all(1)
    assert 60 < poisson.sum() < 140 and 60 < grey.sum() < 140
    together = (noise[~grey][:, 0] * noise[~grey][:, 1]).mean() / noise[~grey].var()
    assert abs(together) < 0.02  # noise in colour is another one in each channel


@pytest.mark.parametrize("size, channels", [((64, 64), 1), ((37, 50), 3), ((3, 5), 3), ((1, 1), 1)])
def test_any_sides_give_whole_levels_and_a_seed_the_same_ones_in_any_piece_of_a_batch(size, channels):
    levels = to_levels(photos(12, 64, 64))[:, :channels, : size[0], : size[1]].contiguous()
    made = [damaged(levels, seed) for seed in (5, 5, 6)]
    assert made[0].shape == levels.shape and made[0].dtype == torch.float32
    assert torch.equal(made[0], made[0].round()) and made[0].min() >= 0 and made[0].max() <= 255
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert torch.equal(damaged(levels[3:5], 5, rows=(slice(3, 5),), total=12), made[0][3:5])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(damaged(levels, 5), made[0])
