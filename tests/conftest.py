"""What tests share: one thread, runs of a tiny network to look at, and what evaluate.py measured of two."""
import fcntl
import json
import os
import shutil
import signal
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
from evaluation import judge as judging
from images import data
from measured import FLAGS, LOCAL, SIDE, TEST
from runs import FINISHED, METHODS, SERVER, child, draw_pictures, start
from trainer import Config

os.environ |= dict(WANDB_MODE="offline", OMP_NUM_THREADS="1")  # no test talks to a server; for processes of their own
torch.set_num_threads(1)  # the fastest for so small networks
torch.manual_seed(0)
data.draw_shapes = cache(data.draw_shapes)  # seconds, for 10,000 of them


def once(tmp_path_factory, name: str, make) -> Path:
    """The folder that make(folder) has filled, once for all processes of pytest-xdist. Nobody writes to it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, done = shared / name, shared / f"{name}.done"
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(autouse=True, scope="session")
def elsewhere(tmp_path_factory):
    """Tests stand in a folder of their own: what they leave in data/ and runs/ is not found by the next."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("here"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def as_found():
    """Signals do what they do in a new Python, even under nohup; after the test, threads and signals are as before."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    handlers = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    torch.set_num_threads(1)
    if "torch._dynamo" in sys.modules:  # which takes seconds to import
        torch._dynamo.reset()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """draw_pictures, not to be written to."""
    return once(tmp_path_factory, "pictures", draw_pictures)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A run of 4 steps, not to be written to."""
    return next(once(tmp_path_factory, "finished", lambda out: start(out, FINISHED)).iterdir())


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The finished run in another place."""
    return shutil.copytree(finished, tmp_path / "elsewhere" / "moved")


@pytest.fixture
def process(tmp_path):
    """process(function, *args, env={}): runs it in a new process, which does not outlive the test."""
    running = []

    def begin(target, *args, env=None):
        log = tmp_path / f"log-{len(running)}"
        running.append(SERVER.Process(target=child, args=(target, log, env or {}, *args)))
        running[-1].log = log
        running[-1].start()
        return running[-1]

    yield begin
    for each in running:
        each.kill()
        each.join()


# What the tests of evaluate.py share, not to be written to.

@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    """Two classes, dark and bright drawings, with grey levels 20 .. 220, in train/ and test/."""
    def make(root):
        for i, drawing in enumerate(data.load("shapes", SIDE, limit=TEST + 64).train):
            label, split = ("dark", "bright")[i % 2], "test" if i < TEST else "train"
            level = 20 + (drawing.float() * 100 / 255).round() + 100 * (i % 2)
            path = root / split / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(level.to(torch.uint8).permute(1, 2, 0).numpy()).save(path)

    return once(tmp_path_factory, "drawings", make)


@pytest.fixture(scope="session")
def config(drawings):
    return Config(dataset=str(drawings), image_size=SIDE, overfit=False, device="cpu")


@pytest.fixture(scope="session")
def judge(config):
    return judging.Judge(config, torch.device("cpu"), LOCAL, count=40, batch_size=16, epochs=30)


@pytest.fixture
def quick(monkeypatch):
    """evaluate.py draws no plot, as without matplotlib, and counts no operations of training: they take seconds."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(evaluate, "training_flops", lambda *_: 1.0)


@pytest.fixture(scope="session")
def runs(drawings, tmp_path_factory):
    """Two tiny runs: an interpolant and a UDPM, whose discriminator counts too."""
    own = {"interpolant": "--solver euler --sample-steps 1", "udpm": METHODS["udpm"]}

    def make(out):
        for method, flags in own.items():
            start(out / method, f"--preset small --dataset {drawings} --unet-dim-mults 1 2 --no-overfit --precision "
                  f"fp32 --max-steps 2 --method {method} {flags}")

    out = once(tmp_path_factory, "runs", make)
    return [str(path) for method in own for path in (out / method).iterdir()]


@pytest.fixture(scope="session")
def results(runs, tmp_path_factory):
    """What evaluate.py wrote of the two: the folder, and the content of its JSON files."""
    def make(output):
        assert evaluate.main([*runs, *FLAGS, "--metrics", *LOCAL, "--output", str(output)]) == 0

    output = once(tmp_path_factory, "results", make)
    return output, [json.loads((output / (run.split("/")[-1] + ".json")).read_text()) for run in runs]
