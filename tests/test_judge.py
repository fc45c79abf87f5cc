"""The judge holds samples against the truth by a classifier that it keeps, and leaves out what can't be had."""
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn

from evaluation import judge as judging
from evaluation import metrics
from evaluation.classifier import Classifier, cached, digest
from images import SettingsError, data
from images.corruptions import Damage
from images.pictures import psnr, to_float, to_uint8
from measured import EXACT, LOCAL, SIDE, truth
from trainer import Config

# -------------------------------------------------------------------------------------------- classifier, halves, floor


def test_the_classifier_tells_dark_from_bright(judge, config):
    assert judge.accuracy == 100 and judge(config, False, truth)["accuracy"] == 100

    def swapped(batch):
        return batch.z1 + torch.where(batch.z1.mean((1, 2, 3), keepdim=True) < -0.1, 1, -1) * 100 / 127.5

    assert judge(config, False, swapped)["accuracy"] == 0


def test_the_accuracy_is_of_one_image_at_a_time():
    """All test images are bright: by statistics of their own batch they would look as dark as bright."""
    level = torch.tensor([60, 180], dtype=torch.uint8).repeat(64)
    x = (level.view(-1, 1, 1, 1) + torch.randint(0, 20, (128, 3, 16, 16), dtype=torch.uint8))
    y = torch.arange(128) % 2
    net = Classifier(3, 2, 16)
    assert net.learn(data.Images(x, x[y == 1], y, y[y == 1], ["dark", "bright"]), 10, "cpu")["accuracy"] == 100


def test_which_images_with_which_damage_and_noise(config):
    """Some of all classes, though folders are sorted; each batch and each seed has damage and noise of its own."""
    def seen(seed):
        judge, found = judging.Judge(config, torch.device("cpu"), ("bias",), 12, 6, seed), []

        def make(batch):
            found.append((batch.zlo - batch.z1, batch.randn_like(batch.z1)))
            return batch.z1

        judge(replace(config, task="noise"), False, make)
        return judge, found

    (judge, one), (_, again), (_, other) = seen(0), seen(0), seen(1)
    assert set(judge.images.test_y[torch.cat(judge.batches)].tolist()) == {0, 1}
    for kind in (0, 1):
        assert torch.equal(one[0][kind], again[0][kind])
        assert not torch.allclose(one[0][kind], one[1][kind], atol=0.02)
        assert not torch.allclose(one[0][kind], other[0][kind], atol=0.02)


def test_samples_that_are_the_truth_score_the_floor(judge, config):
    floor = judge.baselines(config)[-1]
    assert floor["name"] == "truth against truth" and floor["frechet"] > 0.01
    assert judge(config, False, truth)["frechet"] == pytest.approx(floor["frechet"], rel=1e-6)
    assert judge(config, False, lambda batch: batch.zlo)["frechet"] > floor["frechet"]


def test_each_half_is_held_against_the_other(judge, config):
    order = torch.cat(judge.batches)
    other = iter(judge.images.test[order.roll(20)].split(16))  # for the i-th image of a half, the i-th of the other
    assert judge(config, False, lambda batch: to_float(next(other)))["frechet"] == pytest.approx(0, abs=1e-4)


@pytest.fixture
def pooled(monkeypatch):
    """Features in place of Inception's: means of a quarter of the image each."""
    def features(x):
        return nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)

    monkeypatch.setitem(metrics.TABLE, "fid", replace(metrics.TABLE["fid"], load=lambda side, device: features))
    return features


def scipys_distance(a, b) -> float:
    """Frechet's, of features (N, d)."""
    x, y = np.cov(a.T), np.cov(b.T)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(x + y - 2 * scipy.linalg.sqrtm(x @ y).real)


def test_fid_flows_through_the_same_halves(config, pooled):
    judge = judging.Judge(config, torch.device("cpu"), ("fid",), count=41, batch_size=16)
    score = judge(config, False, lambda batch: 0.5 * batch.z1)
    z1 = judge.images.test[torch.cat(judge.batches)][:40]
    x, y = (pooled(z).double().numpy() for z in (to_uint8(0.5 * to_float(z1)), z1))
    assert score.keys() == {"fid", "seconds", "errors", "without"} and score["errors"] == score["without"] == {}
    assert score["fid"] == pytest.approx((scipys_distance(x[:20], y[20:]) + scipys_distance(x[20:], y[:20])) / 2,
                                         rel=1e-4)


def test_fid_against_given_statistics(config, pooled, tmp_path):
    """The same formula by scipy, over all samples; truth against itself is 0."""
    plain = judging.Judge(config, torch.device("cpu"), ("fid",), count=40, batch_size=16)
    truth_features = pooled(plain.images.test[torch.cat(plain.batches)]).double().numpy()
    file = tmp_path / "given.npz"
    np.savez(file, mu=truth_features.mean(0), sigma=np.cov(truth_features.T), more=np.zeros(3))
    judge = judging.Judge(config, torch.device("cpu"), ("fid",), count=40, batch_size=16, fid_statistics=str(file))
    rows = [judge(config, False, lambda batch: batch.z1), judge(config, False, lambda batch: 0.5 * batch.z1)]
    assert rows[0]["fid_given"] == pytest.approx(0, abs=1e-4 * np.trace(np.cov(truth_features.T)))
    x = pooled(to_uint8(0.5 * to_float(judge.images.test[torch.cat(judge.batches)]))).double().numpy()
    assert rows[1]["fid_given"] == pytest.approx(scipys_distance(x, truth_features), rel=1e-4)
    assert "fid_given" not in plain(config, False, truth)
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    (tmp_path / "text.npz").write_text("mu")
    for name in ("small", "other", "text", "missing"):
        with pytest.raises(SettingsError, match="fid_statistics = ") as refused:
            judging.Judge(config, torch.device("cpu"), ("fid",), count=40, fid_statistics=str(tmp_path / f"{name}.npz"))
        assert "\n" not in str(refused.value)


def test_baselines_of_sr(judge, config):
    low, bicubic, floor = judge.baselines(replace(config, damage=Damage(up="bicubic")))
    assert [low["name"], bicubic["name"], floor["name"]] == ["input", "bicubic", "truth against truth"]
    assert low["consistency"] == 0 < bicubic["consistency"] and low["psnr"] != bicubic["psnr"]
    z1 = judge.images.test[torch.cat(judge.batches)]
    small = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((SIDE // 2,) * 2, Image.BOX) for image in z1]
    for row, how in ((low, Image.NEAREST), (bicubic, Image.BICUBIC)):
        images = torch.stack([torch.from_numpy(np.array(image.resize((SIDE, SIDE), how))) for image in small])
        images = images.permute(0, 3, 1, 2)
        assert row["psnr"] == pytest.approx(psnr(to_float(images), to_float(z1)), rel=1e-5)


@pytest.mark.parametrize("task, names, without", [
    ("inpaint", ["input", "smooth fill", "truth against truth"], set()),
    ("jpeg", ["input", "truth against truth"], set()),
    ("generate", ["truth against truth"], {"psnr", "consistency"}),
    ("sr,inpaint", ["input", "truth against truth"], set())])
def test_other_tasks(judge, config, task, names, without):
    c = replace(config, task=task)
    rows = judge.baselines(c)
    assert [row["name"] for row in rows] == names
    assert set(judge(c, True, truth)) == set(LOCAL) - without | {"seconds", "errors", "without"}
    if task != "generate":  # the very damage of before is done to the sample, random masks included
        assert judge(c, False, truth)["consistency"] == 0
    if task == "inpaint":
        assert rows[1]["psnr"] > rows[0]["psnr"]
    if task == "generate":
        assert judge.left_out(c, False).keys() == {"psnr", "consistency", "accuracy"}


def test_pairs_can_not_be_damaged_again(config, drawings):
    c = replace(config, task="paired", paired_path=str(drawings))
    judge = judging.Judge(c, torch.device("cpu"), ("psnr", "consistency"), count=3)
    assert judge(c, False, lambda batch: batch.zlo)["psnr"] == pytest.approx(EXACT)
    assert judge.left_out(c, False).keys() == {"consistency"}


def test_nor_can_damage_that_adds_noise(judge, config):
    c = replace(config, task="sr,noise")
    assert "consistency" not in judge(c, False, truth) and "noise" in judge.left_out(c, False)["consistency"]


def test_data_without_classes_and_too_few_images(drawings, config):
    c = replace(config, dataset=str(drawings / "test" / "dark"))
    judge = judging.Judge(c, torch.device("cpu"), LOCAL, count=40)
    assert "no classes" in judge.why["accuracy"]
    assert judge(c, False, truth).keys() == {"psnr", "consistency", "bias", "seconds", "errors", "without"}
    few = judging.Judge(config, torch.device("cpu"), LOCAL, count=3, epochs=30)
    assert "4 images" in few.why["frechet"] and "accuracy" in few(config, False, truth)


# -------------------------------------------------------------------------------------------------------- random crops

def test_runs_on_random_crops_are_measured_on_the_middles(tmp_path):
    for i, picture in enumerate(data.load("shapes", 40, limit=60).train):
        path = tmp_path / "photos" / ("train", "test")[i % 2] / "ab"[i // 2 % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).crop((0, 0, 40, 30)).save(path)
    config = Config(dataset=str(tmp_path / "photos"), image_size=SIDE, crop="random", overfit=False, device="cpu")
    arguments = torch.device("cpu"), ("psnr", "accuracy", "frechet"), 30, 16, 0, 1, tmp_path / "cache"
    judge, seen = judging.Judge(config, *arguments), []
    score = judge(config, False, lambda batch: seen.append(to_uint8(batch.z1)) or batch.z1)
    files = sorted((tmp_path / "photos/test").rglob("*.png"))  # as the set lists them
    middles = [np.array(Image.open(path))[7:23, 12:28] for path in files]
    expected = torch.stack([torch.from_numpy(middle).permute(2, 0, 1) for middle in middles])
    assert torch.equal(torch.cat(seen), expected[torch.cat(judge.batches)])
    assert score["psnr"] == pytest.approx(EXACT) and score["frechet"] == judge.baselines(config)[-1]["frechet"]
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert len(names) == 2 and all("photos-16-random" in name for name in names)
    centred = judging.Judge(replace(config, crop="center"), *arguments)
    assert centred.digest != judge.digest and centred.key != judge.key
    assert len(list((tmp_path / "cache").iterdir())) == 4


# ------------------------------------------------------------------------------------------------------------ the cache


def test_what_is_kept_depends_on_what_it_came_from(config, judge, drawings, monkeypatch):
    def files(kind):
        return set(Path("runs/cache").glob(f"{kind}-drawings-16-*.pt"))

    assert not list(drawings.parent.glob("*.pt"))  # nothing beside the user's data

    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: pytest.fail("the classifier was kept"))
    before = files("classifier"), files("features")
    again = judging.Judge(config, torch.device("cpu"), LOCAL, count=40, batch_size=7, epochs=30)
    assert again.accuracy == judge.accuracy and (files("classifier"), files("features")) == before
    assert again(config, False, truth)["frechet"] == pytest.approx(judge(config, False, truth)["frechet"], rel=1e-4)

    fewer = judging.Judge(config, torch.device("cpu"), LOCAL, count=30, epochs=30)  # other images: other statistics
    assert len(files("features") - before[1]) == 1 and files("classifier") == before[0]
    assert fewer.key == judge.key and fewer.digest != judge.digest

    monkeypatch.undo()
    other = judging.Judge(config, torch.device("cpu"), LOCAL, count=40, epochs=1)  # another classifier: other features
    assert other.key != judge.key
    assert len(files("classifier") - before[0]) == 1 and len(files("features") - before[1]) == 2


def test_cached(tmp_path):
    calls, path = [], str(tmp_path / "new" / "x.pt")

    def make():
        calls.append(1)
        return dict(weights=torch.arange(3), accuracy=50.0)

    for _ in range(2):
        value = cached(path, make)
        assert value["accuracy"] == 50 and value["weights"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    (tmp_path / "new" / "x.pt").write_bytes(b"half a file")
    cached(path, make)
    assert len(calls) == 2 and torch.load(path, weights_only=True)["accuracy"] == 50
    whole = Path(path).read_bytes()
    at = whole.index(torch.arange(3).numpy().tobytes())
    Path(path).write_bytes(whole[:at + 8] + b"\x45" + whole[at + 9:])  # a stored 1 became 69
    assert cached(path, make)["weights"].tolist() == [0, 1, 2] and len(calls) == 3


def test_digest_sees_every_value():
    x = torch.zeros(4, 4, dtype=torch.uint8)
    y = x.clone()
    y[3, 3] = 1
    assert len({digest(x, 1), digest(y, 1), digest(x, 2), digest(x, 1, None)}) == 4
    assert digest(x.T, 1) == digest(x, 1)
    assert digest(iter(y.split(3)), 1) == digest(y, 1) != digest(iter(x.split(3)), 1)


# ---------------------------------------------------------------------------------------- what can't be had is left out


def test_weights_that_can_not_be_downloaded(config, monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    judge = judging.Judge(config, torch.device("cpu"), ("psnr", "lpips", "fid"), count=8)
    score = judge(config, False, truth)
    assert score.keys() == {"psnr", "seconds", "errors", "without"}
    assert judge.left_out(config, False).keys() == {"lpips", "fid"}
    for module, metric in (("lpips", "lpips"), ("torch_fidelity", "fid")):
        try:
            __import__(module)
            assert "no route to host" in judge.why[metric] and str(tmp_path) in judge.why[metric]
        except ImportError:
            assert module in judge.why[metric]
    assert socket.getdefaulttimeout() is None


def test_packages_that_are_not_there(config, monkeypatch):
    for name in ("torchmetrics.functional.image", "lpips", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    judge = judging.Judge(config, torch.device("cpu"), ("ssim", "lpips", "fid", "bias"), count=8)
    assert judge(config, False, truth).keys() == {"bias", "seconds", "errors", "without"}
    assert all(package in judge.why[metric] for metric, package in
               dict(ssim="torchmetrics", lpips="lpips", fid="torch_fidelity").items())


def test_a_fault_of_the_program_is_no_missing_package(config, monkeypatch):
    def faulty(side, device):
        raise AttributeError("no such thing")

    monkeypatch.setitem(metrics.TABLE, "fid", replace(metrics.TABLE["fid"], load=faulty))
    with pytest.raises(AttributeError):
        judging.Judge(config, torch.device("cpu"), ("fid",), count=8)


def test_a_new_metric_is_one_entry_of_the_table(config, monkeypatch):
    def mae(of):
        return (of.x.double() - of.truth.double()).abs().flatten(1).mean(1)

    for table in (metrics.TABLE, metrics.COLUMNS):  # the latter is made of the former, on import
        monkeypatch.setitem(table, "mae", metrics.Metric("MAE", "{:.1f}", "↓", score=mae))
    judge = judging.Judge(config, torch.device("cpu"), ("mae",), count=8)
    score = judge(config, False, lambda batch: batch.z1 + 3 / 127.5)
    assert score["mae"] == pytest.approx(3) and score["errors"]["mae"] == pytest.approx(0) and score["without"]["mae"]
