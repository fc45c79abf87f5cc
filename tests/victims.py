"""Real processes of the trainer that faults are done to: what is done to them, and how to see that nothing is lost."""
import itertools
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

import trainer
from images import data
from runs import SERVER, STATE, TINY, checkpoint, finite, leaves, metrics, until
from support import run_folder
from trainer import Trainer

METHODS = {"interpolant": "", "sr3": "--solver auto", "i2sb": "--solver auto", "edm": "",
           "udpm": "--solver auto --sample-steps 3 --udpm.lpips-weight 0 0 0 --udpm.disc-channels 8",
           "regression": "--solver auto --sample-steps 1"}
# everything that draws random numbers is switched on, and nothing falls on the same steps as everything else
STEPS = ("--no-overfit --unet-dropout 0.1 --label-drop 0.3 --warmup-steps 10 --max-steps 12 --sample-every 4 "
         "--print-loss-every 3 --checkpoint-every 2 --keep-every 4")
PATIENCE = 100  # seconds after which a process that should have ended counts as hanging
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0  # who may mount a disk


class Lost(AssertionError):
    """What a fault has destroyed, or a process that did not end as it should."""


def expect(condition, text):
    if not condition:
        raise Lost(text)


# ------------------------------------------------------------------------------------------------- a process, outside

class Victim:
    """trainer.main(flags) in a process of its own; preludes: (function, *arguments), called in it before."""

    def __init__(self, flags: str, folder: Path, *preludes, env: dict | None = None):
        number = len(list(folder.glob("*.out")))
        self.out, self.err, ready = (folder / f"{number}.{name}" for name in ("out", "err", "ready"))
        self.process = SERVER.Process(target=live, args=(flags.split(), self.out, self.err, ready, preludes, env or {}))
        self.process.start()
        self.process.log = self.err
        until(ready.exists, self.process)

    def kill(self, number: int = signal.SIGKILL):
        if self.process.exitcode is None:  # or its number may be another one's by now
            os.kill(self.process.pid, number)

    def end(self, *allowed: int, seconds: float = PATIENCE, traceback: bool = False) -> int:
        """Its exit status, which has to be one of those allowed; no traceback is to be seen unless it may be."""
        self.process.join(seconds)
        hangs = self.process.exitcode is None
        self.kill()
        self.process.join()
        expect(not hangs, f"it hangs: no end after {seconds} s\n{self.said}")
        expect(traceback or "Traceback" not in self.said, f"a traceback\n{self.said}")
        expect(not allowed or self.process.exitcode in allowed, f"exit status {self.process.exitcode}\n{self.said}")
        return self.process.exitcode

    def refused(self):
        """It ended with one line that says why."""
        self.end(2)
        lines = [line for line in self.err.read_text().splitlines() if not line.startswith("warning: ")]
        expect(len(lines) == 1 and lines[0].startswith("trainer.py: "), f"not one line\n{self.said}")

    @property
    def said(self) -> str:
        return "".join(path.read_text(errors="replace") for path in (self.out, self.err) if path.exists())


@dataclass
class Place:
    """Where one try takes place: its folder, the method that is trained, and random numbers that can be had again."""

    folder: Path
    shared: Path  # what all tries have in common: the pictures, and runs that were never interrupted
    method: str
    chance: random.Random

    def __post_init__(self):
        self.victims = []
        self.folder.mkdir(parents=True, exist_ok=True)
        pictures(self.shared)

    @property
    def run(self) -> Path:
        return self.folder / "out" / "run"

    def flags(self, more: str = "") -> str:
        """The command of the run: always the same one, but for `more`."""
        where = f"--out-dir {self.folder / 'out'} --name run --dataset {self.shared / 'pictures'}"
        return f"{TINY} {STEPS} --method {self.method} {METHODS[self.method]} {where} {more}"

    def start(self, *preludes, more: str = "", env: dict | None = None) -> Victim:
        self.victims.append(Victim(self.flags(more), self.folder, *preludes, env=env))
        return self.victims[-1]

    def leave(self):
        for victim in self.victims:
            victim.kill()
            victim.process.join()

    def straight(self) -> "Place":
        """The same command in another place, never interrupted; of each method it is run once."""
        place = replace(self, folder=self.shared / self.method)
        calls, last = place.folder / "calls", place.run / "checkpoints" / "last.pt"
        if not place.run.exists():
            place.start((count_calls, calls, place.run)).end(0)
        place.calls = calls.stat().st_size
        place.seconds = last.stat().st_mtime - (place.folder / "0.ready").stat().st_mtime
        return place

    def half(self):
        """Makes this the run as kill -9 left it in step 9: last.pt is of step 8, previous.pt of step 6."""
        template = replace(self, folder=self.shared / f"{self.method}-half")
        if not template.run.exists():
            template.start((die_in_step, 9)).end(-signal.SIGKILL)
        shutil.copytree(template.folder / "out", self.folder / "out")

    def nap(self):
        """Up to a random moment in the life of a run that just began."""
        time.sleep(self.chance.uniform(0, self.straight().seconds))

    def finish(self, *preludes, **what):
        """The same command goes on to the end, and nothing of the run is lost."""
        self.start(*preludes).end(0)
        self.compare(**what)

    def compare(self, straight: Path | None = None, pictures: bool = True):
        """Bit for bit with a run that was never interrupted: checkpoints, metrics.jsonl but for clocks, pictures.

        previous.pt has to be whole, of whatever step: a run that is stopped makes a checkpoint of its own.
        """
        straight = straight or self.straight().run
        names = {path.name for path in (straight / "checkpoints").iterdir()}
        there = {path.name for path in (self.run / "checkpoints").iterdir() if not path.name.startswith("damaged")}
        expect(there == names, f"{self.method}: checkpoints {sorted(there)} instead of {sorted(names)}")
        for name in sorted(names):
            ours, theirs = (state(run / "checkpoints" / name) for run in (self.run, straight))
            if name == "previous.pt":
                continue
            wrong = [key for key in ours | theirs if not equal(ours.get(key), theirs.get(key))]
            expect(not wrong, f"{self.method}: of {name} other than they should be are {wrong[:5]}")
        ours, theirs = metrics(self.run), metrics(straight)
        expect(ours == theirs, f"{self.method}: metrics.jsonl is\n{ours}\ninstead of\n{theirs}")
        ours, theirs = (contents(run / "samples") if pictures else {} for run in (self.run, straight))
        wrong = [key for key in theirs if ours.get(key) != theirs[key]]
        expect(not wrong, f"{self.method}: the pictures {wrong} are others or missing")
        expect(not list(self.run.rglob(".*.tmp")), "half a file is left")


def state(file: Path) -> dict:
    """What of a checkpoint the run depends on: {path: tensor or value}."""
    whole = torch.load(file, weights_only=True)
    return leaves({key: whole[key] for key in (*STATE, "images_seen", "lowest_loss")})


def equal(a, b) -> bool:
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expect_finite(run: Path):
    whole = checkpoint(run)
    expect(all(finite(whole[key]) for key in ("ema", "players", "optimizers")), "last.pt has NaN or infinity in it")


def pictures(shared: Path):
    """40 pictures in the folders of two classes."""
    folder = shared / "pictures"
    if folder.exists():
        return
    for i, image in enumerate(data.load("shapes", 16, limit=40).train):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True, parents=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "ab"[i % 2] / f"{i:02d}.png")


@contextmanager
def disk(folder: Path, megabytes: int):
    """A disk of its own at `folder`, for root alone."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "faults", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(ballast: Path):
    """Takes what room the disk has left, to the last byte."""
    with open(ballast, "ab", buffering=0) as f:
        for size in (2**16, 2**12, 1):
            with suppress(OSError):
                while True:
                    f.write(bytes(size))


# -------------------------------------------------------------------------------------------------- a process, inside

def live(arguments, out, err, ready, preludes, env):
    """What a victim's process does."""
    os.environ.update(env)
    torch.set_num_threads(1)
    for number, path in ((1, out), (2, err)):
        with open(path, "wb") as f:
            os.dup2(f.fileno(), number)
    for function, *values in preludes:
        function(*values)
    ready.touch()
    status = trainer.main(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on it is the tests' own process
    sys.exit(status)


def on_calls(folder: Path, action):
    """Calls `action` before each call that makes, renames, links, removes or flushes a file in the folder."""
    def hook(event, values):
        if event == "open":
            path, mode, flags = values
            changes = flags & (os.O_WRONLY | os.O_RDWR) and not isinstance(path, int)
        else:
            path, changes = values[0] if values else "", event in ("os.rename", "os.link", "os.remove", "os.mkdir")
        if changes and os.fsdecode(path).startswith(str(folder)):
            action()

    def fsync(handle, original=os.fsync):
        action()
        original(handle)

    sys.addaudithook(hook)
    os.fsync = fsync


def count_calls(record: Path, folder: Path):
    """The record gets as many bytes as there are such calls."""
    file = os.open(record, os.O_WRONLY | os.O_CREAT)
    on_calls(folder, lambda: os.write(file, b"."))


def die_at_call(count: int, folder: Path, number: int = signal.SIGKILL):
    """Just before the call of that count the process gets the signal."""
    calls = itertools.count(1)
    on_calls(folder, lambda: next(calls) == count and os.kill(os.getpid(), number))


def record_flushes(record: Path):
    """The record says what a disk that keeps nothing but what was flushed has: names by folder, contents by file."""
    names, contents = {}, {}

    def fsync(handle, original=os.fsync):
        original(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            names[str(path)] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            contents[os.fstat(handle).st_ino] = path.read_bytes()
        new = record.with_suffix(".new")
        new.write_bytes(pickle.dumps((names, contents)))
        os.replace(new, record)

    os.fsync = fsync


def lose_power(folder: Path, record: Path):
    """The folder becomes what the disk had of it, by the record."""
    names, contents = pickle.loads(record.read_bytes())
    shutil.rmtree(folder)

    def make_again(path: Path):
        path.mkdir()
        for name, inode in names.get(str(path), {}).items():
            if str(path / name) in names or name in ("checkpoints", "samples"):
                make_again(path / name)
            else:
                (path / name).write_bytes(contents.get(inode, b""))

    make_again(folder)


def lose_folder(count: int, folder: Path, moved: Path | None):
    """Just before the call of that count the folder is renamed, or removed where `moved` is None."""
    calls = itertools.count(1)

    def lose():
        if next(calls) == count and folder.exists():
            shutil.rmtree(folder) if moved is None else folder.rename(moved)

    on_calls(folder, lose)


def in_step(first: int, last: int, before, after=lambda trainer: None):
    """Calls before(trainer) and after(trainer) around the training steps first to last, counted from 1."""
    original = Trainer.train_step

    def train_step(self):
        here = first <= self.step + 1 <= last
        if here:
            before(self)
        original(self)
        if here:
            after(self)

    Trainer.train_step = train_step


def die_in_step(step: int, number: int = signal.SIGKILL):
    in_step(step, step, lambda trainer: os.kill(os.getpid(), number))


def poison(what: str, value: float, first: int, last: int):
    """One number of the gradient, of Adam's moments or of the weights becomes `value` in these steps."""
    hooks = []

    def before(trainer):
        if what == "gradient":
            hooks.append(next(trainer.net.parameters()).register_hook(lambda gradient: gradient * value))

    def after(trainer):
        weights = next(trainer.net.parameters())
        while hooks:
            hooks.pop().remove()
        if what == "moments":
            trainer.players[0].optimizer.state[weights]["exp_avg_sq"].view(-1)[0] = value
        if what == "weights":
            weights.data.view(-1)[0] = value

    in_step(first, last, before, after)


def run_short(what: str, first: int, last: int):
    """In these savings, counted from 1, there is no memory for a copy of the state, or no thread can be started."""
    where, name = (run_folder, "copied") if what == "memory" else (threading.Thread, "start")
    original, calls = getattr(where, name), itertools.count(1)

    def short(value):
        saving = "ema" in value if isinstance(value, dict) else getattr(value, "name", "") == "checkpoint"
        if saving and first <= next(calls) <= last:
            raise MemoryError if what == "memory" else RuntimeError("can't start new thread")
        return original(value)

    setattr(where, name, short)


def small_files(size: int):
    """No file may be longer than so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def lose_stream(name: str, kind: str):
    """stdout or stderr on a full disk, in a pipe that nobody reads any more, or closed from the start."""
    number = dict(stdout=1, stderr=2)[name]
    if kind == "closed":
        os.close(number)
        os.open(os.devnull, os.O_RDONLY)  # or the next file that is opened would get what is printed by others
        setattr(sys, name, None)
        return
    read, write = os.pipe() if kind == "pipe" else (None, os.open("/dev/full", os.O_WRONLY))
    if kind == "pipe":
        os.close(read)
    os.dup2(write, number)
    os.close(write)


WANDB = """
import time, types

count = 0

def fault(where):
    global count
    count += where == {where!r}
    if where == {where!r} and count >= {number}:
        if {blocks}:
            time.sleep(10_000)
        raise ConnectionError("the server is gone")

class Run:
    offline, url, settings = True, None, types.SimpleNamespace(sync_dir="nowhere")
    log = lambda self, *_: fault("log")
    define_metric = lambda self, *_, **__: fault("define_metric")
    finish = lambda self: fault("finish")

def init(**_):
    fault("init")
    return Run()

Settings = lambda **_: None
Image = lambda picture: fault("Image")
teardown = lambda: fault("teardown")
fault("import")
"""


def use_wandb(folder: Path, where: str, number: int, blocks: bool):
    """A package of that name which fails, or blocks for ever, in a place and from the `number`th call on."""
    (folder / "wandb.py").write_text(WANDB.format(where=where, number=number, blocks=blocks))
    sys.path.insert(0, str(folder))
    with suppress(ImportError):  # patience costs a second here
        from support import background
        background.PATIENCE = 1
