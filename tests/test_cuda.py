"""What only a GPU shows: python -m pytest -m cuda. Everything here is skipped where there is none."""
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from images.corruptions import Damage
from runs import checkpoint, leaves, make, resume, start
from sample import open_model
from support.checkpoints import export, open_run
from trainer import Config

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = "--device cuda --precision fp32 --unet-dropout 0.1"
METHODS = {
    "interpolant": "--solver midpoint --sample-steps 2", "sr3": "--solver auto --sample-steps 3",
    "i2sb": "--solver auto --sample-steps 3", "edm": "--task generate --solver auto --sample-steps 2",
    "flowmap": "--solver auto --sample-steps 2",
    "regression": "--solver auto --sample-steps 1",
    "udpm": "--solver auto --sample-steps 3 --udpm.lpips-weight 0 0 0 --udpm.disc-channels 8"}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """The same sums in the same order, so that bits can be compared; where a kernel has no such form, torch warns."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


def state(run) -> dict:
    torch.cuda.synchronize()
    parts = dict(net=run.net.state_dict(), ema=run.ema.state_dict(), health=vars(run.health),
                 optimizers=[player.optimizer.state_dict()["state"] for player in run.players])
    return {name: x.cpu() for name, x in leaves(parts).items() if torch.is_tensor(x)}


@pytest.mark.parametrize("more", ["", "--micro-batch 2 --warmup-steps 5"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "udpm"])
def test_a_graph_trains_to_the_bits_of_eager_steps(tmp_path, method, more):
    found = []
    for graph in ("--graph", "--no-graph"):
        flags = f"{GPU} --no-overfit --method {method} {METHODS[method]} {more} {graph}"
        run = make(f"{flags} --out-dir {tmp_path / graph}")
        torch.backends.cudnn.benchmark = False  # or the two might take other kernels
        for _ in range(8):
            run.train_step()
        run.folder.close()
        assert hasattr(run.update, "graph") == (graph == "--graph") and getattr(run.update, "graph", True)
        found.append(state(run))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 200
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_a_step_does_not_wait_for_the_gpu(tmp_path):
    for method, flags in METHODS.items():
        run = make(f"{GPU} --no-overfit --method {method} {flags} --no-graph --out-dir {tmp_path / method}")
        for _ in range(8):
            run.train_step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run.folder.close()


@pytest.mark.parametrize("task, knobs, share", [
    ("sr", dict(), 0), ("sr", dict(down="bicubic", up="bicubic"), 0.001), ("blur", dict(), 0.001),
    ("blur", dict(kernel="gaussian"), 0.001), ("jpeg", dict(quality=10), 0.06), ("inpaint", dict(), 0)])
def test_damage_is_that_of_the_cpu(task, knobs, share):
    """To within ties: at most that share of the values differs."""
    z1 = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    here, there = (Damage(**knobs)(task, x) for x in (z1, z1.cuda()))
    assert ((here.zlo - there.zlo.cpu()).abs() > 1e-3).float().mean() <= share
    assert torch.equal(here.to_make, there.to_make.cpu()) and torch.equal(here.unknown, there.unknown.cpu())


@pytest.mark.parametrize("method", METHODS)
def test_trains_samples_saves_resumes_and_exports(tmp_path, method):
    flags = f"{GPU} --method {method} {METHODS[method]} --no-overfit --checkpoint-every 4 --keep-every 4 --max-steps"
    run = start(tmp_path / "straight", f"{flags} 8")
    half = start(tmp_path / "half", f"{flags} 4")
    resume(half, "--max-steps 8")
    before, after = (leaves(checkpoint(folder)["ema"]) for folder in (run, half))
    assert all((value - after[name]).abs().max() < 1e-4 for name, value in before.items())
    export(open_run(half, Config), tmp_path / "model.safetensors")
    zlo = torch.rand(2, 3, 16, 16) * 2 - 1
    streams = [[(1.0, (0, "", 0))]] * 2
    here, there = (open_model(str(tmp_path / "model.safetensors"), device=device, precision="fp32",
                              solver="dopri5" if method == "interpolant" else None).sample(
        zlo, None, [None] * 2, streams).cpu() for device in ("cpu", "cuda"))
    assert (here - there).abs().mean() < 0.01
