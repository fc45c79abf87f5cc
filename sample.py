"""Uses a trained run: restores damaged images, or makes new ones. All that describes the model comes from the run.

    python sample.py RUN --input photos --output restored          every image below a folder, or one file
    python sample.py RUN --count 64 --label cat --guidance 2.5     new images; --label all: a row a class
    python sample.py RUN --export model.safetensors                weights and settings in one file, which is a RUN too

RUN is a run's folder, a checkpoint or an exported file. The task sr takes low-resolution files; every other, mixtures
too, files of full size. Restored images keep their names and become PNG; of inputs that differ in nothing but their
ending (a.jpg, a.tif) each keeps it (a.jpg.png, a.tif.png). Transparency is laid over white; for inpainting without
--masks it is what is to be made. What could not be restored is listed at the end. An image's noise depends on the seed,
its name or number and the draw; the rest of its batch changes it by rounding only (dopri5: by its tolerance).
"""
import json
import math
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
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
from methods.udpm import interpolate
from settings import from_plain, parse
from trainer import Config, bf16_helps, draw, make_unet, open_checkpoint, pick_device
from unet import Guided


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
    solver: str | None = None  # dopri5, euler, midpoint, heun, rk4, or auto: the method's own; None: as the run
    steps: int | None = None  # of the sampler; None: as the run
    atol: float | None = None  # absolute tolerance of dopri5; None: as the run
    rtol: float | None = None  # relative tolerance of dopri5; None: as the run
    ema: bool = True  # the averaged weights; --no-ema: the raw ones
    trace: bool = False  # also write the iterative process, as a strip (states above clean estimates) and a GIF
    interpolate: tuple[int, int] | None = None  # udpm: from one seed's image to the other's, in `count` images

    masks: str | None = None  # inpaint: folder of masks named as the images, or one for all; white is to be made
    # restorations of each image; also writes their mean, and their standard deviation (white: 32 or more of 255 levels)
    draws: int = 1
    # larger images pass the network in tiles of this side, pixels; None: the side trained on; 0: all in one piece
    tile: int | None = None
    overlap: int | None = None  # pixels that neighbouring tiles share and are blended over; None: a quarter of a tile

    batch_size: int = 64  # images at a time; those larger than trained on count as several
    device: str = "auto"  # auto: cuda if there is one; or cuda, cuda:1, cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the activations; auto: bf16 where the chip computes in it

    def check(self):
        """Raises ValueError, one line that names field, value and what is allowed."""
        def need(name, good, allowed):
            if getattr(self, name) is not None and not good(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)!r}: allowed is {allowed}")

        if [self.input, self.count, self.export].count(None) != 2:
            raise ValueError("one of --input (restore), --count (make images) and --export is needed, and one only")
        for name in ("count", "draws", "steps", "batch_size", "overlap"):
            need(name, lambda n: n >= 1, "1 or more")
        for name in ("atol", "rtol"):
            need(name, lambda x: 0 < x < math.inf, "a number above 0")
        need("tile", lambda n: n >= 0, "0 or more")
        need("guidance", math.isfinite, "a finite number")
        need("draws", lambda n: n == 1 or self.input and not self.interpolate, "more than 1 with --input only")
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
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(run, "pt") as file:
            about, weights = json.loads(file.metadata()["run"]), {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, TypeError, KeyError, safetensors.SafetensorError) as failure:
        raise ValueError(f"run = {run!r}: not a file that --export wrote ({one_line(failure)[:100]})") from None
    if about["ema"] and not ema:
        raise ValueError(f"ema = False: {run} holds the averaged weights only")
    return from_plain(Config, about["config"]), weights, about["num_classes"], about["classes"]


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("exported files need one more package: pip install safetensors") from None
    return safetensors


def export(o: Options) -> int:
    """The weights; in the file's header, as JSON, the rest of what open_model gives."""
    refuse_existing([o.export], o)
    safetensors, (config, weights, num_classes, classes) = import_safetensors(), open_model(o.run, o.ema)
    about = json.dumps(dict(config=asdict(config), num_classes=num_classes, classes=classes, ema=o.ema))
    content = safetensors.torch.save({name: w.contiguous() for name, w in weights.items()}, {"run": about})
    write_atomically(Path(o.export), lambda f: f.write(content))
    print(f"{'averaged' if o.ema else 'raw'} weights, {len(content) / 1e6:.1f} MB, in {o.export}")
    return 0


def sampling_config(config: Config, o: Options) -> Config:
    """The run's settings, with the sampler and the device that the options name. Raises ValueError."""
    named = dict(solver=o.solver, sample_steps=o.steps, integration_atol=o.atol, integration_rtol=o.rtol)
    named = {name: value for name, value in named.items() if value is not None}
    if o.solver is not None:
        named["sample_steps"] = o.steps  # the run's count is for the run's solver
    c = replace(config, device=o.device, precision=o.precision, **named)
    if c.solver != "auto" and c.solver not in ode_int.SOLVERS:
        raise ValueError(f"solver = {c.solver!r}: allowed is auto, {', '.join(ode_int.SOLVERS)}")
    if c.solver != "auto" and not hasattr(c.recipe, "velocity"):
        raise ValueError(f"solver = {c.solver!r}: {c.method} has no ODE; allowed is auto")
    if c.sampler == "dopri5" and c.sample_steps is not None:
        raise ValueError(f"steps = {c.sample_steps}: dopri5 chooses its own; add --solver heun, or leave steps out")
    try:
        torch.empty(1, device=pick_device(c))
    except (RuntimeError, AssertionError):
        raise ValueError(f"device = {c.device!r}: allowed is auto, cpu, or a CUDA device that is there") from None
    return c


def parse_labels(text: str | None, classes: list[str]) -> list[int | None]:
    """"all", or names and numbers joined by commas -> numbers; None -> [None], no label."""
    if text is None:
        return [None]
    if not classes:
        raise ValueError(f"label = {text!r}: the run was trained without labels")
    if text == "all":
        return list(range(len(classes)))
    names = [text] if text in classes else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in classes and not (name.isdecimal() and int(name) < len(classes)):
            raise ValueError(f"label = {text!r}: allowed is all, or from {', '.join(classes)}, 0 to {len(classes) - 1}")
    return list(dict.fromkeys(classes.index(name) if name in classes else int(name) for name in names))


class Model:
    """A run's network and sampler. Raises ValueError where the options do not fit the run."""

    def __init__(self, o: Options):
        config, weights, self.num_classes, self.classes = open_model(o.run, o.ema)
        self.options, self.config = o, sampling_config(config, o)
        c, method, self.device = self.config, self.config.recipe, pick_device(self.config)
        if o.interpolate and not hasattr(method, "latent"):
            raise ValueError(f"interpolate = {o.interpolate}: {c.method} has no latent for it, only udpm has")
        self.labels = parse_labels(o.label, self.classes if self.num_classes else [])
        if o.label is None and o.guidance not in (None, 1):
            raise ValueError(f"guidance = {o.guidance}: needs a --label to follow")
        self.guidance = 1 if o.label is None else c.guidance if o.guidance is None else o.guidance
        if self.num_classes and (c.overfit or not c.label_drop) and (o.label is None or self.guidance != 1):
            what = "guidance needs them" if o.label else "give a --label"
            print(f"note: images without labels were no part of the training; {what}")

        self.multiple = 2 ** getattr(method, "levels", 0)  # that sides must be of
        blocks = {"sr": c.damage.factor, "jpeg": 16}  # of pixels that are damaged together: tiles begin where they do
        self.align = max([self.multiple, *(blocks.get(name, 1) for name in parts(c.task))])
        self.tile = -(-(c.image_size if o.tile is None else o.tile) // self.align) * self.align
        self.overlap = self.tile // 4 if o.overlap is None else o.overlap
        if 0 < self.tile <= self.overlap:
            raise ValueError(f"overlap = {self.overlap}: allowed is less than a tile's side, {self.tile}")

        net = make_unet(c, self.num_classes)
        try:
            net.load_state_dict(weights)
        except RuntimeError as failure:
            reason = one_line(failure)[:100]
            raise ValueError(f"run = {o.run!r}: its weights do not fit its settings ({reason} ...)") from None
        self.net = net.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        bf16 = c.precision == "bf16" or c.precision == "auto" and bf16_helps(self.device)
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.images, self.rows, self.clock = 0, 0, time.perf_counter()
        self.bar = tqdm(disable=None, dynamic_ncols=True, unit="image")

    def cost(self) -> str:
        """What an image took. An evaluation in tiles counts as one."""
        self.bar.close()
        n = max(self.images, 1)
        return f"{self.rows / n:.0f} NFE, {(time.perf_counter() - self.clock) / n:.3g} s an image"

    def at_a_time(self, height: int, width: int) -> int:
        """How many images of these sides make a batch."""
        return max(1, self.options.batch_size * self.config.image_size**2 // (height * width))

    def __call__(self, zlo: Tensor, hole: Tensor | None, label: list, noise: list) -> Iterator[tuple]:
        """A batch at a time: its rows, a slice; the images (b, C, H, W) uint8 on the CPU; with --trace their Frames.

        zlo (n, C, H, W) on z1's grid, any sides; hole (n, 1, H, W) or None; label: n numbers or None; noise: n of noise().
        """
        for rows in torch.arange(len(zlo)).split(self.at_a_time(*zlo.shape[2:])):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            frames = Frames(zlo.shape[2:]) if self.options.trace else None
            sample = self.sample(zlo[rows], None if hole is None else hole[rows], label[rows], noise[rows], frames)
            self.images += len(sample)
            self.bar.update(len(sample))
            yield rows, sample, frames

    @torch.no_grad()
    def sample(self, zlo, hole, label, noise, frames) -> Tensor:
        c, method, net, (height, width) = self.config, self.config.recipe, self.net, zlo.shape[2:]
        tiled = 0 < self.tile < max(height, width)
        multiple = self.align if tiled else self.multiple
        margin = (0, -width % multiple, 0, -height % multiple)
        zlo, hole = (None if x is None else F.pad(x.to(self.device), margin, mode="replicate") for x in (zlo, hole))
        y = torch.tensor([self.num_classes if i is None else i for i in label], device=self.device)
        batch = given(c.task, zlo, y if self.num_classes else None, c.condition, hole)
        if tiled:
            net = Tiled(net, zlo.shape[2:], self.tile, self.overlap, self.align, self.options.batch_size)
        counted = Watched(net, self.bar)
        net = Guided(counted, self.guidance)

        start, end, share = zip(*noise)
        with self.autocast():
            if end[0] is None:
                with noise_of(start, self.device):
                    sample, _ = draw(c, net, batch, frames)
            else:
                latents = []
                for keys in (start, end):
                    with noise_of(keys, self.device):
                        latents.append(method.latent(batch))
                rows = [interpolate(*([m[i:i + 1] for m in maps] for maps in latents), w) for i, w in enumerate(share)]
                sample = method.sample(net, batch, c.sample_steps, frames, [torch.cat(maps) for maps in zip(*rows)])
        self.rows += counted.rows
        if frames is not None:
            frames.append((1.0, sample, sample), last=True)
        return data.to_uint8(sample[:, :, :height, :width]).cpu()


class Watched(ode_int.Counted):
    """Counted, and the progress bar shows that it lives: a large image takes long."""

    def __init__(self, net, bar):
        super().__init__(net)
        self.bar = bar

    def __call__(self, x, *args):
        self.bar.set_postfix_str(f"evaluation {self.rows // len(x) + 1}", refresh=False)
        self.bar.update(0)
        return super().__call__(x, *args)


@contextmanager
def noise_of(keys, device):
    """Within it, row i of torch.randn and torch.randn_like comes from a random stream of its own, that of keys[i].

    Samplers draw the noise of a batch at once; an image is not to depend on its batch. (A TorchFunctionMode would do
    the same and slow the network down, for it sees every call.)
    """
    # hashed, since torch's CPU generator keeps 32 bits of a seed only
    streams = [torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63)) for key in keys]
    randn, randn_like = torch.randn, torch.randn_like

    def by_row(rows, *shape, **kind):
        assert rows == len(streams)
        return torch.stack([randn(*shape, generator=stream, **kind) for stream in streams])

    torch.randn, torch.randn_like = by_row, lambda x: by_row(*x.shape, device=x.device, dtype=x.dtype)
    try:
        yield
    finally:
        torch.randn, torch.randn_like = randn, randn_like


def noise(o: Options, name: str, n: int) -> list[tuple]:
    """The noise of an input's n images: (key, None, 0); on the way between two seeds (key, other key, share of it)."""
    if o.interpolate is None:
        return [((o.seed, name, i), None, 0.0) for i in range(n)]
    a, b = o.interpolate
    return [((a, name, 0), (b, name, 0), i / max(n - 1, 1)) for i in range(n)]


class Frames(list):
    """A trace, see ode_int.solve, of at most 64 small pictures, evenly spread over the steps; then the sample."""

    def __init__(self, sides, largest=256):
        self.sides, self.shrink, self.every, self.seen = sides, -(-max(sides) // largest), 1, 0

    def append(self, frame, last=False):
        if last or self.seen % self.every == 0:
            t, *pictures = frame
            pictures = (p[:, :, :self.sides[0], :self.sides[1]].float() for p in pictures)
            super().append((t, *(F.avg_pool2d(p, self.shrink, ceil_mode=True).cpu() for p in pictures)))
        self.seen += 1
        if len(self) > 64:
            del self[1::2]
            self.every *= 2


# --------------------------------------------------------------------------------------------------------------- tiles

class Tiled:
    """net(x, t, y, cond) on images of any size, in overlapping tiles whose predictions are blended.

    The sampler sees one field over the whole image, so no seam survives a step; noise and known pixels are the image's.
    The outer quarter of an overlap counts for nothing, as the tile does not see beyond it: of a network that looks no
    further than that, the result is what it is in one piece. Pixels are z1's: where x is smaller (UDPM), tiles are too.
    """

    def __init__(self, net, sides, tile: int, overlap: int, align: int, rows: int):
        """sides (H, W) of z1 and tile: multiples of align, a whole number of x's pixels. rows: tiles at a time."""
        self.net, self.rows, self.num_classes = net, rows, getattr(net, "num_classes", 0)
        self.axes = [(side, starts(side, tile, overlap, align), min(tile, side), overlap) for side in sides]

    def __call__(self, x, t, y=None, cond=None):
        shrunk, upscale = self.axes[0][0] // x.shape[2], getattr(self.net, "upscale", 1)
        tops, lefts = ([start // shrunk for start in starts] for _, starts, _, _ in self.axes)
        height, width = (tile // shrunk for _, _, tile, _ in self.axes)
        down, across = (windows(*axis, upscale / shrunk).to(x.device) for axis in self.axes)
        corners, out = list(product(zip(tops, down), zip(lefts, across))), None

        def cut(z, corners):
            return None if z is None else torch.cat([z[:, :, i:i + height, j:j + width] for (i, _), (j, _) in corners])

        at_a_time = max(1, self.rows // len(x))
        for some in (corners[k:k + at_a_time] for k in range(0, len(corners), at_a_time)):
            labels = None if y is None else y.repeat(len(some))
            made = self.net(cut(x, some), t.repeat(len(some)), labels, cut(cond, some))
            if out is None:
                out = made.new_zeros(len(x), made.shape[1], upscale * x.shape[2], upscale * x.shape[3])
            for ((i, d), (j, a)), tile in zip(some, made.chunk(len(some))):
                i, j = (slice(upscale * k, upscale * (k + side)) for k, side in ((i, height), (j, width)))
                out[:, :, i, j] += d[i, None] * a[j] * tile
        return out


def starts(side: int, tile: int, overlap: int, align: int) -> list[int]:
    """First pixels of tiles that cover `side`, multiples of align. Neighbours share `overlap`, or more if they must."""
    step = max((tile - overlap) // align, 1) * align
    return [*range(0, side - tile, step), max(side - tile, 0)]


def windows(side: int, starts: list[int], tile: int, overlap: float, scale: float) -> Tensor:
    """How much each tile counts, (tiles, side * scale), on a grid of `scale` pixels to one of z1's. Sums to 1.

    From a tile's edge inwards: 0 over a quarter of the overlap, a smooth rise over half of it, 1. Image edges: 1.
    """
    at = (torch.arange(round(side * scale), dtype=torch.float64) + 0.5) / scale
    weights = []
    for start in starts:
        left = at - start if start else torch.full_like(at, math.inf)
        right = start + tile - at if start + tile < side else torch.full_like(at, math.inf)
        rise = ((torch.minimum(left, right) - overlap / 4) / (overlap / 2)).clamp(0, 1)
        weights.append(rise * rise * (3 - 2 * rise))
    weights = torch.stack(weights)
    return (weights / weights.sum(0)).float()


# --------------------------------------------------------------------------------------------------------------- files

def find(path: str) -> tuple[Path, list[str]]:
    """A folder, or one file -> the folder, and the names of the images in it and below. Raises DatasetError."""
    root = Path(path).expanduser()
    return (root.parent, [root.name]) if root.is_file() else (root, data._list(root))


def stem(name: str) -> str:
    return name.removesuffix(Path(name).suffix)


def read(path: Path, channels: int) -> Tensor:
    """(C, H, W) uint8. Raises DatasetError."""
    return torch.from_numpy(np.atleast_3d(data.open_image(path, channels)).copy()).permute(2, 0, 1)


def read_alpha(path: Path) -> Tensor:
    """(1, H, W) uint8 of a file that `read` could read: 0 transparent, 255 opaque."""
    with Image.open(path) as image:
        image.load()
        with suppress(Exception):  # as data.open_image does
            ImageOps.exif_transpose(image, in_place=True)
        if not image.has_transparency_data:  # 16-bit greys can't become RGBA
            return torch.full((1, image.height, image.width), 255)
        return torch.from_numpy(np.array(image.convert("RGBA").getchannel("A")))[None]


def save(path: str, picture: Tensor):
    """(C, H, W) uint8 -> PNG."""
    image = Image.fromarray(picture.permute(1, 2, 0).squeeze(2).contiguous().numpy())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), lambda f: image.save(f, format="PNG"))


def save_trace(base: str, frames: Frames, rows: slice):
    """base_trace.png: the strip; base_trace.gif: state beside clean estimate, over time."""
    frames = [(t, state[rows], clean[rows]) for t, state, clean in frames]
    save(base + "_trace.png", torch.from_numpy(strip(frames)).permute(2, 0, 1))
    first, *others = [Image.fromarray(beside(grid(state), grid(clean))) for _, state, clean in frames]
    pace = dict(duration=[100] * len(others) + [2000], loop=0)  # milliseconds
    write_atomically(
        Path(base + "_trace.gif"), lambda f: first.save(f, "GIF", save_all=True, append_images=others, **pace))


def outputs(base: str, o: Options, n: int) -> list[str]:
    """All files that are written for an input of which n images are made, these first."""
    singles = [base if n == 1 else f"{base}_{i + 1}" for i in range(n)]
    more = [] if n == 1 else [base + "_interpolation"] if o.interpolate else [base + "_mean", base + "_std"]
    traces = [name + end for name in singles * o.trace for end in ("_trace.png", "_trace.gif")]
    return [f"{name}.png" for name in singles + more] + traces


def refuse_existing(paths: list[str], o: Options):
    if not o.overwrite and (there := [path for path in paths if Path(path).exists()]):
        raise data.DatasetError(f"{there[0]} exists; --overwrite replaces it")


def output_folder(o: Options, kind: str) -> Path:
    if o.output is not None:
        return Path(o.output).expanduser()
    run = Path(o.run).resolve()
    folder = run if run.is_dir() else run.parent.parent if run.parent.name == "checkpoints" else run.parent
    return folder / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"


# ----------------------------------------------------------------------------------------------------------- restoring

MOST_WAITING = 2**28  # values of images that wait for others of their size


class Restorer:
    """Restores files, those of equal size together. What fails does not stop the others; it is told at the end."""

    def __init__(self, model: Model):
        self.model, self.options, self.config, self.failures = model, model.options, model.config, []
        o, self.tasks = self.options, parts(self.config.task)
        if self.tasks == ["generate"]:
            raise ValueError(f"input = {o.input!r}: the run makes images from noise; --count N does")
        if len(model.labels) > 1:
            raise ValueError(f"label = {o.label!r}: allowed is one, for all images")
        if o.masks is not None and "inpaint" not in self.tasks:
            raise ValueError(f"masks = {o.masks!r}: the run's task, {self.config.task}, takes none")
        self.n = 9 if o.interpolate else o.draws
        self.factor = self.config.damage.factor if self.tasks == ["sr"] else 1
        (self.root, names), self.folder = find(o.input), output_folder(o, "restored")
        if self.folder.resolve() == self.root.resolve():
            raise ValueError(f"output = {o.output!r}: allowed is another folder than the input's")
        self.names = [name for name in names if self.folder.resolve() not in (self.root / name).resolve().parents]
        twins = Counter(map(stem, self.names))
        self.base = {name: f"{self.folder}/{stem(name) if twins[stem(name)] == 1 else name}" for name in self.names}
        written = Counter(path for base in self.base.values() for path in outputs(base, o, self.n))
        if twice := [path for path, times in written.items() if times > 1]:
            raise ValueError(f"input = {o.input!r}: two of its images would both give {twice[0]}; restore them apart")
        if o.masks is not None:
            folder, names = find(o.masks)
            self.masks = {stem(name): folder / name for name in names}
            if Path(o.masks).expanduser().is_file():
                self.masks = dict.fromkeys(twins, folder / names[0])

    def run(self) -> int:
        self.model.bar.reset(self.n * len(self.names))
        waiting, held = defaultdict(list), 0
        for name in self.names:
            try:
                image, hole = self.read(name)
            except data.DatasetError as failure:
                self.fail(name, failure)
                continue
            group = waiting[image.shape, hole is None]
            group.append((name, image, hole))
            held += image.numel()
            together = self.model.at_a_time(self.factor * image.shape[1], self.factor * image.shape[2]) // self.n
            if len(group) >= together or held > MOST_WAITING:
                held -= image.numel() * len(group)
                self.restore(group)
                group.clear()
        for group in filter(None, waiting.values()):
            self.restore(group)
        done = f"{len(self.names) - len(self.failures)} of {len(self.names)} images restored"
        print(f"{done}, in {self.folder}: {self.model.cost()}")
        for failure in self.failures:
            print(f"not restored: {failure}", file=sys.stderr)
        return int(bool(self.failures))

    def fail(self, name: str, reason):
        path = str(self.root / name)
        self.failures.append(str(reason) if path in str(reason) else f"{path}: {reason}")
        self.model.bar.update(self.n)

    def read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Image (C, H, W) uint8; what is to be made of it (1, H, W), 1 there, or None for all. Raises DatasetError."""
        refuse_existing(outputs(self.base[name], self.options, self.n), self.options)
        image = read(self.root / name, self.config.channels)
        if "inpaint" not in self.tasks:
            return image, None
        if self.options.masks is None:
            hole = read_alpha(self.root / name) < 255
        elif stem(name) in self.masks:
            hole = read(self.masks[stem(name)], 1) >= 128
        else:
            raise data.DatasetError(f"no mask of this name is in {self.options.masks}")
        if hole.shape[1:] != image.shape[1:]:
            (height, width), (h, w) = image.shape[1:], hole.shape[1:]
            raise data.DatasetError(f"it is {width}x{height}, its mask {w}x{h}")
        if not hole.any() and self.tasks == ["inpaint"]:
            raise data.DatasetError("nothing is to be made: no --masks that is white there, no transparency")
        return image, hole.float() if hole.any() else None

    def restore(self, group: list):
        """Images [(name, image, hole)] of one size -> files."""
        names, images, holes = zip(*group)
        zlo, hole, n = data.to_float(torch.stack(images)), None if holes[0] is None else torch.stack(holes), self.n
        if self.factor > 1:
            zlo = enlarge(zlo, self.factor, self.config.damage.up)
        zlo, hole = (None if x is None else x.repeat_interleave(n, 0) for x in (zlo, hole))
        streams = [stream for name in names for stream in noise(self.options, name, n)]
        paths = [outputs(self.base[name], self.options, n) for name in names]
        made = []
        try:
            for rows, sample, frames in self.model(zlo, hole, self.model.labels * len(zlo), streams):
                made += sample
                for row, i in enumerate(range(rows.start, rows.stop) if frames else ()):
                    save_trace(paths[i // n][i % n].removesuffix(".png"), frames, slice(row, row + 1))
        except torch.OutOfMemoryError:
            for name in names:
                self.fail(name, "out of GPU memory; lower --batch-size or --tile")
            return
        for i, those in enumerate(paths):
            pictures = made[n * i:n * (i + 1)]
            if self.options.interpolate:
                pictures.append(grid(data.to_float(torch.stack(pictures)), columns=n))
            elif n > 1:
                levels = torch.stack(pictures).float()
                std = levels.var(0).mean(0, keepdim=True).sqrt()  # over the draws; root mean square over the channels
                pictures += [levels.mean(0).round().byte(), (8 * std).round().clamp(max=255).byte()]
            for path, picture in zip(those, pictures):
                save(path, picture)


# ---------------------------------------------------------------------------------------------------------- generation

def generate(model: Model) -> int:
    """`count` images of each label, as files and as grid.png, a row a label. The i-th of each share their noise."""
    o, c, labels, count = model.options, model.config, model.labels, model.options.count
    if "generate" not in parts(c.task):
        raise ValueError(f"count = {count}: the run restores damaged images (task {c.task}); --input FOLDER does")
    folder = output_folder(o, "generated")
    kinds = ["image" if i is None else re.sub(r"[^\w-]+", "-", model.classes[i]) for i in labels]
    paths = [f"{folder}/{kind}_{i + 1:04d}.png" for kind in kinds for i in range(count)]
    refuse_existing([*paths, f"{folder}/grid.png", f"{folder}/grid_trace.png", f"{folder}/grid_trace.gif"], o)
    label, streams = [i for i in labels for _ in range(count)], noise(o, "", count) * len(labels)
    blank, made = torch.zeros(1, c.channels, c.image_size, c.image_size).expand(len(paths), -1, -1, -1), []
    model.bar.reset(len(paths))
    for rows, sample, frames in model(blank, blank[:, :1] + 1, label, streams):
        for path, picture in zip(paths[rows], sample):
            save(path, picture)
        if frames and not made:  # of the first batch
            save_trace(f"{folder}/grid", frames, slice(16))
        made.append(sample)
    columns = count if len(labels) > 1 or o.interpolate else None
    save(f"{folder}/grid.png", grid(data.to_float(torch.cat(made)), columns))
    print(f"{len(paths)} images and grid.png in {folder}: {model.cost()}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some images could not be restored or it broke off, 2 bad input, 130 interrupted."""
    try:
        o = parse(Options, sys.argv[1:] if arguments is None else arguments, __doc__)
        o.check()
        return export(o) if o.export else Restorer(Model(o)).run() if o.input else generate(Model(o))
    except (ValueError, data.DatasetError) as failure:
        tqdm.write(f"sample.py: {failure}", sys.stderr)
        return 2
    except (FloatingPointError, OSError) as failure:  # a network that is not finite; a full disk
        tqdm.write(f"sample.py: {failure}", sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        tqdm.write("sample.py: out of GPU memory; lower --batch-size", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
