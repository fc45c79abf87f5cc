"""A logger that may block, in a thread of its own: the run never waits long for it."""
import atexit
import queue
import threading
import time
from contextlib import suppress

from images import one_line
from support.output import warn

PATIENCE = 10  # seconds that the run waits for a logger, when it starts and when it ends
QUEUE = 256  # entries that may wait to be logged


class Background:
    """A sink that another program or a server stands behind. After a failure, or when it hangs, it is done with:
    one warning, whatever happens later.

    The thread is a daemon: Python does not wait for it to leave.
    """

    def __init__(self, name: str, make, release=lambda: None):
        """make() -> the sink; release() frees what it holds of the process. Both are called in the thread.

        Waits until the sink is made, at most PATIENCE seconds: what it prints comes before the training's lines.
        """
        self.name, self.make, self.release = name, make, release
        self.queue, self.ready = queue.Queue(QUEUE), threading.Event()
        self.given_up, self.lock = False, threading.Lock()
        self.thread = threading.Thread(target=self.work, name=name, daemon=True)
        try:
            self.thread.start()
        except RuntimeError as failure:  # no more threads can be had
            return self.give_up(f"failed ({one_line(failure)}); the run goes on without it")
        try:
            if not self.ready.wait(PATIENCE):
                print(f"{name}: no answer in {PATIENCE} seconds; training begins, and it joins when it can")
        except BaseException:  # Ctrl-C
            self.give_up("was not waited for")
            raise

    def work(self):
        try:
            sink = self.make()
            atexit.register(self.close)  # runs before what the sink itself has registered, and that may hang
            self.ready.set()
            while (entry := self.queue.get()) is not None and not self.given_up:
                sink.log(*entry)
            sink.close()
        except (Exception, SystemExit) as failure:
            self.give_up(f"failed ({one_line(failure)}); the run goes on without it")
        finally:
            self.let_go()
            self.ready.set()

    def let_go(self):
        with suppress(Exception, SystemExit):
            self.release()

    def give_up(self, why: str):
        """One warning. The thread may be stuck, so another one lets go."""
        with self.lock:
            known, self.given_up = self.given_up, True
        if not known:
            warn(f"{self.name} {why}")
            with suppress(RuntimeError):  # Python starts no thread when it is about to leave
                other = threading.Thread(target=self.let_go, daemon=True)
                other.start()
                other.join(1)

    def log(self, numbers: dict, pictures: dict):
        if self.given_up:
            return
        # copies: the caller may go on using its arrays
        entry = dict(numbers), {name: picture.copy() for name, picture in pictures.items()}
        try:
            self.queue.put_nowait(entry)
        except queue.Full:
            self.give_up("does not answer; the run goes on without it")

    def close(self):
        """Waits for what is queued, at most PATIENCE seconds."""
        atexit.unregister(self.close)
        if self.given_up or not self.thread.is_alive():
            return
        end = time.monotonic() + PATIENCE
        try:
            with suppress(queue.Full):
                self.queue.put(None, timeout=PATIENCE)
            self.thread.join(max(0, end - time.monotonic()))
        except BaseException:  # Ctrl-C
            self.give_up("was not waited for")
            raise
        if self.thread.is_alive():
            self.give_up(f"did not answer for {PATIENCE} seconds: it may lack the run's last lines")
