"""In place of the package wandb: records what it is told, and fails or hangs where it is asked to."""
import sys
import threading
import types
from collections import Counter


class FakeWandb(types.ModuleType):
    """From the `number`th call of `where` on, that call raises, or `hangs` until `free` is set."""

    def __init__(self, where: str | None = None, number: int = 1, hangs: bool = False):
        super().__init__("wandb")
        self.where, self.number, self.hangs, self.free = where, number, hangs, threading.Event()
        self.calls, self.inits, self.logged = Counter(), [], []
        self.offline, self.url, self.settings = True, None, types.SimpleNamespace(sync_dir="there")

    def reach(self, call: str):
        self.calls[call] += 1
        if call == self.where and self.calls[call] >= self.number:
            if not self.hangs:
                raise RuntimeError(f"{call}: no server\nanywhere")
            self.free.wait(1000)

    def Settings(self, **settings):
        return settings

    def init(self, **how):
        self.inits.append(how)
        self.reach("init")
        self.reach("init " + how["mode"])
        return self

    def define_metric(self, *names, **axis):
        self.reach("define_metric")
        self.axis = axis

    def Image(self, picture, caption):
        self.reach("Image")
        return picture, caption

    def log(self, numbers):
        self.reach("log")
        self.logged.append(numbers)

    def finish(self):
        self.reach("finish")

    def teardown(self):
        self.reach("teardown")


def use_wandb(where: str, number: int, hangs: bool):
    """In a process of its own: such a package instead of wandb, and little patience with it."""
    from support import logs

    sys.modules["wandb"], logs.PATIENCE = FakeWandb(where, number, hangs), 1
