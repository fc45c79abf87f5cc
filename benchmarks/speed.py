"""How fast training, sampling and the data pipeline are on this machine, beside the plain way of doing each, in one run.

    python benchmarks/speed.py                                          the preset that trainer.py takes here
    python benchmarks/speed.py --preset cifar10-sr --batch-size 16      the 34.4M network
    python benchmarks/speed.py --grow                                   images/s and memory against batch, side and width

The plain recipe: fp32 (TF32 on CUDA), NCHW, eager, PIL transforms of one image at a time in DataLoader workers, torchdiffeq's
dopri5 at 1e-5. What is compared is timed in turns, A B C A B C ..., so that a machine that slows down slows all of them; a ratio
is the median of the turns' ratios. Prints Markdown tables and writes JSON that holds every turn. benchmarks/README.md explains
the columns.
"""
import contextlib
import copy
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torchdiffeq
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor

import data
import ode_int
from corruptions import Batch, parts
from logs import one_line
from settings import PRESETS, parse
from trainer import Config, Trainer, bf16_helps, draw, make_unet, open_checkpoint, pick_device, reseed


@dataclass
class Options:
    """What to measure. Times are wall-clock seconds."""

    preset: str = "auto"  # method, network and batch of this preset of trainer.py; auto: cifar10-sr on a GPU, small on a CPU
    batch_size: int | None = None  # images a training step; None: the preset's
    image_size: int | None = None  # side of the images, pixels; None: the preset's
    unet_channels: int | None = None  # channels of the network's first level; None: the preset's
    device: str = "auto"  # auto: cuda if there is one; or cuda, cuda:1, cpu

    # step: the training step alone; loop: training with its data; data: the data pipeline alone; sample: the samplers
    parts: tuple[Literal["step", "loop", "data", "sample"], ...] = ("step", "loop", "data", "sample")
    startup: bool = True  # also start each kind of step in a process of its own: start-up and compile seconds, peak memory
    compile: Literal["auto", "on", "off"] = "auto"  # also compile, the repeated blocks or the whole network; auto: on a GPU
    workers: int | None = None  # processes of the plain recipe's DataLoader; None: one a CPU core, 8 at most

    run: str | None = None  # a trained run whose network samples; None: a network of a few training steps
    sample_count: int | None = None  # images a sampling; None: 32 on a GPU, 4 on a CPU
    solver_steps: int = 10  # of midpoint and heun; euler gets twice, rk4 half as many: the same number of evaluations

    grow: bool = False  # measure instead how the following change images/s and memory, one at a time
    batch_sizes: tuple[int, ...] | None = None  # None: a quarter of the preset's to four times it
    image_sizes: tuple[int, ...] = (32, 64, 128)  # sides, pixels
    widths: tuple[int, ...] | None = None  # channels of the network's first level; None: half the preset's to twice it

    repeats: int = 5  # turns that each time is the median of (samplers: 3 at most)
    seconds: float = 1.0  # that a turn takes at least
    out: str | None = None  # the JSON file; None: runs/speed-DATE.json
    quick: bool = False  # a tiny network and short turns: shows that the script works, measures nothing

    def check(self):
        """Raises ValueError, one line that names field, value and what is allowed."""
        single = ("batch_size", "image_size", "unet_channels", "workers", "sample_count", "solver_steps", "repeats")
        several = [(name, number) for name in ("batch_sizes", "image_sizes", "widths") for number in getattr(self, name) or ()]
        for name, number in several + [(name, getattr(self, name)) for name in single]:
            if number is not None and number < 1:
                raise ValueError(f"{name} = {number}: allowed is 1 or more")
        if not self.seconds > 0:
            raise ValueError(f"seconds = {self.seconds}: allowed is a number above 0")
        if self.preset != "auto" and self.preset not in PRESETS:
            raise ValueError(f"preset = {self.preset!r}: allowed are auto, {', '.join(PRESETS)}")


def settings(o: Options) -> tuple[Config, torch.device]:
    """The training run that is measured, on drawn pictures: no speed depends on what is in them. Raises ValueError."""
    o.check()
    Config(device=o.device).check()
    device = pick_device(Config(device=o.device))
    name = o.preset if o.preset != "auto" else "small" if device.type == "cpu" else "cifar10-sr"
    config = replace(Config(**PRESETS[name]), preset=name, dataset="shapes", paired_path=None, use_wandb=False, device=o.device)
    if hasattr(config.recipe, "players") or "paired" in parts(config.task):
        raise ValueError(f"preset = {name!r}: allowed are those of one network and of tasks that make their damaged images")
    if o.quick:
        config = replace(config, unet_channels=8, unet_dim_mults=(1, 2), image_size=16, batch_size=2)
    given = {field: getattr(o, field) for field in ("batch_size", "image_size", "unet_channels") if getattr(o, field)}
    config = replace(config, **given)
    config.check()
    return config, device


# -------------------------------------------------------------------------------------------------------------- timing

def timer(call: Callable[[], object], device: torch.device) -> Callable[[int], float]:
    """n -> the seconds that n calls take, until the device has done them."""
    def turn(n: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            call()
        synchronize(device)
        return time.perf_counter() - start
    return turn


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(work: dict[str, Callable[[int], float]], repeats: int, seconds: float) -> dict[str, list[float] | str]:
    """{name: n -> seconds of n calls} -> {name: seconds a call, one number a turn}, in the order A B C A B C ...

    A turn makes as many calls as fill `seconds`. What fails, out of memory say, drops out, and its result is the error.
    """
    count, times = {}, {name: [] for name in work}
    for turn in range(-1, repeats):  # turn -1 warms up, and tells how many calls a turn needs
        for name, run in work.items():
            if not isinstance(times[name], list):
                continue
            say(f"turn {turn + 1} of {repeats}: {name}" if turn >= 0 else f"warm-up: {name}")
            try:
                if turn >= 0:
                    times[name].append(run(count[name]) / count[name])
                    continue
                once = run(1)
                if once < seconds:  # else the call is so long that what the first one sets up hardly counts
                    once = run(1)
                count[name] = max(1, round(seconds / max(once, 1e-9)))
            except Exception as failure:
                times[name] = failed(failure)
    say("")
    return times


def say(what: str):
    """What is being done, on the terminal's last line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def failed(failure: Exception) -> str:
    if isinstance(failure, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    return f"{type(failure).__name__}: {one_line(failure)[:150]}"


def rows(times: dict[str, list[float] | str], plain: str | None, images: int) -> list[dict]:
    """A row for each name: median seconds a call of `images` images, images/s, and how many times as fast as `plain` it is."""
    result = []
    for name, turns in times.items():
        row = dict(name=name)
        if isinstance(turns, str):
            row |= dict(error=turns)
        else:
            seconds = statistics.median(turns)
            row |= dict(turns=turns, seconds=seconds, images_per_second=images / seconds)
            if isinstance(times.get(plain), list):
                row |= dict(ratio=statistics.median(p / s for p, s in zip(times[plain], turns)))
        result.append(row)
    return result


# ------------------------------------------------------------------------------------------------------- training step

@dataclass(frozen=True)
class Variant:
    """A way to run the same network."""

    name: str
    bf16: bool = True
    channels_last: bool = True
    compile: Literal["", "blocks", "whole"] = ""
    graph: bool = False  # the whole step replayed as one CUDA graph


def variants(o: Options, device: torch.device) -> list[Variant]:
    """The plain one first, then what changes, one at a time."""
    fp32 = full_precision_name(device)
    result = [Variant(f"{fp32}, NCHW (plain)", bf16=False, channels_last=False), Variant(f"{fp32}, channels_last", bf16=False)]
    if bf16_helps(device):
        result += [Variant("bf16, NCHW", channels_last=False), Variant("bf16, channels_last")]
    last = result[-1]
    if compiles(o, device):
        result += [replace(last, name=f"{last.name}, {what} compiled", compile=what) for what in ("blocks", "whole")]
    if device.type == "cuda":
        result += [replace(v, name=f"{v.name}, CUDA graph", graph=True) for v in result if v == last or v.compile]
    return result


def eager(variants: list[Variant]) -> Variant:
    """Ours, without what needs time to set up."""
    return [v for v in variants if not v.compile and not v.graph][-1]


def compiles(o: Options, device: torch.device) -> bool:
    return o.compile == "on" or o.compile == "auto" and device.type == "cuda"


def full_precision_name(device: torch.device) -> str:
    return "TF32" if device.type == "cuda" else "fp32"


def set_up(device: torch.device):
    """The same for all that is compared."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def unet(config: Config) -> torch.nn.Module:
    return make_unet(config, len(data.SHAPES) if config.unet_use_classes else 0)


def one_batch(config: Config, device: torch.device, count: int | None = None) -> Batch:
    """`count` images, or as many as the config has in a batch; no more than 64 of them differ."""
    images = data.load("shapes", config.image_size, config.channels, limit=64)
    z1, y, _ = images.batch(torch.arange(count or config.batch_size) % len(images.train), device)
    return config.damage(config.task, z1, y if config.unet_use_classes else None, config.condition)


def make_step(config: Config, variant: Variant, batch: Batch) -> Callable[[], torch.Tensor | None]:
    """Forward, backward, clipping and AdamW on a batch that stays where it is: nothing but the network's own cost. -> the loss"""
    device = batch.zlo.device
    reseed("weights", config.seed)
    net = unet(config).to(device, memory_format=torch.channels_last if variant.channels_last else torch.contiguous_format)
    compile_in_place(net, variant.compile)
    optimizer = torch.optim.AdamW(net.parameters(), config.base_lr, weight_decay=0.0, fused=True, capturable=variant.graph)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=variant.bf16):
            loss = config.recipe.loss(net, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip, foreach=True)
        optimizer.step()
        return loss

    return captured(step) if variant.graph else step


def compile_in_place(net: torch.nn.Module, what: str):
    if what == "blocks":
        net.compile_blocks()
    elif what == "whole":
        net.compile(dynamic=False)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph: the host starts one graph instead of thousands of kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def flop_an_image(config: Config, device: torch.device) -> int:
    """Of the network, forward and backward; a multiplication and an addition count as two."""
    net, batch = unet(config).to(device), one_batch(config, device, 1)
    with FlopCounterMode(display=False) as counter:
        config.recipe.loss(net, batch).mean().backward()
    return counter.get_total_flops()


def matmul(device: torch.device, kind: str, side: int) -> Callable[[], object]:
    """A product of two square matrices in bf16, fp32 or TF32."""
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind != "fp32":  # TF32 is allowed everywhere else
        return lambda: a @ b

    def full():
        with ode_int.full_precision(device.type):
            return a @ b
    return full


# ------------------------------------------------------------------------------------ start-up and memory, in a process

def in_process(o: Options, variant: Variant, turns: int, caches: Path | None = None) -> dict:
    """What `child` returns, from a fresh process; {"error": why} if it breaks."""
    say(f"in a process of its own: {variant.name}")
    job = dict(options=asdict(o), variant=asdict(variant), turns=turns, spawned=time.time())
    environment = os.environ | ({"TORCHINDUCTOR_CACHE_DIR": str(caches)} if caches else {})
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return dict(error="out of memory" if "OutOfMemory" in last or done.returncode == -9 else last[:150])
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(job: dict) -> dict:
    """Seconds of import, construction and first step; peak bytes after that, and seconds a step of each of `turns` turns."""
    imported = time.time()
    o, variant = Options(**job["options"]), Variant(**job["variant"])
    config, device = settings(o)
    set_up(device)
    batch = one_batch(config, device)  # drawing it is not counted
    start = time.perf_counter()
    step = make_step(config, variant, batch)
    synchronize(device)
    built = time.perf_counter()
    first = timer(step, device)(1)
    forget_peak(device)
    turns = in_turns({"": timer(step, device)}, job["turns"], o.seconds)[""]
    if isinstance(turns, str):
        return dict(error=turns)
    return dict(import_s=imported - job["spawned"], build_s=built - start, first_step_s=first, peak_bytes=peak(device),
                turns=turns, flop_an_image=flop_an_image(config, device))


def forget_peak(device: torch.device):
    """The first step compiles, and tries algorithms out: that is not what training needs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int | None:
    """Peak bytes allocated on the GPU, or resident in this process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # getrusage's peak would be inherited from the parent process
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


# ---------------------------------------------------------------------------------------------------- the plain recipe

class PlainPairs(Dataset):
    """Pairs for super-resolution, made one PIL image at a time: clean, damaged, label."""

    def __init__(self, images: data.Images, config: Config):
        self.pixels, self.y = images.train.permute(0, 2, 3, 1).squeeze(-1).numpy(), images.train_y.tolist()
        self.small = (config.image_size // config.damage.factor,) * 2
        self.down, self.up = (Image.Resampling[name.upper()] for name in (config.damage.down, config.damage.up))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int):
        clean = Image.fromarray(self.pixels[i])
        if torch.rand(()) < 0.5:
            clean = clean.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        low = clean.resize(self.small, self.down).resize(clean.size, self.up)
        return to_tensor(clean) * 2 - 1, to_tensor(low) * 2 - 1, self.y[i]


class PlainLoop:
    """The plain recipe's data and training: DataLoader and AdamW as they come, clipping, no average of the weights."""

    def __init__(self, config: Config, images: data.Images, device: torch.device, workers: int):
        self.config, self.device = config, device
        pairs = PlainPairs(images, config)
        endless = RandomSampler(pairs, replacement=True, num_samples=2**40)
        self.loader = DataLoader(pairs, config.batch_size, sampler=endless, num_workers=workers, pin_memory=device.type == "cuda")
        self.ahead = workers * self.loader.prefetch_factor  # batches that are ready soon after the workers start
        reseed("weights", config.seed)
        self.net = unet(config).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), config.base_lr, weight_decay=0.0)

    def run(self, n: int, train: bool) -> float:
        """Seconds of n batches, or steps, once the head start of the workers is used up."""
        batches = iter(self.loader)
        for _ in range(1 + self.ahead):
            next(batches)
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(n):
            z1, zlo, y = (x.to(self.device, non_blocking=True) for x in next(batches))
            if train:
                self.step(z1, zlo, y)
        synchronize(self.device)
        return time.perf_counter() - start

    def step(self, z1, zlo, y):
        c, one = self.config, torch.ones_like(z1[:, :1])
        batch = Batch(z1, zlo, one, 0 * one, zlo if c.condition else None, y if c.unet_use_classes else None)
        self.optimizer.zero_grad()
        c.recipe.loss(self.net, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), c.grad_clip)
        self.optimizer.step()


def plain_sample(config: Config, net, batch: Batch) -> torch.Tensor:
    """torchdiffeq's dopri5 as it comes, at 1e-5."""
    ode = config.recipe.velocity(net, batch)
    times = torch.tensor([ode.t0, ode.t1], device=ode.z.device)
    return torchdiffeq.odeint(ode.velocity, ode.z, times, atol=1e-5, rtol=1e-5, method="dopri5")[-1]


# ------------------------------------------------------------------------------------- parts of the report, each a table

def measure_steps(o: Options, config: Config, device: torch.device, report: dict, caches: Path):
    """Training steps of each variant, and the matrix products that say what the device can do, in turns."""
    todo, fp32 = variants(o, device), full_precision_name(device)
    fresh = {}  # what each takes in a process of its own
    for v in todo if o.startup else []:
        if not o.quick or v == eager(todo):
            fresh[v] = in_process(o, v, 0, caches / v.compile)
            if v.compile and not v.graph:
                fresh[v]["cached"] = in_process(o, v, 0, caches / v.compile)

    flop, batch = flop_an_image(config, device), one_batch(config, device)
    side = 128 if o.quick else 8192 if device.type == "cuda" else 2048
    kinds = dict.fromkeys(["bf16"] * bf16_helps(device) + [fp32, "fp32"])
    work = {kind: timer(matmul(device, kind, side), device) for kind in kinds}
    broken = {}
    for v in todo:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(caches / v.compile)
        try:
            step = make_step(config, v, batch)
            step()  # compiles, from the cache that the processes filled
            work[v.name] = timer(step, device)
        except Exception as failure:
            broken[v.name] = failed(failure)
    times = in_turns(work, o.repeats, o.seconds) | broken

    report["flop_an_image"] = flop
    report["matmul_flop_per_second"] = rates = {kind: 2 * side**3 / statistics.median(times[kind]) for kind in kinds}
    measured = {v.name: times[v.name] for v in todo}
    table = dict(zip(todo, rows(measured, plain=todo[0].name, images=config.batch_size)))
    first = fresh.get(eager(todo), {}).get("first_step_s")
    for v, row in table.items():
        row |= dict(variant=asdict(v), fresh=fresh.get(v, {}))
        if "seconds" in row:
            row["share"] = flop * row["images_per_second"] / rates["bf16" if v.bf16 else fp32]
        if v.compile and not v.graph and first and "first_step_s" in row["fresh"]:
            row["compile_s"] = row["fresh"]["first_step_s"] - first
            row["compile_cached_s"] = row["fresh"]["cached"].get("first_step_s", math.nan) - first
            row["pays_after_steps"] = pays_after(row["compile_s"], table[eager(todo)].get("seconds"), row.get("seconds"))
    report["step"] = list(table.values())


def pays_after(once: float, before: float | None, after: float | None) -> float | None:
    """Steps until what is spent once is saved; None: never."""
    return max(once, 0) / (before - after) if before and after and after < before else None


def show_steps(report: dict) -> str:
    rates = ", ".join(f"{kind} {rate / 1e12:.3g}" for kind, rate in report["matmul_flop_per_second"].items())
    title = (f"Training step, batch {report['config']['batch_size']}, {report['flop_an_image'] / 1e9:.3g} GFLOP an image forward "
             f"and backward. Matrix products, TFLOP/s: {rates}.")
    table = []
    for row in report["step"]:
        fresh, compiler = row["fresh"], ["", ""]
        start = [fresh.get(key, math.nan) for key in ("import_s", "build_s", "first_step_s")]
        if "compile_s" in row:
            steps = row["pays_after_steps"]
            compiler = [f"{row['compile_s']:.1f} ({row['compile_cached_s']:.1f})"]
            compiler += ["never" if steps is None else f"{steps:,.0f} steps"]
        start_up = f"{sum(start):.1f}" if "import_s" in fresh else fresh.get("error", "")
        share = f"{row['share']:.1%}" if "share" in row else ""
        table.append([row["name"], *speed(row), share, size(fresh.get("peak_bytes")), start_up, *compiler])
    return markdown(title, ["forward + backward + step", "ms (min-max)", "images/s", "x plain", "share of matmul", "peak memory",
                            "start-up s", "compile s (cached)", "pays after"], table)


def a_trainer(config: Config, folder: Path) -> Trainer:
    """A trainer as `python trainer.py --no-overfit` makes it, but with few images."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(replace(config, overfit=True, out_dir=str(folder)))  # overfit: draws a batch of images, not 10,000
    trainer.config = replace(trainer.config, overfit=False)
    return trainer


def measure_loop(o: Options, config: Config, device: torch.device, report: dict, part: str, trainer: Trainer):
    """The plain recipe's training loop, or its data alone, beside the trainer's own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = o.workers or min(8, cores)
    plain = PlainLoop(config, trainer.images.to("cpu"), device, workers)
    name = f"plain recipe, {workers} DataLoader workers"
    ours = trainer.train_step if part == "loop" else lambda: trainer.batch(trainer.step)
    work = {name: lambda n: plain.run(n, train=part == "loop"), "trainer.py": timer(ours, device)}
    report[part] = rows(in_turns(work, o.repeats, o.seconds), name, config.batch_size)


def show_loop(report: dict, part: str) -> str:
    title = dict(loop="Training with its data", data="Data alone, until a damaged batch is on the device")[part]
    return markdown(f"{title}, batch {report['config']['batch_size']}.", ["", "ms a batch (min-max)", "images/s", "x plain"],
                    [[row["name"], *speed(row)] for row in report[part]])


def trained(run: str, device: torch.device) -> tuple[Config, torch.nn.Module]:
    """A run's settings and its averaged network. Raises ValueError."""
    config, checkpoint = open_checkpoint(run)
    net = make_unet(config, checkpoint["num_classes"])
    net.load_state_dict(checkpoint["ema"])
    return config, net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def held_out(config: Config, labels: bool, count: int, device: torch.device) -> Batch:
    """`count` test images, or as many as there are, damaged. Raises DatasetError."""
    images = data.load(config.dataset, config.image_size, config.channels, config.data_path, config.paired_path, count)
    z1, y, zlo = images.batch(torch.arange(len(images.test)), device, "test")
    return config.damage(config.task, z1, y if labels else None, config.condition, zlo)


def measure_samplers(o: Options, config: Config, device: torch.device, report: dict, trainer: Trainer | None):
    """Every solver, and the method's own sampler, from the same noise."""
    count = o.sample_count or (2 if o.quick else 32 if device.type == "cuda" else 4)
    if o.run:
        config, net = trained(o.run, device)
        batch = held_out(config, net.num_classes > 0, count, device)
        count, report["sample_net"] = len(batch.zlo), f"the network of {o.run}"
    else:
        net, batch = trainer.ema, one_batch(config, device, count)
        report["sample_net"] = f"a network of {trainer.step} training steps (NFE of dopri5 needs a trained one: --run)"
    bf16 = bf16_helps(device)
    evaluations, work = {}, {}

    def add(name, sample, net):
        counted = ode_int.Counted(net)

        @torch.no_grad()
        def call():
            reseed("sample")
            counted.rows = 0
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16 and name != plain):
                sample(counted)
            evaluations[name] = counted.rows / count
        work[name] = timer(call, device)

    def ours(solver, steps=None):
        return lambda net: draw(replace(config, solver=solver, sample_steps=steps), net, batch)

    plain, n, precision = "dopri5 as it comes, NCHW (plain)", o.solver_steps, ", bf16" * bf16
    if hasattr(config.recipe, "velocity"):
        add(plain, lambda net: plain_sample(config, net, batch), copy.deepcopy(net).to(memory_format=torch.contiguous_format))
        add("dopri5", ours("dopri5"), net)
        for solver, steps in dict(euler=2 * n, midpoint=n, heun=n, rk4=max(1, n // 2)).items():
            add(f"{solver}, {steps} steps{precision}", ours(solver, steps), net)
        if compiles(o, device):
            compile_in_place(whole := copy.deepcopy(net), "whole")
            add(f"midpoint, {n} steps{precision}, compiled", ours("midpoint", n), whole)
    if replace(config, solver="auto").sampler == "own":
        steps = config.quick.sample_steps or n
        add(f"{config.method}'s own, {steps} steps{precision}", ours("auto", steps), net)
    result = rows(in_turns(work, min(o.repeats, 3), o.seconds), plain, count)
    report["sample"] = [row | dict(nfe=evaluations.get(row["name"])) for row in result]
    report["sample_count"] = count


def show_samplers(report: dict) -> str:
    title = f"Sampling {report['sample_count']} images at once, {report['sample_net']}."
    table = []
    for row in report["sample"]:
        milliseconds, images_per_second, ratio = speed(row)
        seconds = f"{1 / row['images_per_second']:.4g}" if "seconds" in row else milliseconds
        table.append([row["name"], f"{row['nfe']:.0f}" if row["nfe"] else "", seconds, images_per_second, ratio])
    return markdown(title, ["sampler", "NFE", "s an image", "images/s", "x plain"], table)


def measure_growth(o: Options, config: Config, device: torch.device, report: dict):
    """A fresh process for each batch, side and width: memory is measured as if nothing else had run."""
    base = dict(batch_size=config.batch_size, image_size=config.image_size, unet_channels=config.unet_channels)
    batch, width = config.batch_size, config.unet_channels
    batches, widths = o.batch_sizes, o.widths
    if batches is None:
        batches = sorted({max(1, batch // 4), max(1, batch // 2), batch, 2 * batch, 4 * batch})
    if widths is None:
        widths = sorted({max(8, width // 2), width, 2 * width})
    wanted = dict(batch_size=batches, image_size=o.image_sizes, unet_channels=widths)
    variant = eager(variants(o, device))
    report["variant"], report["grow"] = variant.name, []
    for field, numbers in wanted.items():
        for number in numbers:
            sizes = base | {field: number}
            row = dict(varies=field) | sizes | in_process(replace(o, **sizes), variant, o.repeats)
            if "turns" in row:
                row["seconds"] = statistics.median(row["turns"])
                row["images_per_second"] = sizes["batch_size"] / row["seconds"]
            report["grow"].append(row)


def exponent(x: list[float], y: list[float]) -> float:
    """a of the power law y ~ x^a that fits best."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def show_growth(report: dict) -> str:
    table, laws = [], []
    for row in report["grow"]:
        milliseconds, images_per_second, _ = speed(row)
        arithmetic = ["", ""]
        if "turns" in row:
            arithmetic = [f"{row['flop_an_image'] / 1e9:.3g}", f"{row['flop_an_image'] * row['images_per_second'] / 1e12:.3g}"]
        sizes = [row[field] for field in ("batch_size", "image_size", "unet_channels")]
        table.append([*sizes, milliseconds, images_per_second, *arithmetic, size(row.get("peak_bytes"))])
    for field in dict.fromkeys(row["varies"] for row in report["grow"]):
        some = [row for row in report["grow"] if row["varies"] == field and "turns" in row]
        x = [row[field] for row in some]
        if len(set(x)) > 1:
            time = exponent(x, [row["seconds"] for row in some])
            arithmetic = exponent(x, [row["flop_an_image"] * row["batch_size"] for row in some])
            laws.append(f"A step's time grows as {field}^{time:.2f}, its arithmetic as {field}^{arithmetic:.2f}.")
            if field == "batch_size" and all(row["peak_bytes"] for row in some):
                memory = statistics.linear_regression(x, [row["peak_bytes"] for row in some])
                laws.append(f"Memory: {size(memory.intercept)} + {memory.slope / 2**20:.3g} MiB an image.")
    head = ["batch", "side", "width", "ms a step (min-max)", "images/s", "GFLOP an image", "TFLOP/s", "peak memory"]
    return markdown(f"Growth of the training step, {report['variant']}.", head, table) + "\n" + "\n".join(laws) + "\n"


# -------------------------------------------------------------------------------------------------------------- report

def speed(row: dict) -> list[str]:
    """Cells: milliseconds with their spread, images/s, times as fast as the plain one."""
    if "seconds" not in row:
        return [row["error"], "", ""]
    low, middle, high = (1000 * x for x in (min(row["turns"]), row["seconds"], max(row["turns"])))
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    return [f"{middle:.4g} ({low:.4g}-{high:.4g})", f"{row['images_per_second']:,.4g}", ratio]


def size(number: float | None) -> str:
    return "" if number is None else f"{number / 2**30:.2f} GiB"


def markdown(title: str, head: list[str], table: list[list]) -> str:
    cells = [[str(cell).replace("|", "/") for cell in line] for line in (head, ["---"] * len(head), *table)]
    return title + "\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells)


def machine(device: torch.device) -> dict:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()[0].strip("\t :")
    result = dict(cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), bf16=bf16_helps(device), load=os.getloadavg()[0],
                  system=platform.system(), python=platform.python_version(), torch=torch.__version__,
                  torchvision=torchvision.__version__, torchdiffeq=torchdiffeq.__version__)
    if device.type == "cuda":
        result |= dict(gpu=torch.cuda.get_device_name(device), gpu_bytes=torch.cuda.get_device_properties(device).total_memory,
                       cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    return result


def describe(report: dict) -> str:
    m = report["machine"]
    chip = m.get("gpu") or f"{m['cpu']}, {m['threads']} threads"
    busy = ""
    if m["load"] > m["cores"] / 4:
        busy = f"\nThe machine was busy before this run (load {m['load']:.1f} on {m['cores']} cores): do not trust these figures."
    return f"{chip}; torch {m['torch']}, Python {m['python']}\n`{report['command']}`{busy}\n"


def save(report: dict, given: str | None, kind: str, started: float) -> Path:
    """Writes the report to the file that was named, or to one of the time the run started."""
    path = Path(given or f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    started, arguments = time.time(), sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--child"]:
        print(json.dumps(child(json.loads(arguments[1]))))
        return 0
    try:
        o = parse(Options, arguments, __doc__)
        if o.quick:
            o = replace(o, repeats=2, seconds=0.01, workers=1, solver_steps=2)
        config, device = settings(o)
        if o.run:
            found, net = trained(o.run, torch.device("cpu"))
            held_out(found, net.num_classes > 0, 1, torch.device("cpu"))
    except (ValueError, data.DatasetError) as failure:
        print(f"speed.py: {failure}", file=sys.stderr)
        return 2
    set_up(device)
    parameters = sum(p.numel() for p in unet(config).parameters())
    report = dict(command=" ".join(["python benchmarks/speed.py", *arguments]), machine=machine(device), config=asdict(config),
                  parameters=parameters)
    print(describe(report))
    print(f"Preset {config.preset}: {parameters / 1e6:.1f}M parameters, {config.image_size}x{config.image_size} pixels.\n")

    def done(table: str):
        print(table, flush=True)
        return save(report, o.out, "speed", started)  # after each part, so that a run cut short leaves what it has

    with tempfile.TemporaryDirectory() as folder:
        if o.grow:
            measure_growth(o, config, device, report)
            done(show_growth(report))
        elif "step" in o.parts:
            measure_steps(o, config, device, report, Path(folder))
            done(show_steps(report))
        if not o.grow and {"loop", "data", "sample"} & set(o.parts):
            trainer = a_trainer(config, Path(folder))
            for part in ("loop", "data"):
                if part in o.parts and parts(config.task) == ["sr"]:  # the plain recipe is for that task
                    measure_loop(o, config, device, report, part, trainer)
                    done(show_loop(report, part))
            if "sample" in o.parts:
                measure_samplers(o, config, device, report, trainer)
                done(show_samplers(report))
    print(f"written to {save(report, o.out, 'speed', started)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
