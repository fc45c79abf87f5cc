"""UDPM's operators, diffusion and sampler against dense linear algebra on small images."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from dense import PLAIN, Toy, dense_H, dense_powers, flat, image, make_batch, seeded
from images.corruptions import Draws
from methods import udpm
from methods.udpm import UDPM

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
def test_posterior_is_the_papers(method, level):
    side = 16 >> (level - 1)
    H, n = dense_H(side), side**2
    a, s, A, S = method.alphas[level - 1], method.sigmas[level - 1], method.A[level - 1], method.S[level - 1]
    clean, x = torch.randn(1, 1, side, side).double(), torch.randn(1, 1, side // 2, side // 2).double()
    precision = a**2 / s**2 * H.T @ H + np.eye(n) / S**2
    mean = np.linalg.solve(precision, a / s**2 * H.T @ flat(x) + A / S**2 * flat(clean))
    np.testing.assert_allclose(flat(method.posterior(x, clean, level, torch.zeros_like(clean))), mean, atol=1e-10)
    root = flat(method.posterior(0 * x, 0 * clean, level, image(np.eye(n))))  # of every unit vector
    np.testing.assert_allclose(root @ root.T, np.linalg.inv(precision), atol=1e-13)


# Sampling

def test_trace_shows_the_states_and_the_estimates_and_each_state_is_drawn_from_the_posterior():
    batch, trace, net, stream = replace(make_batch(), draws=Draws(seeded())), [], Toy(), seeded()
    before = torch.get_rng_state()
    sample = PLAIN.sample(net, batch, steps=3, trace=trace)
    assert torch.equal(torch.get_rng_state(), before)  # all noise is the batch's
    noise = [torch.randn(2, 1, side, side, generator=stream) for side in (1, 2, 4)]
    assert [t for t, _, _ in trace] == pytest.approx([0, 1 / 3, 2 / 3])
    S3 = 1e-4 * (0.1**2 / 0.5**2 + 0.2**2 / 0.1**2 + 0.3**2 / 1e-4**2) ** 0.5
    state = S3 * noise[0]  # x_3 is noise of that size
    for level, fresh, (x, t, _, _), (_, view, clean) in zip((3, 2, 1), [*noise[1:], None], net.seen, trace):
        torch.testing.assert_close(x, state / np.hypot(2**level * PLAIN.A[level], PLAIN.S[level]))
        assert t.tolist() == pytest.approx([(level - 0.5) / 3] * 2) and t.dtype == torch.float32
        torch.testing.assert_close(view, x.repeat_interleave(2**level, 2).repeat_interleave(2**level, 3))
        torch.testing.assert_close(udpm.average(clean, level - 1), net(x, t))
        if level > 1:
            state = PLAIN.posterior(state, 2 ** (level - 1) * net(x, t), level, fresh)
    torch.testing.assert_close(trace[-1][2], sample)


# Wrong values

def test_settings_of_each_level_are_as_many_as_the_levels():
    with pytest.raises(ValueError, match=r"udpm\.lpips_weight = .*as many as udpm.alphas has"):
        UDPM((0.9, 0.6), (0.3, 0.05), (1, 1), adv_weight=(1, 1), grad_penalty=(1, 1))  # of None, the paper's is meant


def test_wrong_sides_are_named():
    batch = make_batch(side=12)
    for call in (PLAIN.sample, PLAIN.loss):
        with pytest.raises(ValueError, match=r"image sides = \(12, 12\).*multiples of 8,"):
            call(Toy(), batch)
