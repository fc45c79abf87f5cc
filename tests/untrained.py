"""Runs with random weights, which no one trained, and sample.py called on them."""
from dataclasses import asdict
from pathlib import Path

import torch

import sample
from methods.i2sb import I2SB
from methods.sr3 import SR3
from methods.udpm import UDPM
from support.model import make_unet
from trainer import Config

CLASSES = ["cat", "dog", "T-shirt/top"]

METHODS = dict(interpolant=dict(solver="heun", sample_steps=2), sr3=dict(sr3=SR3(T=3)), i2sb=dict(i2sb=I2SB(n=3)),
               edm=dict(sample_steps=2),
               udpm=dict(unet_channels=16, udpm=UDPM(lpips_weight=(0, 0, 0), disc_channels=8)))


def make_run(folder: Path, identity=False, **settings) -> str:
    """A run's folder with random weights, or one whose samples are the damaged images themselves.

    The latter is a bridge without noise whose network's output is 0.
    """
    settings = (
        dict(unet_channels=8, unet_dim_mults=(1, 2), unet_blocks=1, image_size=16, overfit=False, precision="fp32")
        | settings
    )
    if identity:
        settings |= dict(method="i2sb", i2sb=I2SB(n=2, ot_ode=True))
    config = Config(**settings)
    torch.manual_seed(3)
    num_classes = len(CLASSES) if config.unet_use_classes else 0
    averaged, raw = (make_unet(config, num_classes) for _ in range(2))
    if identity:
        for net in (averaged, raw):
            net.out.weight.data.zero_(), net.out.bias.data.zero_()
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(dict(config=asdict(config), step=2, classes=CLASSES, num_classes=num_classes, ema=averaged.state_dict(),
                    players=[raw.state_dict()]), folder / "checkpoints" / "last.pt")
    return str(folder)


def run(*arguments) -> int:
    return sample.main([str(a) for a in arguments])
