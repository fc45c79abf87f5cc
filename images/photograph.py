"""A photograph's file: what it holds beside the colours that a network restores, and how it is written again."""
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops
from torch import Tensor

from images.files import FORMATS, alpha, flatten, load, to_image, to_srgb, to_tensor
from support.disk import make_folder, write_atomically

KINDS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}  # what is written, by the ending: Pillow's names


@dataclass
class Photograph:
    """An upright image of 8 bits in sRGB, and what it goes back with."""

    pixels: Tensor  # (C, H, W) uint8, the colours as they are stored, also where they are transparent
    alpha: Image.Image | None  # L, how opaque each pixel is; None: all are
    grey: bool  # whether it is without colour
    about: dict  # exif (but for the orientation) and dpi, as Pillow's save takes them
    notes: list[str]  # what is changed beside the restoration, a few words each

    def finish(self, picture: Tensor) -> Image.Image:
        """The restored (C, H, W) uint8, of any size, as grey and as transparent as the file was."""
        image = to_image(picture)
        if self.grey:
            image = image.convert("L")
        if self.alpha:
            image.putalpha(self.alpha.resize(image.size, Image.Resampling.BICUBIC))
        return image


def read_photograph(path: Path, channels: int, holes: bool = False) -> Photograph:
    """holes: transparency says what is to be filled in, and does not go back. Raises DatasetError."""
    stored, notes = load(path), []
    with Image.open(path, formats=FORMATS) as header:
        if getattr(header, "is_animated", False):
            notes.append("of several pages or frames the first is taken")
        if header.mode[0] in "IF" or ";16" in str([tile.args for tile in header.tile]):
            notes.append("16 bits and more become 8")
    image = to_srgb(stored)
    if image is not stored:
        notes.append("colours are converted to sRGB")
    flat = flatten(image, 3, path, background="white" if holes else None)
    red, green, blue = flat.split()
    grey = Image.getmodebase(stored.mode) == "L" or not any(
        ImageChops.difference(red, other).getbbox() for other in (green, blue))
    opaque = alpha(image)
    return Photograph(
        pixels=to_tensor(flat if channels == 3 else flat.convert("L")),
        alpha=opaque if not holes and opaque.getextrema()[0] < 255 else None,
        grey=grey,
        about={name: stored.info[name] for name in ("exif", "dpi") if stored.info.get(name)},
        notes=notes)


def write_photograph(path: Path, image: Image.Image, about: dict, quality: int):
    """Writes it atomically, in the format that the path's ending names; transparency is laid over white in a JPEG."""
    kind = KINDS[path.suffix[1:].lower()]
    if kind == "JPEG":
        image = flatten(image, 1 if image.mode in ("L", "LA") else 3)
    how = dict(PNG={}, JPEG=dict(quality=quality, subsampling=0), WEBP=dict(quality=quality))[kind]
    make_folder(path.parent)
    write_atomically(path, lambda f: image.save(f, format=kind, **how, **about))
