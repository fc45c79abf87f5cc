"""Integrates dz/dt = v(t, z) with torchdiffeq, from where a path starts to the clean image."""
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# network calls a step; the adaptive solver chooses its own
FIXED_STEP = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
SOLVERS = ("dopri5", *FIXED_STEP)
DEFAULT_STEPS = 50  # of a fixed-step solver that was given no count
MAX_ADAPTIVE_STEPS = 1000  # a field this stiff is not worth its dopri5 solution
TRACE_FRAMES = 8
NOT_FINITE = ("the network's output is not finite, or its field too stiff for the steps; "
              "resume an earlier checkpoint, lower base_lr or take more steps")


class SolverError(FloatingPointError):
    """The field, or the state that follows it, is not finite."""


@dataclass
class ODE:
    """An initial-value problem whose end point is a clean image, in the method's own time."""

    velocity: Callable[[Tensor, Tensor], Tensor]  # (t (), z (B, C, H, W)) -> dz/dt
    z: Tensor  # (B, C, H, W) the state at t0
    t0: float
    t1: float
    clean: Callable[[Tensor, Tensor], Tensor]  # (t, z) -> E[z1 | zt], one network evaluation
    view: Callable[[Tensor, Tensor], Tensor] = lambda t, z: z  # (t, z) -> the state, scaled to be looked at
    rho: float = 1.0  # how much fixed steps shorten towards the data, see time_grid


def largest_rms(z: Tensor) -> Tensor:
    """Error norm of the adaptive solver: the largest root mean square that any image has.

    A mean over the batch would let one image's error hide behind the others.
    """
    return z.square().flatten(1).mean(1).sqrt().amax() if z.ndim > 1 else z.abs().amax()


@contextmanager
def full_precision(device_type: str):
    """fp32 without autocast and TF32: to an adaptive solver, rounding in the field reads as stiffness."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def time_grid(t0: float, t1: float, steps: int, rho: float = 1.0) -> Tensor:
    """(steps + 1,) float64: times from t0 to t1 <= 1 at which (1 - t)^(1/rho) falls evenly.

    EDM spaces its sigmas by the same rule (arXiv:2206.00364, eq. 5). With rho = 1 all steps are alike. Above 1 they
    shorten towards the data at t = 1, where a velocity amplifies an error of z by 1/(1 - t).
    """
    if rho == 1:
        return torch.linspace(t0, t1, steps + 1, dtype=torch.float64)
    times = 1 - torch.linspace((1 - t0) ** (1 / rho), (1 - t1) ** (1 / rho), steps + 1, dtype=torch.float64) ** rho
    times[0], times[-1] = t0, t1
    return times


def integrate(velocity, z0: Tensor, t0: float, t1: float, solver="dopri5", steps: int | None = None,
              atol=1e-5, rtol=1e-5, times: Tensor | None = None, rho: float = 1.0) -> Tensor:
    """z(t1) of dz/dt = velocity(t, z), z(t0) = z0.

    With `times` (T,), which increase from t0 to t1, it returns the states (T, *z0.shape) at these times instead.
    dopri5 is adaptive and runs in full precision. euler, midpoint, heun and rk4 take `steps` steps on `time_grid`,
    under the caller's autocast, with an fp32 state. Where dopri5 fails on a finite field, midpoint takes over, with a
    RuntimeWarning. Raises ValueError for an unknown solver, and SolverError where the field is not finite or where
    midpoint can't follow it either.
    """
    from torchdiffeq import odeint  # it imports scipy, which --help need not wait for

    if solver not in SOLVERS:
        raise ValueError(f"solver = {solver!r}: allowed are {', '.join(SOLVERS)}")
    z0 = z0.float()
    inner = [] if times is None else times.tolist()[1:-1]
    output = torch.tensor([t0, *inner, t1], dtype=torch.float64, device=z0.device)
    calls = []  # (t, is the field finite there): tensors read after a failure only, so no call waits for the device

    def v(t, z):
        t = t.to(z.dtype).clamp(min(t0, t1), max(t0, t1))  # dopri5 may look past t1 for the size of its first step
        dz = velocity(t, z)
        calls.append((t, dz.isfinite().all()))
        return dz

    def broken(default=None):
        """The first time at which the field was not finite."""
        return next((float(t) for t, finite in calls if not finite), default)

    def fixed(name, steps):
        points = time_grid(t0, t1, steps, rho).to(z0.device)
        method = "heun2" if name == "heun" else name
        interp = "linear" if times is None else "cubic"  # cubic calls the network once more for each of `times`
        options = dict(grid_constructor=lambda f, z, t: points, interp=interp)
        return odeint(v, z0, output, method=method, options=options)

    if solver == "dopri5":
        # step_t makes torchdiffeq step to t1. Else it would step past t1, where v is not defined, and interpolate back.
        options = dict(norm=largest_rms, max_num_steps=MAX_ADAPTIVE_STEPS, step_t=output[-1:])
        try:
            with full_precision(z0.device.type):
                states = odeint(v, z0, output, method="dopri5", atol=atol, rtol=rtol, options=options)
        except AssertionError as failure:
            if broken() is not None:
                raise SolverError(f"dopri5 failed at t = {broken():.4f}: {NOT_FINITE}") from None
            warnings.warn(f"dopri5 failed at t = {float(calls[-1][0]):.4f} ({failure}): the field is stiff; "
                          f"midpoint with {DEFAULT_STEPS} steps takes over", RuntimeWarning, stacklevel=2)
            solver, states = "midpoint", fixed("midpoint", DEFAULT_STEPS)
    else:
        states = fixed(solver, steps or DEFAULT_STEPS)
    if not states[-1].isfinite().all():
        raise SolverError(f"{solver} failed at t = {broken(t1):.4f}: {NOT_FINITE}")
    return states[-1] if times is None else states


def solve(ode: ODE, solver="dopri5", steps: int | None = None, atol=1e-5, rtol=1e-5,
          trace: list | None = None) -> Tensor:
    """The clean image (B, C, H, W) at the end of `ode`: E[z1 | zt] at t1.

    `trace` receives (t, state, clean estimate) at a few times, the first one before the first step. It costs up to two
    network evaluations a frame.
    """
    def integrated(times=None):
        return integrate(ode.velocity, ode.z, ode.t0, ode.t1, solver, steps, atol, rtol, times, ode.rho)

    def clean(t, z):
        t = torch.tensor(t, dtype=z.dtype, device=z.device)
        if solver != "dopri5":
            return ode.clean(t, z)
        with full_precision(z.device.type):
            return ode.clean(t, z)

    def show(t, z):
        trace.append((t, ode.view(torch.tensor(t, dtype=z.dtype, device=z.device), z), clean(t, z)))

    if trace is None:
        return clean(ode.t1, integrated())
    n = steps or DEFAULT_STEPS  # on the solver's own grid where it has one
    times = time_grid(ode.t0, ode.t1, n, ode.rho)[torch.linspace(0, n, min(TRACE_FRAMES, n) + 1).round().long()]
    show(times[0].item(), ode.z.float())
    for t, z in zip(times[1:].tolist(), integrated(times)[1:]):
        show(t, z)
    return trace[-1][2]
