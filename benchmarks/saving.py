"""How long a checkpoint holds up training, and when it is on the disk: a preset's run, saved as trainer.py saves it.

    python benchmarks/saving.py                        sr3-faces128: 367M parameters
    python benchmarks/saving.py --preset cifar10-sr

No step is trained: the gradients are zeros, so that AdamW has its moments. The folder of the runs is on the disk that
counts (--out-dir). Prints Markdown.
"""
import contextlib
import io
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.timing import markdown, synchronize
from images import SettingsError
from support.bounds import require
from support.command_line import parse
from support.settings import PRESETS
from trainer import Config, Trainer


@dataclass
class Options:
    """What is saved, and where."""

    preset: str = "sr3-faces128"  # trainer.py's
    repeats: int = 3  # checkpoints; the times are medians
    out_dir: str = "runs"  # a folder in it is made and removed
    device: str = "auto"  # auto: cuda if there is one; or cuda, cuda:1, cpu

    def check(self):
        """Raises SettingsError, one line that names field, value and what is allowed."""
        require(self, "preset", self.preset in PRESETS, ", ".join(PRESETS))
        require(self, "repeats", self.repeats >= 1, "1 or more")


def a_trainer(o: Options, folder: str) -> Trainer:
    """A run of the preset with moments in its optimizers. Raises SettingsError."""
    config = replace(Config(**PRESETS[o.preset]), dataset="shapes", paired_path=None, overfit=True, batch_size=1,
                     sample_steps=None, use_wandb=False, compile="off", device=o.device, out_dir=folder)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(config)
    for optimizer in (player.optimizer for player in trainer.players):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    return trainer


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    try:
        o = parse(Options, sys.argv[1:] if arguments is None else arguments, __doc__)
        o.check()
        Path(o.out_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=o.out_dir) as folder:
            trainer, held, written = a_trainer(o, folder), [], []
            for _ in range(o.repeats):
                synchronize(trainer.device)
                start = time.perf_counter()
                trainer.save()
                held.append(time.perf_counter() - start)
                trainer.folder.wait()
                written.append(time.perf_counter() - start)
            size = (trainer.folder.path / "checkpoints" / "last.pt").stat().st_size
    except SettingsError as failure:
        print(f"saving.py: {failure}", file=sys.stderr)
        return 2
    parameters = sum(p.numel() for player in trainer.players for p in player.module.parameters())
    head = ["preset", "parameters", "checkpoint, GB", "training waits, s (min-max)", "on the disk after, s (min-max)"]
    times = [f"{statistics.median(t):.3g} ({min(t):.3g}-{max(t):.3g})" for t in (held, written)]
    print(markdown("", head, [[o.preset, f"{parameters / 1e6:.1f}M", f"{size / 1e9:.2f}", *times]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
