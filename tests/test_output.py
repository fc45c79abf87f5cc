"""Where what a command says can't be written: it goes on, and tells once why a file can't be."""
import errno
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import trainer
from images import one_line
from runs import TINY, TRAINER, checkpoint, linux
from support.output import Attempts, Unbreakable

TALKS = """
import sys, warnings
from tqdm import tqdm
from support.output import unbreakable_output, warn
unbreakable_output()
for i in tqdm(range(500), mininterval=0):
    print(f"line {i} of many")
    tqdm.write(f"another {i}")
warn("something")
warnings.warn("something else")
print("the end", flush=True)
open(sys.argv[1], "w").close()
print("left in the buffer", end="")
sys.exit(3)
"""


def bad(kind):
    """What a stream is connected to, so that nothing can be written to it."""
    if kind == "full disk":
        return os.open("/dev/full", os.O_WRONLY)
    read, write = os.pipe()
    os.close(read)
    return write


def run(command, **streams) -> subprocess.CompletedProcess:
    """In the repository's folder, with streams that are "full disk", "closed pipe" or captured (None)."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    files = {name: subprocess.PIPE if kind is None else bad(kind) for name, kind in streams.items()}
    try:
        return subprocess.run(command, cwd=TRAINER.parent, env=buffered, text=True, timeout=120, **files)
    finally:
        for file in files.values():
            if file != subprocess.PIPE:
                os.close(file)


@linux
@pytest.mark.parametrize("kind", ["full disk", "closed pipe"])
@pytest.mark.parametrize("names", [["stdout"], ["stderr"]])
def test_streams_that_cannot_be_written_end_nothing(tmp_path, kind, names):
    streams = {name: kind if name in names else None for name in ("stdout", "stderr")}
    result = run([sys.executable, "-c", TALKS, tmp_path / "reached"], **streams)
    assert result.returncode == 3 and (tmp_path / "reached").exists()
    if "stderr" not in names:
        assert "100%" in result.stderr and "warning: something" in result.stderr
        assert "ignored" not in result.stderr and "rror" not in result.stderr
    if "stdout" not in names:
        assert "line 499 of many\nanother 499\nthe end\nleft in the buffer" in result.stdout


def test_streams_that_were_closed_from_the_start(tmp_path):
    command = ["sh", "-c", '"$@" >&- 2>&-', "sh", sys.executable, "-c", TALKS, str(tmp_path / "reached")]
    assert run(command, stdout=None, stderr=None).returncode == 3 and (tmp_path / "reached").exists()


def without_output(arguments):
    os.dup2(bad("full disk"), 1), os.dup2(bad("closed pipe"), 2)
    return trainer.main(arguments)


@linux
def test_a_run_whose_output_is_lost_is_not(tmp_path, process):
    run = process(without_output, f"{TINY} --out-dir {tmp_path}/out --max-steps 3 --print-loss-every 1".split())
    run.join(60)
    assert run.exitcode == 0 and checkpoint(next((tmp_path / "out").iterdir()))["step"] == 3


def test_a_stream_takes_text_again_and_is_otherwise_the_one_of_before():
    stream = Unbreakable(sys.__stdout__)
    assert (stream.encoding, stream.fileno(), stream.isatty()) == (sys.__stdout__.encoding, 1, sys.__stdout__.isatty())

    written, full = [], True

    def write(text):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(text)

    stream = Unbreakable(SimpleNamespace(write=write))
    print("lost", file=stream)
    full = False
    print("kept", file=stream)
    assert "".join(written) == "kept\n"


def test_a_character_that_a_stream_lacks_is_replaced():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    print("a\u2191b", file=Unbreakable(stream))
    assert stream.buffer.getvalue() == b"a\\u2191b\n"


# ----------------------------------------------------------------------------------------------------------- the reason

class Full:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, room):
        self.room = room

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(content)

    def flush(self):
        pass


@pytest.mark.parametrize("room", [0, 200, 300_000, 401_000])
def test_a_full_disk_is_the_reason_however_torch_puts_it(room):
    with pytest.raises(Exception) as caught:
        torch.save({"weights": torch.zeros(100_000)}, Full(room))
    assert one_line(caught.value) == "No space left on device"


def test_other_reasons():
    assert one_line(RuntimeError("one\n two")) == "one two" and one_line(KeyError()) == "KeyError"
    assert one_line(OSError(errno.EACCES, "Permission denied", "file")) == "Permission denied"
    assert one_line(OSError("no strerror")) == "no strerror"
    with pytest.raises(ValueError) as caught:
        try:
            raise OSError(errno.EACCES, "Permission denied")
        except OSError:
            raise ValueError("a word of our own") from None
    assert one_line(caught.value) == "a word of our own"


def test_a_failure_is_told_once_and_so_is_its_end(capsys):
    attempt = Attempts()

    def fail(number):
        raise OSError(number, os.strerror(number))

    for number in (errno.ENOSPC, errno.ENOSPC, errno.EACCES, errno.ENOSPC):
        assert attempt("the file", lambda: fail(number)) is None
        attempt("the other", lambda: None)
    assert attempt("the file", lambda: 7) == 7 and attempt("the file", lambda: 8) == 8
    attempt("the file", lambda: fail(errno.ENOSPC))
    why = [line.partition("the file ")[2].partition(";")[0] for line in capsys.readouterr().err.splitlines()]
    full, denied = "failed (No space left on device)", "failed (Permission denied)"
    assert why == [full, denied, full, "works again", full]
