"""The command line of trainer.py, and of all other commands: flags into dataclasses, by tyro."""
import io
import re
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from itertools import dropwhile, takewhile

import torch
import tyro

from images import SettingsError
from support.checkpoints import has_checkpoint, named_folder, open_run, refuse_another_network
from support.machine import check_environment, processes
from support.settings import PRESETS


@dataclass
class FirstLook:
    """The flags that decide what the others start from."""

    preset: str = "auto"
    resume: str | None = None
    name: str | None = None
    out_dir: str = "runs"
    device: str = "auto"
    max_steps: int | None = None
    warmup_steps: int | None = None


def first_look(arguments: list[str]) -> FirstLook:
    """Those of the command line; `parse` reads it in full, and tells what is wrong with it."""
    try:
        with redirect_stderr(io.StringIO()):
            return tyro.cli(FirstLook, args=arguments, return_unknown_args=True, add_help=False)[0]
    except SystemExit:
        return FirstLook()


def preset(name: str, device: str) -> dict:
    """What that recipe changes of Config's defaults; auto: the one that the device is up to. Raises SettingsError."""
    if name == "auto":
        cpu = device == "cpu" or device == "auto" and not torch.cuda.is_available()
        name = "small" if cpu else "cifar10-sr"
        if processes()[0] == 0:
            why = "no GPU used, so a small network; --preset cifar10-sr is the full one" if cpu else "the full network"
            print(f"preset {name}: {why}")
    if name not in PRESETS:
        raise SettingsError(f"preset = {name!r}: allowed are auto, {', '.join(PRESETS)}")
    return PRESETS[name] | dict(preset=name)


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and those behind -- for another one."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:cut], arguments[cut + 1:]


def parse(kind, arguments: list[str], description: str, default=None):
    """The dataclass `kind` from the command line, by tyro. Raises SettingsError, in one line; exits after --help."""
    check_environment()
    with redirect_stderr(io.StringIO()) as errors:
        try:
            how = {} if default is None else dict(default=default)
            return tyro.cli(kind, args=arguments, description=description, **how)
        except SystemExit as end:
            if not end.code:
                raise
    # the first paragraph of tyro's box, whose frame is drawn in ASCII where the terminal knows no better
    lines = (line.strip("│| ").strip("─-") for line in errors.getvalue().splitlines()[1:])
    text = " ".join(takewhile(bool, dropwhile(lambda line: not line, lines)))
    raise SettingsError(re.sub(r"^Error parsing [\w.]+: ", "", text))  # our own messages name the field


def read(arguments: list[str], config_class, description: str) -> tuple:
    """The run's trainer.Config, and the checkpoint that --resume or --name goes on from, or None.

    Raises SettingsError; exits after --help.
    """
    first, run = first_look(arguments), None
    resume = first.resume
    if resume == "":
        raise SettingsError("resume = '': allowed is a run's folder")
    if first.name is not None:
        if resume is not None:
            raise SettingsError("of --name and --resume one is allowed: --name goes on by itself")
        folder = named_folder(first.out_dir, first.name)
        resume = str(folder) if has_checkpoint(folder) else None
    if resume is not None:
        run = open_run(resume, config_class)
        start = replace(run.config, resume=resume)
    else:
        start = config_class(**preset(first.preset, first.device))
    config = parse(config_class, arguments, f"{description}\nPresets: {', '.join(PRESETS)}", start)
    if run:
        refuse_another_network(run.config, config)
    if config.overfit != start.overfit:  # a paper's step count and slow start are no demo's, and a demo's no full run's
        config = replace(config, max_steps=first.max_steps)
        if config.overfit:
            config = replace(config, warmup_steps=first.warmup_steps or 0)
    config.check()
    config.chosen.check(config.task, config.condition)
    return config, run.checkpoint if run else None
