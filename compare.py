"""Several methods from nothing to a table and a plot: trains each alike, measures each, and reports.

    python compare.py                                    all methods, super-resolution: about an hour on two cores
    python compare.py --task jpeg --methods i2sb edm --seeds 0 1 --images 100000 --output runs/compare-jpeg
    CUDA_VISIBLE_DEVICES=1 python compare.py --only edm  this method alone, for one GPU each
    python compare.py -- --damage.factor 4               what follows -- goes to trainer.py, for every run

Into --output go a run METHOD-seedS each, results/METHOD-seedS.json, table.md, quality.png and .pdf, and
quality-seconds.png and .pdf. Ctrl-C saves; the same command again goes on and skips what is done.
"""
if __name__ == "__main__":
    from support.output import quiet_interrupt
    quiet_interrupt()

import ctypes
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import torch

from evaluate import read_result
from evaluation.costs import training_flops
from evaluation.metrics import METRICS
from evaluation.report import write_report
from images import SettingsError, data
from support import bounds, machine
from support.bounds import Count, Positive, Seed, between, length
from support.command_line import parse, split
from support.disk import write_atomically
from support.machine import Signals
from support.model import make_players, make_unet
from support.output import unbreakable_output
from trainer import Config, read_command_line

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # opened here: a forked child does next to nothing
HERE = Path(__file__).resolve().parent
METHODS = get_args(get_type_hints(Config)["method"])


@dataclass
class Options:
    """What is compared, and how long each method trains."""

    # names of the methods; None: all, of the task generate all but regression
    methods: Annotated[tuple[Literal[METHODS], ...], length(1)] | None = None
    only: tuple[Literal[METHODS], ...] = ()  # methods to train and measure now; the table has all runs
    seeds: tuple[Seed, ...] = (0,)  # seeds of a run each; the table has mean and spread
    task: str = "sr"  # task, as trainer.py's
    dataset: str | None = None  # data set, as trainer.py's; None: cifar10
    data_path: str = "data"  # folder where downloaded data sets are kept
    images: Count = 38_400  # training images that each method sees, counted again in each epoch
    flops: Positive | None = None  # floating-point operations of training that each method takes, in place of images
    preset: str = "small"  # recipe of trainer.py, of which the network is the same for all
    batch_size: Annotated[int, between(1, data.MAX_BATCH)] = 32  # images per step
    # network evaluations per image at which each is measured
    nfe: Annotated[tuple[int, ...], between(1, 10_000), length(1)] = (1, 3, 5, 9, 19, 49)
    default: bool = False  # rows of the papers' own samplers too: SR3 takes 2,000 evaluations, I2SB 1,000
    count: Annotated[int, between(1, 10**9)] = 400  # test images compared, at most
    metrics: Annotated[tuple[Literal[METRICS], ...], length(1)] = METRICS  # columns of the table
    device: str = "auto"  # device: auto (cuda if there is one), cuda, cuda:1 or cpu
    output: str | None = None  # folder of it all; None: runs/compare-TASK

    def check(self):
        """Raises SettingsError, one line that names field, value and what is allowed."""
        bounds.check(self)
        need = partial(bounds.require, self)
        need("only", set(self.only) <= set(self.methods), "some of the methods, " + ", ".join(self.methods))
        need("seeds", self.seeds and len(set(self.seeds)) == len(self.seeds), "one or more, each once")


@dataclass
class Job:
    """One method with one seed: what is asked of trainer.py and of evaluate.py, and where the figures are kept."""

    name: str
    method: str
    steps: int
    train: list[str]  # command
    measure: list[str]  # command
    measuring: list[str]  # those of its flags that change figures
    result: Path

    def measured(self) -> bool:
        """Whether the figures are those of the run's last step, by the same measuring, and all there."""
        try:
            result = read_result(str(self.result))
        except SettingsError:
            return False
        return result.get("measuring") == self.measuring and result["costs"]["steps"] == self.steps

    def do(self, signals: Signals) -> int:
        """Trains and measures -> exit status. A run that is trained already is left as it is by trainer.py."""
        unfinished = self.result.parent / f".{self.name}"  # evaluate.py writes its file anew after each row
        if status := call(self.train, signals) or call([*self.measure, "--output", str(unfinished)], signals):
            return status
        result = json.loads((unfinished / self.result.name).read_text()) | dict(measuring=self.measuring)
        write_atomically(self.result, lambda f: f.write(json.dumps(result, indent=1).encode()))
        shutil.rmtree(unfinished)
        return 0


def call(command: list[str], signals: Signals) -> int:
    """One of our commands in a process of its own, to which a signal is passed on -> its exit status."""
    # in a session of its own: Ctrl-C in the terminal would reach it twice
    process = subprocess.Popen([sys.executable, str(HERE / command[0]), *command[1:]], start_new_session=True,
                               preexec_fn=end_with_parent)
    passed = False
    try:
        while process.poll() is None:
            if signals.number and not passed:
                process.send_signal(signals.number)
                passed = True
            time.sleep(0.05)
    finally:  # a second Ctrl-C
        process.terminate()
    return process.returncode


def end_with_parent():
    """In a child: SIGTERM, at which a trainer saves and ends, once compare.py is gone. Linux only."""
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def plan(o: Options, more: list[str]) -> list[Job]:
    """All runs, seed by seed. Raises SettingsError where one can't be trained so, or was trained otherwise before."""
    flags = {method: training_flags(o, method, more) for method in o.methods}
    for each in flags.values():
        read_command_line(each)
    images = dict.fromkeys(o.methods, o.images)
    if o.flops:
        images = {method: math.ceil(o.flops / flops_per_image(each)) for method, each in flags.items()}
    steps = {method: math.ceil(count / o.batch_size) for method, count in images.items()}
    keep_settings(o, more, steps)
    measuring = ["--nfe", *map(str, o.nfe), "--default" if o.default else "--no-default", "--count", str(o.count),
                 "--metrics", *o.metrics]
    jobs = []
    for seed, method in product(o.seeds, o.methods):
        name = f"{method}-seed{seed}"
        train = ["trainer.py", *flags[method], "--seed", str(seed), "--max-steps", str(steps[method]), "--name", name,
                 "--out-dir", o.output]
        measure = ["evaluate.py", str(Path(o.output, name)), "--device", o.device, *measuring]
        result = Path(o.output, "results", f"{name}.json")
        jobs.append(Job(name, method, steps[method], train, measure, measuring, result))
    return jobs


def keep_settings(o: Options, more: list[str], steps: dict[str, int]):
    """Writes into compare.json what the runs of a folder have in common, and the steps of each method.

    Raises SettingsError where those before had other settings or more steps: they may only go on for longer.
    """
    file = Path(o.output, "compare.json")
    now = dict(task=o.task, dataset=o.dataset, preset=o.preset, batch_size=o.batch_size, more=more)
    had = json.loads(file.read_text()) if file.exists() else now | dict(steps={})
    other = [f"{key} = {had[key]!r}, not {value!r}" for key, value in now.items() if had[key] != value]
    other += [f"{had['steps'][method]:,} steps of {method}, not {count:,}" for method, count in steps.items()
              if had["steps"].get(method, 0) > count]
    if other:
        raise SettingsError(f"output = {o.output!r}: its runs have {'; '.join(other)}; allowed is the same, or another "
                            "--output")
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = json.dumps(now | dict(steps=had["steps"] | steps), indent=1)
    write_atomically(file, lambda f: f.write(kept.encode()))


def training_flags(o: Options, method: str, more: list[str]) -> list[str]:
    """The flags of trainer.py but for the seed and the number of steps. Raises SettingsError for one given twice."""
    named = ["--dataset", o.dataset] if o.dataset is not None else []
    ours = ["--method", method, "--task", o.task, "--preset", o.preset, "--no-overfit", "--batch-size",
            str(o.batch_size), "--data-path", o.data_path, "--device", o.device, *named]
    taken = {*ours, "--overfit", "--seed", "--max-steps", "--name", "--out-dir", "--resume", "--dataset"}
    for flag in more:
        name = flag.split("=")[0].replace("_", "-")
        if name.startswith("--") and name in taken:
            raise SettingsError(f"{flag} after --: compare.py decides on it; allowed are trainer.py's other flags")
    return [*more, *ours]


def flops_per_image(flags: list[str]) -> float:
    """Floating-point operations of training by one image, with these flags of trainer.py."""
    c, _ = read_command_line(flags)
    images = data.load(c.dataset, c.image_size, c.channels, c.data_path, c.paired_path, limit=2, crop=c.crop)
    classes = len(images.classes) if c.unet_use_classes else 0
    c = replace(c, **{c.method: c.chosen.settled()})
    z1, y, zlo = images.batch(torch.arange(2) % len(images.train), torch.device("cpu"), "train")
    batch = c.damaged(z1, y if classes else None, zlo)
    return training_flops(c.chosen.levels, make_players(c, make_unet(c, classes), classes), batch, "fp32")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a run failed, 2 bad input, 129, 130 or 143 stopped by a signal."""
    unbreakable_output()
    try:
        ours, more = split(sys.argv[1:] if arguments is None else arguments)
        o = parse(Options, ours, __doc__)
        # from nothing regression could only predict the mean
        able = tuple(m for m in METHODS if o.task != "generate" or m != "regression")
        folder = o.output or f"runs/compare-{o.task.replace(',', '-')}"
        o = replace(o, methods=able if o.methods is None else o.methods, output=folder)
        o.check()
        jobs, failed = plan(o, more), False
        (Path(folder) / "results").mkdir(exist_ok=True)
        todo = [job for job in jobs if job.method in (o.only or o.methods)]
        with Signals() as signals:
            for number, job in enumerate(todo, start=1):
                print(f"run {number} of {len(todo)}: {job.name}{' is done' if job.measured() else ''}", flush=True)
                status = 0 if job.measured() else job.do(signals)
                if signals.number:
                    break
                if status:
                    print(f"compare.py: {job.name} failed with exit status {status}", file=sys.stderr)
                    failed = True
        if results := [read_result(str(job.result)) for job in jobs if job.measured()]:
            write_report(results, Path(folder))
    except (SettingsError, OSError) as failure:
        return machine.failed("compare.py", failure, "lower --batch-size")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if signals.number:
        print(f"{signals.name}: the same command goes on", file=sys.stderr)
        return 128 + signals.number
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
