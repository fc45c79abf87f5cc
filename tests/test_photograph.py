"""sample.py as a person with photographs uses it: what a file holds besides its colours comes back."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from images import DatasetError
from images.corruptions import Damage
from images.files import open_image, to_tensor
from images.pictures import psnr, to_float
from pixels import doubled, get, photo, put
from support.progress import Progress
from test_files import GREYS, TURNED
from untrained import METHODS, make_run, run


@pytest.fixture(scope="module")
def same(tmp_path_factory) -> str:
    """A run that gives back what it gets."""
    return make_run(tmp_path_factory.mktemp("same") / "run", identity=True, task="jpeg")


def restored(path, tmp_path, *flags) -> Image.Image:
    out = tmp_path / "out"
    assert run(path, "-i", tmp_path / "in", "-o", out, *flags) == 0
    image = Image.open(next(out.iterdir()))
    image.load()
    return image


def test_exif_and_resolution_are_kept_and_the_picture_is_upright(same, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # lies on its side; who made the camera
    put(tmp_path / "in/a.jpg", photo(20, 16), exif=exif, dpi=(300, 300))
    for kind in ("png", "jpg", "webp"):
        image = restored(same, tmp_path, "--format", kind, "--overwrite", "--suffix", f"_{kind}")
        (tmp_path / "out" / f"a_{kind}.{kind}").unlink()
        assert image.size == (16, 20) and image.format == {"jpg": "JPEG"}.get(kind, kind.upper())
        assert image.getexif().get(0x010F) == "maker" and 0x0112 not in image.getexif()
        assert kind == "webp" or image.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_grey_comes_back_grey(same, tmp_path):
    grey = photo(12, 10, 1)
    put(tmp_path / "in/16-bits.png", grey.astype(np.uint16) * 257)
    for mode in ("L", "LA", "RGB"):
        Image.fromarray(grey).convert(mode).save(tmp_path / f"in/{mode}.png")
    assert run(same, "-i", tmp_path / "in", "-o", tmp_path / "out") == 0
    for name in ("16-bits", "L", "LA", "RGB"):
        made = Image.open(tmp_path / f"out/{name}.png")
        assert made.mode == "L" and np.array_equal(np.asarray(made), grey), name


def test_transparency_goes_back_onto_the_restored_colours(tmp_path):
    path = make_run(tmp_path / "run", identity=True, damage=Damage(up="nearest"))  # twice as large
    rgb, alpha = photo(10, 8), np.full((8, 10, 1), 255, np.uint8)
    alpha[:, :5] = 0
    put(tmp_path / "in/a.png", np.concatenate([rgb, alpha], 2))
    made = np.asarray(restored(path, tmp_path))
    np.testing.assert_array_equal(made[..., :3], doubled(rgb))
    assert not made[:, :8, 3].any() and (made[:, 12:, 3] == 255).all()
    laid_over_white = np.asarray(restored(path, tmp_path, "--format", "jpg", "--suffix", "2", "--quality", 100))
    assert laid_over_white.shape == (16, 20, 3)


@pytest.mark.parametrize("mode, icc", [("RGB", TURNED), ("L", GREYS)])
def test_a_profile_is_converted_and_said(same, tmp_path, capsys, mode, icc):
    pixels = photo(16, 16, len(mode))
    path = put(tmp_path / "in/a.png", pixels, icc_profile=icc)
    made = restored(same, tmp_path)
    assert made.mode == mode and (np.asarray(made) != pixels).mean() > 0.5
    np.testing.assert_array_equal(np.asarray(made), np.asarray(open_image(path).convert(mode)))
    assert "note: colours are converted to sRGB (1 image)" in capsys.readouterr().out


def test_what_is_changed_is_one_line(same, tmp_path, capsys):
    pages = [Image.fromarray(photo(8, 8, seed=i)) for i in range(3)]
    put(tmp_path / "in/deep.png", photo(8, 8, 1).astype(np.uint16) * 257)
    put(tmp_path / "in/clear.png", photo(8, 8, 4))
    for name in ("pages.tif", "frames.gif"):
        pages[0].save(tmp_path / "in" / name, save_all=True, append_images=pages[1:])
    assert run(same, "-i", tmp_path / "in", "-o", tmp_path / "out", "--format", "jpg") == 0
    notes = {line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")}
    assert notes == {"note: 16 bits and more become 8 (1 image)",
                     "note: of several pages or frames the first is taken (2 images)",
                     "note: transparency is laid over white, which a JPEG can't hold (1 image)"}


def test_several_files_folders_and_patterns(same, tmp_path, monkeypatch, capsys):
    for name in ("a/one.jpg", "a/be.low/two.png", "a/be.low/two.jpg", "b/three.jpg", "b/one.jpg", "b/five.png"):
        put(tmp_path / name, photo(6, 6))
    monkeypatch.chdir(tmp_path)
    assert run(same, "--input", "a", "b/*.jpg", "-o", "out") == 0
    assert {str(path.relative_to("out")) for path in (tmp_path / "out").relative_to(tmp_path).rglob("*.png")} == {
        "one_jpg.png", "be.low/two_png.png", "be.low/two_jpg.png", "three.png", "one_jpg_2.png"}
    assert run(same, "--input", "b/*.bmp", "-o", "out") == 2
    assert "input = 'b/*.bmp': there is no such file or folder" in capsys.readouterr().err


def test_the_output_may_be_a_files_name(same, tmp_path):
    put(tmp_path / "in.png", photo(8, 8))
    for name, kind in (("out.webp", "WEBP"), ("out.jpeg", "JPEG")):
        assert run(same, "-i", tmp_path / "in.png", "-o", tmp_path / "new" / name, "--before-after", "off") == 0
        assert Image.open(tmp_path / "new" / name).format == kind
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_results_beside_the_inputs_are_no_inputs(same, tmp_path, capsys):
    put(tmp_path / "in/a.jpg", photo(8, 8))
    for said in ("1 of 1", "1 were there already"):
        assert run(same, "-i", tmp_path / "in", "-o", tmp_path / "in", "--suffix", "_new") == 0
        assert said in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["a.jpg", "a_new.png"]


def test_draws_that_were_interrupted_go_on(same, tmp_path):
    put(tmp_path / "in/a.png", photo(8, 8))
    flags = "-i", tmp_path / "in", "-o", tmp_path / "out", "--draws", 2
    assert run(same, *flags) == 0
    (tmp_path / "out/a_mean.png").unlink()
    assert run(same, *flags) == 0 and (tmp_path / "out/a_mean.png").exists()


@pytest.mark.parametrize("factor, size", [(3, (33, 27)), (1.5, (16, 14))])
def test_any_enlargement(tmp_path, factor, size):
    path = make_run(tmp_path / "run", identity=True, task="sr,jpeg",
                    damage=Damage(factor=(4, 2), down="bicubic", up="bicubic"))
    put(tmp_path / "in/a.png", np.full((9, 11, 3), 77, np.uint8))
    made = restored(path, tmp_path, "--factor", factor)
    assert made.size == size and (np.asarray(made) == 77).all()
    assert sample.open_model(path, factor=factor).restore(Image.open(tmp_path / "in/a.png")).size == size


def test_strength_is_the_share_of_the_restoration(tmp_path):
    path = make_run(tmp_path / "run", method="i2sb", task="jpeg", sample_steps=2)
    put(tmp_path / "in/a.png", photo(16, 16))
    images = {s: np.asarray(restored(path, tmp_path, "--strength", s, "--overwrite")).astype(int) for s in (0, 0.5, 1)}
    assert abs(images[0] - get(tmp_path / "in/a.png")).max() == 0
    inside = (images[1] > 0) & (images[1] < 255)  # what was not cut at black or white
    assert abs(images[0] + images[1] - 2 * images[0.5])[inside].max() <= 2 and (images[1] != images[0]).mean() > 0.5


@pytest.mark.skipif("pillow_heif" in sys.modules, reason="pillow-heif is there")
def test_heic_names_the_package_that_it_needs(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(40))
    with pytest.raises(DatasetError, match="a.heic: .*pip install pillow-heif"):
        open_image(tmp_path / "a.heic")


@pytest.mark.parametrize("settings, flags, calls", [
    (dict(method="sr3", sample_steps=5), {}, 5), (dict(method="edm", sample_steps=2), dict(guidance=2.0), 3),
    (dict(method="regression"), {}, 1), (METHODS["udpm"] | dict(method="udpm"), {}, 3)])
def test_the_bar_moves_within_a_picture(tmp_path, monkeypatch, settings, flags, calls):
    """Two images at once, in tiles: each call of the network is a share of them, and all calls are both."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model = sample.open_model(make_run(tmp_path / "run", task="jpeg", **settings), batch_size=2, **flags)
    progress, zlo, seen = Progress(model, 3, False), torch.zeros(2, 3, 96, 48), []
    assert not progress.bar.disable
    model.net.register_forward_hook(lambda *_: seen.append(progress.bar.n))
    model.sample(zlo, None, [0, 0], [[(1.0, (0, i))] for i in range(2)])
    assert len(seen) > calls and seen[-1] == pytest.approx(2) and max(np.diff(seen)) == pytest.approx(2 / len(seen))
    progress.finished(2)
    assert progress.bar.n == pytest.approx(2)


def test_the_bar_waits_where_dopri5_chooses_its_steps(tmp_path):
    model = sample.open_model(make_run(tmp_path / "run", task="jpeg"), solver="dopri5")
    assert model.evaluations == float("inf")


def test_the_photographs_model_leaves_clean_pictures_nearly_as_they_are():
    """On the truths in the README's picture."""
    root = Path(sample.__file__).parent
    model = sample.open_model(root / "models/photos.safetensors", device="cpu")
    picture = Image.open(root / "assets/photos.png").convert("RGB")
    truths = [picture.crop((416, top, 600, top + 136)) for top in (24, 172, 320, 468)]
    clean = [to_float(to_tensor(each))[None] for each in truths]
    restored = [to_float(to_tensor(each))[None] for each in model.restore(truths)]
    assert np.mean([psnr(ours, theirs) for ours, theirs in zip(restored, clean)]) > 45
    noisy = (clean[0] + 0.08 * torch.randn_like(clean[0])).clamp(-1, 1)
    assert psnr(model.restore(noisy), clean[0]) > psnr(noisy, clean[0]) + 3
