"""Two folders of pairs: which damaged image belongs to which clean one, and how many times smaller it is."""
import os
import warnings
from pathlib import Path

from images import DatasetError
from images.files import first_few, list_images


def partners(root: Path, names: list[str], paired: Path) -> tuple[dict[str, str], list[str]]:
    """The images `names` of root and those of paired -> clean path: damaged path, where they are the same or differ in
    the ending only; and a line for each image that has no partner."""
    others = list_images(paired)
    pairs = {name: name for name in set(names).intersection(others)}
    clean = _by_stem(root, [name for name in names if name not in pairs])
    damaged = _by_stem(paired, [name for name in others if name not in pairs])
    pairs |= {clean[stem]: damaged[stem] for stem in clean.keys() & damaged.keys()}
    lone = clean.keys() ^ damaged.keys()
    if not pairs:
        raise DatasetError(f"{paired}: none of its images has the same name as one in {root}; rename them: "
                           f"{first_few(lone)}")
    if lone:
        warnings.warn(f"{len(lone)} images are in only one of {root} and {paired} and left out: {first_few(lone)}")
    left_out = [f"{root / clean[stem]}: has no partner in {paired}" for stem in sorted(clean.keys() - damaged.keys())]
    left_out += [f"{paired / damaged[stem]}: has no partner in {root}"
                 for stem in sorted(damaged.keys() - clean.keys())]
    return pairs, left_out


def _by_stem(folder: Path, names: list[str]) -> dict[str, str]:
    """Path without its ending -> path."""
    paths = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        if stem in paths:
            raise DatasetError(f"{folder}: more than one image is called {stem} ({paths[stem]}, {name}); keep one")
        paths[stem] = name
    return paths


def check_shape(clean: tuple[int, int], damaged: tuple[int, int], path: Path) -> None:
    """DatasetError where the damaged image `path` has other proportions, so it belongs to another picture."""
    if abs(damaged[0] * clean[1] - damaged[1] * clean[0]) > max(clean):  # a pixel of the damaged image is allowed
        raise DatasetError(f"{path}: has {_by(damaged)} pixels, its partner {_by(clean)}, which is not the same shape; "
                           "crop one of them")


def factor_of(clean: tuple[int, int], damaged: tuple[int, int]) -> int:
    """How many times longer the clean image's sides are than its partner's; 0 where that is no whole number.

    A side that it does not divide may have been rounded up or down: half of 101 is 50 or 51.
    """
    factor = round(max(clean) / max(damaged))
    return 0 if any(abs(c - factor * d) >= max(factor, 1) for c, d in zip(clean, damaged)) else factor


def pair_factor(pairs: list[tuple]) -> int:
    """The factor_of all pairs. DatasetError where it is not one whole number for all.

    pairs: for each (width, height) of the clean image, of the damaged one, and the damaged one's path.
    """
    found = {}  # factor -> a damaged image that has it
    for clean, damaged, path in pairs:
        factor = factor_of(clean, damaged)
        if factor < 1:
            raise DatasetError(f"{path}: has {_by(damaged)} pixels, its partner {_by(clean)}; make the damaged images "
                               "as large as the clean ones, or all of them the same whole number of times smaller")
        found[factor] = path
    if len(found) > 1:
        raise DatasetError(f"{found[max(found)]}: is {max(found)} times smaller than its partner, but "
                           f"{found[min(found)]} {min(found)} times; make it the same number for all")
    return max(found)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
