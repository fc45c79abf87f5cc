"""The training step by size: its time, its arithmetic, and the memory that it needs.

    python benchmarks/growth.py                    batch, image side and network width, one at a time
    python benchmarks/growth.py --preset cifar10-sr --widths 64 128
    python benchmarks/growth.py --presets          memory of every preset, of those too large for here too

Memory is counted, not measured: the step runs on tensors without content (FakeTensorMode), and torch's MemTracker
follows what is alive. A device's allocator and libraries come on top. Prints a Markdown table, with the power laws that
fit it best, and writes JSON. benchmarks/README.md explains the columns.
"""
import math
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.common import Common, cells, command, failed, in_turns, markdown, rows, timer
from benchmarks.step import flops_per_image, make_step, one_batch, unet, variants
from images.corruptions import task_names
from support.bounds import Count
from support.machine import set_up
from support.settings import PRESETS
from trainer import Config

FIXED = 20  # bytes per parameter: weight, gradient, AdamW's two moments, and the average, float32 each


@dataclass
class Options(Common):
    """What to measure. Times are wall-clock seconds."""

    # images per step; None: a quarter of the preset's to four times it
    batch_sizes: tuple[Count, ...] | None = None
    image_sizes: tuple[Count, ...] = (32, 64, 128)  # sides, pixels
    # channels of the network's first level; None: half the preset's to twice it
    widths: tuple[Count, ...] | None = None
    presets: bool = False  # memory of each preset in place of all that


def count_memory(config: Config) -> dict:
    """Bytes of weights and optimizer; the most of activations and temporaries alive at any moment of a step, without
    and with activation checkpointing."""
    parameters, activations = alive(config)
    _, fewer = alive(replace(config, unet_checkpointing=True))
    return dict(parameters=parameters, fixed=FIXED * parameters, activations=activations, with_checkpointing=fewer)


def alive(config: Config) -> tuple[int, int]:
    """Parameters of the network, and what its step has alive at most besides them and their gradients, bytes."""
    c, paired = config, "paired" in task_names(config.task)
    with torch.no_grad():  # methods make their tables once: now, of real numbers
        few = torch.zeros(1, c.channels, c.image_size, c.image_size)
        c.chosen.loss(lambda x, *_: torch.zeros_like(x), c.damaged(few, None, few if paired else None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        net, z1 = unet(c), torch.randn(c.batch_size, *few.shape[1:])
        y = torch.zeros(c.batch_size, dtype=torch.long) if c.unet_use_classes else None
        batch = c.damaged(z1, y, z1 if paired else None)
        tracker = MemTracker()
        tracker.track_external(net)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16):
                loss = c.chosen.loss(net, batch).mean()
            loss.backward()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        held = sum(size for kind, size in peak.items() if getattr(kind, "name", "") in ("PARAM", "GRAD", "BUFFER"))
        return sum(p.numel() for p in net.parameters()), peak["Total"] - held


def measure(o: Options, report: dict):
    warnings.simplefilter("ignore")
    if o.presets:
        kinds = {name: Config(**preset) for name, preset in PRESETS.items()}
        report["presets"] = {name: dict(batch_size=c.batch_size, image_size=c.image_size) | count_memory(c)
                             for name, c in kinds.items() if not c.chosen.levels}
        table = [[name, f"{row['parameters'] / 1e6:.1f}M", row["batch_size"], row["image_size"], *memory_cells(row)]
                 for name, row in report["presets"].items()]
        print(markdown("Memory of a training step.", ["preset", "parameters", "batch", "side", *MEMORY], table))
        return
    config, device = o.config()
    set_up(device)
    batch, width = config.batch_size, config.unet_channels
    batches = o.batch_sizes or sorted({max(1, batch // 4), max(1, batch // 2), batch, 2 * batch, 4 * batch})
    widths = o.widths or sorted({max(8, width // 2), width, 2 * width})
    sizes = dict(batch_size=batches, image_size=o.image_sizes, unet_channels=widths)
    report |= dict(config=asdict(config), rows=[])
    for field, numbers in sizes.items():
        for number in numbers:
            c = replace(config, **{field: number})
            row = dict(varies=field, batch_size=c.batch_size, image_size=c.image_size, unet_channels=c.unet_channels)
            row |= dict(flops=flops_per_image(c, device)) | count_memory(c)
            try:
                work = dict(step=timer(make_step(c, variants(device)[-1], one_batch(c, device))))
                row |= rows(in_turns(work, o.repeats, o.seconds), None, c.batch_size)[0]
            except Exception as failure:
                row["error"] = failed(failure)
            report["rows"].append(row)
    print(show(report))


MEMORY = ("weights, optimizer, GiB", "activations, GiB", "in all, GiB", "with checkpointing, GiB")


def memory_cells(row: dict) -> list[str]:
    fixed, activations, fewer = row["fixed"], row["activations"], row["with_checkpointing"]
    return [f"{size / 2**30:.2f}" for size in (fixed, activations, fixed + activations, fixed + fewer)]


def exponent(x: list[float], y: list[float]) -> float:
    """a of the power law y ~ x^a that fits best."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def show(report: dict) -> str:
    table, laws = [], []
    for row in report["rows"]:
        tflops = f"{row['flops'] * row['images_per_second'] / 1e12:.3g}" if "seconds" in row else ""
        table.append([row["batch_size"], row["image_size"], row["unet_channels"], *cells(row)[:2],
                      f"{row['flops'] / 1e9:.3g}", tflops, *memory_cells(row)])
    for field in ("batch_size", "image_size", "unet_channels"):
        some = [row for row in report["rows"] if row["varies"] == field and "seconds" in row]
        x = [row[field] for row in some]
        if len(set(x)) > 1:
            time = exponent(x, [row["seconds"] for row in some])
            arithmetic = exponent(x, [row["flops"] * row["batch_size"] for row in some])
            laws.append(f"A step's time grows as {field}^{time:.2f}, its arithmetic as {field}^{arithmetic:.2f}.")
    head = ["batch", "side", "width", "ms (min-max)", "images/s", "GFLOP per image", "TFLOP/s", *MEMORY]
    return markdown("Growth of the training step.", head, table) + "\n" + "\n".join(laws)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    return command("growth", Options, measure, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
