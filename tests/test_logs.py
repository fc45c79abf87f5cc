"""What a run logs: sinks that may block, the lines of metrics.jsonl, TensorBoard. Nothing is lost in silence."""
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time

import pytest

from images import SettingsError
from runs import FINISHED, at_step, checkpoint, metrics, one_line, resume, same, start
from support import logs
from support.logs import Background, Files, Log
from support.output import Attempts

# ------------------------------------------------------------------------------------------------- sinks that may block

class Slow:
    """A sink that logs when it may."""

    def __init__(self):
        self.free = threading.Event()

    def log(self, numbers, pictures):
        self.free.wait(60)


def test_a_sink_that_hangs_is_dropped_when_its_queue_is_full(monkeypatch, capsys):
    monkeypatch.setattr(logs, "QUEUE", 3)
    slow, released, began = Slow(), [], time.monotonic()
    sink = Background("slow", lambda: slow, lambda: released.append(True))
    for step in range(20):
        sink.log({"step": step}, {})
    sink.close()
    assert time.monotonic() - began < 5 and released
    slow.free.set()
    assert capsys.readouterr().err == "warning: slow does not answer; the run goes on without it\n"


def test_ctrl_c_does_not_wait_for_a_sink(capsys):
    slow, began = Slow(), time.monotonic()
    sink = Background("slow", lambda: slow)
    sink.log({"step": 1}, {})
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        sink.close()
    assert time.monotonic() - began < 8 and len(capsys.readouterr().err.splitlines()) == 1
    slow.free.set()


# ------------------------------------------------------------------------------------------------------ metrics.jsonl

def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_that_cannot_be_read_are_set_aside(tmp_path, copy, capsys):
    straight = start(tmp_path / "straight", FINISHED.replace("4", "6"))
    bad = [b'{"step": 3, "lo{"step": 4, "loss": 1.0}', b'{"step": 1, "text": "\xff"}', b'{"loss": 1.0}', b"\0\0\0",
           b'{"step": "3"}', b'{"step": 3.0}', b'{"step": true}', b'{"step": null}', b"[3]", b"3", b'{"step": 6, "lo']
    lines, good = copy / "metrics.jsonl", (copy / "metrics.jsonl").read_bytes()
    damaged = b"\n".join(bad[:5]) + b"\n\n" + good + b"\n".join(bad[5:])  # half a line at the end
    lines.write_bytes(damaged)
    capsys.readouterr()
    resume(copy, "--max-steps 6")
    assert metrics(copy) == metrics(straight)
    assert (copy / "metrics.jsonl.unreadable").read_bytes() == damaged
    warnings = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
    assert len(warnings) == 1 and "11 lines" in warnings[0]


def test_a_line_is_appended_whole_or_not_at_all(tmp_path, capsys):
    files, lines = Files(tmp_path, 0, Attempts()), tmp_path / "metrics.jsonl"
    files.log({"step": 1}, {})
    lines.write_bytes(lines.read_bytes() + b'{"step": 2, "lo')  # killed in the middle of it
    files.log({"step": 3}, {})
    assert lines.read_bytes() == b'{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n'

    before, limits = lines.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))  # room for five bytes
    try:
        for step in (4, 5, 6):
            files.log({"step": step}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lines.read_bytes() == before
    files.log({"step": 7}, {})
    assert lines.read_bytes() == before + b'{"step": 7}\n'
    assert capsys.readouterr().err.splitlines() == [
        "warning: metrics.jsonl failed (File too large); the run goes on without it", "metrics.jsonl works again"]


def test_files_that_cannot_be_written_are_one_line_at_the_start(tmp_path, copy, capsys):
    for name in ("metrics.jsonl", "config.json"):
        run = shutil.copytree(copy, tmp_path / f"without-{name}")
        (run / name).unlink()
        (run / name).mkdir()
        capsys.readouterr()
        resume(run, "--max-steps 6", status=2)
        error = one_line(capsys)
        assert f"{run / name} can't be written (Is a directory)" in error
    with pytest.raises(SettingsError, match="metrics.jsonl can't be written .No such file or directory."):
        Log(tmp_path / "nowhere", 0)


def test_a_folder_that_is_gone_is_made_again(tmp_path, monkeypatch, finished, capsys):
    at_step(monkeypatch, 3, lambda: shutil.move(next(tmp_path.glob("out/*")), tmp_path / "renamed"))
    run = start(tmp_path / "out", FINISHED)
    assert steps(tmp_path / "renamed" / "metrics.jsonl") == [2, 2] and steps(run / "metrics.jsonl") == [4, 4]
    same(checkpoint(run), checkpoint(finished))
    assert (run / "samples" / "step_000004.png").read_bytes() == (finished / "samples/step_000004.png").read_bytes()
    assert capsys.readouterr().err.count(f"{run} was gone and is made again") == 1
    resume(run, "--max-steps 5")  # it is the run's, although it is another one
    assert checkpoint(run)["step"] == 5


# -------------------------------------------------------------------------------------------------------- TensorBoard

def test_tensorboard_holds_the_numbers_and_the_grids(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = start(tmp_path, f"{FINISHED} --use-tensorboard")
    resume(run, "--max-steps 6 --use-tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {(event.step, round(event.value, 4)) for event in events.Scalars("loss")}
    assert shown == {(line["step"], round(line["loss"], 4)) for line in metrics(run) if "loss" in line}
    assert [event.step for event in events.Images("samples/step")] == [2, 4, 6]


def test_a_missing_tensorboard_is_one_line(tmp_path, monkeypatch, capsys, finished):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = start(tmp_path, f"{FINISHED} --use-tensorboard")
    assert capsys.readouterr().err.count("pip install tensorboard") == 1
    same(checkpoint(run), checkpoint(finished))
