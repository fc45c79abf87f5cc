"""Several methods from nothing to a table and a plot: trains each alike, measures each, and reports.

    python compare.py                                    all methods, super-resolution: about an hour on two cores
    python compare.py --task jpeg --methods i2sb edm --seeds 0 1 --images 100000 --output runs/compare-jpeg
    CUDA_VISIBLE_DEVICES=1 python compare.py --only edm  this method alone, for one GPU each
    python compare.py -- --damage.factor 4               what follows -- goes to trainer.py, for every run

Into --output go a run METHOD-seedS each, results/METHOD-seedS.json, what the commands said in logs/, table.md,
quality.png and .pdf, quality-seconds.png and .pdf. Ctrl-C saves; the same command again goes on and skips what is done.
"""
if __name__ == "__main__":
    from support.output import quiet_interrupt
    quiet_interrupt()

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from support.settings import INCIDENTAL
from trainer import Config, read_command_line

HERE = Path(__file__).resolve().parent
METHODS = get_args(get_type_hints(Config)["method"])
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # opened here: a forked child should do next to nothing


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


class Job:
    """One method with one seed. Raises SettingsError where its settings can't be used, or its run began with others."""

    def __init__(self, o: Options, method: str, seed: int, images: int, more: list[str]):
        self.name, self.method, folder = f"{method}-seed{seed}", method, Path(o.output)
        self.run, self.result = folder / self.name, folder / "results" / f"{self.name}.json"
        self.unfinished = self.result.parent / f".{self.name}"  # where evaluate.py writes
        self.log, self.errors, self.begun = (folder / "logs" / f"{self.name}{end}"
                                             for end in (".txt", "-errors.txt", ".json"))
        steps = math.ceil(images / o.batch_size)
        flags = [*training_flags(o, method, more), "--seed", str(seed), "--max-steps", str(steps)]
        self.measuring = ["--nfe", *map(str, o.nfe), "--default" if o.default else "--no-default", "--count",
                          str(o.count), "--metrics", *o.metrics]
        self.train = ["trainer.py", *flags, "--name", self.name, "--out-dir", o.output]
        self.measure = ["evaluate.py", str(self.run), *self.measuring, "--device", o.device, "--output",
                        str(self.unfinished)]
        self.steps, self.batch_size = steps, o.batch_size
        self.measuring_cost = o.count * sum(o.nfe) / 3  # in training images, of which a forward pass is a third
        self.settings = json.loads(json.dumps(asdict(read_command_line(flags)[0])))  # as they are read again
        had = json.loads(self.begun.read_text()) if self.begun.exists() else self.settings
        other = [f"{key} {had[key]!r}, not {value!r}" for key, value in self.settings.items()
                 if key not in INCIDENTAL and had.get(key, value) != value]
        if had["max_steps"] > steps:  # more steps it may go on for
            other.append(f"{had['max_steps']:,} steps, not {steps:,}")
        if other:
            raise SettingsError(f"run = {str(self.run)!r}: it has {'; '.join(other)}; allowed is the same, or another "
                                "--output")

    def measured(self) -> bool:
        """Whether the figures are those of the run's last step, by the same measuring, and all there."""
        try:
            result = read_result(str(self.result))
        except SettingsError:
            return False
        return result.get("measuring") == self.measuring and result["costs"]["steps"] == self.steps

    def keep_result(self):
        """The JSON file takes its place, once it is whole, with what was asked of it."""
        result = json.loads((self.unfinished / self.result.name).read_text()) | dict(measuring=self.measuring)
        write_atomically(self.result, lambda f: f.write(json.dumps(result, indent=1).encode()))
        shutil.rmtree(self.unfinished)

    def step(self) -> int:
        """How far its training is, as metrics.jsonl has it."""
        with suppress(OSError, ValueError, KeyError, IndexError, TypeError):  # not there yet, or a line half written
            return json.loads((self.run / "metrics.jsonl").read_text(errors="replace").splitlines()[-1])["step"]
        return 0


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


def flops_per_image(o: Options, method: str, more: list[str]) -> float:
    """Floating-point operations of training by one image."""
    c, _ = read_command_line(training_flags(o, method, more))
    images = data.load(c.dataset, c.image_size, c.channels, c.data_path, c.paired_path, limit=2, crop=c.crop)
    classes = len(images.classes) if c.unet_use_classes else 0
    c = replace(c, **{method: c.chosen.settled()})
    z1, y, zlo = images.batch(torch.arange(2) % len(images.train), torch.device("cpu"), "train")
    batch = c.damaged(z1, y if classes else None, zlo)
    return training_flops(c.chosen.levels, make_players(c, make_unet(c, classes), classes), batch, "fp32")


class Work:
    """Trains and measures the jobs that are not measured yet, one after the other, until a signal comes."""

    def __init__(self, jobs: list[Job], signals: Signals):
        self.jobs, self.signals = jobs, signals
        self.began, self.whole = time.monotonic(), self.left()

    def left(self) -> float:
        """What is still to be done, in training images."""
        return sum(max(job.steps - job.step(), 0) * job.batch_size + job.measuring_cost
                   for job in self.jobs if not job.measured())

    def time_left(self) -> str:
        """By how fast the work went since it began."""
        left = self.left()
        if left == self.whole:
            return "time left not known yet"
        return f"about {left / (self.whole - left) * (time.monotonic() - self.began) / 60:.0f} min left"

    def do(self) -> list[str]:
        """-> the names of the jobs that failed."""
        failed = []
        for job in self.jobs:
            if not job.measured():
                job.log.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(job.begun, lambda f: f.write(json.dumps(job.settings, indent=1).encode()))
                # a run that is trained already is left as it is by its trainer
                status = call(job.train, job, self) or call(job.measure, job, self)
                if self.signals.number:
                    break
                if status:
                    last = (job.errors.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
                    print(f"compare.py: {job.name} failed with exit status {status}: {last} (all of it: {job.errors})",
                          file=sys.stderr)
                    failed.append(job.name)
                    continue
                job.keep_result()
            print(f"{job.name} is done: {self.time_left()}", flush=True)
        return failed


def call(command: list[str], job: Job, work: Work) -> int:
    """A command of ours in a process of its own, to which a signal is passed on -> its exit status."""
    told, passed = 0, False
    job.errors.unlink(missing_ok=True)
    with open(job.log, "ab") as log, open(job.errors, "wb") as errors:
        # in a session of its own: Ctrl-C in the terminal would reach it twice
        process = subprocess.Popen([sys.executable, str(HERE / command[0]), *command[1:]], stdout=log, stderr=errors,
                                   start_new_session=True, preexec_fn=end_with_parent)
        while (status := process.poll()) is None:
            if work.signals.number and not passed:
                process.send_signal(work.signals.number)
                passed = True
            if time.monotonic() - told > 30:
                told = time.monotonic()
                what = f"step {job.step():,} of {job.steps:,}" if command is job.train else "being measured"
                print(f"{job.name}: {what}; run {work.jobs.index(job) + 1} of {len(work.jobs)}, {work.time_left()}",
                      flush=True)
            time.sleep(0.05)
    return status


def end_with_parent():
    """In a child: SIGTERM, at which a trainer saves and ends, once compare.py is gone. Linux only."""
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


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
        images = dict.fromkeys(o.methods, o.images)
        if o.flops:
            images = {m: math.ceil(o.flops / flops_per_image(o, m, more)) for m in o.methods}
        jobs = [Job(o, m, seed, images[m], more) for seed in o.seeds for m in o.methods]
        os.makedirs(Path(folder) / "results", exist_ok=True)
        with Signals() as signals:
            failed = Work([job for job in jobs if job.method in (o.only or o.methods)], signals).do()
        if results := [read_result(str(job.result)) for job in jobs if job.measured()]:
            write_report(results, Path(folder))
    except (SettingsError, OSError) as failure:
        return machine.failed("compare.py", failure, "lower --batch-size")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if signals.number:
        print(f"{signal.Signals(signals.number).name}: the same command goes on", file=sys.stderr)
        return 128 + signals.number
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
