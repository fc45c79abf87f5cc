"""The flow map, against the one that Gaussian data have in closed form."""
from dataclasses import replace

import pytest
import torch
from torch import nn

from images.corruptions import Damage
from methods.flowmap import FlowMap, column
from networks import Spy
from ode_int import solve
from unet import Tiled, Unet

SIGMA, TAU = 0.8, 0.5  # z0 = centre + SIGMA noise; z1 = zlo + TAU noise
JUMPS = pytest.mark.parametrize("jump", ["psd", "lsd"])


def gaussian(count=64, seed=0):
    """A batch whose pixels are independent, given zlo."""
    torch.manual_seed(seed)
    zlo = torch.rand(count, 1, 4, 4) * 2 - 1
    batch = Damage()("sr", zlo)
    return replace(batch, zlo=zlo, cond=zlo, z1=zlo + TAU * torch.randn_like(zlo), to_make=torch.ones_like(zlo))


def spread(t):
    """The standard deviation of zt around zlo, by the dependent coupling."""
    return (((1 - t) * SIGMA) ** 2 + (t * TAU) ** 2).sqrt()


def exact(z, times, y, cond):
    """u of the exact map, X(s, t, z) = zlo + spread(t) / spread(s) (z - zlo), and on the diagonal its derivative."""
    s, t = times[:, 0], times.sum(1)
    jump = (spread(t) / spread(s) - 1) / (t - s)
    velocity = (t * TAU**2 - (1 - t) * SIGMA**2) / spread(t) ** 2
    return column(torch.where(t - s > 1e-6, jump, velocity)) * (z - cond)


METHOD = FlowMap(sigma=SIGMA)


@JUMPS
def test_jumps_of_the_exact_map_are_their_own_target(jump):
    method, batch = replace(METHOD, jump=jump), gaussian()
    s, t = torch.rand(2, 64).sort(dim=0).values
    t = torch.maximum(t, s + 0.05)
    target = method.jump_target(exact, batch.z1, s, t, batch)
    torch.testing.assert_close(target, method.u(exact, batch.z1, s, t, batch), atol=2e-5, rtol=1e-4)
    assert method.loss(exact, batch)[1::2].max() < 1e-5


def test_half_of_the_images_learn_the_line_and_half_a_jump_that_gets_no_gradient():
    batch, calls = gaussian(6), []

    def zero(z, times, y, cond):
        calls.append((z, times, torch.is_grad_enabled()))
        return 0 * z

    torch.manual_seed(1)
    loss = METHOD.loss(zero, batch)
    torch.manual_seed(1)
    z0 = METHOD.path.start(batch)
    line = batch.z1 - z0
    torch.testing.assert_close(loss, torch.where(torch.arange(6) % 2 == 0, line.square().mean((1, 2, 3)), 0))
    assert [(len(z), learns) for z, _, learns in calls] == [(3, False), (3, False), (6, True)]
    z, times, _ = calls[-1]
    torch.testing.assert_close(z, z0 + column(times[:, 0]) * line)
    assert METHOD.loss(zero, batch[:1]).shape == (1,)


def test_jumps_begin_where_they_should():
    seen = []

    def net(z, times, y, cond):
        seen.append(times)
        return 0 * z

    METHOD.loss(net, gaussian(4000))
    s, span = seen[-1].T
    assert (span[::2] == 0).all() and (span[1::2] > 0).float().mean() > 0.99 and (s + span).max() <= 1
    assert 0.22 < (s[1::2] == 0).float().mean() < 0.28
    assert abs(s[::2].mean() - 1 / 2) < 0.02 and abs(s[::2].var() - 1 / 12) < 0.01, "not uniform on the diagonal"


def test_a_network_begins_as_the_interpolants():
    torch.manual_seed(0)
    plain = Unet(6, 3, dim=8, dim_mults=(1, 2), num_classes=3, blocks=1).eval()
    torch.manual_seed(0)
    net = Unet(6, 3, dim=8, dim_mults=(1, 2), num_classes=3, blocks=1, two_times=True).eval()
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([0, 2])
    at = torch.stack([t, torch.tensor([0.3, 0.1])], dim=1)
    with torch.no_grad():
        assert torch.equal(net(x, at, y, x), plain(x, t, y, x))
        assert torch.equal(net(x, at, None, x), plain(x, t, None, x))
        nn.init.ones_(net.embed_span[-1].weight)
        assert not torch.equal(net(x, at, y, x), plain(x, t, y, x))


def test_sampling_is_exact_in_any_number_of_steps_and_keeps_known_pixels():
    batch, calls, trace = gaussian(8), [], []

    def counted(*inputs):
        calls.append(inputs)
        return exact(*inputs)

    torch.manual_seed(3)
    z0 = METHOD.path.start(batch)
    for steps in (None, 2, 4):
        torch.manual_seed(3)
        made = METHOD.sample(counted, replace(batch, z1=None), steps)
        torch.testing.assert_close(made, batch.zlo + TAU / SIGMA * (z0 - batch.zlo))
    assert len(calls) == 1 + 2 + 4
    torch.manual_seed(3)
    by_ode = solve(METHOD.velocity(exact, batch))
    torch.testing.assert_close(by_ode, made, rtol=0, atol=5e-3)  # it stays on 0.001 <= t <= 0.999
    torch.manual_seed(3)
    METHOD.sample(counted, batch, 2, trace)
    assert [t for t, _, _ in trace] == [0, 0.5] and torch.equal(trace[0][1], z0) and len(calls) == 7 + 3
    for _, _, clean in trace:
        torch.testing.assert_close(clean, made)
    hole = Damage()("inpaint", torch.rand(2, 3, 8, 8))
    sample = METHOD.sample(lambda z, times, y, cond: torch.ones_like(z), hole, 3)
    assert torch.equal(sample * (1 - hole.unknown), hole.zlo * (1 - hole.unknown))


def test_tiles_take_both_times():
    def net(z, times, y, cond):
        return z * times[:, :1, None, None] + times[:, 1:, None, None]

    z, at = torch.randn(2, 3, 64, 64), torch.tensor([[0.1, 0.5], [0.4, 0.2]])
    torch.testing.assert_close(Tiled(Spy(net), 64, 32, 8, 4)(z, at), net(z, at, None, None))
