"""SR3's schedules, and its reverse steps on Gaussians; test_methods.py has what holds for every method."""
import math

import numpy as np
import pytest
import torch

from methods.sr3 import SR3
from networks import gaussian, make_batch, oracle, sample_by


@pytest.mark.parametrize("schedule, betas", [
    ("quadratic", np.linspace(1e-5**0.5, 0.02**0.5, 500) ** 2), ("linear", np.linspace(1e-5, 0.02, 500)),
    ("constant", np.full(500, 0.02)), ("warmup", np.append(np.linspace(1e-5, 0.02, 125), np.full(375, 0.02)))])
def test_schedules(schedule, betas):
    gammas = SR3(schedule=schedule, T=500, beta_start=1e-5, beta_end=0.02, warmup=0.25).gammas()
    assert gammas.dtype == torch.float64 and gammas[0] == 1
    np.testing.assert_allclose(gammas[1:], np.cumprod(1 - betas), rtol=1e-12)


def test_default_schedule_is_the_published_one():
    """alpha from 1 to 0.993 over 2000 quadratic steps leaves 0.88% of the signal's variance at T."""
    gammas = SR3().gammas()
    assert len(gammas) == 2001
    assert 1 - gammas[1].item() == pytest.approx(1e-6, rel=1e-6)
    assert gammas[2000].item() / gammas[1999].item() == pytest.approx(0.993, rel=1e-9)
    assert gammas[2000].item() == pytest.approx(0.0088, abs=5e-5)


def test_reverse_step_is_bayes_for_unit_variance():
    """For data N(m, 1), x_s and x_t are jointly Gaussian. Each step's residual from Bayes' posterior mean, in units of
    the posterior's standard deviation, must be the noise that was drawn; the last step draws none."""
    mean, steps = 0.7, 7
    sr3 = SR3(T=40, schedule="linear", beta_start=0.01, beta_end=0.2, clamp=False)
    batch, trace = make_batch("generate", 2, 1, 6, dtype=torch.float64), []
    sample = sample_by(sr3, None, steps, gaussian(sr3, (mean, 0), ((1, 0), (0, 0))), batch, trace)
    torch.manual_seed(4)  # as sample_by
    draws = [torch.randn_like(batch.zlo) for _ in range(steps)]
    gammas = sr3.gammas()[[40, 34, 28, 22, 17, 11, 5, 0]].tolist()
    states = [state for _, state, _ in trace] + [sample]
    torch.testing.assert_close(states[0], draws[0])
    for k in range(steps):
        gamma_t, gamma_s = gammas[k], gammas[k + 1]
        assert math.sin(math.pi * trace[k][0] / 2) ** 2 == pytest.approx(gamma_t)
        # both have variance 1; their covariance is the data's share and that of the noise in x_s, scaled on to t
        c = (gamma_s * gamma_t) ** 0.5 + (1 - gamma_s) * (gamma_t / gamma_s) ** 0.5
        posterior_mean = gamma_s**0.5 * mean + c * (states[k] - gamma_t**0.5 * mean)
        noise = (states[k + 1] - posterior_mean) / (1 - c**2) ** 0.5
        torch.testing.assert_close(noise, draws[k + 1] if k + 1 < steps else 0 * noise, rtol=1e-9, atol=1e-9)


def test_clamp_keeps_x_the_sum_of_its_estimates():
    """Clamped or not, a z1_hat + b eps_hat = x; clamped pixels sit at the bound, the others are as without clamping."""
    x, guess = torch.randn(2, 2, 3, 8, 8).double()
    a, b = torch.tensor(0.6).double().sqrt(), torch.tensor(0.4).double().sqrt()
    args = (lambda x, t, y, cond: guess, make_batch("generate", 2, 3), x, a, b)
    (free, eps), (clamped, clamped_eps) = SR3(clamp=False).predict(*args), SR3().predict(*args)
    assert 0.1 < (free.abs() > 1).double().mean() < 0.9
    assert torch.equal(eps, guess) and torch.equal(clamped, free.clamp(-1, 1))
    torch.testing.assert_close(a * free + b * eps, x)
    torch.testing.assert_close(a * clamped + b * clamped_eps, x)


def test_oracle_in_float32_at_full_length():
    batch = make_batch("generate", side=4)
    sample = sample_by(SR3(), None, None, oracle(SR3(), batch.z1), batch)
    torch.testing.assert_close(sample, batch.z1, rtol=0, atol=2e-4)
