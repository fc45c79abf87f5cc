"""The whole run, on a tiny network: settings, data, gradients."""
import copy
import json
import math
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import trainer
from images import data
from images.corruptions import Damage
from images.pictures import to_uint8
from methods.interpolant import Interpolant
from runs import checkpoint, finite, leaves, make, metrics, one_line, ranks, resume, same, start
from support.machine import pick_device
from support.settings import PRESETS, from_plain
from trainer import Config, Trainer

# -------------------------------------------------------------------------------------------------------- bad input

UDPM = "--method udpm --udpm.lpips-weight 0 0 0"


@pytest.mark.parametrize("flags, words", [
    ("--batch-size ten", "batch-size ten int"),
    ("--task sr,foo", "task foo sr inpaint blur jpeg generate paired"),
    ("--method foo", "method foo interpolant sr3 i2sb edm udpm"),
    ("--preset foo", "preset foo cifar10-sr small"),
    ("--frobnicate 3", "--frobnicate"),
    ("--solver auto --sample-steps 5", "sample_steps 5 dopri5"),  # the interpolant's own
    (UDPM, "solver euler udpm auto"),  # it has no ODE
    ("--method i2sb", "i2sb ODE --i2sb.ot-ode"),  # nor has this, as it stands
    (f"{UDPM} --solver auto --sample-steps 5", "steps 5 3"),
    (f"{UDPM} --solver auto --sample-steps 3 --image-size 12", "12 8"),
    ("--method sr3 --solver auto --sample-steps 3000", "steps 3000 2000"),
    ("--method flowmap --label-drop 0.1 --no-overfit --guidance 2", "guidance 2 1 flowmap"),
    ("--guidance 2 --label-drop 0", "guidance 2 1 label"),
    ("--guidance 0 --label-drop 0 --no-overfit", "guidance 0 1 label"),
    ("--guidance 2 --no-unet-use-classes", "guidance 2 1 label"),
    ("--damage.factor 3", "damage.factor 3 2 4 8"),
    ("--image-size 15", "15 2"),
    ("--task paired", "paired_path None paired"),
    ("--paired-path somewhere", "paired_path somewhere paired"),
    ("--dataset nowhere", "dataset nowhere cifar10 shapes"),
    ("--device frob", "device frob cpu"),
    ("--init nowhere", "run nowhere"),
    ("--unet-channels 8192 --unet-dim-mults 64 64", "unet_channels GB are free"),  # before it takes any
    ("--name a/b", "name = 'a/b' without slashes"),
    ("--name ..", "name = '..'"),
    ("--name=", "name = ''"),
    ("--resume=", "resume = ''"),
    ("--out-dir {file}", "{file}"),
    ("--out-dir {file}/runs", "{file}/runs"),
    pytest.param("--device cuda", "device cuda cpu",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")),
])
def test_wrong_values_are_refused_in_one_line(tmp_path, capsys, flags, words):
    (tmp_path / "file").touch()
    flags, words = (text.format(file=tmp_path / "file") for text in (flags, words))
    assert start(tmp_path / "out", flags, status=2) is None
    error = one_line(capsys).removeprefix("trainer.py: ")
    for word in words.split():
        assert word in error or word.replace("_", "-") in error, (word, error)
    assert len(error) < 600


def test_help_names_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        trainer.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    names = {re.sub(r"/\d+$", "", name) for name in leaves(asdict(Config()))}  # a tuple's leaves have numbers
    flags = {"--" + name.lstrip("/").replace("/", ".").replace("_", "-") for name in names}
    missing = [flag for flag in flags if flag not in text and flag.replace("--", "--no-", 1) not in text]
    assert len(flags) > 60 and not missing


# --------------------------------------------------------------------------------------------- gradients not finite

def test_a_gradient_that_is_not_finite_skips_its_step(tmp_path, monkeypatch):
    """Be it in all weights, or in one of them."""
    bad = {1: slice(1), 4: slice(None), 5: slice(1)}  # which weights, by the step
    states, original = {}, Trainer.train_step

    def train_step(self):
        spoilt = list(self.net.parameters())[bad.get(self.step + 1, slice(0))]
        hooks = [weight.register_hook(lambda gradient: gradient * math.nan) for weight in spoilt]
        original(self)
        for hook in hooks:
            hook.remove()
        state = dict(players=[each.module.state_dict() for each in self.players], ema=self.ema.state_dict(),
                     optimizers=[each.optimizer.state_dict() for each in self.players])
        states[self.step] = copy.deepcopy(state)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    run = start(tmp_path, "--max-steps 6 --print-loss-every 1 --checkpoint-every 1")
    weights = [states[step]["players"][0]["stem.weight"] for step in range(1, 7)]
    moved = [not torch.equal(*pair) for pair in zip(weights, weights[1:])]
    assert moved == [True, True, False, False, True]
    for step in (4, 5):
        same(states[step], states[3], ("players",))
        for a, b in zip(states[step]["optimizers"], states[3]["optimizers"]):  # moments and Adam's own step count
            same(a, b, ("state",))
    assert all(finite(state) for state in states.values())
    logged = [m for m in metrics(run) if "loss" in m]
    assert [m.get("skipped_steps", 0) for m in logged] == [1, 1, 1, 2, 3, 3]
    assert checkpoint(run)["skipped"].tolist() == [3, 0]


def test_one_of_two_players_alone_can_end_the_run(tmp_path, monkeypatch, capsys):
    """A healthy discriminator must not hide a network that never learns, nor the other way round."""
    monkeypatch.setattr(trainer, "MAX_SKIPPED", 3)
    for sick in (0, 1):
        def players(self, net, *args, **kwargs):
            other = torch.nn.Linear(1, 1)
            losses = [self.loss, lambda module, batch: module(batch.z1[:, 0, 0, :1]).square()[:, 0]]
            good = losses[sick]
            losses[sick] = lambda module, batch: good(module, batch) * math.nan
            return list(zip((net, other), losses))

        monkeypatch.setattr(Interpolant, "players", players, raising=False)
        run = start(tmp_path / str(sick), "--max-steps 6 --print-loss-every 1", status=1)
        error = capsys.readouterr().err.splitlines()[-1]
        assert "the last 3 gradients were not finite" in error and "start again" in error
        assert not list(run.rglob("*.pt"))  # nothing good was there to be saved


# ---------------------------------------------------------------------------------------------------- labels and flips

def test_labels_can_be_switched_off(tmp_path, folder):
    flat = tmp_path / "flat"  # the same pictures without class folders
    flat.mkdir()
    for path in folder.rglob("*.png"):
        shutil.copy(path, flat)
    for flags, classes in ((f"--dataset {folder} --no-unet-use-classes", 0), (f"--dataset {flat}", 0),
                           (f"--dataset {folder}", 2)):
        run = make(f"--out-dir {tmp_path}/runs {flags}")
        rows = [len(tensor) for name, tensor in run.net.state_dict().items() if "embed_class.0" in name]
        assert run.num_classes == classes and rows == ([classes + 1] if classes else [])


@pytest.mark.parametrize(
    "flags, null, flipped", [("--overfit", 0, 0), ("--no-overfit", 0.3, 0.5), ("--no-overfit --label-drop 0", 0, 0.5),
                              ("--no-overfit --no-flip", 0.3, 0)]
)
def test_labels_drop_and_images_flip_in_their_share(tmp_path, folder, flags, null, flipped):
    """Each image is one of the data set's or its mirror image, with its own label or the null label, and its damage
    follows it."""
    run = make(f"--out-dir {tmp_path} --dataset {folder} --batch-size 6 --label-drop 0.3 {flags}")
    known = {tuple(x.flatten().tolist()): (y, mirrored) for mirrored in (False, True) for x, y in zip(
        run.images.train.flip(3) if mirrored else run.images.train, run.images.train_y.tolist())}
    nulls, flips, seen = 0, 0, set()
    batches = [run.batches(step)[0] for step in range(100)]
    for batch in batches:
        for z1, y in zip(to_uint8(batch.z1).flatten(1).tolist(), batch.y.tolist()):
            label, mirrored = known[tuple(z1)]
            assert y in (label, 2)
            nulls, flips = nulls + (y == 2), flips + mirrored
            seen.add(tuple(z1))
        assert torch.equal(batch.zlo, Damage()("sr", batch.z1).zlo)
    for share, expected in ((nulls / 600, null), (flips / 600, flipped)):
        assert abs(share - expected) < 0.07 * (expected > 0) + 1e-9
    # 36 training images, and their mirror images
    assert len(seen) == (6 if flags == "--overfit" else 36 if "--no-flip" in flags else 72)


def test_paired_images_flip_together(tmp_path, folder):
    negative = tmp_path / "negative"
    for path in folder.rglob("*.png"):
        target = negative / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(path))).save(target)
    run = make(f"--out-dir {tmp_path / 'out'} --dataset {folder} --task paired --paired-path {negative} --no-overfit")
    for step in range(10):
        batch = run.batches(step)[0]
        assert torch.allclose(batch.zlo, -batch.z1, atol=1e-6)


def test_no_test_image_is_trained_on(tmp_path, folder):
    run = make(f"--out-dir {tmp_path} --dataset {folder} --no-overfit --sample-count 4")
    trained = {tuple(x.flatten().tolist()) for images in (run.images.train, run.images.train.flip(3)) for x in images}
    shown = {tuple(x.flatten().tolist()) for x in to_uint8(run.batches.shown().z1)}
    assert len(shown) == 4 and not shown & trained


# ------------------------------------------------------------------------------------------------- device and compiler

@pytest.mark.parametrize(
    "there, named, expected",
    [(True, "auto", "cuda:2"), (True, "cuda", "cuda:2"), (True, "cuda:1", "cuda:1"), (True, "cpu", "cpu"),
     (False, "auto", "cpu")],
)
def test_each_process_has_its_own_gpu(monkeypatch, there, named, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setenv("LOCAL_RANK", "2")  # left over by a parent: without the others it says nothing
    assert str(pick_device(named)) == expected.replace("2", "0")
    for name, value in ranks(4)[2].items():
        monkeypatch.setenv(name, value)
    if ":" in named:
        with pytest.raises(ValueError, match="each on a GPU of its own"):
            pick_device(named)
    else:
        assert str(pick_device(named)) == expected


@pytest.mark.parametrize(
    "settings, compiled",
    [(dict(), True), (dict(max_steps=9999), False), (dict(unet_channels=72), False), (dict(compile="off"), False),
     (dict(compile="on", max_steps=4), True), (dict(method="udpm"), False)],
)
def test_long_runs_of_narrow_networks_are_compiled(settings, compiled):
    c = Config(**dict(device="cpu", max_steps=10_000, unet_channels=64) | settings)
    assert trainer.model.compiles(c) == compiled


def test_a_compiled_run_goes_on_compiled(tmp_path, monkeypatch):
    """As before, whatever its new length."""
    calls = []
    monkeypatch.setattr(trainer.model, "compile_network", lambda *_: calls.append(True))
    resume(start(tmp_path, "--max-steps 1 --compile on"), "--max-steps 2")
    assert len(calls) == 2


def no_compiler(graph, inputs):
    raise RuntimeError("no C++ compiler")


def wrong_compiler(graph, inputs):
    return lambda *x: tuple(y * math.nan for y in graph(*x))


@pytest.mark.parametrize("compiler, why", [(no_compiler, "no C\\+\\+ compiler"), (wrong_compiler, "not finite")])
def test_what_can_not_be_compiled_is_left_as_it_was(monkeypatch, compiler, why):
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend=compiler, **options))
    net, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    expected = net(x)
    with pytest.warns(UserWarning, match=f"the network is not compiled .*{why}"):
        trainer.model.compile_network(Config(), net, lambda net, x: net(x).square(), lambda step: [x], "fp32")
    assert torch.equal(net(x), expected) and net.weight.grad is None


# ------------------------------------------------------------------------------------- starting from a trained network

def test_a_new_run_begins_with_another_ones_weights(tmp_path, finished, capsys):
    trained = checkpoint(finished)["ema"]
    net = make(f"--out-dir {tmp_path}/a --init {finished}").net.state_dict()
    assert all(torch.equal(net[name], weight) for name, weight in trained.items())
    run = make(f"--out-dir {tmp_path}/b --init {finished} --task generate")  # which does not see the damaged image
    said = capsys.readouterr().out
    assert "fresh are stem.weight\n" in said
    other = run.net.state_dict()
    assert other["stem.weight"].shape[1] == 3 and run.step == 0
    assert all(torch.equal(other[name], weight) for name, weight in trained.items() if name != "stem.weight")
    assert all(torch.equal(run.ema.state_dict()[name], other[name]) for name in other)


# ------------------------------------------------------------------------------------------------- settings and data

def test_config_json_is_the_runs_config(finished):
    plain = json.loads((finished / "config.json").read_text())
    config = from_plain(Config, plain)
    assert config == from_plain(Config, checkpoint(finished)["config"])
    assert (config.unet_channels, config.max_steps, config.dataset, config.preset) == (8, 4, "shapes", "small")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_allowed_and_survive_json(name):
    config = replace(Config(**PRESETS[name]), preset=name)
    config.check()
    assert from_plain(Config, json.loads(json.dumps(asdict(config), allow_nan=False))) == config


def test_flags_override_their_preset():
    flags = "--batch-size 6 --device cpu --preset=small-sr3 --damage.factor 4"
    config, _ = trainer.read_command_line(flags.split())
    expected = replace(Config(**PRESETS["small-sr3"]), preset="small-sr3", device="cpu", batch_size=6)
    assert config == replace(expected, damage=replace(expected.damage, factor=4))


@pytest.mark.parametrize(
    "flags, steps, warmup",
    [("--preset sr3-faces128", 1_000_000, 50_000), ("--preset sr3-faces128 --overfit", 1000, 0),
     ("--preset=sr3-faces128 --overfit --max_steps 7", 7, 0),
     ("--preset sr3-faces128 --overfit --warmup-steps=3", 1000, 3), ("--preset small", 600, 0),
     ("--preset small --no-overfit", 100_000, 0)],
)
def test_a_presets_step_count_is_for_its_own_mode(flags, steps, warmup):
    config, _ = trainer.read_command_line([*flags.split(), "--device", "cpu"])
    assert (config.steps, config.warmup_steps) == (steps, warmup)


@pytest.fixture
def no_cifar(monkeypatch):
    def download(name, *_):
        raise data.DatasetError(f"{name} is not in data")

    monkeypatch.setattr(data, "_download", download)


def test_the_demo_without_cifar_takes_its_own_photographs_and_says_so(tmp_path, no_cifar, capsys):
    run = start(tmp_path, "--dataset None --max-steps 1")
    said = capsys.readouterr().out
    assert "*" * 50 in said and "No CIFAR-10: cifar10 is not in data" in said
    assert "sixteen photographs" in said and "--dataset" in said
    assert json.loads((run / "config.json").read_text())["dataset"] == "demo"
    resume(run, "--max-steps 2")  # on the same images, without the banner
    assert "No CIFAR-10" not in capsys.readouterr().out


@pytest.mark.parametrize("flags",
                         ["--dataset None --no-overfit", "--dataset cifar10", "--dataset cifar10 --no-overfit"])
def test_where_cifar_was_meant_its_lack_is_an_error(tmp_path, no_cifar, capsys, flags):
    assert start(tmp_path, flags, status=2) is None
    assert "cifar10 is not in data" in one_line(capsys)


def test_without_a_gpu_the_small_preset_is_taken_and_said(capsys):
    config, _ = trainer.read_command_line(["--device", "cpu"])
    assert config == replace(Config(**PRESETS["small"]), preset="small", device="cpu")
    said = capsys.readouterr().out
    assert "small" in said and "no GPU" in said and "--preset cifar10-sr" in said


def test_the_demo_drops_labels_where_guidance_needs_it():
    shares = [Config(**settings).dropped for settings in ({}, dict(guidance=2), dict(overfit=False))]
    assert shares == [0, 0.1, 0.1]
