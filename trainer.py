"""Trains one UNet by one of several methods to make clean images from noise or damaged ones; shows what it learned.

    python trainer.py                    overfit one batch of CIFAR-10, 16x16 -> 32x32: a demo of minutes
    python trainer.py --no-overfit       the full run
    python trainer.py --help             every setting
"""
if __name__ == "__main__":
    from support.output import quiet_interrupt
    quiet_interrupt()

import copy
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

import ode_int
from images import SettingsError, data
from images.corruptions import Batch, Damage, Draws
from methods import Method
from methods.edm import EDM
from methods.flowmap import FlowMap
from methods.i2sb import I2SB
from methods.interpolant import Interpolant
from methods.regression import Regression
from methods.sr3 import SR3
from methods.udpm import UDPM
from support import checkpoints, command_line, machine, model, output, run_folder
from support.batches import Batches
from support.bounds import Count, NotNegative, Positive, Seed, above, between, from_to_below, length, multiple_of
from support.graph import Graphed
from support.health import Health
from support.run_folder import NoFolder, RunFolder
from support.settings import check

MAX_SKIPPED = 20  # gradients in a row that are not finite before the run gives up; fp16's scale is found by then


@dataclass
class Config:
    """Everything a run depends on. Sides are pixels, batch sizes are images over all GPUs."""
    # The comment beside or right above a field is its help; a title stands apart, with an empty line below it.

    # ---- what is trained

    # whole recipe that the other flags start from; auto: cifar10-sr on a GPU, small on a CPU
    preset: str = "auto"
    # way to make clean images; regression: the baseline
    method: Literal["interpolant", "sr3", "i2sb", "edm", "udpm", "flowmap", "regression"] = "interpolant"
    task: str = "sr"  # damage to undo: sr, inpaint, blur, noise, jpeg, chain, generate, paired, or a mixture: sr,jpeg
    overfit: bool = True  # training on one batch, which is also sampled: a quick demo; --no-overfit: the full run
    condition: bool = True  # sight of the damaged image, for the network

    # ---- the data

    # images: cifar10, fashion-mnist, celeba, demo (16 photographs), shapes, or the path of a folder. None: cifar10;
    # where that can't be downloaded, demo if overfit
    dataset: str | None = None
    data_path: str = "data"  # folder where downloaded data sets are kept
    paired_path: str | None = None  # task paired: the folder of damaged images with the names of the clean ones
    image_size: Annotated[int, between(1, data.MAX_SIDE)] = 32  # side of the clean images, pixels
    channels: Literal[1, 3] = 3  # channels of the images: 3 colour, 1 grey
    # part of an image that is used. center: its middle square, resized; random, for folders of photographs: squares of
    # image_size from anywhere in them, at their own resolution (test images: from the middle)
    crop: Literal["center", "random"] = "center"
    # mirroring of half the training images, left to right; not for what has a side, as digits and letters
    flip: bool = True

    # ---- training

    max_steps: Count | None = None  # training steps; None: 1,000 when overfitting, else 100,000
    batch_size: Annotated[int, between(1, data.MAX_BATCH)] = 128  # images per step, of all GPUs together
    # images that pass the network at once; a GPU adds up the gradients of its pieces. None: its whole share
    micro_batch: Count | None = None
    base_lr: Positive = 2e-4  # learning rate of AdamW
    weight_decay: NotNegative = 0.0  # weight decay of AdamW: a step shrinks the weights by the rate times this
    warmup_steps: Annotated[int, between(0, 10**12)] = 0  # steps over which the rate rises from 0
    lr_decay: Annotated[float, above(0, 1)] = 1.0  # factor on the rate every 1,000 steps
    # fall of the rate after the warm-up, to 0 at max_steps: by half a cosine, evenly, or none
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    grad_clip: Positive = 1.0  # largest norm of the gradient
    # decay of the averaged weights that sample, warmed up as (1 + n) / (10 + n) after n steps
    ema_decay: Annotated[float, from_to_below(0, 1)] = 0.9999
    # share of labels replaced by the null label, for guidance; 0 when overfitting, unless guidance is asked for
    label_drop: Annotated[float, between(0, 1)] = 0.1
    seed: Seed = 0  # seed of the weights, the data order and the noise

    # ---- the network

    unet_channels: Annotated[int, between(8, 8192), multiple_of(8)] = 128  # channels of its first level
    # channels of each level on the way up, in units of unet_channels; sides halve
    unet_dim_mults: Annotated[tuple[int, ...], between(1, 64), length(1, 8)] = (1, 2, 2, 2)
    unet_blocks: Annotated[int, between(1, 100)] = 2  # residual blocks per level
    unet_dropout: Annotated[float, from_to_below(0, 1)] = 0.0  # share of activations dropped in training
    unet_use_classes: bool = True  # class labels as an input, where the data has them
    unet_checkpointing: bool = False  # activation checkpointing: less than half the memory, a third more time

    # ---- sampling

    sample_every: Count | None = None  # steps between samplings; None: 500, and a tenth of a run of more than 5,000
    sample_at_start: bool = False  # sampling before the first step too
    sample_count: Annotated[int, between(1, data.MAX_BATCH)] = 32  # images per sampling
    sample_steps: Count | None = None  # steps of the sampler; None: the method's own count
    # solver of the method's ODE; auto: the method's own sampler (interpolant: dopri5)
    solver: Literal["auto", "dopri5", "euler", "midpoint", "heun", "rk4"] = "auto"
    integration_atol: Positive = 1e-5  # absolute tolerance of dopri5, in the images' units
    integration_rtol: Positive = 1e-5  # relative tolerance of dopri5
    guidance: float = 1.0  # classifier-free guidance: 0 ignores the label, 1 follows it, above 1 exaggerates it

    # ---- what is kept

    out_dir: str = "runs"  # folder in which each run makes its own
    # name of the run's folder; if it holds a checkpoint, the run goes on from there. None: method, task and time
    name: str | None = None
    init: str | None = None  # a run or an exported file whose averaged weights a new run begins with, where they fit
    resume: str | None = None  # a run's folder: go on from its checkpoint with its settings; other flags still override
    print_loss_every: Count = 50  # steps between logged losses
    checkpoint_every: Count = 500  # steps between checkpoints
    keep_every: Count | None = None  # steps between checkpoints that stay, as step_N.pt; None: the last two alone
    use_wandb: bool = True  # logging to Weights & Biases as well: online where an account is configured, else offline
    use_tensorboard: bool = False  # logging to TensorBoard as well, in the run's folder (pip install tensorboard)
    wandb_project: str = "couplings"  # project of wandb
    wandb_entity: str | None = None  # user or team of wandb; None: the account's default

    # ---- the machine

    device: str = "auto"  # device: auto (cuda if there is one), cuda, cuda:1 or cpu
    # precision of the activations; auto: bf16 where the chip computes in it, fp16 on other GPUs with tensor cores
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # torch.compile of the network, minutes at the start; auto: from 10,000 steps on, on a CPU up to 64 channels
    compile: Literal["auto", "on", "off"] = "auto"
    graph: bool = True  # training step as one CUDA graph, on a GPU: the same numbers, sooner; not for udpm

    damage: Damage = field(default_factory=Damage)
    interpolant: Interpolant = field(default_factory=Interpolant)
    sr3: SR3 = field(default_factory=SR3)
    i2sb: I2SB = field(default_factory=I2SB)
    edm: EDM = field(default_factory=EDM)
    udpm: UDPM = field(default_factory=UDPM)
    flowmap: FlowMap = field(default_factory=FlowMap)
    regression: Regression = field(default_factory=Regression)

    @property
    def chosen(self) -> Method:
        """The method in use."""
        return getattr(self, self.method)

    @property
    def sampler(self) -> str:
        """A solver of ode_int, or "own": the method's sampler."""
        return self.chosen.solver if self.solver == "auto" else self.solver

    @property
    def steps(self) -> int:
        return self.max_steps or (1000 if self.overfit else 100_000)

    @property
    def dropped(self) -> float:
        """The share of labels that training drops: none when overfitting, unless guidance needs it."""
        return self.label_drop if not self.overfit or self.guidance != 1 else 0.0

    @property
    def trains_null_label(self) -> bool:
        """Whether the network learns what an image without a label is, which guidance starts from."""
        return self.unet_use_classes and self.dropped > 0

    def pictures_due(self, step: int, sampled: int) -> bool:
        """Whether a state has pictures to be made, by its step and that of the last pictures."""
        return sampled < step and self.samples_at(step)

    def samples_at(self, step: int) -> bool:
        return step % (self.sample_every or max(500, self.steps // 10)) == 0 or step == self.steps

    def keeps_at(self, step: int) -> bool:
        """Whether that step's checkpoint stays."""
        return self.keep_every is not None and step % self.keep_every == 0

    def rate(self, step: int) -> float:
        """The learning rate of the step that comes after `step` ones."""
        warm = min(1, (step + 1) / max(1, self.warmup_steps))
        part = max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        fall = dict(constant=1, cosine=(1 + math.cos(math.pi * part)) / 2, linear=1 - part)[self.lr_schedule]
        return self.base_lr * warm * self.lr_decay ** (step // 1000) * fall

    def damaged(self, z1: Tensor, y: Tensor | None = None, zlo: Tensor | None = None,
                draws: Draws | None = None) -> Batch:
        """Clean images (B, C, H, W), their labels, and for `paired` the damaged ones -> Batch."""
        return self.damage(self.task, z1, y, self.condition, zlo, draws)

    def check(self):
        """Raises SettingsError, one line that names the field, its value and what is allowed."""
        check(self)


@dataclass
class Player:
    """A network in training: the one that samples, or another that the method trains beside it."""

    module: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]  # (module or shared, batch) -> (B,)
    shared: nn.Module  # the module as all processes train it together
    optimizer: torch.optim.Optimizer


class Trainer:
    """A run: data, networks, optimizers, log and checkpoints. Raises SettingsError before the first step."""

    def __init__(self, config: Config, folder: RunFolder | NoFolder | None = None):
        """folder: where a run goes on, or one of a given name begins; None: a new one."""
        self.step = self.images_seen = 0
        self.sampled = -1 if config.sample_at_start else 0  # the step of the last pictures
        self.saved = (0, 0)  # step and sampled of the last checkpoint
        self.signals = machine.Signals()
        self.rank, self.world = machine.processes()
        self.device = machine.pick_device(config.device)
        self.precision = machine.set_up(self.device, config.precision)
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        machine.join_processes(self.device)
        with machine.first_process_first():  # which downloads, if need be
            self.images = data.load(
                config.dataset, config.image_size, config.channels, config.data_path, config.paired_path,
                limit=config.batch_size if config.overfit else None, or_demo=config.overfit,
                crop=config.crop).to(self.device)
            chosen = config.chosen.settled()
        # what was left open is chosen once: a resumed run takes the same
        compiled = "on" if model.compiles(config) else "off"
        self.config = config = replace(config, dataset=config.dataset or self.images.name, compile=compiled,
                                       **{config.method: chosen})
        self.batches = Batches(config, self.images, self.device)
        self.batches.agree()
        self.num_classes = self.batches.num_classes
        self.z0 = model.start_states(config, self.batches.shown())

        begun = folder and folder.begun
        # the weights, their average and gradient, and the optimizer's two averages
        model.check_fits(config, self.num_classes, self.device, copies=5)
        machine.reseed("weights", config.seed)
        self.net = model.make_unet(config, self.num_classes).to(self.device, memory_format=torch.channels_last)
        if config.init is not None and not begun:
            model.start_from(self.net, checkpoints.open_run(config.init, Config), self.images.classes)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.players = [self.player(*each) for each in model.make_players(config, self.net, self.num_classes)]
        self.health = Health(self.device, usual_skips=MAX_SKIPPED if self.precision == "fp16" else 0)
        # of fp16's narrow range: the loss is scaled up, so that small gradients do not become 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.rate = torch.zeros((), device=self.device)
        # UDPM's batches have several shapes, and several processes exchange their gradients
        graphed = (config.graph and self.device.type == "cuda" and not config.chosen.levels and self.world == 1
                   and self.precision != "fp16")
        self.update = Graphed(self.update_players) if graphed else self.update_players
        if begun:
            self.load(begun)
        if self.world > 1:
            machine.agree(step=self.step, weights=machine.digest(self.ema.state_dict().values()))
        if folder is None:
            folder = NoFolder() if self.rank else RunFolder(run_folder.new_path(config))
        self.folder = folder
        folder.announce(config, self.images, self.num_classes, self.players, self.precision, self.device, self.step)
        folder.begin(config, self.images, self.step, again=config.pictures_due(self.step, self.sampled))
        if config.compile == "on":
            machine.print0("compiling the network, which takes minutes (--compile off leaves it out)")
            model.compile_network(config, self.net, self.players[0].loss, self.batches, self.precision)

    def player(self, module: nn.Module, loss: Callable) -> Player:
        c, shared = self.config, machine.data_parallel(module)
        optimizer = torch.optim.AdamW(module.parameters(), lr=c.base_lr, weight_decay=c.weight_decay, fused=True)
        return Player(module, loss, shared, optimizer)

    # ------------------------------------------------------------------------------------------------------ training

    def train_step(self):
        """One step of every player."""
        c = self.config
        pieces = self.batches(self.step)
        machine.reseed("dropout", c.seed, self.step, self.rank)
        rate = c.rate(self.step)
        if self.device.type == "cuda":
            rate = self.rate.fill_(rate)  # where a CUDA graph reads it
        for player in self.players:
            player.optimizer.param_groups[0].update(lr=rate, capturable=torch.is_tensor(rate))
        self.update(pieces)
        c.chosen.after_step([player.module for player in self.players])
        self.step += 1
        self.images_seen += c.batch_size
        decay = min(c.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():  # or the average would keep a graph of all its steps
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)

    def update_players(self, pieces: list[Batch]):
        """Gradients, clipping, AdamW. All on the device and in place: it may be captured as a CUDA graph."""
        losses, parts, norms = [], {}, []
        for player in self.players:
            player.optimizer.zero_grad()
            losses.append(self.gradients(player, pieces, parts))
            self.scaler.unscale_(player.optimizer)
            parameters = [p for p in player.module.parameters() if p.grad is not None]
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip, foreach=True))
            if not self.scaler.is_enabled():  # which does the same
                # the fused optimizer skips the step where found_inf is 1: no look at the gradient from the host
                player.optimizer.found_inf = (~norms[-1].isfinite()).float()
            self.scaler.step(player.optimizer)
        self.scaler.update()
        parts |= {type(player.module).__name__.lower(): loss for player, loss in zip(self.players[1:], losses[1:])}
        skip = (~torch.stack(norms).isfinite()).any().float()
        self.health.count(losses[0], norms[0], skip, parts)

    def gradients(self, player: Player, pieces: list[Batch], parts: dict[str, Tensor]) -> Tensor:
        """Adds up the gradients of the mean loss over the pieces -> that loss, on the device; its parts go to parts."""
        share, total = self.config.batch_size // self.world, torch.zeros((), device=self.device)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last else machine.no_sync(player.shared):
                with machine.autocast(self.device, self.precision):
                    value = player.loss(player.shared, piece).sum() / share
                self.scaler.scale(value).backward()
            total += value.detach()
            for name, part in piece.notes.items():
                parts[name] = parts.get(name, 0) + part.detach().sum() / share
            piece.notes.clear()
        return total

    def run(self) -> int:
        """Trains to the last step, or to a signal (see machine.Signals); returns that signal's number, or 0."""
        with self.signals:
            try:
                stopped = self.loop()
            finally:
                self.folder.close()
            machine.leave_processes()
        return stopped

    def loop(self) -> int:
        """Looks and saves before each step, so that what a signal prevented comes first when the run goes on."""
        c = self.config
        quiet = True if self.rank else None  # None: tqdm shows the bar on a terminal only
        bar = tqdm(total=c.steps, initial=self.step, disable=quiet, dynamic_ncols=True, unit="step")
        clock, counted = time.perf_counter(), self.step  # the images since are counted, but for the time of samplings
        while True:
            stopped = self.asked_to_stop()
            if c.pictures_due(self.step, self.sampled) and not stopped:
                clock += self.show()
                stopped = self.asked_to_stop()
            last = self.step == c.steps
            if last or stopped or c.keeps_at(self.step) or self.step % c.checkpoint_every == 0:
                if self.saved[0] < self.step:
                    self.health.share()
                if self.saved != (self.step, self.sampled):
                    self.save()
            elif self.folder.refused and self.step % c.print_loss_every == 0:
                self.save()
            if last or stopped:
                break
            self.train_step()
            bar.update()
            if self.step == c.steps or self.step % c.print_loss_every == 0:
                self.report(bar, self.step - counted, clock)
                clock, counted = time.perf_counter(), self.step
        bar.close()
        if stopped:
            machine.print0(f"{signal.Signals(stopped).name}: leaving after step {self.step:,}")
        return stopped

    def asked_to_stop(self) -> int:
        """The signal that ends the run now, or 0. Several processes agree on it every few steps."""
        if self.world == 1:
            return self.signals.number
        if self.config.samples_at(self.step) or self.step % min(self.config.print_loss_every, 10) == 0:
            return self.signals.agreed(self.device)
        return 0

    def report(self, bar, steps: int, clock: float):
        """The mean loss of the last `steps` steps, and their speed since `clock`. Only this waits for the GPU."""
        numbers, in_a_row = self.health.report()
        loss, rate = numbers["loss"], self.config.rate(self.step - 1)
        speed = self.config.batch_size * steps / (time.perf_counter() - clock)
        self.folder.log(self.step, **numbers, images_per_second=speed, learning_rate=rate)
        line = ("no finite loss" if loss is None else f"loss {loss:.4f}") + f", {speed:.3g} images/s"
        bar.set_postfix_str(line)
        if bar.disable:
            machine.print0(f"step {self.step:,}: {line}")
        if in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(f"the last {in_a_row} gradients were not finite and their steps were skipped: "
                                     f"{self.folder.advice(self.config.base_lr)}")

    # ------------------------------------------------------------------------------------------------------ pictures

    @torch.no_grad()
    def show(self) -> float:
        """Samples of the averaged network -> the seconds that they took. The first process makes them, the others wait
        in their next step."""
        began = time.perf_counter()
        try:
            if self.rank == 0:
                with self.signals.interruption(), machine.autocast(self.device, self.precision):
                    batch = self.batches.shown()
                    numbers, pictures = model.sample_for_pictures(self.config, self.ema, batch, self.z0)
                    if not self.config.overfit:
                        machine.reseed("held out", self.config.seed)
                        numbers["held_out_loss"] = self.players[0].loss(self.ema, batch).mean().item()
                self.folder.log(self.step, pictures, **numbers)
                self.folder.tell_pictures(self.step, len(batch.zlo), **numbers)
        except (ode_int.SolverError, MemoryError, RuntimeError) as failure:
            short = machine.is_out_of_memory(failure)
            if not short and not isinstance(failure, ode_int.SolverError):
                raise
            why = "out of memory; lower sample_count" if short else failure
            output.warn(f"no samples at step {self.step:,}: {why}")
        except KeyboardInterrupt:
            tqdm.write(f"{self.signals.name}: the sampling is cut short; saving and leaving")
            return time.perf_counter() - began
        self.sampled = self.step
        return time.perf_counter() - began

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def save(self):
        """checkpoints/last.pt. Data order and noise are functions of (seed, step), so the step is their whole state."""
        if self.rank == 0:
            state = dict(
                step=self.step, images_seen=self.images_seen, sampled=self.sampled, num_classes=self.num_classes,
                ema=self.ema.state_dict(), players=[player.module.state_dict() for player in self.players],
                optimizers=[player.optimizer.state_dict() for player in self.players],
                scaler=self.scaler.state_dict(), **self.health.state())
            if why := self.health.unfit(state):
                return self.folder.refuse(self.step, why, self.config.base_lr)
            self.folder.save(state, self.config.keeps_at(self.step))
        self.saved = (self.step, self.sampled)

    def load(self, begun: checkpoints.Run):
        """Raises SettingsError where the checkpoint is of another network, or there is nothing left to train."""
        c, state = self.config, begun.checkpoint
        if self.num_classes or begun.num_classes:
            checkpoints.refuse_other_classes(begun, self.images)
        checkpoints.restore(state, begun.path, self.ema, self.players)
        self.health.load(state, anew=not checkpoints.learns_the_same(begun.config, c))
        if state.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.images_seen = begun.step, begun.images_seen
        self.sampled = state.get("sampled", self.step)
        self.saved = (self.step, self.sampled)
        if self.step >= c.steps and not c.pictures_due(self.step, self.sampled):
            raise SettingsError(f"max_steps = {c.steps}: the run is at step {self.step} already; allowed is more")


def read_command_line(arguments: list[str]) -> tuple[Config, RunFolder | NoFolder | None]:
    """The run's settings, and its folder where it goes on or has a name. Raises SettingsError, exits after --help."""
    return command_line.read(arguments, Config, __doc__)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 broke off, 2 bad input, 129, 130 or 143 stopped by a signal."""
    output.unbreakable_output()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    trainer = folder = None
    try:
        config, folder = read_command_line(sys.argv[1:] if arguments is None else arguments)
        if folder and run_folder.is_done(folder.begun, config):  # a scheduler may start it once more
            machine.print0(f"{folder.path} is done: step {folder.begun.step:,} of {config.steps:,}")
            return 0
        trainer = Trainer(config, folder)
        folder = trainer.folder
        stopped = trainer.run()
    except (ValueError, ArithmeticError, MemoryError, RuntimeError) as failure:
        return machine.failed("trainer.py", failure, "lower batch_size, sample_count or unet_channels")
    except KeyboardInterrupt:
        number = trainer.signals.number if trainer else 0
        return 128 + (number or signal.SIGINT)
    finally:
        if folder:
            folder.close()
    if trainer.rank == 0 and not folder.wait():
        print("trainer.py: the last checkpoint could not be written", file=sys.stderr)
        return 128 + stopped if stopped else 1
    more = "" if stopped else f" --max-steps {2 * trainer.step}"
    if trainer.step:
        machine.print0(f"go on with: {folder.command}{more}")
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
