"""The images of a folder: which are trained on and which held out, and which damaged image belongs to which clean."""
import hashlib
import os
from pathlib import Path

from images import DatasetError
from images.files import first_few, list_images

TRAIN = ("train", "training")  # names of folders, in capitals or not
TEST = ("test", "testing", "val", "valid", "validation")  # of several the first in this list is taken
SHARE = 0.1  # of the images is held out
MOST = 1000  # images that are held out


def split_names(names: list[str]) -> tuple[list[str], list[str], dict[str, str | None]]:
    """A folder's images (relative paths) -> the training images, the test images, and the class folder of each image.

    The folders train and test are the split where both exist; else names choose, see hold_out.
    """
    top = {name: name.split("/")[0].lower() if "/" in name else None for name in names}
    test_folder = next((kind for kind in TEST if kind in top.values()), None)
    is_split = test_folder and any(kind in TRAIN for kind in top.values())
    if is_split:
        train = [name for name in names if top[name] in TRAIN]
        test = [name for name in names if top[name] == test_folder]
    else:
        held_out = hold_out(names)
        train, test = [name for name in names if name not in held_out], sorted(held_out)
    # class folders lie in train and test, or in a train that is all there is
    level = 1 if is_split or all(kind in TRAIN for kind in top.values()) else 0
    return train, test, {name: name.split("/")[level] if name.count("/") > level else None for name in names}


def hold_out(names: list[str]) -> set[str]:
    """About a tenth of the images, at most 1,000 and at least one (none of a single image), by a hash of their names.

    So an image that was trained on is not held out when others are added. The endings of the names do not matter.
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
    clean, damaged = (_by_stem(folder, [name for name in listed if name not in pairs])
                      for folder, listed in ((root, names), (paired, others)))
    pairs |= {clean[stem]: damaged[stem] for stem in clean.keys() & damaged.keys()}
    if not pairs:
        raise DatasetError(f"{paired}: none of its images has the same name as one in {root}; rename them: "
                           f"{first_few(damaged)}")
    left_out = [f"{root / clean[stem]}: has no partner in {paired}" for stem in clean.keys() - damaged.keys()]
    left_out += [f"{paired / damaged[stem]}: has no partner in {root}" for stem in damaged.keys() - clean.keys()]
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
    """How many times longer a clean image's sides are than those of its partner, the file `path`: a whole number, where
    half of 101 is 50 or 51. Raises DatasetError."""
    factor = max(1, round(max(clean) / max(damaged)))
    if any(abs(c - factor * d) >= factor for c, d in zip(clean, damaged)):
        raise DatasetError(f"{path}: has {damaged[0]}x{damaged[1]} pixels, its partner {clean[0]}x{clean[1]}; make it "
                           "as large, or a whole number of times smaller")
    return factor
