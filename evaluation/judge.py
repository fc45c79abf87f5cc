"""What scores images: PSNR, SSIM, LPIPS, consistency, bias; by a network's features, Frechet distances and accuracy.

SSIM needs torchmetrics, LPIPS lpips, FID torch-fidelity; the last two download weights. What is not available is left
out, with the reason. A small classifier, trained once on the data set itself and kept in a cache (see
evaluation/classifier.py), needs none of them: it gives the accuracy and FD, the Frechet distance on its features, which
unlike Inception's mean something at 32x32.

A Frechet distance is larger for fewer images, so only distances of equally many can be compared: samples for one half
of the images are held against the truth of the other half, both ways, and the mean is given. Samples that equal the
truth score exactly what one half of the truth has against the other: "truth against truth", the least there is.

Each figure has its standard error: how far it would vary with other test images, as many and of the same kind. Of a
mean over images it is their standard deviation / sqrt(n), n the number of images; of FD a jackknife. FID has none: 20
more roots of matrices of 2048 x 2048 would take minutes. Errors say nothing of another training or other noise.

All runs are measured on the same images, so a difference of two varies less than their errors suggest. Its own error
is a jackknife too (`jackknife`), of the difference. For that each figure comes with GROUPS others: what it is without
the g-th group of images, the same groups for every run.

Several processes share the images, a batch to each in turn. Batches stay whole: the figures are those of one process.
"""
import math
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import ode_int
from evaluation.classifier import Classifier, cached, digest, pieces
from images import SettingsError, data, one_line
from images.corruptions import TASKS, task_names
from images.lpips import FOREIGN, load_lpips, lpips_distance
from images.pictures import psnr_of_each, to_float, to_uint8
from support.machine import all_gather, broadcast, first_process_first, print0, processes, reseed
from trainer import Config

METRICS = ("psnr", "ssim", "lpips", "fid", "consistency", "bias", "accuracy", "frechet")
GROUPS = 20  # of images, which the jackknife leaves out one after the other


class Judge:
    """Scores samples for `count` test images of a run's data set: always the same images, damage and noise.

    metrics: names out of METRICS. epochs: of the classifier's training. cache: folder where it is kept afterwards.
    `why`: metric -> why it is not measured.
    """

    def __init__(self, config: Config, device: torch.device, metrics=METRICS, count=1000, batch_size=200, seed=0,
                 epochs=8, cache=Path("runs/cache")):
        self.device = device
        self.metrics = metrics
        self.seed = seed
        self.why = {}
        self.rank, self.world = processes()
        with first_process_first():  # which downloads or packs, if need be
            self.images = images = data.load(
                config.dataset, config.image_size, config.channels, config.data_path, config.paired_path,
                crop=config.crop)
        self.split = "train" if images.test is images.train else "test"
        order = data.batch_indices(len(images.test), min(count, len(images.test)), 0, 0)
        self.count, self.half, self.batches = len(order), len(order) // 2, order.split(batch_size)
        self.digest = digest(images.test[rows] for rows in self.batches)

        self.ssim = self.attempt("ssim", partial(load_ssim, config.image_size))
        with first_process_first():
            self.lpips = self.attempt("lpips", partial(load_lpips_alex, device), "alexnet-owt-7be5be79.pth")
            inception = self.attempt(
                "fid", partial(load_inception, device), "weights-inception-2015-12-05-6726825d.pth")
        self.features = {}  # metric -> (uint8 images -> features)
        self.classifier = self.accuracy = self.key = None

        form = str(config.image_size) if config.crop == "center" else f"{config.image_size}-{config.crop}"

        def shared(kind: str, key: str, make: Callable):
            return broadcast(partial(cached, f"{cache}/{kind}-{images.name}-{form}-{key}.pt", make))

        if not images.classes:
            self.why |= dict.fromkeys(("accuracy", "frechet"), "the data has no classes to train a classifier on")
        elif {"accuracy", "frechet"} & set(metrics):
            reseed("classifier")
            self.classifier = net = Classifier(config.channels, len(images.classes), config.image_size)
            seen = pieces(images.train), images.train_y, pieces(images.test), images.test_y
            self.key = digest(net, net.RECIPE, epochs, *seen)
            trained = shared("classifier", self.key, partial(net.learn, images, epochs, device))
            net.load_state_dict(trained["weights"])
            # channels last as in training: from the cache, and in every process, the features have the same bits
            net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
            self.accuracy = trained["accuracy"]
            self.features["frechet"] = lambda x: net.features(to_float(x))
            print0(f"classifier {self.key}: {self.accuracy:.1f}% of all {len(images.test):,} test images right")
        if inception:
            self.features["fid"] = inception
        if self.half < 2:
            self.why |= dict.fromkeys(("fid", "frechet"), "it needs 4 images or more")
        self.truth = {}  # metric -> the truth's features (count, d), float32
        for metric in [m for m in self.features if m in metrics and m not in self.why]:
            def make():
                return torch.cat([self.extract(metric, images.test[rows].to(device)) for rows in self.batches])

            key = digest(metric, self.key if metric == "frechet" else "torch-fidelity", self.digest)
            self.truth[metric] = shared("features", key, make)
        # metric -> the Gaussians of the truth's two halves
        self.gaussians = {metric: [gaussian(half) for half in self.halves(f)] for metric, f in self.truth.items()}

    def attempt(self, metric: str, load, weights: str | None = None):
        """load(), or None and the reason in `why`. weights: the file that it downloads unless it is there."""
        if metric not in self.metrics:
            return None
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(data.TIMEOUT)
        try:
            return load()
        except (SettingsError, *FOREIGN) as failure:  # no package, no network, a damaged file
            self.why[metric] = one_line(getattr(failure, "reason", failure))[:150]
            if weights and not isinstance(failure.__cause__ or failure, ImportError):
                self.why[metric] += f"; {weights} may be put into {torch.hub.get_dir()}/checkpoints"
        finally:
            socket.setdefaulttimeout(before)

    def extract(self, metric: str, x: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) -> features (B, d) on the CPU, float32."""
        assert x.dtype == torch.uint8
        with torch.no_grad(), ode_int.full_precision(self.device.type):
            return self.features[metric](x).float().cpu()

    def halves(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (count, d) of all images -> those of each half."""
        return features[: self.half], features[self.half : 2 * self.half]

    def left_out(self, config: Config, labels: bool) -> dict[str, str]:
        """Metrics asked for that can't be measured of such a run -> why."""
        why = dict(self.why)
        if task_names(config.task) == ["generate"]:
            why |= dict.fromkeys(("psnr", "ssim", "lpips", "consistency"), "generation has no truth to be near to")
            if not labels:
                why["accuracy"] = "generation without labels has no right class"
        for name in task_names(config.task):
            if not TASKS[name].repeatable:
                why["consistency"] = f"the damage of task {name} can't be done to a sample again"
        return {metric: reason for metric, reason in why.items() if metric in self.metrics}

    @torch.no_grad()
    def __call__(self, config: Config, labels: bool, make: Callable) -> dict:
        """Of make(batch) -> (B, C, H, W): the mean of every metric over the images, and the seconds an image.

        "errors": metric -> standard error, where there is one; "without": metric -> its value without each group of
        images, for metrics that have a better and a worse. labels: whether the network sees classes. All processes get
        the same. Raises ode_int.SolverError for samples that are not finite, torch.OutOfMemoryError, and
        ProcessLost.
        """
        left_out, scores, failure = self.left_out(config, labels), {}, None
        mine = range(self.rank, len(self.batches), self.world)
        try:
            for number in tqdm(mine, desc="images", disable=True if self.rank else None, leave=False):
                scores[number] = self.scores(config, labels, make, number, left_out)
        except (ode_int.SolverError, torch.OutOfMemoryError) as caught:
            failure = caught
        everyone = all_gather((scores, failure))
        for scores_there, failure in everyone:
            if failure:
                raise failure
            scores |= scores_there
        ordered = [scores[number] for number in range(len(self.batches))]
        values = {metric: torch.cat([score[metric] for score in ordered]) for metric in ordered[0]}  # (count, ...)
        found = {metric: value.mean(0).tolist() for metric, value in values.items() if metric not in self.features}
        errors, without = {}, {}
        if self.count > 1:
            errors = {metric: (values[metric].std(0) / math.sqrt(self.count)).tolist() for metric in found}
            without = {metric: mean_without(values[metric]) for metric in found if metric != "bias"}
        for metric in self.truth:
            ours = [gaussian(half) for half in self.halves(values[metric])]
            found[metric] = across(ours, self.gaussians[metric])
        if "frechet" in self.truth and self.half > 2:
            halves = self.halves(values["frechet"]), self.halves(self.truth["frechet"])
            without["frechet"] = across_without(*halves)
            errors["frechet"] = jackknife(without["frechet"])
        wanted = [metric for metric in METRICS if metric in self.metrics and metric in found]
        return {metric: found[metric] for metric in (*wanted, "seconds")} | dict(
            errors={metric: errors[metric] for metric in wanted if metric in errors},
            without={metric: without[metric] for metric in wanted if metric in without})

    def scores(self, config: Config, labels: bool, make: Callable, number: int, left_out) -> dict[str, Tensor]:
        """Of make(batch) for the batch of this number: each image's score (B,), bias (B, C) and features (B, d)."""
        rows = self.batches[number]
        z1, y, zlo = self.images.batch(rows, self.device, "test")

        def damaged(images, **knobs):  # the same draws for every method, and for the sample as for the truth
            reseed("damage", self.seed, number)
            damage = replace(config.damage, **knobs)
            return damage(config.task, images, y if labels else None, config.condition, zlo)

        batch = damaged(z1)
        reseed("noise", self.seed, number)
        start = self.now()
        sample = make(batch)
        score = dict(seconds=torch.full((len(rows),), (self.now() - start) / len(rows)))
        if not sample.isfinite().all():
            raise ode_int.SolverError("its samples are not finite")
        x, truth = to_uint8(sample), to_uint8(z1)
        assert x.shape == truth.shape
        score["bias"] = (x.double() - truth.double()).mean((2, 3))
        if "psnr" not in left_out:
            score["psnr"] = psnr_of_each(sample, z1)
        if "consistency" not in left_out:  # `up`: of sr, that of the small images themselves
            error = damaged(to_float(x), up="nearest").zlo - damaged(z1, up="nearest").zlo
            score["consistency"] = 1e5 * (error / 2).square().flatten(1).mean(1)
        for metric, function in (("ssim", self.ssim), ("lpips", self.lpips)):
            if function and metric not in left_out:
                score[metric] = function(x, truth)
        score = {metric: value.double().cpu() for metric, value in score.items()}
        for metric in self.features:
            score[metric] = self.extract(metric, x)
        if self.classifier and "accuracy" not in left_out:
            guess = self.classifier.head(score["frechet"].to(self.device)).argmax(1)
            score["accuracy"] = 100 * (guess == y).double().cpu()
        return score

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def baselines(self, config: Config) -> list[dict]:
        """The damaged input, the task's classical answer if it has one, and the truth against the truth."""
        def damaged(batch):
            return batch.zlo

        answers = {"input": ({}, damaged)}
        if task_names(config.task) == ["sr"]:
            answers = {"input": (dict(up="nearest"), damaged), "bicubic": (dict(up="bicubic"), damaged)}
        elif task_names(config.task) == ["inpaint"]:
            answers["smooth fill"] = {}, lambda batch: fill(batch.zlo, 1 - batch.unknown)
        elif task_names(config.task) == ["generate"]:
            answers = {}
        rows = []
        for name, (knobs, make) in answers.items():
            row = dict(name=name) | self(replace(config, damage=replace(config.damage, **knobs)), False, make)
            del row["seconds"]  # no network was asked
            rows.append(row)
        truth = self(config, True, lambda batch: batch.z1)
        of_features = [metric for metric in ("fid", "accuracy", "frechet") if metric in truth]
        if of_features:
            errors = {metric: truth["errors"][metric] for metric in of_features if metric in truth["errors"]}
            best = {metric: truth[metric] for metric in of_features}
            rows.append(dict(name="truth against truth", errors=errors) | best)
        return rows


# ------------------------------------------------------------------------------------------------------- single metrics

def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, d) -> their mean (d,) and a factor F (min(N, d), d) of their covariance F'F, float64."""
    features = features.double()
    mean = features.mean(0)
    return mean, torch.linalg.qr((features - mean) / math.sqrt(len(features) - 1), mode="r").R


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


def load_ssim(side: int):
    """torchmetrics' SSIM (Wang et al. 2004) of each image: a Gaussian window of 11 pixels, mirrored at the edges."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    if side < 6:
        raise SettingsError("it needs sides of 6 pixels or more")
    # it subtracts squares: float32 is not enough
    return lambda x, truth: ssim(x.double(), truth.double(), data_range=255.0, reduction="none")


def load_lpips_alex(device):
    """LPIPS of each image with AlexNet."""
    load_lpips("alex")

    def distance(x: Tensor, truth: Tensor) -> Tensor:
        return lpips_distance(to_float(x).to(device), to_float(truth).to(device), "alex")

    return distance


def load_inception(device):
    """The FID network as torch-fidelity has it: uint8 images (B, 1 or 3, H, W) -> (B, 2048)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    return lambda x: net(x.expand(-1, 3, -1, -1))[0]


def fill(x: Tensor, known: Tensor) -> Tensor:
    """x (B, C, H, W) where `known` (B, 1, H, W) is 1, elsewhere the mean of what is near.

    Near: on the finest scale that knows anything there.
    """
    if known.min() > 0 or max(x.shape[2:]) == 1:
        return x
    weight = F.avg_pool2d(known, 2, ceil_mode=True)
    mean = F.avg_pool2d(x * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = fill(mean, (weight > 0).float())
    return torch.where(known > 0, x, F.interpolate(coarse, x.shape[2:], mode="bilinear"))
