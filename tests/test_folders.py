"""Folders of images, alone and in pairs: what is held out, what is labelled, and what is left out and named."""
import numpy as np
import pytest
import torch
from PIL import Image

from images import DatasetError
from images.corruptions import to_full_size
from images.data import load
from images.files import fit, open_image, to_image, to_tensor
from images.folders import factor_of, hold_out
from images.pictures import to_float, to_uint8
from pixels import noise, solid, values

pytestmark = pytest.mark.filterwarnings("ignore")  # of the skipped images: those that matter are asserted


# ------------------------------------------------------------------------------------------------------------- folders

def test_flat_folder_holds_out_a_tenth(tmp_path):
    for i in range(40):
        solid(tmp_path / f"im{i:02}.png", i)
    images = load(str(tmp_path), 8)
    assert sorted(values(images.train) + values(images.test)) == list(range(40))
    assert len(images.test) == 4 and values(images.train) == sorted(values(images.train))
    assert images.train_y is None and images.classes == [] and images.name == tmp_path.name
    few = load(str(tmp_path), 8, limit=6)  # evenly spread, and what was held out stays held out
    assert len(few.train) == 6 and set(values(few.train)) <= set(values(images.train))
    assert np.ptp(values(few.train)) > 25 and values(few.test) == values(images.test)


@pytest.mark.parametrize("n, least, most", [(1, 0, 0), (2, 1, 1), (9, 1, 3), (1000, 70, 130), (10_500, 900, 1000),
                                            (20_000, 1000, 1000)])
def test_size_of_the_hold_out(n, least, most):
    assert least <= len(hold_out([f"{i:05}.png" for i in range(n)])) <= most


def test_what_was_trained_on_is_never_held_out_later():
    """While a folder grows from one image to 12,000; and a picture stays beside its copy in another format."""
    names = [f"{i}.jpg" for i in np.random.default_rng(0).permutation(12_000)]
    trained = set()
    for n in [*range(1, 100), *range(100, 12_001, 700)]:
        held_out = hold_out(names[:n])
        assert not held_out & trained
        if n > 1:
            trained |= set(names[:n]) - held_out
    copies = [name.replace("jpg", "png") for name in names[:1000]]
    both = hold_out(names[:1000] + copies)
    assert {name[:-4] for name in both if name.endswith("jpg")} == {name[:-4] for name in both if name.endswith("png")}


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


@pytest.mark.parametrize("train, held_out", [
    ("train", "test"), ("train", "val"), ("Train", "Test"), ("training", "testing"), ("TRAINING", "Validation"),
    ("train", "valid")])
def test_train_and_test_folders(tmp_path, train, held_out):
    names = [f"{train}/cat/0", f"{train}/dog/1", f"{train}/dog/2", f"{held_out}/dog/3", f"{held_out}/cat/4"]
    for value, name in enumerate(names):
        solid(tmp_path / f"{name}.png", value)
    images = load(str(tmp_path), 8)
    assert values(images.train) == [0, 1, 2] and sorted(values(images.test)) == [3, 4]
    assert images.classes == ["cat", "dog"] and images.train_y.tolist() == [0, 1, 1]
    assert images.test_y.tolist() == [{3: 1, 4: 0}[v] for v in values(images.test)]


def test_every_image_that_is_in_neither_split_is_named(tmp_path):
    for value, name in enumerate(["train/0", "test/1", "val/2", "extra/3", "loose"]):
        solid(tmp_path / f"{name}.png", value)
    with pytest.warns(UserWarning, match="3 images are left out, .*extra/3.png: is neither in .*loose.png.*val/2.png"):
        images = load(str(tmp_path), 8)
    assert values(images.train) == [0] and values(images.test) == [1]
    named = [line.split(": is neither")[0] for line in images.left_out]
    assert named == [str(tmp_path / name) for name in ("extra/3.png", "loose.png", "val/2.png")]


def test_train_folder_alone_holds_the_classes(tmp_path):
    for i in range(20):
        solid(tmp_path / "Train" / "ab"[i % 2] / f"{i}.png", i)
    images = load(str(tmp_path), 8)
    assert images.classes == ["a", "b"] and len(images.train) + len(images.test) == 20
    assert images.train_y.tolist() == [v % 2 for v in values(images.train)]


def test_one_good_training_image_is_needed(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DatasetError, match="none of the 1 training images can be read; .*a.png"):
        load(str(tmp_path), 8)


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


# -------------------------------------------------------------------------------------------------------------- pairs

def test_missing_partners_are_named(tmp_path):
    for name in ("a", "b", "c", "only_clean"):
        solid(tmp_path / "clean" / f"{name}.png", 10 + ord(name[0]))
    for name in ("a", "b", "c", "only_damaged"):
        solid(tmp_path / "damaged" / f"{name}.png", ord(name[0]))
    with pytest.warns(UserWarning, match="2 images are left out.*only_clean.png: has no .*only_damaged.png: has no"):
        images = load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged"))
    x, lo = torch.cat([images.train, images.test]), torch.cat([images.train_lo, images.test_lo])
    assert sorted(values(x)) == [107, 108, 109] and [v - 10 for v in values(x)] == values(lo)
    assert [line.split(": has no partner")[0] for line in images.left_out] == [
        str(tmp_path / "clean" / "only_clean.png"), str(tmp_path / "damaged" / "only_damaged.png")]

    solid(tmp_path / "damaged" / "a.png", 97, size=(8, 20))  # of another shape: the picture of something else
    with pytest.warns(UserWarning, match="a.png: has 8x20 pixels"):
        images = load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged"))
    assert sorted(values(torch.cat([images.train, images.test]))) == [108, 109]

    solid(tmp_path / "other" / "z.png", 0)
    with pytest.raises(DatasetError, match="same name"):
        load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "other"))
    for ending in ("bmp", "gif"):
        solid(tmp_path / "damaged" / f"only_clean.{ending}", 0)
    with pytest.raises(DatasetError, match="more than one .* only_clean"):
        load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged"))
    with pytest.raises(DatasetError, match="nowhere"):
        load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("paired", [False, True])
def test_an_image_beside_one_of_its_name_with_another_ending(tmp_path, paired):
    for i, name in enumerate(("a.png", "a.bmp", "b.png", "c.png")):
        solid(tmp_path / "clean" / name, i)
        solid(tmp_path / "damaged" / name, 100 + i)
    images = load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged") if paired else None)
    x = values(images.train) + values(images.test)
    assert sorted(x) == [0, 1, 2, 3]
    assert not paired or values(images.train_lo) + values(images.test_lo) == [100 + value for value in x]


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
def test_small_damaged_images_are_enlarged_as_sample_enlarges_a_file(tmp_path, side):
    """Whether `fit` then shrinks, crops or enlarges it."""
    (tmp_path / "clean").mkdir()
    (tmp_path / "damaged").mkdir()
    for i in range(3):
        Image.fromarray(noise(60, 48, 3, seed=i)).save(tmp_path / "clean" / f"{i}.png")
        Image.fromarray(noise(20, 16, 3, seed=i)).save(tmp_path / "damaged" / f"{i}.png")
    images = load(str(tmp_path / "clean"), side, paired_path=str(tmp_path / "damaged"))
    assert images.pair_factor == 3
    seen = torch.cat([images.train_lo, images.test_lo])
    by_sample = []
    for i in range(3):
        file = to_float(to_tensor(open_image(tmp_path / "damaged" / f"{i}.png")))[None]
        by_sample.append(to_tensor(fit(to_image(to_uint8(to_full_size(file, 3, "bicubic"))[0]), side)))
    difference = (seen[:, None].int() - torch.stack(by_sample).int()).abs().amax((2, 3, 4))  # of each to each
    assert difference.min(1).values.max() <= 2


@pytest.mark.parametrize("clean, damaged, factor", [
    ((8, 12), (8, 12), 1), ((80, 120), (20, 30), 4), ((400, 40), (100, 10), 4),
    ((101, 67), (50, 33), 2), ((67, 101), (34, 51), 2),  # rounded down, rounded up
    ((9, 15), (6, 10), None), ((100, 60), (40, 24), None), ((8, 8), (16, 16), None), ((40, 27), (40, 26), None),
    ((8, 8), (8, 20), None),
])
def test_how_many_times_smaller_a_damaged_image_is(clean, damaged, factor):
    if factor:
        assert factor_of(clean, damaged, "b.png") == factor
    else:
        said = "b.png: has {}x{} pixels, its partner {}x{}; make it as large, or a whole".format(*damaged, *clean)
        with pytest.raises(DatasetError, match=said):
            factor_of(clean, damaged, "b.png")


def test_pairs_of_different_factors_are_refused(tmp_path):
    for i in range(4):
        solid(tmp_path / "clean" / f"{i}.png", i, size=(16, 16))
        solid(tmp_path / "damaged" / f"{i}.png", i, size=(8, 8) if i else (4, 4))
    with pytest.raises(DatasetError, match="0.png: is 4 times smaller than its partner, but .*png 2 times; make it"):
        load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged"))
