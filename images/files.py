"""Image files in and out, of every mode that Pillow reads; and files that are never half written."""
import os
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from images import DatasetError

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


def write_atomically(path: Path, write):
    """`write(file)` writes a temporary file beside `path`, which is then renamed.

    Whenever the process dies, `path` holds either the whole old content or the whole new one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_image(path, channels: int = 3) -> Image.Image:
    """A file of any mode -> upright 8-bit PIL image, L (channels = 1) or RGB. Raises DatasetError that names the file.

    Transparency is laid over white. 16-bit greys map 65535 to 255; floats count as [0, 1] where none is above 1, else
    as [0, 255]. Of an animation the first frame is taken.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return flatten(image, channels)
    except Exception as error:  # each of Pillow's readers raises its own kinds of exception
        unknown = "its format is unknown" if isinstance(error, Image.UnidentifiedImageError) else None
        reason = unknown or getattr(error, "strerror", None) or error
        raise DatasetError(f"{path} can't be read as an image: {reason}") from error


def flatten(image: Image.Image, channels: int = 3) -> Image.Image:
    """A PIL image of any mode -> upright, opaque, 8-bit: see open_image."""
    image = upright(image)
    if image.mode[0] in "IF":
        grey = np.asarray(image).astype(np.float64)
        grey = grey / 257 if image.mode != "F" else grey * 255 if grey.max() <= 1 else grey
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF block says, or as it is stored where that block is damaged."""
    with suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def read_image(path: Path, channels: int) -> Tensor:
    """(C, H, W) uint8. Raises DatasetError."""
    return to_tensor(open_image(path, channels))


def read_alpha(path: Path) -> Tensor:
    """(1, H, W) uint8 of a file that `open_image` could read: 0 transparent, 255 opaque."""
    with Image.open(path) as image:
        return to_tensor(alpha(upright(image)))


def alpha(image: Image.Image) -> Image.Image:
    """How opaque each pixel is, an L image: 255 everywhere where the image has no transparency."""
    if not image.has_transparency_data:  # 16-bit greys can't become RGBA
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def to_tensor(image: Image.Image) -> Tensor:
    """An L or RGB image -> (C, H, W) uint8."""
    return torch.from_numpy(np.atleast_3d(np.asarray(image)).copy()).permute(2, 0, 1)


def to_image(picture: Tensor) -> Image.Image:
    """(1 or 3, H, W) uint8 -> an L or RGB image."""
    return Image.fromarray(picture.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def save_png(path: Path, image: Image.Image):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda f: image.save(f, format="PNG"))


def fit(image: Image.Image, side: int) -> Image.Image:
    """Centre crop to side x side as guided-diffusion and DiT do: halve with a box while the shorter side is at least
    twice too long, bring it to `side` with bicubic (small images are enlarged), cut out the middle."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != side:
        scale = side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image if image.size == (side, side) else image.crop((left, top, left + side, top + side))


def list_images(root: Path) -> list[str]:
    """Sorted relative paths of the images below root. Hidden files are passed over, others counted in a warning."""
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder")
    images, others = [], []
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith((".", "__MACOSX"))]
        prefix = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
        for name in files:
            if not name.startswith("."):
                (images if os.path.splitext(name)[1].lower() in ENDINGS else others).append(prefix + name)
    if others:
        warnings.warn(f"{root}: {len(others)} files that are no images are ignored: {few(others)}")
    if not images:
        raise DatasetError(f"no images in {root}: looked for {' '.join(sorted(ENDINGS))}")
    return sorted(images)


def few(names) -> str:
    """The first of them, for a message."""
    return ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
