"""Readers against independent computations, drawings against closed forms, errors against what a user needs."""
import gzip
import http.server
import math
import os
import pickle
import socket
import struct
import threading
import time
import types

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from images import DatasetError, SettingsError, data, packs, shapes
from images.data import batch_indices, load
from images.files import enlarge, fit, open_image, to_tensor
from images.pairs import pair_factor
from images.pictures import to_float, to_uint8

pytestmark = pytest.mark.filterwarnings("ignore")  # of the skipped images: those that matter are asserted


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def solid(path, value, size=(8, 8)):
    """A one-coloured picture, which keeps its value however it is resized: it can be told from the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def values(x):
    return x[:, 0, 0, 0].tolist()


# ---------------------------------------------------------------------------------------------------------- one image

@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_keeps_its_values(tmp_path, ending):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{ending}")
    for channels in (1, 3):
        read = np.asarray(open_image(tmp_path / f"ramp.{ending}", channels)).reshape(64, 64, channels) / 255
        assert np.abs(read - ramp[..., None] / 65535).max() < 1 / 255
        assert read.min() == 0 and read.max() == 1


def test_wide_integers_and_floats(tmp_path):
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    for name, pixels in (("i", (ramp * 65535).astype(np.int32)), ("unit", ramp.astype(np.float32)),
                         ("bytes", (ramp * 255).astype(np.float32))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.tif")
        assert np.abs(np.asarray(open_image(tmp_path / f"{name}.tif", 1)) / 255 - ramp).max() < 1 / 255, name


def test_palette_bilevel_and_cmyk(tmp_path):
    colours = noise(16, 3)
    index = noise(20, 20, seed=1) % 16
    palette = Image.frombytes("P", (20, 20), index.tobytes())
    palette.putpalette(colours.tobytes())
    for ending in ("png", "gif", "bmp"):
        palette.save(tmp_path / f"p.{ending}")
        np.testing.assert_array_equal(np.asarray(open_image(tmp_path / f"p.{ending}")), colours[index])

    bits = index > 7
    Image.fromarray(bits).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "bits.png", 1)), bits * 255)

    inks = noise(20, 20, 4, seed=2)
    Image.frombytes("CMYK", (20, 20), inks.tobytes()).save(tmp_path / "inks.tif")
    c, k = 1 - inks[..., :3] / 255, 1 - inks[..., 3:] / 255
    assert np.abs(np.asarray(open_image(tmp_path / "inks.tif")) - 255 * c * k).max() <= 1.5


def test_transparency_is_laid_over_white(tmp_path):
    rgba = noise(16, 16, 4)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * 255
    assert np.abs(np.asarray(open_image(tmp_path / "rgba.png")) - expected).max() <= 1

    la = noise(16, 16, 2)
    Image.fromarray(la).save(tmp_path / "la.png")
    alpha = la[..., 1] / 255
    expected = alpha * la[..., 0] + (1 - alpha) * 255
    assert np.abs(np.asarray(open_image(tmp_path / "la.png", 1)) - expected).max() <= 1

    index = noise(16, 16) % 2
    palette = Image.frombytes("P", (16, 16), index.tobytes())
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png", transparency=1)
    expected = np.array([[10, 20, 30], [255, 255, 255]])[index]
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "p.png")), expected)


def test_exif_rotation_is_applied(tmp_path):
    upright = noise(12, 20, 3)
    turned_back = {  # how a camera that held the picture so would have stored it
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1),
    }
    for orientation, stored in turned_back.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)
        np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x.png")), upright, str(orientation))


def test_unreadable_images_are_named(tmp_path):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    (tmp_path / "text.png").write_text("I am no image")
    (tmp_path / "empty.png").touch()
    for name in ("cut.jpg", "text.png", "empty.png", "missing.png"):
        with pytest.raises(DatasetError, match=name) as error:
            open_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_fit_halves_with_a_box():
    image = noise(60, 100, 3)
    expected = image.astype(float)
    for _ in range(2):  # 100 x 60 -> 50 x 30 -> 25 x 15: the short side is exactly 15, bicubic has nothing to do
        for axis in (1, 0):  # Pillow rounds after each direction
            pairs = np.moveaxis(expected, axis, 0)
            expected = np.moveaxis(np.floor((pairs[::2] + pairs[1::2]) / 2 + 0.5), 0, axis)
    np.testing.assert_array_equal(np.asarray(fit(Image.fromarray(image), 15)), expected[:, 5:20])


@pytest.mark.parametrize("height, width, side", [(61, 97, 32), (97, 61, 32), (160, 136, 33), (10, 14, 32), (7, 7, 32)])
def test_fit_against_torch(height, width, side):
    """The same recipe by torch's filters, which neither round nor clamp between the two directions."""
    image = noise(height, width, 3) // 3 + 85
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    while min(x.shape[2:]) >= 2 * side:
        x = avg_pool2d(x, 2)
    scale = side / min(x.shape[2:])
    x = interpolate(x, (round(x.shape[2] * scale), round(x.shape[3] * scale)), mode="bicubic", antialias=True)
    top, left = (x.shape[2] - side) // 2, (x.shape[3] - side) // 2
    expected = x[0, :, top:top + side, left:left + side].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(fit(Image.fromarray(image), side)) - expected).max() < 3


def test_uint8_survives_the_float():
    u8 = torch.arange(256, dtype=torch.uint8)
    assert to_float(u8).min() == -1 and to_float(u8).max() == 1
    assert torch.equal(to_uint8(to_float(u8)), u8)
    step = 1 / 127.5
    assert torch.equal(to_uint8(to_float(u8) + 0.49 * step), u8)  # rounded, not cut
    assert torch.equal(to_uint8(to_float(u8) - 0.49 * step), u8)
    assert to_uint8(torch.tensor([-7.0, 7.0, -1.01, 1.01])).tolist() == [0, 255, 0, 255]


# -------------------------------------------------------------------------------------------------------------- order

@pytest.mark.parametrize("n, size", [(60, 12), (50, 7), (20, 32), (1, 5), (9, 9)])
def test_each_epoch_covers_every_index_once(n, size):
    epochs = 7
    steps = -(-epochs * n // size)
    batches = [batch_indices(n, size, 3, step) for step in range(steps)]
    assert all(len(b) == size for b in batches)
    stream = torch.cat(batches)[:epochs * n].view(epochs, n)
    assert torch.equal(stream.sort(1).values, torch.arange(n).expand(epochs, n))
    if n > 10:
        assert len({tuple(row) for row in stream.tolist()}) == epochs  # shuffled anew each time


def test_order_is_a_function_of_seed_and_step():
    steps = [5, 0, 900, 5, 17, 0]
    first = [batch_indices(100, 32, 1, s) for s in steps]
    torch.manual_seed(99)
    data._permutation.cache_clear()
    for s, batch in zip(reversed(steps), reversed(first)):
        assert torch.equal(batch_indices(100, 32, 1, s), batch)
    # seed and epoch are not added up: the next seed's stream is not this one's, an epoch later
    assert not torch.equal(batch_indices(100, 100, 2, 0), batch_indices(100, 100, 1, 1))
    assert not torch.equal(batch_indices(100, 100, 2, 0), batch_indices(100, 100, 1, 0))


# ------------------------------------------------------------------------------------------------------------- folders

def test_flat_folder_holds_out_a_tenth(tmp_path):
    for i in range(40):
        solid(tmp_path / f"{i:02}.png", i)
    images = load(str(tmp_path), 8)
    assert sorted(values(images.train) + values(images.test)) == list(range(40))
    assert len(images.test) == 4 and values(images.train) == sorted(values(images.train))
    assert images.train_y is None and images.classes == [] and images.name == tmp_path.name
    few = load(str(tmp_path), 8, limit=6)  # evenly spread, and what was held out stays held out
    assert len(few.train) == 6 and set(values(few.train)) <= set(values(images.train))
    assert np.ptp(values(few.train)) > 25 and values(few.test) == values(images.test)


@pytest.mark.parametrize("n, held_out", [(2, 1), (9, 1), (10, 1), (25, 2), (10_500, 1000)])
def test_size_of_the_hold_out(n, held_out):
    names = [f"{i:05}" for i in range(n)]
    train, test, _, _ = data._split(names)
    assert len(test) == held_out and sorted(train + test) == names


def test_a_single_image_is_its_own_test(tmp_path):
    solid(tmp_path / "one.png", 7)
    with pytest.warns(UserWarning, match="hold out"):
        images = load(str(tmp_path), 8)
    assert values(images.train) == values(images.test) == [7]


def test_class_folders(tmp_path):
    for value, name in enumerate(["dog/a", "cat/b", "dog/deep/c", "cat/d", "eel/e", "eel/f"]):
        solid(tmp_path / f"{name}.png", value)
    images = load(str(tmp_path), 8)
    assert images.classes == ["cat", "dog", "eel"]
    got = dict(zip(values(images.train) + values(images.test), images.train_y.tolist() + images.test_y.tolist()))
    assert got == {0: 1, 1: 0, 2: 1, 3: 0, 4: 2, 5: 2}
    solid(tmp_path / "stray.png", 9)  # an image outside the class folders: no label for it, so none at all
    assert load(str(tmp_path), 8).train_y is None


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_train_and_test_folders(tmp_path, held_out):
    names = ["train/cat/0", "train/dog/1", "train/dog/2", f"{held_out}/dog/3", f"{held_out}/cat/4"]
    for value, name in enumerate(names):
        solid(tmp_path / f"{name}.png", value)
    images = load(str(tmp_path), 8)
    assert values(images.train) == [0, 1, 2] and sorted(values(images.test)) == [3, 4]
    assert images.classes == ["cat", "dog"] and images.train_y.tolist() == [0, 1, 1]
    assert images.test_y.tolist() == [{3: 1, 4: 0}[v] for v in values(images.test)]


def test_train_folder_alone_holds_the_classes(tmp_path):
    for i in range(20):
        solid(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", i)
    images = load(str(tmp_path), 8)
    assert images.classes == ["a", "b"] and len(images.test) == 2
    assert images.train_y.tolist() == [v % 2 for v in values(images.train)]


def test_broken_images_are_skipped_and_their_labels_too(tmp_path):
    for i in range(20):
        solid(tmp_path / "ab"[i % 2] / f"{i:02}.png", i)
    for i in (0, 3, 4, 11):
        (tmp_path / "ab"[i % 2] / f"{i:02}.png").write_text("no image")
    with pytest.warns(UserWarning, match="4 images are left out, which a run lists in left_out.txt: .*00.png"):
        images = load(str(tmp_path), 8)
    assert len(images.left_out) == 4  # all are named, however few the warning names
    assert all("can't be read" in line and "\n" not in line for line in images.left_out)
    assert {line.split(":")[0][-6:] for line in images.left_out} == {"00.png", "03.png", "04.png", "11.png"}
    x, y = values(images.train) + values(images.test), images.train_y.tolist() + images.test_y.tolist()
    assert sorted(x) == [i for i in range(20) if i not in (0, 3, 4, 11)]
    assert y == [v % 2 for v in x]


def test_one_good_image_is_enough_but_one_is_needed(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DatasetError, match="none of the.*a.png"):
        load(str(tmp_path), 8)
    solid(tmp_path / "b.png", 5)
    with pytest.warns(UserWarning):
        images = load(str(tmp_path), 8)
    assert values(images.train) == values(images.test) == [5]


def test_what_is_no_image_is_counted_and_what_is_hidden_is_not(tmp_path):
    for i in range(3):
        solid(tmp_path / f"{i}.PNG", i)
    solid(tmp_path / ".thumbnails" / "x.png", 99)
    solid(tmp_path / "._0.png", 99)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "list.csv").touch()
    with pytest.warns(UserWarning, match="2 files .*list.csv, notes.txt"):
        images = load(str(tmp_path), 8)
    assert sorted(values(images.train) + values(images.test)) == [0, 1, 2]


def test_grey_and_colour_asked_of_a_mixed_folder(tmp_path):
    Image.fromarray(noise(9, 9, 3)).save(tmp_path / "a.png")
    Image.fromarray(noise(9, 9, seed=1)).save(tmp_path / "b.png")
    grey, colour = load(str(tmp_path), 9, channels=1), load(str(tmp_path), 9, channels=3)
    rgb = colour.train[0].double()
    luma = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]  # ITU-R 601
    assert (grey.train[0, 0] - luma).abs().max() <= 1
    assert torch.equal(colour.test[0], grey.test[0].expand(3, 9, 9))
    np.testing.assert_array_equal(colour.train[0].permute(1, 2, 0), noise(9, 9, 3))


def test_what_is_broken_does_not_shift_the_rest(tmp_path):
    """The rows kept move together, within one array: each clean image stays beside its damaged one and its label."""
    for i in range(30):
        solid(tmp_path / "clean" / "ab"[i % 2] / f"{i:02}.png", i)
        solid(tmp_path / "damaged" / "ab"[i % 2] / f"{i:02}.png", 200 - i)
    for i in (2, 5, 15, 21):
        (tmp_path / "damaged" / "ab"[i % 2] / f"{i:02}.png").write_text("no image")
    images = load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged"))
    x = values(images.train) + values(images.test)
    assert sorted(x) == [i for i in range(30) if i not in (2, 5, 15, 21)]
    assert values(images.train_lo) + values(images.test_lo) == [200 - v for v in x]
    assert images.train_y.tolist() + images.test_y.tolist() == [v % 2 for v in x]


def test_links_in_a_circle_double_nothing(tmp_path):
    """A folder that holds a link to itself: no test image is a training image, and it ends."""
    for i in range(20):
        solid(tmp_path / "pictures" / f"{i:02}.png", i)
    (tmp_path / "pictures" / "again").symlink_to(tmp_path / "pictures")
    (tmp_path / "pictures" / "up").symlink_to("..")
    (tmp_path / "pictures" / "self.png").symlink_to("self.png")
    (tmp_path / "pictures" / "nowhere.png").symlink_to("missing.png")
    images = load(str(tmp_path / "pictures"), 8)
    assert sorted(values(images.train) + values(images.test)) == list(range(20))
    assert len(images.left_out) == 2 and "nowhere.png" in images.left_out[0] and "self.png" in images.left_out[1]


# -------------------------------------------------------------------------------------------------------------- pairs

def ramps(height, width):
    """A smooth picture in which a shift of half a pixel is two grey levels."""
    y, x = np.mgrid[:height, :width]
    return np.stack([40 + 4 * x, 40 + 4 * y, 40 + 2 * x + 2 * y], -1).clip(0, 255).astype(np.uint8)


def test_pairs_are_cropped_alike(tmp_path):
    for i, (h, w) in enumerate([(40, 52), (52, 40), (32, 32), (48, 32)]):
        for side in ("clean", "damaged"):
            (tmp_path / side / "train").mkdir(parents=True, exist_ok=True)
        clean = Image.fromarray(ramps(h, w))
        clean.save(tmp_path / "clean" / "train" / f"{i}.png")
        clean.reduce(2).save(tmp_path / "damaged" / "train" / f"{i}.bmp")  # at half the size, with another ending
    images = load(str(tmp_path / "clean"), 32, paired_path=str(tmp_path / "damaged"))
    assert images.train_lo.shape == images.train.shape and images.test_lo.shape == images.test.shape
    assert images.pair_factor == 2
    for clean, damaged in ((images.train, images.train_lo), (images.test, images.test_lo)):
        error = (clean.float() - damaged.float()).abs()
        assert error[..., 4:-4, 4:-4].max() <= 1.5 and clean.float().std() > 20


def test_missing_partners_are_named(tmp_path):
    for name in ("a", "b", "c", "only_clean"):
        solid(tmp_path / "clean" / f"{name}.png", 10 + ord(name[0]))
    for name in ("a", "b", "c", "only_damaged"):
        solid(tmp_path / "damaged" / f"{name}.png", ord(name[0]))
    with pytest.warns(UserWarning, match="only_clean, only_damaged"):
        images = load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged"))
    x, lo = torch.cat([images.train, images.test]), torch.cat([images.train_lo, images.test_lo])
    assert sorted(values(x)) == [107, 108, 109] and [v - 10 for v in values(x)] == values(lo)
    assert [line.split(": has no partner")[0] for line in images.left_out] == [
        str(tmp_path / "clean" / "only_clean.png"), str(tmp_path / "damaged" / "only_damaged.png")]

    solid(tmp_path / "damaged" / "a.png", 97, size=(8, 20))  # of another shape: the picture of something else
    with pytest.warns(UserWarning, match="a.png.*not the same shape"):
        images = load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged"))
    assert sorted(values(torch.cat([images.train, images.test]))) == [108, 109]

    solid(tmp_path / "other" / "z.png", 0)
    with pytest.raises(DatasetError, match="same name"):
        load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "other"))
    Image.new("RGB", (8, 8)).save(tmp_path / "damaged" / "b.jpg")
    with pytest.raises(DatasetError, match="more than one .* b"):
        load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged"))
    with pytest.raises(DatasetError, match="nowhere"):
        load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "nowhere"))


def test_where_most_pairs_do_not_belong_together_there_is_no_training(tmp_path):
    for i in range(6):
        solid(tmp_path / "clean" / f"{i}.png", i)
        solid(tmp_path / "damaged" / f"{i}.png", i, size=(8, 8) if i < 3 else (8, 20))
    clean, damaged = str(tmp_path / "clean"), str(tmp_path / "damaged")
    assert len(load(clean, 8, paired_path=damaged).left_out) == 3  # the good half will do
    solid(tmp_path / "damaged" / "2.png", 2, size=(20, 8))
    with pytest.raises(DatasetError, match="damaged: only 2 of its 6 pairs .*2.png: has 20x8 pixels, its partner 8x8"):
        load(clean, 8, paired_path=damaged)


@pytest.mark.parametrize("side", [24, 40, 64])
def test_small_damaged_images_are_enlarged_as_one_enlarges_a_file(tmp_path, side):
    """`enlarge` makes of a damaged file what training saw, whether `fit` then shrinks, crops or enlarges it."""
    (tmp_path / "clean").mkdir()
    (tmp_path / "damaged").mkdir()
    for i in range(3):
        Image.fromarray(noise(60, 48, 3, seed=i)).save(tmp_path / "clean" / f"{i}.png")
        Image.fromarray(noise(20, 16, 3, seed=i)).save(tmp_path / "damaged" / f"{i}.png")
    images = load(str(tmp_path / "clean"), side, paired_path=str(tmp_path / "damaged"))
    assert images.pair_factor == 3
    seen = torch.cat([images.train_lo, images.test_lo])
    files = [fit(enlarge(open_image(tmp_path / "damaged" / f"{i}.png"), images.pair_factor), side) for i in range(3)]
    assert sorted(x.numpy().tobytes() for x in seen) == sorted(to_tensor(x).numpy().tobytes() for x in files)


@pytest.mark.parametrize("clean, damaged, factor", [
    ([(8, 12)], [(8, 12)], 1),
    ([(80, 120), (400, 40)], [(20, 30), (100, 10)], 4),
    ([(101, 67), (67, 101)], [(50, 33), (34, 51)], 2),  # rounded down, rounded up
    ([(9, 15)], [(6, 10)], "b0.png: has 6x10 pixels, its partner 9x15; make"),
    ([(100, 60)], [(40, 24)], "b0.png: has 40x24 pixels, its partner 100x60; make"),
    ([(8, 8)], [(16, 16)], "b0.png: has 16x16 pixels, its partner 8x8; make"),
    ([(40, 27)], [(40, 26)], "b0.png: has 40x26 pixels, its partner 40x27; make"),
    ([(80, 80), (80, 80), (80, 80)], [(40, 40), (20, 20), (40, 40)], "b1.png: is 4 times smaller .*png 2 times; make"),
])
def test_how_many_times_smaller_the_damaged_images_are(clean, damaged, factor):
    sizes = [(c, d, f"b{i}.png") for i, (c, d) in enumerate(zip(clean, damaged))]
    if isinstance(factor, int):
        assert pair_factor(sizes) == factor
    else:
        with pytest.raises(DatasetError, match=factor):
            pair_factor(sizes)


def test_pairs_of_different_factors_are_refused(tmp_path):
    for i in range(4):
        solid(tmp_path / "clean" / f"{i}.png", i, size=(16, 16))
        solid(tmp_path / "damaged" / f"{i}.png", i, size=(8, 8) if i else (4, 4))
    with pytest.raises(DatasetError, match="0.png: is 4 times smaller"):
        load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged"))


# ------------------------------------------------------------------------------------------------- sets by torchvision

def idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_fashion_mnist_from_disk(tmp_path):
    x, y = noise(30, 28, 28), noise(30, seed=1) % 10
    raw = tmp_path / "FashionMNIST" / "raw"
    for part, rows in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        idx(raw / f"{part}-images-idx3-ubyte", x[rows])
        idx(raw / f"{part}-labels-idx1-ubyte", y[rows])
    images = load("fashion-mnist", 32, channels=1, data_path=str(tmp_path))
    np.testing.assert_array_equal(images.train[:, 0], np.pad(x[:20], ((0, 0), (2, 2), (2, 2))))
    np.testing.assert_array_equal(images.test_y, y[20:])
    assert images.train_y.dtype == torch.int64 and len(images.classes) == 10
    few = load("fashion-mnist", 28, channels=3, data_path=str(tmp_path), limit=4)
    np.testing.assert_array_equal(few.train[:, 2], x[:20:5])

    idx(raw / "train-images-idx3-ubyte", x[:20])
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    (raw / "train-images-idx3-ubyte").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(DatasetError, match="fashion-mnist: .*not whole.*github.com/zalandoresearch"):
        load("fashion-mnist", 32, channels=1, data_path=str(tmp_path))


def test_cifar10_from_disk(tmp_path, monkeypatch):
    """Files of CIFAR's own layout (planes of red, green, blue), whose sums torchvision is told to take on trust."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    planes, names = noise(60, 3, 32, 32), [f"class {i}" for i in range(10)]
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        rows = slice(10 * i, 10 * i + 10)
        (folder / name).write_bytes(pickle.dumps({"data": planes[rows].reshape(10, -1), "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    images = load("cifar10", 32, data_path=str(tmp_path))
    np.testing.assert_array_equal(images.train, planes[:50])
    np.testing.assert_array_equal(images.test, planes[50:])
    assert images.train_y.tolist() == list(range(10)) * 5 and images.classes == names
    half = load("cifar10", 16, data_path=str(tmp_path), limit=10)
    box = planes[:50:5].reshape(10, 3, 16, 2, 16, 2).mean((3, 5))
    assert np.abs(half.train.numpy() - box).max() <= 1 and half.train_y.tolist() == [0, 5] * 5


def test_celeba_without_its_files_says_what_is_needed(tmp_path, monkeypatch):
    def no_gdown(*_, **__):
        raise RuntimeError("To download files from GDrive, 'gdown' is required.")
    monkeypatch.setattr(torchvision.datasets.CelebA, "download", no_gdown)
    with pytest.raises(DatasetError, match="celeba.*pip install gdown.*img_align_celeba.zip"):
        load("celeba", 64, data_path=str(tmp_path))


class Junk(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(gzip.compress(b"half of an archive")[:20])

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_a_download_that_fails(tmp_path, monkeypatch, capsys):
    """No server, a server that never answers, one that sends junk, and junk on disk: one line each time, and soon."""
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"the first bytes of an archive")
    monkeypatch.setattr(data, "TIMEOUT", 0.5)
    silent = socket.create_server(("127.0.0.1", 0))
    closed = socket.create_server(("127.0.0.1", 0))
    closed_port = closed.getsockname()[1]
    closed.close()
    junk = http.server.HTTPServer(("127.0.0.1", 0), Junk)
    threading.Thread(target=junk.serve_forever, daemon=True).start()
    for port in (closed_port, silent.getsockname()[1], junk.server_port):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:{port}/cifar-10-python.tar.gz")
        start = time.monotonic()
        with pytest.raises(DatasetError, match="cifar10: .*put cifar-10-python.tar.gz.*--dataset shapes") as error:
            load("cifar10", 32, data_path=str(tmp_path))
        assert time.monotonic() - start < 5 and "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    junk.shutdown()
    silent.close()
    assert capsys.readouterr().out == "" and socket.getdefaulttimeout() is None


def test_too_little_memory_or_disk_is_said_beforehand(tmp_path, monkeypatch):
    for i in range(4):
        solid(tmp_path / f"{i}.png", i)
    monkeypatch.setattr(data, "free_memory", lambda: 500_000_000)
    with pytest.raises(SettingsError, match=r"image_size = 8192: .* images need .* GB of mem.*0.5 GB are free; lower"):
        load("shapes", 8192)

    free = types.SimpleNamespace(free=500_000_000)
    monkeypatch.setattr(packs.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(SettingsError, match=r"image_size = 8192: 4 images need 0.8 GB of disk, and 0.5 GB are free in"):
        load(str(tmp_path), 8192)
    free.free = 4 * 3 * 16**2 - 1
    with pytest.raises(SettingsError, match="4 images need"):
        load(str(tmp_path), 16)
    with pytest.raises(SettingsError, match="8 images need"):
        load(str(tmp_path), 16, paired_path=str(tmp_path))
    free.free = 4 * 3 * 16**2
    assert len(load(str(tmp_path), 16).train) == 3

    def none_left(*_):
        raise MemoryError
    free.free = 10**9
    monkeypatch.setattr(packs, "fit", none_left)
    with pytest.raises(SettingsError, match="image_size = 24: too little memory"):
        load(str(tmp_path), 24)


def test_free_memory_is_that_of_this_machine():
    if free := data.free_memory():
        assert 2**20 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_limit_above_the_number_of_images_is_all_of_them(tmp_path):
    for i in range(4):
        solid(tmp_path / f"{i}.png", i)
    assert len(load(str(tmp_path), 8, limit=10**20).train) == 3
    assert len(shapes.draw_shapes(5, 0, 8, 1, 10**20)[0]) == 5


@pytest.mark.parametrize("size", [0, 10**7, 10**20])
def test_a_batch_that_no_one_can_mean(size):
    with pytest.raises(SettingsError, match=f"images in a batch = {size}: allowed is 1 to 1,048,576"):
        batch_indices(10, size, 0, 0)


def test_errors_name_what_is_wrong(tmp_path):
    for dataset in ("~nobody-of-this-name/photos", "x" * 300, ""):
        with pytest.raises(DatasetError, match=f"dataset = {dataset}: is not a folder; name one, or cifar10"):
            load(dataset, 32)
    for dataset in ("cifra10", str(tmp_path / "nowhere")):
        with pytest.raises(DatasetError, match=f"{dataset}.*cifar10, fashion-mnist, celeba, shapes"):
            load(dataset, 32)
    with pytest.raises(DatasetError, match="no images"):
        load(str(tmp_path), 32)
    with pytest.raises(DatasetError, match="paired_path.*folder"):
        load("shapes", 32, paired_path=str(tmp_path))
    for wrong in ({"side": 0}, {"side": 100_000}, {"channels": 2}, {"limit": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = {next(iter(wrong.values()))}"):
            load("shapes", **{"side": 32, **wrong})


# ------------------------------------------------------------------------------------------------------------- shapes

def lens(r, s, d):
    """Area that discs of radius r and s, d apart, have in common."""
    a, b = math.acos((d * d + r * r - s * s) / (2 * d * r)), math.acos((d * d + s * s - r * r) / (2 * d * s))
    return r * r * (a - math.sin(2 * a) / 2) + s * s * (b - math.sin(2 * b) / 2)


AREAS = {
    "disc": math.pi * 0.9**2, "ring": math.pi * (0.97**2 - 0.53**2), "square": 1.56**2,
    "triangle": 3 * math.sqrt(3) * 0.55**2, "star": 5 * 1.1 * 0.48 * math.sin(math.pi / 5),
    "cross": 2 * 1.9 * 0.56 - 0.56**2, "moon": math.pi * 0.95**2 - lens(0.95, 0.78, 0.42),
    "stripes": 17.6**2 / 2, "checks": 17.6**2 / 2, "waves": None,
}


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_distances(shape):
    """The area inside is the shape's, and |grad d| = 1 near its edge but for creases: d is a distance there."""
    n, half = 1600, 8.8 if shape in ("stripes", "checks") else 1.8  # whole periods of the patterns
    y, x = torch.meshgrid(*[((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1) * half] * 2, indexing="ij")
    d, h = shapes.signed_distance(shape, x[None], y[None])[0], 2 * half / n
    if AREAS[shape]:
        assert (d < 0).double().mean() * (2 * half) ** 2 == pytest.approx(AREAS[shape], rel=5e-3)
    slope = torch.hypot(*torch.gradient(d, spacing=h))
    near = d.abs() < 0.05
    assert ((slope[near] - 1).abs() < 0.06).double().mean() > 0.9


def test_shapes_are_the_same_every_time_and_differ_by_class():
    one = load("shapes", 32, limit=60)
    torch.manual_seed(5)
    two = load("shapes", 32, limit=100)
    assert torch.equal(one.train, two.train[:60]) and torch.equal(one.test_y, two.test_y[:60])
    assert two.train_y.bincount().tolist() == [10] * 10 and len(two.classes) == 10
    both = torch.cat([two.train, two.test]).flatten(1)
    assert len(both.unique(dim=0)) == 200  # no test image is a training image
    random = torch.rand(1, 17)  # the same colours, place and textures: the class alone makes the difference
    drawn = torch.cat([shapes.paint(shape, random, 32, 3) for shape in shapes.SHAPES])
    assert (torch.cdist(drawn.flatten(1), drawn.flatten(1)) / drawn[0].numel() ** 0.5 + torch.eye(10)).min() > 0.1


def test_outline_has_its_width():
    """White ink less black shows the outline alone: it covers the annulus that its width in pixels makes."""
    random = torch.full((2, 17), 0.5)
    random[:, -1] = torch.tensor([0.4, 0.6])
    white, black = shapes.paint("disc", random, 64, 3)
    covered = ((white - black) / 2).mean(0).sum().item()
    assert covered == pytest.approx(2 * math.pi * (0.9 * 0.65 * 32) * 1.3, rel=0.03)


def test_shapes_are_antialiased_and_have_detail():
    random = torch.rand(4, 17)
    for shape in shapes.SHAPES:
        fine = shapes.paint(shape, random, 32, 3, oversample=8)
        assert (shapes.paint(shape, random, 32, 3) - fine).square().mean().sqrt() < 0.05, shape
    x = to_float(load("shapes", 32, limit=200).train)
    low = interpolate(avg_pool2d(x, 2), scale_factor=2, mode="bicubic").clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (x - low).square().mean())
    assert 15 < psnr < 26  # CIFAR-10 has 23 to 24: there is something to restore
    grey = load("shapes", 32, channels=1, limit=200).train.float()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert (grey - (to_uint8(x).float() * weights).sum(1, keepdim=True)).abs().max() <= 1.01


# ------------------------------------------------------------------------------------------------------------- batches

def test_batches_are_the_rows_asked_for():
    images = load("shapes", 16, limit=50)
    images.train_lo = 255 - images.train
    index = torch.tensor([3, 49, 3])
    x, y, lo = images.batch(index, "cpu")
    assert torch.equal(to_uint8(x), images.train[index]) and torch.equal(y, images.train_y[index])
    assert torch.allclose(lo, -x, atol=1e-6)
    x, y, lo = images.batch(index, "cpu", "test")
    assert torch.equal(to_uint8(x), images.test[index]) and torch.equal(y, images.test_y[index]) and lo is None


def test_a_set_too_large_for_the_card_stays_here(monkeypatch):
    images = load("shapes", 16, limit=10)
    size = sum(t.nbytes for t in (images.train, images.test, images.train_y, images.test_y))
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(device) or self)
    for free, stays in ((2 * size - 1, True), (2 * size, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        moved.clear()
        images.to("cuda")
        assert (not moved) == stays
