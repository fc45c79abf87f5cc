"""The table and the plot of evaluate.py: what was measured of several runs side by side, with all that keeps it from
being fair."""
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from images.files import write_atomically

COLUMNS = {  # of a row: title, format
    "nfe": ("NFE", "{:.4g}"),
    "psnr": ("PSNR, dB ↑", "{:.2f}"),
    "ssim": ("SSIM ↑", "{:.3f}"),
    "lpips": ("LPIPS ↓", "{:.3f}"),
    "fid": ("FID ↓", "{:.2f}"),
    "consistency": ("consistency, 1e-5 ↓", "{:.2f}"),
    "bias": ("bias by channel", "{:+.1f}"),
    "accuracy": ("accuracy, % ↑", "{:.1f}"),
    "frechet": ("FD ↓", "{:.2f}"),
    "seconds": ("s/image", "{:.2g}"),
}
PANELS = ("psnr", "lpips", "frechet", "fid", "accuracy")
ABOUT = """\
Samples are compared as uint8. Consistency: squared error on [0, 1] of the sample damaged again, against the input.
Bias: mean of sample - truth, in levels of 255. Accuracy: share of the samples that the classifier puts into their
class. FD and FID: Frechet distances on the classifier's and on Inception's features, of the samples for half of the
images to the truth of the other half, both ways; floor: one half of the truth to the other. They depend on the number
of images: compare them within this table only, and of fewer images than features (at most 128, and 2,048) they are
mostly bias. Training FLOPs: forward and backward of all networks."""


def check_result(result: dict):
    """Raises TypeError, ValueError or KeyError for what can't be a result of evaluate.py."""
    kinds = dict(name=str, run=str, method=str, problem=dict, training=dict, costs=dict, record=dict, rows=list,
                 baselines=list, left_out=dict, nfe_left_out=list)
    for key, kind in kinds.items():
        if not isinstance(result[key], kind):
            raise TypeError(f"{key} is {result[key]!r}")
    for row in [*result["rows"], *result["baselines"]]:
        for column in COLUMNS:
            values = row.get(column)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and not (type(value) in (int, float) and math.isfinite(value)):
                    raise ValueError(f"{column} is {value!r}")


def cell(row: dict, column: str) -> str:
    """23.48 ± .02 where the row has the figure's standard error; a figure for each channel."""
    values, errors = (each if isinstance(each, list) else [each]
                      for each in (row.get(column), row.get("errors", {}).get(column)))
    if values == [None]:
        return "–"
    written, style = [COLUMNS[column][1].format(value) for value in values], COLUMNS[column][1].replace("+", "")
    if errors != [None]:
        errors = [style.format(error).removeprefix("0") for error in errors]
        written = [f"{figure} ± {error}" for figure, error in zip(written, errors, strict=True)]
    return " ".join(written)


def line(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def told(pairs, of: int) -> list[str]:
    """(text, run) pairs -> each text once, with its runs unless it holds for all `of` them."""
    runs = {}
    for text, run in pairs:
        runs.setdefault(text, []).append(run)
    return [f"{text} ({', '.join(names)})" if len(names) < of else text for text, names in runs.items()]


def groups(results: list[dict]) -> list[list[dict]]:
    """Runs on one problem belong together."""
    found = {}
    for result in results:
        found.setdefault(json.dumps(result["problem"]), []).append(result)
    return list(found.values())


def title(result: dict, results: list[dict]) -> str:
    """The method if that says which run it is, else the run's folder."""
    methods = [r["method"] for r in results]
    return result["method"] if methods.count(result["method"]) == 1 else result["name"]


def heading(problem: dict) -> str:
    return f"{problem['task']}: {problem['dataset']}, {problem['image_size']}x{problem['image_size']}"


def differences(results: list[dict]) -> list[str]:
    """What keeps the runs from being one comparison."""
    found, name, n = [], partial(title, results=results), len(results)
    for kind in ("problem", "training"):
        for key in results[0][kind]:
            values = told([(str(result[kind].get(key)), name(result)) for result in results], n)
            if len(values) > 1:
                found.append(f"the runs differ in {key.replace('_', ' ')}: {'; '.join(values)}")
    overfit = [("trained on a single batch (overfit)", name(r)) for r in results if r["training"]["overfit"]]
    return found + told(overfit, n)


# ----------------------------------------------------------------------------------------------------------- the table

def table(results: list[dict]) -> str:
    """Markdown: for each problem the figures and what is missing; then the runs' sizes and costs."""
    name = partial(title, results=results)
    lines = ["# Quality against the number of network evaluations (NFE)", ""]
    lines += [f"**Not one comparison:** {difference}.\n" for difference in differences(results)]
    for group in groups(results):
        lines += [f"## {heading(group[0]['problem'])}", "", *figures(group, name), ""]
        lines += [f"- {note}" for note in notes(group, name)]
        lines.append("")
    return "\n".join(lines + sizes(results, name)) + f"\n\n{ABOUT}\n"


def figures(group: list[dict], name: Callable) -> list[str]:
    """Of runs on one problem: a row for each baseline, then for each sampler of each run."""
    columns = [m for m in COLUMNS if any(m in row for result in group for row in result["rows"])]
    lines = [line("run", "sampler", *(COLUMNS[m][0] for m in columns)), "|---|---|" + "---:|" * len(columns)]
    for row in group[0]["baselines"]:
        lines.append(line(row["name"], "", *(cell(row, m) for m in columns)))
    for result in group:
        for row in result["rows"]:
            sampler = row.get("failed", row["sampler"])
            if row["default"]:
                sampler += ", default"
            lines.append(line(name(result), sampler, *(cell(row, m) for m in columns)))
    return lines


def notes(group: list[dict], name: Callable) -> list[str]:
    """Of runs on one problem: what is missing, and how the figures came about."""
    p, n = group[0]["problem"], len(group)
    unmeasured = []
    for result in group:
        for metric, reason in result["left_out"].items():
            metric = COLUMNS.get(metric, [metric])[0].strip(" ↑↓")
            unmeasured.append((f"{metric} is not measured: {reason}", name(result)))
    found = told(unmeasured, n)
    if missing := [f"{name(r)} {', '.join(map(str, r['nfe_left_out']))}" for r in group if r["nfe_left_out"]]:
        found.append(f"NFE left out, since the sampler can't do exactly so many: {'; '.join(missing)}")
    if all(result["method"] != "regression" for result in group):
        found.append("a regression network is missing: train one with --method regression and the other runs' "
                     "settings, and name it too")
    if p["classifier"]:
        found.append(f"classifier {p['classifier']}: {p['classifier_accuracy']:.1f}% of all test images right")
    half = p["images"] // 2
    found.append(f"{p['images']:,} images of the {p['split']} split, FD and FID {half:,} against {half:,}; "
                 f"seed {p['seed']}")
    how = "measured in batches of {batch_size}, {device}, {precision}, code {code}, torch {torch}"
    return found + told([(how.format(**r["record"]), name(r)) for r in group], n)


def sizes(results: list[dict], name: Callable) -> list[str]:
    """A row a run: its network, and what its training took."""
    lines = [line("run", "network", "parameters", "images seen", "global batch", "training FLOPs", "weights",
                  "class labels"), "|---|---|" + "---:|" * 4 + "---|---|"]
    for result in results:
        t, costs = result["training"], result["costs"]
        parameters = " + ".join(f"{n / 1e6:.2f}M" for n in costs["parameters"])
        flops = "–" if costs["training_flops"] is None else f"{costs['training_flops']:.2e}"
        labels = f"seen, guidance {t['guidance']:g}" if t["labels"] else "not seen"
        lines.append(line(name(result), t["network"], parameters, f"{t['images_seen']:,}", costs["global_batch"], flops,
                          t["weights"], labels))
    return lines


# ------------------------------------------------------------------------------------------------------------ the plot

# pdf.fonttype 42: letters stay letters
PAPER = {"font.size": 8, "legend.fontsize": 7.5, "lines.linewidth": 1.2, "axes.linewidth": 0.6, "pdf.fonttype": 42}
# Okabe and Ito's, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = {"input": (0, (1, 1.5)), "bicubic": (0, (5, 2)), "smooth fill": (0, (5, 2)), "floor": "-"}
REGRESSION = (0, (6, 1.5, 1, 1.5))  # its dashes


def few_ticks(axis, low: float, high: float):
    """Plain numbers on a logarithmic axis: about five, also where it spans less than a decade."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if not 0 < low < high:  # nothing is drawn there
        return
    decades = math.log10(high / low)
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,)))
    axis.set_major_formatter("{x:g}")
    if decades < 2.2:
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter("")


def plot(results: list[dict]):
    """A matplotlib Figure: problems in rows, metrics in columns, a line a run.

    Stars are default samplers, horizontal lines baselines. A PSNR more than 2 dB below the best of the worst line is
    out of view.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = [m for m in PANELS if any(m in row for result in results for row in result["rows"])] or ["seconds"]
    figure = Figure(figsize=(2.4 * len(panels), 2 * len(groups(results)) + 0.6), layout="constrained")
    grid = figure.subplots(len(groups(results)), len(panels), squeeze=False)
    for group, axes in zip(groups(results), grid):
        problem = group[0]["problem"]
        axes[0].set_title(f"{heading(problem)}, {problem['images']:,} images", loc="left", fontsize=8)
        for metric, ax in zip(panels, axes):
            draw_runs(ax, metric, group, partial(title, results=results))
            set_axes(ax, metric, group)
    handles = {label: handle for ax in grid.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    handles["default sampler"] = Line2D([], [], ls="", marker="*", ms=9, mec="white", mew=0.5, color="0.3")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def draw_runs(ax, metric: str, group: list[dict], name: Callable):
    """One panel: a line a run, and horizontal ones for the baselines, of which a regression network is one."""
    for number, result in enumerate(r for r in group if r["method"] != "regression"):
        rows = [row for row in result["rows"] if metric in row]
        style = dict(color=COLOURS[number % len(COLOURS)], marker="osD^vP"[number % 6], ms=3)
        joined = sorted((row for row in rows if row["sampler"] != "dopri5"), key=lambda row: row["nfe"])
        ax.plot([row["nfe"] for row in joined], [row[metric] for row in joined], label=name(result), **style)
        for row in rows:
            if row["default"]:
                ax.plot(row["nfe"], row[metric], "*", color=style["color"], ms=9, mec="white", mew=0.5)
    levels = [(row["name"], row, "0.5", DASHES.get(row["name"], (0, (3, 1)))) for row in group[0]["baselines"]]
    levels += [(name(r), row, "k", REGRESSION) for r in group if r["method"] == "regression" for row in r["rows"]]
    for label, row, colour, dashes in levels:
        if metric in row:
            ax.axhline(row[metric], color=colour, lw=1, ls=dashes, label=label, zorder=1)


def set_axes(ax, metric: str, group: list[dict]):
    """A panel's axes, once its runs are drawn."""
    better = COLUMNS[metric][0].translate({ord("↑"): "→", ord("↓"): "←"})  # the label is turned by 90 degrees
    ax.set(xscale="log", xlabel="network evaluations (NFE)", ylabel=better)
    few_ticks(ax.xaxis, *ax.get_xlim())
    if metric in ("frechet", "fid"):
        ax.set_yscale("log")
        few_ticks(ax.yaxis, *ax.get_ylim())
    if metric == "psnr":  # what is far below everyone's best would hide the differences
        best = [max(values) for r in group if (values := [row[metric] for row in r["rows"] if metric in row])]
        levels = [row[metric] for row in group[0]["baselines"] if metric in row]
        ax.set_ylim(bottom=max(ax.get_ylim()[0], min([*best, *levels], default=0) - 2))
    ax.spines[["top", "right"]].set_visible(False)


def write_report(results: list[dict], folder: Path):
    written = table(results)
    print("\n" + written)
    write_atomically(folder / "table.md", lambda f: f.write(written.encode()))
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
    else:
        with matplotlib.rc_context(PAPER):
            for kind in ("pdf", "png"):
                write_atomically(folder / f"quality.{kind}", lambda f: plot(results).savefig(f, format=kind, dpi=300))
    print(f"in {folder}")
