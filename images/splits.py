"""Which images of a folder are trained on and which are held out: its own split, or a tenth, chosen by their names."""
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from images import DatasetError
from support.disk import read_json, write_atomically

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
    own: bool  # whether the folder itself says which are the test images


def split_names(names: list[str], sides: dict[str, bool]) -> Split:
    """The split of the folder's images (relative paths), by its folders train and test where both exist.

    Else names choose, see hold_out.
    """
    top = {name: name.split("/")[0].lower() if "/" in name else None for name in names}
    test = next((kind for kind in TEST if kind in top.values()), None)
    if test and any(kind in top.values() for kind in TRAIN):
        return Split([name for name in names if top[name] in TRAIN], [name for name in names if top[name] == test],
                     [name for name in names if top[name] not in (*TRAIN, test)], level=1, own=True)
    held_out = hold_out(names, sides)
    level = int(all(kind in TRAIN for kind in top.values()))
    return Split([name for name in names if name not in held_out], [name for name in names if name in held_out], [],
                 level, own=False)


def hold_out(names: list[str], sides: dict[str, bool]) -> set[str]:
    """About a tenth of the images, at most 1,000 and at least one (none of a single image), by a hash of their names.

    So however many images are added, an image that was trained on is never held out later. Images whose names differ
    in the ending only are on one side. sides: images that are held out or not whatever their hash says.
    """
    place = {name: int.from_bytes(hashlib.sha256(os.path.splitext(name)[0].encode(errors="surrogateescape"))
                                  .digest()[:8], "big") / 2**64 for name in names}  # in [0, 1)
    in_order = sorted(names, key=lambda name: (place[name], name))
    count = min(max(1, sum(place[name] < SHARE for name in names)), MOST, len(names) - 1)
    held_out = set(in_order[:count])
    return {name for name in names if sides.get(name, name in held_out)}


def known_sides(folder: Path, names: list[str], limit: int | None) -> dict[str, bool]:
    """Of a folder that was packed when position decided what is held out: the images that a hash would put elsewhere.

    They stay where they were: the first start that finds such a pack in `folder`, and as many images, writes them into
    sides.json there, which later packs in that folder leave alone. {} for other folders. Raises DatasetError.
    """
    file = folder / "sides.json"
    try:
        sides = read_json(file)
        if not isinstance(sides, dict):
            raise ValueError
        return sides
    except ValueError as error:
        raise DatasetError(f"{file}: is damaged; remove it, and names alone decide what is held out") from error
    except OSError:
        pass
    count = min(max(1, len(names) // 10), MOST, len(names) - 1)
    rows = {(2 * i + 1) * len(names) // (2 * count) for i in range(count)}
    packed = min(count, limit or count) + min(len(names) - count, limit or len(names))
    try:
        stamp = read_json(folder / "index.json")["stamp"]
        if (stamp["version"], stamp["files"]) != (1, packed):
            return {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    by_name, by_position = hold_out(names, {}), {names[row] for row in rows}
    sides = {name: name in by_position for name in sorted(by_name ^ by_position)}
    write_atomically(file, lambda f: f.write(json.dumps(sides).encode()))
    return sides
