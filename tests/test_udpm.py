"""UDPM against dense linear algebra on small images, and its two losses against formulas written out here."""
import copy
import sys
import warnings
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images.corruptions import Batch
from methods import udpm
from methods.udpm import UDPM, Discriminator
from support.settings import PRESETS, from_plain
from unet import Unet

PLAIN = UDPM(lpips_weight=(0, 0, 0), disc_channels=8)
LEVELS = pytest.mark.parametrize("level", [1, 2, 3])


def dense_H(side: int) -> np.ndarray:
    """(side^2 / 4, side^2): taps 1/2 on each 2x2 block."""
    half = np.kron(np.eye(side // 2), [[1.0, 1.0]]) / 2**0.5
    return np.kron(half, half)


def dense_powers(side: int, times: int) -> list[np.ndarray]:
    """H^0 .. H^times on images of that side."""
    powers = [np.eye(side**2)]
    for k in range(times):
        powers.append(dense_H(side >> k) @ powers[-1])
    return powers


def flat(x: Tensor) -> np.ndarray:
    """(B, 1, H, W) -> (pixels, B)."""
    return x.flatten(1).double().numpy().T


def image(x: np.ndarray) -> Tensor:
    side = round(x.shape[0] ** 0.5)
    return torch.from_numpy(np.ascontiguousarray(x.T)).reshape(-1, 1, side, side)


def basis(n: int) -> Tensor:
    """Every unit vector of n pixels, as images (n, 1, side, side)."""
    return image(np.eye(n))


def make_batch(size=2, channels=1, side=8, task="generate", y=None, seed=3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.rand(size, channels, side, side, generator=generator) * 2 - 1
    ones = torch.ones(size, 1, side, side)
    if task == "generate":
        return Batch(z1, 0 * z1, ones, ones, None, y)
    if task == "restore":
        zlo = (z1 + 0.3 * torch.randn(z1.shape, generator=generator)).clamp(-1, 1)
        return Batch(z1, zlo, ones, 0 * ones, zlo, y)
    hole = (torch.rand(ones.shape, generator=generator) < 0.5).float()
    zlo = z1 * (1 - hole)
    return Batch(z1, zlo, hole, hole, torch.cat([zlo, hole], dim=1), y)


def level_of(t: Tensor, levels=3) -> int:
    return round(t[0].item() * levels + 0.5)


def oracle(z1: Tensor):
    """average(z1, l - 1), by dense algebra."""
    def net(x, t, y, cond):
        level = level_of(t)
        powers = dense_powers(z1.shape[-1], level - 1)
        return torch.cat([image(powers[-1] @ flat(c)) for c in z1.split(1, dim=1)], dim=1).to(x) / 2 ** (level - 1)
    return net


class Toy(nn.Module):
    """A network with every argument in it, and a record of what it was given."""

    def __init__(self, channels=1):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.seen = []

    def forward(self, x, t, y=None, cond=None):
        self.seen.append((x, t, y, cond))
        return self.up(x) + t[:, None, None, None]


def players(method, net, channels=1, num_classes=0, cond_channels=0):
    (_, loss), (disc, disc_loss) = method.players(net, channels, num_classes, cond_channels)
    return loss, disc, disc_loss


def at_level(method: UDPM, level: int, call):
    """call() under a seed whose draw is that level."""
    for seed in range(100):
        torch.manual_seed(seed)
        if torch.randint(1, method.levels + 1, ()) == level:
            torch.manual_seed(seed)
            return call()


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

@pytest.mark.parametrize("task", ["generate", "restore", "inpaint"])
def test_oracle_gives_z1(task):
    batch = make_batch(channels=3, side=16, task=task)
    assert torch.equal(PLAIN.sample(oracle(batch.z1), batch), batch.z1)


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
    batch = Batch(None, batch.zlo.double(), batch.mask, batch.hole, None, None)
    out = flat(PLAIN.sample(net, batch, noise=[image(e) for e in noise[:levels]]))
    mean, jacobian = out[:, -1:], out[:, :-1] - out[:, -1:]
    # x_L starts from noise alone: what it lacks is A_L H^L z1, 0.0008 of the picture against a noise of 0.3
    np.testing.assert_allclose(mean, m, atol=5e-3)
    np.testing.assert_allclose(jacobian @ jacobian.T, K, atol=1e-4)


@pytest.mark.parametrize("task", ["generate", "restore", "inpaint"])
def test_nan_in_z1_changes_no_sample(task):
    batch, net = make_batch(task=task), Toy()
    hidden = replace(batch, z1=torch.full_like(batch.z1, float("nan")))
    torch.manual_seed(5)
    first = PLAIN.sample(net, batch)
    torch.manual_seed(5)
    assert torch.equal(PLAIN.sample(net, hidden), first)
    torch.manual_seed(5)
    assert torch.equal(PLAIN.sample(net, replace(batch, z1=None)), first)


def test_known_pixels_are_put_back():
    batch = make_batch(task="inpaint", channels=3)
    sample = PLAIN.sample(lambda x, t, y, cond: torch.full((len(x), 3, 2 * x.shape[2], 2 * x.shape[3]), 7.0), batch)
    torch.testing.assert_close(sample, torch.where(batch.mask == 1, 7.0, batch.z1), rtol=0, atol=0)


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
        swapped = udpm.swap(a, b, level)
        assert [x is y for x, y in zip(swapped, a)] == [other != level for other in (3, 2, 1)]
        assert swapped[3 - level] is b[3 - level]
        same = [torch.equal(x, y) for x, y in zip(first, states(swapped))]
        assert same == [other > level for other in (3, 2, 1, 0)]
    for level in (0, 4):
        with pytest.raises(ValueError, match="level = "):
            udpm.swap(a, b, level)


@pytest.mark.parametrize("task", ["generate", "restore", "inpaint"])
def test_all_noise_is_the_batchs(task):
    """The latent, its perturbation and the sample draw from the source they are handed, and nothing elsewhere."""
    drawn, stream = [], torch.Generator().manual_seed(1)

    def randn_like(x):
        drawn.append(torch.randn(x.shape, generator=stream))
        return drawn[-1]

    batch = replace(make_batch(channels=3, side=16, task=task), draws=SimpleNamespace(randn_like=randn_like))
    net = Toy(3)
    before = torch.get_rng_state()
    latent = PLAIN.latent(batch)
    assert [x.shape for x in latent] == [(2, 3, side, side) for side in (2, 4, 8)]
    assert all(x is y for x, y in zip(latent, drawn, strict=True))
    sample = PLAIN.sample(net, batch, noise=latent)
    assert len(drawn) == 3  # the latent is all of it
    edited = udpm.perturb(latent, 0.6, 2, randn_like)
    torch.testing.assert_close(edited[1], 0.8 * latent[1] + 0.6 * drawn[3])
    assert len(drawn) == 4 and not torch.equal(PLAIN.sample(net, batch, noise=edited), sample)
    assert torch.equal(torch.get_rng_state(), before)
    stream.manual_seed(1)
    assert torch.equal(PLAIN.sample(net, batch), sample)


def test_interpolation_and_perturbation_keep_unit_noise():
    batch = make_batch()
    a, b = PLAIN.latent(batch), PLAIN.latent(batch)
    for w, end in ((0, a), (1, b)):
        for x, y in zip(udpm.interpolate(a, b, w), end):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    zero = [0 * x for x in a]
    for w in (0.25, 0.5, 0.9):  # the weights' squares add to 1
        for x, y, p, q in zip(udpm.interpolate(a, zero, w), udpm.interpolate(zero, b, w), a, b):
            torch.testing.assert_close((x / p) ** 2 + (y / q) ** 2, torch.ones_like(x))
    middle = udpm.interpolate(a, b, 0.5)[0]
    torch.testing.assert_close(middle, (a[0] + b[0]) / 2**0.5)

    assert all(torch.equal(x, y) for x, y in zip(udpm.perturb(a, 0.0, 2), a))
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"strength = {strength}: allowed is 0 to 1"):
            udpm.perturb(a, strength, 2)
    with pytest.raises(ValueError, match="level = 4"):
        udpm.perturb(a, 0.5, 4)
    large = [torch.randn(4, 3, 64, 64) for _ in range(3)]
    new = udpm.perturb(large, 0.6, 2)
    assert new[0] is large[0] and new[2] is large[2]
    assert new[1].var().item() == pytest.approx(1, abs=0.03)
    assert (new[1] * large[1]).mean().item() == pytest.approx(0.8, abs=0.03)
    assert (udpm.perturb(large, 1.0, 1)[2] * large[2]).mean().item() == pytest.approx(0, abs=0.03)


# Training

@LEVELS
def test_network_sees_state_time_and_condition_of_the_level(level):
    batch, net = make_batch(task="inpaint", y=torch.tensor([1, 0])), Toy()
    at_level(PLAIN, level, lambda: PLAIN.loss(net, batch))
    at_level(PLAIN, level, lambda: torch.randint(1, 4, ()))
    eps = torch.randn(2, 1, 8 >> level, 8 >> level)  # what the loss drew after the level
    x, t, y, cond = net.seen[0]
    power = dense_powers(8, level)
    state = PLAIN.A[level] * power[level] @ flat(batch.z1) + PLAIN.S[level] * flat(eps)
    bound = ((PLAIN.A[level] * 2**level) ** 2 + PLAIN.S[level] ** 2) ** 0.5  # of an image of +-1 and the noise
    np.testing.assert_allclose(flat(x), state / bound, atol=1e-6)
    assert t.tolist() == pytest.approx([(level - 0.5) / 3] * 2) and y is batch.y
    for c in range(2):
        small = image(power[level - 1] @ flat(batch.cond[:, c:c + 1]) / 2 ** (level - 1)).float()
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            torch.testing.assert_close(cond[:, 4 * c + 2 * i + j], small[:, 0, i::2, j::2])


@LEVELS
def test_generator_loss_is_its_formula(level):
    method = replace(PLAIN, l1_weight=(1.5, 2.5, 0.5))
    batch, net = make_batch(task="restore", y=torch.tensor([2, 0])), Toy()
    loss, disc, _ = players(method, net, num_classes=2, cond_channels=1)
    nn.init.normal_(disc.label.weight)
    disc.steps += 2500  # two decays
    value = at_level(method, level, lambda: loss(net, batch))

    disc.eval()
    at_level(method, level, lambda: torch.randint(1, 4, ()))
    torch.randn(2, 1, 8 >> level, 8 >> level)
    x, t, _, _ = net.seen[0]
    guess = net(x, t)
    truth = image(dense_powers(8, level - 1)[-1] @ flat(batch.z1)).float() / 2 ** (level - 1)
    cond = F.interpolate(batch.cond, scale_factor=0.5 ** (level - 1), mode="area")
    logit = disc(guess + 0.4 * 0.99**2 * torch.randn_like(guess), level, batch.y, cond)
    expected = method.l1_weight[level - 1] * (guess - truth).abs().mean((1, 2, 3))
    expected = expected - method.adv_weight[level - 1] * torch.sigmoid(logit).log()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(at_level(method, level, lambda: method.loss(net, batch)),
                               method.l1_weight[level - 1] * (guess - truth).abs().mean((1, 2, 3)))


@LEVELS
def test_discriminator_loss_with_a_linear_discriminator(level):
    """D(x) = <w, x> has gradient w, so the penalty is penalty/2 |w|^2."""
    batch, net, side = make_batch(), Toy(), 8 >> (level - 1)
    w = torch.randn(1, side, side)
    seen = []

    class Linear(nn.Module):
        def forward(self, x, level, y, cond):
            seen.append((x, level, y, cond))
            return (w * x).sum((1, 2, 3))

    value = at_level(PLAIN, level, lambda: PLAIN.disc_loss(Linear(), batch, net, 0.3))
    (fake, *others), (real, *_) = seen
    assert others == [level, None, None]
    truth = image(dense_powers(8, level - 1)[-1] @ flat(batch.z1)).float() / 2 ** (level - 1)
    guess = net(*net.seen[0][:2])
    at_level(PLAIN, level, lambda: torch.randint(1, 4, ()))
    torch.randn(2, 1, 8 >> level, 8 >> level)
    torch.testing.assert_close(fake, guess + 0.3 * torch.randn_like(guess))
    torch.testing.assert_close(real, truth + 0.3 * torch.randn_like(truth))
    on_fake, on_real = ((w * x).sum((1, 2, 3)) for x in (fake, real))
    likelihood = torch.sigmoid(-on_fake).log() + torch.sigmoid(on_real).log()
    torch.testing.assert_close(value, -likelihood / 2 + PLAIN.grad_penalty[level - 1] / 2 * w.square().sum())


def test_penalty_and_its_own_gradient_against_finite_differences():
    """In float64: the discriminator's input gradient, and the whole loss's slope along a direction of its weights."""
    torch.manual_seed(0)
    method = replace(PLAIN, grad_penalty=(5.0, 5.0, 5.0), disc_dropout=0.0)
    batch = make_batch(side=16)
    batch = replace(batch, z1=batch.z1.double(), y=torch.tensor([0, 1]))
    disc = Discriminator(1, 0, 3, 2, 8, 0.0).double()

    class Enlarge(nn.Module):
        def forward(self, x, t, y, cond):
            return F.interpolate(x, scale_factor=2).double()

    net = Enlarge()

    def loss():
        return at_level(method, 3, lambda: method.disc_loss(disc, batch, net, 0.0))

    truth = udpm.average(batch.z1, 2)  # 4x4
    with torch.no_grad():
        step = 1e-5 * basis(16)[:, None]  # (16, 1, 1, 4, 4): one pixel of both images at a time
        gradient = torch.zeros(2, 16, dtype=torch.float64)
        for b in range(2):
            for i in range(16):
                moved = step[i] * (torch.arange(2) == b)[:, None, None, None]
                gradient[b, i] = (disc(truth + moved, 3, batch.y).sum() - disc(truth - moved, 3, batch.y).sum()) / 2e-5
        penalty = 2.5 * gradient.square().sum(1)
    plain = replace(method, grad_penalty=(0.0, 0.0, 0.0))
    without = at_level(plain, 3, lambda: plain.disc_loss(disc, batch, net, 0.0))
    torch.testing.assert_close((loss() - without).detach(), penalty, rtol=1e-6, atol=1e-10)

    weights = list(disc.parameters())
    direction = [torch.randn_like(p) for p in weights]
    gradients = torch.autograd.grad(loss().sum(), weights, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction) if g is not None)

    def moved(size):
        with torch.no_grad():
            for p, d in zip(weights, direction):
                p += size * d
        value = loss().sum().detach()
        with torch.no_grad():
            for p, d in zip(weights, direction):
                p -= size * d
        return value

    torch.testing.assert_close(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-7)


@LEVELS
def test_each_loss_leaves_the_other_network_alone(level):
    batch, net = make_batch(), Toy()
    loss, disc, disc_loss = players(PLAIN, net)
    modes = []
    disc.stem.register_forward_hook(lambda module, inputs, output: modes.append((disc.training, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        value = at_level(PLAIN, level, lambda: loss(net, batch).mean())
    assert all(p.requires_grad for p in disc.parameters())
    value.backward()
    assert modes == [(False, torch.float32)]  # dropout only while it learns itself
    assert all(p.grad is None for p in disc.parameters())
    assert net.up.weight.grad.abs().max() > 0  # level 3: by the discriminator alone
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        value = at_level(PLAIN, level, lambda: disc_loss(disc, batch).mean())
    value.backward()
    assert modes[1:] == [(True, torch.float32)] * 2
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in disc.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_the_discriminator_judges_images_made_without_dropout(training):
    class Dropping(Toy):
        def forward(self, x, t, y, cond):
            return F.dropout(super().forward(x, t, y, cond), 0.5, self.training)

    torch.manual_seed(0)
    batch, net, shown = make_batch(channels=3), Dropping(3).train(training), []
    loss, disc, disc_loss = players(PLAIN, net, channels=3)
    disc.stem.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    method = replace(PLAIN, disc_noise=0.0)
    at_level(method, 1, lambda: method.disc_loss(disc, batch, net, 0.0))
    torch.testing.assert_close(shown[0], net.up(net.seen[0][0]) + net.seen[0][1][:, None, None, None])
    assert net.training == net.up.training == training
    at_level(PLAIN, 1, lambda: disc_loss(disc, batch))
    assert net.training == training
    at_level(PLAIN, 1, lambda: loss(net, batch))  # its own loss leaves the mode alone
    assert net.training == training


def test_level_three_learns_from_the_discriminator_alone():
    """The adversarial gradient, worked out with the discriminator in the open."""
    batch, net = make_batch(), Toy()
    loss, disc, _ = players(PLAIN, net)
    at_level(PLAIN, 3, lambda: loss(net, batch).sum()).backward()
    x, t, _, _ = net.seen[0]
    at_level(PLAIN, 3, lambda: torch.randint(1, 4, ()))
    torch.randn(2, 1, 1, 1)
    guess = net(x, t)
    expected, = torch.autograd.grad(F.softplus(-disc(guess + 0.4 * torch.randn_like(guess), 3)).sum(), net.up.weight)
    torch.testing.assert_close(net.up.weight.grad, expected)


def test_discriminator_compares_the_images_of_a_batch_and_knows_the_class():
    torch.manual_seed(0)
    disc = Discriminator(3, 0, 3, 4, 8, 0.0).eval()
    nn.init.normal_(disc.label.weight)
    x = torch.randn(4, 3, 16, 16)
    y = torch.tensor([0, 1, 2, 4])  # 4 is the null label
    with torch.no_grad():
        alike, diverse = disc(x[:1].expand(4, -1, -1, -1), 1, y[:1].expand(4)), disc(x, 1, y)
        assert alike.std() < 1e-5 and (alike[0] - diverse[0]).abs() > 1e-5
        # the projection is linear in the class's vector
        first = disc(x, 1, y)
        disc.label.weight.mul_(2)
        second = disc(x, 1, y)
        disc.label.weight.mul_(0)
        torch.testing.assert_close(second - first, first - disc(x, 1, y))
        assert (second - first).abs().min() > 0
        assert (disc(x, 1, y) - disc(x, 2, y)).abs().min() > 0
        disc = Discriminator(3, 1, 3, 0, 8, 0.0).eval()
        assert (disc(x, 1, None, x[:, :1]) - disc(x, 1, None, x[:, 1:2])).abs().min() > 0


def test_noise_on_the_discriminator_decays_with_its_steps():
    net, batch = Toy(), make_batch()
    _, disc, disc_loss = players(PLAIN, net)
    for _ in range(2):
        disc_loss(disc, batch)
        disc_loss(disc, batch)  # a batch in two pieces is one step
        PLAIN.after_step([net, disc])
    assert disc.steps == 2 and "steps" in disc.state_dict()
    for steps, decays in ((999, 0), (1000, 1), (2999, 2), (50_000, 50)):
        disc.steps.fill_(steps)
        assert PLAIN.noise_std(disc).item() == pytest.approx(0.4 * 0.99**decays)


def test_training_resumes_bit_for_bit_with_unet_labels_and_condition():
    method = replace(PLAIN, disc_dropout=0.4)
    batch = make_batch(channels=3, side=8, task="inpaint", y=torch.tensor([0, 2]))

    def build():
        torch.manual_seed(0)
        net = Unet(3 + 4 * 4, 3, dim=8, dim_mults=(1, 2), num_classes=2, blocks=1, upscale=2)
        pair = method.players(net, 3, 2, cond_channels=4)
        return pair, [torch.optim.Adam(module.parameters(), 1e-2) for module, _ in pair]

    def train(pair, optimizers, steps):
        for step in steps:
            torch.manual_seed(step)
            for (module, loss), optimizer in zip(pair, optimizers):
                with torch.autocast("cpu", torch.bfloat16):
                    value = loss(module, batch).mean()
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                assert value.isfinite() and value.dtype == torch.float32
            method.after_step([module for module, _ in pair])

    whole, optimizers = build()
    train(whole, optimizers, range(3))
    saved = copy.deepcopy([(m.state_dict(), o.state_dict()) for (m, _), o in zip(whole, optimizers)])
    train(whole, optimizers, range(3, 6))
    resumed, optimizers = build()
    for (module, _), optimizer, (weights, state) in zip(resumed, optimizers, saved):
        module.load_state_dict(weights)
        optimizer.load_state_dict(state)
    train(resumed, optimizers, range(3, 6))
    for (a, _), (b, _) in zip(whole, resumed):
        for x, y in zip(a.state_dict().values(), b.state_dict().values()):
            assert torch.equal(x, y)
    assert whole[1][0].steps == 6
    assert method.sample(whole[0][0].eval(), batch).shape == batch.z1.shape


def test_without_adversarial_weight_there_is_no_discriminator():
    net = Toy()
    (module, loss), = replace(PLAIN, adv_weight=(0, 0, 0)).players(net, 1, 0)
    assert module is net and loss(net, make_batch()).shape == (2,)


# LPIPS

def test_weight_zero_needs_no_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    PLAIN.check("generate", True)
    assert PLAIN.settled() is PLAIN
    for level in (1, 2, 3):
        at_level(PLAIN, level, lambda: PLAIN.loss(Toy(), make_batch()))


def test_missing_lpips_names_the_two_ways_on(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    udpm.load_lpips.cache_clear()
    path = str(tmp_path / "vgg16.pth")
    for refused in (lambda: UDPM(lpips_weight=(0, 1, 0)).check("generate", True), UDPM(lpips_path=path).settled,
                    lambda: UDPM(lpips_path=path).check("generate", True),
                    lambda: at_level(UDPM(), 1, lambda: UDPM().loss(Toy(), make_batch()))):
        with pytest.raises(ValueError) as error:
            refused()
        message = str(error.value)
        assert "\n" not in message and "--udpm.lpips-path FILE" in message and "--udpm.lpips-weight 0 0 0" in message


def test_papers_recipes_refuse_to_start_without_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    udpm.load_lpips.cache_clear()
    for name in ("udpm-cifar10", "udpm-ffhq64", "udpm-afhq64"):
        assert PRESETS[name]["udpm"].lpips_weight == (4, 4, 0) and PRESETS[name]["label_drop"] == 0
        with pytest.raises(ValueError, match="pip install lpips"):
            PRESETS[name]["udpm"].check("generate", True)


def test_as_typed_it_does_without_a_missing_lpips_and_a_run_keeps_to_that(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    udpm.load_lpips.cache_clear()
    UDPM().check("generate", True)
    with pytest.warns(UserWarning) as warned:
        settled = UDPM(disc_channels=8).settled()
    assert len(warned) == 1 and "pip install lpips" in str(warned[0].message) and "\n" not in str(warned[0].message)
    assert settled == UDPM(lpips_weight=(0, 0, 0), disc_channels=8)
    # LPIPS is there by the time the run is resumed
    monkeypatch.setattr(udpm, "load_lpips", lambda path: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_plain(UDPM, asdict(settled)).settled() == settled
        found = UDPM().settled()
        assert found.lpips_weight == (4, 4, 0) and found.settled() is found


def make_vgg() -> nn.Sequential:
    from torchvision.models.vgg import cfgs, make_layers
    return make_layers(cfgs["D"])


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Random weights of VGG-16's convolutions under torchvision's names."""
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({"features." + k: v for k, v in make_vgg().state_dict().items()}, path)
    yield str(path)
    udpm.load_lpips.cache_clear()


def test_lpips_with_weights_from_a_file_is_its_formula(vgg_file, tmp_path):
    method = UDPM(lpips_path=vgg_file, adv_weight=(0, 0, 0))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    method.check("generate", True)
    method = method.settled()
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing from the run's stream

    package = udpm.load_lpips(vgg_file)
    assert not any(p.requires_grad for p in package.parameters()) and not package.training
    vgg = make_vgg()
    vgg.load_state_dict({k.removeprefix("features."): v for k, v in torch.load(vgg_file, weights_only=True).items()})
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # in [0, 1]

    def features(x):
        x = ((x + 1) / 2 - mean) / std
        return [F.normalize(vgg[:end](x)) for end in (4, 9, 16, 23, 30)]  # ReLU 1_2, 2_2, 3_3, 4_3, 5_3

    def formula(a, b):
        heads = [lin.model[-1].weight for lin in package.lins]
        return sum((w * (x - y) ** 2).sum(1).mean((1, 2)) for w, x, y in zip(heads, features(a), features(b)))

    def distance(a, b):
        return udpm.lpips_distance(a, b, vgg_file)

    batch, net = make_batch(channels=3, side=32), Toy(3)
    guess, truth = at_level(method, 2, lambda: method.noised_pair(net, batch)[1:])
    expected = formula(guess, truth)
    assert expected.min() > 1e-4
    torch.testing.assert_close(distance(guess, truth), expected, rtol=5e-3, atol=0)  # it rounds mean and std
    loss = at_level(method, 2, lambda: method.loss(net, batch))
    torch.testing.assert_close(loss, (guess - truth).abs().mean((1, 2, 3)) + 4 * distance(guess, truth))

    loss.sum().backward()
    assert net.up.weight.grad.isfinite().all()
    small, grey = torch.rand(1, 3, 8, 8), torch.rand(2, 1, 16, 16)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(distance(small, -small), distance(large, -large))
    torch.testing.assert_close(distance(grey, -grey), distance(grey.repeat(1, 3, 1, 1), -grey.repeat(1, 3, 1, 1)))

    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="--udpm.lpips-path FILE"):
        UDPM(lpips_path=str(tmp_path / "other.pth")).check("generate", True)


# Wrong values

@pytest.mark.parametrize("field, value", [
    ("sigmas", (0.1, 0.2)), ("alphas", (0.5, 0.0, 0.1)), ("alphas", ()), ("adv_weight", (1, -1, 1)),
    ("grad_penalty", (1, float("nan"), 1)), ("disc_channels", 20), ("lpips_weight", (1, 1)),
    ("adv_weight", (1, float("inf"), 1)), ("disc_noise", float("nan")), ("disc_noise", -0.1),
    ("disc_noise_decay", float("inf")), ("disc_noise_decay", 1.1), ("disc_dropout", 1.0), ("disc_dropout", -0.1)])
def test_wrong_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"udpm\.{field} = .*allowed"):
        UDPM(**{field: value})
    with pytest.raises(ValueError, match=r"udpm\.lpips_weight = .*as many as udpm.alphas"):
        UDPM((0.9, 0.6), (0.3, 0.05), (1, 1), adv_weight=(1, 1), grad_penalty=(1, 1))  # of None, the paper's is meant


def test_wrong_sides_and_steps_are_named():
    batch = make_batch(side=12)
    for call in (lambda: PLAIN.latent(batch), lambda: PLAIN.sample(Toy(), batch), lambda: PLAIN.loss(Toy(), batch)):
        with pytest.raises(ValueError, match=r"image sides = \(12, 12\).*multiples of 8,"):
            call()
    with pytest.raises(ValueError, match="steps = 10"):
        PLAIN.sample(Toy(), make_batch(), steps=10)
