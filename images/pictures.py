"""Images as values and as pictures to look at: conversions, PSNR, grids with titled columns, the path of a sampler."""
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TITLE_SIZE = 13  # height of the letters in pixels


def to_float(u8: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return u8.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8, rounded; what lies outside is clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(x: Tensor, truth: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, dB, of x (B, C, H, W) as 8-bit images."""
    return psnr_of_each(x, truth).mean().item()


def psnr_of_each(x: Tensor, truth: Tensor) -> Tensor:
    """The peak signal-to-noise ratio, dB, of each of x (B, C, H, W) as 8-bit images: (B,)."""
    error = (to_uint8(x).float() - to_uint8(truth).float()).square().flatten(1).mean(1)
    least = 1 / x[0].numel()  # one level in one value: an exact image does not count as infinitely good
    return 10 * torch.log10(255**2 / error.clamp(min=least))


def grid(images: Tensor, columns: int | None = None) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1] -> one picture (H', W', 3) uint8, up to twice as high as wide.

    Small images are enlarged.
    """
    from torchvision.utils import make_grid  # a second to import

    scale = max(1, 64 // images.shape[-1])
    images = to_uint8(images).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    columns = columns or 2 ** math.ceil(math.log2(len(images) / 2) / 2)
    return make_grid(images, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).contiguous().numpy()


def titled(titles: list[str], pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) of one height in a row, each with its title above it."""
    cells = [np.pad(picture, ((TITLE_SIZE + 9, 6), (6, 6), (0, 0)), constant_values=255) for picture in pictures]
    page = Image.fromarray(np.concatenate(cells, axis=1))
    left = 0
    for title, cell in zip(titles, cells, strict=True):
        room, font = cell.shape[1] - 4, ImageFont.load_default(TITLE_SIZE)
        if font.getlength(title) > room:
            font = ImageFont.load_default(max(6, TITLE_SIZE * room / font.getlength(title)))
        ImageDraw.Draw(page).text((left + cell.shape[1] / 2, 4), title, fill="black", font=font, anchor="mt")
        left += cell.shape[1]
    return np.asarray(page)


def row_titles(titles: list[str], height: int) -> np.ndarray:
    """A picture of the titles, `height` pixels high, to stand to the left of the rows that they name."""
    font = ImageFont.load_default(TITLE_SIZE)
    page = Image.new("RGB", (math.ceil(max(map(font.getlength, titles))), height), "white")
    for row, title in enumerate(titles):
        middle = (row + 0.5) * height / len(titles)
        ImageDraw.Draw(page).text((page.width, middle), title, fill="black", font=font, anchor="rm")
    return np.asarray(page)


def strip(trace: list, frames: int = 9) -> np.ndarray:
    """The path of a sampler, a column for each time t. An image has a row of states above a row of clean estimates."""
    chosen = [trace[i] for i in np.linspace(0, len(trace) - 1, min(frames, len(trace))).round().astype(int)]
    columns = [grid(torch.stack([state, clean], 1).flatten(0, 1), columns=1) for _, state, clean in chosen]
    rows = row_titles(["state", "clean estimate"] * len(chosen[0][1]), len(columns[0]))
    return titled(["", *(f"t = {t:.2f}" for t, _, _ in chosen)], [rows, *columns])


def deviation(draws: Tensor) -> Tensor:
    """Restorations of one image (n, ..., C, H, W) -> (..., 1, H, W), their standard deviation over the draws.

    The root of the channels' mean variance; 0 of a single draw.
    """
    n = len(draws)
    return draws.var(0, correction=1 if n > 1 else 0).mean(-3, keepdim=True).sqrt()
