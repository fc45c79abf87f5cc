"""PRESETS, whole recipes on this project's UNet; settings from plain dicts, and what is allowed of them."""
import warnings
from dataclasses import fields, is_dataclass
from functools import partial

from images import SettingsError
from images.corruptions import Damage, task_names
from methods.edm import EDM
from methods.i2sb import I2SB
from methods.regression import Regression
from methods.sr3 import SR3
from methods.udpm import PAPER_LPIPS, UDPM
from support import bounds

# two CPU cores, a few minutes
SMALL = dict(unet_channels=32, unet_blocks=1, batch_size=16, base_lr=1e-3, max_steps=600,
             sample_every=300, sample_count=16)

# I2SB section 5: ImageNet at 256, ADM's network (the paper starts from its weights), without the damaged image as input
I2SB_256 = dict(method="i2sb", dataset="data/imagenet", image_size=256, condition=False, overfit=False, batch_size=256,
                base_lr=5e-5, lr_decay=0.99, ema_decay=0.99, max_steps=1_000_000, unet_channels=256,
                unet_dim_mults=(1, 1, 2, 2, 4, 4), unet_use_classes=False)
OT = I2SB(beta_max=1.0, ot_ode=True)

# EDM table 7: CIFAR-10 sees 200 M images, the rate rises over 10 M, the average's half-life is 0.5 M
EDM_CIFAR = dict(method="edm", task="generate", overfit=False, batch_size=512, base_lr=1e-3, warmup_steps=19_531,
                 max_steps=390_625, ema_decay=0.9993, unet_dim_mults=(2, 2, 2), unet_blocks=4, unet_dropout=0.13)

# UDPM: 600,000 steps, every label shown; level 3 of a 32x32 image works at 4x4, hence no more than three levels in the
# network. lpips_weight is written out: a paper's recipe is refused where LPIPS is missing
UDPM_CIFAR = dict(method="udpm", task="generate", overfit=False, batch_size=64, base_lr=1e-4, warmup_steps=5000,
                  max_steps=600_000, label_drop=0.0, unet_dim_mults=(2, 2, 2), unet_blocks=4,
                  udpm=UDPM(lpips_weight=PAPER_LPIPS))
UDPM_64 = UDPM_CIFAR | dict(image_size=64, unet_dim_mults=(1, 2, 2, 2), unet_use_classes=False)

PRESETS = {  # name: what differs from Config's defaults
    "cifar10-sr": dict(),
    # the published run of the couplings paper's example code; its gradient is of the sum over an image's values
    "couplings": dict(overfit=False, max_steps=1_000_000, weight_decay=0.01, grad_clip=10_000 / (3 * 32 * 32),
                      label_drop=0.0, ema_decay=0.0, print_loss_every=20, sample_every=100, sample_at_start=True),
    "small": SMALL,
    "small-sr3": SMALL | dict(method="sr3", damage=Damage(up="bicubic")),
    "small-i2sb": SMALL | dict(method="i2sb"),
    "small-edm": SMALL | dict(method="edm", task="generate"),
    # L1 at the coarsest level too, which the paper leaves to the discriminator: it settles within the demo
    "small-udpm": SMALL | dict(
        method="udpm", task="generate", unet_dim_mults=(2, 2, 2), max_steps=1000, sample_every=500,
        udpm=UDPM(l1_weight=(1, 1, 1), lpips_weight=(0, 0, 0), disc_channels=32)),
    # photographs at their own resolution, told nothing of which damage it was: models/photos.safetensors
    "photos": dict(
        method="regression", regression=Regression(error="log"), task="sr,jpeg,blur,noise,chain,chain,chain",
        damage=Damage(factor=(4, 2), down="bicubic", up="bicubic", quality=(10, 95), kernel="gaussian", taps=15,
                      sigma=(0.5, 2.5), std=(0.5, 15.0)),
        dataset="data/photos", crop="random", image_size=80, overfit=False, unet_channels=32,
        unet_dim_mults=(1, 2, 4, 4), unet_blocks=1, unet_use_classes=False, batch_size=16, base_lr=1e-3,
        lr_schedule="cosine", ema_decay=0.999, max_steps=60_000, sample_every=5000),
    "sr3-faces128": dict(
        method="sr3", dataset="data/celeba-hq", image_size=128, damage=Damage(factor=8, down="bicubic", up="bicubic"),
        overfit=False, batch_size=256, base_lr=1e-4, warmup_steps=50_000, max_steps=1_000_000, unet_channels=128,
        unet_dim_mults=(1, 2, 4, 8, 8), unet_blocks=4, unet_dropout=0.2, unet_use_classes=False, sr3=SR3()),
    "i2sb-sr4-pool": I2SB_256 | dict(damage=Damage(factor=4)),
    "i2sb-sr4-bicubic": I2SB_256 | dict(damage=Damage(factor=4, down="bicubic")),
    "i2sb-jpeg5": I2SB_256 | dict(task="jpeg", damage=Damage(quality=5)),
    "i2sb-jpeg10": I2SB_256 | dict(task="jpeg", damage=Damage(quality=10)),
    "i2sb-blur-uniform": I2SB_256 | dict(task="blur", i2sb=OT),
    "i2sb-blur-gaussian": I2SB_256 | dict(task="blur", damage=Damage(kernel="gaussian"), i2sb=OT),
    "i2sb-inpaint-center": I2SB_256 | dict(task="inpaint", i2sb=OT),
    "i2sb-inpaint-freeform1020": I2SB_256 | dict(task="inpaint", damage=Damage(mask="freeform-10-20"), i2sb=OT),
    "i2sb-inpaint-freeform2030": I2SB_256 | dict(task="inpaint", damage=Damage(mask="freeform-20-30"), i2sb=OT),
    "i2sb-paired": I2SB_256 | dict(task="paired", dataset="data/clean", paired_path="data/damaged", condition=True),
    "edm-cifar10": EDM_CIFAR | dict(label_drop=0.0),
    "edm-cifar10-guided": EDM_CIFAR | dict(guidance=2.5, edm=EDM(sampler="euler")),
    "edm-fashion-mnist": EDM_CIFAR | dict(
        dataset="fashion-mnist", channels=1, max_steps=50_000, unet_channels=64, unet_blocks=2),
    "edm-celeba": EDM_CIFAR | dict(
        dataset="celeba", image_size=64, unet_dim_mults=(1, 2, 2, 2), unet_blocks=2, unet_use_classes=False),
    "udpm-cifar10": UDPM_CIFAR,
    "udpm-ffhq64": UDPM_64 | dict(
        dataset="data/ffhq64", udpm=UDPM(lpips_weight=PAPER_LPIPS, disc_dropout=0.2, grad_penalty=(0.1, 0.4, 0.8))),
    "udpm-afhq64": UDPM_64 | dict(
        dataset="data/afhqv2", unet_dropout=0.1,
        udpm=UDPM(lpips_weight=PAPER_LPIPS, disc_dropout=0.3, grad_penalty=(0.1, 0.4, 0.8))),
}

# fields of Config that say where a run is, how long it takes, what it shows and on what machine, not what it learns
INCIDENTAL = (
    "preset", "max_steps", "out_dir", "name", "resume", "data_path", "sample_every", "sample_at_start", "sample_count",
    "sample_steps", "solver", "print_loss_every", "checkpoint_every", "keep_every", "use_wandb", "use_tensorboard",
    "wandb_project", "wandb_entity", "device", "compile", "graph", "micro_batch")


def from_plain(kind, plain: dict):
    """A dataclass from the plain dict that asdict made. Keys of another version are dropped, with a warning.

    Raises SettingsError for what is no dict, and for what a method or Damage does not take; `check` looks at the rest.
    """
    if not isinstance(plain, dict):
        raise SettingsError(f"{bounds.shown(plain)} is given for {kind.__name__}: allowed is its fields by name")
    known = {f.name: f for f in fields(kind)}
    if unknown := set(plain) - set(known):
        warnings.warn(f"settings of another version are ignored: {', '.join(sorted(map(str, unknown)))[:200]}")
    values = {}
    for name in set(plain) & set(known):
        value, default = plain[name], known[name].default_factory
        if is_dataclass(default):
            value = from_plain(default, value)
        values[name] = tuple(value) if isinstance(value, list) else value  # JSON knows no tuples
    return kind(**values)


def check(c):
    """Raises SettingsError, one line that names the field of a trainer.Config, its value and what is allowed."""
    bounds.check(c)
    need = partial(bounds.require, c)
    need("preset", c.preset in PRESETS or c.preset == "auto", "auto, " + ", ".join(PRESETS))
    tasks = task_names(c.task)
    paired = c.paired_path is not None
    need("paired_path", ("paired" in tasks) == paired, "a folder for the task paired, None for the others")
    c.damage.check(c.task, c.image_size)
    if c.solver != "auto" and not c.chosen.has_ode:
        raise SettingsError(f"solver = {c.solver!r}: {c.method} {c.chosen.no_ode}; allowed is auto")
    if c.sampler == "dopri5" and c.sample_steps is not None:
        raise SettingsError(f"sample_steps = {c.sample_steps}: dopri5 chooses its own steps; "
                            "add --solver midpoint, or leave sample_steps out")
    if c.guidance != 1 and not c.chosen.guided:
        raise SettingsError(f"guidance = {c.guidance}: allowed is 1 for {c.method}")
    if c.guidance != 1 and not c.trains_null_label:
        raise SettingsError(f"guidance = {c.guidance}: allowed is 1 where no label is dropped in training; "
                            "--label-drop 0.1 drops a tenth of them")
