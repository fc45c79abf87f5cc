"""What tests share: one thread, and runs of a tiny network to look at."""
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from images import data
from runs import FINISHED, SERVER, child, start

os.environ["WANDB_MODE"] = "offline"  # no test talks to a server
torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def elsewhere(tmp_path_factory):
    """Tests stand in a folder of their own: what they leave in data/ and runs/ is not found by the next."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("here"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def as_found():
    """One thread, which is fastest for so small a network, and the signal handlers of before."""
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 pictures, of which 4 are held out, in the folders of two classes."""
    root = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(data.load("shapes", 16, limit=40).train):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "ab"[i % 2] / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 4 steps, not to be written to."""
    torch.set_num_threads(1)
    return start(tmp_path_factory.mktemp("finished"), FINISHED)


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
