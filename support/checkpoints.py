"""A trained run as a folder, a checkpoint or an exported file: read, written, and compared with what is asked for."""
import json
import os
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from images import SettingsError, data, one_line
from images.files import user_path
from support import bounds
from support.bounds import between
from support.disk import flush_folder, parse_json, write_atomically
from support.settings import from_plain

EXPORTED = ".safetensors"
DATA_PATHS = ("dataset", "data_path", "paired_path")  # fields of Config
# what a checkpoint has to have, and what it may have
KEYS = dict(step=int, config=dict, classes=list, num_classes=int, ema=dict, players=list[dict])
OPTIONAL_KEYS = dict(images_seen=int, pair_factor=int, absolute_paths=dict, sampled=int, optimizers=list,
                     scaler=dict, loss=Tensor, parts=dict[str, Tensor], skipped=Tensor, first_loss=float | None,
                     lowest_loss=float | None, wandb_id=str | None, code=str)


@dataclass
class Run:
    """A trained run, on the CPU. A file may hold anything: SettingsError for what is not of its type and bounds."""

    path: str  # as the user named it
    config: object  # trainer.Config: every setting
    classes: list[str]  # names of the data's classes
    num_classes: Annotated[int, between(0, 10**6)]  # that the network knows; 0: it sees no labels
    # task paired: how many times larger the clean images were than the damaged ones
    pair_factor: Annotated[int, between(1, 64)]
    step: Annotated[int, between(0, 10**12)]  # training steps done
    images_seen: Annotated[int, between(0, 10**24)]
    # "ema": the averaged network, "raw": the trained one; an exported file holds one of them
    weights: dict[str, dict[str, Tensor]]
    checkpoint: dict | None = None  # all that a resumed run needs; None of an exported file

    def __post_init__(self):
        try:
            bounds.check(self)
            few = f"0 or {len(self.classes)}, the number of its classes"
            bounds.require(self, "num_classes", self.num_classes in (0, len(self.classes)), few)
        except SettingsError as failure:
            raise SettingsError(f"run = {self.path!r}: {failure}") from None

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
    """A run's folder, a checkpoint or an exported file -> Run with a `config_class`. Raises SettingsError.

    Where a folder's last checkpoint is damaged, the one before it is taken, with a warning.
    """
    name, path = str(path), Path(path)
    if path.suffix == EXPORTED:
        return open_exported(name, config_class)
    if not path.is_dir():
        return open_checkpoint(name, path, config_class)
    last = path / "checkpoints" / "last.pt"
    try:
        return open_checkpoint(name, last, config_class)
    except DamagedError as failure:
        try:
            run = open_checkpoint(name, last.with_name("previous.pt"), config_class)
        except SettingsError:
            raise failure from None
        warnings.warn(f"{failure}; previous.pt, of step {run.step:,}, takes its place: what came after is lost")
        run.checkpoint["damaged"] = str(last)
        return run


class DamagedError(SettingsError):
    """A checkpoint that is not there or not whole."""


def open_checkpoint(name: str, file: Path, config_class) -> Run:
    """`name`: the run as the user named it. Raises SettingsError."""
    if not file.is_file():
        raise DamagedError(f"run = {name!r}: there is no checkpoint {file}")
    try:
        c = load_tensors(file)
        if missing := KEYS.keys() - c.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        kinds = KEYS | OPTIONAL_KEYS
        if wrong := [key for key in kinds if key in c and not bounds.fits(c[key], kinds[key])]:
            raise ValueError(f"of another kind than it should be is {', '.join(wrong)}")
        seen = c.get("images_seen", c["step"] * c["config"].get("batch_size", 1))
        about = c["classes"], c["num_classes"], c.get("pair_factor", 1), c["step"], seen
        weights = dict(ema=c["ema"], raw=c["players"][0])
        paths = c.get("absolute_paths", {})  # resume may be started from another working directory
        there = {field: paths[field] for field in DATA_PATHS if field in paths and os.path.exists(Path(paths[field]))}
    except PermissionError as failure:
        raise SettingsError(f"run = {name!r}: {file} can't be read ({failure.strerror})") from None
    except Exception as failure:  # a file of anything fails in many ways
        why = one_line(failure)[:100]
        raise DamagedError(f"run = {name!r}: {file} is not a whole checkpoint of this trainer ({why})") from None
    config = replace(read_config(name, c["config"], config_class), **there)
    return Run(name, config, *about, weights, c)


def load_tensors(file: Path):
    """What torch.save wrote, on the CPU. Raises what torch.load does, and ValueError where a checksum is wrong."""
    with zipfile.ZipFile(file) as whole:
        if damaged := whole.testzip():  # each part has a checksum, which torch.load passes over
            raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(file, map_location="cpu", weights_only=True)


def read_config(name: str, plain: dict, config_class):
    """The settings of a run, checked like those of the command line. Raises SettingsError."""
    try:
        config = from_plain(config_class, plain)
        config.check()
        return config
    except SettingsError as failure:
        raise SettingsError(f"run = {name!r}: its settings can't be used: {failure}") from None


def open_exported(path: str, config_class) -> Run:
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = parse_json(file.metadata()["run"])
        weights = safetensors.torch.load_file(path)
        kind, plain = "ema" if about["ema"] else "raw", about["config"]
        rest = (about["classes"], about["num_classes"], about.get("pair_factor", 1), about.get("step", 0),
                about.get("images_seen", 0))
    except (OSError, TypeError, KeyError, AttributeError, ValueError, safetensors.SafetensorError) as failure:
        raise SettingsError(f"run = {path!r}: not a file that --export wrote ({one_line(failure)[:100]})") from None
    return Run(path, read_config(path, plain, config_class), *rest, {kind: weights})


def portable(path: str | None) -> str | None:
    """A path without the user's folders: from the working directory on, or its last part where it lies elsewhere."""
    if path is None or not os.path.isabs(path):
        return path
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if here in Path(path).parents else Path(path).name


def export(run: Run, path: Path, ema: bool = True, half: bool = False) -> int:
    """Writes the weights, `half`: as bf16; in the file's header, as JSON, the rest of what open_run gives.

    -> its size in bytes
    """
    safetensors = import_safetensors()
    paths = {name: portable(getattr(run.config, name)) for name in (*DATA_PATHS, "out_dir")}
    about = dict(config=asdict(run.config) | paths, classes=run.classes, num_classes=run.num_classes,
                 pair_factor=run.pair_factor, step=run.step, images_seen=run.images_seen, ema=ema)
    weights = {name: (w.bfloat16() if half else w).contiguous() for name, w in run.network(ema).items()}
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

def save_checkpoint(folder: Path, checkpoint: dict, keep: bool) -> Path:
    """checkpoints/last.pt in the run's folder, replaced atomically; the one before it becomes previous.pt.

    keep: also step_N.pt, which stays.
    """
    last = folder / "checkpoints" / "last.pt"
    new = last.with_name(".next.pt")
    if not last.parent.is_dir():
        last.parent.mkdir()  # without its parents: a run's folder that is gone is RunFolder's to make, with a warning
        flush_folder(folder)
    write_atomically(new, lambda f: torch.save(checkpoint, f))
    if keep:  # first: a run that is killed here comes to this step again
        link(new, last.with_name(f"step_{checkpoint['step']:06d}.pt"))
    if last.exists():
        link(last, last.with_name("previous.pt"))
    os.replace(new, last)
    flush_folder(last.parent)
    return last


def restore(checkpoint: dict, run: str, ema, players: list):
    """The state of the averaged network, and of each player's module and optimizer. Raises SettingsError.

    An optimizer's weight decay and what else its groups hold stay those of the settings; its rate is set by each step.
    """
    if missing := {"optimizers", "loss", "skipped", "wandb_id"} - checkpoint.keys():
        raise SettingsError(f"run = {run!r}: its checkpoint lacks {', '.join(sorted(missing))}, can't go on")
    try:
        ema.load_state_dict(checkpoint["ema"])
        for player, weights, moments in zip(players, checkpoint["players"], checkpoint["optimizers"], strict=True):
            player.module.load_state_dict(weights)
            group = player.optimizer.param_groups[0]
            settings = {name: value for name, value in group.items() if name not in ("params", "lr")}
            player.optimizer.load_state_dict(moments)
            player.optimizer.param_groups[0].update(settings)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as failure:
        why = one_line(failure)[:200]
        raise SettingsError(f"run = {run!r}: its network is not the one these settings describe ({why} ...)") from None


def link(file: Path, other: Path):
    """`other` becomes a second name of the file, or a copy where the disk knows no second names."""
    new = other.with_name(f".{other.name}.{os.getpid()}")
    try:
        os.link(file, new)
        os.replace(new, other)
    except OSError:
        write_atomically(other, lambda f: f.write(file.read_bytes()))
    finally:
        new.unlink(missing_ok=True)


FREE = ("unet_dropout", "unet_checkpointing")  # of the network's fields, which may change in the course of a run


def refuse_fixed(trained, config):
    """A run keeps for ever what its network is, and where it began. Raises SettingsError."""
    network = [field.name for field in fields(config) if field.name.startswith("unet_") and field.name not in FREE]
    for name in ("method", "channels", "condition", *network, "init", "preset"):
        before, now = getattr(trained, name), getattr(config, name)
        if before != now:
            raise SettingsError(f"{name} = {now!r}: the run was trained with {before!r}, and goes on with it")


def refuse_other_classes(run: Run, images):
    """A label's number means the class that it was trained for. Raises SettingsError."""
    if run.classes != images.classes:
        theirs, ours = (", ".join(classes[:20]) or "none" for classes in (run.classes, images.classes))
        raise SettingsError(f"dataset = {images.name!r}: its classes are {ours}, and the run knows {theirs}; allowed "
                            "are the same classes, or a new run that begins with its weights (--init)")


def learns_the_same(trained, config) -> bool:
    """Whether losses under both settings can be compared: the same images, damage, loss and overfitting."""
    names = ("dataset", "paired_path", "image_size", "crop", "task", "damage", "overfit", "chosen")
    trained, config = (replace(c, **absolute_paths(c)) for c in (trained, config))
    return all(getattr(trained, name) == getattr(config, name) for name in names)


def absolute_paths(c) -> dict[str, str]:
    """Where the data is, whatever folder one stands in when the run goes on."""
    named = dict(data_path=c.data_path, paired_path=c.paired_path)
    if c.dataset not in (*data.DOWNLOADS, *data.WITH_THE_CLONE):
        named["dataset"] = c.dataset
    return {name: str(user_path(path).resolve()) for name, path in named.items() if path}


def run_folder(run: str | Path) -> Path:
    """The folder of a run that was named by it or by its checkpoint file."""
    return Path(run) if Path(run).is_dir() else Path(run).resolve().parent.parent
