"""A folder of image files as training meets it: packed once, found again, read in batches.

    python benchmarks/data.py                                 20,000 JPEGs of 256x256: 5 GB of disk, until it ends
    python benchmarks/data.py --images 100000 --batch-size 512

The pictures are random clouds, with about as many bytes as photographs have. Prints a Markdown table and writes JSON.
"""
import math
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.common import command, markdown, synchronize
from images import data
from support import bounds
from support.bounds import Count
from support.machine import pick_device


@dataclass
class Options:
    """What to measure. Times are wall-clock seconds."""

    images: Count = 20_000  # JPEG files
    side: Count = 256  # pixels
    batch_size: Count = 256  # images
    device: str = "auto"  # where the batches go. auto: cuda if there is one; or cuda, cuda:1, cpu
    out: str | None = None  # the JSON file; None: in runs/, named by the time

    def check(self):
        """Raises SettingsError, one line that names field, value and what is allowed."""
        bounds.check(self)


def draw_all(folder: Path, o: Options):
    for number in tqdm(range(o.images), desc="drawing", unit="image", disable=None, leave=False):
        random = np.random.default_rng(number)
        clouds = random.integers(0, 256, (o.side // 8 + 1, o.side // 8 + 1, 3), np.uint8)
        path = folder / f"{number // 1000:05d}" / f"{number:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(clouds).resize((o.side, o.side), Image.BICUBIC).save(path, quality=90)


def measure(o: Options, report: dict):
    warnings.simplefilter("ignore")
    device, rows = pick_device(o.device), {}
    with tempfile.TemporaryDirectory(prefix="packs-") as root:
        draw_all(Path(root, "files"), o)
        for name in ("first start: packing", "second start"):
            begin = time.perf_counter()
            images = data.load(str(Path(root, "files")), o.side, data_path=root)
            rows[name] = dict(seconds=time.perf_counter() - begin, images=o.images)
        for name, ahead in (("rows gathered in the host's memory", 0), ("batches as the trainer takes them", 3)):
            feed = data.Feed(images, device, o.batch_size, 0, ahead=ahead)
            steps, begin = math.ceil(len(images.train) / o.batch_size), time.perf_counter()
            for step in range(steps):
                feed(step) if ahead else feed.rows(step)
            synchronize(device)
            rows[name] = dict(seconds=time.perf_counter() - begin, images=steps * o.batch_size)
        sizes = [sum(path.stat().st_size for path in Path(root).glob(f"{what}/*/*")) / 1e9
                 for what in ("files", "packs")]
    report |= dict(options=asdict(o), rows=rows, gigabytes=sizes)
    table = [[name, f"{row['seconds']:.2f}", f"{row['images'] / row['seconds']:,.0f}"] for name, row in rows.items()]
    title = (f"{o.images:,} JPEG files of {o.side}x{o.side}, {sizes[0]:.2f} GB, packed {sizes[1]:.2f} GB; batches of "
             f"{o.batch_size}.")
    print(markdown(title, ["", "seconds", "images/s"], table))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    return command("data", Options, measure, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
