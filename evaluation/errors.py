"""How sure a figure is: the mean over seeds, its error, and the error of a difference of two rows.

Runs that differ in nothing but their seed are one row and one curve, the mean over seeds. Of each figure there are

    spread    over seeds: their standard deviation; of a single seed the standard error over the test images
    error     the standard error of the mean, sqrt(spread^2 / seeds + (standard error over the test images)^2). All
              seeds are measured on the same images, so that error of theirs does not average out

The error of a difference of two rows is smaller: both see the same images. It is sqrt(spread^2 / seeds of the one + the
same of the other + (standard error of the difference over the test images)^2), the last by a jackknife.
"""
import json
import math
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics import COLUMNS
from support.settings import INCIDENTAL

GROUPS = 20  # of images, which the jackknife leaves out one after the other
SURE = 2  # errors by which a figure has to be worse than the best one to count as worse


def without_each_group(figure: Callable[[Tensor], float], n: int) -> list[float]:
    """figure(kept) without each of some groups of n images, `kept` (n,) being the mask of the others: every GROUPS-th
    image is of the same group."""
    groups = min(GROUPS, n)
    return [figure(torch.arange(n) % groups != g) for g in range(groups)]


def jackknife(without: list[float]) -> float:
    """Standard error of a figure T from its values T_g without the g-th of G groups of images.

    The variance is (G - 1)/G sum_g (T_g - mean T)^2. Of a Frechet distance near that of truth against truth, where
    the true distance is 0, it is rather too large, by about the square root of 2 (Efron and Stein 1981: never too small
    on average).
    """
    return math.sqrt((len(without) - 1) * statistics.pvariance(without))


def mean_over_seeds(results: list[dict]) -> list[dict]:
    """One result for all runs of other seeds and the same settings, with `seeds`, the list of theirs.

    Its rows have the means, and beside them `spread` and `errors`, by metric, as this file's docstring defines them;
    `measured`: of how many seeds. A seed given twice is no other seed: it stays a run of its own.
    """
    found = {}
    for result in results:
        settings = {k: v for k, v in result.get("config", {}).items() if k not in (*INCIDENTAL, "seed")}
        same = json.dumps([result[k] for k in ("method", "problem", "training")] + [settings], sort_keys=True)
        seed = result.get("config", {}).get("seed")
        key = (same, result["name"]) if seed in found.get(same, {}) else same
        found.setdefault(key, {})[seed] = result
    means = []
    for seeds in found.values():
        runs = list(seeds.values())
        rows = {}  # of one sampler
        for row in (row for run in runs for row in run["rows"]):
            rows.setdefault((row["sampler"], row.get("steps"), row["default"]), []).append(row)
        means.append(runs[0] | dict(seeds=list(seeds), rows=[mean_row(alike) for alike in rows.values()]))
    return means


def mean_row(rows: list[dict]) -> dict:
    """What one sampler made with the networks of several seeds. A seed where it failed does not count.

    "seed_errors": metric -> the part of its error that another training would change; "without": metric -> the mean
    without each group of images, where all runs have it. What has several figures, the bias say, has a list of each.
    """
    good = [row for row in rows if "failed" not in row]
    if not good:
        return rows[0]
    mean = dict(good[0], spread={}, errors={}, seed_errors={}, without={}, measured=len(good))
    for column in COLUMNS:
        values = [row[column] for row in good if row.get(column) is not None]
        if not values:
            continue
        mean[column] = plain(np.mean(values, 0))
        if column in ("nfe", "seconds"):
            continue
        over_images = [row["errors"][column] for row in good if row.get("errors", {}).get(column) is not None]
        image_error = np.mean(over_images, 0) if over_images else 0
        if len(values) > 1:
            spread = np.std(values, 0, ddof=1)
            seed_error = spread / math.sqrt(len(values))
        elif over_images:
            spread, seed_error = image_error, 0 * image_error
        else:
            continue
        mean["spread"][column], mean["seed_errors"][column] = plain(spread), plain(seed_error)
        mean["errors"][column] = plain(np.hypot(seed_error, image_error))
        without = [row.get("without", {}).get(column) for row in good]
        if all(without):
            mean["without"][column] = plain(np.mean(without, 0))
    return mean


def plain(value: np.ndarray) -> float | list[float]:
    return np.asarray(value).tolist()


def best(rows: list[dict], column: str) -> list[dict]:
    """The best row, and those that are not worse by more than SURE errors of the difference. Empty where a column has
    no better and worse, or fewer than two rows."""
    sign = {"↑": 1, "↓": -1}.get(COLUMNS[column].arrow)
    there = [row for row in rows if row.get(column) is not None]
    if sign is None or len(there) < 2:
        return []
    first = max(there, key=lambda row: sign * row[column])
    return [row for row in there
            if sign * (first[column] - row[column]) <= SURE * error_of_difference(first, row, column)]


def error_of_difference(one: dict, other: dict, column: str) -> float:
    """Of two rows of `mean_over_seeds`, as this file's docstring defines it.

    Where a row lacks its figures without each group of images, which older results do, the two count as independent.
    """
    both = [row.get("without", {}).get(column, []) for row in (one, other)]
    if not all(both) or len(both[0]) != len(both[1]):
        return math.hypot(*(row.get("errors", {}).get(column) or 0 for row in (one, other)))
    seeds = (row["seed_errors"].get(column, 0) for row in (one, other))
    return math.hypot(*seeds, jackknife([a - b for a, b in zip(*both)]))
