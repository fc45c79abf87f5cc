"""How well a model restores whole photographs: PSNR, SSIM, bias and seconds beside the classical answers, as Markdown.

    python benchmarks/photos.py models/photos.safetensors --photos data/photos/test

Each photograph, cut to sides of multiples of 16, is damaged in each way and restored `--draws` times: a draw is scored,
and the mean of all draws. Classical are the damaged image itself (for sr: enlarged by the bicubic filter), and for blur
the best of an unsharp mask's strengths, chosen on the test photographs, so in its favour.
"""
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from PIL import Image
from torch import Tensor

from evaluation.judge import load_ssim
from images import SettingsError
from images.corruptions import Damage
from images.files import list_images, read_image, save_png
from images.pictures import psnr, titled, to_float, to_uint8
from sample import open_model
from support.bounds import require
from support.command_line import parse

DAMAGES = {  # title: task, knobs
    "sr 4": ("sr", dict(factor=4, down="bicubic", up="bicubic")),
    "sr 2": ("sr", dict(factor=2, down="bicubic", up="bicubic")),
    "jpeg 10": ("jpeg", dict(quality=10)),
    "jpeg 30": ("jpeg", dict(quality=30)),
    "blur 1.5": ("blur", dict(kernel="gaussian", taps=15, sigma=1.5)),
}
HOLES = {
    "centre": ("inpaint", dict(mask="center")),
    "freeform": ("inpaint", dict(mask="freeform-20-30")),
}
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)  # of the unsharp mask


@dataclass
class Options:
    """Which model, and which photographs."""

    model: tyro.conf.Positional[str]  # a run, a checkpoint or an exported file
    photos: str  # folder of photographs that training never saw
    count: int | None = None  # how many of them, evenly spread; None: all
    draws: int = 8  # restorations of each
    steps: int | None = None  # of the sampler; None: the model's
    tile: int | None = None  # as sample.py's
    only: tuple[str, ...] = ()  # damages to measure, by the names in DAMAGES and HOLES; none: all
    pictures: str | None = None  # folder for pictures of the first eight photographs


def unsharp(x: Tensor, strength: float) -> Tensor:
    """x + strength (x - blurred x), with a gaussian of 1.5 pixels."""
    blurred = Damage(kernel="gaussian", taps=15, sigma=1.5)("blur", x).zlo
    return (x + strength * (x - blurred)).clamp(-1, 1)


def photographs(folder: Path, count: int | None, channels: int) -> list[tuple[str, Tensor]]:
    """(name, (1, C, H, W) in [-1, 1]) of `count` of the folder's photographs, evenly spread."""
    names = list_images(folder)
    count = len(names) if count is None else min(count, len(names))
    names = [names[i * len(names) // count] for i in range(count)]
    found = []
    for name in names:
        x = to_float(read_image(folder / name, channels))[None]
        found.append((name, x[:, :, : x.shape[2] // 16 * 16, : x.shape[3] // 16 * 16]))
    return found


def measure(model, task: str, knobs: dict, photos: list, draws: int, ssim, pictures: Path | None, title: str):
    """-> {answer: [PSNR, SSIM, bias by channel]}, means over the photographs; the seconds of a draw."""
    scores, seconds = defaultdict(list), 0.0
    for number, (name, z1) in enumerate(photos):
        torch.manual_seed(number)
        batch = Damage(**knobs)(task, z1)
        hole = batch.unknown if task == "inpaint" else None
        start = time.perf_counter()
        noise = [[(1.0, (0, name, draw))] for draw in range(draws)]
        hole = None if hole is None else hole.expand(draws, -1, -1, -1)
        made = model.sample(batch.zlo.expand(draws, -1, -1, -1), hole, [None] * draws, noise).clamp(-1, 1)
        seconds += time.perf_counter() - start
        before = "bicubic" if task == "sr" else "damaged"
        answers = {before: batch.zlo, "one draw": made[:1], f"mean of {draws}": made.mean(0, keepdim=True)}
        if task == "blur":
            answers |= {f"unsharp {strength}": unsharp(batch.zlo, strength) for strength in STRENGTHS}
        for answer, x in answers.items():
            x, truth = to_uint8(x), to_uint8(z1)
            bias = (x.double() - truth.double()).mean((0, 2, 3)).tolist()
            scores[answer].append([psnr(to_float(x), z1), ssim(x, truth), *bias])
        if pictures and number < 8:
            columns = {"damaged": batch.zlo, "one draw": made[:1], "mean": made.mean(0, keepdim=True), "truth": z1}
            columns = [to_uint8(x[0]).permute(1, 2, 0).expand(-1, -1, 3).numpy() for x in columns.values()]
            page = titled(["damaged", "one draw", f"mean of {draws}", "truth"], columns)
            save_png(pictures / f"{title.replace(' ', '-')}-{Path(name).stem}.png", Image.fromarray(page))
    means = {answer: torch.tensor(rows, dtype=torch.float64).mean(0).tolist() for answer, rows in scores.items()}
    sharp = max((answer for answer in means if answer.startswith("unsharp")), key=lambda a: means[a][0], default=None)
    means = {a: m for a, m in means.items() if not a.startswith("unsharp") or a == sharp}
    return means, seconds / draws / len(photos)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    try:
        o = parse(Options, sys.argv[1:] if arguments is None else arguments, __doc__)
        require(o, "only", {*o.only} <= {*DAMAGES, *HOLES}, ", ".join([*DAMAGES, *HOLES]))
        model = open_model(o.model, steps=o.steps, tile=o.tile)
        photos, ssim = photographs(Path(o.photos), o.count, model.config.channels), load_ssim(16)
    except (SettingsError, ImportError) as failure:
        print(f"photos.py: {failure}", file=sys.stderr)
        return 2
    print(f"{len(photos)} photographs, {o.draws} draws\n")
    print("| damage | answer | PSNR, dB | SSIM | bias, levels | s a draw |\n|---|---|---|---|---|---|")
    damages = HOLES if model.tasks == ["inpaint"] else DAMAGES
    for title, (task, knobs) in damages.items():
        if o.only and title not in o.only or task not in model.tasks:
            continue
        means, seconds = measure(model, task, knobs, photos, o.draws, ssim, o.pictures and Path(o.pictures), title)
        for answer, (decibels, similarity, *bias) in means.items():
            took = f"{seconds:.2g}" if answer == "one draw" else ""
            shown = " ".join(f"{value:+.2f}" for value in bias)
            print(f"| {title} | {answer} | {decibels:.2f} | {similarity:.3f} | {shown} | {took} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
