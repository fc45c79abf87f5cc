"""Regression, the baseline: one pass of the network from the damaged image to the clean one, under squared error.

Its answer tends to E[z1 | zlo], the mean over all clean images that zlo may come from. In that limit no method has a
better PSNR, but details that the damage erased come out smooth (SR3, arXiv:2104.07636, table 1, row "Regression").
"""
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from images import SettingsError
from images.corruptions import Batch
from methods import Method, keep_known, masked_mean, same_shape

LEAST = 1e-5  # squared error, 56 dB, below which its logarithm hardly rewards getting better


@dataclass(frozen=True)
class Regression(Method):
    # what is made small: each image's mean squared error, or its logarithm, as NAFNet does (arXiv:2204.04676), by which
    # a lightly damaged image counts as much as a badly damaged one
    error: Literal["squared", "log"] = "squared"

    def estimate(self, net, batch: Batch) -> Tensor:
        """(B, C, H, W): zlo and the network's correction to it. There is no time: the network sees t = 0."""
        correction = net(batch.zlo, batch.zlo.new_zeros(len(batch.zlo)), batch.y, batch.cond)
        return keep_known(batch.zlo + same_shape(correction, batch.zlo), batch)

    def loss(self, net, batch: Batch) -> Tensor:
        """(B,) squared error over the pixels to be made, or its logarithm."""
        squared = masked_mean((self.estimate(net, batch) - batch.z1).square(), batch.to_make)
        return (squared + LEAST).log() if self.error == "log" else squared

    def sample(self, net, batch: Batch, steps: int | None = None, trace: list | None = None) -> Tensor:
        """(B, C, H, W) by one network evaluation. SettingsError for another count."""
        if steps not in (None, 1):
            raise SettingsError(f"steps = {steps}: allowed is 1")
        z1 = self.estimate(net, batch)
        if trace is not None:
            trace.append((0.0, batch.zlo, z1))
        return z1
