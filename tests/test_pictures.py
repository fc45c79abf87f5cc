"""The pictures of a run are what was made and have the logged PSNR; where none can be made, training goes on."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

from images import data, pictures
from runs import checkpoint, metrics, same, start
from unet import Guided

TITLE = pictures.TITLE_SIZE + 9  # height of the row of titles


def read_grids(path, count: int, side: int) -> list[np.ndarray]:
    """The four grids of a picture -> each (count, side, side, 3) uint8. Images are enlarged to 64 pixels."""
    picture, scale = np.asarray(Image.open(path)), 64 // side
    columns = 2 ** math.ceil(math.log2(count / 2) / 2)
    rows = math.ceil(count / columns)
    width, height = 12 + 2 + 66 * columns, TITLE + 2 + 66 * rows + 6
    assert picture.shape == (height, 4 * width, 3)
    grids = []
    for left in range(0, 4 * width, width):
        images = []
        for i in range(count):
            y, x = TITLE + 2 + 66 * (i // columns), left + 6 + 2 + 66 * (i % columns)
            tile = picture[y:y + 64, x:x + 64].reshape(side, scale, side, scale, 3)
            assert (tile == tile[:, :1, :, :1]).all()
            images.append(tile[:, 0, :, 0])
        grids.append(np.stack(images))
    return grids


def decibels(x, truth) -> float:
    error = ((x.astype(np.float64) - truth.astype(np.float64)) ** 2).reshape(len(x), -1).mean(1)
    return float(np.mean(10 * np.log10(255**2 / error)))


@pytest.mark.parametrize("flags", ["--sample-count 4", "--sample-count 3 --no-overfit"])
def test_the_picture_is_zlo_z0_sample_truth_and_its_psnr_is_the_logged_one(tmp_path, folder, flags):
    run = start(tmp_path, f"--dataset {folder} --max-steps 3 --interpolant.sigma 1e-6 {flags}")
    count = 4 if "4" in flags else 3
    zlo, z0, sample, truth = read_grids(run / "samples" / "step_000003.png", count, 16)
    images = data.load(str(folder), 16)
    known = (images.test if "--no-overfit" in flags else images.train).permute(0, 2, 3, 1).numpy()
    assert len({image.tobytes() for image in truth}) == count  # all different, all from the right split
    assert {image.tobytes() for image in truth} <= {image.tobytes() for image in known}
    blocks = truth.reshape(count, 8, 2, 8, 2, 3).astype(np.float64)
    across = np.floor(blocks.mean(4) + 0.5)  # PIL halves the width first, to whole levels
    low = np.floor(across.mean(2) + 0.5).repeat(2, 1).repeat(2, 2)
    assert np.array_equal(zlo, low)
    assert np.array_equal(z0, zlo)  # with hardly any noise
    assert not np.array_equal(sample, zlo) and not np.array_equal(sample, truth)
    logged = next(m for m in metrics(run) if "psnr" in m)
    assert logged["psnr"] == pytest.approx(decibels(sample, truth), abs=1e-3)
    assert logged["psnr_zlo"] == pytest.approx(decibels(zlo, truth), abs=1e-3)
    assert logged["nfe"] == 3  # two Euler steps and the clean estimate


def test_the_pictures_z0_carries_the_noise_of_the_coupling(finished):
    zlo, z0, _, _ = read_grids(finished / "samples" / "step_000004.png", 2, 16)
    middle = (zlo > 120) & (zlo < 136)  # where a noise of standard deviation 1 = 127.5 levels is clipped at one sigma
    noise = (z0.astype(float) - zlo)[middle]
    assert len(noise) > 50 and abs((np.abs(noise) > 115).mean() - 0.34) < 0.12


def test_psnr_against_numpy():
    torch.manual_seed(0)
    truth = torch.rand(5, 3, 6, 7) * 2 - 1
    scales = torch.tensor([0.02, 0.1, 0.3, 1, 3])[:, None, None, None]
    x = truth + scales * torch.randn_like(truth)  # far out of range too
    levels = [np.clip(np.floor((z.double().numpy() + 1) * 127.5 + 0.5), 0, 255) for z in (x, truth)]
    assert pictures.psnr(x, truth) == pytest.approx(decibels(*levels), abs=0.01)
    one_level_off = 10 * math.log10(255**2 * 3 * 6 * 7)  # in one value
    assert pictures.psnr(truth, truth) == pytest.approx(one_level_off)


def test_the_strip_has_a_column_a_time_and_clean_estimates_below_states():
    trace = [(t, torch.full((2, 3, 64, 64), t), torch.full((2, 3, 64, 64), -t)) for t in np.linspace(0, 1, 21).tolist()]
    picture = pictures.strip(trace).astype(int)
    left = picture.shape[1] - 80 * 9 + 80 * np.arange(9)  # of each column; the titles of the rows come before them
    columns = [picture[TITLE + 2 + 32 + 66 * row, left + 6 + 2 + 32, 0] for row in range(4)]
    expected = np.round((np.array([trace[i][0] for i in (0, 2, 5, 8, 10, 12, 15, 18, 20)]) + 1) * 127.5)
    for row, sign in enumerate((1, -1, 1, -1)):
        assert np.abs(columns[row] - np.round(127.5 + sign * (expected - 127.5))).max() <= 1


def test_a_solver_that_fails_ends_no_training(tmp_path, monkeypatch, finished, capsys):
    """The network's output turns to NaN while it samples: a warning, no picture, the same weights."""
    original = Guided.__call__
    monkeypatch.setattr(Guided, "__call__", lambda self, *args: original(self, *args) * math.nan)
    run = start(tmp_path, "--max-steps 4 --sample-every 2")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no samples" in line]
    assert len(warnings) == 2 and all("euler" in line and "not finite" in line for line in warnings)
    same(checkpoint(run), checkpoint(finished), ("ema", "players", "optimizers"))
    assert not list(run.rglob("*.png"))


def test_dopri5_samples_by_default(tmp_path):
    run = start(tmp_path, "--max-steps 2 --solver auto --sample-steps None")
    logged = next(m for m in metrics(run) if "psnr" in m)
    assert logged["nfe"] >= 2 + 6 * 2 and logged["psnr"] > 5
