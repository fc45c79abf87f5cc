"""Kills runs of the trainer, starves them, damages their files; then sees whether anything was lost.

    python tests/faults.py                                   every fault; exit status 1 if anything was lost
    python tests/faults.py --only kill signals --tries 40 --seed 7

A fault is survived where the same command, given again, ends with the bits of a run that was never interrupted: all
checkpoints, metrics.jsonl but for its clocks, pictures. Where only a logger fails, the run has to come to its end by
itself; what can't be used has to be refused in one line, with exit status 2 and every file as it was.
"""
import argparse
import itertools
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from PIL import Image

import trainer
from damage import damage
from fake_wandb import use_wandb
from images import data
from runs import SERVER, STATE, TINY, checkpoint, finite, leaves, metrics, ranks, until
from trainer import Trainer

METHODS = {"interpolant": "", "sr3": "--solver auto", "i2sb": "--solver auto", "edm": "",
           "udpm": "--solver auto --sample-steps 3 --udpm.lpips-weight 0 0 0 --udpm.disc-channels 8",
           "flowmap": "--solver auto --sample-steps 1", "regression": "--solver auto --sample-steps 1"}
# everything that draws random numbers is switched on, and nothing falls on the same steps as everything else
STEPS = ("--no-overfit --unet-dropout 0.1 --label-drop 0.3 --warmup-steps 10 --max-steps 12 --sample-every 4 "
         "--print-loss-every 3 --checkpoint-every 2 --keep-every 4")
PATIENCE = 100  # seconds after which a process that should have ended counts as hanging


class Lost(AssertionError):
    """What a fault has destroyed, or a process that did not end as it should."""


def expect(condition, text: str):
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

    def expect_said(self, words: str):
        expect(words in self.said, f"it does not say {words!r}\n{self.said}")

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
        pictures(self.shared / "pictures")

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

    def die_at_some_call(self, most: int):
        self.start((die_at_call, self.chance.randint(1, most), self.run)).end(0, -signal.SIGKILL)

    def finish(self):
        """The same command goes on to the end, and nothing of the run is lost."""
        self.start().end(0)
        self.compare()

    def compare(self, straight: Path | None = None):
        """Bit for bit with a run that was never interrupted: checkpoints, metrics.jsonl but for clocks, pictures.

        previous.pt has to be whole, of whatever step: a run that is stopped makes a checkpoint of its own.
        """
        straight = straight or self.straight().run
        names = {path.name for path in (straight / "checkpoints").iterdir()}
        there = {path.name for path in (self.run / "checkpoints").iterdir() if not path.name.startswith("damaged")}
        expect(there == names, f"{self.method}: checkpoints {sorted(there)} instead of {sorted(names)}")
        for name in sorted(names):
            ours, theirs = (state(run / "checkpoints" / name) for run in (self.run, straight))
            wrong = [key for key in ours | theirs if not equal(ours.get(key), theirs.get(key))]
            expect(not wrong or name == "previous.pt", f"{self.method}: of {name} other than they should be: {wrong}")
        ours, theirs = metrics(self.run), metrics(straight)
        expect(ours == theirs, f"{self.method}: metrics.jsonl is\n{ours}\ninstead of\n{theirs}")
        ours, theirs = (contents(run / "samples") for run in (self.run, straight))
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


def pictures(folder: Path):
    """40 pictures in the folders of two classes."""
    if not folder.exists():
        for i, image in enumerate(data.load("shapes", 16, limit=40).train):
            (folder / "ab"[i % 2]).mkdir(exist_ok=True, parents=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "ab"[i % 2] / f"{i:02d}.png")


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


def die_at_call(count: int, folder: Path):
    """Kills the process just before the call of that count."""
    calls = itertools.count(1)
    on_calls(folder, lambda: next(calls) == count and os.kill(os.getpid(), signal.SIGKILL))


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


def die_in_step(step: int):
    in_step(step, step, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))


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


def small_files(size: int):
    """No file may be longer than so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# ----------------------------------------------------------------------------- the faults; what each says is its row

def kill(place: Place):
    """kill -9 at a random moment, three times in a row"""
    for _ in range(3):
        victim = place.start()
        place.nap()
        victim.kill()
        victim.end()
    place.finish()


def kill_between_files(place: Place):
    """kill -9 just before a file is made, flushed, renamed, linked or removed, three times in a row"""
    for _ in range(3):
        place.die_at_some_call(place.straight().calls)
    place.finish()


def signals(place: Place):
    """SIGTERM, SIGHUP or SIGINT at a random moment, three times in a row"""
    for _ in range(3):
        victim, number = place.start(), place.chance.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
        place.nap()
        victim.kill(number)
        victim.end(0, 128 + number, -number)
    place.finish()


def long_files(place: Place):
    """no file may be longer than some bytes (EFBIG), then it may"""
    size = int(10 ** place.chance.uniform(1, 5.7))
    victim = place.start((small_files, size))
    status = victim.end(1, 2)
    if size >= 10_000:
        victim.expect_said("File too large")
        if status == 2:
            victim.refused()
    place.finish()


def dead_logger(place: Place, hangs: bool = False):
    """a dead logger: any of its calls raises"""
    where = place.chance.choice(["init", "define_metric", "Image", "log", "log", "finish", "teardown"])
    number = place.chance.randint(1, 6) if where in ("log", "Image") else 1
    wandb = use_wandb, where, number, hangs
    if place.chance.random() < 0.3:
        victim = place.start(wandb, more="--use-wandb")
        place.nap()
        victim.kill(signal.SIGTERM)
        victim.end(0, 143, -signal.SIGTERM)
    victim = place.start(wandb, more="--use-wandb")
    victim.end(0, seconds=30)
    expect(victim.err.read_text().count("warning: wandb") <= 1, f"more than one warning\n{victim.said}")
    place.compare()


def frozen_logger(place: Place):
    """a frozen logger: any of its calls never returns"""
    dead_logger(place, hangs=True)


def bad_gradients(place: Place):
    """gradients that are NaN from a random step on"""
    first = place.chance.randint(1, 11)
    victim = place.start((poison, "gradient", torch.nan, first, 10**9), more="--max-steps 60")
    victim.end(1)
    victim.expect_said("gradients were not finite")
    if first > 2:
        expect_finite(place.run)
    place.finish()


def bad_state(place: Place):
    """NaN or infinity in Adam's moments or in the weights"""
    what, value = place.chance.choice(["moments", "weights"]), place.chance.choice([torch.nan, torch.inf])
    step = place.chance.randint(1, 12)
    victim = place.start((poison, what, value, step, step))
    victim.end(1)
    victim.expect_said("is not saved")
    if step > 2:
        expect_finite(place.run)
    place.finish()


def divergence(place: Place):
    """a learning rate of 1e6 given on resume; then what the last line advises"""
    place.half()
    victim = place.start(more="--base-lr 1e6 --grad-clip 1e9 --max-steps 60")
    victim.end(1)
    expect_finite(place.run)
    advice = re.search(r"--resume (\S+), and lower base_lr", victim.said)
    expect(advice, f"no advice\n{victim.said}")
    flags = f"--resume {advice[1]} --max-steps {checkpoint(place.run)['step'] + 9} --base-lr 2e-4 --grad-clip 1"
    place.victims.append(Victim(flags, place.folder))
    place.victims[-1].end(0)
    expect_finite(place.run)


def damaged_checkpoint(place: Place):
    """last.pt damaged: cut, a bit flipped, zeros, empty, other files, code, another zip; half of them killed after"""
    place.half()
    how = damage(place.run / "checkpoints" / "last.pt", place.chance, place.folder / "marker")
    if place.chance.random() < 0.5:
        place.die_at_some_call(30)
    place.finish()
    expect(not (place.folder / "marker").exists(), f"code in a checkpoint was run ({how})")


def damaged_checkpoints(place: Place):
    """last.pt and previous.pt both damaged"""
    place.half()
    for name in ("last.pt", "previous.pt"):
        damage(place.run / "checkpoints" / name, place.chance, place.folder / "marker")
    before = contents(place.run)
    victim = place.start()
    if victim.end(0, 2) == 2:
        victim.refused()
        expect(contents(place.run) == before, "files were changed")
    else:  # a flipped bit in what nobody reads, say a date
        place.compare()
    expect(not (place.folder / "marker").exists(), "code in a checkpoint was run")


def damaged_metrics(place: Place):
    """half lines, bytes and nonsense in metrics.jsonl"""
    place.half()
    path, chance = place.run / "metrics.jsonl", place.chance
    lines = path.read_bytes().splitlines()
    for _ in range(chance.randint(1, 6)):
        line = chance.choice([b'{"step": 3, "lo', b'{"loss": 1.0}', b'{"step": "3"}', b'{"step": NaN}', b"nan", b"[3]",
                              b"[" * 100_000, b"\0" * 40, chance.randbytes(99).replace(b"\n", b""), b"", b"\xff\xfe"])
        lines.insert(chance.randint(0, len(lines)), line)
    path.write_bytes(b"\n".join(lines) + chance.choice([b"\n", b'\n{"step": 9, "loss": 0.']))
    place.finish()


def two_trainers(place: Place):
    """two trainers in one folder"""
    first = place.start()
    if place.chance.random() < 0.7:
        place.nap()
    second = place.start()
    statuses = first.end(0, 2), second.end(0, 2)
    expect(0 in statuses, "both were refused")
    for status, victim in zip(statuses, (first, second)):
        if status == 2:
            victim.refused()
            victim.expect_said("another trainer is at work")
    place.compare()


def one_of_two(place: Place):
    """kill -9 to one of two processes: the other one leaves, and both go on"""
    def start_two(place):
        return [place.start(env=env) for env in ranks(2)]

    straight = replace(place, folder=place.shared / f"{place.method}-two")
    if not straight.run.exists():
        for victim in start_two(straight):
            victim.end(0)
    both = start_two(place)
    until(lambda: (place.run / "config.json").exists(), both[0].process)  # they have met
    time.sleep(place.chance.uniform(0, place.straight().seconds))
    hit = place.chance.randrange(2)
    both[hit].kill()
    both[hit].end()
    both[1 - hit].end(seconds=60, traceback=True)
    for victim in start_two(place):
        victim.end(0)
    place.compare(straight.run)


FAULTS = {function.__name__: function for function in (
    kill, kill_between_files, signals, long_files, dead_logger, frozen_logger, bad_gradients, bad_state, divergence,
    damaged_checkpoint, damaged_checkpoints, damaged_metrics, two_trainers, one_of_two)}


def attempt(name: str, number: int, seed, folder: Path) -> str | None:
    """One try; what was lost, or None. It is the same for the same (name, number, seed), but for the clock."""
    chance = random.Random(f"{seed} {name} {number}")
    place = Place(folder / f"{name}-{number}", folder / "shared", list(METHODS)[number % len(METHODS)], chance)
    try:
        FAULTS[name](place)
        return None
    except Exception as failure:
        where = f"seed {seed}, try {number} of {name}, method {place.method}; see {place.folder}"
        return f"{type(failure).__name__}: {failure}\n({where})"
    finally:
        place.leave()


def main() -> int:
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # where the processes find the trainer
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=12, help="of each fault; methods take turns")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="NAME",
                        help=", ".join(FAULTS))
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="to repeat a failure")
    asked = parser.parse_args()
    folder, lost = Path(tempfile.mkdtemp(prefix="faults-")), {}
    print(f"seed {asked.seed}, in {folder}", file=sys.stderr)
    rows = ["| fault | tries | survived | lost |", "|---|---|---|---|"]
    for name in asked.only:
        text, lost[name] = FAULTS[name].__doc__, 0
        for number in range(asked.tries):
            if reason := attempt(name, number, asked.seed, folder):
                lost[name] += 1
                print(f"LOST by {name}: {reason}\n", file=sys.stderr)
            else:
                shutil.rmtree(folder / f"{name}-{number}")
        print(f"{name}: {asked.tries} tries, {lost[name]} lost", file=sys.stderr)
        rows.append(f"| {text} | {asked.tries} | {asked.tries - lost[name]} | {lost[name]} |")
    print("\n".join(rows))
    if not any(lost.values()):
        shutil.rmtree(folder)
    return 1 if any(lost.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
