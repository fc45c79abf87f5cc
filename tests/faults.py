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
from dataclasses import dataclass
from functools import cache
from math import inf, nan
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import runs
import trainer
from damage import damage
from fake_wandb import use_wandb
from runs import METHODS, STATE, TINY, checkpoint, contents, finite, metrics, ranks, same, until
from trainer import Trainer

# everything that draws random numbers is switched on, and nothing falls on the same steps as everything else
STEPS = ("--no-overfit --unet-dropout 0.1 --label-drop 0.3 --warmup-steps 10 --max-steps 12 --sample-every 4 "
         "--print-loss-every 3 --checkpoint-every 2 --keep-every 4")
PATIENCE = 100  # seconds after which a process that should have ended counts as hanging


# ------------------------------------------------------------------------------------------------- a process, outside

class Victim:
    """trainer.main(flags) in a process of its own; preludes: (function, *arguments), called in it before."""

    def __init__(self, flags: str, log: Path, *preludes, env: dict | None = None):
        self.process = runs.SERVER.Process(target=runs.child, args=(live, log, env or {}, flags.split(), preludes))
        self.process.start()
        self.process.log = log
        until(log.exists, self.process)

    def kill(self, number: int = signal.SIGKILL):
        if self.process.exitcode is None:  # or its number may be another one's by now
            os.kill(self.process.pid, number)

    def end(self, *allowed: int, seconds: float = PATIENCE, traceback: bool = False) -> int:
        """Its exit status, which has to be one of those allowed; no traceback is to be seen unless it may be."""
        self.process.join(seconds)
        hangs = self.process.exitcode is None
        self.kill()
        self.process.join()
        assert not hangs, f"it hangs: no end after {seconds} s\n{self.said}"
        assert traceback or "Traceback" not in self.said, f"a traceback\n{self.said}"
        assert not allowed or self.process.exitcode in allowed, f"exit status {self.process.exitcode}\n{self.said}"
        return self.process.exitcode

    def expect_refused(self, words: str = ""):
        """It ended with one line that says why."""
        self.end(2)
        assert len(re.findall(rf"^trainer\.py: .*{words}", self.said, re.M)) == 1, self.said

    @property
    def said(self) -> str:
        return self.process.log.read_text(errors="replace")


@dataclass
class Place:
    """Where one try takes place: its folder, the method that is trained, and random numbers that can be had again."""

    folder: Path
    shared: Path  # what all tries have in common: the pictures, and runs that were never interrupted
    method: str
    chance: random.Random | None = None

    def __post_init__(self):
        self.victims = []
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.shared / "pictures").exists():
            runs.draw_pictures(self.shared / "pictures")

    @property
    def run(self) -> Path:
        return self.folder / "out" / "run"

    def start(self, *preludes, flags: str | None = None, more: str = "", env: dict | None = None) -> Victim:
        """The command of the run: always the same one, but for `more`; flags: another one."""
        command = (f"{TINY} {STEPS} --method {self.method} {METHODS[self.method]} --out-dir {self.folder / 'out'} "
                   f"--name run --dataset {self.shared / 'pictures'} {more}")
        log = self.folder / f"{len(self.victims)}.log"
        self.victims.append(Victim(flags or command, log, *preludes, env=env))
        return self.victims[-1]

    def be_half(self):
        """From here on this is the run as kill -9 left it in step 9: last.pt is of step 8, previous.pt of step 6."""
        shutil.copytree(half(self.shared, self.method).folder / "out", self.folder / "out")

    def nap(self):
        """Up to a random moment in the life of a run that just began."""
        time.sleep(self.chance.uniform(0, straight(self.shared, self.method).seconds))

    def die_at_some_call(self, most: int):
        self.start((die_at_call, self.chance.randint(1, most), self.run)).end(0, -signal.SIGKILL)

    def finish(self):
        """The same command goes on to the end, and nothing of the run is lost."""
        self.start().end(0)
        self.compare()

    def compare(self, processes: int = 1):
        """Bit for bit with a run that was never interrupted: checkpoints, metrics.jsonl but for clocks, pictures.

        previous.pt has to be whole, of whatever step: a run that is stopped makes a checkpoint of its own.
        """
        whole = straight(self.shared, self.method, processes).run
        names = {path.name for path in (whole / "checkpoints").iterdir()}
        there = {path.name for path in (self.run / "checkpoints").iterdir() if not path.name.startswith("damaged")}
        assert there == names, f"checkpoints {sorted(there)} instead of {sorted(names)}"
        for name in names:
            ours, theirs = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (self.run, whole))
            if name != "previous.pt":
                same(ours, theirs, (*STATE, "images_seen", "lowest_loss"))
        assert metrics(self.run) == metrics(whole), f"{metrics(self.run)}\ninstead of\n{metrics(whole)}"
        assert contents(whole / "samples").items() <= contents(self.run / "samples").items(), "other pictures, or none"
        assert not list(self.run.rglob(".*.tmp")), "half a file is left"


@cache
def straight(shared: Path, method: str, processes: int = 1) -> Place:
    """The same command in another place, never interrupted."""
    place, began = Place(shared / f"{method}-{processes}", shared, method), time.monotonic()
    calls = place.folder / "calls"
    environments = ranks(processes) if processes > 1 else [None]
    for victim in [place.start((count_calls, calls, place.run), env=env) for env in environments]:
        victim.end(0)
    place.calls, place.seconds = calls.stat().st_size, time.monotonic() - began
    return place


@cache
def half(shared: Path, method: str) -> Place:
    place = Place(shared / f"{method}-half", shared, method)
    place.start((in_step, 9, die)).end(-signal.SIGKILL)
    return place


# -------------------------------------------------------------------------------------------------- a process, inside

def live(arguments, preludes) -> int:
    """What a victim's process does."""
    for function, *values in preludes:
        function(*values)
    status = trainer.main(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on it is the tests' own process
    return status


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


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(count: int, folder: Path):
    """Kills the process just before the call of that count."""
    calls = itertools.count(1)
    on_calls(folder, lambda: next(calls) == count and die())


def in_step(step: int, action, *arguments):
    """Calls action(trainer, *arguments) before that training step, counted from 1."""
    original = Trainer.train_step

    def train_step(self):
        if self.step + 1 == step:
            action(self, *arguments)
        original(self)

    Trainer.train_step = train_step


def poison(trainer: Trainer, what: str, value: float):
    """From here on every gradient is spoilt by `value`; or one number of Adam's moments or of the weights is, once."""
    weights = next(trainer.net.parameters())
    if what == "gradient":
        weights.register_hook(lambda gradient: gradient * value)
    elif what == "moments":
        trainer.players[0].optimizer.state[weights]["exp_avg_sq"].view(-1)[0] = value
    else:
        weights.data.view(-1)[0] = value


def small_files(size: int):
    """No file may be longer than so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# --------------------------------------------------------------------------------------------------------- the faults

def stopped(place: Place, *numbers: int, times: int = 3):
    """By one of these signals at random moments; none: by kill -9 just before it touches a file."""
    for _ in range(times):
        if not numbers:
            place.die_at_some_call(straight(place.shared, place.method).calls)
            continue
        victim, number = place.start(), place.chance.choice(numbers)
        place.nap()
        victim.kill(number)
        victim.end(0, 128 + number, -number)
    place.finish()


def long_files(place: Place):
    size = int(10 ** place.chance.uniform(1, 5.7))
    victim = place.start((small_files, size))
    status = victim.end(1, 2)
    if size >= 10_000:
        assert "File too large" in victim.said, victim.said
        if status == 2:
            victim.expect_refused()
    place.finish()


def logger(place: Place, hangs: bool):
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
    assert victim.said.count("warning: wandb") <= 1, f"more than one warning\n{victim.said}"
    place.compare()


def bad_numbers(place: Place, *kinds: str):
    """NaN or infinity, in the course of some step."""
    what, value, step = place.chance.choice(kinds), place.chance.choice([nan, inf]), place.chance.randint(2, 11)
    victim = place.start((in_step, step, poison, what, value), more="--max-steps 60")
    victim.end(1)
    assert "is not saved" in victim.said, victim.said
    if step > 2:
        assert finite(checkpoint(place.run))
    place.finish()


def divergence(place: Place):
    place.be_half()
    victim = place.start(more="--base-lr 1e6 --grad-clip 1e9 --max-steps 60")
    victim.end(1)
    assert finite(checkpoint(place.run))
    advice = re.search(r"--resume (\S+), and lower base_lr", victim.said)
    assert advice, f"no advice\n{victim.said}"
    steps = checkpoint(place.run)["step"] + 9
    place.start(flags=f"--resume {advice[1]} --max-steps {steps} --base-lr 2e-4 --grad-clip 1").end(0)
    assert finite(checkpoint(place.run))


def damaged(place: Place, *names: str):
    """Checkpoints of these names."""
    place.be_half()
    marker = place.folder / "marker"
    how = [damage(place.run / "checkpoints" / name, place.chance, marker) for name in names]
    before, both = contents(place.run), len(names) == 2
    if not both and place.chance.random() < 0.5:
        place.die_at_some_call(30)
    victim = place.start()
    if victim.end(*(0, 2) if both else (0,)) == 2:
        victim.expect_refused()
        assert contents(place.run) == before, "files were changed"
    else:  # also of both: a flipped bit in what nobody reads, say a date
        place.compare()
    assert not marker.exists(), f"code in a checkpoint was run ({how})"


def damaged_metrics(place: Place):
    place.be_half()
    path, chance = place.run / "metrics.jsonl", place.chance
    lines = path.read_bytes().splitlines()
    for _ in range(chance.randint(1, 6)):
        line = chance.choice([b'{"step": 3, "lo', b'{"loss": 1.0}', b'{"step": "3"}', b'{"step": NaN}', b"nan", b"[3]",
                              b"[" * 100_000, b"\0" * 40, chance.randbytes(99).replace(b"\n", b""), b"", b"\xff\xfe"])
        lines.insert(chance.randint(0, len(lines)), line)
    path.write_bytes(b"\n".join(lines) + chance.choice([b"\n", b'\n{"step": 9, "loss": 0.']))
    place.finish()


def two_trainers(place: Place):
    first = place.start()
    if place.chance.random() < 0.7:
        place.nap()
    both = first, place.start()
    statuses = [victim.end(0, 2) for victim in both]
    assert 0 in statuses, "both were refused"
    for status, victim in zip(statuses, both):
        if status == 2:
            victim.expect_refused("another trainer is at work")
    place.compare()


def one_of_two(place: Place):
    both = [place.start(env=env) for env in ranks(2)]
    until(lambda: (place.run / "config.json").exists(), both[0].process)  # they have met
    place.nap()
    hit = place.chance.randrange(2)
    both[hit].kill()
    both[hit].end()
    both[1 - hit].end(seconds=60, traceback=True)
    for victim in [place.start(env=env) for env in ranks(2)]:
        victim.end(0)
    place.compare(processes=2)


FAULTS = {  # name: (its row in docs/faults.md, what to do, with what)
    "kill": ("kill -9 at a random moment, three times in a row", stopped, signal.SIGKILL),
    "kill_between_files": ("kill -9 just before a file is made, flushed, renamed, linked or removed, three times in a "
                           "row", stopped),
    "signals": ("SIGTERM, SIGHUP or SIGINT at a random moment, three times in a row",
                stopped, signal.SIGTERM, signal.SIGHUP, signal.SIGINT),
    "long_files": ("no file may be longer than some bytes (EFBIG), then it may", long_files),
    "dead_logger": ("a dead logger: any of its calls raises", logger, False),
    "frozen_logger": ("a frozen logger: any of its calls never returns", logger, True),
    "bad_gradients": ("gradients that are NaN from a random step on", bad_numbers, "gradient"),
    "bad_state": ("NaN or infinity in Adam's moments or in the weights", bad_numbers, "moments", "weights"),
    "divergence": ("a learning rate of 1e6 given on resume; then what the last line advises", divergence),
    "damaged_checkpoint": ("last.pt damaged: cut, a bit flipped, zeros, empty, other files, code, another zip; half of "
                           "them killed after", damaged, "last.pt"),
    "damaged_checkpoints": ("last.pt and previous.pt both damaged", damaged, "last.pt", "previous.pt"),
    "damaged_metrics": ("half lines, bytes and nonsense in metrics.jsonl", damaged_metrics),
    "two_trainers": ("two trainers in one folder", two_trainers),
    "one_of_two": ("kill -9 to one of two processes: the other one leaves, and both go on", one_of_two)}


def attempt(name: str, number: int, seed, folder: Path, **how) -> str | None:
    """One try; what was lost, or None. It is the same for the same (name, number, seed), but for the clock."""
    chance = random.Random(f"{seed} {name} {number}")
    place = Place(folder / f"{name}-{number}", folder / "shared", list(METHODS)[number % len(METHODS)], chance)
    try:
        _, fault, *arguments = FAULTS[name]
        fault(place, *arguments, **how)
        return None
    except Exception as failure:
        where = f"seed {seed}, try {number} of {name}, method {place.method}; see {place.folder}"
        return f"{type(failure).__name__}: {failure}\n({where})"
    finally:
        for victim in place.victims:
            victim.kill()
            victim.process.join()


def main() -> int:
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # where the processes find the trainer
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=12, help="of each fault; methods take turns")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="NAME",
                        help=", ".join(FAULTS))
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="to repeat a failure")
    asked = parser.parse_args()
    folder, all_lost = Path(tempfile.mkdtemp(prefix="faults-")), 0
    print(f"seed {asked.seed}, in {folder}", file=sys.stderr)
    rows = ["| fault | tries | survived | lost |", "|---|---|---|---|"]
    for name in asked.only:
        lost = 0
        for number in range(asked.tries):
            if reason := attempt(name, number, asked.seed, folder):
                lost += 1
                print(f"LOST by {name}: {reason}\n", file=sys.stderr)
            else:
                shutil.rmtree(folder / f"{name}-{number}")
        print(f"{name}: {asked.tries} tries, {lost} lost", file=sys.stderr)
        rows.append(f"| {FAULTS[name][0]} | {asked.tries} | {asked.tries - lost} | {lost} |")
        all_lost += lost
    print("\n".join(rows))
    if all_lost:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
