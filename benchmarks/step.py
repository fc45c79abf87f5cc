"""The training step alone, in each way to run the network."""
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

import ode_int
from images import data
from images.corruptions import Batch
from support.machine import bf16_helps, reseed
from support.model import make_unet
from trainer import Config


@dataclass(frozen=True)
class Variant:
    """A way to run the same network."""

    name: str
    bf16: bool = True
    channels_last: bool = True
    compile: bool = False


def variants(device: torch.device, compiled: bool = False) -> list[Variant]:
    """The plain one first, then what changes, one at a time."""
    fp32 = full_precision_name(device)
    result = [Variant(f"{fp32}, NCHW (plain)", bf16=False, channels_last=False)]
    result.append(Variant(f"{fp32}, channels_last", bf16=False))
    if bf16_helps(device):
        result += [Variant("bf16, NCHW", channels_last=False), Variant("bf16, channels_last")]
    last = result[-1]
    if compiled:
        result.append(replace(last, name=f"{last.name}, compiled", compile=True))
    return result


def full_precision_name(device: torch.device) -> str:
    return "TF32" if device.type == "cuda" else "fp32"


def unet(config: Config) -> torch.nn.Module:
    return make_unet(config, len(data.SHAPES) if config.unet_use_classes else 0)


def one_batch(config: Config, device: torch.device, count: int | None = None) -> Batch:
    """`count` images, or as many as the config has in a batch; no more than 64 of them differ."""
    images = data.load("shapes", config.image_size, config.channels, limit=64)
    z1, y, _ = images.batch(torch.arange(count or config.batch_size) % len(images.train), device)
    return config.damaged(z1, y if config.unet_use_classes else None)


def make_step(config: Config, variant: Variant, batch: Batch) -> Callable[[], torch.Tensor]:
    """Forward, backward, clipping and AdamW on a batch that stays where it is: nothing but the network's own cost.

    -> a call that makes a step and returns its loss.
    """
    device = batch.zlo.device
    reseed("weights", config.seed)
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    net = unet(config).to(device, memory_format=layout)
    if variant.compile:
        net.compile(dynamic=False)
    optimizer = torch.optim.AdamW(net.parameters(), config.base_lr, weight_decay=0.0, fused=True)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=variant.bf16):
            loss = config.chosen.loss(net, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip, foreach=True)
        optimizer.step()
        return loss

    return step


def flops_per_image(config: Config, device: torch.device) -> int:
    """Of the network, forward and backward; a multiplication and an addition count as two."""
    net, batch = unet(config).to(device), one_batch(config, device, 1)
    with FlopCounterMode(display=False) as counter:
        config.chosen.loss(net, batch).mean().backward()
    return counter.get_total_flops()


def matmul(device: torch.device, kind: str, side: int) -> Callable[[], object]:
    """A product of two square matrices in bf16, fp32 or TF32, which is allowed everywhere but in fp32."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)

    def product():
        with ode_int.full_precision(device.type) if kind == "fp32" else contextlib.nullcontext():
            return a @ b

    return product
