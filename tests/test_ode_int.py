"""The integrator against initial-value problems whose solution is known, and what it does when a field misbehaves."""
import re
import warnings

import numpy as np
import pytest
import torch

import ode_int
from ode_int import DEFAULT_STEPS, FIXED_STEP, ODE, SolverError, integrate, solve, time_grid

SHAPE = (3, 2, 4, 4)


def start(shape=SHAPE) -> torch.Tensor:
    return 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(1))


def swing(t, z):
    """Not linear, not autonomous; 1/z = 1/z0 + sin t."""
    return -t.cos() * z.square()


def swing_at(t, z0):
    return 1 / (1 / z0.double() + np.sin(t))


# accuracy

def euler(t, z, h):
    return swing(t, z)


def midpoint(t, z, h):
    return swing(t + h / 2, z + h / 2 * swing(t, z))


def heun(t, z, h):
    first = swing(t, z)
    return (first + swing(t + h, z + h * first)) / 2


def rk4(t, z, h):  # by the rule of three eighths
    k1 = swing(t, z)
    k2 = swing(t + h / 3, z + h * k1 / 3)
    k3 = swing(t + 2 * h / 3, z + h * (k2 - k1 / 3))
    k4 = swing(t + h, z + h * (k1 - k2 + k3))
    return (k1 + 3 * k2 + 3 * k3 + k4) / 8


@pytest.mark.parametrize("rho", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("rule", [euler, midpoint, heun, rk4])
def test_fixed_steps_are_the_rule_of_their_name_and_shorten_towards_the_data(rule, rho):
    """(1 - t)^(1/rho) falls evenly."""
    times = 1 - torch.linspace(0.9 ** (1 / rho), 0.001 ** (1 / rho), 6, dtype=torch.float64) ** rho
    grid = time_grid(0.1, 0.999, 5, rho)
    torch.testing.assert_close(grid, times, rtol=1e-12, atol=0)
    assert (grid[0], grid[-1]) == (0.1, 0.999)
    z = start().double()
    for t, after in zip(times, times[1:]):
        z = z + (after - t) * rule(t, z, after - t)
    ode = ODE(swing, start(), 0.1, 0.999, lambda t, z: z, rho=rho)
    torch.testing.assert_close(solve(ode, rule.__name__, 5).double(), z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("t0, t1", [(0.0, 3.0), (0.001, 0.999), (3.0, 0.0)])
def test_dopri5_reaches_its_tolerance_and_lands_on_t1(t0, t1):
    z0 = 0.5 * start()

    def error(tolerance):  # of the worst image
        reached = integrate(swing, swing_at(t0, z0), t0, t1, atol=tolerance, rtol=tolerance)
        return (reached - swing_at(t1, z0)).square().mean((1, 2, 3)).sqrt().max().item()

    assert error(1e-5) < 1e-4 and error(1e-6) < 1e-5  # the tolerance is a step's; some ten of them add up
    assert 1e-4 < error(1e-3) < 1e-1  # and a loose one is loose


@pytest.mark.parametrize("rate", [1e-3, 20.0])  # in a slow field dopri5's first guess of a step is far too long
@pytest.mark.parametrize("t0, t1", [(0.001, 0.999), (1.0, 0.0)])
def test_dopri5_asks_only_between_t0_and_t1(rate, t0, t1):
    asked, z0 = [], start()

    def v(t, z):
        asked.append(float(t))
        return -rate * z * (t1 - t0)

    reached = integrate(v, z0, t0, t1)
    low, high = np.float32(min(t0, t1)), np.float32(max(t0, t1))  # a network is told the time in fp32
    assert low <= min(asked) and max(asked) <= high
    torch.testing.assert_close(reached.double(), z0.double() * np.exp(-rate * (t1 - t0) ** 2), rtol=1e-5, atol=3e-5)


def test_no_image_hides_in_its_batch():
    """One image swings 30 times as fast as 255 others: it must get the steps it gets alone."""
    rate = torch.ones(256, 1, 1, 1)
    rate[77] = 30

    def swung(rate):
        asked = []
        z0 = torch.full((len(rate), 1, 2, 2), 0.1)
        return integrate(lambda t, z: asked.append(float(t)) or rate * (rate * t).cos() + 0 * z, z0, 0.0, 1.0), asked

    (together, asked), (alone, asked_alone) = swung(rate), swung(rate[77:78])
    np.testing.assert_allclose(asked, asked_alone, rtol=1e-5)
    torch.testing.assert_close(together[77:78], alone, rtol=0, atol=1e-6)
    assert (alone - 0.1 - np.sin(30.0)).abs().max() < 1e-4


def test_without_a_number_a_fixed_step_solver_takes_its_usual_one():
    for solver, calls in FIXED_STEP.items():
        asked = []
        integrate(lambda t, z: asked.append(t) or -z, start(), 0.0, 1.0, solver)
        assert len(asked) == DEFAULT_STEPS * calls


@pytest.mark.parametrize("solver, steps", [("dopri5", None), ("euler", 3), ("heun", 20), ("rk4", 50)])
@pytest.mark.parametrize("t_min", [0.001, 0.003])  # t0 + (t1 - t0) misses t1 by a rounding for one of them
def test_trace_shows_the_path_and_changes_nothing(solver, steps, t_min):
    ode, frames = ODE(lambda t, z: -z, start(), t_min, 1 - t_min, lambda t, z: -z, view=lambda t, z: z * (1 + t)), []
    sample = solve(ode, solver, steps, trace=frames)
    torch.testing.assert_close(sample, solve(ode, solver, steps), rtol=0, atol=2e-5 if solver == "dopri5" else 0)
    assert torch.equal(frames[-1][2], sample)
    times = [t for t, _, _ in frames]
    assert (times[0], times[-1]) == (t_min, 1 - t_min) and len(times) == min(9, (steps or 9) + 1)
    on_grid = (np.array(times) - t_min) / (1 - 2 * t_min) * (steps or DEFAULT_STEPS)
    np.testing.assert_allclose(on_grid, on_grid.round(), atol=1e-9)
    for t, view, clean in frames:
        state = view / (1 + t)
        torch.testing.assert_close(state, ode.z * np.exp(t_min - t), rtol=0, atol=0.3 if solver == "euler" else 1e-3)
        torch.testing.assert_close(clean, -state, rtol=1e-5, atol=1e-6)


# failure

@pytest.mark.parametrize("solver", ["dopri5", "heun"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("since, until", [(-1.0, 2.0), (0.37, 2.0), (0.37, 0.52)])
def test_a_field_that_is_not_finite_is_named_with_its_time(solver, bad, since, until):
    def v(t, z):
        return torch.where((t > since) & (t < until), bad * torch.ones_like(z), torch.ones_like(z))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # this is no stiffness
        with pytest.raises(SolverError, match="not finite") as failure:
            integrate(v, start(), 0.0, 1.0, solver, 40)
    named = float(re.search(r"t = (-?[\d.]+)", str(failure.value))[1])
    assert max(since, 0) <= named <= min(until, 1)


def test_a_state_that_overflows_is_an_error():
    with pytest.raises(SolverError, match="euler failed at t = 2.0000"):  # the field is finite wherever it is asked
        integrate(lambda t, z: 3e38 * torch.ones_like(z), start(), 0.0, 2.0, "euler", 1)


def test_a_rough_field_falls_back_to_midpoint(monkeypatch):
    monkeypatch.setattr(ode_int, "MAX_ADAPTIVE_STEPS", 100)  # sooner

    def v(t, z):
        return 3 * (1e6 * z + 1e5 * t).sin()

    with pytest.warns(RuntimeWarning, match=r"dopri5 failed at t = 0\.\d+ .*midpoint with 50 steps"):
        fallen = integrate(v, start(), 0.0, 1.0)
    assert fallen.isfinite().all()
    assert torch.equal(fallen, integrate(v, start(), 0.0, 1.0, "midpoint", 50))
    times = torch.tensor([0.0, 0.35, 1.0])
    with pytest.warns(RuntimeWarning):
        states = integrate(v, start(), 0.0, 1.0, times=times)
    assert torch.equal(states[-1], fallen) and states.isfinite().all()


def test_a_field_too_stiff_for_the_fallback_is_an_error(monkeypatch):
    monkeypatch.setattr(ode_int, "MAX_ADAPTIVE_STEPS", 100)
    with pytest.warns(RuntimeWarning, match="stiff"), pytest.raises(SolverError, match="midpoint failed.*too stiff"):
        integrate(lambda t, z: -1e6 * z, start(), 0.0, 1.0)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match=r"^solver = 'rk5': allowed are dopri5, euler, midpoint, heun, rk4$"):
        integrate(swing, start(), 0.0, 1.0, "rk5")


# precision

@pytest.fixture
def backends():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    yield matmul, cudnn
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize("solver", ["dopri5", "heun"])
@pytest.mark.parametrize("flags", [(True, True), (False, True), (True, False)])
def test_precision_is_full_for_dopri5_and_the_callers_for_the_others(solver, flags, backends):
    matmul, cudnn = backends
    matmul.allow_tf32, cudnn.allow_tf32 = flags
    seen, states = set(), set()

    def net(t, z):
        product = z.flatten(1) @ torch.eye(32)
        seen.add((product.dtype, matmul.allow_tf32, cudnn.allow_tf32))
        states.add(z.dtype)
        return -product.view_as(z)

    ode = ODE(net, start(), 0.0, 1.0, net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample = solve(ode, solver, trace=[])
        assert torch.mm(torch.eye(2), torch.eye(2)).dtype == torch.bfloat16  # the caller's autocast is back
    assert seen == {(torch.float32, False, False) if solver == "dopri5" else (torch.bfloat16, *flags)}
    assert states == {torch.float32} and (matmul.allow_tf32, cudnn.allow_tf32) == flags
    if solver == "dopri5":
        torch.testing.assert_close(sample, -ode.z * np.exp(-1), rtol=0, atol=3e-5)

    with pytest.raises(KeyError):  # a network's own error, not the solver's
        solve(ODE(lambda t, z: {}["missing"], start(), 0.0, 1.0, net), solver)
    assert (matmul.allow_tf32, cudnn.allow_tf32) == flags


def test_the_state_is_fp32_where_the_field_is_bf16():
    """2000 steps of 1/2000: a bf16 state would stop growing at 0.25, where its spacing is twice the step's."""
    grown = integrate(lambda t, z: torch.ones_like(z, dtype=torch.bfloat16), torch.zeros(SHAPE, dtype=torch.bfloat16),
                      0.0, 1.0, "euler", 2000)
    assert grown.dtype == torch.float32
    torch.testing.assert_close(grown, torch.ones(SHAPE), rtol=0, atol=5e-3)
