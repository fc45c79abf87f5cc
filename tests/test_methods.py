"""What holds for every method: an oracle, Gaussian data and its exact answer, known pixels, losses, times, costs."""
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dense import PLAIN
from images.corruptions import Batch
from methods import masked_mean
from methods.edm import EDM
from methods.i2sb import I2SB
from methods.interpolant import Interpolant
from methods.regression import Regression
from methods.sr3 import SR3
from methods.udpm import UDPM
from networks import Spy, answer, expected, gaussian, make_batch, oracle, path, sample_by, wiggly
from unet import Counted

TASKS = pytest.mark.parametrize("task", ["restore", "inpaint", "generate"])
# method, solver (None: its own), steps, network evaluations, frames of the trace
SAMPLERS = [
    (Interpolant(), None, 7, 15, 8),
    (Interpolant(), "dopri5", None, None, 9),
    (Interpolant("trigonometric", "independent"), "rk4", 9, 37, 9),
    (Interpolant(eps0=0.7), None, 7, 8, 8),
    (Interpolant("trigonometric", "independent", eps0=0.7), None, None, 101, 101),
    (SR3(T=30), None, 10, 10, 10),
    (SR3(T=30, clamp=False), None, None, 30, 30),
    (SR3(beta_start=1e-4), "heun", 5, 11, 6),
    (I2SB(n=20), None, 6, 6, 6),
    (I2SB(n=20, ot_ode=True), None, None, 20, 20),
    (I2SB(n=20, ot_ode=True), None, 1, 1, 1),
    (I2SB(n=20, ot_ode=True), "midpoint", 3, 7, 4),
    (EDM(), None, None, 35, 18),
    (EDM(sampler="euler"), None, None, 35, 35),
    (EDM(S_churn=40.0, sigma_data=0.3), None, 10, 19, 10),
    (EDM(sampler="euler"), None, 1, 1, 1),
    (EDM(), "heun", 5, 11, 6),
    (PLAIN, None, 3, 3, 3),
    (Regression(), None, None, 1, 1),
]
EVERY_SAMPLER = pytest.mark.parametrize("method, solver, steps, nfe, frames", SAMPLERS)


def net_for(method):
    return lambda *inputs: F.interpolate(wiggly(*inputs), scale_factor=method.upscale)


# ------------------------------------------------------------------------------------------------------- samplers


@TASKS
@EVERY_SAMPLER
def test_oracle_makes_the_sample_z1_at_the_stated_cost(method, solver, steps, nfe, frames, task):
    """The oracle has it, the sampler is not handed it."""
    batch = make_batch(task)
    spy = Spy(oracle(method, batch.z1))
    counted = Counted(spy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample = sample_by(method, solver, steps, counted, replace(batch, z1=None))
    torch.testing.assert_close(sample, batch.z1, rtol=0, atol=2e-4)
    assert counted.rows == len(batch.zlo) * (nfe or len(spy.seen))
    for _, t, _, _ in spy.seen:
        assert t.shape == (2,) and t.dtype == torch.float32 and t[0] == t[1]


@EVERY_SAMPLER
def test_known_pixels_hold_zlo_throughout(method, solver, steps, nfe, frames):
    batch, trace, spy = make_batch("inpaint", y=torch.tensor([1, 2])), [], Spy(net_for(method))
    known = (batch.to_make == 0).expand_as(batch.zlo)
    sample = sample_by(method, solver, steps, spy, batch, trace)
    assert torch.equal(sample[known], batch.zlo[known])
    assert (sample - batch.zlo)[~known].abs().max() > 0.1
    if isinstance(method, UDPM):  # in its states no pixel is known
        return
    assert all(torch.equal(clean[known], batch.zlo[known]) for _, _, clean in trace)
    noisy = isinstance(method, I2SB) and not method.ot_ode  # its bridge is, from the second state on
    for (x, t, _, _) in spy.seen[:1] if noisy else spy.seen:
        scale = path(method, t)[0].view(-1, 1, 1, 1) if isinstance(method, EDM) else 1  # c_in
        torch.testing.assert_close(x[known], (scale * batch.zlo)[known].float(), rtol=0,
                                   atol=1e-5 if solver == "dopri5" else 1e-6)
    for _, state, _ in trace[:1] if noisy else trace:
        torch.testing.assert_close(state[known], batch.zlo[known], rtol=0, atol=1e-5 if solver == "dopri5" else 0)


@EVERY_SAMPLER
def test_label_and_condition_change_a_sample_and_a_trace_does_not(method, solver, steps, nfe, frames):
    batch, trace, net = make_batch(y=torch.tensor([1, 2])), [], net_for(method)
    plain = sample_by(method, solver, steps, net, batch)
    for shown in (dict(y=batch.y + 1), dict(cond=-batch.cond)):
        other = sample_by(method, solver, steps, net, replace(batch, **shown))
        assert (other - plain).abs().amax((1, 2, 3)).min() > 1e-3
    traced = sample_by(method, solver, steps, net, batch, trace)
    torch.testing.assert_close(traced, plain, rtol=0, atol=2e-5 if solver == "dopri5" else 0)
    if not getattr(method, "clamp", False):  # SR3's last step is not exactly the clamped estimate
        torch.testing.assert_close(trace[-1][2], traced, rtol=0, atol=1e-4)
    times = [t for t, _, _ in trace]
    assert len(trace) == frames and 0 <= times[0] and times[-1] <= 1 and (np.diff(times) > 0).all()


@pytest.mark.parametrize("method, solver, steps, nfe, frames", [s for s in SAMPLERS if not getattr(s[0], "clamp", 0)])
def test_guidance_on_outputs_is_guidance_on_samples(method, solver, steps, nfe, frames):
    """Every estimate is affine in the network's output, so that mixing outputs mixes estimates."""
    torch.manual_seed(5)
    u, c = torch.randn(2, 2, 2, 16, 16)

    def sampled(output):
        def net(x, t, y, cond):
            side = x.shape[2] * method.upscale
            return output[:, :, :side, :side].to(x.dtype)

        return sample_by(method, solver, steps, net, make_batch(dtype=torch.float64)).double()

    mixed = sampled(u) + 2.5 * (sampled(c) - sampled(u))
    torch.testing.assert_close(sampled(u + 2.5 * (c - u)), mixed, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- losses

LOSSES = [Interpolant(path, coupling, sigma=0.8, t_min=0.05)
          for path in ("linear", "trigonometric") for coupling in ("dependent", "independent")]
LOSSES += [SR3(T=50, schedule="constant", beta_end=0.05), SR3(norm="l2", T=50, schedule="constant", beta_end=0.05)]
LOSSES += [I2SB(n=30), I2SB(n=30, ot_ode=True), EDM(), EDM(sigma_data=0.3), Regression()]


@TASKS
@pytest.mark.parametrize("method", LOSSES)
def test_loss_is_the_error_in_what_the_network_should_say(method, task):
    """Worked out anew from what the network saw: x and t with the clean image give the noise and the answer. The
    answer alone has loss 0, and only pixels that are to be made count."""
    batch, spy = make_batch(task, 64, y=torch.arange(64)), Spy(lambda x, t, y, cond: wiggly(x, t, None, None))
    torch.manual_seed(1)
    loss = method.loss(spy, batch)
    (x, t, y, cond), = spy.seen
    assert y is batch.y and cond is batch.cond and t.dtype == torch.float32
    made, power = (batch.to_make > 0).expand_as(x), 1 if getattr(method, "norm", "") == "l1" else 2
    error = (wiggly(x, t, None, None).double() - answer(method, x, t, batch.z1.double())).abs() ** power
    by_hand = torch.stack([e[m].mean() for e, m in zip(error, made)])
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-3, atol=1e-6)
    assert loss.shape == (64,) and loss.dtype == torch.float32

    a, b, std = (c.view(-1, 1, 1, 1) for c in path(method, t))
    if isinstance(method, I2SB):
        std = (std**2 + b**2 * batch.unknown).sqrt()  # there the damaged end is noise
    residual = x.double() - a * batch.z1 - b * batch.zlo
    noisy = made & (std > 0)
    assert residual[made & ~noisy].abs().sum() < 1e-3
    if noisy.any():
        noise = (residual / std)[noisy]  # standard normal, were a, b and std what they should be
        assert abs(noise.mean()) < 4 / noise.numel()**0.5 and abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    known = (a if isinstance(method, EDM) else 1) * batch.zlo
    if not isinstance(method, I2SB) or method.ot_ode:
        torch.testing.assert_close(x[~made], known[~made].float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method, rank", [
    (Interpolant(t_min=0.1), lambda t: (t - 0.1) / 0.8),
    (SR3(T=4, schedule="linear", beta_start=0.1, beta_end=0.7),  # even in its step, and between two steps' gammas
     lambda gamma: np.interp(gamma, np.cumprod([1, 0.9, 0.7, 0.5, 0.3])[::-1], np.linspace(0, 1, 5))),
    (EDM(P_mean=-0.7, P_std=0.9), lambda t: torch.special.ndtr((4 * torch.tensor(t) + 0.7) / 0.9).numpy()),
    (I2SB(n=5), lambda t: (np.round(5 * t) - np.random.default_rng(1).random(len(t))) / 5)])  # k = 1 .. 5 alike
def test_times_are_drawn_from_the_papers_distribution(method, rank):
    spy = Spy(wiggly)
    torch.manual_seed(0)
    method.loss(spy, make_batch("generate", size=40_000, channels=1, side=1))
    ranks = np.sort(rank(spy.seen[0][1].double().numpy()))
    uniform = (np.arange(40_000) + 0.5) / 40_000
    assert 0 <= ranks[0] and ranks[-1] <= 1
    assert np.abs(ranks - uniform).max() < 1.95 / 40_000**0.5  # Kolmogorov and Smirnov, one in a thousand


def test_regression_may_take_the_logarithm():
    batch = make_batch()
    loss = Regression(error="log").loss(lambda x, t, y, cond: batch.z1 - x + 0.5, batch)
    torch.testing.assert_close(loss, torch.full((2,), 0.25001).log())


def test_masked_mean_is_the_mean_over_the_mask():
    error, mask = torch.rand(3, 2, 5, 5), (torch.rand(3, 1, 5, 5) < 0.3).float()
    mask[2] = 0
    by_hand = [error[i][:, mask[i, 0] > 0].mean() for i in range(2)] + [torch.tensor(0.0)]
    torch.testing.assert_close(masked_mean(error, mask), torch.stack(by_hand))


# ------------------------------------------------------------------------------------------------------- Gaussian data

MEAN, COV = (0.2, -0.1), ((0.25, 0.15), (0.15, 0.18))  # of z1 and zlo, pixel by pixel


def gaussian_batch(size=2, side=80, seen=True, dtype=torch.float32) -> Batch:
    noise = torch.randn(2, size, 1, side, side, generator=torch.Generator().manual_seed(5))
    root = np.linalg.cholesky(COV)
    z1 = (MEAN[0] + root[0, 0] * noise[0]).to(dtype)
    zlo = (MEAN[1] + root[1, 0] * noise[0] + root[1, 1] * noise[1]).to(dtype)
    one = torch.ones_like(zlo)
    return Batch(z1, zlo, one, 0 * one, zlo if seen else None, None)


def is_normal(sample, mean, var, extra=0.0):
    """Mean and variance within four standard errors (and `extra`, relative to the deviation) of N(mean, var)."""
    n, std = sample.numel(), math.sqrt(var)
    assert abs(sample.double().mean().item() - mean) < std * (4 / n**0.5 + extra)
    assert abs(sample.double().var().item() - var) < var * (4 * (2 / n) ** 0.5 + 2 * extra)


@pytest.mark.parametrize("method, solver, steps, extra", [  # extra: what the steps, and ends short of 0 and 1, leave
    *((Interpolant(path, coupling, 0.7), "dopri5", None, 4e-3)
      for path in ("linear", "trigonometric") for coupling in ("dependent", "independent")),
    *((Interpolant(path, coupling, 0.7, eps0=0.8), None, 150, 4e-3)
      for path in ("linear", "trigonometric") for coupling in ("dependent", "independent")),
    (Interpolant(sigma=0.7), "heun", 40, 4e-3),
    (SR3(T=400, schedule="linear", beta_start=1e-4, beta_end=0.04, clamp=False), None, None, 0.04),
    (I2SB(), None, 200, 0.02),
    (EDM(), None, 80, 0.02),
    (EDM(S_churn=20.0, S_max=5.0), None, 100, 0.01)])
def test_every_sampler_draws_from_the_posterior(method, solver, steps, extra):
    """Given zlo, samples are N(E[z1 | zlo], Var[z1 | zlo]): z0 and z1 are independent then."""
    (v1, c), (_, v0) = COV
    zlo = torch.tensor([-0.6, 0.9])[:, None, None, None].expand(2, 1, 140, 140).contiguous()
    batch = replace(gaussian_batch(side=140), zlo=zlo, cond=zlo)
    mean, var = MEAN[0] + c / v0 * (zlo.double() - MEAN[1]), v1 - c**2 / v0
    net = gaussian(method, (mean, zlo.double()), ((var, 0), (0, 0)))
    sample = sample_by(method, solver, steps, net, batch)
    for i in range(2):
        is_normal(sample[i], mean[i].mean().item(), var, extra)


FLOWS = [  # and the network's times at the two ends
    *((Interpolant(path, coupling, 0.6), (0.001, 0.999)) for path in ("linear", "trigonometric")
      for coupling in ("dependent", "independent")),
    (SR3(clamp=False), (SR3().gammas()[-1].item(), 1 - 1e-6)), (I2SB(ot_ode=True), (1, 1 / 1000)),
    (SR3(schedule="constant", beta_end=0.002, clamp=False), (0.998**2000, 0.998)),
    (EDM(), (math.log(80) / 4, math.log(0.002) / 4))]


@pytest.mark.parametrize("method, ends", FLOWS)
def test_dopri5_is_the_exact_map_between_gaussians(method, ends):
    """Without sight of zlo. dz/dt = m' + (s'/s)(z - m) keeps standard scores; z starts from the right distribution, and
    E[z1 | z] ends it."""
    batch = gaussian_batch(side=20, seen=False, dtype=torch.float64)
    if getattr(method, "coupling", "") == "independent":
        batch = replace(batch, zlo=0 * batch.zlo)
    spy = Spy(gaussian(method, MEAN, COV))
    sample = sample_by(method, "dopri5", None, spy, batch)
    moments = []
    for x, t, _, _ in (spy.seen[0], spy.seen[-1]):
        a, b, std = (c.item() for c in path(method, t[:1]))
        moments.append((a * MEAN[0] + b * MEAN[1], np.array([a, b]) @ COV @ [a, b] + std**2))
    (mean0, var0), (mean1, var1) = moments
    (x0, t0, _, _), (_, t1, _, _) = spy.seen[0], spy.seen[-1]
    is_normal(x0, mean0, var0, 0.05)
    x1 = mean1 + (var1 / var0) ** 0.5 * (x0.double() - mean0)
    torch.testing.assert_close(sample.double(), expected(method, x1, t1[:1], MEAN, COV), rtol=0, atol=3e-4)
    assert (t0[0].item(), t1[0].item()) == pytest.approx(ends, rel=1e-4)


# ------------------------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize("method, fields", [
    (Interpolant, dict(path="quadratic", coupling="both", sigma=0.0, t_min=0.0, eps0=-0.1)),
    (Interpolant, dict(sigma=math.nan, t_min=0.5, eps0=math.inf)),
    (SR3, dict(T=0, schedule="cosine", beta_start=0.0, beta_end=1.0, warmup=0.0, norm="huber")),
    (SR3, dict(beta_start=0.5, beta_end=math.nan, warmup=math.inf)),
    (I2SB, dict(beta_max=0.0, n=1)), (I2SB, dict(beta_max=math.nan)),
    (EDM, dict(sigma_data=0.0, P_mean=math.nan, P_std=-1.0, sigma_min=0.0, sigma_max=0.001, rho=0, S_churn=-1.0)),
    (EDM, dict(sampler="dpm", S_min=math.inf, S_max=math.nan, S_noise=-1.0)),
    (UDPM, dict(sigmas=(0.1, 0.2), alphas=(0.5, 0.0, 0.1), adv_weight=(1, -1, 1), grad_penalty=(1, math.nan, 1))),
    (UDPM, dict(lpips_weight=(1, 1), disc_channels=20, disc_noise=-0.1, disc_noise_decay=1.1, disc_dropout=1.0))])
def test_a_wrong_setting_is_named_in_one_line(method, fields):
    for name, value in fields.items():
        with pytest.raises(ValueError, match=rf"^{method.__name__.lower()}\.{name} = [^\n]+allowed[^\n]+$"):
            method(**{name: value})


@pytest.mark.parametrize("method, steps, allowed", [
    (SR3(T=20), 0, "1 to sr3.T = 20"), (SR3(T=20), 21, "1 to sr3.T = 20"), (I2SB(n=20), 0, "1 to i2sb.n = 20"),
    (I2SB(n=20), 21, "1 to i2sb.n = 20"), (EDM(), 0, "1 or more"), (PLAIN, 10, "3, one a level"),
    (Regression(), 2, "1")])
def test_a_wrong_number_of_steps_is_named(method, steps, allowed):
    with pytest.raises(ValueError, match=f"^steps = {steps}: allowed is {allowed}$"):
        method.sample(wiggly, make_batch(), steps)


@pytest.mark.parametrize("method, steps", [(SR3(), 100), (SR3(T=50), 50), (I2SB(), 50), (I2SB(n=10), 10)])
def test_pictures_in_training_take_no_more_steps_than_there_are(method, steps):
    assert method.picture_steps == steps
