"""What sample.py draws: by noise, label, guidance, latent and sampler, and the trace of the way there."""
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
import untrained
from images import SettingsError
from images.pictures import TITLE_SIZE
from methods.interpolant import Interpolant
from methods.sr3 import SR3
from pixels import get, photo, put
from support.noise import NoisePerImage
from untrained import METHODS, make_run, run

# noise ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_its_batch_but_on_seed_name_and_draw(tmp_path, method):
    path = make_run(tmp_path / "run", method=method, task="jpeg", **METHODS[method])
    for name in "ab":
        put(tmp_path / f"in/{name}.png", photo(16, 16))
    for out, more in (("both", ()), ("seed", ("--seed", 1)), ("one", ("--draws", 2, "--batch-size", 1))):
        assert run(path, "--input", tmp_path / "in", "--output", tmp_path / out, *more) == 0
    assert run(path, "--input", tmp_path / "in/a.png", "--output", tmp_path / "alone") == 0
    a = get(tmp_path / "both/a.png").astype(int)
    for same in ("alone/a.png", "one/a_1.png"):
        assert abs(get(tmp_path / same) - a).max() <= 1, same  # rounding
    for other in ("both/b.png", "seed/a.png", "one/a_2.png"):
        assert abs(get(tmp_path / other) - a).mean() > 0.5, other


def test_draws_have_a_mean_and_a_standard_deviation(tmp_path):
    path = make_run(tmp_path / "run", interpolant=Interpolant(sigma=0.1), solver="euler", sample_steps=1)
    put(tmp_path / "in.png", photo(8, 6))
    assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / "out", "--draws", 3) == 0
    draws = np.stack([get(tmp_path / f"out/in_{i}.png") for i in (1, 2, 3)]).astype(float)
    np.testing.assert_allclose(get(tmp_path / "out/in_mean.png"), draws.mean(0), atol=0.51)
    std = np.sqrt(draws.var(0, ddof=1).mean(2))
    np.testing.assert_allclose(get(tmp_path / "out/in_std.png"), np.minimum(8 * std, 255), atol=0.51)
    assert 0 < std.max() and (8 * std < 255).any()


# generation ----------------------------------------------------------------------------------------------------------

def test_generation_by_label(tmp_path, capsys):
    path = make_run(tmp_path / "run", method="edm", sample_steps=2, task="generate")
    made = {}
    for name, more in dict(all=("--label", "all"), two=("--label", "T-shirt/top, 0"), one=("--label", 2), none=(),
                           half=("--label", 2, "--guidance", 0), strong=("--label", 2, "--guidance", 3)).items():
        assert run(path, "--count", 2, "--output", tmp_path / name, *more) == 0
        assert f": {6 if name == 'strong' else 3} NFE" in capsys.readouterr().out  # guidance calls twice
        made[name] = {p.name: get(p).astype(int) for p in sorted((tmp_path / name).iterdir()) if p.name != "grid.png"}
    assert list(made["all"]) == ["T-shirt-top_0001.png", "T-shirt-top_0002.png", "cat_0001.png", "cat_0002.png",
                                 "dog_0001.png", "dog_0002.png"]
    assert list(made["two"]) == [n for n in made["all"] if "dog" not in n]
    shirt, other = made["one"]["T-shirt-top_0001.png"], made["one"]["T-shirt-top_0002.png"]
    for name in ("all", "two"):
        assert abs(made[name]["T-shirt-top_0001.png"] - shirt).max() <= 1
        assert abs(made[name]["cat_0001.png"] - shirt).max() > 1
    assert abs(other - shirt).mean() > 2
    assert abs(made["half"]["T-shirt-top_0001.png"] - made["none"]["image_0001.png"]).max() <= 1
    half, strong = made["half"]["T-shirt-top_0001.png"], made["strong"]["T-shirt-top_0001.png"]
    assert abs(strong - half).mean() > 1.5 * abs(shirt - half).mean()
    assert run(path, "--count", 2, "--output", tmp_path / "all", "--label", "all") == 2  # they exist


def test_names_of_classes_become_names_of_files(tmp_path, monkeypatch):
    """One with a comma, one with a new line, and two that differ in punctuation only."""
    monkeypatch.setattr(untrained, "CLASSES", ["salt, pepper", "two\nlines", "two/lines"])
    path = make_run(tmp_path / "run", method="edm", sample_steps=1, task="generate")
    for name, label in (("comma", "salt, pepper"), ("all", "all")):
        assert run(path, "--count", 1, "--output", tmp_path / name, "--label", label) == 0
    for name, files in (("comma", {"salt-pepper_0001"}),
                        ("all", {"salt-pepper-0_0001", "two-lines-1_0001", "two-lines-2_0001"})):
        assert {file.stem for file in (tmp_path / name).iterdir()} == files | {"grid"}


def test_the_grid_has_a_row_for_each_label_and_shows_its_first_images(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "GRID", 4)
    path = make_run(tmp_path / "run", method="edm", sample_steps=1, task="generate")
    assert run(path, "--count", 3, "--output", tmp_path / "out", "--label", "cat,dog") == 0
    grid = get(tmp_path / "out" / "grid.png")[TITLE_SIZE + 9:-6, -(2 * 66 + 2 + 6):-6]  # what is inside the titles
    assert grid.shape == (2 * 66 + 2, 2 * 66 + 2, 3)  # 16 pixels enlarged by 4
    for row, name in enumerate(("cat", "dog")):
        for column in (0, 1):
            np.testing.assert_array_equal(grid[4 + 66 * row, 4 + 66 * column],
                                          get(tmp_path / "out" / f"{name}_000{column + 1}.png")[0, 0])


def test_the_way_between_two_seeds(tmp_path):
    path = make_run(tmp_path / "run", method="sr3", task="generate,blur", **METHODS["sr3"])
    put(tmp_path / "dog.png", photo(16, 16))
    for out, more in dict(a=("--seed", 5), b=("--seed", 8), way=("--interpolate", 5, 8)).items():
        assert run(path, "--count", 3, "--label", "dog", "--output", tmp_path / out, *more) == 0
        draws = ("--draws", 3) if out == "way" else ()
        assert run(path, "--input", tmp_path / "dog.png", "--output", tmp_path / out, *draws, *more) == 0
    for names, end in ((["dog_0001", "dog_0002", "dog_0003"], "dog_0001"), (["dog_1", "dog_2", "dog_3"], "dog")):
        way = [get(tmp_path / f"way/{name}.png").astype(int) for name in names]
        for picture, seed in ((way[0], "a"), (way[2], "b")):
            assert abs(picture - get(tmp_path / seed / f"{end}.png")).max() <= 1
        ends = abs(way[0] - way[2]).mean()
        assert 0 < abs(way[1] - way[0]).mean() < ends and 0 < abs(way[1] - way[2]).mean() < ends


# sampler and pictures -------------------------------------------------------------------------------------------------

def calls_of(path, folder, capsys, flags) -> int:
    """The NFE that sample.py tells of one picture."""
    put(folder / "in.png", photo(8, 8))
    assert run(path, "--input", folder / "in.png", "--output", folder / "out", "--overwrite", *flags.split()) == 0
    return int(re.search(r": (\d+) NFE", capsys.readouterr().out)[1])


@pytest.mark.parametrize("settings, flags, nfe", [  # and one more for the clean estimate
    (dict(solver="heun", sample_steps=3), "", 7), (dict(solver="heun", sample_steps=3), "--steps 5", 11),
    (dict(solver="heun", sample_steps=3), "--solver rk4 --steps 2", 9), (dict(solver="heun"), "--solver euler", 51),
    (dict(solver="auto"), "", 11), (dict(solver="auto"), "--steps 3", 7)])  # midpoint
def test_the_sampler_is_the_runs_unless_named(tmp_path, capsys, settings, flags, nfe):
    path = make_run(tmp_path / "run", **settings)
    assert calls_of(path, tmp_path, capsys, flags) == nfe


def test_who_names_dopri5_or_a_tolerance_gets_dopri5(tmp_path, capsys):
    named, auto = make_run(tmp_path / "named", solver="dopri5"), make_run(tmp_path / "run", solver="auto")
    counts = [calls_of(path, tmp_path, capsys, flags) for path, flags in
              ((named, "--tolerance 1e-2"), (auto, "--tolerance 1e-4"), (named, ""))]
    assert 11 < counts[0] < counts[1] < counts[2]
    assert all(count % 6 == 3 for count in counts)  # 2 to start with, 6 a step, the clean estimate


def test_trace_shows_the_path_and_changes_nothing(tmp_path, capsys):
    path = make_run(tmp_path / "run", method="sr3", sr3=SR3(T=6))
    put(tmp_path / "in/a.png", photo(5, 6)), put(tmp_path / "in/wide.png", photo(140, 3))
    for name, more in ("plain", ()), ("traced", ("--trace",)):
        assert run(path, "--input", tmp_path / "in", "--output", tmp_path / name, *more) == 0
    assert "NFE with the trace" in capsys.readouterr().out
    gifs = {name: Image.open(tmp_path / f"traced/{name}_trace.gif") for name in ("a", "wide")}
    for name, gif in gifs.items():
        np.testing.assert_array_equal(get(tmp_path / f"traced/{name}.png"), get(tmp_path / f"plain/{name}.png"))
        assert gif.n_frames == 7  # six steps, and the sample
    assert gifs["wide"].width < 2 * 180  # the frames of a large image are small
    gifs["a"].seek(6)
    last, strip = get(tmp_path / "traced/a.png")[-1, -1], get(tmp_path / "traced/a_trace.png")
    for picture in (strip, np.asarray(gifs["a"].convert("RGB"))):  # inside the last, enlarged pixel of the last image
        assert abs(picture[-11, -11].astype(int) - last).max() <= 24  # a GIF has 256 colours


def test_frames_are_few_and_even():
    frames, picture = sample.Frames((4, 6), largest=3), torch.arange(48.0).view(1, 1, 6, 8)
    for i in range(1000):
        frames.append((float(i), picture, picture))
        assert frames[-1][1] is picture  # ode_int.solve takes the sample from there
    times = [t for t, _, _ in frames]
    assert 32 <= len(times) <= 64 and len(set(np.diff(times))) == 1 and times[0] == 0 and times[-1] > 950
    for _, state, _ in frames[:-1]:
        torch.testing.assert_close(state, F.avg_pool2d(picture[:, :, :4, :6], 2))


# guidance -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [dict(overfit=True), dict(label_drop=0.0)])
def test_guidance_needs_a_null_label_that_was_trained(tmp_path, capsys, settings):
    path = make_run(tmp_path / "run", task="generate", method="edm", sample_steps=2, **settings)
    assert run(path, "--count", 1, "--label", "cat", "--guidance", 2) == 2
    assert "guidance = 2.0: allowed is 1" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="guidance = 3"):
        sample.open_model(path, guidance=3)
    assert run(path, "--count", 1, "--label", "cat", "--output", tmp_path / "out") == 0


# UDPM's latent --------------------------------------------------------------------------------------------------------

def test_a_level_of_the_latent_is_redrawn(tmp_path, capsys, monkeypatch):
    path = make_run(tmp_path / "run", method="udpm", task="generate", **METHODS["udpm"])
    drawn, original = [], NoisePerImage.randn_like

    def randn_like(self, x):
        drawn.append(original(self, x))
        return drawn[-1]

    monkeypatch.setattr(NoisePerImage, "randn_like", randn_like)
    for name, flags in dict(a=(), redrawn=("--perturb", 3, 0.6)).items():
        assert run(path, "--count", 3, "--output", tmp_path / name, *flags) == 0
    a, redrawn = drawn[:3], drawn[3:]  # level 3, 2, 1
    first = [maps[:1].expand_as(maps) for maps in a]  # the variants are of the first image's latent
    torch.testing.assert_close(redrawn[1], first[1])
    torch.testing.assert_close(redrawn[2], first[2])
    torch.testing.assert_close(redrawn[0][0], a[0][0])  # as it was, for comparison
    fresh = (redrawn[0][1:] - 0.8 * first[0][1:]) / 0.6
    assert (fresh[0] - fresh[1]).abs().max() > 0.1 and 0.3 < fresh.std() < 2
    other = make_run(tmp_path / "edm", method="edm", task="generate", sample_steps=2)
    for which, count, flags, words in ((path, 1, "--perturb 3 0.6", "perturb = (3, 0.6): allowed is with --count or"),
                                       (path, 2, "--perturb 4 1", "level = 4"), (path, 2, "--perturb 1 1.5", "perturb"),
                                       (path, 2, "--perturb 1 1 --interpolate 1 2", "interpolate = (1, 2): allowed is"),
                                       (other, 2, "--perturb 1 1", "of UDPM only")):
        assert run(which, "--count", count, "--output", tmp_path / "x", *flags.split()) == 2
        assert words in capsys.readouterr().err
