"""JPEG's loss, as batched tensor operations: what libjpeg makes of an image, to within ties in its rounding.

As in images/corruptions.py, `levels` is a float tensor of values 0 to 255.
"""
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from images import SettingsError

# ITU-T T.81, tables K.1 and K.2: quantisation steps of brightness and colour at quality 50
LUMA = """16 11 10 16  24  40  51  61    12 12 14 19  26  58  60  55    14 13 16 24  40  57  69  56
          14 17 22 29  51  87  80  62    18 22 37 56  68 109 103  77    24 35 55 64  81 104 113  92
          49 64 78 87 103 121 120 101    72 92 95 98 112 100 103  99"""
CHROMA = "17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66" + " 99" * 38


@cache  # one copy a device: copying from the host at each batch would make the device wait
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The orthonormal DCT (8, 8), a row a frequency; and by quality the steps of brightness and colour, (101, 8, 8)."""
    k = torch.arange(8, dtype=torch.float64, device=device)
    dct = 0.5 * torch.cos((2 * k + 1) * k[:, None] * math.pi / 16)
    dct[0] /= math.sqrt(2)
    percent = [5000 // max(quality, 1) if quality < 50 else 200 - 2 * quality for quality in range(101)]
    percent = torch.tensor(percent, device=device)[:, None, None]
    steps = (torch.tensor([int(q) for q in table.split()], device=device).view(8, 8) for table in (LUMA, CHROMA))
    return dct.float(), *(((percent * step + 50) // 100).clamp(1, 255).float() for step in steps)


def _last(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix for a matrix of 8 rows, exact in float32, where a matmul may run in TF32 or bfloat16."""
    return sum(x[..., k, None] * matrix[k] for k in range(8))


def _code(plane: Tensor, dct: Tensor, step: Tensor) -> Tensor:
    """A plane (B, 1, H, W) of levels through 8x8 DCT, rounding to multiples of `step` (8, 8) or (B, 8, 8), and back."""
    step, (height, width) = step.view(-1, 1, 1, 1, 8, 8), plane.shape[2:]
    x = F.pad(plane - 128, (0, -width % 8, 0, -height % 8), mode="replicate")
    x = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # (B, 1, H/8, W/8, 8, 8)
    x = _last(_last(x, dct.mT).mT, dct.mT).mT
    eighths = (8 * x.abs()).round()  # libjpeg's DCT has this precision; it rounds halves of a step away from zero
    x = x.sign() * ((eighths + 4 * step) / (8 * step)).floor() * step
    x = _last(_last(x, dct).mT, dct).mT
    return nearest_level(x.transpose(3, 4).flatten(4, 5).flatten(2, 3) + 128)[..., :height, :width]


def _colour(plane: Tensor, dct: Tensor, step: Tensor, halved: Tensor | None) -> Tensor:
    """Cb or Cr (B, 1, H, W), coded -> offsets from 128, of the same shape. For `halved` see `jpeg`."""
    height, width = plane.shape[2:]
    plane = nearest_level(plane - 1e-3)  # halves downwards, here only
    # libjpeg repeats the last column until the halved rows fill their blocks, but the last row only until it has a
    # partner: `_code` repeats the halved row
    x = F.pad(plane, (0, -width % 16, 0, height % 2), mode="replicate")
    # libjpeg rounds by adding a fraction and taking the floor. Two fractions take turns along a row: 1/4 and 1/2 where
    # it halves, 1/2 and 7/16 where it doubles.
    odd = torch.arange(x.shape[3], device=x.device) % 2
    x = (F.avg_pool2d(x, 2) + 1 / 4 + odd[: x.shape[3] // 2] / 4).floor()
    x = _code(x, dct, step)[..., : (width + 1) // 2]  # what fills the blocks does not reach the picture again
    x = F.interpolate(x, scale_factor=2, mode="bilinear")
    x = (x + 1 / 2 - odd[: x.shape[3]] / 16).floor()[..., :height, :width]
    return (x if halved is None else torch.where(halved, x, _code(plane, dct, step))) - 128


def jpeg(levels: Tensor, quality: int | Tensor, halved: Tensor | None = None) -> Tensor:
    """Levels (B, 1 or 3, H, W) -> the levels after a JPEG file of that quality, one for all images or (B,).

    Colour is halved (4:2:0) in images where `halved` (B, 1, 1, 1) is True, or in all of them; else it is not (4:4:4).
    Of what PIL (libjpeg) reads back from its own file, 1 to 6% differs, by at most 35 levels: ties in rounding.
    """
    # not I2SB's own JPEG, which takes every second colour value and does not clip: users' files are libjpeg's
    dct, luma, chroma = tables(levels.device)
    luma, chroma = luma[quality], chroma[quality]
    if levels.shape[1] == 1:
        return _code(levels, dct, luma)
    if levels.shape[1] != 3:
        raise SettingsError(f"task = 'jpeg': needs images of 1 or 3 channels, not {levels.shape[1]}")
    r, g, b = levels.split(1, 1)
    y = _code(nearest_level(0.299 * r + 0.587 * g + 0.114 * b), dct, luma)
    cb = _colour(-0.168736 * r - 0.331264 * g + 0.5 * b + 128, dct, chroma, halved)
    cr = _colour(0.5 * r - 0.418688 * g - 0.081312 * b + 128, dct, chroma, halved)
    return nearest_level(torch.cat((y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb), 1))


def nearest_level(x: Tensor) -> Tensor:
    """The nearest of the levels 0..255, halves upwards as in PIL and libjpeg."""
    return (x + 0.5 + 1e-4).floor().clamp(0, 255)  # float32 may miss a half by 1e-5
