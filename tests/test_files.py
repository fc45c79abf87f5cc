"""Folders that no program should get lost in, and files that are too large, too long or not quite images."""
import os
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageCms

from images import DatasetError, SettingsError, files
from images.data import load
from images.files import flatten, list_images, mask_of, open_image, user_path
from pixels import noise, put, solid

pytestmark = pytest.mark.filterwarnings("ignore")  # those that matter are asserted


# ------------------------------------------------------------------------------------------------------------- folders

def test_pipes_sockets_and_devices_are_named_and_not_read(tmp_path, monkeypatch):
    """Opening a pipe waits for whoever writes to it, for ever if no one does."""
    solid(tmp_path / "a.png", 0)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        images = load(str(tmp_path), 8)
    assert [line.split("/")[-1] for line in images.left_out] == [
        f"{name}.png: is not a file; replace or remove it" for name in ("link", "pipe", "socket", "zero")]


def test_each_real_folder_is_entered_once(tmp_path):
    for name in ("in/b/1.png", "in/2.png", "out/3.png", "out/deep/4.png"):
        solid(tmp_path / name, 0)
    for link, target in {
        "in/b/up": "..",  # a circle
        "in/y": "../out", "in/x": "../out",  # two ways to a folder: the first in the alphabet
        "in/c": "../out/deep",  # one link leads there as well, and comes before x/deep
        "out/back": "../in",
        "in/e.png": "../out",  # an image's ending does not make an image
        "in/f.png": "2.png",  # a link to a file is a file: one mask under the names of several images, say
    }.items():
        (tmp_path / link).symlink_to(target)
    assert list_images(tmp_path / "in") == ["2.png", "b/1.png", "c/4.png", "e.png/3.png", "f.png"]


@pytest.mark.parametrize("target, reason", [("self.png", "symbolic links"), ("missing", "No such file")])
def test_a_link_that_leads_nowhere_is_named_where_it_is_read(tmp_path, target, reason):
    solid(tmp_path / "a.png", 0)
    (tmp_path / "self.png").symlink_to(target)
    assert list_images(tmp_path) == ["a.png", "self.png"]
    with pytest.raises(DatasetError, match=f"self.png: can't be read as an image .*{reason}"):
        open_image(tmp_path / "self.png")


def test_a_folder_that_can_not_be_opened_is_named(tmp_path, monkeypatch):
    solid(tmp_path / "a.png", 0), solid(tmp_path / "secret/b.png", 0)
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.warns(UserWarning, match="1 folders can't be opened.*secret .Permission denied"):
        assert list_images(tmp_path) == ["a.png"]


# ---------------------------------------------------------------------------------------------------------- one image

@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_refused(tmp_path, wrong):
    pixels = np.full((4, 4), 0.5, np.float32)
    pixels[1, 2] = wrong
    put(tmp_path / "bad.tif", pixels)
    with pytest.raises(DatasetError, match="bad.tif: some of its pixels are NaN or infinite; "):
        open_image(tmp_path / "bad.tif")
    with pytest.raises(DatasetError, match="image: some"):
        flatten(Image.fromarray(pixels))


def test_pictures_beyond_a_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_PIXELS", 99)
    solid(tmp_path / "huge.png", 0, size=(10, 10))
    with pytest.raises(DatasetError, match="huge.png: has 10x10 pixels, more than 99; make it smaller"):
        open_image(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 49)  # from twice as many on, Pillow refuses
    with pytest.raises(DatasetError, match="huge.png: can't be read as an image .*100 pixels.*; replace"):
        open_image(tmp_path / "huge.png")


# --------------------------------------------------------------------------------------------------- formats, colours

@pytest.mark.parametrize("ending", ["jfif", "avif", "jp2", "tga", "qoi", "ico", "pcx"])
def test_formats_that_pillow_opens_by_itself(tmp_path, ending):
    Image.new("RGB", (32, 32), (200, 30, 90)).save(tmp_path / f"a.{ending}")
    assert list_images(tmp_path) == [f"a.{ending}"]
    assert np.abs(np.asarray(open_image(tmp_path / f"a.{ending}")).astype(int) - (200, 30, 90)).max() <= 4


def test_a_drawing_that_another_program_would_run_is_not_opened(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    os.rename(tmp_path / "a.eps", tmp_path / "a.png")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    with pytest.raises(DatasetError, match="a.png: can't be read as an image .its format is unknown"):
        open_image(tmp_path / "a.png")
    solid(tmp_path / "b.png", 0)
    (tmp_path / "c.eps").write_text("%!PS")
    assert list_images(tmp_path) == ["a.png", "b.png"]


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile(*edits: tuple[bytes, bytes]) -> bytes:
    """sRGB's ICC profile under another name, with some of its bytes replaced by others."""
    icc = SRGB
    for old, new in (("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be")), *edits):
        assert old in icc
        icc = icc.replace(old, new)
    return icc


# the second value is the red one, the third the green one and the first the blue one
TURNED = profile((b"rXYZ", b"...."), (b"bXYZ", b"rXYZ"), (b"gXYZ", b"bXYZ"), (b"....", b"gXYZ"))
# greys, of a gamma of 1.5 where sRGB has 2.4
GREYS = profile((b"RGB ", b"GRAY"), (b"rTRC", b"kTRC"), (struct.pack(">i", int(2.4 * 2**16)), struct.pack(">i", 98304)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA"])
def test_colours_are_converted_to_srgb(tmp_path, mode):
    grey = mode in ("L", "LA")
    image = Image.fromarray(noise(16, 16) // 2 + 64 if grey else noise(16, 16, 3))
    image = image.quantize(200) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png", icc_profile=GREYS if grey else TURNED)
    levels = np.asarray(image.convert("RGB"))
    expected = levels[..., [1, 2, 0]]
    if grey:
        light = ((levels / 255 + 0.055) / 1.055) ** 1.5
        expected = 255 * (1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(np.asarray(open_image(tmp_path / "a.png")) - expected).max() < 1.5
    if mode == "L":  # and where greys are asked for
        assert np.abs(np.asarray(open_image(tmp_path / "a.png", 1)) - expected[..., 0]).max() < 1.5


@pytest.mark.parametrize("icc", [b"no profile", profile((b"RGB ", b"CMYK")), SRGB])
def test_a_profile_that_changes_nothing_leaves_the_bits(tmp_path, icc):
    """One that is damaged, one of another kind of image, and sRGB itself."""
    put(tmp_path / "a.png", noise(16, 16, 3), icc_profile=icc)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png")), noise(16, 16, 3))


def test_what_is_transparent_in_a_mask_is_kept(tmp_path):
    """White strokes on a transparent layer, as drawing programs save them; and plain black and white."""
    strokes = noise(8, 8) > 128
    plain = 255 * strokes.astype(np.uint8)
    layer = np.dstack([np.full((8, 8, 3), 255, np.uint8), plain])
    for pixels in (plain, layer):
        np.testing.assert_array_equal(mask_of(Image.fromarray(pixels))[0], strokes)


def test_a_user_that_does_not_exist_is_named():
    with pytest.raises(SettingsError, match="~nosuchuser/photos: there is no user of this name"):
        user_path("~nosuchuser/photos")
    assert user_path("~/photos") == Path.home() / "photos"
