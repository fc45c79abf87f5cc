"""What `sample.py --input` does: image files in, restored ones out."""
import os
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import ode_int
from images import DatasetError, SettingsError, files, one_line
from images.files import ENDINGS, list_images, refuse_outputs, save_image, to_image, to_tensor, user_path
from images.photograph import WRITTEN, Photograph, read_photograph
from images.pictures import deviation, titled, to_float, to_uint8
from support.machine import partition
from support.noise import noise_of
from support.progress import Progress
from support.trace import Frames, save_trace
from support.trained_model import Model


def stem(name: str) -> str:
    return os.path.splitext(name)[0]


def output_folder(o, kind: str) -> Path:
    """Where the pictures go, `kind` being restored or generated. o: sample.Options. Raises SettingsError."""
    if o.output is not None:
        return user_path(o.output)
    if partition(o.partition)[1] > 1:  # whose clocks differ
        raise SettingsError("output = None: allowed is a folder, where several processes share the images")
    run, folder = Path(o.run).resolve(), Path("runs")  # of a file elsewhere, whose neighbours are not its own
    if run.is_dir():
        folder = run
    elif run.parent.name == "checkpoints":
        folder = run.parent.parent
    return folder / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"


def find_images(inputs: tuple[str, ...]) -> tuple[dict[Path, str], set[str]]:
    """Files, folders and patterns -> each image's path and its name below its folder; and the real paths of those
    folders. Raises SettingsError."""
    found, folders = {}, set()
    for text in inputs:
        path = user_path(text)
        paths = [path] if os.path.lexists(path) else list(map(Path, sorted(glob(str(path), recursive=True))))
        if not paths:
            raise SettingsError(f"input = {text!r}: there is no such file or folder")
        for path in paths:
            folder, names = (path, list_images(path)) if path.is_dir() else (path.parent, [path.name])
            found |= {folder / name: name for name in names}
            folders.add(os.path.realpath(folder))
    return found, folders


def without_results(images: dict[Path, str], folders: set[str], o, output: Path) -> dict[Path, str]:
    """Of find_images, the images but for what this command has made before. Raises SettingsError.

    o: sample.Options. output: the folder of the results.
    """
    output = Path(os.path.realpath(output))
    if str(output) not in folders:
        return {path: name for path, name in images.items() if output not in Path(os.path.realpath(path)).parents}
    if not o.suffix:
        raise SettingsError(f"output = {o.output!r}: allowed is another folder than the input's, or a --suffix")
    return {path: name for path, name in images.items() if not stem(name).endswith(o.suffix)}


def output_names(names: dict[Path, str], suffix: str) -> dict[Path, str]:
    """Names below an input's folder -> those of the results, without ending: a.jpg and a.png become a_jpg and a_png."""
    stems, made, taken = Counter(map(stem, names.values())), {}, set()
    for path, name in names.items():
        base = stem(name) if stems[stem(name)] == 1 else stem(name) + path.suffix.replace(".", "_")
        while base in taken:
            base += "_2"
        taken.add(base)
        made[path] = base + suffix
    return made


@dataclass
class Draw:
    """One restoration to make."""

    path: Path  # of the file
    number: int  # among the draws of its image
    photo: Photograph
    hole: Tensor | None  # (1, H, W), 1 where it is to be made; None: everywhere

    @property
    def kind(self) -> tuple:
        """Draws of one kind make a batch."""
        return self.photo.pixels.shape, self.hole is None


class Restorer:
    """Restores files, neighbours of equal size together. What fails does not stop the others; it is told at the end."""

    def __init__(self, o, model: Model):
        """o: sample.Options. Raises SettingsError."""
        self.options, self.model, self.labels = o, model, model.label_numbers(o.label)
        self.failures, self.made = {}, defaultdict(list)  # by path: why, and the draws so far
        self.notes = Counter()
        if model.tasks == ["generate"]:
            raise SettingsError(f"input = {o.input}: the run makes images from noise; --count N does")
        if len(self.labels) > 1:
            raise SettingsError(f"label = {o.label!r}: allowed is one, for all images")
        if o.masks is not None and "inpaint" not in model.tasks:
            raise SettingsError(f"masks = {o.masks!r}: the run's task, {model.config.task}, takes none")
        if o.strength < 1 and "inpaint" in model.tasks:
            raise SettingsError(f"strength = {o.strength}: allowed is 1 for a run that fills holes")
        images, folders = find_images(o.input)
        one = len(images) == 1 and not user_path(o.input[0]).is_dir()
        self.before_after = o.before_after == "on" or (o.before_after == "auto" and one)
        self.output, self.ending = output_folder(o, "restored"), o.format
        if o.output is not None and self.output.suffix.lower() in ENDINGS:  # the name of the only one
            self.ending = self.output.suffix[1:].lower()
            if len(images) > 1 or self.ending not in WRITTEN:
                raise SettingsError(f"output = {o.output!r}: allowed is a folder, or for one input a name with the "
                                    f"ending {', '.join(WRITTEN)}")
            self.below = images
            self.bases = dict.fromkeys(images, stem(str(self.output)))
        else:
            self.below = without_results(images, folders, o, self.output)  # each image's name below its folder
            names = output_names(self.below, o.suffix)
            self.bases = {path: f"{self.output}/{name}" for path, name in names.items()}  # of results, without ending
        number, count = partition(o.partition)
        mine = list(self.below)[number::count]
        self.paths = [path for path in mine if o.overwrite or not all(map(os.path.exists, self.outputs(path)[0]))]
        self.skipped = len(mine) - len(self.paths)
        self.masks = None
        if o.masks is not None and user_path(o.masks).is_dir():
            self.masks = {stem(name): user_path(o.masks) / name for name in list_images(user_path(o.masks))}

    def run(self) -> int:
        """Exit status: 0 all are restored, 1 some are not."""
        self.progress = Progress(self.model, self.options.draws * len(self.paths), self.options.trace)
        try:
            for draws in self.batches():
                self.restore(draws)
                self.progress.finished(len(draws))
            done, total = len(self.paths) - len(self.failures), len(self.paths) + self.skipped
            print(f"{done} of {total} images restored, in {self.output}: {self.progress.cost()}")
        finally:  # also when it is interrupted
            if self.skipped:
                print(f"{self.skipped} were there already (--overwrite makes them again)")
            for note, count in self.notes.items():
                print(f"note: {note} ({count} {'image' if count == 1 else 'images'})")
            for failure in self.failures.values():
                print(f"not restored: {failure}", file=sys.stderr)
        return int(bool(self.failures))

    def batches(self):
        """Yields the draws of each file in turn, neighbours of one kind together, and notes what can't be restored."""
        o, draws = self.options, []
        for path in self.paths:
            try:
                photo, hole = self.read(path)
            except SettingsError as failure:
                self.failures[path] = failure
                self.progress.finished(o.draws)
                continue
            self.notes.update(photo.notes)
            if photo.alpha and self.ending in ("jpg", "jpeg"):
                self.notes["transparency is laid over white, which a JPEG can't hold"] += 1
            for i in range(o.draws):
                draw = Draw(path, i, photo, hole)
                at_a_time = self.model.at_a_time(*photo.pixels.shape[1:])
                if draws and (draw.kind != draws[0].kind or len(draws) == at_a_time):
                    yield draws
                    draws = []
                draws.append(draw)
        if draws:
            yield draws

    def read(self, path: Path) -> tuple[Photograph, Tensor | None]:
        """The image and its hole, once it is known that the result can be made and written. Raises SettingsError."""
        made, beside = self.outputs(path)
        refuse_outputs(made + beside, overwrite=True)
        holes = "inpaint" in self.model.tasks
        photo = read_photograph(path, self.model.config.channels, holes)
        hole = self.read_hole(path, photo.pixels) if holes else None
        self.model.check_size(*photo.pixels.shape[1:], path.name, self.options.trace)
        return photo, hole

    def outputs(self, path: Path) -> tuple[list[str], list[str]]:
        """The files to be written for an input: its draws, their mean and deviation; and what is shown beside them."""
        o, base = self.options, self.bases[path]
        singles = [base] if o.draws == 1 else [f"{base}_{i + 1}" for i in range(o.draws)]
        made = [f"{single}.{self.ending}" for single in singles]
        if o.draws > 1:
            made += [f"{base}_mean.{self.ending}", base + "_std.png"]
        ends = ["_before_after.png"] * self.before_after + ["_trace.png", "_trace.gif"] * o.trace
        return made, [single + end for single in singles for end in ends]

    def read_hole(self, path: Path, image: Tensor) -> Tensor | None:
        name, masks = stem(self.below[path]), self.options.masks
        if masks is None:
            hole = to_tensor(files.alpha(files.load(path))) < 255
        elif self.masks is not None and name not in self.masks:
            raise DatasetError(f"{path}: no mask of this name is in {masks}")
        else:
            mask = user_path(masks) if self.masks is None else self.masks[name]  # a file: one for all
            hole = files.mask_of(files.load(mask), mask)
        if hole.shape[1:] != image.shape[1:]:
            (_, height, width), (_, h, w) = image.shape, hole.shape
            raise DatasetError(f"{path}: it is {width}x{height}, its mask {w}x{h}")
        if not hole.any() and (masks is not None or self.model.tasks == ["inpaint"]):
            raise DatasetError(f"{path}: nothing to fill in: no --masks that is white there, no transparency")
        return hole.float() if hole.any() else None

    def restore(self, draws: list[Draw]):
        """Draws of one kind -> files."""
        o, model = self.options, self.model
        zlo = model.full_size(to_float(torch.stack([draw.photo.pixels for draw in draws])))
        hole = None if draws[0].hole is None else torch.stack([draw.hole for draw in draws])
        streams = [noise_of(o, model, self.below[draw.path], draw.number, o.draws) for draw in draws]
        frames = Frames(zlo.shape[2:]) if o.trace else None
        try:
            sample = model.sample(zlo, hole, self.labels * len(zlo), streams, frames)
        except (torch.OutOfMemoryError, ode_int.SolverError) as failure:
            out_of_memory = isinstance(failure, torch.OutOfMemoryError)
            reason = "out of GPU memory; lower --batch-size or --tile" if out_of_memory else failure
            self.failures |= {draw.path: f"{draw.path}: {reason}" for draw in draws}
            return
        trace = frames.until(sample) if o.trace else None
        before = model.enlarged(zlo)
        after = torch.lerp(before, model.enlarged(sample), o.strength)
        for row, draw in enumerate(draws):
            try:
                self.save(draw, to_uint8(before[row]), to_uint8(after[row]), trace, row)
            except (OSError, ValueError) as failure:  # a full disk, say, or a picture too large for its format
                self.failures[draw.path] = f"{draw.path}: {one_line(failure)}"

    def save(self, draw: Draw, before: Tensor, after: Tensor, trace: list | None, row: int):
        """The files of a draw, its own last: where that is, nothing is missing. before and after: (C, H, W) uint8."""
        made, _ = self.outputs(draw.path)
        path, n, quality = made[draw.number], self.options.draws, self.options.quality
        if self.before_after:  # the image as the network got it, and what became of it
            pictures = [x.expand(3, -1, -1).permute(1, 2, 0).numpy() for x in (before, after)]
            save_image(stem(path) + "_before_after.png", Image.fromarray(titled(["before", "after"], pictures)))
        if trace:
            save_trace(path, trace, slice(row, row + 1))
        draw.photo.save(path, after, quality)
        if n > 1:
            self.made[draw.path].append(after)
            if len(self.made[draw.path]) == n:  # their mean, and their standard deviation
                levels = torch.stack(self.made.pop(draw.path)).float()
                draw.photo.save(made[n], levels.mean(0).round().byte(), quality)
                save_image(made[n + 1], to_image((8 * deviation(levels)).round().clamp(max=255).byte()))
