"""Uses a trained run: restores damaged images, or makes new ones. All that describes the model comes from the run.

    python sample.py RUN --input photos --output restored          every image below a folder, or one file
    python sample.py RUN --count 64 --label cat --guidance 2.5     new images; --label all: a row a class
    python sample.py RUN --export model.safetensors                weights and settings in one file, which is a RUN too

RUN is a run's folder, a checkpoint or an exported file. The task sr takes low-resolution files, every other one
files of full size; a mixture with sr takes those too, and low-resolution files with --factor. Restored images keep
their names, EXIF, transparency and greyness, and become PNG unless --format says otherwise. For inpainting without
--masks the transparent part is filled in. What is finished is skipped, so an interrupted command goes on; what could
not be restored is listed at the end. An image's noise depends on the seed, its name or number and the draw; the rest
of its batch changes the result by rounding only (dopri5: by its tolerance).
"""
if __name__ == "__main__":
    from support.output import quiet_interrupt
    quiet_interrupt()

import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image

from images import SettingsError
from images.data import MAX_BATCH
from images.files import ENDINGS, refuse_outputs, save_image, to_image
from images.pictures import grid, row_titles, titled, to_float, to_uint8
from support import bounds
from support.bounds import Count, Positive, Seed, between
from support.checkpoints import EXPORTED, export, open_run
from support.command_line import parse
from support.machine import failed, partition
from support.noise import noise_of
from support.output import unbreakable_output
from support.progress import Progress
from support.restorer import Restorer, output_folder
from support.sampler_settings import MethodFlags, given_flags
from support.trace import Frames, save_trace
from support.trained_model import Model, Precision, Solver, batched
from trainer import Config

GRID = 1024  # images that grid.png shows


@dataclass
class Options(MethodFlags):
    """What to do with the run: --input restores, --count makes new images, --export writes the weights."""

    run: tyro.conf.Positional[str]  # a run's folder, a checkpoint, or an exported .safetensors file
    # damaged images: files, folders, which are searched with the folders in them, and patterns as '*.jpg'
    input: Annotated[tuple[str, ...] | None, tyro.conf.arg(aliases=["-i"])] = None
    count: Annotated[int, between(1, 10**7)] | None = None  # number of images to make, of each label
    export: str | None = None  # file to write, with the ending .safetensors
    half: bool = False  # --export: weights in bf16, a file of half the size
    # folder of the pictures, or a file's name for the only one; None: a new folder in the run's, of an exported file in
    # runs
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    overwrite: bool = False  # replacement of files that exist; else what is finished is skipped
    format: Literal["png", "jpg", "webp"] = "png"  # format of the restored pictures
    quality: Annotated[int, between(1, 100)] = 95  # quality of jpg and webp
    suffix: str = ""  # end of the restored pictures' names, before the format's

    label: str | None = None  # class name or number, several joined by commas, or all; None: the network sees no label
    # classifier-free guidance: 0 ignores the label, 1 follows it, above 1 exaggerates it; None: as the run
    guidance: float | None = None
    seed: Seed = 0  # seed of the noise
    # solver of the method's ODE; auto: the method's own sampler; None: as the run, but for an interpolant midpoint in 5
    # steps, which ends within one grey level of dopri5 at a tenth of the evaluations (benchmarks/README.md)
    solver: Solver | None = None
    steps: Count | None = None  # steps of the sampler; None: as the run
    tolerance: Positive | None = None  # tolerance of dopri5, absolute and relative; None: as the run
    ema: bool = True  # averaged weights; --no-ema: the raw ones
    trace: bool = False  # pictures of the iterative process too: a strip (states above clean estimates) and a GIF
    interpolate: tuple[int, int] | None = None  # two seeds: images, or draws, go from the noise of one to the other's
    perturb: tuple[int, float] | None = None  # UDPM: LEVEL STRENGTH (0 to 1), that level's noise is redrawn in part

    # factor by which the result is larger; 1 restores at the image's own size. One that the run does not know, as 3 or
    # 1.5, is made by its next larger one and then reduced. None: the run's own, of a mixture 1
    factor: Positive | None = None
    strength: Annotated[float, between(0, 1)] = 1.0  # share of the restoration in the result, the rest is the input
    # picture of the image beside its restoration, NAME_before_after.png; auto: where --input is one file
    before_after: Literal["auto", "on", "off"] = "auto"
    # folder of masks for inpaint, named as the images, or one mask for all; white is filled in, transparent is kept
    masks: str | None = None
    # restorations of each image; also writes their mean, and their standard deviation (white: 32 or more of 255 levels)
    draws: Annotated[int, between(1, 10**6)] = 1
    # side in pixels of the overlapping tiles in which an image with a side of more than two tiles passes the network;
    # 0: one piece always. None: the side trained on, or 256 after training on parts of photographs
    tile: Annotated[int, between(0, 10**9)] | None = None

    # images at a time; those larger than trained on count as several
    batch_size: Annotated[int, between(1, MAX_BATCH)] = 64
    partition: str | None = None  # share of the images: 2/4 is that of the third of four processes; None: torchrun's
    device: str = "auto"  # device: auto (cuda if there is one), cuda, cuda:1 or cpu
    precision: Precision | None = None  # precision of the activations; None: as the run

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
        need("interpolate", lambda _: not self.perturb, "None with --perturb")
        need("perturb", lambda edit: 0 <= edit[1] <= 1, "a level, and a strength from 0 to 1")
        need("input", all, "paths")
        need("output", lambda path: path != "", "a path")
        need("masks", lambda _: self.input, "a path, with --input only")
        need("factor", lambda _: self.input, "a number with --input only")
        need("before_after", lambda which: which != "on" or self.input, "on with --input only")
        need("half", lambda half: not half or self.export, "True with --export only")
        need("output", lambda path: self.input or Path(path).suffix.lower() not in ENDINGS, "a folder")
        need("export", lambda path: Path(path).suffix == EXPORTED, "a name that ends in .safetensors")


def open_model(run: str | Path, *, ema: bool = True, **how) -> Model:
    """A run's folder, a checkpoint or an exported file -> Model, whose arguments `how` are. Raises SettingsError."""
    return Model(open_run(run, Config), ema=ema, **how)


# ---------------------------------------------------------------------------------------------------------- generation

def generate(o: Options, model: Model) -> int:
    """`count` images of each label, as files and, the first GRID of them, as grid.png, a row a label.

    The i-th images of all labels share their noise.
    """
    labels, count = model.label_numbers(o.label), o.count
    if "generate" not in model.tasks:
        raise SettingsError(f"count = {count}: the run restores damaged images (task {model.config.task}), "
                            "which --input FOLDER names")
    folder, side = output_folder(o, "generated"), model.config.image_size
    titles = ["image" if label is None else " ".join(model.classes[label].split()) for label in labels]
    kinds = [re.sub(r"[^\w-]+", "-", title) for title in titles]
    if len(set(kinds)) < len(kinds):  # names that differ in their punctuation only
        kinds = [f"{kind}-{label}" for kind, label in zip(kinds, labels)]
    number, of = partition(o.partition)
    ends = (".png", "_trace.png", "_trace.gif") if of == 1 else ()  # one of several processes has not all for a grid
    grids = [f"{folder}/grid{end}" for end in ends]

    jobs = [(f"{folder}/{kind}_{i + 1:04d}.png", i, label, noise_of(o, model, "", i, count))
            for kind, label in zip(kinds, labels) for i in range(count)][number::of]
    refuse_outputs([path for path, *_ in jobs] + grids, o.overwrite)
    progress, shown = Progress(model, len(jobs), o.trace), []
    of_each = min(count, max(1, GRID // len(labels)))  # images that the grid shows; all would fill the memory
    for some in batched(jobs, model.at_a_time(side, side)):
        paths, numbers, each_label, noise = zip(*some)
        frames = Frames((side, side)) if o.trace and grids and not shown else None
        sample = model.sample(*model.nothing(len(some)), each_label, noise, frames)
        if frames is not None:
            save_trace(grids[0], frames.until(sample), slice(16))
        for path, i, picture in zip(paths, numbers, to_uint8(sample)):
            save_image(path, to_image(picture))
            if i < of_each:
                shown.append(picture)
        progress.finished(len(some))
    print(f"{len(jobs)} images in {folder}: {progress.cost()}")
    if grids:
        picture = grid(to_float(torch.stack(shown)), of_each if len(labels) > 1 or o.interpolate else None)
        if len(labels) > 1:
            picture = titled(["", "samples"], [row_titles(titles, len(picture)), picture])
        else:
            picture = titled(titles, [picture])
        save_image(grids[0], Image.fromarray(picture))
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
