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

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import torch

from evaluate import read_result, training_flops
from evaluation.judge import METRICS
from evaluation.report import write_report
from images import SettingsError, data
from support.checkpoints import absolute_paths, open_run
from support.command_line import parse, split
from support.disk import write_atomically
from support.machine import Signals
from support.model import make_players, make_unet
from support.output import unbreakable_output
from support.run_folder import has_checkpoint
from support.settings import INCIDENTAL, require
from trainer import Config, read_command_line

HERE = Path(__file__).resolve().parent
METHODS = get_args(get_type_hints(Config)["method"])


@dataclass
class Options:
    """What is compared, and how long each method trains."""

    methods: tuple[str, ...] | None = None  # None: all, of the task generate all but regression
    only: tuple[str, ...] = ()  # train and measure only these now; the table has all runs that are there
    seeds: tuple[int, ...] = (0,)  # a run each; the table has mean and spread
    task: str = "sr"  # as trainer.py's
    dataset: str | None = None  # as trainer.py's; None: cifar10
    data_path: str = "data"  # folder where downloaded data sets are kept
    images: int = 38_400  # training images that each method sees, counted again in each epoch
    flops: float | None = None  # in place of images: floating-point operations of training that each method takes
    preset: str = "small"  # trainer.py's recipe, of which the network is the same for all
    batch_size: int = 32  # images a step
    nfe: tuple[int, ...] = (1, 3, 5, 9, 19, 49)  # network evaluations an image at which each is measured
    default: bool = False  # also the papers' own samplers: SR3 takes 2,000 evaluations, I2SB 1,000
    count: int = 400  # test images compared, at most
    metrics: tuple[str, ...] = METRICS  # the columns
    device: str = "auto"  # auto: cuda if there is one; or cuda, cuda:1, cpu
    output: str | None = None  # folder of it all; None: runs/compare-TASK

    def check(self):
        """Raises SettingsError, one line that names field, value and what is allowed."""
        need = partial(require, self)
        need("methods", self.methods and set(self.methods) <= set(METHODS), ", ".join(METHODS))
        need("only", set(self.only) <= set(self.methods), "some of the methods, " + ", ".join(self.methods))
        need("seeds", self.seeds and len(set(self.seeds)) == len(self.seeds), "one or more, each once")
        need("images", self.images >= 1, "1 or more")
        need("flops", self.flops is None or 0 < self.flops < math.inf, "a number above 0")
        need("batch_size", 1 <= self.batch_size <= data.MAX_BATCH, f"1 to {data.MAX_BATCH:,}")
        need("count", self.count >= 1, "1 or more")
        need("metrics", self.metrics and set(self.metrics) <= set(METRICS), ", ".join(METRICS))
        need("nfe", self.nfe and min(self.nfe) >= 1, "one or more numbers from 1")


class Run:
    """One method with one seed. Raises SettingsError where its settings, or those of the run there, can't be used."""

    def __init__(self, o: Options, method: str, seed: int, images: int, more: list[str]):
        self.name, self.method = f"{method}-seed{seed}", method
        self.folder, self.result = Path(o.output) / self.name, Path(o.output) / "results" / f"{self.name}.json"
        self.steps, self.batch_size, self.log = math.ceil(images / o.batch_size), o.batch_size, Path(o.output) / "logs"
        self.flags = [*training_flags(o, method, more), "--seed", str(seed), "--max-steps", str(self.steps)]
        self.measuring = ["--nfe", *map(str, o.nfe), "--default" if o.default else "--no-default", "--count",
                          str(o.count), "--metrics", *o.metrics]
        self.device, self.cost = o.device, o.count * sum(o.nfe) / 3  # a forward pass is a third of a training image
        self.refuse_others(read_command_line(self.flags)[0])

    def refuse_others(self, asked: Config):
        """Raises SettingsError where the run there is another than the one asked for; more steps it may go on for."""
        if not has_checkpoint(self.folder):
            return
        there = open_run(self.folder, Config)
        had = there.config
        asked = replace(asked, dataset=asked.dataset or had.dataset, **{asked.method: asked.chosen.settled()})
        had, asked = ({k: v for k, v in asdict(replace(c, **absolute_paths(c))).items() if k not in INCIDENTAL}
                      for c in (had, asked))
        other = [f"{k} {had[k]!r}, not {asked[k]!r}" for k in asked if had[k] != asked[k]]
        if there.step > self.steps:
            other.append(f"{there.step:,} steps, not {self.steps:,}")
        if other:
            raise SettingsError(f"run = {str(self.folder)!r}: it has {'; '.join(other)}; allowed is the same, or "
                                "another --output")

    def trained(self) -> bool:
        if not has_checkpoint(self.folder):
            return False
        run = open_run(self.folder, Config)
        sampled = run.checkpoint.get("sampled", run.step)
        return run.step >= self.steps and not run.config.pictures_due(run.step, sampled)

    def measured(self) -> bool:
        """Whether the figures are those of the run's last step, by the same measuring, and all there."""
        try:
            result = read_result(str(self.result))
        except SettingsError:
            return False
        return result.get("measuring") == self.measuring and result["costs"]["steps"] == self.steps

    def train(self) -> list[str]:
        return [str(HERE / "trainer.py"), *self.flags, "--name", self.name, "--out-dir", str(self.folder.parent)]

    def measure(self) -> list[str]:
        return [str(HERE / "evaluate.py"), str(self.folder), *self.measuring, "--device", self.device, "--output",
                str(self.unfinished)]

    @property
    def unfinished(self) -> Path:
        return self.result.parent / f".{self.name}"

    def keep_result(self):
        """The JSON file takes its place, once it is whole, with what was asked of it."""
        result = json.loads((self.unfinished / self.result.name).read_text()) | dict(measuring=self.measuring)
        write_atomically(self.result, lambda f: f.write(json.dumps(result, indent=1).encode()))
        shutil.rmtree(self.unfinished)

    def progress(self) -> tuple[int, float | None]:
        """(steps done, training images a second in the median), as far as metrics.jsonl has them."""
        step, speeds = 0, []
        try:
            for line in (self.folder / "metrics.jsonl").read_text(errors="replace").splitlines():
                record = json.loads(line)
                step, speeds = max(step, record["step"]), speeds + [record.get("images_per_second")]
        except (OSError, ValueError, KeyError, TypeError):  # not there yet, or a line half written
            pass
        speeds = sorted(speed for speed in speeds if speed)
        return step, speeds[len(speeds) // 2] if speeds else None


def training_flags(o: Options, method: str, more: list[str]) -> list[str]:
    """The flags of trainer.py but for the seed and the number of steps. Raises SettingsError for one given twice."""
    named = ["--dataset", o.dataset] if o.dataset is not None else []
    ours = ["--method", method, "--task", o.task, "--preset", o.preset, "--no-overfit", "--batch-size",
            str(o.batch_size), "--data-path", o.data_path, "--device", o.device, *named]
    taken = {*ours, "--overfit", "--seed", "--max-steps", "--name", "--out-dir", "--resume", "--dataset"}
    for flag in more:
        if (name := flag.split("=")[0].replace("_", "-")) in taken and name.startswith("--"):
            raise SettingsError(f"{flag} after --: compare.py decides on it; allowed are trainer.py's other flags")
    return [*more, *ours]


def flops_an_image(o: Options, method: str, more: list[str]) -> float:
    """Floating-point operations of training by one image."""
    c, _ = read_command_line(training_flags(o, method, more))
    images = data.load(c.dataset, c.image_size, c.channels, c.data_path, c.paired_path, limit=2, crop=c.crop)
    classes = len(images.classes) if c.unet_use_classes else 0
    c = replace(c, **{method: c.chosen.settled()})
    z1, y, zlo = images.batch(torch.arange(2) % len(images.train), torch.device("cpu"), "train")
    batch = c.damaged(z1, y if classes else None, zlo)
    return training_flops(c.chosen.levels, make_players(c, make_unet(c, classes), classes), batch, "fp32")


def time_left(runs: list[Run]) -> str:
    """Until all runs are trained and measured; those not begun are taken to be as fast as the others of their method,
    or as all others."""
    speeds, images = {}, []
    for run in runs:
        step, speed = run.progress()
        images.append((run.steps - min(step, run.steps)) * run.batch_size + (0 if run.result.exists() else run.cost))
        if speed:
            speeds.setdefault(run.method, []).append(speed)
    known = [speed for found in speeds.values() for speed in found]
    if not known:
        return "time left not known yet"
    seconds = sum(n / (sum(s) / len(s)) for n, run in zip(images, runs) for s in [speeds.get(run.method, known)])
    return f"about {seconds / 60:.0f} min left"


def call(command: list[str], run: Run, runs: list[Run], signals: Signals) -> int:
    """A command in a process of its own, to which a signal is passed on -> its exit status, or 128 + the signal."""
    run.log.mkdir(parents=True, exist_ok=True)
    told = passed = 0
    with open(run.log / f"{run.name}.txt", "ab") as log:
        # in a session of its own: Ctrl-C in the terminal would reach it twice
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, start_new_session=True)
        while (status := process.poll()) is None:
            if signals.number and not passed:
                passed = signals.number
                process.send_signal(passed)
            if time.monotonic() - told > 30:
                told, (step, speed) = time.monotonic(), run.progress()
                what = f"step {step:,} of {run.steps:,}" if command[0].endswith("trainer.py") else "being measured"
                print(f"{run.name}: {what}{f', {speed:.3g} images/s' if speed else ''}; run {runs.index(run) + 1} of "
                      f"{len(runs)}, {time_left(runs)}", flush=True)
            time.sleep(0.05)
    return 128 + passed if passed else status


def work(runs: list[Run], signals: Signals) -> list[str]:
    """Trains and measures what is not done -> the names of the runs that failed. Stops at a signal."""
    failed = []
    for run in runs:
        for done, command, after in ((run.trained, run.train, None), (run.measured, run.measure, run.keep_result)):
            if signals.number:
                return failed
            if done():
                continue
            status = call(command(), run, runs, signals)
            if signals.number:
                return failed
            if status:
                log = run.log / f"{run.name}.txt"
                lines = log.read_text(errors="replace").strip().splitlines()
                print(f"compare.py: {run.name} failed with exit status {status}: {lines[-1] if lines else ''} (all of "
                      f"it: {log})", file=sys.stderr)
                failed.append(run.name)
                break
            if after:
                after()
        else:
            print(f"{run.name} is done: {time_left(runs)}", flush=True)
    return failed


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
        images = {m: math.ceil(o.flops / flops_an_image(o, m, more)) if o.flops else o.images for m in o.methods}
        runs = [Run(o, m, seed, images[m], more) for seed in o.seeds for m in o.methods]
        os.makedirs(Path(folder) / "results", exist_ok=True)
        with Signals() as signals:
            failed = work([run for run in runs if run.method in (o.only or o.methods)], signals)
        if results := [read_result(str(run.result)) for run in runs if run.measured()]:
            write_report(results, Path(folder))
    except SettingsError as failure:
        print(f"compare.py: {failure}", file=sys.stderr)
        return 2
    except OSError as failure:
        print(f"compare.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if signals.number:
        print(f"{signal.Signals(signals.number).name}: the same command goes on", file=sys.stderr)
        return 128 + signals.number
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
