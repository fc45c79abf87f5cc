"""Quality of trained runs against the number of network evaluations (NFE), beside baselines: JSON, a table and a plot.

    python evaluate.py RUN [RUN ...]                           runs' folders, or checkpoints
    python evaluate.py RUN [RUN ...] --nfe 1 10 --count 200

A RUN that is a JSON file of an earlier evaluation joins the table without being measured again. Into --output go one JSON file a
run, table.md, quality.pdf and quality.png. pip install torchmetrics lpips torch-fidelity matplotlib: for SSIM, LPIPS, FID and the
plot. All else is measured without them; metrics.py says how.
"""
import json
import math
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

import data
import ode_int
from corruptions import Batch, parts
from logs import one_line, write_atomically
from metrics import METRICS, Judge
from settings import parse
from trainer import Config, bf16_helps, draw, make_unet, open_checkpoint, pick_device, reseed, run_folder
from unet import Guided


@dataclass
class Options:
    """What is measured, on what, and where the results go."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # runs' folders, checkpoints, or JSON files of an earlier evaluation
    nfe: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 50, 100)  # evaluations an image; guidance counts two; what a method can't do is left out
    default: bool = True  # also the method's own sampler with its own count
    solver: str = "auto"  # at those NFE; auto: the method's own sampler (interpolant: euler); or euler, midpoint, heun, rk4 on its ODE
    count: int = 1000  # test images compared, at most; published tables take 10,000 to 50,000
    metrics: tuple[str, ...] = METRICS  # the columns
    classifier_epochs: int = 8  # passes over the training images for the classifier behind accuracy and FD, which is trained once
    ema: bool = True  # the averaged weights; --no-ema: the raw ones
    data_path: str | None = None  # where the data set is now, if it moved: the folder itself, or that of a downloaded set
    paired_path: str | None = None  # task paired: where the damaged images are now, if they moved
    output: str = "runs/evaluation"  # folder of the results
    batch_size: int = 200  # images at a time; dopri5's steps depend on it a little
    seed: int = 0  # of damage and noise
    device: str = "auto"  # auto: cuda if there is one; or cuda, cuda:1, cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the network's activations; auto: bf16 where the chip computes in it

    def check(self):
        """Raises ValueError, one line that names field, value and what is allowed."""
        def need(name, good, allowed):
            if not good:
                raise ValueError(f"{name} = {getattr(self, name)!r}: allowed is {allowed}")

        need("runs", self.runs, "one run or more")
        need("nfe", all(n >= 1 for n in self.nfe) and (self.nfe or self.default), "numbers from 1")
        need("solver", self.solver in ("auto", *ode_int.FIXED_STEP), "auto, " + ", ".join(ode_int.FIXED_STEP))
        need("metrics", self.metrics and set(self.metrics) <= set(METRICS), ", ".join(METRICS))
        for name in ("count", "batch_size", "classifier_epochs"):
            need(name, getattr(self, name) >= 1, "1 or more")
        if self.device != "auto":
            try:
                torch.empty(1, device=self.device)
            except (RuntimeError, AssertionError):
                raise ValueError(f"device = {self.device!r}: allowed is auto, cpu, or a CUDA device that is there") from None


# ------------------------------------------------------------------------------------------------------ samplers and costs

def evaluations(config: Config, batch: Batch) -> float:
    """NFE of the sampler, counted with a network that says 0; inf where it does not allow its count of steps."""
    scale = getattr(config.recipe, "upscale", 1)
    counted = ode_int.Counted(lambda x, *_: x.new_zeros(len(x), x.shape[1], x.shape[2] * scale, x.shape[3] * scale))
    try:
        draw(config, Guided(counted, config.guidance), batch)
    except ValueError:
        return math.inf
    return counted.rows / len(batch.zlo)


def samplers(config: Config, nfe, batch: Batch, solver="auto", default=True) -> tuple[list[Config], list[int]]:
    """For each of `nfe` the sampler that takes exactly so many evaluations, the method's default last; and the NFE for which there is none."""
    own = replace(config, solver="auto", sample_steps=None)
    few = replace(own, solver=solver)
    if few.sampler == "dopri5":  # it chooses its own steps
        few = replace(few, solver="euler")
    usual = evaluations(own, batch) if few.sampler == own.sampler else None
    found, missing = [], []
    for n in sorted(set(nfe)):
        setting, low, high = own, 1, n
        cost = usual if usual == n else math.inf
        while cost != n and low <= high:  # NFE grow with steps
            setting = replace(few, sample_steps=(low + high) // 2)
            cost = evaluations(setting, batch)
            low, high = (setting.sample_steps + 1, high) if cost < n else (low, setting.sample_steps - 1)
        if cost == n:
            found.append(setting)
        else:
            missing.append(n)
    return found + [own] * (default and own not in found), missing


def training_flops(method, players: list, batch: Batch, autocast) -> float:
    """Floating-point operations of a training step, forward and backward, of every player, an image.

    A method with levels (UDPM) draws one for each step: the mean over levels, which are told apart by what they cost.
    """
    costs, levels = [set() for _ in players], getattr(method, "levels", 1)
    for number in range(8 * levels):
        reseed("flops", number)
        for cost, (module, loss) in zip(costs, players):
            with FlopCounterMode(display=False) as counter:
                with autocast():
                    value = loss(module, batch).mean()
                value.backward()
            module.zero_grad()
            cost.add(counter.get_total_flops())
        if all(len(cost) == levels for cost in costs):
            break
    return sum(sum(cost) / len(cost) for cost in costs) / len(batch.zlo)


# -------------------------------------------------------------------------------------------------------------- measuring

def evaluate(run: str, c: Config, o: Options, judge: Judge, baselines: list[dict]) -> dict:
    """All that the table, the plot and the reader need to know of a run, as plain values. `c`: its settings, with the data where it is now."""
    _, checkpoint = open_checkpoint(run)
    classes, device, name = checkpoint["num_classes"], judge.device, run_folder(run).name
    if classes and checkpoint["classes"] != judge.images.classes:
        raise ValueError(f"data_path = {o.data_path!r}: {judge.images.name} has other classes than {run} was trained on")
    bf16 = o.precision == "bf16" or o.precision == "auto" and bf16_helps(device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    net = make_unet(c, classes).to(device, memory_format=torch.channels_last)
    players = c.recipe.players(net, c.channels, classes) if hasattr(c.recipe, "players") else [(net, c.recipe.loss)]
    players = [(module.to(device), loss) for module, loss in players]
    z1, y, zlo = judge.images.batch(judge.batches[0][:2], device, "test")
    few = c.damage(c.task, z1, y if classes else None, c.condition, zlo)
    left_out, seen = judge.left_out(c, classes > 0), checkpoint["step"] * c.batch_size
    try:
        flops = seen * training_flops(c.recipe, players, few, autocast)
    except ValueError as failure:  # a loss with LPIPS, whose weights are not to be had
        flops, left_out["training FLOPs"] = None, one_line(failure)
    try:
        net.load_state_dict(checkpoint["ema"] if o.ema else checkpoint["players"][0])
    except RuntimeError as failure:
        raise ValueError(f"run = {run!r}: its weights are not of the network that its settings describe ({one_line(failure)[:150]})") from None
    net.eval().requires_grad_(False)

    rows = []
    settings, missing = samplers(c, o.nfe, few, o.solver, o.default)
    for number, setting in enumerate(settings):
        counted = ode_int.Counted(net)

        def make(batch):
            with autocast():
                return draw(setting, Guided(counted, c.guidance), batch)[0]

        if number == 0:  # the first call sets the device up, which says nothing of speed
            with torch.no_grad():
                make(few)
            counted.rows = 0
        sampler = setting.sampler if setting.sampler != "own" else f"own {getattr(c.recipe, 'sampler', '')}".strip()
        row = dict(sampler=sampler, steps=setting.sample_steps, default=setting == replace(c, solver="auto", sample_steps=None))
        try:
            row |= judge(setting, classes > 0, make)
            row["nfe"] = counted.rows / judge.count
        except ode_int.SolverError as failure:
            row |= dict(nfe=counted.rows / judge.count, failed=one_line(failure))
        rows.append(row)
        print(f"{name}, {sampler}, {row['nfe']:.4g} NFE:", ", ".join(f"{m} {cell(row, m)}" for m in COLUMNS if m in row), row.get("failed", ""))

    return dict(
        name=name, run=str(run), method=c.method,
        problem=dict(task=task(c), dataset=judge.images.name, image_size=c.image_size, channels=c.channels, images=judge.count, split=judge.split,
                     test_images=judge.digest, classifier=judge.key, classifier_accuracy=judge.accuracy, seed=o.seed),
        training=dict(network=f"{c.unet_channels} x {c.unet_dim_mults}, {c.unet_blocks} blocks", labels=classes > 0, condition=c.condition,
                      images_seen=seen, weights="EMA" if o.ema else "raw", guidance=c.guidance, overfit=c.overfit),
        costs=dict(parameters=[sum(p.numel() for p in module.parameters()) for module, _ in players], training_flops=flops,
                   steps=checkpoint["step"], global_batch=c.batch_size),
        record=dict(reference="the same test images, undamaged; FID and FD: the other half of them", quantised="uint8, clamped",
                    dopri5=dict(atol=c.integration_atol, rtol=c.integration_rtol), batch_size=o.batch_size, precision="bf16" if bf16 else "fp32",
                    device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
                    code=code_version(), python=platform.python_version(), torch=torch.__version__),
        rows=rows, baselines=baselines, left_out=left_out, nfe_left_out=missing,
        config=json.loads(json.dumps(asdict(c)), parse_constant=str))  # JSON has no infinity


def task(config: Config) -> str:
    """The task and the knobs that make it what it is. How sr enlarges its input again is the method's affair, not the task's."""
    knobs = dict(sr=("factor", "down"), inpaint=("mask",), blur=("kernel", "width", "sigma"), jpeg=("quality",))
    named = {name: ", ".join(f"{knob} {getattr(config.damage, knob)}" for knob in knobs.get(name, ())) for name in parts(config.task)}
    return " or ".join(name + f" ({settings})" * bool(settings) for name, settings in named.items())


def code_version() -> str:
    try:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --------------------------------------------------------------------------------------------------------- table and plot

COLUMNS = {  # of a row: title, format
    "psnr": ("PSNR, dB ↑", "{:.2f}"), "ssim": ("SSIM ↑", "{:.3f}"), "lpips": ("LPIPS ↓", "{:.3f}"), "fid": ("FID ↓", "{:.2f}"),
    "consistency": ("consistency, 1e-5 ↓", "{:.2f}"), "bias": ("bias by channel", "{:+.1f}"), "accuracy": ("accuracy, % ↑", "{:.1f}"),
    "frechet": ("FD ↓", "{:.2f}"), "seconds": ("s/image", "{:.2g}")}
PANELS = ("psnr", "frechet", "fid", "accuracy")
ABOUT = """\
Samples are compared as uint8. Consistency: squared error on [0, 1] of the sample damaged again, against the input. Bias: mean of sample -
truth, in levels of 255. Accuracy: share of the samples that the classifier puts into their class. FD and FID: Frechet distances on the
classifier's and on Inception's features, of the samples for half of the images to the truth of the other half, both ways; floor: one half of
the truth to the other. They depend on the number of images: compare them within this table only. Training FLOPs: forward and backward of all
networks."""


def cell(row: dict, column: str) -> str:
    value = row.get(column)
    values = value if isinstance(value, list) else [value]
    return "–" if value is None else " ".join(COLUMNS[column][1].format(v) for v in values)


def line(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def groups(results: list[dict]) -> list[list[dict]]:
    """Runs on one problem belong together."""
    found = {}
    for result in results:
        found.setdefault(json.dumps(result["problem"]), []).append(result)
    return list(found.values())


def title(result: dict, results: list[dict]) -> str:
    """The method if that says which run it is, else the run's folder."""
    return result["method"] if [r["method"] for r in results].count(result["method"]) == 1 else result["name"]


def differences(results: list[dict]) -> list[str]:
    """What keeps the runs from being one comparison."""
    found, name = [], partial(title, results=results)
    for kind in ("problem", "training"):
        for key in results[0][kind]:
            values = [result[kind][key] for result in results]
            if any(value != values[0] for value in values):
                found.append(f"the runs differ in {key.replace('_', ' ')}: " + "; ".join(f"{name(r)} {v}" for r, v in zip(results, values)))
    return found + [f"{name(r)} was trained on a single batch (overfit)" for r in results if r["training"]["overfit"]]


def table(results: list[dict]) -> str:
    """Markdown: for each problem the figures and what is missing; then the runs' sizes and costs."""
    name = partial(title, results=results)
    lines = ["# Quality against the number of network evaluations (NFE)", "", *(f"**Not one comparison:** {d}.\n" for d in differences(results))]
    for group in groups(results):
        p, record, baselines = group[0]["problem"], group[0]["record"], group[0]["baselines"]
        columns = [m for m in COLUMNS if any(m in row for result in group for row in result["rows"])]
        lines += [f"## {p['task']}: {p['dataset']}, {p['image_size']}x{p['image_size']}", "",
                  line("run", "sampler", "NFE", *(COLUMNS[m][0] for m in columns)), "|---|---|" + "---:|" * (len(columns) + 1)]
        lines += [line(row["name"], "", "", *(cell(row, m) if m != "seconds" else "" for m in columns)) for row in baselines]
        lines += [line(name(result), row.get("failed", row["sampler"]) + ", default" * row["default"], f"{row['nfe']:.4g}", *(cell(row, m) for m in columns))
                  for result in group for row in result["rows"]]
        why = {}
        for result in group:
            for metric, reason in result["left_out"].items():
                why.setdefault(f"{COLUMNS.get(metric, [metric])[0].strip(' ↑↓')} is not measured: {reason}", []).append(name(result))
        lines += ["", *(f"- {reason}" + f" ({', '.join(names)})" * (len(names) < len(group)) for reason, names in why.items())]
        lines += [f"- {name(r)} has no sampler of {', '.join(map(str, r['nfe_left_out']))} NFE" for r in group if r["nfe_left_out"]]
        if all(result["method"] != "regression" for result in group):
            lines.append("- a regression network is missing: train one with --method regression and the other runs' settings, and name it too")
        if p["classifier"]:
            lines.append(f"- classifier {p['classifier']}: {p['classifier_accuracy']:.1f}% of all test images right")
        lines.append(f"- {p['images']:,} images of the {p['split']} split, FD and FID {p['images'] // 2:,} against {p['images'] // 2:,}; seed {p['seed']}, "
                     f"batches of {record['batch_size']}, {record['device']}, {record['precision']}, code {record['code']}, torch {record['torch']}\n")
    lines += [line("run", "network", "parameters", "images seen", "global batch", "training FLOPs", "weights", "labels"), "|---|---|" + "---:|" * 4 + "---|---|"]
    for result in results:
        t, costs = result["training"], result["costs"]
        lines.append(line(name(result), t["network"], " + ".join(f"{n / 1e6:.2f}M" for n in costs["parameters"]), f"{t['images_seen']:,}",
                          costs["global_batch"], "–" if costs["training_flops"] is None else f"{costs['training_flops']:.2e}", t["weights"],
                          f"guidance {t['guidance']:g}" if t["labels"] else "none"))
    return "\n".join(lines) + f"\n\n{ABOUT}\n"


def plot(results: list[dict]):
    """A matplotlib Figure: problems in rows, metrics in columns, a line a run; stars are default samplers, horizontal lines baselines."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    panels = [m for m in PANELS if any(m in row for result in results for row in result["rows"])] or ["seconds"]
    figure = Figure(figsize=(3.6 * len(panels), 3.1 * len(groups(results)) + 0.5), layout="constrained")
    grid = figure.subplots(len(groups(results)), len(panels), squeeze=False)
    for group, axes in zip(groups(results), grid):
        axes[0].set_title(f"{group[0]['problem']['task']}: {group[0]['problem']['dataset']}", loc="left", fontsize=9)
        for metric, ax in zip(panels, axes):
            ticks = set()
            for number, result in enumerate(group):
                rows, style = [row for row in result["rows"] if metric in row], dict(color=f"C{number}", label=title(result, results), lw=1.4)
                if result["method"] == "regression" and rows:
                    ax.axhline(rows[0][metric], ls="-.", **style)
                    continue
                joined = [row for row in rows if row["sampler"] == rows[0]["sampler"]]
                ax.plot([row["nfe"] for row in joined], [row[metric] for row in joined], "o-", ms=4, **style)
                for row in rows:
                    ticks.add(round(row["nfe"]))
                    if row["default"]:
                        ax.plot(row["nfe"], row[metric], "*", color=style["color"], ms=12, mec="white", mew=0.7)
            for row, dashes in zip(group[0]["baselines"][::-1], (":", "--", (0, (6, 2, 1, 2)))):
                if metric in row:
                    ax.axhline(row[metric], color="0.4", lw=1, ls=dashes, label=row["name"])
            ticks = sorted(ticks & {1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000} or ticks)
            ax.set(xscale="log", yscale="log" if metric in ("frechet", "fid") else "linear", xlabel="network evaluations (NFE)", ylabel=COLUMNS[metric][0])
            ax.set_xticks(ticks, map(str, ticks))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for ax in grid.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def save(results: list[dict], folder: Path):
    written = table(results)
    print("\n" + written)
    write_atomically(folder / "table.md", lambda f: f.write(written.encode()))
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
    else:
        with matplotlib.rc_context({"pdf.fonttype": 42}):  # letters stay letters
            for ending in ("pdf", "png"):
                write_atomically(folder / f"quality.{ending}", lambda f: plot(results).savefig(f, format=ending, dpi=200))
    print(f"in {folder}")


# ------------------------------------------------------------------------------------------------------------------- main

def open_run(run: str, o: Options) -> Config | dict:
    """A run's settings, with the data where it is now; or what a JSON file says of a run. Raises ValueError."""
    if Path(run).suffix == ".json":
        try:
            result = json.loads(Path(run).read_text())
            table([result])
            return result
        except (OSError, ValueError, KeyError, TypeError) as failure:
            raise ValueError(f"run = {run!r}: it is no result of an evaluation ({one_line(failure)[:100]})") from None
    try:
        c, _ = open_checkpoint(run)
    except ValueError as failure:
        raise ValueError(str(failure).replace("resume", "run", 1)) from None
    if o.solver != "auto" and not hasattr(c.recipe, "velocity"):
        raise ValueError(f"solver = {o.solver!r}: {run} is of {c.method}, which has no ODE; allowed is auto")
    moved = {} if o.data_path is None else {"data_path" if c.dataset in (*data.DOWNLOADS, "shapes") else "dataset": o.data_path}
    return replace(c, paired_path=o.paired_path or c.paired_path, **moved)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 broke off, 2 bad input, 130 interrupted; the runs finished until then keep their JSON files."""
    try:
        o = parse(Options, sys.argv[1:] if arguments is None else arguments, __doc__)
        o.check()
        opened, device, folder = [open_run(run, o) for run in o.runs], pick_device(Config(device=o.device)), Path(o.output)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise ValueError(f"output = {o.output!r}: no folder can be made there ({failure.strerror})") from None
        judges, baselines, results = {}, {}, []
        sets = [(c.dataset, c.data_path, c.paired_path, c.image_size, c.channels) if isinstance(c, Config) else None for c in opened]
        for key, c in zip(sets, opened):  # all the data first: what is missing shows before work is done
            if key and key not in judges:
                judges[key] = Judge(c, device, o.metrics, o.count, o.batch_size, o.seed, o.classifier_epochs)
        for run, key, c in zip(o.runs, sets, opened):
            if key:
                if (key, task(c)) not in baselines:
                    baselines[key, task(c)] = judges[key].baselines(c)
                result = evaluate(run, c, o, judges[key], baselines[key, task(c)])
                plain = json.dumps(result, indent=1)
                write_atomically(folder / f"{run_folder(run).name}.json", lambda f: f.write(plain.encode()))
            results.append(result if key else c)
        save(results, folder)
        return 0
    except (ValueError, data.DatasetError) as failure:
        print(f"evaluate.py: {failure}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError:
        print("evaluate.py: out of GPU memory; lower batch_size", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
