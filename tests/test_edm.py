"""EDM's samplers and time; test_methods.py has what holds for every method, the preconditioning and the loss too."""
import math

import pytest
import torch

from methods.edm import EDM
from networks import gaussian, make_batch, oracle, sample_by

MEAN, VAR = 0.3, 0.16  # of the data, pixel by pixel


def algorithm_2(edm, denoise, x, randn_like, steps):
    """The paper's, line by line, of which algorithm 1 is a case: the sample, and (sigma, state, clean) of each step."""
    high, low = edm.sigma_max ** (1 / edm.rho), edm.sigma_min ** (1 / edm.rho)
    t = [(high + i / (steps - 1) * (low - high)) ** edm.rho for i in range(steps)] + [0.0]
    frames = []
    for i in range(steps):
        gamma = min(edm.S_churn / steps, 2**0.5 - 1) if edm.S_min <= t[i] <= edm.S_max else 0
        t_hat = t[i] + gamma * t[i]
        if gamma:
            x = x + (t_hat**2 - t[i] ** 2) ** 0.5 * edm.S_noise * randn_like(x)
        denoised = denoise(x, t_hat)
        frames.append((t_hat, x, denoised))
        d = (x - denoised) / t_hat
        end = x + (t[i + 1] - t_hat) * d
        if t[i + 1] and edm.sampler == "heun":
            d_after = (end - denoise(end, t[i + 1])) / t[i + 1]
            end = x + (t[i + 1] - t_hat) * (d + d_after) / 2
        x = end
    return x, frames


@pytest.mark.parametrize("edm", [
    EDM(), EDM(sampler="euler"), EDM(sigma_min=0.01, sigma_max=50.0, rho=5.0), EDM(S_churn=40.0, S_min=81.0),
    EDM(S_churn=4.0, S_min=0.1, S_max=10.0, S_noise=1.1), EDM(S_churn=1e3, S_min=0.05, sampler="euler"),
    EDM(S_churn=40.0, S_min=0.5, S_max=0.4)])
@pytest.mark.parametrize("steps", [2, 18])
def test_sampler_is_algorithm_2(edm, steps):
    """On data N(MEAN, VAR), with the same noise. Of a state, the trace shows what is of the size of an image."""
    batch, trace = make_batch("generate", dtype=torch.float64), []
    sample = sample_by(edm, None, steps, gaussian(edm, (MEAN, 0), ((VAR, 0), (0, 0))), batch, trace)
    torch.manual_seed(4)  # as sample_by

    def denoise(x, sigma):
        return MEAN + VAR / (VAR + sigma**2) * (x - MEAN)

    expected, frames = algorithm_2(edm, denoise, edm.sigma_max * torch.randn_like(batch.zlo), torch.randn_like, steps)
    torch.testing.assert_close(sample, expected)
    for (t, view, clean), (sigma, x, denoised) in zip(trace, frames, strict=True):
        assert 0.5 / math.tan(math.pi / 2 * t) == pytest.approx(sigma)
        torch.testing.assert_close(view, x / (1 + sigma**2) ** 0.5)
        torch.testing.assert_close(clean, denoised)


def test_network_is_the_velocity_of_the_trigonometric_interpolant():
    """The target of training is, per pixel, the derivative of z = sin(pi t/2) z1/sd + cos(pi t/2) eps."""
    batch = make_batch("generate", dtype=torch.float64)
    z1, ode = batch.z1, EDM().velocity(oracle(EDM(), batch.z1), batch)
    eps = torch.randn_like(z1)
    for t in torch.tensor([ode.t0, 0.3, 0.9, ode.t1], dtype=torch.float64):
        a = math.pi / 2 * t
        z, slope = a.sin() * z1 / 0.5 + a.cos() * eps, math.pi / 2 * (a.cos() * z1 / 0.5 - a.sin() * eps)
        torch.testing.assert_close(ode.velocity(t, z), slope)
        torch.testing.assert_close(ode.clean(t, z), z1)
        sigma = 0.5 / a.tan()
        torch.testing.assert_close(ode.view(t, z), (z1 + sigma * eps) / (1 + sigma**2).sqrt())
