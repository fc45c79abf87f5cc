"""EDM against closed forms: Gaussian data with its exact denoiser and flow; an oracle that knows the clean image."""
import math
from dataclasses import fields, replace

import pytest
import torch

from images.corruptions import Batch
from methods.edm import EDM
from networks import Plain
from ode_int import integrate, solve
from unet import Counted


def make_batch(z1, mask=None):
    """Generation where there is no mask; with one, inpainting of z1."""
    mask = torch.ones_like(z1[:, :1]) if mask is None else mask
    return Batch(z1=z1, zlo=z1 * (1 - mask), to_make=mask, unknown=mask, cond=None, y=None)


def hole(batch_size, side):
    mask = torch.zeros(batch_size, 1, side, side)
    mask[:, :, side // 4 : side // 2 + 1, 1:-1] = 1
    return mask


def net_of(denoiser, sigma_data=0.5):
    """The network behind a denoiser(x, sigma), by solving eq. 7 for it."""

    def net(x, t, y, cond):
        sigma = (4 * t).exp().view(-1, 1, 1, 1)
        total = (sigma**2 + sigma_data**2).sqrt()
        x = x * total
        return (denoiser(x, sigma) - (sigma_data / total) ** 2 * x) * total / (sigma * sigma_data)

    return net


MEAN, STD = 0.3, 0.4


def gaussian(x, sigma):
    """E[z1 | x] for data N(MEAN, STD^2), pixel by pixel."""
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


def flow(x, sigma_from, sigma_to):
    """The probability flow of that data: x - MEAN scales with its own standard deviation."""
    return MEAN + (x - MEAN) * ((STD**2 + sigma_to**2) / (STD**2 + sigma_from**2)) ** 0.5


def blank(*shape, dtype=torch.float64):
    return make_batch(torch.zeros(shape, dtype=dtype))


def test_denoiser_without_noise_is_the_identity():
    torch.manual_seed(0)
    x, output = torch.randn(2, 3, 4, 4, 4).double()
    edm = EDM()
    for sigma in (1e-3, 1e-5):  # D - x = sigma F + O(sigma^2)
        slope = (edm.D(lambda *_: output, x, torch.tensor(sigma), None, None) - x) / sigma
        torch.testing.assert_close(slope, output, rtol=0, atol=20 * sigma)


def test_denoiser_in_noise_alone_is_the_output_at_data_scale():
    torch.manual_seed(1)
    noise, output = torch.randn(2, 3, 4, 4, 4).double()
    for sigma in (1e3, 1e5):
        denoised = EDM(sigma_data=0.7).D(lambda *_: output, sigma * noise, torch.tensor(sigma), None, None)
        torch.testing.assert_close(denoised, 0.7 * output, rtol=0, atol=3 / sigma)


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


def test_loss_is_the_networks_own_squared_error():
    """weight * c_out^2 = 1: whatever sigma was drawn, the loss is mean (F - target)^2, and nothing is left over."""
    torch.manual_seed(3)
    z1, output, seen = torch.rand(2, 6, 3, 8, 8).double()[0] * 2 - 1, torch.randn(6, 3, 8, 8).double(), {}

    def net(x, t, y, cond):
        seen.update(x=x, t=t, y=y, cond=cond)
        return output

    batch = replace(make_batch(z1), y=torch.arange(6), cond=torch.randn(6, 2, 8, 8))
    loss = EDM().loss(net, batch)
    target = net_of(lambda x, sigma: z1)(seen["x"], seen["t"], None, None)
    torch.testing.assert_close(loss, (output - target).square().mean((1, 2, 3)))
    assert seen["y"] is batch.y and seen["cond"] is batch.cond


def test_training_noise_is_log_normal():
    torch.manual_seed(4)
    seen = []

    def net(x, t, y, cond):
        seen.append((x, t))
        return x

    EDM(P_mean=-0.7, P_std=0.9).loss(net, blank(40_000, 1, 1, 1, dtype=torch.float32))
    (x, t), = seen
    log_sigma = 4 * t
    assert log_sigma.mean().item() == pytest.approx(-0.7, abs=0.02)
    assert log_sigma.std().item() == pytest.approx(0.9, abs=0.016)
    sigma = log_sigma.exp()
    noise = x.flatten() * (sigma**2 + 0.25).sqrt() / sigma  # z1 is 0
    assert noise.mean().item() == pytest.approx(0, abs=0.025) and noise.std().item() == pytest.approx(1, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([noise.abs(), log_sigma]))[0, 1].item()) < 0.03


def test_loss_of_the_oracle_is_zero_and_counts_the_hole_only():
    torch.manual_seed(5)
    z1, mask = torch.rand(4, 3, 8, 8) * 2 - 1, hole(4, 8)
    oracle = net_of(lambda x, sigma: z1)
    assert EDM().loss(oracle, make_batch(z1)).max() < 1e-6

    def net(x, t, y, cond):
        sigma = (4 * t).exp().view(-1, 1, 1, 1)
        torch.testing.assert_close(x * (sigma**2 + 0.25).sqrt() * (1 - mask), z1 * (1 - mask))
        return oracle(x, t, y, cond) + 3 * mask + torch.where(mask > 0, 0, 1e3)

    torch.testing.assert_close(EDM().loss(net, make_batch(z1, mask)), torch.full((4,), 9.0), rtol=1e-3, atol=0)


def test_schedule_is_even_in_its_root():
    *sigmas, last = EDM(sigma_min=0.01, sigma_max=50.0, rho=5.0).sigmas(11)
    roots = [sigma**0.2 for sigma in sigmas]
    assert last == 0 and sigmas[0] == pytest.approx(50) and sigmas[-1] == pytest.approx(0.01) and len(sigmas) == 11
    assert [b - a for a, b in zip(roots, roots[1:])] == pytest.approx([(0.01**0.2 - 50**0.2) / 10] * 10)
    assert EDM().sigmas(1) == pytest.approx([80, 0])


def end_error(edm, steps):
    """RMS distance, at the last network evaluation, from the exact flow of the same starting noise."""
    torch.manual_seed(6)
    batch, trace = blank(1, 1, 20, 20), []
    out = edm.sample(net_of(gaussian), batch, steps, trace)
    torch.manual_seed(6)
    exact = flow(80 * torch.randn_like(batch.zlo), 80, 0.002)
    last = trace[-1][1] * (1 + 0.002**2) ** 0.5
    torch.testing.assert_close(out, gaussian(last, 0.002))  # the last step is the clean estimate
    return (out - gaussian(exact, 0.002)).square().mean().sqrt().item()


@pytest.mark.parametrize("sampler, order", (("heun", 2), ("euler", 1)))
def test_order_of_the_sampler(sampler, order):
    """Error ~ steps^-order against the exact flow."""
    errors = [end_error(EDM(sampler=sampler), n + 1) for n in (80, 160, 320)]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert slopes == pytest.approx([order, order], abs=0.1), (errors, slopes)


@pytest.mark.parametrize("edm, steps, nfe", (
    (EDM(), None, 35), (EDM(), 18, 35), (EDM(), 1, 1), (EDM(), 2, 3), (EDM(S_churn=30.0), 18, 35),
    (EDM(sampler="euler"), None, 35), (EDM(sampler="euler"), 18, 18)))
def test_network_evaluations(edm, steps, nfe):
    net, trace = Counted(Plain(net_of(gaussian))), []
    edm.sample(net, blank(3, 1, 4, 4), steps, trace)
    assert net.rows / 3 == nfe
    assert len(trace) == (steps or (18 if edm.sampler == "heun" else 35))


def sampled(edm, steps=18, batch=None, net=net_of(gaussian)):
    torch.manual_seed(7)
    return edm.sample(net, blank(2, 3, 8, 8) if batch is None else batch, steps)


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

    sampled(edm, 18, net=net)
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
    x = sampled(edm, 18, blank(4, 1, 150, 150, dtype=torch.float32))
    assert x.var().item() == pytest.approx(churned_variance(edm, 18), rel=4 * (2 / n) ** 0.5)
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / n**0.5)
    fine = churned_variance(edm, 1024) / STD**2
    assert abs(fine - 1) < 0.003 if edm.S_noise == 1 else fine > 1.1


@pytest.mark.parametrize("edm", (EDM(), EDM(sampler="euler"), EDM(S_churn=40.0, S_noise=1.003), EDM(sigma_data=0.3)))
@pytest.mark.parametrize("steps", (1, 5, None))
def test_oracle_returns_the_clean_image(edm, steps):
    torch.manual_seed(8)
    z1 = torch.rand(2, 3, 8, 8) * 2 - 1
    out = edm.sample(net_of(lambda x, sigma: z1, edm.sigma_data), make_batch(z1), steps)
    torch.testing.assert_close(out, z1, rtol=0, atol=1e-4)


def test_trace_shows_states_of_the_size_of_an_image():
    """Divided by sqrt(1 + sigma^2), noise alone has deviation 1 and the end is the image."""
    torch.manual_seed(9)
    z1, trace = torch.rand(2, 3, 32, 32) * 2 - 1, []
    EDM().sample(net_of(lambda x, sigma: z1), make_batch(z1), trace=trace)
    assert trace[0][1].std().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(trace[-1][1], z1, rtol=0, atol=0.012)
    for sigma, (t, _, clean) in zip(EDM().sigmas(18), trace):
        assert 0.5 / math.tan(math.pi / 2 * t) == pytest.approx(sigma)
        torch.testing.assert_close(clean, z1, rtol=0, atol=1e-4)


def test_sample_and_ode_never_see_the_clean_image():
    z1, mask, edm = torch.rand(2, 3, 8, 8) * 2 - 1, hole(2, 8), EDM(S_churn=10.0)
    outs = []
    for clean in (z1, torch.full_like(z1, math.nan), None):
        batch = replace(make_batch(z1, mask), z1=clean)
        torch.manual_seed(10)
        outs.append((edm.sample(net_of(gaussian), batch), solve(edm.velocity(net_of(gaussian), batch), "heun", 5)))
    for sample, end in outs[1:]:
        assert torch.equal(sample, outs[0][0]) and torch.equal(end, outs[0][1])


def test_inpainting_keeps_known_pixels_in_every_state():
    torch.manual_seed(11)
    z1, mask = torch.rand(2, 3, 8, 8) * 2 - 1, hole(2, 8)
    batch, trace, seen, edm = make_batch(z1, mask), [], [], EDM(S_churn=10.0)

    def net(x, t, y, cond):
        seen.append(x * ((4 * t).exp() ** 2 + 0.25).sqrt().view(-1, 1, 1, 1))
        return torch.where(mask > 0, net_of(lambda x, sigma: z1)(x, t, y, cond), 7.0)

    for out in (edm.sample(net, batch, 10, trace), solve(edm.velocity(net, batch), "heun", 10, trace=trace)):
        torch.testing.assert_close(out, z1, rtol=0, atol=1e-4)
        assert torch.equal(out * (1 - mask), batch.zlo)
    for x in seen:
        torch.testing.assert_close(x * (1 - mask), batch.zlo)
    for _, *pair in trace:
        assert all(torch.equal(x * (1 - mask), batch.zlo) for x in pair)


def test_flow_by_dopri5_is_the_exact_map_of_a_gaussian():
    torch.manual_seed(12)
    ode = EDM().velocity(net_of(gaussian), blank(2, 1, 8, 8, dtype=torch.float32))
    start, end = ((sigma**2 + 0.25) ** 0.5 for sigma in (80, 0.002))  # x = that times z
    z = integrate(ode.velocity, ode.z, ode.t0, ode.t1, "dopri5", atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(end * z, flow(start * ode.z, 80, 0.002), rtol=0, atol=1e-5)
    torch.testing.assert_close(ode.clean(torch.tensor(ode.t1), z), gaussian(end * z, 0.002), rtol=0, atol=2e-6)
    torch.testing.assert_close(solve(ode), gaussian(flow(start * ode.z, 80, 0.002), 0.002), rtol=0, atol=5e-5)
    assert (start * ode.z).std().item() == pytest.approx(80, rel=0.25)


@pytest.mark.parametrize("solver, steps", (("heun", 17), ("euler", 34)))
def test_flow_costs_no_more_than_the_paper_sampler(solver, steps):
    """With as many evaluations, 34 and the clean estimate, each solver ends nearer to the exact flow than the paper's
    sampler of its name."""
    torch.manual_seed(13)
    ode = EDM().velocity(net_of(gaussian), blank(1, 1, 20, 20, dtype=torch.float32))
    exact = gaussian(flow(ode.z * (80**2 + 0.25) ** 0.5, 80, 0.002), 0.002)
    assert (solve(ode, solver, steps) - exact).square().mean().sqrt() < end_error(EDM(sampler=solver), None)


def test_network_is_the_velocity_of_the_trigonometric_interpolant():
    """The target of training is, per pixel, the derivative of z = sin(pi t/2) z1/sd + cos(pi t/2) eps."""
    torch.manual_seed(14)
    z1, batch = torch.rand(2, 3, 4, 4).double() * 2 - 1, blank(2, 3, 4, 4)
    ode = EDM().velocity(net_of(lambda x, sigma: z1), batch)
    eps = torch.randn_like(z1)
    for t in torch.tensor([ode.t0, 0.3, 0.9, ode.t1], dtype=torch.float64):
        a = math.pi / 2 * t
        z, slope = a.sin() * z1 / 0.5 + a.cos() * eps, math.pi / 2 * (a.cos() * z1 / 0.5 - a.sin() * eps)
        torch.testing.assert_close(ode.velocity(t, z), slope)
        torch.testing.assert_close(ode.clean(t, z), z1)
        sigma = 0.5 / a.tan()
        torch.testing.assert_close(ode.view(t, z), (z1 + sigma * eps) / (1 + sigma**2).sqrt())


def test_guidance_on_outputs_is_guidance_on_denoisers():
    """D_u + w (D_c - D_u) from the network's outputs mixed by w, at every sigma of a batch."""
    torch.manual_seed(14)
    x, u, c = torch.randn(3, 5, 2, 4, 4).double()
    sigma = torch.tensor([0.002, 0.1, 0.5, 5.0, 80.0], dtype=torch.float64)

    def D(output):
        return EDM().D(lambda *_: output, x, sigma, None, None)

    torch.testing.assert_close(D(u + 2.5 * (c - u)), D(u) + 2.5 * (D(c) - D(u)))


@pytest.mark.parametrize("wrong", (
    dict(sigma_data=0.0), dict(P_std=-1.0), dict(sigma_min=0.0), dict(sigma_max=0.001), dict(rho=0),
    dict(S_churn=-1.0), dict(sampler="dpm"), *(dict([(field.name, value)]) for field in fields(EDM)
                                               if field.name != "sampler" for value in (math.nan, math.inf))))
def test_wrong_fields_are_named(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=rf"edm\.{name} = '?{value}"):
        EDM(**wrong)


def test_wrong_steps_are_named():
    with pytest.raises(ValueError, match="^steps = 0: allowed is 1 or more$"):
        EDM().sample(net_of(gaussian), blank(1, 1, 2, 2), 0)
