"""Every method on every task goes through the whole trainer: two steps, pictures, checkpoints, and a resume that is
bit for bit."""

import contextlib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trainer
from images.corruptions import TASKS
from methods.udpm import UDPM
from runs import checkpoint, copied_at, finite, metrics, resume, same
from trainer import Trainer

METHODS = {  # flags for few network evaluations, without a download, and the NFE by them
    "interpolant": ("--solver heun --sample-steps 2", 5),
    "sr3": ("--sample-steps 3", 3),
    "i2sb": ("--sample-steps 3", 3),
    "edm": ("--sample-steps 2", 3),
    "udpm": ("--udpm.lpips-weight 0 0 0 --udpm.disc-channels 8", 3),
    "flowmap": ("--sample-steps 2", 2),
    "regression": ("", 1),
}


@pytest.fixture(scope="module")
def damaged(folder, tmp_path_factory) -> Path:
    """The pictures of `folder`, darker."""
    root = tmp_path_factory.mktemp("damaged")
    for path in folder.rglob("*.png"):
        (root / path.parent.name).mkdir(exist_ok=True)
        Image.open(path).point(lambda level: level // 4).save(root / path.relative_to(folder))
    return root


# Every method meets batches with known pixels and a condition. No method can tell of which kind the damage is, so they
# take turns at the other tasks. Options of the methods and of the network go along, and a solver of the user's choice
# for every ODE.
RK4 = "--solver rk4 --sample-steps 2"
CASES = [
    *((method, "sr,inpaint", "", nfe) for method, (_, nfe) in METHODS.items()),
    ("interpolant", "generate", "--no-unet-use-classes", 5),
    ("sr3", "generate", "--channels 1", 3),
    ("edm", "generate", "--guidance 2", 6),
    ("udpm", "generate", "--no-unet-use-classes", 3),
    ("interpolant", "paired", "--solver auto --interpolant.eps0 1", 3),
    ("i2sb", "paired", "--no-condition", 3),
    ("sr3", "blur", RK4, 9),  # four evaluations a step, and the clean estimate
    ("edm", "jpeg", RK4, 9),
    ("i2sb", "noise", f"--i2sb.ot-ode {RK4}", 9),
    ("regression", "chain", "", 1),
    ("flowmap", "sr", RK4, 9),
    ("interpolant", "inpaint", RK4, 9),
]


def test_nothing_is_left_out():
    assert set(METHODS) == set(get_args(trainer.Config.__annotations__["method"]))
    assert {task for _, task, _, _ in CASES} == {*TASKS, "sr,inpaint"}


@pytest.mark.parametrize("method, task, more, nfe", CASES)
def test_trains_samples_and_resumes_bit_for_bit(tmp_path, monkeypatch, folder, damaged, method, task, more, nfe):
    flags = (
        "--device cpu --image-size 16 --unet-channels 8 --unet-dim-mults 1 --unet-blocks 1 --unet-dropout 0.2 "
        "--batch-size 4 --sample-count 2 --print-loss-every 1 --sample-every 2 --checkpoint-every 1 --no-use-wandb "
        f"--dataset {folder} --out-dir {tmp_path / 'runs'} "
        f"--method {method} --task {task} --max-steps 2 --no-overfit {METHODS[method][0]} {more}"
    )
    if task == "paired":
        flags += f" --paired-path {damaged}"
    half = tmp_path / "half"
    with monkeypatch.context() as patch:
        copied_at(patch, 1, half)
        assert trainer.main(flags.split()) == 0
    run, = (tmp_path / "runs").iterdir()
    before, after = checkpoint(half), checkpoint(run)
    assert (before["step"], after["step"]) == (1, 2)
    players = 2 if method == "udpm" else 1  # the network, and its discriminator
    assert len(after["players"]) == len(after["optimizers"]) == players
    for old, new, optimizer in zip(before["players"], after["players"], after["optimizers"]):
        moved = [name for name in new if not torch.equal(old[name], new[name])]
        assert len(moved) > 0.8 * len(new)
        assert {state["step"].item() for state in optimizer["state"].values()} == {2}
    assert finite(after) and after["skipped"].tolist() == [0, 0]

    resume(half)
    same(checkpoint(half), after)
    assert metrics(half) == metrics(run)
    for name in ("step_000002.png", "trace_000002.png"):
        ours, theirs = (np.asarray(Image.open(folder / "samples" / name)) for folder in (half, run))
        assert np.array_equal(ours, theirs) and ours.std() > 10
    sampled = metrics(run)[-1]
    assert sampled["nfe"] == nfe and ("psnr" in sampled) == (task != "generate")
    assert not list(half.rglob("*.tmp"))


class Copies(TorchDispatchMode):
    """The operations that take a tensor of the host and one of the device, but for copies that nobody waits for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)}
        if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
            self.found.append(str(operation))
        return result


@pytest.mark.parametrize(
    "method, task",
    [("interpolant", ",".join(task for task in TASKS if task not in ("paired", "generate"))), ("interpolant", "paired"),
     ("edm", "generate"), ("udpm", "generate"), *((method, "sr,inpaint") for method in METHODS)],
)
def test_no_training_step_makes_the_host_wait_for_the_device(tmp_path, monkeypatch, folder, damaged, method, task):
    """The meta device stands in for a GPU: it computes nothing, so that whoever reads a value from it breaks."""
    monkeypatch.setattr(trainer.model, "start_states", lambda *_: None)  # dopri5 reads its error
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm, foreach: clip(parameters, norm))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: self.found_inf)
    config = trainer.Config(method=method, task=task, overfit=False, image_size=16, batch_size=4, unet_channels=8,
                            unet_dim_mults=(1,), unet_blocks=1, dataset=str(folder),
                            paired_path=str(damaged) if task == "paired" else None, use_wandb=False,
                            compile="off", out_dir=str(tmp_path), udpm=UDPM(lpips_weight=(0, 0, 0), disc_channels=8))
    monkeypatch.setattr(trainer.machine, "pick_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(trainer.machine, "stream", lambda *_, **__: None)  # there are none on this device
    run = Trainer(config)
    run.batches.streams = defaultdict(lambda: SimpleNamespace(manual_seed=lambda seed: None))
    run.train_step()  # makes tables that stay on the device
    with Copies() as copies:
        run.train_step()
    assert run.health.loss.is_meta and not copies.found
    with Copies() as copies:
        torch.tensor([0]).to(run.device)
    assert len(copies.found) == 1
