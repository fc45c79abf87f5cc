"""Whether a sampler's draws mean what they say: is the truth where they say it may be?

K draws for one damaged image are right if the truth could be one more of them. Then

    CRPS             is least (the mean over pixels of E|draw - truth| - E|draw - draw'| / 2); of a network that always
                     draws the same it is the absolute error. The fair estimate: it does not depend on K
    spread / error   sqrt((K + 1) / K) * the draws' standard deviation / the root mean square error of their mean is 1;
                     less: the draws are too sure of themselves
    ranks            the truth is as often the lowest value of a pixel among its K draws as each other rank. Unevenness:
                     the share of pixels that would have to change their rank for that
    coverage         half of the pixels lie in the central half of the draws, and 75% in the central 75%

(Gneiting and Raftery 2007; Fortin et al. 2014; Ferro 2014). Draws are clamped to [-1, 1] as pictures are. A truth that
equals some of its draws, as in a pixel that is clamped in both, counts in equal parts for all ranks that it may have.
Ranks are those of pixels that were to be made. Of an image's rank only bounds are known, (r/(K+1), (r+1)/(K+1)):
coverage counts the share of these bounds that lies in the central half.
"""
import math

import torch
from torch import Tensor

from images.pictures import psnr_of_each


def calibration_scores(draws: Tensor, truth: Tensor, to_make: Tensor) -> dict[str, Tensor]:
    """Of draws (K, B, C, H, W), K 2 or more, their truth (B, C, H, W) and the pixels to be made (B, 1, H, W): each
    image's figures, (B,) or (B, several). CRPS and errors are in levels of 255."""
    count, x = len(draws), draws.float().clamp(-1, 1)
    mean, ordered = x.mean(0), x.sort(0).values
    # sum_ij |x_i - x_j| = 2 sum_i (2 i - K - 1) x_i of the ordered draws
    weight = 2 * torch.arange(1, count + 1, device=x.device) - count - 1
    apart = 2 * torch.einsum("k,kbchw->bchw", weight.float(), ordered) / (count * (count - 1))
    crps = (x - truth).abs().mean(0) - apart / 2
    lowest, highest = (x < truth).sum(0), (x <= truth).sum(0)  # ranks that the truth may have
    rank = torch.arange(count + 1, device=x.device).view(-1, 1, 1, 1, 1)
    share = ((lowest <= rank) & (rank <= highest)) / (highest - lowest + 1) * to_make
    ranks = (share.sum((2, 3, 4)) / share.sum((0, 2, 3, 4))).T
    bounds = torch.arange(count + 2, device=x.device) / (count + 1)
    inside = [(bounds.clamp(max=0.5 + half).diff() - bounds.clamp(max=0.5 - half).diff()) * (count + 1)
              for half in (0.25, 0.375)]
    powers = [2**i for i in range(count.bit_length())]
    per_image = dict(crps=127.5 * crps, mean_error=127.5 * (mean - truth).abs(), variance=x.var(0),
                     squared_error=(mean - truth).square())
    return {name: value.flatten(1).mean(1) for name, value in per_image.items()} | dict(
        ranks=ranks, coverage=100 * ranks @ torch.stack(inside, 1),
        psnr_of_means=torch.stack([psnr_of_each(x[:n].mean(0), truth) for n in powers], 1))


def spread_skill(scores: dict[str, Tensor], draws: int) -> float:
    """Of calibration_scores of many images."""
    return math.sqrt((1 + 1 / draws) * scores["variance"].mean() / scores["squared_error"].mean().clamp(min=1e-12))


def unevenness(scores: dict[str, Tensor], draws: int) -> float:
    """Of calibration_scores of many images: how far the rank histogram is from flat, % of the pixels."""
    return 50 * (scores["ranks"].mean(0) - 1 / (draws + 1)).abs().sum().item()


def rank_plot(runs: dict[str, list[dict]]):
    """A matplotlib Figure: for each run, by its name, the rank histogram of each of its rows, where 1 is flat."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * len(runs), 2.2), layout="constrained")
    for ax, (name, rows) in zip(figure.subplots(1, len(runs), squeeze=False, sharey=True).flat, runs.items()):
        for row in rows:
            ax.stairs([len(row["ranks"]) * share for share in row["ranks"]], label=f"{row['nfe']:.4g} NFE")
        ax.axhline(1, color="k", lw=0.6, zorder=0)
        ax.set(title=name, xlabel="rank of the truth among draws", xticks=[])
        ax.legend(frameon=False)
    return figure
