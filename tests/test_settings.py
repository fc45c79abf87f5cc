"""What a setting may be: said beside its field, checked alike for flags, files and Python; and the papers' numbers."""
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from typing import Annotated, Literal

import pytest
import tyro

import compare
import evaluate
import sample
import trainer
from images import SettingsError
from images.corruptions import Damage
from methods.i2sb import I2SB
from support import bounds
from support.bounds import above, ascending, between, from_to_below, length, multiple_of, odd, one_of
from support.checkpoints import read_config
from support.command_line import parse
from support.settings import PRESETS
from trainer import Config


@dataclass
class Inner:
    std: Annotated[float, above(0, 50)] = 1.0


@dataclass
class Outer:
    run: tyro.conf.Positional[str]
    side: Annotated[int, between(8, 64), multiple_of(8)] = 32
    share: Annotated[float, from_to_below(0, 1)] = 0.5
    taps: Annotated[int, odd()] | None = None
    kind: Literal["box", 2] = "box"
    on: bool = True
    mults: Annotated[tuple[int, ...], between(1, 9), length(1, 3)] = (1, 2)
    span: Annotated[float | tuple[float, float], above(0), ascending()] = 1.0
    factor: Annotated[int | tuple[int, ...], one_of(2, 4), length(1)] = 2
    pair: tuple[int, float] | None = None
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize("name, value, allowed", [
    ("side", 72, "a whole number from 8 to 64, in multiples of 8"), ("side", 12, "a whole .* multiples of 8"),
    ("side", 8.0, "a whole"), ("side", True, "a whole"), ("side", None, "a whole"),
    pytest.param("side", 10**5000, "a whole", id="more digits than Python prints"),
    ("share", 1.0, "a finite number from 0 to below 1"), ("share", math.nan, "a finite"), ("share", -1e-9, "a finite"),
    ("share", 10**400, "a finite"), ("share", "0.5", "a finite"), ("share", [[]] * 999, "a finite"),
    ("taps", 4, "a whole number odd, or None"), ("taps", "None", "a whole"),
    ("kind", "bicubic", "box, 2"), ("kind", 2.0, "box, 2"), ("kind", [], "box, 2"), ("on", 1, "True or False"),
    ("mults", (), "whole numbers from 1 to 9, 1 to 3 of them"), ("mults", (1, 2, 3, 4), "whole"),
    ("mults", (1, 10), "whole"), ("mults", (1, 2.0), "whole"), ("mults", [1], "whole"), ("mults", 1, "whole"),
    ("span", (2.0, 1.0), "a finite number or 2 finite numbers above 0, the lower first"), ("span", (1.0,), "a finite"),
    ("span", (0.0, 1.0), "a finite"), ("span", math.inf, "a finite"),
    ("factor", (2, 3), "a whole number or whole numbers out of 2, 4, 1 or more of them"), ("factor", (), "a whole"),
    ("pair", (1, 2, 3), "a whole number and a finite number, or None"), ("pair", (0.5, 1.0), "a whole"),
    ("run", b"x", "a text"), ("inner", {}, "the settings of Inner"),
])
def test_a_wrong_value_is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(SettingsError, match=rf"\A{name} = [^\n]*: allowed is {allowed}[^\n]*\Z") as refused:
        bounds.check(replace(Outer("x"), **{name: value}))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("right", [
    {}, dict(side=64), dict(share=0), dict(taps=3), dict(kind=2), dict(mults=(9, 1, 1)), dict(span=(1, 1.0)),
    dict(factor=(4, 2)), dict(factor=4), dict(pair=(1, 2)), dict(inner=Inner(50.0))])
def test_right_values_pass(right):
    bounds.check(Outer("x", **right))


def test_dataclasses_within_are_checked_and_named():
    with pytest.raises(SettingsError, match=r"^damage\.inner\.std = -3: allowed is a finite number above 0, at .* 50$"):
        bounds.check(Outer("x", inner=Inner(-3)), "damage.")


def test_the_command_line_reads_what_has_bounds():
    """tyro passes over what it does not know: types, defaults and help are as without it."""
    o = parse(Outer, "x --side 13 --taps 3 --mults 4 5 --span 1 2 --factor 4 2 --inner.std -3".split(), "")
    assert o == Outer("x", 13, taps=3, mults=(4, 5), span=(1.0, 2.0), factor=(4, 2), inner=Inner(-3.0))


def numbers(kind, prefix=""):
    """Names of all fields whose type is a number, or may be one."""
    for name, hint in bounds.hints(kind).items():
        if is_dataclass(hint):
            yield from numbers(hint, f"{prefix}{name}.")
        elif bounds.fits(getattr(kind(), name), hint) and re.search("(whole|finite) number", bounds.words(hint)):
            yield prefix + name


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "1" + 400 * "0", "[]", "{}", '"1"', "true", "[[1]]"])
def test_no_number_of_a_run_takes_what_is_none(value):
    """A config in a file, damaged in one place, ends in one line that names the field."""
    for name in numbers(Config):
        plain = json.loads(json.dumps(asdict(Config())))
        inner, (*groups, knob) = plain, name.split(".")
        for group in groups:
            inner = inner[group]
        inner[knob] = json.loads(value)
        line = rf"\Arun = 'x': its settings can't be used: {name} = [^\n]*: allowed is [^\n]*\Z"
        with pytest.raises(SettingsError, match=line):
            read_config("x", plain, Config)


@pytest.mark.parametrize("name, flag, allowed", [
    ("i2sb.beta_max", "-1.0", "a finite number above 0, at most 1,000,000"),
    ("damage.quality", "0", "a whole number or 2 whole numbers from 1 to 100, the lower first"),
    ("unet_dim_mults", "1000000", "whole numbers from 1 to 64, 1 to 8 of them"),
    ("unet_channels", "12", "a whole number from 8 to 8,192, in multiples of 8"),
    ("lr_decay", "nan", "a finite number above 0, at most 1"),
])
def test_flags_files_and_python_are_told_the_same(capsys, name, flag, allowed):
    assert trainer.main(["--device", "cpu", "--" + name.replace("_", "-"), flag]) == 2
    line = capsys.readouterr().err.removeprefix("trainer.py: ").strip()
    assert re.fullmatch(rf"{re.escape(name)} = \(?{flag},?\)?: allowed is {re.escape(allowed)}", line)
    value = float(flag) if "." in flag or flag == "nan" else int(flag)
    value = (value,) if name == "unet_dim_mults" else value
    group, _, knob = name.rpartition(".")
    with pytest.raises(SettingsError, match=re.escape(line)):
        if group:
            {"i2sb": I2SB, "damage": Damage}[group](**{knob: value})
        Config(**{name: value}).check()
    plain = asdict(Config())
    (plain[group] if group else plain)[knob] = value
    with pytest.raises(SettingsError, match=re.escape(line)):
        read_config("x", plain, Config)


@pytest.mark.parametrize("kind, given", [
    (Config, {}), (sample.Options, dict(run="x", count=1)), (evaluate.Options, dict(runs=("x",))),
    (compare.Options, dict(methods=("sr3",)))])
def test_every_setting_as_it_comes_is_allowed(kind, given):
    kind(**given).check()
    assert set(bounds.hints(kind)) == {f.name for f in fields(kind)}


# What the papers say, written out by hand from them (I2SB section 5 and its published runs, EDM table 7 with F of the
# guided run, SR3 section 4 and appendix, UDPM section 5, the couplings paper's example code), not from PRESETS.
I2SB_RUNS = dict(method="i2sb", image_size=256, batch_size=256, base_lr=5e-5, lr_decay=0.99, ema_decay=0.99,
                 condition=False, overfit=False)
EDM_RUNS = {"method": "edm", "task": "generate", "batch_size": 512, "base_lr": 1e-3, "warmup_steps": 19_531,
            "ema_decay": 0.9993, "unet_dropout": 0.13, "edm.sigma_data": 0.5, "edm.P_mean": -1.2, "edm.P_std": 1.2,
            "edm.sigma_min": 0.002, "edm.sigma_max": 80.0, "edm.rho": 7.0}
UDPM_RUNS = {"method": "udpm", "task": "generate", "batch_size": 64, "base_lr": 1e-4, "warmup_steps": 5000,
             "max_steps": 600_000, "label_drop": 0.0, "udpm.alphas": (0.5, 0.2, 1e-3), "udpm.sigmas": (0.1, 0.2, 0.3),
             "udpm.l1_weight": (1, 1, 0), "udpm.lpips_weight": (4, 4, 0), "udpm.adv_weight": (0.2, 0.5, 1),
             "udpm.disc_noise": 0.4, "udpm.disc_noise_decay": 0.99}
SMOOTH = {"i2sb.beta_max": 0.3, "i2sb.ot_ode": False, "i2sb.n": 1000}
STRAIGHT = {"i2sb.beta_max": 1.0, "i2sb.ot_ode": True, "i2sb.n": 1000}
PAPERS = {
    "couplings": {"method": "interpolant", "max_steps": 1_000_000, "batch_size": 128, "base_lr": 2e-4,
                  "weight_decay": 0.01, "grad_clip": 10_000 / 3072, "ema_decay": 0.0, "label_drop": 0.0,
                  "interpolant.coupling": "dependent", "overfit": False, "sample_at_start": True, "sample_every": 100,
                  "print_loss_every": 20},
    "sr3-faces128": {"method": "sr3", "image_size": 128, "damage.factor": 8, "damage.down": "bicubic",
                     "damage.up": "bicubic", "batch_size": 256, "base_lr": 1e-4, "warmup_steps": 50_000,
                     "max_steps": 1_000_000, "unet_channels": 128, "unet_dim_mults": (1, 2, 4, 8, 8),
                     "unet_blocks": 4, "unet_dropout": 0.2, "sr3.T": 2000, "sr3.norm": "l1", "ema_decay": 0.9999},
    "i2sb-sr4-pool": I2SB_RUNS | SMOOTH | {"task": "sr", "damage.factor": 4, "damage.down": "box"},
    "i2sb-sr4-bicubic": I2SB_RUNS | SMOOTH | {"task": "sr", "damage.factor": 4, "damage.down": "bicubic"},
    "i2sb-jpeg5": I2SB_RUNS | SMOOTH | {"task": "jpeg", "damage.quality": 5},
    "i2sb-jpeg10": I2SB_RUNS | SMOOTH | {"task": "jpeg", "damage.quality": 10},
    "i2sb-blur-uniform": I2SB_RUNS | STRAIGHT | {"task": "blur", "damage.kernel": "uniform", "damage.width": 9},
    "i2sb-blur-gaussian": I2SB_RUNS | STRAIGHT | {
        "task": "blur", "damage.kernel": "gaussian", "damage.width": 5, "damage.sigma": 10.0},
    "i2sb-inpaint-center": I2SB_RUNS | STRAIGHT | {"task": "inpaint", "damage.mask": "center"},
    "i2sb-inpaint-freeform1020": I2SB_RUNS | STRAIGHT | {"task": "inpaint", "damage.mask": "freeform-10-20"},
    "i2sb-inpaint-freeform2030": I2SB_RUNS | STRAIGHT | {"task": "inpaint", "damage.mask": "freeform-20-30"},
    "i2sb-paired": I2SB_RUNS | SMOOTH | {"task": "paired", "condition": True},
    "edm-cifar10": EDM_RUNS | {"max_steps": 390_625, "label_drop": 0.0, "edm.sampler": "heun"},
    "edm-cifar10-guided": EDM_RUNS | {"label_drop": 0.1, "guidance": 2.5, "edm.sampler": "euler"},
    "udpm-cifar10": UDPM_RUNS | {"udpm.disc_dropout": 0.4, "udpm.grad_penalty": (0.025, 0.1, 0.4)},
    "udpm-ffhq64": UDPM_RUNS | {"image_size": 64, "udpm.disc_dropout": 0.2, "udpm.grad_penalty": (0.1, 0.4, 0.8)},
    "udpm-afhq64": UDPM_RUNS | {"image_size": 64, "unet_dropout": 0.1, "udpm.disc_dropout": 0.3,
                                "udpm.grad_penalty": (0.1, 0.4, 0.8)},
}


@pytest.mark.parametrize("name", PAPERS)
def test_presets_have_the_papers_numbers(name):
    config = Config(**PRESETS[name])
    assert {field: attrgetter(field)(config) for field in PAPERS[name]} == PAPERS[name]


@pytest.mark.parametrize("command, helps", [
    (trainer, ["{None}|INT training steps; None: 1,000", "STR whole recipe", "seed of the weights, the data order"]),
    (sample, ["seed of the noise", "number of images to make"]), (evaluate, ["seed of the damage and the noise"]),
    (compare, ["methods to train and measure now"])])
def test_help_begins_with_what_the_flag_is_and_no_title_runs_into_it(command, helps, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    said = " ".join(re.sub(r"[│ ]\n[│ ]|^[|│] | [|│]$", " ", capsys.readouterr().out, flags=re.M).split())
    assert all(help in said for help in helps), said
    for name in ("what is trained", "the data", "training", "the network", "sampling", "what is kept", "the machine"):
        assert f"---- {name}" not in said and f"{name.upper()}." not in said
