"""A method as a stranger would write it, with all that the interface allows: it splits the batch, uses every draw in
loss and sampler. It goes through trainer.py and sample.py, with their count of NFE."""
from dataclasses import dataclass, field, make_dataclass

import pytest
import torch

import sample
import trainer
from images.corruptions import Batch, Damage, Draws
from methods import Method, keep_known, masked_mean, same_shape
from methods.edm import EDM
from methods.i2sb import I2SB
from methods.interpolant import Interpolant
from methods.regression import Regression
from methods.sr3 import SR3
from methods.udpm import UDPM
from runs import TINY, metrics
from sample import open_model
from support.noise import NoisePerImage


@dataclass(frozen=True)
class Seventh(Method):
    """A straight path from three kinds of noise, of which each half of a batch draws its own; sampled in one step."""

    def start(self, batch: Batch) -> torch.Tensor:
        sign = 2 * batch.draws.randint(0, 2, batch.zlo, 1, 1, 1) - 1
        level = batch.draws.rand(batch.zlo, 3, 1, 1) / batch.draws.one(2, 5)
        return batch.zlo + sign * batch.randn_like(batch.zlo) + level

    def loss(self, net, batch: Batch) -> torch.Tensor:
        middle = len(batch.zlo) // 2
        return torch.cat([self.half(net, batch[:middle]), self.half(net, batch[middle:])])

    def half(self, net, batch: Batch) -> torch.Tensor:
        z0, t = self.start(batch), batch.draws.rand(batch.zlo)
        zt = torch.lerp(z0, batch.z1, t[:, None, None, None])
        v = same_shape(net(zt, t, batch.y, batch.cond), zt)
        return masked_mean((v - (batch.z1 - z0)).square(), batch.to_make)

    def sample(self, net, batch: Batch, steps=None, trace=None) -> torch.Tensor:
        z0 = self.start(batch)
        z1 = keep_known(z0 + net(z0, z0.new_zeros(len(z0)), batch.y, batch.cond), batch)
        if trace is not None:
            trace.append((0.0, z0, z1))
        return z1


@pytest.fixture
def with_seventh(monkeypatch):
    """The program with one more method: a field of Config, and its name."""
    more = [("method", str, "seventh"), ("seventh", Seventh, field(default_factory=Seventh))]
    Config = make_dataclass("Config", more, bases=(trainer.Config,))
    monkeypatch.setattr(trainer, "Config", Config)
    monkeypatch.setattr(sample, "Config", Config)


def test_it_trains_and_samples_at_its_own_cost(tmp_path, with_seventh):
    flags = TINY.replace("--solver euler --sample-steps 2", "--max-steps 2 --batch-size 8 --micro-batch 6")
    assert trainer.main(f"{flags} --precision fp32 --name run --out-dir {tmp_path}".split()) == 0
    sampled = next(line for line in metrics(tmp_path / "run") if "nfe" in line)
    assert sampled["nfe"] == 1  # no trace is paid for
    assert (tmp_path / "run/samples/step_000002.png").exists() and (tmp_path / "run/samples/trace_000002.png").exists()

    model, low = open_model(tmp_path / "run"), 2 * torch.rand(3, 3, 8, 8) - 1
    made = model.restore(low, seed=4)
    assert model.rows == 3
    torch.testing.assert_close(model.restore(low[:2], seed=4), made[:2])  # no image depends on its neighbours
    assert (model.restore(low[:2], seed=5) - made[:2]).abs().mean() > 0.01


# ------------------------------------------------------------------------------------------------ what it may rely on

def test_part_of_a_batch_has_its_own_rows_of_the_noise():
    def batch():
        draws = Draws(torch.Generator().manual_seed(1), torch.Generator().manual_seed(2), (slice(1, None, 2),), 16)
        return Damage()("sr", torch.zeros(8, 3, 8, 8), draws=draws)

    def per_image():
        noise = NoisePerImage([[(1.0, (0, "", i))] for i in range(8)], "cpu")
        return Batch(None, *[torch.zeros(8, 1, 4, 4)] * 3, None, None, noise)

    def draw(b):
        return b.randn_like(b.zlo), b.draws.rand(b.zlo, 2), b.draws.randint(0, 1000, b.zlo)

    for make in (batch, per_image):
        for rows in (slice(None, 2), slice(1, 7, 3), torch.tensor([5, 0, 6])):
            for whole, part in zip(draw(make()), draw(make()[rows]), strict=True):
                assert torch.equal(whole[rows], part)
            for whole, part in zip(draw(make()), draw(make()[1:][rows]), strict=True):
                assert torch.equal(whole[1:][rows], part)
        with pytest.raises(AssertionError, match="index the Batch"):
            make().randn_like(torch.empty(2, 3))


def test_the_noise_of_single_images_has_every_draw():
    x = torch.empty(400, 50)
    a, b = ([[(weight, (seed, "", i))] for i in range(400)] for weight, seed in ((0.6, 0), (0.8, 1)))
    noise = NoisePerImage([row + other for row, other in zip(a, b)], "cpu")
    normal, uniform, whole = noise.randn_like(x), noise.rand(x, 50), noise.randint(-2, 3, x, 50)
    torch.testing.assert_close(normal, NoisePerImage(a, "cpu").randn_like(x) + NoisePerImage(b, "cpu").randn_like(x))
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert uniform.dtype == torch.float32 and whole.dtype == torch.int64
    assert 0 <= uniform.min() < 1e-3 and 1 - 1e-3 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.std() - 12**-0.5) < 0.01
    assert [(whole == k).float().mean().item() for k in range(-2, 3)] == pytest.approx([0.2] * 5, abs=0.015)
    a, b = ([NoisePerImage([[(1.0, (seed, name, 0))]], "cpu").one(0, 1000) for seed in range(20)] for name in "ab")
    assert a == b and len(set(a)) > 10  # it is the batch's, whatever its images are


@pytest.mark.parametrize("method", [Interpolant(), SR3(), I2SB(), EDM(), UDPM(lpips_weight=(0, 0, 0)), Regression(),
                                    Seventh()])
def test_a_network_of_one_channel_is_not_trained_on_colour(method):
    batch = Damage()("sr", 2 * torch.rand(4, 3, 16, 16) - 1)

    def one_channel(x, t, y, cond):
        return x.new_zeros(len(x), 1, x.shape[2] * method.upscale, x.shape[3] * method.upscale)

    with pytest.raises(AssertionError, match="the network predicts"):
        method.loss(one_channel, batch)
    with pytest.raises(AssertionError, match="a mask of"):
        masked_mean(torch.zeros(4), batch.to_make)
