"""Clean images -> Batch: the restoration tasks, as batched tensor operations on the images' device.

Every damaged pixel takes one of the 256 levels that a PNG or JPEG file can hold, so a network meets the same values
whether the damage is made here or arrives in a user's file. Resizing follows PIL, its rounding included, and JPEG
libjpeg to within ties (tests/test_corruptions.py compares). Inside this file `levels` is a float tensor of values 0 to
255. A new task is an entry of TASKS, a branch of Damage._apply, and its knobs among Damage's fields.
"""
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from images import SettingsError
from images.chain import chain, choose
from images.jpeg import jpeg, nearest_level
from support import bounds
from support.bounds import above, ascending, between, length, odd, one_of


@dataclass(frozen=True)
class Task:
    """What the rest of the program knows of a task."""

    # fields of Damage that make the task what it is; of sr not `up`, which is how the small image is shown
    knobs: tuple[str, ...] = ()
    leaves_unknown: bool = False  # whether zlo knows nothing of the pixels that are to be made
    repeatable: bool = True  # whether a sample can be damaged as the truth was; not where the damage adds noise
    block: int = 1  # side of the blocks of pixels that are damaged together, where it is not the factor
    # who says how many times smaller files are than what is made of them: Damage.factor, the pairs; none: as large
    smaller_by: Literal["none", "factor", "pairs"] = "none"


TASKS = {
    "sr": Task(("factor", "down"), smaller_by="factor"),
    "inpaint": Task(("mask",), leaves_unknown=True),
    "blur": Task(("kernel", "width", "sigma")),
    "noise": Task(("std",), repeatable=False),
    "jpeg": Task(("quality",), block=16),
    "chain": Task(("chain_blur", "chain_factors", "chain_noise", "chain_quality", "chain_skips", "chain_twice",
                   "chain_untouched"), repeatable=False, block=16),
    "generate": Task(leaves_unknown=True),
    "paired": Task(repeatable=False, smaller_by="pairs"),
}


@dataclass
class Draws:
    """Random numbers for some images of a batch: those of the whole batch are drawn, and these images' kept.

    So several processes, or several pieces of a batch one after the other, train with the noise that one process in one
    piece would have had.
    """

    generator: torch.Generator | None = None  # on the images' device; None: torch's own stream
    host: torch.Generator | None = None  # on the CPU, for what the host must know; None: torch's own stream
    rows: tuple[slice | Tensor, ...] = ()  # which images these are: each selects of those that the one before has left
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
        drawn = draw((self.total or len(x), *shape), generator=self.generator, device=x.device)
        for rows in self.rows:
            drawn = drawn[rows]
        assert len(drawn) == len(x), f"noise for {len(drawn)} images is asked for {len(x)}: index the Batch, not x"
        return drawn

    def narrow(self, rows: slice | Tensor, count: int) -> "Draws":
        """Draws for the images that `rows`, a slice or an index tensor, selects of the `count` ones of these."""
        return replace(self, rows=(*self.rows, rows), total=self.total or count)


@dataclass(frozen=True)
class Batch:
    """What a method trains on and samples from, images in [-1, 1]. `cond` may be `zlo`: nothing is changed in place."""

    z1: Tensor | None  # (B, C, H, W) clean; None where only damaged images are given
    zlo: Tensor  # (B, C, H, W) damaged, on z1's grid; zero where it knows nothing
    to_make: Tensor  # (B, 1, H, W) 1 where pixels are to be made: all ones, but for inpainting the hole only
    unknown: Tensor  # (B, 1, H, W) 1 where zlo knows nothing: ones for generation, the hole for inpainting, else zeros
    cond: Tensor | None  # (B, Cc, H, W) zlo, and `unknown` where the task can have holes; None: no image is seen
    y: Tensor | None  # (B,) int64 class labels; num_classes is the null label; None where labels are off
    draws: Draws = field(default_factory=Draws)  # where all randomness of a method comes from
    # what a loss tells beside its value, by name, (B,) each: training logs the means
    notes: dict[str, Tensor] = field(default_factory=dict)

    def randn_like(self, x: Tensor) -> Tensor:
        return self.draws.randn_like(x)

    def __getitem__(self, rows) -> "Batch":
        """The images that `rows`, a slice or an index tensor, selects, with their rows of the noise."""
        tensors = {name: x[rows] for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **tensors, draws=self.draws.narrow(rows, len(self.zlo)), notes={})


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
    # blur: standard deviation of the gaussian in pixels, 10 in DDRM and I2SB; of two, each image draws one between
    sigma: Annotated[float | tuple[float, float], between(0.01, 10**6), ascending()] = 10.0
    # noise: standard deviation of the gaussian noise, in levels of 255; of two numbers, each image draws one between
    std: Annotated[float | tuple[float, float], above(0, 255), ascending()] = 15.0
    # jpeg: quality, 1 (worst) to 100; of two numbers, each image draws one between them
    quality: Annotated[int | tuple[int, int], between(1, 100), ascending()] = 10
    # chain: standard deviations of the gaussian blur along its two axes, pixels; half of the images draw one for both
    chain_blur: Annotated[tuple[float, float], between(0, 100), ascending()] = (0.0, 2.5)
    # chain: how many times smaller each side gets, one of these, by any of four filters; bicubic enlarges at the end
    chain_factors: Annotated[tuple[int, ...], between(2, 16), length(1)] = (2, 3, 4)
    # chain: standard deviation of the noise, levels of 255; half is Poisson's, as strong at mid-grey, and half is grey
    chain_noise: Annotated[tuple[float, float], between(0, 255), ascending()] = (0.0, 15.0)
    # chain: JPEG quality, between these two; half of the images have 4:4:4 colour, the others 4:2:0
    chain_quality: Annotated[tuple[int, int], between(1, 100), ascending()] = (30, 98)
    # chain: shares of the images that skip blur, reduction, noise and JPEG, in this order
    chain_skips: Annotated[tuple[float, float, float, float], between(0, 1)] = (0.4, 0.3, 0.4, 0.2)
    # chain: share of the JPEGs that were another JPEG before, whose blocks lay elsewhere
    chain_twice: Annotated[float, between(0, 1)] = 0.25
    # chain: share of the images to which nothing happens
    chain_untouched: Annotated[float, between(0, 1)] = 0.1

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

        A task may be a mixture, "sr,jpeg,blur": each image draws one of them, all equally likely.
        """
        for side in z1.shape[2:]:
            self.check(task, side)
        draws = draws or Draws()
        pick = draws.randint(0, len(task_names(task)), z1)
        each = [self._apply(name, z1, zlo, draws) for name in task_names(task)]
        zlo, to_make, unknown = (choose(x, pick) for x in zip(*each))
        return Batch(z1, zlo, to_make, unknown, _cond(task, zlo, unknown, condition), y, draws)

    def _apply(self, name: str, z1: Tensor, pair: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """One task on every image, of 1 or 3 channels -> zlo, to_make, unknown (see Batch)."""
        one = torch.ones_like(z1[:, :1])
        if name == "generate":
            return torch.zeros_like(z1), one, one
        if name == "paired":
            if pair is None or pair.shape != z1.shape:
                raise SettingsError(f"task = 'paired': needs damaged images of the shape {tuple(z1.shape)}")
            return pair, one, 0 * one
        if name == "inpaint":
            hole = center(z1) if self.mask == "center" else freeform(z1, *FREEFORM[self.mask], draws)
            return z1.masked_fill(hole > 0, 0), hole, hole
        levels = to_levels(z1)
        if name == "sr":
            small = [resize(levels, [side // factor for side in levels.shape[2:]], self.down)
                     for factor in as_tuple(self.factor)]
            each = [resize(x, levels.shape[2:], self.up) for x in small]
            levels = each[0] if len(each) == 1 else choose(each, draws.randint(0, len(each), levels))
        elif name == "blur":
            levels = blur(levels, self.weights(levels, draws))
        elif name == "noise":
            std = self.between(self.std, levels, draws)[..., None, None]
            levels = nearest_level(levels + std * draws.randn_like(levels))
        elif name == "jpeg":
            low, high = as_tuple(self.quality)[0], as_tuple(self.quality)[-1]
            levels = jpeg(levels, low if low == high else draws.randint(low, high + 1, levels))
        else:
            assert name == "chain", f"task {name!r} has no branch in Damage._apply"
            levels = chain(levels, self, draws)
        return from_levels(levels), one, 0 * one

    @property
    def width(self) -> int:
        """Side of the blur kernel in pixels."""
        return (9 if self.kernel == "uniform" else 5) if self.taps is None else self.taps

    def weights(self, x: Tensor, draws: Draws) -> Tensor:
        """(B, width) blur kernels along one axis, or (1, width); the square kernel is the outer product with itself."""
        if self.kernel == "uniform":
            return x.new_full((1, self.width), 1 / self.width)
        sigma = self.between(self.sigma, x, draws)
        bell = (-0.5 * ((torch.arange(self.width, device=x.device) - self.width // 2) / sigma) ** 2).exp()
        return bell / bell.sum(1, keepdim=True)

    def between(self, knob, x: Tensor, draws: Draws) -> Tensor:
        """(B, 1) draws between a knob's two values for the B images of x, or (1, 1) its only one."""
        low, high = as_tuple(knob)[0], as_tuple(knob)[-1]
        return x.new_full((1, 1), low) if low == high else low + (high - low) * draws.rand(x, 1)

    def block(self, task: str) -> int:
        """Side in pixels of the largest blocks that the task damages together: an image's tiles begin where they do."""
        tasks = [TASKS[name] for name in task_names(task)]
        return max(max(as_tuple(self.factor)) if each.smaller_by == "factor" else each.block for each in tasks)

    def factors(self, task: str, pair_factor: int) -> list[int]:
        """How many times smaller damaged files may be than what is made of them; `pair_factor`: of the task paired."""
        factors = dict(none=(1,), factor=as_tuple(self.factor), pairs=(pair_factor,))
        return sorted({factor for name in task_names(task) for factor in factors[TASKS[name].smaller_by]})


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
    return any(TASKS[name].leaves_unknown for name in task_names(task))


def cond_channels(task: str, channels: int, condition: bool) -> int:
    """Channels of Batch.cond for images of `channels` channels; 0 where it is None."""
    return 0 if not condition or set(task_names(task)) == {"generate"} else channels + has_holes(task)


def _cond(task: str, zlo: Tensor, unknown: Tensor, condition: bool) -> Tensor | None:
    # `unknown`, not `to_make`: of an image damaged by sr or jpeg, in a mixture with inpaint, it says nothing is missing
    if cond_channels(task, zlo.shape[1], condition) == 0:
        return None
    return torch.cat((zlo, unknown), 1) if has_holes(task) else zlo


def from_damaged(task: str, zlo: Tensor, y=None, condition=True, mask: Tensor | None = None) -> Batch:
    """Damaged images alone, zlo (B, C, H, W), of sr after `to_full_size` -> Batch without z1.

    `mask` (B, 1, H, W) is 1 where pixels are missing: inpaint needs it, a mixture with inpaint may have it.
    """
    names, one = set(task_names(task)), torch.ones_like(zlo[:, :1])
    if names == {"generate"}:
        mask = one
    if mask is None and names == {"inpaint"}:
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


FILTERS = {
    "box": dict(mode="area"),
    "nearest": dict(mode="nearest"),
    # with antialias torch uses PIL's cubic kernel: its parameter a is -1/2, and it widens with the step when shrinking
    "bicubic": dict(mode="bicubic", antialias=True),
}


def resize(levels: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    """PIL's resize: along the width, then along the height, each time to whole levels."""
    levels = nearest_level(F.interpolate(levels, (levels.shape[2], size[1]), **FILTERS[filter]))
    return nearest_level(F.interpolate(levels, size, **FILTERS[filter]))


def blur(levels: Tensor, weights: Tensor) -> Tensor:
    """Convolution with the outer product of a row of `weights` (B or 1, taps) with itself; edges mirror the image."""
    # not I2SB's own blur, which drops a tap, pads with zeros and mixes up rows: no convolution with the kernel it names
    reach, (height, width) = weights.shape[1] // 2, levels.shape[2:]
    weights = weights.T[..., None, None, None]  # (taps, B or 1, 1, 1, 1)
    x = F.pad(levels, (reach,) * 4, mode="reflect")
    # sums of shifted images: exact in float32, where a convolution on a GPU may run in TF32
    x = sum(weight * x[..., k : k + width] for k, weight in enumerate(weights))
    return nearest_level(sum(weight * x[..., k : k + height, :] for k, weight in enumerate(weights)))


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
