"""Each metric and its standard error against closed forms and other implementations."""
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluation import errors as errors_of
from evaluation import frechet, metrics
from evaluation import judge as judging
from images.corruptions import Damage
from images.pictures import psnr, to_uint8
from measured import EXACT, SIDE
from ode_int import SolverError

# -------------------------------------------------------------------------------------------------------------- Frechet


def test_frechet_against_scipys_matrix_square_root():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 6)) @ random.normal(size=(6, 6)), random.normal(size=(30, 6)) + 0.3
    c1, c2 = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    one, other = frechet.gaussian(torch.tensor(x)), frechet.gaussian(torch.tensor(y))
    assert frechet.frechet(one, other) == pytest.approx(float(expected), rel=1e-9)
    assert frechet.frechet(other, one) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_with_more_features_than_images():
    # features that live in a corner of a larger space are as far apart there as in the corner itself
    random = np.random.default_rng(2)
    x, y = torch.tensor(random.normal(size=(12, 4))), torch.tensor(random.normal(size=(9, 4)) + 0.1)
    turn = torch.linalg.qr(torch.tensor(random.normal(size=(300, 4)))).Q.T
    expected = frechet.frechet(frechet.gaussian(x), frechet.gaussian(y))
    one, other = frechet.gaussian(x @ turn), frechet.gaussian(y @ turn)
    assert frechet.frechet(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet(one, one) == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------------------------------------------- single metrics


def test_ssim():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    ssim = metrics.load_ssim(6)
    x = (torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    assert ssim(x, x).tolist() == pytest.approx([1] * 3, abs=1e-6)  # one an image
    darker = (x * 0.75).round().to(torch.uint8)
    assert ssim(darker, x).mean().item() == pytest.approx(0.9219, abs=2e-3)  # torchmetrics' documented example
    assert ssim(torch.cat([x[:1], darker[1:]]), x).argmax() == 0
    # Wang et al. 2004, eq. 13 for two constant images: (2 a b + C1) / (a^2 + b^2 + C1), C1 = (0.01 * 255)^2
    a, b, c1 = 100.0, 130.0, (0.01 * 255) ** 2
    flat = torch.ones(1, 1, 6, 6, dtype=torch.uint8)  # one image, of the smallest side
    assert ssim(flat * 100, flat * 130).item() == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), abs=1e-4)
    with pytest.raises(ValueError, match="6 pixels"):
        metrics.load_ssim(5)


def test_a_shift_by_k_levels(judge, config):
    k = 7
    score = judge(config, False, lambda batch: batch.z1 + k / 127.5)
    assert score["bias"] == pytest.approx([k] * 3)
    assert score["psnr"] == pytest.approx(20 * math.log10(255 / k), rel=1e-5)
    assert score["consistency"] == pytest.approx(1e5 * (k / 255) ** 2, rel=1e-4)  # the box mean shifts along
    colour = torch.tensor([3.0, 0.0, -2.0]).view(3, 1, 1) / 127.5
    assert judge(config, False, lambda batch: batch.z1 + colour)["bias"] == pytest.approx([3, 0, -2])


def test_what_the_damage_hides_is_consistent(judge, config):
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(SIDE // 2, SIDE // 2) * 10 / 127.5  # of mean 0 in a box
    bicubic = replace(config, damage=Damage(up="bicubic"))
    for each in (config, bicubic):
        score = judge(each, False, lambda batch: batch.z1 + checks)
        assert score["consistency"] == 0 and score["psnr"] == pytest.approx(20 * math.log10(255 / 10), rel=1e-5)
    # the error counts on the small image, however it is enlarged
    shifted = judge(bicubic, False, lambda batch: batch.z1 + 7 / 127.5)
    assert shifted["consistency"] == pytest.approx(1e5 * (7 / 255) ** 2, rel=1e-4)


def test_samples_are_rounded_and_clamped(judge, config):
    assert judge(config, False, lambda batch: batch.z1 + 0.4 / 127.5)["psnr"] == pytest.approx(EXACT)  # rounded away
    bright = judge(config, False, lambda batch: torch.full_like(batch.z1, 5.0))
    order = torch.cat(judge.batches)
    assert bright["bias"] == pytest.approx((255 - judge.images.test[order].double().mean((0, 2, 3))).tolist())
    with pytest.raises(SolverError, match="not finite"):
        judge(config, False, lambda batch: batch.z1 / 0)


def test_the_last_batch_counts_by_its_images(judge, config):
    # 16 + 16 + 8 images: a mean of batch means would weigh the last twice
    seen = []
    score = judge(config, False, lambda batch: seen.append(batch) or batch.zlo)
    assert [len(batch.zlo) for batch in seen] == [16, 16, 8]
    expected = sum(psnr(batch.zlo[i:i + 1], batch.z1[i:i + 1]) for batch in seen for i in range(len(batch.zlo))) / 40
    assert score["psnr"] == pytest.approx(expected, rel=1e-5)


def test_fill_keeps_what_is_known_and_looks_at_nothing_else():
    x = torch.randn(4, 3, 15, 12, generator=torch.Generator().manual_seed(0))
    known = (torch.rand(4, 1, 15, 12, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    filled = judging.fill(x * known, known)
    assert torch.equal(filled * known, x * known)
    assert torch.equal(filled, judging.fill(torch.where(known > 0, x, 9.0), known))
    flat = torch.full_like(x, 0.3)
    assert torch.allclose(judging.fill(flat * known, known), flat)


# ----------------------------------------------------------------------------------------------------- standard errors

def test_errors_of_means_are_those_of_their_images(judge, config):
    seen = []
    score = judge(config, False, lambda batch: seen.append(batch) or batch.zlo)
    zlo, z1 = (torch.cat([getattr(batch, name) for batch in seen]) for name in ("zlo", "z1"))
    decibels = [psnr(a[None], b[None]) for a, b in zip(zlo, z1)]
    bias = (to_uint8(zlo).double() - to_uint8(z1).double()).mean((2, 3)).numpy()
    errors = score["errors"]
    assert errors["psnr"] == pytest.approx(np.std(decibels, ddof=1) / math.sqrt(40), rel=1e-5)
    assert errors["bias"] == pytest.approx((bias.std(0, ddof=1) / math.sqrt(40)).tolist(), rel=1e-9)
    assert errors["consistency"] == 0  # the input fits to itself, every time
    without = score["without"]
    assert without.keys() == errors.keys() - {"bias"}
    assert without["psnr"] == pytest.approx([np.mean(np.delete(decibels, np.s_[g::20])) for g in range(20)], rel=1e-5)
    assert errors["frechet"] == errors_of.jackknife(without["frechet"])
    bright = (z1.mean((1, 2, 3)) > -0.1).double().mean().item()
    grey = judge(config, False, lambda batch: torch.full_like(batch.z1, 0.3))  # all are called bright
    assert grey["accuracy"] == pytest.approx(100 * bright)
    assert grey["errors"]["accuracy"] == pytest.approx(100 * math.sqrt(bright * (1 - bright) / 39), rel=1e-9)


@pytest.mark.parametrize("shift, scale, largest", [(0.5, 1.5, 1.5), (0.0, 1.0, 2.0)])
def test_the_jackknife_is_the_spread_over_other_images(shift, scale, largest):
    """Of Gaussians, for 60 independent sets of images; where ours are as the truth (the floor) it may be too large."""
    generator = torch.Generator().manual_seed(0)
    found, errors = [], []
    for _ in range(60):
        truth = torch.randn(800, 4, generator=generator)
        noise = torch.randn(800, 4, generator=generator)
        ours = shift + scale * (0.8 * truth + 0.6 * noise)  # samples follow the truth
        pairs = ours.split(400), truth.split(400)
        found.append(frechet.across(*([frechet.gaussian(half) for half in pair] for pair in pairs)))
        errors.append(errors_of.jackknife(frechet.across_without(*pairs)))
    expected = 4 * (shift**2 + (scale - 1) ** 2)
    spread, error = np.std(found, ddof=1), math.sqrt(np.mean(np.square(errors)))
    assert np.mean(found) == pytest.approx(expected, abs=0.1)
    assert 0.75 < error / spread < largest


def test_the_jackknife_leaves_out_each_image_once():
    """By a plain loop: 3 images a half, so 3 groups of one image of each half."""
    random = np.random.default_rng(1)
    ours, truth = random.normal(size=(2, 3, 1)), random.normal(size=(2, 3, 1)) + 1
    figures = []
    for g in range(3):
        a, b = (np.delete(sets, g, axis=1)[..., 0] for sets in (ours, truth))
        figures.append(sum((a[h].mean() - b[1 - h].mean()) ** 2 + (a[h].std(ddof=1) - b[1 - h].std(ddof=1)) ** 2
                           for h in (0, 1)) / 2)
    expected = math.sqrt(2 / 3 * sum((f - np.mean(figures)) ** 2 for f in figures))
    without = frechet.across_without(torch.tensor(ours), torch.tensor(truth))
    assert without == pytest.approx(figures, rel=1e-6)
    assert errors_of.jackknife(without) == pytest.approx(expected, rel=1e-6)


def test_the_error_of_a_difference_is_its_spread_over_other_images():
    """Two networks whose samples follow the same truth, for 60 independent sets of images: FD and the mean square."""
    generator = torch.Generator().manual_seed(0)
    found, errors, apart = ([] for _ in range(3))
    for _ in range(60):
        truth = torch.randn(800, 4, generator=generator)
        rows = []
        for shift in (0.5, 0.6):
            ours = shift + 0.95 * truth + 0.3 * torch.randn(800, 4, generator=generator)
            pairs = ours.split(400), truth.split(400)
            figures = dict(frechet=frechet.across(*([frechet.gaussian(half) for half in pair] for pair in pairs)),
                           psnr=ours.square().mean().item())
            square = ours.square().mean(1)
            without = dict(frechet=frechet.across_without(*pairs),
                           psnr=errors_of.without_each_group(lambda kept: square[kept].mean().item(), len(square)))
            rows.append(figures | dict(
                without=without, seed_errors={}, errors={m: errors_of.jackknife(t) for m, t in without.items()}))
        found.append([rows[0][m] - rows[1][m] for m in without])
        errors.append([errors_of.error_of_difference(*rows, m) for m in without])
        apart.append([math.hypot(*(row["errors"][m] for row in rows)) for m in without])
    ratio = np.sqrt(np.mean(np.square(errors), axis=0)) / np.std(found, axis=0, ddof=1)
    assert ((0.75 < ratio) & (ratio < 1.33)).all()
    assert (np.mean(apart, axis=0) > 1.3 * np.mean(errors, axis=0)).all()
