"""What a setting may be: said beside its field, checked alike for flags, files and Python; and the papers' numbers."""
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
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
