"""sample.py as its user runs it: on odd files and large ones, with factors and masks, and with what is wrong."""
import math
import os
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from images.corruptions import Damage, to_full_size
from images.pictures import to_float, to_uint8
from ode_int import SolverError
from pixels import doubled, get, photo, put
from runs import ranks
from support import restorer, trained_model
from untrained import METHODS, make_run, run

# files ---------------------------------------------------------------------------------------------------------------

def test_odd_files(tmp_path, capsys):
    rgb, grey = photo(9, 14), photo(10, 8, 1)
    put(tmp_path / "in/portrait.jpg", rgb)
    put(tmp_path / "in/below/grey.png", grey)
    put(tmp_path / "in/deep.png", grey.astype(np.uint16) * 257)
    put(
        tmp_path / "in/exif.png",
        rgb,
        exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01"
        b"\x00\x06\x00\x00\x00\x00\x00\x00",
    )
    put(tmp_path / "in/alpha.png", np.concatenate([rgb, np.full((14, 9, 1), 255, np.uint8)], 2) * (rgb[..., :1] < 128))
    Image.fromarray(rgb).quantize(17).save(tmp_path / "in/palette.gif")
    whole = put(tmp_path / "whole.png", photo(40, 40)).read_bytes()
    (tmp_path / "in/truncated.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "in/empty.png").write_bytes(b"")
    (tmp_path / "in/text.png").write_text("no picture")
    identity = make_run(tmp_path / "run", identity=True)

    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "6 of 9 images restored" in captured.out
    listed = [line for line in captured.err.splitlines() if line.startswith("not restored: ")]
    assert len(listed) == 3 and all(
        str(tmp_path / "in" / f"{n}.png") in line for n, line in zip(("empty", "text", "truncated"), listed)
    )

    made = {p.relative_to(tmp_path / "out").as_posix(): get(p) for p in (tmp_path / "out").rglob("*.*")}
    made["alpha.png"] = made["alpha.png"][..., :3]
    expected = {"portrait.png": get(tmp_path / "in/portrait.jpg"), "below/grey.png": grey, "deep.png": grey,
                "exif.png": np.rot90(rgb, -1), "alpha.png": np.where(rgb[..., :1] < 128, rgb, 0),
                "palette.png": np.asarray(Image.open(tmp_path / "in/palette.gif").convert("RGB"))}
    assert made.keys() == expected.keys()
    for name, pixels in expected.items():
        np.testing.assert_array_equal(made[name], doubled(pixels), err_msg=name)


def test_a_grey_run_takes_colour_files(tmp_path):
    put(tmp_path / "in.png", photo(5, 6))
    assert (
        run(make_run(tmp_path / "run", identity=True, channels=1), "--input", tmp_path / "in.png", "--output",
            tmp_path / "out")
        == 0
    )
    np.testing.assert_array_equal(
        get(tmp_path / "out/in.png"), doubled(np.asarray(Image.open(tmp_path / "in.png").convert("L")))
    )


def test_other_tasks_take_files_as_they_are_and_factors_are_the_runs(tmp_path):
    put(tmp_path / "in.png", photo(5, 6))
    for task, factor in (("jpeg", 1), ("sr,blur", 1), ("sr", 4)):
        identity = make_run(tmp_path / task, identity=True, task=task, damage=Damage(factor=4))
        assert run(identity, "--input", tmp_path / "in.png", "--output", tmp_path / "out", "--overwrite") == 0
        np.testing.assert_array_equal(get(tmp_path / "out/in.png"), photo(5, 6).repeat(factor, 0).repeat(factor, 1))


def test_what_is_finished_is_skipped(tmp_path, capsys):
    identity = make_run(tmp_path / "run", identity=True)
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
    assert {p.parent.parent for p in tmp_path.rglob("restored-*/in.png")} == {tmp_path / "run"}


@pytest.mark.parametrize(
    "failure, reason", [(torch.OutOfMemoryError(), "out of GPU memory"), (SolverError("not finite"), "not finite")]
)
def test_what_breaks_off_costs_the_image_only(tmp_path, capsys, monkeypatch, failure, reason):
    identity, whole, calls = make_run(tmp_path / "run", identity=True), sample.Model.sample, []

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
    assert {p.name for p in (tmp_path / "out").glob("*_mean.png")} == {"small_mean.png"}


def test_an_interrupt_still_tells_what_was_not_restored(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    identity = make_run(tmp_path / "run", identity=True)
    monkeypatch.setattr(sample.Model, "sample", interrupted)
    put(tmp_path / "in/b.png", photo(5, 5))
    (tmp_path / "in/a.png").write_bytes(b"no image")
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 130
    error = capsys.readouterr().err
    assert "not restored: " in error and "a.png: can't be read" in error and "interrupted" in error


# how much larger, and before and after -------------------------------------------------------------------------------

@pytest.mark.parametrize("task, factors", [("sr", (4, 2)), ("sr,jpeg", (4, 2)), ("sr,jpeg", 2), ("jpeg", 2)])
def test_factor_says_how_much_larger(tmp_path, capsys, task, factors):
    damage = Damage(factor=factors, down="bicubic", up="bicubic")
    identity = make_run(tmp_path / "run", identity=True, task=task, damage=damage)
    rgb = photo(11, 9)
    image = put(tmp_path / "in.png", rgb)
    known = set() if task == "jpeg" else {factors} if isinstance(factors, int) else set(factors)
    if task != "sr":
        known.add(1)
    for factor in (1, 2, 4):
        out = tmp_path / f"{factor}"
        status = run(identity, "--input", image, "--factor", factor, "--output", out)
        if factor in known:
            enlarged = to_uint8(to_full_size(to_float(torch.from_numpy(rgb).permute(2, 0, 1))[None], factor, "bicubic"))
            assert status == 0
            made = get(out / "in.png")
            assert made.shape == (9 * factor, 11 * factor, 3)
            assert abs(made.astype(int) - enlarged[0].permute(1, 2, 0).numpy()).max() <= 1
        else:
            assert status == 2 and f"factor = {factor}: allowed is" in capsys.readouterr().err
    status = run(identity, "--input", image, "--output", tmp_path / "none")
    if task == "sr":
        assert status == 2 and "the run knows 2, 4; name one" in capsys.readouterr().err
    else:
        assert status == 0 and get(tmp_path / "none/in.png").shape == (9, 11, 3)


def test_of_one_file_before_and_after_stand_side_by_side(tmp_path):
    identity, rgb = make_run(tmp_path / "run", identity=True, task="jpeg"), photo(20, 16)
    image = put(tmp_path / "in/a.png", rgb)
    assert run(identity, "--input", image, "--output", tmp_path / "one") == 0
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"a.png", "a_before_after.png"}
    page = get(tmp_path / "one/a_before_after.png")
    height, width = page.shape[:2]
    assert width >= 40 and height > 16
    found = [(page[y:y + 16, x:x + 20] == rgb).all() for y in range(height - 15) for x in range(width - 19)]
    assert sum(found) == 2  # the identity's result is the image
    for more, names in (("--before-after", "on"), {"a.png", "a_before_after.png"}), ((), {"a.png"}):
        out = tmp_path / f"folder{len(more)}"
        assert run(identity, "--input", tmp_path / "in", "--output", out, *more) == 0
        assert {p.name for p in out.iterdir()} == names
    assert run(identity, "--input", image, "--output", tmp_path / "no", "--before-after", "off") == 0
    assert {p.name for p in (tmp_path / "no").iterdir()} == {"a.png"}


# inpainting ----------------------------------------------------------------------------------------------------------

def test_inpainting_makes_what_the_mask_or_transparency_says(tmp_path, capsys):
    path, rgb = make_run(tmp_path / "run", method="edm", sample_steps=2, task="inpaint"), photo(12, 10)
    hole = np.zeros((10, 12), bool)
    hole[2:5, 3:9] = True
    put(tmp_path / "in/a.png", rgb)
    put(tmp_path / "in/b.jpg", rgb)
    put(tmp_path / "in/c.png", rgb)
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
    put(tmp_path / "black.png", np.zeros((8, 8), np.uint8))  # a mask that asks for nothing is a mistake
    masks = "--masks", tmp_path / "black.png"
    assert run(path, "--input", tmp_path / "in/whole.png", *masks, "--output", tmp_path / "out2") == 1
    assert "whole.png: nothing to fill in" in capsys.readouterr().err


# wrong values --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "arguments, line",
    [
        ("", "one of --input"),
        ("--count 3 --input x", "one of --input"),
        ("--bogus 1", "bogus"),
        ("--count many", "count"),
        ("--count 0", "count = 0"),
        ("--count 3", "restores damaged images"),
        ("--input nowhere", "nowhere"),
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
        ("--input in --output in", "another folder"),
        ("--input in --output a.bmp", "a folder, or for one input a name"),
        ("--export model.pt", ".safetensors"),
    ],
)
def test_wrong_values_are_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "in/a.png", photo(4, 4))
    assert sample.main([make_run(tmp_path / "run"), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("sample.py: ") and line in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "run"]  # nothing was written


def test_runs_that_are_none_are_refused(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    (tmp_path / "a.pt").write_bytes(b"nothing")
    for path in ("a.pt", "b.pt", "a.safetensors", "b.safetensors", "."):
        assert run(tmp_path / path, "--count", 1) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and (path in error or "safetensors" in error)


# what would be lost ---------------------------------------------------------------------------------------------------

def test_names_and_places_that_cannot_be_written_are_told_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    identity = make_run(tmp_path / "run", identity=True)
    put(tmp_path / "in/ok.png", photo(5, 5))
    put(tmp_path / f"in/{'n' * 254}", photo(5, 5), format="PNG")
    os.rename(tmp_path / f"in/{'n' * 254}", tmp_path / f"in/{'n' * 250}.gif")  # its PNG would be of 254 bytes: fine
    put(tmp_path / "in/below/deep.png", photo(5, 5))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/below").write_text("a file in a folder's place")
    flags = "--input", tmp_path / "in", "--output", tmp_path / "out", "--draws", 2
    assert run(identity, *flags) == 1
    listed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not restored")]
    assert len(listed) == 2 and "below/deep" in listed[0] and "File name too long" in listed[1]
    assert (tmp_path / "out/ok_mean.png").exists()


def test_a_disk_that_fills_costs_the_image_only(tmp_path, capsys, monkeypatch):
    identity, save = make_run(tmp_path / "run", identity=True), restorer.write_photograph
    for name in "abc":
        put(tmp_path / f"in/{name}.png", photo(5, 5))

    def full(path, *how):
        if path.name == "b.png":
            raise OSError(28, "No space left on device")
        save(path, *how)

    monkeypatch.setattr(restorer, "write_photograph", full)
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    assert "b.png: No space left on device" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "c.png"}


@pytest.mark.parametrize("flags", [("--input", ""), ("--input", "in.png", "--output", "")])
def test_an_empty_path_is_named(tmp_path, capsys, flags):
    assert run(make_run(tmp_path / "run", identity=True), *flags) == 2
    error = capsys.readouterr().err
    assert "put = " in error and "''" in error and "allowed is" in error and error.count("\n") == 1


def test_a_picture_past_memory_is_told_with_its_size(tmp_path, capsys, monkeypatch):
    identity = make_run(tmp_path / "run", identity=True)
    put(tmp_path / "in/large.png", photo(300, 200)), put(tmp_path / "in/small.png", photo(5, 5))
    put(tmp_path / "in/strip.png", photo(1, 1001))
    monkeypatch.setattr(trained_model, "free_memory", lambda: 50 * 10**6)
    assert run(identity, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "large.png: its 0.06 million pixels (300x200) would take about 0.0624 GB" in error
    assert "strip.png: its sides are 1x1001" in error and (tmp_path / "out/small.png").exists()


@pytest.mark.parametrize("sides", [(1, 900), (500, 1)])
def test_strips_are_restored_within_seconds(tmp_path, sides):
    path = make_run(tmp_path / "run", solver="midpoint", sample_steps=1)
    put(tmp_path / "in.png", photo(*sides))
    began = time.monotonic()
    assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / "out") == 0
    assert get(tmp_path / "out/in.png").shape == (2 * sides[1], 2 * sides[0], 3) and time.monotonic() - began < 20


@pytest.mark.parametrize("sides", [(1, 1), (1, 7), (2, 3)])
def test_a_side_of_one_pixel_is_finite_in_bf16_too(tmp_path, sides):
    settings = dict(task="jpeg", solver="midpoint", sample_steps=2, unet_dim_mults=(1, 2, 2), precision="bf16")
    path = make_run(tmp_path / "run", **settings)
    put(tmp_path / "in.png", photo(*sides))
    assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / "out") == 0


@pytest.mark.parametrize("method", METHODS)
def test_an_output_that_is_not_finite_is_no_picture(tmp_path, capsys, method):
    path = make_run(tmp_path / "run", method=method, task="jpeg", **METHODS[method])
    state = torch.load(f"{path}/checkpoints/last.pt", weights_only=True)
    state["ema"]["out.bias"][:] = math.nan
    torch.save(state, f"{path}/checkpoints/last.pt")
    put(tmp_path / "in/a.png", photo(16, 16))
    assert run(path, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    assert "not finite" in capsys.readouterr().err and not list((tmp_path / "out").glob("*.png"))


# several processes ----------------------------------------------------------------------------------------------------

def test_the_parts_make_what_one_process_makes(tmp_path, capsys, monkeypatch):
    restoring = make_run(tmp_path / "run", method="edm", sample_steps=2)
    making = make_run(tmp_path / "other", method="edm", task="generate", sample_steps=2)
    for i in range(5):
        put(tmp_path / f"in/{i}.png", photo(5, 5, seed=i))
    for path, flags in ((restoring, ("--input", tmp_path / "in")), (making, ("--count", 3, "--label", "cat,dog"))):
        whole, parts, torchrun = (tmp_path / f"{name}{path[-3:]}" for name in ("whole", "parts", "torchrun"))
        assert run(path, *flags, "--output", whole) == 0
        for part in ("0/3", "1/3", "2/3"):
            assert run(path, *flags, "--output", parts, "--partition", part) == 0
        for rank in range(2):
            for name, value in ranks(2)[rank].items():
                monkeypatch.setenv(name, value)
            assert run(path, *flags, "--output", torchrun) == 0
        for name in ranks(1)[0]:
            monkeypatch.delenv(name)
        expected = {p.name: get(p).astype(int) for p in whole.iterdir() if p.name != "grid.png"}
        for made in (parts, torchrun):
            assert {p.name for p in made.iterdir()} - {"grid.png"} == expected.keys()
            assert all(abs(get(made / name) - pixels).max() <= 1 for name, pixels in expected.items())
    assert run(restoring, "--input", tmp_path / "in", "--partition", "0/2") == 2
    assert "output = None: allowed is a folder" in capsys.readouterr().err
    traced = tmp_path / "traced"
    assert run(making, "--count", 2, "--label", "cat", "--output", traced, "--partition", "0/2", "--trace") == 0
    assert [p.name for p in traced.iterdir()] == ["cat_0001.png"]  # a trace of all is nobody's here
    for wrong in ("3/3", "x", "-1/2"):
        assert run(restoring, "--input", tmp_path / "in", f"--partition={wrong}") == 2
        assert "partition = " in capsys.readouterr().err
