"""What scores images: PSNR, SSIM, LPIPS, consistency, bias; by a network's features, Frechet distances and accuracy.

SSIM needs torchmetrics, LPIPS lpips, FID torch-fidelity; the last two download weights. What is not available is left
out, with the reason. A small classifier, trained once on the data set itself and kept beside it, needs none of them: it
gives the accuracy and FD, the Frechet distance on its features, which unlike Inception's mean something at 32x32.

A Frechet distance is larger for fewer images, so only distances of equally many can be compared: samples for one half
of the images are held against the truth of the other half, both ways, and the mean is given; the floor is one half of
the truth against the other. Samples that equal the truth score the floor exactly.
"""
import hashlib
import math
import socket
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import ode_int
from images import SettingsError, data, one_line
from images.corruptions import parts
from images.files import write_atomically
from images.pictures import psnr, to_float, to_uint8
from support.machine import reseed
from trainer import Config

METRICS = ("psnr", "ssim", "lpips", "fid", "consistency", "bias", "accuracy", "frechet")


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
        if config.crop != "center":
            raise SettingsError(f"crop = {config.crop!r}: runs on random crops can't be compared yet")
        self.images = images = data.load(
            config.dataset, config.image_size, config.channels, config.data_path, config.paired_path)
        self.split = "train" if images.test is images.train else "test"
        order = data.batch_indices(len(images.test), min(count, len(images.test)), 0, 0)
        self.count, self.half, self.batches = len(order), len(order) // 2, order.split(batch_size)
        self.digest = digest(images.test[order])

        self.ssim = self.attempt("ssim", partial(load_ssim, config.image_size))
        self.lpips = self.attempt("lpips", partial(load_lpips_alex, device), "alexnet-owt-7be5be79.pth")
        inception = self.attempt("fid", partial(load_inception, device), "weights-inception-2015-12-05-6726825d.pth")
        self.features = {}  # metric -> (uint8 images -> features)
        self.classifier = self.accuracy = self.key = None

        def file(kind: str, key: str) -> str:
            return f"{cache}/{kind}-{images.name}-{config.image_size}-{key}.pt"

        if not images.classes:
            self.why |= dict.fromkeys(("accuracy", "frechet"), "the data has no classes to train a classifier on")
        elif {"accuracy", "frechet"} & set(metrics):
            reseed("classifier")
            self.classifier = net = Classifier(config.channels, len(images.classes), config.image_size)
            self.key = digest(net, net.RECIPE, epochs, images.train, images.train_y, images.test, images.test_y)
            trained = kept(file("classifier", self.key), partial(net.learn, images, epochs, device))
            net.load_state_dict(trained["weights"])
            net.to(device).eval().requires_grad_(False)
            self.accuracy = trained["accuracy"]
            self.features["frechet"] = lambda x: net.features(to_float(x))
            print(f"classifier {self.key}: {self.accuracy:.1f}% of all {len(images.test):,} test images right")
        if inception:
            self.features["fid"] = inception
        if self.half < 2:
            self.why |= dict.fromkeys(("fid", "frechet"), "it needs 4 images or more")
        self.truth = {}  # metric -> the Gaussians of the truth's two halves
        for metric in [m for m in self.features if m in metrics and m not in self.why]:
            def make():
                features = [self.extract(metric, images.test[rows].to(device)) for rows in self.batches]
                return self.halves(torch.cat(features))

            key = digest(metric, self.key if metric == "frechet" else "torch-fidelity", self.digest)
            self.truth[metric] = kept(file("statistics", key), make)

    def attempt(self, metric: str, load, weights: str | None = None):
        """load(), or None and the reason in `why`. weights: the file that it downloads unless it is there."""
        if metric not in self.metrics:
            return None
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(data.TIMEOUT)
        try:
            return load()
        except Exception as failure:  # no package, no network, a damaged file
            self.why[metric] = one_line(getattr(failure, "reason", failure))[:150]
            if weights and not isinstance(failure, ImportError):
                self.why[metric] += f"; {weights} may be put into {torch.hub.get_dir()}/checkpoints"
        finally:
            socket.setdefaulttimeout(before)

    def extract(self, metric: str, x: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) -> features (B, d) on the CPU, float64."""
        assert x.dtype == torch.uint8
        with torch.no_grad(), ode_int.full_precision(self.device.type):
            return self.features[metric](x).double().cpu()

    def halves(self, features: Tensor) -> list:
        return [gaussian(features[: self.half]), gaussian(features[self.half : 2 * self.half])]

    def left_out(self, config: Config, labels: bool) -> dict[str, str]:
        """Metrics asked for that can't be measured of such a run -> why."""
        why = dict(self.why)
        if parts(config.task) == ["generate"]:
            why |= dict.fromkeys(("psnr", "ssim", "lpips", "consistency"), "generation has no truth to be near to")
            if not labels:
                why["accuracy"] = "generation without labels has no right class"
        if "paired" in parts(config.task):
            why["consistency"] = "the damage of pairs can't be done again"
        return {metric: reason for metric, reason in why.items() if metric in self.metrics}

    @torch.no_grad()
    def __call__(self, config: Config, labels: bool, make: Callable) -> dict:
        """Of make(batch) -> (B, C, H, W): the mean of every metric over the images, and the seconds an image.

        labels: whether the network sees classes. Raises ode_int.SolverError for samples that are not finite.
        """
        left_out = self.left_out(config, labels)
        total, features = defaultdict(float), defaultdict(list)
        for number, rows in enumerate(tqdm(self.batches, desc="images", disable=None, leave=False)):
            z1, y, zlo = self.images.batch(rows, self.device, "test")

            def damaged(images, **knobs):  # the same draws for every method, and for the sample as for the truth
                reseed("damage", self.seed, number)
                damage = replace(config.damage, **knobs)
                return damage(config.task, images, y if labels else None, config.condition, zlo)

            batch = damaged(z1)
            reseed("noise", self.seed, number)
            start = self.now()
            sample = make(batch)
            score = dict(seconds=(self.now() - start) / len(rows))
            if not sample.isfinite().all():
                raise ode_int.SolverError("its samples are not finite")
            x, truth = to_uint8(sample), to_uint8(z1)
            assert x.shape == truth.shape
            score["bias"] = (x.double() - truth.double()).mean((0, 2, 3))
            if "psnr" not in left_out:
                score["psnr"] = psnr(sample, z1)
            if "consistency" not in left_out:  # `up`: of sr, that of the small images themselves
                error = damaged(to_float(x), up="nearest").zlo - damaged(z1, up="nearest").zlo
                score["consistency"] = 1e5 * (error / 2).square().mean()
            for metric, function in (("ssim", self.ssim), ("lpips", self.lpips)):
                if function and metric not in left_out:
                    score[metric] = function(x, truth)
            for metric in self.features:
                features[metric].append(self.extract(metric, x))
            if self.classifier and "accuracy" not in left_out:
                guess = self.classifier.head(features["frechet"][-1].float().to(self.device)).argmax(1)
                score["accuracy"] = 100 * (guess == y).double().mean()
            for metric, value in score.items():
                total[metric] += len(rows) / self.count * torch.as_tensor(value, dtype=torch.float64).cpu()
        total = {metric: value.tolist() for metric, value in total.items()}
        for metric, (first, second) in self.truth.items():
            one, other = self.halves(torch.cat(features[metric]))
            total[metric] = (frechet(one, second) + frechet(other, first)) / 2
        wanted = [metric for metric in METRICS if metric in self.metrics]
        return {metric: total[metric] for metric in (*wanted, "seconds") if metric in total}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def baselines(self, config: Config) -> list[dict]:
        """The damaged input, the task's classical answer if it has one, and the floor: the truth itself."""
        def damaged(batch):
            return batch.zlo

        answers = {"input": ({}, damaged)}
        if parts(config.task) == ["sr"]:
            answers = {"input": (dict(up="nearest"), damaged), "bicubic": (dict(up="bicubic"), damaged)}
        elif parts(config.task) == ["inpaint"]:
            answers["smooth fill"] = {}, lambda batch: fill(batch.zlo, 1 - batch.hole)
        elif parts(config.task) == ["generate"]:
            answers = {}
        rows = []
        for name, (knobs, make) in answers.items():
            row = dict(name=name) | self(replace(config, damage=replace(config.damage, **knobs)), False, make)
            del row["seconds"]  # no network was asked
            rows.append(row)
        floor = dict(name="floor")
        truth = self(config, True, lambda batch: batch.z1)
        if "accuracy" in truth:
            floor["accuracy"] = truth["accuracy"]
        floor |= {metric: frechet(*halves) for metric, halves in self.truth.items()}
        return [*rows, floor]


# --------------------------------------------------------------------------------------------- the project's classifier

class Classifier(nn.Module):
    """Images (B, C, side, side) in [-1, 1] -> `features` (B, 32, 64 or 128) -> `head`, logits.

    A CPU core takes a minute for an epoch of CIFAR-10.
    """

    RECIPE = dict(batch_size=128, peak=5e-3, decay=5e-3)  # images a step, largest learning rate, weight decay

    def __init__(self, channels: int, classes: int, side: int):
        super().__init__()
        levels = max(1, round(math.log2(side)) - 2)  # down to 4x4
        dims = [channels] + [32 * min(2**level, 4) for level in range(levels)]
        self.features = nn.Sequential(*map(Block, dims, dims[1:]), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(dims[-1], classes)

    def learn(self, images: data.Images, epochs: int, device) -> dict:
        """Trains on the training images, flipped at random -> its weights, and its accuracy (%) on all test images."""
        batch_size, peak, decay = self.RECIPE.values()
        self.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(self.parameters(), peak, weight_decay=decay)
        steps = -(-epochs * len(images.train) // batch_size)
        for step in tqdm(range(steps), desc="classifier", disable=None, leave=False):
            x, y, _ = images.batch(data.batch_indices(len(images.train), batch_size, 0, step), device)
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
            optimizer.param_groups[0]["lr"] = peak * min(5 * (step + 1) / steps, 1.25 * (1 - step / steps))
            optimizer.zero_grad()
            F.cross_entropy(self.head(self.features(x)), y, label_smoothing=0.1).backward()
            optimizer.step()
        self.eval()
        with torch.no_grad():
            batches = [images.batch(rows, device, "test") for rows in torch.arange(len(images.test)).split(500)]
            right = sum((self.head(self.features(x)).argmax(1) == y).sum().item() for x, y, _ in batches)
        return dict(weights=self.state_dict(), accuracy=100 * right / len(images.test))


class Block(nn.Module):
    """Halves the sides, then a residual convolution."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.halve = nn.Sequential(nn.Conv2d(dim_in, dim_out, 4, 2, 1, bias=False), nn.BatchNorm2d(dim_out), nn.ReLU())
        self.stay = nn.Sequential(nn.Conv2d(dim_out, dim_out, 3, 1, 1, bias=False), nn.BatchNorm2d(dim_out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        return x + self.stay(x)


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


def load_ssim(side: int):
    """torchmetrics' SSIM (Wang et al. 2004): a Gaussian window of 11 pixels, images mirrored at their edges."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    if side < 6:
        raise SettingsError("it needs sides of 6 pixels or more")
    # it subtracts squares: float32 is not enough
    return lambda x, truth: ssim(x.double(), truth.double(), data_range=255.0)


def load_lpips_alex(device):
    """LPIPS with AlexNet, by its authors' package. Sides under 32 are too small for it: their pixels are repeated."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in a deprecated way
        net = lpips.LPIPS(net="alex", verbose=False).to(device)

    def distance(x: Tensor, truth: Tensor) -> Tensor:
        repeat = -(-32 // min(x.shape[2:]))
        a, b = (F.interpolate(to_float(image), scale_factor=repeat) for image in (x, truth))
        assert max(a.abs().max(), b.abs().max()) <= 1  # it takes [-1, 1]
        return net(a, b).mean()

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


# ------------------------------------------------------------------------------------------------------------ the cache

def digest(*things) -> str:
    """8 hexadecimal digits of all that a kept file depends on: tensors, and what prints as what it is."""
    total = hashlib.blake2b(digest_size=4)
    for thing in things:
        total.update(thing.cpu().contiguous().numpy().tobytes() if torch.is_tensor(thing) else repr(thing).encode())
    return total.hexdigest()


def kept(path: str, make):
    """make() -> tensors and plain values, from the file that kept them the last time if it is there and whole."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # it is not there, or damaged, which shows in many ways
        value = make()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda f: torch.save(value, f))
    except (OSError, RuntimeError) as failure:  # torch.save's, on a full disk
        print(f"warning: {path} can't be written ({one_line(failure)}); the next evaluation makes it again",
              file=sys.stderr)
    return value
