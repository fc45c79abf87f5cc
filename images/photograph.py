"""A photograph's file: what it holds beside the colours that a network restores, and how it is written again."""
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops
from torch import Tensor

from images.files import FORMATS, alpha, flatten, load, save_image, to_image, to_srgb, to_tensor

WRITTEN = ("png", "jpg", "jpeg", "webp")  # endings of the formats that a restored photograph may have


@dataclass
class Photograph:
    """An upright image of 8 bits in sRGB, and what it goes back with."""

    pixels: Tensor  # (C, H, W) uint8, the colours as they are stored, also where they are transparent
    alpha: Image.Image | None  # L, how opaque each pixel is; None: all are
    grey: bool  # whether it is without colour
    about: dict  # exif (but for the orientation) and dpi, as Pillow's save takes them
    notes: list[str]  # what is changed beside the restoration, a few words each

    def save(self, path: str, picture: Tensor, quality: int):
        """The restored (C, H, W) uint8, of any size, as a file as grey and as transparent as this one was.

        The ending names the format; in a JPEG, which has no transparency, it is laid over white.
        """
        image = to_image(picture)
        if self.grey:
            image = image.convert("L")
        if self.alpha:
            image.putalpha(self.alpha.resize(image.size, Image.Resampling.BICUBIC))
            if path.endswith(("jpg", "jpeg")):
                image = flatten(image, 1 if self.grey else 3)
        save_image(path, image, quality=quality, subsampling=0, **self.about)  # Pillow passes over what a format lacks


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
