"""The benchmarks: their arithmetic, that what they compare is the same problem, and a smoke run of each."""
import io
import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import common, growth, photos, plain, solvers, speed, step
from images import data
from images.corruptions import Damage
from pixels import photo, put
from support.machine import reseed
from support.model import start_states
from trainer import Config, Trainer
from untrained import make_run

CPU = torch.device("cpu")
TINY = Config(unet_channels=8, unet_dim_mults=(1, 2), image_size=16, batch_size=2, dataset="shapes", use_wandb=False)


def test_turns_go_round_and_what_fails_drops_out():
    calls = []

    def work(name, fails_at=None):
        def call():
            calls.append(name)
            if calls.count(name) == fails_at:
                raise RuntimeError("no memory")
        return common.timer(call)

    times = common.in_turns(dict(a=work("a"), b=work("b", fails_at=1), c=work("c")), repeats=3, seconds=1e-6)
    assert [len(times[name]) for name in "ac"] == [3, 3] and times["b"] == "RuntimeError: no memory"
    turns = [name for name, before in zip(calls, [""] + calls) if name != before]
    assert "".join(turns) == "abcacac"


def test_a_machine_that_slows_down_changes_no_ratio():
    drift = [1.0, 1.7, 5.0]
    plain, ours = common.rows(dict(plain=[0.6 * d for d in drift], ours=[0.2 * d for d in drift]), "plain", images=12)
    assert ours["ratio"] == pytest.approx(3) and plain["ratio"] == 1
    assert ours["seconds"] == pytest.approx(0.34) and ours["images_per_second"] == pytest.approx(12 / 0.34)
    assert common.rows(dict(plain="out of memory", ours=[0.2]), "plain", 1)[0] == dict(
        name="plain", error="out of memory"
    )


def test_exponent_of_a_power_law():
    x = [1, 2, 4, 10]
    assert growth.exponent(x, [3 * v**1.7 for v in x]) == pytest.approx(1.7)


def test_arithmetic_of_a_step_grows_with_the_pixels_and_not_with_the_batch():
    one = replace(TINY, unet_channels=32, unet_dim_mults=(1,))
    small, large, wide = (step.flops_per_image(replace(one, **sizes), CPU) for sizes in (
        dict(image_size=8), dict(image_size=8, batch_size=64), dict(image_size=16)))
    assert small == large
    assert 3.9 < wide / small < 4.5  # the embedding does not grow, full attention faster


@pytest.mark.parametrize("knobs", [dict(), dict(down="bicubic", up="bicubic"), dict(factor=4)])
def test_the_plain_recipe_makes_the_same_pairs(knobs):
    config = replace(TINY, damage=Damage(**knobs))
    images = data.load("shapes", 16, limit=6)
    z1, y, _ = images.batch(torch.arange(6), CPU)
    zlo = config.damage("sr", z1).zlo
    pairs, flipped = plain.PlainPairs(images, config), set()
    for i in list(range(6)) * 3:
        clean, low, label = pairs[i]
        flip = bool((clean - z1[i]).abs().amax() > 1e-5)
        flipped.add(flip)
        turn = [2] if flip else []
        assert (clean.flip(turn) - z1[i]).abs().amax() < 1e-5 and label == y[i]
        assert (low.flip(turn) - zlo[i]).abs().amax() * 127.5 < 1.01
    assert flipped == {True, False}


def test_all_variants_train_the_same_network():
    batch = step.one_batch(TINY, CPU)
    todo = [step.Variant("fp32, NCHW (plain)", bf16=False, channels_last=False), step.Variant("fp32", bf16=False),
            step.Variant("bf16")]
    assert step.variants(CPU, False)[0] == todo[0]
    curves = []
    for variant, steps in zip(todo, (300, 30, 300)):
        train = step.make_step(replace(TINY, base_lr=1e-3), variant, batch)
        curves.append([])
        for number in range(steps):
            reseed(number)  # the same t and noise for each variant: what can differ is the weights
            curves[-1].append(train().item())
    plain, last, bf16 = (torch.tensor(curve).double() for curve in curves)
    assert plain[-30:].mean() < 0.6 * plain[:30].mean()  # it does learn
    torch.testing.assert_close(last, plain[:30], rtol=1e-4, atol=0)
    ratio = bf16.view(10, 30).mean(1) / plain.view(10, 30).mean(1)
    assert (ratio - 1).abs().max() < 0.03 and not torch.equal(bf16, plain), ratio


def test_plain_sampling_solves_the_same_equation():
    config, batch = TINY, step.one_batch(TINY, CPU)
    reseed("weights")
    net = step.unet(config).eval().requires_grad_(False)
    reseed("sample")
    theirs = plain.plain_sample(config, net, batch)
    reseed("sample")
    z0 = start_states(config, batch)
    ours = speed.run_sampler(config, net, batch)
    assert (theirs - z0).abs().mean() > 0.1  # it went somewhere
    # ours goes on from t = 1 - t_min to the clean estimate: alpha = t_min is left of the way
    assert (theirs - ours).abs().amax() < 3 * config.interpolant.t_min * (theirs - z0).abs().amax()


def test_the_peer_is_called_like_our_network_and_learns_the_same_task():
    pytest.importorskip("diffusers")
    shipped, tuned = step.variants(CPU, peer=True)[-2:]
    assert (shipped.bf16, tuned.peer) == (False, True)
    config = replace(TINY, base_lr=1e-3)
    batch = step.one_batch(config, CPU)
    net = step.unet(config, peer=True)
    out = net(batch.z1, torch.zeros(2), None, batch.zlo)
    assert out.shape == batch.z1.shape and out.dtype == torch.float32
    assert torch.equal(out, net(batch.z1, torch.zeros(2), torch.full((2,), net.num_classes), batch.zlo))
    train = step.make_step(config, shipped, batch)
    losses = [train().item() for _ in range(60)]
    assert statistics.fmean(losses[-20:]) < 0.8 * statistics.fmean(losses[:20])


def test_speed_in_a_smoke_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    assert speed.main(["--peer"]) == 2
    assert capsys.readouterr().err == ("speed.py: peer = True: allowed is that with one more package: pip install "
                                       "diffusers\n")
    assert speed.main(["--device", "abacus"]) == 2 and "device = 'abacus': allowed is" in capsys.readouterr().err
    out, parts = tmp_path / "speed.json", "step loop data sample save".split()
    assert speed.main(["--quick", "--device", "cpu", "--out", str(out), "--parts", *parts]) == 0
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert report["command"] in printed and report["machine"]["torch"] == torch.__version__
    plain_row = report["step"][0]
    for row in report["step"]:
        assert row["ratio"] == pytest.approx(statistics.median(p / s for p, s in zip(plain_row["turns"], row["turns"])))
        rate = report["matmul_flops_per_second"]["bf16" if row["name"].startswith("bf16") else "fp32"]
        assert row["share"] == pytest.approx(report["flops_per_image"] * 2 / row["seconds"] / rate)
        assert row["share"] > 0 and row["first_step"] > 0 and row["name"] in printed
    for part in ("loop", "data"):
        assert [row["ratio"] > 0 for row in report[part]] == [True, True] and report[part][1]["name"] == "trainer.py"
    nfe = {row["name"].split(",")[0]: row["nfe"] for row in report["sample"][1:]}
    assert [nfe[name] for name in ("euler", "midpoint", "heun", "rk4")] == [5, 5, 5, 5] and nfe["dopri5"] > 13
    assert report["save"]["bytes"] > 12 * report["parameters"]  # weights, their average, and AdamW's moments
    assert all(0 < held <= written for held, written in zip(report["save"]["held"], report["save"]["written"]))


def test_growth_in_a_smoke_run(tmp_path, capsys):
    out = tmp_path / "growth.json"
    arguments = "--quick --device cpu --batch-sizes 2 4 --image-sizes 16 --widths".split()
    assert growth.main([*arguments, "0"]) == 2 and capsys.readouterr().err.startswith("growth.py: widths = (0,): ")
    assert growth.main([*arguments, "8", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(r["batch_size"], r["image_size"], r["unet_channels"]) for r in rows] == [(2, 16, 8), (4, 16, 8)] + [
        (2, 16, 8)] * 2
    assert all(r["images_per_second"] == pytest.approx(r["batch_size"] / r["seconds"]) and r["flops"] > 1e6
               for r in rows)


def test_memory_counts_what_the_backward_pass_is_kept_for():
    config = replace(TINY, batch_size=8)
    net, batch, kept = step.unet(config), step.one_batch(config, CPU), {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        loss = config.chosen.loss(net, batch)
    saved = sum(kept.values()) - sum(kept.get(p.untyped_storage().data_ptr(), 0) for p in net.parameters())
    assert loss.requires_grad
    counted = growth.count_memory(config)
    assert counted["parameters"] == sum(p.numel() for p in net.parameters())
    assert saved < counted["activations"] < 1.6 * saved  # what is alive for a moment only comes on top
    assert abs(growth.alive(replace(config, batch_size=16))[1] / counted["activations"] - 2) < 0.1
    assert counted["with_checkpointing"] < 0.7 * counted["activations"]


def test_distance_in_levels():
    x = torch.zeros(2, 3, 4, 4)
    far = x.clone()
    far[1] += 2 / 127.5
    rms, worst = solvers.rms_in_levels(far, x)
    assert worst == pytest.approx(2) and rms == pytest.approx(2 / 2**0.5)
    assert solvers.rms_in_levels(x + 7, x + 5) == (0, 0)  # both white


def test_the_cheapest_is_near_in_both_distances():
    reference = dict(nfe=100, rms=0.0, frechet=5.0)
    far, worse, good, better = (dict(nfe=n, rms=r, frechet=f) for n, r, f in (
        (3, 2.0, 5.0), (5, 0.5, 5.2), (9, 0.9, 5.09), (9, 0.3, 5.0)))
    assert solvers.cheapest([reference, far, worse, good, better, dict(error="stiff")]) is better
    assert solvers.cheapest([reference, far, dict(error="stiff")]) is reference
    assert solvers.cheapest([dict(reference, frechet=None), dict(worse, frechet=None)])["nfe"] == 5


def test_solvers_on_a_run(tmp_path, capsys):
    from PIL import Image

    images = data.load("shapes", 16, limit=40)
    for i, (pixels, label) in enumerate(zip(images.train, images.train_y)):
        folder = tmp_path / "pictures" / ("train" if i < 28 else "test") / ("even", "odd")[label % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    trainer = Trainer(replace(TINY, dataset=str(tmp_path / "pictures"), out_dir=str(tmp_path)))
    trainer.save()
    trainer.folder.wait()
    out = tmp_path / "solvers.json"
    arguments = "--device cpu --count 8 --batch-size 4 --steps 8 16 --tolerances 1e-2 --precisions fp32".split()
    assert solvers.main([str(trainer.folder.path), *arguments, "--out", str(out)]) == 0
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    table = {row["name"]: row for row in report["table"]}
    reference, loose = table["dopri5, 1e-05"], table["dopri5, 0.01"]
    assert reference["rms"] == 0 and 0 < loose["rms"] and loose["nfe"] < reference["nfe"]
    evaluations = dict(euler=1, midpoint=2, heun=2, rk4=4)
    for solver, order in dict(euler=1, midpoint=2, heun=2).items():
        coarse, fine = (table[f"{solver}, {n} steps"] for n in (8, 16))
        assert (coarse["nfe"], fine["nfe"]) == (8 * evaluations[solver] + 1, 16 * evaluations[solver] + 1)
        assert 2**order * 0.7 < coarse["rms"] / fine["rms"] < 2**order * 1.7  # as the same noise must give
    assert all(row["frechet"] > 0 and row["rms_worst"] >= row["rms"] for row in report["table"])
    assert "Fewest evaluations within one level and 2% of FD" in printed


def test_photos_scores_a_model_that_changes_nothing_as_the_damage_itself(tmp_path, capsys):
    run = make_run(tmp_path / "run", identity=True, task="sr,jpeg", damage=Damage(factor=(4, 2), up="nearest"))
    truth = [photo(37, 33, seed=seed) for seed in range(2)]
    for seed in range(2):
        put(tmp_path / f"photos/{seed}.png", truth[seed])
    truth = [Image.fromarray(x[:32, :32]) for x in truth]
    arguments = [run, "--photos", str(tmp_path / "photos"), "--draws", "2"]
    assert photos.main(arguments) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == ["damage", "input", "model", "best simple peer"]
    rows = {row[0]: row[1:] for row in rows[1:]}
    assert list(rows) == list(photos.DAMAGES)

    def decibels(answer) -> str:
        errors = [(np.asarray(x).astype(float) - np.asarray(answer(x))) ** 2 for x in truth]
        return f"{statistics.fmean(10 * np.log10(255**2 / error.mean()) for error in errors):.2f}"

    def jpeg(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=50)
        return Image.open(file)

    def area(filter):
        return lambda image: image.resize((16, 16), Image.BOX).resize((32, 32), filter)

    assert rows["JPEG 50"][:2] == [decibels(jpeg)] * 2
    assert rows["area 2"][:2] == [decibels(area(Image.BICUBIC)), decibels(area(Image.NEAREST))]  # as it was trained
    assert float(rows["blur 2"][2].split()[0]) > float(rows["blur 2"][0])  # an unsharp mask undoes a part of it
    for wrong, line in ([["--only", "sr 8"], "only = ('sr 8',): allowed is none, JPEG 95, "],
                        [["--count", "0"], "count = 0: allowed is a whole number from 1"]):
        assert photos.main([*arguments, *wrong]) == 2 and line in capsys.readouterr().err
