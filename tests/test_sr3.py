"""SR3 against closed forms: Gaussian data with its exact noise predictor; an oracle that knows the clean image."""
import math
from dataclasses import replace

import pytest
import torch

from images.corruptions import Batch
from methods import keep_known, masked_mean
from methods.sr3 import SR3
from ode_int import integrate, solve

SCHEDULES = ("quadratic", "linear", "constant", "warmup")


def make_batch(z1, mask=None):
    """Generation where there is no mask; with one, inpainting of z1."""
    ones = torch.ones_like(z1[:, :1])
    mask = ones if mask is None else mask
    zlo = z1 * (1 - mask)
    return Batch(z1=z1, zlo=zlo, to_make=mask, unknown=mask, cond=None, y=None)


def hole(batch_size, side):
    mask = torch.zeros(batch_size, 1, side, side)
    mask[:, :, side // 4 : side // 2 + 1, 1:-1] = 1
    return mask


def gaussian_net(mean, std):
    """E[eps | x] for data N(mean, std^2), pixel by pixel."""

    def net(x, gamma, y, cond):
        gamma = gamma.view(-1, 1, 1, 1)
        return (1 - gamma).sqrt() * (x - gamma.sqrt() * mean) / (gamma * std**2 + 1 - gamma)

    return net


def oracle_net(z1):
    def net(x, gamma, y, cond):
        gamma = gamma.view(-1, 1, 1, 1)
        return (x - gamma.sqrt() * z1) / (1 - gamma).sqrt()

    return net


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


def test_loss_draws_gamma_between_neighbours():
    """t is uniform on 1 .. T and gamma uniform between gamma_t and gamma_{t-1}: its mean is that of the midpoints."""
    torch.manual_seed(0)
    sr3, seen = SR3(T=4, schedule="linear", beta_start=0.1, beta_end=0.7), []

    def net(x, gamma, y, cond):
        seen.append(gamma)
        return torch.zeros_like(x)

    sr3.loss(net, make_batch(torch.zeros(40_000, 1, 1, 1)))
    (gamma,), table = seen, sr3.gammas().float()
    interval = torch.bucketize(gamma, table[1:].flip(0).contiguous()) - 1  # 0: the lowest
    for i in range(4):
        inside = gamma[interval == i]
        low, high = table[4 - i], table[3 - i]
        assert inside.min() >= low and inside.max() <= high
        assert len(inside) / 40_000 == pytest.approx(0.25, abs=0.012)  # 5.5 standard errors
        assert inside.mean() == pytest.approx((low + high).item() / 2, abs=0.016 * (high - low).item())


@pytest.mark.parametrize("norm", ("l1", "l2"))
def test_loss_formula(norm):
    """The net's own view of x and gamma, with a clean image that is known, determines the noise and so the loss."""
    torch.manual_seed(1)
    z1, weights = torch.rand(5, 3, 8, 8) * 2 - 1, torch.randn(5, 3, 8, 8)
    seen = {}

    def net(x, gamma, y, cond):
        seen.update(x=x, gamma=gamma, y=y, cond=cond)
        return weights

    batch = replace(make_batch(z1), y=torch.arange(5), cond=torch.randn(5, 2, 8, 8))
    loss = SR3(norm=norm, T=50, schedule="constant", beta_end=0.05).loss(net, batch)
    gamma = seen["gamma"].double().view(-1, 1, 1, 1)
    eps = (seen["x"].double() - gamma.sqrt() * z1) / (1 - gamma).sqrt()
    expected = (eps - weights).abs().pow(1 if norm == "l1" else 2).mean((1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert loss.shape == (5,) and loss.dtype == torch.float32
    assert seen["y"] is batch.y and seen["cond"] is batch.cond
    assert 0.85 < eps.std().item() < 1.15 and abs(eps.mean().item()) < 0.15  # it is unit noise


def test_loss_of_the_oracle_is_zero():
    torch.manual_seed(2)
    z1 = torch.rand(64, 1, 4, 4) * 2 - 1
    # beta_start: of 1 - gamma, float32's gamma leaves three digits at 1e-4
    loss = SR3(beta_start=1e-4).loss(oracle_net(z1), make_batch(z1))
    assert loss.max() < 2e-2 and loss.median() < 1e-5


def test_inpainting_loss_sees_known_pixels_clean_and_counts_the_hole_only():
    torch.manual_seed(3)
    z1, mask = torch.rand(4, 3, 8, 8) * 2 - 1, hole(4, 8)
    batch = make_batch(z1, mask)

    def net(x, gamma, y, cond):
        assert torch.equal(x * (1 - mask), z1 * (1 - mask))
        return oracle_net(z1)(x, gamma, y, cond) + 3 * mask + torch.where(mask > 0, 0, 1e3)

    loss = SR3(norm="l2", beta_start=1e-3).loss(net, batch)
    torch.testing.assert_close(loss, torch.full((4,), 9.0), rtol=1e-3, atol=0)


def test_masked_mean_is_the_mean_over_the_mask():
    error, mask = torch.rand(3, 2, 5, 5), (torch.rand(3, 1, 5, 5) < 0.3).float()
    mask[2] = 0
    expected = [error[i][:, mask[i, 0] > 0].mean() for i in range(2)] + [torch.tensor(0.0)]
    torch.testing.assert_close(masked_mean(error, mask), torch.stack(expected))


def test_reverse_step_is_bayes_for_unit_variance():
    """For data N(m, 1), x_s and x_t are jointly Gaussian. Each step's residual from Bayes' posterior mean, in units of
    the posterior's standard deviation, must be the noise that was drawn."""
    torch.manual_seed(4)
    mean = 0.7
    sr3 = SR3(T=40, schedule="linear", beta_start=0.01, beta_end=0.2, clamp=False)
    batch, trace = make_batch(torch.zeros(2, 1, 6, 6, dtype=torch.float64)), []
    torch.manual_seed(5)
    sr3.sample(gaussian_net(mean, 1.0), batch, steps=8, trace=trace)
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


def moments(sr3, tau, mean, std):
    """Mean and variance of what the sampler makes of N(0, 1) on the indices tau, by the predictor of N(mean, std^2)."""
    gammas = sr3.gammas()[tau].tolist()
    m, v = 0.0, 1.0
    for k in range(len(tau) - 1, 0, -1):
        g, alpha = gammas[k], gammas[k] / gammas[k - 1]
        share = (1 - alpha) / (g * std**2 + 1 - g)  # of x - sqrt(g) mean, taken off
        m = (m - share * (m - g**0.5 * mean)) / alpha**0.5
        v = v * (1 - share) ** 2 / alpha + (1 - alpha if k > 1 else 0)
    return m, v


@pytest.mark.parametrize("steps", (None, 100, 7))
def test_unit_gaussian_comes_out_in_closed_form(steps):
    """Data N(m, 1): the start without signal leaves a share gamma_T of the mean unmade, the last step without noise a
    variance of gamma at the smallest index; nothing else differs from the data, whatever the number of steps."""
    torch.manual_seed(6)
    sr3, mean, n = SR3(clamp=False), 1.5, 8 * 64 * 64
    tau = [0] + [2000 * k // (steps or 2000) for k in range(1, (steps or 2000) + 1)]
    x = sr3.sample(gaussian_net(mean, 1.0), make_batch(torch.zeros(8, 1, 64, 64)), steps)
    m, v = mean * (1 - sr3.gammas()[-1].item()), sr3.gammas()[tau[1]].item()
    assert moments(sr3, tau, mean, 1.0) == pytest.approx((m, v), rel=1e-9)
    assert x.mean().item() == pytest.approx(m, abs=4 * (v / n) ** 0.5)
    assert x.var().item() == pytest.approx(v, rel=4 * (2 / n) ** 0.5)


def test_narrow_gaussian_comes_out():
    """Data N(0.3, 0.2^2), T steps: the moments follow the exact recursion, which is itself near the data's."""
    torch.manual_seed(7)
    sr3, n = SR3(T=400, schedule="linear", beta_start=1e-4, beta_end=0.04, clamp=False), 8 * 64 * 64
    x = sr3.sample(gaussian_net(0.3, 0.2), make_batch(torch.zeros(8, 1, 64, 64)))
    m, v = moments(sr3, list(range(401)), 0.3, 0.2)
    assert x.mean().item() == pytest.approx(m, abs=4 * (v / n) ** 0.5)
    assert x.var().item() == pytest.approx(v, rel=4 * (2 / n) ** 0.5)
    assert m == pytest.approx(0.3, abs=1e-3) and v == pytest.approx(0.04, rel=0.03)  # of order 1/T


def test_clamp_keeps_x_the_sum_of_its_estimates():
    """Clamped or not, a z1_hat + b eps_hat = x; clamped pixels sit at the bound, the others are as without clamping."""
    torch.manual_seed(8)
    x, guess = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 8, 8).double()
    gamma = torch.tensor(0.6, dtype=torch.float64)
    a, b = gamma.sqrt(), (1 - gamma).sqrt()
    args = (lambda x, t, y, cond: guess, make_batch(x), x, a, b)
    free, (z1, eps) = SR3(clamp=False).predict(*args), SR3().predict(*args)
    outside = free[0].abs() > 1
    assert 0.1 < outside.double().mean() < 0.9
    torch.testing.assert_close(free[1], guess)
    for estimate in (free, (z1, eps)):
        torch.testing.assert_close(a * estimate[0] + b * estimate[1], x)
    torch.testing.assert_close(z1[outside], free[0][outside].sign())
    torch.testing.assert_close(eps[~outside], guess[~outside])


def test_clamp_bounds_the_sample():
    torch.manual_seed(9)
    batch = make_batch(torch.zeros(2, 3, 8, 8))

    def wild(x, t, y, cond):
        return 5 * torch.randn_like(x)

    assert SR3(T=50).sample(wild, batch).abs().max() <= 1 + 1e-5
    assert SR3(T=50, clamp=False).sample(wild, batch).abs().max() > 1.1


@pytest.mark.parametrize("clamp", (True, False))
@pytest.mark.parametrize("steps", (None, 10, 1))
def test_oracle_returns_the_clean_image(steps, clamp):
    torch.manual_seed(10)
    z1 = torch.rand(2, 3, 8, 8).double() * 2 - 1
    gammas, trace = [], []

    def net(x, gamma, y, cond):
        gammas.append(gamma[0].item())
        return oracle_net(z1)(x, gamma, y, cond)

    sr3 = SR3(T=200, clamp=clamp)
    torch.testing.assert_close(sr3.sample(net, make_batch(z1), steps, trace), z1, rtol=0, atol=1e-6)
    assert len(trace) == len(gammas) == (steps or 200)
    assert gammas[0] == pytest.approx(sr3.gammas()[200].item()) and gammas == sorted(gammas)
    for gamma, (t, _, clean) in zip(gammas, trace):
        assert math.sin(math.pi * t / 2) ** 2 == pytest.approx(gamma)
        torch.testing.assert_close(clean, z1, rtol=0, atol=1e-6)


def test_oracle_in_float32_at_full_length():
    torch.manual_seed(11)
    z1 = torch.rand(2, 3, 4, 4) * 2 - 1
    torch.testing.assert_close(SR3().sample(oracle_net(z1), make_batch(z1)), z1, rtol=0, atol=2e-4)


def test_sample_and_ode_never_see_the_clean_image():
    z1, mask, sr3 = torch.rand(2, 3, 8, 8) * 2 - 1, hole(2, 8), SR3(T=20)
    net = gaussian_net(0.1, 0.4)
    outs = []
    for clean in (z1, torch.full_like(z1, math.nan), None):
        batch = replace(make_batch(z1, mask), z1=clean)
        torch.manual_seed(12)
        outs.append((sr3.sample(net, batch), solve(sr3.velocity(net, batch), "heun", 5)))
    for sample, flow in outs[1:]:
        assert torch.equal(sample, outs[0][0]) and torch.equal(flow, outs[0][1])


def test_inpainting_keeps_known_pixels_in_every_state():
    torch.manual_seed(13)
    z1, mask = torch.rand(2, 3, 8, 8) * 2 - 1, hole(2, 8)
    batch, trace, seen, sr3 = make_batch(z1, mask), [], [], SR3(T=30)

    def net(x, gamma, y, cond):
        seen.append(x)
        return torch.where(mask > 0, oracle_net(z1)(x, gamma, y, cond), 7.0)

    for out in (sr3.sample(net, batch, 10, trace), solve(sr3.velocity(net, batch), "heun", 10, trace=trace)):
        torch.testing.assert_close(out, z1, rtol=0, atol=1e-3)
    for x in seen + [x for _, *pair in trace for x in pair] + [keep_known(torch.randn_like(z1), batch)]:
        assert torch.equal(x * (1 - mask), batch.zlo)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_probability_flow_is_the_exact_map_of_a_gaussian(schedule):
    """The flow carries N(sqrt(g) m, g s^2 + 1 - g) linearly on: x - sqrt(g) m scales with its standard deviation."""
    torch.manual_seed(14)
    mean, std = 0.4, 0.3
    sr3 = SR3(schedule=schedule, clamp=False)
    ode = sr3.velocity(gaussian_net(mean, std), make_batch(torch.zeros(2, 1, 6, 6)))
    x = integrate(ode.velocity, ode.z, ode.t0, ode.t1, "dopri5", atol=1e-6, rtol=1e-6)
    g0, g1 = sr3.gammas()[[sr3.T, 1]].tolist()
    scale = ((g1 * std**2 + 1 - g1) / (g0 * std**2 + 1 - g0)) ** 0.5
    torch.testing.assert_close(x, g1**0.5 * mean + scale * (ode.z - g0**0.5 * mean), rtol=0, atol=2e-5)
    # and the estimate there is Bayes'
    bayes = mean + g1**0.5 * std**2 / (g1 * std**2 + 1 - g1) * (x - g1**0.5 * mean)
    torch.testing.assert_close(ode.clean(torch.tensor(ode.t1), x), bayes, rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", ("dopri5", "heun", "euler"))
def test_probability_flow_of_the_oracle_ends_at_the_clean_image(solver):
    torch.manual_seed(15)
    z1 = torch.rand(2, 3, 4, 4) * 2 - 1
    # beta_start: nearer to 1, float32's gamma fails this oracle
    ode = SR3(beta_start=1e-4).velocity(oracle_net(z1), make_batch(z1))
    torch.testing.assert_close(solve(ode, solver, 20), z1, rtol=0, atol=2e-4)


def test_guidance_on_outputs_is_guidance_on_estimates():
    """Unclamped estimates are affine in the output, so that mixing outputs mixes estimates."""
    torch.manual_seed(16)
    x, u, c = torch.randn(3, 2, 3, 4, 4).double()
    a, b = torch.tensor([0.8, 0.6], dtype=torch.float64)
    sr3, batch = SR3(clamp=False), make_batch(x)

    def clean(output):
        return sr3.predict(lambda x, t, y, cond: output, batch, x, a, b)[0]

    torch.testing.assert_close(clean(u + 2.5 * (c - u)), clean(u) + 2.5 * (clean(c) - clean(u)))


@pytest.mark.parametrize("wrong", (
    dict(T=0), dict(schedule="cosine"), dict(beta_start=0.0), dict(beta_start=0.5), dict(beta_end=1.0),
    dict(warmup=0.0), dict(norm="huber"), dict(beta_start=math.nan), dict(beta_end=math.nan), dict(warmup=math.inf)))
def test_wrong_fields_are_named(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=rf"sr3\.{name} = '?{value}"):
        SR3(**wrong)


def test_pictures_in_training_take_no_more_steps_than_the_schedule_has():
    assert (SR3().picture_steps, SR3(T=100).picture_steps, SR3(T=50).picture_steps) == (100, 100, 50)
    batch = make_batch(torch.zeros(1, 1, 2, 2))
    assert SR3(T=50).sample(gaussian_net(0.0, 1.0), batch, SR3(T=50).picture_steps).isfinite().all()


@pytest.mark.parametrize("steps", (0, 21))
def test_wrong_steps_are_named(steps):
    with pytest.raises(ValueError, match=f"^steps = {steps}: allowed is 1 to sr3.T = 20$"):
        SR3(T=20).sample(gaussian_net(0.0, 1.0), make_batch(torch.zeros(1, 1, 2, 2)), steps)
