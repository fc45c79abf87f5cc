"""A run's folder as one object: its lock, the state it goes on from, its settings, log and checkpoints.

What going on means, here and in command_line.read:

- A folder is a run's only if a trainer marked it, in .lock. Runs of before are known by what they hold, config.json and
  checkpoints/. In any other folder that is not empty, no trainer writes.
- The lock comes before the look: a folder is locked, then its checkpoint is read.
- No trainer writes into a folder whose newest state it did not load. An older checkpoint (previous.pt, step_N.pt), or
  one that lies in no run's folder, goes on under the --name of a new run, a branch, and stays as it is.
- An exported file holds no optimizer to go on with: by --init a new run begins with its weights.
- Every setting that is given takes effect, or is refused by its name (checkpoints.refuse_fixed).
- Classes are compared by name. The lowest loss starts anew where what is learned changed (checkpoints.learns_the_same).
"""
import json
import os
import shlex
import stat
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from images import SettingsError, one_line
from support import checkpoints, machine
from support.disk import flush_folder, no_link, write_atomically
from support.logs import Log
from support.output import warn

MARK = b"the folder of a run of trainer.py\n"  # in .lock


class NoFolder:
    """What the processes have that write nothing: as a RunFolder, but its methods do nothing."""

    def __init__(self, path: Path | None = None):
        self.path, self.begun, self.refused, self.command = path, None, False, ""

    def nothing(self, *_, **__):
        pass

    announce = begin = log = tell_pictures = advice = refuse = wait = close = nothing


class RunFolder:
    """Holds the lock on a run's folder, which is made if need be, from the first moment on.

    path     the folder
    command  what to paste to go on
    begun    the checkpoints.Run that goes on here, with its checkpoint; None: a new run
    refused  whether the newest state was not fit to be saved
    """

    def __init__(self, path: Path):
        """Raises SettingsError where another trainer has the folder, or it is no run's."""
        self.path, self.begun, self.refused = path, None, False
        self.command = f"python trainer.py --resume {shlex.quote(str(path))}"
        self.logger = self.saving = None
        self.written = True  # the last checkpoint, as far as is known
        try:
            path.mkdir(parents=True, exist_ok=True)
            strange = not is_run(path) and any(file.name != ".lock" for file in path.iterdir())
        except OSError as failure:
            raise SettingsError(f"name = {path.name!r}: no folder {path} can be made ({failure.strerror})") from None
        if strange:
            raise SettingsError(f"name = {path.name!r}: {path} holds something else than a run; allowed is a new name")
        self.lock = lock_folder(path)

    def announce(self, c, images, num_classes: int, players: list, precision: str, device: torch.device, step: int):
        """What is about to be trained, on what, where."""
        counts = [sum(p.numel() for p in player.module.parameters()) for player in players]
        millions = " + ".join(f"{count / 1e6:.3g}M" for count in counts)
        world = machine.processes()[1]
        gpus = f" x {world}" if world > 1 else ""
        what = "overfitting one batch" if c.overfit else "training on batches"
        print(f"{c.method}, task {c.task}, on {images.name}: {len(images.train):,} training and {len(images.test):,} "
              f"test images, {c.image_size}x{c.image_size}, {num_classes or 'no'} classes\n"
              f"{millions} parameters, {precision}, {machine.chip(device)}{gpus}\n"
              f"{what} of {c.batch_size}, steps {step:,} to {c.steps:,}, in {self.path}", flush=True)

    def begin(self, config, images, step: int, again: bool):
        """Writes the settings and opens the log. `step`: where the run goes on; again: with that step's pictures.

        Raises SettingsError where the files can't be written.
        """
        state = self.begun.checkpoint if self.begun else {}
        # what every checkpoint says beside the state
        self.about = dict(config=asdict(config), classes=images.classes, pair_factor=images.pair_factor,
                          absolute_paths=checkpoints.absolute_paths(config), code=machine.code_version())
        remove_leftovers(self.path)
        if not has_checkpoint(self.path):  # a run that died before its first checkpoint; this one writes the same lines
            set_aside(self.path / "metrics.jsonl")
        elif "damaged" in state:  # else the next save would put it in the place of previous.pt, the good one
            set_aside(Path(state["damaged"]))
        self.write_settings()
        if images.left_out:
            write_text(self.path / "left_out.txt", "\n".join(images.left_out) + "\n")
        flush_folder(self.path.parent)
        wandb = dict(project=config.wandb_project, entity=config.wandb_entity, id=state.get("wandb_id"))
        wandb = wandb | dict(config=self.about["config"] | dict(code=self.about["code"])) if config.use_wandb else None
        self.logger = Log(self.path, step, again, wandb, config.use_tensorboard)
        self.about["wandb_id"] = self.logger.wandb_id

    def log(self, step: int, pictures: dict | None = None, **numbers):
        """As of Log."""
        self.logger.attempt("the run's folder", self.make_again)
        self.logger(step, pictures, **numbers)

    def advice(self, base_lr: float) -> str:
        """What to do about a run that diverges."""
        if not has_checkpoint(self.path):
            return f"lower base_lr ({base_lr}) and start again"
        return (f"go on from the last good checkpoint, {self.command}, and lower base_lr ({base_lr}) or add "
                "--precision fp32")

    def refuse(self, step: int, why: str, base_lr: float):
        """A state that must not replace a good one; said once, until one is saved again."""
        if not self.refused:
            warn(f"step {step:,} is not saved: {why}; {self.advice(base_lr)}")
        self.refused = True

    def tell_pictures(self, step: int, count: int, nfe: float, seconds: float, **numbers):
        """A line about a sampling of `count` images."""
        decibels = ""
        if "psnr" in numbers:
            decibels = f"PSNR {numbers['psnr']:.2f} dB (input {numbers['psnr_zlo']:.2f} dB), "
        tqdm.write(f"step {step:,}: {decibels}{nfe:.0f} NFE, {seconds:.1f} s for {count} images, "
                   f"{self.path / 'samples' / f'step_{step:06d}.png'}")

    def save(self, state: dict, keep: bool):
        """Writes a checkpoint in a thread, so that training waits for a copy in memory and not for the disk.

        Waits for the one before. The state's tensors may change as soon as this returns. keep: it stays, as step_N.pt.
        """
        self.wait()
        self.refused = False
        try:
            copy = copied(state)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # once, for all copies
            # no daemon: Python does not leave before it has written
            self.saving = threading.Thread(target=self.write, args=(copy, keep), name="checkpoint")
            self.saving.start()
        except (MemoryError, RuntimeError):  # no memory for a copy, or no thread to be had: training waits for the disk
            self.saving = None
            self.write(state, keep)

    def write(self, state: dict, keep: bool):
        def save():
            self.make_again()
            self.logger.flush()  # the lines that the checkpoint vouches for
            return checkpoints.save_checkpoint(self.path, state | self.about, keep)

        self.written = self.logger.attempt("the checkpoint", save) is not None

    def wait(self) -> bool:
        """Whether the newest state is on the disk, once all is written."""
        if self.saving:
            self.saving.join()
            self.saving = None
        return self.written and not self.refused

    def make_again(self):
        """Where somebody moved or removed the folder, the run goes on in another one of its name."""
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            return
        warn(f"{self.path} was gone and is made again, without what it held")
        self.lock = lock_folder(self.path)
        self.write_settings()

    def write_settings(self):
        settings = self.about["config"] | dict(code=self.about["code"])
        write_text(self.path / "config.json", json.dumps(settings, indent=1))

    def close(self):
        """Waits for what is being written, and lets other trainers in."""
        self.wait()
        if self.logger:
            self.logger.close()
        if self.lock:
            self.lock.close()
        self.logger = self.lock = None


def is_done(run: checkpoints.Run | None, config) -> bool:
    """Whether a command that names the run finds it at its last step, with all its pictures."""
    if run is None or config.resume is not None:
        return False
    return run.step >= config.steps and not config.pictures_due(run.step, run.checkpoint.get("sampled", run.step))


# -------------------------------------------------------------------------------------------------- which folder it is

def new_path(c) -> Path:
    """Where a run without a name goes: a folder named by its method, task and the time, which is made.

    Raises SettingsError.
    """
    folder = Path(c.out_dir) / f"{c.method}-{c.task.replace(',', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another one began in this second
            folder = folder.with_name(folder.name + "-1")
        except OSError as failure:
            raise SettingsError(f"out_dir = {c.out_dir!r}: no folder can be made there ({failure.strerror})") from None


def named_path(out_dir: str, name: str) -> Path:
    """out_dir/name. Raises SettingsError."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise SettingsError(f"name = {name!r}: allowed is a folder's name, without slashes")
    return Path(out_dir) / name


def resumed_path(resume: str) -> Path:
    """The folder in which the run goes on that was named by its folder or its last.pt. Raises SettingsError."""
    path = Path(resume)
    folder = path if path.is_dir() else checkpoints.run_folder(path)
    if not path.exists() or path.is_dir() and not has_checkpoint(path):
        raise SettingsError(f"resume = {resume!r}: there is no run with a checkpoint")
    if not is_run(folder) or path.is_file() and path.resolve() != (folder / "checkpoints/last.pt").resolve():
        raise SettingsError(f"resume = {resume!r}: is not the newest state of a run that a trainer made, and goes on "
                            "as a new run: add --name NEW")
    return folder


def is_run(folder: Path) -> bool:
    """Whether a trainer made it."""
    return is_marked(folder) or (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()


def is_marked(folder: Path) -> bool:
    with suppress(OSError), open(folder / ".lock", "rb", opener=no_link) as file:
        return file.read(len(MARK) + 1) == MARK
    return False


def has_checkpoint(folder: Path) -> bool:
    """Whether the run has a state that it could go on from."""
    return any((folder / "checkpoints").glob("*.pt"))


def lock_folder(folder: Path):
    """An open file that keeps every other trainer out of the run's folder until it, or this process, is gone.

    Raises SettingsError where another one has it. A disk that knows no locks is used without, with a warning.
    """
    file = None
    try:
        import fcntl  # not on Windows
        file = open(folder / ".lock", "a+b", buffering=0, opener=no_link)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SettingsError(f"run = {str(folder)!r}: another trainer is at work in this folder") from None
    except (ImportError, OSError) as failure:
        warnings.warn(f"{folder} can't be locked ({one_line(failure)}): let no second trainer work in it")
    if file and not is_marked(folder):
        with suppress(OSError):  # a full disk; what can't be written there is told by the next file
            file.truncate(0)
            file.write(MARK)
    return file


# ----------------------------------------------------------------------------------------------------- what is in it

def copied(value):
    """Nested dicts and lists with copies of their tensors on the CPU."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True, non_blocking=True)  # from a GPU into pinned memory
    if isinstance(value, dict):
        return {name: copied(inner) for name, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def write_text(path: Path, text: str):
    """Raises SettingsError where there is no room for it, or no permission."""
    try:
        write_atomically(path, lambda f: f.write(text.encode(errors="surrogateescape")))
    except OSError as failure:
        raise SettingsError(f"{path} can't be written ({one_line(failure)})") from None


def set_aside(file: Path):
    """A file that must not be taken for a good one any more, nor be lost: damaged_NAME, or NAME.before of a text."""
    name = f"{file.name}.before" if file.suffix == ".jsonl" else f"damaged_{file.name}"
    if file.exists() and stat.S_ISREG(file.lstat().st_mode):
        os.replace(file, file.with_name(name))


def remove_leftovers(run: Path):
    """What a process that was killed while it wrote has left behind, in the folders that the trainer writes."""
    for folder, names in ((run, ".*.tmp"), (run / "samples", ".*.tmp"), (run / "checkpoints", ".*.pt*")):
        if folder.is_symlink():
            continue
        for leftover in folder.glob(names):
            with suppress(OSError):
                leftover.unlink()
