"""What is said to the user, where it may fail: a stream that can't be written, and warnings that don't repeat."""
import os
import signal
import sys
from contextlib import suppress

from tqdm import tqdm

from images import one_line


def quiet_interrupt():
    """Until the command's main() begins, while its imports take their seconds, Ctrl-C ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def unbreakable_output():
    """From now on a closed pipe or terminal, or a log file on a full disk, loses what is printed and ends nothing.

    To be called first in a command's main(), which hears of Ctrl-C again. A stream that takes text again gets what is
    printed from then on.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w"))
        elif not isinstance(stream, Unbreakable):
            setattr(sys, name, Unbreakable(stream))


class Unbreakable:
    """A text stream that drops what can't be written.

    Python's own flush when it leaves goes through it as well: no message then, and no exit status of 120.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # a ValueError too, but only some characters are at fault
            return self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):  # ValueError: the stream was closed
            return len(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()


def warn(text: str):
    """A line on stderr that does not tear a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def reason(failure: BaseException) -> str:
    """Why it failed, on one line; where a file is at fault, in the system's words: No space left on device.

    torch.save may hide them: its zip writer, left half-way, raises an error of its own while it handles that one.
    """
    cause = failure
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return one_line(failure)


class Attempts:
    """Calls that may fail without ending the run. Of the same failures in a row only the first one is told."""

    def __init__(self):
        self.failing = {}  # why, of each thing that failed the last time

    def __call__(self, what: str, function):
        """function(), or None and a warning."""
        try:
            result = function()
        except Exception as failure:
            why = reason(failure)
            if self.failing.get(what) != why:
                warn(f"{what} failed ({why}); the run goes on without it")
            self.failing[what] = why
            return None
        if self.failing.pop(what, None):
            tqdm.write(f"{what} works again", file=sys.stderr)
        return result
