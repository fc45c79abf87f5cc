"""An image of any mode is read as what it shows, and is fitted to a square as independent computations have it."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from images import DatasetError
from images.files import fit, open_image
from images.pictures import to_float, to_uint8
from pixels import noise


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
