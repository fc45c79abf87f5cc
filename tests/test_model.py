"""A trained run in a user's own Python, as docs/sampling.md shows it; and runs made before the files moved."""
import json
import lzma
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import trainer
from images import SettingsError
from images.pictures import to_float, to_uint8
from pixels import get, photo, put
from runs import start
from sample import open_model
from untrained import make_run

HERE = Path(__file__).parent


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    make_run(tmp_path / "runs/NAME", identity=True)
    put(tmp_path / "photo.png", photo(9, 14)), put(tmp_path / "small.png", photo(5, 5))
    monkeypatch.chdir(tmp_path)
    code, = re.findall(r"```python\n(.*?)```", (HERE.parent / "docs/sampling.md").read_text(), re.S)
    exec(code, {})
    np.testing.assert_array_equal(get(tmp_path / "restored.png"), photo(9, 14).repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(get(tmp_path / "mean.png"), photo(5, 5).repeat(2, 0).repeat(2, 1))  # of the last one


def test_a_tensor_in_a_tensor_out(tmp_path):
    model = open_model(make_run(tmp_path / "run", identity=True))
    zlo = to_float(torch.from_numpy(photo(6, 4)).permute(2, 0, 1))[None]
    made = model.restore(torch.cat([zlo, -zlo]))
    assert made.dtype == torch.float32 and made.shape == (2, 3, 8, 12)
    torch.testing.assert_close(made[:1], zlo.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(made[1], -made[0])


@pytest.mark.parametrize("argument, allowed", [
    (dict(solver="x"), "dopri5"), (dict(batch_size=0), "from 1"), (dict(precision="x"), "bf16"),
    (dict(tile=1.5), "from 0"), (dict(tolerance=float("nan")), "above 0"), (dict(steps=-1), "from 1"),
    (dict(guidance=float("inf")), "finite")])
def test_arguments_that_no_model_takes_are_refused_in_one_line(tmp_path, argument, allowed):
    (name, value), = argument.items()
    with pytest.raises(SettingsError, match=f"^{name} = {value!r}: allowed is [^\n]*{allowed}[^\n]*$"):
        open_model(make_run(tmp_path / "run"), **argument)


def test_tensors_that_are_no_images_are_refused_in_one_line(tmp_path):
    model, zlo = open_model(make_run(tmp_path / "run", identity=True)), torch.zeros(2, 3, 8, 8)
    for wrong, words in ((zlo[0], "shape"), (zlo[:, :1], "shape"), (zlo[:0], "shape"), (zlo.byte(), "uint8"),
                         (zlo.to(torch.complex64), "complex64"), (zlo + 1.01, "values are from 1.01"),
                         (zlo / 0, "nan"), (zlo.numpy(), "ndarray"), (None, "NoneType")):
        with pytest.raises(SettingsError, match=f"^image[^\n]*{words}[^\n]*: allowed [^\n]*$"):
            model.restore(wrong)
    with pytest.raises(SettingsError, match="^mask: "):
        open_model(make_run(tmp_path / "hole", task="inpaint")).restore(zlo, mask=zlo[0])


def test_restored_tensors_are_within_their_range(tmp_path):
    model = open_model(make_run(tmp_path / "run", solver="euler", sample_steps=1))
    made = model.restore(torch.rand(4, 3, 8, 8) * 2 - 1)
    assert made.abs().max() == 1  # its noise went further


def test_draws_of_images_of_several_sizes_in_batches(tmp_path):
    model, sizes = open_model(make_run(tmp_path / "run", method="edm", sample_steps=2), batch_size=16), []
    model.net.register_forward_pre_hook(lambda net, inputs: sizes.append(tuple(inputs[0].shape)))
    images = [Image.fromarray(photo(w, h, seed=w)) for w, h in ((6, 4), (8, 8), (4, 6), (6, 4))]
    made = model.restore(images, draws=3, seed=5)
    assert [shape[0] for shape in sizes[::3]] == [6, 3, 3]  # by size, the two of one size together; 3 calls a batch
    for image, (draws, mean, std) in zip(images, made):
        levels = np.stack([pixels(each) for each in draws]).astype(float)
        assert levels.shape == (3, 2 * image.height, 2 * image.width, 3) and (levels[0] != levels[1]).mean() > 0.3
        assert abs(pixels(mean) - levels.mean(0)).max() <= 0.5
        np.testing.assert_allclose(std, np.sqrt(levels.var(0, ddof=1).mean(-1)), rtol=1e-4)
        assert abs(pixels(model.restore(image, seed=5)).astype(int) - levels[0]).max() <= 1  # the first is the only one
    one, = model.restore(images[:1], draws=1)
    assert len(one.draws) == 1 and (one.std == 0).all()
    with pytest.raises(SettingsError, match="^draws = 0: allowed is"):
        model.restore(images, draws=0)


def test_draws_of_tensors(tmp_path):
    model = open_model(make_run(tmp_path / "run", method="edm", sample_steps=2))
    zlo = torch.rand(2, 3, 4, 5) * 2 - 1
    draws, mean, std = model.restore(zlo, draws=4)
    assert draws.shape == (4, 2, 3, 8, 10) and mean.shape == (2, 3, 8, 10) and std.shape == (2, 1, 8, 10)
    torch.testing.assert_close(mean, draws.mean(0))
    torch.testing.assert_close(std[:, 0], draws.var(0).mean(1).sqrt())
    torch.testing.assert_close(draws[0], model.restore(zlo), rtol=0, atol=1e-4)
    assert (draws[0, 0] - draws[0, 1]).abs().max() > 0.1 and (draws[0] - draws[1]).abs().max() > 0.1


def test_the_seed_and_the_label_decide_and_nothing_else(tmp_path):
    path = make_run(tmp_path / "run", method="edm", sample_steps=2)
    low, first = Image.fromarray(photo(8, 8)), open_model(path)
    once = pixels(first.restore(low, seed=1, label="dog"))
    np.testing.assert_array_equal(once, pixels(open_model(path).restore(low, seed=1, label=1)))
    assert (once != pixels(first.restore(low, seed=2, label="dog"))).any()
    assert (once != pixels(first.restore(low, seed=1, label="cat"))).any()
    with pytest.raises(SettingsError, match="label = 'bird'"):
        first.restore(low, label="bird")


def test_grey_transparent_and_turned_images_are_read_as_from_files(tmp_path):
    model = open_model(make_run(tmp_path / "run", identity=True))
    grey = Image.fromarray(photo(5, 5, 1))
    np.testing.assert_array_equal(pixels(model.restore(grey))[::2, ::2], np.stack([pixels(grey)] * 3, 2))
    clear = Image.fromarray(np.dstack([photo(5, 5), np.zeros((5, 5), np.uint8)]))
    assert (pixels(model.restore(clear)) == 255).all()  # over white


def test_inpainting_by_mask_and_by_transparency(tmp_path):
    model, rgb = open_model(make_run(tmp_path / "run", method="edm", sample_steps=2, task="inpaint")), photo(8, 8)
    hole = np.zeros((8, 8), bool)
    hole[2:5] = True
    mask = Image.fromarray(np.where(hole, 128, 127).astype(np.uint8))  # the edge of a brush is grey
    by_mask = pixels(model.restore(Image.fromarray(rgb), mask=mask))
    alpha = np.where(hole, 254, 255).astype(np.uint8)  # what is a little transparent has white in it
    by_alpha = pixels(model.restore(Image.fromarray(np.dstack([rgb, alpha]))))
    np.testing.assert_array_equal(by_mask, by_alpha)
    np.testing.assert_array_equal(by_mask[~hole], rgb[~hole])
    assert (by_mask[hole] != rgb[hole]).any(-1).mean() > 0.9
    with pytest.raises(SettingsError, match="mask: its sides"):
        model.restore(Image.fromarray(rgb), mask=mask.crop((0, 0, 8, 4)))


def test_generation_of_n_images_of_a_label(tmp_path):
    model = open_model(make_run(tmp_path / "run", method="edm", task="generate", sample_steps=2), batch_size=2)
    cats = model.generate(3, label="cat")
    assert [image.size for image in cats] == [(16, 16)] * 3
    assert len({image.tobytes() for image in cats}) == 3
    few = model.generate(2, label="cat")  # an image depends on the seed and its number, not on how many there are
    assert [image.tobytes() for image in few] == [image.tobytes() for image in cats[:2]]
    with pytest.raises(SettingsError, match="use generate"):
        model.restore(cats[0])
    with pytest.raises(SettingsError, match="use restore"):
        open_model(make_run(tmp_path / "other")).generate()


def test_no_tile_cuts_a_block_of_jpeg_colours(tmp_path):
    model, corners = open_model(make_run(tmp_path / "run", task="jpeg", unet_use_classes=False)), []
    model.net.register_forward_pre_hook(lambda net, inputs: corners.extend(to_uint8(inputs[3])[:, :2, 0, 0].tolist()))
    x, y = np.meshgrid(np.arange(90), np.arange(70))
    model.restore(Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8)))  # each pixel's colour says where it is
    assert {0, 32} < {x for x, _ in corners} and not any(x % 16 or y % 16 for x, y in corners)


# runs of an earlier version: tests/before holds a checkpoint and an exported file that it wrote after two steps

@pytest.fixture
def before(tmp_path) -> Path:
    folder = tmp_path / "before"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/last.pt").write_bytes(lzma.decompress((HERE / "before/last.pt.xz").read_bytes()))
    config = torch.load(folder / "checkpoints/last.pt", weights_only=True)["config"]
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(HERE / "before/exported.safetensors", folder)
    return folder


def test_an_old_checkpoint_is_resumed(before):
    old = torch.load(before / "checkpoints/last.pt", weights_only=True)
    assert trainer.main(["--resume", str(before), "--max-steps", "4"]) == 0
    new = torch.load(before / "checkpoints/last.pt", weights_only=True)
    moved = [sum((after[name] - weight).abs().sum().item() for name, weight in weights.items())
             for after, weights in ((new["players"][0], old["players"][0]), (new["ema"], old["ema"]))]
    assert new["step"] == 4 and moved == pytest.approx([18.53, 16.85], rel=0.02)  # without Adam's moments: 27.7, 22.8


def test_old_files_restore_the_same_picture(before):
    low = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    put(before / "in.png", low)
    for path in (before, before / "exported.safetensors"):
        if path.suffix:
            pytest.importorskip("safetensors")
        out = before / f"out{path.suffix}"
        flags = "--input", before / "in.png", "--output", out, "--precision", "fp32"
        assert sample.main([str(argument) for argument in (path, *flags)]) == 0
        corner = get(out / "in.png")[0, :4].astype(int)  # as it came out then
        assert abs(corner - [[255, 0, 177], [255, 215, 255], [131, 4, 255], [54, 71, 165]]).max() <= 1


def test_every_way_to_name_a_run_gives_the_same_model(tmp_path):
    pytest.importorskip("safetensors")
    run = start(tmp_path / "runs", "--max-steps 1 --precision fp32")
    assert sample.main([str(run), "--export", str(tmp_path / "model.safetensors")]) == 0
    low = Image.fromarray(photo(8, 8))
    first, *others = (pixels(open_model(path).restore(low)) for path in
                      (run, run / "checkpoints/last.pt", tmp_path / "model.safetensors"))
    for other in others:
        np.testing.assert_array_equal(first, other)
