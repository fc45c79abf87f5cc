"""What a model makes of photographs that other programs damaged: PSNR in dB, beside the damage and simple filters.

    python benchmarks/photos.py models/photos.safetensors --photos data/photos/test --count 10

Whole photographs (sides cut to multiples of 16), damaged by PIL and numpy. What got smaller is enlarged by the bicubic
filter, for a model that knows the factor (task sr) as that one was trained. The peer's filter and strength are those
of the highest mean over these very photographs: a choice in its favour. Without any error PSNR is about 100 dB.
"""
import io
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tyro
from PIL import Image, ImageFilter

from images import SettingsError
from images.corruptions import to_full_size
from images.files import list_images, open_image, to_tensor
from images.pictures import psnr, to_float
from sample import open_model
from support.bounds import Count, check, require
from support.command_line import parse

try:
    import cv2
    import pywt  # noqa: F401, which scikit-image needs for its wavelets
    from skimage.restoration import denoise_tv_chambolle, denoise_wavelet, richardson_lucy
except ImportError:
    cv2 = None


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def jpeg_twice(image: Image.Image, first: int, second: int) -> Image.Image:
    """The blocks of the second JPEG begin four pixels below and to the right of the first one's."""
    larger = Image.fromarray(np.pad(np.asarray(image), ((4, 0), (4, 0), (0, 0)), mode="edge"))
    return jpeg(jpeg(larger, first).crop((4, 4, *larger.size)), second)


def noise(image: Image.Image, levels: float) -> Image.Image:
    x = np.asarray(image) + np.random.default_rng(0).normal(0, levels, (image.height, image.width, 3))
    return Image.fromarray(x.round().clip(0, 255).astype(np.uint8))


DAMAGES = {
    "none": lambda image: image,
    **{f"JPEG {quality}": partial(jpeg, quality=quality) for quality in (95, 75, 50, 30, 10)},
    "JPEG 60, shifted, JPEG 75": partial(jpeg_twice, first=60, second=75),
    "messenger: down 2, JPEG 60": lambda image: jpeg(image.resize((image.width // 2, image.height // 2)), 60),
    "bicubic 2": lambda image: image.resize((image.width // 2, image.height // 2), Image.BICUBIC),
    "bicubic 4": lambda image: image.resize((image.width // 4, image.height // 4), Image.BICUBIC),
    "area 2": lambda image: image.resize((image.width // 2, image.height // 2), Image.BOX),
    "blur 1": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "blur 2": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    **{f"noise {levels}": partial(noise, levels=levels) for levels in (5, 10)},
}


def simple_peers(image: Image.Image) -> dict:
    """What each filter makes of the image, (H, W, 3) in levels, by its name and strength."""
    made = {f"unsharp {percent}": image.filter(ImageFilter.UnsharpMask(1.5, percent, 0)) for percent in (50, 100, 200)}
    if cv2 is None:
        return made
    x, y = np.asarray(image), np.asarray(image) / 255
    made |= {f"bilateral {std}": cv2.bilateralFilter(x, 7, std, 2) for std in (5, 10, 20, 30)}
    made |= {f"non-local means {h}": cv2.fastNlMeansDenoisingColored(x, None, h, h, 5, 15) for h in (1, 2, 3, 5, 8)}
    made |= {f"wavelet {std}": 255 * denoise_wavelet(y, std / 255, channel_axis=2) for std in (1, 2, 5, 10)}
    made |= {f"TV {w}": 255 * denoise_tv_chambolle(y, w, channel_axis=2) for w in (0.005, 0.01, 0.02, 0.04)}
    larger = np.pad(y, ((8, 8), (8, 8), (0, 0)), "reflect")
    for sigma in (0.5, 1, 2):
        bell = cv2.getGaussianKernel(17, sigma)
        made[f"Richardson-Lucy {sigma}"] = 255 * richardson_lucy(larger, (bell @ bell.T)[..., None], 10)[8:-8, 8:-8]
    return made


@dataclass
class Options:
    """Which model, and which photographs."""

    model: tyro.conf.Positional[str]  # a run, a checkpoint or an exported file
    photos: str  # folder of photographs that training never saw
    count: Count | None = None  # number of them, evenly spread; None: all
    draws: Count = 1  # restorations of each, whose mean is scored
    steps: Count | None = None  # number of the sampler's steps; None: the model's
    tile: int | None = None  # side of the tiles, pixels, as sample.py's
    only: tuple[str, ...] = ()  # damages to measure, by the names in DAMAGES; none: all


def photographs(folder: Path, count: int | None) -> list[Image.Image]:
    """`count` of the folder's photographs by name, evenly spread."""
    names = list_images(folder)
    count = len(names) if count is None else min(count, len(names))
    images = [open_image(folder / names[i * len(names) // count]) for i in range(count)]
    return [image.crop((0, 0, image.width // 16 * 16, image.height // 16 * 16)) for image in images]


def to_z(levels):
    """Levels (H, W, 3) -> (1, 3, H, W) in [-1, 1]."""
    return to_float(to_tensor(np.asarray(levels).round().clip(0, 255).astype(np.uint8)))[None]


def measure(model, damage, photos: list[Image.Image], draws: int) -> dict[str, float]:
    """The mean PSNR over the photographs of the input, the model and each simple peer, by name."""
    rows, c = [], model.config
    for photo in photos:
        damaged = damage(photo)
        enlarged = damaged.resize(photo.size, Image.BICUBIC)
        zlo, factor = to_z(enlarged), photo.width // damaged.width
        if factor > 1 and "sr" in model.tasks and factor in c.damage.factors("sr", 1):
            zlo = to_full_size(to_z(damaged), factor, c.damage.up)
        streams = [[(1.0, (0, "", draw))] for draw in range(draws)]  # of noise
        made = model.sample(zlo.expand(draws, -1, -1, -1), None, [None] * draws, streams).clamp(-1, 1)
        answers = {name: to_z(levels) for name, levels in simple_peers(enlarged).items()}
        answers |= dict(input=to_z(enlarged), model=made.mean(0, keepdim=True))
        rows.append({name: psnr(x, to_z(photo)) for name, x in answers.items()})
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    try:
        o = parse(Options, sys.argv[1:] if arguments is None else arguments, __doc__)
        check(o)
        require(o, "only", {*o.only} <= {*DAMAGES}, ", ".join(DAMAGES))
        model, photos = open_model(o.model, steps=o.steps, tile=o.tile), photographs(Path(o.photos), o.count)
        require(model.config, "channels", model.config.channels == 3, "3, for photographs have colour")
    except SettingsError as failure:
        print(f"photos.py: {failure}", file=sys.stderr)
        return 2
    if cv2 is None:
        print("The unsharp mask is the only peer: pip install opencv-python-headless scikit-image PyWavelets\n")
    print(f"{len(photos)} photographs, PSNR in dB\n\n| damage | input | model | best simple peer |\n|---|---|---|---|")
    for title in o.only or DAMAGES:
        means = measure(model, DAMAGES[title], photos, o.draws)
        best = max(means.keys() - {"input", "model"}, key=means.get)
        print(f"| {title} | {means['input']:.2f} | {means['model']:.2f} | {means[best]:.2f} ({best}) |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
