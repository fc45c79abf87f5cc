"""Which solver, in how many steps: a trained run's network evaluations (NFE) against the distance from dopri5 at 1e-5.

    python benchmarks/solvers.py RUN                     held-out images of the run's data
    python benchmarks/solvers.py RUN --solvers midpoint --steps 3 5 10

Every row starts from the same noise. Distance is the root mean square over pixels, in levels of 255, of what the solver
makes of an image minus what dopri5 at 1e-5 makes of it. Not PSNR: one Euler step is the regression answer, and scores
best there. FD is evaluation/judge.py's Frechet distance to held-out images. Prints a Markdown table and writes JSON.
"""
import sys
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from torch import Tensor

import ode_int
from benchmarks.common import command, markdown
from evaluation.judge import Judge
from images import SettingsError
from support import bounds
from support.bounds import Count, Positive
from support.checkpoints import open_run
from support.machine import autocast, bf16_helps, pick_device, set_up
from support.model import load_network, run_sampler
from trainer import Config
from unet import Counted, Guided


@dataclass
class Options:
    """What to measure."""

    run: tyro.conf.Positional[str]  # a run's folder, or a checkpoint; its method has an ODE
    solvers: tuple[Literal["euler", "midpoint", "heun", "rk4"], ...] = tuple(ode_int.FIXED_STEP)  # with each of `steps`
    steps: tuple[Count, ...] = (2, 3, 4, 5, 7, 10, 15, 20)  # of those
    tolerances: tuple[Positive, ...] = (1e-2, 1e-3, 1e-4)  # of dopri5, beside the reference at 1e-5
    count: Count = 500  # images
    batch_size: Count = 100  # images at a time; dopri5's steps depend on it a little
    dataset: str | None = None  # folder of the data, if it moved; None: the run's
    device: str = "auto"  # auto: cuda if there is one; or cuda, cuda:1, cpu
    out: str | None = None  # the JSON file; None: runs/solvers-DATE.json

    def check(self):
        """Raises SettingsError, one line that names field, value and what is allowed."""
        bounds.check(self)


def rms_in_levels(x: Tensor, reference: Tensor) -> tuple[float, float]:
    """RMS of x - reference (B, C, H, W), both clamped, in levels of 255: of all pixels, of the worst image's."""
    error = (x.clamp(-1, 1) - reference.clamp(-1, 1)).mul(127.5).square().flatten(1).mean(1)
    return error.mean().sqrt().item(), error.max().sqrt().item()


def candidates(o: Options, config: Config, device: torch.device) -> list[tuple[str, Config, str]]:
    """(name, settings, precision), the reference first. Fixed steps are in bf16 where the chip computes in it."""
    result = []
    for tolerance in (1e-5, *o.tolerances):
        setting = replace(config, solver="dopri5", sample_steps=None, integration_atol=tolerance,
                          integration_rtol=tolerance)
        result.append((f"dopri5, {tolerance:g}", setting, "fp32"))
    for solver, steps in product(o.solvers, o.steps):
        setting = replace(config, solver=solver, sample_steps=steps)
        result.append((f"{solver}, {steps} steps", setting, "bf16" if bf16_helps(device) else "fp32"))
    return result


def measure(o: Options, report: dict):
    device = pick_device(o.device)
    set_up(device)
    run = open_run(o.run, Config)
    net, config = load_network(run).to(device), replace(run.config, dataset=o.dataset or run.config.dataset)
    if not config.chosen.has_ode:
        raise SettingsError(f"run = {o.run!r}: allowed are runs of methods that have an ODE, and {config.method} has "
                            "none")
    judge = Judge(config, device, ("frechet",), o.count, o.batch_size)
    rows, reference = [], None
    for name, setting, precision in candidates(o, config, device):
        counted, samples = Counted(net), []

        def make(batch):
            with autocast(device, precision):
                samples.append(run_sampler(setting, Guided(counted, config.guidance), batch))
            return samples[-1]

        row = dict(name=name, precision=precision)
        try:
            scores = judge(setting, net.num_classes > 0, make)
            x = torch.cat(samples)
            reference = x if reference is None else reference
            rms, worst = rms_in_levels(x, reference)
            row |= dict(nfe=counted.rows / len(x), rms=rms, rms_worst=worst, frechet=scores.get("frechet"),
                        seconds=scores["seconds"])
        except ode_int.SolverError as failure:
            if reference is None:
                raise SettingsError(f"run = {o.run!r}: dopri5 fails at 1e-5 ({failure})") from None
            row["error"] = f": {failure}"
        rows.append(row)
        print(f"{name}, {precision}: done", file=sys.stderr)
    report |= dict(run=o.run, config=asdict(config), count=judge.count, table=rows)
    forms = dict(nfe=".0f", rms=".3f", rms_worst=".3f", seconds=".3g", frechet=".3f")
    table = []
    for row in rows:
        figures = [format(row[name], form) if row.get(name) is not None else "" for name, form in forms.items()]
        table.append([row["name"] + row.get("error", ""), row["precision"], *figures])
    head = ["solver", "precision", "NFE", "RMS, levels", "worst image", "s per image", "FD"]
    print(markdown(f"{judge.count} held-out images, {o.run}.", head, table))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    return command("solvers", Options, measure, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
