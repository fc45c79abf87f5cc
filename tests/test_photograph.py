"""sample.py as a person with photographs uses it: what a file holds besides its colours comes back."""
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

from images.corruptions import Damage
from pixels import doubled, get, photo, put
from untrained import make_run, run


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


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "RGB"])
def test_grey_comes_back_grey(same, tmp_path, mode):
    grey = photo(12, 10, 1)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in/a.png")
    made = restored(same, tmp_path)
    assert made.mode == "L"
    np.testing.assert_array_equal(np.asarray(made), grey)


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


def test_a_profile_is_converted_and_said(same, tmp_path, capsys):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    put(tmp_path / "in/a.png", photo(8, 8), icc_profile=lab)
    assert "icc_profile" not in restored(same, tmp_path).info
    assert "note: colours are converted to sRGB, and the profile is left out (1 image)" in capsys.readouterr().out


def test_what_is_lost_is_one_line(same, tmp_path, capsys):
    deep = Image.fromarray(photo(8, 8, 1).astype(np.uint16) * 257)
    pages = [Image.fromarray(photo(8, 8, seed=i)) for i in range(3)]
    (tmp_path / "in").mkdir()
    deep.save(tmp_path / "in/deep.png")
    pages[0].save(tmp_path / "in/pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "in/more.tif", save_all=True, append_images=pages[1:])
    assert run(same, "-i", tmp_path / "in", "-o", tmp_path / "out") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == ["note: 16 bits become 8 (1 image)",
                     "note: of several pages or frames the first is taken (2 images)"]


def test_several_files_folders_and_patterns(same, tmp_path, monkeypatch, capsys):
    for name in ("a/one.jpg", "a/below/two.png", "b/three.jpg", "b/four.jpg", "b/five.txt.png"):
        put(tmp_path / name, photo(6, 6))
    monkeypatch.chdir(tmp_path)
    assert run(same, "--input", "a", "b/*.jpg", "-o", "out") == 0
    assert {str(path.relative_to("out")) for path in (tmp_path / "out").relative_to(tmp_path).rglob("*.png")} == {
        "one.png", "below/two.png", "three.png", "four.png"}
    assert run(same, "--input", "b/*.bmp", "-o", "out") == 2
    assert "input = 'b/*.bmp': there is no such file or folder" in capsys.readouterr().err


def test_the_output_may_be_a_files_name(same, tmp_path):
    put(tmp_path / "in.jpg", photo(8, 8))
    assert run(same, "-i", tmp_path / "in.jpg", "-o", tmp_path / "new/out.jpeg") == 2  # neither jpg nor a folder
    assert run(same, "-i", tmp_path / "in.jpg", "-o", tmp_path / "new/out.webp", "--before-after", "off") == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.webp"]
    assert Image.open(tmp_path / "new/out.webp").size == (8, 8)


@pytest.mark.parametrize("factor, size", [(3, (33, 27)), (1.5, (16, 14)), (2, (22, 18))])
def test_any_enlargement(tmp_path, factor, size):
    path = make_run(tmp_path / "run", identity=True, task="sr,jpeg",
                    damage=Damage(factor=(4, 2), down="bicubic", up="bicubic"))
    put(tmp_path / "in/a.png", np.full((9, 11, 3), 77, np.uint8))
    made = restored(path, tmp_path, "--factor", factor)
    assert made.size == size and (np.asarray(made) == 77).all()


def test_strength_is_the_share_of_the_restoration(tmp_path):
    path = make_run(tmp_path / "run", method="i2sb", task="jpeg", sample_steps=2)
    put(tmp_path / "in/a.png", photo(16, 16))
    images = {s: np.asarray(restored(path, tmp_path, "--strength", s, "--overwrite")).astype(int) for s in (0, 0.5, 1)}
    assert abs(images[0] - get(tmp_path / "in/a.png")).max() == 0
    inside = (images[1] > 0) & (images[1] < 255)  # what was not cut at black or white
    assert abs(images[0] + images[1] - 2 * images[0.5])[inside].max() <= 2 and (images[1] != images[0]).mean() > 0.5


@pytest.mark.parametrize("ending", ["jfif", "avif", "jp2"])
def test_endings_of_phones_and_browsers(same, tmp_path, ending):
    put(tmp_path / f"in/a.{ending}", photo(16, 16), **(dict(format="JPEG") if ending == "jfif" else {}))
    assert restored(same, tmp_path).size == (16, 16)


def test_heic_names_the_package_that_it_needs(same, tmp_path, capsys, monkeypatch):
    if "pillow_heif" in sys.modules:
        pytest.skip("pillow-heif is there")
    (tmp_path / "a.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(40))
    assert run(same, "-i", tmp_path / "a.heic", "-o", tmp_path / "out") == 1
    assert "pip install pillow-heif" in capsys.readouterr().err
