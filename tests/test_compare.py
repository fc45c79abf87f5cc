"""compare.py end to end on a tiny network, and report.py's seeds, errors, ties and plots against numbers by hand."""
import json
import math
import os
import shutil
import signal

import pytest
import torch

import compare
import evaluate
import trainer
from benchmarks import record
from evaluation import errors, report
from runs import at_step, linux, metrics, until
from support.machine import Signals

NETWORK = ("--image-size 16 --unet-channels 8 --unet-dim-mults 1 1 --unet-blocks 1 --sample-count 2 "
           "--integration-atol 0.1 --integration-rtol 0.1 --no-use-wandb --precision fp32 --print-loss-every 2")


def command(folder, out, flags="", more=""):
    return (f"--dataset {folder} --methods interpolant regression --images 24 --batch-size 4 --nfe 2 3 --count 4 "
            f"--metrics psnr bias --device cpu --output {out} {flags} -- {NETWORK} {more}").split()


def in_process(command, signals):
    """compare.call without a process of its own: imports take seconds."""
    main = trainer.main if command[0] == "trainer.py" else evaluate.main
    return main(command[1:])


def figures(out) -> dict:
    """Of each run what no clock measured."""
    found = {}
    for file in sorted((out / "results").glob("*.json")):
        rows = json.loads(file.read_text())["rows"]
        found[file.stem] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return found


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    """A comparison of two methods with two seeds, not to be written to."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "call", in_process)
        assert compare.main(command(folder, out, "--seeds 0 1")) == 0
    return out


def test_from_nothing_to_table_and_plot(compared):
    found = figures(compared)
    assert list(found) == [f"{method}-seed{seed}" for method in ("interpolant", "regression") for seed in (0, 1)]
    table = (compared / "table.md").read_text()
    a, b = (found[f"interpolant-seed{seed}"][0]["psnr"] for seed in (0, 1))
    spread = math.sqrt(((a - b) ** 2) / 2)  # of two numbers
    assert f"{(a + b) / 2:.2f} ± {spread:.2f}".replace("± 0", "± ") in table and "| 0, 1 |" in table
    assert "Not one comparison" not in table
    for name in ("quality", "quality-seconds"):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        assert (compared / f"{name}.pdf").read_bytes().startswith(b"%PDF") and (compared / f"{name}.png").exists()


def test_what_is_done_is_skipped(compared, folder, monkeypatch, capsys):
    monkeypatch.setattr(compare, "call", lambda *_: pytest.fail("all is done"))
    assert compare.main(command(folder, compared, "--seeds 0 1")) == 0
    assert compare.main(command(folder, compared, "--seeds 0 1 --only regression")) == 0
    assert "| interpolant |" in capsys.readouterr().out  # the table is of all that there is


def test_figures_of_another_measuring_are_not_kept(compared, folder, tmp_path, monkeypatch):
    out, asked = shutil.copytree(compared, tmp_path / "out"), []

    def measure(command, signals):
        asked.append(command[0])
        return in_process(command, signals)

    monkeypatch.setattr(compare, "call", measure)
    for flags, rows in (("--nfe 2", 1), ("--nfe 2 --count 3", 1)):
        before = figures(out)["interpolant-seed0"]
        assert compare.main(command(folder, out, f"--methods interpolant {flags}")) == 0
        after = figures(out)["interpolant-seed0"]
        assert len(after) == rows and after != before
    assert asked == ["trainer.py", "evaluate.py"] * 2


def test_stopped_in_the_middle_and_run_again(compared, folder, tmp_path, monkeypatch, capsys):
    """A signal in training ends the trainer, which saves, and the comparison; then the rest, to the same figures."""
    def stopped(command, signals):
        status = in_process(command, signals)
        signals.number = status - 128 if status > 128 else 0
        return status

    out = tmp_path / "out"
    monkeypatch.setattr(compare, "call", stopped)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert compare.main(command(folder, out, "--methods interpolant")) == 143
    assert "SIGTERM: the same command goes on" in capsys.readouterr().err
    assert not figures(out) and metrics(out / "interpolant-seed0")[-1]["step"] < 6
    assert compare.main(command(folder, out, "--methods interpolant")) == 0
    assert figures(out)["interpolant-seed0"] == figures(compared)["interpolant-seed0"]


def test_a_command_is_told_of_the_signal_that_comes(tmp_path):
    script = tmp_path / "command.py"
    script.write_text("import signal, sys, time\n"
                      "signal.signal(signal.SIGHUP, lambda *_: sys.exit(int(sys.argv[1])))\n"
                      f"open({str(tmp_path / 'ready')!r}, 'w')\n"
                      "time.sleep(60)\n")

    class Signals:
        @property
        def number(self):
            return signal.SIGHUP if (tmp_path / "ready").exists() else 0

    assert compare.call([str(script), "7"], Signals()) == 7


def test_a_failing_run_is_named_and_the_others_go_on(folder, tmp_path, monkeypatch, capsys):
    def failing(command, signals):
        return 2 if "interpolant-seed0" in command else in_process(command, signals)

    monkeypatch.setattr(compare, "call", failing)
    assert compare.main(command(folder, tmp_path / "out")) == 1
    assert "interpolant-seed0 failed with exit status 2" in capsys.readouterr().err
    assert list(figures(tmp_path / "out")) == ["regression-seed0"]


@pytest.mark.parametrize("flags, more, said", [
    ("--methods gan", "", "invalid choice 'gan' for argument '--methods'"), ("--only edm", "", "only = ('edm',)"),
    ("--images 0", "", "images = 0"),
    ("--seeds 0 0", "", "seeds = (0, 0)"), ("--nfe 0", "", "nfe = (0,)"), ("", "--seed 3", "--seed after --"),
    ("", "--batch_size=8", "--batch_size=8 after --"), ("", "--base-lr 0", "base_lr = 0"),
    ("", "--base-lr 0.5", "not ['--image-size'"), ("--task jpeg", "", "task = 'sr', not 'jpeg'"),
    ("--images 8", "", "6 steps of interpolant, not 2")])
def test_what_is_refused_in_one_line(compared, folder, capsys, flags, more, said):
    assert compare.main(command(folder, compared, flags, more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare.py: ") and said in error and error.count("\n") == 1


def test_equal_flops_are_fewer_images_of_a_larger_network(folder, tmp_path):
    def steps(flops, *more):
        flags = ["--methods", "i2sb", "edm", "--flops", flops, "--output", str(tmp_path / f"out{len(more)}")]
        return [job.steps for job in compare.plan(*parsed(folder, flags, more))]

    i2sb, edm = steps("1e12")
    wide, _ = steps("1e12", "--unet-channels", "16")
    assert i2sb == edm and 1.5 < i2sb / wide < 4.5


def parsed(folder, flags, more):
    """What compare.main hands to compare.plan."""
    o = compare.parse(compare.Options, ["--dataset", str(folder), "--batch-size", "4", "--device", "cpu", *flags], "")
    return o, [*NETWORK.split(), *more]


# ------------------------------------------------------------------------------------------ seeds, errors, ties, plots

def result(method, rows, seed=0, **more):
    """What evaluate.py writes, with made-up figures."""
    problem = dict(task="sr", dataset="made up", image_size=8, channels=3, images=10, split="test", test_images="x",
                   classifier=None, classifier_accuracy=None, seed=0)
    training = dict(network="n", labels=False, condition=True, images_seen=8, weights="EMA", guidance=1.0,
                    overfit=False)
    record = dict(batch_size=2, device="cpu", precision="fp32", code="c", torch="t")
    rows = [dict(sampler="own", steps=row["nfe"], default=False, seconds=row["nfe"] / 100) | row for row in rows]
    return dict(name=f"{method}-seed{seed}", run="r", method=method, problem=problem, training=training,
                costs=dict(parameters=[10], training_flops=1.0, steps=1, global_batch=1), record=record, rows=rows,
                baselines=[dict(name="bicubic", psnr=19.0, frechet=4.0), dict(name="truth against truth", frechet=1.0)],
                left_out={}, nfe_left_out=[], config=dict(seed=seed, base_lr=1.0)) | more


def test_mean_spread_and_error_by_hand():
    psnr = {0: 20.0, 1: 22.0, 2: 27.0}  # mean 23, squared deviations 9 + 1 + 16 = 26, of 3 - 1
    runs = [result("edm", [dict(nfe=3, psnr=x, bias=[x, 0.0], errors=dict(psnr=0.5))], seed)
            for seed, x in psnr.items()]
    (mean,) = errors.mean_over_seeds(runs)
    row = mean["rows"][0]
    assert mean["seeds"] == [0, 1, 2] and row["psnr"] == 23 and row["bias"] == [23, 0]
    assert row["spread"]["psnr"] == pytest.approx(math.sqrt(13))
    assert row["errors"]["psnr"] == pytest.approx(math.sqrt(13 / 3 + 0.25))
    assert report.cell(row, "psnr") == "23.00 ± 3.61"


def test_one_seed_has_the_error_over_images_or_none():
    known, older = (errors.mean_over_seeds([result("edm", [dict(nfe=3, psnr=20.0) | more])])[0]["rows"][0]
                    for more in (dict(errors=dict(psnr=0.5)), {}))
    assert report.cell(known, "psnr") == "20.00 ± .50" and known["errors"] == dict(psnr=0.5)
    assert report.cell(older, "psnr") == "20.00" and not older["errors"]


def test_only_runs_that_differ_in_nothing_but_the_seed_are_one():
    rows = [dict(nfe=3, psnr=20.0)]
    other = result("edm", rows, 1, config=dict(seed=1, base_lr=2.0))
    assert len(errors.mean_over_seeds([result("edm", rows), other])) == 2
    assert len(errors.mean_over_seeds([result("edm", rows), result("edm", rows)])) == 2  # the same seed twice
    assert len(errors.mean_over_seeds([result("edm", rows), result("sr3", rows, 1)])) == 2
    elsewhere = result("edm", rows, 1, config=dict(seed=1, base_lr=1.0, out_dir="x", device="cuda"))
    assert len(errors.mean_over_seeds([result("edm", rows), elsewhere])) == 1


def test_a_seed_that_failed_is_said():
    good, bad = result("edm", [dict(nfe=3, psnr=20.0)]), result("edm", [dict(nfe=3, failed="not finite")], 1)
    assert "| edm | own, 1 of 2 seeds | 3 | 20.00 |" in report.table([good, bad])


def test_the_best_and_what_is_no_worse_is_bold():
    """FD 2.0 with error 0.3 against 2.9 with 0.4: the difference has an error of 0.5, twice that is 1.0."""
    runs = [result("edm", [dict(nfe=3, psnr=20.0, frechet=2.0, errors=dict(frechet=0.3))]),
            result("sr3", [dict(nfe=3, psnr=21.0, frechet=2.9, errors=dict(frechet=0.4))]),
            result("i2sb", [dict(nfe=3, psnr=20.9, frechet=3.1, errors=dict(frechet=0.4))])]
    written = report.table(runs)
    assert "| **2.00 ± .30** |" in written and "| **2.90 ± .40** |" in written and "| 3.10 ± .40 |" in written
    assert "| **21.00** |" in written and "| 20.90 |" in written  # without an error the best alone
    assert written.count("Bold: the best") == 1 and "| **3** |" not in written  # NFE knows no better
    assert "With a single seed it says nothing of another training." in written
    assert "**" not in report.table(runs[:1])  # one row is no comparison


def test_rows_are_compared_on_their_common_images():
    """FD without one of two groups of images: the figures move by 1, their differences by 0, 0.1 and a training's 0.3.
    """
    def run(method, frechet, without, seed=0):
        row = dict(nfe=3, frechet=frechet, without=dict(frechet=without), errors=dict(frechet=1.0))
        return result(method, [row], seed)

    edm, same, near = run("edm", 2.0, [1.0, 3.0]), run("i2sb", 2.1, [1.1, 3.1]), run("sr3", 2.1, [1.0, 3.2])
    rows = [mean["rows"][0] for mean in errors.mean_over_seeds([edm, same, near])]
    assert errors.error_of_difference(*rows[:2], "frechet") == pytest.approx(0)
    # differences 0 and -0.2: variance 1/2 (0.1^2 + 0.1^2)
    assert errors.error_of_difference(rows[0], rows[2], "frechet") == pytest.approx(0.1)
    assert errors.best(rows, "frechet") == [rows[0], rows[2]]
    seeds = [run("edm", 2.0 + 0.3 * sign, [1.0, 3.0], seed) for seed, sign in enumerate((-1, 1))]
    (mean,) = errors.mean_over_seeds(seeds)
    error = errors.error_of_difference(mean["rows"][0], rows[1], "frechet")
    assert error == pytest.approx(0.3)  # the seeds' 0.3 sqrt(2), of two seeds; on the images nothing
    older = {key: value for key, value in rows[1].items() if key != "without"}
    assert errors.error_of_difference(rows[0], older, "frechet") == pytest.approx(math.sqrt(2))


def test_the_legend_says_everything_once_and_the_papers_sampler_is_open():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figures = [dict(psnr=20.0, frechet=3.0), dict(psnr=21.0, frechet=2.0, default=True, errors=dict(psnr=0.1))]
    rows = [dict(nfe=nfe) | figure for nfe, figure in zip((1, 300), figures)]
    worse = dict(nfe=300, sampler="euler", psnr=15.0, frechet=9.0)
    runs = [result(method, [*rows, worse], seed) for method in ("edm", "sr3") for seed in (0, 1)]
    runs.append(result("regression", [dict(nfe=1, psnr=25.0, frechet=2.5)]))
    for against, last in (("nfe", 300), ("seconds", 3)):
        figure = report.plot(runs, against)
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert len(labels) == len(set(labels))
        assert set(labels) == {"edm", "sr3", "regression", "bicubic", "truth against truth", "the paper's sampler",
                               "± standard error"}
        ax = figure.axes[0]
        assert ax.get_xscale() == "log" and ax.get_xlabel() == report.AXES[against]
        curve = next(line for line in ax.lines if line.get_label() == "edm")
        assert curve.get_xydata()[-1].tolist() == [last, 21.0]  # the best solver of that NFE
        assert sum(line.get_markerfacecolor() == "none" for line in ax.lines) == 2
        below = next(line for line in figure.axes[1].lines if line.get_label() == "edm")
        assert figure.axes[1].get_ylabel() == "FD ←" and below.get_xydata()[-1].tolist() == [last, 2.0]
        assert len(ax.collections) == 2  # a band each: one error to each side, as the legend says
        ends = [y for x, y in ax.collections[0].get_paths()[0].vertices if x == last]
        assert min(ends) == pytest.approx(20.9) and max(ends) == pytest.approx(21.1)


def test_ticks_are_plain():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    runs = [result("edm", [dict(nfe=nfe, psnr=20.0 + nfe / 100) for nfe in (1, 3, 49, 100)])]
    figure = report.plot(runs)
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels() if low <= tick.get_position()[0] <= high]
    assert ticks == ["1", "2", "5", "10", "20", "50", "100"] and low <= 1 and high >= 100


# ------------------------------------------------------------------------------------------------- benchmarks/record.py

def test_record_adds_a_row(folder, tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.md"
    table.write_text(f"before\n{record.BEGIN}\n| head |\n{record.END}\nafter\n")

    original = record.subprocess.run

    def run(command, **how):
        if how:  # git's
            return original(command, **how)
        return type("Done", (), dict(returncode=trainer.main(command[2:])))

    monkeypatch.setattr(record.subprocess, "run", run)
    flags = (f"--frechet 1e6 --accuracy 0 --max-steps 4 --every 2 --count 8 --dataset {folder} --device cpu --table "
             f"{table} --output {tmp_path / 'out'}")
    assert record.main([*flags.split(), "--", *NETWORK.split(), "--batch-size", "4"]) == 0
    before, row, after = table.read_text().partition(next(x for x in table.read_text().splitlines() if "torch " in x))
    assert before == f"before\n{record.BEGIN}\n| head |\n" and after == f"\n{record.END}\nafter\n"
    assert row in capsys.readouterr().out and "| 2, 8 |" in row and " 5 NFE " in row  # the first checkpoint
    assert f"--max-steps 4 -- {NETWORK} --batch-size 4 |" in row  # what it takes to do it again
    assert record.main(flags.split()) == 2 and "output = " in capsys.readouterr().err


@linux
def test_a_command_does_not_outlive_the_comparison(tmp_path, process):
    script = tmp_path / "command.py"
    script.write_text("import pathlib, signal, sys\n"
                      "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
                      "pathlib.Path(sys.argv[1], 'begun').touch()\n"
                      "if signal.sigtimedwait({signal.SIGTERM}, 60):\n"
                      "    pathlib.Path(sys.argv[1], 'told').touch()\n")
    first = process(compare.call, [str(script), str(tmp_path)], Signals())
    until(lambda: (tmp_path / "begun").exists(), first)
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: (tmp_path / "told").exists(), seconds=30)
