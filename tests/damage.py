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
    how = chance.choice(["truncated", "a bit", "a bit", "zeros", "empty", "text", "torch", "code", "code in torch",
                         "old code", "entry gone", "entry wrong", "entry short", "entry more"])
    place = chance.randrange(len(content))
    if how == "truncated":
        path.write_bytes(content[:place])
    elif how == "a bit":
        if chance.random() < 0.5:
            place = len(content) - 1 - place // 20  # where the list of entries is
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1:])
    elif how == "zeros":  # a file system that wrote the length before the content
        path.write_bytes(content[:place] + bytes(len(content) - place))
    elif how in ("empty", "text"):
        path.write_bytes(b"" if how == "empty" else b"epoch 3\n" * 1000)
    elif how == "torch":
        torch.save(chance.choice([[1, 2], {"model": torch.zeros(2), "step": 7}, torch.zeros(3)]), path)
    elif how == "code":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    elif how in ("code in torch", "old code"):
        torch.save({"step": Bomb(marker)}, path, _use_new_zipfile_serialization=how == "code in torch")
    else:
        damage_entry(path, content, how, chance)
    return f"{how} at {place}"


def damage_entry(path: Path, content: bytes, how: str, chance: random.Random):
    """A zip file whose checksums are right, but one entry is missing, is another, is shorter or is new."""
    path.write_bytes(content)
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
