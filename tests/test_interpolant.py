"""The stochastic interpolant on Gaussian pairs, whose velocity field is known, and with a network that knows the
answer."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from images.corruptions import Batch
from measured import SMALL
from methods.interpolant import Interpolant
from networks import Plain
from ode_int import FIXED_STEP, solve
from support.model import run_sampler
from trainer import Config
from unet import Counted

PATHS = pytest.mark.parametrize("path", ["linear", "trigonometric"])
COUPLINGS = pytest.mark.parametrize("coupling", ["dependent", "independent"])
TASKS = pytest.mark.parametrize("task", ["restore", "inpaint", "generate"])
SAMPLERS = pytest.mark.parametrize("sampler", ["dopri5", "heun", "sde"])


def make_batch(task="restore", size=4, side=6) -> Batch:
    generator = torch.Generator().manual_seed(3)
    z1 = torch.rand(size, 2, side, side, generator=generator) * 1.8 - 0.9
    one, y = torch.ones(size, 1, side, side), torch.arange(size)
    if task == "restore":
        zlo = (z1 + 0.3 * torch.randn(z1.shape, generator=generator)).clamp(-1, 1)
        return Batch(z1, zlo, one, 0 * one, zlo, y)
    if task == "generate":
        return Batch(z1, 0 * z1, one, one, None, y)
    hole = (torch.rand(one.shape, generator=generator) < 0.4).float()
    return Batch(z1, z1 * (1 - hole), hole, hole, torch.cat([z1 * (1 - hole), hole], 1), y)


def curve(path: str, t):
    """alpha, beta, alpha', beta' in numpy's float64."""
    t = np.asarray(t, dtype=np.float64)
    if path == "linear":
        return 1 - t, t, 0 * t - 1, 0 * t + 1
    a = np.pi * t / 2
    return np.cos(a), np.sin(a), -np.pi / 2 * np.sin(a), np.pi / 2 * np.cos(a)


def per_image(path: str, t: torch.Tensor):
    return (torch.from_numpy(c).reshape(-1, 1, 1, 1) for c in curve(path, t))


def oracle(path: str, z1):
    """A network that knows z1: zt gives it z0, and both give v."""
    def net(x, t, y, cond):
        alpha, beta, d_alpha, d_beta = per_image(path, t)
        z0 = (x.double() - beta * z1) / alpha
        return (d_alpha * z0 + d_beta * z1).float()
    return net


def gaussian_net(path: str, mean0, mean1, cov):
    """E[alpha' z0 + beta' z1 | zt] where (z0, z1) is Gaussian in every pixel, with these means given cond and this
    covariance."""

    def net(x, t, y, cond):
        alpha, beta, d_alpha, d_beta = per_image(path, t)
        m0, m1 = mean0(cond), mean1(cond)
        var = alpha**2 * cov[0, 0] + 2 * alpha * beta * cov[0, 1] + beta**2 * cov[1, 1]
        with_v = alpha * d_alpha * cov[0, 0] + (alpha * d_beta + beta * d_alpha) * cov[0, 1] + beta * d_beta * cov[1, 1]
        return (d_alpha * m0 + d_beta * m1 + with_v / var * (x.double() - alpha * m0 - beta * m1)).float()
    return net


def wiggly_net(x, t, y, cond):
    """Any network: of all its inputs, and not linear."""
    out = 1.5 * (x + t[:, None, None, None]).sin() + 0.1 * y[:, None, None, None]
    return out if cond is None else out + 0.3 * cond[:, :2] * x


class Spy:
    """Remembers what the network was given."""

    def __init__(self, net):
        self.net, self.x, self.t = net, [], []

    def __call__(self, x, t, y, cond):
        self.x.append(x.detach().clone())
        self.t.append(t.detach().clone())
        return self.net(x, t, y, cond)


def sample_by(sampler, net, batch, trace=None, **knobs):
    method = Interpolant(eps0=0.7 if sampler == "sde" else 0.0, **knobs)
    return method.sample(net, batch, 20 if sampler == "heun" else None, trace)


# ------------------------------------------------------------------------------------------------------- the path


@PATHS
def test_path_runs_from_z0_to_z1_and_its_derivatives_are_right(path):
    at = Interpolant(path=path).path_at
    ends = [[float(c) for c in at(torch.tensor(t, dtype=torch.float64))[:2]] for t in (0.0, 1.0)]
    np.testing.assert_allclose(ends, [[1, 0], [0, 1]], atol=1e-15)
    t, h = torch.linspace(0, 1, 101, dtype=torch.float64), 1e-5
    alpha, beta, d_alpha, d_beta = at(t)
    for c, d, index in ((alpha, d_alpha, 0), (beta, d_beta, 1)):
        torch.testing.assert_close((at(t + h)[index] - at(t - h)[index]) / (2 * h), d, rtol=0, atol=1e-9)
        assert (c.diff() * (1 - 2 * index) < 0).all()
    size = alpha**2 + beta**2 if path == "trigonometric" else alpha + beta
    torch.testing.assert_close(size, torch.ones_like(t))
    for t in (0.001, 0.5, 0.999):  # the network is told fp32 times
        np.testing.assert_allclose([float(c) for c in at(torch.tensor(t))], curve(path, t), atol=2e-7)


@PATHS
def test_ends_inverts_state_and_velocity(path):
    method, generator = Interpolant(path=path), torch.Generator().manual_seed(1)
    z0, z1 = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    for t in (0.0, 0.001, 0.3, 0.999, 1.0):
        alpha, beta, d_alpha, d_beta = (float(c) for c in curve(path, t))
        back = method.ends(torch.tensor(t, dtype=torch.float64), alpha * z0 + beta * z1, d_alpha * z0 + d_beta * z1)
        torch.testing.assert_close(back, (z0, z1), rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------------------------- the loss


@PATHS
@COUPLINGS
@TASKS
def test_loss_is_the_squared_error_of_the_velocity(path, coupling, task):
    """Worked out anew from what the network saw: zt and t give z0, z0 and z1 the target."""
    method, batch, net = Interpolant(path, coupling, sigma=0.8, t_min=0.05), make_batch(task), Spy(wiggly_net)
    torch.manual_seed(1)
    loss = method.loss(net, batch)
    assert loss.shape == (4,) and loss.dtype == torch.float32
    x, t = net.x[0].double().numpy(), net.t[0]
    mask = np.broadcast_to(batch.to_make.numpy() > 0, x.shape)
    zlo, z1 = batch.zlo.numpy(), batch.z1.numpy()
    np.testing.assert_array_equal(x[~mask], zlo[~mask])  # known pixels
    out = wiggly_net(net.x[0], t, batch.y, batch.cond).numpy()
    noise = []
    for i in range(4):
        alpha, beta, d_alpha, d_beta = curve(path, float(t[i]))
        z0 = (x[i] - beta * z1[i]) / alpha
        error = (out[i] - d_alpha * z0 - d_beta * z1[i]) ** 2
        np.testing.assert_allclose(float(loss[i]), error[mask[i]].mean(), rtol=2e-5)
        noise.append(((z0 - (zlo[i] if coupling == "dependent" else 0)) / 0.8)[mask[i]])
    noise = np.concatenate(noise)  # standard normal, were sigma and the centre what they should be
    assert abs(noise.mean()) < 4 / noise.size**0.5 and abs(noise.var() - 1) < 4 * (2 / noise.size) ** 0.5
    torch.manual_seed(1)
    assert torch.equal(method.loss(wiggly_net, batch), loss)


def test_loss_draws_its_times_uniformly():
    batch = make_batch(size=4000, side=1)
    net = Spy(wiggly_net)
    torch.manual_seed(0)
    Interpolant(t_min=0.1).loss(net, batch)
    t = np.sort(net.t[0].double().numpy())
    assert 0.1 <= t[0] and t[-1] <= 0.9
    uniform = 0.1 + 0.8 * (np.arange(4000) + 0.5) / 4000
    assert np.abs(t - uniform).max() < 0.8 * 1.95 / 4000**0.5  # Kolmogorov and Smirnov, one in a thousand


@PATHS
@COUPLINGS
@TASKS
def test_loss_of_the_oracle_is_zero(path, coupling, task):
    batch = make_batch(task, size=64)
    torch.manual_seed(2)
    assert Interpolant(path, coupling).loss(oracle(path, batch.z1), batch).max() < 1e-6


def test_loss_sends_its_gradient_to_the_network():
    """net = w x + b: d loss / d w = mean 2 x (w x + b - v), over the hole alone."""
    batch = make_batch("inpaint")
    w, b = torch.tensor(0.7, requires_grad=True), torch.tensor(-0.2, requires_grad=True)
    net = Spy(lambda x, t, y, cond: w * x + b)
    torch.manual_seed(3)
    Interpolant(t_min=0.05).loss(net, batch).sum().backward()
    x, t = net.x[0].double(), net.t[0].double()[:, None, None, None]
    v = batch.z1 - (x - t * batch.z1) / (1 - t)
    error, mask = 2 * (w.item() * x + b.item() - v), batch.to_make.expand_as(x)
    expected = [(g * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)) for g in (error * x, error)]
    np.testing.assert_allclose([w.grad, b.grad], [e.sum() for e in expected], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- Gaussian pairs

M, S = 0.3, 0.5  # z1 ~ N(M, S^2) in every pixel
GAIN, OFFSET, ROUGH = 0.8, 0.1, 0.2  # zlo = GAIN z1 + OFFSET + ROUGH noise


def posterior():
    """E[z1 | zlo] as a function of zlo, and the variance."""
    gain = GAIN * S**2 / (GAIN**2 * S**2 + ROUGH**2)
    return lambda zlo: M + gain * (zlo.double() - GAIN * M - OFFSET), S**2 - gain * GAIN * S**2


def given_cond(path, coupling, sigma):
    """The exact network where it sees cond = zlo: z0 and z1 are independent given it."""
    mean1, var1 = posterior()
    return gaussian_net(path, (lambda c: c.double()) if coupling == "dependent" else lambda c: 0 * c.double(), mean1,
                        np.diag([sigma**2, var1]))


def blind(path, coupling, sigma):
    """Means and covariance of (z0, z1), and the exact network, where it sees zt alone."""
    k = GAIN if coupling == "dependent" else 0.0
    mean0 = k * M + OFFSET if coupling == "dependent" else 0.0
    own = k**2 * S**2 + ROUGH**2 if coupling == "dependent" else 0.0
    cov = np.array([[own + sigma**2, k * S**2], [k * S**2, S**2]])
    return mean0, cov, gaussian_net(path, lambda c: mean0, lambda c: M, cov)


def gaussian_batch(size, side, condition):
    generator = torch.Generator().manual_seed(5)
    z1 = M + S * torch.randn(size, 3, side, side, generator=generator)
    zlo = GAIN * z1 + OFFSET + ROUGH * torch.randn(z1.shape, generator=generator)
    one = torch.ones(size, 1, side, side)
    return Batch(z1, zlo, one, 0 * one, zlo if condition else None, None)


def is_normal(sample, mean, var, extra=0.0):
    """Mean and variance within four standard errors (and `extra`, relative to the deviation) of N(mean, var)."""
    n, std = sample.numel(), math.sqrt(var)
    assert abs(sample.double().mean().item() - mean) < std * (4 / n**0.5 + extra)
    assert abs(sample.double().var().item() - var) < var * (4 * (2 / n) ** 0.5 + 2 * extra)


@PATHS
@COUPLINGS
def test_ode_is_the_exact_affine_map_between_gaussians(path, coupling):
    """v = m' + (s'/s)(z - m), so z(t) = m(t) + s(t)/s(0) (z(0) - m(0)), and z1's distribution is reached."""
    method, batch = Interpolant(path, coupling, sigma=0.6, t_min=1e-4), gaussian_batch(2, 64, condition=False)
    m0, cov, net = blind(path, coupling, 0.6)
    torch.manual_seed(4)
    sample = method.sample(net, batch)
    torch.manual_seed(4)
    z0 = method.start(batch).double()
    is_normal(z0, m0, cov[0, 0])

    def moments(t):
        c = np.array(curve(path, t)[:2])
        return c @ [m0, M], math.sqrt(c @ cov @ c)

    (m_start, s_start), (m_end, s_end) = moments(1e-4), moments(1 - 1e-4)
    z = m_end + s_end / s_start * (z0 - m_start)
    alpha, beta = curve(path, 1 - 1e-4)[:2]
    clean = M + (alpha * cov[0, 1] + beta * cov[1, 1]) / s_end**2 * (z - m_end)
    error = (sample - clean).abs()
    assert error.square().mean().sqrt() < 1e-4 and error.max() < 5e-4  # dopri5 at 1e-5 an image and step
    is_normal(sample, M, S**2, extra=1e-3)  # 1e-3: z0 starts at t_min


@PATHS
@COUPLINGS
@SAMPLERS
def test_every_sampler_draws_from_the_posterior(path, coupling, sampler):
    """Given zlo, samples are N(E[z1 | zlo], Var[z1 | zlo]): for the ODE and, thanks to the score, for the SDE of any
    strength."""
    size, sigma, eps0 = 80, 0.7, 0.8
    zlo = torch.tensor([-0.6, 0.9])[:, None, None, None].expand(2, 3, size, size).contiguous()
    batch = replace(gaussian_batch(2, size, condition=True), zlo=zlo, cond=zlo)
    method, trace = Interpolant(path, coupling, sigma, eps0=eps0 if sampler == "sde" else 0.0), []
    mean1, var1 = posterior()
    torch.manual_seed(6)
    steps = dict(dopri5=None, heun=40, sde=150)[sampler]
    sample = method.sample(given_cond(path, coupling, sigma), batch, steps, trace if sampler == "sde" else None)
    assert method.solver == ("own" if sampler == "sde" else "dopri5")
    for i in range(2):
        is_normal(
            sample[i], mean1(batch.zlo)[i].mean().item(), var1, extra=4e-3
        )  # 4e-3: t_min, and the steps of the SDE
    if (
        sampler == "sde"
    ):  # z(1) and z(0) correlate by exp(-int eps/s^2 dt), s^2 the variance at t: the strength is eps0's
        t = np.linspace(1e-3, 1 - 1e-3, 10001)
        alpha, beta = curve(path, t)[:2]
        rho = math.exp(-np.trapezoid(eps0 * alpha / (alpha**2 * sigma**2 + beta**2 * var1), t))
        found = np.corrcoef(trace[0][1][0].flatten(), trace[-1][1][0].flatten())[0, 1]
        assert abs(found - rho) < 4 / (3 * size**2) ** 0.5 + 0.02 * rho


@PATHS
@pytest.mark.parametrize("task", ["sr", "inpaint"])
def test_sde_of_a_network_that_does_not_see_zlo(path, task):
    """It draws from the distribution of z1 where E[zlo | zt] is known: by the independent coupling, and in holes."""
    batch = gaussian_batch(4, 64, condition=False)
    if task == "inpaint":
        hole = (torch.arange(64) < 32).float().expand(4, 1, 64, 64)
        batch = replace(batch, to_make=hole, unknown=hole, zlo=batch.z1 * (1 - hole))
    method = Interpolant(path, "dependent" if task == "inpaint" else "independent", sigma=0.7, eps0=0.8)
    method.check(task, condition=False)
    torch.manual_seed(6)
    sample = method.sample(blind(path, "independent", 0.7)[2], batch, 150)  # in holes z0 is noise alone
    is_normal(sample[batch.to_make.expand_as(sample) > 0], M, S**2, extra=4e-3)  # t_min, and the steps


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
    # the fault: zlo in place of E[zlo | zt] draws from another distribution than z1's
    torch.manual_seed(6)
    sample = Interpolant(sigma=0.7, eps0=0.8).sample(
        blind("linear", "dependent", 0.7)[2], gaussian_batch(2, 64, condition=False), 150)
    assert abs(sample.std() / S - 1) > 0.05


@PATHS
@COUPLINGS
def test_exact_velocity_is_where_the_loss_is_stationary(path, coupling):
    """Training and sampling mean the same field: no offset and no slope added to it lowers the expected loss."""
    batch = gaussian_batch(3000, 3, condition=True)
    offset, slope = torch.zeros(2, 3000, 1, 1, 1, requires_grad=True).unbind()
    offset.retain_grad(), slope.retain_grad()
    exact = given_cond(path, coupling, 0.7)
    torch.manual_seed(7)
    Interpolant(path, coupling, 0.7).loss(
        lambda x, t, y, cond: exact(x, t, y, cond) + offset + slope * x, batch
    ).sum().backward()
    for g in (offset.grad.flatten(), slope.grad.flatten()):
        assert abs(g.mean()) < 4 * g.std() / 3000**0.5
        assert g.std() < 3  # the standard error is small enough to notice


# ------------------------------------------------------------------------------------------------------- sampling


@PATHS
@COUPLINGS
@TASKS
@SAMPLERS
def test_oracle_makes_sample_return_z1(path, coupling, task, sampler):
    batch = make_batch(task)
    torch.manual_seed(8)
    sample = sample_by(sampler, oracle(path, batch.z1), batch, path=path, coupling=coupling)
    torch.testing.assert_close(sample, batch.z1, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", FIXED_STEP)
def test_any_solver_reaches_z1_with_the_oracle(solver):
    batch, method = make_batch("inpaint"), Interpolant()
    sample = solve(method.velocity(oracle("linear", batch.z1), batch), solver, 12)
    torch.testing.assert_close(sample, batch.z1, rtol=0, atol=1e-4)


@SAMPLERS
@COUPLINGS
def test_known_pixels_stay_what_they_are(sampler, coupling):
    batch, trace, net = make_batch("inpaint"), [], Spy(wiggly_net)
    known = (batch.to_make == 0).expand_as(batch.zlo)
    torch.manual_seed(9)
    sample = sample_by(sampler, net, batch, trace, coupling=coupling)
    assert len(trace) > 5
    for picture in (sample, *(clean for _, _, clean in trace)):
        assert torch.equal(picture[known], batch.zlo[known])
    for z in (*net.x, *(state for _, state, _ in trace)):  # dopri5's states come from a polynomial, in fp32
        torch.testing.assert_close(z[known], batch.zlo[known], rtol=0, atol=1e-5 if sampler == "dopri5" else 0)
    assert not torch.equal(sample[~known], trace[0][1][~known])


@SAMPLERS
@COUPLINGS
@TASKS
def test_sample_never_reads_z1(sampler, coupling, task):
    samples = []
    for z1 in (make_batch(task).z1, torch.full((4, 2, 6, 6), torch.nan), None):
        batch = replace(make_batch(task), z1=z1)
        torch.manual_seed(10)
        samples.append(sample_by(sampler, wiggly_net, batch, coupling=coupling))
    assert samples[0].isfinite().all()
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])


@SAMPLERS
def test_trace_ends_at_the_sample_and_changes_nothing(sampler):
    batch, trace = make_batch(), []
    torch.manual_seed(11)
    traced = sample_by(sampler, wiggly_net, batch, trace)
    torch.manual_seed(11)
    plain = sample_by(sampler, wiggly_net, batch)
    torch.testing.assert_close(traced, plain, rtol=0, atol=2e-5 if sampler == "dopri5" else 0)
    torch.manual_seed(11)
    assert torch.equal(trace[0][1], Interpolant().start(batch))
    assert torch.equal(trace[-1][2], traced)
    times = np.array([t for t, _, _ in trace])
    np.testing.assert_allclose(times[[0, -1]], [0.001, 0.999], rtol=1e-6)
    assert (np.diff(times) > 0).all()
    for t, z, clean in trace:  # the clean estimate is the velocity's
        t = torch.full((4,), t)
        v = wiggly_net(z, t, batch.y, batch.cond)
        torch.testing.assert_close(clean, z + (1 - t[:, None, None, None]) * v, rtol=0, atol=1e-5)


def test_cost_is_what_steps_say():
    batch = make_batch()
    for eps0, steps, calls in ((0.0, 7, 2 * 7 + 1), (0.5, 7, 7 + 1), (0.5, None, 100 + 1)):
        net = Counted(Plain(wiggly_net))
        Interpolant(eps0=eps0).sample(net, batch, steps)
        assert net.rows == 4 * calls


def test_network_is_told_one_time_an_image_in_fp32():
    for sampler in ("dopri5", "heun", "sde"):
        net = Spy(wiggly_net)
        sample_by(sampler, net, make_batch())
        for t in net.t:
            assert t.shape == (4,) and t.dtype == torch.float32 and (t == t[0]).all()
        times = [float(t[0]) for t in net.t]
        assert min(times) == pytest.approx(0.001) and max(times) == pytest.approx(0.999) and times[-1] == max(times)


def test_an_independent_coupling_knows_nothing_of_the_damaged_image():
    batch = replace(make_batch(), cond=None)
    other = replace(batch, zlo=-batch.zlo)
    for coupling, same in (("independent", True), ("dependent", False)):
        samples = []
        for b in (batch, other):
            torch.manual_seed(12)
            samples.append(sample_by("sde", wiggly_net, b, coupling=coupling))
        assert torch.equal(*samples) == same


@pytest.mark.parametrize(
    "field, value",
    [
        ("path", "quadratic"),
        ("coupling", "both"),
        ("sigma", 0.0),
        ("sigma", math.nan),
        ("t_min", 0.0),
        ("t_min", 0.5),
        ("eps0", -0.1),
        ("eps0", math.nan),
        ("sigma", math.inf),
        ("t_min", math.nan),
        ("eps0", math.inf),
    ],
)
def test_wrong_knobs_are_refused_in_one_line(field, value):
    with pytest.raises(ValueError, match=rf"^interpolant\.{field} = {value!r}: [^\n]+$"):
        Interpolant(**{field: value})


def test_no_warning_on_the_way():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_by("dopri5", wiggly_net, make_batch())


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
