"""A run's folder and what is in it; a trained run as a folder, a checkpoint or an exported file."""
import json
import os
import threading
import time
import warnings
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from images import SettingsError, data, one_line
from images.files import user_path
from support import bounds
from support.bounds import between
from support.disk import parse_json, write_atomically
from support.output import reason
from support.settings import from_plain

EXPORTED = ".safetensors"
# what a checkpoint has to have to be sampled, and what else it may have; of which kind. read_config looks at the config
KEYS = dict(step=int, config=object, classes=list, num_classes=int, ema=dict, players=list)
MORE = dict(images_seen=int, pair_factor=int, absolute_paths=dict, sampled=int, optimizers=list, loss=Tensor,
            skipped=Tensor, first_loss=float | None, lowest_loss=float | None, wandb_id=str | None)


@dataclass
class Run:
    """A trained run, on the CPU."""

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
    if Path(path).suffix == EXPORTED:
        return open_exported(str(path), config_class)
    if not Path(path).is_dir():
        return open_checkpoint(str(path), Path(path), config_class)
    last, previous = (Path(path) / "checkpoints" / name for name in ("last.pt", "previous.pt"))
    try:
        return open_checkpoint(str(path), last, config_class)
    except DamagedError as failure:
        try:
            run = open_checkpoint(str(path), previous, config_class)
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
        with zipfile.ZipFile(file) as whole:
            if damaged := whole.testzip():  # each part has a checksum, which torch.load passes over
                raise ValueError(f"the checksum of {damaged} is wrong")
        c = torch.load(file, map_location="cpu", weights_only=True)
        missing = KEYS.keys() - c.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if wrong := of_another_kind(c):
            raise ValueError(f"of another kind than it should be is {', '.join(wrong)}")
    except PermissionError as failure:
        raise SettingsError(f"run = {name!r}: {file} can't be read ({failure.strerror})") from None
    except Exception as failure:  # a file of anything fails in many ways
        why = one_line(failure)[:100]
        raise DamagedError(f"run = {name!r}: {file} is not a whole checkpoint of this trainer ({why})") from None
    config = read_config(name, c["config"], config_class)
    there = {field: path for field, path in c.get("absolute_paths", {}).items()
             if field in ("dataset", "data_path", "paired_path") and os.path.exists(path)}
    config = replace(config, **there)  # the folder one stands in may be another today
    seen, weights = c.get("images_seen", c["step"] * config.batch_size), dict(ema=c["ema"], raw=c["players"][0])
    about = c["classes"], c["num_classes"], c.get("pair_factor", 1), c["step"], seen
    return checked(Run(name, config, *about, weights, c))


def of_another_kind(c: dict) -> list[str]:
    """The names of what in a checkpoint is something else than it should be."""
    wrong = [name for name, kind in (KEYS | MORE).items() if name in c and not isinstance(c[name], kind)]
    if not wrong and not (c["players"] and all(isinstance(weights, dict) for weights in c["players"])):
        wrong.append("players")
    if not wrong and not all(isinstance(path, str) for path in c.get("absolute_paths", {}).values()):
        wrong.append("absolute_paths")
    return wrong


def checked(run: Run) -> Run:
    """The run, if it is one by types and bounds: a file may hold anything. Raises SettingsError."""
    try:
        bounds.check(run)
        few = f"0 or {len(run.classes)}, the number of its classes"
        bounds.require(run, "num_classes", run.num_classes in (0, len(run.classes)), few)
    except SettingsError as failure:
        raise SettingsError(f"run = {run.path!r}: {failure}") from None
    return run


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
    return checked(Run(path, read_config(path, plain, config_class), *rest, {kind: weights}))


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
    paths = {name: portable(getattr(run.config, name)) for name in ("dataset", "data_path", "paired_path", "out_dir")}
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


def named_folder(out_dir: str, name: str) -> Path:
    """out_dir/name, made if need be. Raises SettingsError."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise SettingsError(f"name = {name!r}: allowed is a folder's name, without slashes")
    folder = Path(out_dir) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise SettingsError(f"name = {name!r}: no folder {folder} can be made ({failure.strerror})") from None
    return folder


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints" / name).exists() for name in ("last.pt", "previous.pt"))


def save_checkpoint(folder: Path, checkpoint: dict, keep: bool) -> Path:
    """checkpoints/last.pt in the run's folder, replaced atomically; the one before it becomes previous.pt.

    keep: also step_N.pt, which stays.
    """
    last = folder / "checkpoints" / "last.pt"
    new = last.with_name(".next.pt")
    last.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(new, lambda f: torch.save(checkpoint, f))
    if keep:  # first: a run that is killed here comes to this step again
        link(new, last.with_name(f"step_{checkpoint['step']:06d}.pt"))
    if last.exists():
        link(last, last.with_name("previous.pt"))
    os.replace(new, last)
    return last


class Saver:
    """Writes a run's checkpoints in a thread, so that training waits for a copy in memory and not for the disk.

    One at a time. The thread is no daemon: Python does not leave before it has written.
    """

    def __init__(self, folder: Path, attempt):
        """attempt: calls what may fail, see support.output.Attempts."""
        self.folder, self.attempt, self.thread, self.written = folder, attempt, None, True

    def __call__(self, checkpoint: dict, keep: bool):
        """Waits for the checkpoint before. Its tensors may change as soon as this returns. keep: of save_checkpoint."""
        self.wait()
        own = copied(checkpoint)

        def write():
            path = self.attempt("the checkpoint", lambda: save_checkpoint(self.folder, own, keep))
            self.written = path is not None

        self.thread = threading.Thread(target=write, name="checkpoint")
        self.thread.start()

    def wait(self) -> bool:
        """-> whether the last checkpoint is on the disk."""
        if self.thread:
            self.thread.join()
            self.thread = None
        return self.written


def copied(value):
    """Nested dicts and lists with copies of their tensors on the CPU."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: copied(inner) for name, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def restore(checkpoint: dict, resume: str, ema, modules: list, optimizers: list):
    """The state of the averaged network, the players' modules and their optimizers. Raises SettingsError."""
    missing = {"optimizers", "loss", "skipped", "wandb_id"} - checkpoint.keys()
    if missing:
        raise SettingsError(f"resume = {resume!r}: its checkpoint lacks {', '.join(sorted(missing))}, can't go on")
    try:
        ema.load_state_dict(checkpoint["ema"])
        for module, weights in zip(modules, checkpoint["players"], strict=True):
            module.load_state_dict(weights)
        for optimizer, moments in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as failure:
        why = one_line(failure)[:200]
        raise SettingsError(f"resume = {resume!r}: its network is not the one these settings describe "
                            f"({why} ...)") from None


def write_text(path: Path, text: str):
    """Raises SettingsError where there is no room for it, or no permission."""
    try:
        write_atomically(path, lambda f: f.write(text.encode(errors="surrogateescape")))
    except OSError as failure:
        raise SettingsError(f"{path} can't be written ({reason(failure)})") from None


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


def refuse_another_network(trained, config):
    """A run goes on with the method and the network that it began with. Raises SettingsError."""
    for name in ("method", "channels", "condition",
                 "unet_channels", "unet_dim_mults", "unet_blocks", "unet_use_classes"):
        before, now = getattr(trained, name), getattr(config, name)
        if before != now:
            raise SettingsError(f"{name} = {now!r}: the run was trained with {before!r}, and goes on with it")


def absolute_paths(c) -> dict[str, str]:
    """Where the data is, whatever folder one stands in when the run goes on."""
    named = dict(data_path=c.data_path, paired_path=c.paired_path)
    if c.dataset not in (*data.DOWNLOADS, *data.WITH_THE_CLONE):
        named["dataset"] = c.dataset
    return {name: str(user_path(path).resolve()) for name, path in named.items() if path}


def lock_folder(folder: Path):
    """An open file that keeps every other trainer out of the run's folder until it, or this process, is gone.

    Raises SettingsError where another one has it. A disk that knows no locks is used without, with a warning.
    """
    try:
        import fcntl  # not on Windows
        file = open(folder / ".lock", "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise SettingsError(f"run = {str(folder)!r}: another trainer is at work in this folder") from None
    except (ImportError, OSError) as failure:
        warnings.warn(f"{folder} can't be locked ({one_line(failure)}): let no second trainer work in it")


def forget_samples(metrics: Path, step: int):
    """Drops the line of that step's sampling, which comes again."""
    with suppress(OSError):  # the log will say so
        lines = metrics.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if not (line.startswith(b'{"step": %d,' % step) and b'"nfe"' in line)]
        if kept != lines:
            write_atomically(metrics, lambda f: f.writelines(kept))


def set_aside(file: Path):
    """A file that must not be taken for a good one any more, nor be lost: damaged_NAME, or NAME.before of a text."""
    name = f"{file.name}.before" if file.suffix == ".jsonl" else f"damaged_{file.name}"
    if file.is_file():
        os.replace(file, file.with_name(name))


def remove_leftovers(folder: Path):
    """What a process that was killed while it wrote has left behind."""
    for leftover in [*folder.glob("**/.*.tmp"), *folder.glob("checkpoints/.*.pt*")]:
        with suppress(OSError):
            leftover.unlink()


def run_folder(run: str | Path) -> Path:
    """The folder of a run that was named by it or by its checkpoint file."""
    return Path(run) if Path(run).is_dir() else Path(run).resolve().parent.parent
