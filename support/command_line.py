"""The command line of trainer.py, and of all other commands: flags into dataclasses, by tyro."""
import io
import re
import shlex
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from itertools import dropwhile, takewhile
from pathlib import Path

import torch
import tyro

from images import SettingsError
from support import run_folder
from support.checkpoints import EXPORTED, open_run, refuse_fixed
from support.machine import check_environment, print0, processes
from support.settings import PRESETS


@dataclass
class FirstLook:
    """The flags that decide what the others start from."""

    preset: str = "auto"
    resume: str | None = None
    name: str | None = None
    out_dir: str | None = None
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
        why = "no GPU used, so a small network; --preset cifar10-sr is the full one" if cpu else "the full network"
        print0(f"preset {name}: {why}")
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


def open_folder(first: FirstLook, config_class):
    """Where the run goes on, locked, with what it goes on from; None: a folder that is yet to be named.

    run_folder.py has the rules. Raises SettingsError.
    """
    if first.name is None and first.resume is None:
        return None
    if first.resume == "":
        raise SettingsError("resume = '': allowed is a run's folder")
    if first.resume and Path(first.resume).suffix == EXPORTED:
        raise SettingsError(f"resume = {first.resume!r}: an exported file holds no optimizer to go on with; "
                            f"a new run begins with its weights by --init {shlex.quote(first.resume)}")
    if first.name is not None:
        path = run_folder.named_path(first.out_dir or config_class.out_dir, first.name)
    else:
        path = run_folder.resumed_path(first.resume)
        if first.out_dir is not None and Path(first.out_dir).resolve() != path.resolve().parent:
            raise SettingsError(f"out_dir = {first.out_dir!r}: the run goes on in {path}; add --name NEW for a new one")
    folder = run_folder.RunFolder(path) if processes()[0] == 0 else run_folder.NoFolder(path)
    there = run_folder.has_checkpoint(path)
    if there and first.name and first.resume:
        raise SettingsError(f"name = {first.name!r}: there is a run of this name, which goes on without --resume")
    if there or first.resume:
        folder.begun = open_run(first.resume or path, config_class)
        if not there:  # a branch: the other run keeps its damaged files, and its place on wandb
            folder.begun.checkpoint.pop("damaged", None)
            folder.begun.checkpoint["wandb_id"] = None
    return folder


def read(arguments: list[str], config_class, description: str) -> tuple:
    """The run's trainer.Config, and its folder where --resume or --name says which, else None.

    Raises SettingsError; exits after --help.
    """
    check_environment()
    first = first_look(arguments)
    folder = open_folder(first, config_class)
    begun = folder and folder.begun
    if begun:  # out_dir and name as they are today, wherever the run was moved
        start = replace(begun.config, resume=first.resume, out_dir=str(folder.path.parent),
                        name=begun.config.name and folder.path.name)
    else:
        start = config_class(**preset(first.preset, first.device))
    config = parse(config_class, arguments, f"{description}\nPresets: {', '.join(PRESETS)}", start)
    if begun:
        config = replace(config, preset=begun.config.preset) if config.preset == "auto" else config
        refuse_fixed(begun.config, config)
    if config.overfit != start.overfit:  # a paper's step count and slow start are no demo's, and a demo's no full run's
        warmup = (first.warmup_steps or 0) if config.overfit else config.warmup_steps
        config = replace(config, max_steps=first.max_steps, warmup_steps=warmup)
    config.check()
    config.chosen.check(config.task, config.condition)
    return config, folder
