"""SR3's schedules, and its reverse steps on Gaussians; test_methods.py has what holds for every method."""
import math

import pytest
import torch

from methods.sr3 import SR3
from networks import gaussian, make_batch, oracle, sample_by

SCHEDULES = ("quadratic", "linear", "constant", "warmup")


def unit_net(sr3, mean):
    """E[eps | x] for data N(mean, 1), pixel by pixel."""
    return gaussian(sr3, (mean, 0), ((1, 0), (0, 0)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_ends_and_monotonicity(schedule):
    sr3 = SR3(schedule=schedule, T=500, beta_start=1e-5, beta_end=0.02, warmup=0.25)
    gammas = sr3.gammas()
    assert gammas.dtype == torch.float64 and len(gammas) == 501 and gammas[0] == 1
    beta = 1 - gammas[1:] / gammas[:-1]
    first = 0.02 if schedule == "constant" else 1e-5
    assert beta[0].item() == pytest.approx(first, rel=1e-9) and beta[-1].item() == pytest.approx(0.02, rel=1e-9)
    assert (gammas.diff() < 0).all() and gammas[-1] > 0
    # each curve by its own characteristic: what is constant along it
    if schedule == "quadratic":
        torch.testing.assert_close(beta.sqrt().diff(), torch.full((499,), (0.02**0.5 - 1e-5**0.5) / 499).double())
    elif schedule == "linear":
        torch.testing.assert_close(beta.diff(), torch.full((499,), (0.02 - 1e-5) / 499).double())
    elif schedule == "constant":
        torch.testing.assert_close(gammas, 0.98 ** torch.arange(501).double())
    else:
        torch.testing.assert_close(beta[:125].diff(), torch.full((124,), (0.02 - 1e-5) / 124).double())
        torch.testing.assert_close(beta[124:], torch.full((376,), 0.02).double())


def test_default_schedule_is_the_published_one():
    """alpha from 1 to 0.993 over 2000 quadratic steps leaves 0.88% of the signal's variance at T."""
    gammas = SR3().gammas()
    assert len(gammas) == 2001
    assert 1 - gammas[1].item() == pytest.approx(1e-6, rel=1e-6)
    assert gammas[2000].item() / gammas[1999].item() == pytest.approx(0.993, rel=1e-9)
    assert gammas[2000].item() == pytest.approx(0.0088, abs=5e-5)


def test_reverse_step_is_bayes_for_unit_variance():
    """For data N(m, 1), x_s and x_t are jointly Gaussian. Each step's residual from Bayes' posterior mean, in units of
    the posterior's standard deviation, must be the noise that was drawn."""
    torch.manual_seed(4)
    mean = 0.7
    sr3 = SR3(T=40, schedule="linear", beta_start=0.01, beta_end=0.2, clamp=False)
    batch, trace = make_batch("generate", 2, 1, 6, dtype=torch.float64), []
    torch.manual_seed(5)
    sr3.sample(unit_net(sr3, mean), batch, steps=8, trace=trace)
    torch.manual_seed(5)
    draws = [torch.randn_like(batch.zlo) for _ in range(8)]
    gammas = sr3.gammas()[::5].flip(0).tolist()  # 8 steps of 5
    torch.testing.assert_close(trace[0][1], draws[0])
    for k in range(7):
        gamma_t, gamma_s = gammas[k], gammas[k + 1]
        # both have variance 1; their covariance is the data's share and that of the noise in x_s, scaled on to t
        c = (gamma_s * gamma_t) ** 0.5 + (1 - gamma_s) * (gamma_t / gamma_s) ** 0.5
        posterior_mean = gamma_s**0.5 * mean + c * (trace[k][1] - gamma_t**0.5 * mean)
        posterior_std = (1 - c**2) ** 0.5
        noise = (trace[k + 1][1] - posterior_mean) / posterior_std
        torch.testing.assert_close(noise, draws[k + 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", (None, 100, 7))
def test_unit_gaussian_comes_out_in_closed_form(steps):
    """Data N(m, 1): the start without signal leaves a share gamma_T of the mean unmade, the last step without noise a
    variance of gamma at the smallest index; nothing else differs from the data, whatever the number of steps."""
    torch.manual_seed(6)
    sr3, mean, n = SR3(clamp=False), 1.5, 2 * 64 * 64
    x = sr3.sample(unit_net(sr3, mean), make_batch("generate", 2, 1, 64), steps)
    m, v = mean * (1 - sr3.gammas()[-1].item()), sr3.gammas()[2000 // (steps or 2000)].item()
    assert x.mean().item() == pytest.approx(m, abs=4 * (v / n) ** 0.5)
    assert x.var().item() == pytest.approx(v, rel=4 * (2 / n) ** 0.5)


def test_clamp_keeps_x_the_sum_of_its_estimates():
    """Clamped or not, a z1_hat + b eps_hat = x; clamped pixels sit at the bound, the others are as without clamping."""
    torch.manual_seed(8)
    x, guess = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 8, 8).double()
    gamma = torch.tensor(0.6, dtype=torch.float64)
    a, b = gamma.sqrt(), (1 - gamma).sqrt()
    args = (lambda x, t, y, cond: guess, make_batch("generate", 2, 3), x, a, b)
    free, (z1, eps) = SR3(clamp=False).predict(*args), SR3().predict(*args)
    outside = free[0].abs() > 1
    assert 0.1 < outside.double().mean() < 0.9
    torch.testing.assert_close(free[1], guess)
    for estimate in (free, (z1, eps)):
        torch.testing.assert_close(a * estimate[0] + b * estimate[1], x)
    torch.testing.assert_close(z1[outside], free[0][outside].sign())
    torch.testing.assert_close(eps[~outside], guess[~outside])


def test_oracle_in_float32_at_full_length():
    batch, trace = make_batch("generate", side=4), []
    sample = sample_by(SR3(), None, None, oracle(SR3(), batch.z1), batch, trace)
    torch.testing.assert_close(sample, batch.z1, rtol=0, atol=2e-4)
    for (t, _, _), gamma in zip(trace, SR3().gammas().flip(0).tolist()):
        assert math.sin(math.pi * t / 2) ** 2 == pytest.approx(gamma)
