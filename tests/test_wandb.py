"""wandb holds what a run shows, goes offline where it must, and neither ends nor holds a run."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs import FINISHED, TINY, TRAINER, checkpoint, linux, metrics, resume, same, start
from support import background, logs
from support.logs import Log


def test_wandb_offline_holds_the_grid_and_the_numbers(tmp_path, monkeypatch, capsys):
    """The real thing, and again after a resume."""
    run = start(tmp_path, "--max-steps 2 --use-wandb")
    said = capsys.readouterr().out
    assert 0 < said.index("wandb: offline; `wandb sync") < said.index("step 2")
    resume(run, "--max-steps 3")
    name = checkpoint(run)["wandb_id"]
    segments = sorted((run / "wandb").glob("offline-run-*"))
    assert len(segments) == 2 and all(name in segment.name for segment in segments)
    for segment, step in zip(segments, (2, 3)):
        pictures = [np.asarray(Image.open(path)) for path in (segment / "files" / "media" / "images").rglob("*.png")]
        for kind in ("step", "trace"):
            ours = np.asarray(Image.open(run / "samples" / f"{kind}_{step:06d}.png"))
            assert sum(np.array_equal(ours, picture) for picture in pictures) == 1
        record = next(segment.glob("*.wandb")).read_bytes()
        for line in metrics(run):
            for key in ("loss", "psnr", "psnr_zlo"):
                if line["step"] == step and key in line:
                    assert key.encode() in record and json.dumps(line[key]).encode() in record, key


class FakeWandb(types.ModuleType):
    """Records what it is told; fails where it is asked to."""

    def __init__(self, fail=()):
        super().__init__("wandb")
        self.fail, self.inits, self.logged, self.offline, self.url = fail, [], [], True, None
        self.settings = types.SimpleNamespace(sync_dir="there")
        self.closed = self.torn_down = False

    def may_fail(self, what):
        if what in self.fail:
            raise RuntimeError(f"{what}: no server\nanywhere")

    def init(self, **kwargs):
        self.inits.append(kwargs)
        self.may_fail("init " + kwargs["mode"])
        return self

    def Settings(self, **kwargs):
        return kwargs

    def define_metric(self, *args, **kwargs):
        self.axis = args, kwargs

    def Image(self, picture, caption):
        assert caption == f"step {caption.split()[1]} 3 NFE"
        self.may_fail("Image")
        return picture

    def log(self, numbers):
        self.may_fail("log" if len(self.logged) > 1 else "")
        self.logged.append(numbers)

    def finish(self):
        self.may_fail("finish")
        self.closed = True

    def teardown(self):
        self.torn_down = True


@pytest.mark.parametrize("fail", [None, ["import"], ["init online", "init offline"], ["Image"], ["log"], ["finish"]])
def test_wandb_never_ends_a_run(tmp_path, monkeypatch, capsys, finished, fail):
    fake = FakeWandb(fail or [])
    monkeypatch.setitem(sys.modules, "wandb", None if fail == ["import"] else fake)
    run = start(tmp_path, f"{FINISHED} --use-wandb")
    same(checkpoint(run), checkpoint(finished))
    assert metrics(run) == metrics(finished)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert len(warnings) == bool(fail)  # one line, once
    assert fail == ["import"] or fake.torn_down  # it has nothing left to do when the program leaves
    if not fail:
        assert fake.closed
        steps = [row["step"] for row in fake.logged]
        assert steps == [m["step"] for m in metrics(run)] == [2, 2, 4, 4]  # numbers, its own axis
        assert fake.axis[1]["step_metric"] == "step"
        shown = [row for row in fake.logged if "psnr" in row]
        for row in shown:
            ours = np.asarray(Image.open(run / "samples" / f"step_{row['step']:06d}.png"))
            assert any(np.array_equal(ours, value) for value in row.values() if isinstance(value, np.ndarray))


def test_wandb_goes_offline_where_online_fails_and_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    fake = FakeWandb(["init online"])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = start(tmp_path, "--max-steps 1 --use-wandb")
    resume(run, "--max-steps 2")
    assert [each["mode"] for each in fake.inits] == ["online", "offline"] * 2
    assert len({each["id"] for each in fake.inits}) == 1 and all(each["resume"] == "allow" for each in fake.inits)
    assert [row["step"] for row in fake.logged] == [1, 1, 2, 2]


def test_wandb_is_online_only_where_an_account_is_configured(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert logs.wandb_mode() == "offline"
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert logs.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")  # an account elsewhere is none here
    assert logs.wandb_mode() == "offline"
    netrc.write_text("machine wandb.example.org login user password secret\n")
    assert logs.wandb_mode() == "online"
    netrc.write_text("not a netrc")
    assert logs.wandb_mode() == "offline"
    monkeypatch.setenv("NETRC", str(tmp_path / "nowhere"))
    assert logs.wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert logs.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the user's word is the last
    assert logs.wandb_mode() == "disabled"


def test_wandb_goes_offline_where_there_is_no_network(tmp_path, monkeypatch, capsys):
    """The real thing, which takes the id of the run that it could not start online for one in use."""
    for name, value in dict(MODE="online", API_KEY="x" * 40, BASE_URL="http://127.0.0.1:9").items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    began = time.monotonic()
    log = Log(tmp_path, 0, wandb=dict(project="couplings", entity=None, id="abcd1234", config={}))
    assert time.monotonic() - began < 10
    log(1, loss=0.5)
    log.close()
    output = capsys.readouterr()
    assert "going on offline" in output.out and "wandb: offline" in output.out and not output.err
    assert len(list(tmp_path.glob("wandb/offline-run-*-abcd1234/*.wandb"))) == 1


PATIENT_TRAINER = """
import sys
from support import background
background.PATIENCE = 3
import trainer
sys.exit(trainer.main())
"""


@linux
@pytest.mark.parametrize("to_service, to_run, status", [(signal.SIGSTOP, signal.SIGINT, 130),
                                                        (signal.SIGKILL, signal.SIGTERM, 143)])
def test_a_service_of_wandb_that_hangs_or_dies_does_not_hold_the_run(tmp_path, to_service, to_run, status):
    """The real thing, as a program: it must be able to leave as well."""
    flags = f"{TINY} --out-dir {tmp_path}/out --print-loss-every 1 --max-steps 19000 --sample-every 1000 --use-wandb"
    with open(tmp_path / "said", "w") as said:
        command = [sys.executable, "-c", PATIENT_TRAINER, *flags.split()]
        env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # a service of its own
        run = subprocess.Popen(command, cwd=TRAINER.parent, env=env | {"OMP_NUM_THREADS": "1"}, stdout=said,
                               stderr=subprocess.STDOUT)
    services = []
    try:
        wait_for_lines(tmp_path, run, 5)
        for children in Path(f"/proc/{run.pid}/task").glob("*/children"):
            services += [int(pid) for pid in children.read_text().split() if "wandb-core" in name_of(pid)]
        assert len(services) == 1
        os.kill(services[0], to_service)
        wait_for_lines(tmp_path, run, 100)
        run.send_signal(to_run)
        assert run.wait(60) == status
    finally:
        run.kill()
        for pid in services if to_service == signal.SIGSTOP else []:
            os.kill(pid, signal.SIGKILL)
    said = (tmp_path / "said").read_text()
    assert said.count("warning: wandb") == 1 and "Traceback" not in said and "ignored" not in said, said
    assert checkpoint(next((tmp_path / "out").iterdir()))["step"] >= 100


def wait_for_lines(folder, process, count):
    """Until the run's metrics.jsonl has so many more."""
    def lines():
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("out/*/metrics.jsonl"))

    end, wanted = time.monotonic() + 120, lines() + count
    while lines() < wanted:
        assert process.poll() is None and time.monotonic() < end, (folder / "said").read_text()
        time.sleep(0.05)


def name_of(pid) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


class Stuck(FakeWandb):
    """Never returns from one of its calls, until the test is over."""

    def __init__(self, where):
        super().__init__()
        self.where, self.free = where, threading.Event()

    def may_fail(self, what):
        if what.startswith(self.where):
            self.free.wait(60)


@contextmanager
def stuck(monkeypatch, where, patience=1.0):
    fake = Stuck(where)
    monkeypatch.setattr(background, "PATIENCE", patience)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    try:
        yield fake
    finally:
        fake.free.set()


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_wandb_that_hangs_does_not_hold_the_run(tmp_path, monkeypatch, capsys, finished, where):
    with stuck(monkeypatch, where) as fake:
        began = time.monotonic()
        run = start(tmp_path, f"{FINISHED} --use-wandb")
        assert time.monotonic() - began < 20
        warnings = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
        assert len(warnings) == 1 and "did not answer" in warnings[0]
        assert fake.torn_down
    same(checkpoint(run), checkpoint(finished))
    assert metrics(run) == metrics(finished)
    time.sleep(0.2)
    assert not capsys.readouterr().err  # nor a word when it comes back


def test_a_wandb_that_comes_late_gets_every_line(tmp_path, monkeypatch, capsys):
    with stuck(monkeypatch, "init", patience=0.2) as fake:
        log = Log(tmp_path, 0, wandb=dict(project="couplings", entity=None, id=None, config={}))
        log(1, loss=0.5)
        fake.free.set()
        monkeypatch.setattr(background, "PATIENCE", 20)
        log(2, loss=0.25)
        log.close()
    assert [row["step"] for row in fake.logged] == [1, 2] and fake.closed
    assert "joins" in capsys.readouterr().out
