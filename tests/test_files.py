"""Folders that no program should get lost in, and files that are too large, too long or not quite images."""
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from images import DatasetError, files
from images.corruptions import to_full_size
from images.files import enlarge, fit, flatten, list_images, open_image, to_image, to_tensor
from images.pictures import to_float, to_uint8
from pixels import noise

pytestmark = pytest.mark.filterwarnings("ignore")  # those that matter are asserted


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path)


# ------------------------------------------------------------------------------------------------------------- folders

def test_pipes_sockets_and_devices_are_passed_over(tmp_path):
    """Opening a pipe waits for whoever writes to it, for ever if no one does."""
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path must be short
        try:
            server.bind("socket.png")
        finally:
            os.chdir(here)
        with pytest.warns(UserWarning, match="4 files are ignored.*: link.png, pipe.png, socket.png, zero.png"):
            assert list_images(tmp_path) == ["a.png"]


def test_each_real_folder_is_entered_once(tmp_path):
    for name in ("in/b/1.png", "in/2.png", "out/3.png", "out/deep/4.png"):
        picture(tmp_path / name)
    for link, target in {
        "in/a": "b",  # before b in the alphabet, but b is the folder's own name
        "in/b/up": "..",  # a circle
        "in/y": "../out", "in/x": "../out",  # two ways to a folder outside: the first in the alphabet
        "in/c": "../out/deep",  # one link leads there as well, and comes before x/deep
        "out/back": "../in",
        "in/e.png": "../out",  # an image's ending does not make an image
    }.items():
        (tmp_path / link).symlink_to(target)
    assert list_images(tmp_path / "in") == ["2.png", "b/1.png", "c/4.png", "e.png/3.png"]
    assert list_images(tmp_path / "in" / "b") == sorted(["1.png", "up/2.png", "up/c/4.png", "up/e.png/3.png"])


def test_the_order_in_which_the_disk_lists_a_folder_changes_nothing(tmp_path, monkeypatch):
    for i in range(5):
        picture(tmp_path / "out" / f"{i}.png")
        (tmp_path / "in" / f"{i}").mkdir(parents=True)
        (tmp_path / "in" / f"{i}" / "link").symlink_to("../../out")
    scandir = os.scandir
    found = []
    for backwards in (False, True):
        def listed(path, backwards=backwards):
            return sorted(scandir(path), key=lambda entry: entry.name, reverse=backwards)
        monkeypatch.setattr(os, "scandir", listed)
        found.append(list_images(tmp_path / "in"))
    assert found[0] == found[1] == [f"0/link/{i}.png" for i in range(5)]


def test_a_link_to_a_file_is_a_file(tmp_path):
    """One mask under the names of several images, say."""
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert list_images(tmp_path) == ["a.png", "b.png"]


@pytest.mark.parametrize("target, reason", [("self.png", "symbolic links"), ("missing", "No such file")])
def test_a_link_that_leads_nowhere_is_named_where_it_is_read(tmp_path, target, reason):
    picture(tmp_path / "a.png")
    (tmp_path / "self.png").symlink_to(target)
    assert list_images(tmp_path) == ["a.png", "self.png"]
    with pytest.raises(DatasetError, match=f"self.png: can't be read as an image .*{reason}"):
        open_image(tmp_path / "self.png")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux shows its processes there")
@pytest.mark.parametrize("place", ["/", "/proc", "/proc/self", "/sys", "/dev", "link"])
def test_the_systems_own_folders_are_refused_at_once(tmp_path, place):
    start = time.monotonic()
    if place == "link":
        picture(tmp_path / "a.png")
        (tmp_path / "everything").symlink_to("/")
        place = tmp_path
    with pytest.raises(DatasetError, match="leads to /.*; name a folder of images"):
        list_images(Path(place))
    assert time.monotonic() - start < 1


def test_a_disk_with_hardly_an_image_is_not_searched_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ENTRIES", 200)
    for i in range(250):
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{i}.txt").touch()
    picture(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="only 1 of the first 252 files and folders .*images; name the folder"):
        list_images(tmp_path)
    picture(tmp_path / "b.png")
    picture(tmp_path / "c.png")  # now one in a hundred is
    assert len(list_images(tmp_path)) == 3


def test_a_folder_that_can_not_be_opened_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    picture(tmp_path / "secret" / "b.png")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.warns(UserWarning, match="1 folders can't be opened.*secret .Permission denied"):
        assert list_images(tmp_path) == ["a.png"]


# ---------------------------------------------------------------------------------------------------------- one image

@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_refused(tmp_path, wrong):
    pixels = np.full((4, 4), 0.5, np.float32)
    Image.fromarray(pixels).save(tmp_path / "good.tif")
    assert set(open_image(tmp_path / "good.tif", 1).tobytes()) == {128}
    pixels[1, 2] = wrong
    Image.fromarray(pixels).save(tmp_path / "bad.tif")
    with pytest.raises(DatasetError, match="bad.tif: some of its pixels are NaN or infinite; "):
        open_image(tmp_path / "bad.tif")
    with pytest.raises(DatasetError, match="image: some"):
        flatten(Image.fromarray(pixels))


@pytest.mark.parametrize("side, said", [(13_000, "13000x13000 pixels"), (20_000, "400000000 pixels")])
def test_what_pillow_takes_for_an_attack_is_named_with_its_size(tmp_path, side, said):
    Image.new("1", (side, side)).save(tmp_path / "huge.png")
    with pytest.raises(DatasetError, match=rf"huge.png: is too large .*{said}.*; make it smaller, 89,478,485 pixels"):
        open_image(tmp_path / "huge.png")


@pytest.mark.parametrize("width, height, side", [(1, 65_000, 32), (500, 1, 64), (3, 1000, 256), (65_000, 7, 32)])
def test_a_strip_is_fitted_without_enlarging_all_of_it(width, height, side, monkeypatch):
    """The whole of the first, enlarged, would have 67 million pixels."""
    strip = Image.fromarray(noise(height, width, 3))
    largest, resize = [], Image.Image.resize

    def watched(self, size, *args, **kwargs):
        largest.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert fit(strip, side).size == (side, side)
    assert max(largest) <= 3 * side**2 + 10 * side


@pytest.mark.parametrize("seed", range(40))
def test_a_strip_looks_as_if_all_of_it_had_been_enlarged(seed):
    random = np.random.default_rng(seed)
    short = int(random.integers(1, 12))
    long, side = int(random.integers(4 * short + 1, 60 * short + 20)), int(random.integers(short + 1, 12 * short + 20))
    strip = Image.fromarray(noise(*((short, long) if seed % 2 else (long, short)), 3, seed=seed))
    scale = side / short
    whole = strip.resize((round(strip.width * scale), round(strip.height * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    difference = np.asarray(whole.crop((left, top, left + side, top + side))).astype(int) - np.asarray(fit(strip, side))
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01  # a half that rounds the other way


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_a_picture_and_its_pixels_are_enlarged_alike(channels, factor):
    image = to_image(torch.from_numpy(noise(channels, 9, 14)))
    large = enlarge(image, factor)
    assert large.size == (14 * factor, 9 * factor)
    assert torch.equal(enlarge(to_tensor(image), factor), to_tensor(large))
    torch_s = to_uint8(to_full_size(to_float(to_tensor(image))[None], factor, "bicubic"))[0]
    assert (torch_s.int() - to_tensor(large)).abs().max() <= 1
