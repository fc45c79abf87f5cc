"""Runs of a tiny network for the tests of the trainer, what they leave, and processes that may be killed."""
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import trainer
from images import data
from trainer import Trainer

TINY = ("--device cpu --dataset shapes --image-size 16 --batch-size 4 --unet-channels 8 --unet-dim-mults 1 1 "
        "--unet-blocks 1 --sample-count 2 --solver euler --sample-steps 2 --no-use-wandb --compile off")
FINISHED = "--max-steps 4 --sample-every 2 --print-loss-every 2 --checkpoint-every 2"
STATE = ("step", "ema", "players", "optimizers", "loss", "skipped")
METHODS = {  # few network evaluations, and no download
    "interpolant": "", "sr3": "--solver auto", "i2sb": "--solver auto", "edm": "",
    "udpm": "--solver auto --sample-steps 3 --udpm.lpips-weight 0 0 0 --udpm.disc-channels 8",
    "flowmap": "--solver auto --sample-steps 1", "regression": "--solver auto --sample-steps 1"}
TRAINER = Path(trainer.__file__)

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and /dev/full")


def draw_pictures(root: Path):
    """40 pictures in the folders of two classes; 4 of these names are held out, 2 a class."""
    for i, image in enumerate(data.load("shapes", 16, limit=40).train):
        (root / "ab"[i % 2]).mkdir(exist_ok=True, parents=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "ab"[i % 2] / f"bf{i:02d}.png")


def start(out, flags="", status=0) -> Path | None:
    """Trains in this process; the run's folder, if there is one."""
    assert trainer.main(f"{TINY} --out-dir {out} {flags}".split()) == status
    folders = [path for path in Path(out).iterdir()] if Path(out).is_dir() else []
    assert len(folders) <= 1
    return folders[0] if folders else None


def make(flags) -> Trainer:
    return Trainer(*trainer.read_command_line(f"{TINY} {flags}".split()))


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("trainer.py: ")
    return lines[0]


def resume(run, flags="", status=0):
    assert trainer.main(f"--resume {run} {flags}".split()) == status


def checkpoint(folder) -> dict:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files, but for the lock's."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def leaves(value, name="") -> dict:
    """Nested dicts and lists -> {path: tensor or value}."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, inner in items for path, leaf in leaves(inner, f"{name}/{key}").items()}
    return {name: value}


def same(a: dict, b: dict, keys=STATE):
    """Bit for bit: every tensor and number of two checkpoints."""
    a, b = (leaves({key: x[key] for key in keys}) for x in (a, b))
    assert a.keys() == b.keys()
    for name, value in a.items():
        tensor = torch.is_tensor(value)
        assert torch.equal(value, b[name]) and value.dtype == b[name].dtype if tensor else value == b[name], name


def finite(state: dict) -> bool:
    return all(leaf.isfinite().all() for leaf in leaves(state).values() if torch.is_tensor(leaf))


def metrics(folder) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("images_per_second", "seconds")} for line in lines]


def at_step(monkeypatch, step: int, action):
    """Calls `action` in the middle of that training step, counted from 1."""
    original = Trainer.train_step

    def train_step(self):
        if self.step + 1 == step:
            action()
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def copied_at(monkeypatch, step: int, target):
    """The run's folder as it is after that step, with its checkpoint, is copied to `target`."""
    original = Trainer.train_step

    def train_step(self):
        if self.step == step:
            self.folder.wait()
            shutil.copytree(self.folder.path, target)
        original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


# Processes that may be killed come from a fork server that has imported the trainer once.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trainer", "torch._dynamo", "PIL.PngImagePlugin"])  # what a run imports late


def child(target, log, env, *args):
    os.environ.update(env)
    torch.set_num_threads(1)
    with open(log, "wb") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.exit(target(*args))


def until(ready, *processes, seconds=120):
    end = time.monotonic() + seconds
    while not ready():
        fine = all(each.exitcode is None for each in processes) and time.monotonic() < end
        assert fine, [each.log.read_text() for each in processes]
        time.sleep(0.01)


def ranks(count):
    """What torchrun tells each of so many processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]


def together(process, target, *arguments, status=0) -> list[str]:
    """target(*arguments[rank]) in processes that train together; what each of them said."""
    running = [process(target, *each, env=env) for each, env in zip(arguments, ranks(len(arguments)))]
    for each in running:
        each.join(100)
    said = [each.log.read_text() for each in running]
    assert [each.exitcode for each in running] == [status] * len(running), said
    return said
