"""What a run leaves to look at: metrics.jsonl and pictures in its folder, and the same on Weights & Biases.

Each of these is a sink: log(numbers, pictures) and close(). No sink may end a run or hold it up, so one that talks to
another program works in a thread, as a Background.
"""
import json
import os
import queue
import secrets
import shlex
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from images import SettingsError, one_line
from images.files import save_image
from support.disk import no_link, write_atomically
from support.output import Attempts, warn

PATIENCE = 10  # seconds that the run waits for a sink in a thread, when it starts and when it ends
QUEUE = 256  # entries that may wait for such a sink
ONLINE_WITHIN = 6  # seconds that wandb may take to reach its server


class Log:
    """Numbers and pictures to every sink: the run's files, and wandb and TensorBoard if wanted."""

    def __init__(self, folder: Path, step: int, again: bool = False, wandb: dict | None = None,
                 tensorboard: bool = False):
        """step: where the run goes on; again: with that step's pictures. wandb: project, entity, id (None: a new one)
        and config; None: no wandb.

        Raises SettingsError where the run's files can't be written.
        """
        self.attempt = Attempts()
        self.sinks, self.wandb_id = [Files(folder, step, self.attempt, again)], None
        if wandb is not None:
            self.wandb_id = wandb["id"] or secrets.token_hex(4)
            how = wandb | dict(id=self.wandb_id)
            self.sinks.append(Background("wandb", lambda: Wandb(folder, **how), leave_wandb))
        if tensorboard:
            self.sinks.append(Background("tensorboard", lambda: TensorBoard(folder, step)))

    def __call__(self, step: int, pictures: dict[str, np.ndarray] | None = None, **numbers):
        """A line of metrics, those that are None left out; pictures (H, W, 3) uint8 by name."""
        numbers = {name: value for name, value in numbers.items() if value is not None}
        # small ones, as learning rates are, keep their digits
        numbers = {"step": step} | {name: round(x, 6 if abs(x) > 0.01 else 12) for name, x in numbers.items()}
        for sink in self.sinks:
            sink.log(numbers, pictures or {})

    def flush(self):
        """The lines so far survive a loss of power."""
        self.sinks[0].flush()

    def close(self):
        for sink in self.sinks:
            sink.close()


class Background:
    """A sink in a thread of its own. Where it fails or hangs it is dropped, with one warning, and the run goes on.

    The thread is a daemon: Python does not wait for it to leave.
    """

    def __init__(self, name: str, make: Callable, release: Callable = lambda: None):
        """make() -> the sink; release() frees what a sink that is done with would hold up the program's end by.

        Waits until the sink is made, at most PATIENCE seconds: what it prints comes before the training's lines.
        """
        self.name, self.make, self.release = name, make, release
        self.queue, self.dropped = queue.SimpleQueue(), False
        self.ready, self.done = threading.Event(), threading.Event()
        try:
            threading.Thread(target=self.work, name=name, daemon=True).start()
        except RuntimeError as failure:  # no more threads can be had
            self.dropped = True
            warn(f"{name} failed ({one_line(failure)}); the run goes on without it")
        if not self.dropped and not self.ready.wait(PATIENCE):
            print(f"{name}: no answer in {PATIENCE} seconds; training begins, and it joins when it can")

    def work(self):
        try:
            sink = self.make()
            self.ready.set()
            while (entry := self.queue.get()) is not None:
                sink.log(*entry)
            sink.close()
            self.release()
        except (Exception, SystemExit) as failure:
            self.drop(f"failed ({one_line(failure)}); the run goes on without it")
        self.ready.set()
        self.done.set()

    def drop(self, why: str):
        """Its thread may hang for ever, so another one releases what it holds."""
        if not self.dropped:
            self.dropped = True
            warn(f"{self.name} {why}")
            releasing = threading.Thread(target=self.release, daemon=True)
            releasing.start()
            releasing.join(1)

    def log(self, numbers: dict, pictures: dict):
        if self.queue.qsize() >= QUEUE:
            self.drop("does not answer; the run goes on without it")
        if not self.dropped:
            self.queue.put((numbers, pictures))

    def close(self):
        """Waits for what is queued, at most PATIENCE seconds."""
        if self.dropped:
            return
        self.queue.put(None)
        try:
            self.done.wait(PATIENCE)
        finally:  # Ctrl-C as well
            if not self.done.is_set():
                self.drop(f"did not answer for {PATIENCE} seconds: it may lack the run's last lines")


# --------------------------------------------------------------------------------------------------- the run's files

class Files:
    """metrics.jsonl, an object a logged step, and samples/NAME_STEP.png."""

    def __init__(self, folder: Path, step: int, attempt: Attempts, again: bool = False):
        self.folder, self.lines, self.attempt = folder, folder / "metrics.jsonl", attempt
        try:
            with open(self.lines, "a+b", opener=no_link) as file:
                file.seek(0)
                content = file.read()
            if step:
                self.cut(content, step, again)
        except OSError as failure:
            raise SettingsError(f"{self.lines} can't be written ({one_line(failure)})") from None

    def cut(self, content: bytes, step: int, again: bool):
        """Drops the lines after `step`, and `again` of its pictures, which are about to come again; what can't be read
        is left in a copy of the file."""
        lines = [line for line in content.splitlines(keepends=True) if line.strip()]
        steps = [step_of(line) for line in lines]
        if None in steps:
            aside = self.lines.with_name("metrics.jsonl.unreadable")
            write_atomically(aside, lambda f: f.write(content))
            warn(f"{steps.count(None)} lines of {self.lines} can't be read; {aside.name} beside it has them")
        kept = b"".join(line for line, at in zip(lines, steps) if at is not None and (
            at < step or at == step and not (again and b'"nfe"' in line)))
        if kept != content:
            write_atomically(self.lines, lambda f: f.write(kept))

    def log(self, numbers: dict, pictures: dict):
        self.attempt("metrics.jsonl", lambda: self.append(numbers))
        if pictures:
            self.attempt("saving pictures", lambda: self.save(numbers["step"], pictures))

    def append(self, numbers: dict):
        """A whole line or nothing."""
        line = (json.dumps(numbers) + "\n").encode()
        with open(self.lines, "a+b", buffering=0, opener=no_link) as f:
            end = f.tell()
            if end:
                f.seek(end - 1)
                if f.read(1) != b"\n":  # half a line, of a process that was killed in the middle of it
                    line = b"\n" + line
            try:
                while line:
                    line = line[f.write(line):]  # of which a full disk may take a part
            except BaseException:
                with suppress(OSError):
                    f.truncate(end)
                raise

    def save(self, step: int, pictures: dict):
        for name, picture in pictures.items():
            save_image(self.folder / "samples" / f"{name}_{step:06d}.png", Image.fromarray(picture))

    def flush(self):
        with suppress(OSError), open(self.lines, "rb", opener=no_link) as f:
            os.fsync(f.fileno())

    def close(self):
        pass


def step_of(line: bytes) -> int | None:
    """Of a line of metrics.jsonl; None: it can't be read."""
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


# -------------------------------------------------------------------------------------------------------- TensorBoard

class TensorBoard:
    """The same in the run's folder tensorboard/. What came after the checkpoint that a run goes on from is hidden."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("it needs one more package: pip install tensorboard") from None
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
        print(f"tensorboard: `tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}` shows the run")

    def log(self, numbers: dict, pictures: dict):
        step = numbers["step"]
        for name, value in numbers.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self.writer.add_image(f"samples/{name}", picture, step, dataformats="HWC")
        self.writer.flush()

    def close(self):
        self.writer.close()


# -------------------------------------------------------------------------------------------------------------- wandb

class Wandb:
    """Online where an account is configured, else offline. All of it may raise, and all of it may block."""

    def __init__(self, folder: Path, project: str, entity: str | None, id: str, config: dict):
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # without a network, reports on itself delay the exit
        import wandb

        self.wandb, mode = wandb, wandb_mode()
        how = dict(project=project, entity=entity, id=id, name=folder.name, dir=str(folder), config=config,
                   resume="allow", settings=wandb.Settings(init_timeout=ONLINE_WITHIN, console="off"))
        self.run = None
        if mode != "offline":
            try:
                self.run = wandb.init(mode=mode, **how)
            except Exception as failure:
                print(f"wandb: {one_line(failure)}; going on offline")
                leave_wandb()  # its service believes that a run of this id goes on
        self.run = self.run or wandb.init(mode="offline", **how)
        if self.run.offline:
            print(f"wandb: offline; `wandb sync {shlex.quote(str(self.run.settings.sync_dir))}` uploads the run later")
        else:
            print(f"wandb: {self.run.url}")
        # an axis of our own: wandb drops points behind its internal one after a resume
        self.run.define_metric("*", step_metric="step")

    def log(self, numbers: dict, pictures: dict):
        caption = f"step {numbers['step']:,}, {numbers.get('nfe', 0):.0f} NFE"  # the columns have titles in the picture
        self.run.log(numbers | {f"samples/{name}": self.wandb.Image(picture, caption=caption)
                                for name, picture in pictures.items()})

    def close(self):
        self.run.finish()


def leave_wandb():
    """Ends wandb's service. First of all this takes back wandb's function for the exit of the program, which would
    wait for a service that hangs and show a traceback of one that died."""
    if wandb := sys.modules.get("wandb"):
        with suppress(Exception, SystemExit):  # with the exit status of its service
            wandb.teardown()


def wandb_mode() -> str:
    """WANDB_MODE if it is set, online where an account is configured, else offline: wandb must not ask."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"
