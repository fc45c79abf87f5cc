"""Stochastic interpolants with data-dependent couplings (Albergo et al. 2023, arXiv:2310.03725).

The paper's symbols -> ours:
    x_1, x_0              z1, z0
    x_t = I_t             zt
    alpha_t, beta_t       alpha, beta
    b_t                   v
    xi                    cond, what the coupling conditions on
    m(x_1) + sigma zeta   zlo + sigma * to_make * noise, written with keep_known: known pixels stand still

The path, its velocity and its ODE are

    zt = alpha(t) z0 + beta(t) z1,    v(t, z) = E[alpha' z0 + beta' z1 | zt = z],    dz/dt = v(t, z)

The ODE carries the distribution of z0 at t = 0 to that of z1 at t = 1.
"""
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

import ode_int
from images import SettingsError
from images.corruptions import TASKS, Batch, task_names
from methods import Method, keep_known, masked_mean, same_shape
from ode_int import ODE
from support.bounds import above, between, from_to_below


@dataclass(frozen=True)
class Interpolant(Method):
    """Path, coupling and sampler of the interpolant."""

    # path from z0 to z1. linear: alpha = 1 - t, beta = t; trigonometric: alpha = cos(pi t / 2), beta = sin(pi t / 2)
    path: Literal["linear", "trigonometric"] = "linear"
    # coupling of z0 and z1. dependent: z0 = zlo + noise; independent: z0 = noise alone, the paper's ablation
    coupling: Literal["dependent", "independent"] = "dependent"
    # standard deviation of the noise in z0, in units of the [-1, 1] range
    sigma: Annotated[float, above(0, 10**6)] = 1.0
    # end of the times: training and sampling stay on t_min <= t <= 1 - t_min
    t_min: Annotated[float, from_to_below(1e-9, 0.5)] = 1e-3
    # strength of the stochastic sampler, eps(t) = eps0 alpha(t); 0 integrates the ODE. It needs a network that sees zlo
    eps0: Annotated[float, between(0, 10**6)] = 0.0

    def check(self, task: str, condition: bool):
        """Raises SettingsError, one line, where the score can't be computed from the network's output.

        The score is -(E[z0 | zt] - m) / (alpha sigma^2), with m = E[zlo | zt]. That is zlo where the network sees it,
        and 0 in holes and by the independent coupling; elsewhere v does not determine it.
        """
        holes_alone = all(TASKS[name].leaves_unknown for name in task_names(task))
        if self.eps0 and not (condition or holes_alone or self.coupling == "independent"):
            raise SettingsError(f"interpolant.eps0 = {self.eps0}: allowed is 0 where the network does not see the "
                                "damaged image (--no-condition), unless interpolant.coupling = 'independent'")

    has_ode = True
    # one v gives the score, and with it any eps; path, coupling and sigma are of the marginals that v is trained on
    free_at_sampling = not_in_ode = ("eps0",)

    @property
    def solver(self) -> str:
        """Used where the user names no solver: dopri5 on the ODE, or this method's own stochastic sampler."""
        return "own" if self.eps0 else "dopri5"

    def path_at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, beta and their derivatives at t, shaped like t."""
        if self.path == "linear":
            return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        angle, rate = torch.pi / 2 * t, torch.pi / 2
        return angle.cos(), angle.sin(), -rate * angle.sin(), rate * angle.cos()

    def center(self, batch: Batch) -> Tensor:
        """The mean of z0 where pixels are to be made, given the damaged image."""
        return batch.zlo if self.coupling == "dependent" else torch.zeros_like(batch.zlo)

    def start(self, batch: Batch) -> Tensor:
        """z0 (B, C, H, W), drawn from the coupling (section 3.1, eq. 10). Known pixels of inpainting hold zlo."""
        return keep_known(self.center(batch) + self.sigma * batch.randn_like(batch.zlo), batch)

    def loss(self, net, batch: Batch) -> Tensor:
        """|v_hat - (alpha' z0 + beta' z1)|^2, mean over the pixels to be made -> (B,) (eq. 8)."""
        z1, z0 = batch.z1, self.start(batch)
        t = self.t_min + (1 - 2 * self.t_min) * batch.draws.rand(z1)
        alpha, beta, d_alpha, d_beta = (c[:, None, None, None] for c in self.path_at(t))
        zt = keep_known(alpha * z0 + beta * z1, batch)
        v = d_alpha * z0 + d_beta * z1
        error = same_shape(net(zt, t, batch.y, batch.cond), v) - v
        return masked_mean(error.square(), batch.to_make)

    def ends(self, t: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """E[z0 | zt], E[z1 | zt] from the velocity at the scalar t: zt and v are two linear equations in them."""
        alpha, beta, d_alpha, d_beta = self.path_at(t)
        determinant = alpha * d_beta - d_alpha * beta
        return (d_beta * z - beta * v) / determinant, (alpha * v - d_alpha * z) / determinant

    def velocity(self, net, batch: Batch) -> ODE:
        """The probability-flow ODE, from z0 at t_min to 1 - t_min, where the clean estimate is the sample."""
        def v(t, z):
            return net(z, t.expand(len(z)), batch.y, batch.cond) * batch.to_make

        def clean(t, z):
            return keep_known(self.ends(t, z, v(t, z))[1], batch)

        # rho: how much fixed steps shorten towards the data (ode_int.time_grid); 3 is the best of 1, 1.5, 2, 3, 4 in
        # benchmarks/README.md
        return ODE(v, self.start(batch), self.t_min, 1 - self.t_min, clean, rho=3.0)

    def sample(self, net, batch: Batch, steps: int | None = None, trace: list | None = None) -> Tensor:
        """(B, C, H, W). At eps0 = 0 dopri5 solves the ODE, or midpoint where `steps` is given.
        Above it the SDE is solved, in `steps` Euler-Maruyama steps (None: 100)."""
        ode = self.velocity(net, batch)
        if not self.eps0:
            return ode_int.solve(ode, "midpoint" if steps else "dopri5", steps, trace=trace)
        steps = steps or 100
        z, dt = ode.z, (ode.t1 - ode.t0) / steps
        for t in torch.linspace(ode.t0, ode.t1, steps + 1, device=z.device)[:-1]:
            v = ode.velocity(t, z)
            z0_hat, z1_hat = self.ends(t, z, v)
            if trace is not None:
                trace.append((float(t), z, keep_known(z1_hat, batch)))
            # dz = (v + eps score) dt + sqrt(2 eps) dW,  score = -(E[z0 | zt] - center) / (alpha sigma^2)
            # eps = eps0 alpha, so alpha cancels in eps * score
            drift = v - self.eps0 * (z0_hat - self.center(batch)) / self.sigma**2
            noise = (2 * self.eps0 * self.path_at(t)[0] * dt).sqrt() * batch.randn_like(z)
            z = z + batch.to_make * (drift * dt + noise)
        end = torch.tensor(ode.t1, dtype=z.dtype, device=z.device)
        sample = ode.clean(end, z)
        if trace is not None:
            trace.append((ode.t1, z, sample))
        return sample
