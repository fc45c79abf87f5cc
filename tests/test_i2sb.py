"""I2SB against Brownian motion worked out by linear algebra, and its samplers against Gaussians whose flow is known."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from images.corruptions import Batch
from methods import i2sb
from methods.i2sb import I2SB
from ode_int import solve

BOTH = pytest.mark.parametrize("ot_ode", [False, True])
TASKS = pytest.mark.parametrize("task", ["restore", "inpaint", "generate"])


def make_batch(task: str, size: int = 3, side: int = 4, dtype=torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(7)
    z1 = torch.rand(size, 2, side, side, generator=generator, dtype=dtype) * 1.8 - 0.9
    ones, y = torch.ones(size, 1, side, side, dtype=dtype), torch.arange(size)
    if task == "restore":
        zlo = (z1 + 0.3 * torch.randn(z1.shape, generator=generator, dtype=dtype)).clamp(-1, 1)
        return Batch(z1, zlo, ones, 0 * ones, zlo, y)
    if task == "generate":
        return Batch(z1, 0 * z1, ones, ones, None, y)
    hole = (torch.rand(ones.shape, generator=generator) < 0.5).to(dtype)
    return Batch(z1, z1 * (1 - hole), hole, hole, torch.cat([z1 * (1 - hole), hole], 1), y)


def s2_table(method: I2SB) -> np.ndarray:
    """The variances from the definition, one interval after another."""
    low, high = i2sb.BETA_MIN**0.5, (method.beta_max / method.n) ** 0.5
    s2 = [0.0]
    for k in range(method.n):
        i = min(k, method.n - 1 - k)
        s2.append(s2[-1] + (low + (high - low) * i / (method.n - 1)) ** 2)
    return np.array(s2)


def variance(method: I2SB, t: Tensor) -> Tensor:
    """s2 at the network's times (B,), as (B, 1, 1, 1)."""
    k = t.double().numpy() * method.n
    k = np.where(abs(k - k.round()) < 1e-4, k.round(), k)  # t is float32
    s2 = np.interp(k, np.arange(method.n + 1), s2_table(method))
    return torch.from_numpy(s2)[:, None, None, None]


def oracle(method: I2SB, z1: Tensor):
    return lambda x, t, y, cond: ((x - z1) / variance(method, t).sqrt()).to(x.dtype)


def gaussian_net(method: I2SB, mean, cov):
    """Exact for (z1, zlo) ~ N(mean, cov): the regression of z1 on zt = (1 - u) z1 + u zlo + std noise."""
    total = s2_table(method)[-1]

    def net(x, t, y, cond):
        s2 = variance(method, t)
        u = s2 / total
        var = (1 - u) ** 2 * cov[0][0] + 2 * u * (1 - u) * cov[0][1] + u**2 * cov[1][1]
        var = var + (0 if method.ot_ode else s2 * (1 - u))
        z1 = mean[0] + ((1 - u) * cov[0][0] + u * cov[0][1]) / var * (x - (1 - u) * mean[0] - u * mean[1])
        return ((x - z1) / s2.sqrt()).to(x.dtype)

    return net


def wiggly_net(x, t, y, cond):
    """Any smooth function of all that a network is shown."""
    return torch.tanh(2 * x + (t + 0.1 * y)[:, None, None, None]) + (0 if cond is None else 0.3 * cond[:, :2])


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


@pytest.mark.parametrize("n", [2, 7, 10, 1000])
@pytest.mark.parametrize("beta_max", [0.3, 1.0])
def test_table_of_variances(n, beta_max):
    method = I2SB(beta_max=beta_max, n=n)
    s2 = method.s2.numpy()
    beta = np.diff(s2)
    assert len(beta) == n and beta[0] == pytest.approx(1e-4) and (np.diff(beta[: (n + 1) // 2]) > 0).all()
    np.testing.assert_allclose(beta, beta[::-1], rtol=1e-10)  # symmetric
    np.testing.assert_allclose(s2, s2_table(method), rtol=1e-12)
    if n == 1000 and beta_max == 0.3:  # half way up in std: (0.01 + 0.0173) / 2
        assert beta.max() == pytest.approx(((0.01 + 0.0003**0.5) / 2) ** 2, rel=2e-3)


def test_bridge_and_posterior_are_brownian_motion_conditioned_at_both_ends():
    method = I2SB(n=50)
    s2, clean, damaged, zk = method.s2.numpy(), 0.7, -0.4, 0.9
    for j, k in [(0, 1), (0, 50), (3, 4), (10, 40), (25, 49), (49, 50)]:
        times = s2[[j, k, 50]]
        mean, cov = np.full(3, clean), np.minimum.outer(times, times)  # (zj, zk, damaged) given the clean end

        a, b, std = method.bridge(s2[k])
        gain = cov[1, 2] / cov[2, 2]
        assert a * clean + b * damaged == pytest.approx(mean[1] + gain * (damaged - mean[2]), abs=1e-12)
        assert std**2 == pytest.approx(cov[1, 1] - gain * cov[2, 1], abs=1e-14)

        given = slice(1, 3) if k < 50 else slice(1, 2)  # at k = n, zk is the damaged end
        observed = np.array([zk, damaged])[: given.stop - 1]
        gain = np.linalg.solve(cov[given, given], cov[given, 0])
        a, b, std = method.posterior(s2[k], s2[j])
        assert a * clean + b * zk == pytest.approx(mean[0] + gain @ (observed - mean[given]), abs=1e-12)
        assert std**2 == pytest.approx(cov[0, 0] - gain @ cov[given, 0], abs=1e-14)


@BOTH
@pytest.mark.parametrize("steps", [1, 2, 7, 24])
@TASKS
def test_every_state_of_the_sampler_is_distributed_as_the_bridge(ot_ode, steps, task):
    """With the true z1, steps of the posterior compose to q(zt | z1, damaged); known pixels get q(zt | zlo, zlo)."""
    method = I2SB(n=24, ot_ode=ot_ode)
    rows = steps + 2  # the response to no draw, to the start's, to each step's
    one = make_batch(task, size=1, dtype=torch.float64)
    batch = Batch(
        *(x.repeat(rows, 1, 1, 1) for x in (one.z1, one.zlo, one.to_make, one.unknown)), None, None, impulses()
    )
    trace = []
    method.sample(oracle(method, batch.z1), batch, steps, trace)
    s2 = s2_table(method)
    assert len(trace) == steps and trace[0][0] == 0
    for t, zt, _ in trace:
        k = np.abs(1 - s2 / s2[-1] - t).argmin()
        u = s2[k] / s2[-1]
        torch.testing.assert_close(zt[:1], (1 - u) * one.z1 + u * one.zlo, rtol=0, atol=1e-12)
        var = (zt[1:] - zt[:1]).square().sum(0, keepdim=True)
        expected = u**2 * one.unknown + (0 if ot_ode else s2[k] * (1 - u))
        torch.testing.assert_close(var, expected.expand_as(var), rtol=1e-10, atol=1e-14)


@BOTH
@TASKS
@pytest.mark.parametrize("steps", [1, 2, 5, 19, None])
def test_oracle_returns_the_clean_image(ot_ode, task, steps):
    method, batch, trace = I2SB(n=20, ot_ode=ot_ode), make_batch(task), []
    sample = method.sample(oracle(method, batch.z1), batch, steps, trace)
    torch.testing.assert_close(sample, batch.z1, rtol=0, atol=1e-6)
    assert torch.equal(sample, trace[-1][2])  # the last step goes all the way: it is the clean estimate itself
    assert len(trace) == (steps or 20)


@BOTH
@TASKS
def test_sampling_never_reads_the_clean_image(ot_ode, task):
    method, batch = I2SB(n=20, ot_ode=ot_ode), make_batch(task)
    samples = []
    for z1 in (batch.z1, torch.full_like(batch.z1, float("nan")), None):
        batch = replace(batch, z1=z1)
        torch.manual_seed(3)
        samples.append(method.sample(wiggly_net, batch, 5))
        if ot_ode:
            torch.manual_seed(3)
            samples.append(solve(method.velocity(wiggly_net, batch), "euler", 5))
    assert samples[0].isfinite().all()
    for i, sample in enumerate(samples):
        assert torch.equal(sample, samples[i % (1 + ot_ode)])


@pytest.mark.parametrize("shown", ["y", "cond"])
def test_the_samplers_show_the_network_labels_and_condition(shown):
    for how in ("sample", "velocity"):
        samples = []
        for value in (1.0, 2.0):
            torch.manual_seed(3)
            method, batch = I2SB(n=20, ot_ode=True), make_batch("restore")
            batch = replace(batch, **{shown: getattr(batch, shown) * value})
            sampled = method.sample(wiggly_net, batch) if how == "sample" else solve(method.velocity(wiggly_net, batch))
            samples.append(sampled)
        assert (samples[0] - samples[1])[1:].abs().amax((1, 2, 3)).min() > 1e-3


@BOTH
def test_known_pixels_come_back_exactly(ot_ode):
    method, batch, trace = I2SB(n=20, ot_ode=ot_ode), make_batch("inpaint"), []
    known = (batch.to_make == 0).expand_as(batch.zlo)
    sample = method.sample(wiggly_net, batch, 6, trace)
    assert torch.equal(sample[known], batch.zlo[known]) and not torch.equal(sample[~known], batch.zlo[~known])
    for i, (_, zt, z1) in enumerate(trace):
        assert torch.equal(z1[known], batch.zlo[known])
        assert torch.equal(zt[known], batch.zlo[known]) == (ot_ode or i == 0)  # the bridge is noisy only inside
    if ot_ode:
        sample = solve(method.velocity(wiggly_net, batch), "rk4", 4)
        assert torch.equal(sample[known], batch.zlo[known])


@BOTH
@TASKS
def test_loss_of_the_oracle_is_zero(ot_ode, task):
    method, batch = I2SB(n=30, ot_ode=ot_ode), make_batch(task, size=64)
    assert method.loss(oracle(method, batch.z1), batch).max() < 1e-8


@BOTH
@TASKS
def test_loss_against_the_formula(ot_ode, task):
    method, batch = I2SB(n=30, ot_ode=ot_ode), make_batch(task, size=64)
    seen = {}

    def net(x, t, y, cond):
        seen["x"], seen["t"] = x, t
        return wiggly_net(x, t, y, cond)

    torch.manual_seed(5)
    loss = method.loss(net, batch)
    torch.manual_seed(5)
    k = torch.randint(1, 31, (64,)).numpy()
    start, noise = (torch.randn_like(batch.z1).double().numpy() for _ in range(2))
    z1, zlo, mask, hole = (x.double().numpy() for x in (batch.z1, batch.zlo, batch.to_make, batch.unknown))
    s2 = s2_table(method)[k][:, None, None, None]
    r2 = s2_table(method)[-1] - s2
    zt = (r2 * z1 + s2 * (zlo + hole * start)) / (r2 + s2) + (not ot_ode) * np.sqrt(r2 * s2 / (r2 + s2)) * noise
    np.testing.assert_allclose(seen["x"].numpy(), zt, atol=1e-6)
    np.testing.assert_allclose(seen["t"].numpy(), k / 30, rtol=1e-6)
    assert seen["t"].dtype == loss.dtype == torch.float32 and {1, 30} <= set(k)
    error = wiggly_net(seen["x"], seen["t"], batch.y, batch.cond).double().numpy() - (zt - z1) / np.sqrt(s2)
    by_hand = [(e[:, m[0] == 1] ** 2).mean() for e, m in zip(error, mask)]  # over the pixels to be made alone
    np.testing.assert_allclose(loss.numpy(), by_hand, rtol=1e-4)


def test_any_number_of_steps_takes_even_distinct_times_from_n():
    method, batch, seen = I2SB(n=37), make_batch("restore", 1, 1), []

    def net(x, t, y, cond):
        seen.append(t.item() * 37)
        return torch.zeros_like(x)

    for steps in range(1, 38):
        seen.clear()
        method.sample(net, batch, steps)
        gaps = -np.diff([*seen, 0])
        np.testing.assert_allclose(seen, np.round(seen), atol=1e-4)
        assert len(seen) == steps and seen[0] == 37
        assert gaps.min() > 1 - 1e-4 and np.abs(gaps - 37 / steps).max() < 1 + 1e-4


# a damaged image that has lost contrast, gained noise and been shifted
MEAN, COV = (0.2, -0.1), ((0.25, 0.15), (0.15, 0.18))


@BOTH
def test_exact_network_carries_the_damaged_distribution_to_the_clean_one(ot_ode):
    errors = []
    method = I2SB(ot_ode=ot_ode)
    for steps in (250, 500, 1000):
        rows = steps + 3  # the response to no draw, to each draw, and (last) to one more of zlo
        zlo = torch.full((rows, 1, 1, 1), MEAN[1], dtype=torch.float64)
        zlo[-1] += 1
        ones = torch.ones_like(zlo)
        sample = method.sample(
            gaussian_net(method, MEAN, COV), Batch(None, zlo, ones, 0 * ones, None, None, impulses()), steps
        )
        assert sample[0].item() == pytest.approx(MEAN[0], abs=1e-9)
        response = sample - sample[0]
        errors.append((response[-1] ** 2 * COV[1][1] + response[1:-1].square().sum()).item() / COV[0][0] - 1)
    assert abs(errors[-1]) < 0.01 and abs(errors[0]) > 1.6 * abs(errors[1]) > 1.6**2 * abs(errors[2])  # first order


def test_ot_ode_is_the_limit_without_noise(monkeypatch):
    """Shrinking every variance by one factor leaves the bridge's mean and takes its noise, by the factor's root."""
    batch = make_batch("restore", dtype=torch.float64)

    def net(method):  # one and the same denoiser, whatever the variances
        return lambda x, t, y, cond: (x - torch.sin(x + t[:, None, None, None])) / variance(method, t).sqrt()

    distance = []
    limit = I2SB(n=40, beta_max=0.3, ot_ode=True)
    limit = limit.sample(net(limit), batch)
    for factor in (1, 1e-4, 1e-8):
        monkeypatch.setattr(i2sb, "BETA_MIN", 1e-4 * factor)
        method = I2SB(n=40, beta_max=0.3 * factor)
        torch.manual_seed(2)
        distance.append((method.sample(net(method), batch) - limit).square().mean().sqrt().item())
    assert distance[0] > 0.03
    assert distance[1] / distance[2] == pytest.approx(100, rel=0.02)


def test_dopri5_follows_the_exact_flow_and_sample_converges_to_it():
    """A linear-Gaussian flow keeps standard scores: (zt - mean_t) / std_t is that of zlo."""
    batch = make_batch("restore", size=2)
    (m1, m0), ((v1, c), (_, v0)) = MEAN, COV
    method = I2SB(n=1000, ot_ode=True)
    u = 1 - method.velocity(None, batch).t1  # the flow ends short of the data; the regression there does the rest
    assert u == pytest.approx(s2_table(method)[1] / s2_table(method)[-1])
    std = ((1 - u) ** 2 * v1 + 2 * u * (1 - u) * c + u**2 * v0) ** 0.5
    exact = m1 + ((1 - u) * v1 + u * c) / std * (batch.zlo - m0) / v0**0.5
    net = gaussian_net(method, MEAN, COV)
    by_dopri5 = solve(method.velocity(net, batch), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(by_dopri5, exact, rtol=0, atol=2e-5)
    coarse, fine = ((method.sample(net, batch, steps) - by_dopri5).abs().max() for steps in (250, 1000))
    assert fine < 1e-3 and coarse / fine == pytest.approx(4, rel=0.1)


@TASKS
@pytest.mark.parametrize("clip", [False, True])
def test_euler_in_the_odes_time_is_the_papers_sampler(task, clip):
    """Where all intervals have the same variance, even steps in t and in k are the same."""
    method, batch = I2SB(n=40, beta_max=40 * 1e-4, ot_ode=True, clip_denoise=clip), make_batch(task)

    def sharp(x, t, y, cond):
        return -20 * wiggly_net(x, t, y, cond)  # so large that clipping matters

    torch.manual_seed(4)
    sample = method.sample(sharp, batch)
    torch.manual_seed(4)
    torch.testing.assert_close(solve(method.velocity(sharp, batch), "euler", 39), sample, rtol=0, atol=2e-5)


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
    batch = make_batch("restore")
    for clip in (False, True):
        trace = []
        method = I2SB(n=20, ot_ode=ot_ode, clip_denoise=clip)
        method.sample(lambda x, t, y, cond: 50 * wiggly_net(x, t, y, cond), batch, 4, trace)
        assert all((z1.abs().max() <= 1) == clip for _, _, z1 in trace)


def test_what_is_not_allowed_says_so():
    batch = make_batch("restore")
    with pytest.raises(ValueError, match="solver: I2SB has an ODE with --i2sb.ot-ode only"):
        I2SB().velocity(wiggly_net, batch)
    for steps in (0, -1, 21):
        with pytest.raises(ValueError, match=f"steps = {steps}: .* 1 to i2sb.n = 20"):
            I2SB(n=20).sample(wiggly_net, batch, steps)
    for field, value in [("beta_max", 0.0), ("beta_max", float("nan")), ("beta_max", float("inf")), ("n", 1)]:
        with pytest.raises(ValueError, match=f"i2sb.{field} = {value}: allowed"):
            I2SB(**{field: value})


def test_pictures_in_training_take_no_more_steps_than_the_bridge_has():
    assert (I2SB().picture_steps, I2SB(n=50).picture_steps, I2SB(n=10).picture_steps) == (50, 50, 10)
    assert I2SB(n=10).sample(wiggly_net, make_batch("restore"), I2SB(n=10).picture_steps).isfinite().all()
