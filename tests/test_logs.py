"""What a run shows: pictures, numbers, wandb. Nothing is silent, and what is shown is what was made."""
import json
import math
import os
import resource
import shutil
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
import torch
from PIL import Image

from images import SettingsError, data, pictures
from runs import FINISHED, TINY, TRAINER, at_step, checkpoint, metrics, one_line, resume, same, start
from support import background, logs, model
from support.background import Background
from support.logs import Files, Log
from support.model import draw
from support.output import Attempts
from unet import Guided

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and /dev/full")


# -------------------------------------------------------------------------------------------------------------- wandb

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

    def Image(self, picture):
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
    log = Log(tmp_path, 0, dict(project="couplings", entity=None, id="abcd1234", config={}))
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
@pytest.mark.parametrize("to_service, to_run, status", [
    (signal.SIGSTOP, signal.SIGINT, 130),
    (signal.SIGKILL, signal.SIGTERM, 143),
])
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


# ------------------------------------------------------------------------------------------------- sinks that may block

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
        log = Log(tmp_path, 0, dict(project="couplings", entity=None, id=None, config={}))
        log(1, loss=0.5)
        fake.free.set()
        monkeypatch.setattr(background, "PATIENCE", 20)
        log(2, loss=0.25)
        log.close()
    assert [row["step"] for row in fake.logged] == [1, 2] and fake.closed
    assert "joins" in capsys.readouterr().out


class Slow:
    """A sink that logs when it may."""

    def __init__(self):
        self.free, self.seen, self.closed = threading.Event(), [], False

    def log(self, numbers, pictures):
        self.free.wait(60)
        self.seen.append((numbers, pictures))

    def close(self):
        self.closed = True


def test_what_is_queued_is_not_changed_any_more():
    slow, numbers, picture = Slow(), {"step": 1}, np.zeros((2, 2, 3), np.uint8)
    sink = Background("slow", lambda: slow)
    sink.log(numbers, {"step": picture})
    numbers["step"], picture[:] = 2, 255
    slow.free.set()
    sink.close()
    (numbers, pictures), = slow.seen
    assert numbers == {"step": 1} and not pictures["step"].any() and slow.closed


def test_a_sink_that_hangs_is_dropped_when_its_queue_is_full(monkeypatch, capsys):
    monkeypatch.setattr(background, "QUEUE", 3)
    slow, released = Slow(), []
    sink = Background("slow", lambda: slow, lambda: released.append(True))
    began = time.monotonic()
    for step in range(20):
        sink.log({"step": step}, {})
    sink.close()
    sink.close()
    assert time.monotonic() - began < 5 and released
    slow.free.set()
    sink.thread.join(10)
    assert capsys.readouterr().err == "warning: slow does not answer; the run goes on without it\n"


def test_ctrl_c_does_not_wait_for_a_sink(capsys):
    slow, began = Slow(), time.monotonic()
    sink = Background("slow", lambda: slow)
    sink.log({"step": 1}, {})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        sink.close()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        Background("other", lambda: slow.free.wait(60))
    assert time.monotonic() - began < 8
    slow.free.set()
    assert len(capsys.readouterr().err.splitlines()) == 2


# ------------------------------------------------------------------------------------------------------ metrics.jsonl

def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_that_cannot_be_read_are_set_aside(tmp_path, copy, capsys):
    straight = start(tmp_path / "straight", FINISHED.replace("4", "6"))
    bad = [b'{"step": 3, "lo{"step": 4, "loss": 1.0}', b'{"step": 1, "text": "\xff"}', b'{"loss": 1.0}', b"\0\0\0",
           b'{"step": "3"}', b'{"step": 3.0}', b'{"step": true}', b'{"step": null}', b"[3]", b"3", b'{"step": 6, "lo']
    lines, good = copy / "metrics.jsonl", (copy / "metrics.jsonl").read_bytes()
    lines.write_bytes(b"\n".join(bad[:5]) + b"\n\n" + good + b"\n".join(bad[5:]))  # half a line at the end
    capsys.readouterr()
    resume(copy, "--max-steps 6")
    assert metrics(copy) == metrics(straight)
    assert (copy / "metrics.jsonl.unreadable").read_bytes() == b"\n".join(bad) + b"\n"
    warnings = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
    assert len(warnings) == 1 and "11 lines" in warnings[0]


def test_a_line_is_appended_whole_or_not_at_all(tmp_path, capsys):
    files, lines = Files(tmp_path, 0, Attempts()), tmp_path / "metrics.jsonl"
    files.log({"step": 1}, {})
    lines.write_bytes(lines.read_bytes() + b'{"step": 2, "lo')  # killed in the middle of it
    files.log({"step": 3}, {})
    assert lines.read_bytes() == b'{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n'

    before, limits = lines.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))  # room for five bytes
    try:
        for step in (4, 5, 6):
            files.log({"step": step}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lines.read_bytes() == before
    files.log({"step": 7}, {})
    assert lines.read_bytes() == before + b'{"step": 7}\n'
    assert capsys.readouterr().err.splitlines() == [
        "warning: metrics.jsonl failed (File too large); the run goes on without it", "metrics.jsonl works again"]


@linux
def test_a_full_disk_is_told_once(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    files = Files(tmp_path, 0, Attempts())
    for step in range(3):
        files.log({"step": step}, {})
    assert capsys.readouterr().err == (
        "warning: metrics.jsonl failed (No space left on device); the run goes on without it\n")


def test_files_that_cannot_be_written_are_one_line_at_the_start(tmp_path, copy, capsys):
    for name in ("metrics.jsonl", "config.json"):
        run = shutil.copytree(copy, tmp_path / f"without-{name}")
        (run / name).unlink()
        (run / name).mkdir()
        capsys.readouterr()
        resume(run, "--max-steps 6", status=2)
        error = one_line(capsys)
        assert f"{run / name} can't be written (Is a directory)" in error
    with pytest.raises(SettingsError, match="metrics.jsonl can't be written .No such file or directory."):
        Log(tmp_path / "nowhere", 0)


def test_a_folder_that_is_gone_is_made_again(tmp_path, monkeypatch, finished, capsys):
    at_step(monkeypatch, 3, lambda: shutil.move(next(tmp_path.glob("out/*")), tmp_path / "renamed"))
    run = start(tmp_path / "out", FINISHED)
    assert steps(tmp_path / "renamed" / "metrics.jsonl") == [2, 2] and steps(run / "metrics.jsonl") == [4, 4]
    same(checkpoint(run), checkpoint(finished))
    assert (run / "samples" / "step_000004.png").read_bytes() == (finished / "samples/step_000004.png").read_bytes()
    assert f"{run} was gone and is made again" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- pictures

TITLE = pictures.TITLE_SIZE + 9  # height of the row of titles


def read_grids(path, count: int, side: int) -> list[np.ndarray]:
    """The four grids of a picture -> each (count, side, side, 3) uint8. Images are enlarged to 64 pixels."""
    picture, scale = np.asarray(Image.open(path)), 64 // side
    columns = 2 ** math.ceil(math.log2(count / 2) / 2)
    rows = math.ceil(count / columns)
    width, height = 12 + 2 + 66 * columns, TITLE + 2 + 66 * rows + 6
    assert picture.shape == (height, 4 * width, 3)
    grids = []
    for left in range(0, 4 * width, width):
        images = []
        for i in range(count):
            y, x = TITLE + 2 + 66 * (i // columns), left + 6 + 2 + 66 * (i % columns)
            tile = picture[y:y + 64, x:x + 64].reshape(side, scale, side, scale, 3)
            assert (tile == tile[:, :1, :, :1]).all()
            images.append(tile[:, 0, :, 0])
        grids.append(np.stack(images))
    return grids


def decibels(x, truth) -> float:
    error = ((x.astype(np.float64) - truth.astype(np.float64)) ** 2).reshape(len(x), -1).mean(1)
    return float(np.mean(10 * np.log10(255**2 / error)))


@pytest.mark.parametrize("flags", ["--sample-count 4", "--sample-count 3 --no-overfit"])
def test_the_picture_is_zlo_z0_sample_truth_and_its_psnr_is_the_logged_one(tmp_path, folder, flags):
    run = start(tmp_path, f"--dataset {folder} --max-steps 3 --interpolant.sigma 1e-6 {flags}")
    count = 4 if "4" in flags else 3
    zlo, z0, sample, truth = read_grids(run / "samples" / "step_000003.png", count, 16)
    images = data.load(str(folder), 16)
    known = (images.test if "--no-overfit" in flags else images.train).permute(0, 2, 3, 1).numpy()
    assert len({image.tobytes() for image in truth}) == count  # all different, all from the right split
    assert {image.tobytes() for image in truth} <= {image.tobytes() for image in known}
    blocks = truth.reshape(count, 8, 2, 8, 2, 3).astype(np.float64)
    across = np.floor(blocks.mean(4) + 0.5)  # PIL halves the width first, to whole levels
    low = np.floor(across.mean(2) + 0.5).repeat(2, 1).repeat(2, 2)
    assert np.array_equal(zlo, low)
    assert np.array_equal(z0, zlo)  # with hardly any noise
    assert not np.array_equal(sample, zlo) and not np.array_equal(sample, truth)
    logged = next(m for m in metrics(run) if "psnr" in m)
    assert logged["psnr"] == pytest.approx(decibels(sample, truth), abs=1e-3)
    assert logged["psnr_zlo"] == pytest.approx(decibels(zlo, truth), abs=1e-3)
    assert logged["nfe"] == 3  # two Euler steps and the clean estimate


def test_the_pictures_z0_carries_the_noise_of_the_coupling(finished):
    zlo, z0, _, _ = read_grids(finished / "samples" / "step_000004.png", 2, 16)
    middle = (zlo > 120) & (zlo < 136)  # where a noise of standard deviation 1 = 127.5 levels is clipped at one sigma
    noise = (z0.astype(float) - zlo)[middle]
    assert len(noise) > 50 and abs((np.abs(noise) > 115).mean() - 0.34) < 0.12


def test_psnr_against_numpy():
    torch.manual_seed(0)
    truth = torch.rand(5, 3, 6, 7) * 2 - 1
    x = (
        truth + torch.randn_like(truth) * torch.tensor([0.02, 0.1, 0.3, 1, 3])[:, None, None, None]
    )  # far out of range too
    levels = [np.clip(np.floor((z.double().numpy() + 1) * 127.5 + 0.5), 0, 255) for z in (x, truth)]
    assert pictures.psnr(x, truth) == pytest.approx(decibels(*levels), abs=0.01)
    assert pictures.psnr(truth, truth) == pytest.approx(
        10 * math.log10(255**2 * 3 * 6 * 7)
    )  # as if one value were off by a level


def test_the_strip_has_a_column_a_time_and_clean_estimates_below_states():
    trace = [(t, torch.full((2, 3, 64, 64), t), torch.full((2, 3, 64, 64), -t)) for t in np.linspace(0, 1, 21).tolist()]
    picture = pictures.strip(trace).astype(int)
    left = picture.shape[1] - 80 * 9 + 80 * np.arange(9)  # of each column; the titles of the rows come before them
    columns = [picture[TITLE + 2 + 32 + 66 * row, left + 6 + 2 + 32, 0] for row in range(4)]
    expected = np.round((np.array([trace[i][0] for i in (0, 2, 5, 8, 10, 12, 15, 18, 20)]) + 1) * 127.5)
    for row, sign in enumerate((1, -1, 1, -1)):
        assert np.abs(columns[row] - np.round(127.5 + sign * (expected - 127.5))).max() <= 1


def test_a_solver_that_fails_ends_no_training(tmp_path, monkeypatch, finished, capsys):
    """The network's output turns to NaN while it samples: a warning, no picture, the same weights."""
    original = Guided.__call__
    monkeypatch.setattr(Guided, "__call__", lambda self, *args: original(self, *args) * math.nan)
    for name, solver in (("dopri5", "--solver dopri5 --sample-steps None"), ("euler", "")):
        run = start(tmp_path / name, f"--max-steps 4 --sample-every 2 {solver}")
        warnings = [line for line in capsys.readouterr().err.splitlines() if "no samples" in line]
        assert len(warnings) == 2 and all(name in line and "not finite" in line for line in warnings)
        same(checkpoint(run), checkpoint(finished), ("ema", "players", "optimizers"))
        assert not list(run.rglob("*.png"))


def test_no_memory_for_samples_ends_no_training(tmp_path, monkeypatch, finished, capsys):
    def full(config, net, batch, trace=None):
        if isinstance(net, Guided):
            raise torch.OutOfMemoryError
        return draw(config, net, batch, trace)

    monkeypatch.setattr(model, "draw", full)
    run = start(tmp_path, FINISHED)
    assert "no samples at step 2: out of GPU memory" in capsys.readouterr().err
    same(checkpoint(run), checkpoint(finished), ("ema", "players", "optimizers"))


def test_dopri5_samples_by_default(tmp_path):
    run = start(tmp_path, "--max-steps 2 --solver auto --sample-steps None")
    logged = next(m for m in metrics(run) if "psnr" in m)
    assert logged["nfe"] >= 2 + 6 * 2 and logged["psnr"] > 5


# -------------------------------------------------------------------------------------------------------- TensorBoard

def test_tensorboard_holds_the_numbers_and_the_grids(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = start(tmp_path, f"{FINISHED} --use-tensorboard")
    resume(run, "--max-steps 6 --use-tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {(event.step, round(event.value, 4)) for event in events.Scalars("loss")}
    assert shown == {(line["step"], round(line["loss"], 4)) for line in metrics(run) if "loss" in line}
    assert [event.step for event in events.Images("samples/step")] == [2, 4, 6]


def test_a_missing_tensorboard_is_one_line(tmp_path, monkeypatch, capsys, finished):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = start(tmp_path, f"{FINISHED} --use-tensorboard")
    assert capsys.readouterr().err.count("pip install tensorboard") == 1
    same(checkpoint(run), checkpoint(finished))
