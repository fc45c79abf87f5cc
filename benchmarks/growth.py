"""How batch, image side and network width change a training step's time and memory, one at a time.

    python benchmarks/growth.py                                     the preset that trainer.py takes here
    python benchmarks/growth.py --preset cifar10-sr --widths 64 128

Prints a Markdown table, with the power laws that fit it best, and writes JSON. benchmarks/README.md explains the
columns.
"""
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.step import eager, in_process, variants
from benchmarks.timing import Common, cells, describe, machine, markdown, save, size
from images import SettingsError
from support.command_line import parse
from trainer import Config


@dataclass
class Options(Common):
    """What to measure. Times are wall-clock seconds."""

    batch_sizes: tuple[int, ...] | None = None  # images a step; None: a quarter of the preset's to four times it
    image_sizes: tuple[int, ...] = (32, 64, 128)  # sides, pixels
    widths: tuple[int, ...] | None = None  # channels of the network's first level; None: half the preset's to twice it


def measure_growth(o: Options, config: Config, device: torch.device, report: dict):
    """A fresh process for each batch, side and width: memory is measured as if nothing else had run."""
    batch, width = config.batch_size, config.unet_channels
    batches, widths = o.batch_sizes, o.widths
    if batches is None:
        batches = sorted({max(1, batch // 4), max(1, batch // 2), batch, 2 * batch, 4 * batch})
    if widths is None:
        widths = sorted({max(8, width // 2), width, 2 * width})
    variant = eager(variants(device, compiled=False))
    report["variant"], report["grow"] = variant.name, []
    for field, numbers in dict(batch_size=batches, image_size=o.image_sizes, unet_channels=widths).items():
        for number in numbers:
            sized = replace(config, **{field: number})
            sizes = dict(batch_size=sized.batch_size, image_size=sized.image_size, unet_channels=sized.unet_channels)
            row = dict(varies=field) | sizes | in_process(sized, variant, o.repeats, o.seconds)
            if "turns" in row:
                row["seconds"] = statistics.median(row["turns"])
                row["images_per_second"] = sized.batch_size / row["seconds"]
            report["grow"].append(row)


def exponent(x: list[float], y: list[float]) -> float:
    """a of the power law y ~ x^a that fits best."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def show_growth(report: dict) -> str:
    table, laws = [], []
    for row in report["grow"]:
        milliseconds, images_per_second, _ = cells(row)
        gflop = tflops = ""
        if "turns" in row:
            gflop = f"{row['flop_an_image'] / 1e9:.3g}"
            tflops = f"{row['flop_an_image'] * row['images_per_second'] / 1e12:.3g}"
        sizes = [row[field] for field in ("batch_size", "image_size", "unet_channels")]
        table.append([*sizes, milliseconds, images_per_second, gflop, tflops, size(row.get("peak_bytes"))])
    for field in dict.fromkeys(row["varies"] for row in report["grow"]):
        some = [row for row in report["grow"] if row["varies"] == field and "turns" in row]
        x = [row[field] for row in some]
        if len(set(x)) > 1:
            time = exponent(x, [row["seconds"] for row in some])
            arithmetic = exponent(x, [row["flop_an_image"] * row["batch_size"] for row in some])
            laws.append(f"A step's time grows as {field}^{time:.2f}, its arithmetic as {field}^{arithmetic:.2f}.")
            if field == "batch_size" and all(row["peak_bytes"] for row in some):
                memory = statistics.linear_regression(x, [row["peak_bytes"] for row in some])
                laws.append(f"Memory: {size(memory.intercept)} + {memory.slope / 2**20:.3g} MiB an image.")
    head = ["batch", "side", "width", "ms a step (min-max)", "images/s", "GFLOP an image", "TFLOP/s", "peak memory"]
    return markdown(f"Growth of the training step, {report['variant']}.", head, table) + "\n" + "\n".join(laws) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    started = time.time()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        o = parse(Options, arguments, __doc__)
        config, device = o.config()
        if o.quick:
            o = replace(o, repeats=2, seconds=0.01)
    except SettingsError as failure:
        print(f"growth.py: {failure}", file=sys.stderr)
        return 2
    command = " ".join(["python benchmarks/growth.py", *arguments])
    report = dict(command=command, machine=machine(device), config=asdict(config))
    print(describe(report))
    measure_growth(o, config, device, report)
    print(show_growth(report))
    print(f"written to {save(report, o.out, 'growth', started)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
