"""Trains one UNet by one of five methods to make clean images from noise or from damaged ones, and shows what it learned.

    python trainer.py                    overfit one batch of CIFAR-10, 16x16 -> 32x32: a demo of minutes
    python trainer.py --no-overfit       the full run
    python trainer.py --help             every setting
"""
import copy
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
import ode_int
from corruptions import Batch, Damage, cond_channels, parts
from logs import Log, beside, grid, new_folder, one_line, psnr, run_folder, strip, write_atomically
from methods.edm import EDM
from methods.i2sb import I2SB
from methods.interpolant import Interpolant
from methods.regression import Regression
from methods.sr3 import SR3
from methods.udpm import UDPM
from settings import PRESETS, from_plain, parse
from unet import Guided, Unet


@dataclass
class Config:
    """Everything a run depends on. Sizes are pixels, batch sizes are images over all GPUs."""

    preset: str = "auto"  # whole recipe the other flags start from; auto: cifar10-sr on a GPU, small on a CPU
    method: Literal["interpolant", "sr3", "i2sb", "edm", "udpm", "regression"] = "interpolant"  # how clean images are made; regression: the baseline
    task: str = "sr"  # sr, inpaint, blur, jpeg, generate, paired, or a mixture: sr,jpeg
    overfit: bool = True  # train on one batch and sample that batch: a quick demo; --no-overfit is the full run

    dataset: str | None = None  # cifar10, fashion-mnist, celeba, shapes, or the path of a folder; None: cifar10 if it can be had
    data_path: str = "data"  # where downloaded data sets are kept
    paired_path: str | None = None  # task paired: the folder of damaged images with the names of the clean ones
    image_size: int = 32  # side of the clean images
    channels: int = 3  # 3 colour, 1 grey
    condition: bool = True  # whether the network sees the damaged image

    max_steps: int | None = None  # training steps; None: 1,000 when overfitting, else 100,000
    batch_size: int = 128  # images a step
    base_lr: float = 2e-4  # AdamW's learning rate
    warmup_steps: int = 0  # steps over which the rate rises from 0
    lr_decay: float = 1.0  # factor on the rate every 1,000 steps
    grad_clip: float = 1.0  # largest norm of the gradient
    ema_decay: float = 0.9999  # of the averaged weights that sample, warmed up as (1 + n) / (10 + n)
    label_drop: float = 0.1  # share of labels replaced by the null label, for guidance; 0 when overfitting

    unet_channels: int = 128  # channels of the network's first level
    unet_dim_mults: tuple[int, ...] = (1, 2, 2, 2)  # channels of each level in units of unet_channels; sides halve
    unet_blocks: int = 2  # residual blocks a level
    unet_dropout: float = 0.0  # share of activations dropped in training
    unet_checkpointing: bool = False  # activation checkpointing: less memory, more time
    unet_use_classes: bool = True  # whether the network sees class labels, where the data has them

    sample_every: int = 500  # steps between samplings
    sample_count: int = 32  # images a sampling
    sample_steps: int | None = None  # steps of the sampler; None: the method's own count
    solver: str = "auto"  # auto: the method's own sampler (interpolant: dopri5); or dopri5, euler, midpoint, heun, rk4 on its ODE
    integration_atol: float = 1e-5  # absolute tolerance of dopri5
    integration_rtol: float = 1e-5  # relative tolerance of dopri5
    guidance: float = 1.0  # classifier-free guidance: 0 ignores the label, 1 follows it, above 1 exaggerates it

    print_loss_every: int = 50  # steps between logged losses
    checkpoint_every: int = 500  # steps between checkpoints
    out_dir: str = "runs"  # each run makes a folder in it
    resume: str | None = None  # a run's folder: go on from its checkpoint with its settings; other flags still override
    use_wandb: bool = True  # log to Weights & Biases as well: online where an account is configured, else offline
    wandb_project: str = "couplings"  # wandb's project
    wandb_entity: str | None = None  # wandb's user or team; None: the account's default

    seed: int = 0  # of weights, data order and noise
    device: str = "auto"  # auto: cuda if there is one; or cuda, cuda:1, cpu
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the network, minutes at the start; auto: from 20,000 steps on
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the activations; auto: bf16 where the chip computes in it

    damage: Damage = field(default_factory=Damage)
    interpolant: Interpolant = field(default_factory=Interpolant)
    sr3: SR3 = field(default_factory=SR3)
    i2sb: I2SB = field(default_factory=I2SB)
    edm: EDM = field(default_factory=EDM)
    udpm: UDPM = field(default_factory=UDPM)
    regression: Regression = field(default_factory=Regression)

    @property
    def recipe(self):
        """The method in use."""
        return getattr(self, self.method)

    @property
    def sampler(self) -> str:
        """A solver of ode_int, or "own": the method's sampler."""
        return getattr(self.recipe, "solver", "own") if self.solver == "auto" else self.solver

    @property
    def quick(self) -> "Config":
        """For the pictures in training: a method whose paper takes a thousand steps says how many will do there."""
        steps = getattr(self.recipe, "quick", None) if self.sampler == "own" else None
        return replace(self, sample_steps=self.sample_steps or steps)

    @property
    def steps(self) -> int:
        return self.max_steps if self.max_steps is not None else 1000 if self.overfit else 100_000

    def check(self):
        """Raises ValueError, one line that names field, value and what is allowed."""
        def need(name, good, allowed):
            if not good:
                raise ValueError(f"{name} = {getattr(self, name)!r}: allowed is {allowed}")

        need("preset", self.preset in PRESETS or self.preset == "auto", "auto, " + ", ".join(PRESETS))
        for name in ("image_size", "batch_size", "unet_channels", "unet_blocks", "sample_every", "sample_count", "print_loss_every", "checkpoint_every"):
            need(name, getattr(self, name) >= 1, "1 or more")
        for name in ("max_steps", "sample_steps"):
            need(name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more, or None")
        for name in ("base_lr", "lr_decay", "grad_clip", "integration_atol", "integration_rtol"):
            need(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("ema_decay", "unet_dropout"):
            need(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        need("label_drop", 0 <= self.label_drop <= 1, "from 0 to 1")
        need("warmup_steps", self.warmup_steps >= 0, "0 or more")
        need("guidance", math.isfinite(self.guidance), "a finite number")
        need("channels", self.channels in (1, 3), "1 or 3")
        need("unet_channels", self.unet_channels % 8 == 0, "a multiple of 8, for the group norms")
        need("unet_dim_mults", len(self.unet_dim_mults) and min(self.unet_dim_mults) >= 1, "one or more whole numbers from 1")
        need("task", parts(self.task), "")
        need("paired_path", ("paired" in parts(self.task)) == (self.paired_path is not None), "a folder for the task paired, None for the others")
        self.damage.check(self.task, self.image_size)
        need("solver", self.solver == "auto" or self.solver in ode_int.SOLVERS, "auto, " + ", ".join(ode_int.SOLVERS))
        if self.solver != "auto" and not hasattr(self.recipe, "velocity"):
            raise ValueError(f"solver = {self.solver!r}: {self.method} has no ODE; allowed is auto")
        if self.sampler == "dopri5" and self.sample_steps is not None:
            raise ValueError(f"sample_steps = {self.sample_steps}: dopri5 chooses its own steps; add --solver midpoint, or leave sample_steps out")
        pick_device(self)
        if hasattr(self.recipe, "check"):
            self.recipe.check()


COMPILE_FROM = 20_000  # steps: benchmarks/README.md has what compiling takes and saves
MAX_SKIPPED = 20  # gradients in a row that are not finite before the run gives up


def reseed(*key):
    """All randomness after this is a function of `key`. Hashed, since torch's CPU generator keeps 32 bits of a seed only."""
    torch.manual_seed(random.Random(repr(key)).getrandbits(63))


def draw(config: Config, net, batch: Batch, trace: list | None = None) -> tuple[Tensor, Tensor]:
    """Samples (B, C, H, W) of the method, and the states they started from. `trace`: see ode_int.solve."""
    method = config.recipe
    if config.sampler == "own":
        frames = FirstFrame() if trace is None else trace
        sample = method.sample(net, batch, config.sample_steps, frames)
        return sample, frames[0][1]
    ode = method.velocity(net, batch)
    tolerances = config.integration_atol, config.integration_rtol
    return ode_int.solve(ode, config.sampler, config.sample_steps, *tolerances, trace), ode.view(torch.tensor(ode.t0), ode.z)


class FirstFrame(list):
    """A trace that keeps where the path starts, and nothing else."""

    def append(self, frame):
        if not self:
            super().append(frame)


def bf16_helps(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def set_up(device: torch.device, precision: str = "auto") -> str:
    """Makes `device` the current GPU, with TF32 for what remains float32; -> the precision of the activations, bf16 or fp32."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return precision if precision != "auto" else "bf16" if bf16_helps(device) else "fp32"


class Trainer:
    """A run: data, network, averaged network, optimizers, log and checkpoints. Raises ValueError or DatasetError before the first step."""

    def __init__(self, config: Config, checkpoint: dict | None = None):
        self.config, self.step, self.images_seen, self.saved = config, 0, 0, True
        self.signal, self.signalled, self.showing = 0, None, False  # the last signal, when it came, whether samples are being made
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(config)
        precision = set_up(self.device, config.precision)
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        if self.world > 1 and not dist.is_initialized():
            # the others wait for the first one while it reads the data set, and while it samples
            gpu = self.device if self.device.type == "cuda" else None
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=6), device_id=gpu)
        if config.batch_size % self.world:
            raise ValueError(f"batch_size = {config.batch_size}: allowed are multiples of the {self.world} processes it is shared by")

        if self.rank:
            dist.barrier()  # one process downloads, the others find it done
        self.images = load_images(config).to(self.device)
        if self.world > 1 and self.rank == 0:
            dist.barrier()
        compiled = config.compile
        if compiled == "auto":  # a method with levels, and a second network, would compile a graph for each
            compiled = "on" if config.steps >= COMPILE_FROM and not hasattr(config.recipe, "players") else "off"
        # chosen once: a resumed run takes the same
        self.config = config = replace(config, dataset=config.dataset or self.images.name, compile=compiled)
        self.num_classes = len(self.images.classes) if config.unet_use_classes else 0
        self.rehearse()
        reseed("weights", config.seed)
        net = make_unet(config, self.num_classes).to(self.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        method = config.recipe
        self.players = [(net, method.loss)]
        if hasattr(method, "players"):  # the network and a discriminator
            seen = cond_channels(config.task, config.channels, config.condition)
            self.players = method.players(net, config.channels, self.num_classes, seen)
        self.players = [(module.to(self.device), loss) for module, loss in self.players]
        self.net = net
        self.optimizers = [torch.optim.AdamW(module.parameters(), config.base_lr, weight_decay=0.0, fused=True) for module, _ in self.players]
        self.loss = torch.zeros(2, device=self.device)  # since the last report: sum, steps
        self.skipped = torch.zeros(2, device=self.device)  # steps whose gradient was not finite: in all, in a row

        wandb_id, self.folder = None, None
        if checkpoint:
            wandb_id, self.folder = checkpoint["wandb_id"], run_folder(config.resume)
            self.load(checkpoint)
            if self.step >= config.steps:
                raise ValueError(f"max_steps = {config.steps}: the run is at step {self.step} already; allowed is more than that")
        if self.rank == 0:
            self.folder = self.folder or new_folder(config)
            plain = json.dumps(asdict(config), indent=1)
            write_atomically(self.folder / "config.json", lambda f: f.write(plain.encode()))
            self.announce(precision)
            self.log = Log(config, self.folder, self.step, wandb_id)
        if config.compile == "on":
            self.compile()

    @torch.no_grad()
    def rehearse(self):
        """Samples one image with a network that always says 0, so that a setting no sampler takes is refused before the first step."""
        scale = getattr(self.config.recipe, "upscale", 1)
        one = Batch(*(None if x is None else x[:1] for x in vars(self.held_out()).values()))
        draw(self.config.quick, lambda x, *_: x.new_zeros(len(x), x.shape[1], x.shape[2] * scale, x.shape[3] * scale), one)

    def compile(self):
        """torch.compile of the network, tried on one batch: where that fails, for want of a C++ compiler say, the run goes on without."""
        if self.rank == 0:
            print("compiling the network, which takes minutes (--compile off leaves it out)")
        net, loss = self.players[0]
        net.compile(dynamic=False)
        try:
            with self.autocast():
                loss(net, self.batch(self.step)).mean().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # of many types
            net._compiled_call_impl = None
            warnings.warn(f"the network is not compiled ({one_line(failure)[:200]})")
        net.zero_grad()

    def announce(self, precision: str):
        c, n = self.config, self.images
        millions = [f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}M" for module, _ in self.players]
        chip = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"{c.method}, task {c.task}, on {n.name}: {len(n.train):,} training and {len(n.test):,} test images, "
              f"{c.image_size}x{c.image_size}, {self.num_classes or 'no'} classes")
        print(f"{' + '.join(millions)} parameters, {precision}, {chip}" + f" x {self.world}" * (self.world > 1))
        what = f"overfitting one batch of {c.batch_size}" if c.overfit else f"training on batches of {c.batch_size}"
        print(f"{what}, steps {self.step:,} to {c.steps:,}, in {self.folder}")

    # ------------------------------------------------------------------------------------------------------ training

    def batch(self, step: int) -> Batch:
        """This process's share of the step's batch, damaged; a function of (seed, step, rank)."""
        c = self.config
        index = data.batch_indices(len(self.images.train), c.batch_size, c.seed, 0 if c.overfit else step)[self.rank::self.world]
        z1, y, zlo = self.images.batch(index, self.device)
        reseed("train", c.seed, step, self.rank)
        if not c.overfit:
            flip = torch.rand(len(z1), 1, 1, 1, device=self.device) < 0.5
            z1, zlo = torch.where(flip, z1.flip(3), z1), zlo if zlo is None else torch.where(flip, zlo.flip(3), zlo)
        if not self.num_classes:
            y = None
        elif not c.overfit and c.label_drop:
            y = torch.where(torch.rand(len(y), device=self.device) < c.label_drop, self.num_classes, y)
        return c.damage(c.task, z1, y, c.condition, zlo)

    def train_step(self) -> Tensor:
        """One step of every player -> the network's loss, left on the device."""
        c = self.config
        batch = self.batch(self.step)
        rate = c.base_lr * min(1, (self.step + 1) / max(1, c.warmup_steps)) * c.lr_decay ** (self.step // 1000)
        losses = []
        for (module, loss), optimizer in zip(self.players, self.optimizers):
            optimizer.zero_grad()
            with self.autocast():
                value = loss(module, batch).mean()
            value.backward()
            parameters = [p for p in module.parameters() if p.grad is not None]
            if self.world > 1:
                average([p.grad for p in parameters])
            norm = torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip, foreach=True)
            # the fused optimizer skips the step where found_inf is 1: no look at the gradient from the host
            optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            losses.append(value.detach())
        skip = torch.stack([optimizer.found_inf for optimizer in self.optimizers]).amax()
        self.skipped = torch.stack([self.skipped[0], self.skipped[1] * skip]) + skip
        self.step, self.images_seen = self.step + 1, self.images_seen + c.batch_size
        decay = min(c.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():  # or the average would keep a graph of all its steps
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        return losses[0]

    def run(self) -> int:
        """Trains to the last step, or to SIGINT or SIGTERM; returns that signal's number, or 0."""
        c = self.config
        before = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=c.steps, initial=self.step, disable=None if self.rank == 0 else True, dynamic_ncols=True, unit="step")
        clock, counted = time.perf_counter(), self.step
        if self.step and self.step % c.sample_every == 0 and not (self.folder / "samples" / f"step_{self.step:06d}.png").exists():
            self.show(bar)  # the run was stopped before it could
        stop = 0
        while self.step < c.steps and not stop:
            loss = self.train_step()
            self.loss += torch.where(loss.isfinite(), torch.stack([loss, torch.ones_like(loss)]), 0)
            bar.update()
            if self.step % c.print_loss_every == 0 or self.step == c.steps:
                self.report(bar, self.step - counted, clock)
                clock, counted = time.perf_counter(), self.step
            if self.step == c.steps or self.step % c.sample_every == 0 and not self.signal:  # who is to leave draws on resume
                paused = time.perf_counter()
                self.show(bar)
                clock += time.perf_counter() - paused
            stop = self.asked_to_stop()
            if self.step % c.checkpoint_every == 0 or self.step == c.steps or stop:
                self.save()
        bar.close()
        if self.rank == 0:
            self.log.close()
        if self.world > 1:
            dist.barrier()  # nobody leaves while the first process writes
            dist.destroy_process_group()
        for number, handler in before.items():
            signal.signal(number, handler)
        return stop

    def on_signal(self, number, frame):
        """The first signal ends the run after this step, or cuts a sampling short; a second one ends it at once.

        What comes within a second counts as one: a scheduler may signal each process, and torchrun then does so again.
        """
        now, again, self.signal = time.monotonic(), self.signalled is not None, number
        if again and now - self.signalled < 1:
            return
        self.signalled = now
        if again or self.showing:
            raise KeyboardInterrupt
        tqdm.write(f"{signal.Signals(number).name}: saving and leaving after this step")

    def asked_to_stop(self) -> int:
        """The signal that ends the run now, or 0. Several processes, which it reaches in different steps, agree on it every few steps."""
        if self.world == 1:
            return self.signal
        if self.step % min(self.config.print_loss_every, 10):
            return 0
        asked = torch.tensor(self.signal, device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return int(asked)

    def report(self, bar, steps: int, clock: float):
        """The mean loss of the last `steps` steps, and their speed since `clock`: all that the host looks at, but for signals."""
        if self.world > 1:
            average([self.loss])
        (loss, count), (skipped, in_a_row) = self.loss.tolist(), self.skipped.tolist()
        images_per_second = self.config.batch_size * steps / (time.perf_counter() - clock)  # the device has done them by now
        loss = loss / count if count else None
        self.loss.zero_()
        if self.rank == 0:
            self.log(self.step, loss=loss, images_per_second=images_per_second, skipped_steps=skipped or None)
            line = ("no finite loss" if loss is None else f"loss {loss:.4f}") + f", {images_per_second:.0f} images/s"
            bar.set_postfix_str(line)
            if bar.disable:
                print(f"step {self.step:,}: {line}", flush=True)
        if in_a_row >= MAX_SKIPPED:
            self.save()  # its weights are finite: they are those of before
            raise FloatingPointError(
                f"the last {in_a_row:.0f} gradients were not finite and their steps were skipped: lower base_lr ({self.config.base_lr}), or go on in "
                f"full precision: --resume {self.folder} --precision fp32")

    # ------------------------------------------------------------------------------------------------------ pictures

    def held_out(self) -> Batch:
        """What samplings show: the overfitted batch, or test images; always the same ones, damaged the same way."""
        c = self.config
        n, size, split = (len(self.images.train), c.batch_size, "train") if c.overfit else (len(self.images.test), c.sample_count, "test")
        z1, y, zlo = self.images.batch(data.batch_indices(n, size, c.seed, 0)[:c.sample_count], self.device, split)
        reseed("show", c.seed)
        return c.damage(c.task, z1, y if self.num_classes else None, c.condition, zlo)

    @torch.no_grad()
    def show(self, bar):
        """Samples of the averaged network: their PSNR beside the input's, NFE, seconds, the four grids and the path they took."""
        if self.rank:
            return
        c, self.showing, start = self.config.quick, True, time.perf_counter()
        counted = ode_int.Counted(self.ema)
        net = Guided(counted, c.guidance)
        try:
            with self.autocast():
                batch = self.held_out()
                sample, z0 = draw(c, net, batch)
                numbers = dict(nfe=counted.rows / len(sample), seconds=time.perf_counter() - start)
                if parts(c.task) != ["generate"]:
                    numbers |= dict(psnr=psnr(sample, batch.z1), psnr_zlo=psnr(batch.zlo, batch.z1))
                trace, few = [], Batch(*(None if x is None else x[:4] for x in vars(batch).values()))
                draw(c, net, few, trace)
            pictures = dict(step=beside(*map(grid, (batch.zlo, z0, sample, batch.z1))), trace=strip(trace))
            self.log(self.step, pictures, **numbers)
            decibels = f"PSNR {numbers['psnr']:.2f} dB (input {numbers['psnr_zlo']:.2f} dB), " if "psnr" in numbers else ""
            tqdm.write(f"step {self.step:,}: {decibels}{numbers['nfe']:.0f} NFE, {numbers['seconds']:.1f} s for {len(sample)} images, "
                       f"{self.folder}/samples/step_{self.step:06d}.png")
        except (ode_int.SolverError, torch.OutOfMemoryError) as failure:
            reason = failure if isinstance(failure, ode_int.SolverError) else "out of GPU memory; lower sample_count"
            tqdm.write(f"warning: no samples at step {self.step:,}: {reason}", file=sys.stderr)
        except KeyboardInterrupt:
            tqdm.write(f"{signal.Signals(self.signal).name}: the sampling is cut short; saving and leaving")
        finally:
            self.showing = False

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def save(self):
        """checkpoints/last.pt, replaced atomically. Plain tensors and values: loads with weights_only=True.

        Data order and all noise are functions of (seed, step), so the step is their whole state.
        """
        if self.rank:
            return
        checkpoint = dict(
            step=self.step, images_seen=self.images_seen, config=asdict(self.config), classes=self.images.classes, num_classes=self.num_classes, wandb_id=self.log.id,
            ema=self.ema.state_dict(), players=[module.state_dict() for module, _ in self.players],
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers], loss=self.loss, skipped=self.skipped)
        path = self.folder / "checkpoints" / "last.pt"

        def write():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, lambda f: torch.save(checkpoint, f))
            return True

        self.saved = bool(self.log.guarded("the checkpoint", write))

    def load(self, checkpoint: dict):
        try:
            self.ema.load_state_dict(checkpoint["ema"])
            for (module, _), optimizer, weights, state in zip(self.players, self.optimizers, checkpoint["players"], checkpoint["optimizers"], strict=True):
                module.load_state_dict(weights)
                optimizer.load_state_dict(state)
        except (RuntimeError, ValueError) as failure:
            raise ValueError(f"resume = {self.config.resume!r}: its network is not the one these settings describe ({one_line(failure)[:200]} ...)")
        self.step = checkpoint["step"]
        self.images_seen = checkpoint.get("images_seen", self.step * checkpoint["config"]["batch_size"])
        self.loss, self.skipped = checkpoint["loss"].to(self.device), checkpoint["skipped"].to(self.device)


def average(tensors: list[Tensor]):
    """Mean over the processes, in place, in one message."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip((flat / dist.get_world_size()).split([t.numel() for t in tensors]), tensors)])


def pick_device(config: Config) -> torch.device:
    """The device that was named; of several GPUs this process's own. Raises ValueError."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"device = {name!r}: allowed is auto, cuda or cpu where several processes train, each on a GPU of its own")
    try:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as failure:
        there = f", and {torch.cuda.device_count()} GPUs, one for each process" if torch.cuda.is_available() else "; no CUDA device is to be seen"
        raise ValueError(f"device = {config.device!r}: allowed is auto, cpu{there} ({one_line(failure)[:100]})") from None
    return device


def make_unet(config: Config, num_classes: int) -> Unet:
    """The network that the method and task need; in float32."""
    c, upscale = config, getattr(config.recipe, "upscale", 1)
    seen = c.channels + cond_channels(c.task, c.channels, c.condition) * upscale**2
    return Unet(seen, c.channels, c.unet_channels, c.unet_dim_mults, num_classes, c.unet_blocks, c.unet_dropout, upscale, checkpointing=c.unet_checkpointing)


def load_images(config: Config) -> data.Images:
    """The data set; the demo, where none was named and CIFAR-10 can't be had, draws shapes instead and says so."""
    c = config
    arguments = (c.image_size, c.channels, c.data_path, c.paired_path, c.batch_size if c.overfit else None)
    try:
        return data.load(c.dataset or "cifar10", *arguments)
    except data.DatasetError as failure:
        if c.dataset or not c.overfit:
            raise
        print("*" * 100 + f"\n  No CIFAR-10: {failure}\n  This demo runs on drawn shapes instead; --dataset FOLDER takes your own images.\n" + "*" * 100)
        return data.load("shapes", *arguments)


def open_checkpoint(run: str | Path) -> tuple[Config, dict]:
    """A run's folder, or a checkpoint file -> its settings and its contents, on the CPU. Raises ValueError."""
    path = run_folder(run) / "checkpoints" / "last.pt" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise ValueError(f"run = {str(run)!r}: there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return from_plain(Config, checkpoint["config"]), checkpoint
    except Exception as failure:  # of many types, on a file that is something else
        raise ValueError(f"run = {str(run)!r}: {path} is not a checkpoint of this trainer ({one_line(failure)[:100]})")


def read_command_line(arguments: list[str]) -> tuple[Config, dict | None]:
    """The run's Config, and the checkpoint to go on from if --resume names one. Raises ValueError, exits after --help."""
    def given(flag):
        pairs = (a.split("=", 1) if "=" in a else (a, b) for a, b in zip(arguments, [*arguments[1:], ""]))
        return dict((a.replace("_", "-"), b) for a, b in pairs).get(flag)

    checkpoint, preset = None, given("--preset") or "auto"
    if run := given("--resume"):
        config, checkpoint = open_checkpoint(run)
        config = replace(config, resume=run)
    else:
        device = given("--device") or "auto"  # check() refuses what is none
        cpu = not torch.cuda.is_available() if device == "auto" else device == "cpu"
        name = preset if preset != "auto" else "small" if cpu else "cifar10-sr"
        if name not in PRESETS:
            raise ValueError(f"preset = {name!r}: allowed are auto, {', '.join(PRESETS)}")
        config = replace(Config(**PRESETS[name]), preset=name)
        if preset == "auto" and int(os.environ.get("RANK", 0)) == 0:
            print(f"preset {name}: " + ("no GPU here, so a small network; --preset cifar10-sr is the full one" if name == "small" else "the full network"))
    default = config
    config = parse(Config, arguments, __doc__, default)
    if config.overfit != default.overfit:  # a paper's step count and slow start are no demo's, and a demo's no full run's
        config = replace(config, max_steps=config.max_steps if given("--max-steps") else None,
                         warmup_steps=config.warmup_steps if given("--warmup-steps") or not config.overfit else 0)
    config.check()
    return config, checkpoint


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 broke off, 2 bad input, 130 or 143 stopped by a signal."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    trainer = None
    try:
        try:
            trainer = Trainer(*read_command_line(sys.argv[1:] if arguments is None else arguments))
        except (ValueError, data.DatasetError) as failure:
            print(f"trainer.py: {failure}", file=sys.stderr)
            return 2
        stopped = trainer.run()
    except FloatingPointError as failure:
        if trainer.rank == 0:
            print(f"trainer.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + (trainer and trainer.signal or signal.SIGINT)
    except torch.OutOfMemoryError:
        print("trainer.py: out of GPU memory; lower batch_size, sample_count or unet_channels", file=sys.stderr)
        return 1
    if trainer.rank == 0:
        again = f"go on with: python trainer.py --resume {trainer.folder}" + (f" --max-steps {2 * trainer.step}" if not stopped else "")
        print(again if trainer.saved else "trainer.py: the last checkpoint could not be written")
    return 128 + stopped if stopped else int(trainer.rank == 0 and not trainer.saved)


if __name__ == "__main__":
    sys.exit(main())
