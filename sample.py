"""Uses a trained run: restores damaged images, or makes new ones. All that describes the model comes from the run.

    python sample.py RUN --input photos --output restored          every image below a folder, or one file
    python sample.py RUN --count 64 --label cat --guidance 2.5     new images; --label all: a row a class
    python sample.py RUN --export model.safetensors                weights and settings in one file, which is a RUN too

RUN is a run's folder, a checkpoint or an exported file. The task sr takes low-resolution files; every other, mixtures
too, files of full size. Restored images keep their names and become PNG. Transparency is laid over white; for
inpainting without --masks it is what is to be made. What could not be restored is listed at the end. An image's noise
depends on the seed, its name or number and the draw; the rest of its batch changes it by rounding only (dopri5: by its
tolerance).
"""
import json
import math
import os
import random
import re
import sys
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import data
import ode_int
from corruptions import enlarge, given, parts
from logs import beside, grid, one_line, strip, write_atomically
from settings import from_plain, parse
from trainer import Config, draw, make_unet, open_checkpoint, pick_device, set_up
from unet import Guided, Tiled


@dataclass
class Options:
    """What to do with the run: --input restores, --count makes new images, --export writes the weights."""

    run: tyro.conf.Positional[str]  # a run's folder, a checkpoint, or an exported .safetensors file
    input: str | None = None  # damaged images: a folder, searched with the folders in it, or a file
    count: int | None = None  # how many images to make, of each label
    export: str | None = None  # the .safetensors file to write
    output: str | None = None  # folder for the pictures; None: a new one in the run's
    overwrite: bool = False  # replace files that exist; else they are left as they are

    label: str | None = None  # class name or number, several joined by commas, or all; None: the network sees no label
    guidance: float | None = None  # 0 ignores the label, 1 follows it, above 1 exaggerates it; None: as the run
    seed: int = 0  # of the noise
    # on the method's ODE; auto: the method's own sampler; None: as the run, but for an interpolant midpoint in 5 steps,
    # which ends within one grey level of dopri5 at a tenth of the evaluations (benchmarks/README.md)
    solver: Literal["auto", "dopri5", "euler", "midpoint", "heun", "rk4"] | None = None
    steps: int | None = None  # of the sampler; None: as the run
    tolerance: float | None = None  # of dopri5, absolute and relative; None: as the run
    ema: bool = True  # the averaged weights; --no-ema: the raw ones
    trace: bool = False  # also write the iterative process, as a strip (states above clean estimates) and a GIF
    interpolate: tuple[int, int] | None = None  # the images, or draws, go from one seed's to the other's

    masks: str | None = None  # inpaint: folder of masks named as the images, or one for all; white is to be made
    # restorations of each image; also writes their mean, and their standard deviation (white: 32 or more of 255 levels)
    draws: int = 1
    # side in pixels of the overlapping tiles in which an image with a side of more than two tiles passes the network:
    # up to there one piece is better, and cheaper. None: the side trained on; 0: one piece always
    tile: int | None = None

    batch_size: int = 64  # images at a time; those larger than trained on count as several
    device: str = "auto"  # auto: cuda if there is one; or cuda, cuda:1, cpu
    precision: Literal["auto", "bf16", "fp32"] | None = None  # of the activations; None: as the run

    def check(self):
        """Raises ValueError, one line that names field, value and what is allowed."""
        def need(name, good, allowed):
            if getattr(self, name) is not None and not good(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)!r}: allowed is {allowed}")

        if [self.input, self.count, self.export].count(None) != 2:
            raise ValueError("one of --input (restore), --count (make images) and --export is needed, and one only")
        for name in ("count", "draws", "steps", "batch_size"):
            need(name, lambda n: n >= 1, "1 or more")
        need("tolerance", lambda x: 0 < x < math.inf, "a number above 0")
        need("tile", lambda n: n >= 0, "0 or more")
        need("guidance", lambda g: g == 1 or self.label and math.isfinite(g), "a finite number, with a --label")
        need("draws", lambda n: n == 1 or self.input, "more than 1 with --input only")
        need("interpolate", lambda _: max(self.draws, self.count or 1) > 1, "with --count or --draws above 1 only")
        need("masks", lambda _: self.input, "a path, with --input only")
        need("output", lambda path: Path(path).suffix.lower() not in data.ENDINGS, "a folder")
        need("export", lambda path: Path(path).suffix == ".safetensors", "a name that ends in .safetensors")


# ----------------------------------------------------------------------------------------------------------- the model

def open_model(run: str, ema: bool) -> tuple[Config, dict[str, Tensor], int, list[str]]:
    """-> the run's settings, weights, number of classes, and their names. Raises ValueError."""
    if Path(run).suffix != ".safetensors":
        config, checkpoint = open_checkpoint(run)
        weights = checkpoint["ema"] if ema else checkpoint["players"][0]
        return config, weights, checkpoint["num_classes"], checkpoint["classes"]
    import safetensors.torch
    try:
        with safetensors.safe_open(run, "pt") as file:
            about = json.loads(file.metadata()["run"])
        weights = safetensors.torch.load_file(run)
    except (OSError, TypeError, KeyError, safetensors.SafetensorError) as failure:
        raise ValueError(f"run = {run!r}: not a file that --export wrote ({one_line(failure)[:100]})") from None
    if about["ema"] and not ema:
        raise ValueError(f"ema = False: {run} holds the averaged weights only")
    return from_plain(Config, about["config"]), weights, about["num_classes"], about["classes"]


def export(o: Options) -> int:
    """The weights; in the file's header, as JSON, the rest of what open_model gives."""
    import safetensors.torch
    if Path(o.run).suffix == ".safetensors":
        raise ValueError(f"run = {o.run!r}: allowed is a run or a checkpoint, for this is an exported file already")
    refuse_existing([o.export], o)
    config, weights, num_classes, classes = open_model(o.run, o.ema)
    about = json.dumps(dict(config=asdict(config), num_classes=num_classes, classes=classes, ema=o.ema))
    content = safetensors.torch.save({name: w.contiguous() for name, w in weights.items()}, {"run": about})
    write_atomically(Path(o.export), lambda f: f.write(content))
    print(f"{'averaged' if o.ema else 'raw'} weights, {len(content) / 1e6:.1f} MB, in {o.export}")
    return 0


def sampling_config(config: Config, o: Options) -> Config:
    """The run's settings, with the sampler and the device that the options name. Raises ValueError."""
    steps = o.steps or (None if o.solver else config.sample_steps)  # the run's count is for the run's solver
    c = replace(config, solver=o.solver or config.solver, sample_steps=steps, device=o.device,
                precision=o.precision or config.precision, integration_atol=o.tolerance or config.integration_atol,
                integration_rtol=o.tolerance or config.integration_rtol)
    if c.solver == "auto" and c.sampler == "dopri5" and o.solver is None and o.tolerance is None:
        c = replace(c, solver="midpoint", sample_steps=steps or 5)
    if c.solver != "auto" and not hasattr(c.recipe, "velocity"):
        raise ValueError(f"solver = {c.solver!r}: {c.method} has no ODE; allowed is auto")
    if c.sampler == "dopri5" and steps is not None:
        raise ValueError(f"steps = {steps}: dopri5 chooses its own; add --solver midpoint, or leave steps out")
    return c


def parse_labels(text: str | None, classes: list[str]) -> list[int | None]:
    """"all", or names and numbers joined by commas -> numbers; None -> [None], no label."""
    if text is None:
        return [None]
    if not classes:
        raise ValueError(f"label = {text!r}: the run was trained without labels")
    names = classes if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in classes and not (name.isdecimal() and int(name) < len(classes)):
            raise ValueError(f"label = {text!r}: allowed is all, or from {', '.join(classes)}, 0 to {len(classes) - 1}")
    return list(dict.fromkeys(classes.index(name) if name in classes else int(name) for name in names))


class Model:
    """A run's network and sampler. Raises ValueError where the options do not fit the run."""

    def __init__(self, o: Options):
        config, weights, self.num_classes, self.classes = open_model(o.run, o.ema)
        self.options, self.config = o, (c := sampling_config(config, o))
        self.device = pick_device(c)
        self.labels = parse_labels(o.label, self.classes if self.num_classes else [])
        self.guidance = 1 if o.label is None else c.guidance if o.guidance is None else o.guidance
        if self.num_classes and (c.overfit or not c.label_drop) and (o.label is None or self.guidance != 1):
            what = "guidance needs them" if o.label else "give a --label"
            print(f"note: images without labels were no part of the training; {what}")

        # sides are multiples of UDPM's smallest pixel, and tiles begin where blocks of pixels damaged together do
        blocks = {"sr": c.damage.factor, "jpeg": 16}
        self.align = max([2 ** getattr(c.recipe, "levels", 0), *(blocks.get(name, 1) for name in parts(c.task))])
        tile = c.image_size if o.tile is None else o.tile
        self.tile = tile and max(-(-tile // self.align), 2) * self.align

        net = make_unet(c, self.num_classes)
        try:
            net.load_state_dict(weights)
        except RuntimeError as failure:
            reason = one_line(failure)[:100]
            raise ValueError(f"run = {o.run!r}: its weights do not fit its settings ({reason} ...)") from None
        self.net = net.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        precision = set_up(self.device, c.precision)
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.images, self.rows, self.clock = 0, 0, time.perf_counter()
        self.bar = tqdm(disable=None, dynamic_ncols=True, unit="image", miniters=0)

        def tick(*_):  # so that the bar moves while a large image is made
            self.bar.update(0)

        self.net.register_forward_pre_hook(tick)

    def cost(self) -> str:
        """What an image took, --trace's own evaluations included. An evaluation in tiles counts as one."""
        self.bar.close()
        n = max(self.images, 1)
        return f"{self.rows / n:.0f} NFE{' with the trace' * self.options.trace}, {(time.perf_counter() - self.clock) / n:.3g} s an image"

    def at_a_time(self, height: int, width: int) -> int:
        """How many images of these sides make a batch."""
        return max(1, self.options.batch_size * self.config.image_size**2 // (height * width))

    @torch.no_grad()
    def sample(self, zlo: Tensor, hole: Tensor | None, label: list, noise: list) -> tuple:
        """-> images (B, C, H, W) uint8 on the CPU, and their trace, small, if --trace, else None.

        zlo (B, C, H, W) on z1's grid, any sides; hole (B, 1, H, W) or None; B labels, numbers or None; B of noise().
        """
        c, net, (height, width) = self.config, self.net, zlo.shape[2:]
        frames = Frames((height, width)) if self.options.trace else None
        margin = (0, -width % self.align, 0, -height % self.align)
        zlo, hole = (None if x is None else F.pad(x.to(self.device), margin, mode="replicate") for x in (zlo, hole))
        y = torch.tensor([self.num_classes if i is None else i for i in label], device=self.device)
        batch = given(c.task, zlo, y if self.num_classes else None, c.condition, hole)
        if 0 < 2 * self.tile < max(height, width):
            net = Tiled(net, zlo.shape[2], self.tile, self.align, self.options.batch_size)
        counted = ode_int.Counted(net)
        with self.autocast(), noise_of(noise, self.device):
            sample, _ = draw(c, Guided(counted, self.guidance), batch, frames)
        if frames is not None:
            frames = [*frames[:-1], frames.small(frames[-1]), frames.small((1.0, sample, sample))]
        self.images, self.rows = self.images + len(sample), self.rows + counted.rows
        self.bar.update(len(sample))
        return data.to_uint8(sample[:, :, :height, :width]).cpu(), frames


def noise(o: Options, name: str, i: int, n: int) -> list[tuple]:
    """What the noise of the i-th of an input's n images is the sum of: [(weight, key of a random stream)]."""
    if o.interpolate is None:
        return [(1.0, (o.seed, name, i))]
    (a, b), angle = o.interpolate, math.pi / 2 * i / (n - 1)  # along a circle unit noise remains unit noise
    return [(math.cos(angle), (a, name, 0)), (math.sin(angle), (b, name, 0))]


@contextmanager
def noise_of(rows: list[list], device):
    """Within it, row i of torch.randn and torch.randn_like is the noise that rows[i] describes, see `noise`.

    Samplers draw the noise of a batch at once; an image is not to depend on its batch. (A TorchFunctionMode would do
    the same and slow the network down, for it sees every call.)
    """
    def stream(key):  # hashed, since torch's CPU generator keeps 32 bits of a seed only
        return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))

    streams = [[(weight, stream(key)) for weight, key in row] for row in rows]
    randn, randn_like = torch.randn, torch.randn_like

    def by_row(n, *shape, **kind):
        assert n == len(streams)
        return torch.stack([sum(weight * randn(*shape, generator=g, **kind) for weight, g in row) for row in streams])

    torch.randn, torch.randn_like = by_row, lambda x: by_row(*x.shape, device=x.device, dtype=x.dtype)
    try:
        yield
    finally:
        torch.randn, torch.randn_like = randn, randn_like


class Frames(list):
    """A trace, see ode_int.solve, of at most 64 frames, evenly spread over the steps; all but the newest small."""

    def __init__(self, sides, largest=256):
        self.sides, self.shrink, self.every, self.seen = sides, -(-max(sides) // largest), 1, 0

    def append(self, frame):
        if self.seen % self.every == 0:
            self[-1:] = map(self.small, self[-1:])
            super().append(frame)
        self.seen += 1
        if len(self) > 64:
            del self[1::2]
            self.every *= 2

    def small(self, frame):
        t, *pictures = frame
        pictures = (p[:, :, :self.sides[0], :self.sides[1]].float() for p in pictures)
        return t, *(F.avg_pool2d(p, self.shrink, ceil_mode=True).cpu() for p in pictures)


# --------------------------------------------------------------------------------------------------------------- files

def stem(name: str) -> str:
    return os.path.splitext(name)[0]


def read(path: Path, channels: int) -> Tensor:
    """(C, H, W) uint8. Raises DatasetError."""
    return torch.from_numpy(np.atleast_3d(data.open_image(path, channels)).copy()).permute(2, 0, 1)


def read_alpha(path: Path) -> Tensor:
    """(1, H, W) uint8 of a file that `read` could read: 0 transparent, 255 opaque."""
    with Image.open(path) as image:
        with suppress(Exception):  # as data.open_image does
            ImageOps.exif_transpose(image, in_place=True)
        opaque = not image.has_transparency_data  # 16-bit greys can't become RGBA
        alpha = Image.new("L", image.size, 255) if opaque else image.convert("RGBA").getchannel("A")
        return torch.from_numpy(np.array(alpha))[None]


def save(path: str, picture: Tensor):
    """(C, H, W) uint8 -> PNG."""
    image = Image.fromarray(picture.permute(1, 2, 0).squeeze(2).contiguous().numpy())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), lambda f: image.save(f, format="PNG"))


def save_trace(path: str, frames: list, rows: slice):
    """Beside the picture `path`: NAME_trace.png, the strip, and NAME_trace.gif, state | clean estimate over time."""
    base, frames = stem(path), [(t, state[rows], clean[rows]) for t, state, clean in frames]
    save(base + "_trace.png", torch.from_numpy(strip(frames)).permute(2, 0, 1))
    first, *others = [Image.fromarray(beside(grid(state), grid(clean))) for _, state, clean in frames]
    how = dict(format="GIF", save_all=True, append_images=others, loop=0, duration=[100] * len(others) + [2000])  # ms
    write_atomically(Path(base + "_trace.gif"), lambda f: first.save(f, **how))


def refuse_existing(paths: list[str], o: Options):
    if not o.overwrite and (there := [path for path in paths if os.path.exists(path)]):
        raise data.DatasetError(f"{there[0]} exists; --overwrite replaces it")


def output_folder(o: Options, kind: str) -> Path:
    if o.output is not None:
        return Path(o.output).expanduser()
    run = Path(o.run).resolve()
    folder = run if run.is_dir() else run.parent.parent if run.parent.name == "checkpoints" else run.parent
    return folder / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"


# ----------------------------------------------------------------------------------------------------------- restoring

class Restorer:
    """Restores files, neighbours of equal size together. What fails does not stop the others; it is told at the end."""

    def __init__(self, model: Model):
        self.model, self.options, self.config, self.failures = model, model.options, model.config, {}
        o, self.tasks, self.taken, self.made = self.options, parts(self.config.task), set(), defaultdict(list)
        if self.tasks == ["generate"]:
            raise ValueError(f"input = {o.input!r}: the run makes images from noise; --count N does")
        if len(model.labels) > 1:
            raise ValueError(f"label = {o.label!r}: allowed is one, for all images")
        if o.masks is not None and "inpaint" not in self.tasks:
            raise ValueError(f"masks = {o.masks!r}: the run's task, {self.config.task}, takes none")
        self.factor = self.config.damage.factor if self.tasks == ["sr"] else 1
        path, self.folder = Path(o.input).expanduser(), output_folder(o, "restored")
        self.root, names = (path.parent, [path.name]) if path.is_file() else (path, data._list(path))
        folder = self.folder.resolve()
        if folder == self.root.resolve():
            raise ValueError(f"output = {o.output!r}: allowed is another folder than the input's")
        self.names = [name for name in names if folder not in (self.root / name).resolve().parents]
        if o.masks is not None:
            masks = Path(o.masks).expanduser()
            one = dict.fromkeys(map(stem, names), masks)
            self.masks = one if masks.is_file() else {stem(name): masks / name for name in data._list(masks)}

    def run(self) -> int:
        self.model.bar.reset(self.options.draws * len(self.names))
        try:
            for ((_, height, width), _), group in groupby(self.draws(), lambda draw: (draw[2].shape, draw[3] is None)):
                while some := list(islice(group, self.model.at_a_time(self.factor * height, self.factor * width))):
                    self.restore(*zip(*some))
            done = f"{len(self.names) - len(self.failures)} of {len(self.names)} images restored"
            print(f"{done}, in {self.folder}: {self.model.cost()}")
        finally:  # also when it is interrupted
            for failure in self.failures.values():
                print(f"not restored: {failure}", file=sys.stderr)
        return int(bool(self.failures))

    def draws(self):
        """Yields name, number of the draw, image (C, H, W) uint8, and where it is to be made, (1, H, W), None: all."""
        for name in self.names:
            try:
                paths = self.outputs(name)
                refuse_existing(paths, self.options)
                image = read(self.root / name, self.config.channels)
                hole = self.read_hole(name, image) if "inpaint" in self.tasks else None
                if twice := self.taken.intersection(paths):
                    raise data.DatasetError(f"{self.root / name}: another image of its name takes {min(twice)}")
                self.taken.update(paths)
            except data.DatasetError as failure:
                self.failures[name] = failure
                continue
            yield from ((name, i, image, hole) for i in range(self.options.draws))

    def outputs(self, name: str) -> list[str]:
        """The files to be written for an input: its draws, then the others."""
        n, base = self.options.draws, f"{self.folder}/{stem(name)}"
        singles = [base] if n == 1 else [f"{base}_{i + 1}" for i in range(n)]
        traces = [single + end for single in singles * self.options.trace for end in ("_trace.png", "_trace.gif")]
        more = [base + end for end in ("_mean.png", "_std.png")] if n > 1 else []
        return [single + ".png" for single in singles] + more + traces

    def read_hole(self, name: str, image: Tensor) -> Tensor | None:
        path = self.root / name
        if self.options.masks is None:
            hole = read_alpha(path) < 255
        elif stem(name) in self.masks:
            hole = read(self.masks[stem(name)], 1) >= 128
        else:
            raise data.DatasetError(f"{path}: no mask of this name is in {self.options.masks}")
        if hole.shape[1:] != image.shape[1:]:
            (_, height, width), (_, h, w) = image.shape, hole.shape
            raise data.DatasetError(f"{path}: it is {width}x{height}, its mask {w}x{h}")
        if not hole.any() and self.tasks == ["inpaint"]:
            raise data.DatasetError(f"{path}: nothing is to be made: no --masks that is white there, no transparency")
        return hole.float() if hole.any() else None

    def restore(self, names, numbers, images, holes):
        """Draws of one size -> files."""
        o, zlo = self.options, data.to_float(torch.stack(images))
        hole = None if holes[0] is None else torch.stack(holes)
        if self.factor > 1:
            zlo = enlarge(zlo, self.factor, self.config.damage.up)
        streams = [noise(o, name, i, o.draws) for name, i in zip(names, numbers)]
        try:
            sample, frames = self.model.sample(zlo, hole, self.model.labels * len(zlo), streams)
        except (torch.OutOfMemoryError, ode_int.SolverError) as failure:
            reason = failure if isinstance(failure, ode_int.SolverError) else "out of GPU memory; lower --batch-size or --tile"
            self.failures |= {name: f"{self.root / name}: {reason}" for name in names}
            return
        for row, (name, i, picture) in enumerate(zip(names, numbers, sample)):
            paths = self.outputs(name)
            save(paths[i], picture)
            if frames:
                save_trace(paths[i], frames, slice(row, row + 1))
            if o.draws > 1:
                self.made[name].append(picture)
            if len(self.made[name]) == o.draws > 1:
                levels = torch.stack(self.made.pop(name)).float()
                std = levels.var(0).mean(0, keepdim=True).sqrt()  # over the draws; root mean square over the channels
                save(paths[o.draws], levels.mean(0).round().byte())
                save(paths[o.draws + 1], (8 * std).round().clamp(max=255).byte())


# ---------------------------------------------------------------------------------------------------------- generation

def generate(model: Model) -> int:
    """`count` images of each label, as files and as grid.png, a row a label. The i-th of each share their noise."""
    o, c, labels, count = model.options, model.config, model.labels, model.options.count
    if "generate" not in parts(c.task):
        raise ValueError(f"count = {count}: the run restores damaged images (task {c.task}); --input FOLDER does")
    folder, made = output_folder(o, "generated"), []
    kinds = ["image" if i is None else re.sub(r"[^\w-]+", "-", model.classes[i]) for i in labels]
    if len(set(kinds)) < len(kinds):  # names that differ in their punctuation only
        kinds = [f"{kind}-{i}" for kind, i in zip(kinds, labels)]
    paths = [f"{folder}/{kind}_{i + 1:04d}.png" for kind in kinds for i in range(count)]
    refuse_existing([*paths, f"{folder}/grid.png", f"{folder}/grid_trace.png", f"{folder}/grid_trace.gif"], o)
    every = [(label, noise(o, "", i, count)) for label in labels for i in range(count)]
    model.bar.reset(len(paths))
    most = model.at_a_time(c.image_size, c.image_size)
    for label, streams in (zip(*every[k:k + most]) for k in range(0, len(every), most)):
        zlo = torch.zeros(len(label), c.channels, c.image_size, c.image_size)
        sample, frames = model.sample(zlo, zlo[:, :1] + 1, label, streams)
        if frames and not made:
            save_trace(f"{folder}/grid.png", frames, slice(16))
        for picture in sample:
            save(paths[len(made)], picture)
            made.append(picture)
    columns = count if len(labels) > 1 or o.interpolate else None
    save(f"{folder}/grid.png", grid(data.to_float(torch.stack(made)), columns))
    print(f"{len(paths)} images and grid.png in {folder}: {model.cost()}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some images could not be restored or it broke off, 2 bad input, 130 interrupted."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        o = parse(Options, sys.argv[1:] if arguments is None else arguments, __doc__)
        o.check()
        return export(o) if o.export else Restorer(Model(o)).run() if o.input else generate(Model(o))
    except (ValueError, data.DatasetError) as failure:
        reason, status = failure, 2
    except ImportError:
        reason, status = "exported files need one more package: pip install safetensors", 2
    except (FloatingPointError, OSError) as failure:  # a network that is not finite; a full disk
        reason, status = failure, 1
    except torch.OutOfMemoryError:
        reason, status = "out of GPU memory; lower --batch-size", 1
    except KeyboardInterrupt:
        reason, status = "interrupted", 130
    tqdm.write(f"sample.py: {reason}", sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
