"""UDPM's two losses against formulas written out here, and how its two networks are trained."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dense import PLAIN, Toy, at_level, dense_powers, flat, image, make_batch, seeded
from methods.udpm import Discriminator

LEVELS = pytest.mark.parametrize("level", [1, 2, 3])


def players(method, net, channels=1, num_classes=0, cond_channels=0):
    (_, loss), (disc, disc_loss) = method.players(net, channels, num_classes, cond_channels)
    return loss, disc, disc_loss


def averaged(x, times):
    """(B, 1, H, W) -> H^times x / 2^times."""
    return image(dense_powers(x.shape[2], times)[-1] @ flat(x)).float() / 2**times


@LEVELS
def test_network_sees_state_time_and_condition_of_the_level(level):
    batch, net = make_batch(task="inpaint", y=torch.tensor([1, 0])), Toy()
    PLAIN.loss(net, at_level(level, batch))
    x, t, y, cond = net.seen[0]
    eps = torch.randn(2, 1, 8 >> level, 8 >> level, generator=seeded())
    state = PLAIN.A[level] * dense_powers(8, level)[level] @ flat(batch.z1) + PLAIN.S[level] * flat(eps)
    bound = ((PLAIN.A[level] * 2**level) ** 2 + PLAIN.S[level] ** 2) ** 0.5  # of an image of +-1 and the noise
    np.testing.assert_allclose(flat(x), state / bound, atol=1e-6)
    assert t.tolist() == pytest.approx([(level - 0.5) / 3] * 2) and y is batch.y
    for c in range(2):
        small = averaged(batch.cond[:, c:c + 1], level - 1)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            torch.testing.assert_close(cond[:, 4 * c + 2 * i + j], small[:, 0, i::2, j::2])


@LEVELS
def test_generator_loss_is_its_formula(level):
    method = replace(PLAIN, l1_weight=(1.5, 2.5, 0.5))
    batch, net = make_batch(task="restore", y=torch.tensor([2, 0])), Toy()
    loss, disc, _ = players(method, net, num_classes=2, cond_channels=1)
    nn.init.normal_(disc.label.weight)
    disc.steps += 2500  # two decays
    value = loss(net, at_level(level, batch))
    assert batch.notes.keys() == {"l1", "adversarial"} and torch.equal(sum(batch.notes.values()), value)

    x, t, _, _ = net.seen[0]
    guess, noise = net(x, t), seeded()
    torch.randn(x.shape, generator=noise)  # the state's
    noised = guess + 0.4 * 0.99**2 * torch.randn(guess.shape, generator=noise)
    logit = disc.eval()(noised, level, batch.y, averaged(batch.cond, level - 1))
    l1 = method.l1_weight[level - 1] * (guess - averaged(batch.z1, level - 1)).abs().mean((1, 2, 3))
    torch.testing.assert_close(value, l1 - method.adv_weight[level - 1] * torch.sigmoid(logit).log())
    torch.testing.assert_close(method.loss(net, at_level(level, batch)), l1)


@LEVELS
def test_discriminator_loss_with_a_linear_discriminator(level):
    """D(x) = <w, x> has gradient w, so the penalty is penalty/2 |w|^2."""
    batch, net, side = make_batch(), Toy(), 8 >> (level - 1)
    w, seen = torch.randn(1, side, side, requires_grad=True), []

    class Linear(nn.Module):
        def forward(self, x, level, y, cond):
            seen.append((x, level, y, cond))
            return (w * x).sum((1, 2, 3))

    steps = SimpleNamespace(steps=torch.tensor(1000))
    value = PLAIN.disc_loss(Linear(), at_level(level, batch), disc=steps, net=net)
    (fake, *others), (real, *_) = seen
    assert others == [level, None, None]
    x, t, _, _ = net.seen[0]
    guess, truth, noise = net(x, t).detach(), averaged(batch.z1, level - 1), seeded()
    torch.randn(x.shape, generator=noise)  # the state's
    torch.testing.assert_close(fake, guess + 0.4 * 0.99 * torch.randn(guess.shape, generator=noise))
    torch.testing.assert_close(real, truth + 0.4 * 0.99 * torch.randn(truth.shape, generator=noise))
    on_fake, on_real = ((w * x.detach()).sum((1, 2, 3)) for x in (fake, real))
    likelihood = torch.sigmoid(-on_fake).log() + torch.sigmoid(on_real).log()
    expected = -likelihood / 2 + PLAIN.grad_penalty[level - 1] / 2 * w.square().sum()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), w) for each in (value, expected)))


class Dropping(Toy):
    def forward(self, x, t, y, cond):
        return F.dropout(super().forward(x, t, y, cond), 0.5, self.training)


@LEVELS
def test_each_loss_leaves_the_other_network_alone(level):
    batch, net, seen = make_batch(), Dropping(), []
    loss, disc, disc_loss = players(replace(PLAIN, disc_noise=0.0), net)
    disc.stem.register_forward_hook(lambda module, inputs, output: seen.append((disc.training, output.dtype, *inputs)))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(net, at_level(level, batch)).mean()
    assert all(p.requires_grad for p in disc.parameters())
    value.backward()
    assert [which[:2] for which in seen] == [(False, torch.float32)]  # dropout only while it learns itself
    assert all(p.grad is None for p in disc.parameters())
    assert net.up.weight.grad.abs().max() > 0  # level 3: by the discriminator alone
    net.zero_grad()
    value = disc_loss(disc, at_level(level, batch)).mean()
    x, t, _, _ = net.seen[1]
    torch.testing.assert_close(seen[1][2], net.up(x) + t[:, None, None, None])  # images made without dropout
    assert net.training and net.up.training
    with torch.autocast("cpu", torch.bfloat16):
        value = disc_loss(disc, at_level(level, batch)).mean()
    value.backward()
    assert [which[:2] for which in seen[1:]] == [(True, torch.float32)] * 4
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in disc.parameters())


def test_discriminator_compares_the_images_of_a_batch_and_knows_level_class_and_condition():
    disc = Discriminator(3, 0, 3, 4, 8, 0.0).eval()
    nn.init.normal_(disc.label.weight)
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 4])  # 4 is the null label
    with torch.no_grad():
        alike, diverse = disc(x[:1].expand(4, -1, -1, -1), 1, y[:1].expand(4)), disc(x, 1, y)
        assert alike.std() < 1e-5 and (alike[0] - diverse[0]).abs() > 1e-5
        assert (diverse - disc(x, 2, y)).abs().min() > 0
        # the projection is linear in the class's vector
        disc.label.weight.mul_(2)
        twice = disc(x, 1, y)
        disc.label.weight.zero_()
        torch.testing.assert_close(twice - diverse, diverse - disc(x, 1, y))
        assert (twice - diverse).abs().min() > 0
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


def test_without_adversarial_weight_there_is_no_discriminator():
    net = Toy()
    (module, loss), = replace(PLAIN, adv_weight=(0, 0, 0)).players(net, 1, 0)
    assert module is net and loss(net, make_batch()).shape == (2,)
