"""Folders of images, alone and in pairs: what is held out, what is labelled, and what is left out and named."""
import numpy as np
import pytest
import torch

from images import DatasetError
from images.corruptions import to_full_size
from images.data import load
from images.files import fit, open_image, to_image, to_tensor
from images.folders import factor_of, hold_out
from images.pictures import to_float, to_uint8
from pixels import noise, put, solid, values

pytestmark = pytest.mark.filterwarnings("ignore")  # of the skipped images: those that matter are asserted


def everything(images) -> list[int]:
    """The values of all images, the training images first."""
    return values(images.train) + values(images.test)


# ------------------------------------------------------------------------------------------------------------- folders

def test_flat_folder_holds_out_a_tenth(tmp_path):
    for i in range(40):
        solid(tmp_path / f"im{i:02}.png", i)
    images = load(str(tmp_path), 8)
    assert sorted(everything(images)) == list(range(40))
    assert len(images.test) == 4 and values(images.train) == sorted(values(images.train))
    assert images.train_y is None and images.classes == [] and images.name == tmp_path.name
    few = load(str(tmp_path), 8, limit=6)  # evenly spread, and what was held out stays held out
    assert len(few.train) == 6 and set(values(few.train)) <= set(values(images.train))
    assert np.ptp(values(few.train)) > 25 and values(few.test) == values(images.test)
    assert everything(load(str(tmp_path), 8, limit=10**20)) == everything(images)


@pytest.mark.parametrize("n, least, most", [(1, 0, 0), (2, 1, 1), (9, 1, 3), (1000, 70, 130), (20_000, 1000, 1000)])
def test_size_of_the_hold_out(n, least, most):
    assert least <= len(hold_out([f"{i:05}.png" for i in range(n)])) <= most


def test_what_was_trained_on_is_never_held_out_later():
    """While a folder grows from one image to 12,000; and a picture stays beside its copy in another format."""
    names = [f"{i}.jpg" for i in np.random.default_rng(0).permutation(12_000)]
    trained = set()
    for n in [*range(2, 100, 7), *range(100, 12_001, 1700)]:
        held_out = hold_out(names[:n])
        assert not held_out & trained
        trained |= set(names[:n]) - held_out
    both = hold_out(names[:1000] + [name.replace("jpg", "png") for name in names[:1000]])
    assert {name[:-4] for name in both if name.endswith("jpg")} == {name[:-4] for name in both if name.endswith("png")}


def test_a_single_image_is_its_own_test(tmp_path):
    solid(tmp_path / "one.png", 7)
    with pytest.warns(UserWarning, match="hold out"):
        images = load(str(tmp_path), 8)
    assert values(images.train) == values(images.test) == [7]


@pytest.mark.parametrize("names, classes, held_out", [
    ("dog/0 cat/1 dog/deep/2 cat/3 eel/4 eel/5", "cat dog eel", None),
    ("dog/0 cat/1 stray2", "", None),  # an image outside the class folders: no label for it, so none at all
    ("only/0 only/1", "", None),
    (" ".join(f"Train/{'ab'[i % 2]}/{i}" for i in range(20)), "a b", None),  # no folder of test images
    *((f"{train}/cat/0 {train}/dog/1 {test}/dog/2 {test}/cat/3", "cat dog", [2, 3]) for train, test in (
        ("train", "test"), ("train", "val"), ("Train", "Test"), ("training", "testing"), ("TRAINING", "Validation"),
        ("train", "valid"))),
])
def test_train_and_test_folders_and_those_of_classes(tmp_path, names, classes, held_out):
    names = names.split()
    for value, name in enumerate(names):
        solid(tmp_path / f"{name}.png", value)
    images = load(str(tmp_path), 8)
    assert images.classes == classes.split() and sorted(everything(images)) == list(range(len(names)))
    assert held_out is None or sorted(values(images.test)) == held_out
    assert (images.train_y is None) == (not classes)
    if classes:
        labels = [images.classes[y] for y in images.train_y.tolist() + images.test_y.tolist()]
        assert all(label in names[value].split("/") for label, value in zip(labels, everything(images), strict=True))


def test_every_image_that_is_in_neither_split_is_named(tmp_path):
    for value, name in enumerate(["train/0", "test/1", "val/2", "extra/3", "loose"]):
        solid(tmp_path / f"{name}.png", value)
    with pytest.warns(UserWarning, match="3 images are left out, .*extra/3.png: is neither in .*loose.png.*val/2.png"):
        images = load(str(tmp_path), 8)
    assert everything(images) == [0, 1]
    named = [line.split(": is neither")[0] for line in images.left_out]
    assert named == [str(tmp_path / name) for name in ("extra/3.png", "loose.png", "val/2.png")]


def test_what_is_no_image_is_counted_and_what_is_hidden_is_not(tmp_path):
    solid(tmp_path / "1.PNG", 1)
    solid(tmp_path / ".thumbnails" / "x.png", 99)
    solid(tmp_path / "._0.png", 99)
    for name in ("notes.txt", "list.csv"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="2 files .*list.csv, notes.txt"):
        assert set(everything(load(str(tmp_path), 8))) == {1}


def test_grey_and_colour_asked_of_a_mixed_folder(tmp_path):
    put(tmp_path / "a.png", noise(9, 9, 3))
    put(tmp_path / "b.png", noise(9, 9, seed=1))
    grey, colour = load(str(tmp_path), 9, channels=1), load(str(tmp_path), 9, channels=3)
    rgb = colour.train[0].double()
    luma = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]  # ITU-R 601
    assert (grey.train[0, 0] - luma).abs().max() <= 1
    assert torch.equal(colour.test[0], grey.test[0].expand(3, 9, 9))
    np.testing.assert_array_equal(colour.train[0].permute(1, 2, 0), noise(9, 9, 3))


# -------------------------------------------------------------------------------------------------------------- pairs

def test_what_is_broken_does_not_shift_the_rest(tmp_path):
    """The rows kept move together, within one array: each clean image stays beside its damaged one and its label."""
    broken = (2, 5, 15, 21)
    for i in range(30):
        name = f"{'ab'[i % 2]}/{i:02}.png"
        solid(tmp_path / "clean" / name, i)
        solid(tmp_path / "damaged" / name, 200 - i)
        if i in broken:
            (tmp_path / "damaged" / name).write_text("no image")
    images = load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged"))
    x = everything(images)
    assert sorted(x) == [i for i in range(30) if i not in broken]
    assert values(images.train_lo) + values(images.test_lo) == [200 - v for v in x]
    assert images.train_y.tolist() + images.test_y.tolist() == [v % 2 for v in x]


@pytest.fixture
def pairs(tmp_path):
    """pairs(clean, damaged) loads two folders of pictures: names -> their value, or (value, size)."""
    def both(clean: dict, damaged: dict):
        for folder, pictures in (("clean", clean), ("damaged", damaged)):
            for name, picture in pictures.items():
                solid(tmp_path / folder / name, *(picture if isinstance(picture, tuple) else (picture,)))
        return load(str(tmp_path / "clean"), 8, paired_path=str(tmp_path / "damaged"))

    return both


def test_partners_have_the_same_name_or_one_that_differs_in_its_ending(pairs, tmp_path):
    clean = {"a.png": 0, "a.bmp": 1, "b.png": 2, "c.png": 3, "only_clean.png": 4}
    with pytest.warns(UserWarning, match="2 images are left out.*only_clean.png: has no .*only_damaged.png: has no"):
        images = pairs(clean, {"a.png": 100, "a.bmp": 101, "b.png": 102, "c.gif": 103, "only_damaged.png": 104})
    assert sorted(everything(images)) == [0, 1, 2, 3]
    assert values(images.train_lo) + values(images.test_lo) == [100 + value for value in everything(images)]
    assert [line.split(": has no partner")[0] for line in images.left_out] == [
        str(tmp_path / "clean" / "only_clean.png"), str(tmp_path / "damaged" / "only_damaged.png")]
    assert sorted(everything(load(str(tmp_path / "clean"), 8))) == [0, 1, 2, 3, 4]  # without pairs they are images


@pytest.mark.parametrize("damaged, said", [
    ({"z.png": 0}, "damaged: none of its images has the same name as one in .*clean; rename them: z"),
    ({"a.bmp": 0, "a.gif": 0}, "damaged: more than one image is called a .a.bmp, a.gif.; keep one"),
    ({}, "damaged: is not a folder"),
    ({f"{name}.png": (0, (4, 4) if name == "a" else (8, 8)) for name in "abcdef"},
     "a.png: is 4 times smaller than its partner, but .*png 2 times; make it the same number for all"),
    ({f"{name}.png": (0, (20, 8) if name in "abcd" else (8, 8)) for name in "abcdef"},
     "damaged: only [12] of 5 training images can be used; .*a.png: has 20x8 pixels, its partner 16x16"),
])
def test_pairs_that_can_not_be_used_end_in_one_line(pairs, damaged, said):
    with pytest.raises(DatasetError, match=said):
        pairs({f"{name}.png": (1, (16, 16)) for name in "abcdef"}, damaged)


def test_one_good_training_image_is_needed(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DatasetError, match="only 0 of 1 training images can be used; .*a.png"):
        load(str(tmp_path), 8)


@pytest.mark.parametrize("side", [24, 40, 64])
def test_small_damaged_images_are_enlarged_as_sample_enlarges_a_file(tmp_path, side):
    """Whether `fit` then shrinks, crops or enlarges it."""
    for i in range(3):
        put(tmp_path / "clean" / f"{i}.png", noise(60, 48, 3, seed=i))
        put(tmp_path / "damaged" / f"{i}.png", noise(20, 16, 3, seed=i))
    images = load(str(tmp_path / "clean"), side, paired_path=str(tmp_path / "damaged"))
    assert images.pair_factor == 3
    for name, seen in zip(images.train_names + images.test_names, torch.cat([images.train_lo, images.test_lo])):
        file = to_float(to_tensor(open_image(tmp_path / "damaged" / name)))[None]
        by_sample = to_tensor(fit(to_image(to_uint8(to_full_size(file, 3, "bicubic"))[0]), side))
        assert (seen.int() - by_sample.int()).abs().max() <= 2


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
