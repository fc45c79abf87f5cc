"""What a run leaves to look at: metrics.jsonl, pictures, the same on Weights & Biases; and files that are never half written."""
import json
import math
import os
import secrets
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

import data


class Log:
    """metrics.jsonl and pictures in the run's folder, and the same on wandb. A logger that fails warns once; it never ends a run."""

    def __init__(self, config, folder: Path, step: int, wandb_id: str | None):
        self.folder, self.id, self.wandb = folder, wandb_id, None
        self.lines = folder / "metrics.jsonl"
        if step and self.lines.exists():  # what came after the checkpoint is about to come again
            kept = [line for line in self.lines.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
            write_atomically(self.lines, lambda f: f.write("".join(line + "\n" for line in kept).encode()))
        if config.use_wandb:
            self.guarded("wandb", self.start_wandb, config)

    def start_wandb(self, config):
        import wandb

        self.id = self.id or secrets.token_hex(4)
        mode = wandb_mode()
        os.environ.setdefault("WANDB_SILENT", "true")
        common = dict(project=config.wandb_project, entity=config.wandb_entity, id=self.id, name=self.folder.name, dir=str(self.folder),
                      config=asdict(config), resume="allow", settings=wandb.Settings(init_timeout=30, console="off"))
        try:
            self.wandb = wandb.init(mode=mode, **common)
        except Exception as failure:
            if mode == "offline":
                raise
            print(f"wandb: {one_line(failure)}; going on offline")
            self.wandb = wandb.init(mode="offline", **common)
        if self.wandb.offline:
            print(f"wandb: offline; `wandb sync {self.wandb.settings.sync_dir}` uploads the run later")
        else:
            print(f"wandb: {self.wandb.url}")
        self.wandb.define_metric("*", step_metric="step")  # an own axis: wandb drops points behind its internal one after a resume

    def guarded(self, what: str, function, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as failure:  # a full disk, a missing package, a dead server
            print(f"warning: {what} failed ({one_line(failure)}); the run goes on without it", file=sys.stderr)
            if what == "wandb":
                self.wandb = None

    def __call__(self, step: int, pictures: dict | None = None, **numbers):
        """One line of metrics; pictures {name: (H, W, C) uint8 array} go to samples/NAME_STEP.png."""
        numbers = {"step": step} | {k: round(v, 6) for k, v in numbers.items() if v is not None}
        self.guarded("metrics.jsonl", self.append, numbers)
        for name, picture in (pictures or {}).items():
            self.guarded("the picture", self.save_picture, self.folder / "samples" / f"{name}_{step:06d}.png", picture)
        if self.wandb:
            self.guarded("wandb", self.log_wandb, numbers, pictures or {})

    def log_wandb(self, numbers: dict, pictures: dict):
        import wandb

        self.wandb.log(numbers | {f"samples/{name}": wandb.Image(picture) for name, picture in pictures.items()})

    def append(self, numbers: dict):
        with open(self.lines, "a") as f:
            f.write(json.dumps(numbers) + "\n")

    def save_picture(self, path: Path, picture: np.ndarray):
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda f: Image.fromarray(picture).save(f, format="PNG"))

    def close(self):
        if self.wandb:
            self.guarded("wandb", self.wandb.finish)


def new_folder(config) -> Path:
    """Makes the run's folder, named by its method, task and the time. Raises ValueError."""
    name = f"{config.method}-{config.task.replace(',', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(100):
        folder = Path(config.out_dir) / (name + f"-{attempt}" * bool(attempt))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as failure:
            raise ValueError(f"out_dir = {config.out_dir!r}: no folder can be made there ({failure.strerror})")
    raise ValueError(f"out_dir = {config.out_dir!r}: it holds 100 runs of this second")


def run_folder(run: str | Path) -> Path:
    """The folder of a run that was named by it or by its checkpoint file."""
    return Path(run) if Path(run).is_dir() else Path(run).resolve().parent.parent


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


def write_atomically(path: Path, write):
    """`write(file)` into a neighbour, then renamed: whenever the process dies, `path` holds the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def one_line(failure: BaseException) -> str:
    return " ".join(str(failure).split()) or type(failure).__name__


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> one picture (3, H', W') uint8, up to twice as high as wide; small images are enlarged."""
    images = data.to_uint8(images).cpu().repeat_interleave(scale := max(1, 64 // images.shape[-1]), 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=columns or 2 ** math.ceil(math.log2(len(images) / 2) / 2), padding=2, pad_value=255)


def beside(*pictures: Tensor) -> np.ndarray:
    """Pictures (3, H, W) in a row -> (H, W', 3)."""
    return torch.cat([F.pad(p, (6, 6), value=255) for p in pictures], dim=2).permute(1, 2, 0).contiguous().numpy()


def strip(trace: list, frames: int = 9) -> np.ndarray:
    """The iterative process: a column a time; each image has a row of states above a row of clean estimates."""
    chosen = [trace[i] for i in np.linspace(0, len(trace) - 1, min(frames, len(trace))).round().astype(int)]
    rows = torch.stack([torch.stack([state, clean], 1).flatten(0, 1) for _, state, clean in chosen], 1)  # (2B, T, C, H, W)
    return beside(grid(rows.flatten(0, 1), columns=len(chosen)))


def psnr(x: Tensor, truth: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, dB, of x (B, C, H, W) as 8-bit images."""
    error = (data.to_uint8(x).float() - data.to_uint8(truth).float()).square().flatten(1).mean(1)
    least = 1 / x[0].numel()  # one level in one value: an exact image does not count as infinitely good
    return (10 * torch.log10(255**2 / error.clamp(min=least))).mean().item()
