"""What tests/faults.py does to a run: a function for each row of its table, which raises Lost where something was."""
import random
import re
import shutil
import signal
import time
from dataclasses import dataclass, replace

import torch

from damage import damage, nonsense
from runs import checkpoint, ranks
from victims import (
    Lost,
    Place,
    Victim,
    contents,
    die_at_call,
    die_in_step,
    disk,
    equal,
    expect,
    expect_finite,
    fill,
    lose_folder,
    lose_power,
    lose_stream,
    poison,
    record_flushes,
    run_short,
    small_files,
    state,
    use_wandb,
)

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT")]


@dataclass
class Fault:
    text: str
    does: object  # does(place) raises Lost
    share: float = 1.0  # of the tries that are asked for: some take long
    root: bool = False  # whether only root can


FAULTS: dict[str, Fault] = {}


def fault(text: str, **more):
    def register(does):
        FAULTS[does.__name__] = Fault(text, does, **more)
        return does

    return register


# --------------------------------------------------------------------------------------------------- kills and signals

@fault("kill -9 at a random moment, three times in a row")
def kill(place: Place):
    for _ in range(3):
        victim = place.start()
        place.nap()
        victim.kill()
        victim.end()
    place.finish()


@fault("kill -9 just before a file is made, flushed, renamed, linked or removed, three times in a row")
def kill_between_files(place: Place):
    for _ in range(3):
        place.start((die_at_call, place.chance.randint(1, place.straight().calls), place.run)).end(0, -signal.SIGKILL)
    place.finish()


@fault("SIGTERM, SIGHUP or SIGINT at a random moment, three times in a row")
def signals(place: Place):
    for _ in range(3):
        victim, number = place.start(), place.chance.choice(SIGNALS)
        place.nap()
        victim.kill(number)
        victim.end(0, 128 + number, -number)
    place.finish()


@fault("SIGTERM in a step that would be followed by pictures, then kill -9 as files are changed")
def before_pictures(place: Place):
    place.start((die_in_step, place.chance.choice([4, 8, 12]), signal.SIGTERM)).end(128 + signal.SIGTERM)
    for _ in range(2):
        place.start((die_at_call, place.chance.randint(1, 30), place.run)).end(0, -signal.SIGKILL)
    place.finish()


# ---------------------------------------------------------------------------------------------------------- the disk

@fault("no file may be longer than some bytes (EFBIG), then it may")
def long_files(place: Place):
    size = int(10 ** place.chance.uniform(1, 5.7))
    victim = place.start((small_files, size))
    status = victim.end(1, 2)
    expect(size < 10_000 or "File too large" in victim.said, f"it does not say so\n{victim.said}")
    if status == 2 and size >= 10_000:
        victim.refused()
    place.finish()


@fault("the disk is full from a random moment on (ENOSPC), then there is room again", root=True)
def full_disk(place: Place):
    with disk(place.folder / "out", 16):
        victim, ballast = place.start(), place.folder / "out" / "ballast"
        place.nap()
        while victim.process.exitcode is None:
            fill(ballast)
            time.sleep(0.002)
        status = victim.end(0, 1, 2)
        expect(status == 0 or "No space left" in victim.said, f"it does not say so\n{victim.said}")
        ballast.unlink(missing_ok=True)
        place.finish()


OBSTACLES = {  # what can't be written: the exit status of a run that meets it
    "": 2, "run": 2, "run/config.json": 2, "run/metrics.jsonl": 2, "run/checkpoints": 1, "run/samples": 0}


@fault("a file in the place of a folder, or a folder in the place of a file")
def obstacle(place: Place):
    if place.chance.random() < 0.5:
        place.half()
    name, status = place.chance.choice(list(OBSTACLES.items()))
    path, aside = place.folder / "out" / name, place.folder / "aside"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(aside)
    path.mkdir() if path.suffix else path.write_text("in the way")
    before = contents(place.folder / "out")
    victim = place.start()
    victim.end(status)
    if status == 2:
        victim.refused()
        after = contents(place.folder / "out")
        changed = {key for key in before if before[key] != after.get(key)} - {"run/config.json"}  # it names the folder
        expect(not changed, f"files were changed: {changed}")
    else:
        expect("warning: " in victim.said and " failed " in victim.said, f"it does not say so\n{victim.said}")
    path.rmdir() if path.suffix else path.unlink()
    if aside.exists():
        aside.rename(path)
    place.finish(pictures=name != "run/samples")


@fault("the power fails at a random moment, or as the command has ended: all that was not flushed is lost")
def power(place: Place):
    record = place.folder / "disk"
    victim = place.start((record_flushes, record))
    if place.chance.random() < 0.5:
        victim.end(0)
        lose_power(place.run, record)
        place.compare()
    else:
        place.nap()
        victim.kill()
        victim.end()
        if record.exists():
            lose_power(place.run, record)
    place.finish()


@fault("the run's folder is renamed or removed while it runs")
def folder_gone(place: Place):
    moved = place.folder / "moved" if place.chance.random() < 0.5 else None
    count, last = place.chance.randint(10, place.straight().calls), "checkpoints/last.pt"
    status = place.start((lose_folder, count, place.run, moved)).end(0, 1)
    if status == 0:
        ours, theirs = (state(run / last) for run in (place.run, place.straight().run))
        expect(all(equal(ours[key], theirs[key]) for key in theirs), "last.pt is not what it should be")
    if moved:  # it is as good as the folder of a run that was killed
        shutil.rmtree(place.run, ignore_errors=True)
        moved.rename(place.run)
        place.finish()


# --------------------------------------------------------------------------------------------- the logger, the output

def logger(place: Place, blocks: bool):
    where = place.chance.choice(["import", "init", "define_metric", "Image", "log", "log", "finish", "teardown"])
    number = place.chance.randint(1, 6) if where in ("log", "Image") else 1
    wandb = use_wandb, place.folder, where, number, blocks
    victim = place.start(wandb, more="--use-wandb")
    if place.chance.random() < 0.3:
        place.nap()
        victim.kill(signal.SIGTERM)
        victim.end(0, 143, -signal.SIGTERM)
        victim = place.start(wandb, more="--use-wandb")
    victim.end(0, seconds=30)
    shown = victim.err.read_text().count("warning: wandb")
    expect(shown <= 1, f"more than one warning\n{victim.said}")
    place.compare()


@fault("a dead logger: any of its calls raises")
def dead_logger(place: Place):
    logger(place, blocks=False)


@fault("a frozen logger: any of its calls never returns", share=0.5)
def frozen_logger(place: Place):
    logger(place, blocks=True)


@fault("stdout or stderr closed, in a pipe that nobody reads (as after `head -1`), or on a full disk")
def output(place: Place):
    names = place.chance.choice([["stdout"], ["stderr"], ["stdout", "stderr"]])
    lost = [(lose_stream, name, place.chance.choice(["closed", "pipe", "full"])) for name in names]
    place.start(*lost).end(0)
    place.compare()


# ------------------------------------------------------------------------------------------------ numbers that go wrong

@fault("gradients that are NaN or infinite, in up to three steps")
def few_bad_gradients(place: Place):
    first, count = place.chance.randint(1, 8), place.chance.randint(1, 3)
    place.start((poison, "gradient", place.chance.choice([torch.nan, torch.inf]), first, first + count - 1)).end(0)
    expect_finite(place.run)
    skipped = int(checkpoint(place.run)["skipped"][0])
    expect(skipped == count, f"{skipped} skipped steps are counted instead of {count}")


@fault("gradients that are NaN from a random step on")
def bad_gradients(place: Place):
    first = place.chance.randint(1, 11)
    victim = place.start((poison, "gradient", torch.nan, first, 10**9), more="--max-steps 60")
    victim.end(1)
    expect("gradients were not finite" in victim.said, f"it does not say so\n{victim.said}")
    if first > 2:
        expect_finite(place.run)
    place.finish()


@fault("NaN or infinity in Adam's moments or in the weights")
def bad_state(place: Place):
    what, value = place.chance.choice(["moments", "weights"]), place.chance.choice([torch.nan, torch.inf])
    step = place.chance.randint(1, 12)
    victim = place.start((poison, what, value, step, step))
    victim.end(1)
    expect("is not saved" in victim.said, f"it does not say so\n{victim.said}")
    if step > 2:
        expect_finite(place.run)
    place.finish()


@fault("a learning rate of 1e6 given on resume; then what the last line advises")
def divergence(place: Place):
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


# ------------------------------------------------------------------------------------------------------- damaged files

@fault("last.pt damaged: cut, a bit flipped, zeros, empty, other files, code, another zip; half of them killed after")
def damaged_checkpoint(place: Place):
    place.half()
    how = damage(place.run / "checkpoints" / "last.pt", place.chance, place.folder / "marker")
    if place.chance.random() < 0.5:
        place.start((die_at_call, place.chance.randint(1, 30), place.run)).end(0, -signal.SIGKILL)
    place.finish()
    expect(not (place.folder / "marker").exists(), f"code in a checkpoint was run ({how})")


@fault("last.pt and previous.pt both damaged")
def damaged_checkpoints(place: Place):
    place.half()
    for name in ("last.pt", "previous.pt"):
        damage(place.run / "checkpoints" / name, place.chance, place.folder / "marker")
    refused_or_harmless(place)
    expect(not (place.folder / "marker").exists(), "code in a checkpoint was run")


@fault("one value in both checkpoints is of another kind")
def nonsense_in_checkpoints(place: Place):
    place.half()
    seed = place.chance.random()
    for name in ("last.pt", "previous.pt"):
        how = nonsense(place.run / "checkpoints" / name, random.Random(seed))
    try:
        refused_or_harmless(place, compare=False)
    except Lost as failure:
        raise Lost(f"{how}: {failure}") from None


def refused_or_harmless(place: Place, compare: bool = True):
    before = contents(place.run)
    victim = place.start()
    if victim.end(0, 2) == 2:
        victim.refused()
        expect(contents(place.run) == before, "files were changed")
    elif compare:  # a flipped bit in what nobody reads, say a date
        place.compare()


@fault("going on from what is older than the run's newest state, or was exported")
def wrong_resume(place: Place):
    place.half()
    before = contents(place.run)
    name = place.chance.choice(["checkpoints/previous.pt", "checkpoints/step_000004.pt", "model.safetensors"])
    place.victims.append(Victim(f"--resume {place.run / name} --max-steps 20", place.folder))
    place.victims[-1].refused()
    expect(contents(place.run) == before, "files were changed")
    place.finish()


@fault("the classes of the data changed: one is gone, another one is new")
def changed_data(place: Place):
    place.half()
    before = contents(place.run)
    shutil.copytree(place.shared / "pictures", place.folder / "pictures")
    (place.folder / "pictures" / "a").rename(place.folder / "pictures" / "c")
    place.start(more=f"--dataset {place.folder / 'pictures'}").refused()
    expect(contents(place.run) == before, "files were changed")
    place.finish()


@fault("a pack of images is damaged: cut, longer by a byte, or a bit flipped")
def damaged_pack(place: Place):
    more = f"--data-path {place.folder / 'data'}"
    place.start((die_in_step, 9), more=more).end(-signal.SIGKILL)
    columns = [path for path in (place.folder / "data").rglob("*") if path.is_file() and path.stat().st_size > 5000]
    expect(columns, "no pack was made")
    file, chance = place.chance.choice(columns), place.chance
    content, at = file.read_bytes(), chance.randrange(file.stat().st_size)
    flipped = content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1:]
    file.write_bytes(chance.choice([content[:at], content + b"x", flipped]))
    place.start(more=more).end(0)
    place.compare()


@fault("no memory for a copy of the state, or no thread to write it, for a while")
def shortage(place: Place):
    what, first = place.chance.choice(["memory", "threads"]), place.chance.randint(1, 5)
    place.start((run_short, what, first, first + place.chance.randint(0, 3))).end(0)
    place.compare()


@fault("half lines, bytes and nonsense in metrics.jsonl")
def damaged_metrics(place: Place):
    place.half()
    path, chance = place.run / "metrics.jsonl", place.chance
    lines = path.read_bytes().splitlines()
    for _ in range(chance.randint(1, 6)):
        line = chance.choice([b'{"step": 3, "lo', b'{"loss": 1.0}', b'{"step": "3"}', b'{"step": NaN}', b"nan", b"[3]",
                              b"[" * 100_000, b"\0" * 40, chance.randbytes(99).replace(b"\n", b""), b"", b"\xff\xfe"])
        lines.insert(chance.randint(0, len(lines)), line)
    path.write_bytes(b"\n".join(lines) + chance.choice([b"\n", b'\n{"step": 9, "loss": 0.']))
    place.finish()


# ---------------------------------------------------------------------------------------------------- several processes

@fault("two trainers in one folder")
def two_trainers(place: Place):
    first = place.start()
    if place.chance.random() < 0.7:
        place.nap()
    second = place.start()
    statuses = first.end(0, 2), second.end(0, 2)
    expect(0 in statuses, "both were refused")
    for status, victim in zip(statuses, (first, second)):
        if status == 2:
            victim.refused()
            expect("another trainer is at work" in victim.said, victim.said)
    place.compare()


def start_two(place: Place) -> list[Victim]:
    return [place.start(env=env) for env in ranks(2)]


@fault("two processes with other settings each, or other images", share=0.5)
def disagreement(place: Place):
    shutil.copytree(place.shared / "pictures", place.folder / "pictures")
    next((place.folder / "pictures" / "a").iterdir()).unlink()
    other = place.chance.choice(["--seed 1", "--weight-decay 0.1", f"--dataset {place.folder / 'pictures'}"])
    for victim in [place.start(env=env, more=more) for env, more in zip(ranks(2), ["", other])]:
        victim.refused()
        expect("process 1 differs from process 0" in victim.said, victim.said)


@fault("kill -9 to one of two processes: the other one leaves, and both go on", share=0.5)
def one_of_two(place: Place):
    straight = replace(place, folder=place.shared / f"{place.method}-two")
    if not straight.run.exists():
        for victim in start_two(straight):
            victim.end(0)
    both = start_two(place)
    while not (place.run / ".lock").exists() and both[0].process.exitcode is None:
        time.sleep(0.001)
    time.sleep(place.chance.uniform(0, place.straight().seconds))
    hit = place.chance.randrange(2)
    both[hit].kill()
    both[hit].end()
    both[1 - hit].end(seconds=60, traceback=True)
    for victim in start_two(place):
        victim.end(0)
    place.compare(straight.run)
