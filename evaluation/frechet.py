"""The Frechet distance of two sets of images' features, each as a Gaussian: that of samples to the truth."""
import math
import zipfile

import numpy as np
import torch
from torch import Tensor

from evaluation.errors import without_each_group
from images import SettingsError, one_line


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, d) -> their mean (d,) and a factor F (min(N, d), d) of their covariance F'F, float64."""
    features = features.double()
    mean = features.mean(0)
    return mean, torch.linalg.qr((features - mean) / math.sqrt(len(features) - 1), mode="r").R


def read_statistics(path: str, size: int) -> tuple[Tensor, Tensor]:
    """mu (d,) and sigma (d, d) of an .npz file, as ADM and clean-fid publish them for FID -> a Gaussian as `gaussian`
    gives it. Raises SettingsError for another file, or features of another `size`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (torch.from_numpy(np.asarray(file[name], np.float64)) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, AttributeError) as failure:
        raise SettingsError(f"fid_statistics = {path!r}: allowed is an .npz file of mu and sigma "
                            f"({one_line(failure)[:100]})") from None
    if mu.shape != (size,) or sigma.shape != (size, size) or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise SettingsError(f"fid_statistics = {path!r}: allowed are finite numbers, mu of {size:,} and sigma of "
                            f"{size:,} x {size:,}, and it has {tuple(mu.shape)} and {tuple(sigma.shape)}")
    squares, directions = torch.linalg.eigh(sigma)
    return mu, squares.clamp(min=0).sqrt()[:, None] * directions.T


def frechet(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the Frechet distance of two Gaussians (arXiv:1706.08500, eq. 6).

    With S = F'F, the eigenvalues of S1 S2 are the squared singular values of F1 F2': no root of a matrix that may be
    singular.
    """
    (mean1, f1), (mean2, f2) = one, other
    apart = (mean1 - mean2).square().sum() + f1.square().sum() + f2.square().sum()
    return (apart - 2 * torch.linalg.svdvals(f1 @ f2.T).sum()).item()


def across(ours, truth) -> float:
    """Each half held against the other half of the truth, both as pairs of Gaussians: the mean of the distances."""
    return (frechet(ours[0], truth[1]) + frechet(ours[1], truth[0])) / 2


def across_without(ours, truth) -> list[float]:
    """`across` without each group of images, for features (half, d) of ours and of the truth, each a pair of halves.

    A group leaves its share of both halves and of both sets. half: 3 or more.
    """
    def figure(kept):
        return across(*([gaussian(features[kept]) for features in pair] for pair in (ours, truth)))

    return without_each_group(figure, len(ours[0]))
