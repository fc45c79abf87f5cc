"""Quality of trained runs against the number of network evaluations (NFE), beside baselines: JSON, a table and a plot.

    python evaluate.py RUN [RUN ...]                           runs' folders, checkpoints or exported files
    python evaluate.py RUN [RUN ...] --nfe 1 10 --count 200
    python evaluate.py RUN --guidance 1 2 3                    a row each, also of pictures: RUN.png, quality-guidance
    python evaluate.py RUN --draws 8                           are the draws of an image right? also ranks.png
    python evaluate.py RUN --edm.S-churn 40                    its method's sampler with other settings than its own
    python evaluate.py RUN --pictures restored/                another program's pictures of the held-out images: a row
    python evaluate.py RUN/checkpoints/step_*.pt               checkpoints of one run: also quality-step, a curve
    torchrun --nproc-per-node 4 evaluate.py RUN [RUN ...]      four processes share the images, same figures

Into --output go one JSON file a run, written anew after each row, table.md, and as .pdf and .png quality (against NFE)
and quality-seconds. A RUN that is such a JSON file joins the table as it is, under the file's name.
evaluation/judge.py says how each column is measured, and its standard error.
SSIM, LPIPS, FID and the plot need more packages; all else is measured without them:

    pip install torchmetrics lpips torch-fidelity matplotlib
"""
if __name__ == "__main__":
    from support.output import quiet_interrupt
    quiet_interrupt()

import json
import platform
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image

import ode_int
from evaluation.costs import samplers, training_flops
from evaluation.judge import Judge
from evaluation.metrics import COLUMNS, METRICS
from evaluation.report import cell, differences, table, write_report
from images import SettingsError, data, one_line
from images.corruptions import TASKS, Batch, task_names
from images.files import save_image
from images.pictures import grid, row_titles, titled
from support import bounds, machine
from support.bounds import Seed, between, length, require
from support.checkpoints import Run, open_run
from support.command_line import parse
from support.disk import read_json, write_atomically
from support.machine import autocast, chip, first_process_first, pick_device, print0, reseed, set_up
from support.model import load_network, make_players, run_sampler
from support.output import unbreakable_output
from support.sampler_settings import MethodFlags, check_guidance, given_flags, with_method
from trainer import Config
from unet import Counted, Guided, Unet

SWEPT = 8  # images in a row of the picture of a sweep


@dataclass
class Options(MethodFlags):
    """What is measured, on what, and where the results go."""

    # runs' folders, checkpoints, exported files, JSON files of an earlier evaluation
    runs: tyro.conf.Positional[Annotated[tuple[str, ...], length(1)]]
    # network evaluations per image, guidance counts two; those that a sampler can't do exactly are left out: EDM's Heun
    # takes odd ones only
    nfe: Annotated[tuple[int, ...], between(1, 10_000)] = (1, 3, 5, 9, 19, 49, 99)
    default: bool = True  # a row of the method's own sampler with its own count too
    # sampler at the NFE of --nfe; auto: the method's own (interpolant: midpoint, or euler where that can't do so
    # many); or euler, midpoint, heun, rk4 on its ODE, where it has one
    solver: Literal["auto", "euler", "midpoint", "heun", "rk4"] = "auto"
    # scales of classifier-free guidance: each is a row, and a point of quality-guidance; None: the run's own
    guidance: tuple[float, ...] | None = None
    # folders of pictures that other programs made of the run's held-out images, by the names of those: a row each
    pictures: tuple[str, ...] = ()
    # test images compared, at most; published tables take 10,000 to 50,000
    count: Annotated[int, between(1, 10**9)] = 1000
    draws: Annotated[int, between(1, 1000)] = 1  # draws per image; of several, columns that say whether they are right
    metrics: Annotated[tuple[Literal[METRICS], ...], length(1)] = METRICS  # columns of the table
    # .npz file of mu and sigma of Inception's features, as ADM and clean-fid publish them: FID of all samples to these
    fid_statistics: str | None = None
    # passes over the training images for the classifier behind accuracy and FD, which is trained once
    classifier_epochs: Annotated[int, between(1, 10**9)] = 8
    ema: bool = True  # averaged weights; --no-ema: the raw ones
    # place of the data set now, if it moved: the folder itself, or that of a downloaded set
    data_path: str | None = None
    paired_path: str | None = None  # place of the damaged images now, if they moved (task paired)
    output: str | None = None  # folder of the results; None: a new one in runs/
    cache: str = "runs/cache"  # folder where the classifier and its features of the truth are kept for the next time
    # images at a time; dopri5's steps depend on it a little
    batch_size: Annotated[int, between(1, data.MAX_BATCH)] = 200
    seed: Seed = 0  # seed of the damage and the noise
    device: str = "auto"  # device: auto (cuda if there is one), cuda, cuda:1 or cpu
    # precision of the network's activations; auto: bf16 where the chip computes in it
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"

    def check(self):
        """Raises SettingsError, one line that names field, value and what is allowed."""
        bounds.check(self)
        require(self, "guidance", self.guidance != (), "one number or more")
        require(self, "fid_statistics", not self.fid_statistics or "fid" in self.metrics, "None without the metric fid")
        require(self, "nfe", self.nfe or self.default, "one number or more, with --no-default")


# ------------------------------------------------------------------------------------------------------------ measuring

@dataclass
class Job:
    """A run with one scale of guidance: what is measured, by which samplers, and what is known of it so far."""

    result: dict
    net: Unet
    config: Config
    judge: Judge
    samplers: list[Config]


def describe(run: Run, o: Options, judge: Judge) -> tuple[dict, Unet]:
    """All but the figures that the table, the plot and the reader need of a run, as plain values; and its network.

    The run's settings say where the data is now. Raises SettingsError for what can't be measured.
    """
    c, device = run.config, judge.device
    if run.num_classes and run.classes != judge.images.classes:
        raise SettingsError(f"data_path = {o.data_path!r}: {judge.images.name} has other classes than {run.path} "
                            "was trained on")
    net = load_network(run, o.ema).to(device)
    players = make_players(c, net.requires_grad_(True), run.num_classes)
    parameters = [sum(p.numel() for p in module.parameters()) for module, _ in players]
    left_out = judge.left_out(c, run.num_classes > 0)
    flops = None
    try:
        batch = first_images(judge, c, run.num_classes, 2)
        flops = run.images_seen * training_flops(c.chosen.levels, players, batch, o.precision)
    except SettingsError as failure:  # a loss with LPIPS, whose weights are not available
        left_out["training FLOPs"] = one_line(failure)
    network = ", ".join(f"{name.removeprefix('unet_').replace('_', ' ')} {value}" for name, value in asdict(c).items()
                        if name.startswith("unet_"))
    problem = dict(
        task=task(c), dataset=judge.images.name, image_size=c.image_size, channels=c.channels, images=judge.count,
        split=judge.split, test_images=judge.digest, classifier=judge.key, classifier_accuracy=judge.accuracy,
        seed=o.seed)
    if o.draws > 1:
        problem["draws"] = o.draws
    if o.fid_statistics:
        problem["fid_statistics"] = Path(o.fid_statistics).name
    training = dict(
        network=network, labels=run.num_classes > 0, condition=c.condition, images_seen=run.images_seen,
        weights="EMA" if o.ema else "raw", guidance=c.guidance, overfit=c.overfit)
    costs = dict(parameters=parameters, training_flops=flops, steps=run.step, global_batch=c.batch_size)
    record = dict(
        processes=machine.processes()[1], batch_size=o.batch_size, precision=o.precision, device=chip(device),
        code=machine.code_version(), python=platform.python_version(), torch=torch.__version__)
    result = dict(
        name=run.name, run_name=run.name, run=run.path, method=c.method, problem=problem, training=training,
        costs=costs, record=record, rows=[], baselines=[], left_out=left_out, nfe_left_out=[], config=asdict(c))
    return result, net.eval().requires_grad_(False)


def measure(job: Job, o: Options, file: Path):
    """Fills in the rows of a job's result, one for each sampler. `file` holds the result as far as it goes."""
    c, judge, rows, classes = job.config, job.judge, job.result["rows"], job.net.num_classes
    own = replace(c, solver="auto", sample_steps=None)
    for setting in job.samplers:
        counted = Counted(job.net)

        def make(batch):
            with autocast(judge.device, o.precision):
                return run_sampler(setting, Guided(counted, c.guidance), batch)

        sampler = setting.sampler
        if sampler == "own":
            sampler = f"own {getattr(c.chosen, 'sampler', '')}".strip()
        row = dict(sampler=sampler, steps=setting.sample_steps, default=setting == own, nfe=None)
        try:
            if not rows:  # what comes first sets the device up, which says nothing of speed
                with torch.no_grad(), suppress(ode_int.SolverError):  # the judge meets it again, in all processes
                    make(first_images(judge, c, classes, o.batch_size if o.nfe else 2))
                counted.rows = 0
            row |= judge(setting, classes > 0, make, o.draws)
            row["nfe"] = sum(machine.all_gather(counted.rows)) / (judge.count * o.draws)
        except ode_int.SolverError as failure:
            row["failed"] = one_line(failure)
        rows.append(row)
        if machine.processes()[0] == 0:
            plain = json.dumps(job.result, indent=1)
            write_atomically(file, lambda f: f.write(plain.encode()))
        figures = ", ".join(f"{m} {cell(row, m)}" for m in COLUMNS if m in row and COLUMNS[m].format)
        print0(f"{job.result['name']}, {sampler}: {row.get('failed', figures)}")


def first_images(judge: Judge, c: Config, classes: int, count: int) -> Batch:
    z1, y, zlo = judge.images.batch(judge.batches[0][:count], judge.device, "test")
    return c.damaged(z1, y if classes else None, zlo)


def task(config: Config) -> str:
    """The task, and the fields of Damage that make it what it is."""
    described = []
    for name in dict.fromkeys(task_names(config.task)):
        settings = ", ".join(f"{knob} {getattr(config.damage, knob)}" for knob in TASKS[name].knobs)
        described.append(f"{name} ({settings})" if settings else name)
    return " or ".join(described)


# ----------------------------------------------------------------------------------------------------------------- main

def read_result(path: str) -> dict:
    """What an earlier evaluation wrote. Raises SettingsError."""
    try:
        result = read_json(Path(path)) | dict(name=Path(path).stem)
        table([result])
        return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as failure:
        raise SettingsError(f"run = {path!r}: it is no result of an evaluation ({one_line(failure)[:100]})") from None


def open_where_the_data_is(path: str, o: Options) -> Run:
    """A run, its settings with the data where it is now. Raises SettingsError."""
    run = open_run(path, Config)
    moved = {}
    if o.data_path is not None:
        named = run.config.dataset in (*data.DOWNLOADS, *data.WITH_THE_CLONE)
        moved["data_path" if named else "dataset"] = o.data_path
    return replace(run, config=replace(run.config, paired_path=o.paired_path or run.config.paired_path, **moved))


def as_asked(run: Run, o: Options, arguments: list[str], methods: set[str], steps: bool) -> list[tuple[Config, dict]]:
    """The settings that a run is measured with, one for each scale of guidance, and what they change of the run's;
    steps: several checkpoints of it are measured. Raises SettingsError."""
    new = given_flags(o, arguments, run.config, methods)
    config = with_method(run.config, new, o.solver)
    changed = dict(step=run.step) if steps else {}
    changed |= {f"{config.method}.{name}": value for name, value in new.items()}
    asked = []
    for scale in dict.fromkeys(o.guidance or [config.guidance]):
        if scale != 1 and not run.num_classes:
            raise SettingsError(f"guidance = {scale}: allowed is 1, for {run.path} was trained without labels")
        check_guidance(run, scale)
        swept = {} if scale == run.config.guidance and o.guidance is None else dict(guidance=scale)
        asked.append((replace(config, guidance=scale), changed | swept))
    return asked


def called(run: Run, changed: dict) -> str:
    """A run's name, and what sets these figures of it apart."""
    return run.name + "".join(f"-{name}-{value}" for name, value in changed.items())


def prepare(o: Options, arguments: list[str], device: torch.device) -> tuple[list[dict], list[Job]]:
    """-> a result of each run, and what is to be measured.

    Everything is described before anything is measured: what is wrong shows at once. Raises SettingsError.
    """
    with machine.settings_for_all():
        earlier = {path: read_result(path) for path in o.runs if Path(path).suffix == ".json"}
        runs = {path: open_where_the_data_is(path, o) for path in o.runs if path not in earlier}
        methods = {run.config.method for run in runs.values()}
        times = Counter(run.name for run in runs.values())
        asked = {path: as_asked(run, o, arguments, methods, times[run.name] > 1) for path, run in runs.items()}
        names = [earlier[path]["name"] if path in earlier else called(runs[path], asked[path][0][1])
                 for path in o.runs]
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise SettingsError(f"runs = {o.runs!r}: allowed is one of the name {twice[0]}; a copy of its JSON file "
                                "may have another")
    judges = {}  # of each data set
    results, jobs = [], []
    for path in o.runs:
        if path in earlier:
            results.append(earlier[path])
            continue
        c = runs[path].config
        key = c.dataset, c.data_path, c.paired_path, c.image_size, c.channels, c.crop
        if key not in judges:
            judges[key] = Judge(c, device, o.metrics, o.count, o.batch_size, o.seed, o.classifier_epochs, Path(o.cache),
                                o.fid_statistics)
            with machine.settings_for_all():
                judges[key].take_pictures(o.pictures, c)
        judge = judges[key]
        with first_process_first():  # a loss with LPIPS downloads weights
            result, net = describe(runs[path], o, judge)
        batch = first_images(judge, c, net.num_classes, 2)
        for c, changed in asked[path]:
            own = result | dict(name=called(runs[path], changed), changed=changed, config=asdict(c), rows=[],
                                training=result["training"] | dict(guidance=c.guidance))
            settings, own["nfe_left_out"] = samplers(c, o.nfe, batch, o.solver, o.default)
            if not settings:  # its own count is the only one it can do
                settings, _ = samplers(c, (), batch, o.solver, default=True)
            jobs.append(Job(own, net, c, judge, settings))
            results.append(own)
    return results, jobs


def save_sweep(jobs: list[Job], o: Options, file: Path):
    """One picture of a run's jobs: of each the samples by its last sampler, in a row; the images of a column have
    their noise in common."""
    grids = []
    for job in jobs:
        batch = first_images(job.judge, job.config, job.net.num_classes, SWEPT)
        reseed("sweep", o.seed)
        with torch.no_grad(), autocast(job.judge.device, o.precision):
            samples = run_sampler(job.samplers[-1], Guided(job.net, job.config.guidance), batch)
        grids.append(grid(samples.float().cpu(), columns=len(samples)))
    titles = [", ".join(f"{name} {value}" for name, value in job.result["changed"].items()) for job in jobs]
    picture = np.concatenate(grids)
    picture = titled(["", "samples"], [row_titles(titles, len(picture)), picture])
    save_image(file, Image.fromarray(picture))


def run(o: Options, arguments: list[str]):
    """Measures what is to be measured and writes it. Raises SettingsError."""
    with machine.settings_for_all():
        device = pick_device(o.device)
        folder = Path(o.output or f"runs/evaluation-{time.strftime('%Y%m%d-%H%M%S')}")
        o = replace(o, precision=set_up(device, o.precision))
        try:
            (folder if o.output else folder.parent).mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise SettingsError(f"output = {str(folder)!r}: no folder can be made there ({failure.strerror})") from None
    results, jobs = prepare(o, arguments, device)
    first = machine.processes()[0] == 0
    if first:
        folder.mkdir(exist_ok=True)
    for difference in differences(results):
        print0(f"not one comparison: {difference}", sys.stderr)
    baselines = {}  # of each problem
    try:
        for job in jobs:
            problem = json.dumps(job.result["problem"])
            if problem not in baselines:
                baselines[problem] = job.judge.baselines(job.config)
            job.result["baselines"] = baselines[problem]
            measure(job, o, folder / f"{job.result['name']}.json")
        if first and len(o.guidance or ()) > 1:
            for name in dict.fromkeys(job.result["run_name"] for job in jobs):
                of_run = [job for job in jobs if job.result["run_name"] == name]
                with suppress(ode_int.SolverError):  # which the table tells
                    save_sweep(of_run, o, folder / f"{name}.png")
    finally:
        measured = [result for result in results if result["rows"]]
        if first and measured:
            write_report(measured, folder)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 broke off, 2 bad input, 130 interrupted; what was measured until then is kept."""
    unbreakable_output()
    try:
        machine.join_processes(torch.device("cpu"))  # by gloo: what they tell each other is on the CPU
        arguments = sys.argv[1:] if arguments is None else arguments
        o = parse(Options, arguments, __doc__)
        o.check()
        run(o, arguments)
        machine.leave_processes()
        return 0
    except SettingsError as failure:  # in all processes
        print0(f"evaluate.py: {failure}", sys.stderr)
        machine.leave_processes()
        return 2
    except (OSError, RuntimeError) as failure:
        return machine.failed("evaluate.py", failure, "lower batch_size")
    except KeyboardInterrupt:
        print0("evaluate.py: interrupted", sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
