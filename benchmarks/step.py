"""The training step alone, in each way to run the network: its time, share of the device's rate, start-up, memory."""
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

import ode_int
from benchmarks.peer import Peer
from benchmarks.timing import cells, failed, in_turns, markdown, rows, say, size, synchronize, timer
from images import data
from images.corruptions import Batch
from support.machine import bf16_helps, pick_device, reseed, set_up
from support.model import make_unet
from support.settings import from_plain
from trainer import Config
from unet import Attention, LinearAttention, ResBlock

PEER = "diffusers' UNet2DModel"


@dataclass(frozen=True)
class Variant:
    """A way to run the same network."""

    name: str
    bf16: bool = True
    channels_last: bool = True
    compile: Literal["", "blocks", "whole"] = ""
    graph: bool = False  # the whole step replayed as one CUDA graph
    peer: bool = False  # diffusers' network in place of ours


def variants(device: torch.device, compiled: bool, peer: bool = False) -> list[Variant]:
    """The plain one first, then what changes, one at a time; `peer`: then another network, as it comes and tuned."""
    fp32 = full_precision_name(device)
    result = [Variant(f"{fp32}, NCHW (plain)", bf16=False, channels_last=False)]
    result.append(Variant(f"{fp32}, channels_last", bf16=False))
    if bf16_helps(device):
        result += [Variant("bf16, NCHW", channels_last=False), Variant("bf16, channels_last")]
    last = result[-1]
    if compiled:
        result += [replace(last, name=f"{last.name}, {what} compiled", compile=what) for what in ("blocks", "whole")]
    if device.type == "cuda":
        result += [replace(v, name=f"{v.name}, CUDA graph", graph=True) for v in result if v == last or v.compile]
    if peer:
        result += [Variant(f"{PEER}, as it comes: {fp32}, NCHW", bf16=False, channels_last=False, peer=True),
                   replace(last, name=f"{PEER}, {last.name}", peer=True)]
    return result


def eager(variants: list[Variant]) -> Variant:
    """Ours, without what needs time to set up."""
    return [v for v in variants if not v.compile and not v.graph and not v.peer][-1]


def full_precision_name(device: torch.device) -> str:
    return "TF32" if device.type == "cuda" else "fp32"


def unet(config: Config, peer: bool = False) -> torch.nn.Module:
    return (Peer if peer else make_unet)(config, len(data.SHAPES) if config.unet_use_classes else 0)


def one_batch(config: Config, device: torch.device, count: int | None = None) -> Batch:
    """`count` images, or as many as the config has in a batch; no more than 64 of them differ."""
    images = data.load("shapes", config.image_size, config.channels, limit=64)
    z1, y, _ = images.batch(torch.arange(count or config.batch_size) % len(images.train), device)
    return config.damaged(z1, y if config.unet_use_classes else None)


def make_step(config: Config, variant: Variant, batch: Batch) -> Callable[[], torch.Tensor | None]:
    """Forward, backward, clipping and AdamW on a batch that stays where it is: nothing but the network's own cost.

    -> a call that makes a step and returns its loss.
    """
    device = batch.zlo.device
    reseed("weights", config.seed)
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    net = unet(config, variant.peer).to(device, memory_format=layout)
    compile_in_place(net, variant.compile)
    optimizer = torch.optim.AdamW(
        net.parameters(), config.base_lr, weight_decay=0.0, fused=True, capturable=variant.graph)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=variant.bf16):
            loss = config.chosen.loss(net, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip, foreach=True)
        optimizer.step()
        return loss

    return captured(step) if variant.graph else step


def compile_in_place(net: torch.nn.Module, what: str):
    if what == "blocks":  # those of one shape share their kernels
        torch._dynamo.config.recompile_limit = 64  # a block meets every resolution and width of the network
        for module in net.modules():
            if isinstance(module, (ResBlock, LinearAttention, Attention)):
                module.compile(dynamic=False)
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

    def replay(step=step):  # whose network and optimizer live as long as their graph
        graph.replay()

    return replay


def flop_an_image(config: Config, device: torch.device, peer: bool = False) -> int:
    """Of the network, forward and backward; a multiplication and an addition count as two."""
    net, batch = unet(config, peer).to(device), one_batch(config, device, 1)
    with FlopCounterMode(display=False) as counter:
        config.chosen.loss(net, batch).mean().backward()
    return counter.get_total_flops()


def matmul(device: torch.device, kind: str, side: int) -> Callable[[], object]:
    """A product of two square matrices in bf16, fp32 or TF32."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    if kind != "fp32":  # TF32 is allowed everywhere else
        return lambda: a @ b

    def full():
        with ode_int.full_precision(device.type):
            return a @ b

    return full


# ------------------------------------------------------------------------------------ start-up and memory, in a process

def in_process(config: Config, variant: Variant, turns: int, seconds: float, caches: Path | None = None) -> dict:
    """What `child` returns, from a fresh process; {"error": why} if it breaks."""
    say(f"in a process of its own: {variant.name}")
    job = dict(config=asdict(config), variant=asdict(variant), turns=turns, seconds=seconds, spawned=time.time())
    environment = dict(os.environ)
    if caches:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(caches)
    done = subprocess.run([sys.executable, __file__, json.dumps(job)], env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if "OutOfMemory" in last or done.returncode == -9:
            last = "out of memory"
        return dict(error=last[:150])
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(job: dict) -> dict:
    """Seconds of import, construction and first step; peak bytes after that; seconds a step in each turn."""
    imported = time.time()
    config, variant = from_plain(Config, job["config"]), Variant(**job["variant"])
    device = pick_device(config.device)
    set_up(device)
    torch.backends.cudnn.benchmark = True
    batch = one_batch(config, device)  # drawing it is not counted
    start = time.perf_counter()
    step = make_step(config, variant, batch)
    synchronize(device)
    built = time.perf_counter()
    first = timer(step, device)(1)
    if not variant.graph:  # which has its memory from its capture on
        forget_peak(device)
    turns = in_turns({"": timer(step, device)}, job["turns"], job["seconds"])[""]
    if isinstance(turns, str):
        return dict(error=turns)
    return dict(import_s=imported - job["spawned"], build_s=built - start, first_step_s=first, peak_bytes=peak(device),
                turns=turns, flop_an_image=flop_an_image(config, device, variant.peer))


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


# ------------------------------------------------------------------------------------------------------------- a table

def measure_steps(o, config: Config, device: torch.device, report: dict, caches: Path):
    """Training steps of each variant, and the matrix products that say what the device can do, in turns.

    o: speed.py's Options.
    """
    todo = variants(device, o.compiles(device), o.peer)
    fresh = {}  # what each takes in a process of its own
    for v in todo if o.startup else []:
        if not o.quick or v == eager(todo):
            fresh[v] = in_process(config, v, 0, o.seconds, caches / v.compile)
            if v.compile and not v.graph:
                fresh[v]["cached"] = in_process(config, v, 0, o.seconds, caches / v.compile)

    batch = one_batch(config, device)
    flops = {peer: flop_an_image(config, device, peer) for peer in {v.peer for v in todo}}
    side = 8192 if device.type == "cuda" else 2048
    if o.quick:
        side = 128
    fp32 = full_precision_name(device)
    kinds = [fp32] if fp32 == "fp32" else [fp32, "fp32"]
    if bf16_helps(device):
        kinds.insert(0, "bf16")
    work = {kind: timer(matmul(device, kind, side), device) for kind in kinds}
    broken = {}
    for v in todo:
        try:
            with cached_in(caches / v.compile):
                step = make_step(config, v, batch)
                step()  # compiles, from the cache that the processes filled
            work[v.name] = timer(step, device)
        except Exception as failure:
            broken[v.name] = failed(failure)
    times = in_turns(work, o.repeats, o.seconds) | broken

    report["flop_an_image"] = flops[False]
    report["parameters_of_peer"] = sum(p.numel() for p in unet(config, True).parameters()) if o.peer else None
    rates = {kind: 2 * side**3 / statistics.median(times[kind]) for kind in kinds}
    report["matmul_flop_per_second"] = rates
    measured = {v.name: times[v.name] for v in todo}
    table = dict(zip(todo, rows(measured, plain=todo[0].name, images=config.batch_size)))
    first = fresh.get(eager(todo), {}).get("first_step_s")
    for v, row in table.items():
        row |= dict(variant=asdict(v), fresh=fresh.get(v, {}))
        if "seconds" in row:
            row["share"] = flops[v.peer] * row["images_per_second"] / rates["bf16" if v.bf16 else fp32]
        if v.compile and not v.graph and first and "first_step_s" in row["fresh"]:
            row["compile_s"] = row["fresh"]["first_step_s"] - first
            row["compile_cached_s"] = row["fresh"]["cached"].get("first_step_s", math.nan) - first
            before, after = table[eager(todo)].get("seconds"), row.get("seconds")
            row["pays_after_steps"] = pays_after(row["compile_s"], before, after)
    report["step"] = list(table.values())


@contextlib.contextmanager
def cached_in(folder: Path):
    """Within it, torch.compile keeps its kernels in `folder`."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before, os.environ[name] = os.environ.get(name), str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def pays_after(once: float, before: float | None, after: float | None) -> float | None:
    """Steps until what is spent once is saved; None: never."""
    saves = before and after and after < before
    return max(once, 0) / (before - after) if saves else None


def show_steps(report: dict) -> str:
    rates = ", ".join(f"{kind} {rate / 1e12:.3g}" for kind, rate in report["matmul_flop_per_second"].items())
    gflop = report["flop_an_image"] / 1e9
    title = (f"Training step, batch {report['config']['batch_size']}, {gflop:.3g} GFLOP an image forward and backward. "
             f"Matrix products, TFLOP/s: {rates}.")
    if peer := report["parameters_of_peer"]:
        title += f" {PEER} has {peer / 1e6:.1f}M parameters."
    table = []
    for row in report["step"]:
        fresh = row["fresh"]
        compiling = pays = ""
        start = [fresh.get(key, math.nan) for key in ("import_s", "build_s", "first_step_s")]
        if "compile_s" in row:
            steps = row["pays_after_steps"]
            compiling = f"{row['compile_s']:.1f} ({row['compile_cached_s']:.1f})"
            pays = "never" if steps is None else f"{steps:,.0f} steps"
        start_up = f"{sum(start):.1f}" if "import_s" in fresh else fresh.get("error", "")
        share = f"{row['share']:.1%}" if "share" in row else ""
        memory = size(fresh.get("peak_bytes"))
        table.append([row["name"], *cells(row), share, memory, start_up, compiling, pays])
    head = ["forward + backward + step", "ms (min-max)", "images/s", "x plain", "share of matmul", "peak memory",
            "start-up s", "compile s (cached)", "pays after"]
    return markdown(title, head, table)


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
