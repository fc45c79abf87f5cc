"""Which solver, in how many steps: a trained run's network evaluations (NFE) against the distance from dopri5 at 1e-5.

    python benchmarks/solvers.py RUN                     held-out images of the run's data
    python benchmarks/solvers.py RUN --precisions bf16 fp32

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
from support.machine import bf16_helps, pick_device, set_up
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
    # of the fixed steps; None: bf16 where the chip computes in it
    precisions: tuple[Literal["bf16", "fp32"], ...] | None = None
    count: Count = 500  # images
    batch_size: Count = 100  # images at a time; dopri5's steps depend on it a little
    frechet: bool = True  # also the Frechet distance, by a classifier that is trained once, some minutes on a CPU
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
    """(name, settings, precision), the reference first."""
    precisions = o.precisions or ("bf16" if bf16_helps(device) else "fp32",)
    adaptive = replace(config, solver="dopri5", sample_steps=None)
    result = []
    for tolerance in (1e-5, *o.tolerances):
        setting = replace(adaptive, integration_atol=tolerance, integration_rtol=tolerance)
        result.append((f"dopri5, {tolerance:g}", setting, "fp32"))
    for precision, solver, steps in product(precisions, o.solvers, o.steps):
        setting = replace(config, solver=solver, sample_steps=steps)
        result.append((f"{solver}, {steps} steps", setting, precision))
    return result


def measure_all(o: Options, config: Config, net, judge, device: torch.device) -> list[dict]:
    """A row a candidate: NFE, distance, Frechet distance, seconds."""
    table, reference = [], None
    for name, setting, precision in candidates(o, config, device):
        counted, samples = Counted(net), []

        def make(batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                samples.append(run_sampler(setting, Guided(counted, config.guidance), batch))
            return samples[-1]

        row = dict(name=name, solver=setting.solver, precision=precision)
        try:
            scores = judge(setting, net.num_classes > 0, make)
        except ode_int.SolverError as failure:
            if reference is None:
                raise
            table.append(row | dict(error=str(failure)))
            continue
        x = torch.cat(samples)
        reference = x if reference is None else reference
        rms, worst = rms_in_levels(x, reference)
        nfe, seconds = counted.rows / len(x), scores["seconds"]
        table.append(row | dict(nfe=nfe, rms=rms, rms_worst=worst, frechet=scores.get("frechet"), seconds=seconds))
        print(f"{name}, {precision}: {nfe:.0f} NFE, RMS {rms:.3f} levels", file=sys.stderr)
    return table


def cheapest(table: list[dict], rms: float = 1.0, share: float = 0.02) -> dict | None:
    """The row of fewest evaluations within `rms` levels of the first, of a Frechet distance at most `share` larger."""
    def good(row):
        near = row.get("rms", float("inf")) <= rms
        return near and (row["frechet"] is None or row["frechet"] <= (1 + share) * table[0]["frechet"])

    return min(filter(good, table), key=lambda row: (row["nfe"], row["rms"]), default=None)


def show(report: dict) -> str:
    table = []
    for row in report["table"]:
        numbers = [row.get("error", ""), "", "", "", ""]
        if "rms" in row:
            numbers = [f"{row['nfe']:.0f}", f"{row['rms']:.3f}", f"{row['rms_worst']:.3f}", f"{row['seconds']:.3g}",
                       "" if row["frechet"] is None else f"{row['frechet']:.3f}"]
        table.append([row["name"], row["precision"], *numbers])
    head = ["solver", "precision", "NFE", "RMS, levels", "worst image", "s per image", "FD"]
    best, first = cheapest(report["table"]), report["table"][0]
    within = "one level" if first["frechet"] is None else "one level and 2% of FD"
    choice = (f"Fewest evaluations within {within}: {best['name']}, {best['precision']}: {best['nfe']:.0f} NFE "
              f"instead of {first['nfe']:.0f}.")
    missing = f"\nNo FD: {report['no_frechet']}." if report["no_frechet"] else ""
    return markdown(f"{report['count']} held-out images, {report['run']}.", head, table) + f"\n{choice}{missing}\n"


def measure(o: Options, report: dict):
    device = pick_device(o.device)
    set_up(device)
    run = open_run(o.run, Config)
    net, config = load_network(run).to(device), replace(run.config, dataset=o.dataset or run.config.dataset)
    if not config.chosen.has_ode:
        raise SettingsError(f"run = {o.run!r}: allowed are runs of methods that have an ODE, and {config.method} has "
                            "none")
    judge = Judge(config, device, ("frechet",) if o.frechet else (), o.count, o.batch_size)
    try:
        table = measure_all(o, config, net, judge, device)
    except ode_int.SolverError as failure:
        raise SettingsError(f"run = {o.run!r}: dopri5 fails at 1e-5 ({failure})") from None
    report |= dict(run=o.run, config=asdict(config), count=judge.count, table=table,
                   no_frechet=judge.why.get("frechet") if o.frechet else "switched off")
    print(show(report))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    return command("solvers", Options, measure, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
