"""What a run does with its settings, seen from outside: its checkpoints, figures and pictures, held against plain torch
and closed forms."""
import json
import shutil
import time

import pytest
import torch

from images import data
from images.corruptions import Damage
from images.pictures import psnr, to_float
from methods.regression import Regression
from runs import checkpoint, make, metrics, resume, same, start
from support import model
from support.model import make_unet
from support.settings import from_plain
from trainer import Config, Trainer

# Regression draws neither time nor noise, so its loss can be written out here; on one batch there are no flips either.
# Groups of two channels: in groups of one, a bias before a norm has no gradient but rounding.
PLAIN = "--method regression --solver auto --sample-steps 1 --precision fp32 --unet-channels 16 --sample-every 1000"
STILL = "--base-lr 1e-30"  # moves no weight: a checkpoint holds those that the run began with
EACH = "--checkpoint-every 1 --keep-every 1 --print-loss-every 1"
RATE, DECAY, CLIP, AVERAGE = 3e-3, 0.1, 0.05, 0.3


def states(run) -> list[dict]:
    """The checkpoints that stay, by step."""
    return [torch.load(file, weights_only=True) for file in sorted((run / "checkpoints").glob("step_*.pt"))]


def losses(run) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def network(state, weights):
    """The run's network with these weights."""
    net = make_unet(from_plain(Config, state["config"]), state["num_classes"])
    net.load_state_dict(weights)
    return net


def the_batch():
    """What those runs overfit: clean images, damaged ones, labels."""
    images = data.load("shapes", 16, limit=4)
    z1 = to_float(images.train)
    return z1, Damage()("sr", z1).zlo, images.train_y


@pytest.fixture(scope="module")
def beginning(tmp_path_factory) -> dict:
    """The checkpoint of a run that moved no weight, and its folder as `run`."""
    run = start(tmp_path_factory.mktemp("still"), f"{PLAIN} {STILL} --max-steps 1")
    return checkpoint(run) | dict(run=run)


@pytest.fixture(scope="module")
def trained(beginning, tmp_path_factory):
    """Three steps from there."""
    return start(tmp_path_factory.mktemp("trained"), f"{PLAIN} {EACH} --init {beginning['run']} --base-lr {RATE} "
                 f"--weight-decay {DECAY} --warmup-steps 4 --grad-clip {CLIP} --ema-decay {AVERAGE} --max-steps 3 "
                 "--sample-count 4")


def test_steps_are_those_of_plain_torch(beginning, trained):
    """The mean squared error's gradient, clipped, the rate rising over four steps, AdamW with decay of the weights, and
    the average of the weights with its warm-up."""
    z1, zlo, y = the_batch()
    net = network(beginning, beginning["players"][0]).train()
    weights = dict(net.named_parameters())
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    first, second = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    for step, (state, logged) in enumerate(zip(states(trained), losses(trained), strict=True), 1):
        loss = (zlo + net(zlo, torch.zeros(4), y, zlo) - z1).square().mean()
        assert logged == pytest.approx(loss.item(), rel=1e-4)
        net.zero_grad()
        loss.backward()
        norm = torch.cat([weight.grad.flatten() for weight in weights.values()]).norm()
        assert norm > 2 * CLIP
        rate, decay = RATE * step / 4, min(AVERAGE, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = weight.grad * CLIP / norm
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient.square()
                mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
                weight *= 1 - rate * DECAY
                weight -= rate * mean / (square.sqrt() + 1e-8)
                average[name] = decay * average[name] + (1 - decay) * weight
        for expected, found in ((weights, state["players"][0]), (average, state["ema"])):
            for name in expected:
                assert (found[name] - expected[name]).abs().max() < 2e-5, (step, name)


def test_pictures_are_of_the_averaged_weights(trained):
    z1, zlo, y = the_batch()
    state = checkpoint(trained)
    with torch.no_grad():
        averaged, raw = (psnr(zlo + network(state, weights).eval()(zlo, torch.zeros(4), y, zlo), z1)
                         for weights in (state["ema"], state["players"][0]))
    assert metrics(trained)[-1]["psnr"] == pytest.approx(averaged, abs=0.02) and abs(averaged - raw) > 0.2


def test_each_sampling_shows_the_same_images_damage_and_noise(tmp_path, folder):
    """Also before the first step."""
    run = start(tmp_path, f"{STILL} --no-overfit --dataset {folder} --task inpaint --damage.mask freeform-10-20 "
                          "--sample-at-start --sample-every 1 --max-steps 1")
    for name in ("step", "trace"):
        first, second = ((run / "samples" / f"{name}_00000{step}.png").read_bytes() for step in (0, 1))
        assert first == second


def test_a_logged_loss_is_the_mean_since_the_last_one(tmp_path):
    each, second = (start(tmp_path / str(every), f"--max-steps 6 --sample-every 1000 --print-loss-every {every}")
                    for every in (1, 2))
    pairs = torch.tensor(losses(each)).view(3, 2)
    assert losses(second) == pytest.approx(pairs.mean(1).tolist(), rel=1e-5) and pairs.mean(1).diff().abs().min() > 1e-3


def test_the_lowest_loss_is_not_the_last(tmp_path):
    run = start(tmp_path, f"{PLAIN} {EACH} --base-lr 0.02 --max-steps 4")
    assert min(losses(run)) < losses(run)[-1] / 2
    assert checkpoint(run)["lowest_loss"] == pytest.approx(min(losses(run)))


def test_the_speed_does_not_count_samplings(tmp_path, monkeypatch):
    clock = [0.0]

    def takes(seconds, function):
        def timed(*arguments):
            clock[0] += seconds
            return function(*arguments)

        return timed

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Trainer, "train_step", takes(1, Trainer.train_step))
    monkeypatch.setattr(model, "sample_for_pictures", takes(100, model.sample_for_pictures))
    run = start(tmp_path, "--max-steps 4 --print-loss-every 2 --sample-every 3")  # between two losses, and at the end
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_per_second"] for line in lines if "loss" in line] == [4, 4]


def test_udpm_draws_another_level_at_each_step(tmp_path):
    """The loss of level 1 alone counts, so it is 0 in the steps of the other levels."""
    weights = "--udpm.l1-weight 1 0 0 --udpm.lpips-weight 0 0 0 --udpm.adv-weight 0 0 0"
    run = start(tmp_path, f"--method udpm --solver auto --sample-steps 3 --sample-every 1000 {weights} {STILL} {EACH} "
                          "--max-steps 12")
    assert 1 < losses(run).count(0) < 11


def test_each_process_drops_activations_of_its_own(tmp_path):
    gradients = []
    for rank in range(2):
        run = make(f"{PLAIN} {STILL} --unet-dropout 0.5 --out-dir {tmp_path / str(rank)}")
        run.rank = rank
        run.train_step()
        gradients.append(run.net.out.weight.grad)
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


def test_a_step_leaves_every_tensor_in_its_place(tmp_path):
    """A CUDA graph reads and writes the addresses that it was captured with."""
    run = make(f"--dataset shapes --out-dir {tmp_path} --no-overfit --unet-dropout 0.1 --warmup-steps 9")

    def places():
        health = [x for x in vars(run.health).values() if torch.is_tensor(x)]
        states = [x for player in run.players for state in player.optimizer.state.values() for x in state.values()]
        return [x.data_ptr() for x in (*run.net.parameters(), *run.ema.parameters(), *health, *states)]

    run.train_step()
    before, streams = places(), [piece.draws.generator for piece in run.batches(1)]
    run.train_step()
    assert places() == before and len(before) > 100
    assert streams == [piece.draws.generator for piece in run.batches(2)]
    run.folder.close()


def test_pictures_are_rarer_in_longer_runs():
    def due(c):
        return [step for step in range(100, c.steps + 1, 100) if c.samples_at(step)]

    assert due(Config(max_steps=700)) == [500, 700] and due(Config(max_steps=5000)) == [*range(500, 5001, 500)]
    assert due(Config(max_steps=100_000)) == [*range(10_000, 100_001, 10_000)]
    assert Config(max_steps=9000, sample_every=3000).samples_at(3000)


@pytest.mark.parametrize("settings, rates", [
    (dict(lr_schedule="constant"), {0: 0.5, 1: 1, 5: 1}),
    (dict(lr_schedule="linear"), {0: 0.5, 2: 1, 3: 0.75, 5: 0.25}),
    (dict(lr_schedule="cosine"), {0: 0.5, 3: (2 + 2**0.5) / 4, 4: 0.5, 5: (2 - 2**0.5) / 4}),
    (dict(lr_decay=0.5, max_steps=9999), {999: 1, 1000: 0.5, 2999: 0.25})])
def test_the_rate_follows_its_schedule(settings, rates):
    config = Config(**dict(base_lr=1, warmup_steps=2, max_steps=6) | settings)
    assert {step: config.rate(step) for step in rates} == pytest.approx(rates)


def test_the_log_has_the_gradients_norm_the_rate_and_the_loss_on_held_out_images(trained, tmp_path):
    lines = [line for line in metrics(trained) if "loss" in line]
    assert all(line["gradient_norm"] > 2 * CLIP for line in lines)
    assert [line["learning_rate"] for line in lines] == pytest.approx([RATE * step / 4 for step in (1, 2, 3)])
    run = start(tmp_path, f"{PLAIN} {STILL} --no-overfit --sample-every 1 --max-steps 2 --sample-count 4")
    state, (first, second) = checkpoint(run), [line["held_out_loss"] for line in metrics(run) if "nfe" in line]
    images, index = data.load("shapes", 16), data.batch_indices(1000, 4, 0, 0)
    z1 = to_float(images.test[index])
    zlo, net = Damage()("sr", z1).zlo, network(state, state["ema"]).eval()
    with torch.no_grad():
        guess = zlo + net(zlo, torch.zeros(4), images.test_y[index], zlo)
    assert first == second == pytest.approx((guess - z1).square().mean().item(), rel=1e-4)


def test_udpm_logs_its_loss_by_part_and_its_discriminators(tmp_path):
    run = start(tmp_path, "--method udpm --solver auto --sample-steps 3 --udpm.lpips-weight 0 0 0 "
                "--udpm.disc-channels 8 --udpm.l1-weight 1 1 1 --max-steps 4 --print-loss-every 1 --micro-batch 2")
    lines = [line for line in metrics(run) if "loss" in line]
    assert all(line["loss"] == pytest.approx(line["loss_l1"] + line["loss_adversarial"], abs=2e-6) for line in lines)
    assert all(line["loss_discriminator"] > 0 for line in lines)


def test_fp16_finds_its_scale_and_a_resumed_run_keeps_it(tmp_path, monkeypatch):
    """2^16 times a large loss overflows: those steps are skipped, and the scale halves until one passes. A state of
    that time is good enough to be saved."""
    original = Regression.loss
    monkeypatch.setattr(Regression, "loss", lambda *arguments: 3e3 * original(*arguments))
    flags = f"{PLAIN} --precision fp16 --print-loss-every 1 --checkpoint-every 4 --keep-every 4 --unet-channels 8"
    run = start(tmp_path / "straight", f"{flags} --max-steps 12")
    state = checkpoint(run)
    scaler, skipped = state["scaler"], int(state["skipped"][0])
    assert 4 < skipped < 11 and scaler["scale"] == 2**16 / 2**skipped and scaler["_growth_tracker"] == 12 - skipped
    assert torch.load(run / "checkpoints" / "step_000004.pt", weights_only=True)["skipped"].tolist() == [4, 4]
    half = shutil.copytree(run, tmp_path / "half")
    (half / "checkpoints" / "step_000004.pt").rename(half / "checkpoints" / "last.pt")
    resume(half)
    same(checkpoint(half), state, keys=("step", "ema", "players", "optimizers", "scaler", "skipped"))
