"""What the benchmarks share: what is measured, timing in turns, and the tables and files that tell of it."""
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchdiffeq
import torchvision
from torch.utils.benchmark import Timer

from images import SettingsError, one_line
from images.corruptions import task_names
from support import bounds
from support.bounds import Count, Positive
from support.command_line import parse
from support.machine import bf16_helps, chip, code_version, pick_device
from support.settings import PRESETS
from trainer import Config


@dataclass
class Common:
    """What to measure. Times are wall-clock seconds."""

    # method, network and batch of this preset of trainer.py; auto: cifar10-sr on a GPU, small on a CPU
    preset: str = "auto"
    device: str = "auto"  # auto: cuda if there is one; or cuda, cuda:1, cpu
    repeats: Count = 5  # turns that each time is the median of (samplers: 3 at most)
    seconds: Positive = 1.0  # that a turn takes at least
    out: str | None = None  # the JSON file; None: in runs/, named by the time
    quick: bool = False  # a tiny network and short turns: shows that the script works, measures nothing

    def check(self):
        """Raises SettingsError, one line that names field, value and what is allowed."""
        bounds.check(self)
        bounds.require(self, "preset", self.preset in ("auto", *PRESETS), f"auto, {', '.join(PRESETS)}")
        if self.quick:
            self.repeats, self.seconds = 2, 0.01

    def config(self, **sizes: int | None) -> tuple[Config, torch.device]:
        """The training run that is measured, on drawn pictures: no speed depends on what is in them.

        Raises SettingsError.
        """
        device, name = pick_device(self.device), self.preset
        if name == "auto":
            name = "small" if device.type == "cpu" else "cifar10-sr"
        config = replace(Config(**PRESETS[name]), preset=name, dataset="shapes", paired_path=None, use_wandb=False,
                         device=self.device)
        if config.chosen.levels or "paired" in task_names(config.task):
            raise SettingsError(f"preset = {name!r}: allowed are those of one network and of tasks that make their "
                                "damaged images")
        if self.quick:
            config = replace(config, unet_channels=8, unet_dim_mults=(1, 2), image_size=16, batch_size=2)
        config = replace(config, **{field: size for field, size in sizes.items() if size})
        config.check()
        return config, device


def command(name: str, options, measure: Callable, description: str, arguments: list[str] | None) -> int:
    """A benchmark's main: measure(options, report) prints its tables and fills the report, which is written as JSON.

    Exit status: 0 done, 2 bad input, which is told in one line.
    """
    started = time.localtime()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        o = parse(options, arguments, description)
        o.check()
        report = dict(command=" ".join([f"python benchmarks/{name}.py", *arguments]),
                      machine=machine(pick_device(o.device)))
        print(describe(report))
        measure(o, report)
    except SettingsError as failure:
        print(f"{name}.py: {failure}", file=sys.stderr)
        return 2
    path = Path(o.out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S', started)}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")
    return 0


# -------------------------------------------------------------------------------------------------------------- timing

def timer(call: Callable[[], object], ready: Callable[[], object] = lambda: None) -> Timer:
    """Of call(), until the device has done it, with as many threads as there are; ready() is not timed."""
    return Timer("call()", "ready()", globals=dict(call=call, ready=ready), num_threads=torch.get_num_threads())


def in_turns(work: dict[str, Timer], repeats: int, seconds: float) -> dict[str, list[float] | str]:
    """{name: timer} -> {name: seconds of a call, one number for each turn}, in the order A B C A B C ...

    A turn makes as many calls as fill `seconds`. What fails, out of memory say, drops out, and its result is the error.
    """
    times = {name: [] for name in work}
    for _ in range(repeats):
        for name, each in work.items():
            if isinstance(times[name], list):
                try:
                    times[name].append(each.blocked_autorange(min_run_time=seconds).median)
                except Exception as failure:
                    times[name] = failed(failure)
    return times


def failed(failure: Exception) -> str:
    return f"{type(failure).__name__}: {one_line(failure)[:150]}"


def rows(times: dict[str, list[float] | str], plain: str | None, images: int) -> list[dict]:
    """A row for each name: median seconds of a call for `images` images, images/s, times as fast as `plain`."""
    result = []
    for name, turns in times.items():
        if isinstance(turns, str):
            result.append(dict(name=name, error=turns))
            continue
        seconds = statistics.median(turns)
        row = dict(name=name, turns=turns, seconds=seconds, images_per_second=images / seconds)
        if isinstance(times.get(plain), list):
            row["ratio"] = statistics.median(p / s for p, s in zip(times[plain], turns))
        result.append(row)
    return result


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -------------------------------------------------------------------------------------------------------------- report

def cells(row: dict) -> list[str]:
    """Cells: milliseconds with their spread, images/s, times as fast as the plain one."""
    if "seconds" not in row:
        return [row["error"], "", ""]
    low, middle, high = (1000 * x for x in (min(row["turns"]), row["seconds"], max(row["turns"])))
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    return [f"{middle:.4g} ({low:.4g}-{high:.4g})", f"{row['images_per_second']:,.4g}", ratio]


def markdown(title: str, head: list[str], table: list[list]) -> str:
    table = [[str(cell).replace("|", "/") for cell in line] for line in (head, ["---"] * len(head), *table)]
    return title + "\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in table)


def machine(device: torch.device) -> dict:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()[0].strip("\t :")
    return dict(chip=chip(device) if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
                cores=os.cpu_count(), bf16=bf16_helps(device), load=os.getloadavg()[0], system=platform.system(),
                python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                torchdiffeq=torchdiffeq.__version__, cuda=torch.version.cuda, code=code_version())


def describe(report: dict) -> str:
    m = report["machine"]
    busy = ""
    if m["load"] > m["cores"] / 4:
        busy = (f"\nThe machine was busy before this run (load {m['load']:.1f} on {m['cores']} cores): "
                "do not trust these figures.")
    return f"{m['chip']}; torch {m['torch']}, Python {m['python']}\n`{report['command']}`{busy}\n"
