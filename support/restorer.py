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
from images.files import ENDINGS, list_images, refuse_outputs, save_png, to_image, user_path
from images.photograph import KINDS, Photograph, read_photograph, write_photograph
from images.pictures import deviation, titled, to_float, to_uint8
from support.checkpoints import EXPORTED
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
    run = Path(o.run).resolve()
    folder = run if run.is_dir() else run.parent.parent if run.parent.name == "checkpoints" else run.parent
    if run.suffix == EXPORTED:  # what lies beside it is not its own
        folder = Path("runs")
    return folder / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"


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


def find_images(inputs: tuple[str, ...]) -> dict[Path, tuple[Path, str]]:
    """Files, folders and patterns -> each image's path: its folder, and its name below it. Raises SettingsError."""
    found = {}
    for text in inputs:
        path = user_path(text)
        paths = [path] if os.path.lexists(path) else list(map(Path, sorted(glob(str(path), recursive=True))))
        if not paths:
            raise SettingsError(f"input = {text!r}: there is no such file or folder")
        for path in paths:
            names = list_images(path) if path.is_dir() else [path.name]
            folder = path if path.is_dir() else path.parent
            found |= {folder / name: (folder, name) for name in names}
    return found


class Restorer:
    """Restores files, neighbours of equal size together. What fails does not stop the others; it is told at the end."""

    def __init__(self, o, model: Model):
        """o: sample.Options. Raises SettingsError."""
        self.options, self.model, self.labels = o, model, model.label_numbers(o.label)
        self.failures, self.taken, self.made = {}, set(), defaultdict(list)  # by path; paths; draws by path
        self.skipped, self.notes = 0, Counter()
        if model.tasks == ["generate"]:
            raise SettingsError(f"input = {o.input}: the run makes images from noise; --count N does")
        if len(self.labels) > 1:
            raise SettingsError(f"label = {o.label!r}: allowed is one, for all images")
        if o.masks is not None and "inpaint" not in model.tasks:
            raise SettingsError(f"masks = {o.masks!r}: the run's task, {model.config.task}, takes none")
        if o.strength < 1 and "inpaint" in model.tasks:
            raise SettingsError(f"strength = {o.strength}: allowed is 1 for a run that fills holes")
        images = find_images(o.input)
        one = len(images) == 1 and not user_path(o.input[0]).is_dir()
        self.before_after = o.before_after == "on" or (o.before_after == "auto" and one)
        self.ending, self.file = o.format, None
        if o.output is not None and Path(o.output).suffix.lower() in ENDINGS:
            self.file, self.ending = user_path(o.output), Path(o.output).suffix[1:].lower()
            if len(images) > 1 or self.ending not in KINDS:
                raise SettingsError(f"output = {o.output!r}: allowed is a folder, or for one input a name with the "
                                    f"ending {', '.join(KINDS)}")
        self.folder = self.file.parent if self.file else output_folder(o, "restored")
        folder = Path(os.path.realpath(self.folder))
        beside = str(folder) in {os.path.realpath(root) for root, _ in images.values()}
        if beside and not self.file and not o.suffix:
            raise SettingsError(f"output = {o.output!r}: allowed is another folder than the input's, or a --suffix")
        names = {path: name for path, (_, name) in images.items()
                 if beside or folder not in Path(os.path.realpath(path)).parents}  # what was restored is no input
        stems = Counter(map(stem, names.values()))
        self.names = {path: stem(name) if stems[stem(name)] == 1 else name.replace(".", "_")
                      for path, name in names.items()}  # a.jpg and a.png: a_jpg and a_png
        number, count = partition(o.partition)
        self.below, self.paths = names, list(names)[number::count]
        if o.masks is not None:
            masks = user_path(o.masks)
            if masks.is_file():  # one for all
                self.masks = dict.fromkeys(map(stem, names.values()), masks)
            else:
                self.masks = {stem(name): masks / name for name in list_images(masks)}

    def run(self) -> int:
        """Exit status: 0 all are restored, 1 some are not."""
        progress = Progress(self.model, self.options.draws * len(self.paths), self.options.trace)
        try:
            some = []  # the next batch
            for draw in self.draws():
                at_a_time = self.model.at_a_time(*draw.photo.pixels.shape[1:])
                if some and (draw.kind != some[0].kind or len(some) == at_a_time):
                    self.restore(some)
                    progress.bar.update(len(some))
                    some = []
                some.append(draw)
            if some:
                self.restore(some)
                progress.bar.update(len(some))
            done = len(self.paths) - len(self.failures) - self.skipped
            print(f"{done} of {len(self.paths)} images restored, in {self.file or self.folder}: {progress.cost()}")
        finally:  # also when it is interrupted
            if self.skipped:
                print(f"{self.skipped} were there already (--overwrite makes them again)")
            for note, count in self.notes.items():
                print(f"note: {note} ({count} {'image' if count == 1 else 'images'})")
            for failure in self.failures.values():
                print(f"not restored: {failure}", file=sys.stderr)
        return int(bool(self.failures))

    def draws(self):
        """Yields the draws of each file in turn, and notes the files that can't be restored."""
        o, holes = self.options, "inpaint" in self.model.tasks
        for path in self.paths:
            outputs = self.outputs(path)
            try:
                if twice := self.taken.intersection(outputs):
                    raise DatasetError(f"{path}: another image of its name takes {min(twice)}")
                self.taken.update(outputs)
                if all(map(os.path.exists, outputs)) and not o.overwrite:
                    self.skipped += 1
                    continue
                refuse_outputs(outputs, overwrite=True)
                photo = read_photograph(path, self.model.config.channels, holes)
                hole = self.read_hole(path, photo.pixels) if holes else None
                self.model.check_size(*photo.pixels.shape[1:], path.name, o.trace)
            except SettingsError as failure:
                self.failures[path] = failure
                continue
            self.notes.update(photo.notes)
            for i in range(o.draws):
                yield Draw(path, i, photo, hole)

    def outputs(self, path: Path) -> list[str]:
        """The files to be written for an input: its draws, then the others."""
        n, base = self.options.draws, f"{self.folder}/{self.names[path]}{self.options.suffix}"
        if self.file:
            base = stem(str(self.file))
        singles = [base] if n == 1 else [f"{base}_{i + 1}" for i in range(n)]
        paths = [f"{single}.{self.ending}" for single in singles]
        if n > 1:
            paths += [f"{base}_mean.{self.ending}", base + "_std.png"]
        if self.before_after:
            paths += [single + "_before_after.png" for single in singles]
        if self.options.trace:
            paths += [single + end for single in singles for end in ("_trace.png", "_trace.gif")]
        return paths

    def read_hole(self, path: Path, image: Tensor) -> Tensor | None:
        name = stem(self.below[path])
        if self.options.masks is None:
            hole = files.read_alpha(path) < 255
        elif name in self.masks:
            hole = files.read_mask(self.masks[name])
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
        o, zlo = self.options, self.model.full_size(to_float(torch.stack([draw.photo.pixels for draw in draws])))
        hole = None if draws[0].hole is None else torch.stack([draw.hole for draw in draws])
        streams = [noise_of(o, self.model, self.below[draw.path], draw.number, o.draws) for draw in draws]
        frames = Frames(zlo.shape[2:]) if o.trace else None
        try:
            sample = self.model.sample(zlo, hole, self.labels * len(zlo), streams, frames)
        except (torch.OutOfMemoryError, ode_int.SolverError) as failure:
            reason = failure
            if isinstance(failure, torch.OutOfMemoryError):
                reason = "out of GPU memory; lower --batch-size or --tile"
            self.failures |= {draw.path: f"{draw.path}: {reason}" for draw in draws}
            return
        if o.strength < 1:
            sample = torch.lerp(zlo, sample, o.strength)
        for row, (draw, picture) in enumerate(zip(draws, to_uint8(sample))):
            try:
                paths = self.outputs(draw.path)
                self.write(paths[draw.number], draw.photo, picture)
                if self.before_after:
                    self.save_before_after(paths[draw.number], to_uint8(zlo[row]), picture)
                if o.trace:
                    save_trace(paths[draw.number], frames.until(sample), slice(row, row + 1))
                if o.draws > 1:
                    self.made[draw.path].append(picture)
                    if len(self.made[draw.path]) == o.draws:
                        self.save_statistics(draw, torch.stack(self.made.pop(draw.path)).float())
            except OSError as failure:  # a full disk, say
                self.failures[draw.path] = f"{draw.path}: {one_line(failure)}"

    def write(self, path: str, photo: Photograph, picture: Tensor):
        """The restored (C, H, W) uint8, at the size that was asked for, with what the file held besides."""
        size = [round(side * (self.options.factor or self.model.factor)) for side in photo.pixels.shape[:0:-1]]
        write_photograph(path, photo.finish(picture, size), photo.about, self.options.quality)

    def save_before_after(self, path: str, before: Tensor, after: Tensor):
        """Both (C, H, W) uint8, side by side: the image as the network got it, and what became of it."""
        if self.model.config.channels == 1:
            before, after = before.expand(3, -1, -1), after.expand(3, -1, -1)
        pictures = [x.permute(1, 2, 0).numpy() for x in (before, after)]
        save_png(Path(stem(path) + "_before_after.png"), Image.fromarray(titled(["before", "after"], pictures)))

    def save_statistics(self, draw: Draw, draws: Tensor):
        """Pictures of the mean over the draws (n, C, H, W) in levels of 255, and of their standard deviation."""
        n, paths = len(draws), self.outputs(draw.path)
        self.write(paths[n], draw.photo, draws.mean(0).round().byte())
        save_png(Path(paths[n + 1]), to_image((8 * deviation(draws)).round().clamp(max=255).byte()))
