"""The training step in a process of its own: its time, arithmetic, memory and start-up, by size or by way to run it.

    python benchmarks/growth.py                    batch, image side and network width, one at a time
    python benchmarks/growth.py --preset cifar10-sr --widths 64 128
    python benchmarks/growth.py --variants         precision and memory format, one at a time; --compile, --peer

Prints a Markdown table, with the power laws that fit it best, and writes JSON. benchmarks/README.md explains the
columns.
"""
import contextlib
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import Common, cells, command, failed, fresh, in_turns, markdown, rows, timer
from benchmarks.step import Variant, flops_per_image, make_step, one_batch, variants
from support.bounds import Count
from support.machine import pick_device, set_up
from trainer import Config


@dataclass
class Options(Common):
    """What to measure. Times are wall-clock seconds."""

    # images per step; None: a quarter of the preset's to four times it
    batch_sizes: tuple[Count, ...] | None = None
    image_sizes: tuple[Count, ...] = (32, 64, 128)  # sides, pixels
    # channels of the network's first level; None: half the preset's to twice it
    widths: tuple[Count, ...] | None = None
    variants: bool = False  # in place of sizes: each way to run the network, at the preset's own size
    batch_size: Count | None = None  # of --variants; None: the preset's
    compile: bool = False  # of --variants: also compiled. TORCHINDUCTOR_CACHE_DIR names the folder of its cache
    peer: bool = False  # of --variants: also diffusers' UNet2DModel of the same widths (pip install diffusers)


def measure(o: Options, report: dict):
    """A fresh process for each row: memory is measured as if nothing else had run."""
    config, device = o.config(batch_size=o.batch_size)
    report["config"] = asdict(config)
    if o.variants:
        todo = [("way to run it", config, variant) for variant in variants(device, o.compile, o.peer)]
    else:
        batch, width = config.batch_size, config.unet_channels
        batches, widths = o.batch_sizes, o.widths
        if batches is None:
            batches = sorted({max(1, batch // 4), max(1, batch // 2), batch, 2 * batch, 4 * batch})
        if widths is None:
            widths = sorted({max(8, width // 2), width, 2 * width})
        sizes = dict(batch_size=batches, image_size=o.image_sizes, unet_channels=widths)
        todo = [(field, replace(config, **{field: number}), variants(device)[-1])
                for field, numbers in sizes.items() for number in numbers]
    report["rows"] = []
    for varies, sized, variant in todo:
        row = dict(name=variant.name, varies=varies, batch_size=sized.batch_size, image_size=sized.image_size,
                   unet_channels=sized.unet_channels)
        try:
            row |= fresh(one_step, sized, variant, o.repeats, o.seconds, time.time())
        except Exception as failure:
            row["error"] = failed(failure)
        report["rows"].append(row)
    print(show(report))


def one_step(config: Config, variant: Variant, repeats: int, seconds: float, began: float) -> dict:
    """Seconds of a step; from `began` to the end of the first one; bytes in memory at most, after that one."""
    device = pick_device(config.device)
    set_up(device)
    torch.backends.cudnn.benchmark = True
    step = make_step(config, variant, one_batch(config, device))
    timer(step).timeit(1)
    start_up = time.time() - began
    if not variant.graph:  # which has its memory from its capture on
        forget_peak(device)
    (row,) = rows(in_turns({variant.name: timer(step)}, repeats, seconds), None, config.batch_size)
    return row | dict(start_up=start_up, peak=peak(device), flops=flops_per_image(config, device, variant.peer))


def forget_peak(device: torch.device):
    """The first step compiles, and tries algorithms out: that is not what training needs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int | None:
    """Peak bytes allocated on the GPU, or resident in this process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # getrusage's peak would be inherited from the parent process
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


def exponent(x: list[float], y: list[float]) -> float:
    """a of the power law y ~ x^a that fits best."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def show(report: dict) -> str:
    table, laws = [], []
    for row in report["rows"]:
        milliseconds, images_per_second, _ = cells(row)
        line = [row["name"], row["batch_size"], row["image_size"], row["unet_channels"], milliseconds,
                images_per_second]
        if "seconds" in row:
            memory = "" if row["peak"] is None else f"{row['peak'] / 2**30:.2f} GiB"
            line += [f"{row['flops'] / 1e9:.3g}", f"{row['flops'] * row['images_per_second'] / 1e12:.3g}", memory,
                     f"{row['start_up']:.1f}"]
        table.append(line + [""] * (10 - len(line)))
    for field in ("batch_size", "image_size", "unet_channels"):
        some = [row for row in report["rows"] if row["varies"] == field and "seconds" in row]
        x = [row[field] for row in some]
        if len(set(x)) > 1:
            time = exponent(x, [row["seconds"] for row in some])
            arithmetic = exponent(x, [row["flops"] * row["batch_size"] for row in some])
            laws.append(f"A step's time grows as {field}^{time:.2f}, its arithmetic as {field}^{arithmetic:.2f}.")
            if field == "batch_size" and all(row["peak"] for row in some):
                memory = statistics.linear_regression(x, [row["peak"] for row in some])
                laws.append(f"Memory: {memory.intercept / 2**30:.2f} GiB + {memory.slope / 2**20:.3g} MiB per image.")
    head = ["forward + backward + step", "batch", "side", "width", "ms (min-max)", "images/s", "GFLOP per image",
            "TFLOP/s", "peak memory", "start-up s"]
    return markdown("The training step, each row in a process of its own.", head, table) + "\n" + "\n".join(laws)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    return command("growth", Options, measure, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
