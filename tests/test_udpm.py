"""UDPM's operators, diffusion and sampler against dense linear algebra on small images."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dense import PLAIN, Toy, basis, dense_H, dense_powers, flat, image, make_batch
from images.corruptions import Batch
from methods import udpm
from methods.udpm import UDPM


def level_of(t: Tensor, levels=3) -> int:
    return round(t[0].item() * levels + 0.5)


# The operators and the diffusion

def test_H_and_its_transpose():
    H = dense_H(8)
    np.testing.assert_allclose(H @ H.T, np.eye(16), atol=1e-15)
    x, small = torch.randn(3, 1, 8, 8).double(), torch.randn(3, 1, 4, 4).double()
    np.testing.assert_allclose(flat(udpm.shrink(x)), H @ flat(x), atol=1e-14)
    np.testing.assert_allclose(flat(udpm.enlarge(small)), H.T @ flat(small), atol=1e-14)
    torch.testing.assert_close(udpm.shrink(udpm.enlarge(small)), small)
    for k, power in enumerate(dense_powers(8, 3)):
        np.testing.assert_allclose(flat(udpm.average(x, k)), power @ flat(x) / 2**k, atol=1e-14)


TWO_LEVELS = UDPM((0.9, 0.6), (0.3, 0.05), (1, 1), lpips_weight=(0, 0), adv_weight=(1, 1), grad_penalty=(1, 1))


@pytest.mark.parametrize("method", [PLAIN, TWO_LEVELS])
def test_marginals_by_composing_the_steps(method):
    mean, cov = np.eye(64), np.zeros((64, 64))
    assert method.A[0] == 1 and method.S[0] == 0
    for level, (a, s) in enumerate(zip(method.alphas, method.sigmas), 1):
        H = dense_H(8 >> (level - 1))
        mean, cov = a * H @ mean, a**2 * H @ cov @ H.T + s**2 * np.eye(len(H))
        np.testing.assert_allclose(method.A[level] * dense_powers(8, level)[level], mean, rtol=1e-13)
        np.testing.assert_allclose(method.S[level] ** 2 * np.eye(len(H)), cov, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("method", [PLAIN, replace(PLAIN, alphas=(0.7, 0.8, 0.6), sigmas=(0.4, 0.3, 0.2))])
@pytest.mark.parametrize("level", [2, 3])
def test_posterior_is_the_conditional_of_the_joint_gaussian(method, level):
    side = 16 >> (level - 1)
    H, n = dense_H(side), side**2
    a, s, A, S = method.alphas[level - 1], method.sigmas[level - 1], method.A[level - 1], method.S[level - 1]
    clean, x = torch.randn(1, 1, side, side).double(), torch.randn(1, 1, side // 2, side // 2).double()
    prior = A * flat(clean)
    cross, var = S**2 * a * H.T, a**2 * S**2 * H @ H.T + s**2 * np.eye(n // 4)  # Cov(x_{l-1}, x_l), Var(x_l) given x_0
    mean = prior + cross @ np.linalg.solve(var, flat(x) - a * H @ prior)
    cov = S**2 * np.eye(n) - cross @ np.linalg.solve(var, cross.T)

    np.testing.assert_allclose(flat(method.posterior(x, clean, level, torch.zeros_like(clean))), mean, atol=1e-12)
    root = flat(method.posterior(0 * x, 0 * clean, level, basis(n)))
    np.testing.assert_allclose(root @ root.T, cov, atol=1e-14)
    # the paper's way of writing it
    precision = a**2 / s**2 * H.T @ H + np.eye(n) / S**2
    np.testing.assert_allclose(np.linalg.inv(precision), cov, atol=1e-13)
    weighted = a / s**2 * H.T @ flat(x) + A / S**2 * flat(clean)
    np.testing.assert_allclose(np.linalg.solve(precision, weighted), mean, atol=1e-10)


# Sampling

def test_sampler_with_exact_draws_of_x0_has_the_data_distribution():
    """z1 ~ N(m, K). A network that draws H^{l-1} z1 from its law given x_l must make sample ~ N(m, K).

    The sampler is then affine in the latent and in the network's own noise, so its law is read off a basis.
    """
    side, n, levels = 8, 64, 3
    rng = np.random.default_rng(0)
    root = rng.normal(size=(n, n)) / 8
    K, m = root @ root.T + 0.05 * np.eye(n), rng.uniform(-1, 1, size=(n, 1))
    powers = dense_powers(side, levels)
    sizes = [n >> 2 * level for level in (3, 2, 1, 2, 1, 0)]  # of the latent's three maps, then of the network's own
    ends = np.cumsum(sizes)
    drawn = np.eye(ends[-1] + 1)[:, :-1].T  # a unit vector a column, the last column none: the sample's mean
    noise = [drawn[end - size:end] for end, size in zip(ends, sizes)]

    def net(x, t, y, cond):
        level = level_of(t)
        fine, coarse = powers[level - 1], PLAIN.A[level] * powers[level]
        gain = fine @ K @ coarse.T @ np.linalg.inv(coarse @ K @ coarse.T + PLAIN.S[level] ** 2 * np.eye(len(coarse)))
        cov = fine @ K @ fine.T - gain @ coarse @ K @ fine.T
        given = flat(x) * np.hypot(2**level * PLAIN.A[level], PLAIN.S[level])
        guess = fine @ m + gain @ (given - coarse @ m) + np.linalg.cholesky(cov) @ noise[6 - level]
        return image(guess) / 2 ** (level - 1)

    batch = make_batch(size=drawn.shape[1])
    batch = Batch(None, batch.zlo.double(), batch.to_make, batch.unknown, None, None)
    out = flat(PLAIN.sample(net, batch, noise=[image(e) for e in noise[:levels]]))
    mean, jacobian = out[:, -1:], out[:, :-1] - out[:, -1:]
    # x_L starts from noise alone: what it lacks is A_L H^L z1, 0.0008 of the picture against a noise of 0.3
    np.testing.assert_allclose(mean, m, atol=5e-3)
    np.testing.assert_allclose(jacobian @ jacobian.T, K, atol=1e-4)


def test_trace_shows_the_states_and_the_estimates():
    batch, trace = make_batch(), []
    noise = PLAIN.latent(batch)
    net = Toy()
    sample = PLAIN.sample(net, batch, steps=3, trace=trace, noise=noise)
    assert [t for t, _, _ in trace] == pytest.approx([0, 1 / 3, 2 / 3])
    S3 = 1e-4 * (0.1**2 / 0.5**2 + 0.2**2 / 0.1**2 + 0.3**2 / 1e-4**2) ** 0.5  # x_3 is noise of that size
    torch.testing.assert_close(net.seen[0][0], S3 * noise[0] / ((8 * 1e-4) ** 2 + S3**2) ** 0.5)
    for level, (x, t, _, _), (_, state, clean) in zip((3, 2, 1), net.seen, trace):
        assert t.tolist() == pytest.approx([(level - 0.5) / 3] * 2) and t.dtype == torch.float32
        torch.testing.assert_close(state, x.repeat_interleave(2**level, 2).repeat_interleave(2**level, 3))
        torch.testing.assert_close(udpm.average(clean, level - 1), net(x, t))
    torch.testing.assert_close(trace[-1][2], sample)


def test_a_map_of_the_latent_reaches_its_level_and_finer_ones():
    batch, net = make_batch(), Toy()
    a, b = PLAIN.latent(batch), PLAIN.latent(batch)

    def states(noise):
        trace = []
        sample = PLAIN.sample(net, batch, trace=trace, noise=noise)
        return [state for _, state, _ in trace] + [sample]

    first = states(a)
    assert all(torch.equal(x, y) for x, y in zip(first, states(a)))
    for level in (1, 2, 3):
        swapped = [y if other == level else x for other, x, y in zip((3, 2, 1), a, b)]
        same = [torch.equal(x, y) for x, y in zip(first, states(swapped))]
        assert same == [other > level for other in (3, 2, 1, 0)]


def test_all_noise_is_the_batchs():
    """The latent and the sample draw from the source they are handed, and nothing elsewhere."""
    drawn, stream = [], torch.Generator().manual_seed(1)

    def randn_like(x):
        drawn.append(torch.randn(x.shape, generator=stream))
        return drawn[-1]

    batch = replace(make_batch(channels=3, side=16), draws=SimpleNamespace(randn_like=randn_like))
    net = Toy(3)
    before = torch.get_rng_state()
    latent = PLAIN.latent(batch)
    assert [x.shape for x in latent] == [(2, 3, side, side) for side in (2, 4, 8)]
    assert all(x is y for x, y in zip(latent, drawn, strict=True))
    sample = PLAIN.sample(net, batch, noise=latent)
    assert len(drawn) == 3  # the latent is all of it
    edited = [latent[0], -latent[1], latent[2]]
    assert not torch.equal(PLAIN.sample(net, batch, noise=edited), sample)
    assert torch.equal(torch.get_rng_state(), before)
    stream.manual_seed(1)
    assert torch.equal(PLAIN.sample(net, batch), sample)


# Wrong values

def test_settings_of_each_level_are_as_many_as_the_levels():
    with pytest.raises(ValueError, match=r"udpm\.lpips_weight = .*as many as udpm.alphas has"):
        UDPM((0.9, 0.6), (0.3, 0.05), (1, 1), adv_weight=(1, 1), grad_penalty=(1, 1))  # of None, the paper's is meant


def test_wrong_sides_are_named():
    batch = make_batch(side=12)
    for call in (lambda: PLAIN.latent(batch), lambda: PLAIN.sample(Toy(), batch), lambda: PLAIN.loss(Toy(), batch)):
        with pytest.raises(ValueError, match=r"image sides = \(12, 12\).*multiples of 8,"):
            call()
