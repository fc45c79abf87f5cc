"""The images of a folder: which are trained on and which held out, and which damaged image belongs to which clean."""
import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from images import DatasetError
from images.files import first_few, list_images

TRAIN = ("train", "training")  # names of folders, in capitals or not
TEST = ("test", "testing", "val", "valid", "validation")  # of several the first in this list is taken
SHARE = 0.1  # of the images is held out
MOST = 1000  # images that are held out


@dataclass
class Split:
    train: list[str]
    test: list[str]
    left_out: list[str]  # in neither
    level: int  # of the class folders: 0 in the folder itself, 1 in its train and test

    def label(self, name: str) -> str | None:
        """The class folder that the image is in."""
        return name.split("/")[self.level] if name.count("/") > self.level else None


def split_names(names: list[str]) -> Split:
    """The split of the folder's images (relative paths), by its folders train and test where both exist.

    Else names choose, see hold_out.
    """
    top = {name: name.split("/")[0].lower() if "/" in name else None for name in names}
    test = next((kind for kind in TEST if kind in top.values()), None)
    if test and any(kind in top.values() for kind in TRAIN):
        return Split([name for name in names if top[name] in TRAIN], [name for name in names if top[name] == test],
                     [name for name in names if top[name] not in (*TRAIN, test)], level=1)
    held_out = hold_out(names)
    level = int(all(kind in TRAIN for kind in top.values()))
    return Split([name for name in names if name not in held_out], [name for name in names if name in held_out], [],
                 level)


def hold_out(names: list[str]) -> set[str]:
    """About a tenth of the images, at most 1,000 and at least one (none of a single image), by a hash of their names.

    So however many images are added, an image that was trained on is never held out later. Images whose names differ
    in the ending only are on one side.
    """
    place = {name: int.from_bytes(hashlib.sha256(os.path.splitext(name)[0].encode(errors="surrogateescape"))
                                  .digest()[:8], "big") / 2**64 for name in names}  # in [0, 1)
    in_order = sorted(names, key=lambda name: (place[name], name))
    return set(in_order[:min(max(1, sum(place[name] < SHARE for name in names)), MOST, len(names) - 1)])


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


def factor_of(clean: tuple[int, int], damaged: tuple[int, int], path: str) -> int:
    """How many times longer a clean image's sides are than those of its partner, the file `path`.

    A side that the factor does not divide may have been rounded up or down: half of 101 is 50 or 51. Raises
    DatasetError where it is no whole number, or not the same for both sides.
    """
    factor = max(1, round(max(clean) / max(damaged)))
    if any(abs(c - factor * d) >= factor for c, d in zip(clean, damaged)):
        raise DatasetError(f"{path}: has {damaged[0]}x{damaged[1]} pixels, its partner {clean[0]}x{clean[1]}; make it "
                           "as large, or a whole number of times smaller")
    return factor


def pair_factor(found: dict[int, str]) -> int:
    """The factor_of all pairs. DatasetError where there are several. found: factor -> a damaged image that has it."""
    if len(found) > 1:
        least, most = min(found), max(found)
        raise DatasetError(f"{found[most]}: is {most} times smaller than its partner, but {found[least]} {least} "
                           "times; make it the same number for all")
    return min(found)
