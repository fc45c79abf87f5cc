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

from images import SettingsError, one_line
from images.corruptions import task_names
from support.machine import bf16_helps, pick_device
from support.settings import PRESETS
from trainer import Config


@dataclass
class Common:
    """What to measure. Times are wall-clock seconds."""

    # method, network and batch of this preset of trainer.py; auto: cifar10-sr on a GPU, small on a CPU
    preset: str = "auto"
    device: str = "auto"  # auto: cuda if there is one; or cuda, cuda:1, cpu
    repeats: int = 5  # turns that each time is the median of (samplers: 3 at most)
    seconds: float = 1.0  # that a turn takes at least
    out: str | None = None  # the JSON file; None: in runs/, named by the time
    quick: bool = False  # a tiny network and short turns: shows that the script works, measures nothing

    def check(self):
        """Raises SettingsError, one line that names field, value and what is allowed."""
        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and not isinstance(number, bool) and number < 1:
                    raise SettingsError(f"{name} = {number}: allowed is 1 or more")
        if not self.seconds > 0:
            raise SettingsError(f"seconds = {self.seconds}: allowed is a number above 0")
        if self.preset != "auto" and self.preset not in PRESETS:
            raise SettingsError(f"preset = {self.preset!r}: allowed are auto, {', '.join(PRESETS)}")

    def config(self, **sizes: int | None) -> tuple[Config, torch.device]:
        """The training run that is measured. Raises SettingsError.

        It sees drawn pictures: no speed depends on what is in them.
        """
        self.check()
        device = pick_device(self.device)
        name = self.preset
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


def timer(call: Callable[[], object], device: torch.device) -> Callable[[int], float]:
    """n -> the seconds that n calls take, until the device has done them."""
    def turn(n: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            call()
        synchronize(device)
        return time.perf_counter() - start

    return turn


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(work: dict[str, Callable[[int], float]], repeats: int, seconds: float) -> dict[str, list[float] | str]:
    """{name: n -> seconds of n calls} -> {name: seconds a call, one number a turn}, in the order A B C A B C ...

    A turn makes as many calls as fill `seconds`. What fails, out of memory say, drops out, and its result is the error.
    """
    count, times = {}, {name: [] for name in work}
    for turn in range(-1, repeats):  # turn -1 warms up, and tells how many calls a turn needs
        for name, run in work.items():
            if not isinstance(times[name], list):
                continue
            say(f"turn {turn + 1} of {repeats}: {name}" if turn >= 0 else f"warm-up: {name}")
            try:
                if turn >= 0:
                    times[name].append(run(count[name]) / count[name])
                    continue
                once = run(1)
                if once < seconds:  # else the call is so long that what the first one sets up hardly counts
                    once = run(1)
                count[name] = max(1, round(seconds / max(once, 1e-9)))
            except Exception as failure:
                times[name] = failed(failure)
    say("")
    return times


def say(what: str):
    """What is being done, on the terminal's last line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def failed(failure: Exception) -> str:
    if isinstance(failure, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    return f"{type(failure).__name__}: {one_line(failure)[:150]}"


def rows(times: dict[str, list[float] | str], plain: str | None, images: int) -> list[dict]:
    """A row for each name: median seconds a call of `images` images, images/s, times as fast as `plain`."""
    result = []
    for name, turns in times.items():
        row = dict(name=name)
        if isinstance(turns, str):
            row |= dict(error=turns)
        else:
            seconds = statistics.median(turns)
            row |= dict(turns=turns, seconds=seconds, images_per_second=images / seconds)
            if isinstance(times.get(plain), list):
                row |= dict(ratio=statistics.median(p / s for p, s in zip(times[plain], turns)))
        result.append(row)
    return result


# -------------------------------------------------------------------------------------------------------------- report

def cells(row: dict) -> list[str]:
    """Cells: milliseconds with their spread, images/s, times as fast as the plain one."""
    if "seconds" not in row:
        return [row["error"], "", ""]
    low, middle, high = (1000 * x for x in (min(row["turns"]), row["seconds"], max(row["turns"])))
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    return [f"{middle:.4g} ({low:.4g}-{high:.4g})", f"{row['images_per_second']:,.4g}", ratio]


def size(number: float | None) -> str:
    return "" if number is None else f"{number / 2**30:.2f} GiB"


def markdown(title: str, head: list[str], table: list[list]) -> str:
    table = [[str(cell).replace("|", "/") for cell in line] for line in (head, ["---"] * len(head), *table)]
    return title + "\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in table)


def machine(device: torch.device) -> dict:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()[0].strip("\t :")
    result = dict(
        cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), bf16=bf16_helps(device),
        load=os.getloadavg()[0], system=platform.system(), python=platform.python_version(), torch=torch.__version__,
        torchvision=torchvision.__version__, torchdiffeq=torchdiffeq.__version__)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        result |= dict(gpu=torch.cuda.get_device_name(device), gpu_bytes=gpu.total_memory, cuda=torch.version.cuda,
                       cudnn=torch.backends.cudnn.version())
    return result


def describe(report: dict) -> str:
    m = report["machine"]
    chip = m.get("gpu") or f"{m['cpu']}, {m['threads']} threads"
    busy = ""
    if m["load"] > m["cores"] / 4:
        busy = (f"\nThe machine was busy before this run (load {m['load']:.1f} on {m['cores']} cores): "
                "do not trust these figures.")
    return f"{chip}; torch {m['torch']}, Python {m['python']}\n`{report['command']}`{busy}\n"


def save(report: dict, given: str | None, kind: str, started: float) -> Path:
    """Writes the report to the file that was named, or to one of the time the run started."""
    path = Path(given or f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path
