"""Model: a trained run that restores and makes images."""
import math
from collections import defaultdict
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Literal, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ode_int
from images import SettingsError
from images.corruptions import from_damaged, has_holes, task_names, to_full_size
from images.files import alpha, flatten, mask_of, to_image, to_tensor
from images.pictures import deviation, to_float, to_uint8
from support.bounds import Count, Positive, between, fits, shown, words
from support.checkpoints import Run
from support.disk import free_memory
from support.machine import autocast, pick_device, set_up
from support.model import ZeroNet, load_network, run_sampler
from support.noise import NoisePerImage
from support.sampler_settings import check_guidance, sampling_config, with_method
from unet import Counted, Guided, Tiled, windows

# of memory: 180 to 260 a pixel of the result were measured, and twice as many by dopri5 or with a trace
BYTES_A_PIXEL = 260
BYTES_A_CHANNEL = 65  # of the network's first level and pixel, where the image passes in one piece
LONGEST = 1000  # times as long as wide
TILE = 256  # pixels
SMALL_SIDE = 16  # pixels: below it fp32 is no slower, and bf16 has been seen to give infinities

Solver = Literal["auto", "dopri5", "euler", "midpoint", "heun", "rk4"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]


def batched(items: list, size: int) -> list[list]:
    """The items in lists of at most `size`."""
    return [items[i:i + size] for i in range(0, len(items), size)]


class Restorations(NamedTuple):
    """Several restorations of an image, which differ by their noise."""

    draws: list[Image.Image] | Tensor  # of tensors (draws, B, C, H, W)
    mean: Image.Image | Tensor  # (B, C, H, W)
    std: Tensor  # (H, W) in levels of 255, the channels' root mean square; of tensors (B, 1, H, W) in their unit


def pictures_of(levels: Tensor) -> Restorations:
    """(draws, C, H, W) uint8 -> PIL images."""
    mean, std = levels.float().mean(0).round().byte(), deviation(levels.float())[0]
    return Restorations([to_image(each) for each in levels], to_image(mean), std)


class Model:
    """A trained run, ready to sample.

    Its arguments are sample.py's flags of the same names, and settings of the run's method by its name, of those that
    sampling may change (the method's free_at_sampling): i2sb=dict(clip_denoise=True). Raises SettingsError where one
    does not fit the run.
    """

    def __init__(self, run: Run, *, ema: bool = True, solver: Solver | None = None, steps: Count | None = None,
                 tolerance: Positive | None = None, guidance: float | None = None, factor: Positive | None = None,
                 tile: Annotated[int, between(0, 10**12)] | None = None, batch_size: Count = 64, device: str = "auto",
                 precision: Precision | None = None, **method: dict):
        given = locals()
        for name, hint in get_type_hints(Model.__init__, include_extras=True).items():
            if not fits(given[name], hint):
                raise SettingsError(f"{name} = {shown(given[name])}: allowed is {words(hint)}")
        for name, settings in method.items():
            if name != run.config.method or not isinstance(settings, dict):
                raise SettingsError(f"{name} = {shown(settings)}: allowed is, beside a model's arguments, "
                                    f"{run.config.method} = a dict of the method's settings")
        c = with_method(run.config, method.get(run.config.method, {}), solver or "auto")
        self.run, self.config = run, (c := sampling_config(c, solver, steps, tolerance))
        self.classes, self.num_classes = run.classes if run.num_classes else [], run.num_classes
        self.tasks, self.batch_size = task_names(c.task), batch_size
        self.guidance = c.guidance if guidance is None else guidance
        check_guidance(run, self.guidance)
        self.factor, self.enlargement = self.choose_factor(factor)  # of the network, and of what it made in the end

        # sides are multiples of UDPM's smallest pixel, and tiles begin where blocks of pixels damaged together do
        self.align = max(2**c.chosen.levels, c.damage.block(c.task))
        if tile is None:  # what learned from parts of photographs, at their own resolution, takes larger ones too
            tile = max(c.image_size, TILE) if c.crop == "random" else c.image_size
        self.tile = tile and max(-(-tile // self.align), 2) * self.align

        self.device = pick_device(device)
        self.precision = set_up(self.device, precision or c.precision)
        self.net = load_network(run, ema).to(self.device)
        self.images = self.rows = 0  # made so far, and what they took of the network
        self.passes = 1  # rows of the network that an image takes in each evaluation: its tiles, guided twice as many

    def choose_factor(self, factor: float | None) -> tuple[int, float]:
        """-> how many times larger the network makes an image, and what it becomes then. Raises SettingsError."""
        known = self.config.damage.factors(self.config.task, self.run.pair_factor)
        if factor is None:
            if len(known) > 1 and known[0] > 1:  # a mixture defaults to the same size; --factor enlarges
                raise SettingsError(f"factor = None: the run knows {', '.join(map(str, known))}; name one")
            return known[0], known[0]
        if factor not in known and not 1 < factor < known[-1]:
            least = "1 or more" if known[0] == 1 else "more than 1"
            allowed = f"{least}, up to {known[-1]}" if known[-1] > 1 else "1"
            raise SettingsError(f"factor = {factor:g}: allowed is {allowed}")
        return min(each for each in known if each >= factor), factor

    def enlarged(self, made: Tensor) -> Tensor:
        """Images (B, C, H, W) on the network's grid -> as large as they are wanted; antialiased bicubic."""
        if self.enlargement == self.factor:
            return made
        sides = [max(1, round(side // self.factor * self.enlargement)) for side in made.shape[2:]]
        return F.interpolate(made, sides, mode="bicubic", antialias=True).clamp(-1, 1)

    @cached_property
    def evaluations(self) -> float:
        """Network evaluations of a sample, for a bar of progress; dopri5, which chooses its own steps, has inf."""
        c = self.config
        if c.sampler == "dopri5":
            return math.inf
        (zlo, hole), counted = self.nothing(1), Counted(ZeroNet(c))
        run_sampler(c, counted, from_damaged(c.task, zlo, None, c.condition, hole if has_holes(c.task) else None))
        return counted.rows

    def label_number(self, label: str | int) -> int:
        """A class's name, or its number. Raises SettingsError."""
        if not self.classes:
            raise SettingsError(f"label = {label!r}: the run was trained without labels")
        if label in self.classes:
            return self.classes.index(label)
        if str(label).isdecimal() and int(label) < len(self.classes):
            return int(label)
        names = ", ".join(" ".join(name.split()) for name in self.classes)
        raise SettingsError(f"label = {label!r}: allowed is all, or from {names}, 0 to {len(self.classes) - 1}")

    def label_numbers(self, text: str | None) -> list[int | None]:
        """"all", or names and numbers joined by commas -> numbers; None -> [None], no label. Raises SettingsError."""
        if text is None:
            return [None]
        if text == "all" and self.classes:
            return list(range(len(self.classes)))
        if text in self.classes:  # it may hold a comma
            return [self.label_number(text)]
        return list(dict.fromkeys(self.label_number(name.strip()) for name in text.split(",")))

    def at_a_time(self, height: int, width: int) -> int:
        """How many damaged images of these sides make a batch."""
        return max(1, self.batch_size * self.config.image_size**2 // (self.factor**2 * height * width))

    def restore(self, image: Image.Image | list | Tensor, *, mask: Image.Image | Tensor | None = None,
                label: str | int | None = None, seed: int = 0, draws: int | None = None):
        """A damaged PIL image -> a restored one, or a list of them -> a list; or float tensors (B, C, h, w) ->
        (B, C, H, W), in [-1, 1]. Images of one size are restored in batches.

        mask, for inpainting: white (1 in a tensor) is filled in; without it, what is transparent in the image.
        draws: how many restorations of each image; it then returns Restorations, of a list of images a list.
        The same seed gives the same picture. Raises SettingsError, and SolverError for an output that is not finite.
        """
        if self.tasks == ["generate"]:
            raise SettingsError("the run makes images from noise: use generate")
        if not fits(draws, Count | None):
            raise SettingsError(f"draws = {shown(draws)}: allowed is {words(Count)}, or None for one picture")
        if torch.is_tensor(image):
            self.check_tensor(image, mask)
            holes = [None] * len(image) if mask is None else list(mask)
            made = self.restore_each(list(image), holes, range(len(image)), label, seed, draws or 1)
            made = torch.stack(made, 1).clamp(-1, 1)
            return made[0] if draws is None else Restorations(made, made.mean(0), deviation(made))
        images = image if isinstance(image, list) else [image]
        for each in images:
            if not isinstance(each, Image.Image):
                raise SettingsError(f"image is a {type(each).__name__}: allowed is a PIL image, a list of them, or a "
                                    "tensor")
        holes = [None] * len(images)
        if "inpaint" in self.tasks:
            holes = [to_tensor(alpha(each)) < 255 if mask is None else mask_of(mask) for each in images]
        damaged = [to_float(to_tensor(flatten(each, self.config.channels))) for each in images]
        made = self.restore_each(damaged, holes, [0] * len(images), label, seed, draws or 1)
        restored = [pictures_of(to_uint8(each)) for each in made]
        if draws is None:
            restored = [each.draws[0] for each in restored]
        return restored if isinstance(image, list) else restored[0]

    def restore_each(self, damaged: list[Tensor], holes: list, rows, label, seed: int, draws: int) -> list[Tensor]:
        """Images (C, h, w) and holes (1, h, w) or None -> of each image (draws, C, H, W). `rows` number their noise."""
        alike = defaultdict(list)  # (image, draw) of those that can make a batch
        for i, (zlo, hole) in enumerate(zip(damaged, holes)):
            if hole is not None and hole.shape[1:] != zlo.shape[1:]:
                sides = tuple(hole.shape[1:]), tuple(zlo.shape[1:])
                raise SettingsError(f"mask: its sides, {sides[0]}, are not the image's, {sides[1]}")
            alike[zlo.shape, hole is None].extend((i, draw) for draw in range(draws))
        label = None if label is None else self.label_number(label)
        made = [[None] * draws for _ in damaged]
        for ((_, height, width), whole), jobs in alike.items():
            for some in batched(jobs, self.at_a_time(height, width)):
                zlo = self.full_size(torch.stack([damaged[i] for i, _ in some]))
                hole = None if whole else torch.stack([holes[i] for i, _ in some])
                noise = [[(1.0, (seed, "", rows[i], draw) if draw else (seed, "", rows[i]))] for i, draw in some]
                samples = self.enlarged(self.sample(zlo, hole, [label] * len(some), noise))
                for (i, draw), sample in zip(some, samples):
                    made[i][draw] = sample
        return [torch.stack(each) for each in made]

    def check_tensor(self, zlo, mask):
        """Raises SettingsError, one line, for what `restore` can't take as tensors."""
        shape, channels = [*zlo.shape], self.config.channels
        if len(shape) != 4 or shape[1] != channels or 0 in shape:
            raise SettingsError(f"image: its shape is {shape}: allowed is (B, {channels}, height, width)")
        if not zlo.is_floating_point():
            raise SettingsError(f"image: its type is {zlo.dtype}: allowed are floating-point numbers in [-1, 1]")
        if not zlo.abs().max() <= 1:  # NaN too
            raise SettingsError(f"image: its values are from {zlo.min():.4g} to {zlo.max():.4g}: allowed is [-1, 1]")
        if mask is not None and not (torch.is_tensor(mask) and mask.ndim == 4 and mask.shape[:2] == (len(zlo), 1)):
            raise SettingsError(f"mask: beside a tensor allowed is a tensor ({len(zlo)}, 1, height, width)")

    def generate(self, count: int = 1, *, label: str | int | None = None, seed: int = 0) -> list[Image.Image]:
        """`count` new images, of a class or of none. Raises SettingsError."""
        if "generate" not in self.tasks:
            raise SettingsError(f"the run restores damaged images (task {self.config.task}): use restore")
        number, made = None if label is None else self.label_number(label), []
        for some in batched([[(1.0, (seed, "", i))] for i in range(count)], self.batch_size):
            made += self.sample(*self.nothing(len(some)), [number] * len(some), some)
        return [to_image(to_uint8(image)) for image in made]

    def nothing(self, count: int) -> tuple[Tensor, Tensor]:
        """What `sample` takes to make images from noise: zlo, hole."""
        side = self.config.image_size
        return torch.zeros(count, self.config.channels, side, side), torch.ones(count, 1, side, side)

    def full_size(self, zlo: Tensor) -> Tensor:
        """Damaged images as they come in files -> on z1's grid."""
        up = self.config.damage.up if "sr" in self.tasks else "bicubic"  # as pairs of two sizes are trained on
        return to_full_size(zlo, self.factor, up) if self.factor > 1 else zlo

    def check_size(self, height: int, width: int, name: str, traced: bool):
        """Raises SettingsError for a picture that this machine can't restore, before anything is computed."""
        if max(height, width) > LONGEST * min(height, width):
            raise SettingsError(f"{name}: its sides are {width}x{height}: allowed is up to {LONGEST:,} times as long "
                                "as wide; crop it")
        each = BYTES_A_PIXEL * (2 if traced or self.config.sampler == "dopri5" else 1)
        if not self.tile:
            each += BYTES_A_CHANNEL * self.config.unet_channels
        need, free = each * self.factor**2 * height * width, free_memory()
        if self.device.type == "cpu" and free is not None and need > 3 / 4 * free:
            raise SettingsError(
                f"{name}: its {height * width / 1e6:.3g} million pixels ({width}x{height}) would take about "
                f"{need / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free; crop or downscale it")

    @torch.no_grad()
    def sample(self, zlo: Tensor, hole: Tensor | None, labels: list[int | None], noise: list,
               trace: list | None = None) -> Tensor:
        """-> images (B, C, H, W) float on the CPU.

        zlo      (B, C, H, W) on z1's grid, any sides
        hole     (B, 1, H, W) 1 where zlo knows nothing, or None
        labels   B numbers, None: no label
        noise    B rows of NoisePerImage
        trace    receives (t, state, clean estimate) at each step, padded to multiples of `align`
        """
        c, net, (height, width) = self.config, self.net, zlo.shape[2:]

        def padded(x):
            margin = (0, -width % self.align, 0, -height % self.align)
            return F.pad(x.float().to(self.device), margin, mode="replicate")

        zlo, hole = padded(zlo), None if hole is None else padded(hole)
        y = None
        if self.num_classes:
            y = torch.tensor([self.num_classes if label is None else label for label in labels], device=self.device)
        batch = replace(from_damaged(c.task, zlo, y, c.condition, hole), draws=NoisePerImage(noise, self.device))
        guidance = self.guidance if any(label is not None for label in labels) else 1
        self.passes = 1 if guidance in (0, 1) else 2
        if 0 < 2 * self.tile < max(height, width):
            net = Tiled(net, zlo.shape[2], self.tile, self.align, self.batch_size)
            self.passes *= math.prod(len(windows(side, self.tile, self.align, self.device)) for side in zlo.shape[2:])
        counted = Counted(net)
        precision = self.precision if min(zlo.shape[2:]) >= SMALL_SIDE else "fp32"
        with autocast(self.device, precision):
            made = run_sampler(c, Guided(counted, guidance), batch, trace)
        if not made.isfinite().all():  # a method's own sampler does not look
            raise ode_int.SolverError(ode_int.NOT_FINITE)
        self.images, self.rows = self.images + len(made), self.rows + counted.rows
        return made[:, :, :height, :width].float().cpu()
