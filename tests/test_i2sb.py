"""I2SB against Brownian motion worked out by linear algebra; test_methods.py has what holds for every method."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from images.corruptions import Batch
from methods.i2sb import I2SB
from networks import make_batch, oracle, s2_table, sample_by, wiggly

BOTH = pytest.mark.parametrize("ot_ode", [False, True])
TASKS = pytest.mark.parametrize("task", ["restore", "inpaint", "generate"])


def impulses():
    """Draws whose row i > 0 of a batch is given the number 1 as its i-th draw and zeros before and after, row 0
    zeros alone: the sampler's response to each of its draws, so that moments over its noise are sums of squares,
    without Monte Carlo."""
    draws = iter(range(1, 10**6))

    def randn_like(x):
        noise, i = torch.zeros_like(x), next(draws)
        if i < len(x):
            noise[i] = 1
        return noise

    return SimpleNamespace(randn_like=randn_like)


def sharp(x, t, y, cond):
    """A network of outputs so large that clipping matters."""
    return -20 * wiggly(x, t, y, cond)


@pytest.mark.parametrize("n", [2, 7, 10, 1000])
@pytest.mark.parametrize("beta_max", [0.3, 1.0])
def test_table_of_variances(n, beta_max):
    method = I2SB(beta_max=beta_max, n=n)
    np.testing.assert_allclose(method.s2, s2_table(method), rtol=1e-12)


@BOTH
@pytest.mark.parametrize("steps", [1, 2, 7, 24])
@TASKS
def test_every_state_of_the_sampler_is_distributed_as_the_bridge(ot_ode, steps, task):
    """With the true z1, steps of the posterior, eq. 4, compose to q(zt | z1, damaged), eq. 11: means and variances of
    the states settle all of the posterior's weights. Known pixels get q(zt | zlo, zlo)."""
    method = I2SB(n=24, ot_ode=ot_ode)
    rows = steps + 2  # the response to no draw, to the start's, to each step's
    one = make_batch(task, size=1, dtype=torch.float64)
    tensors = [x.repeat(rows, 1, 1, 1) for x in (one.z1, one.zlo, one.to_make, one.unknown)]
    batch = Batch(*tensors, None, None, impulses())
    trace = []
    method.sample(oracle(method, batch.z1), batch, steps, trace)
    s2 = s2_table(method)
    for i, (t, zt, _) in zip(range(steps, 0, -1), trace, strict=True):
        u = s2[24 * i // steps] / s2[-1]  # the times are even
        assert t == pytest.approx(1 - u)
        torch.testing.assert_close(zt[:1], (1 - u) * one.z1 + u * one.zlo, rtol=0, atol=1e-12)
        var = (zt[1:] - zt[:1]).square().sum(0, keepdim=True)
        expected = u**2 * one.unknown + (0 if ot_ode else u * (1 - u) * s2[-1])
        torch.testing.assert_close(var, expected.expand_as(var), rtol=1e-10, atol=1e-14)


@TASKS
@pytest.mark.parametrize("clip", [False, True])
def test_euler_in_the_odes_time_is_the_papers_sampler(task, clip):
    """Where all intervals have the same variance, even steps in t and in k are the same."""
    method, batch = I2SB(n=40, beta_max=40 * 1e-4, ot_ode=True, clip_denoise=clip), make_batch(task)

    sample, by_euler = (sample_by(method, *how, sharp, batch) for how in ((None, None), ("euler", 39)))
    torch.testing.assert_close(by_euler, sample, rtol=0, atol=2e-5)


def test_with_noise_there_is_no_ode():
    with pytest.raises(ValueError, match="^solver: I2SB has an ODE with --i2sb.ot-ode only; allowed is auto$"):
        I2SB().velocity(wiggly, make_batch())


def test_between_the_times_of_the_table_network_time_and_noise_level_agree():
    method, batch = I2SB(n=12, ot_ode=True), make_batch("restore", size=1)
    seen = []
    ode = method.velocity(lambda x, t, y, cond: seen.append(t) or torch.ones_like(x), batch)
    s2 = s2_table(method)
    for level in [*s2[1:], *np.linspace(s2[1], s2[-1], 40)]:
        t = torch.tensor(1 - level / s2[-1])
        s = (ode.z - ode.clean(t, ode.z)).mean().item()  # the network says 1
        assert s == pytest.approx(level**0.5, rel=1e-4)
        assert seen[-1].item() * 12 == pytest.approx(np.interp(level, s2, np.arange(13)), abs=1e-4)
        assert seen[-1].dtype == torch.float32


@BOTH
def test_clip_denoise_clamps_every_clean_estimate(ot_ode):
    free, clipped = [], []
    for clip, trace in ((False, free), (True, clipped)):
        sample_by(I2SB(n=20, ot_ode=ot_ode, clip_denoise=clip), None, 4, sharp, make_batch(), trace)
    assert torch.equal(clipped[0][2], free[0][2].clamp(-1, 1))
    assert all(z1.abs().max() == 1 for _, _, z1 in clipped) and all(z1.abs().max() > 1 for _, _, z1 in free)
