"""Clean images -> Batch: the restoration tasks, as batched tensor operations on the images' device.

Every damaged pixel takes one of the 256 levels that a PNG or JPEG file can hold, so a network meets the same values
whether the damage is made here or arrives in a user's file. Resizing follows PIL and JPEG follows libjpeg, their
rounding included (tests/test_corruptions.py compares). Inside this file `levels` is a float tensor of values 0 to 255.
"""
import math
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from images import SettingsError
from support import bounds
from support.bounds import ascending, between, length, odd, one_of

# name: the fields of Damage that make the task what it is. Of sr not up, by which the network sees what is left
TASKS = {
    "sr": ("factor", "down"), "inpaint": ("mask",), "blur": ("kernel", "width", "sigma"), "jpeg": ("quality",),
    "generate": (), "paired": (),
}


@dataclass
class Draws:
    """Random numbers for some images of a batch, the same however the batch is shared out.

    The numbers of the whole batch are drawn, and those of these images kept: so several processes, or several pieces of
    a batch one after the other, train with the noise that one process in one piece would have had.
    """

    generator: torch.Generator | None = None  # on the images' device; None: torch's own stream
    host: torch.Generator | None = None  # on the CPU, for what the host must know; None: torch's own stream
    rows: slice | Tensor = field(default_factory=lambda: slice(None))  # which images of the batch these are
    total: int | None = None  # how many the batch has; None: no more than these

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise of x's shape (B, ...), type and device."""
        return self.of_the_whole(partial(torch.randn, dtype=x.dtype), x, *x.shape[1:])

    def rand(self, x: Tensor, *shape: int) -> Tensor:
        """Uniform on [0, 1), (B, *shape) for the B images of x."""
        return self.of_the_whole(torch.rand, x, *shape)

    def randint(self, low: int, high: int, x: Tensor, *shape: int) -> Tensor:
        """Whole numbers from low to high - 1, (B, *shape) int64 for the B images of x."""
        return self.of_the_whole(partial(torch.randint, low, high), x, *shape)

    def one(self, low: int, high: int) -> int:
        """A whole number from low to high - 1 for the whole batch."""
        return int(torch.randint(low, high, (), generator=self.host))

    def of_the_whole(self, draw, x: Tensor, *shape: int) -> Tensor:
        """(B, *shape): the rows of these images out of what `draw` gives for the whole batch."""
        drawn = draw((self.total or len(x), *shape), generator=self.generator, device=x.device)[self.rows]
        assert len(drawn) == len(x), f"noise for {len(drawn)} images is asked for {len(x)}: index the Batch, not x"
        return drawn

    def narrow(self, rows: slice | Tensor, count: int) -> "Draws":
        """Draws for the images that `rows`, a slice or an index tensor, selects of the `count` ones of these."""
        total = self.total or count
        if isinstance(rows, slice) and isinstance(self.rows, slice):
            places = range(total)[self.rows][rows]
            return replace(self, rows=slice(places.start, places.stop, places.step), total=total)
        device = rows.device if torch.is_tensor(rows) else self.rows.device
        return replace(self, rows=torch.arange(total, device=device)[self.rows][rows], total=total)


@dataclass(frozen=True)
class Batch:
    """What a method trains on and samples from. Images are float (B, C, H, W) in [-1, 1].

    Loss and sampler share its tensors, and `cond` may be `zlo` itself: no method changes them in place.
    """

    z1: Tensor | None  # (B, C, H, W) clean; None where only damaged images are given
    zlo: Tensor  # (B, C, H, W) damaged, on z1's grid; zero where it knows nothing
    to_make: Tensor  # (B, 1, H, W) 1 where pixels are to be made: all ones, but for inpainting the hole only
    unknown: Tensor  # (B, 1, H, W) 1 where zlo knows nothing: ones for generation, the hole for inpainting, else zeros
    cond: Tensor | None  # (B, Cc, H, W) zlo, and `unknown` where the task can have holes; None: no image is seen
    y: Tensor | None  # (B,) int64 class labels; num_classes is the null label; None where labels are off
    draws: Draws = field(default_factory=Draws)  # where all randomness of a method comes from

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise of x's shape (B, ...), type and device."""
        return self.draws.randn_like(x)

    def __getitem__(self, rows) -> "Batch":
        """The images that `rows`, a slice or an index tensor, selects, with their rows of the noise."""
        tensors = {name: x[rows] for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **tensors, draws=self.draws.narrow(rows, len(self.zlo)))


@dataclass(frozen=True)
class Damage:
    """The knobs of the restoration tasks; calling it damages clean images.

    I2SB's nine corruptions (arXiv:2302.05872, section 5) are sr at factor 4 with either `down`, inpaint with each
    `mask`, blur with each `kernel`, and jpeg at quality 5 and 10.
    """

    # sr: ratio of the sides, full to low resolution: 2, 4 or 8; of several each image draws one
    factor: Annotated[int | tuple[int, ...], one_of(2, 4, 8), length(1)] = 2
    # sr: filter that makes the low-resolution image; box takes the mean of factor x factor pixels
    down: Literal["box", "bicubic"] = "box"
    # sr: filter that enlarges it again; nearest repeats each pixel
    up: Literal["nearest", "bicubic"] = "nearest"
    # inpaint: shape of the hole: the centre (half of each side), or brush strokes over 10-20% or 20-30% of the pixels
    mask: Literal["center", "freeform-10-20", "freeform-20-30"] = "center"
    # blur: shape of the kernel
    kernel: Literal["uniform", "gaussian"] = "uniform"
    # blur: side of the kernel in pixels, odd; None: 9 if uniform, 5 if gaussian, as in DDRM (arXiv:2201.11793) and I2SB
    taps: Annotated[int, between(1, 16_383), odd()] | None = None
    # blur: standard deviation of the gaussian in pixels; DDRM and I2SB take 10, nearly flat over 5 taps. Of two
    # numbers, each image draws one between them
    sigma: Annotated[float | tuple[float, float], between(0.01, 10**6), ascending()] = 10.0
    # jpeg: quality, 1 (worst) to 100; of two numbers, each image draws one between them
    quality: Annotated[int | tuple[int, int], between(1, 100), ascending()] = 10

    def __post_init__(self):
        """Raises SettingsError, one line, for a field of another type or out of its bounds."""
        bounds.check(self, "damage.")

    def check(self, task: str, side: int) -> None:
        """SettingsError, one line, if `task` is none or a knob it uses does not fit images of `side` pixels a side."""
        names = task_names(task)
        if "sr" in names and any(side % factor for factor in as_tuple(self.factor)):
            raise SettingsError(f"damage.factor = {self.factor}: allowed is what divides the side, {side}")
        if "blur" in names and self.width >= 2 * side:
            raise SettingsError(f"damage.taps = {self.width}: allowed is an odd number below twice the side, {side}")

    def __call__(self, task: str, z1: Tensor, y=None, condition=True, zlo: Tensor | None = None,
                 draws: Draws | None = None) -> Batch:
        """z1 (B, C, H, W) in [-1, 1] -> Batch. `zlo` holds the damaged images of `paired`, of z1's shape.

        A task may be a mixture, "sr,jpeg,blur": each image draws one of them, all equally likely. The draws depend
        on their streams and z1's shape only, so the same seed gives another batch the very same damage.
        """
        for side in z1.shape[2:]:
            self.check(task, side)
        draws = draws or Draws()
        pick = draws.randint(0, len(task_names(task)), z1)
        each = [self._apply(name, z1, zlo, draws) for name in task_names(task)]
        zlo, to_make, unknown = (torch.stack(x)[pick, torch.arange(len(z1), device=z1.device)] for x in zip(*each))
        return Batch(z1, zlo, to_make, unknown, _cond(task, zlo, unknown, condition), y, draws)

    def _apply(self, name: str, z1: Tensor, pair: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """One task on every image, of 1 or 3 channels -> zlo, to_make, unknown (see Batch)."""
        one = torch.ones_like(z1[:, :1])
        if name == "generate":
            return torch.zeros_like(z1), one, one
        if name == "paired":
            if pair is None or pair.shape != z1.shape:
                shape = tuple(z1.shape)
                raise SettingsError(f"task = 'paired': needs damaged images of the clean ones' shape, {shape}")
            return pair, one, 0 * one
        if name == "inpaint":
            hole = center(z1) if self.mask == "center" else freeform(z1, *FREEFORM[self.mask], draws)
            return z1.masked_fill(hole > 0, 0), hole, hole
        levels = to_levels(z1)
        if name == "sr":
            levels = self.shrink_and_enlarge(levels, draws)
        elif name == "blur":
            levels = blur(levels, self.weights(levels, draws))
        elif name == "jpeg":
            low, high = as_tuple(self.quality)[0], as_tuple(self.quality)[-1]
            levels = jpeg(levels, low if low == high else draws.randint(low, high + 1, levels))
        else:
            raise NotImplementedError(f"task {name!r} has no branch in Damage._apply")
        return from_levels(levels), one, 0 * one

    @property
    def width(self) -> int:
        """Side of the blur kernel in pixels."""
        return (9 if self.kernel == "uniform" else 5) if self.taps is None else self.taps

    def shrink_and_enlarge(self, levels: Tensor, draws: Draws) -> Tensor:
        """Task sr on levels (B, C, H, W), each image by one of the factors."""
        height, width = levels.shape[2:]
        each = []
        for factor in as_tuple(self.factor):
            small = resize(levels, (height // factor, width // factor), self.down)
            each.append(resize(small, (height, width), self.up))
        if len(each) == 1:
            return each[0]
        return torch.stack(each)[draws.randint(0, len(each), levels), torch.arange(len(levels), device=levels.device)]

    def weights(self, x: Tensor, draws: Draws) -> Tensor:
        """(B, width) blur kernels along one axis, or (1, width); the square kernel is the outer product with itself."""
        if self.kernel == "uniform":
            return x.new_full((1, self.width), 1 / self.width)
        low, high = as_tuple(self.sigma)[0], as_tuple(self.sigma)[-1]
        sigma = x.new_full((1, 1), low) if low == high else low + (high - low) * draws.rand(x, 1)
        bell = (-0.5 * ((torch.arange(self.width, device=x.device) - self.width // 2) / sigma) ** 2).exp()
        return bell / bell.sum(1, keepdim=True)


def as_tuple(value) -> tuple:
    """A knob's one value, or its several ones."""
    return value if isinstance(value, tuple) else (value,)


def task_names(task: str) -> list[str]:
    """Names in a task or mixture; SettingsError if one is unknown."""
    names = [name.strip() for name in task.split(",")]
    for name in names:
        if name not in TASKS:
            raise SettingsError(f"task = {task!r}: allowed are {', '.join(TASKS)}, or several joined by commas")
    return names


def has_holes(task: str) -> bool:
    """Whether the task can leave pixels of which zlo knows nothing."""
    return not {"inpaint", "generate"}.isdisjoint(task_names(task))


def cond_channels(task: str, channels: int, condition: bool) -> int:
    """Channels of Batch.cond for images of `channels` channels; 0 where it is None."""
    return 0 if not condition or set(task_names(task)) == {"generate"} else channels + has_holes(task)


def _cond(task: str, zlo: Tensor, unknown: Tensor, condition: bool) -> Tensor | None:
    # `unknown`, not `to_make`: of an image damaged by sr or jpeg, in a mixture with inpaint, it says nothing is missing
    if cond_channels(task, zlo.shape[1], condition) == 0:
        return None
    return torch.cat((zlo, unknown), 1) if has_holes(task) else zlo


def from_damaged(task: str, zlo: Tensor, y=None, condition=True, mask: Tensor | None = None) -> Batch:
    """Damaged images alone, zlo (B, C, H, W) -> Batch without z1.

    `mask` (B, 1, H, W) is 1 where pixels are missing: inpaint needs it, a mixture with inpaint may have it. `generate`
    takes nothing from zlo but shape and device. For sr, `to_full_size` first brings low-resolution images to z1's grid.
    """
    names, one = task_names(task), torch.ones_like(zlo[:, :1])
    if set(names) == {"generate"}:
        return Batch(None, torch.zeros_like(zlo), one, one, None, y)
    if mask is None and set(names) == {"inpaint"}:
        raise SettingsError("task = 'inpaint': needs a mask, 1 where pixels are missing")
    if mask is not None and not has_holes(task):
        raise SettingsError(f"task = {task!r}: takes no mask, it leaves no holes")
    unknown = 0 * one if mask is None else mask.to(one).expand_as(one)
    zlo = zlo.masked_fill(unknown > 0, 0)
    return Batch(None, zlo, one if mask is None else unknown, unknown, _cond(task, zlo, unknown, condition), y)


def to_full_size(lo: Tensor, factor: int, up: str) -> Tensor:
    """Low-resolution images (B, C, h, w) in [-1, 1] -> z1's grid (B, C, h * factor, w * factor), as sr has them."""
    return from_levels(resize(to_levels(lo), (lo.shape[2] * factor, lo.shape[3] * factor), up))


def to_levels(x: Tensor) -> Tensor:
    return ((x.float() + 1) * 127.5).round().clamp(0, 255)


def from_levels(levels: Tensor) -> Tensor:
    return levels / 127.5 - 1


def _level(x: Tensor) -> Tensor:
    """The nearest of the levels 0..255, halves upwards as in PIL and libjpeg."""
    return (x + 0.5 + 1e-4).floor().clamp(0, 255)  # float32 may miss a half by 1e-5


# sr ------------------------------------------------------------------------------------------------------------------

FILTERS = {
    "box": dict(mode="area"),
    "nearest": dict(mode="nearest"),
    # with antialias torch uses PIL's cubic kernel: its parameter a is -1/2, and it widens with the step when shrinking
    "bicubic": dict(mode="bicubic", antialias=True),
}


def resize(levels: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    """PIL's resize: along the width, then along the height, each time to whole levels."""
    levels = _level(F.interpolate(levels, (levels.shape[2], size[1]), **FILTERS[filter]))
    return _level(F.interpolate(levels, size, **FILTERS[filter]))


# blur ----------------------------------------------------------------------------------------------------------------


def blur(levels: Tensor, weights: Tensor) -> Tensor:
    """Convolution with the outer product of a row of `weights` (B or 1, taps) with itself; edges mirror the image."""
    # not I2SB's own blur, which drops a tap, pads with zeros and mixes up rows: no convolution with the kernel it names
    reach, (height, width) = weights.shape[1] // 2, levels.shape[2:]
    weights = weights.T[..., None, None, None]  # (taps, B or 1, 1, 1, 1)
    x = F.pad(levels, (reach,) * 4, mode="reflect")
    # sums of shifted images: exact in float32, where a convolution on a GPU may run in TF32
    x = sum(weight * x[..., k : k + width] for k, weight in enumerate(weights))
    return _level(sum(weight * x[..., k : k + height, :] for k, weight in enumerate(weights)))


# inpaint -------------------------------------------------------------------------------------------------------------

FREEFORM = {"freeform-10-20": (0.1, 0.2), "freeform-20-30": (0.2, 0.3)}  # least and largest share of the pixels


def center(z1: Tensor) -> Tensor:
    """The rectangle of half the height and half the width in the middle -> (B, 1, H, W), 1 in it."""
    height, width = z1.shape[2:]
    hole = torch.zeros_like(z1[:, :1])
    hole[:, :, height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = 1
    return hole


def freeform(z1: Tensor, least: float, most: float, draws: Draws, strokes=4, bends=6) -> Tensor:
    """Brush strokes -> (B, 1, H, W), 1 on them, over a share of the pixels uniform between `least` and `most`.

    A stroke is the set of points within some distance of a polyline, whose vertices walk at random and are folded back
    at the image's edges. That distance follows from the share: the pixels are ranked by their distance from the
    polylines, and the nearest ones are taken.
    """
    (batch, _, height, width), device = z1.shape, z1.device

    def rand(*shape):
        return draws.rand(z1, strokes, *shape)

    heading = 2 * math.pi * rand(1) + (2 * (rand(bends) - 0.5)).cumsum(-1)
    step = 0.05 + 0.2 * rand(bends)
    x = torch.cat((rand(1), step * heading.cos()), -1).cumsum(-1)  # (B, strokes, bends + 1) in image widths
    y = torch.cat((rand(1), step * heading.sin()), -1).cumsum(-1)
    x, y = width * (1 - (x % 2 - 1).abs()), height * (1 - (y % 2 - 1).abs())
    thickness, away = 0.5 + rand(), 1e6 * (rand() < 0.5)
    away[:, :2] = 0  # two strokes always, and each further one in half of the images

    py = torch.arange(height, device=device).view(1, -1, 1) + 0.5
    px = torch.arange(width, device=device).view(1, 1, -1) + 0.5
    distance = torch.full((batch, height, width), math.inf, device=device)
    for s in range(strokes):
        for k in range(bends):
            x0, y0, dx, dy = (p[:, s, k, None, None] for p in (x[..., :-1], y[..., :-1], x.diff(), y.diff()))
            along = (((px - x0) * dx + (py - y0) * dy) / (dx**2 + dy**2 + 1e-8)).clamp(0, 1)
            near = torch.hypot(px - x0 - along * dx, py - y0 - along * dy) / thickness[:, s, None, None]
            distance = torch.minimum(distance, near + away[:, s, None, None])
    rank = distance.flatten(1).argsort(1).argsort(1)
    pixels = height * width
    count = draws.randint(math.ceil(least * pixels), math.floor(most * pixels) + 1, z1, 1)
    return (rank < count).view(batch, 1, height, width).to(z1.dtype)


# jpeg ----------------------------------------------------------------------------------------------------------------

# ITU-T T.81, tables K.1 and K.2: quantisation steps of brightness and colour at quality 50
LUMA = """16 11 10 16  24  40  51  61    12 12 14 19  26  58  60  55    14 13 16 24  40  57  69  56
          14 17 22 29  51  87  80  62    18 22 37 56  68 109 103  77    24 35 55 64  81 104 113  92
          49 64 78 87 103 121 120 101    72 92 95 98 112 100 103  99"""
CHROMA = "17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66" + " 99" * 38


@cache  # one copy a device: copying from the host at each batch would make the device wait
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The orthonormal DCT (8, 8), one row a frequency, and the quantisation steps of brightness and colour, (101, 8, 8)
    by quality."""
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
    return _level(x.transpose(3, 4).flatten(4, 5).flatten(2, 3) + 128)[..., :height, :width]


def _colour(plane: Tensor, dct: Tensor, step: Tensor) -> Tensor:
    """Cb or Cr (B, 1, H, W) halved, coded and enlarged -> offsets from 128, of the same shape."""
    height, width = plane.shape[2:]
    x = _level(plane - 1e-3)  # halves downwards, here only
    # libjpeg repeats the last column until the halved rows fill their blocks, but the last row only until it has a
    # partner: `_code` repeats the halved row
    x = F.pad(x, (0, -width % 16, 0, height % 2), mode="replicate")
    # libjpeg rounds by adding a fraction and taking the floor. Two fractions take turns along a row: 1/4 and 1/2 where
    # it halves, 1/2 and 7/16 where it doubles.
    odd = torch.arange(x.shape[3], device=x.device) % 2
    x = (F.avg_pool2d(x, 2) + 1 / 4 + odd[: x.shape[3] // 2] / 4).floor()
    x = _code(x, dct, step)[..., : (width + 1) // 2]  # what fills the blocks does not reach the picture again
    x = F.interpolate(x, scale_factor=2, mode="bilinear")
    return (x + 1 / 2 - odd[: x.shape[3]] / 16).floor()[..., :height, :width] - 128


def jpeg(levels: Tensor, quality: int | Tensor) -> Tensor:
    """Levels (B, 1 or 3, H, W) -> what PIL (libjpeg) reads back from its own file. Colour is halved (4:2:0).

    quality: one for all images, or (B,).
    """
    # not I2SB's own JPEG, which takes every second colour value and does not clip: users' files are libjpeg's
    dct, luma, chroma = tables(levels.device)
    luma, chroma = luma[quality], chroma[quality]
    if levels.shape[1] == 1:
        return _code(levels, dct, luma)
    if levels.shape[1] != 3:
        raise SettingsError(f"task = 'jpeg': needs images of 1 or 3 channels, not {levels.shape[1]}")
    r, g, b = levels.split(1, 1)
    y = _code(_level(0.299 * r + 0.587 * g + 0.114 * b), dct, luma)
    cb = _colour(-0.168736 * r - 0.331264 * g + 0.5 * b + 128, dct, chroma)
    cr = _colour(0.5 * r - 0.418688 * g - 0.081312 * b + 128, dct, chroma)
    return _level(torch.cat((y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb), 1))
