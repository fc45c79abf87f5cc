"""The network of a run, its sampler, and Model: a trained run that restores and makes images."""
import copy
import itertools
import math
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import ode_int
from images import SettingsError, one_line
from images.corruptions import Batch, Draws, cond_channels, from_damaged, task_names, to_full_size
from images.files import alpha, flatten, mask_of, to_image, to_tensor
from images.pictures import grid, psnr, strip, titled, to_float, to_uint8
from support.bounds import Count, Positive, between, fits, shown, words
from support.checkpoints import Run
from support.disk import free_memory
from support.machine import autocast, hashed, pick_device, processes, set_up
from unet import Counted, Guided, Tiled, Unet

# For an interpolant: within one level of 255 of dopri5's result, at a tenth of its evaluations (benchmarks/README.md).
QUICK_SOLVER, QUICK_STEPS = "midpoint", 5
# of memory: 180 to 260 a pixel of the result were measured, and twice as many by dopri5 or with a trace
BYTES_A_PIXEL = 260
BYTES_A_CHANNEL = 65  # of the network's first level and pixel, where the image passes in one piece
COMPILE_FROM = 10_000  # steps: benchmarks/README.md has what compiling takes and saves
COMPILE_UP_TO = 64  # channels, on a CPU: there the compiler takes too long over wider networks, and gains little
EMBEDDING = "embed_class.0.weight"  # of Unet: a row per class, and the null label's
LONGEST = 1000  # times as long as wide
SMALL_SIDE = 16  # pixels: below it fp32 is no slower, and bf16 has been seen to give infinities


ARGUMENTS = dict(  # of Model
    solver=Literal["auto", "dopri5", "euler", "midpoint", "heun", "rk4"] | None, steps=Count | None,
    tolerance=Positive | None, guidance=float | None, factor=Count | None,
    tile=Annotated[int, between(0, 10**12)] | None, batch_size=Count, precision=Literal["auto", "bf16", "fp32"] | None)


# c is a trainer.Config in all of these

def make_unet(c, num_classes: int) -> Unet:
    """The network that the method and task need; in float32."""
    upscale = c.chosen.upscale
    seen = c.channels + cond_channels(c.task, c.channels, c.condition) * upscale**2
    return Unet(seen, c.channels, dim=c.unet_channels, dim_mults=c.unet_dim_mults, num_classes=num_classes,
                blocks=c.unet_blocks, dropout=c.unet_dropout, upscale=upscale, checkpointing=c.unet_checkpointing)


def make_players(c, net: nn.Module, num_classes: int) -> list:
    """[(module, its loss)] on net's device: the network, and what else the method trains."""
    players = c.chosen.players(net, c.channels, num_classes, cond_channels(c.task, c.channels, c.condition))
    return [(module.to(next(net.parameters()).device), loss) for module, loss in players]


def check_fits(c, num_classes: int, device: torch.device, copies: int):
    """Raises SettingsError where so many copies of the network's weights are more than the memory that is free."""
    try:
        with torch.device("meta"):  # where tensors have a shape, and no memory
            numbers = weights(make_unet(c, num_classes))
    except RuntimeError:  # there are more than can be counted
        numbers = math.inf
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    need = 4 * copies * numbers
    if free is not None and need > free:
        raise SettingsError(f"unet_channels = {c.unet_channels}, unet_dim_mults = {c.unet_dim_mults}: the network has "
                            f"{numbers / 1e6:,.0f} million weights, which take {need / 1e9:,.1f} GB of memory, and "
                            f"{free / 1e9:,.1f} GB are free; lower them")


def load_network(run: Run, ema: bool = True) -> Unet:
    """The run's network with its weights, ready to sample, on the CPU. Raises SettingsError."""
    check_fits(run.config, run.num_classes, torch.device("cpu"), copies=1)
    net = make_unet(run.config, run.num_classes)
    try:
        net.load_state_dict(run.network(ema))
    except RuntimeError as failure:
        reason = one_line(failure)[:100]
        raise SettingsError(f"run = {run.path!r}: its weights do not fit its settings ({reason} ...)") from None
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def compiles(c) -> bool:
    """Whether the run compiles its network; auto: long runs, of one network at one size (each further size would take
    as long to compile again)."""
    if c.compile == "auto":
        narrow = c.unet_channels <= COMPILE_UP_TO or pick_device(c.device).type == "cuda"
        return c.steps >= COMPILE_FROM and narrow and not c.chosen.levels
    return c.compile == "on"


def weights(net: nn.Module) -> int:
    """How many numbers it has to learn."""
    return sum(p.numel() for p in net.parameters())


def compile_network(net: nn.Module, rehearse):
    """torch.compile in place, tried by `rehearse()`: without a C++ compiler, say, it warns and leaves net as it was."""
    net.compile(dynamic=False)
    try:
        rehearse()
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # of whatever type the compiler raises
        net._compiled_call_impl = None
        warnings.warn(f"the network is not compiled ({one_line(failure)[:200]})")
    net.zero_grad()


def start_from(net: nn.Module, run: Run, classes: list[str]):
    """Gives `net` the run's averaged weights (or raw ones, where it holds no others) by name and shape.

    The embedding of each of net's `classes` becomes that of the run's class of the same name.

    What does not fit, as after a change of channels or classes, is named and stays as it is.
    """
    trained, own = run.weights.get("ema") or run.weights["raw"], net.state_dict()
    trained = dict(trained)
    if EMBEDDING in trained and EMBEDDING in own:
        before, now = trained[EMBEDDING], own[EMBEDDING].clone()
        if before.shape[1] == now.shape[1]:
            now[-1] = before[-1]  # the null label
            for number, name in enumerate(classes):
                if name in run.classes:
                    now[number] = before[run.classes.index(name)]
            trained[EMBEDDING] = now
    fitting = {name: weight for name, weight in trained.items() if name in own and own[name].shape == weight.shape}
    net.load_state_dict(own | fitting)
    fresh = sorted(own.keys() - fitting.keys())
    if EMBEDDING in own:
        fresh += [f"class {name}" for name in classes if name not in run.classes]
    left = f"; fresh are {', '.join(fresh[:8])}" + (f" and {len(fresh) - 8} more" if len(fresh) > 8 else "")
    if processes()[0] == 0:
        print(f"{len(fitting)} of {len(own)} tensors are those of {run.path}{left if fresh else ''}")


def zero_net(c):
    """In place of a network: it always says 0. Shows what a sampler asks of one, and whether it takes its settings."""
    scale = c.chosen.upscale
    return lambda x, *_: x.new_zeros(len(x), x.shape[1], x.shape[2] * scale, x.shape[3] * scale)


def run_sampler(c, net, batch: Batch, trace: list | None = None) -> Tensor:
    """Samples (B, C, H, W) by the sampler that the settings name.

    `trace`, a list if given, receives (t, state, clean estimate) at each step.
    """
    if c.sampler == "own":
        return c.chosen.sample(net, batch, c.sample_steps, trace)
    ode = c.chosen.velocity(net, batch)
    return ode_int.solve(ode, c.sampler, c.sample_steps, c.integration_atol, c.integration_rtol, trace)


class StartShown(Exception):
    """Ends a sampler that was asked for nothing but its start."""


class Start(list):
    """A trace of the first state alone."""

    def append(self, frame):
        super().append(frame)
        raise StartShown


def start_states(c, net, batch: Batch) -> Tensor:
    """The states (B, C, H, W) that run_sampler would start from next, as a trace shows them. Uses no noise up."""
    trace, device = Start(), batch.zlo.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), suppress(StartShown):
        run_sampler(c, net, batch, trace)
    return trace[0][1]


def sample_for_pictures(c, net, batch: Batch) -> tuple[dict, dict]:
    """Samples of a network -> numbers (NFE, seconds, decibels) and pictures (H, W, 3) uint8, by name."""
    z0, trace = start_states(c, Guided(net, c.guidance), batch), []
    counted, began = Counted(net), time.perf_counter()
    guided = Guided(counted, c.guidance)
    sample = run_sampler(c, guided, batch)
    numbers = dict(nfe=counted.rows / len(sample), seconds=time.perf_counter() - began)
    run_sampler(c, guided, batch[:4], trace)
    columns = {"start": z0, "samples": sample, "truth": batch.z1}
    if not c.generates:
        numbers |= dict(psnr=psnr(sample, batch.z1), psnr_zlo=psnr(batch.zlo, batch.z1))
        columns = {"low resolution" if task_names(c.task) == ["sr"] else "damaged": batch.zlo} | columns
    grids = titled(list(columns), [grid(images) for images in columns.values()])
    return numbers, dict(step=grids, trace=strip(trace))


def batched(items: list, size: int) -> list[list]:
    """The items in lists of at most `size`."""
    return [items[i:i + size] for i in range(0, len(items), size)]


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


class Model:
    """A trained run, ready to sample.

    ema          the averaged weights, or the raw ones
    solver, steps, tolerance, guidance, precision
                 None takes the run's own, but for an interpolant: its dopri5 becomes midpoint in 5 steps
    factor       how many times larger a restored image becomes: one that the run was trained on; a mixture also has 1,
                 for what is of full size already. None: the run's own, of a mixture 1
    tile         side in pixels of the overlapping tiles in which an image with a side of more than two tiles passes the
                 network; None: the side trained on, 0: one piece always
    batch_size   images at a time; those larger than trained on count as several

    Raises SettingsError where an argument does not fit the run.
    """

    def __init__(self, run: Run, *, ema: bool = True, solver: str | None = None, steps: int | None = None,
                 tolerance: float | None = None, guidance: float | None = None, factor: int | None = None,
                 tile: int | None = None, batch_size: int = 64, device: str = "auto", precision: str | None = None):
        given = dict(solver=solver, steps=steps, tolerance=tolerance, guidance=guidance, factor=factor, tile=tile,
                     batch_size=batch_size, precision=precision)
        for name, value in given.items():
            if not fits(value, ARGUMENTS[name]):
                raise SettingsError(f"{name} = {shown(value)}: allowed is {words(ARGUMENTS[name])}")
        self.run, self.config = run, (c := sampling_config(run.config, solver, steps, tolerance))
        self.classes, self.num_classes = run.classes if run.num_classes else [], run.num_classes
        self.tasks, self.batch_size = task_names(c.task), batch_size
        self.guidance = c.guidance if guidance is None else guidance
        check_guidance(run, self.guidance)
        self.factor = self.choose_factor(factor)

        # sides are multiples of UDPM's smallest pixel, and tiles begin where blocks of pixels damaged together do
        self.align = max(2**c.chosen.levels, c.damage.block(c.task))
        tile = c.image_size if tile is None else tile
        self.tile = tile and max(-(-tile // self.align), 2) * self.align

        self.device = pick_device(device)
        self.precision = set_up(self.device, precision or c.precision)
        self.net = load_network(run, ema).to(self.device)
        self.images = self.rows = 0  # made so far, and what they took of the network

    def choose_factor(self, factor: int | None) -> int:
        """How many times larger a restored image becomes. Raises SettingsError."""
        allowed = self.config.damage.factors(self.config.task, self.run.pair_factor)
        if factor is None:
            factor = allowed[0]  # a mixture defaults to the same size; --factor enlarges
            if len(allowed) > 1 and factor > 1:
                raise SettingsError(f"factor = None: the run knows {', '.join(map(str, allowed))}; name one")
        if factor not in allowed:
            raise SettingsError(f"factor = {factor}: allowed is {', '.join(map(str, allowed))}")
        return factor

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

    def at_a_time(self, height: int, width: int) -> int:
        """How many images of these sides make a batch."""
        return max(1, self.batch_size * self.config.image_size**2 // (height * width))

    def restore(self, image: Image.Image | list | Tensor, *, mask: Image.Image | Tensor | None = None,
                label: str | int | None = None, seed: int = 0) -> Image.Image | list | Tensor:
        """A damaged PIL image -> a restored one, or a list of them; or float tensors (B, C, h, w) -> (B, C, H, W), in
        [-1, 1].

        mask, for inpainting: white (1 in a tensor) is filled in; without it, what is transparent in the image.
        The same seed gives the same picture. Raises SettingsError, and SolverError for an output that is not finite.
        """
        if self.tasks == ["generate"]:
            raise SettingsError("the run makes images from noise: use generate")
        if isinstance(image, list):
            return [self.restore(each, mask=mask, label=label, seed=seed) for each in image]
        zlo, hole = image, mask
        if not isinstance(image, Image.Image):
            self.check_tensor(image, mask)
        else:
            zlo = to_float(to_tensor(flatten(image, self.config.channels)))[None]
            if "inpaint" in self.tasks:
                hole = to_tensor(alpha(image)) < 255 if mask is None else mask_of(mask)
                hole = hole[None]
        if hole is not None and hole.shape[2:] != zlo.shape[2:]:
            sides = tuple(hole.shape[2:]), tuple(zlo.shape[2:])
            raise SettingsError(f"mask: its sides, {sides[0]}, are not the image's, {sides[1]}")
        labels = [None if label is None else self.label_number(label)] * len(zlo)
        made = self.sample(self.full_size(zlo), hole, labels, [[(1.0, (seed, "", i))] for i in range(len(zlo))])
        return to_image(to_uint8(made[0])) if isinstance(image, Image.Image) else made.clamp(-1, 1)

    def check_tensor(self, zlo, mask):
        """Raises SettingsError, one line, for what `restore` can't take as tensors."""
        if not torch.is_tensor(zlo):
            raise SettingsError(f"image is a {type(zlo).__name__}: allowed is a PIL image, a list of them, or a tensor")
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

    def check_size(self, height: int, width: int, name: str = "image", traced: bool = False):
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
        if 0 < 2 * self.tile < max(height, width):
            net = Tiled(net, zlo.shape[2], self.tile, self.align, self.batch_size)
        counted = Counted(net)
        guidance = self.guidance if any(label is not None for label in labels) else 1
        precision = self.precision if min(zlo.shape[2:]) >= SMALL_SIDE else "fp32"
        with autocast(self.device, precision):
            made = run_sampler(c, Guided(counted, guidance), batch, trace)
        if not made.isfinite().all():  # a method's own sampler does not look
            raise ode_int.SolverError(ode_int.NOT_FINITE)
        self.images, self.rows = self.images + len(made), self.rows + counted.rows
        return made[:, :, :height, :width].float().cpu()


def check_guidance(run: Run, guidance: float):
    """Guidance starts from what the network says without a label. Raises SettingsError where that was not trained."""
    if guidance != 1 and run.num_classes and not run.config.trains_null_label:
        raise SettingsError(f"guidance = {guidance}: allowed is 1, for images without labels were no part of the "
                            "training; train with --label-drop 0.1, and not on one batch")


def sampling_config(c, solver: str | None = None, steps: int | None = None, tolerance: float | None = None):
    """The run's settings with the sampler that is asked for. Raises SettingsError."""
    if solver:
        c = replace(c, solver=solver, sample_steps=None)  # the run's count is for the run's solver
    if steps:
        c = replace(c, sample_steps=steps)
    if tolerance:
        c = replace(c, integration_atol=tolerance, integration_rtol=tolerance)
    if c.solver == "auto" and c.sampler == "dopri5" and solver is None and tolerance is None:
        c = replace(c, solver=QUICK_SOLVER, sample_steps=c.sample_steps or QUICK_STEPS)
    if c.solver != "auto" and not c.chosen.has_ode:
        raise SettingsError(f"solver = {c.solver!r}: {c.method} {c.chosen.no_ode}; allowed is auto")
    if c.sampler == "dopri5" and c.sample_steps is not None:
        raise SettingsError(f"steps = {c.sample_steps}: dopri5 chooses its own; add --solver midpoint, "
                            "or leave steps out")
    return c
