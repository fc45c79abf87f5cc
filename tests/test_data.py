"""Batches in the order that seed and step make, sets by torchvision from disk, and errors that say what to do."""
import pickle
import re
import socket
import struct
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from images import DatasetError, SettingsError, data, packs
from images.data import batch_indices, load
from images.pictures import to_uint8
from pixels import noise, solid

pytestmark = pytest.mark.filterwarnings("ignore")  # of the skipped images: those that matter are asserted


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
    for s, batch in zip(reversed(steps), reversed(first)):
        assert torch.equal(batch_indices(100, 32, 1, s), batch)
    # seed and epoch are not added up: the next seed's stream is not this one's, an epoch later
    assert not torch.equal(batch_indices(100, 100, 2, 0), batch_indices(100, 100, 1, 1))
    assert not torch.equal(batch_indices(100, 100, 2, 0), batch_indices(100, 100, 1, 0))


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


@pytest.mark.parametrize("failure, ours", [
    (RuntimeError("To download files from GDrive, 'gdown' is required."), False), (zipfile.BadZipFile("x"), False),
    (TimeoutError("x"), False), (AttributeError("x"), True), (TypeError("x"), True)])
def test_our_own_faults_are_not_told_as_failed_downloads(tmp_path, monkeypatch, failure, ours):
    def fail(*_, **__):
        raise failure
    monkeypatch.setattr(torchvision.datasets.CelebA, "download", fail)
    said = str(failure) if ours else f"celeba.*{failure}.*pip install gdown.*img_align_celeba.zip"
    with pytest.raises(type(failure) if ours else DatasetError, match=said):
        load("celeba", 32, data_path=str(tmp_path))


def test_a_new_data_set_is_one_entry(tmp_path, monkeypatch):
    class Digits:
        def __init__(self, root, download, part):
            self.data, self.targets, self.classes = noise(4 if part == "train" else 2, 32, 32, 3), [0, 1, 1, 0], "ab"

        def __len__(self):
            return len(self.data)

    monkeypatch.setattr(torchvision.datasets, "Digits", Digits, raising=False)
    entry = data.Download("Digits", "put it into {}", {"part": "train"}, {"part": "test"})
    monkeypatch.setitem(data.DOWNLOADS, "digits", entry)
    images = load("digits", 32, data_path=str(tmp_path))
    np.testing.assert_array_equal(images.train.permute(0, 2, 3, 1), noise(4, 32, 32, 3))
    assert len(images.test) == 2 and images.classes == ["a", "b"]


def test_a_download_that_fails(tmp_path, monkeypatch, capsys):
    """No server, or one that never answers, and junk on disk: one line each time, and soon."""
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"the first bytes of an archive")
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        ports = [server.getsockname()[1] for server in (closed, silent)]
        closed.close()
        for port in ports:
            monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:{port}/cifar-10-python.tar.gz")
            start = time.monotonic()
            with pytest.raises(DatasetError, match="cifar10: .*put cifar-10-python.tar.gz.*--dataset shapes") as error:
                load("cifar10", 32, data_path=str(tmp_path))
            assert time.monotonic() - start < 5 and "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert capsys.readouterr().out == "" and socket.getdefaulttimeout() is None


def test_too_little_memory_or_disk_is_said_beforehand(tmp_path, monkeypatch):
    for i in range(4):
        solid(tmp_path / f"{i}.png", i)
    monkeypatch.setattr(data, "free_memory", lambda: 500_000_000)
    with pytest.raises(SettingsError, match=r"image_size = 8192: .* images need .* GB of memory, where 0.5 GB"):
        load("shapes", 8192)

    free = types.SimpleNamespace(free=500_000_000)
    monkeypatch.setattr(packs.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(SettingsError, match=r"image_size = 8192: 4 images need 0.8 GB of disk in .*, where 0.5 GB"):
        load(str(tmp_path), 8192)
    free.free = 4 * 3 * 16**2
    assert len(load(str(tmp_path), 16).train) == 3
    with pytest.raises(SettingsError, match="8 images need"):
        load(str(tmp_path), 16, paired_path=str(tmp_path))

    def none_left(*_):
        raise MemoryError
    free.free = 10**9
    monkeypatch.setattr(packs, "fit", none_left)
    with pytest.raises(SettingsError, match="image_size = 24: too little memory"):
        load(str(tmp_path), 24)


def test_the_photographs_of_the_demo_have_their_pixels_and_licences():
    images = load("demo", 32)
    folder = Path(data.__file__).parent / "demo"
    files = sorted(folder.glob("*.png"))
    assert images.train.shape == (16, 3, 32, 32) and images.classes == []
    for row, file in zip(images.train, files, strict=True):
        assert torch.equal(row, torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
        line, = re.findall(rf"^{file.name} .*", (folder / "LICENCES.txt").read_text(), re.M)
        assert re.search("public domain|CC0 1.0|CC BY 4.0", line)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 100_000
    assert load("demo", 48, channels=1, limit=5).test.shape == (5, 1, 48, 48)


@pytest.mark.parametrize("dataset, how, words", [
    ("~nobody-of-this-name/photos", {}, "~nobody-of-this-name/photos: there is no user of this name"),
    ("x" * 300, {}, "dataset = x{300}: is not a folder; name one, or cifar10"),
    ("", {}, "dataset = : is not a folder; name one, or cifar10"),
    ("cifra10", {}, "cifra10.*cifar10, fashion-mnist, celeba, demo, shapes"),
    (".", {}, "no images"),
    ("shapes", dict(paired_path="."), "paired_path.*folder"),
    *((name, dict(crop="random", or_demo=True), f"crop = random: allowed is center for {name or 'cifar10'}")
      for name in (None, "demo", "shapes", "fashion-mnist")),
])
def test_errors_name_what_is_wrong(tmp_path, monkeypatch, dataset, how, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=words):
        load(dataset, 32, **how)


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
