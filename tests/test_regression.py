"""Regression is least squares; test_methods.py has its sampler."""
from dataclasses import replace

import torch

from methods.regression import Regression
from networks import make_batch


def test_regression_is_least_squares():
    batch = make_batch()

    def off(x, t, y, cond):
        return batch.z1 - batch.zlo + 0.5

    assert torch.allclose(Regression().loss(off, batch), torch.full((2,), 0.25))
    assert torch.allclose(Regression(error="log").loss(off, batch), torch.full((2,), 0.25001).log())
    hole = make_batch("inpaint")
    wrong = replace(hole, zlo=hole.zlo + 1 - hole.unknown)  # outside the hole, of which no loss is asked
    loss = Regression().loss(lambda x, t, y, cond: hole.z1 - x + 0.5 * hole.unknown, wrong)
    assert torch.allclose(loss, torch.full((2,), 0.25))
