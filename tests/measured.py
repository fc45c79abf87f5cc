"""The data, settings and flags that the tests of evaluate.py share."""
import math

import torch

SIDE, TEST = 16, 42  # pixels, and test images
EXACT = 10 * math.log10(255**2 * 3 * SIDE**2)  # the PSNR of a perfect image: as if one value were off by a level
LOCAL = ("psnr", "consistency", "bias", "accuracy", "frechet")  # need no package and no download
SMALL = dict(image_size=16, unet_channels=8, unet_dim_mults=(1, 2), unet_blocks=1, device="cpu")
FLAGS = "--nfe 1 2 3 --count 12 --batch-size 5 --classifier-epochs 20 --device cpu --precision fp32".split()


def truth(batch):
    return batch.z1


def one_batch(config, classes, n=3):
    z1 = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return config.damage(config.task, z1, torch.arange(n) % classes if classes else None, config.condition)
