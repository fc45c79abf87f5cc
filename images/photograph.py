"""A photograph's file: what it holds beside the colours that a network restores, and how it is written again."""
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops
from torch import Tensor

from images.files import FORMATS, alpha, flatten, load, to_image, to_tensor
from support.disk import make_folder, write_atomically

KINDS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}  # what is written, by the file's ending: Pillow's names


@dataclass
class Photograph:
    """An upright image of 8 bits in sRGB, and what it goes back with."""

    pixels: Tensor  # (C, H, W) uint8, the colours as they are stored, also where they are transparent
    alpha: Image.Image | None  # L, how opaque each pixel is; None: all are
    grey: bool  # whether it is without colour
    about: dict  # exif (but for the orientation) and dpi, as Pillow's save takes them
    notes: list[str]  # what is lost, a few words each

    def finish(self, picture: Tensor, size: tuple[int, int]) -> Image.Image:
        """The restored (C, H, W) uint8, brought to (width, height), as grey and as transparent as the file was."""
        image = to_image(picture)
        if self.grey:
            image = image.convert("L")
        if image.size != tuple(size):
            image = image.resize(size, Image.Resampling.LANCZOS)
        if self.alpha:
            image.putalpha(self.alpha.resize(image.size, Image.Resampling.BICUBIC))
        return image


def read_photograph(path: Path, channels: int, holes: bool = False) -> Photograph:
    """holes: transparency says what is to be filled in, and does not go back. Raises DatasetError."""
    image, notes = load(path), []
    with Image.open(path, formats=FORMATS) as header:
        if getattr(header, "is_animated", False):
            notes.append("of several pages or frames the first is taken")
        if "16" in str([tile.args for tile in header.tile]) or header.mode[0] in "IF":
            notes.append("16 bits become 8")
    if image.info.get("icc_profile"):
        notes.append("colours are converted to sRGB, and the profile is left out")
    opaque = alpha(image)
    about = {name: image.info[name] for name in ("exif", "dpi") if image.info.get(name)}
    flat = flatten(image, 3, path, background="white" if holes else None)
    red, green, blue = flat.split()
    grey = not any(ImageChops.difference(red, other).getbbox() for other in (green, blue))
    transparent = not holes and opaque.getextrema()[0] < 255
    pixels = to_tensor(flat if channels == 3 else flat.convert("L"))
    return Photograph(pixels, opaque if transparent else None, grey and channels == 3, about, notes)


def write_photograph(path: str | os.PathLike, image: Image.Image, about: dict, quality: int):
    """Writes it atomically, in the format that the path's ending names."""
    path = Path(path)
    kind = KINDS[path.suffix[1:].lower().replace("jpeg", "jpg")]
    if kind == "JPEG" and image.has_transparency_data:
        image = flatten(image)
    how = dict(quality=quality, subsampling=0) if kind == "JPEG" else dict(quality=quality) if kind == "WEBP" else {}
    make_folder(path.parent)
    write_atomically(path, lambda f: image.save(f, format=kind, **how, **about))
