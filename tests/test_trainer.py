"""The whole run, on a tiny network: nothing is lost, nothing is silent, and what is shown is what was made."""
import errno
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import logs
import methods.udpm
import trainer
from corruptions import Damage
from trainer import PRESETS, Config, Interpolant, Trainer, from_plain
from unet import Guided

TINY = ("--device cpu --dataset shapes --image-size 16 --batch-size 4 --unet-channels 8 --unet-dim-mults 1 1 --unet-blocks 1 "
        "--sample-count 2 --solver euler --sample-steps 2 --no-use-wandb")
FINISHED = "--max-steps 4 --sample-every 2 --print-loss-every 2 --checkpoint-every 2"
STATE = ("step", "ema", "players", "optimizers", "loss", "skipped")
TRAINER = Path(trainer.__file__)


def start(out, flags="", status=0) -> Path | None:
    """Trains in this process; the run's folder, if there is one."""
    assert trainer.main(f"{TINY} --out-dir {out} {flags}".split()) == status
    folders = [path for path in Path(out).iterdir()] if Path(out).is_dir() else []
    assert len(folders) <= 1
    return folders[0] if folders else None


def resume(run, flags="", status=0):
    assert trainer.main(f"--resume {run} {flags}".split()) == status


def checkpoint(folder) -> dict:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


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
        equal = torch.equal(value, b[name]) and value.dtype == b[name].dtype if torch.is_tensor(value) else value == b[name]
        assert equal, name


def finite(state: dict) -> bool:
    return all(leaf.isfinite().all() for leaf in leaves(state).values() if torch.is_tensor(leaf))


def metrics(folder) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_second", "seconds")} for line in lines]


def at_step(monkeypatch, step: int, action):
    """Calls `action` in the middle of that training step, counted from 1."""
    original = Trainer.train_step

    def train_step(self):
        if self.step + 1 == step:
            action()
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def kept(monkeypatch) -> dict:
    """{step: checkpoint} of all that are written from now on."""
    states, original = {}, Trainer.save

    def save(self):
        original(self)
        states[self.step] = checkpoint(self.folder)

    monkeypatch.setattr(Trainer, "save", save)
    return states


@pytest.fixture(autouse=True)
def as_found():
    """One thread, which is fastest for so small a network, and the signal handlers of before."""
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 pictures, of which 4 are held out, in the folders of two classes."""
    root = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(data.load("shapes", 16, limit=40).train):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "ab"[i % 2] / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 4 steps, not to be written to."""
    torch.set_num_threads(1)
    return start(tmp_path_factory.mktemp("finished"), FINISHED)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The finished run in another place."""
    return shutil.copytree(finished, tmp_path / "elsewhere" / "moved")


# Processes that may be killed come from a fork server that has imported the trainer once.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trainer"])


def child(target, log, env, *args):
    os.environ.update(env)
    torch.set_num_threads(1)
    with open(log, "wb") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.exit(target(*args))


@pytest.fixture
def process(tmp_path):
    """process(function, *args, env={}): runs it in a new process, which does not outlive the test."""
    running = []

    def begin(target, *args, env=None):
        log = tmp_path / f"log-{len(running)}"
        running.append(SERVER.Process(target=child, args=(target, log, env or {}, *args)))
        running[-1].log = log
        running[-1].start()
        return running[-1]

    yield begin
    for each in running:
        each.kill()
        each.join()


def until(ready, *processes, seconds=120):
    end = time.monotonic() + seconds
    while not ready():
        assert all(each.exitcode is None for each in processes) and time.monotonic() < end, [each.log.read_text() for each in processes]
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------- resume

@pytest.mark.parametrize("mode", ["--overfit", "--no-overfit"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, process, folder, mode):
    """With everything that draws random numbers switched on: dropout, labels dropped, flips, shuffled epochs."""
    flags = (f"{mode} --dataset {folder} --unet-dropout 0.1 --label-drop 0.3 --warmup-steps 10 --sample-every 3 --print-loss-every 2 "
             "--checkpoint-every 1")
    victim = process(trainer.main, f"{TINY} --out-dir {tmp_path}/killed {flags} --max-steps 10000".split())
    until(lambda: list(tmp_path.glob("killed/*/checkpoints/last.pt")), victim)
    time.sleep(random.Random().uniform(0, 0.5))  # an arbitrary moment: half of the time it is writing
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert victim.exitcode == -signal.SIGKILL

    run = next((tmp_path / "killed").iterdir())
    before = checkpoint(run)
    steps = before["step"] + 4
    resume(run, f"--max-steps {steps}")
    straight = start(tmp_path / "straight", f"{flags} --max-steps {steps}")
    after = checkpoint(run)
    same(after, checkpoint(straight))
    assert after["step"] == steps and not torch.equal(after["players"][0]["stem.weight"], before["players"][0]["stem.weight"])
    assert metrics(run) == metrics(straight)
    assert [m["step"] for m in metrics(run) if "loss" in m] == sorted({*range(2, steps + 1, 2), steps})
    assert [m["step"] for m in metrics(run) if "psnr" in m] == sorted({*range(3, steps + 1, 3), steps})
    assert not list(run.rglob("*.tmp"))


def test_how_often_one_looks_changes_no_training(tmp_path, finished):
    seldom = start(tmp_path, "--max-steps 4 --sample-every 1000 --print-loss-every 3 --checkpoint-every 1000")
    same(checkpoint(finished), checkpoint(seldom), ("step", "ema", "players", "optimizers", "skipped"))


def test_another_seed_changes_training(tmp_path, finished):
    other = start(tmp_path, "--max-steps 4 --seed 1")
    ours, theirs = checkpoint(finished), checkpoint(other)
    assert all(not torch.equal(p, theirs["ema"][name]) for name, p in ours["ema"].items() if p.ndim > 1)


def test_resume_by_folder_or_file_wherever_it_lies(tmp_path, copy, capsys):
    straight = start(tmp_path / "straight", FINISHED.replace("4", "6"))
    twin = shutil.copytree(copy, tmp_path / "twin")
    for run, name in ((copy, copy), (twin, twin / "checkpoints" / "last.pt")):
        resume(name, "--max-steps 6")
        assert "steps 4 to 6" in capsys.readouterr().out
        same(checkpoint(run), checkpoint(straight))
        assert metrics(run) == metrics(straight)


def test_lines_after_the_checkpoint_and_half_lines_are_dropped(copy):
    before = metrics(copy)
    with open(copy / "metrics.jsonl", "a") as f:  # died in the middle of step 6's line
        f.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')
    resume(copy, "--max-steps 5")
    after = metrics(copy)
    assert after[:len(before)] == before and [m["step"] for m in after[len(before):]] == [5, 5] and after[len(before)]["loss"] < 99


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "another object", "another program's"])
def test_a_damaged_checkpoint_is_one_line(copy, capsys, damage):
    path = copy / "checkpoints" / "last.pt"
    if damage == "another object":
        torch.save([1, 2], path)
    elif damage == "another program's":
        torch.save({"model": torch.zeros(2), "step": 7}, path)
    else:
        path.write_bytes({"truncated": path.read_bytes()[:-2000], "empty": b"", "text": b"epoch 3\n"}[damage])
    capsys.readouterr()
    resume(copy, "--max-steps 6", status=2)
    error = one_line(capsys)
    assert "run = " in error and str(copy) in error


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("trainer.py: ")
    return lines[0]


@pytest.mark.parametrize("flags, words", [
    ("", ["max_steps = 4", "step 4"]),
    ("--max-steps 3", ["max_steps = 3", "step 4"]),
    ("--max-steps 6 --unet-channels 16", ["resume", "network"]),
    ("--max-steps 6 --no-unet-use-classes", ["resume", "network"]),
    ("--max-steps 6 --no-condition", ["resume", "network"]),
])
def test_a_resume_that_cannot_be_changes_nothing(finished, capsys, flags, words):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    capsys.readouterr()
    resume(finished, flags, status=2)
    error = one_line(capsys)
    assert all(word in error for word in words), error
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_no_such_run(tmp_path, capsys):
    for run in (tmp_path, tmp_path / "nowhere"):
        resume(run, status=2)
        assert str(run) in one_line(capsys)


def test_settings_of_another_version_are_ignored_with_a_warning(copy):
    path = copy / "checkpoints" / "last.pt"
    state = checkpoint(copy)
    state["config"] |= {"frobnicate": 3, "damage": state["config"]["damage"] | {"rain": 1}}
    del state["config"]["guidance"]  # and a field that was not there then takes its default
    torch.save(state, path)
    with pytest.warns(UserWarning) as caught:
        resume(copy, "--max-steps 5")
    assert ["frobnicate" in str(w.message) for w in caught].count(True) == ["rain" in str(w.message) for w in caught].count(True) == 1
    assert checkpoint(copy)["step"] == 5 and "frobnicate" not in checkpoint(copy)["config"]


# ------------------------------------------------------------------------------------------------------------ signals

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves(tmp_path, monkeypatch, finished, number, status, capsys):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        run = start(tmp_path, FINISHED, status)
    assert checkpoint(run)["step"] == 3 and checkpoint(run)["loss"][1] == 1  # half-way to the next report
    assert signal.getsignal(number) is handler
    assert f"--resume {run}" in capsys.readouterr().out
    resume(run)
    same(checkpoint(run), checkpoint(finished))


def test_a_signal_does_not_wait_for_samples(tmp_path, monkeypatch, finished):
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))  # the step after which samples are due
        run = start(tmp_path, FINISHED, 143)
    assert checkpoint(run)["step"] == 2 and not list(run.rglob("*.png"))
    resume(run)
    assert metrics(run) == metrics(finished)


def test_a_signal_cuts_a_sampling_short(tmp_path, monkeypatch, finished):
    original = trainer.draw

    def endless(config, net, batch, trace=None):
        if not isinstance(net, trainer.Guided):  # the rehearsal before the first step
            return original(config, net, batch, trace)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "draw", endless)
        run = start(tmp_path, FINISHED, 130)
    assert time.monotonic() - began < 15
    assert checkpoint(run)["step"] == 2 and not list(run.rglob("*.png"))
    resume(run)
    same(checkpoint(run), checkpoint(finished))
    assert metrics(run) == metrics(finished)  # with the sampling that was missed
    pictures = [{p.name: p.read_bytes() for p in (each / "samples").iterdir()} for each in (run, finished)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 4


@pytest.mark.parametrize("pause, saved", [(1.1, 2), (0, 3)])
def test_a_second_signal_does_not_wait_but_a_signal_may_come_twice(tmp_path, monkeypatch, pause, saved):
    at_step(monkeypatch, 3, lambda: [os.kill(os.getpid(), signal.SIGINT), time.sleep(pause), os.kill(os.getpid(), signal.SIGINT)])
    run = start(tmp_path, "--max-steps 4 --checkpoint-every 1", 130)
    assert checkpoint(run)["step"] == saved


def program(arguments, where):
    """python trainer.py, less the seconds of its imports."""
    os.chdir(where)
    sys.argv = [str(TRAINER), *arguments]
    runpy.run_path(str(TRAINER), run_name="__main__")


def test_the_program_stopped_from_outside(tmp_path, process):
    """As a scheduler stops it, in the default folders."""
    run = process(program, f"{TINY} --checkpoint-every 1 --max-steps 10000".split(), tmp_path)
    until(lambda: list(tmp_path.glob("runs/*/checkpoints/last.pt")), run)
    os.kill(run.pid, signal.SIGTERM)
    run.join(60)
    assert run.exitcode == 143
    said, folder = run.log.read_text(), next((tmp_path / "runs").iterdir())
    assert "Traceback" not in said and "SIGTERM" in said
    assert said.strip().splitlines()[-1] == f"go on with: python trainer.py --resume {folder.relative_to(tmp_path)}"
    resume(folder, f"--max-steps {checkpoint(folder)['step'] + 1}")


# ------------------------------------------------------------------------------------------------- never half a file

def test_a_writer_that_fails_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    logs.write_atomically(path, lambda f: f.write(b"old"))
    for failure in (OSError("disk full"), KeyboardInterrupt()):
        def write(f):
            f.write(b"half")
            raise failure

        with pytest.raises(type(failure)):
            logs.write_atomically(path, write)
        assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    logs.write_atomically(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def write_for_ever(path):
    for i in range(10**9):
        logs.write_atomically(path, lambda f: [f.write(bytes([i % 256]) * 2**16) for _ in range(64)])


def test_kill_while_writing_leaves_one_whole_content(tmp_path, process):
    path = tmp_path / "file"
    for _ in range(3):
        path.unlink(missing_ok=True)
        writer = process(write_for_ever, path)
        until(path.exists, writer)
        time.sleep(random.Random().uniform(0, 0.1))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        content = path.read_bytes()
        assert len(content) == 2**22 and len(set(content)) == 1


def test_a_full_disk_ends_no_training(tmp_path, monkeypatch, capsys):
    """Neither pictures nor checkpoints can be written: warnings, training to the end, and then exit status 1."""
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        run = start(tmp_path / "pictures", "--max-steps 2")
    err = capsys.readouterr().err
    assert "picture" in err and "No space left" in err
    assert [m["step"] for m in metrics(run) if "psnr" in m] == [2] and checkpoint(run)["step"] == 2
    assert not list(run.rglob("*.png")) and not list(run.rglob("*.tmp"))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        run = start(tmp_path / "checkpoints", "--max-steps 2", status=1)
    assert "checkpoint" in capsys.readouterr().err and not list(run.rglob("*.pt*"))


def test_the_checkpoint_is_plain_and_its_keys_are_the_networks(finished):
    state = checkpoint(finished)  # with weights_only=True
    assert {type(leaf) for leaf in leaves(state).values()} <= {torch.Tensor, int, float, str, bool, type(None)}
    config = from_plain(Config, state["config"])
    net = trainer.make_unet(config, state["num_classes"])
    net.load_state_dict(state["ema"])
    net.load_state_dict(state["players"][0])
    assert all(tensor.device.type == "cpu" for tensor in leaves(state["ema"]).values())


# -------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, words", [
    ("--batch-size 0", "batch_size 0 1"),
    ("--batch-size ten", "batch-size ten int"),
    ("--max-steps 0", "max_steps 0 1"),
    ("--task foo", "task foo sr inpaint blur jpeg generate paired"),
    ("--task sr,foo", "task foo sr inpaint"),
    ("--method foo", "method foo interpolant sr3 i2sb edm udpm"),
    ("--preset foo", "preset foo cifar10-sr small"),
    ("--frobnicate 3", "--frobnicate"),
    ("--unet-channels 12", "unet_channels 12 8"),
    ("--unet-dim-mults 1 0", "unet_dim_mults 0 1"),
    ("--unet-dropout 1", "unet_dropout 1"),
    ("--solver foo", "solver foo dopri5 euler midpoint heun rk4"),
    ("--solver dopri5 --sample-steps 5", "sample_steps 5 dopri5"),
    ("--solver auto --sample-steps 5", "sample_steps 5 dopri5"),  # the interpolant's own
    ("--method udpm --udpm.lpips-weight 0 0 0", "solver euler udpm auto"),  # it has no ODE
    ("--method i2sb", "I2SB ODE ot_ode"),  # nor has this, as it stands
    ("--method udpm --udpm.lpips-weight 0 0 0 --solver auto --sample-steps 5", "steps 5 3"),
    ("--method udpm --udpm.lpips-weight 0 0 0 --solver auto --sample-steps 3 --image-size 12", "12 8"),
    ("--method sr3 --solver auto --sample-steps 3000", "steps 3000 2000"),
    ("--sr3.T 0 --method sr3", "sr3.T 0 1"),
    ("--interpolant.sigma -1", "interpolant.sigma -1"),
    ("--integration-atol -1", "integration_atol -1 0"),
    ("--base-lr nan", "base_lr nan 0"),
    ("--ema-decay 1", "ema_decay 1"),
    ("--label-drop 1.5", "label_drop 1.5 0 1"),
    ("--channels 2", "channels 2 1 3"),
    ("--damage.factor 3", "damage.factor 3 2 4 8"),
    ("--image-size 15", "15 2"),
    ("--task jpeg --damage.quality 0", "damage.quality 0 1 100"),
    ("--task paired", "paired_path None paired"),
    ("--paired-path somewhere", "paired_path somewhere paired"),
    ("--dataset nowhere", "dataset nowhere cifar10 shapes"),
    ("--device frob", "device frob cpu"),
    ("--precision fp16", "precision fp16 auto bf16 fp32"),
    pytest.param("--device cuda", "device cuda cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")),
])
def test_wrong_values_are_refused_in_one_line(tmp_path, capsys, flags, words):
    assert start(tmp_path / "out", flags, status=2) is None
    error = one_line(capsys).removeprefix("trainer.py: ")
    for word in words.split():
        assert word in error or word.replace("_", "-") in error, (word, error)
    assert len(error) < 600


def test_out_dir_in_a_files_place(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "runs"):
        assert trainer.main(f"{TINY} --out-dir {out}".split()) == 2
        assert str(out) in one_line(capsys)


def test_help_names_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        trainer.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    flags = {"--" + name.lstrip("/").replace("/", ".").replace("_", "-") for name in leaves(asdict(replace(Config(), unet_dim_mults=1)))}
    missing = [flag for flag in flags if flag not in text and flag.replace("--", "--no-", 1) not in text]
    assert len(flags) > 60 and all("udpm." in flag for flag in missing), missing  # tuples there are leaves by index


# --------------------------------------------------------------------------------------------- gradients not finite

def poison(monkeypatch, steps):
    """A gradient that is not finite in those training steps, counted from 1: in all weights, or in one of them."""
    original = Trainer.train_step

    def train_step(self):
        (net, loss), *others = players = self.players
        if self.step + 1 in steps:
            weight = net.out.bias
            bad = dict(nan=lambda *a: loss(*a) * math.nan, one=lambda *a: loss(*a) + (weight[0] - weight[0].detach()).sqrt())
            self.players = [(net, bad["nan" if self.step % 2 else "one"]), *others]
        value = original(self)
        self.players = players
        return value

    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_a_gradient_that_is_not_finite_skips_its_step(tmp_path, monkeypatch):
    poison(monkeypatch, {1, 4, 5})
    states = kept(monkeypatch)
    run = start(tmp_path, "--max-steps 6 --print-loss-every 1 --checkpoint-every 1")
    moved = {step: not torch.equal(states[step]["players"][0]["stem.weight"], states[step - 1]["players"][0]["stem.weight"]) for step in range(2, 7)}
    assert moved == {2: True, 3: True, 4: False, 5: False, 6: True}
    for step in (4, 5):
        same(states[step], states[3], ("players",))
        for a, b in zip(states[step]["optimizers"], states[3]["optimizers"]):  # moments and Adam's own step count
            same(a, b, ("state",))
    assert all(finite(state) for state in states.values())
    logged = [m for m in metrics(run) if "loss" in m or "skipped_steps" in m]
    assert [m.get("skipped_steps", 0) for m in logged if m["step"] in range(1, 7)] == [1, 1, 1, 2, 3, 3]
    assert all(math.isfinite(m["loss"]) for m in logged if "loss" in m)
    assert checkpoint(run)["skipped"].tolist() == [3, 0]


def test_many_in_a_row_end_the_run_with_advice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "MAX_SKIPPED", 3)
    with monkeypatch.context() as patch:
        poison(patch, range(2, 100))
        run = start(tmp_path, "--max-steps 50 --print-loss-every 1", status=1)
    error = one_line(capsys)
    assert "base_lr" in error and "--precision fp32" in error
    state = checkpoint(run)
    assert finite(state) and state["step"] == 4 and state["skipped"][0] == 3
    command = error[error.index("--resume"):]  # what it says to do works
    assert trainer.main([*command.split(), "--max-steps", "6"]) == 0 and checkpoint(run)["skipped"].tolist() == [3, 0]


def test_one_of_two_players_alone_can_end_the_run(tmp_path, monkeypatch):
    """A healthy discriminator must not hide a network that never learns, nor the other way round."""
    monkeypatch.setattr(trainer, "MAX_SKIPPED", 3)
    for sick in (0, 1):
        def players(self, net, *args, **kwargs):
            other = torch.nn.Linear(1, 1)
            losses = [self.loss, lambda module, batch: module(batch.z1[:, 0, 0, :1]).square()[:, 0]]
            good = losses[sick]
            losses[sick] = lambda module, batch: good(module, batch) * math.nan
            return list(zip((net, other), losses))

        monkeypatch.setattr(Interpolant, "players", players, raising=False)
        run = start(tmp_path / str(sick), "--max-steps 6 --print-loss-every 1", status=1)
        assert finite(checkpoint(run)) and checkpoint(run)["skipped"].tolist() == [3, 3]


# -------------------------------------------------------------------------------------------------------------- wandb

def test_wandb_offline_holds_the_grid_and_the_numbers(tmp_path, monkeypatch):
    """The real thing, and again after a resume."""
    run = start(tmp_path, "--max-steps 2 --use-wandb")
    resume(run, "--max-steps 3")
    name = checkpoint(run)["wandb_id"]
    segments = sorted((run / "wandb").glob("offline-run-*"))
    assert len(segments) == 2 and all(segment.name.endswith(name) for segment in segments)
    for segment, step in zip(segments, (2, 3)):
        pictures = [np.asarray(Image.open(path)) for path in (segment / "files" / "media" / "images").rglob("*.png")]
        for kind in ("step", "trace"):
            ours = np.asarray(Image.open(run / "samples" / f"{kind}_{step:06d}.png"))
            assert sum(np.array_equal(ours, picture) for picture in pictures) == 1
        record = next(segment.glob("*.wandb")).read_bytes()
        for line in metrics(run):
            for key in ("loss", "psnr", "psnr_zlo"):
                if line["step"] == step and key in line:
                    assert key.encode() in record and json.dumps(line[key]).encode() in record, key


class FakeWandb(types.ModuleType):
    """Records what it is told; fails where it is asked to."""

    def __init__(self, fail=()):
        super().__init__("wandb")
        self.fail, self.inits, self.logged, self.offline, self.url = fail, [], [], True, None
        self.settings = types.SimpleNamespace(sync_dir="there")
        self.closed = False

    def may_fail(self, what):
        if what in self.fail:
            raise RuntimeError(f"{what}: no server\nanywhere")

    def init(self, **kwargs):
        self.inits.append(kwargs)
        self.may_fail("init " + kwargs["mode"])
        return self

    def Settings(self, **kwargs):
        return kwargs

    def define_metric(self, *args, **kwargs):
        self.axis = args, kwargs

    def Image(self, picture):
        self.may_fail("Image")
        return picture

    def log(self, numbers):
        self.may_fail("log" if len(self.logged) > 1 else "")
        self.logged.append(numbers)

    def finish(self):
        self.may_fail("finish")
        self.closed = True


@pytest.mark.parametrize("fail", [None, ["import"], ["init online", "init offline"], ["Image"], ["log"], ["finish"]])
def test_wandb_never_ends_a_run(tmp_path, monkeypatch, capsys, finished, fail):
    fake = FakeWandb(fail or [])
    monkeypatch.setitem(sys.modules, "wandb", None if fail == ["import"] else fake)
    run = start(tmp_path, f"{FINISHED} --use-wandb")
    same(checkpoint(run), checkpoint(finished))
    assert metrics(run) == metrics(finished)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert len(warnings) == bool(fail)  # one line, once
    if not fail:
        assert fake.closed
        steps = [row["step"] for row in fake.logged]
        assert steps == [m["step"] for m in metrics(run)] == [2, 2, 4, 4]  # numbers, its own axis
        assert fake.axis[1]["step_metric"] == "step"
        shown = [row for row in fake.logged if "psnr" in row]
        for row in shown:
            ours = np.asarray(Image.open(run / "samples" / f"step_{row['step']:06d}.png"))
            assert any(np.array_equal(ours, value) for value in row.values() if isinstance(value, np.ndarray))


def test_wandb_goes_offline_where_online_fails_and_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    fake = FakeWandb(["init online"])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = start(tmp_path, "--max-steps 1 --use-wandb")
    resume(run, "--max-steps 2")
    assert [each["mode"] for each in fake.inits] == ["online", "offline"] * 2
    assert len({each["id"] for each in fake.inits}) == 1 and all(each["resume"] == "allow" for each in fake.inits)
    assert [row["step"] for row in fake.logged] == [1, 1, 2, 2]


def test_wandb_is_online_only_where_an_account_is_configured(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert logs.wandb_mode() == "offline"
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert logs.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")  # an account elsewhere is none here
    assert logs.wandb_mode() == "offline"
    netrc.write_text("machine wandb.example.org login user password secret\n")
    assert logs.wandb_mode() == "online"
    netrc.write_text("not a netrc")
    assert logs.wandb_mode() == "offline"
    monkeypatch.setenv("NETRC", str(tmp_path / "nowhere"))
    assert logs.wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert logs.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the user's word is the last
    assert logs.wandb_mode() == "disabled"


# ----------------------------------------------------------------------------------------------------------- pictures

def read_grids(path, count: int, side: int) -> list[np.ndarray]:
    """The four grids of a picture -> each (count, side, side, 3) uint8. Images are enlarged to 64 pixels."""
    picture, scale = np.asarray(Image.open(path)), 64 // side
    columns = 2 ** math.ceil(math.log2(count / 2) / 2)
    rows = math.ceil(count / columns)
    width, height = 12 + 2 + 66 * columns, 2 + 66 * rows
    assert picture.shape == (height, 4 * width, 3)
    grids = []
    for left in range(0, 4 * width, width):
        images = []
        for i in range(count):
            y, x = 2 + 66 * (i // columns), left + 6 + 2 + 66 * (i % columns)
            tile = picture[y:y + 64, x:x + 64].reshape(side, scale, side, scale, 3)
            assert (tile == tile[:, :1, :, :1]).all()
            images.append(tile[:, 0, :, 0])
        grids.append(np.stack(images))
    return grids


def decibels(x, truth) -> float:
    error = ((x.astype(np.float64) - truth.astype(np.float64)) ** 2).reshape(len(x), -1).mean(1)
    return float(np.mean(10 * np.log10(255**2 / error)))


@pytest.mark.parametrize("flags", ["--sample-count 4", "--sample-count 3 --no-overfit"])
def test_the_picture_is_zlo_z0_sample_truth_and_its_psnr_is_the_logged_one(tmp_path, folder, flags):
    run = start(tmp_path, f"--dataset {folder} --max-steps 3 --interpolant.sigma 1e-6 {flags}")
    count = 4 if "4" in flags else 3
    zlo, z0, sample, truth = read_grids(run / "samples" / "step_000003.png", count, 16)
    images = data.load(str(folder), 16)
    known = (images.test if "--no-overfit" in flags else images.train).permute(0, 2, 3, 1).numpy()
    assert len({image.tobytes() for image in truth}) == count  # all different, all from the right split
    assert {image.tobytes() for image in truth} <= {image.tobytes() for image in known}
    blocks = truth.reshape(count, 8, 2, 8, 2, 3).astype(np.float64)
    across = np.floor(blocks.mean(4) + 0.5)  # PIL halves the width first, to whole levels
    low = np.floor(across.mean(2) + 0.5).repeat(2, 1).repeat(2, 2)
    assert np.array_equal(zlo, low)
    assert np.array_equal(z0, zlo)  # with hardly any noise
    assert not np.array_equal(sample, zlo) and not np.array_equal(sample, truth)
    logged = next(m for m in metrics(run) if "psnr" in m)
    assert logged["psnr"] == pytest.approx(decibels(sample, truth), abs=1e-3)
    assert logged["psnr_zlo"] == pytest.approx(decibels(zlo, truth), abs=1e-3)
    assert logged["nfe"] == 3  # two Euler steps and the clean estimate


def test_the_pictures_z0_carries_the_noise_of_the_coupling(finished):
    zlo, z0, _, _ = read_grids(finished / "samples" / "step_000004.png", 2, 16)
    middle = (zlo > 120) & (zlo < 136)  # where a noise of standard deviation 1 = 127.5 levels is clipped at one sigma
    noise = (z0.astype(float) - zlo)[middle]
    assert len(noise) > 50 and abs((np.abs(noise) > 115).mean() - 0.34) < 0.12


def test_psnr_against_numpy():
    torch.manual_seed(0)
    truth = torch.rand(5, 3, 6, 7) * 2 - 1
    x = truth + torch.randn_like(truth) * torch.tensor([0.02, 0.1, 0.3, 1, 3])[:, None, None, None]  # far out of range too
    levels = [np.clip(np.floor((z.double().numpy() + 1) * 127.5 + 0.5), 0, 255) for z in (x, truth)]
    assert logs.psnr(x, truth) == pytest.approx(decibels(*levels), abs=0.01)
    assert logs.psnr(truth, truth) == pytest.approx(10 * math.log10(255**2 * 3 * 6 * 7))  # as if one value were off by a level


def test_the_strip_has_a_column_a_time_and_clean_estimates_below_states():
    trace = [(t, torch.full((2, 3, 64, 64), t), torch.full((2, 3, 64, 64), -t)) for t in np.linspace(0, 1, 21).tolist()]
    picture = logs.strip(trace).astype(int)
    columns = [picture[2 + 32 + 66 * row, 6 + 2 + 32 + 66 * np.arange(9), 0] for row in range(4)]
    expected = np.round((np.array([trace[i][0] for i in (0, 2, 5, 8, 10, 12, 15, 18, 20)]) + 1) * 127.5)
    for row, sign in enumerate((1, -1, 1, -1)):
        assert np.abs(columns[row] - np.round(127.5 + sign * (expected - 127.5))).max() <= 1


def test_a_solver_that_fails_ends_no_training(tmp_path, monkeypatch, finished, capsys):
    """The network's output turns to NaN while it samples: a warning, no picture, the same weights."""
    original = trainer.Guided.__call__
    monkeypatch.setattr(trainer.Guided, "__call__", lambda self, *args: original(self, *args) * math.nan)
    for name, solver in (("dopri5", "--solver dopri5 --sample-steps None"), ("euler", "")):
        run = start(tmp_path / name, f"--max-steps 4 --sample-every 2 {solver}")
        warnings = [line for line in capsys.readouterr().err.splitlines() if "no samples" in line]
        assert len(warnings) == 2 and all(name in line and "not finite" in line for line in warnings)
        same(checkpoint(run), checkpoint(finished), ("ema", "players", "optimizers"))
        assert not list(run.rglob("*.png"))


@pytest.mark.parametrize("there, named, expected", [(True, "auto", "cuda:2"), (True, "cuda", "cuda:2"), (True, "cuda:1", "cuda:1"), (True, "cpu", "cpu"),
                                                    (False, "auto", "cpu")])
def test_each_process_has_its_own_gpu(monkeypatch, there, named, expected):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert str(trainer.pick_device(Config(device=named))) == expected
    monkeypatch.setenv("WORLD_SIZE", "4")
    if ":" in named:
        with pytest.raises(ValueError, match="each on a GPU of its own"):
            trainer.pick_device(Config(device=named))
    else:
        assert str(trainer.pick_device(Config(device=named))) == expected


def test_more_processes_than_gpus_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # there is none: as if this process were one too many
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(ValueError, match="device = 'auto': .* 2 GPUs"):
        Config().check()


@pytest.mark.parametrize("flags, compiled", [("--max-steps 20000", True), ("--max-steps 19999", False), ("--max-steps 20000 --compile off", False),
                                             ("--max-steps 4 --compile on", True)])
def test_long_runs_compile_their_network(tmp_path, monkeypatch, flags, compiled):
    graphs = []
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend=lambda graph, _: graphs.append(graph) or graph.forward, **options))
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    run = start(tmp_path, flags, 130)
    assert checkpoint(run)["step"] == 2 and len(graphs) == compiled
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "compile", lambda self: graphs.append("again"))
    resume(run, "--max-steps 3")
    assert (graphs[-1:] == ["again"]) == compiled  # as before, whatever the new length


def test_where_nothing_can_be_compiled_the_run_goes_on(tmp_path, monkeypatch, finished):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend=broken, **options))
    with pytest.warns(UserWarning, match="the network is not compiled .*no C\\+\\+ compiler"):
        run = start(tmp_path, f"{FINISHED} --compile on")
    same(checkpoint(run), checkpoint(finished))


def test_no_memory_for_samples_ends_no_training(tmp_path, monkeypatch, finished, capsys):
    draw = trainer.draw

    def full(config, net, batch, trace=None):
        if isinstance(net, Guided):
            raise torch.OutOfMemoryError
        return draw(config, net, batch, trace)

    monkeypatch.setattr(trainer, "draw", full)
    run = start(tmp_path, FINISHED)
    assert "no samples at step 2: out of GPU memory" in capsys.readouterr().err
    same(checkpoint(run), checkpoint(finished), ("ema", "players", "optimizers"))


def test_dopri5_samples_by_default(tmp_path):
    run = start(tmp_path, "--max-steps 2 --solver auto --sample-steps None")
    logged = next(m for m in metrics(run) if "psnr" in m)
    assert logged["nfe"] >= 2 + 6 * 2 and logged["psnr"] > 5


# ---------------------------------------------------------------------------------------------------- labels and flips

def make(flags) -> Trainer:
    return Trainer(*trainer.read_command_line(f"{TINY} {flags}".split()))


def test_labels_can_be_switched_off(tmp_path, folder, finished):
    flat = tmp_path / "flat"  # the same pictures without class folders
    flat.mkdir()
    for path in folder.rglob("*.png"):
        shutil.copy(path, flat)
    for flags, classes in (("--no-unet-use-classes", 0), (f"--dataset {flat}", 0), (f"--dataset {folder}", 2)):
        run = start(tmp_path / f"runs-{flags[-5:]}", f"--max-steps 1 {flags}")
        state = checkpoint(run)
        assert state["num_classes"] == classes
        rows = [tensor.shape[0] for name, tensor in state["ema"].items() if "embed_class.0" in name]
        assert rows == ([classes + 1] if classes else [])
        assert any("embed_class" in name for name in state["ema"]) == bool(classes)
    assert checkpoint(finished)["num_classes"] == 10


@pytest.mark.parametrize("flags, null, flipped", [("--overfit", 0, 0), ("--no-overfit", 0.3, 0.5), ("--no-overfit --label-drop 0", 0, 0.5)])
def test_labels_drop_and_images_flip_in_their_share(tmp_path, folder, flags, null, flipped):
    """Each image is one of the data set's or its mirror image, with its own label or the null label, and its damage follows it."""
    run = make(f"--out-dir {tmp_path} --dataset {folder} --batch-size 6 --label-drop 0.3 {flags}")
    known = {tuple(x.flatten().tolist()): (y, mirrored) for mirrored in (False, True) for x, y in zip(
        run.images.train.flip(3) if mirrored else run.images.train, run.images.train_y.tolist())}
    nulls, flips, seen = 0, 0, set()
    batches = [run.batch(step) for step in range(100)]
    for batch in batches:
        for z1, y in zip(data.to_uint8(batch.z1).flatten(1).tolist(), batch.y.tolist()):
            label, mirrored = known[tuple(z1)]
            assert y in (label, 2)
            nulls, flips = nulls + (y == 2), flips + mirrored
            seen.add(tuple(z1))
        assert torch.equal(batch.zlo, Damage()("sr", batch.z1).zlo)
    assert abs(nulls / 600 - null) < 0.06 * (null > 0) + 1e-9 and abs(flips / 600 - flipped) < 0.07 * (flipped > 0) + 1e-9
    assert len(seen) == (6 if flags == "--overfit" else 72)  # 36 training images and their mirror images


def test_paired_images_flip_together(tmp_path, folder):
    negative = tmp_path / "negative"
    for path in folder.rglob("*.png"):
        target = negative / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(path))).save(target)
    run = make(f"--out-dir {tmp_path / 'out'} --dataset {folder} --task paired --paired-path {negative} --no-overfit")
    for step in range(10):
        batch = run.batch(step)
        assert torch.allclose(batch.zlo, -batch.z1, atol=1e-6)


def test_no_test_image_is_trained_on(tmp_path, folder):
    run = make(f"--out-dir {tmp_path} --dataset {folder} --no-overfit --sample-count 4")
    trained = {tuple(x.flatten().tolist()) for images in (run.images.train, run.images.train.flip(3)) for x in images}
    shown = {tuple(x.flatten().tolist()) for x in data.to_uint8(run.held_out().z1)}
    assert len(shown) == 4 and not shown & trained


# ------------------------------------------------------------------------------------------------- settings and data

def test_settings_survive_json():
    config = replace(Config(), unet_dim_mults=(1, 3), damage=Damage(taps=3), interpolant=Interpolant(sigma=0.25), wandb_entity="me")
    for plain in (asdict(config), json.loads(json.dumps(asdict(config), allow_nan=False))):  # which knows no infinity
        again = from_plain(Config, plain)
        assert again == config and isinstance(again.damage, Damage) and isinstance(again.unet_dim_mults, tuple)


def test_config_json_is_the_runs_config(finished):
    plain = json.loads((finished / "config.json").read_text())
    config = from_plain(Config, plain)
    assert config == from_plain(Config, checkpoint(finished)["config"])
    assert (config.unet_channels, config.max_steps, config.dataset, config.preset) == (8, 4, "shapes", "small")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_allowed_and_make_a_network(monkeypatch, name):
    monkeypatch.setattr(methods.udpm, "load_lpips", lambda path: None)  # a download
    config = replace(Config(**PRESETS[name]), preset=name)
    config.check()
    assert from_plain(Config, json.loads(json.dumps(asdict(config)))) == config
    with torch.device("meta"):
        trainer.make_unet(config, 10)


@pytest.mark.parametrize("preset", ["cifar10-sr", "small-sr3"])
def test_flags_override_their_preset(preset):
    config, _ = trainer.read_command_line(["--preset", preset, "--device", "cpu"])
    assert config == replace(Config(**PRESETS[preset]), preset=preset, device="cpu")
    config, _ = trainer.read_command_line(["--batch-size", "6", "--device", "cpu", f"--preset={preset}", "--damage.factor", "4"])
    expected = replace(Config(**PRESETS[preset]), preset=preset, device="cpu", batch_size=6)
    assert config == replace(expected, damage=replace(expected.damage, factor=4))


@pytest.mark.parametrize("flags, steps, warmup", [
    ("--preset sr3-faces128", 1_000_000, 50_000), ("--preset sr3-faces128 --overfit", 1000, 0), ("--preset=sr3-faces128 --overfit --max_steps 7", 7, 0),
    ("--preset sr3-faces128 --overfit --warmup-steps=3", 1000, 3), ("--preset small", 600, 0), ("--preset small --no-overfit", 100_000, 0)])
def test_a_presets_step_count_is_for_its_own_mode(flags, steps, warmup):
    config, _ = trainer.read_command_line([*flags.split(), "--device", "cpu"])
    assert (config.steps, config.warmup_steps) == (steps, warmup)


def test_the_average_of_the_weights_is_no_part_of_a_graph(tmp_path):
    run = make(f"--out-dir {tmp_path}")
    before = [p.clone() for p in run.ema.parameters()]
    run.train_step()
    assert not any(p.requires_grad for p in run.ema.parameters()) and not all(map(torch.equal, before, run.ema.parameters()))


@pytest.fixture
def no_cifar(monkeypatch):
    original = data.load

    def load(dataset, *args, **kwargs):
        if dataset == "cifar10":
            raise data.DatasetError("cifar10 is not in data")
        return original(dataset, *args, **kwargs)

    monkeypatch.setattr(data, "load", load)


def test_the_demo_without_cifar_draws_shapes_and_says_so(tmp_path, no_cifar, capsys):
    run = start(tmp_path, "--dataset None --max-steps 1")
    said = capsys.readouterr().out
    assert "*" * 50 in said and "No CIFAR-10: cifar10 is not in data" in said and "shapes" in said and "--dataset" in said
    assert json.loads((run / "config.json").read_text())["dataset"] == "shapes"
    resume(run, "--max-steps 2")  # on the same images, without the banner
    assert "No CIFAR-10" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--dataset None --no-overfit", "--dataset cifar10", "--dataset cifar10 --no-overfit"])
def test_where_cifar_was_meant_its_lack_is_an_error(tmp_path, no_cifar, capsys, flags):
    assert start(tmp_path, flags, status=2) is None
    assert "cifar10 is not in data" in one_line(capsys)


def test_without_a_gpu_the_small_preset_is_taken_and_said(capsys):
    config, _ = trainer.read_command_line(["--device", "cpu"])
    assert config == replace(Config(**PRESETS["small"]), preset="small", device="cpu")
    said = capsys.readouterr().out
    assert "small" in said and "no GPU" in said and "--preset cifar10-sr" in said


# -------------------------------------------------------------------------------------------------- several processes

def without_noise(self, net, batch):
    """A loss that draws nothing, so that only the sharing of the batch is left to compare."""
    target = net(batch.zlo, torch.full_like(batch.z1[:, 0, 0, 0], 0.5), batch.y, batch.cond) - batch.z1
    return target.square().flatten(1).mean(1)


def share(arguments, record):
    """One of several processes; leaves what it was given and what it drew at each step in `record`."""
    Interpolant.loss, seen, original = without_noise, [], Trainer.batch

    def batch(self, step):
        result = original(self, step)
        seen.append((data.to_uint8(result.z1), torch.rand(3)))
        return result

    Trainer.batch = batch
    status = trainer.main(arguments)
    torch.save(seen, record)
    return status


def ranks(count):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]


def test_two_processes_train_as_one(tmp_path, process, monkeypatch):
    # Adam enlarges the rounding of small gradients, hence the low rate, and groups of two channels: with one, a bias before a norm has none
    flags = "--precision fp32 --unet-channels 16 --base-lr 5e-5 --grad-clip 1000 --max-steps 3 --print-loss-every 1"
    arguments = f"{TINY} --out-dir {tmp_path}/two {flags}".split()
    both = [process(share, arguments, tmp_path / f"seen-{rank}", env=env) for rank, env in enumerate(ranks(2))]
    with monkeypatch.context() as patch:
        patch.setattr(Interpolant, "loss", without_noise)
        one = start(tmp_path / "one", flags)
        whole = data.to_uint8(make(f"--out-dir {tmp_path}/other {flags}").batch(0).z1)
    for each in both:
        each.join(60)
        assert each.exitcode == 0, each.log.read_text()
    two = next((tmp_path / "two").iterdir())
    ours, theirs = checkpoint(two), checkpoint(one)
    begin = leaves(trainer_weights(one))
    for name, tensor in leaves(theirs["players"]).items():
        assert (tensor - leaves(ours["players"])[name]).abs().max() < 1e-6, name
        assert (tensor - begin[name]).abs().max() > 5e-5, name  # it has moved far more than that
    for i, moments in theirs["optimizers"][0]["state"].items():  # of the gradient itself: Adam's steps do not show its scale
        mean = moments["exp_avg"]
        assert (ours["optimizers"][0]["state"][i]["exp_avg"] - mean).abs().max() < 1e-4 * mean.abs().max()
    for a, b in zip(metrics(two), metrics(one), strict=True):
        assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=1e-3) for key in a)
    seen = [torch.load(tmp_path / f"seen-{rank}") for rank in range(2)]
    for step in range(3):
        (z1_0, noise_0), (z1_1, noise_1) = seen[0][step], seen[1][step]
        assert torch.equal(torch.stack([z1_0, z1_1], 1).flatten(0, 1), whole)  # every image once
        assert not torch.equal(noise_0, noise_1)


def trainer_weights(run) -> list[dict]:
    """The weights that the run began with."""
    config = from_plain(Config, checkpoint(run)["config"])
    trainer.reseed("weights", config.seed)
    return [trainer.make_unet(config, checkpoint(run)["num_classes"]).state_dict()]


def interrupted(arguments, rank, moment):
    """One of two processes, of which rank 0 or 1 alone is sent SIGTERM in step 2: while it computes, or as it hears from the other."""
    def strike(*_):
        if rank == (moment == "in the step") and running[0].step == 2 - (moment == "in the step"):
            os.kill(os.getpid(), signal.SIGTERM)

    running, step, reduce = [], Trainer.train_step, torch.distributed.all_reduce

    def train_step(self):
        running[:] = [self]
        if moment == "in the step":
            strike()
        return step(self)

    def all_reduce(tensor, op=torch.distributed.ReduceOp.SUM):
        reduce(tensor, op)
        if moment == "between" and op == torch.distributed.ReduceOp.MAX:
            strike()

    Trainer.train_step, torch.distributed.all_reduce = train_step, all_reduce
    return trainer.main(arguments)


@pytest.mark.parametrize("moment, every, stops_at", [("in the step", 1, 2), ("between", 1, 3), ("in the step", 50, 10)])
def test_a_signal_to_one_process_stops_both_in_the_same_step(tmp_path, process, moment, every, stops_at):
    arguments = f"{TINY} --out-dir {tmp_path}/out --max-steps 1000 --print-loss-every {every}".split()
    both = [process(interrupted, arguments, rank, moment, env=env) for rank, env in enumerate(ranks(2))]
    for each in both:
        each.join(60)
        assert each.exitcode == 143, each.log.read_text()
    run = next((tmp_path / "out").iterdir())
    assert checkpoint(run)["step"] == stops_at
    resume(run, f"--max-steps {stops_at + 1}")
