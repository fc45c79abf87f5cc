"""Draws of a known posterior score what they must, and evaluate.py --draws tells of them."""
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

import evaluate
from evaluation import calibration
from evaluation import judge as judging

K, STD = 8, 0.1


def scores(spread: float, draws: int = K) -> dict:
    """Of draws whose standard deviation is `spread` times that of the exact posterior N(mean, STD^2)."""
    generator = torch.Generator().manual_seed(0)
    mean = 0.2 * torch.rand(200, 3, 8, 8, generator=generator)
    truth = mean + STD * torch.randn(mean.shape, generator=generator)
    x = mean + spread * STD * torch.randn(draws, *mean.shape, generator=generator)
    return calibration.calibration_scores(x, truth, torch.ones(200, 1, 8, 8))


@pytest.mark.parametrize("spread", [1.0, 0.5])
def test_draws_of_a_gaussian_score_the_closed_forms(spread):
    found = scores(spread)
    # E|draw - truth| of two normal numbers, less half of E|draw - draw'|
    crps = STD * (math.sqrt(2 / math.pi * (1 + spread**2)) - spread / math.sqrt(math.pi))
    assert found["crps"].mean().item() == pytest.approx(127.5 * crps, rel=0.01)
    error = math.sqrt(1 + spread**2 / K)
    assert found["mean_error"].mean().item() == pytest.approx(127.5 * STD * error * math.sqrt(2 / math.pi), rel=0.01)
    ratio = calibration.spread_skill(found, K)
    assert ratio == pytest.approx(math.sqrt(1 + 1 / K) * spread / error, rel=0.01)
    # a truth y standard deviations off is above each draw with the probability Phi(y / spread)
    y = np.linspace(-6, 6, 2001)
    density = stats.norm.pdf(y) / stats.norm.pdf(y).sum()
    ranks = np.array([(density * stats.binom.pmf(rank, K, stats.norm.cdf(y / spread))).sum() for rank in range(K + 1)])
    assert found["ranks"].mean(0).tolist() == pytest.approx(ranks.tolist(), abs=0.005)
    flat = 100 * np.abs(ranks - 1 / (K + 1)).sum() / 2
    assert calibration.unevenness(found, K) == pytest.approx(flat, abs=1)
    fine = np.repeat(ranks / 8, 8)  # each rank in eighths: 72 of them, of which 18 .. 53 and 9 .. 62 are central
    coverage = [100 * fine[18:54].sum(), 100 * fine[9:63].sum()]
    assert found["coverage"].mean(0).tolist() == pytest.approx(coverage, abs=0.5)
    if spread == 1:
        assert ratio == pytest.approx(1, rel=0.01) and flat < 0.01 and coverage == pytest.approx([50, 75])
        assert crps == pytest.approx(STD / math.sqrt(math.pi))
    else:
        assert ratio < 0.55 and coverage[0] < 40


def test_the_mean_of_more_draws_is_nearer_and_their_crps_is_the_same():
    psnr = scores(1.0)["psnr_of_means"].mean(0)
    errors = [10 * math.log10((1 + 1 / n) / (1 + 1 / K)) for n in (1, 2, 4, 8)]
    assert (psnr[-1] - psnr).tolist() == pytest.approx(errors, abs=0.05)
    assert scores(1.0, 2)["crps"].mean().item() == pytest.approx(scores(1.0)["crps"].mean().item(), rel=0.02)


def test_ties_count_in_equal_parts_and_known_pixels_not_at_all():
    """Pixels that are clamped in all draws and in the truth are flat; two of eight draws equal: three ranks."""
    white = torch.full((K, 1, 3, 4, 4), 1.7)
    found = calibration.calibration_scores(white, torch.ones(1, 3, 4, 4), torch.ones(1, 1, 4, 4))
    assert found["crps"].item() == 0 and found["ranks"][0].tolist() == pytest.approx([1 / 9] * 9)
    truth, made = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]])
    draws = torch.tensor([-0.5, 0.0, 0.0, 0.5, 0.6, 0.7, 0.8, 0.9]).view(K, 1, 1, 1, 1).expand(K, 1, 1, 1, 2)
    found = calibration.calibration_scores(draws, truth, made)
    assert found["ranks"][0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0, 0])
    pairs = (draws[:, 0, 0, 0, 0, None] - draws[None, :, 0, 0, 0, 0]).abs().sum().item()
    expected = draws[:, 0, 0, 0, 0].abs().mean().item() - pairs / (2 * K * (K - 1))
    assert found["crps"].item() == pytest.approx(127.5 * expected, rel=1e-5)


def test_a_network_that_always_draws_the_same_has_its_absolute_error_and_no_spread(config):
    judge = judging.Judge(config, torch.device("cpu"), ("psnr",), count=12)
    one = judge(config, False, lambda batch: batch.z1 + 5 / 127.5, draws=4)
    assert one["crps"] == pytest.approx(5, rel=1e-4) and one["mean_error"] == pytest.approx(5, rel=1e-4)
    assert one["spread_skill"] == pytest.approx(0, abs=1e-4) and one["unevenness"] == pytest.approx(80)
    assert one["psnr_of_means"] == pytest.approx([one["psnr"]] * 3) and one["errors"]["crps"] < 1e-3
    noisy = judge(config, False, lambda batch: batch.z1 + 0.1 * batch.randn_like(batch.z1), draws=4)
    error = noisy["errors"]
    assert noisy["spread_skill"] > 1.5 and 0 < error["spread_skill"] < 0.1 and len(error["coverage"]) == 2
    assert noisy["psnr_of_means"][2] > noisy["psnr_of_means"][0] + 4  # each draw has its own noise
    assert "crps" not in judge(config, False, lambda batch: batch.zlo)


def test_draws_are_columns_of_the_table_and_a_plot(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "training_flops", lambda *_: 1.0)
    flags = "--nfe 3 --no-default --count 8 --draws 2 --metrics psnr --device cpu --precision fp32".split()
    assert evaluate.main([runs[1], *flags, "--output", str(tmp_path)]) == 0
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    (row,) = result["rows"]
    assert row["nfe"] == 3 and result["problem"]["draws"] == 2 and sum(row["ranks"]) == pytest.approx(1)
    table = (tmp_path / "table.md").read_text()
    assert "| CRPS, levels ↓ |" in table and f"{row['crps']:.2f} ± " in table and "too sure" in table
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed") and calibration.rank_plot(
        {"udpm": [row]})
    (steps,) = figure.axes[0].patches
    assert steps.get_data().values.tolist() == pytest.approx([3 * share for share in row["ranks"]])
    assert (tmp_path / "ranks.png").exists()
