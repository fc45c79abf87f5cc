"""Regression is least squares, in one evaluation of the network."""
from dataclasses import replace

import pytest
import torch

from images.corruptions import Damage
from measured import SMALL, one_batch
from methods.regression import Regression
from trainer import Config


def test_regression_is_least_squares():
    batch = one_batch(Config(**SMALL), 0)
    method = Regression()

    def oracle(x, t, y, cond):
        return batch.z1 - batch.zlo

    def off(x, t, y, cond):
        return batch.z1 - batch.zlo + 0.5

    assert method.loss(oracle, batch).abs().max() < 1e-10
    assert torch.allclose(method.sample(oracle, replace(batch, z1=None)), batch.z1)
    assert torch.allclose(method.loss(off, batch), torch.full((3,), 0.25))
    assert torch.allclose(Regression(error="log").loss(off, batch), torch.full((3,), 0.25001).log())
    with pytest.raises(ValueError, match="allowed is 1"):
        method.sample(oracle, batch, steps=2)
    hole = Damage()("inpaint", batch.z1)
    wrong = replace(hole, zlo=hole.zlo + 1 - hole.unknown)  # outside the hole, of which no loss is asked
    loss = method.loss(lambda x, t, y, cond: hole.z1 - x + 0.5 * hole.unknown, wrong)
    assert torch.allclose(loss, torch.full((3,), 0.25))
    sample = method.sample(lambda x, t, y, cond: torch.ones_like(x), hole)
    assert torch.equal(sample * (1 - hole.unknown), hole.zlo)
    assert torch.equal(sample * hole.unknown, hole.unknown.expand_as(sample))
