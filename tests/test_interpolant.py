"""The stochastic interpolant's SDE, the conditions on it, and how its ODE is solved; test_methods.py has the rest."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from measured import SMALL
from methods.interpolant import Interpolant
from networks import curve, gaussian, make_batch, sample_by, wiggly
from support.model import run_sampler
from test_methods import MEAN, gaussian_batch, is_normal
from trainer import Config

ROUGH = 0.04  # variance of z1 given zlo


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
@pytest.mark.parametrize("eps0", [0.3, 1.5])
def test_strength_of_the_sde_is_eps0s(path, eps0):
    """z(1) and z(0) correlate by exp(-int eps/s^2 dt), s^2 the variance at t, and samples are N(MEAN, ROUGH)."""
    batch, trace = gaussian_batch(side=100), []
    batch = replace(batch, zlo=0 * batch.zlo)
    method = Interpolant(path, "dependent", sigma=0.7, eps0=eps0)
    net = gaussian(method, (MEAN[0], 0), ((ROUGH, 0), (0, 0)))
    sample = sample_by(method, None, 150, net, batch, trace)
    is_normal(sample, MEAN[0], ROUGH, extra=0.01)
    t = torch.linspace(1e-3, 1 - 1e-3, 10001, dtype=torch.float64)
    alpha, beta = curve(path, t)[:2]
    rho = math.exp(-torch.trapezoid(eps0 * alpha / (alpha**2 * 0.49 + beta**2 * ROUGH), t))
    found = np.corrcoef(trace[0][1].flatten(), trace[-1][1].flatten())[0, 1]
    assert abs(found - rho) < 4 / 20_000**0.5 + 0.02 * rho


def test_sde_is_refused_where_the_network_does_not_tell_its_score():
    method = Interpolant(eps0=0.8)
    for task in ("sr", "paired", "sr,inpaint"):
        with pytest.raises(ValueError, match=r"^interpolant\.eps0 = 0\.8: allowed is 0 where [^\n]+$"):
            method.check(task, condition=False)
        method.check(task, condition=True)
        Interpolant().check(task, condition=False)
        Interpolant(coupling="independent", eps0=0.8).check(task, condition=False)
    for task in ("generate", "inpaint", "inpaint,generate"):
        method.check(task, condition=False)


def test_its_solver_is_dopri5_or_its_own_sde():
    assert (Interpolant().solver, Interpolant(eps0=0.1).solver) == ("dopri5", "own")
    batch = make_batch()
    by_dopri5, by_default = (sample_by(Interpolant(), solver, None, wiggly, batch) for solver in ("dopri5", None))
    assert torch.equal(by_dopri5, by_default)


def test_fixed_steps_shorten_towards_the_data():
    """(1 - t)^(1/3) falls evenly; the clean estimate asks once more at the end."""
    times, config = [], Config(solver="euler", sample_steps=4, **SMALL)
    run_sampler(config, lambda x, t, y, cond: times.append(t[0].item()) or 0 * x, make_batch())
    np.testing.assert_allclose(times, 1 - np.linspace(0.999 ** (1 / 3), 0.001 ** (1 / 3), 5) ** 3, atol=1e-6)


def test_dopri5_keeps_to_both_tolerances():
    """dz/dt = 30,000 cos 30 t: the absolute tolerance is in units of z, the relative one is a share of it."""
    batch, method = make_batch("generate"), Interpolant(sigma=1e-6)  # which starts near 0

    def net(x, t, y, cond):
        return (3e4 * torch.cos(30 * t)).view(-1, 1, 1, 1).expand_as(x)

    exact = 1000 * (math.sin(29.97) - math.sin(0.03)) + 30 * math.cos(29.97)
    for absolute, relative, least, most in ((1.0, 1e-9, 0, 10), (1e-9, 1.0, 50, math.inf)):
        config = Config(integration_atol=absolute, integration_rtol=relative, interpolant=method, **SMALL)
        assert least <= (run_sampler(config, net, batch) - exact).abs().max() < most
