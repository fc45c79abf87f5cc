"""A folder of image files as training meets it: packed once, found again, read in batches; its time and its memory.

    python benchmarks/data.py                                 100,000 drawn JPEGs of 256x256: some 25 GB of disk
    python benchmarks/data.py --images 20000 --crop random    photographs of 256 to 512 pixels, and crops of them

Everything is written below --folder and removed at the end. Prints a Markdown table and writes JSON. Each row is
measured in a fresh process.
"""
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from benchmarks.common import command, markdown, synchronize
from images import data
from support import bounds
from support.bounds import Count, Positive
from support.machine import pick_device

PROCESSES = multiprocessing.get_context("spawn")


@dataclass
class Options:
    """What to measure. Times are wall-clock seconds."""

    images: Count = 100_000  # JPEG files
    side: Count = 256  # of the images in a batch, pixels
    crop: Literal["center", "random"] = "center"  # as trainer.py's; random: the files' sides are 1 to 2 times as long
    batch_size: Count = 256  # images
    seconds: Positive = 10.0  # that a row of batches takes at most
    device: str = "auto"  # where the batches go. auto: cuda if there is one; or cuda, cuda:1, cpu
    folder: str | None = None  # an existing one, with room for it all; None: where the system keeps temporary files
    out: str | None = None  # the JSON file; None: in runs/, named by the time

    def check(self):
        """Raises SettingsError, one line that names field, value and what is allowed."""
        bounds.check(self)
        bounds.require(self, "folder", self.folder is None or os.path.isdir(self.folder), "an existing folder")


# --------------------------------------------------------------------------------------------------------- the pictures

def draw(number: int, folder: Path, o: Options):
    """A JPEG of clouds, discs and grain: about as many bytes as a photograph of that size has."""
    random = np.random.default_rng(number)
    width, height = random.integers(o.side, 2 * o.side, 2) if o.crop == "random" else (o.side, o.side)
    image = Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    pen = ImageDraw.Draw(image)
    for x, y, r, *colour in random.integers(0, 256, (12, 6)):
        x, y, r = x * width // 256, y * height // 256, r * o.side // 1024 + 1
        pen.ellipse((x - r, y - r, x + r, y + r), fill=tuple(map(int, colour)))
    grain = random.integers(-9, 10, (height, width, 1), np.int16)
    image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
    image.save(folder / f"{number // 1000:05d}" / f"{number:08d}.jpg", quality=90)


def draw_all(folder: Path, o: Options):
    for number in range(0, o.images, 1000):
        (folder / f"{number // 1000:05d}").mkdir(parents=True)
    with ProcessPoolExecutor(mp_context=PROCESSES) as pool:
        made = pool.map(partial(draw, folder=folder, o=o), range(o.images), chunksize=100)
        for _ in tqdm(made, total=o.images, desc="drawing", unit="image", disable=None, leave=False):
            pass


# -------------------------------------------------------------------------------------------------------- what is timed

def load(o: Options, root: Path) -> data.Images:
    warnings.simplefilter("ignore")
    return data.load(str(root / "files"), o.side, data_path=str(root), crop=o.crop)


def start(o: Options, root: Path) -> dict:
    """Once the files are read for the first time, then once the pack is there."""
    begin = time.perf_counter()
    images = load(o, root)
    return dict(seconds=time.perf_counter() - begin, images=len(images.train) + len(images.test)) | memory()


def batches(o: Options, root: Path, whole: bool, cold: bool, barrier=None) -> dict:
    """Batches in random order: `whole` as the training step gets them, else gathered in the host's memory only.

    On a CPU, turning the pixels into float32 takes most of the whole.
    """
    device = pick_device(o.device)
    images = load(o, root)
    feed = data.Feed(images, device, o.batch_size, 0, ahead=3 if whole else 0)
    read_or_forget(root, cold)
    steps, begin = 0, time.perf_counter()
    while steps * o.batch_size < len(images.train) and time.perf_counter() - begin < o.seconds:
        feed(steps) if whole else feed.rows(steps)
        steps += 1
    synchronize(device)
    seconds = time.perf_counter() - begin
    if barrier:
        barrier.wait()  # until each has read its share, and none has left
    result = dict(seconds=seconds, images=steps * o.batch_size) | memory()
    if barrier:
        barrier.wait()
    return result


def read_or_forget(root: Path, cold: bool):
    """The system's cache holds the whole pack, as far as there is memory, or nothing of it: the disk has to read."""
    for path in root.glob("packs/*/*"):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            if cold and hasattr(os, "posix_fadvise"):  # Linux
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and f.read(2**24):
                pass


def memory() -> dict:
    """Bytes of this process's memory: the most that was its own; of the pack, what it has mapped, and its share of that
    where other processes have it mapped too."""
    try:
        status, maps = (Path(f"/proc/self/{name}").read_text().splitlines() for name in ("status", "smaps"))
    except OSError:  # another system than Linux
        return {}
    resident = {line.split()[0]: 1024 * int(line.split()[1]) for line in status if line.startswith(("Vm", "Rss"))}
    result = dict(own=max(resident["RssAnon:"], resident["VmHWM:"] - resident["RssFile:"]), mapped=0, share=0)
    pack = False
    for line in maps:
        if "-" in line.split()[0]:  # the head of a mapping: its addresses, and its file at the end
            pack = "/packs/" in line
        for name, key in (("Rss:", "mapped"), ("Pss:", "share")):
            if pack and line.startswith(name):
                result[key] += 1024 * int(line.split()[1])
    return result


def fresh(function, *args):
    """function(*args) in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return pool.submit(function, *args).result()


def measure(o: Options, report: dict):
    o, report["options"] = replace(o, device=str(pick_device(o.device))), asdict(o)
    root = Path(tempfile.mkdtemp(prefix="packs-", dir=o.folder)).resolve()
    try:
        measure_all(o, root, report)
    finally:
        shutil.rmtree(root)
    print(show(report))


def measure_all(o: Options, root: Path, report: dict):
    drawn = time.perf_counter()
    draw_all(root / "files", o)
    report["drawing_seconds"] = time.perf_counter() - drawn
    report["files_bytes"] = sum(path.stat().st_size for path in root.glob("files/*/*"))
    rows = report["rows"] = {}
    rows["first start: packing"] = fresh(start, o, root)
    report["pack_bytes"] = sum(path.stat().st_size for path in root.glob("packs/*/*"))
    rows["second start"] = fresh(start, o, root)
    pinned = "pinned" if pick_device(o.device).type == "cuda" else "not pinned"
    for where, cold in (("the disk", True), ("the system's cache", False)):
        rows[f"rows from {where}, {pinned}"] = fresh(batches, o, root, False, cold)
        rows[f"batches from {where}"] = fresh(batches, o, root, True, cold)
    with PROCESSES.Manager() as manager, ProcessPoolExecutor(2, mp_context=PROCESSES) as pool:
        barrier = manager.Barrier(2)
        both = [pool.submit(batches, o, root, False, False, barrier) for _ in range(2)]
        for name, each in zip(("of two processes, the first", "of two processes, the second"), both):
            rows[name] = each.result()


def show(report: dict) -> str:
    o = report["options"]
    kind = f"{o['side']}x{o['side']}" if o["crop"] == "center" else f"{o['side']} to {2 * o['side']} pixels a side"
    title = (f"{o['images']:,} JPEG files of {kind}, {report['files_bytes'] / 1e9:.2f} GB, "
             f"packed {report['pack_bytes'] / 1e9:.2f} GB; batches of {o['batch_size']}.")
    table = []
    for name, row in report["rows"].items():
        sizes = [f"{row[key] / 1e9:.2f}" if key in row else "" for key in ("own", "mapped", "share")]
        rate = f"{row['images'] / row['seconds']:,.0f}"
        table.append([name, f"{row['seconds']:.2f}", rate, *sizes])
    head = ["", "seconds", "images/s", "own memory at most, GB", "of the pack, GB", "its share of that, GB"]
    return markdown(title, head, table)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    return command("data", Options, measure, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
