"""An image of any mode is read as what it shows, and is fitted to a square as independent computations have it."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from images.files import fit, open_image
from images.pictures import to_float, to_uint8
from pixels import noise, put


@pytest.mark.parametrize("name, kind, white", [
    ("a.png", np.uint16, 65535), ("a.tif", np.uint16, 65535), ("a.tif", np.int32, 65535), ("a.tif", np.float32, 1),
    ("a.tif", np.float32, 255)])
def test_greys_of_more_than_8_bits_keep_their_values(tmp_path, name, kind, white):
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    put(tmp_path / name, (ramp * white).astype(kind))
    for channels in (1, 3):
        read = np.asarray(open_image(tmp_path / name, channels)).reshape(64, 64, channels) / 255
        assert np.abs(read - ramp[..., None]).max() < 1 / 255 and read.min() == 0 and read.max() == 1


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
    for channels in (1, 3):
        pixels = noise(16, 16, channels + 1)
        path, opaque = put(tmp_path / "a.png", pixels), pixels[..., -1:] / 255
        expected = opaque * pixels[..., :-1] + (1 - opaque) * 255
        assert np.abs(np.asarray(open_image(path, channels)).reshape(16, 16, channels) - expected).max() <= 1

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
        path = put(tmp_path / "x.png", np.ascontiguousarray(stored), exif=exif)
        np.testing.assert_array_equal(np.asarray(open_image(path)), upright, str(orientation))


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
