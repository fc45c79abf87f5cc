"""The task `chain`: damage as it happens to photographs. Each image goes through blur, reduction, noise and JPEG.

After Real-ESRGAN (arXiv:2107.10833) and BSRGAN (arXiv:2103.14006), but milder: many images skip a step, and some skip
all. Every step gives whole levels, as the file between two programs holds them. All images of a batch go through all
steps at once, and each keeps the results that were drawn for it, so the host never waits for the device. As in
images/corruptions.py, `levels` is a float tensor of values 0 to 255.
"""
import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from images.jpeg import jpeg, nearest_level


def chain(levels: Tensor, damage, draws) -> Tensor:
    """Levels (B, 1 or 3, H, W) -> the same after the chain, as the fields chain_... of `damage` say.

    damage, draws: an images.corruptions.Damage and Draws.
    """
    def share(part: float) -> Tensor:
        return draws.rand(levels, 1, 1, 1) < part

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * draws.rand(levels, 1, 1, 1)

    skip_blur, skip_reduction, skip_noise, skip_jpeg = (share(part) for part in damage.chain_skips)

    sigma = between(*damage.chain_blur)
    other_sigma = torch.where(share(0.5), sigma, between(*damage.chain_blur))
    blurred = blur(levels, sigma, other_sigma, between(0, math.pi), reach=math.ceil(4 * damage.chain_blur[1]))
    x = torch.where(skip_blur, levels, blurred)

    filters = draws.randint(0, len(FILTERS), levels)
    strength = torch.where(skip_noise, 0, between(*damage.chain_noise))
    grain, grey, poisson = draws.randn_like(levels), share(0.5), share(0.5)
    grain = torch.where(grey, grain[:, :1], grain)
    least, most = damage.chain_quality
    first, last = (draws.randint(least, most + 1, levels) for _ in range(2))
    halved = share(0.5)
    twice, shift = share(damage.chain_twice), draws.randint(0, 16, levels, 2)

    def noise_and_jpeg(x: Tensor) -> Tensor:  # at the size that the reduction gave the image
        brightness = torch.where(poisson, (x / 127.5).sqrt(), 1)  # a count's variance is its mean
        x = nearest_level(x + strength * brightness * grain[..., : x.shape[2], : x.shape[3]])
        once = torch.where(twice, shifted_jpeg(x, first, shift), x)
        return torch.where(skip_jpeg, x, jpeg(once, last, halved))

    each = [noise_and_jpeg(x)]
    for factor in damage.chain_factors:
        small = resize(x, [max(1, round(side / factor)) for side in x.shape[2:]], filters)
        each.append(resize(noise_and_jpeg(small), x.shape[2:], BICUBIC))
    reduction = draws.randint(1, len(each), levels, 1, 1, 1)
    x = choose(each, torch.where(skip_reduction, 0, reduction).flatten())
    return torch.where(share(damage.chain_untouched), levels, x)


def choose(each: Sequence[Tensor], which: Tensor) -> Tensor:
    """Several versions of a batch -> each image's version of the number `which` (B,)."""
    return torch.stack(tuple(each))[which, torch.arange(len(which), device=which.device)]


def blur(levels: Tensor, sigma: Tensor, other_sigma: Tensor, angle: Tensor, reach: int) -> Tensor:
    """Convolution with a gaussian whose axis of `sigma` pixels is turned by `angle` from the rows towards the columns.

    sigma, other_sigma and angle are (B, 1, 1, 1). By Fourier transform, where the gaussian is exp(-(s f)^2 / 2) along
    each axis, f in radians a pixel: any angle costs the same. The image is mirrored at its edges, `reach` pixels far.
    """
    height, width = levels.shape[2:]
    down, right = min(reach, height - 1), min(reach, width - 1)
    x = F.pad(levels, (right, right, down, down), mode="reflect")
    spectrum = torch.fft.rfft2(x)
    fy = 2 * math.pi * torch.fft.fftfreq(x.shape[2], device=x.device)[:, None]
    fx = 2 * math.pi * torch.fft.rfftfreq(x.shape[3], device=x.device)
    along, across = fx * angle.cos() + fy * angle.sin(), fy * angle.cos() - fx * angle.sin()
    spectrum = spectrum * (-((sigma * along) ** 2 + (other_sigma * across) ** 2) / 2).exp()
    x = torch.fft.irfft2(spectrum, s=x.shape[2:])
    return nearest_level(x[..., down : down + height, right : right + width])


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -1/2, as PIL has it."""
    x = x.abs()
    return torch.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


# PIL's filters: how far each reaches, and the weight of a pixel that is x pixels away from the middle
FILTERS = {
    "area": (0.5, lambda x: (-0.5 < x) & (x <= 0.5)),
    "bilinear": (1, lambda x: 1 - x.abs()),
    "bicubic": (2, cubic),
    "lanczos": (3, lambda x: torch.sinc(x) * torch.sinc(x / 3)),
}
BICUBIC = list(FILTERS).index("bicubic")


@cache  # one copy per size and device, as images.jpeg.tables
def resampling(before: int, after: int, device: torch.device) -> Tensor:
    """The weight of each of `before` pixels of a row in each of its `after` new ones, by filter: (4, after, before)."""
    scale = before / after
    wider = max(scale, 1)  # antialiased: where the image gets smaller, filters reach as much farther
    centre = scale * (torch.arange(after, dtype=torch.float64, device=device)[:, None] + 0.5)
    pixel = torch.arange(before, dtype=torch.float64, device=device)
    weights = []
    for reach, value in FILTERS.values():
        first, end = (centre - reach * wider + 0.5).floor(), (centre + reach * wider + 0.5).floor()
        weights.append(value((pixel - centre + 0.5) * (1 / wider)) * ((first <= pixel) & (pixel < end)))
    weights = torch.stack(weights)
    return weights / weights.sum(2, keepdim=True)


def resize(levels: Tensor, size: Sequence[int], filters: Tensor | int) -> Tensor:
    """PIL's resize of (B, C, H, W) to `size`: along the width, then along the height, each time to whole levels.

    filters: (B,) numbers each image's filter in FILTERS, or is one for all. In float64, which stays exact everywhere.
    """
    down, across = (resampling(before, after, levels.device)[filters][..., None, :, :]  # (B, 1, h, H), or (1, h, H)
                    for before, after in zip(levels.shape[2:], size))
    return nearest_level(down @ nearest_level(levels.double() @ across.mT)).float()


def shifted_jpeg(levels: Tensor, quality: Tensor, shift: Tensor) -> Tensor:
    """JPEG (4:2:0) of a larger picture that repeats the image's edges, in which it lies `shift` (B, 2), 0 to 15, pixels
    down and to the right."""
    height, width = levels.shape[2:]
    down, right = shift[:, :1], shift[:, 1:]
    rows, columns = torch.arange(height + 15, device=levels.device), torch.arange(width + 15, device=levels.device)
    larger = crop_each(levels, (rows - down).clamp(0, height - 1), (columns - right).clamp(0, width - 1))
    return crop_each(jpeg(larger, quality), rows[:height] + down, columns[:width] + right)


def crop_each(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images (B, C, H, W), and the rows (B, h) and columns (B, w) that each keeps -> (B, C, h, w)."""
    x = x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return x.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1))
