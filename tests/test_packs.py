"""Packs: the same pixels as the files', decoded once, whole or not taken; and crops that are a function of the step."""
import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from images import SettingsError, data, packs
from images.data import Feed, crop_corners, load
from images.files import fit, list_images, open_image, to_tensor
from images.folders import hold_out
from images.packs import gather_rows, map_file
from images.pictures import to_float, to_uint8
from pixels import noise, put

pytestmark = pytest.mark.filterwarnings("ignore")  # of the skipped images: those that matter are asserted


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """20 photographs of noise, each of another size, in the folders of two classes; packs are made beside them."""
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        put(tmp_path / "photos" / "ab"[i % 2] / f"r{i:02}.png", noise(16 + i, 30 - i // 2, 3, seed=i))
    return tmp_path / "photos"


@pytest.fixture
def decoded(monkeypatch) -> list:
    """The names of the files that are decoded from now on."""
    names, read = [], packs.open_image
    monkeypatch.setattr(packs, "open_image", lambda path, *_: names.append(os.path.basename(path)) or read(path, *_))
    return names


def everything(images) -> bytes:
    """Pixels and labels, to compare."""
    return b"".join(t.numpy().tobytes() for t in (images.train, images.test, images.train_y, images.test_y))


# --------------------------------------------------------------------------------------------------------------- whole

@pytest.mark.parametrize("channels", [1, 3])
def test_a_pack_holds_the_pixels_of_the_files(photos, decoded, channels):
    images = load(str(photos), 12, channels)
    names = list_images(photos)
    assert sorted(decoded) == sorted(os.path.basename(name) for name in names)
    expected = {to_tensor(fit(open_image(photos / name, channels), 12)).numpy().tobytes(): name[0] for name in names}
    found = [*zip(images.train, images.train_y), *zip(images.test, images.test_y)]
    assert {x.numpy().tobytes(): images.classes[y] for x, y in found} == expected


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux shows there what is open")
def test_the_pixels_are_on_the_disk_before_the_index_says_so(photos, monkeypatch):
    flushed, fsync = [], os.fsync

    def watched(handle):
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    load(str(photos), 12)
    assert flushed[0] == "clean.u8" and flushed[1].startswith(".index.json")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux shows there what is mapped")
def test_the_images_lie_in_the_file_and_what_is_written_to_them_does_not(photos):
    for crop in ("center", "random"):
        images = load(str(photos), 12, crop=crop)
        pixels = images.train if crop == "center" else images.train.flat
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "clean.u8" in line]
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
        assert any(begin <= pixels.data_ptr() < end for begin, end in ranges)
        before = pixels.clone()
        pixels += 1
        again = load(str(photos), 12, crop=crop).train
        assert torch.equal(again if crop == "center" else again.flat, before)


def test_a_file_larger_than_the_memory_can_be_mapped(tmp_path):
    with open(tmp_path / "large", "wb") as f:
        f.truncate(4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))  # a hole, which takes no disk
    mapped = map_file(tmp_path / "large")
    assert len(mapped) == os.path.getsize(tmp_path / "large") and mapped[-1] == 0
    rows = gather_rows(mapped[:4096 * 1000].view(1000, 1, 64, 64), torch.tensor([999, 3]))
    assert rows.shape == (2, 1, 64, 64) and not rows.any()


def test_another_way_to_the_folder_is_the_same_pack_and_other_settings_are_another(photos, decoded):
    before = everything(load(str(photos), 12))
    (photos.parent / "link").symlink_to(photos)
    for way in ("link", "photos", "./photos/"):
        decoded.clear()
        assert everything(load(way, 12)) == before and not decoded
    for other in dict(side=13), dict(channels=1), dict(limit=3), dict(crop="random"), dict(paired_path=str(photos)):
        for makes in (True, False):
            decoded.clear()
            load(str(photos), **{"side": 12, **other})
            assert bool(decoded) == makes, other
    assert len(list(Path("data/packs").iterdir())) == 6


def test_unreadable_images_stay_left_out_and_named(photos, decoded):
    for name in ("a/r02.png", "b/r07.png"):
        (photos / name).write_text("no image")
    Image.new("RGB", (301, 3)).save(photos / "b/r09.png")
    for _ in range(2):
        with pytest.warns(UserWarning, match="3 images are left out, .*a/r02.png: can't be read.*b/r07.png.*b/r09.png: "
                                             "has 301x3 pixels, more than 100 times as long as wide; crop"):
            images = load(str(photos), 12)
        named = [line.split(":")[0] for line in images.left_out]
        assert named == [str(photos / name) for name in ("a/r02.png", "b/r07.png", "b/r09.png")]
        assert len(images.train) + len(images.test) == 17
    assert len(decoded) == 20
    put(photos / "a/r02.png", noise(20, 20, 3))
    assert len(load(str(photos), 12).left_out) == 2  # mended


def test_celeba_is_packed_too(photos, decoded, monkeypatch, tmp_path):
    folder = tmp_path / "data" / "celeba" / "img_align_celeba"
    folder.parent.mkdir(parents=True)
    (photos / "a").rename(folder)

    class CelebA:
        def __init__(self, root, download, split):
            self.root = root
            self.filename = [f"r{i:02}.png" for i in range(0, 18, 2) if (i < 14) == (split == "train")]

    monkeypatch.setattr(torchvision.datasets, "CelebA", CelebA)
    (folder / "r04.png").write_text("no image")
    for crop in ("center", "random", "center"):
        images = load("celeba", 12, crop=crop)
        assert (len(images.train), len(images.test), len(images.left_out)) == (6, 2, 1)
    assert len(decoded) == 18


# --------------------------------------------------------------------------------------------------------------- stale

@pytest.mark.parametrize("change", ["content", "time", "new", "gone", "renamed", "layout"])
def test_a_stale_pack_is_made_anew(photos, decoded, change, monkeypatch):
    before = load(str(photos), 12)
    pixels, file = everything(before), photos / "a/r04.png"
    decoded.clear()
    if change in ("content", "new"):
        put(file if change == "content" else photos / "a/r99.png", noise(40, 40, 3, seed=99))
    elif change == "time":
        os.utime(file, ns=(1, 1))
    elif change == "gone":
        file.unlink()
    elif change == "renamed":
        file.rename(photos / "b/r04.png")
    else:
        monkeypatch.setattr(packs, "VERSION", packs.VERSION + 1)
    after = load(str(photos), 12)
    assert len(decoded) == {"new": 21, "gone": 19}.get(change, 20)
    assert everything(before) == pixels  # whoever still reads the old pack reads what it was
    assert (everything(after) == pixels) == (change in ("time", "layout"))
    assert len(list(Path("data/packs").iterdir())) == 1
    decoded.clear()
    assert everything(load(str(photos), 12)) == everything(after) and not decoded


@pytest.mark.parametrize("name", ["clean.u8", "damaged.u8", "shapes.npy", "index.json"])
@pytest.mark.parametrize("damage", ["longer", "shorter", "gone", "a bit"])
def test_a_pack_that_is_not_whole_is_packed_again(photos, decoded, damage, name):
    """Never are other images taken, and it ends in neither a traceback nor the system's SIGBUS."""
    how = dict(paired_path=str(photos), crop="random" if name == "shapes.npy" else "center")
    before = load(str(photos), 12, **how)
    decoded.clear()
    file, = Path("data/packs").glob(f"*/{name}")
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes({"longer": content + b"x", "shorter": content[:-1],
                          "a bit": content[:-1] + bytes([content[-1] ^ 1])}[damage])
    after, every = load(str(photos), 12, **how), torch.arange(len(before.train))
    assert len(decoded) == 40
    assert all(torch.equal(one, other) for one, other in zip(before.rows(every), after.rows(every)))


def test_a_failure_of_the_moment_is_never_stored(photos, monkeypatch):
    whole = Image.open

    def fails(path, **how):
        if str(path).endswith("r04.png"):
            raise OSError(errno.EIO, "Input/output error")
        return whole(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fails)
        with pytest.raises(SettingsError, match="r04.png: can't be read .*Input/output error.*or start again"):
            load(str(photos), 12)
    images = load(str(photos), 12)
    assert len(images.train) + len(images.test) == 20 and not images.left_out


def test_of_two_that_start_at_once_one_packs(photos, decoded, monkeypatch, capsys):
    read = packs.open_image
    monkeypatch.setattr(packs, "open_image", lambda *arguments: time.sleep(0.02) or read(*arguments))
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: everything(load(str(photos), 12)), range(2))
    assert one == other and len(decoded) == 20
    assert capsys.readouterr().out.startswith("waiting for another process that packs data/packs/photos-")


def test_a_pack_that_can_not_be_written(photos, monkeypatch):
    Path("file").touch()
    with pytest.raises(SettingsError, match="data_path = file: the pack of photos-.* can't be written .*Not a"):
        load(str(photos), 12, data_path="file")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packs, "write_atomically", full)
        with pytest.raises(SettingsError, match="data_path = data: .*No space left on device.; name a folder"):
            load(str(photos), 12)
    assert not list(Path("data").rglob("*.u8"))  # what was written gives its room back
    load(str(photos), 12)
    monkeypatch.setattr(Path, "mkdir", full)  # of a pack that is there nothing has to be written
    load(str(photos), 12)


# ------------------------------------------------------------------------------------------------------------- batches

def fed(images, steps, **how):
    feed = Feed(images, "cpu", 7, 3, **how)
    return [[t for t in feed(step) if t is not None] for step in steps]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


@pytest.mark.parametrize("crop", ["center", "random"])
def test_batches_gathered_ahead_are_the_same(photos, crop):
    images = load(str(photos), 12, paired_path=str(photos), crop=crop)
    steps = [0, 1, 2, 3, 9, 10, 4, 4, 0]  # a resumed run begins anywhere
    assert equal(fed(images, steps, ahead=3), fed(images, steps))
    assert equal(fed(images, steps[:3], ahead=2, overfit=True), fed(images, [0, 0, 0], overfit=True))
    whole = fed(images, [5])[0]
    for rank in range(3):
        assert equal([[t[rank::3] for t in whole]], fed(images, [5], rank=rank, world=3))


def test_random_crops_are_of_the_photograph_itself_and_lie_in_the_middle_of_a_test_image(photos):
    images, names = load(str(photos), 12, crop="random"), list_images(photos)
    held_out = hold_out(names)
    train, test = ([name for name in names if (name in held_out) == held] for held in (False, True))

    def crop(name, down, right):
        photo = to_tensor(open_image(photos / name))
        top, left = int(down * (photo.shape[1] - 11)), int(right * (photo.shape[2] - 11))
        return photo[:, top:top + 12, left:left + 12]

    for step in range(3):
        index, corners = data.batch_indices(len(images.train), 7, 3, step), crop_corners(7, 3, step)
        expected = [crop(train[i], *corner) for i, corner in zip(index.tolist(), corners.tolist())]
        assert torch.equal(to_uint8(fed(images, [step])[0][0]), torch.stack(expected))
    x, _, _ = images.batch(torch.arange(len(test)), "cpu", "test")
    middle = 0.5 - 1e-9  # of an odd margin the smaller half is above it
    assert torch.equal(to_uint8(x), torch.stack([crop(name, middle, middle) for name in test]))
    assert torch.equal(images.test[torch.tensor([1, 0])], to_uint8(x[[1, 0]]))
    first = images.train[data.batch_indices(len(images.train), 7, 3, 0)]
    assert torch.equal(fed(images, [8], overfit=True)[0][0], to_float(first))  # the overfitted batch too


def test_random_crops_cover_the_photograph_evenly(tmp_path):
    """Of 13x15 pixels, squares of 12 lie at 2 x 4 places: each comes equally often."""
    for i in range(2):
        row, column = np.mgrid[:13, :15]
        put(tmp_path / "one" / f"{i}.png", (10 * row + column).astype(np.uint8))
    images = load(str(tmp_path / "one"), 12, channels=1, data_path=str(tmp_path), crop="random")
    feed = Feed(images, "cpu", 400, 0)
    corners = torch.cat([to_uint8(feed(step)[0])[:, 0, 0, 0] for step in range(4)])
    values, counts = corners.unique(return_counts=True)
    assert values.tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert (counts - 200).abs().max() < 5 * 200**0.5
    here, again, later, elsewhere = (crop_corners(400, *key) for key in ((0, 3), (0, 3), (0, 4), (1, 3)))
    assert torch.equal(here, again) and not torch.equal(here, later) and not torch.equal(here, elsewhere)


@pytest.mark.parametrize("height, width, kept", [(8, 20, (12, 30)), (20, 6, (40, 12)), (12, 50, (12, 50))])
def test_small_photographs_are_enlarged_until_a_crop_fits(tmp_path, height, width, kept):
    for i in range(2):
        put(tmp_path / "small" / f"{i}.png", noise(height, width, 3))
    images = load(str(tmp_path / "small"), 12, data_path=str(tmp_path), crop="random")
    assert images.train.sizes.tolist() == [list(kept)]
    assert Feed(images, "cpu", 5, 0)(0)[0].shape == (5, 3, 12, 12)


def test_pairs_have_the_same_crop(tmp_path):
    """The damaged one is the negative, at a third of the size."""
    for i in range(6):
        clean = np.kron(noise(8, 9 + i, seed=i), np.ones((9, 9), np.uint8))
        put(tmp_path / "clean" / f"{i}.png", clean)
        put(tmp_path / "damaged" / f"{i}.png", 255 - clean[::3, ::3])
    images = load(str(tmp_path / "clean"), 32, 1, str(tmp_path), str(tmp_path / "damaged"), crop="random")
    assert images.pair_factor == 3
    feed = Feed(images, "cpu", 16, 0)
    for x, _, lo in [feed(0), feed(1), images.batch(torch.tensor([0]), "cpu", "test")]:
        assert x.shape == lo.shape
        assert np.corrcoef(x.flatten(), lo.flatten())[0, 1] < -0.9  # of two places it would be 0
