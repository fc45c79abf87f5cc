"""Checkpoints as a bad disk, another program or somebody with bad intent leaves them."""
import pickle
import random
import zipfile
from pathlib import Path

import torch


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def damage(path: Path, chance: random.Random, marker: Path) -> str:
    """The file is replaced by a damaged one; how, in words."""
    content = path.read_bytes()
    path.unlink()  # it may have a second name
    place = chance.randrange(len(content))
    if chance.random() < 0.1:  # where the list of entries is
        place = len(content) - 1 - place // 20
    replaced = {
        "truncated": content[:place],
        "a bit": content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1:],
        "zeros": content[:place] + bytes(len(content) - place),  # a file system wrote the length before the content
        "empty": b"", "text": b"epoch 3\n" * 1000, "code": pickle.dumps(Bomb(marker))}
    saved = {"torch": {"model": torch.zeros(2), "step": 7}, "list": [1, 2], "tensor": torch.zeros(3),
             "code in torch": {"step": Bomb(marker)}, "old code": {"step": Bomb(marker)}}
    how = chance.choice([*replaced, "a bit", *saved, "entry gone", "entry wrong", "entry short", "entry more"])
    if how in saved:
        torch.save(saved[how], path, _use_new_zipfile_serialization=how != "old code")
        return how
    path.write_bytes(replaced.get(how, content))
    if how.startswith("entry"):
        damage_entry(path, how, chance)
    return f"{how} at {place}"


def damage_entry(path: Path, how: str, chance: random.Random):
    """A zip file whose checksums are right, but one entry is missing, is another, is shorter or is new."""
    with zipfile.ZipFile(path) as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    name = chance.choice([name for name, content in entries.items() if content])
    if how == "entry gone":
        del entries[name]
    elif how == "entry wrong":
        entries[name] = entries[name][:-1] + bytes([entries[name][-1] ^ 255]) if "/data/" not in name else b"?"
    elif how == "entry short":
        entries[name] = entries[name][:-1]
    else:
        entries["archive/more"] = b"?"
    with zipfile.ZipFile(path, "w") as whole:
        for name, content in entries.items():
            whole.writestr(name, content)
