"""An exported file: the run's own samples, half its size, and nothing of its maker's disk."""
import sys

import numpy as np
import pytest
import torch

import sample
from pixels import get, photo, put
from untrained import make_run, run


def test_export_samples_the_same_bits(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path = make_run(tmp_path / "run", method="edm", sample_steps=2, task="generate")
    for name, more in ("model", ()), ("raw", ("--no-ema",)):
        assert run(path, "--export", tmp_path / f"{name}.safetensors", *more) == 0
        assert run(path, "--count", 2, "--label", 1, "--output", tmp_path / name, *more) == 0
        again = "--count", 2, "--label", "dog", "--output", tmp_path / f"{name}-again", *more
        assert run(tmp_path / f"{name}.safetensors", *again) == 0
        np.testing.assert_array_equal(get(tmp_path / f"{name}-again/grid.png"), get(tmp_path / name / "grid.png"))
    assert (get(tmp_path / "model/grid.png") != get(tmp_path / "raw/grid.png")).any()
    capsys.readouterr()
    assert run(path, "--export", tmp_path / "model.safetensors") == 2 and "exists" in capsys.readouterr().err
    assert run(tmp_path / "model.safetensors", "--count", 2, "--no-ema") == 2
    assert "averaged weights only" in capsys.readouterr().err
    assert run(tmp_path / "raw.safetensors", "--export", tmp_path / "again.safetensors") == 2
    assert "exported file already" in capsys.readouterr().err and not (tmp_path / "again.safetensors").exists()


def test_half_of_an_exported_file_is_the_weights_rounded_to_bf16(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path, files = make_run(tmp_path / "run"), [tmp_path / "whole.safetensors", tmp_path / "half.safetensors"]
    for file, more in zip(files, ((), ("--half",))):
        assert run(path, "--export", file, *more) == 0
    whole, half = (list(sample.open_model(file).net.parameters()) for file in files)
    for one, other in zip(whole, half):
        assert other.dtype == torch.float32 and torch.equal(one.bfloat16().float(), other)
    saved = files[0].stat().st_size - files[1].stat().st_size
    assert saved == pytest.approx(2 * sum(p.numel() for p in whole), abs=64)  # of the header
    assert run(path, "--count", 1, "--half") == 2 and "half = True" in capsys.readouterr().err


def test_an_exported_file_tells_no_folder_of_its_makers_disk(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    paths = dict(dataset=str(tmp_path / "data/photos"), data_path="/elsewhere/data", paired_path=None, out_dir="runs")
    path = make_run(tmp_path / "run", **paths)
    monkeypatch.chdir(tmp_path)
    assert run(path, "--export", "model.safetensors") == 0
    config = sample.open_model("model.safetensors").config
    assert run("model.safetensors", "--input", put(tmp_path / "in.png", photo(8, 8))) == 0
    folder, = (tmp_path / "runs").iterdir()  # pictures lie where runs do
    assert folder.name.startswith("restored-") and (folder / "in.png").exists()
    assert {name: getattr(config, name) for name in paths} == paths | dict(dataset="data/photos", data_path="data")


def test_export_without_the_package_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert run(make_run(tmp_path / "run"), "--export", tmp_path / "model.safetensors") == 2
    assert "pip install safetensors" in capsys.readouterr().err
