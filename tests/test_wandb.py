"""wandb holds what a run shows, goes offline where it must, and neither ends nor holds a run."""
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import trainer
from fake_wandb import FakeWandb
from runs import FINISHED, TINY, checkpoint, linux, metrics, resume, same, start, until
from support import logs
from support.logs import Log


@pytest.fixture
def fake(monkeypatch):
    """fake(...): a FakeWandb in the package's place, with which there is little patience. It is free in the end."""
    made = []

    def make(*where, **how):
        made.append(FakeWandb(*where, **how))
        monkeypatch.setitem(sys.modules, "wandb", made[-1])
        return made[-1]

    monkeypatch.setattr(logs, "PATIENCE", 0.5)
    yield make
    for each in made:
        each.free.set()


def test_wandb_offline_holds_the_grid_and_the_numbers(tmp_path, capsys):
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


def test_what_wandb_is_told(tmp_path, fake):
    wandb = fake()
    run = start(tmp_path, f"{FINISHED} --use-wandb")
    assert wandb.calls["finish"] == wandb.calls["teardown"] == 1 and wandb.axis == dict(step_metric="step")
    assert [row["step"] for row in wandb.logged] == [line["step"] for line in metrics(run)] == [2, 2, 4, 4]
    for row in (row for row in wandb.logged if "psnr" in row):
        picture, caption = row["samples/step"]
        assert np.array_equal(picture, Image.open(run / "samples" / f"step_{row['step']:06d}.png"))
        assert caption == f"step {row['step']}, 3 NFE"


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("where", ["import", "init", "Image", "log", "finish"])
def test_wandb_never_ends_nor_holds_a_run(tmp_path, monkeypatch, fake, capsys, finished, where, hangs):
    wandb = fake(where, hangs=hangs)
    if where == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    began = time.monotonic()
    run = start(tmp_path, f"{FINISHED} --use-wandb")
    assert time.monotonic() - began < 20
    same(checkpoint(run), checkpoint(finished))
    assert metrics(run) == metrics(finished)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert len(warnings) == 1 and ("did not answer" in warnings[0]) == (hangs and where != "import")
    assert where == "import" or wandb.calls["teardown"]  # it has nothing left to do when the program leaves
    wandb.free.set()
    time.sleep(0.1)
    assert not capsys.readouterr().err  # nor a word when it comes back


def test_a_wandb_that_comes_late_gets_every_line(tmp_path, monkeypatch, fake, capsys):
    wandb = fake("init", hangs=True)
    log = Log(tmp_path, 0, wandb=dict(project="couplings", entity=None, id=None, config={}))
    log(1, loss=0.5)
    wandb.free.set()
    monkeypatch.setattr(logs, "PATIENCE", 20)
    log(2, loss=0.25)
    log.close()
    assert [row["step"] for row in wandb.logged] == [1, 2] and "joins" in capsys.readouterr().out


def test_wandb_goes_offline_where_online_fails_and_keeps_its_id(tmp_path, monkeypatch, fake):
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb = fake("init online")
    run = start(tmp_path, "--max-steps 1 --use-wandb")
    resume(run, "--max-steps 2")
    assert [each["mode"] for each in wandb.inits] == ["online", "offline"] * 2
    assert len({each["id"] for each in wandb.inits}) == 1 and all(each["resume"] == "allow" for each in wandb.inits)
    assert [row["step"] for row in wandb.logged] == [1, 1, 2, 2]


@pytest.mark.parametrize("netrc, environment, mode", [
    (None, {}, "offline"), ("api.wandb.ai", {}, "online"), ("wandb.example.org", {}, "offline"),
    ("wandb.example.org", dict(BASE_URL="https://wandb.example.org/"), "online"),
    ("api.wandb.ai", dict(BASE_URL="https://wandb.example.org/"), "offline"),
    (None, dict(API_KEY="secret"), "online"), ("api.wandb.ai", dict(MODE="disabled"), "disabled")])
def test_wandb_is_online_only_where_an_account_is_configured(tmp_path, monkeypatch, netrc, environment, mode):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if netrc:
        (tmp_path / "netrc").write_text(f"machine {netrc} login user password secret\n")
    for name, value in environment.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert logs.wandb_mode() == mode


def test_wandb_goes_offline_where_there_is_no_network(tmp_path, monkeypatch, capsys):
    """The real thing, which takes the id of the run that it could not start online for one in use."""
    monkeypatch.setattr(logs, "ONLINE_WITHIN", 1)
    for name, value in dict(MODE="online", API_KEY="x" * 40, BASE_URL="http://127.0.0.1:9").items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    log = Log(tmp_path, 0, wandb=dict(project="couplings", entity=None, id="abcd1234", config={}))
    log(1, loss=0.5)
    log.close()
    output = capsys.readouterr()
    assert "going on offline" in output.out and "wandb: offline" in output.out and not output.err
    assert len(list(tmp_path.glob("wandb/offline-run-*-abcd1234/*.wandb"))) == 1


def impatient(arguments):
    logs.PATIENCE = 2
    return trainer.main(arguments)


@linux
def test_a_service_of_wandb_that_hangs_does_not_hold_the_program(tmp_path, monkeypatch, process):
    """The real thing; the program must be able to leave as well."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # a service of its own
    flags = f"{TINY} --out-dir {tmp_path}/out --print-loss-every 1 --max-steps 19000 --sample-every 1000 --use-wandb"
    run = process(impatient, flags.split(), env=dict(WANDB_SERVICE=""))
    lines = tmp_path / "out"

    def logged(count):
        return sum(path.read_bytes().count(b"\n") for path in lines.glob("*/metrics.jsonl")) >= count

    until(lambda: logged(5), run)
    children = [int(pid) for task in Path(f"/proc/{run.pid}/task").glob("*/children")
                for pid in task.read_text().split()]
    service, = [pid for pid in children if "wandb-core" in Path(f"/proc/{pid}/comm").read_text()]
    os.kill(service, signal.SIGSTOP)
    try:
        until(lambda: logged(40), run)
        os.kill(run.pid, signal.SIGINT)
        run.join(60)
    finally:
        os.kill(service, signal.SIGKILL)
    said = run.log.read_text()
    assert run.exitcode == 130 and said.count("warning: wandb") == 1 and "Traceback" not in said, said
    assert checkpoint(next(lines.iterdir()))["step"] >= 40
