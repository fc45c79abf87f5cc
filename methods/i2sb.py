"""I2SB (Liu et al. 2023, arXiv:2302.05872): a Brownian bridge from the damaged image to the clean one.

The paper's symbols -> ours:
    X_0                      z1, the clean image
    X_1                      damaged = zlo + unknown * noise, one noise for the whole bridge
    X_t                      zt, at one of the times k = 0 (clean) .. n (damaged)
    beta_t                   beta_1 .. beta_n, the variance of each of the n intervals
    sigma_t^2                s2 = beta_1 + .. + beta_k, the variance between clean and zt
    sigma-bar_t^2            r2 = total - s2, the variance between zt and damaged
    eps(X_t, t; theta)       net(zt, k/n, y, cond), which predicts (zt - z1) / sqrt(s2)
    t (0 = clean)            t = r2 / total (1 = data): the bridge's mean is then t z1 + (1 - t) damaged
"""
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor

from images import SettingsError
from images.corruptions import Batch
from methods import Method, keep_known, masked_mean, same_shape
from ode_int import ODE
from support.bounds import above, between

BETA_MIN = 1e-4  # variance of the first and of the last interval


@dataclass(frozen=True)
class I2SB(Method):
    # noise of the bridge: an interval's variance climbs towards beta_max / n; 1.0 for blur and inpainting
    beta_max: Annotated[float, above(0, 10**6)] = 0.3
    # intervals of the bridge, so the network is trained at times 1/n .. 1; fewer make it less noisy too
    n: Annotated[int, between(2, 10**6)] = 1000
    ot_ode: bool = False  # limit without noise: straight lines, a deterministic sampler
    clip_denoise: bool = False  # clamping of the sampler's clean estimates to [-1, 1]

    # all others are of the marginals q(zt | z1, damaged) trained on: ot_ode too, which takes the noise out of them
    free_at_sampling = ("clip_denoise",)
    no_ode = "has an ODE with --i2sb.ot-ode only"

    @property
    def picture_steps(self) -> int:
        """Sampler steps that are enough for the pictures in training."""
        return min(50, self.n)

    @property
    def has_ode(self) -> bool:
        return self.ot_ode

    @cached_property
    def s2(self) -> Tensor:
        """(n + 1,) float64: variance between z1 and zt at k = 0..n. beta climbs to the middle, then mirrors itself."""
        climb = torch.linspace(BETA_MIN**0.5, (self.beta_max / self.n) ** 0.5, self.n, dtype=torch.float64).square()
        half = climb[: (self.n + 1) // 2]
        beta = torch.cat([half, half[: self.n // 2].flip(0)])
        return torch.cat([beta.new_zeros(1), beta.cumsum(0)])

    @cached_property
    def total(self) -> float:
        return self.s2[-1].item()

    def bridge(self, s2):
        """q(zt | z1, damaged), eq. 11: weight of z1, weight of damaged, std. `s2` a float or a tensor."""
        r2 = self.total - s2
        return r2 / self.total, s2 / self.total, 0 * s2 if self.ot_ode else (r2 * s2 / self.total) ** 0.5

    def posterior(self, s2_k, s2_j):
        """q(z_j | z1, z_k) for j < k, eq. 4: weight of z1, weight of z_k, std."""
        weight = s2_j / s2_k
        return 1 - weight, weight, 0 * weight if self.ot_ode else (weight * (s2_k - s2_j)) ** 0.5

    @cache
    def table(self, device: torch.device) -> Tensor:
        """(4, n + 1) float32 on `device`: the bridge's two weights and std, and s, by k."""
        return torch.stack([*self.bridge(self.s2), self.s2.sqrt()]).float().to(device)

    def loss(self, net, batch: Batch) -> Tensor:
        """(B,) squared error of eq. 12 over the pixels to be made; k uniform on 1..n."""
        z1 = batch.z1
        k = batch.draws.randint(1, self.n + 1, z1)
        damaged = batch.zlo + batch.unknown * batch.randn_like(z1)
        a, b, std, s = self.table(z1.device)[:, k, None, None, None]  # (B, 1, 1, 1) each
        zt = a * z1 + b * damaged + std * batch.randn_like(z1)
        target = (zt - z1) / s
        error = same_shape(net(zt, k / self.n, batch.y, batch.cond), target) - target
        return masked_mean(error.square(), batch.to_make)

    def estimate(self, net, zt: Tensor, s, time: Tensor, batch: Batch) -> Tensor:
        """E[z1 | zt], eq. 12 solved for z1; known pixels are zlo. `s` a float or a scalar tensor, `time` = k/n (B,)."""
        z1 = zt - s * net(zt, time, batch.y, batch.cond)
        return keep_known(z1.clamp(-1, 1) if self.clip_denoise else z1, batch)

    def sample(self, net, batch: Batch, steps: int | None = None, trace: list | None = None) -> Tensor:
        """(B, C, H, W): algorithm 2 on `steps` intervals, even in k (None: n of them).

        Raises SettingsError where steps is not within 1..n.
        """
        steps = self.n if steps is None else steps
        if not 1 <= steps <= self.n:
            raise SettingsError(f"steps = {steps}: allowed is 1 to i2sb.n = {self.n}")
        s2 = self.s2.tolist()
        zt = batch.zlo + batch.unknown * batch.randn_like(batch.zlo)
        for k, j in pairwise(self.n * i // steps for i in range(steps, -1, -1)):
            time = torch.full((len(zt),), k / self.n, device=zt.device)
            z1 = self.estimate(net, zt, s2[k] ** 0.5, time, batch)
            if trace is not None:
                trace.append((1 - s2[k] / self.total, zt, z1))
            noise = batch.randn_like(zt)
            a, b, std = self.posterior(s2[k], s2[j])
            made = a * z1 + b * zt + std * noise  # at j = 0 this is z1
            known = batch.zlo + self.bridge(s2[j])[2] * noise  # where both ends of the bridge are zlo
            zt = torch.where(batch.to_make > 0, made, known)
        return zt

    def velocity(self, net, batch: Batch) -> ODE:
        """The OT-ODE, d zt / d s2 = (zt - z1) / s2; in t = 1 - s2/total, d zt / dt = (z1 - zt) / (1 - t).

        zt = t z1 + (1 - t) damaged solves it: straight lines at constant speed. An Euler step in t is a step of
        `sample`, but even steps in t are equal shares of the variance, not equal numbers of intervals.
        Between two times of the table, k is linear in s2. The ODE ends at k = 1, the last time that the network
        knows; the clean estimate there is the last step of `sample`. Raises SettingsError without ot_ode.
        """
        if not self.ot_ode:
            return super().velocity(net, batch)
        table = self.s2.to(batch.zlo)

        def clean(t, zt):
            s2 = (1 - t) * self.total
            j = torch.searchsorted(table, s2[None]).clamp(1, self.n)  # (1,), table[j - 1] < s2 <= table[j]
            k = j - (table[j] - s2) / (table[j] - table[j - 1])
            return self.estimate(net, zt, s2.sqrt(), (k / self.n).float().expand(len(zt)), batch)

        start = batch.zlo + batch.unknown * batch.randn_like(batch.zlo)
        return ODE(lambda t, zt: (clean(t, zt) - zt) / (1 - t), start, 0.0, 1 - self.s2[1].item() / self.total, clean)
