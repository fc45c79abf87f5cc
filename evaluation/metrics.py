"""Every column of the table, defined in one place: how it is measured, written and drawn; and the Frechet distance.

A new metric is an entry of TABLE: `score` or `load`, a title, a format, and an arrow if it has a better and a worse.
"""
import math
import statistics
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from images import SettingsError, one_line
from images.corruptions import Batch
from images.lpips import load_lpips, lpips_distance
from images.pictures import psnr_of_each, to_float

GROUPS = 20  # of images, which the jackknife leaves out one after the other


@dataclass
class Samples:
    """A batch of samples and all that a metric may look at."""

    sample: Tensor  # (B, C, H, W) in [-1, 1], as the sampler gave it
    z1: Tensor  # (B, C, H, W) in [-1, 1], the truth
    x: Tensor  # (B, C, H, W) uint8: the sample, rounded and clamped
    truth: Tensor  # (B, C, H, W) uint8
    again: Callable[..., Batch]  # images in [-1, 1] -> the very damage that these samples began with, done to them
    y: Tensor | None  # (B,) class labels
    guess: Tensor | None  # (B,) the classes that the classifier sees in the samples


@dataclass(frozen=True)
class Metric:
    """A column of the table. Each image is scored by `score`, or by what `load` gives, which may need a package."""

    title: str
    format: str  # of a figure
    arrow: str = ""  # ↑ more is better, ↓ less is better; none where no row is the best
    panel: str = ""  # scale of its panel of the plot, linear or log; none: not drawn
    score: Callable[[Samples], Tensor] | None = None  # -> (B,), or (B, C) by channel
    # (side of the images, device) -> a function: uint8 samples and truth (B, C, H, W) -> (B,)
    load: Callable | None = None
    weights: str = ""  # file that `load` downloads unless it is there
    features: bool = False  # the function takes images alone and gives features (B, d) for a Frechet distance
    needs_truth: bool = False  # which generation does not have
    imperfect: bool = False  # the truth itself has no perfect score: the table tells which

    @property
    def heading(self) -> str:
        return f"{self.title} {self.arrow}".strip()


def consistency(of: Samples) -> Tensor:
    """The sample damaged again against the input; `up`: of sr, that of the small images themselves."""
    error = of.again(to_float(of.x), up="nearest").zlo - of.again(of.z1, up="nearest").zlo
    return 1e5 * (error / 2).square().flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------------- single metrics

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


def without_each_group(n: int) -> list[Tensor]:
    """Masks (n,) that leave out one group of n images each: every GROUPS-th image is of the same group."""
    groups = min(GROUPS, n)
    return [torch.arange(n) % groups != g for g in range(groups)]


def mean_without(values: Tensor) -> list[float]:
    """The mean of `values` (N,) without each group of them. N: 2 or more."""
    return [values[kept].mean().item() for kept in without_each_group(len(values))]


def across_without(ours, truth) -> list[float]:
    """`across` without each group of images, for features (half, d) of ours and of the truth, each a pair of halves.

    A group leaves its share of both halves and of both sets. half: 3 or more.
    """
    return [across(*([gaussian(features[kept]) for features in pair] for pair in (ours, truth)))
            for kept in without_each_group(len(ours[0]))]


def jackknife(without: list[float]) -> float:
    """Standard error of a figure T from its values T_g without the g-th of G groups of images.

    The variance is (G - 1)/G sum_g (T_g - mean T)^2. Of a Frechet distance near that of truth against truth, where
    the true distance is 0, it is rather too large, by about the square root of 2 (Efron and Stein 1981: never too small
    on average).
    """
    return math.sqrt((len(without) - 1) * statistics.pvariance(without))


def load_ssim(side: int, device=None):
    """torchmetrics' SSIM (Wang et al. 2004) of each image: a Gaussian window of 11 pixels, mirrored at the edges."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    if side < 6:
        raise SettingsError("it needs sides of 6 pixels or more")
    # it subtracts squares: float32 is not enough
    return lambda x, truth: ssim(x.double(), truth.double(), data_range=255.0, reduction="none")


def load_lpips_alex(side: int, device):
    """LPIPS of each image with AlexNet."""
    load_lpips("alex")

    def distance(x: Tensor, truth: Tensor) -> Tensor:
        return lpips_distance(to_float(x).to(device), to_float(truth).to(device), "alex")

    return distance


def load_inception(side: int, device):
    """The FID network as torch-fidelity has it: uint8 images (B, 1 or 3, H, W) -> (B, 2048)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    return lambda x: net(x.expand(-1, 3, -1, -1))[0]


TABLE = {
    "psnr": Metric("PSNR, dB", "{:.2f}", "↑", "linear", needs_truth=True,
                   score=lambda of: psnr_of_each(of.sample, of.z1)),
    "ssim": Metric("SSIM", "{:.3f}", "↑", load=load_ssim, needs_truth=True),
    "lpips": Metric("LPIPS", "{:.3f}", "↓", "linear", load=load_lpips_alex, weights="alexnet-owt-7be5be79.pth",
                    needs_truth=True),
    "fid": Metric("FID", "{:.2f}", "↓", "log", load=load_inception, features=True, imperfect=True,
                  weights="weights-inception-2015-12-05-6726825d.pth"),
    "consistency": Metric("consistency, 1e-5", "{:.2f}", "↓", score=consistency, needs_truth=True),
    "bias": Metric("bias by channel", "{:+.1f}",
                   score=lambda of: (of.x.double() - of.truth.double()).mean((2, 3))),
    "accuracy": Metric("accuracy, %", "{:.1f}", "↑", "linear", imperfect=True,
                       score=lambda of: 100 * (of.guess == of.y).double()),
    "frechet": Metric("FD", "{:.2f}", "↓", "log", features=True, imperfect=True),  # the judge's own classifier
}
METRICS = tuple(TABLE)
DRAWN = {  # of several draws, see evaluation/calibration.py
    "crps": Metric("CRPS, levels", "{:.2f}", "↓"),
    "mean_error": Metric("absolute error of the draws' mean, levels", "{:.2f}", "↓"),
    "spread_skill": Metric("spread / error", "{:.3f}"),
    "unevenness": Metric("unevenness of ranks, %", "{:.1f}", "↓"),
    "coverage": Metric("coverage of the central 50 and 75%", "{:.1f}"),
    "psnr_of_means": Metric("PSNR of the mean of 1, 2, 4 ... draws, dB", "{:.2f}"),
    "ranks": Metric("rank histogram", ""),  # a plot of its own, and no column
}
COLUMNS = {"nfe": Metric("NFE", "{:.4g}"), **TABLE, **DRAWN,
           "fid_given": Metric("FID to the given statistics", "{:.2f}", "↓", "log", imperfect=True),
           "seconds": Metric("s/image", "{:.2g}")}
