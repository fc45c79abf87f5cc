"""The classifier that judges samples, trained on the data set itself, and the files that keep it and its features."""
import hashlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from images import data, one_line
from images.packs import Photos
from support.checkpoints import load_tensors
from support.disk import write_atomically


class Classifier(nn.Module):
    """Images (B, C, side, side) in [-1, 1] -> `features` (B, 32, 64 or 128) -> `head`, logits.

    A CPU core takes a minute for an epoch of CIFAR-10.
    """

    RECIPE = dict(batch_size=128, peak=5e-3, decay=5e-3)  # images a step, largest learning rate, weight decay

    def __init__(self, channels: int, classes: int, side: int):
        super().__init__()
        halvings = max(1, round(math.log2(side)) - 2)  # down to 4x4
        dims = [channels] + [32 * min(2**i, 4) for i in range(halvings)]
        self.features = nn.Sequential(*map(Block, dims, dims[1:]), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(dims[-1], classes)

    def learn(self, images: data.Images, epochs: int, device) -> dict:
        """Trains on the training images, flipped at random -> its weights, and its accuracy (%) on all test images."""
        batch_size, peak, decay = self.RECIPE.values()
        self.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(self.parameters(), peak, weight_decay=decay)
        steps = -(-epochs * len(images.train) // batch_size)
        for step in tqdm(range(steps), desc="classifier", disable=None, leave=False):
            x, y, _ = images.batch(data.batch_indices(len(images.train), batch_size, 0, step), device)
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
            optimizer.param_groups[0]["lr"] = peak * min(5 * (step + 1) / steps, 1.25 * (1 - step / steps))
            optimizer.zero_grad()
            F.cross_entropy(self.head(self.features(x)), y, label_smoothing=0.1).backward()
            optimizer.step()
        self.eval()
        with torch.no_grad():
            batches = [images.batch(rows, device, "test") for rows in torch.arange(len(images.test)).split(500)]
            right = sum((self.head(self.features(x)).argmax(1) == y).sum().item() for x, y, _ in batches)
        weights = {name: weight.cpu() for name, weight in self.state_dict().items()}
        return dict(weights=weights, accuracy=100 * right / len(images.test))


class Block(nn.Module):
    """Halves the sides, then a residual convolution."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.halve = nn.Sequential(nn.Conv2d(dim_in, dim_out, 4, 2, 1, bias=False), nn.BatchNorm2d(dim_out), nn.ReLU())
        self.stay = nn.Sequential(nn.Conv2d(dim_out, dim_out, 3, 1, 1, bias=False), nn.BatchNorm2d(dim_out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        return x + self.stay(x)


# ------------------------------------------------------------------------------------------------------------ the cache

def digest(*things) -> str:
    """8 hexadecimal digits of all that a kept file depends on: tensors, iterators of them, what prints as what it is.

    A tensor and its pieces one after the other are the same.
    """
    total = hashlib.blake2b(digest_size=4)
    for thing in things:
        if not (torch.is_tensor(thing) or isinstance(thing, Iterator)):
            total.update(repr(thing).encode())
            continue
        for piece in [thing] if torch.is_tensor(thing) else thing:
            total.update(piece.cpu().flatten().numpy())
    return total.hexdigest()


def pieces(images: Tensor | Photos) -> Iterator[Tensor]:
    """All images, 500 (B, C, H, W) uint8 at a time; of photographs the crops from their middles."""
    for rows in torch.arange(len(images)).split(500):
        yield images[rows]


def cached(path: str, make):
    """make() -> tensors and plain values, from the file that kept them the last time if it is there and whole."""
    try:
        return load_tensors(Path(path))
    except Exception:  # of what reads it alone: the file is not there, or damaged, which shows in many ways
        value = make()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda f: torch.save(value, f))
    except (OSError, RuntimeError) as failure:  # torch.save's, on a full disk
        print(f"warning: {path} can't be written ({one_line(failure)}); the next evaluation makes it again",
              file=sys.stderr)
    return value
