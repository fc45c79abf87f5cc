"""sample.py as its user runs it: on odd files, by label, with draws, in tiles; and its parts against formulas written
out here."""

import math
import os
import re
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
import trainer
from images import SettingsError, data
from images.corruptions import Damage, to_full_size
from images.files import read_image
from images.pictures import TITLE_SIZE, to_float, to_uint8
from methods.i2sb import I2SB
from methods.interpolant import Interpolant
from methods.sr3 import SR3
from methods.udpm import UDPM
from ode_int import SolverError
from support import model
from support.model import Streams, make_unet
from support.settings import from_plain
from trainer import Config
from unet import Tiled, windows

CLASSES = ["cat", "dog", "T-shirt/top"]
METHODS = dict(
    interpolant=dict(solver="heun", sample_steps=2),
    sr3=dict(sr3=SR3(T=3)),
    i2sb=dict(i2sb=I2SB(n=3)),
    edm=dict(sample_steps=2),
    udpm=dict(unet_channels=16, udpm=UDPM(lpips_weight=(0, 0, 0), disc_channels=8)),
)


def make_run(folder: Path, identity=False, **settings) -> str:
    """A run's folder with random weights, or one whose samples are the damaged images themselves.

    The latter is a bridge without noise whose network's output is 0.
    """
    settings = (
        dict(unet_channels=8, unet_dim_mults=(1, 2), unet_blocks=1, image_size=16, overfit=False, precision="fp32")
        | settings
    )
    if identity:
        settings |= dict(method="i2sb", i2sb=I2SB(n=2, ot_ode=True))
    config = Config(**settings)
    torch.manual_seed(3)
    num_classes = len(CLASSES) if config.unet_use_classes else 0
    averaged, raw = (make_unet(config, num_classes) for _ in range(2))
    if identity:
        for net in (averaged, raw):
            net.out.weight.data.zero_(), net.out.bias.data.zero_()
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(dict(config=asdict(config), step=2, classes=CLASSES, num_classes=num_classes, ema=averaged.state_dict(),
                    players=[raw.state_dict()]), folder / "checkpoints" / "last.pt")
    return str(folder)


def photo(width: int, height: int, channels=3, seed=0) -> np.ndarray:
    pixels = np.random.default_rng((seed, width, height)).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels if channels > 1 else pixels[..., 0]


def put(path: Path, pixels: np.ndarray, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path


def get(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def run(*arguments) -> int:
    return sample.main([str(a) for a in arguments])


def doubled(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(2, 0).repeat(2, 1)


# files ---------------------------------------------------------------------------------------------------------------

def test_odd_files(tmp_path, capsys):
    rgb, grey = photo(9, 14), photo(10, 8, 1)
    put(tmp_path / "in/portrait.jpg", rgb)
    put(tmp_path / "in/below/grey.png", grey)
    put(tmp_path / "in/deep.png", grey.astype(np.uint16) * 257)
    put(
        tmp_path / "in/exif.png",
        rgb,
        exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01"
        b"\x00\x06\x00\x00\x00\x00\x00\x00",
    )
    put(tmp_path / "in/alpha.png", np.concatenate([rgb, np.full((14, 9, 1), 255, np.uint8)], 2) * (rgb[..., :1] < 128))
    Image.fromarray(rgb).quantize(17).save(tmp_path / "in/palette.gif")
    whole = put(tmp_path / "whole.png", photo(40, 40)).read_bytes()
    (tmp_path / "in/truncated.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "in/empty.png").write_bytes(b"")
    (tmp_path / "in/text.png").write_text("no picture")
    identity = make_run(tmp_path / "run", identity=True)

    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "6 of 9 images restored" in captured.out
    listed = [line for line in captured.err.splitlines() if line.startswith("not restored: ")]
    assert len(listed) == 3 and all(
        str(tmp_path / "in" / f"{n}.png") in line for n, line in zip(("empty", "text", "truncated"), listed)
    )

    made = {p.relative_to(tmp_path / "out").as_posix(): get(p) for p in (tmp_path / "out").rglob("*.*")}
    triple = np.stack([grey] * 3, 2)
    over_white = np.where(rgb[..., :1] < 128, rgb, 255)
    expected = {
        "portrait.png": get(tmp_path / "in/portrait.jpg"),
        "below/grey.png": triple,
        "deep.png": triple,
        "exif.png": np.rot90(rgb, -1),
        "alpha.png": over_white,
        "palette.png": np.asarray(Image.open(tmp_path / "in/palette.gif").convert("RGB")),
    }
    assert made.keys() == expected.keys()
    for name, pixels in expected.items():
        np.testing.assert_array_equal(made[name], doubled(pixels), err_msg=name)


def test_a_grey_run_takes_colour_files(tmp_path):
    put(tmp_path / "in.png", photo(5, 6))
    assert (
        run(
            make_run(tmp_path / "run", identity=True, channels=1),
            "--input",
            tmp_path / "in.png",
            "--output",
            tmp_path / "out",
        )
        == 0
    )
    np.testing.assert_array_equal(
        get(tmp_path / "out/in.png"), doubled(np.asarray(Image.open(tmp_path / "in.png").convert("L")))
    )


def test_other_tasks_take_files_as_they_are_and_factors_are_the_runs(tmp_path):
    put(tmp_path / "in.png", photo(5, 6))
    for task, factor in (("jpeg", 1), ("sr,blur", 1), ("sr", 4)):
        identity = make_run(tmp_path / task, identity=True, task=task, damage=Damage(factor=4))
        assert run(identity, "--input", tmp_path / "in.png", "--output", tmp_path / "out", "--overwrite") == 0
        np.testing.assert_array_equal(get(tmp_path / "out/in.png"), photo(5, 6).repeat(factor, 0).repeat(factor, 1))


def test_nothing_is_overwritten(tmp_path, capsys):
    identity = make_run(tmp_path / "run", identity=True)
    for name in ("a.bmp", "a.png", "b.png"):
        put(tmp_path / "in" / name, photo(6, 6, seed=len(name) + ord(name[2])))
    put(tmp_path / "out/b.png", photo(3, 3))
    before = (tmp_path / "out/b.png").read_bytes()
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "b.png exists; --overwrite" in error and (tmp_path / "out/b.png").read_bytes() == before
    assert "a.png: another image of its name takes" in error
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out", "--overwrite") == 1
    np.testing.assert_array_equal(get(tmp_path / "out/b.png"), doubled(get(tmp_path / "in/b.png")))
    np.testing.assert_array_equal(get(tmp_path / "out/a.png"), doubled(get(tmp_path / "in/a.bmp")))
    for _ in range(2):  # the second time restores the inputs, not what was restored
        assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "in/restored", "--overwrite") == 1
    assert len(list((tmp_path / "in/restored").rglob("*"))) == 2


def test_without_output_the_run_gets_a_new_folder(tmp_path):
    put(tmp_path / "in.png", photo(4, 4))
    for path in (make_run(tmp_path / "run", identity=True), tmp_path / "run/checkpoints/last.pt"):
        assert run(path, "--input", tmp_path / "in.png", "--overwrite") == 0
    assert {p.parent.parent for p in tmp_path.rglob("restored-*/in.png")} == {tmp_path / "run"}


@pytest.mark.parametrize(
    "failure, reason", [(torch.OutOfMemoryError(), "out of GPU memory"), (SolverError("not finite"), "not finite")]
)
def test_what_breaks_off_costs_the_image_only(tmp_path, capsys, monkeypatch, failure, reason):
    identity, whole, calls = make_run(tmp_path / "run", identity=True), sample.Model.sample, []

    def small(self, zlo, *rest):
        calls.append(len(zlo))
        if zlo.shape[2] > 20 and len(calls) % 2:
            raise failure
        return whole(self, zlo, *rest)

    monkeypatch.setattr(sample.Model, "sample", small)
    put(tmp_path / "in/big.png", photo(20, 20)), put(tmp_path / "in/small.png", photo(5, 5))
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out", "--draws", 3, "--batch-size", 8) == 1
    assert calls == [1, 1, 1, 3]
    captured = capsys.readouterr()
    assert "1 of 2 images restored" in captured.out and captured.err.count(f"big.png: {reason}") == 1
    assert {p.name for p in (tmp_path / "out").glob("*_mean.png")} == {"small_mean.png"}


def test_an_interrupt_still_tells_what_was_not_restored(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    identity = make_run(tmp_path / "run", identity=True)
    monkeypatch.setattr(sample.Model, "sample", interrupted)
    put(tmp_path / "in/b.png", photo(5, 5))
    (tmp_path / "in/a.png").write_bytes(b"no image")
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 130
    error = capsys.readouterr().err
    assert "not restored: " in error and "a.png: can't be read" in error and "interrupted" in error


# how much larger, and before and after -------------------------------------------------------------------------------

@pytest.mark.parametrize("task, factors", [("sr", (4, 2)), ("sr,jpeg", (4, 2)), ("sr,jpeg", 2), ("jpeg", 2)])
def test_factor_says_how_much_larger(tmp_path, capsys, task, factors):
    damage = Damage(factor=factors, down="bicubic", up="bicubic")
    identity = make_run(tmp_path / "run", identity=True, task=task, damage=damage)
    rgb = photo(11, 9)
    image = put(tmp_path / "in.png", rgb)
    known = set() if task == "jpeg" else {factors} if isinstance(factors, int) else set(factors)
    if task != "sr":
        known.add(1)
    for factor in (1, 2, 3, 4):
        out = tmp_path / f"{factor}"
        status = run(identity, "--input", image, "--factor", factor, "--output", out)
        if factor in known:
            enlarged = to_uint8(to_full_size(to_float(torch.from_numpy(rgb).permute(2, 0, 1))[None], factor, "bicubic"))
            assert status == 0
            made = get(out / "in.png")
            assert made.shape == (9 * factor, 11 * factor, 3)
            assert abs(made.astype(int) - enlarged[0].permute(1, 2, 0).numpy()).max() <= 1
        else:
            assert status == 2 and f"factor = {factor}: allowed is" in capsys.readouterr().err
    status = run(identity, "--input", image, "--output", tmp_path / "none")
    if task == "sr":
        assert status == 2 and "the run knows 2, 4; name one" in capsys.readouterr().err
    else:
        assert status == 0 and get(tmp_path / "none/in.png").shape == (9, 11, 3)


def test_of_one_file_before_and_after_stand_side_by_side(tmp_path):
    identity, rgb = make_run(tmp_path / "run", identity=True, task="jpeg"), photo(20, 16)
    image = put(tmp_path / "in/a.png", rgb)
    assert run(identity, "--input", image, "--output", tmp_path / "one") == 0
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"a.png", "a_before_after.png"}
    page = get(tmp_path / "one/a_before_after.png")
    height, width = page.shape[:2]
    assert width >= 40 and height > 16
    found = [(page[y:y + 16, x:x + 20] == rgb).all() for y in range(height - 15) for x in range(width - 19)]
    assert sum(found) == 2  # the identity's result is the image
    for more, names in (("--before-after", "on"), {"a.png", "a_before_after.png"}), ((), {"a.png"}):
        out = tmp_path / f"folder{len(more)}"
        assert run(identity, "--input", tmp_path / "in", "--output", out, *more) == 0
        assert {p.name for p in out.iterdir()} == names
    assert run(identity, "--input", image, "--output", tmp_path / "no", "--before-after", "off") == 0
    assert {p.name for p in (tmp_path / "no").iterdir()} == {"a.png"}


# inpainting ----------------------------------------------------------------------------------------------------------

def test_inpainting_makes_what_the_mask_or_transparency_says(tmp_path, capsys):
    path, rgb = make_run(tmp_path / "run", method="edm", sample_steps=2, task="inpaint"), photo(12, 10)
    hole = np.zeros((10, 12), bool)
    hole[2:5, 3:9] = True
    put(tmp_path / "in/a.png", rgb)
    put(tmp_path / "in/b.jpg", rgb)
    put(tmp_path / "in/c.png", rgb)
    put(tmp_path / "masks/a.bmp", (hole * 255).astype(np.uint8))
    put(tmp_path / "masks/c.png", np.full((10, 13), 255, np.uint8))
    assert run(path, "--input", tmp_path / "in", "--masks", tmp_path / "masks", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert re.search("b.jpg: no mask of this name", error) and re.search("c.png: it is 12x10, its mask 13x10", error)
    made = get(tmp_path / "out/a.png")
    np.testing.assert_array_equal(made[~hole], rgb[~hole])
    assert (made[hole] != rgb[hole]).any(-1).mean() > 0.9

    soft = np.where(hole, 254, 255).astype(np.uint8)  # any transparency has white in it
    put(tmp_path / "alpha/a.png", np.dstack([rgb, soft]))
    put(tmp_path / "alpha/opaque.png", rgb)
    assert run(path, "--input", tmp_path / "alpha", "--output", tmp_path / "out2") == 1
    np.testing.assert_array_equal(get(tmp_path / "out2/a.png"), made)
    assert "opaque.png: nothing is to be made" in capsys.readouterr().err
    one = tmp_path / "masks/a.bmp"
    assert run(path, "--input", tmp_path / "alpha", "--masks", one, "--output", tmp_path / "out3") == 0


def test_a_mixture_restores_whole_images_and_holes(tmp_path):
    path, rgb = make_run(tmp_path / "run", method="edm", sample_steps=2, task="inpaint,blur"), photo(8, 8)
    hole = np.zeros((8, 8), bool)
    hole[:4] = True
    put(tmp_path / "in/part.png", np.dstack([rgb, 255 - hole * 255]).astype(np.uint8))
    put(tmp_path / "in/whole.png", rgb)
    assert run(path, "--input", tmp_path / "in", "--output", tmp_path / "out") == 0
    np.testing.assert_array_equal(get(tmp_path / "out/part.png")[4:], rgb[4:])
    assert (get(tmp_path / "out/whole.png") != rgb).any(-1).mean() > 0.9


# noise ---------------------------------------------------------------------------------------------------------------

def test_noise_comes_row_by_row():
    rows, alone = [[(1.0, (0, "a", 0))], [(1.0, (0, "b", 0))], [(0.6, (0, "a", 0)), (0.8, (0, "b", 0))]], []
    shapes = torch.empty(3, 3, 4), torch.empty(3, 5, dtype=torch.float64)
    together = Streams(rows, "cpu")
    first, second = map(together.randn_like, shapes)
    for row in rows:
        single = Streams([row], "cpu")
        alone.append([single.randn_like(x[:1]) for x in shapes])
    assert torch.equal(first, torch.cat([r[0] for r in alone])) and torch.equal(
        second, torch.cat([r[1] for r in alone])
    )
    torch.testing.assert_close(second[2], 0.6 * second[0] + 0.8 * second[1])
    normal = Streams([[(1.0, (0, "", i))] for i in range(200)], "cpu").randn_like(torch.empty(200, 20))
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_its_batch_but_on_seed_name_and_draw(tmp_path, method):
    path = make_run(tmp_path / "run", method=method, task="jpeg", **METHODS[method])
    for name in "ab":
        put(tmp_path / f"in/{name}.png", photo(16, 16))
    for out, more in (("both", ()), ("again", ()), ("seed", ("--seed", 1)), ("draws", ("--draws", 2))):
        assert run(path, "--input", tmp_path / "in", "--output", tmp_path / out, *more) == 0
    assert run(path, "--input", tmp_path / "in/a.png", "--output", tmp_path / "alone") == 0
    assert run(path, "--input", tmp_path / "in", "--output", tmp_path / "one", "--batch-size", 1, "--draws", 2) == 0
    a = get(tmp_path / "both/a.png").astype(int)
    np.testing.assert_array_equal(get(tmp_path / "again/a.png"), a)
    for same in ("alone/a.png", "draws/a_1.png", "one/a_1.png"):
        assert abs(get(tmp_path / same) - a).max() <= 1, same  # rounding
    assert abs(get(tmp_path / "one/b_2.png") - get(tmp_path / "draws/b_2.png").astype(int)).max() <= 1
    for other in ("both/b.png", "seed/a.png", "draws/a_2.png"):
        assert abs(get(tmp_path / other) - a).mean() > 0.5, other


def test_draws_have_a_mean_and_a_standard_deviation(tmp_path):
    path = make_run(tmp_path / "run", interpolant=Interpolant(sigma=0.1), solver="euler", sample_steps=1)
    put(tmp_path / "in.png", photo(8, 6))
    assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / "out", "--draws", 3) == 0
    draws = np.stack([get(tmp_path / f"out/in_{i}.png") for i in (1, 2, 3)]).astype(float)
    np.testing.assert_allclose(get(tmp_path / "out/in_mean.png"), draws.mean(0), atol=0.51)
    std = np.sqrt(draws.var(0, ddof=1).mean(2))
    np.testing.assert_allclose(get(tmp_path / "out/in_std.png"), np.minimum(8 * std, 255), atol=0.51)
    assert 0 < std.max() and (8 * std < 255).any()


# tiles ---------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    "side, tile, align", [(100, 20, 1), (160, 32, 16), (72, 32, 8), (24, 32, 8), (65, 32, 1), (16, 4, 2)]
)
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
    out = Tiled(net, 64, 64, 1, 64)(x, torch.zeros(1))
    assert out[..., 0, 0].item() == 0 and out[..., -1].mean() == 1  # tiles differ by up to 40/64 ...
    assert out.diff(dim=3).abs().max() < 40 / 64 * 1.6 / 8  # ... and a smooth step over 8 pixels is at most 1.5/8 steep


def test_much_larger_images_go_in_tiles_at_no_more_nfe(tmp_path, capsys):
    path = make_run(tmp_path / "run", method="i2sb", i2sb=I2SB(n=4), task="blur")
    for side in (32, 33):  # one piece up to twice the side trained on
        put(tmp_path / "in.png", photo(side, 20))
        made = {}
        for name, more in dict(tiles=(), whole=("--tile", 0), few=("--batch-size", 1)).items():
            assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / name, "--overwrite", *more) == 0
            assert ": 4 NFE" in capsys.readouterr().out
            made[name] = get(tmp_path / name / "in.png").astype(int)
            assert made[name].shape == (20, side, 3)
        assert abs(made["tiles"] - made["few"]).max() <= 1
        assert (abs(made["tiles"] - made["whole"]).max() > 1) == (side > 32)


@pytest.mark.parametrize("more", [(), ("--tile", 5)])
def test_tiles_of_whole_jpeg_blocks_have_no_gap(tmp_path, more):
    path = make_run(
        tmp_path / "run", identity=True, task="jpeg"
    )  # 16 pixels, as a block: tiles must overlap all the same
    put(tmp_path / "in.png", photo(70, 37))
    assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / "out", *more) == 0
    np.testing.assert_array_equal(get(tmp_path / "out/in.png"), photo(70, 37))


@pytest.mark.parametrize("width, height", [(13, 21), (7, 70), (1, 1)])
def test_udpm_takes_any_sides(tmp_path, width, height):
    path = make_run(tmp_path / "run", method="udpm", task="blur", **METHODS["udpm"])
    put(tmp_path / "in.png", photo(width, height))
    assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / "out") == 0
    assert get(tmp_path / "out/in.png").shape == (height, width, 3)


# generation ----------------------------------------------------------------------------------------------------------

def test_generation_by_label(tmp_path, capsys):
    path = make_run(tmp_path / "run", method="edm", sample_steps=2, task="generate")
    made = {}
    for name, more in dict(
        all=("--label", "all"),
        two=("--label", "T-shirt/top, 0"),
        one=("--label", 2),
        none=(),
        half=("--label", 2, "--guidance", 0),
        strong=("--label", 2, "--guidance", 3),
    ).items():
        assert run(path, "--count", 2, "--output", tmp_path / name, *more) == 0
        assert f": {6 if name == 'strong' else 3} NFE" in capsys.readouterr().out  # guidance calls twice
        made[name] = {p.name: get(p).astype(int) for p in sorted((tmp_path / name).iterdir()) if p.name != "grid.png"}
    assert list(made["all"]) == [
        "T-shirt-top_0001.png",
        "T-shirt-top_0002.png",
        "cat_0001.png",
        "cat_0002.png",
        "dog_0001.png",
        "dog_0002.png",
    ]
    assert list(made["two"]) == [n for n in made["all"] if "dog" not in n]
    shirt, other = made["one"]["T-shirt-top_0001.png"], made["one"]["T-shirt-top_0002.png"]
    for name in ("all", "two"):
        assert abs(made[name]["T-shirt-top_0001.png"] - shirt).max() <= 1
        assert abs(made[name]["cat_0001.png"] - shirt).max() > 1
    assert abs(other - shirt).mean() > 2
    assert abs(made["half"]["T-shirt-top_0001.png"] - made["none"]["image_0001.png"]).max() <= 1
    half, strong = made["half"]["T-shirt-top_0001.png"], made["strong"]["T-shirt-top_0001.png"]
    assert abs(strong - half).mean() > 1.5 * abs(shirt - half).mean()
    grid = get(tmp_path / "all/grid.png")[TITLE_SIZE + 9:-6, -(2 * 66 + 2 + 6):-6]  # what is inside the titles
    assert grid.shape == (3 * 66 + 2, 2 * 66 + 2, 3)  # 16 pixels enlarged by 4; a row a label
    for row, name in zip(grid[4::66], ("cat", "dog", "T-shirt-top")):
        np.testing.assert_array_equal(row[4], made["all"][f"{name}_0001.png"][0, 0])
    assert run(path, "--count", 2, "--output", tmp_path / "all", "--label", "all") == 2  # they exist


def test_classes_whose_names_differ_in_punctuation_have_files_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "CLASSES", ["a b", "a/b", "c"])
    path = make_run(tmp_path / "run", method="edm", sample_steps=1, task="generate")
    assert run(path, "--count", 1, "--output", tmp_path / "out", "--label", "all", "--trace") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} - {"grid.png", "grid_trace.png", "grid_trace.gif"} == {
        f"{n}_0001.png" for n in ("a-b-0", "a-b-1", "c-2")
    }
    assert "NFE with the trace" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["udpm", "sr3"])
def test_the_way_between_two_seeds(tmp_path, method):
    path = make_run(tmp_path / "run", method=method, task="generate,blur", **METHODS[method])
    put(tmp_path / "dog.png", photo(16, 16))
    for out, more in dict(a=("--seed", 5), b=("--seed", 8), way=("--interpolate", 5, 8)).items():
        assert run(path, "--count", 3, "--label", "dog", "--output", tmp_path / out, *more) == 0
        draws = ("--draws", 3) if out == "way" else ()
        assert run(path, "--input", tmp_path / "dog.png", "--output", tmp_path / out, *draws, *more) == 0
    for names, end in ((["dog_0001", "dog_0002", "dog_0003"], "dog_0001"), (["dog_1", "dog_2", "dog_3"], "dog")):
        way = [get(tmp_path / f"way/{name}.png").astype(int) for name in names]
        for picture, seed in ((way[0], "a"), (way[2], "b")):
            assert abs(picture - get(tmp_path / seed / f"{end}.png")).max() <= 1
        ends = abs(way[0] - way[2]).mean()
        assert 0 < abs(way[1] - way[0]).mean() < ends and 0 < abs(way[1] - way[2]).mean() < ends


# sampler, weights, pictures ------------------------------------------------------------------------------------------

def test_the_sampler_is_the_runs_unless_named(tmp_path, capsys):
    path = make_run(tmp_path / "run", solver="heun", sample_steps=3)
    put(tmp_path / "in.png", photo(8, 8))
    for more, nfe in ((), 7), (("--steps", 5), 11), (("--solver", "rk4", "--steps", 2), 9), (("--solver", "euler"), 51):
        assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / "out", "--overwrite", *more) == 0
        assert f": {nfe} NFE" in capsys.readouterr().out, more  # and one more for the clean estimate
    counts = []
    for tolerance in (1e-2, 1e-4):
        assert (
            run(
                path,
                "--input",
                tmp_path / "in.png",
                "--output",
                tmp_path / "out",
                "--overwrite",
                "--solver",
                "auto",
                "--tolerance",
                tolerance,
            )
            == 0
        )
        counts.append(int(re.search(r": (\d+) NFE", capsys.readouterr().out)[1]))
    assert counts[0] < counts[1]


def test_an_interpolant_is_sampled_in_a_few_steps_unless_its_run_or_the_user_says_otherwise(tmp_path, capsys):
    path, named = make_run(tmp_path / "run", solver="auto"), make_run(tmp_path / "named", solver="dopri5")
    put(tmp_path / "in.png", photo(16, 16))
    for each, more, midpoint in (
        (path, (), 11),
        (path, ("--steps", 3), 7),
        (path, ("--tolerance", 1e-3), None),
        (named, (), None),
    ):
        assert run(each, "--input", tmp_path / "in.png", "--output", tmp_path / "out", "--overwrite", *more) == 0
        nfe = int(re.search(r": (\d+) NFE", capsys.readouterr().out)[1])
        assert (
            nfe == midpoint if midpoint else nfe > 11 and nfe % 6 == 3
        )  # dopri5: 2 to start with, 6 a step, the clean estimate


def test_trace_shows_the_path_and_changes_nothing(tmp_path):
    path = make_run(tmp_path / "run", method="sr3", sr3=SR3(T=6))
    put(tmp_path / "in/a.png", photo(5, 6)), put(tmp_path / "in/b.png", photo(5, 6, seed=1))
    for name, more in ("plain", ()), ("traced", ("--trace",)):
        assert run(path, "--input", tmp_path / "in", "--output", tmp_path / name, *more) == 0
    for name in "ab":
        result = get(tmp_path / f"traced/{name}.png")
        np.testing.assert_array_equal(result, get(tmp_path / f"plain/{name}.png"))
        gif, strip = Image.open(tmp_path / f"traced/{name}_trace.gif"), get(tmp_path / f"traced/{name}_trace.png")
        assert gif.n_frames == 7  # six steps, and the sample
        gif.seek(gif.n_frames - 1)
        for picture in (strip, np.asarray(gif.convert("RGB"))):  # inside the last, enlarged pixel of the last image
            assert abs(picture[-11, -11].astype(int) - result[-1, -1]).max() <= 24  # a GIF has 256 colours


def test_the_trace_of_a_large_image_is_small(tmp_path):
    path = make_run(tmp_path / "run", solver="heun", sample_steps=1)
    put(tmp_path / "in.png", photo(140, 3))
    for name, more in ("plain", ()), ("traced", ("--trace",)):
        assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / name, *more) == 0
    np.testing.assert_array_equal(get(tmp_path / "traced/in.png"), get(tmp_path / "plain/in.png"))
    assert Image.open(tmp_path / "traced/in_trace.gif").width < 2 * 180


def test_frames_are_few_and_even():
    frames, picture = sample.Frames((4, 6), largest=3), torch.arange(48.0).view(1, 1, 6, 8)
    for i in range(1000):
        frames.append((float(i), picture, picture))
        assert frames[-1][1] is picture  # ode_int.solve takes the sample from there
    times = [t for t, _, _ in frames]
    assert 32 <= len(times) <= 64 and len(set(np.diff(times))) == 1 and times[0] == 0 and times[-1] > 950
    for _, state, _ in frames[:-1]:
        torch.testing.assert_close(state, F.avg_pool2d(picture[:, :, :4, :6], 2))


def test_export_samples_the_same_bits(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path = make_run(tmp_path / "run", method="edm", sample_steps=2, task="generate")
    for name, more in ("model", ()), ("raw", ("--no-ema",)):
        assert run(path, "--export", tmp_path / f"{name}.safetensors", *more) == 0
        assert run(path, "--count", 2, "--label", 1, "--output", tmp_path / name, *more) == 0
        assert (
            run(
                tmp_path / f"{name}.safetensors",
                "--count",
                2,
                "--label",
                "dog",
                "--output",
                tmp_path / f"{name}-again",
                *more,
            )
            == 0
        )
        np.testing.assert_array_equal(get(tmp_path / f"{name}-again/grid.png"), get(tmp_path / name / "grid.png"))
    assert (get(tmp_path / "model/grid.png") != get(tmp_path / "raw/grid.png")).any()
    capsys.readouterr()
    assert run(path, "--export", tmp_path / "model.safetensors") == 2 and "exists" in capsys.readouterr().err
    assert (
        run(tmp_path / "model.safetensors", "--count", 2, "--no-ema") == 2
        and "averaged weights only" in capsys.readouterr().err
    )


def test_half_of_an_exported_file_is_the_weights_rounded_to_bf16(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path, images = make_run(tmp_path / "run", method="i2sb", sample_steps=2), put(tmp_path / "in.png", photo(12, 9))
    for name, more in ("whole", ()), ("half", ("--half",)):
        assert run(path, "--export", tmp_path / f"{name}.safetensors", *more) == 0
        assert run(tmp_path / f"{name}.safetensors", "--input", images, "--output", tmp_path / name) == 0
    whole, half = (sample.open_model(str(tmp_path / f"{name}.safetensors")) for name in ("whole", "half"))
    for one, other in zip(whole.net.parameters(), half.net.parameters()):
        assert other.dtype == torch.float32 and torch.equal(one.bfloat16().float(), other)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[0] - sizes[1] == pytest.approx(2 * sum(p.numel() for p in whole.net.parameters()), abs=64)  # header
    assert abs(get(tmp_path / "whole/in.png").astype(int) - get(tmp_path / "half/in.png")).max() <= 2
    assert run(path, "--input", images, "--half") == 2 and "half = True" in capsys.readouterr().err


def test_an_exported_file_tells_no_folder_of_its_makers_disk(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    paths = dict(dataset=str(tmp_path / "data/photos"), data_path="/elsewhere/data", paired_path=None, out_dir="runs")
    path = make_run(tmp_path / "run", **paths)
    monkeypatch.chdir(tmp_path)
    assert run(path, "--export", "model.safetensors") == 0
    config = sample.open_model("model.safetensors").config
    assert run("model.safetensors", "--input", put(tmp_path / "in.png", photo(8, 8))) == 0
    folder, = (tmp_path / "runs").iterdir()  # pictures lie where runs do
    assert folder.name.startswith("restored-") and (folder / "in.png").exists()
    assert {name: getattr(config, name) for name in paths} == paths | dict(dataset="data/photos", data_path="data")


def test_an_exported_file_is_not_exported_again(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path = make_run(tmp_path / "run")
    assert run(path, "--export", tmp_path / "raw.safetensors", "--no-ema") == 0
    assert run(tmp_path / "raw.safetensors", "--export", tmp_path / "again.safetensors") == 2
    assert "exported file already" in capsys.readouterr().err and not (tmp_path / "again.safetensors").exists()


def test_export_without_the_package_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert run(make_run(tmp_path / "run"), "--export", tmp_path / "model.safetensors") == 2
    assert "pip install safetensors" in capsys.readouterr().err


def test_a_run_of_the_trainer(tmp_path, capsys):
    arguments = (
        "--dataset shapes --max-steps 2 --batch-size 4 --image-size 16 --unet-channels 8 --unet-dim-mults 1 2 "
        "--unet-blocks 1 --no-use-wandb"
    )
    assert (
        trainer.main(
            [
                *arguments.split(),
                "--precision",
                "fp32",
                "--solver",
                "heun",
                "--sample-steps",
                "1",
                "--out-dir",
                str(tmp_path / "runs"),
            ]
        )
        == 0
    )
    folder, = (tmp_path / "runs").iterdir()
    put(tmp_path / "in.png", photo(8, 8))
    assert run(folder, "--input", tmp_path / "in.png", "--label", "moon", "--output", tmp_path / "out") == 0
    assert get(tmp_path / "out/in.png").shape == (16, 16, 3)
    # the same by hand
    checkpoint = torch.load(folder / "checkpoints/last.pt", weights_only=True)
    config = from_plain(Config, checkpoint["config"])
    net = make_unet(config, 10).eval()
    net.load_state_dict(checkpoint["ema"])
    zlo = to_full_size(to_float(read_image(tmp_path / "in.png", 3))[None], 2, "nearest")
    with torch.no_grad():
        z = zlo + Streams([[(1.0, (0, "in.png", 0))]], "cpu").randn_like(zlo)
        y = torch.tensor([data.SHAPES.index("moon")])

        def v(t, z):
            return net(z, torch.full((1,), t), y, zlo)

        first = v(0.001, z)
        z = z + 0.998 * (first + v(0.999, z + 0.998 * first)) / 2
        z = z + 0.001 * v(0.999, z)  # the clean estimate
    assert abs(to_uint8(z)[0].permute(1, 2, 0).numpy().astype(int) - get(tmp_path / "out/in.png")).max() <= 1


# wrong values --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "arguments, line",
    [
        ("", "one of --input"),
        ("--count 3 --input x", "one of --input"),
        ("--bogus 1", "bogus"),
        ("--count many", "count"),
        ("--count 0", "count = 0"),
        ("--count 3", "restores damaged images"),
        ("--input nowhere", "nowhere"),
        ("--input in --draws 0", "draws = 0"),
        ("--input in --guidance 2", "with a --label"),
        ("--input in --label horse", "label = 'horse': allowed is all, or from cat, dog"),
        ("--input in --label 3", "label = '3'"),
        ("--input in --label all", "label = 'all'"),
        ("--input in --solver rk5", "'rk5'"),
        ("--input in --solver dopri5 --steps 5", "steps = 5"),
        ("--input in --device nowhere", "device = 'nowhere'"),
        ("--input in --interpolate 1 2", "--draws above 1"),
        ("--input in --masks in", "takes none"),
        ("--input in --tolerance 0", "tolerance = 0"),
        ("--input in --output in", "another folder"),
        ("--input in --output a.png", "a folder"),
        ("--export model.pt", ".safetensors"),
    ],
)
def test_wrong_values_are_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "in/a.png", photo(4, 4))
    assert sample.main([make_run(tmp_path / "run"), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("sample.py: ") and line in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "run"]  # nothing was written


def test_runs_that_are_none_are_refused(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    (tmp_path / "a.pt").write_bytes(b"nothing")
    for path in ("a.pt", "b.pt", "a.safetensors", "b.safetensors", "."):
        assert run(tmp_path / path, "--count", 1) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and (path in error or "safetensors" in error)


# what would be lost ---------------------------------------------------------------------------------------------------

def test_names_and_places_that_cannot_be_written_are_told_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    identity = make_run(tmp_path / "run", identity=True)
    put(tmp_path / "in/ok.png", photo(5, 5))
    put(tmp_path / f"in/{'n' * 254}", photo(5, 5), format="PNG")
    os.rename(tmp_path / f"in/{'n' * 254}", tmp_path / f"in/{'n' * 250}.gif")  # its PNG would be of 254 bytes: fine
    put(tmp_path / "in/below/deep.png", photo(5, 5))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/below").write_text("a file in a folder's place")
    flags = "--input", tmp_path / "in", "--output", tmp_path / "out", "--draws", 2
    assert run(identity, *flags) == 1
    listed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not restored")]
    assert len(listed) == 2 and "below/deep" in listed[0] and "File name too long" in listed[1]
    assert (tmp_path / "out/ok_mean.png").exists()


def test_a_disk_that_fills_costs_the_image_only(tmp_path, capsys, monkeypatch):
    identity, save = make_run(tmp_path / "run", identity=True), sample.save_png
    for name in "abc":
        put(tmp_path / f"in/{name}.png", photo(5, 5))

    def full(path, image):
        if path.name == "b.png":
            raise OSError(28, "No space left on device")
        save(path, image)

    monkeypatch.setattr(sample, "save_png", full)
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    assert "b.png: No space left on device" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "c.png"}


@pytest.mark.parametrize("flags", [("--input", ""), ("--input", "in.png", "--output", "")])
def test_an_empty_path_is_named(tmp_path, capsys, flags):
    assert run(make_run(tmp_path / "run", identity=True), *flags) == 2
    assert " = '': allowed is a" in capsys.readouterr().err


def test_a_picture_past_memory_is_told_with_its_size(tmp_path, capsys, monkeypatch):
    identity = make_run(tmp_path / "run", identity=True)
    put(tmp_path / "in/large.png", photo(300, 200)), put(tmp_path / "in/small.png", photo(5, 5))
    put(tmp_path / "in/strip.png", photo(1, 1001))
    monkeypatch.setattr(model, "free_memory", lambda: 50 * 10**6)
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "large.png: its 0.06 million pixels (300x200) would take about 0.0624 GB" in error
    assert "strip.png: its sides are 1x1001" in error and (tmp_path / "out/small.png").exists()


@pytest.mark.parametrize("sides", [(1, 900), (500, 1)])
def test_strips_are_restored_within_seconds(tmp_path, sides):
    path = make_run(tmp_path / "run", solver="midpoint", sample_steps=1)
    put(tmp_path / "in.png", photo(*sides))
    began = time.monotonic()
    assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / "out") == 0
    assert get(tmp_path / "out/in.png").shape == (2 * sides[1], 2 * sides[0], 3) and time.monotonic() - began < 20


@pytest.mark.parametrize("sides", [(1, 1), (1, 7), (2, 3)])
def test_a_side_of_one_pixel_is_finite_in_bf16_too(tmp_path, sides):
    settings = dict(task="jpeg", solver="midpoint", sample_steps=2, unet_dim_mults=(1, 2, 2), precision="bf16")
    path = make_run(tmp_path / "run", **settings)
    put(tmp_path / "in.png", photo(*sides))
    assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / "out") == 0


@pytest.mark.parametrize("method", METHODS)
def test_an_output_that_is_not_finite_is_no_picture(tmp_path, capsys, method):
    path = make_run(tmp_path / "run", method=method, task="jpeg", **METHODS[method])
    state = torch.load(f"{path}/checkpoints/last.pt", weights_only=True)
    state["ema"]["out.bias"][:] = math.nan
    torch.save(state, f"{path}/checkpoints/last.pt")
    put(tmp_path / "in/a.png", photo(16, 16))
    assert run(path, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    assert "not finite" in capsys.readouterr().err and not list((tmp_path / "out").glob("*.png"))


# guidance -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [dict(overfit=True), dict(label_drop=0.0)])
def test_guidance_needs_a_null_label_that_was_trained(tmp_path, capsys, settings):
    path = make_run(tmp_path / "run", task="generate", method="edm", sample_steps=2, **settings)
    assert run(path, "--count", 1, "--label", "cat", "--guidance", 2) == 2
    assert "guidance = 2.0: allowed is 1" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="guidance = 3"):
        sample.open_model(path, guidance=3)
    assert run(path, "--count", 1, "--label", "cat", "--output", tmp_path / "out") == 0


# UDPM's latent --------------------------------------------------------------------------------------------------------

def test_a_level_of_the_latent_is_swapped_or_redrawn(tmp_path, capsys):
    path = make_run(tmp_path / "run", method="udpm", task="generate", **METHODS["udpm"])
    seen, original = [], UDPM.latent

    def latent(self, batch):
        seen.append(original(self, batch))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UDPM, "latent", latent)
        for name, flags in dict(a=(), b=("--seed", 1), swapped=("--swap", 2, 1), redrawn=("--perturb", 3, 0.6)).items():
            assert run(path, "--count", 2, "--output", tmp_path / name, *flags) == 0
    a, b, swapped, redrawn = seen  # level 3, 2, 1
    for i, level in enumerate((3, 2, 1)):
        torch.testing.assert_close(swapped[i], (b if level == 2 else a)[i])
    first = [maps[:1].expand_as(maps) for maps in a]  # the variants are of the first image's latent
    torch.testing.assert_close(redrawn[1], first[1])
    torch.testing.assert_close(redrawn[2], first[2])
    fresh = (redrawn[0] - 0.8 * first[0]) / 0.6
    assert (fresh[0] - fresh[1]).abs().max() > 0.1 and 0.3 < fresh.std() < 2
    for flags, words in ((("--swap", 4, 1), "level = 4"), (("--perturb", 1, 1.5), "perturb"),
                         (("--swap", 1, 1, "--perturb", 1, 0.5), "swap")):
        assert run(path, "--count", 2, "--output", tmp_path / "x", *flags) == 2 and words in capsys.readouterr().err
    other = make_run(tmp_path / "edm", method="edm", task="generate", sample_steps=2)
    assert run(other, "--count", 2, "--output", tmp_path / "x", "--swap", 1, 1) == 2
    assert "for UDPM only" in capsys.readouterr().err


# several processes ----------------------------------------------------------------------------------------------------

def test_the_parts_make_what_one_process_makes(tmp_path, capsys, monkeypatch):
    restoring = make_run(tmp_path / "run", method="edm", sample_steps=2)
    making = make_run(tmp_path / "other", method="edm", task="generate", sample_steps=2)
    for i in range(5):
        put(tmp_path / f"in/{i}.png", photo(5, 5, seed=i))
    for path, flags in ((restoring, ("--input", tmp_path / "in")), (making, ("--count", 3, "--label", "cat,dog"))):
        whole, parts, torchrun = (tmp_path / f"{name}{path[-3:]}" for name in ("whole", "parts", "torchrun"))
        assert run(path, *flags, "--output", whole) == 0
        for part in ("0/3", "1/3", "2/3"):
            assert run(path, *flags, "--output", parts, "--partition", part) == 0
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
            assert run(path, *flags, "--output", torchrun) == 0
        monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
        expected = {p.name: get(p).astype(int) for p in whole.iterdir() if p.name != "grid.png"}
        for made in (parts, torchrun):
            assert {p.name for p in made.iterdir()} - {"grid.png"} == expected.keys()
            assert all(abs(get(made / name) - pixels).max() <= 1 for name, pixels in expected.items())
    for wrong in ("3/3", "x", "-1/2"):
        assert run(restoring, "--input", tmp_path / "in", f"--partition={wrong}") == 2
        assert "partition = " in capsys.readouterr().err
