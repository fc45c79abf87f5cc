"""How long training takes, from the start of its process, to a stated quality on held-out images: a row of RESULTS.md.

    python benchmarks/record.py --frechet 0.5 --accuracy 75
    python benchmarks/record.py -- --preset cifar10-sr --batch-size 512     what follows -- goes to trainer.py

Rules:
 1. The task is sr, factor 2 by box means, on CIFAR-10: training on its training images and on nothing else.
 2. The quality: Frechet distance at most --frechet and accuracy at least --accuracy, both in one sampling.
 3. Both are evaluate.py's, on --count test images, 10,000 where nothing else is said; the row says how many.
 4. A sample takes --nfe network evaluations, 10 at the most.
 5. The clock starts before the process of trainer.py does: imports, data, compiling, logging and pictures count.
 6. Downloads do not count: the data is on disk before. Caches of the compiler may be there; say so if they are not.
 7. The run is new, in one piece and by one command; it keeps a checkpoint every --every steps, which counts too.
 8. The first checkpoint of the quality stops the clock, at the time its file was written; later ones do not count.
 9. Evaluating comes after training and does not count.
10. Seed and settings are chosen before; a row is the first try of its command, not the best of several.
"""
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torchvision

import evaluate
from images import SettingsError
from support.bounds import require
from support.command_line import parse, split
from support.disk import write_atomically
from support.machine import chip, pick_device

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- record -->", "<!-- /record -->"


@dataclass
class Options:
    """What is to be reached, and how long it is tried."""

    frechet: float = 0.5  # at most; 10,000 damaged images themselves have about 1.5
    accuracy: float = 75.0  # at least, %
    nfe: int = 5  # network evaluations of a sample
    max_steps: int = 10_000  # training steps of the whole run
    every: int = 500  # steps between the checkpoints that are measured
    count: int = 10_000  # test images
    dataset: str = "cifar10"  # or a folder with its images
    device: str = "auto"  # auto: cuda if there is one; or cuda, cpu
    output: str = "runs/record"  # folder of the run and of what was measured; there must be none of that name
    table: str = str(ROOT / "RESULTS.md")  # file that gets the row

    def check(self):
        """Raises SettingsError, one line that names field, value and what is allowed."""
        need = partial(require, self)
        need("nfe", 1 <= self.nfe <= 10, "1 to 10")
        need("every", 1 <= self.every <= self.max_steps, "1 to max_steps")
        need("output", not Path(self.output).exists(), "a folder that is not there yet: the clock starts with the run")
        text = Path(self.table).read_text() if Path(self.table).is_file() else ""
        need("table", BEGIN in text and END in text, f"a file with the lines {BEGIN} and {END}")


def train(o: Options, more: list[str]) -> list[tuple[Path, float]]:
    """Runs trainer.py -> its checkpoints and the seconds from its start to each. Raises SettingsError if it fails."""
    command = [sys.executable, str(ROOT / "trainer.py"), *more, "--no-overfit", "--task", "sr", "--damage.factor", "2",
               "--damage.down", "box", "--dataset", o.dataset, "--device", o.device, "--max-steps", str(o.max_steps),
               "--keep-every", str(o.every), "--checkpoint-every", str(o.every), "--name", "run", "--out-dir", o.output]
    start = time.time()  # of the same clock as the times of files
    if status := subprocess.run(command).returncode:
        raise SettingsError(f"trainer.py ended with exit status {status}")
    kept = sorted(Path(o.output, "run", "checkpoints").glob("step_*.pt"), key=lambda file: int(file.stem[5:]))
    return [(file, file.stat().st_mtime - start) for file in kept]


def measure(o: Options, file: Path) -> tuple[dict, dict]:
    """A checkpoint -> evaluate.py's result and its row. Raises SettingsError where there is none."""
    folder = Path(o.output, file.stem)
    status = evaluate.main([str(file), "--nfe", str(o.nfe), "--no-default", "--count", str(o.count), "--metrics",
                            "frechet", "accuracy", "--device", o.device, "--output", str(folder)])
    result = json.loads((folder / "run.json").read_text()) if status == 0 else dict(rows=[])
    if not result["rows"] or not {"frechet", "accuracy"} <= result["rows"][0].keys():
        raise SettingsError(f"{file} could not be measured: accuracy and FD take images with classes")
    if result["rows"][0]["nfe"] > 10:
        raise SettingsError(f"the sampler takes {result['rows'][0]['nfe']:g} evaluations; allowed are 10")
    return result, result["rows"][0]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 reached, 1 not reached, 2 bad input."""
    ours, more = split(sys.argv[1:] if arguments is None else arguments)
    try:
        o = parse(Options, ours, __doc__)
        o.check()
        for file, seconds in train(o, more):
            result, row = measure(o, file)
            if row["frechet"] <= o.frechet and row["accuracy"] >= o.accuracy:
                break
        else:
            print(f"record.py: FD {o.frechet:g} and {o.accuracy:g}% are not reached in {o.max_steps:,} steps")
            return 1
    except SettingsError as failure:
        print(f"record.py: {failure}", file=sys.stderr)
        return 2
    c, costs = result["config"], result["costs"]
    cells = (time.strftime("%Y-%m-%d"),
             f"{chip(pick_device(o.device))}, torch {torch.__version__}, torchvision {torchvision.__version__}",
             f"{c['method']}, {costs['parameters'][0] / 1e6:.3g}M parameters, {result['problem']['dataset']}, "
             f"--max-steps {o.max_steps}{' -- ' if more else ''}{' '.join(more)}",
             f"FD {o.frechet:g}, {o.accuracy:g}%, {result['problem']['images']:,} images",
             f"FD {row['frechet']:.2f}, {row['accuracy']:.1f}%, {row['nfe']:g} NFE",
             f"{costs['steps']:,}, {result['training']['images_seen']:,}", f"{seconds / 60:.2f}")
    line = "| " + " | ".join(cells) + " |"
    print(line)
    before, after = Path(o.table).read_text().split(END)
    write_atomically(Path(o.table), lambda f: f.write(f"{before}{line}\n{END}{after}".encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
