"""The whole run, stopped: nothing is lost, whatever ends it, and a resumed run has the same bits."""
import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import trainer
from runs import (
    FINISHED,
    TINY,
    at_step,
    checkpoint,
    contents,
    leaves,
    linux,
    metrics,
    one_line,
    resume,
    same,
    start,
    together,
)
from support import logs, model
from support.model import make_unet, run_sampler
from support.settings import from_plain
from trainer import Config
from unet import Guided

# ------------------------------------------------------------------------------------------------------------- resume

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


def test_the_checkpoint_before_takes_a_damaged_ones_place(copy, capsys):
    last, straight = copy / "checkpoints" / "last.pt", checkpoint(copy)
    content = last.read_bytes()
    flipped = content[:20_000] + bytes([content[20_000] ^ 1]) + content[20_001:]  # one bit, in somebody's weights
    last.write_bytes(flipped)
    with pytest.warns(UserWarning, match="previous.pt, of step 2, takes its place"):
        resume(copy, "--max-steps 4")
    same(checkpoint(copy), straight)
    for path in (last, last.with_name("previous.pt")):
        path.unlink()  # the two may be one file
        path.write_bytes(flipped)
    capsys.readouterr()
    resume(copy, "--max-steps 6", status=2)
    error = one_line(capsys)
    assert "run = " in error and str(copy) in error


def test_a_resume_that_cannot_be_changes_nothing(tmp_path, finished, capsys):
    before = contents(finished)
    capsys.readouterr()
    for run, flags, words in (
            (finished, "", ["max_steps = 4", "step 4"]), (finished, "--max-steps 3", ["max_steps = 3", "step 4"]),
            (tmp_path, "", [str(tmp_path)]), (tmp_path / "nowhere", "", [str(tmp_path / "nowhere")])):
        resume(run, flags, status=2)
        error = one_line(capsys)
        assert all(word in error for word in words), error
    assert contents(finished) == before


def test_settings_of_another_version_are_ignored_with_a_warning(copy):
    path = copy / "checkpoints" / "last.pt"
    state = checkpoint(copy)
    state["config"] |= {"frobnicate": 3, "damage": state["config"]["damage"] | {"rain": 1}}
    del state["config"]["guidance"]  # and a field that was not there then takes its default
    torch.save(state, path)
    with pytest.warns(UserWarning) as caught:
        resume(copy, "--max-steps 5")
    for name in ("frobnicate", "rain"):
        assert sum(name in str(each.message) for each in caught) == 1
    assert checkpoint(copy)["step"] == 5 and "frobnicate" not in checkpoint(copy)["config"]


# ------------------------------------------------------------------------------------------------------------ signals

def test_a_signal_saves_and_leaves(tmp_path, monkeypatch, finished, capsys):
    """One after the other, in the default folder."""
    monkeypatch.chdir(tmp_path)
    command = f"{TINY} {FINISHED}".split()
    for step, (number, status) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], 1):
        handler = signal.getsignal(number)
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: os.kill(os.getpid(), number))
            assert trainer.main(command) == status
        run = next(Path("runs").iterdir())
        assert checkpoint(run)["step"] == step and signal.getsignal(number) is handler
        assert capsys.readouterr().out.endswith(f"go on with: python trainer.py --resume {run}\n")
        command = ["--resume", str(run)]
    resume(run)
    same(checkpoint(run), checkpoint(finished))
    assert metrics(run) == metrics(finished)


def test_a_hangup_may_be_ignored(tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert checkpoint(start(tmp_path, "--max-steps 2"))["step"] == 2


def test_a_signal_cuts_a_sampling_short(tmp_path, monkeypatch, finished):
    original = run_sampler

    def endless(config, net, batch, trace=None):
        if not isinstance(net, Guided):  # the rehearsal before the first step
            return original(config, net, batch, trace)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(model, "run_sampler", endless)
        run = start(tmp_path, FINISHED, 130)
    assert time.monotonic() - began < 15
    assert checkpoint(run)["step"] == 2 and not list(run.rglob("*.png"))
    resume(run)
    same(checkpoint(run), checkpoint(finished))
    assert metrics(run) == metrics(finished)  # with the sampling that was missed
    pictures = [{p.name: p.read_bytes() for p in (each / "samples").iterdir()} for each in (run, finished)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 4


@pytest.mark.parametrize("pause, saved", [(1.1, 2), (0, 3)])  # seconds
def test_a_second_signal_does_not_wait_but_a_signal_may_come_twice(tmp_path, monkeypatch, pause, saved):
    at_step(monkeypatch, 3,
            lambda: [os.kill(os.getpid(), signal.SIGINT), time.sleep(pause), os.kill(os.getpid(), signal.SIGINT)])
    run = start(tmp_path, "--max-steps 4 --checkpoint-every 1", 130)
    assert checkpoint(run)["step"] == saved


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
    net = make_unet(config, state["num_classes"])
    net.load_state_dict(state["ema"])
    net.load_state_dict(state["players"][0])
    assert all(tensor.device.type == "cpu" for tensor in leaves(state["ema"]).values())


# -------------------------------------------------------------------------------------------------- several processes

def interrupted(arguments, rank):
    """One of two processes, of which the second alone is sent SIGTERM in step 2."""
    if rank:
        at_step(pytest.MonkeyPatch(), 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return trainer.main(arguments)


def test_a_signal_to_one_process_stops_both_in_the_same_step(tmp_path, process):
    """When they hear of each other again."""
    arguments = f"{TINY} --out-dir {tmp_path}/out --max-steps 1000".split()
    together(process, interrupted, *((arguments, rank) for rank in range(2)), status=143)
    run = next((tmp_path / "out").iterdir())
    assert checkpoint(run)["step"] == 10
    resume(run, "--max-steps 11")


@linux
@pytest.mark.parametrize("name, status", [(".lock", 0), ("metrics.jsonl", 2)])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_in_a_runs_folder_are_left_alone(copy, tmp_path, name, status, kind):
    """A link's target is not written to, and a pipe is not waited for."""
    (copy / name).unlink()
    other = tmp_path / "other"
    other.write_text("of somebody else")
    (copy / name).symlink_to(other) if kind == "link" else os.mkfifo(copy / name)
    resume(copy, "--max-steps 6", status=status)
    assert other.read_text() == "of somebody else"
