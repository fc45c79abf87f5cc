"""What evaluate.py and judge.py say is checked against closed forms, other implementations, and a count of the
network's calls."""

import json
import math
import os
import re
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn

import evaluate
import trainer
from evaluation import judge as judging
from evaluation import report
from images import SettingsError, data
from images.corruptions import Damage
from images.pictures import psnr, to_float, to_uint8
from methods.edm import EDM
from methods.i2sb import I2SB
from methods.interpolant import Interpolant
from methods.regression import Regression
from methods.sr3 import SR3
from ode_int import SolverError
from runs import ranks, until
from support.model import draw, make_unet
from trainer import Config
from unet import Counted, Guided

SIDE, TEST = 16, 42
EXACT = 10 * math.log10(
    255**2 * 3 * SIDE**2
)  # the PSNR of an image without an error: as if one value were off by a level


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """A folder to stand in, so that runs/cache is not this clone's."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, dark and bright drawings, with grey levels 20 .. 220, in train/ and test/."""
    root = tmp_path_factory.mktemp("data") / "drawings"
    drawings = data.load("shapes", SIDE, limit=TEST + 64).train
    for i, drawing in enumerate(drawings):
        label, split = ("dark", "bright")[i % 2], "test" if i < TEST else "train"
        level = 20 + (drawing.float() * 100 / 255).round() + 100 * (i % 2)
        path = root / split / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(level.to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
    return root


@pytest.fixture(scope="module")
def config(folder):
    return Config(dataset=str(folder), image_size=SIDE, overfit=False, device="cpu")


LOCAL = ("psnr", "consistency", "bias", "accuracy", "frechet")  # need no package and no download


@pytest.fixture(scope="module")
def judge(config):
    return judging.Judge(config, torch.device("cpu"), LOCAL, count=40, batch_size=16, epochs=30)


def truth(batch):
    return batch.z1


# -------------------------------------------------------------------------------------------------------------- Frechet


def test_frechet_of_gaussians_in_one_dimension():
    one, other = (
        tuple(torch.tensor(x).double() for x in gaussian) for gaussian in (([2.0], [[3.0]]), ([-1.0], [[2.0]]))
    )
    assert judging.frechet(one, other) == pytest.approx((2 + 1) ** 2 + (3 - 2) ** 2)


def test_frechet_against_scipys_matrix_square_root():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 6)) @ random.normal(size=(6, 6)), random.normal(size=(30, 6)) + 0.3
    c1, c2 = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    one, other = judging.gaussian(torch.tensor(x)), judging.gaussian(torch.tensor(y))
    assert judging.frechet(one, other) == pytest.approx(float(expected), rel=1e-9)
    assert judging.frechet(other, one) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_with_more_features_than_images():
    # features that live in a corner of a larger space are as far apart there as in the corner itself
    random = np.random.default_rng(2)
    x, y = torch.tensor(random.normal(size=(12, 4))), torch.tensor(random.normal(size=(9, 4)) + 0.1)
    turn = torch.linalg.qr(torch.tensor(random.normal(size=(300, 4)))).Q.T
    expected = judging.frechet(judging.gaussian(x), judging.gaussian(y))
    one, other = judging.gaussian(x @ turn), judging.gaussian(y @ turn)
    assert judging.frechet(one, other) == pytest.approx(expected, rel=1e-9)
    assert judging.frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_frechet_is_torchmetrics_fid():
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")

    class Mean(nn.Module):
        num_features = 12

        def forward(self, x):
            return nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)

    x, y = (
        torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) ** (1 + seed) * 255 for seed in (0, 1)
    )
    reference = fid.FrechetInceptionDistance(feature=Mean())
    reference.update(x, real=True)
    reference.update(y, real=False)
    mine = judging.frechet(*(judging.gaussian(Mean()(z)) for z in (x, y)))
    assert mine == pytest.approx(reference.compute().item(), rel=1e-3)  # it sums in float32


# ------------------------------------------------------------------------------------------------------- single metrics


def test_psnr_against_numpy_and_torchmetrics():
    a, b = (torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
    x, y = (to_uint8(image).numpy().astype(float) for image in (a, b))
    expected = np.mean([10 * np.log10(255**2 / np.mean((p - q) ** 2)) for p, q in zip(x, y)])
    assert psnr(a, b) == pytest.approx(expected, rel=1e-6)
    functional = pytest.importorskip("torchmetrics.functional.image", reason="torchmetrics is not installed")
    library = functional.peak_signal_noise_ratio(
        torch.tensor(x), torch.tensor(y), data_range=255.0, dim=(1, 2, 3), reduction="elementwise_mean"
    )
    assert psnr(a, b) == pytest.approx(library.item(), rel=1e-6)


def test_ssim():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    ssim = judging.load_ssim(6)
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
        judging.load_ssim(5)


def test_a_shift_by_k_levels(judge, config):
    k = 7
    score = judge(config, False, lambda batch: batch.z1 + k / 127.5)
    assert score["bias"] == pytest.approx([k] * 3)
    assert score["psnr"] == pytest.approx(20 * math.log10(255 / k), rel=1e-5)
    assert score["consistency"] == pytest.approx(1e5 * (k / 255) ** 2, rel=1e-4)  # the box mean shifts along
    colour = torch.tensor([3.0, 0.0, -2.0]).view(3, 1, 1) / 127.5
    assert judge(config, False, lambda batch: batch.z1 + colour)["bias"] == pytest.approx([3, 0, -2])


def test_what_the_damage_hides_is_consistent(judge, config):
    checks = (
        torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(SIDE // 2, SIDE // 2) * 10 / 127.5
    )  # of mean 0 in each 2x2 box
    bicubic = replace(config, damage=Damage(up="bicubic"))
    for each in (config, bicubic):
        score = judge(each, False, lambda batch: batch.z1 + checks)
        assert score["consistency"] == 0 and score["psnr"] == pytest.approx(20 * math.log10(255 / 10), rel=1e-5)
    # the error counts on the small image, however it is enlarged
    assert judge(bicubic, False, lambda batch: batch.z1 + 7 / 127.5)["consistency"] == pytest.approx(
        1e5 * (7 / 255) ** 2, rel=1e-4
    )


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
    assert torch.allclose(
        judging.fill(torch.full_like(x, 0.3) * known, known), torch.full_like(x, 0.3)
    )  # a flat image is a flat image


# -------------------------------------------------------------------------------------------- classifier, halves, floor


def test_the_classifier_tells_dark_from_bright(judge, config):
    assert judge.accuracy == 100 and judge(config, False, truth)["accuracy"] == 100
    swapped = judge(
        config,
        False,
        lambda batch: batch.z1 + torch.where(batch.z1.mean((1, 2, 3), keepdim=True) < -0.1, 1, -1) * 100 / 127.5,
    )
    assert swapped["accuracy"] == 0


def test_samples_that_are_the_truth_score_the_floor(judge, config):
    floor = judge.baselines(config)[-1]
    assert floor["name"] == "floor" and floor["frechet"] > 0.01
    assert judge(config, False, truth)["frechet"] == pytest.approx(floor["frechet"], rel=1e-6)
    assert judge(config, False, lambda batch: batch.zlo)["frechet"] > floor["frechet"]


def test_each_half_is_held_against_the_other(judge, config):
    order = torch.cat(judge.batches)
    other = iter(judge.images.test[order.roll(20)].split(16))  # for the i-th image of a half, the i-th of the other
    assert judge(config, False, lambda batch: to_float(next(other)))["frechet"] == pytest.approx(0, abs=1e-4)


def test_fid_flows_through_the_same_halves(config, monkeypatch):
    def pooled(x):
        return nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)

    monkeypatch.setattr(judging, "load_inception", lambda device: pooled)
    judge = judging.Judge(config, torch.device("cpu"), ("fid",), count=41, batch_size=16)
    score = judge(config, False, lambda batch: 0.5 * batch.z1)
    z1 = judge.images.test[torch.cat(judge.batches)][:40]
    x, y = (pooled(z).double().numpy() for z in (to_uint8(0.5 * to_float(z1)), z1))

    def distance(a, b):
        root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)

    assert score.keys() == {"fid", "seconds", "errors"} and score["errors"] == {}
    assert score["fid"] == pytest.approx((distance(x[:20], y[20:]) + distance(x[20:], y[:20])) / 2, rel=1e-4)


def test_baselines_of_sr(judge, config):
    low, bicubic, floor = judge.baselines(replace(config, damage=Damage(up="bicubic")))
    assert [low["name"], bicubic["name"], floor["name"]] == ["input", "bicubic", "floor"]
    assert low["consistency"] == 0 < bicubic["consistency"] and low["psnr"] != bicubic["psnr"]
    z1 = judge.images.test[torch.cat(judge.batches)]
    small = [
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((SIDE // 2,) * 2, Image.Resampling.BOX) for image in z1
    ]
    for row, how in ((low, Image.Resampling.NEAREST), (bicubic, Image.Resampling.BICUBIC)):
        images = torch.stack(
            [torch.from_numpy(np.array(image.resize((SIDE, SIDE), how))).permute(2, 0, 1) for image in small]
        )
        assert row["psnr"] == pytest.approx(psnr(to_float(images), to_float(z1)), rel=1e-5)


@pytest.mark.parametrize("task, names, without", [
    ("inpaint", ["input", "smooth fill", "floor"], set()), ("jpeg", ["input", "floor"], set()),
    ("generate", ["floor"], {"psnr", "consistency"}), ("sr,inpaint", ["input", "floor"], set())])
def test_other_tasks(judge, config, task, names, without):
    c = replace(config, task=task)
    rows = judge.baselines(c)
    assert [row["name"] for row in rows] == names
    assert set(judge(c, True, truth)) == set(LOCAL) - without | {"seconds", "errors"}
    if task != "generate":  # the very damage of before is done to the sample, random masks included
        assert judge(c, False, truth)["consistency"] == 0
    if task == "inpaint":
        assert rows[1]["psnr"] > rows[0]["psnr"]
    if task == "generate":
        assert judge.left_out(c, False).keys() == {"psnr", "consistency", "accuracy"}


def test_pairs_can_not_be_damaged_again(config, folder):
    c = replace(config, task="paired", paired_path=str(folder))
    judge = judging.Judge(c, torch.device("cpu"), ("psnr", "consistency"), count=3)
    assert judge(c, False, lambda batch: batch.zlo)["psnr"] == pytest.approx(EXACT)
    assert judge.left_out(c, False).keys() == {"consistency"}


def test_data_without_classes_and_too_few_images(folder, config):
    c = replace(config, dataset=str(folder / "test" / "dark"))
    judge = judging.Judge(c, torch.device("cpu"), LOCAL, count=40)
    assert "no classes" in judge.why["accuracy"] and judge(c, False, truth).keys() == {
        "psnr",
        "consistency",
        "bias",
        "seconds",
        "errors",
    }
    few = judging.Judge(config, torch.device("cpu"), LOCAL, count=3, epochs=30)
    assert "4 images" in few.why["frechet"] and "accuracy" in few(config, False, truth)


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
    bright = (z1.mean((1, 2, 3)) > -0.1).double().mean().item()
    grey = judge(config, False, lambda batch: torch.full_like(batch.z1, 0.3))  # all are called bright
    assert grey["accuracy"] == pytest.approx(100 * bright)
    assert grey["errors"]["accuracy"] == pytest.approx(100 * math.sqrt(bright * (1 - bright) / 39), rel=1e-9)


def test_an_error_is_the_spread_over_other_images():
    """PSNR of noise of a random level: the error of 100 images against the spread of 200 such hundreds."""
    generator = torch.Generator().manual_seed(0)
    level = 5 + 40 * torch.rand(200, 100, 1, 1, 1, generator=generator)
    x = to_float((128 + level * torch.randn(200, 100, 1, 8, 8, generator=generator)).clamp(0, 255).round())
    each = torch.stack([judging.psnr_of_each(some, torch.zeros_like(some)) for some in x])
    assert (each.std(1) / 10).mean().item() == pytest.approx(each.mean(1).std().item(), rel=0.15)


@pytest.mark.parametrize("shift, scale, largest", [(0.5, 1.0, 1.5), (0.0, 1.5, 1.5), (0.0, 1.0, 2.0)])
def test_the_jackknife_is_the_spread_over_other_images(shift, scale, largest):
    """Of Gaussians, for 60 independent sets of images; where ours are as the truth (the floor) it may be too large."""
    generator = torch.Generator().manual_seed(0)
    found, errors = [], []
    for _ in range(60):
        truth = torch.randn(800, 4, generator=generator)
        noise = torch.randn(800, 4, generator=generator)
        ours = shift + scale * (0.8 * truth + 0.6 * noise)  # samples follow the truth
        pairs = ours.split(400), truth.split(400)
        found.append(judging.across(*([judging.gaussian(half) for half in pair] for pair in pairs)))
        errors.append(judging.jackknife(*pairs))
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
    assert judging.jackknife(torch.tensor(ours), torch.tensor(truth)) == pytest.approx(expected, rel=1e-6)


def test_a_cell_shows_the_error_in_the_digits_of_the_figure():
    row = dict(psnr=23.478, bias=[1.25, -0.34], nfe=3.0, errors=dict(psnr=0.0216, bias=[0.31, 1.26]))
    assert report.cell(row, "psnr") == "23.48 ± .02" and report.cell(row, "bias") == "+1.2 ± .3 -0.3 ± 1.3"
    assert report.cell(row, "nfe") == "3" and report.cell(row, "ssim") == "–"
    assert report.cell(dict(psnr=23.478), "psnr") == "23.48"  # an older result


# -------------------------------------------------------------------------------------------------------- random crops

def test_runs_on_random_crops_are_measured_on_the_middles(tmp_path):
    for i, picture in enumerate(data.load("shapes", 40, limit=60).train):
        path = tmp_path / "photos" / ("train", "test")[i % 2] / "ab"[i // 2 % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).crop((0, 0, 40, 30)).save(path)
    config = Config(dataset=str(tmp_path / "photos"), image_size=SIDE, crop="random", overfit=False, device="cpu")
    arguments = torch.device("cpu"), ("psnr", "accuracy", "frechet"), 30, 16, 0, 1, tmp_path / "cache"
    judge, seen = judging.Judge(config, *arguments), []
    score = judge(config, False, lambda batch: seen.append(to_uint8(batch.z1)) or batch.z1)
    files = sorted((tmp_path / "photos/test").rglob("*.png"))  # as the set lists them
    middles = [np.array(Image.open(path))[7:23, 12:28] for path in files]
    expected = torch.stack([torch.from_numpy(middle).permute(2, 0, 1) for middle in middles])
    assert torch.equal(torch.cat(seen), expected[torch.cat(judge.batches)])
    assert score["psnr"] == pytest.approx(EXACT) and score["frechet"] == judge.baselines(config)[-1]["frechet"]
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert len(names) == 2 and all("photos-16-random" in name for name in names)
    centred = judging.Judge(replace(config, crop="center"), *arguments)
    assert centred.digest != judge.digest and centred.key != judge.key
    assert len(list((tmp_path / "cache").iterdir())) == 4


# ------------------------------------------------------------------------------------------------------------ the cache


def test_what_is_kept_depends_on_what_it_came_from(config, judge, folder, monkeypatch):
    def files(kind):
        return set(Path("runs/cache").glob(f"{kind}-drawings-16-*.pt"))

    assert not list(folder.parent.glob("*.pt"))  # nothing beside the user's data

    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: pytest.fail("the classifier was kept"))
    before = files("classifier"), files("features")
    again = judging.Judge(config, torch.device("cpu"), LOCAL, count=40, batch_size=7, epochs=30)
    assert again.accuracy == judge.accuracy and (files("classifier"), files("features")) == before
    assert again(config, False, truth)["frechet"] == pytest.approx(judge(config, False, truth)["frechet"], rel=1e-4)

    fewer = judging.Judge(config, torch.device("cpu"), LOCAL, count=30, epochs=30)  # other images: other statistics
    assert len(files("features") - before[1]) == 1 and files("classifier") == before[0]
    assert fewer.key == judge.key and fewer.digest != judge.digest

    monkeypatch.undo()
    other = judging.Judge(config, torch.device("cpu"), LOCAL, count=40, epochs=1)  # another classifier: other features
    assert other.key != judge.key
    assert len(files("classifier") - before[0]) == 1 and len(files("features") - before[1]) == 2


@pytest.mark.parametrize("key, value", [
    ("rows", {}), ("problem", []), ("baselines", None), ("method", 3), ("costs", "none"), ("left_out", [1]),
    ("rows", [dict(sampler="euler", psnr="high")]), ("rows", [dict(sampler="euler", bias=[1, math.nan])])])
def test_a_result_with_nonsense_in_it_is_one_line(results, tmp_path, capsys, key, value):
    _, (good, _) = results
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(good | {key: value}))
    assert evaluate.main([str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.json" in error and "no result of an evaluation" in error


def test_kept(tmp_path):
    calls, path = [], str(tmp_path / "new" / "x.pt")

    def make():
        calls.append(1)
        return dict(weights=torch.arange(3), accuracy=50.0)

    for _ in range(2):
        value = judging.kept(path, make)
        assert value["accuracy"] == 50 and value["weights"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    (tmp_path / "new" / "x.pt").write_bytes(b"half a file")
    judging.kept(path, make)
    assert len(calls) == 2 and torch.load(path, weights_only=True)["accuracy"] == 50


def test_digest_sees_every_value():
    x = torch.zeros(4, 4, dtype=torch.uint8)
    y = x.clone()
    y[3, 3] = 1
    assert len({judging.digest(x, 1), judging.digest(y, 1), judging.digest(x, 2), judging.digest(x, 1, None)}) == 4
    assert judging.digest(x.T, 1) == judging.digest(x, 1)
    assert judging.digest(iter(y.split(3)), 1) == judging.digest(y, 1) != judging.digest(iter(x.split(3)), 1)


# ---------------------------------------------------------------------------------------- what can't be had is left out


def test_weights_that_can_not_be_downloaded(config, monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    judge = judging.Judge(config, torch.device("cpu"), ("psnr", "lpips", "fid"), count=8)
    score = judge(config, False, truth)
    assert score.keys() == {"psnr", "seconds", "errors"} and judge.left_out(config, False).keys() == {"lpips", "fid"}
    for module, metric in (("lpips", "lpips"), ("torch_fidelity", "fid")):
        try:
            __import__(module)
            assert "no route to host" in judge.why[metric] and str(tmp_path) in judge.why[metric]
        except ImportError:
            assert module in judge.why[metric]
    assert socket.getdefaulttimeout() is None


def test_packages_that_are_not_there(config, monkeypatch):
    for name in ("torchmetrics.functional.image", "lpips", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    judge = judging.Judge(config, torch.device("cpu"), ("ssim", "lpips", "fid", "bias"), count=8)
    assert judge(config, False, truth).keys() == {"bias", "seconds", "errors"}
    assert (
        "torchmetrics" in judge.why["ssim"] and "lpips" in judge.why["lpips"] and "torch_fidelity" in judge.why["fid"]
    )


# ------------------------------------------------------------------------------------------------------ samplers, costs

SMALL = dict(image_size=16, unet_channels=8, unet_dim_mults=(1, 2), unet_blocks=1, device="cpu")


def one_batch(config, classes, n=3):
    z1 = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return config.damage(config.task, z1, torch.arange(n) % classes if classes else None, config.condition)


@pytest.mark.parametrize("settings, solver, missing, default", [
    (dict(method="interpolant"), "auto", [1], None),  # the clean estimate at the end is one more
    (dict(method="interpolant"), "heun", [1, 2, 4, 10], None),
    (dict(method="interpolant", interpolant=Interpolant(eps0=0.5)), "auto", [1], 101),
    (dict(method="sr3", sr3=SR3(T=20)), "auto", [], 20),
    (dict(method="sr3", sr3=SR3(T=4)), "auto", [5, 10], 4),
    (dict(method="sr3", sr3=SR3(T=20), guidance=2.0), "auto", [1, 3, 5], 40),  # guidance takes two
    (dict(method="i2sb", i2sb=I2SB(n=8)), "auto", [10], 8),
    (dict(method="edm"), "auto", [2, 4, 10], 35),
    (dict(method="edm", edm=EDM(sampler="euler")), "auto", [], 35),
    (dict(method="edm"), "euler", [1], 35),
    (dict(method="udpm"), "heun", [1, 2, 4, 5, 10], 3),  # no ODE: its own sampler
    (dict(method="i2sb", i2sb=I2SB(n=8)), "midpoint", [10], 8),  # nor without ot_ode
    (dict(method="regression"), "auto", [2, 3, 4, 5, 10], 1),
])
def test_nfe_against_the_networks_own_counter(settings, solver, missing, default):
    config, nfe = Config(**SMALL | settings), (1, 2, 3, 4, 5, 10)
    classes = 3 if config.guidance != 1 else 0
    net, batch = make_unet(config, classes).eval(), one_batch(config, classes)
    found, without = evaluate.samplers(config, nfe, batch, solver)
    assert without == missing
    counts = []
    for setting in found:
        calls = []
        hook = net.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
        counted = Counted(net)
        with torch.no_grad():
            draw(setting, Guided(counted, config.guidance), batch)
        hook.remove()
        assert sum(calls) == counted.rows
        counts.append(sum(calls) / 3)
    own = counts.pop() if found[-1].solver == "auto" and found[-1].sample_steps is None and default not in nfe else None
    assert counts == [n for n in nfe if n not in missing]
    assert own == default if default and default not in nfe else True
    assert evaluate.samplers(config, nfe, batch, solver, default=False)[0] == [s for s, n in zip(found, counts)]


def test_flops_of_a_step():
    convolution = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    forward = 2 * 5 * 3 * 9 * 16 * 16  # a multiplication and an addition a tap
    batch = one_batch(Config(**SMALL), 0)
    cost = evaluate.training_flops(0, [(convolution, lambda net, b: net(b.z1).square().mean((1, 2, 3)))], batch, "fp32")
    assert cost == 2 * forward  # the image needs no gradient: forward, and the weights'
    twice = nn.Sequential(convolution, nn.Conv2d(5, 5, 1, bias=False))
    small = 2 * 5 * 5 * 16 * 16
    cost = evaluate.training_flops(0, [(twice, lambda net, b: net(b.z1).mean((1, 2, 3)))] * 2, batch, "fp32")
    assert cost == 2 * (2 * forward + 3 * small)  # two players


def test_flops_are_the_mean_over_levels():
    def loss(net, batch):
        return net(batch.z1[:, :, :: 2 ** int(torch.randint(3, ())), :]).mean((1, 2, 3))

    convolution, forward = nn.Conv2d(3, 5, 3, padding=1, bias=False), 2 * 5 * 3 * 9 * 16 * 16
    cost = evaluate.training_flops(3, [(convolution, loss)], one_batch(Config(**SMALL), 0), "fp32")
    assert cost == pytest.approx(2 * forward * (1 + 1 / 2 + 1 / 4) / 3)


def test_regression_is_least_squares():
    batch = one_batch(Config(**SMALL), 0)
    method = Regression()

    def oracle(x, t, y, cond):
        return batch.z1 - batch.zlo

    def off(x, t, y, cond):
        return batch.z1 - batch.zlo + 0.5

    assert method.loss(oracle, batch).abs().max() < 1e-10
    assert torch.allclose(method.sample(oracle, replace(batch, z1=None)), batch.z1)
    assert torch.allclose(method.loss(off, batch), torch.full((3,), 0.25))
    with pytest.raises(ValueError, match="allows 1"):
        method.sample(oracle, batch, steps=2)
    hole = Damage()("inpaint", batch.z1)
    sample = method.sample(lambda x, t, y, cond: torch.ones_like(x), hole)
    assert torch.equal(sample * (1 - hole.hole), hole.zlo) and torch.equal(
        sample * hole.hole, hole.hole.expand_as(sample)
    )


# ---------------------------------------------------------------------------------------------------------- end to end

@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """Two tiny runs: an interpolant and a UDPM, whose discriminator counts too."""
    out = tmp_path_factory.mktemp("runs")
    common = [
        "--task",
        "sr",
        "--dataset",
        str(folder),
        "--image-size",
        "16",
        "--unet-channels",
        "8",
        "--unet-dim-mults",
        "1",
        "2",
        "--unet-blocks",
        "1",
        "--no-overfit",
        "--batch-size",
        "4",
        "--no-use-wandb",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--sample-count",
        "2",
        "--preset",
        "small",
    ]
    own = {
        "interpolant": ["--solver", "euler", "--sample-steps", "1"],
        "udpm": ["--udpm.lpips-weight", "0", "0", "0", "--udpm.disc-channels", "8"],
    }
    found = []
    for method, flags in own.items():
        assert (
            trainer.main([*common, "--method", method, "--max-steps", "2", "--out-dir", str(out / method), *flags]) == 0
        )
        found += [str(path) for path in (out / method).iterdir()]
    return found


FLAGS = [
    "--nfe",
    "1",
    "2",
    "3",
    "--count",
    "12",
    "--batch-size",
    "5",
    "--classifier-epochs",
    "20",
    "--device",
    "cpu",
    "--precision",
    "fp32",
]


@pytest.fixture(scope="module")
def results(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    assert evaluate.main([*runs, *FLAGS, "--metrics", *LOCAL, "--output", str(output)]) == 0
    return output, [json.loads((output / (run.split("/")[-1] + ".json")).read_text()) for run in runs]


def test_the_json_holds_each_figure_with_its_record(results):
    _, (interpolant, udpm) = results
    assert [(row["sampler"], row["nfe"]) for row in interpolant["rows"][:2]] == [("euler", 2), ("midpoint", 3)]
    assert (
        interpolant["rows"][2]["sampler"] == "dopri5"
        and interpolant["rows"][2]["default"]
        and interpolant["nfe_left_out"] == [1]
    )
    assert [(row["nfe"], row["default"]) for row in udpm["rows"]] == [(3, True)] and udpm["nfe_left_out"] == [1, 2]
    for result in (interpolant, udpm):
        assert (
            result["problem"]["images"] == 12
            and result["problem"]["split"] == "test"
            and result["problem"]["seed"] == 0
        )
        assert (
            result["training"]["images_seen"] == 2 * 4
            and result["costs"]["global_batch"] == 4
            and result["training"]["weights"] == "EMA"
        )
        assert (
            result["record"]["code"]
            and result["record"]["quantised"].startswith("uint8")
            and result["problem"]["classifier_accuracy"] == 100
        )
        assert all(set(LOCAL) < row.keys() and set(LOCAL) == row["errors"].keys() for row in result["rows"])
        assert result["baselines"][-1]["errors"].keys() == {"accuracy", "frechet"}  # the floor's
        assert "12 of 42 test images" in result["record"]["reference"] and "truth of 6" in result["record"]["reference"]
        json.dumps(result, allow_nan=False)
    assert interpolant["baselines"] == udpm["baselines"]
    net, critic = udpm["costs"]["parameters"]
    weights = torch.load(f"{udpm['run']}/checkpoints/last.pt", weights_only=True)["players"]
    assert (
        net > 1000
        and critic == sum(w.numel() for key, w in weights[1].items() if key != "steps")
        and len(interpolant["costs"]["parameters"]) == 1
    )
    assert interpolant["costs"]["training_flops"] > 0 and udpm["costs"]["training_flops"] > 0


def test_the_table_says_what_the_json_says(results):
    output, found = results
    written = (output / "table.md").read_text()
    rows = [
        [cell.strip(" *") for cell in row.strip("|").split("|")]
        for row in written.splitlines() if row.startswith("| ")
    ]
    header = rows[0]
    for result in found:
        for row in result["rows"]:
            line = next(
                r
                for r in rows
                if r[0] == result["method"] and r[1].startswith(row["sampler"]) and r[2] == f"{row['nfe']:.4g}"
            )
            assert (
                line[header.index("PSNR, dB ↑")] == report.cell(row, "psnr")
                and line[header.index("FD ↓")] == report.cell(row, "frechet")
            )
            assert line[header.index("accuracy, % ↑")] == report.cell(row, "accuracy")
    assert [r[0] for r in rows[1:4]] == ["input", "bicubic", "floor"]
    assert (
        "SSIM" not in header and "regression network is missing" in written and "100.0% of all test images" in written
    )
    assert "exactly so many: interpolant 1; udpm 1, 2" in written and "Not one comparison" not in written
    assert re.search(r"\| udpm \|.*\| 0\.\d\dM \+ 0\.\d\dM \| 8 \| 4 \|", written)


def test_the_plot_says_what_the_json_says(results):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    output, found = results
    assert (output / "quality.pdf").read_bytes().startswith(b"%PDF") and Image.open(output / "quality.png").width > 1000
    panels = {ax.get_ylabel(): ax for ax in report.plot(found).axes}
    assert list(panels) == ["PSNR, dB →", "FD ←", "accuracy, % →"]  # to be read upwards
    interpolant, udpm = found
    lines = {drawn.get_label(): drawn.get_xydata() for drawn in panels["PSNR, dB →"].lines}
    assert lines["interpolant"].tolist() == [[row["nfe"], row["psnr"]] for row in interpolant["rows"][:2]]
    assert lines["udpm"].tolist() == [[3, udpm["rows"][0]["psnr"]]]
    assert lines["bicubic"][:, 1].tolist() == [interpolant["baselines"][1]["psnr"]] * 2 and "floor" not in lines
    assert "floor" in {drawn.get_label() for drawn in panels["FD ←"].lines}
    regression = interpolant | dict(method="regression", rows=[dict(sampler="own", nfe=1, default=True, psnr=20.0)])
    drawn = {d.get_label(): d.get_xydata() for d in report.plot([regression, udpm]).axes[0].lines}
    assert drawn["regression"].tolist() == [[0, 20], [1, 20]]  # a horizontal line, as the baseline that it is


def test_a_problem_without_figures_has_an_empty_panel(results):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    _, (interpolant, udpm) = results
    failed = udpm | dict(
        problem=udpm["problem"] | dict(task="blur"),
        baselines=[],
        rows=[dict(sampler="own", default=True, steps=None, failed="not finite")],
    )
    assert len(report.plot([interpolant, failed]).axes) == 2 * len(report.plot([interpolant]).axes)


def test_a_json_file_is_a_run(results, tmp_path, monkeypatch):
    output, found = results
    monkeypatch.setattr(evaluate, "Judge", lambda *_: pytest.fail("nothing is to be measured"))
    assert (
        evaluate.main([*(str(output / f"{result['name']}.json") for result in found), "--output", str(tmp_path)]) == 0
    )
    assert (tmp_path / "table.md").read_text() == (output / "table.md").read_text()


def test_the_same_again_and_raw_weights(results, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no plot, and no failure
    monkeypatch.setattr(evaluate, "training_flops", lambda *_: 1.0)
    _, (before, _) = results
    found = []
    for flags in ((), ("--no-ema",)):
        assert (
            evaluate.main(
                [
                    runs[0],
                    *FLAGS[4:],
                    "--nfe",
                    "3",
                    "--no-default",
                    "--metrics",
                    "psnr",
                    "--output",
                    str(tmp_path),
                    *flags,
                ]
            )
            == 0
        )
        found.append(json.loads(next(tmp_path.glob("*.json")).read_text()))
    (again,), (raw,) = (result["rows"] for result in found)
    assert again["psnr"] == pytest.approx(before["rows"][1]["psnr"], abs=1e-4) != pytest.approx(raw["psnr"], abs=1e-4)
    assert [result["training"]["weights"] for result in found] == ["EMA", "raw"]


@pytest.mark.parametrize("failure, status", [(KeyboardInterrupt, 130), (RuntimeError, None)])
def test_what_breaks_off_keeps_the_figures_until_then(results, runs, tmp_path, monkeypatch, failure, status):
    def broken(config, net, batch):
        if config.method == "udpm" or config.sample_steps == 2:
            raise failure
        return draw(config, net, batch)

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(evaluate, "training_flops", lambda *_: 1.0)
    monkeypatch.setattr(
        evaluate,
        "samplers",
        lambda c, *_: ([replace(c, sample_steps=1), replace(c, sample_steps=2)] if c.method != "udpm" else [c], []),
    )
    monkeypatch.setattr(evaluate, "draw", broken)
    arguments = [*runs, *FLAGS[4:], "--metrics", "psnr", "--output", str(tmp_path)]
    if status is None:
        with pytest.raises(failure):
            evaluate.main(arguments)
    else:
        assert evaluate.main(arguments) == status
    kept, = tmp_path.glob("*.json")
    row, = json.loads(kept.read_text())["rows"]
    assert f"| interpolant | euler | 2 | {row['psnr']:.2f} ± " in (tmp_path / "table.md").read_text()


def test_a_network_that_is_not_finite_is_a_failed_row(runs, tmp_path, monkeypatch):
    def broken(config, net, batch):
        if config.method == "interpolant" and isinstance(net.net.net, nn.Module):
            raise SolverError("not finite")
        return draw(config, net, batch)

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(evaluate, "draw", broken)
    assert evaluate.main([*runs, *FLAGS, "--metrics", "psnr", "--output", str(tmp_path)]) == 0
    rows = {path.name[:4]: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")}
    assert {row.get("failed") for row in rows["inte"]} == {"not finite"} and all("psnr" in row for row in rows["udpm"])
    assert "| not finite |" in (tmp_path / "table.md").read_text()


def test_a_run_that_can_do_none_of_the_counts_is_measured_at_its_own(runs, tmp_path):
    """UDPM takes 3 evaluations, regression 1: neither keeps the other runs from being measured."""
    flags = "--nfe 5 --no-default --metrics psnr --device cpu".split()
    assert evaluate.main([runs[1], *flags, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / f"{Path(runs[1]).name}.json").read_text())
    assert [row["nfe"] for row in result["rows"]] == [3] and result["nfe_left_out"] == [5]


def test_results_go_to_a_folder_of_their_own(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluate.main([runs[1], "--metrics", "psnr", "--nfe", "3", "--count", "4", "--device", "cpu"]) == 0
    assert len(list(tmp_path.glob("runs/evaluation-*/table.md"))) == 1


def test_what_is_no_comparison_is_said(results):
    _, (interpolant, udpm) = results
    assert report.differences([interpolant, udpm]) == []
    longer = udpm | dict(training=udpm["training"] | dict(images_seen=999, overfit=True))
    said = " ".join(report.differences([interpolant, longer]))
    assert "images seen: 8 (interpolant); 999 (udpm)" in said and "trained on a single batch (overfit) (udpm)" in said
    blurred = udpm | dict(problem=udpm["problem"] | dict(task="blur (kernel uniform, width 9, sigma 10.0)"))
    written = report.table([interpolant, blurred])
    assert "**Not one comparison:** the runs differ in task" in written
    assert written.count("| bicubic |") == 2  # a table each
    twin = interpolant | dict(name="twin")
    assert "| twin | euler |" in report.table([interpolant, twin])


def test_how_the_input_is_enlarged_does_not_change_the_task():
    def task(**knobs):
        return evaluate.task(Config(damage=Damage(**knobs)))

    assert task(up="nearest") == task(up="bicubic") == "sr (factor 2, down box)"
    assert len({task(), task(factor=4), task(down="bicubic")}) == 3


def test_two_processes_write_what_one_writes(runs, tmp_path, process):
    """5 + 5 + 2 images, of which the first process takes 7; the classifier is trained by the first one only."""
    def arguments(name):
        return [*runs, *FLAGS, "--metrics", *LOCAL, "--cache", str(tmp_path / name / "cache"),
                "--output", str(tmp_path / name)]

    pair = [process(counting, arguments("pair"), tmp_path / f"learned-{rank}", env=env)
            for rank, env in enumerate(ranks(2))]
    assert counting(arguments("whole"), tmp_path / "learned") == 0
    for each in pair:
        each.join(120)
        assert each.exitcode == 0, each.log.read_text()
    assert [(tmp_path / f"learned-{rank}").exists() for rank in range(2)] == [True, False]
    assert said(pair[1]) == []
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.json"))
    assert len(names) == 2 and names == sorted(path.name for path in (tmp_path / "pair").glob("*.json"))
    for name in names:
        ours, theirs = (json.loads((tmp_path / folder / name).read_text()) for folder in ("pair", "whole"))
        assert [result.pop("record")["processes"] for result in (ours, theirs)] == [2, 1]
        for row in ours["rows"] + theirs["rows"]:
            assert row.pop("seconds") > 0
        assert ours == theirs


def counting(arguments, record) -> int:
    """An evaluation that leaves `record` if it trained a classifier."""
    learn = judging.Classifier.learn

    def learned(*args):
        record.touch()
        return learn(*args)

    judging.Classifier.learn = learned
    try:
        return evaluate.main(arguments)
    finally:
        judging.Classifier.learn = learn


def bad_in_one(arguments, rank) -> int:
    """An evaluation in which the second process alone meets a wrong setting."""
    pick = evaluate.pick_device

    def pick_device(name):
        if rank == 1:
            raise SettingsError("device = 'cuda': allowed is what is there")
        return pick(name)

    evaluate.pick_device = pick_device
    return evaluate.main(arguments)


@pytest.mark.parametrize("target, flags, line", [
    (bad_in_one, [], "device = 'cuda'"), (bad_in_one, ["--count", "0"], "count = 0"),
    (bad_in_one, ["--data-path", "nowhere", "--device", "cpu"], "device = 'cuda'")])
def test_a_wrong_setting_ends_all_processes_with_one_line(runs, tmp_path, process, target, flags, line):
    pair = [process(target, [runs[0], *FLAGS, "--output", str(tmp_path / "out"), *flags], rank, env=env)
            for rank, env in enumerate(ranks(2))]
    for each in pair:
        each.join(60)
        assert each.exitcode == 2, each.log.read_text()
    only, = said(pair[0])
    assert only.startswith("evaluate.py: ") and line in only and said(pair[1]) == []


def said(process) -> list[str]:
    """The lines of a process's output, without what a library warns of."""
    return [line for line in process.log.read_text().splitlines() if not line.startswith("[")]


def slow_in_one(arguments, rank, marker) -> int:
    """An evaluation in which the second process takes a minute for its first sample; the first waits for it."""
    def slow(config, net, batch):
        if rank == 1 and isinstance(net.net.net, nn.Module):
            marker.touch()
            time.sleep(60)
        return draw(config, net, batch)

    evaluate.draw = slow
    return evaluate.main(arguments)


def test_ctrl_c_ends_all_processes_with_one_line(runs, tmp_path, process):
    arguments = [runs[0], *FLAGS, "--metrics", "psnr", "--output", str(tmp_path / "out")]
    pair = [process(slow_in_one, arguments, rank, tmp_path / "slow", env=env) for rank, env in enumerate(ranks(2))]
    until((tmp_path / "slow").exists, *pair)
    time.sleep(1)  # the first one has done its part
    for each in pair:
        os.kill(each.pid, signal.SIGINT)
    for each in pair:
        each.join(30)
        assert each.exitcode == 130, each.log.read_text()
    assert said(pair[0])[-1] == "evaluate.py: interrupted" and said(pair[1]) == []
    assert pair[0].log.read_text().count("evaluate.py: ") == 1 and "Traceback" not in pair[0].log.read_text()


def test_bad_input_is_one_line_and_exit_2(runs, tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "file").write_text("")
    output = ["--output", str(tmp_path / "out")]
    cases = [
        ([], "runs = "),
        (["nowhere"], "run = 'nowhere'"),
        ([str(tmp_path / "x.json")], "no result of an evaluation"),
        ([runs[0], "--nfe", "0"], "nfe = (0,)"),
        ([runs[0], "--metrics", "speed"], "metrics = ('speed',)"),
        ([runs[0], "--count", "0"], "count = 0"),
        ([str(tmp_path)], "there is no checkpoint"),
        ([runs[0], runs[0]], "allowed is one of the name"),
        ([runs[0], "--solver", "dopri5"], "solver = 'dopri5'"),
        ([runs[0], "--device", "cudo"], "device = 'cudo'"),
        ([runs[0], "--data-path", str(tmp_path / "moved")], "moved"),
        ([runs[0], "--nfo", "3"], "nfo"),
        ([runs[0], "--output", str(tmp_path / "file" / "x")], "output = "),
    ]
    for arguments, what in cases:
        assert evaluate.main(output + arguments if "--output" not in arguments else arguments) == 2, arguments
        said = capsys.readouterr().err.strip()
        assert said.startswith("evaluate.py: ") and what in said and "\n" not in said, said


def test_the_wrong_data_is_refused(runs, tmp_path, folder, capsys):
    moved = tmp_path / "moved"
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (moved / split / label).mkdir(parents=True)
            for image in list((folder / split / "dark").iterdir())[:4]:
                (moved / split / label / image.name).write_bytes(image.read_bytes())
    flags = ["--data-path", str(moved), "--metrics", "psnr", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert evaluate.main([runs[0], *flags]) == 2
    assert "has other classes" in capsys.readouterr().err
