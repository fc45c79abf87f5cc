"""Image files in and out, of every mode that Pillow reads."""
import heapq
import math
import os
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from images import DatasetError, one_line
from support.disk import write_atomically

NAME_MAX = 255  # bytes of a file's name on the usual disks
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # of an image, 89 million: from there on Pillow warns, without naming the file
MAX_ENTRIES = 200_000  # files and folders that are looked at where fewer than one in a hundred is an image
STRIP = 4  # a picture more than so many times as long as it is wide counts as a strip

# open_image refuses such an image itself and names it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(path, channels: int = 3) -> Image.Image:
    """A file of any mode -> upright 8-bit PIL image, L (channels = 1) or RGB. Raises DatasetError that names the file.

    Transparency is laid over white. 16-bit greys map 65535 to 255; floats count as [0, 1] where none is above 1, else
    as [0, 255]. Of an animation the first frame is taken.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            image.load()
            return flatten(image, channels, path)
    except DatasetError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own, or the one above
        raise DatasetError(f"{path}: is too large ({error}); make it smaller, {MAX_PIXELS:,} pixels at most") from error
    except Exception as error:  # each of Pillow's readers raises its own kinds of exception
        reason = getattr(error, "strerror", None) or one_line(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "its format is unknown"
        raise DatasetError(f"{path}: can't be read as an image ({reason}); replace or remove it") from error


def flatten(image: Image.Image, channels: int = 3, name="image") -> Image.Image:
    """A PIL image of any mode -> upright, opaque, 8-bit: see open_image. Raises DatasetError, which says `name`."""
    image = upright(image)
    if image.mode[0] in "IF":
        grey = np.asarray(image).astype(np.float64)
        if not np.isfinite(grey).all():
            raise DatasetError(f"{name}: some of its pixels are NaN or infinite; give them a value")
        if image.mode != "F":
            grey = grey / 257
        elif grey.max() <= 1:
            grey = grey * 255
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


def refuse_outputs(paths: list[str], overwrite: bool):
    """Tries, before anything is computed, whether files of these names can be made. Raises DatasetError."""
    for path in paths:
        if os.path.exists(path) and not overwrite:
            raise DatasetError(f"{path} exists; --overwrite replaces it")
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            if len(os.fsencode(os.path.basename(path))) > NAME_MAX:
                raise OSError(0, "File name too long")
            tempfile.TemporaryFile(dir=Path(path).parent).close()
        except OSError as failure:
            raise DatasetError(f"{path} can't be written: {failure.strerror}") from None


def fit(image: Image.Image, side: int) -> Image.Image:
    """Centre crop to side x side as guided-diffusion and DiT do: halve with a box while the shorter side is at least
    twice too long, bring it to `side` with bicubic (small images are enlarged), cut out the middle."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) < side and max(image.size) > STRIP * min(image.size):
        return _middle_of_strip(image, side)
    if min(image.size) != side:
        scale = side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image if image.size == (side, side) else image.crop((left, top, left + side, top + side))


def cover(image: Image.Image, side: int) -> Image.Image:
    """The image as it is, for crops of side x side; enlarged by bicubic where its shorter side is less than that."""
    if min(image.size) >= side:
        return image
    if max(image.size) > STRIP * min(image.size):
        return fit(image, side)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _middle_of_strip(image: Image.Image, side: int) -> Image.Image:
    """What `fit` makes of an image that it has to enlarge, without enlarging more than the middle.

    1 x 65,000 pixels would become 256 x 16,640,000. Equal to what `fit` would make, but for a rounding now and then.
    """
    scale = side / min(image.size)
    crop, box = [], []  # of each axis: the pixels that matter, and within them the part that becomes the square
    for length in image.size:
        enlarged = round(length * scale)
        start = (enlarged - side) // 2
        begin, end = start * length / enlarged, (start + side) * length / enlarged
        first, last = max(0, math.floor(begin) - 3), min(length, math.ceil(end) + 3)  # bicubic looks 2 pixels around
        crop.append((first, last))
        box.append((begin - first, end - first))
    (left, right), (top, bottom) = crop
    image = image.crop((left, top, right, bottom))
    # one axis after the other, across first, which is Pillow's order where both are enlarged
    (left, right), (top, bottom) = box
    image = image.resize((side, image.height), Image.Resampling.BICUBIC, box=(left, 0, right, image.height))
    return image.resize((side, side), Image.Resampling.BICUBIC, box=(0, top, side, bottom))


def enlarge(picture: Image.Image | Tensor, factor: int) -> Image.Image | Tensor:
    """A PIL image, or (C, H, W) uint8, with sides `factor` times as long, by PIL's bicubic.

    So a damaged image that is smaller than its clean partner comes to the partner's size: see Images.pair_factor.
    """
    if isinstance(picture, Tensor):
        return to_tensor(enlarge(to_image(picture), factor))
    if factor == 1:
        return picture
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.BICUBIC)


def list_images(root: Path) -> list[str]:
    """Sorted relative paths of the images below root. Hidden files are passed over, others counted in a warning.

    Links are followed, but each real folder is entered once, so links in a circle end and no folder's images count
    twice. Where several ways lead to a folder, the one of the fewest links is taken, then the first in the alphabet. A
    link to a single file is that file under another name. A link that leads nowhere is listed: reading it fails.
    """
    if not os.path.isdir(root):
        raise DatasetError(f"{root}: is not a folder; name one that holds images")
    images, others, closed = [], [], []
    looked_at = 0
    entered = set()  # the real paths of folders
    waiting = [(0, "")]  # folders to enter, as a heap: how many links lead there, relative path
    while waiting:
        links, folder = heapq.heappop(waiting)
        path = os.path.join(root, folder)
        real = os.path.realpath(path)
        if real in entered:
            continue
        entered.add(real)
        if _is_the_systems(real):
            raise DatasetError(f"{path}: leads to {real}, where the system keeps its own; name a folder of images")
        try:
            entries = list(os.scandir(path))
        except OSError as error:
            closed.append(f"{path} ({error.strerror})")
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            if _leads_to_folder(entry):
                if not entry.name.startswith("__MACOSX"):
                    heapq.heappush(waiting, (links + int(entry.is_symlink()), name))
            elif os.path.splitext(name)[1].lower() in ENDINGS and not _is_special(entry):
                images.append(name)
            else:
                others.append(name)
        looked_at += len(entries)
        if looked_at > MAX_ENTRIES and 100 * len(images) < looked_at:
            raise DatasetError(f"{root}: only {len(images):,} of the first {looked_at:,} files and folders in it are "
                               "images; name the folder that holds the images")
    if closed:
        warnings.warn(f"{root}: {len(closed)} folders can't be opened and are left out: {few(closed)}")
    if others:
        warnings.warn(f"{root}: {len(others)} files are ignored, which are not images: {few(others)}")
    if not images:
        raise DatasetError(f"{root}: no images in it; their names must end in {' '.join(sorted(ENDINGS))}")
    return sorted(images)


def _is_the_systems(folder: str) -> bool:
    """Whether a real path is the whole disk, or where Linux shows its processes and devices as files without end."""
    return folder in (os.path.dirname(folder), "/dev") or f"{folder}/".startswith(("/proc/", "/sys/"))


def _leads_to_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_special(entry: os.DirEntry) -> bool:
    """Whether this is a pipe, a socket or a device: reading one may never end. Not so a link that leads nowhere."""
    try:
        return os.path.exists(entry.path) and not entry.is_file()
    except OSError:
        return False


def few(names, count: int = 8) -> str:
    """The first of them, for a message."""
    return ", ".join(sorted(names)[:count]) + (", ..." if len(names) > count else "")
