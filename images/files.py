"""Image files in and out, of every mode and format that Pillow reads by itself."""
import io
import os
import tempfile
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from images import DatasetError, SettingsError, one_line
from support.disk import make_folder, write_atomically

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # of an image, 89 million: from there on Pillow warns, without naming the file

with suppress(ImportError):  # optional: photographs of phones, .heic
    import pillow_heif
    pillow_heif.register_heif_opener()
Image.init()  # has Pillow load all its formats
# EPS is drawn by another program, Ghostscript, and WMF by Windows; of the others Pillow knows no more than the name
FORMATS = [name for name in Image.ID if name not in ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")]
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}

# `load` refuses such an image itself and names it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def user_path(path: str) -> Path:
    """The path with ~ and ~name as the users' folders. Raises SettingsError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise SettingsError(f"{path}: there is no user of this name; write the folder out") from error


def open_image(path, channels: int = 3) -> Image.Image:
    """A file of any mode -> upright 8-bit PIL image, L (channels = 1) or RGB. Raises DatasetError that names the file.

    Colours are converted to sRGB where the file says which ones they are, and transparency is laid over white. 16-bit
    greys map 65535 to 255; floats count as [0, 1] where none is above 1, else as [0, 255]. Of an animation the first
    frame is taken.
    """
    return flatten(load(path), channels, path)


def load(path) -> Image.Image:
    """The file's picture, upright, in the mode that it is stored in. Raises DatasetError, and MemoryError."""
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or a device may never end
        raise DatasetError(f"{path}: is not a file; replace or remove it")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DatasetError(f"{path}: has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}; "
                                   "make it smaller")
            image.load()
            return upright(image)
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # each of Pillow's readers raises its own kinds of exception
        reason = one_line(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "its format is unknown"
            if str(path).lower().endswith((".heic", ".heif")):
                reason = "it needs one more package: pip install pillow-heif"
        raise DatasetError(f"{path}: can't be read as an image ({reason}); replace or remove it") from error


def flatten(image: Image.Image, channels: int = 3, name="image", background: str | None = "white") -> Image.Image:
    """A PIL image of any mode -> upright, opaque, 8-bit: see open_image. Raises DatasetError, which says `name`.

    background None: transparent pixels show the colours that they are stored with.
    """
    image = to_srgb(upright(image))
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
        if background:
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB" if channels == 3 else "L")


def to_srgb(image: Image.Image) -> Image.Image:
    """The colours (RGB, CMYK or grey, of 8 bits) as the image's ICC profile says; without a profile they are sRGB.

    A profile that is damaged, or made for images of another kind, is passed over.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L", "LA", "P"):
        return image
    colours = image.convert({"LA": "L", "RGBA": "RGB", "P": "RGB"}.get(image.mode, image.mode))
    transform = srgb_transform(profile, colours.mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(colours, transform)
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


@lru_cache(maxsize=16)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an ICC profile's colours to sRGB. None where the profile can't be used, or is sRGB itself."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():  # converting would change some colours by a level
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF block says, or as it is stored where that block is damaged."""
    with suppress(Exception):  # the readers of EXIF raise all kinds
        return ImageOps.exif_transpose(image)
    return image


def mask_of(image: Image.Image, name="mask") -> Tensor:
    """(1, H, W) bool: true where the image is white. What is transparent counts as black. Raises DatasetError."""
    return to_tensor(flatten(image, 1, name, background="black")) >= 128


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


def save_image(path: Path | str, image: Image.Image, **how):
    """Writes it atomically, in the format that the path's ending names. `how`: what Pillow's save takes."""
    path = Path(path)
    make_folder(path.parent)
    kind = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda f: image.save(f, format=kind, **how))


def refuse_outputs(paths: list[str], overwrite: bool):
    """Tries, before anything is computed, whether files of these names can be made. Raises DatasetError."""
    for path in paths:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=Path(path).parent).close()
            with suppress(FileNotFoundError):
                os.stat(path)  # fails for a name that is too long
                if not overwrite:
                    raise DatasetError(f"{path} exists; --overwrite replaces it")
        except OSError as failure:
            raise DatasetError(f"{path} can't be written: {failure.strerror}") from None


def fit(image: Image.Image, side: int) -> Image.Image:
    """Centre crop to side x side as guided-diffusion and DiT do: halve with a box while the shorter side is at least
    twice too long, bring it to `side` with bicubic (small images are enlarged), cut out the middle."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = _scaled_to(image, side)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def cover(image: Image.Image, side: int) -> Image.Image:
    """The image as it is, for crops of side x side; enlarged by bicubic where its shorter side is less than that."""
    return image if min(image.size) >= side else _scaled_to(image, side)


def _scaled_to(image: Image.Image, side: int) -> Image.Image:
    """The image with a shorter side of `side` pixels, by bicubic."""
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def list_images(root: Path) -> list[str]:
    """Sorted relative paths of the images below root. Hidden files are passed over, others counted in a warning.

    Links are followed, but each real folder is entered once, so links in a circle end. A link that leads nowhere is
    listed: reading it fails.
    """
    if not os.path.isdir(root):
        raise DatasetError(f"{root}: is not a folder; name one that holds images")
    images, others, closed = [], [], []
    entered = set()  # real paths of folders
    for folder, folders, names in os.walk(root, followlinks=True, onerror=closed.append):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in names:
            if not name.startswith("."):
                is_image = os.path.splitext(name)[1].lower() in ENDINGS
                (images if is_image else others).append(os.path.relpath(os.path.join(folder, name), root))
    if closed:
        reasons = [f"{error.filename} ({error.strerror})" for error in closed]
        warnings.warn(f"{root}: {len(closed)} folders can't be opened and are left out: {first_few(reasons)}")
    if others:
        warnings.warn(f"{root}: {len(others)} files are ignored, which are not images: {first_few(others)}")
    if not images:
        raise DatasetError(f"{root}: no images in it; their names must end in .png, .jpg or as another of Pillow's "
                           "formats does")
    return sorted(images)


def first_few(names, count: int = 8) -> str:
    """The first of them, for a message."""
    return ", ".join(sorted(names)[:count]) + (", ..." if len(names) > count else "")
