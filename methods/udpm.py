"""UDPM, upsampling diffusion (Abu-Hussein and Giryes 2023, arXiv:2305.16269): a step halves the sides, then adds noise.

The paper's symbols -> ours:
    x_0                       z1, the clean image
    x_1 .. x_L                x at level 1 .. L, with 2^-level times z1's sides
    H, H^T                    shrink, enlarge: 2x2 box with taps 1/2 then stride 2, and its transpose; H H^T = I
    H^k x_0                   2^k average(z1, k): H doubles an image's values
    alpha_l, sigma_l          alphas[level - 1], sigmas[level - 1]
    alpha-bar_l, sigma-bar_l  A[level], S[level], of q(x_l | x_0)
    f_theta(x_l, l)           estimate(net, x, level, batch), the network's H^{l-1} x_0, with twice x_l's sides

The network itself works at the scale of pictures: from x_l / scale(l), the time (l - 1/2)/L and cond it
predicts average(z1, l - 1).
"""
import warnings
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import hypot, prod
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images import SettingsError
from images.corruptions import Batch
from images.lpips import load_lpips, lpips_distance
from methods import Method, keep_known, same_shape
from support.bounds import NotNegative, between, from_to_below, length, multiple_of, require
from unet import ResBlock

PAPER_LPIPS = (4.0, 4.0, 0.0)  # the paper's lpips_weight
Levels = Annotated[tuple[float, ...], between(1e-6, 10**6), length(1, 8)]
Weights = Annotated[tuple[float, ...], between(0, 10**6)]


@dataclass(frozen=True)
class UDPM(Method):
    # factor of each level on the image's values, finest level first, as in every tuple here: one number a level
    alphas: Levels = (0.5, 0.2, 1e-3)
    # standard deviation of the noise that each level adds
    sigmas: Levels = (0.1, 0.2, 0.3)
    # weight of the mean absolute error by level
    l1_weight: Weights = (1.0, 1.0, 0.0)
    # weight by level of LPIPS with VGG-16, whose weights are a download; all 0 does without. None: 4 4 0, but where the
    # package or the weights are missing a run warns, does without, and keeps to that
    lpips_weight: Weights | None = None
    # file of torchvision's vgg16 weights (.pth); None downloads them
    lpips_path: str | None = None
    # weight of the adversarial term by level; all 0 trains no discriminator
    adv_weight: Weights = (0.2, 0.5, 1.0)
    # weight by level of the squared gradient in the discriminator's loss
    grad_penalty: Weights = (0.025, 0.1, 0.4)
    # standard deviation of the noise on the images that the discriminator is shown, at first
    disc_noise: NotNegative = 0.4
    # factor on disc_noise every 1,000 steps
    disc_noise_decay: Annotated[float, between(0, 1)] = 0.99
    # channels of the discriminator's first layer, a multiple of 8; deeper layers have twice as many
    disc_channels: Annotated[int, between(8, 8192), multiple_of(8)] = 192
    # share of the discriminator's activations dropped while it learns
    disc_dropout: Annotated[float, from_to_below(0, 1)] = 0.4

    upscale = 2  # the network's output has twice its input's sides

    def __post_init__(self):
        super().__post_init__()
        for name in ("sigmas", "l1_weight", "lpips_weight", "adv_weight", "grad_penalty"):
            values = getattr(self, name)
            number = len(PAPER_LPIPS if values is None else values)
            allowed = f"{self.levels} numbers, as many as udpm.alphas has"
            require(self, name, number == self.levels, allowed, self.prefix)

    def check(self, task: str, condition: bool):
        """Raises SettingsError, one line, where LPIPS was asked for but its package or weights are missing."""
        asked = self.lpips_path is not None if self.lpips_weight is None else any(self.lpips_weight)
        if asked:
            self.load_lpips()

    def settled(self) -> "UDPM":
        if self.lpips_weight is not None:
            return self
        try:
            self.load_lpips()
        except SettingsError as missing:
            warnings.warn(f"training without UDPM's LPIPS term: {missing}")
            return replace(self, lpips_weight=(0.0,) * self.levels)
        return replace(self, lpips_weight=PAPER_LPIPS)

    def load_lpips(self):
        """Raises SettingsError, one line with what to do, where the package or the weights are missing."""
        try:
            load_lpips("vgg", self.lpips_path)
        except SettingsError as missing:
            raise SettingsError(
                f"udpm.lpips_weight: LPIPS needs `pip install lpips` and VGG-16's weights ({missing}); "
                "give --udpm.lpips-path FILE (https://download.pytorch.org/models/vgg16-397923af.pth), "
                "or --udpm.lpips-weight 0 0 0 for none") from missing

    # The diffusion. A level is a Python number, and so are its coefficients, in float64.

    @property
    def levels(self) -> int:
        return len(self.alphas)

    @cached_property
    def A(self) -> list[float]:
        """A[l] = alpha_1 .. alpha_l, and A[0] = 1."""
        return [prod(self.alphas[:level]) for level in range(self.levels + 1)]

    @cached_property
    def S(self) -> list[float]:
        """S[l]^2 = A_l^2 sum_{k <= l} sigma_k^2 / A_k^2, so that q(x_l | x_0) = N(A_l H^l x_0, S_l^2 I)."""
        ratios = [s / A for s, A in zip(self.sigmas, self.A[1:])]
        return [A * hypot(*ratios[:level]) for level, A in enumerate(self.A)]

    def scale(self, level: int) -> float:
        """An upper bound on the root mean square of x_l, reached by an image whose pixels are all -1 or all 1."""
        return hypot(2**level * self.A[level], self.S[level])

    def posterior(self, x: Tensor, clean: Tensor, level: int, noise: Tensor) -> Tensor:
        """Draws p(x_{l-1} | x_l, x_0), l >= 2, with unit `noise`; it and clean = H^{l-1} x_0 have twice x's sides.

        Cov = [(a^2/s^2) H'H + I/S_{l-1}^2]^-1,  mean = Cov [(a/s^2) H' x_l + (A_{l-1}/S_{l-1}^2) H^{l-1} x_0].
        H'H is a projection. Off its range this is the prior, N(A_{l-1} H^{l-1} x_0, S_{l-1}^2 I). On its range x_l
        updates the prior by one scalar Kalman step.
        """
        a, s, S = self.alphas[level - 1], self.sigmas[level - 1], self.S[level - 1]
        prior = self.A[level - 1] * clean
        gain = a * S**2 / (a**2 * S**2 + s**2)
        mean = prior + gain * enlarge(x - a * shrink(prior))
        std = S * s / hypot(a * S, s)  # on the range of H'H
        return mean + S * noise + (std - S) * enlarge(shrink(noise))

    def estimate(self, net, x: Tensor, level: int, batch: Batch) -> Tensor:
        """The network's H^{l-1} x_0 (B, C, 2H, 2W), given x_l (B, C, H, W)."""
        t = torch.full((len(x),), (level - 0.5) / self.levels, device=x.device)
        cond = None if batch.cond is None else F.pixel_unshuffle(average(batch.cond, level - 1), 2)
        return 2 ** (level - 1) * net(x / self.scale(level), t, batch.y, cond)

    def check_sides(self, image: Tensor):
        sides, factor = tuple(image.shape[2:]), 2**self.levels
        if any(side % factor for side in sides):
            raise SettingsError(f"image sides = {sides}: UDPM allows multiples of {factor}, 2 ** levels")

    def sample(self, net, batch: Batch, steps: int | None = None, trace: list | None = None) -> Tensor:
        """(B, C, H, W) by L network evaluations. Raises SettingsError where steps is neither None nor L.

        Its latent is the unit noise of levels L to 1, in the order drawn: with cond and y it determines the sample.
        """
        if steps not in (None, self.levels):
            raise SettingsError(f"steps = {steps}: allowed is {self.levels}, one a level")
        self.check_sides(batch.zlo)
        # A_L is so small that x_L is noise alone
        x = self.S[self.levels] * batch.randn_like(average(batch.zlo, self.levels))
        for level in range(self.levels, 0, -1):
            clean = self.estimate(net, x, level, batch)
            if trace is not None:
                views = x / self.scale(level), clean / 2 ** (level - 1)
                trace.append((1 - level / self.levels, *(F.interpolate(view, batch.zlo.shape[2:]) for view in views)))
            x = self.posterior(x, clean, level, batch.randn_like(clean)) if level > 1 else clean
        return keep_known(x, batch)

    # Training: one level a batch, drawn on the host. Predictions and images are compared at the scale of pictures.

    def noised_pair(self, net, batch: Batch) -> tuple[int, Tensor, Tensor]:
        """A level l, the network's average(z1, l - 1) from a draw of x_l, and the true one."""
        self.check_sides(batch.z1)
        level = batch.draws.one(1, self.levels + 1)
        mean = self.A[level] * 2**level * average(batch.z1, level)
        x = mean + self.S[level] * batch.randn_like(mean)
        truth = average(batch.z1, level - 1)
        return level, same_shape(self.estimate(net, x, level, batch), truth) / 2 ** (level - 1), truth

    def loss(self, net, batch: Batch, disc: "Discriminator | None" = None) -> Tensor:
        """(B,) L1 + LPIPS + softplus(-D), over the whole image: known pixels count too. `disc` gets no gradient."""
        level, guess, truth = self.noised_pair(net, batch)
        parts = {"l1": self.l1_weight[level - 1] * (guess - truth).abs().flatten(1).mean(1)}
        lpips_weight = PAPER_LPIPS if self.lpips_weight is None else self.lpips_weight
        if lpips_weight[level - 1]:
            parts["lpips"] = lpips_weight[level - 1] * lpips_distance(guess, truth, "vgg", self.lpips_path)
        if disc is not None and self.adv_weight[level - 1]:
            disc.eval().requires_grad_(False)
            logit = self.logits(disc, guess, level, batch, self.noise_std(disc))
            disc.requires_grad_(True)
            parts["adversarial"] = self.adv_weight[level - 1] * F.softplus(-logit)
        batch.notes.update(parts)
        return sum(parts.values())

    def disc_loss(self, module, batch: Batch, disc: "Discriminator", net) -> Tensor:
        """(B,) 1/2 [softplus(D(guess)) + softplus(-D(truth))] + penalty/2 |grad D(truth)|^2; net gets no gradient.
        `module` is `disc`, perhaps wrapped."""
        training = net.training
        with torch.no_grad():
            level, guess, truth = self.noised_pair(net.eval(), batch)  # its authors judge it without dropout
        net.train(training)
        module.train()
        truth.requires_grad_()
        std = self.noise_std(disc)
        on_guess, on_truth = (self.logits(module, image, level, batch, std) for image in (guess, truth))
        grad, = torch.autograd.grad(on_truth.sum(), truth, create_graph=True)
        penalty = self.grad_penalty[level - 1] / 2 * grad.square().flatten(1).sum(1)
        return (F.softplus(on_guess) + F.softplus(-on_truth)) / 2 + penalty

    def logits(self, disc, image: Tensor, level: int, batch: Batch, std) -> Tensor:
        """(B,) the discriminator's logits of the noised image, in fp32 because the penalty differentiates twice."""
        cond = None if batch.cond is None else average(batch.cond, level - 1)
        with torch.autocast(image.device.type, enabled=False):
            return disc(image + std * batch.randn_like(image), level, batch.y, cond)

    def noise_std(self, disc: "Discriminator") -> Tensor:
        """Of the noise on what the discriminator sees: it decays with the steps it has made."""
        return self.disc_noise * self.disc_noise_decay ** (disc.steps // 1000)

    def players(self, net, channels: int, num_classes: int, cond_channels: int = 0) -> list:
        """The network, and a discriminator where a level has an adversarial term."""
        if not any(self.adv_weight):
            return [(net, self.loss)]
        disc = Discriminator(channels, cond_channels, self.levels, num_classes, self.disc_channels, self.disc_dropout)
        return [(net, partial(self.loss, disc=disc)), (disc, partial(self.disc_loss, disc=disc, net=net))]

    def after_step(self, modules: list[nn.Module]):
        for disc in modules[1:]:
            disc.steps += 1


class Discriminator(nn.Module):
    """D(x, level, y, cond) -> (B,) logits: is x (B, C, any sides) a true average(z1, level - 1)?

    Residual blocks that know the level, three halvings, the minibatch's standard deviation as one more channel
    (arXiv:1710.10196), and with labels a projection on the class (arXiv:1802.05637). Unlike its authors', it has half
    the parameters, takes the spread over the whole piece of the batch, and steps after the network.
    """

    def __init__(self, channels: int, cond_channels: int, levels: int, num_classes: int, dim: int, dropout: float):
        super().__init__()
        self.cond_channels = cond_channels
        self.level = nn.Parameter(torch.randn(levels, dim))
        self.stem = nn.Conv2d(channels + cond_channels, dim, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(i, 2 * dim, dim, dropout) for i in (dim, 2 * dim, 2 * dim))
        self.last = nn.Conv2d(2 * dim + 1, 2 * dim, 3, padding=1)
        self.out = nn.Linear(2 * dim, 1)
        self.label = nn.Embedding(num_classes + 1, 2 * dim) if num_classes else None
        if num_classes:
            nn.init.zeros_(self.label.weight)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # see UDPM.noise_std

    def forward(self, x: Tensor, level: int, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        h = self.stem(torch.cat([x, cond], dim=1) if self.cond_channels else x)
        emb = self.level[level - 1].expand(len(x), -1)
        for block in self.blocks:
            h = F.avg_pool2d(block(h, emb), 2, ceil_mode=True)
        spread = (h.var(0, correction=0) + 1e-8).sqrt().mean()
        h = F.silu(self.last(torch.cat([h, spread.expand_as(h[:, :1])], dim=1))).mean((2, 3))
        logit = self.out(h).squeeze(1)
        return logit if self.label is None else logit + (self.label(y) * h).sum(1)


def shrink(x: Tensor) -> Tensor:
    """H x: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return 2 * F.avg_pool2d(x, 2)


def enlarge(x: Tensor) -> Tensor:
    """H' x: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2) / 2


def average(x: Tensor, times: int) -> Tensor:
    """H^times x / 2^times, in the range of x: (B, C, H, W) -> (B, C, H/2^times, W/2^times)."""
    return F.avg_pool2d(x, 2**times)
