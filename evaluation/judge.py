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

All runs are measured on the same images, so a difference of two varies less than their errors suggest
(evaluation/errors.py). For that each figure comes with its values without each of some groups of images.

Several processes share the images, a batch to each in turn. Batches stay whole: the figures are those of one process.
"""
import math
import socket
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
from evaluation.calibration import calibration_scores, spread_skill, unevenness
from evaluation.classifier import Classifier, cached, digest, pieces
from evaluation.elsewhere import find_pictures, read_pictures
from evaluation.errors import jackknife, without_each_group
from evaluation.frechet import across, across_without, frechet, gaussian, read_statistics
from evaluation.metrics import COLUMNS, TABLE, Samples
from images import SettingsError, data, one_line
from images.corruptions import TASKS, task_names
from images.files import user_path
from images.lpips import FOREIGN
from images.pictures import to_float, to_uint8
from support.machine import all_gather, broadcast, first_process_first, print0, processes, reseed
from trainer import Config


class Judge:
    """Scores samples for `count` test images of a run's data set: always the same images, damage and noise.

    metrics: names out of TABLE. epochs: of the classifier's training. cache: folder where it is kept afterwards.
    fid_statistics: see frechet.read_statistics; FID of all samples to these is measured too, as "fid_given".
    `why`: metric -> why it is not measured.
    """

    def __init__(self, config: Config, device: torch.device, metrics=tuple(TABLE), count=1000, batch_size=200, seed=0,
                 epochs=8, cache=Path("runs/cache"), fid_statistics: str | None = None):
        self.device = device
        self.metrics = metrics
        self.seed = seed
        self.why = {}
        self.pictures = {}  # name -> {test image: file}
        self.rank, self.world = processes()
        with first_process_first():  # which downloads or packs, if need be
            self.images = images = data.load(
                config.dataset, config.image_size, config.channels, config.data_path, config.paired_path,
                crop=config.crop)
        self.split = "train" if images.test is images.train else "test"
        order = data.batch_indices(len(images.test), min(count, len(images.test)), 0, 0)
        self.count, self.half, self.batches = len(order), len(order) // 2, order.split(batch_size)
        self.digest = digest(images.test[rows] for rows in self.batches)

        self.loaded = {}  # metric -> (uint8 samples, truth -> scores)
        self.features = {}  # metric -> (uint8 images -> features)
        with first_process_first():  # which downloads weights
            for name in metrics:
                if TABLE[name].load and (function := self.attempt(name, config.image_size)):
                    (self.features if TABLE[name].features else self.loaded)[name] = function
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
        if self.half < 2:
            self.why |= dict.fromkeys(("fid", "frechet"), "it needs 4 images or more")
        self.truth = {}  # metric -> the truth's features (count, d), float32
        for metric in [m for m in self.features if m in metrics and m not in self.why]:
            def make():
                return torch.cat([self.extract(metric, images.test[rows].to(device)) for rows in self.batches])

            key = digest(metric, self.key if metric == "frechet" else "torch-fidelity", self.digest)
            self.truth[metric] = shared("features", key, make)
        self.given = None  # the Gaussian of Inception's features that all samples are held against as well
        if fid_statistics and "fid" in self.truth:
            self.given = read_statistics(fid_statistics, self.truth["fid"].shape[1])
        # metric -> the Gaussians of the truth's two halves
        self.gaussians = {metric: [gaussian(half) for half in self.halves(f)] for metric, f in self.truth.items()}

    def attempt(self, metric: str, side: int):
        """What the metric is measured with, or None and the reason in `why`."""
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(data.TIMEOUT)
        try:
            return TABLE[metric].load(side, self.device)
        except (SettingsError, *FOREIGN) as failure:  # no package, no network, a damaged file
            self.why[metric] = one_line(getattr(failure, "reason", failure))[:150]
            if TABLE[metric].weights and not isinstance(failure.__cause__ or failure, ImportError):
                self.why[metric] += f"; {TABLE[metric].weights} may be put into {torch.hub.get_dir()}/checkpoints"
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
            why |= {m: "generation has no truth to be near to" for m in TABLE if TABLE[m].needs_truth}
            if not labels:
                why["accuracy"] = "generation without labels has no right class"
        for name in task_names(config.task):
            if not TASKS[name].repeatable:
                why["consistency"] = f"the damage of task {name} can't be done to a sample again"
        return {metric: reason for metric, reason in why.items() if metric in self.metrics}

    @torch.no_grad()
    def __call__(self, config: Config, labels: bool, make: Callable, draws: int = 1) -> dict:
        """Of make(batch) -> (B, C, H, W): the mean of every metric over the images, and the seconds an image.

        "errors": metric -> standard error, where there is one; "without": metric -> its value without each group of
        images, for metrics that have a better and a worse. labels: whether the network sees classes. draws: how many
        are made of each image; of several, DRAWN is measured too. All processes get the same.

        Raises ode_int.SolverError for samples that are not finite, torch.OutOfMemoryError, and ProcessLost.
        """
        left_out, scores, failure = self.left_out(config, labels), {}, None
        mine = range(self.rank, len(self.batches), self.world)
        try:
            for number in tqdm(mine, desc="images", disable=True if self.rank else None, leave=False):
                scores[number] = self.scores(config, labels, make, number, left_out, draws)
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
            without = {metric: without_each_group(lambda kept: values[metric][kept].mean().item(), self.count)
                       for metric in found if metric in COLUMNS and COLUMNS[metric].arrow}
        if self.count > 1 and "ranks" in values:
            for metric, figure in dict(spread_skill=spread_skill, unevenness=unevenness).items():
                found[metric] = figure(values, draws)
                without[metric] = without_each_group(
                    lambda kept: figure({name: value[kept] for name, value in values.items()}, draws), self.count)
                errors[metric] = jackknife(without[metric])
        for metric in self.truth:
            ours = [gaussian(half) for half in self.halves(values[metric])]
            found[metric] = across(ours, self.gaussians[metric])
        if self.given:
            found["fid_given"] = frechet(gaussian(values["fid"]), self.given)
        if "frechet" in self.truth and self.half > 2:
            without["frechet"] = across_without(self.halves(values["frechet"]), self.halves(self.truth["frechet"]))
            errors["frechet"] = jackknife(without["frechet"])
        seconds = found.pop("seconds")
        found = {metric: found[metric] for metric in COLUMNS if metric in found}
        return found | dict(
            seconds=seconds, errors={metric: errors[metric] for metric in found if metric in errors},
            without={metric: without[metric] for metric in found if metric in without})

    def scores(self, config: Config, labels: bool, make: Callable, number: int, left_out,
               draws: int) -> dict[str, Tensor]:
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
        score |= {metric: self.extract(metric, x) for metric in self.features}
        guess = None
        if self.classifier:
            guess = self.classifier.head(score["frechet"].to(self.device)).argmax(1)
        of = Samples(sample, z1, x, truth, damaged, y, guess)
        for metric in set(self.metrics) - left_out.keys() - self.features.keys():
            value = self.loaded[metric](x, truth) if metric in self.loaded else TABLE[metric].score(of)
            score[metric] = value.double().cpu()
        if draws > 1 and task_names(config.task) != ["generate"]:  # which has no truth
            several = [sample]
            for draw in range(1, draws):
                reseed("noise", self.seed, number, draw)
                several.append(make(batch))
            score |= {metric: value.double().cpu() for metric, value in
                      calibration_scores(torch.stack(several), z1, batch.to_make).items()}
        return score

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def take_pictures(self, folders: tuple[str, ...], config: Config):
        """Pictures made elsewhere, a folder each, are baselines from now on. Raises SettingsError."""
        for folder in folders:
            paths = find_pictures(folder, self.images, torch.cat(self.batches))
            read_pictures(list(paths.values()), config.channels, config.image_size)  # what is wrong shows now
            self.pictures[user_path(folder).resolve().name] = paths

    def baselines(self, config: Config) -> list[dict]:
        """The damaged input, the task's classical answer if it has one, pictures made elsewhere, and the truth against
        the truth."""
        def elsewhere(paths: dict):
            mine = iter(self.batches[self.rank::self.world])

            def make(batch):
                files = [paths[row] for row in next(mine).tolist()]
                return to_float(read_pictures(files, config.channels, config.image_size).to(self.device))

            return {}, make

        def damaged(batch):
            return batch.zlo

        answers = {"input": ({}, damaged)}
        if task_names(config.task) == ["sr"]:
            answers = {"input": (dict(up="nearest"), damaged), "bicubic": (dict(up="bicubic"), damaged)}
        elif task_names(config.task) == ["inpaint"]:
            answers["smooth fill"] = {}, lambda batch: fill(batch.zlo, 1 - batch.unknown)
        elif task_names(config.task) == ["generate"]:
            answers = {}
        answers |= {name: elsewhere(paths) for name, paths in self.pictures.items()}
        rows = []
        for name, (knobs, make) in answers.items():
            row = dict(name=name) | self(replace(config, damage=replace(config.damage, **knobs)), False, make)
            del row["seconds"]  # no network was asked
            rows.append(row)
        truth = self(config, True, lambda batch: batch.z1)
        imperfect = [metric for metric in truth if metric in COLUMNS and COLUMNS[metric].imperfect]
        if imperfect:
            errors = {metric: truth["errors"][metric] for metric in imperfect if metric in truth["errors"]}
            best = {metric: truth[metric] for metric in imperfect}
            rows.append(dict(name="truth against truth", errors=errors) | best)
        return rows


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
