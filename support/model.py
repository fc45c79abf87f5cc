"""The network of a run, and its sampler."""
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import ode_int
from images import SettingsError, one_line
from images.corruptions import Batch, cond_channels, task_names
from images.pictures import grid, psnr, strip, titled
from support.checkpoints import Run
from support.disk import free_memory
from support.machine import autocast, pick_device, processes
from unet import Counted, Guided, Unet

COMPILE_FROM = 10_000  # steps: benchmarks/README.md has what compiling takes and saves
COMPILE_UP_TO = 64  # channels, on a CPU: there the compiler takes too long over wider networks, and gains little
EMBEDDING = "embed_class.0.weight"  # of Unet: a row per class, and the null label's

# c is a trainer.Config in all of these

def make_unet(c, num_classes: int) -> Unet:
    """The network that the method and task need; in float32."""
    upscale = c.chosen.upscale
    seen = c.channels + cond_channels(c.task, c.channels, c.condition) * upscale**2
    return Unet(seen, c.channels, dim=c.unet_channels, dim_mults=c.unet_dim_mults, num_classes=num_classes,
                blocks=c.unet_blocks, dropout=c.unet_dropout, upscale=upscale, two_times=c.chosen.two_times,
                checkpointing=c.unet_checkpointing)


def make_players(c, net: nn.Module, num_classes: int) -> list:
    """[(module, its loss)] on net's device: the network, and what else the method trains."""
    players = c.chosen.players(net, c.channels, num_classes, cond_channels(c.task, c.channels, c.condition))
    return [(module.to(next(net.parameters()).device), loss) for module, loss in players]


def check_fits(c, num_classes: int, device: torch.device, copies: int):
    """Raises SettingsError where so many copies of the network's weights are more than the memory that is free."""
    try:
        with torch.device("meta"):  # where tensors have a shape, and no memory
            numbers = weights(make_unet(c, num_classes))
    except RuntimeError:  # there are more than can be counted
        numbers = math.inf
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    need = 4 * copies * numbers
    if free is not None and need > free:
        raise SettingsError(f"unet_channels = {c.unet_channels}, unet_dim_mults = {c.unet_dim_mults}: the network has "
                            f"{numbers / 1e6:,.0f} million weights, which take {need / 1e9:,.1f} GB of memory, and "
                            f"{free / 1e9:,.1f} GB are free; lower them")


def load_network(run: Run, ema: bool = True) -> Unet:
    """The run's network with its weights, ready to sample, on the CPU. Raises SettingsError."""
    check_fits(run.config, run.num_classes, torch.device("cpu"), copies=1)
    net = make_unet(run.config, run.num_classes)
    try:
        net.load_state_dict(run.network(ema))
    except RuntimeError as failure:
        reason = one_line(failure)[:100]
        raise SettingsError(f"run = {run.path!r}: its weights do not fit its settings ({reason} ...)") from None
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def compiles(c) -> bool:
    """Whether the run compiles its network; auto: long runs, of one network at one size (each further size would take
    as long to compile again)."""
    if c.compile == "auto":
        narrow = c.unet_channels <= COMPILE_UP_TO or pick_device(c.device).type == "cuda"
        return c.steps >= COMPILE_FROM and narrow and not c.chosen.levels
    return c.compile == "on"


def weights(net: nn.Module) -> int:
    """How many numbers it has to learn."""
    return sum(p.numel() for p in net.parameters())


def compile_network(c, net: nn.Module, loss: Callable, batches: Callable, precision: str):
    """torch.compile in place, tried on a batch; where a batch has one of several levels, on so many that all occur.

    Without a C++ compiler, say, it warns and leaves net as it was.
    """
    net.compile(dynamic=False)
    try:
        for step in range(max(1, 8 * c.chosen.levels)):
            with autocast(next(net.parameters()).device, precision):
                loss(net, batches(step)[0]).mean().backward()
        # seen on a CPU with AMX, with some batch sizes: a compiler's fault, where the eager network's are finite
        if not all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None):
            raise ArithmeticError("compiled, its gradients are not finite")
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # of whatever type the compiler raises
        net._compiled_call_impl = None
        warnings.warn(f"the network is not compiled ({one_line(failure)[:200]})")
    net.zero_grad()


def start_from(net: nn.Module, run: Run, classes: list[str]):
    """Gives `net` the run's averaged weights (or raw ones, where it holds no others) by name and shape.

    The embedding of each of net's `classes` becomes that of the run's class of the same name.

    What does not fit, as after a change of channels or classes, is named and stays as it is.
    """
    trained, own = run.weights.get("ema") or run.weights["raw"], net.state_dict()
    trained = dict(trained)
    if EMBEDDING in trained and EMBEDDING in own:
        before, now = trained[EMBEDDING], own[EMBEDDING].clone()
        if before.shape[1] == now.shape[1]:
            now[-1] = before[-1]  # the null label
            for number, name in enumerate(classes):
                if name in run.classes:
                    now[number] = before[run.classes.index(name)]
            trained[EMBEDDING] = now
    fitting = {name: weight for name, weight in trained.items() if name in own and own[name].shape == weight.shape}
    net.load_state_dict(own | fitting)
    fresh = sorted(own.keys() - fitting.keys())
    if EMBEDDING in own:
        fresh += [f"class {name}" for name in classes if name not in run.classes]
    left = f"; fresh are {', '.join(fresh[:8])}" + (f" and {len(fresh) - 8} more" if len(fresh) > 8 else "")
    if processes()[0] == 0:
        print(f"{len(fitting)} of {len(own)} tensors are those of {run.path}{left if fresh else ''}")


class ZeroNet:
    """In place of a network: it always says 0. Shows what a sampler asks of one, and whether it takes its settings."""

    def __init__(self, c):
        self.num_classes, self.upscale = 0, c.chosen.upscale

    def __call__(self, x, t, y=None, cond=None):
        return x.new_zeros(len(x), x.shape[1], x.shape[2] * self.upscale, x.shape[3] * self.upscale)


def run_sampler(c, net, batch: Batch, trace: list | None = None) -> Tensor:
    """Samples (B, C, H, W) by the sampler that the settings name.

    `trace`, a list if given, receives (t, state, clean estimate) at each step.
    """
    if c.sampler == "own":
        return c.chosen.sample(net, batch, c.sample_steps, trace)
    ode = c.chosen.velocity(net, batch)
    return ode_int.solve(ode, c.sampler, c.sample_steps, c.integration_atol, c.integration_rtol, trace)


class FirstFrame(list):
    """A trace that keeps its first frame alone."""

    def append(self, frame):
        if not self:
            super().append(frame)


def for_pictures(c):
    """The settings for pictures in training, where a method whose paper takes a thousand steps makes do with fewer."""
    steps = c.chosen.picture_steps if c.sampler == "own" else None
    return replace(c, sample_steps=c.sample_steps or steps)


@torch.no_grad()
def start_states(c, batch: Batch) -> Tensor:
    """The states (B, C, H, W) that the sampler of the pictures starts from, as a trace shows them.

    It runs with a network that costs nothing. Raises SettingsError for settings that the sampler does not take.
    """
    trace = FirstFrame()
    run_sampler(for_pictures(c), ZeroNet(c), batch, trace)
    return trace[0][1]


def sample_for_pictures(c, net, batch: Batch, z0: Tensor) -> tuple[dict, dict]:
    """Samples of a network -> numbers (NFE, seconds, decibels) and pictures (H, W, 3) uint8, by name.

    z0: of start_states.
    """
    c, trace = for_pictures(c), []
    counted, began = Counted(net), time.perf_counter()
    guided = Guided(counted, c.guidance)
    sample = run_sampler(c, guided, batch)
    numbers = dict(nfe=counted.rows / len(sample), seconds=time.perf_counter() - began)
    run_sampler(c, guided, batch[:4], trace)
    columns = {"start": z0, "samples": sample, "truth": batch.z1}
    if task_names(c.task) != ["generate"]:
        numbers |= dict(psnr=psnr(sample, batch.z1), psnr_zlo=psnr(batch.zlo, batch.z1))
        columns = {"low resolution" if task_names(c.task) == ["sr"] else "damaged": batch.zlo} | columns
    grids = titled(list(columns), [grid(images) for images in columns.values()])
    return numbers, dict(step=grids, trace=strip(trace))
