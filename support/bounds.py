"""What a setting may be, said beside its field, and the walker that checks it: for flags, files and Python alike.

    beta_max: Annotated[float, above(0)] = 0.3
    quality: Annotated[int | tuple[int, int], between(1, 100), ascending()] = 10

A leaf module: of ours it imports images/__init__ alone, so that images and methods may import it.
"""
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from images import SettingsError


@dataclass(frozen=True)
class Bound:
    """Which values of its type a field may have: `allows` says it of a value, `words` to the user."""

    allows: Callable[[object], bool]
    words: str
    each: bool = True  # of a tuple's entries, one by one; False: of the tuple itself

    def holds(self, value) -> bool:
        entries = value if self.each and isinstance(value, tuple) else [value]
        return all(self.allows(entry) for entry in entries)


def between(low, high) -> Bound:
    return Bound(lambda x: low <= x <= high, f"from {low:,} to {high:,}")


def above(low, high=sys.float_info.max) -> Bound:
    """Above `low`, up to `high`."""
    most = "" if high == sys.float_info.max else f", at most {high:,}"
    return Bound(lambda x: low < x <= high, f"above {low:,}{most}")


def at_least(low) -> Bound:
    return Bound(lambda x: x >= low, f"from {low:,}")


def from_to_below(low, high) -> Bound:
    return Bound(lambda x: low <= x < high, f"from {low:,} to below {high:,}")


def multiple_of(number) -> Bound:
    return Bound(lambda x: x % number == 0, f"in multiples of {number}")


def odd() -> Bound:
    return Bound(lambda x: x % 2 == 1, "odd")


def one_of(*choices) -> Bound:
    """Of numbers; names are better said by Literal, of which the command line's help knows."""
    return Bound(lambda x: x in choices, f"out of {', '.join(map(str, choices))}")


def length(low, high=sys.maxsize) -> Bound:
    """How many entries a tuple has."""
    most = "or more" if high == sys.maxsize else f"to {high}"
    return Bound(lambda x: not isinstance(x, tuple) or low <= len(x) <= high, f"{low} {most} of them", each=False)


def ascending() -> Bound:
    """Of a tuple: no entry is lower than the one before it."""
    return Bound(lambda x: not isinstance(x, tuple) or list(x) == sorted(x), "the lower first", each=False)


Count = Annotated[int, between(1, 10**12)]
Seed = Annotated[int, between(0, 2**63 - 1)]
Positive = Annotated[float, above(0)]
NotNegative = Annotated[float, at_least(0)]


def check(instance, prefix: str = ""):
    """Raises SettingsError, one line, for the first field of a dataclass whose value is not of its type and bounds:
    it names the field behind `prefix`, the value and what is allowed. Dataclasses within it are checked as well."""
    for name, hint in hints(type(instance)).items():
        value = getattr(instance, name)
        if is_dataclass(hint):
            require(instance, name, isinstance(value, hint), f"the settings of {hint.__name__}", prefix)
            check(value, f"{prefix}{name}.")
        else:
            require(instance, name, fits(value, hint), words(hint), prefix)


def require(instance, name: str, good, allowed: str, prefix: str = ""):
    """Raises SettingsError, one line with the field's name, its value and what is allowed, unless `good`."""
    if not good:
        raise SettingsError(f"{prefix}{name} = {shown(getattr(instance, name))}: allowed is {allowed}")


@cache
def hints(kind) -> dict:
    """The fields of a dataclass by name, with what they are annotated with."""
    found = get_type_hints(kind, include_extras=True)
    return {field.name: found[field.name] for field in fields(kind)}


def fits(value, hint) -> bool:
    """Whether a value has the type that a field is annotated with, and is within its bounds. Floats are finite."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return fits(value, arguments[0]) and all(bound.holds(value) for bound in bounds_of(hint))
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if kind is tuple:  # tuple[X, ...], or one type for each entry
        if not isinstance(value, tuple):
            return False
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if kind is list:
        return isinstance(value, list) and all(fits(entry, arguments[0]) for entry in value)
    if kind is dict:
        return isinstance(value, dict) and all(
            fits(key, arguments[0]) and fits(entry, arguments[1]) for key, entry in value.items())
    if arguments:  # a union
        return any(fits(value, each) for each in arguments)
    if hint is float:  # a whole number will do, if a float can hold it; NaN compares as false
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if hint is str:  # a path with a zero byte is refused by the system, as a fault of the program
        return type(value) is str and "\0" not in value
    if hint in (int, bool):  # True is an int as well
        return type(value) is hint
    return isinstance(value, hint)


def bounds_of(hint) -> list[Bound]:
    return [bound for bound in hint.__metadata__ if isinstance(bound, Bound)]  # tyro's own marks stand there too


WORDS = {int: ("a whole number", "whole numbers"), float: ("a finite number", "finite numbers"),
         str: ("a text", "texts"), bool: ("True or False", "True or False, several"), type(None): ("None", "None")}


def words(hint, several: bool = False) -> str:
    """What a field's annotation allows, in words."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return f"{words(arguments[0], several)} {', '.join(bound.words for bound in bounds_of(hint))}".strip()
    if kind is Literal:
        return ("some of " if several else "") + ", ".join(map(str, arguments))
    if kind is tuple:
        if arguments[-1] is Ellipsis:
            return words(arguments[0], several=True)
        if len(set(arguments)) == 1:
            return f"{len(arguments)} {words(arguments[0], several=True)}"
        return " and ".join(map(words, arguments))
    if kind in (list, dict):
        name = f"{kind.__name__}s" if several else f"a {kind.__name__}"
        return f"{name} of {words(arguments[-1], several=True)}"
    if arguments:
        *others, last = (words(each, several) for each in arguments)
        return f"{' or '.join(others)}{', or ' if last == 'None' else ' or '}{last}"
    return WORDS[hint][several] if hint in WORDS else hint.__name__


def shown(value) -> str:
    """A value as the line tells it, shortened: a file may hold any."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # whole numbers of more than 4,300 digits, lists in lists in lists ...
        text = "a value too long to be shown"
    text = text.replace("\n", " ")  # as tensors are shown
    return text if len(text) <= 200 else text[:200] + " ..."
