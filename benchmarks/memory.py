"""What memory the training step of each preset needs, with and without activation checkpointing: counted, not run.

    python benchmarks/memory.py                    every preset of one network
    python benchmarks/memory.py cifar10-sr small   these

The step runs on tensors without content (FakeTensorMode), so a network of any size and batch can be counted on any
machine, and torch's MemTracker follows what is alive. A device's allocator and libraries come on top. Prints a Markdown
table.
"""
import sys
import warnings
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from images.corruptions import task_names
from support.model import make_unet
from support.settings import PRESETS
from trainer import Config

CLASSES = 10
FIXED = 20  # bytes a parameter: weight, gradient, AdamW's two moments, and the average, float32 each
HEAD = ("preset", "parameters", "batch", "side", "weights, optimizer, GiB", "activations, GiB", "in all, GiB",
        "with checkpointing, GiB")


def count(config: Config) -> tuple[int, int]:
    """Parameters of the network; the most bytes of activations and temporaries alive at any moment of a step."""
    c, side = config, config.image_size
    paired = "paired" in task_names(c.task)
    with torch.no_grad():  # methods make their tables once: now, of real numbers
        few = torch.zeros(1, c.channels, side, side)
        c.chosen.loss(lambda x, *_: torch.zeros_like(x), c.damaged(few, None, few if paired else None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = make_unet(c, CLASSES if c.unet_use_classes else 0)
        z1, y = torch.randn(c.batch_size, c.channels, side, side), torch.zeros(c.batch_size, dtype=torch.long)
        batch = c.damaged(z1, y if c.unet_use_classes else None, z1 if paired else None)
        tracker = MemTracker()
        tracker.track_external(net)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16):
                loss = c.chosen.loss(net, batch).mean()
            loss.backward()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        held = sum(size for kind, size in peak.items() if getattr(kind, "name", "") in ("PARAM", "GRAD", "BUFFER"))
        return sum(p.numel() for p in net.parameters()), peak["Total"] - held


def main(names: list[str]) -> int:
    """Exit status: 0 done, 2 bad input."""
    if {"-h", "--help"} & set(names):
        print(__doc__)
        return 0
    one_network = [name for name, preset in PRESETS.items() if not Config(**preset).chosen.levels]
    if unknown := [name for name in names if name not in one_network]:
        print(f"memory.py: preset = {unknown[0]!r}: allowed are {', '.join(one_network)}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    print(f"| {' | '.join(HEAD)} |")
    print("|---" * len(HEAD) + "|", flush=True)
    for name in names or one_network:
        config = Config(**PRESETS[name])
        parameters, activations = count(config)
        _, fewer = count(replace(config, unet_checkpointing=True))
        fixed = FIXED * parameters
        sizes = [f"{size / 2**30:.2f}" for size in (fixed, activations, fixed + activations, fixed + fewer)]
        cells = [name, f"{parameters / 1e6:.1f}M", str(config.batch_size), str(config.image_size), *sizes]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
