"""EDM, the design space of diffusion models (Karras et al. 2022, arXiv:2206.00364): a preconditioned denoiser, Heun.

    paper        here
    y, n         z1 and sigma eps; y here is the class label
    x            x = z1 + sigma eps, never scaled down
    D(x; sigma)  D(net, x, sigma, y, cond), the estimate of z1
    F, c_noise   net and the t that it sees, ln(sigma)/4
    t_i          sigmas[i], by the paper's choice of sigma(t) = t and s(t) = 1; t here is 1 at the data
    N            steps

Known pixels of inpainting hold zlo throughout, in training as in sampling: the network meets the same states in both.
"""
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from torch import Tensor

from images import SettingsError
from images.corruptions import Batch
from methods import Method, keep_known, masked_mean, same_shape
from ode_int import ODE
from support.bounds import above, between, require


@dataclass(frozen=True)
class EDM(Method):
    # standard deviation of the clean images' values, which are in [-1, 1]
    sigma_data: Annotated[float, between(1e-6, 10**6)] = 0.5
    # mean of ln sigma in training; sigma is the noise's standard deviation, in the images' units
    P_mean: Annotated[float, between(-100, 100)] = -1.2
    # standard deviation of ln sigma in training
    P_std: Annotated[float, above(0, 100)] = 1.2
    # last noise level of the sampler before 0
    sigma_min: Annotated[float, between(1e-9, 10**6)] = 0.002
    # first noise level of the sampler
    sigma_max: Annotated[float, between(1e-9, 10**6)] = 80.0
    # shortening of the sampler's steps towards sigma_min; 1: all alike
    rho: Annotated[float, between(0.1, 1000)] = 7.0
    # sampler: of second order, two network evaluations per step but for the last one (heun), or of first (euler)
    sampler: Literal["heun", "euler"] = "heun"
    # noise put back while sampling, shared out over the steps (paper, table 5: 30 to 80); 0: deterministic
    S_churn: Annotated[float, between(0, 10**6)] = 0.0
    # least noise level at which noise is put back (0.01 to 0.05)
    S_min: Annotated[float, between(0, 10**6)] = 0.0
    # largest noise level at which noise is put back (1 to 50); the default, above every noise level, stands for
    # the paper's infinity, which config.json can't hold
    S_max: Annotated[float, between(0, 10**6)] = 1e6
    # standard deviation of the noise put back, 1 being what theory asks for (1.003 to 1.007)
    S_noise: Annotated[float, between(0, 10**6)] = 1.0

    has_ode = True
    # the network is told sigma, and training draws it by P_mean and P_std: where the sampler goes is its own affair
    not_in_ode = ("rho", "sampler", "S_churn", "S_min", "S_max", "S_noise")
    free_at_sampling = ("sigma_min", "sigma_max", *not_in_ode)

    def __post_init__(self):
        super().__post_init__()
        above_min = f"a number above edm.sigma_min = {self.sigma_min}"
        require(self, "sigma_max", self.sigma_max > self.sigma_min, above_min, self.prefix)

    def D(self, net, x, sigma, y, cond) -> Tensor:
        """E[z1 | x], eq. 7 and table 1: x (B, C, H, W), sigma () or (B,). Affine in the network's output."""
        sigma, sd = sigma.to(x.dtype).expand(len(x)), self.sigma_data
        s = sigma[:, None, None, None]
        total = s**2 + sd**2
        c_skip, c_out, c_in = sd**2 / total, s * sd / total.sqrt(), 1 / total.sqrt()
        F = same_shape(net(c_in * x, sigma.log() / 4, y, cond), x)
        return c_skip * x + c_out * F

    def loss(self, net, batch: Batch) -> Tensor:
        """Eq. 2 under the weight and the sigmas of table 1 -> (B,), the mean over the pixels to be made."""
        z1, sd = batch.z1, self.sigma_data
        sigma = (self.P_mean + self.P_std * batch.randn_like(z1[:, 0, 0, 0])).exp()
        s = sigma[:, None, None, None]
        x = keep_known(z1 + s * batch.randn_like(z1), batch)
        weight = (s**2 + sd**2) / (s * sd) ** 2  # 1 / c_out^2: an equal share for every sigma
        error = self.D(net, x, sigma, batch.y, batch.cond) - z1
        return masked_mean(weight * error.square(), batch.to_make)

    def sigmas(self, steps: int) -> list[float]:
        """Eq. 5: `steps` noise levels from sigma_max to sigma_min, then 0."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return [(high + i / max(steps - 1, 1) * (low - high)) ** self.rho for i in range(steps)] + [0.0]

    def time(self, sigma: float) -> float:
        """t in [0, 1], 1 at the data: the angle of tan(pi t/2) = sigma_data/sigma."""
        return math.atan2(self.sigma_data, sigma) / (math.pi / 2)

    def sample(self, net, batch: Batch, steps: int | None = None, trace: list | None = None) -> Tensor:
        """Algorithm 2, which at S_churn = 0 is algorithm 1 -> (B, C, H, W). The last of the `steps` goes from sigma_min
        to 0: NFE = 2 steps - 1 by heun, steps by euler. None is 18 steps by heun and 35 by euler, an NFE of 35 by both.
        The t of `trace` is that of `velocity`. Raises SettingsError where steps is below 1."""
        steps = (18 if self.sampler == "heun" else 35) if steps is None else steps
        if steps < 1:
            raise SettingsError(f"steps = {steps}: allowed is 1 or more")

        def denoise(x, sigma):
            return self.D(net, x, x.new_full((len(x),), sigma), batch.y, batch.cond)

        sigmas = self.sigmas(steps)
        x = keep_known(sigmas[0] * batch.randn_like(batch.zlo), batch)
        for sigma, after in pairwise(sigmas):
            # churn: put noise back, up to a little more than sigma
            if self.S_churn > 0 and self.S_min <= sigma <= self.S_max:
                more = sigma * (1 + min(self.S_churn / steps, 2**0.5 - 1))
                x = keep_known(x + (more**2 - sigma**2) ** 0.5 * self.S_noise * batch.randn_like(x), batch)
                sigma = more
            # dx/dsigma here, and Euler's step along it
            z1 = denoise(x, sigma)
            if trace is not None:
                view = keep_known(x / (1 + sigma**2) ** 0.5, batch)
                trace.append((self.time(sigma), view, keep_known(z1, batch)))
            slope = (x - z1) / sigma
            end = keep_known(x + (after - sigma) * slope, batch)
            # Heun: the same step along the mean of dx/dsigma here and there
            if self.sampler == "heun" and after > 0:
                slope = (slope + (end - denoise(end, after)) / after) / 2
                end = keep_known(x + (after - sigma) * slope, batch)
            x = end
        return x

    def velocity(self, net, batch: Batch) -> ODE:
        """The probability flow, eq. 1, from sigma_max to sigma_min, whose clean estimate is algorithm 1's last step.
        Its state is z = x / sqrt(sigma^2 + sd^2), its t the angle of sigma = sd / tan(pi t/2), 1 at the data: z is the
        trigonometric interpolant sin(pi t/2) z1/sd + cos(pi t/2) eps, and dz/dt = pi/2 F: the network itself.
        (In x and eq. 5's own variable, where sigma falls 40,000-fold, every solver of ode_int needs more steps.)"""
        sd = self.sigma_data

        def state(t, z):
            sigma = sd / (math.pi / 2 * t).tan()
            scale = (sigma**2 + sd**2).sqrt()
            return keep_known(z * scale, batch), sigma, scale

        def velocity(t, z):
            x, sigma, scale = state(t, z)
            F = net(x / scale, (sigma.log() / 4).expand(len(x)), batch.y, batch.cond)
            return math.pi / 2 * batch.to_make * F

        def clean(t, z):
            x, sigma, _ = state(t, z)
            return keep_known(self.D(net, x, sigma, batch.y, batch.cond), batch)

        def view(t, z):
            x, sigma, _ = state(t, z)
            return keep_known(x / (1 + sigma**2).sqrt(), batch)

        z = self.sigma_max * batch.randn_like(batch.zlo) / (self.sigma_max**2 + sd**2) ** 0.5
        return ODE(velocity, z, self.time(self.sigma_max), self.time(self.sigma_min), clean, view)
