"""sample.py as its user runs it: on odd files and large ones, with factors and masks, and with what is wrong."""
import math
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from images import SettingsError
from images.corruptions import Damage, to_full_size
from images.photograph import Photograph
from images.pictures import to_float
from ode_int import SolverError
from pixels import doubled, get, photo, put
from runs import ranks
from support import trained_model
from untrained import METHODS, make_run, run


@pytest.fixture(scope="module")
def identity(tmp_path_factory) -> str:
    """A run of the task sr that enlarges twice by repeating pixels. Not to be written to."""
    return make_run(tmp_path_factory.mktemp("identity") / "run", identity=True)


# files ---------------------------------------------------------------------------------------------------------------

def test_every_image_below_a_folder_and_what_fails_is_listed(identity, tmp_path, capsys):
    put(tmp_path / "in/portrait.jpg", photo(9, 14))
    put(tmp_path / "in/below/grey.png", photo(10, 8, 1))
    Image.fromarray(photo(9, 14)).quantize(17).save(tmp_path / "in/palette.gif")
    whole = put(tmp_path / "whole.png", photo(40, 40)).read_bytes()
    broken = dict(empty=b"", text=b"no picture", truncated=whole[:len(whole) // 2])
    for name, content in broken.items():
        (tmp_path / f"in/{name}.png").write_bytes(content)
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "3 of 6 images restored" in captured.out
    listed = [line for line in captured.err.splitlines() if line.startswith("not restored: ")]
    assert len(listed) == 3 and all(str(tmp_path / f"in/{name}.png") in line for name, line in zip(broken, listed))
    made = {path.relative_to(tmp_path / "out").as_posix(): get(path) for path in (tmp_path / "out").rglob("*.*")}
    assert made.keys() == {"portrait.png", "below/grey.png", "palette.png"}
    for name, source in (("portrait.png", "portrait.jpg"), ("palette.png", "palette.gif")):
        pixels = np.asarray(Image.open(tmp_path / "in" / source).convert("RGB"))
        np.testing.assert_array_equal(made[name], doubled(pixels), err_msg=name)


def test_a_grey_run_takes_colour_files(tmp_path):
    path, image = make_run(tmp_path / "run", identity=True, channels=1), put(tmp_path / "in.png", photo(5, 6))
    assert run(path, "--input", image, "--output", tmp_path / "out") == 0
    np.testing.assert_array_equal(get(tmp_path / "out/in.png"), doubled(np.asarray(Image.open(image).convert("L"))))


def test_what_is_finished_is_skipped(identity, tmp_path, capsys):
    for name in ("a.bmp", "a.png", "b.png"):
        put(tmp_path / "in" / name, photo(6, 6, seed=len(name) + ord(name[2])))
    before = put(tmp_path / "out/b.png", photo(3, 3)).read_bytes()
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "2 of 3 images restored" in said and "1 were there already (--overwrite makes them again)" in said
    assert (tmp_path / "out/b.png").read_bytes() == before
    for name in ("a_bmp", "a_png"):  # two files of one stem
        made, image = get(tmp_path / f"out/{name}.png"), get(tmp_path / "in" / name.replace("_", "."))
        np.testing.assert_array_equal(made, doubled(image))
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out", "--overwrite") == 0
    np.testing.assert_array_equal(get(tmp_path / "out/b.png"), doubled(get(tmp_path / "in/b.png")))
    for _ in range(2):  # the second time restores the inputs, not what was restored
        assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "in/restored", "--overwrite") == 0
    assert len(list((tmp_path / "in/restored").rglob("*"))) == 3


def test_without_output_the_run_gets_a_new_folder(tmp_path):
    put(tmp_path / "in.png", photo(4, 4))
    for path in (make_run(tmp_path / "run", identity=True), tmp_path / "run/checkpoints/last.pt"):
        assert run(path, "--input", tmp_path / "in.png", "--overwrite") == 0
    assert {path.parent.parent for path in tmp_path.rglob("restored-*/in.png")} == {tmp_path / "run"}


# what breaks off -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("failure, reason", [
    (torch.OutOfMemoryError(), "out of GPU memory"), (SolverError("not finite"), "not finite")])
def test_what_breaks_off_costs_the_image_only(identity, tmp_path, capsys, monkeypatch, failure, reason):
    whole, calls = sample.Model.sample, []

    def small(self, zlo, *rest):
        calls.append(len(zlo))
        if zlo.shape[2] > 20 and len(calls) % 2:
            raise failure
        return whole(self, zlo, *rest)

    monkeypatch.setattr(sample.Model, "sample", small)
    put(tmp_path / "in/big.png", photo(20, 20)), put(tmp_path / "in/small.png", photo(5, 5))
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out", "--draws", 3, "--batch-size", 8) == 1
    assert calls == [1, 1, 1, 3]
    captured = capsys.readouterr()
    assert "1 of 2 images restored" in captured.out and captured.err.count(f"big.png: {reason}") == 1
    assert {path.name for path in (tmp_path / "out").glob("*_mean.png")} == {"small_mean.png"}


def test_an_interrupt_still_tells_what_was_not_restored(identity, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.Model, "sample", interrupted)
    put(tmp_path / "in/b.png", photo(5, 5))
    (tmp_path / "in/a.png").write_bytes(b"no image")
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 130
    error = capsys.readouterr().err
    assert "not restored: " in error and "a.png: can't be read" in error and "interrupted" in error


def test_names_and_places_that_cannot_be_written_are_told_before_anything_is_computed(identity, tmp_path, capsys):
    put(tmp_path / "in/ok.png", photo(5, 5)), put(tmp_path / "in/below/deep.png", photo(5, 5))
    os.rename(put(tmp_path / f"in/{'n' * 254}", photo(5, 5), format="PNG"), tmp_path / f"in/{'n' * 250}.gif")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/below").write_text("a file in a folder's place")
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out", "--draws", 2) == 1
    listed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not restored")]
    assert len(listed) == 2 and "below/deep" in listed[0] and "File name too long" in listed[1]
    assert (tmp_path / "out/ok_mean.png").exists()


def test_a_disk_that_fills_costs_the_image_only(identity, tmp_path, capsys, monkeypatch):
    for name in "abc":
        put(tmp_path / f"in/{name}.png", photo(5, 5))
    save = Photograph.save

    def full(photo, path, *how):
        if path.endswith("b.png"):
            raise OSError(28, "No space left on device")
        save(photo, path, *how)

    monkeypatch.setattr(Photograph, "save", full)
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    assert "b.png: No space left on device" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "c.png"}


def test_a_picture_past_memory_is_told_with_its_size(identity, tmp_path, capsys, monkeypatch):
    put(tmp_path / "in/large.png", photo(300, 200)), put(tmp_path / "in/small.png", photo(5, 5))
    put(tmp_path / "in/strip.png", photo(1, 1001))
    monkeypatch.setattr(trained_model, "free_memory", lambda: 50 * 10**6)
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "large.png: its 0.06 million pixels (300x200) would take about 0.0624 GB" in error
    assert "strip.png: its sides are 1x1001" in error and (tmp_path / "out/small.png").exists()


@pytest.mark.parametrize("method", ["interpolant", "edm"])  # by an ODE's solver, and by a sampler of its own
def test_an_output_that_is_not_finite_is_no_picture(tmp_path, capsys, method):
    path = make_run(tmp_path / "run", method=method, task="jpeg", **METHODS[method])
    state = torch.load(f"{path}/checkpoints/last.pt", weights_only=True)
    state["ema"]["out.bias"][:] = math.nan
    torch.save(state, f"{path}/checkpoints/last.pt")
    put(tmp_path / "in/a.png", photo(16, 16))
    assert run(path, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    assert "not finite" in capsys.readouterr().err and not list((tmp_path / "out").glob("*.png"))


# sizes ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task, factors, known", [
    ("sr", (4, 2), {2, 4}), ("sr,jpeg", (4, 2), {1, 2, 4}), ("jpeg", 2, {1})])
def test_factor_says_how_much_larger(tmp_path, task, factors, known):
    path = make_run(tmp_path / "run", identity=True, task=task, damage=Damage(factor=factors, up="bicubic"))
    low = to_float(torch.from_numpy(photo(11, 9)).permute(2, 0, 1))[None]
    for factor in (1, 2, 4, 5):
        if factor in known:
            made = sample.open_model(path, factor=factor).restore(low)
            torch.testing.assert_close(made, to_full_size(low, factor, "bicubic"), rtol=0, atol=1e-5)
        else:
            with pytest.raises(SettingsError, match=f"factor = {factor}: allowed is"):
                sample.open_model(path, factor=factor)
    if task == "sr":
        with pytest.raises(SettingsError, match="the run knows 2, 4; name one"):
            sample.open_model(path)
    else:
        assert sample.open_model(path).restore(low).shape == low.shape


def test_of_one_file_before_and_after_stand_side_by_side(tmp_path):
    path, rgb = make_run(tmp_path / "run", identity=True, task="jpeg"), photo(20, 16)
    image = put(tmp_path / "in/a.png", rgb)
    assert run(path, "--input", image, "--output", tmp_path / "one") == 0
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"a.png", "a_before_after.png"}
    page = get(tmp_path / "one/a_before_after.png")
    height, width = page.shape[:2]
    found = [(page[y:y + 16, x:x + 20] == rgb).all() for y in range(height - 15) for x in range(width - 19)]
    assert sum(found) == 2  # the identity's result is the image
    for which, source, count in (("on", tmp_path / "in", 2), ("auto", tmp_path / "in", 1), ("off", image, 1)):
        assert run(path, "--input", source, "--output", tmp_path / which, "--before-after", which) == 0
        assert len(list((tmp_path / which).iterdir())) == count


# inpainting ----------------------------------------------------------------------------------------------------------

def test_inpainting_makes_what_the_mask_or_transparency_says(tmp_path, capsys):
    path, rgb = make_run(tmp_path / "run", method="edm", sample_steps=2, task="inpaint"), photo(12, 10)
    hole = np.zeros((10, 12), bool)
    hole[2:5, 3:9] = True
    for name in ("a.png", "b.jpg", "c.png"):
        put(tmp_path / "in" / name, rgb)
    put(tmp_path / "masks/a.bmp", (hole * 255).astype(np.uint8))
    put(tmp_path / "masks/c.png", np.full((10, 13), 255, np.uint8))
    assert run(path, "--input", tmp_path / "in", "--masks", tmp_path / "masks", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert re.search("b.jpg: no mask of this name", error) and re.search("c.png: it is 12x10, its mask 13x10", error)
    made = get(tmp_path / "out/a.png")
    np.testing.assert_array_equal(made[~hole], rgb[~hole])
    assert (made[hole] != rgb[hole]).any(-1).mean() > 0.9

    soft = np.where(hole, 254, 255).astype(np.uint8)  # any transparency has white in it
    put(tmp_path / "alpha/a.png", np.dstack([rgb, soft]))
    put(tmp_path / "alpha/opaque.png", rgb)
    assert run(path, "--input", tmp_path / "alpha", "--output", tmp_path / "out2") == 1
    np.testing.assert_array_equal(get(tmp_path / "out2/a.png"), made)
    assert "opaque.png: nothing to fill in" in capsys.readouterr().err
    one = tmp_path / "masks/a.bmp"
    assert run(path, "--input", tmp_path / "alpha", "--masks", one, "--output", tmp_path / "out3") == 0


def test_a_mixture_restores_whole_images_and_holes(tmp_path, capsys):
    path, rgb = make_run(tmp_path / "run", method="edm", sample_steps=2, task="inpaint,blur"), photo(8, 8)
    hole = np.zeros((8, 8), bool)
    hole[:4] = True
    put(tmp_path / "in/part.png", np.dstack([rgb, 255 - hole * 255]).astype(np.uint8))
    put(tmp_path / "in/whole.png", rgb)
    assert run(path, "--input", tmp_path / "in", "--output", tmp_path / "out") == 0
    np.testing.assert_array_equal(get(tmp_path / "out/part.png")[4:], rgb[4:])
    assert (get(tmp_path / "out/whole.png") != rgb).any(-1).mean() > 0.9
    masks = "--masks", put(tmp_path / "black.png", np.zeros((8, 8), np.uint8))  # it asks for nothing: a mistake
    assert run(path, "--input", tmp_path / "in/whole.png", *masks, "--output", tmp_path / "out2") == 1
    assert "whole.png: nothing to fill in" in capsys.readouterr().err


# wrong values --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, line", [
    ("", "one of --input"),
    ("--count 3 --input x", "one of --input"),
    ("--bogus 1", "bogus"),
    ("--count many", "count"),
    ("--count 0", "count = 0"),
    ("--count 3", "restores damaged images"),
    ("--input nowhere", "nowhere"),
    ("--input=", "input = ('',): allowed is"),
    ("--input in --output=", "output = '': allowed is"),
    ("--input in --draws 0", "draws = 0"),
    ("--input in --guidance 2", "with a --label"),
    ("--input in --label horse", "label = 'horse': allowed is all, or from cat, dog"),
    ("--input in --label 3", "label = '3'"),
    ("--input in --label all", "label = 'all'"),
    ("--input in --solver rk5", "'rk5'"),
    ("--input in --solver dopri5 --steps 5", "steps = 5"),
    ("--input in --device nowhere", "device = 'nowhere'"),
    ("--input in --interpolate 1 2", "--draws above 1"),
    ("--input in --masks in", "takes none"),
    ("--input in --tolerance 0", "tolerance = 0"),
    ("--input in --strength 1.5", "strength = 1.5"),
    ("--input in --output in", "another folder"),
    ("--input in --output a.bmp", "a folder, or for one input a name"),
    ("--input in --partition 3/3", "partition = "),
    ("--export model.pt", ".safetensors"),
])
def test_wrong_values_are_one_line(identity, tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "in/a.png", photo(4, 4)), put(tmp_path / "in/b.png", photo(4, 4))
    assert run(identity, *arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("sample.py: ") and line in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]  # nothing was written


def test_runs_that_are_none_are_refused(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    (tmp_path / "a.pt").write_bytes(b"nothing")
    for path in ("a.pt", "b.pt", "a.safetensors", "b.safetensors", "."):
        assert run(tmp_path / path, "--count", 1) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and (path in error or "safetensors" in error)


# several processes ----------------------------------------------------------------------------------------------------

def test_the_parts_make_what_one_process_makes(tmp_path, capsys, monkeypatch):
    restoring = make_run(tmp_path / "run", method="edm", sample_steps=1), "--input", tmp_path / "in"
    making = make_run(tmp_path / "other", method="edm", task="generate", sample_steps=1), "--count", 3, "--trace"
    for i in range(3):
        put(tmp_path / f"in/{i}.png", photo(5, 5, seed=i))
    for name, arguments in dict(restored=restoring, made=making).items():
        whole, parts = tmp_path / name, tmp_path / f"{name}-parts"
        assert run(*arguments, "--output", whole) == 0
        if name == "restored":
            for part in ("0/2", "1/2"):
                assert run(*arguments, "--output", parts, "--partition", part) == 0
        else:
            for environment in ranks(2):
                with monkeypatch.context() as patch:
                    for variable, value in environment.items():
                        patch.setenv(variable, value)
                    assert run(*arguments, "--output", parts) == 0
        expected = {path.name: get(path) for path in whole.glob("*.png") if "grid" not in path.name}
        assert {path.name for path in parts.iterdir()} == expected.keys()  # no grid: nobody has all of it
        assert all(abs(get(parts / name).astype(int) - pixels).max() <= 1 for name, pixels in expected.items())
    assert run(*restoring, "--partition", "0/2") == 2
    assert "output = None: allowed is a folder" in capsys.readouterr().err
