"""A run's folder and what is in it; a trained run as a folder, a checkpoint or an exported file."""
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from images import SettingsError, one_line
from images.files import write_atomically
from support.settings import from_plain

EXPORTED = ".safetensors"


@dataclass
class Run:
    """A trained run, on the CPU."""

    path: str  # as the user named it
    config: object  # trainer.Config: every setting
    classes: list[str]  # names of the data's classes
    num_classes: int  # that the network knows; 0: it sees no labels
    step: int  # training steps done
    images_seen: int
    # "ema": the averaged network, "raw": the trained one; an exported file holds one of them
    weights: dict[str, dict[str, Tensor]]
    checkpoint: dict | None = None  # all that a resumed run needs; None of an exported file

    @property
    def name(self) -> str:
        """What to call it: its folder's name, or an exported file's."""
        return Path(self.path).stem if self.checkpoint is None else run_folder(self.path).resolve().name

    def network(self, ema: bool = True) -> dict[str, Tensor]:
        """The weights to sample with. Raises SettingsError where an exported file holds the others."""
        kind = "ema" if ema else "raw"
        if kind not in self.weights:
            there = "averaged" if "ema" in self.weights else "raw"
            raise SettingsError(f"ema = {ema}: {self.path} holds the {there} weights only")
        return self.weights[kind]


def open_run(path: str | Path, config_class) -> Run:
    """A run's folder, a checkpoint or an exported file -> Run with a `config_class`. Raises SettingsError."""
    if Path(path).suffix == EXPORTED:
        return open_exported(str(path), config_class)
    file = run_folder(path) / "checkpoints" / "last.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise SettingsError(f"run = {str(path)!r}: there is no checkpoint {file}")
    try:
        c = torch.load(file, map_location="cpu", weights_only=True)
        config = from_plain(config_class, c["config"])
        seen = c.get("images_seen", c["step"] * config.batch_size)
        weights = dict(ema=c["ema"], raw=c["players"][0])
        return Run(str(path), config, c["classes"], c["num_classes"], c["step"], seen, weights, c)
    except Exception as failure:  # a file of anything fails in many ways
        reason = one_line(failure)[:100]
        raise SettingsError(f"run = {str(path)!r}: {file} is not a checkpoint of this trainer ({reason})") from None


def open_exported(path: str, config_class) -> Run:
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["run"])
        weights = safetensors.torch.load_file(path)
        step = about.get("step", 0)
        config = from_plain(config_class, about["config"])
        seen = about.get("images_seen", step * config.batch_size)
        kind = "ema" if about["ema"] else "raw"
        return Run(path, config, about["classes"], about["num_classes"], step, seen, {kind: weights})
    except (OSError, TypeError, KeyError, AttributeError, json.JSONDecodeError, safetensors.SafetensorError) as failure:
        raise SettingsError(f"run = {path!r}: not a file that --export wrote ({one_line(failure)[:100]})") from None


def export(run: Run, path: Path, ema: bool = True) -> int:
    """Writes the weights; in the file's header, as JSON, the rest of what open_run gives. -> its size in bytes"""
    safetensors = import_safetensors()
    about = dict(config=asdict(run.config), num_classes=run.num_classes, classes=run.classes, ema=ema, step=run.step,
                 images_seen=run.images_seen)
    weights = {name: w.contiguous() for name, w in run.network(ema).items()}
    content = safetensors.torch.save(weights, {"run": json.dumps(about)})
    write_atomically(path, lambda f: f.write(content))
    return len(content)


def import_safetensors():
    try:
        import safetensors.torch
        return safetensors
    except ImportError:
        raise SettingsError("exported files need one more package: pip install safetensors") from None


# ------------------------------------------------------------------------------------------------------ a run's folder

def new_folder(out_dir: str, method: str, task: str) -> Path:
    """Makes the run's folder, named by its method, task and the time. Raises SettingsError."""
    name = f"{method}-{task.replace(',', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(100):
        folder = Path(out_dir) / (f"{name}-{attempt}" if attempt else name)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as failure:
            raise SettingsError(f"out_dir = {out_dir!r}: no folder can be made there ({failure.strerror})") from None
    raise SettingsError(f"out_dir = {out_dir!r}: it holds 100 runs of this second")


def save_checkpoint(folder: Path, checkpoint: dict) -> Path:
    """checkpoints/last.pt in the run's folder, replaced atomically."""
    path = folder / "checkpoints" / "last.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda f: torch.save(checkpoint, f))
    return path


def run_folder(run: str | Path) -> Path:
    """The folder of a run that was named by it or by its checkpoint file."""
    return Path(run) if Path(run).is_dir() else Path(run).resolve().parent.parent
