"""Pictures that another program made of a run's held-out images, so that they stand in the same table."""
import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from images import SettingsError, data
from images.files import list_images, open_image, to_tensor, user_path


def find_pictures(folder: str, images: data.Images, rows: Tensor) -> dict[int, Path]:
    """Test image (its row) -> its picture in `folder`, for all `rows`. Raises SettingsError.

    A picture has the path of its test image below the data's folder, or the end of that path; the ending, .png say, may
    be another. Test images that are no files go by their numbers: 00000, 00001 ...
    """
    root = user_path(folder)
    there = {os.path.splitext(name)[0]: root / name for name in list_images(root)}
    found = {}
    for row in rows.tolist():
        name = images.test_names[row] if images.test_names else f"{row:05d}"
        parts = os.path.splitext(name)[0].split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts))]  # the whole path first
        picture = next((there[end] for end in ends if end in there), None)
        if picture is None:
            raise SettingsError(f"pictures = {folder!r}: it has none for the held-out image {name}; needed is one "
                                f"of the same name for each of the {len(rows):,} images measured (--count)")
        found[row] = picture
    twice = [picture for picture, times in Counter(found.values()).items() if times > 1]
    if twice:
        raise SettingsError(f"pictures = {folder!r}: {twice[0].name} is the name of several held-out images; put the "
                            "pictures into folders as the data's are")
    return found


def read_pictures(paths: list[Path], channels: int, side: int) -> Tensor:
    """(B, channels, side, side) uint8. Raises SettingsError."""
    pictures = [to_tensor(open_image(path, channels)) for path in paths]
    for path, picture in zip(paths, pictures):
        if picture.shape[1:] != (side, side):
            raise SettingsError(f"pictures: {path} has {picture.shape[2]}x{picture.shape[1]} pixels; needed are "
                                f"{side}x{side}, as the run's images have")
    return torch.stack(pictures)
