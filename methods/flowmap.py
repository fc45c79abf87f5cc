"""The flow map of the interpolant's coupling: samples in one or two evaluations.

A flow map (Boffi et al., arXiv:2406.07507, and self-distilled arXiv:2505.18825; shortcut models, arXiv:2410.12557)
follows the interpolant's ODE dz/dt = v(t, z) from one time to another in a single evaluation:

    X(s, t, z) = z + (t - s) u(z, s, t)       X(s, t, z_s) = z_t on every path of the ODE
    u(z, t, t) = v(t, z)                      the diagonal: the velocity itself
    X(m, t, X(s, m, z)) = X(s, t, z)          two jumps are one: what `jump` = "psd" asks for
    d/dt X(s, t, z) = v(t, X(s, t, z))        its Lagrangian form: what "lsd" asks for

    the papers' s, t, X_{s,t}, v_{s,t} -> ours: s, t, X, u; their x_s -> zs = (1 - s) z0 + s z1

Half of a batch learns the diagonal from the data, the other half jumps from what the network itself says of shorter
ones. No derivative is taken with respect to z. u is called as net(zs, (s, t - s), y, cond).
"""
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from images.corruptions import Batch
from methods import Method, keep_known, masked_mean, same_shape
from methods.interpolant import Interpolant
from ode_int import ODE
from support.bounds import above, between


def column(t: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to be multiplied with images."""
    return t[:, None, None, None]


@dataclass(frozen=True)
class FlowMap(Method):
    # coupling of z0 and z1, as the interpolant's
    coupling: Literal["dependent", "independent"] = "dependent"
    # standard deviation of the noise in z0, in units of the [-1, 1] range
    sigma: Annotated[float, above(0, 10**6)] = 1.0
    # how a jump learns from shorter ones. psd: as two half jumps; lsd: by the derivative in its end, which needs one
    # forward derivative of the network, without --compile and DDP
    jump: Literal["psd", "lsd"] = "psd"
    # share of the jumps that begin at t = 0, where sampling in one evaluation does
    from_start: Annotated[float, between(0, 1)] = 0.25

    has_ode = True
    two_times = True
    guided = False

    @cached_property
    def path(self) -> Interpolant:
        return Interpolant(coupling=self.coupling, sigma=self.sigma)

    def u(self, net, z: Tensor, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Mean velocity (B, C, H, W) between the times s and t (B,); 0 in known pixels."""
        prediction = net(z, torch.stack([s, t - s], dim=1), batch.y, batch.cond)
        return same_shape(prediction, z) * batch.to_make

    def X(self, net, z: Tensor, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        return z + column(t - s) * self.u(net, z, s, t, batch)

    def loss(self, net, batch: Batch) -> Tensor:
        """(B,) squared error of u, over the pixels to be made; every other image learns a jump."""
        z0, z1, rand = self.path.start(batch), batch.z1, batch.draws.rand
        first, second = rand(z1), rand(z1)
        s, t = torch.minimum(first, second), torch.maximum(first, second)
        s = torch.where(rand(z1) < self.from_start, 0, s)
        on_diagonal = torch.arange(len(z1), device=z1.device) % 2 == 0
        s, t = torch.where(on_diagonal, first, s), torch.where(on_diagonal, first, t)
        zs = keep_known(z0 + column(s) * (z1 - z0), batch)
        target = z1 - z0  # the velocity of this image's straight line
        if len(z1) > 1:
            jumps = slice(1, None, 2)
            with torch.no_grad():
                wanted = self.jump_target(net, zs[jumps], s[jumps], t[jumps], batch[jumps])
            target = target.index_put((torch.arange(1, len(z1), 2, device=z1.device),), wanted)
        error = self.u(net, zs, s, t, batch) - target
        return masked_mean(error.square(), batch.to_make)

    def jump_target(self, net, z: Tensor, s: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """What u(z, s, t) should be by what the network says of shorter jumps."""
        if self.jump == "psd":  # the mean of two halves
            m = (s + t) / 2
            half = self.u(net, z, s, m, batch)
            return (half + self.u(net, z + column(m - s) * half, m, t, batch)) / 2
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no forward derivative
            u, slope = torch.func.jvp(lambda end: self.u(net, z, s, end, batch), (t,), (torch.ones_like(t),))
        # d/dt X = u + (t - s) du/dt is to be the velocity at X
        return self.u(net, z + column(t - s) * u, t, t, batch) - column(t - s) * slope

    def sample(self, net, batch: Batch, steps: int | None = None, trace: list | None = None) -> Tensor:
        """(B, C, H, W) in `steps` even jumps (None: 1), an evaluation each. A trace takes one more for each frame
        but the last, whose jump ends at the sample."""
        z, times = self.path.start(batch), torch.linspace(0, 1, (steps or 1) + 1, device=batch.zlo.device)
        times = list(times[:, None].expand(-1, len(z)))
        for s, t in zip(times, times[1:]):
            after = self.X(net, z, s, t, batch)
            if trace is not None:
                clean = after if t is times[-1] else self.X(net, z, s, times[-1], batch)
                trace.append((s[0].item(), z, clean))
            z = after
        return z

    def velocity(self, net, batch: Batch) -> ODE:
        """The interpolant's ODE, by the diagonal of the map."""
        def diagonal(x, t, y=None, cond=None):
            return net(x, torch.stack([t, torch.zeros_like(t)], dim=1), y, cond)

        return self.path.velocity(diagonal, batch)
