"""Uses a trained run: restores damaged images, or makes new ones. All that describes the model comes from the run.

    python sample.py RUN --input photos --output restored          every image below a folder, or one file
    python sample.py RUN --count 64 --label cat --guidance 2.5     new images; --label all: a row a class
    python sample.py RUN --export model.safetensors                weights and settings in one file, which is a RUN too

RUN is a run's folder, a checkpoint or an exported file. The task sr takes low-resolution files, every other one
files of full size; a mixture with sr takes those too, and low-resolution files with --factor. Restored images keep
their names and become PNG. Transparency is laid over white; for inpainting without --masks it is what gets filled in.
What could not be restored is listed at the end. An image's noise depends on the seed, its name or number and the draw;
the rest of its batch changes the result by rounding only (dopri5: by its tolerance).
"""
if __name__ == "__main__":
    from support.output import quiet_interrupt
    quiet_interrupt()

import os
import re
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor

import ode_int
from images import DatasetError, SettingsError, files, one_line
from images.data import MAX_BATCH
from images.files import ENDINGS, list_images, read_image, refuse_outputs, save_png, to_image, user_path
from images.pictures import deviation, grid, row_titles, titled, to_float, to_uint8
from support import bounds
from support.bounds import Count, Positive, Seed, between
from support.checkpoints import EXPORTED, export, open_run
from support.command_line import parse
from support.machine import failed, partition
from support.noise import noise_of
from support.output import unbreakable_output
from support.progress import Progress
from support.sampler_settings import MethodFlags, given_flags
from support.trace import Frames, save_trace
from support.trained_model import Model, batched
from trainer import Config

GRID = 1024  # images that grid.png shows


@dataclass
class Options(MethodFlags):
    """What to do with the run: --input restores, --count makes new images, --export writes the weights."""

    run: tyro.conf.Positional[str]  # a run's folder, a checkpoint, or an exported .safetensors file
    input: str | None = None  # damaged images: a folder, searched with the folders in it, or a file
    count: Annotated[int, between(1, 10**7)] | None = None  # number of images to make, of each label
    export: str | None = None  # file to write, with the ending .safetensors
    half: bool = False  # --export: weights in bf16, a file of half the size
    output: str | None = None  # folder of the pictures; None: a new one in the run's, of an exported file in runs
    overwrite: bool = False  # replacement of files that exist; else they are left as they are

    label: str | None = None  # class name or number, several joined by commas, or all; None: the network sees no label
    # classifier-free guidance: 0 ignores the label, 1 follows it, above 1 exaggerates it; None: as the run
    guidance: float | None = None
    seed: Seed = 0  # seed of the noise
    # solver of the method's ODE; auto: the method's own sampler; None: as the run, but for an interpolant midpoint in 5
    # steps, which ends within one grey level of dopri5 at a tenth of the evaluations (benchmarks/README.md)
    solver: Literal["auto", "dopri5", "euler", "midpoint", "heun", "rk4"] | None = None
    steps: Count | None = None  # steps of the sampler; None: as the run
    tolerance: Positive | None = None  # tolerance of dopri5, absolute and relative; None: as the run
    ema: bool = True  # averaged weights; --no-ema: the raw ones
    trace: bool = False  # pictures of the iterative process too: a strip (states above clean estimates) and a GIF
    interpolate: tuple[int, int] | None = None  # two seeds: images, or draws, go from the noise of one to the other's
    swap: tuple[int, int] | None = None  # UDPM: LEVEL SEED, that level's noise is the other seed's
    perturb: tuple[int, float] | None = None  # UDPM: LEVEL STRENGTH (0 to 1), that level's noise is redrawn in part

    # factor by which the result is larger, where the run knows several: 4 or 2; 1 restores at the image's own size
    factor: int | None = None
    # picture of the image beside its restoration, NAME_before_after.png; auto: where --input is one file
    before_after: Literal["auto", "on", "off"] = "auto"
    # folder of masks for inpaint, named as the images, or one mask for all; white is filled in, transparent is kept
    masks: str | None = None
    # restorations of each image; also writes their mean, and their standard deviation (white: 32 or more of 255 levels)
    draws: Annotated[int, between(1, 10**6)] = 1
    # side in pixels of the overlapping tiles in which an image with a side of more than two tiles passes the network:
    # up to there one piece is better, and cheaper. None: the side trained on; 0: one piece always
    tile: Annotated[int, between(0, 10**9)] | None = None

    # images at a time; those larger than trained on count as several
    batch_size: Annotated[int, between(1, MAX_BATCH)] = 64
    partition: str | None = None  # share of the images: 2/4 is that of the third of four processes; None: torchrun's
    device: str = "auto"  # device: auto (cuda if there is one), cuda, cuda:1 or cpu
    precision: Literal["auto", "bf16", "fp16", "fp32"] | None = None  # precision of the activations; None: as the run

    def check(self):
        """Raises SettingsError, one line that names field, value and what is allowed."""
        def need(name, good, allowed):
            value = getattr(self, name)
            bounds.require(self, name, value is None or good(value), allowed)

        bounds.check(self)
        if [self.input, self.count, self.export].count(None) != 2:
            raise SettingsError("one of --input (restore), --count (make images) and --export is needed, and one only")
        need("guidance", lambda g: g == 1 or self.label, "1, and any other number with a --label only")
        need("draws", lambda n: n == 1 or self.input, "more than 1 with --input only")
        for name in ("interpolate", "perturb"):  # the first is the one that the others differ from
            need(name, lambda _: max(self.draws, self.count or 1) > 1, "with --count or --draws above 1 only")
        need("interpolate", lambda _: not self.swap and not self.perturb, "one of --interpolate, --swap and --perturb")
        need("swap", lambda _: not self.perturb, "one of --interpolate, --swap and --perturb")
        need("perturb", lambda edit: 0 <= edit[1] <= 1, "a level, and a strength from 0 to 1")
        for name in ("input", "output"):
            need(name, lambda path: path != "", "a path")
        need("masks", lambda _: self.input, "a path, with --input only")
        need("factor", lambda _: self.input, "a number with --input only")
        need("before_after", lambda which: which != "on" or self.input, "on with --input only")
        need("half", lambda half: not half or self.export, "True with --export only")
        need("output", lambda path: Path(path).suffix.lower() not in ENDINGS, "a folder")
        need("export", lambda path: Path(path).suffix == EXPORTED, "a name that ends in .safetensors")


def open_model(run: str | Path, *, ema: bool = True, **how) -> Model:
    """A run's folder, a checkpoint or an exported file -> Model, whose arguments `how` are. Raises SettingsError."""
    return Model(open_run(run, Config), ema=ema, **how)


# --------------------------------------------------------------------------------------------------------------- files

def stem(name: str) -> str:
    return os.path.splitext(name)[0]


def output_folder(o: Options, kind: str) -> Path:
    if o.output is not None:
        return user_path(o.output)
    if partition(o.partition)[1] > 1:  # whose clocks differ
        raise SettingsError("output = None: allowed is a folder, where several processes share the images")
    run = Path(o.run).resolve()
    folder = run if run.is_dir() else run.parent.parent if run.parent.name == "checkpoints" else run.parent
    if run.suffix == EXPORTED:  # what lies beside it is not its own
        folder = Path("runs")
    return folder / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"


# ----------------------------------------------------------------------------------------------------------- restoring

@dataclass
class Draw:
    """One restoration to make."""

    name: str  # of the file
    number: int  # among the draws of its image
    image: Tensor  # (C, H, W) uint8
    hole: Tensor | None  # (1, H, W), 1 where it is to be made; None: everywhere

    @property
    def kind(self) -> tuple:
        """Draws of one kind make a batch."""
        return self.image.shape, self.hole is None


class Restorer:
    """Restores files, neighbours of equal size together. What fails does not stop the others; it is told at the end."""

    def __init__(self, o: Options, model: Model):
        self.options, self.model, self.labels = o, model, model.label_numbers(o.label)
        self.failures, self.taken, self.made = {}, set(), defaultdict(list)  # by name; paths; draws by name
        if model.tasks == ["generate"]:
            raise SettingsError(f"input = {o.input!r}: the run makes images from noise; --count N does")
        if len(self.labels) > 1:
            raise SettingsError(f"label = {o.label!r}: allowed is one, for all images")
        if o.masks is not None and "inpaint" not in model.tasks:
            raise SettingsError(f"masks = {o.masks!r}: the run's task, {model.config.task}, takes none")
        path, self.folder = user_path(o.input), output_folder(o, "restored")
        self.before_after = o.before_after == "on" or (o.before_after == "auto" and path.is_file())
        self.root, names = (path.parent, [path.name]) if path.is_file() else (path, list_images(path))
        folder = Path(os.path.realpath(self.folder))
        if folder == Path(os.path.realpath(self.root)):
            raise SettingsError(f"output = {o.output!r}: allowed is another folder than the input's")
        number, count = partition(o.partition)
        inputs = [name for name in names if folder not in Path(os.path.realpath(self.root / name)).parents]
        self.names = inputs[number::count]
        if o.masks is not None:
            masks = user_path(o.masks)
            if masks.is_file():  # one for all
                self.masks = dict.fromkeys(map(stem, names), masks)
            else:
                self.masks = {stem(name): masks / name for name in list_images(masks)}

    def run(self) -> int:
        """Exit status: 0 all are restored, 1 some are not."""
        progress = Progress(self.model, self.options.draws * len(self.names), self.options.trace)
        try:
            some = []  # the next batch
            for draw in self.draws():
                if some and (draw.kind != some[0].kind or len(some) == self.model.at_a_time(*draw.image.shape[1:])):
                    self.restore(some)
                    progress.bar.update(len(some))
                    some = []
                some.append(draw)
            if some:
                self.restore(some)
                progress.bar.update(len(some))
            done = f"{len(self.names) - len(self.failures)} of {len(self.names)} images restored"
            print(f"{done}, in {self.folder}: {progress.cost()}")
        finally:  # also when it is interrupted
            for failure in self.failures.values():
                print(f"not restored: {failure}", file=sys.stderr)
        return int(bool(self.failures))

    def draws(self):
        """Yields the draws of each file in turn, and notes the files that can't be restored."""
        o = self.options
        for name in self.names:
            try:
                paths = self.outputs(name)
                if twice := self.taken.intersection(paths):
                    raise DatasetError(f"{self.root / name}: another image of its name takes {min(twice)}")
                refuse_outputs(paths, o.overwrite)
                image = read_image(self.root / name, self.model.config.channels)
                hole = self.read_hole(name, image) if "inpaint" in self.model.tasks else None
                self.model.check_size(*image.shape[1:], name, o.trace)
                self.taken.update(paths)
            except SettingsError as failure:
                self.failures[name] = failure
                continue
            for i in range(o.draws):
                yield Draw(name, i, image, hole)

    def outputs(self, name: str) -> list[str]:
        """The files to be written for an input: its draws, then the others."""
        n, base = self.options.draws, f"{self.folder}/{stem(name)}"
        singles = [base] if n == 1 else [f"{base}_{i + 1}" for i in range(n)]
        paths = [single + ".png" for single in singles]
        if n > 1:
            paths += [base + "_mean.png", base + "_std.png"]
        if self.before_after:
            paths += [single + "_before_after.png" for single in singles]
        if self.options.trace:
            paths += [single + end for single in singles for end in ("_trace.png", "_trace.gif")]
        return paths

    def read_hole(self, name: str, image: Tensor) -> Tensor | None:
        path = self.root / name
        if self.options.masks is None:
            hole = files.read_alpha(path) < 255
        elif stem(name) in self.masks:
            hole = files.read_mask(self.masks[stem(name)])
        else:
            raise DatasetError(f"{path}: no mask of this name is in {self.options.masks}")
        if hole.shape[1:] != image.shape[1:]:
            (_, height, width), (_, h, w) = image.shape, hole.shape
            raise DatasetError(f"{path}: it is {width}x{height}, its mask {w}x{h}")
        if not hole.any() and (self.options.masks is not None or self.model.tasks == ["inpaint"]):
            raise DatasetError(f"{path}: nothing to fill in: no --masks that is white there, no transparency")
        return hole.float() if hole.any() else None

    def restore(self, draws: list[Draw]):
        """Draws of one kind -> files."""
        o, zlo = self.options, self.model.full_size(to_float(torch.stack([draw.image for draw in draws])))
        hole = None if draws[0].hole is None else torch.stack([draw.hole for draw in draws])
        streams = [noise_of(o, self.model, draw.name, draw.number, o.draws) for draw in draws]
        frames = Frames(zlo.shape[2:]) if o.trace else None
        try:
            sample = self.model.sample(zlo, hole, self.labels * len(zlo), streams, frames)
        except (torch.OutOfMemoryError, ode_int.SolverError) as failure:
            reason = failure
            if isinstance(failure, torch.OutOfMemoryError):
                reason = "out of GPU memory; lower --batch-size or --tile"
            self.failures |= {draw.name: f"{self.root / draw.name}: {reason}" for draw in draws}
            return
        for row, (draw, picture) in enumerate(zip(draws, to_uint8(sample))):
            name, i = draw.name, draw.number
            try:
                paths = self.outputs(name)
                save_png(Path(paths[i]), to_image(picture))
                if self.before_after:
                    self.save_before_after(paths[i], to_uint8(zlo[row]), picture)
                if o.trace:
                    save_trace(paths[i], frames.until(sample), slice(row, row + 1))
                if o.draws > 1:
                    self.made[name].append(picture)
                    if len(self.made[name]) == o.draws:
                        self.save_statistics(name, torch.stack(self.made.pop(name)).float())
            except OSError as failure:  # a full disk, say
                self.failures[name] = f"{self.root / name}: {one_line(failure)}"

    def save_before_after(self, path: str, before: Tensor, after: Tensor):
        """Both (C, H, W) uint8, side by side: the image as the network got it, and what became of it."""
        if self.model.config.channels == 1:
            before, after = before.expand(3, -1, -1), after.expand(3, -1, -1)
        pictures = [x.permute(1, 2, 0).numpy() for x in (before, after)]
        save_png(Path(stem(path) + "_before_after.png"), Image.fromarray(titled(["before", "after"], pictures)))

    def save_statistics(self, name: str, draws: Tensor):
        """Pictures of the mean over the draws (n, C, H, W) in levels of 255, and of their standard deviation."""
        n, paths = len(draws), self.outputs(name)
        save_png(Path(paths[n]), to_image(draws.mean(0).round().byte()))
        save_png(Path(paths[n + 1]), to_image((8 * deviation(draws)).round().clamp(max=255).byte()))


# ---------------------------------------------------------------------------------------------------------- generation

def generate(o: Options, model: Model) -> int:
    """`count` images of each label, as files and, the first GRID of them, as grid.png, a row a label.

    The i-th images of all labels share their noise.
    """
    labels, count = model.label_numbers(o.label), o.count
    if "generate" not in model.tasks:
        raise SettingsError(f"count = {count}: the run restores damaged images (task {model.config.task}), "
                            "which --input FOLDER names")
    folder, done, shown = output_folder(o, "generated"), 0, []
    titles = ["image" if label is None else " ".join(model.classes[label].split()) for label in labels]
    kinds = [re.sub(r"[^\w-]+", "-", title) for title in titles]
    if len(set(kinds)) < len(kinds):  # names that differ in their punctuation only
        kinds = [f"{kind}-{label}" for kind, label in zip(kinds, labels)]
    paths = [Path(f"{folder}/{kind}_{i + 1:04d}.png") for kind in kinds for i in range(count)]
    grids = [f"{folder}/grid{end}" for end in (".png", "_trace.png", "_trace.gif")]

    every = [(label, noise_of(o, model, "", i, count)) for label in labels for i in range(count)]
    number, of = partition(o.partition)
    every, mine, side = every[number::of], paths[number::of], model.config.image_size
    refuse_outputs([*map(str, mine), *(grids if of == 1 else [])], o.overwrite)  # no other process has all for a grid
    progress = Progress(model, len(mine), o.trace)
    of_each = min(count, max(1, GRID // len(labels)))  # images that the grid shows; all would fill the memory
    for some in batched(every, model.at_a_time(side, side)):
        frames = Frames((side, side)) if o.trace and of == 1 else None
        sample = model.sample(*model.nothing(len(some)), *zip(*some), frames)
        if frames is not None and not done:
            save_trace(f"{folder}/grid.png", frames.until(sample), slice(16))
        for picture in to_uint8(sample):
            save_png(mine[done], to_image(picture))
            if of == 1 and done % count < of_each:
                shown.append(picture)
            done += 1
        progress.bar.update(len(some))
    print(f"{len(mine)} images in {folder}: {progress.cost()}")
    if of > 1:
        return 0
    picture = grid(to_float(torch.stack(shown)), of_each if len(labels) > 1 or o.interpolate else None)
    if len(labels) > 1:
        picture = titled(["", "samples"], [row_titles(titles, len(picture)), picture])
    else:
        picture = titled(["samples" if labels == [None] else titles[0]], [picture])
    save_png(folder / "grid.png", Image.fromarray(picture))
    return 0


def export_model(o: Options) -> int:
    if Path(o.run).suffix == EXPORTED:
        raise SettingsError(f"run = {o.run!r}: allowed is a run or a checkpoint, for this is an exported file already")
    refuse_outputs([o.export], o.overwrite)
    size = export(open_run(o.run, Config), Path(o.export), o.ema, o.half)
    print(f"{'averaged' if o.ema else 'raw'} weights, {size / 1e6:.1f} MB, in {o.export}")
    return 0


def run(o: Options, arguments: list[str]) -> int:
    if o.export:
        return export_model(o)
    opened = open_run(o.run, Config)
    c = opened.config
    settings = {c.method: given_flags(o, arguments, c, {c.method})}
    model = Model(opened, ema=o.ema, solver=o.solver, steps=o.steps, tolerance=o.tolerance, guidance=o.guidance,
                  factor=o.factor, tile=o.tile, batch_size=o.batch_size, device=o.device, precision=o.precision,
                  **settings)
    if model.num_classes and not c.trains_null_label and o.label is None:
        print("note: images without labels were no part of the training; give a --label")
    return Restorer(o, model).run() if o.input else generate(o, model)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some images could not be restored or it broke off, 2 bad input, 130 interrupted."""
    unbreakable_output()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        o = parse(Options, arguments, __doc__)
        o.check()
        return run(o, arguments)
    except (ValueError, ArithmeticError, MemoryError, RuntimeError, OSError) as failure:
        return failed("sample.py", failure, "lower --batch-size")
    except KeyboardInterrupt:
        print("sample.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
