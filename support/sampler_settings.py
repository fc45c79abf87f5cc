"""How a trained run samples: what may differ from its training, and what may not."""
from dataclasses import dataclass, field, fields, replace

from images import SettingsError
from methods import Method
from methods.edm import EDM
from methods.i2sb import I2SB
from methods.interpolant import Interpolant
from methods.sr3 import SR3
from support.bounds import shown
from support.checkpoints import Run
from support.command_line import parse

# For an interpolant: within one level of 255 of dopri5's result, at a tenth of its evaluations (benchmarks/README.md).
QUICK_SOLVER, QUICK_STEPS = "midpoint", 5


@dataclass(kw_only=True)
class MethodFlags:
    """A flag for each setting of a method; UDPM, FlowMap and regression have none that sampling may change."""

    # settings of the run's method: as trained unless they are given, and those that the training fixed are refused
    interpolant: Interpolant = field(default_factory=Interpolant)
    sr3: SR3 = field(default_factory=SR3)  # as for an interpolant
    i2sb: I2SB = field(default_factory=I2SB)  # as for an interpolant
    edm: EDM = field(default_factory=EDM)  # as for an interpolant


def check_guidance(run: Run, guidance: float):
    """Guidance starts from what the network says without a label. Raises SettingsError where that was not trained."""
    if guidance != 1 and not run.config.chosen.guided:
        raise SettingsError(f"guidance = {guidance}: allowed is 1 for {run.config.method}")
    if guidance != 1 and run.num_classes and not run.config.trains_null_label:
        raise SettingsError(f"guidance = {guidance}: allowed is 1, for images without labels were no part of the "
                            "training; train with --label-drop 0.1, and not on one batch")


def sampling_config(c, solver: str | None = None, steps: int | None = None, tolerance: float | None = None):
    """The run's settings with the sampler that is asked for. Raises SettingsError."""
    if solver:
        c = replace(c, solver=solver, sample_steps=None)  # the run's count is for the run's solver
    if steps:
        c = replace(c, sample_steps=steps)
    if tolerance:
        c = replace(c, integration_atol=tolerance, integration_rtol=tolerance)
    if c.solver == "auto" and c.sampler == "dopri5" and solver is None and tolerance is None:
        c = replace(c, solver=QUICK_SOLVER, sample_steps=c.sample_steps or QUICK_STEPS)
    if c.solver != "auto" and not c.chosen.has_ode:
        raise SettingsError(f"solver = {c.solver!r}: {c.method} {c.chosen.no_ode}; allowed is auto")
    if c.sampler == "dopri5" and c.sample_steps is not None:
        raise SettingsError(f"steps = {c.sample_steps}: dopri5 chooses its own; add --solver midpoint, "
                            "or leave steps out")
    return c


def changed(trained: Method, wanted: Method) -> dict:
    """The settings that differ, by name, with the values wanted."""
    return {f.name: getattr(wanted, f.name) for f in fields(trained)
            if getattr(wanted, f.name) != getattr(trained, f.name)}


def with_method(c, new: dict, solver: str = "auto"):
    """The run's settings, but `new` ones of its method, by name, where the user names `solver`, auto: none.

    Raises SettingsError for what the training fixed, what the task can't do, and what the solver would not read.
    """
    trained = c.chosen
    known = [f.name for f in fields(trained)]
    for name, value in new.items():
        if name not in known:
            raise SettingsError(f"{trained.prefix}{name} = {shown(value)}: there is no such setting; "
                                f"allowed at sampling are {', '.join(trained.free_at_sampling) or 'none'}")
        was = getattr(trained, name)
        if value != was and name not in trained.free_at_sampling:
            raise SettingsError(f"{trained.prefix}{name} = {shown(value)}: the run was trained with {shown(was)}, "
                                "and samples with it")
        if value != was and solver != "auto" and name in trained.not_in_ode:
            raise SettingsError(f"{trained.prefix}{name} = {shown(value)}: allowed is {shown(was)} with the solver "
                                f"{solver}, which does not read it; the method's own sampler does")
    wanted = replace(trained, **new)
    if wanted == trained:
        return c
    wanted.check(c.task, c.condition)
    if c.solver != "auto" and any(name in trained.not_in_ode for name in changed(trained, wanted)):
        c = replace(c, solver="auto", sample_steps=None)  # the run's solver and count are for the ODE
    return replace(c, **{c.method: wanted})


def given_flags(o: MethodFlags, arguments: list[str], c, methods: set[str]) -> dict:
    """The settings of the run's method that the command line changes, by name. `o` is what it says by itself, while it
    is not known what the run was trained with.

    Raises SettingsError for a method that is none of `methods`, those of all the runs that the command is about.
    """
    trained = {f.name: getattr(c, f.name) for f in fields(MethodFlags)}
    wanted = parse(type(o), arguments, "", default=replace(o, **trained))
    for name, method in trained.items():
        new = changed(method, getattr(wanted, name))
        if new and name not in methods:
            first, value = next(iter(new.items()))
            raise SettingsError(f"{name}.{first} = {shown(value)}: allowed are settings of the run's method, "
                                f"{', '.join(sorted(methods))}")
    return changed(c.chosen, getattr(wanted, c.method, c.chosen))
