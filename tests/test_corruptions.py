"""The corruptions against PIL, libjpeg and scipy, and the invariants that methods rely on."""
import io
import math
import re

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from images import SettingsError, jpeg
from images.corruptions import TASKS, Damage, Draws, cond_channels, from_damaged, has_holes, to_full_size

MIXTURE = "sr,inpaint,blur,jpeg,generate"


def photos(count: int, height: int, width: int, seed=0) -> np.ndarray:
    """uint8 (count, height, width, 3) like photographs in what matters here: 1/f texture, colour, edges, clipping."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) + 1 / max(height, width)
    spectrum = np.fft.fft2(rng.standard_normal((count, 4, height, width))) / frequency
    texture = np.fft.ifft2(spectrum).real
    texture /= texture.std((2, 3), keepdims=True)
    x = 120 + 55 * texture[:, :1] + 25 * texture[:, 1:]
    for image in x:
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        image[:, top : top + height // 3, left : left + width // 3] = rng.integers(0, 256, (3, 1, 1))
    return x.round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def to_z(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_levels(z: torch.Tensor) -> np.ndarray:
    """-> float64 (B, H, W, C) in 0..255, not rounded"""
    return ((z.double() + 1) * 127.5).permute(0, 2, 3, 1).numpy()


def each(images: np.ndarray, function) -> np.ndarray:
    return np.stack([np.asarray(function(Image.fromarray(i))) for i in images]).astype(float)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Four like photographs, and four of noise."""
    return np.concatenate([photos(4, 48, 32), np.random.default_rng(1).integers(0, 256, (4, 48, 32, 3), np.uint8)])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_sr_box_is_pil_exactly(images, factor):
    pil = each(images, lambda i: i.resize((32 // factor, 48 // factor), Image.BOX).resize((32, 48), Image.BOX))
    assert np.abs(to_levels(Damage(factor=factor)("sr", to_z(images)).zlo) - pil).max() < 1e-3


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_sr_bicubic_is_pil_within_a_level(images, factor):
    lo = each(images, lambda i: i.resize((32 // factor, 48 // factor), Image.BICUBIC))
    error = np.abs(to_levels(Damage(factor=factor, down="bicubic")("sr", to_z(images)).zlo)[:, ::factor, ::factor] - lo)
    assert error.max() < 1 + 1e-3 and (error < 1e-3).mean() > 0.99
    hi = each(images, lambda i: i.resize((32 * factor, 48 * factor), Image.BICUBIC))
    error = np.abs(to_levels(to_full_size(to_z(images), factor, "bicubic")) - hi)
    assert error.max() < 2 + 1e-3 and (error < 1e-3).mean() > 0.995
    assert error[:4].max() < 1 + 1e-3  # at the border of noise PIL's fixed point misses exact halves


@pytest.mark.parametrize("up", ["nearest", "bicubic"])
@pytest.mark.parametrize("down", ["box", "bicubic"])
def test_a_low_resolution_file_enlarges_to_what_training_saw(down, up):
    images = photos(3, 32, 32)
    pil = {"box": Image.BOX, "bicubic": Image.BICUBIC}[down]
    lo = each(images, lambda i: i.resize((8, 8), pil)).astype(np.uint8)
    error = to_levels(to_full_size(to_z(lo), 4, up)) - to_levels(Damage(4, down, up)("sr", to_z(images)).zlo)
    assert np.abs(error).max() < 1 + 1e-3 and (np.abs(error) < 1e-3).mean() > 0.99


@pytest.mark.parametrize("damage, filter, knobs", [
    (Damage(), scipy.ndimage.uniform_filter, dict(size=9)),
    (Damage(taps=3), scipy.ndimage.uniform_filter, dict(size=3)),
    (Damage(kernel="gaussian"), scipy.ndimage.gaussian_filter, dict(sigma=10, radius=2)),
    (Damage(kernel="gaussian", sigma=1.5, taps=13), scipy.ndimage.gaussian_filter, dict(sigma=1.5, radius=6)),
    (Damage(kernel="gaussian", sigma=0.01, taps=31), scipy.ndimage.gaussian_filter, dict(sigma=0.01, radius=15)),
])
def test_blur_is_scipy_rounded(damage, filter, knobs):
    images = photos(3, 24, 40)
    exact = filter(images.astype(float), axes=(1, 2), mode="mirror", **knobs)
    assert np.abs(to_levels(damage("blur", to_z(images)).zlo) - exact).max() < 0.5 + 1e-3


@pytest.mark.parametrize("std", [5.0, (5.0, 20.0)])
def test_noise_is_gaussian_of_its_std_and_of_whole_levels(std):
    torch.manual_seed(0)
    grey = torch.full((400, 1, 32, 32), 1 / 255)
    levels = to_levels(Damage(std=std)("noise", grey).zlo)
    assert np.abs(levels - levels.round()).max() < 1e-3
    found = ((levels - 128) ** 2 - 1 / 12).mean((1, 2, 3)) ** 0.5  # rounding's own variance is 1/12
    low, high = (5, 5) if std == 5 else std
    assert abs(levels.mean() - 128) < 0.1 and low - 0.6 < found.min() and found.max() < high + 2
    assert abs(found.mean() - (low + high) / 2) < 0.8 and abs(found.std() - (high - low) / 12**0.5) < 0.4
    kurtosis = ((levels[:50] - 128) ** 4).mean((1, 2, 3)) / ((levels[:50] - 128) ** 2).mean((1, 2, 3)) ** 2
    assert abs(kurtosis.mean() - 3) < 0.1
    dark = to_levels(Damage()("noise", torch.full((4, 3, 8, 8), -1.0)).zlo)
    assert dark.min() == 0 and 10 < dark.max() < 100 and abs((dark == 0).mean() - 0.5) < 0.1


def test_blocks_and_factors_of_tasks_and_mixtures():
    damage = Damage(factor=(4, 2))
    assert [damage.block(task) for task in ("sr", "jpeg", "blur,noise", "sr,jpeg")] == [4, 16, 1, 16]
    assert damage.factors("sr", 1) == [2, 4] and damage.factors("jpeg,noise", 3) == [1]
    assert damage.factors("sr,jpeg", 1) == [1, 2, 4] and damage.factors("paired", 3) == [3]


def libjpeg(image: Image.Image, quality: int, subsampling: str = "4:2:0") -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=subsampling)
    return Image.open(file)


@pytest.mark.parametrize("size", [(64, 64), (37, 51), (48, 24), (17, 33)])
@pytest.mark.parametrize("kind", ["colour", "grey", "any second one 4:4:4"])
@pytest.mark.parametrize("quality", [5, 10, 50, 95])
def test_jpeg_is_libjpeg(size, kind, quality):
    images = photos(32, *size)[..., : 1 if kind == "grey" else 3]
    if kind == "any second one 4:4:4":
        halved = torch.arange(32).view(32, 1, 1, 1) % 2 == 0
        levels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        ours = jpeg.jpeg(levels, torch.full((32,), quality), halved).permute(0, 2, 3, 1).numpy()
        kinds = ["4:2:0", "4:4:4"] * 16
    else:
        ours, kinds = to_levels(Damage(quality=quality)("jpeg", to_z(images)).zlo), ["4:2:0"] * 32
    pil = [np.asarray(libjpeg(Image.fromarray(image.squeeze()), quality, kind)) for image, kind in zip(images, kinds)]
    pil = np.stack(pil).reshape(images.shape).astype(float)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        error, damage = (ours - pil)[rows], ((images - pil)[rows] ** 2).mean()
        assert (error**2).mean() < damage / (100 if quality < 95 else 15)
        assert (np.abs(error) < 1e-3).mean() > (0.95 if quality <= 10 else 0.75)
        for part in (error, error[:, :, -2:], error[:, -2:]):  # the last blocks are filled as in libjpeg
            assert np.abs(part).mean() < 0.4


def test_jpeg_steps_are_those_in_libjpeg_files():
    for quality in (1, 5, 10, 25, 49, 50, 51, 75, 95, 100):
        tables = libjpeg(Image.new("RGB", (8, 8)), quality).quantization
        dct, *steps = jpeg.tables(torch.device("cpu"))
        luma, chroma = (step[quality] for step in steps)
        assert luma.flatten().tolist() == tables[0] and chroma.flatten().tolist() == tables[1]
    assert torch.allclose(dct @ dct.mT, torch.eye(8), atol=1e-6)


@pytest.mark.parametrize("mask", ["center", "freeform-10-20", "freeform-20-30"])
def test_inpaint_hides_the_hole_and_nothing_else(mask):
    z1 = to_z(photos(4, 32, 40))
    batch = Damage(mask=mask)("inpaint", z1)
    hole = batch.unknown.expand_as(z1) == 1
    assert torch.equal(batch.zlo[~hole], z1[~hole]) and torch.equal(batch.zlo[hole], torch.zeros(int(hole.sum())))
    assert torch.equal(batch.to_make, batch.unknown) and set(batch.unknown.unique().tolist()) == {0.0, 1.0}
    torch.manual_seed(5)
    one = Damage(mask=mask)("inpaint", z1)
    torch.manual_seed(5)
    two = Damage(mask=mask)("inpaint", z1.masked_fill(one.unknown == 1, torch.nan))
    assert torch.equal(one.zlo, two.zlo)  # what is in the hole leaves no trace


def test_center_hole():
    hole = Damage()("inpaint", torch.zeros(2, 3, 16, 24)).unknown
    assert hole[:, :, 4:12, 6:18].min() == 1 and hole.mean() == 0.25


@pytest.mark.parametrize("mask, least, most", [("freeform-10-20", 0.1, 0.2), ("freeform-20-30", 0.2, 0.3)])
@pytest.mark.parametrize("size", [(48, 48), (16, 40), (9, 9)])
def test_freeform_share_and_strokes(mask, least, most, size):
    torch.manual_seed(0)
    hole = Damage(mask=mask)("inpaint", torch.zeros(256, 1, *size)).unknown
    share = hole.mean((1, 2, 3))
    assert share.min() >= least - 1e-6 and share.max() <= most + 1e-6
    assert abs(share.mean() - (least + most) / 2) < 0.01 and abs(share.std() - 0.1 / 12**0.5) < 0.006  # uniform
    if size == (48, 48):
        pieces = [scipy.ndimage.label(h, np.ones((3, 3)))[1] for h in hole[:, 0].numpy()]
        assert max(pieces) <= 4 and sum(pieces) > len(pieces)  # at most four strokes; mostly apart, not one blob
        assert (hole.mean(0) > 0).all() and (hole.mean(0) < 2 * most).all()  # anywhere in the image
        assert abs(hole.diff(dim=2).abs().mean() / hole.diff(dim=3).abs().mean() - 1) < 0.1  # in all directions


@pytest.mark.parametrize("task", (*TASKS, MIXTURE, "sr,paired", "generate,generate"))
@pytest.mark.parametrize("channels, condition", [(1, True), (3, True), (3, False)])
def test_batch(task, channels, condition):
    z1, y = to_z(photos(12, 32, 32))[:, :channels].contiguous(), torch.arange(12)
    pair = to_z(photos(12, 32, 32, seed=2))[:, :channels]
    batch = Damage(mask="freeform-20-30")(task, z1, y, condition, zlo=pair)
    assert batch.z1 is z1 and batch.y is y
    levels = to_levels(batch.zlo)
    holes = batch.unknown.expand_as(z1).permute(0, 2, 3, 1).numpy() == 1
    assert np.abs(levels - levels.round())[~holes].max(initial=0) < 1e-3  # a PNG would hold it
    assert batch.zlo.abs().max() <= 1 and (batch.zlo * batch.unknown).abs().max() == 0
    assert (batch.to_make >= batch.unknown).all()  # what is not known is made
    count = cond_channels(task, channels, condition)
    assert count == (0 if batch.cond is None else batch.cond.shape[1])
    if batch.cond is not None:
        assert torch.equal(batch.cond[:, :channels], batch.zlo)
        assert torch.equal(batch.cond[:, channels:], batch.unknown[:, : count - channels])
    # the same from damaged images alone
    if task != MIXTURE:
        again = from_damaged(task, batch.zlo, y, condition, batch.unknown if has_holes(task) else None)
        assert again.z1 is None
        for name in ("zlo", "to_make", "unknown", "cond", "y"):
            one, two = getattr(batch, name), getattr(again, name)
            assert one is two is None or torch.equal(one, two), name


def test_cond_channels():
    expected = dict(sr=3, blur=3, jpeg=3, paired=3, inpaint=4, generate=0)
    expected |= {"sr,jpeg": 3, "sr,generate": 4, "jpeg, inpaint": 4, "generate,generate": 0}
    assert {task: cond_channels(task, 3, True) for task in expected} == expected
    assert all(cond_channels(task, 3, False) == 0 for task in expected)


def test_mixture_draws_each_task_equally():
    torch.manual_seed(0)
    z1 = to_z(photos(1, 16, 16)).repeat(1000, 1, 1, 1)
    names = MIXTURE.split(",")
    alone = [Damage()(name, z1[:1]) for name in names]
    batch = Damage()(MIXTURE, z1)
    same = torch.stack([(batch.zlo == one.zlo).all((1, 2, 3)) for one in alone], 1)
    assert (same.sum(1) == 1).all()  # each image is one task's own result
    assert ((same.sum(0) - 200).abs() < 4 * (1000 * 0.2 * 0.8) ** 0.5).all()
    for chosen, one in zip(same.T, alone):
        assert (batch.unknown[chosen] == one.unknown).all() and (batch.to_make[chosen] == one.to_make).all()


@pytest.mark.parametrize("task, knob, several, values", [
    ("sr", "factor", (4, 2, 8), (2, 4, 8)), ("jpeg", "quality", (10, 14), range(10, 15)),
])
def test_of_several_values_each_image_draws_one(task, knob, several, values):
    torch.manual_seed(0)
    z1 = to_z(photos(500, 16, 16))
    made = Damage(**{knob: several})(task, z1).zlo
    same = torch.stack([(made == Damage(**{knob: value})(task, z1).zlo).all((1, 2, 3)) for value in values])
    assert same.any(0).all()  # each is the work of one value
    assert ((same.sum(1) - 500 / len(values)).abs() < 4 * 500**0.5 / 2).all()  # and each value's turn comes


def test_sigma_is_drawn_from_its_range():
    torch.manual_seed(0)
    weights = Damage(kernel="gaussian", taps=31, sigma=(0.5, 3.0)).weights(torch.zeros(2000, 1, 1, 1), Draws())
    sigma = (weights * (torch.arange(31) - 15) ** 2).sum(1).sqrt()  # a kernel's standard deviation tells its sigma
    assert sigma.min() > 0.45 and sigma.max() < 3.05 and torch.allclose(weights.sum(1), torch.ones(2000))
    assert abs(sigma.mean() - 1.75) < 0.05 and abs(sigma.std() - 2.5 / 12**0.5) < 0.03


def test_the_same_seed_gives_the_same_damage():
    z1, other = to_z(photos(8, 32, 32)), to_z(photos(8, 32, 32, seed=9))
    batches = []
    for z in (z1, z1, other):
        torch.manual_seed(3)
        batches.append(Damage(mask="freeform-10-20")(MIXTURE, z))
    assert torch.equal(batches[0].zlo, batches[1].zlo) and torch.equal(batches[0].unknown, batches[2].unknown)
    assert not torch.equal(Damage(mask="freeform-10-20")(MIXTURE, z1).unknown, batches[0].unknown)


@pytest.mark.parametrize("task", ["sr", "blur", "jpeg", "inpaint"])
def test_autocast_changes_nothing(task):
    z1, damage = to_z(photos(2, 32, 32)), Damage(up="bicubic")
    with torch.autocast("cpu", torch.bfloat16):
        batch = damage(task, z1)
    assert torch.equal(batch.zlo, damage(task, z1).zlo)


def test_everything_stays_on_the_device():
    # tensors without storage: reading a value on the host, or mixing in a tensor of the CPU, raises
    z1 = torch.empty(2, 3, 37, 32, device="meta")
    damage = Damage(mask="freeform-10-20", chain_factors=(2,))
    batch = damage("inpaint,blur,noise,jpeg,chain,generate", z1)
    assert all(x.device.type == "meta" for x in (batch.zlo, batch.to_make, batch.unknown, batch.cond))
    assert Damage(up="bicubic")("sr", torch.empty(2, 3, 32, 32, device="meta")).zlo.device.type == "meta"


Z = torch.zeros(2, 3, 36, 36)


@pytest.mark.parametrize("call, words", [
    (lambda: Damage()("sharpen", Z), "task = 'sharpen': allowed are sr, inpaint.* or several joined by commas"),
    (lambda: Damage()("sr,", Z), "task = 'sr,'"),
    (lambda: Damage(factor=8)("blur,sr", Z), "damage.factor = 8: allowed is what divides the side, 36"),
    (lambda: Damage(factor=(4, 8))("sr", Z), "damage.factor = .4, 8.: .* 36"),
    (lambda: Damage(taps=73)("blur", Z), "damage.taps = 73: .* 36"),
    (lambda: Damage()("paired", Z), "task = 'paired': needs damaged images"),
    (lambda: Damage()("paired", Z, zlo=Z[..., 1:]), "task = 'paired': needs damaged images"),
    (lambda: Damage()("jpeg", Z[:, :2]), "task = 'jpeg': needs images of 1 or 3 channels"),
    (lambda: from_damaged("inpaint", Z), "task = 'inpaint': needs a mask"),
    (lambda: from_damaged("sr", Z, mask=Z[:, :1]), "task = 'sr': takes no mask"),
])
def test_what_does_not_fit_the_image_is_refused(call, words):
    with pytest.raises(SettingsError, match=rf"^{words}[^\n]*$"):
        call()
    Damage(factor=8, taps=73).check("generate", 36)  # the knobs of other tasks do not matter


@pytest.mark.parametrize("knob, value, words", [
    ("factor", 3, "2, 4, 8"), ("factor", (2, 3), "2, 4, 8"), ("factor", (), "1 or more"), ("factor", True, "2, 4, 8"),
    ("down", "lanczos", "bicubic"), ("mask", "left", "freeform-10-20"), ("kernel", "motion", "gaussian"),
    ("taps", 4, "odd"), ("sigma", 0, "from 0.01"), ("sigma", math.nan, "finite"), ("sigma", (3.0, 1.0), "lower first"),
    ("quality", 0, "100"), ("quality", 101, "100"), ("quality", (40, 10), "the lower first"), ("quality", 7.5, "whole"),
])
def test_wrong_values_are_refused(knob, value, words):
    with pytest.raises(SettingsError, match=rf"^damage\.{knob} = {re.escape(repr(value))}: allowed .*{words}[^\n]*$"):
        Damage(**{knob: value})
