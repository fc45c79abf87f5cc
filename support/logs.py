"""What a run leaves to look at: metrics.jsonl and pictures in its folder, and the same on Weights & Biases."""
import json
import os
import secrets
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from images import one_line
from images.files import save_png, write_atomically


class Log:
    """Numbers and pictures to every sink: the run's files, and wandb if wanted. A sink that fails never ends a run."""

    def __init__(self, folder: Path, step: int, wandb: dict | None = None):
        """step: where the run goes on. wandb: project, entity, id (None: a new one) and config; None: no wandb."""
        self.sinks, self.wandb_id = [Files(folder, step)], None
        if wandb is not None:
            self.wandb_id = wandb["id"] or secrets.token_hex(4)
            if sink := attempt("wandb", lambda: Wandb(folder, **wandb | dict(id=self.wandb_id))):
                self.sinks.append(sink)

    def __call__(self, step: int, pictures: dict[str, np.ndarray] | None = None, **numbers):
        """A line of metrics, those that are None left out; pictures (H, W, 3) uint8 by name."""
        numbers = {"step": step} | {name: round(value, 6) for name, value in numbers.items() if value is not None}
        self.sinks = [sink for sink in self.sinks if sink.log(numbers, pictures or {})]

    def close(self):
        for sink in self.sinks:
            sink.close()


def attempt(what: str, function):
    """function(), or None and a warning: a full disk, a missing package, a dead server."""
    try:
        return function()
    except Exception as failure:
        print(f"warning: {what} failed ({one_line(failure)}); the run goes on without it", file=sys.stderr)


class Files:
    """metrics.jsonl, an object a logged step, and samples/NAME_STEP.png."""

    def __init__(self, folder: Path, step: int):
        self.folder, self.lines = folder, folder / "metrics.jsonl"
        if step and self.lines.exists():  # what came after the checkpoint is about to come again
            lines = [line for line in self.lines.read_text().splitlines() if line.endswith("}")]
            kept = "".join(line + "\n" for line in lines if json.loads(line)["step"] <= step)
            write_atomically(self.lines, lambda f: f.write(kept.encode()))

    def log(self, numbers: dict, pictures: dict) -> bool:
        """True: the disk may have room again the next time."""
        attempt("metrics.jsonl", lambda: self.append(numbers))
        for name, picture in pictures.items():
            path = self.folder / "samples" / f"{name}_{numbers['step']:06d}.png"
            attempt("the picture", lambda: save_png(path, Image.fromarray(picture)))
        return True

    def append(self, numbers: dict):
        with open(self.lines, "a") as f:
            f.write(json.dumps(numbers) + "\n")

    def close(self):
        pass


class Wandb:
    """Online where an account is configured, else offline. After a failure it is done with."""

    def __init__(self, folder: Path, project: str, entity: str | None, id: str, config: dict):
        import wandb

        self.wandb, mode = wandb, wandb_mode()
        os.environ.setdefault("WANDB_SILENT", "true")
        how = dict(project=project, entity=entity, id=id, name=folder.name, dir=str(folder), config=config,
                   resume="allow", settings=wandb.Settings(init_timeout=30, console="off"))
        try:
            self.run = wandb.init(mode=mode, **how)
        except Exception as failure:
            if mode == "offline":
                raise
            print(f"wandb: {one_line(failure)}; going on offline")
            self.run = wandb.init(mode="offline", **how)
        if self.run.offline:
            print(f"wandb: offline; `wandb sync {self.run.settings.sync_dir}` uploads the run later")
        else:
            print(f"wandb: {self.run.url}")
        # an axis of our own: wandb drops points behind its internal one after a resume
        self.run.define_metric("*", step_metric="step")

    def log(self, numbers: dict, pictures: dict) -> bool:
        def send():
            self.run.log(numbers | {f"samples/{name}": self.wandb.Image(picture) for name, picture in pictures.items()})
            return True

        return bool(attempt("wandb", send))

    def close(self):
        attempt("wandb", self.run.finish)


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
