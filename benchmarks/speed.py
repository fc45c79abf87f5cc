"""How fast training, sampling and the data pipeline are on this machine, beside the plain way of doing each.

    python benchmarks/speed.py                                          the preset that trainer.py takes here
    python benchmarks/speed.py --preset cifar10-sr --batch-size 16      the 34.4M network

Prints Markdown tables and writes JSON that holds every turn. benchmarks/README.md explains the columns.
"""
import contextlib
import copy
import io
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import Common, cells, command, failed, in_turns, markdown, rows, synchronize, timer
from benchmarks.plain import PlainLoop, plain_sample
from benchmarks.step import flops_per_image, full_precision_name, make_step, matmul, one_batch, unet, variants
from images import data
from images.corruptions import Batch, task_names
from support.bounds import Count
from support.checkpoints import open_run
from support.machine import bf16_helps, reseed, set_up
from support.model import for_pictures, load_network, run_sampler
from trainer import Config, Trainer
from unet import Counted


@dataclass
class Options(Common):
    """What to measure. Times are wall-clock seconds."""

    batch_size: Count | None = None  # images per training step; None: the preset's
    image_size: Count | None = None  # side of the images, pixels; None: the preset's
    unet_channels: Count | None = None  # channels of the network's first level; None: the preset's
    # step: the training step alone; loop: training with its data; data: the data pipeline alone; sample: the samplers
    parts: tuple[Literal["step", "loop", "data", "sample"], ...] = ("step", "loop", "data", "sample")
    # rows of the compiled network too; auto: on a GPU
    compile: Literal["auto", "on", "off"] = "auto"
    workers: Count | None = None  # processes of the plain recipe's DataLoader; None: one per CPU core, 8 at most
    run: str | None = None  # trained run whose network samples; None: a network of a few training steps
    sample_count: Count = 4  # images per sampling; a GPU takes 32 and more
    solver_steps: Count = 10  # steps of midpoint and heun; euler gets twice, rk4 half as many: as many evaluations

    def check(self):
        super().check()
        if self.quick:
            self.workers, self.solver_steps, self.sample_count = 1, 2, 2


def measure(o: Options, report: dict):
    config, device = o.config(batch_size=o.batch_size, image_size=o.image_size, unet_channels=o.unet_channels)
    set_up(device)
    torch.backends.cudnn.benchmark = True
    compiled = o.compile == "on" or o.compile == "auto" and device.type == "cuda"
    report |= dict(config=asdict(config), parameters=sum(p.numel() for p in unet(config).parameters()))
    trained = trained_and_batch(o, config, device) if o.run else None
    print(f"Preset {config.preset}: {report['parameters'] / 1e6:.1f}M parameters, {config.image_size}x"
          f"{config.image_size} pixels.\n")
    with tempfile.TemporaryDirectory(dir=".") as folder:  # the disk that runs are written to
        if "step" in o.parts:
            measure_steps(o, config, device, compiled, report)
        if {"loop", "data", "sample"} & set(o.parts):
            with contextlib.redirect_stdout(io.StringIO()):  # overfit: draws a batch of images, not 10,000
                trainer = Trainer(replace(config, overfit=True, out_dir=folder, compile="on" if compiled else "off"))
            trainer.config = trainer.batches.config = replace(trainer.config, overfit=False)
            if task_names(config.task) == ["sr"]:  # the plain recipe is for that task
                for part in ("loop", "data"):
                    if part in o.parts:
                        measure_loop(o, config, device, report, part, trainer)
            if "sample" in o.parts:
                measure_samplers(o, config, device, compiled, report, trainer, trained)


def measure_steps(o: Options, config: Config, device: torch.device, compiled: bool, report: dict):
    """Training steps of each variant, and the matrix products that say what the device can do, in turns."""
    todo, batch = {v.name: v for v in variants(device, compiled)}, one_batch(config, device)
    side = 128 if o.quick else 8192 if device.type == "cuda" else 2048
    fp32 = full_precision_name(device)
    kinds = ["bf16"] * bf16_helps(device) + [fp32]
    work, broken = {kind: timer(matmul(device, kind, side)) for kind in kinds}, {}
    first = {}  # seconds until the first step is done: with it come compiling and the choice of algorithms
    for name, variant in todo.items():
        try:
            start = time.perf_counter()
            step = make_step(config, variant, batch)
            step()
            synchronize(device)
            work[name], first[name] = timer(step), time.perf_counter() - start
        except Exception as failure:
            broken[name] = failed(failure)
    times = in_turns(work, o.repeats, o.seconds) | broken
    flops = flops_per_image(config, device)
    rates = {kind: 2 * side**3 / statistics.median(times[kind]) for kind in kinds}
    report |= dict(flops_per_image=flops, matmul_flops_per_second=rates)
    report["step"] = rows({name: times[name] for name in todo}, next(iter(todo)), config.batch_size)
    table = []
    for row in report["step"]:
        variant, share = todo[row["name"]], ""
        if "seconds" in row:
            row["share"] = flops * row["images_per_second"] / rates["bf16" if variant.bf16 else fp32]
            share = f"{row['share']:.1%}"
        row["first_step"] = first.get(row["name"])
        seconds = "" if row["first_step"] is None else f"{row['first_step']:.1f}"
        table.append([row["name"], *cells(row), share, seconds])
    title = (f"Training step, batch {config.batch_size}, {flops / 1e9:.3g} GFLOP per image forward and "
             f"backward. Matrix products, TFLOP/s: {', '.join(f'{k} {r / 1e12:.3g}' for k, r in rates.items())}.")
    head = ["forward + backward + step", "ms (min-max)", "images/s", "x plain", "share of matmul", "first step, s"]
    print(markdown(title, head, table), flush=True)


def measure_loop(o: Options, config: Config, device: torch.device, report: dict, part: str, trainer: Trainer):
    """The plain recipe's training loop, or its data alone, beside the trainer's own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = o.workers or min(8, cores)
    plain, name = PlainLoop(config, trainer.images.to("cpu"), device, workers), f"plain recipe, {workers} workers"
    theirs, ours = plain.batch, lambda: trainer.batches(trainer.step)
    if part == "loop":
        theirs, ours = plain.step, trainer.train_step
    work = {name: timer(theirs, plain.use_up), "trainer.py": timer(ours)}
    report[part] = rows(in_turns(work, o.repeats, o.seconds), name, config.batch_size)
    what = dict(loop="Training with its data", data="Data alone, until a damaged batch is on the device")[part]
    table = [[row["name"], *cells(row)] for row in report[part]]
    print(markdown(f"{what}, batch {config.batch_size}.", ["", "ms per batch (min-max)", "images/s", "x plain"], table),
          flush=True)


def trained_and_batch(o: Options, config: Config, device: torch.device) -> tuple[Config, torch.nn.Module, Batch]:
    """The settings and averaged network of --run, and held-out images of its data, damaged. Raises SettingsError."""
    run = open_run(o.run, Config)
    c, net, count = run.config, load_network(run).to(device), o.sample_count
    images = data.load(c.dataset, c.image_size, c.channels, c.data_path, c.paired_path, count)
    z1, y, zlo = images.batch(torch.arange(len(images.test)), device, "test")
    return c, net, c.damaged(z1, y if net.num_classes else None, zlo)


def measure_samplers(o: Options, config: Config, device: torch.device, compiled: bool, report: dict, trainer: Trainer,
                     trained: tuple | None):
    """Every solver, and the method's own sampler, from the same noise."""
    batch, net, what = one_batch(config, device, o.sample_count), trainer.ema, "hardly trained"
    if trained:
        (config, net, batch), what = trained, f"the network of {o.run}"
    count, bf16, n = len(batch.zlo), bf16_helps(device), o.solver_steps
    evaluations, work = {}, {}

    def add(name, sample, net, precise=False):
        counted = Counted(net)

        @torch.no_grad()
        def call():
            reseed("sample")
            counted.rows = 0
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16 and not precise):
                sample(counted)
            evaluations[name] = counted.rows / count

        work[name] = timer(call)

    def ours(solver, steps=None):
        return lambda net: run_sampler(replace(config, solver=solver, sample_steps=steps), net, batch)

    plain, precision = "dopri5 as it comes, NCHW (plain)", ", bf16" if bf16 else ""
    if config.chosen.has_ode:
        nchw = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
        add(plain, lambda net: plain_sample(config, net, batch), nchw, precise=True)
        add("dopri5", ours("dopri5"), net)
        for solver, steps in dict(euler=2 * n, midpoint=n, heun=n, rk4=max(1, n // 2)).items():
            add(f"{solver}, {steps} steps{precision}", ours(solver, steps), net)
        if compiled:
            (whole := copy.deepcopy(net)).compile(dynamic=False)
            add(f"midpoint, {n} steps{precision}, compiled", ours("midpoint", n), whole)
    if replace(config, solver="auto").sampler == "own":
        steps = for_pictures(config).sample_steps or n
        add(f"{config.method}'s own, {steps} steps{precision}", ours("auto", steps), net)
    report["sample"] = [row | dict(nfe=evaluations.get(row["name"]))
                        for row in rows(in_turns(work, min(o.repeats, 3), o.seconds), plain, count)]
    table = []
    for row in report["sample"]:
        seconds, images_per_second, ratio = cells(row)
        if "seconds" in row:
            seconds = f"{1 / row['images_per_second']:.4g}"
        table.append([row["name"], f"{row['nfe']:.0f}" if row["nfe"] else "", seconds, images_per_second, ratio])
    head = ["sampler", "NFE", "s per image", "images/s", "x plain"]
    print(markdown(f"Sampling {count} images at once, {what}.", head, table), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    return command("speed", Options, measure, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
