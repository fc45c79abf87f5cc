"""Every column of the table, defined in one place: how it is measured, written and drawn.

A new metric is an entry of TABLE: `score` or `load`, a title, a format, and an arrow if it has a better and a worse.
"""
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from images import SettingsError
from images.corruptions import Batch
from images.lpips import load_lpips, lpips_distance
from images.pictures import psnr_of_each, to_float


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
    return lambda x, truth: lpips_distance(to_float(x).to(device), to_float(truth).to(device), "alex")


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
COLUMNS = {"nfe": Metric("NFE", "{:.4g}"), **TABLE, **DRAWN,  # in the table's order
           "fid_given": Metric("FID to the given statistics", "{:.2f}", "↓", "log", imperfect=True),
           "seconds": Metric("s/image", "{:.2g}")}
