"""EDM's preconditioning, churn and time; test_methods.py has what holds for every method."""
import math

import pytest
import torch

from methods.edm import EDM
from networks import gaussian, make_batch, oracle, sample_by

MEAN, STD = 0.3, 0.4


def sampled(edm, net=None, size=2, side=8):
    """18 steps of data N(MEAN, STD^2), pixel by pixel."""
    net = net or gaussian(edm, (MEAN, 0), ((STD**2, 0), (0, 0)))
    return sample_by(edm, None, 18, net, make_batch("generate", size, 1, side))


@pytest.mark.parametrize("sigma", (0.002, 0.1, 0.5, 3.0, 80.0))
def test_network_sees_and_predicts_unit_variance(sigma):
    """For data of sigma_data, the network's input and the output for D = z1 have variance 1; t is ln(sigma)/4."""
    torch.manual_seed(2)
    z1, noise, seen = 0.5 * torch.randn(8, 1, 100, 100).double(), torch.randn(8, 1, 100, 100).double(), {}

    def net(x, t, y, cond):
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    x = z1 + sigma * noise
    skipped = EDM().D(net, x, torch.tensor(sigma), None, None)
    unit = EDM().D(lambda x, *_: torch.ones_like(x), x, torch.tensor(sigma), None, None) - skipped  # c_out
    target = (z1 - skipped) / unit
    for part in (seen["x"], target):
        assert part.var().item() == pytest.approx(1, abs=0.025)  # 5 standard errors
    torch.testing.assert_close(seen["t"], torch.full((8,), math.log(sigma) / 4).double(), rtol=1e-6, atol=1e-7)


def test_schedule_is_even_in_its_root():
    *sigmas, last = EDM(sigma_min=0.01, sigma_max=50.0, rho=5.0).sigmas(11)
    roots = [sigma**0.2 for sigma in sigmas]
    assert last == 0 and sigmas[0] == pytest.approx(50) and sigmas[-1] == pytest.approx(0.01) and len(sigmas) == 11
    assert [b - a for a, b in zip(roots, roots[1:])] == pytest.approx([(0.01**0.2 - 50**0.2) / 10] * 10)
    assert EDM().sigmas(1) == pytest.approx([80, 0])


def test_no_churn_is_deterministic_bit_for_bit():
    """Every way of not churning gives algorithm 1's samples, which are a function of the starting noise alone."""
    plain = sampled(EDM())
    for edm in (EDM(S_churn=0.0, S_noise=2.0), EDM(S_churn=40.0, S_min=0.5, S_max=0.4), EDM(S_churn=40.0, S_min=81.0)):
        assert torch.equal(sampled(edm), plain)
    assert not torch.allclose(sampled(EDM(S_churn=40.0)), plain, atol=0.05)


def test_noise_levels_that_the_network_is_asked_at():
    """Heun: each level, raised by S_churn/steps where it is within [S_min, S_max], then the next one, but for 0."""
    asked, edm = [], EDM(S_churn=4.0, S_min=0.1, S_max=10.0)

    def net(x, t, y, cond):
        asked.append((4 * t).exp()[0].item())
        return x

    sampled(edm, net)
    sigmas = edm.sigmas(18)
    raised = [sigma * (1 + 4 / 18) if 0.1 <= sigma <= 10 else sigma for sigma in sigmas]
    assert asked == pytest.approx([s for pair in zip(raised, sigmas[1:]) for s in pair][:-1])


def churned_variance(edm, steps):
    """Variance of algorithm 2's samples of N(MEAN, STD^2), exactly: each step is linear in x - MEAN."""
    roots = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps, dtype=torch.float64)
    sigmas = [*(roots**7).tolist(), 0.0]
    variance = 80.0**2
    for sigma, after in zip(sigmas, sigmas[1:]):
        if edm.S_min <= sigma <= edm.S_max:
            gamma = min(edm.S_churn / steps, 2**0.5 - 1)
            variance += edm.S_noise**2 * ((sigma * (1 + gamma)) ** 2 - sigma**2)
            sigma *= 1 + gamma
        slope = sigma / (STD**2 + sigma**2)  # of dx/dsigma = (x - D)/sigma
        factor = 1 + (after - sigma) * slope
        if after > 0:
            factor = 1 + (after - sigma) * (slope + factor * after / (STD**2 + after**2)) / 2
        variance *= factor**2
    return variance


@pytest.mark.parametrize("churn", (dict(S_churn=4.0), dict(S_churn=20.0, S_min=0.05, S_max=5.0),
                                   dict(S_churn=1e3), dict(S_churn=20.0, S_noise=1.1)))
def test_churn_keeps_the_marginal_variance(churn):
    """The samples' variance follows the exact recursion, and the recursion's tends to the data's with finer steps: what
    churn adds to sigma^2 is what it tells the denoiser. S_noise = 1.1 adds more, for good."""
    n, edm = 4 * 150 * 150, EDM(**churn)
    x = sampled(edm, size=4, side=150)
    assert x.var().item() == pytest.approx(churned_variance(edm, 18), rel=4 * (2 / n) ** 0.5)
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / n**0.5)
    fine = churned_variance(edm, 1024) / STD**2
    assert abs(fine - 1) < 0.003 if edm.S_noise == 1 else fine > 1.1


def test_trace_shows_states_of_the_size_of_an_image():
    """Divided by sqrt(1 + sigma^2), noise alone has deviation 1 and the end is the image."""
    batch, trace = make_batch("generate", side=32), []
    z1 = batch.z1
    sample_by(EDM(), None, None, oracle(EDM(), z1), batch, trace)
    assert trace[0][1].std().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(trace[-1][1], z1, rtol=0, atol=0.012)
    for sigma, (t, _, clean) in zip(EDM().sigmas(18), trace):
        assert 0.5 / math.tan(math.pi / 2 * t) == pytest.approx(sigma)
        torch.testing.assert_close(clean, z1, rtol=0, atol=1e-4)


def test_network_is_the_velocity_of_the_trigonometric_interpolant():
    """The target of training is, per pixel, the derivative of z = sin(pi t/2) z1/sd + cos(pi t/2) eps."""
    torch.manual_seed(14)
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
