"""What a run keeps: nothing good is overwritten by what is bad, one trainer a folder, and the same command goes on."""
import json
import math
import os
import shutil
import threading

import pytest
import torch

import trainer
from runs import FINISHED, TINY, at_step, checkpoint, contents, linux, one_line, resume, same, start
from support import checkpoints, run_folder
from support.health import Health

# ------------------------------------------------------------------------------------------- bad does not replace good

def test_a_checkpoint_that_was_put_off_is_caught_up_on(tmp_path, monkeypatch, capsys):
    """Step 2 is skipped, and so not saved; the next report finds the run well again."""
    saved, original = [], trainer.checkpoints.save_checkpoint
    monkeypatch.setattr(trainer.checkpoints, "save_checkpoint",
                        lambda folder, state, keep: saved.append(state["step"]) or original(folder, state, keep))
    unfit = Health.unfit

    def says_so(self, state):
        return "a test says so" if state["step"] == 2 else unfit(self, state)

    monkeypatch.setattr(Health, "unfit", says_so)
    start(tmp_path, "--max-steps 5 --checkpoint-every 2 --print-loss-every 1 --sample-every 1000")
    assert saved == [3, 4, 5] and capsys.readouterr().err.count("is not saved") == 1


@pytest.mark.parametrize("recent, lowest, weight, fit", [
    (0.5, 0.4, 1, True), (39.0, 0.4, 1, True), (41.0, 0.4, 1, False), (math.inf, 0.4, 1, False), (7.0, None, 1, True),
    (0.5, 0.4, math.nan, False), (0.5, 0.4, -math.inf, False)])
def test_what_counts_as_diverged(recent, lowest, weight, fit):
    watch = Health(torch.device("cpu"))
    watch.recent, watch.lowest = recent, lowest
    assert (watch.unfit(dict(weights=[torch.ones(2), torch.tensor([1, weight, 1])])) is None) == fit


def test_training_goes_on_while_a_checkpoint_of_before_is_written(tmp_path, monkeypatch):
    gone_on, original, steps = threading.Event(), trainer.checkpoints.save_checkpoint, []

    def slow(folder, state, keep):
        assert state["step"] != 2 or gone_on.wait(60)
        steps.append(state["step"])
        return original(folder, state, keep)

    straight = start(tmp_path / "straight", "--max-steps 2 --sample-every 1000")
    monkeypatch.setattr(trainer.checkpoints, "save_checkpoint", slow)
    at_step(monkeypatch, 4, gone_on.set)
    run = start(tmp_path / "slow", f"{FINISHED} --keep-every 2")
    assert steps == [2, 4] and checkpoint(run)["step"] == 4
    same(torch.load(run / "checkpoints" / "step_000002.pt", weights_only=True), checkpoint(straight))


# ------------------------------------------------------------------------------------------- shortages of the moment

def allocator(*_):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")


def no_thread(self, original=threading.Thread.start):
    if self.name in ("checkpoint", "wandb"):
        raise RuntimeError("can't start new thread")
    original(self)


@pytest.mark.parametrize("where, what, more", [
    (run_folder, ("copied", allocator), ""), (threading.Thread, ("start", no_thread), "--use-wandb")])
def test_without_memory_for_a_copy_or_a_thread_training_waits_for_the_disk(
        tmp_path, monkeypatch, finished, capsys, where, what, more):
    monkeypatch.setattr(where, *what)
    run = start(tmp_path, f"{FINISHED} {more}")
    same(checkpoint(run), checkpoint(finished))
    assert capsys.readouterr().err.count("warning: ") == bool(more)  # wandb's


def test_pictures_for_which_there_is_no_memory_come_the_next_time(tmp_path, monkeypatch, finished, capsys):
    original, calls = trainer.model.sample_for_pictures, []

    def sample(*arguments):
        calls.append(arguments)
        return allocator() if len(calls) == 1 else original(*arguments)

    monkeypatch.setattr(trainer.model, "sample_for_pictures", sample)
    run = start(tmp_path, FINISHED)
    same(checkpoint(run), checkpoint(finished))
    assert [path.name for path in (run / "samples").glob("step*")] == ["step_000004.png"]
    assert "no samples at step 2: out of memory; lower sample_count" in capsys.readouterr().err


def test_no_memory_for_a_step_is_one_line(tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 3, allocator)
    run = start(tmp_path, FINISHED, status=1)
    assert "out of memory; lower batch_size" in one_line(capsys) and checkpoint(run)["step"] == 2


@linux
def test_what_a_checkpoint_says_survives_a_loss_of_power(tmp_path, monkeypatch):
    """The lines of metrics.jsonl are flushed before the checkpoint that vouches for them takes its place, and every
    folder after the last name in it has changed."""
    done, fsync, replace = [], os.fsync, os.replace

    def flushed(handle):
        done.append(("flush", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def renamed(source, target):
        done.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    run = start(tmp_path / "out", "--max-steps 2")
    saved = done.index(("rename", "last.pt"))
    assert ("flush", "metrics.jsonl") in done[:saved] and ("flush", "checkpoints") in done[saved:]
    assert done.index(("flush", run.name)) > done.index(("rename", "config.json"))
    assert ("flush", "out") in done and ("flush", "samples") in done


# ------------------------------------------------------------------------------------------------------ what there is

@pytest.mark.parametrize("links", [True, False])
def test_the_last_two_are_kept_and_those_that_are_to_stay(tmp_path, monkeypatch, links):
    """Also on a disk where files can have one name only."""
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    run = start(tmp_path, "--max-steps 7 --checkpoint-every 2 --keep-every 3 --sample-every 1000")
    steps = {path.name: torch.load(path, weights_only=True)["step"] for path in (run / "checkpoints").iterdir()}
    assert steps == {"last.pt": 7, "previous.pt": 6, "step_000003.pt": 3, "step_000006.pt": 6}


def test_data_is_found_from_another_folder(tmp_path, folder, monkeypatch):
    (tmp_path / "here").mkdir()
    shutil.copytree(folder, tmp_path / "here" / "pictures")
    monkeypatch.chdir(tmp_path / "here")
    run = start(tmp_path / "runs", "--dataset pictures --max-steps 2")
    monkeypatch.chdir(tmp_path)
    resume(run, "--max-steps 3")
    assert checkpoint(run)["step"] == 3
    assert json.loads((run / "config.json").read_text())["dataset"] == str(tmp_path / "here" / "pictures")


@pytest.mark.parametrize("part", ["classes", "optimizers"])
def test_a_checkpoint_that_lacks_something_is_one_line(copy, capsys, part):
    state = checkpoint(copy)
    del state[part]
    for path in (copy / "checkpoints").iterdir():
        torch.save(state, path)
    capsys.readouterr()
    resume(copy, "--max-steps 6", status=2)
    assert f"lacks {part}" in one_line(capsys)


# ---------------------------------------------------------------------------------------------- one trainer a folder

def test_a_disk_without_locks_is_used_without(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="can't be locked"):
        assert checkpoint(start(tmp_path, "--max-steps 1"))["step"] == 1


# ---------------------------------------------------------------------------------------- the same command goes on

def test_a_finished_command_says_so_and_succeeds(copy, capsys):
    before, command = contents(copy), f"{TINY} --out-dir {copy.parent} --name {copy.name} --max-steps 4"
    capsys.readouterr()
    assert trainer.main(command.split()) == 0
    assert f"{copy} is done: step 4 of 4" in capsys.readouterr().out and contents(copy) == before


def test_a_checkpoint_makes_no_folder_for_a_run_that_is_gone(tmp_path):
    """RunFolder does, with a warning, settings and a lock."""
    with pytest.raises(FileNotFoundError):
        checkpoints.save_checkpoint(tmp_path / "gone", dict(step=1), keep=False)
    assert not list(tmp_path.iterdir())
