"""The noise of samples: a random stream for each image, and what is made of two of them."""
import copy
import itertools
import math

import torch
from torch import Tensor

from images import SettingsError
from images.corruptions import Draws
from support.machine import hashed


class NoisePerImage(Draws):
    """Noise whose rows come from random streams of their own, so that no image depends on its batch.

    rows[i] lists (weight, key of a stream), the key a tuple that begins with the seed: the noise of image i is the
    weighted sum of its streams' noises. A weight may be a function of the draw's number, from 0. Uniform and whole
    numbers come from such a noise too, so they go from one seed's to another's like it.
    """

    def __init__(self, rows: list[list[tuple]], device):
        def stream(key, device=device):
            return torch.Generator(device).manual_seed(hashed(key))

        self.images = [(itertools.count(), [(weight, stream(key)) for weight, key in row]) for row in rows]
        first_key = rows[0][0][1]
        self.host = stream(first_key[:1], "cpu")  # what is one for all images knows of none of them

    def randn_like(self, x: Tensor) -> Tensor:
        def noise(numbers, streams):
            number = next(numbers)  # of this draw among the image's
            weights = [weight(number) if callable(weight) else weight for weight, _ in streams]
            drawn = [torch.randn(x.shape[1:], generator=generator, device=x.device, dtype=x.dtype)
                     for _, generator in streams]
            return sum(weight * each for weight, each in zip(weights, drawn))

        assert len(x) == len(self.images), f"noise for {len(self.images)} images is asked for {len(x)}: index the Batch"
        return torch.stack([noise(*image) for image in self.images])

    def rand(self, x: Tensor, *shape: int) -> Tensor:
        return self.uniform(x, shape).float().clamp(max=1 - 2**-24)  # below 1 in float32 too

    def randint(self, low: int, high: int, x: Tensor, *shape: int) -> Tensor:
        return low + (self.uniform(x, shape) * (high - low)).long().clamp(max=high - low - 1)

    def uniform(self, x: Tensor, shape: tuple) -> Tensor:
        """(B, *shape) float64 on [0, 1]: the normal distribution function of a noise."""
        return torch.special.ndtr(self.randn_like(x.new_empty(len(x), *shape, dtype=torch.float64)))

    def narrow(self, rows: slice | Tensor, count: int) -> "NoisePerImage":
        part, places = copy.copy(self), torch.arange(count)[rows.cpu() if torch.is_tensor(rows) else rows]
        part.images = [self.images[place] for place in places.tolist()]
        return part


def noise_of(o, model, name: str, i: int, n: int) -> list[tuple]:
    """A row of NoisePerImage by sample.py's Options, for the i-th of an input's n images. Raises SettingsError."""
    if o.interpolate is not None:
        angle = math.pi / 2 * i / (n - 1)  # along a circle unit noise remains unit noise
        return [(weight, (seed, name, 0)) for weight, seed in zip((math.cos(angle), math.sin(angle)), o.interpolate)]
    if o.perturb is not None:
        (level, strength), levels = o.perturb, model.config.chosen.levels
        if not 1 <= level <= levels:
            allowed = f"1 to {levels}" if levels else "one of a run of UDPM only"
            raise SettingsError(f"level = {level}: allowed is {allowed}")
        share = strength if i else 0.0  # the first image is shown as it was
        edited = levels - level  # the coarsest map is drawn first
        return [(lambda draw: math.sqrt(1 - share**2) if draw == edited else 1.0, (o.seed, name, 0)),
                (lambda draw: share if draw == edited else 0.0, (o.seed, name, "redrawn", i))]
    return [(1.0, (o.seed, name, i))]
