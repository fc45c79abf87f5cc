"""The table and the plots of evaluate.py and compare.py: what was measured of several runs side by side, how sure it
is (see evaluation/errors.py), and all that keeps it from being fair.
"""
import json
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

from evaluation.calibration import rank_plot
from evaluation.errors import SURE, best, mean_over_seeds
from evaluation.metrics import COLUMNS
from support.disk import write_atomically

ABOUT = """\
Samples are compared as uint8. Consistency: squared error on [0, 1] of the sample damaged again, against the input.
Bias: mean of sample - truth, in levels of 255. Accuracy: share of the samples that the classifier puts into their
class. FD and FID: Frechet distances on the classifier's and on Inception's features, of the samples for half of the
images to the truth of the other half, both ways; truth against truth: one half to the other, the least there is. They
depend on the number of images: compare them within this table only, and of fewer images than features (at most 128, and
2,048) they are mostly bias. Training FLOPs: forward and backward of all networks."""
ABOUT_DRAWS = """
Several draws of each image, in levels of 255: CRPS, least where the draws are right; the absolute error of their mean;
spread / error, 1 where they are right, less where they are too sure; unevenness, the share of pixels that would have to
change their rank among the draws for all ranks to be as frequent; how much of the truth lies in the central 50 and 75%
of the draws. A truth equal to some draws counts in equal parts for its possible ranks. FD and all else: the first
draw."""


def flat(value) -> list:
    return value if isinstance(value, list) else [value]


def cell(row: dict, column: str) -> str:
    """23.48 ± .02 where the row has the figure's spread over seeds or else its error; a figure for each channel."""
    values, spreads = flat(row.get(column)), flat(row.get("spread", row.get("errors", {})).get(column))
    if values == [None]:
        return "–"
    form = COLUMNS[column].format
    written = [form.format(value) for value in values]
    if spreads != [None]:
        spreads = [form.replace("+", "").format(spread) for spread in spreads]
        spreads = [spread[1:] if spread.startswith("0.") else spread for spread in spreads]
        written = [f"{figure} ± {spread}" for figure, spread in zip(written, spreads, strict=True)]
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
    """The method if that says which run it is, else the run's folder; and what sampling changed of its settings."""
    changed = ", ".join(f"{name} {value}" for name, value in result.get("changed", {}).items())
    alike = [r for r in results if r["method"] == result["method"]]
    of_one_run = len({r.get("run_name", r["name"]) for r in alike}) == 1
    if of_one_run and len({json.dumps(r.get("changed")) for r in alike}) == len(alike):
        return f"{result['method']}, {changed}" if changed else result["method"]
    more = len(result.get("seeds", [0])) - 1
    return result["name"] + (f" and {more} more" if more else "")


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
    results = mean_over_seeds(results)
    name = partial(title, results=results)
    lines = ["# Quality against the number of network evaluations (NFE)", ""]
    lines += [f"**Not one comparison:** {difference}.\n" for difference in differences(results)]
    for group in groups(results):
        lines += [f"## {heading(group[0]['problem'])}", "", *figures(group, name), ""]
        lines += [f"- {note}" for note in notes(group, name)]
        lines.append("")
    about = ABOUT + ABOUT_DRAWS * any("draws" in result["problem"] for result in results)
    return "\n".join(lines + sizes(results, name)) + f"\n\n{about}\n"


def figures(group: list[dict], name: Callable) -> list[str]:
    """Of runs on one problem: a row for each baseline, then for each sampler of each run."""
    columns = [m for m in COLUMNS if COLUMNS[m].format and any(m in row for result in group for row in result["rows"])]
    lines = [line("run", "sampler", *(COLUMNS[m].heading for m in columns)), "|---|---|" + "---:|" * len(columns)]
    for row in group[0]["baselines"]:
        lines.append(line(row["name"], "", *(cell(row, m) for m in columns)))
    rows = [row for result in group for row in result["rows"]]
    bold = {m: best(rows, m) for m in columns}
    for result in group:
        for row in result["rows"]:
            sampler = row.get("failed", row["sampler"])
            if row["default"]:
                sampler += ", default"
            if row.get("measured", n := len(result["seeds"])) < n:
                sampler += f", {row['measured']} of {n} seeds"
            cells = (f"**{cell(row, m)}**" if any(row is b for b in bold[m]) else cell(row, m) for m in columns)
            lines.append(line(name(result), sampler, *cells))
    if any(bold.values()):
        lines += ["", f"Bold: the best of the column, and what is not worse by more than {SURE} standard errors of the "
                      "difference." + ("" if any(row.get("errors") for row in rows) else " No errors are known here.")]
    if any(row.get("spread") for row in rows):
        lines.append("±: the standard deviation over seeds; of a single seed the standard error over the test images. "
                     "The error of a difference counts the seeds of both rows, and the images once: both see the same.")
        if any(len(result["seeds"]) == 1 for result in group):
            lines.append("With a single seed it says nothing of another training.")
    return lines


def notes(group: list[dict], name: Callable) -> list[str]:
    """Of runs on one problem: what is missing, and how the figures came about."""
    p, n = group[0]["problem"], len(group)
    unmeasured = []
    for result in group:
        for metric, reason in result["left_out"].items():
            metric = COLUMNS[metric].title if metric in COLUMNS else metric
            unmeasured.append((f"{metric} is not measured: {reason}", name(result)))
    found = told(unmeasured, n)
    if missing := [f"{name(r)} {', '.join(map(str, r['nfe_left_out']))}" for r in group if r["nfe_left_out"]]:
        found.append(f"NFE left out, since the sampler can't do exactly so many: {'; '.join(missing)}")
    if p["task"] != "generate" and all(result["method"] != "regression" for result in group):
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
                  "class labels", "seeds"), "|---|---|" + "---:|" * 4 + "---|---|---|"]
    for result in results:
        t, costs = result["training"], result["costs"]
        parameters = " + ".join(f"{n / 1e6:.2f}M" for n in costs["parameters"])
        flops = "–" if costs["training_flops"] is None else f"{costs['training_flops']:.2e}"
        labels = f"seen, guidance {t['guidance']:g}" if t["labels"] else "not seen"
        lines.append(line(name(result), t["network"], parameters, f"{t['images_seen']:,}", costs["global_batch"], flops,
                          t["weights"], labels, ", ".join(map(str, result["seeds"]))))
    return lines


# ------------------------------------------------------------------------------------------------------------ the plot

# pdf.fonttype 42: letters stay letters
PAPER = {"font.size": 8, "legend.fontsize": 7.5, "lines.linewidth": 1.2, "axes.linewidth": 0.6, "pdf.fonttype": 42}
# Okabe and Ito's, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = {"input": (0, (1, 1.5)), "bicubic": (0, (5, 2)), "smooth fill": (0, (5, 2)), "truth against truth": "-"}
REGRESSION = (0, (6, 1.5, 1, 1.5))  # its dashes
OPEN = dict(ms=8, mfc="none", mew=1)  # the marker of a paper's own sampler
AXES = {"nfe": "network evaluations (NFE)", "seconds": "seconds per image", "guidance": "scale of guidance",
        "step": "training steps"}
SWEEPS = ("guidance", "step")  # of those, what the results of one run may differ in


def plot(results: list[dict], against: str = "nfe"):
    """A matplotlib Figure: problems in rows, metrics in columns, a curve a run, against a column of AXES.

    A curve has the best solver at each NFE, its band is one error to each side. Large open markers are the papers' own
    samplers, horizontal lines baselines.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    results = mean_over_seeds(results)
    if against in SWEEPS:
        results = swept(results, against)
    measured = {metric for result in results for row in result["rows"] for metric in row}
    panels = [m for m in COLUMNS if COLUMNS[m].panel and m in measured] or ["seconds"]
    figure = Figure(figsize=(2.4 * len(panels), 2 * len(groups(results)) + 0.6), layout="constrained")
    grid = figure.subplots(len(groups(results)), len(panels), squeeze=False)
    name = partial(title, results=results)
    for group, axes in zip(groups(results), grid):
        problem = group[0]["problem"]
        words = f"{heading(problem)}, {problem['images']:,} images"
        axes[0].set_title(textwrap.fill(words, 40 * len(panels)), loc="left", fontsize=8)
        for metric, ax in zip(panels, axes):
            draw_runs(ax, metric, group, name, against)
            draw_baselines(ax, metric, group, name)
            set_axes(ax, metric, group, against)
    handles = {label: handle for ax in grid.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    if any(row["default"] for result in results for row in result["rows"] if result["method"] != "regression"):
        handles["the paper's sampler"] = Line2D([], [], ls="", marker="o", color="0.3", **OPEN)
    if any(row.get("errors") for result in results for row in result["rows"]):
        handles["± standard error"] = Patch(color="0.3", alpha=0.2, lw=0)
    columns = min(6, 2 * len(panels))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def swept(results: list[dict], against: str) -> list[dict]:
    """Results of one run that differ in the scale of guidance alone, or in the step -> one, each of whose rows has its
    own; where the method's own sampler was measured, its rows alone."""
    found = {}
    for result in results:
        others = {name: value for name, value in result.get("changed", {}).items() if name != against}
        key = result["method"], result.get("run_name", result["name"]), json.dumps([result["problem"], others])
        merged = found.setdefault(key, result | dict(rows=[], changed=others))
        own = [row for row in result["rows"] if row["default"]] or result["rows"]
        value = result["training"]["guidance"] if against == "guidance" else result["costs"]["steps"]
        merged["rows"] += [row | {against: value} for row in own]
    return list(found.values())


def draw_runs(ax, metric: str, group: list[dict], name: Callable, against: str):
    """The curves of one panel."""
    for number, result in enumerate(r for r in group if r["method"] != "regression"):
        rows = [row for row in result["rows"] if None not in (row.get(metric), row.get(against))]
        style = dict(color=COLOURS[number % len(COLOURS)], marker="osD^vP"[number % 6])
        curve = rows if against in SWEEPS else best_solvers(rows, metric)
        curve = sorted(curve, key=lambda row: row[against])
        x, y = ([row[key] for row in curve] for key in (against, metric))
        ax.plot(x, y, label=name(result), ms=3, **style)
        errors = [row.get("errors", {}).get(metric) or 0 for row in curve]
        if any(errors):
            low, high = ([value + sign * error for value, error in zip(y, errors)] for sign in (-1, 1))
            ax.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)
        for row in rows:
            if row["default"]:
                ax.plot(row[against], row[metric], ls="", **style, **OPEN)


def best_solvers(rows: list[dict], metric: str) -> list[dict]:
    """The best row of each NFE. dopri5 chooses its own number of them, which is no point of a curve."""
    found = {}
    for row in rows:
        if row["sampler"] != "dopri5":
            found.setdefault(round(row["nfe"], 3), []).append(row)
    sign = -1 if COLUMNS[metric].arrow == "↓" else 1
    return [max(alike, key=lambda row: sign * row[metric]) for alike in found.values()]


def draw_baselines(ax, metric: str, group: list[dict], name: Callable):
    """The baselines of one panel, of which a regression network is one, as horizontal lines."""
    lines = [(row["name"], row, "0.5", DASHES.get(row["name"], (0, (3, 1)))) for row in group[0]["baselines"]]
    lines += [(name(r), row, "k", REGRESSION) for r in group if r["method"] == "regression" for row in r["rows"]]
    for label, row, colour, dashes in lines:
        if metric in row:
            ax.axhline(row[metric], color=colour, lw=1, ls=dashes, label=label, zorder=1)


def set_axes(ax, metric: str, group: list[dict], against: str):
    """A panel's axes, once its runs are drawn."""
    from matplotlib.ticker import LogLocator, NullLocator

    better = COLUMNS[metric].heading.translate({ord("↑"): "→", ord("↓"): "←"})  # the label is turned
    ax.set(xlabel=AXES[against], ylabel=better)
    if against not in SWEEPS:
        ax.set_xscale("log")
    if COLUMNS[metric].panel == "log":
        ax.set_yscale("log")
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        if axis.get_scale() == "log":  # 1 2 5 10 20 ..., or 1 10 100 ... where those were too many
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    ax.spines[["top", "right"]].set_visible(False)


def write_report(results: list[dict], folder: Path):
    """table.md, and with matplotlib, each as .png and .pdf: quality, against NFE, quality-seconds, and where they were
    measured quality-guidance, quality-step and ranks."""
    written = table(results)
    print("\n" + written)
    write_atomically(folder / "table.md", lambda f: f.write(written.encode()))
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        print(f"in {folder}")
        return
    with matplotlib.rc_context(PAPER):
        plots = {"quality": plot(results), "quality-seconds": plot(results, "seconds")}
        for kind in SWEEPS:
            if any(kind in result.get("changed", {}) for result in results):
                plots[f"quality-{kind}"] = plot(results, kind)
        means = mean_over_seeds(results)
        drawn = {title(result, means): [row for row in result["rows"] if "ranks" in row] for result in means}
        if drawn := {name: rows for name, rows in drawn.items() if rows}:
            plots["ranks"] = rank_plot(drawn)
        for name, figure in plots.items():
            for kind in ("pdf", "png"):
                how = dict(format=kind, dpi=300, bbox_inches="tight")  # tight: long names are not cut off
                write_atomically(folder / f"{name}.{kind}", lambda f: figure.savefig(f, **how))
    print(f"in {folder}")
