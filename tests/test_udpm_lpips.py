"""UDPM's perceptual loss: its formula, and what is said and done where the package is missing."""
import sys
import warnings
from dataclasses import asdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dense import PLAIN, Toy, at_level, make_batch
from images import lpips
from methods import udpm
from methods.udpm import UDPM
from support.settings import PRESETS, from_plain


def test_weight_zero_needs_no_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    PLAIN.check("generate", True)
    assert PLAIN.settled() is PLAIN
    for level in (1, 2, 3):
        at_level(PLAIN, level, lambda: PLAIN.loss(Toy(), make_batch()))


def test_missing_lpips_names_the_two_ways_on(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    lpips.load_lpips.cache_clear()
    path = str(tmp_path / "vgg16.pth")
    for refused in (lambda: UDPM(lpips_weight=(0, 1, 0)).check("generate", True), UDPM(lpips_path=path).settled,
                    lambda: UDPM(lpips_path=path).check("generate", True),
                    lambda: at_level(UDPM(), 1, lambda: UDPM().loss(Toy(), make_batch())),
                    *(partial(PRESETS[name]["udpm"].check, "generate", True)
                      for name in ("udpm-cifar10", "udpm-ffhq64", "udpm-afhq64"))):  # the papers' recipes
        with pytest.raises(ValueError) as error:
            refused()
        message = str(error.value)
        assert "\n" not in message and "--udpm.lpips-path FILE" in message and "--udpm.lpips-weight 0 0 0" in message


def test_as_typed_it_does_without_a_missing_lpips_and_a_run_keeps_to_that(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    lpips.load_lpips.cache_clear()
    UDPM().check("generate", True)
    with pytest.warns(UserWarning) as warned:
        settled = UDPM(disc_channels=8).settled()
    assert len(warned) == 1 and "pip install lpips" in str(warned[0].message) and "\n" not in str(warned[0].message)
    assert settled == UDPM(lpips_weight=(0, 0, 0), disc_channels=8)
    # LPIPS is there by the time the run is resumed
    monkeypatch.setattr(udpm, "load_lpips", lambda net, path: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_plain(UDPM, asdict(settled)).settled() == settled
        found = UDPM().settled()
        assert found.lpips_weight == (4, 4, 0) and found.settled() is found


def make_vgg() -> nn.Sequential:
    from torchvision.models.vgg import cfgs, make_layers
    return make_layers(cfgs["D"])


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Random weights of VGG-16's convolutions under torchvision's names."""
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({"features." + k: v for k, v in make_vgg().state_dict().items()}, path)
    yield str(path)
    lpips.load_lpips.cache_clear()


def test_lpips_with_weights_from_a_file_is_its_formula(vgg_file, tmp_path):
    method = UDPM(lpips_path=vgg_file, adv_weight=(0, 0, 0))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    method.check("generate", True)
    method = method.settled()
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing from the run's stream

    package = lpips.load_lpips("vgg", vgg_file)
    assert not any(p.requires_grad for p in package.parameters()) and not package.training
    vgg = make_vgg()
    vgg.load_state_dict({k.removeprefix("features."): v for k, v in torch.load(vgg_file, weights_only=True).items()})
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
    guess, truth = at_level(method, 2, lambda: method.noised_pair(net, batch)[1:])
    expected = formula(guess, truth)
    assert expected.min() > 1e-4
    torch.testing.assert_close(distance(guess, truth), expected, rtol=5e-3, atol=0)  # it rounds mean and std
    loss = at_level(method, 2, lambda: method.loss(net, batch))
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
