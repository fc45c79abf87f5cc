"""How fast training, sampling and the data pipeline are on this machine, beside the plain way of doing each.

    python benchmarks/speed.py                                          the preset that trainer.py takes here
    python benchmarks/speed.py --preset cifar10-sr --batch-size 16      the 34.4M network

The plain recipe: fp32 (TF32 on CUDA), NCHW, eager, PIL transforms of one image at a time in DataLoader workers,
torchdiffeq's dopri5 at 1e-5. What is compared is timed in turns, A B C A B C ..., so that a machine that slows down
slows all of them; a ratio is the median of the turns' ratios. Prints Markdown tables and writes JSON that holds every
turn. benchmarks/README.md explains the columns.
"""
import contextlib
import copy
import io
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.plain import PlainLoop, plain_sample
from benchmarks.step import compile_in_place, measure_steps, one_batch, show_steps, unet
from benchmarks.timing import Common, cells, describe, in_turns, machine, markdown, rows, save, timer
from images import SettingsError, data
from images.corruptions import Batch, task_names
from support.checkpoints import open_run
from support.command_line import parse
from support.machine import bf16_helps, reseed, set_up
from support.model import load_network, run_sampler
from trainer import Config, Trainer
from unet import Counted


@dataclass
class Options(Common):
    """What to measure. Times are wall-clock seconds."""

    batch_size: int | None = None  # images a training step; None: the preset's
    image_size: int | None = None  # side of the images, pixels; None: the preset's
    unet_channels: int | None = None  # channels of the network's first level; None: the preset's

    # step: the training step alone; loop: training with its data; data: the data pipeline alone; sample: the samplers
    parts: tuple[Literal["step", "loop", "data", "sample"], ...] = ("step", "loop", "data", "sample")
    # also start each kind of step in a process of its own: start-up and compile seconds, peak memory
    startup: bool = True
    # also compile, the repeated blocks or the whole network; auto: on a GPU
    compile: Literal["auto", "on", "off"] = "auto"
    peer: bool = False  # also the step of diffusers' UNet2DModel of the same widths (pip install diffusers)
    workers: int | None = None  # processes of the plain recipe's DataLoader; None: one a CPU core, 8 at most

    run: str | None = None  # a trained run whose network samples; None: a network of a few training steps
    sample_count: int | None = None  # images a sampling; None: 32 on a GPU, 4 on a CPU
    solver_steps: int = 10  # of midpoint and heun; euler gets twice, rk4 half as many: the same number of evaluations

    def compiles(self, device: torch.device) -> bool:
        return self.compile == "on" or self.compile == "auto" and device.type == "cuda"


def a_trainer(config: Config, folder: Path, compiled: bool) -> Trainer:
    """A trainer as `python trainer.py --no-overfit` makes it, but with few images; compiled or not."""
    with contextlib.redirect_stdout(io.StringIO()):  # overfit: draws a batch of images, not 10,000
        trainer = Trainer(replace(config, overfit=True, out_dir=str(folder), compile="on" if compiled else "off"))
    trainer.config = replace(trainer.config, overfit=False)
    return trainer


def measure_loop(o: Options, config: Config, device: torch.device, report: dict, part: str, trainer: Trainer):
    """The plain recipe's training loop, or its data alone, beside the trainer's own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = o.workers or min(8, cores)
    plain = PlainLoop(config, trainer.images.to("cpu"), device, workers)
    name = f"plain recipe, {workers} DataLoader workers"
    ours = trainer.train_step if part == "loop" else lambda: trainer.batches(trainer.step)
    work = {name: lambda n: plain.run(n, train=part == "loop"), "trainer.py": timer(ours, device)}
    report[part] = rows(in_turns(work, o.repeats, o.seconds), name, config.batch_size)


def show_loop(report: dict, part: str) -> str:
    what = dict(loop="Training with its data", data="Data alone, until a damaged batch is on the device")[part]
    title = f"{what}, batch {report['config']['batch_size']}."
    table = [[row["name"], *cells(row)] for row in report[part]]
    return markdown(title, ["", "ms a batch (min-max)", "images/s", "x plain"], table)


def trained(path: str, device: torch.device) -> tuple[Config, torch.nn.Module]:
    """A run's settings and its averaged network. Raises SettingsError."""
    run = open_run(path, Config)
    return run.config, load_network(run).to(device)


def held_out(config: Config, labels: bool, count: int, device: torch.device) -> Batch:
    """`count` test images, or as many as there are, damaged. Raises SettingsError."""
    images = data.load(config.dataset, config.image_size, config.channels, config.data_path, config.paired_path, count)
    z1, y, zlo = images.batch(torch.arange(len(images.test)), device, "test")
    return config.damaged(z1, y if labels else None, zlo)


def measure_samplers(o: Options, config: Config, device: torch.device, report: dict, trainer: Trainer | None):
    """Every solver, and the method's own sampler, from the same noise."""
    count = o.sample_count or (2 if o.quick else 32 if device.type == "cuda" else 4)
    if o.run:
        config, net = trained(o.run, device)
        batch = held_out(config, net.num_classes > 0, count, device)
        count = len(batch.zlo)
        report["sample_net"] = f"the network of {o.run}"
    else:
        net, batch = trainer.ema, one_batch(config, device, count)
        report["sample_net"] = f"a network of {trainer.step} training steps (NFE of dopri5 needs a trained one: --run)"
    bf16 = bf16_helps(device)
    evaluations, work = {}, {}

    def add(name, sample, net):
        counted = Counted(net)

        @torch.no_grad()
        def call():
            reseed("sample")
            counted.rows = 0
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16 and name != plain):
                sample(counted)
            evaluations[name] = counted.rows / count

        work[name] = timer(call, device)

    def ours(solver, steps=None):
        return lambda net: run_sampler(replace(config, solver=solver, sample_steps=steps), net, batch)

    plain = "dopri5 as it comes, NCHW (plain)"
    precision = ", bf16" if bf16 else ""
    n = o.solver_steps
    if config.chosen.has_ode:
        nchw = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
        add(plain, lambda net: plain_sample(config, net, batch), nchw)
        add("dopri5", ours("dopri5"), net)
        for solver, steps in dict(euler=2 * n, midpoint=n, heun=n, rk4=max(1, n // 2)).items():
            add(f"{solver}, {steps} steps{precision}", ours(solver, steps), net)
        if o.compiles(device):
            compile_in_place(whole := copy.deepcopy(net), "whole")
            add(f"midpoint, {n} steps{precision}, compiled", ours("midpoint", n), whole)
    if replace(config, solver="auto").sampler == "own":
        steps = config.for_pictures.sample_steps or n
        add(f"{config.method}'s own, {steps} steps{precision}", ours("auto", steps), net)
    result = rows(in_turns(work, min(o.repeats, 3), o.seconds), plain, count)
    report["sample"] = [row | dict(nfe=evaluations.get(row["name"])) for row in result]
    report["sample_count"] = count


def show_samplers(report: dict) -> str:
    title = f"Sampling {report['sample_count']} images at once, {report['sample_net']}."
    table = []
    for row in report["sample"]:
        milliseconds, images_per_second, ratio = cells(row)
        seconds = f"{1 / row['images_per_second']:.4g}" if "seconds" in row else milliseconds
        table.append([row["name"], f"{row['nfe']:.0f}" if row["nfe"] else "", seconds, images_per_second, ratio])
    return markdown(title, ["sampler", "NFE", "s an image", "images/s", "x plain"], table)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    started = time.time()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        o = parse(Options, arguments, __doc__)
        if o.quick:
            o = replace(o, repeats=2, seconds=0.01, workers=1, solver_steps=2)
        if o.peer and not find_spec("diffusers"):
            raise SettingsError("peer = True: it needs one more package: pip install diffusers")
        config, device = o.config(batch_size=o.batch_size, image_size=o.image_size, unet_channels=o.unet_channels)
        if o.run:
            found, net = trained(o.run, torch.device("cpu"))
            held_out(found, net.num_classes > 0, 1, torch.device("cpu"))
    except SettingsError as failure:
        print(f"speed.py: {failure}", file=sys.stderr)
        return 2
    set_up(device)
    torch.backends.cudnn.benchmark = True
    parameters = sum(p.numel() for p in unet(config).parameters())
    command = " ".join(["python benchmarks/speed.py", *arguments])
    report = dict(command=command, machine=machine(device), config=asdict(config), parameters=parameters)
    print(describe(report))
    side = config.image_size
    print(f"Preset {config.preset}: {parameters / 1e6:.1f}M parameters, {side}x{side} pixels.\n")

    def done(table: str):
        print(table, flush=True)
        return save(report, o.out, "speed", started)  # after each part, so that a run cut short leaves what it has

    with tempfile.TemporaryDirectory() as folder:
        if "step" in o.parts:
            measure_steps(o, config, device, report, Path(folder))
            done(show_steps(report))
        if {"loop", "data", "sample"} & set(o.parts):
            trainer = a_trainer(config, Path(folder), o.compiles(device))
            for part in ("loop", "data"):
                if part in o.parts and task_names(config.task) == ["sr"]:  # the plain recipe is for that task
                    measure_loop(o, config, device, report, part, trainer)
                    done(show_loop(report, part))
            if "sample" in o.parts:
                measure_samplers(o, config, device, report, trainer)
                done(show_samplers(report))
    print(f"written to {save(report, o.out, 'speed', started)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
