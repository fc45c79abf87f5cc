"""UDPM's perceptual loss: its formula, and what is said and done where the package is missing."""
import sys
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.vgg import cfgs, make_layers

from dense import PLAIN, Toy, at_level, make_batch
from images import lpips
from methods import udpm
from methods.udpm import UDPM
from support.settings import PRESETS, from_plain


@pytest.fixture
def without_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    lpips.load_lpips.cache_clear()


def test_weight_zero_needs_no_lpips(without_lpips):
    PLAIN.check("generate", True)
    assert PLAIN.settled() is PLAIN
    for level in (1, 2, 3):
        PLAIN.loss(Toy(), at_level(level, make_batch()))


def test_missing_lpips_names_the_two_ways_on(without_lpips):
    recipes = [PRESETS[name]["udpm"] for name in ("udpm-cifar10", "udpm-ffhq64", "udpm-afhq64")]  # the papers'
    for method in (UDPM(lpips_path="vgg16.pth"), UDPM(lpips_weight=(0, 1, 0)), *recipes):
        with pytest.raises(ValueError, match=r"\A.*--udpm.lpips-path FILE.*--udpm.lpips-weight 0 0 0.*\Z"):
            method.check("generate", True)


def test_as_typed_it_does_without_a_missing_lpips_and_a_run_keeps_to_that(without_lpips, monkeypatch):
    UDPM().check("generate", True)
    with pytest.warns(UserWarning, match=r"\A.*pip install lpips.*\Z"):
        settled = UDPM(disc_channels=8).settled()
    assert settled == UDPM(lpips_weight=(0, 0, 0), disc_channels=8)
    # LPIPS is there by the time the run is resumed
    monkeypatch.setattr(udpm, "load_lpips", lambda net, path: None)
    assert from_plain(UDPM, asdict(settled)).settled() == settled
    found = UDPM().settled()
    assert found.lpips_weight == (4, 4, 0) and found.settled() is found


def test_lpips_with_weights_from_a_file_is_its_formula(tmp_path):
    pytest.importorskip("lpips")
    vgg, vgg_file = make_layers(cfgs["D"]), str(tmp_path / "vgg16.pth")
    torch.save({"features." + name: weight for name, weight in vgg.state_dict().items()}, vgg_file)
    method = UDPM(lpips_path=vgg_file, adv_weight=(0, 0, 0))
    before = torch.get_rng_state()
    method.check("generate", True)
    method = method.settled()
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing from the run's stream

    package = lpips.load_lpips("vgg", vgg_file)
    assert not any(p.requires_grad for p in package.parameters()) and not package.training
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # in [0, 1]

    def features(x):
        x = ((x + 1) / 2 - mean) / std
        return [F.normalize(vgg[:end](x)) for end in (4, 9, 16, 23, 30)]  # ReLU 1_2, 2_2, 3_3, 4_3, 5_3

    def formula(a, b):
        heads = [lin.model[-1].weight for lin in package.lins]
        return sum((w * (x - y) ** 2).sum(1).mean((1, 2)) for w, x, y in zip(heads, features(a), features(b)))

    def distance(a, b):
        return lpips.lpips_distance(a, b, "vgg", vgg_file)

    batch, net = make_batch(channels=3, side=32), Toy(3)
    _, guess, truth = method.noised_pair(net, at_level(2, batch))
    expected = formula(guess, truth)
    assert expected.min() > 1e-4
    torch.testing.assert_close(distance(guess, truth), expected, rtol=5e-3, atol=0)  # it rounds mean and std
    loss = method.loss(net, at_level(2, batch))
    torch.testing.assert_close(loss, (guess - truth).abs().mean((1, 2, 3)) + 4 * distance(guess, truth))

    loss.sum().backward()
    assert net.up.weight.grad.isfinite().all()
    small, grey = torch.rand(1, 3, 8, 8), torch.rand(2, 1, 16, 16)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(distance(small, -small), distance(large, -large))
    torch.testing.assert_close(distance(grey, -grey), distance(grey.repeat(1, 3, 1, 1), -grey.repeat(1, 3, 1, 1)))

    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="--udpm.lpips-path FILE"):
        UDPM(lpips_path=str(tmp_path / "other.pth")).check("generate", True)
