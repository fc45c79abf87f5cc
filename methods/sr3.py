"""SR3, image super-resolution by iterative refinement (Saharia et al. 2021, arXiv:2104.07636): diffusion that sees zlo.

    paper           here
    x               zlo, seen by the network as cond; low-resolution images are enlarged by bicubic
    y_0             z1
    y_t, y tilde    x = sqrt(gamma) z1 + sqrt(1 - gamma) eps
    f(x, y, gamma)  net(x, gamma, y, cond), which predicts eps; y here is the class label
    gamma_t         gammas[t] = alpha_1 ... alpha_t, with gammas[0] = 1; the paper's t counts from clean to noise
    alpha_t         gammas[t] / gammas[t - 1]

The network is this project's: its embedding of t scales and shifts between convolutions, where the code that SR3's seed
names takes an instance norm whose gain and shift come from gamma itself.

Known pixels of inpainting hold zlo throughout, in training as in sampling: the network meets the same states in both.
"""
import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

import torch
from torch import Tensor

from images import SettingsError
from images.corruptions import Batch
from methods import Method, keep_known, masked_mean, same_shape
from ode_int import ODE
from support.bounds import above, between, require


@dataclass(frozen=True)
class SR3(Method):
    # steps of the noise schedule; the sampler takes as many unless it is given another number
    T: Annotated[int, between(1, 10**6)] = 2000
    # growth of beta = 1 - alpha from step 1 to step T: its square root linearly (quadratic), itself linearly (linear),
    # not at all: beta_end (constant), linearly over the first warmup * T steps and no further (warmup)
    schedule: Literal["quadratic", "linear", "constant", "warmup"] = "quadratic"
    # variance of the noise that the first step adds, 1 - alpha_1
    beta_start: Annotated[float, above(0, 0.999)] = 1e-6
    # variance of the noise that the last step adds, 1 - alpha_T
    beta_end: Annotated[float, above(0, 0.999)] = 7e-3
    # share of the T steps over which schedule warmup rises
    warmup: Annotated[float, above(0, 1)] = 0.1
    # error of the predicted noise: absolute (l1) or squared (l2); section 2.2's p
    norm: Literal["l1", "l2"] = "l1"
    # clamping of the sampler's clean estimates to [-1, 1]
    clamp: bool = True

    has_ode = True
    # the network is told gamma, not the step: any schedule will do whose gammas are within those trained on
    free_at_sampling = ("T", "schedule", "beta_start", "beta_end", "warmup", "clamp")

    def __post_init__(self):
        super().__post_init__()
        at_most = f"a number above 0, at most sr3.beta_end = {self.beta_end}"
        require(self, "beta_start", self.beta_start <= self.beta_end, at_most, self.prefix)

    @property
    def picture_steps(self) -> int:
        """Sampler steps that are enough for the pictures in training."""
        return min(100, self.T)

    @cache
    def gammas(self, device=torch.device("cpu")) -> Tensor:
        """gamma_0 .. gamma_T, (T + 1,) float64: 1 - gamma_1 = 1e-6 would have one digit in float32."""
        start, end, T = self.beta_start, self.beta_end, self.T
        if self.schedule == "quadratic":
            beta = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64).square()
        elif self.schedule == "linear":
            beta = torch.linspace(start, end, T, dtype=torch.float64)
        else:
            beta = torch.full((T,), end, dtype=torch.float64)
            if self.schedule == "warmup":
                rise = math.ceil(self.warmup * T)
                beta[:rise] = torch.linspace(start, end, rise, dtype=torch.float64)
        return torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)]).to(device)

    def loss(self, net, batch: Batch) -> Tensor:
        """Algorithm 1 -> (B,), the mean over the pixels to be made."""
        z1, gammas = batch.z1, self.gammas(batch.z1.device)
        # section 2.4: gamma is uniform between neighbours, so that the sampler may choose its steps
        t = batch.draws.randint(1, self.T + 1, z1)
        gamma = torch.lerp(gammas[t], gammas[t - 1], batch.draws.rand(z1).double())
        a, b = (s.to(z1.dtype)[:, None, None, None] for s in (gamma.sqrt(), (1 - gamma).sqrt()))
        eps = batch.randn_like(z1)
        x = keep_known(a * z1 + b * eps, batch)
        error = same_shape(net(x, gamma.to(z1.dtype), batch.y, batch.cond), eps) - eps
        return masked_mean(error.abs() if self.norm == "l1" else error.square(), batch.to_make)

    def predict(self, net, batch: Batch, x, a, b) -> tuple[Tensor, Tensor]:
        """Estimates (section 2.3) of z1 and eps in x = a z1 + b eps; 0-d a = sqrt(gamma), b = sqrt(1 - gamma)."""
        eps = net(x, (a * a).to(x.dtype).expand(len(x)), batch.y, batch.cond)
        z1 = (x - b * eps) / a
        if self.clamp:
            z1 = z1.clamp(-1, 1)
            eps = (x - a * z1) / b
        return z1, eps

    def sample(self, net, batch: Batch, steps: int | None = None, trace: list | None = None) -> Tensor:
        """Algorithm 2 on `steps` of the T steps, evenly spaced (None: all) -> (B, C, H, W). NFE = steps.
        trace's t is velocity's. SettingsError where steps is not within 1 .. T."""
        steps = self.T if steps is None else steps
        if not 1 <= steps <= self.T:
            raise SettingsError(f"steps = {steps}: allowed is 1 to sr3.T = {self.T}")
        gammas = self.gammas()[[self.T * k // steps for k in range(steps + 1)]]
        times = [angle_time(gamma) for gamma in gammas.tolist()]
        gammas = gammas.to(batch.zlo.device)
        x = keep_known(batch.randn_like(batch.zlo), batch)
        for k in range(steps, 0, -1):
            gamma, alpha = gammas[k], gammas[k] / gammas[k - 1]
            z1, eps = self.predict(net, batch, x, gamma.sqrt(), (1 - gamma).sqrt())
            if trace is not None:
                trace.append((times[k], x, keep_known(z1, batch)))
            x = (x - (1 - alpha) / (1 - gamma).sqrt() * eps) / alpha.sqrt()  # line 4, its mean
            if k > 1:
                x = x + (1 - alpha).sqrt() * batch.randn_like(x)
            x = keep_known(x, batch)
        return x

    def velocity(self, net, batch: Batch) -> ODE:
        """The probability flow from gamma_T to gamma_1. Its t is the angle of sqrt(gamma) = sin(pi t/2), 1 at the data,
        so x is the trigonometric interpolant sin(pi t/2) z1 + cos(pi t/2) eps and, whatever the schedule,
        dx/dt = pi/2 (cos(pi t/2) z1_hat - sin(pi t/2) eps_hat) is bounded at both ends."""

        def estimates(t, x):
            a, b = (math.pi / 2 * t).sin(), (math.pi / 2 * t).cos()
            return a, b, *self.predict(net, batch, x, a, b)

        def velocity(t, x):
            a, b, z1, eps = estimates(t, x)
            return math.pi / 2 * batch.to_make * (b * z1 - a * eps)

        def clean(t, x):
            return keep_known(estimates(t, x)[2], batch)

        x = keep_known(batch.randn_like(batch.zlo), batch)
        t1, t0 = (angle_time(gamma) for gamma in self.gammas()[[1, self.T]].tolist())
        return ODE(velocity, x, t0, t1, clean)


def angle_time(gamma: float) -> float:
    """t in [0, 1], 1 at the data, with sqrt(gamma) = sin(pi t/2)."""
    return math.atan2(gamma**0.5, (1 - gamma) ** 0.5) / (math.pi / 2)
