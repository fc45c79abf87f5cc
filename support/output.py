"""What is said to the user, where it may fail: a stream that can't be written, and warnings that don't repeat."""
import os
import signal
import sys
import threading
from contextlib import suppress

from tqdm import tqdm

from images import one_line


def quiet_interrupt():
    """Until the command's main() begins, while its imports take their seconds, Ctrl-C ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_main_thread() -> bool:
    """Python lets this thread alone say what a signal does."""
    return threading.current_thread() is threading.main_thread()


def unbreakable_output():
    """From now on a closed pipe or terminal, or a log file on a full disk, loses what is printed and ends nothing.

    To be called first in a command's main(), which hears of Ctrl-C again. A stream that takes text again gets what is
    printed from then on.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and in_main_thread():
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


class Attempts:
    """Calls that may fail without ending the run. Of the same failures in a row only the first one is told."""

    def __init__(self):
        self.failing = {}  # why, of each thing that failed the last time

    def __call__(self, what: str, function):
        """function(), or None and a warning."""
        try:
            result = function()
        except Exception as failure:
            why = one_line(failure)
            if self.failing.get(what) != why:
                warn(f"{what} failed ({why}); the run goes on without it")
            self.failing[what] = why
            return None
        if self.failing.pop(what, None):
            tqdm.write(f"{what} works again", file=sys.stderr)
        return result
