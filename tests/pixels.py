"""Pixels of noise, and pictures of them to read."""
from pathlib import Path

import numpy as np
from PIL import Image


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def solid(path, value, size=(8, 8)):
    """A one-coloured picture, which keeps its value however it is resized: it can be told from the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def values(x):
    return x[:, 0, 0, 0].tolist()


def photo(width: int, height: int, channels=3, seed=0) -> np.ndarray:
    pixels = np.random.default_rng((seed, width, height)).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels if channels > 1 else pixels[..., 0]


def put(path: Path, pixels: np.ndarray, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path


def get(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def doubled(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(2, 0).repeat(2, 1)
