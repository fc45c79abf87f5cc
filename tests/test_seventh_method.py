"""A method as a stranger would write it, with all that the interface allows: it splits the batch, uses every draw in
loss and sampler, and ends in ode_int.solve. It goes through trainer.py, sample.py and evaluate.py's count of NFE."""
from dataclasses import FrozenInstanceError, dataclass, field, make_dataclass

import pytest
import torch

import ode_int
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
from ode_int import ODE
from runs import TINY, metrics
from sample import open_model
from support.noise import NoisePerImage


@dataclass(frozen=True)
class Seventh(Method):
    """A straight path from noise, or from its absolute value, in four kinds of noise. Each half of a batch has a time
    of its own."""

    solver = "own"
    has_ode = True

    def start(self, batch: Batch) -> torch.Tensor:
        sign = 2 * batch.draws.randint(0, 2, batch.zlo, 1, 1, 1) - 1
        level = batch.draws.rand(batch.zlo, 3, 1, 1)
        return batch.zlo + sign * batch.randn_like(batch.zlo) + level / batch.draws.one(2, 5)

    def loss(self, net, batch: Batch) -> torch.Tensor:
        half = len(batch.zlo) // 2
        return torch.cat([self.piece(net, batch[:half]), self.piece(net, batch[half:])])

    def piece(self, net, batch: Batch) -> torch.Tensor:
        z0, t = self.start(batch), batch.draws.rand(batch.zlo)
        zt = torch.lerp(z0, batch.z1, t[:, None, None, None])
        v = batch.z1 - z0
        return masked_mean((same_shape(net(zt, t, batch.y, batch.cond), v) - v).square(), batch.to_make)

    def velocity(self, net, batch: Batch) -> ODE:
        def v(t, z):
            return net(z, t.expand(len(z)), batch.y, batch.cond)

        def clean(t, z):
            return keep_known(z + (1 - t) * v(t, z), batch)

        return ODE(v, self.start(batch), 0.0, 0.999, clean)

    def sample(self, net, batch: Batch, steps=None, trace=None) -> torch.Tensor:
        return ode_int.solve(self.velocity(net, batch), "euler", steps or 50, trace=trace)


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
    assert sampled["nfe"] == 51  # 50 Euler steps and the clean estimate: no trace is paid for
    assert (tmp_path / "run/samples/step_000002.png").exists() and (tmp_path / "run/samples/trace_000002.png").exists()

    model, low = open_model(tmp_path / "run"), 2 * torch.rand(3, 3, 8, 8) - 1
    made = model.restore(low, seed=4)
    assert model.rows == 3 * 51
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
    x, rows = torch.empty(400, 1), [[(0.6, (0, "a", i)), (0.8, (1, "b", i))] for i in range(400)]
    noise, again = NoisePerImage(rows, "cpu"), NoisePerImage(rows[::-1], "cpu")
    uniform, whole = noise.rand(x, 50), noise.randint(-2, 3, x, 50)
    assert torch.equal(again.rand(x, 50).flip(0), uniform) and torch.equal(again.randint(-2, 3, x, 50).flip(0), whole)
    assert uniform.dtype == torch.float32 and whole.dtype == torch.int64
    assert 0 <= uniform.min() < 1e-3 and 1 - 1e-3 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.std() - 12**-0.5) < 0.01
    assert [(whole == k).float().mean().item() for k in range(-2, 3)] == pytest.approx([0.2] * 5, abs=0.015)
    seeds = {}
    for seed in range(20):
        one, other = (NoisePerImage([[(1.0, (seed, name, 0))]], "cpu").one(0, 1000) for name in "ab")
        assert one == other  # it is the batch's, whatever its images are
        seeds[seed] = one
    assert len(set(seeds.values())) > 10


def test_a_batch_is_not_written_to():
    with pytest.raises(FrozenInstanceError):
        Damage()("sr", torch.zeros(2, 3, 8, 8)).zlo = 0


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
