"""The benchmarks: their arithmetic, that what they compare is the same problem, and a smoke run of each."""
import io
import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import common, photos, plain, solvers, speed, step
from benchmarks import data as packing
from images import data
from images.corruptions import Damage
from pixels import photo, put
from support.machine import reseed
from support.model import start_states
from trainer import Config
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
    curves = []
    for variant in (step.variants(CPU)[0], step.Variant("fp32", bf16=False), step.Variant("bf16")):
        train = step.make_step(replace(TINY, base_lr=1e-3), variant, batch)
        curves.append([])
        for number in range(20):
            reseed(number)  # the same t and noise for each variant: what can differ is the weights
            curves[-1].append(train().item())
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] != curves[0] and curves[2] == pytest.approx(curves[0], rel=0.05)
    reseed(0)
    assert train().item() < 0.9 * curves[0][0]  # it does learn


def test_plain_sampling_solves_the_same_equation():
    config, batch = TINY, step.one_batch(TINY, CPU)
    reseed("weights")
    net = step.unet(config).eval().requires_grad_(False)
    reseed("sample")
    theirs = plain.plain_sample(config, net, batch)
    reseed("sample")
    z0 = start_states(config, batch)
    reseed("sample")
    ours = speed.run_sampler(config, net, batch)
    assert (theirs - z0).abs().mean() > 0.1  # it went somewhere
    # ours goes on from t = 1 - t_min to the clean estimate: alpha = t_min is left of the way
    assert (theirs - ours).abs().amax() < 3 * config.interpolant.t_min * (theirs - z0).abs().amax()


def test_speed_in_a_smoke_run(tmp_path, capsys):
    assert speed.main(["--device", "abacus"]) == 2 and "device = 'abacus': allowed is" in capsys.readouterr().err
    out, parts = tmp_path / "speed.json", "step loop data sample".split()
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


def test_data_in_a_smoke_run(tmp_path):
    out = tmp_path / "data.json"
    assert packing.main(f"--images 40 --side 16 --batch-size 8 --device cpu --out {out}".split()) == 0
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["first start: packing", "second start", "rows gathered in the host's memory",
                          "batches as the trainer takes them"]
    assert all(row["seconds"] > 0 and row["images"] >= 32 for row in rows.values())


def test_distance_in_levels():
    x = torch.zeros(2, 3, 4, 4)
    far = x.clone()
    far[1] += 2 / 127.5
    rms, worst = solvers.rms_in_levels(far, x)
    assert worst == pytest.approx(2) and rms == pytest.approx(2 / 2**0.5)
    assert solvers.rms_in_levels(x + 7, x + 5) == (0, 0)  # both white


def test_solvers_on_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(solvers, "bf16_helps", lambda device: False)  # whose rounding hides the order
    for label in range(2):
        for i in range(14):
            put(tmp_path / f"pictures/{label}/{i}.png", photo(16, 16, seed=2 * i + label))
    run = make_run(tmp_path / "run", dataset=str(tmp_path / "pictures"))
    out = tmp_path / "solvers.json"
    arguments = "--device cpu --count 8 --solvers euler midpoint heun --steps 8 16 --tolerances 1e-2".split()
    assert solvers.main([run, *arguments, "--out", str(out)]) == 0
    table = {row["name"]: row for row in json.loads(out.read_text())["table"]}
    reference, loose = table["dopri5, 1e-05"], table["dopri5, 0.01"]
    assert reference["rms"] == 0 and 0 < loose["rms"] and loose["nfe"] < reference["nfe"]
    for solver, order in dict(euler=1, midpoint=2, heun=2).items():
        coarse, fine = (table[f"{solver}, {n} steps"] for n in (8, 16))
        assert (coarse["nfe"], fine["nfe"]) == (8 * order + 1, 16 * order + 1)
        assert 2**order * 0.7 < coarse["rms"] / fine["rms"] < 2**order * 1.7  # as the same noise must give
    assert all(row["rms_worst"] >= row["rms"] for row in table.values())


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
