"""evaluate.py as its user runs it: on runs and on results, in two processes, interrupted, and on bad input."""
import copy
import json
import math
import os
import shutil
import signal
import time

import pytest
from PIL import Image
from torch import nn

import evaluate
from evaluation import report
from images import SettingsError
from measured import FLAGS, LOCAL
from ode_int import SolverError
from runs import ranks, start, together, until
from support.model import run_sampler


def test_a_json_file_is_a_run(results, tmp_path, monkeypatch, quick):
    output, found = results
    monkeypatch.setattr(evaluate, "Judge", lambda *_: pytest.fail("nothing is to be measured"))
    files = [str(output / f"{result['name']}.json") for result in found]
    assert evaluate.main([*files, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() == (output / "table.md").read_text()


def test_the_same_again_and_raw_weights(results, runs, tmp_path, quick):
    _, (before, _) = results
    found = []
    for flags in ((), ("--no-ema",)):
        asked = ["--nfe", "3", "--no-default", "--metrics", "psnr", "--output", str(tmp_path), *flags]
        assert evaluate.main([runs[0], *FLAGS[4:], *asked]) == 0
        found.append(json.loads(next(tmp_path.glob("*.json")).read_text()))
    (again,), (raw,) = (result["rows"] for result in found)
    assert again["psnr"] == pytest.approx(before["rows"][1]["psnr"], abs=1e-4) != pytest.approx(raw["psnr"], abs=1e-4)
    assert [result["training"]["weights"] for result in found] == ["EMA", "raw"]
    assert found[0]["costs"]["training_flops"] == 8  # one for each image seen, in 2 steps of 4


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_off_keeps_the_figures_until_then(runs, tmp_path, monkeypatch, quick, failure):
    def broken(config, net, batch):
        if config.solver == "midpoint":  # the second sampler of the first run
            raise failure
        return run_sampler(config, net, batch)

    monkeypatch.setattr(evaluate, "run_sampler", broken)
    arguments = [*runs, *FLAGS, "--metrics", "psnr", "--output", str(tmp_path)]
    if failure is RuntimeError:  # a fault of the program
        with pytest.raises(failure):
            evaluate.main(arguments)
    else:
        assert evaluate.main(arguments) == 130
    kept, = tmp_path.glob("*.json")
    row, = json.loads(kept.read_text())["rows"]
    assert f"| interpolant | euler | 2 | {row['psnr']:.2f} ± " in (tmp_path / "table.md").read_text()


def test_a_network_that_is_not_finite_is_a_failed_row(runs, tmp_path, monkeypatch, quick):
    def broken(config, net, batch):
        if config.method == "interpolant":
            raise SolverError("not finite")
        return run_sampler(config, net, batch)

    monkeypatch.setattr(evaluate, "run_sampler", broken)
    assert evaluate.main([*runs, *FLAGS, "--metrics", "psnr", "--output", str(tmp_path)]) == 0
    rows = {path.name[:4]: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")}
    assert {row.get("failed") for row in rows["inte"]} == {"not finite"} and all("psnr" in row for row in rows["udpm"])
    assert "| not finite |" in (tmp_path / "table.md").read_text()


def test_a_run_that_can_do_none_of_the_counts_is_measured_at_its_own(runs, tmp_path, monkeypatch, quick):
    """UDPM takes 3 evaluations, regression 1: neither keeps the other runs from being measured."""
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([runs[1], *"--nfe 5 --no-default --metrics psnr --count 4 --device cpu".split()]) == 0
    (file,) = tmp_path.glob("runs/evaluation-*/*.json")  # a folder of their own, where none is named
    result = json.loads(file.read_text())
    assert [row["nfe"] for row in result["rows"]] == [3] and result["nfe_left_out"] == [5]


def test_two_processes_write_what_one_writes(results, runs, tmp_path, process):
    """5 + 5 + 2 images, of which the first process takes 7."""
    arguments = [runs[0], *FLAGS, "--nfe", "1", "3", "--no-default", "--metrics", *LOCAL, "--output", str(tmp_path)]
    said = together(process, evaluate.main, [arguments], [arguments])
    assert own_lines(said[1]) == []
    theirs = copy.deepcopy(results[1][0])
    theirs["rows"] = theirs["rows"][1:2]  # of 3 evaluations
    ours = json.loads((tmp_path / f"{theirs['name']}.json").read_text())
    assert [result.pop("record")["processes"] for result in (ours, theirs)] == [2, 1]
    for row in ours["rows"] + theirs["rows"]:
        assert row.pop("seconds") > 0
    assert ours == theirs


def bad_in_one(arguments, rank) -> int:
    """An evaluation in which the second process alone meets a wrong setting."""
    pick = evaluate.pick_device

    def pick_device(name):
        if rank == 1:
            raise SettingsError("device = 'cuda': allowed is what is there")
        return pick(name)

    evaluate.pick_device = pick_device
    return evaluate.main(arguments)


def test_a_wrong_setting_ends_all_processes_with_one_line(runs, tmp_path, process):
    arguments = [runs[0], *FLAGS, "--output", str(tmp_path / "out")]
    first, second = together(process, bad_in_one, (arguments, 0), (arguments, 1), status=2)
    (only,) = own_lines(first)
    assert only.startswith("evaluate.py: device = 'cuda'") and own_lines(second) == []


def own_lines(log: str) -> list[str]:
    """The lines of a process's output, without what a library warns of."""
    return [line for line in log.splitlines() if not line.startswith("[")]


def slow_in_one(arguments, rank, marker) -> int:
    """An evaluation in which the second process takes a minute for its first sample; the first waits for it."""
    def slow(config, net, batch):
        if rank == 1 and isinstance(net.net.net, nn.Module):
            marker.touch()
            time.sleep(60)
        return run_sampler(config, net, batch)

    evaluate.run_sampler = slow
    return evaluate.main(arguments)


def test_ctrl_c_ends_all_processes_with_one_line(runs, tmp_path, process):
    arguments = [runs[0], *FLAGS, "--metrics", "psnr", "--output", str(tmp_path / "out")]
    pair = [process(slow_in_one, arguments, rank, tmp_path / "slow", env=env) for rank, env in enumerate(ranks(2))]
    until((tmp_path / "slow").exists, *pair)
    time.sleep(1)  # the first one has done its part
    for each in pair:
        os.kill(each.pid, signal.SIGINT)
    for each in pair:
        each.join(30)
        assert each.exitcode == 130, each.log.read_text()
    first, second = (own_lines(each.log.read_text()) for each in pair)
    assert first[-1] == "evaluate.py: interrupted" and second == [] and "Traceback" not in "".join(first)


def test_bad_input_is_one_line_and_exit_2(runs, tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "file").write_text("")
    output = ["--output", str(tmp_path / "out")]
    cases = [
        ([], "runs = "),
        (["nowhere"], "run = 'nowhere'"),
        ([str(tmp_path / "x.json")], "no result of an evaluation"),
        ([runs[0], "--nfe", "0"], "nfe = (0,)"),
        ([runs[0], "--metrics", "speed"], "invalid choice 'speed'"),
        ([runs[0], "--count", "0"], "count = 0"),
        ([str(tmp_path)], "there is no checkpoint"),
        ([runs[0], runs[0]], "allowed is one of the name"),
        ([runs[0], "--solver", "dopri5"], "invalid choice 'dopri5'"),
        ([runs[0], "--device", "cudo"], "device = 'cudo'"),
        ([runs[0], "--data-path", str(tmp_path / "moved")], "moved"),
        ([runs[0], "--nfo", "3"], "nfo"),
        ([runs[0], "--output", str(tmp_path / "file" / "x")], "output = "),
    ]
    for arguments, what in cases:
        assert evaluate.main(output + arguments if "--output" not in arguments else arguments) == 2, arguments
        said = capsys.readouterr().err.strip()
        assert said.startswith("evaluate.py: ") and what in said and "\n" not in said, said


def test_the_wrong_data_is_refused(runs, tmp_path, drawings, capsys):
    moved = shutil.copytree(drawings, tmp_path / "moved")
    for split in ("train", "test"):
        (moved / split / "dark").rename(moved / split / "cat")
    flags = ["--data-path", str(moved), "--metrics", "psnr", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert evaluate.main([runs[0], *flags]) == 2
    assert "has other classes" in capsys.readouterr().err


@pytest.mark.parametrize("key, value", [
    ("problem", []), ("baselines", None), ("costs", "none"), ("rows", [dict(sampler="euler", psnr="high")]),
    ("rows", [dict(sampler="euler", default=False, psnr=math.nan)])])
def test_a_result_with_nonsense_in_it_is_one_line(results, tmp_path, capsys, key, value):
    _, (good, _) = results
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(good | {key: value}))
    assert evaluate.main([str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.json" in error and "no result of an evaluation" in error


# ------------------------------------------------------------------------- pictures made elsewhere, several checkpoints

def test_pictures_made_elsewhere_are_a_row(runs, drawings, tmp_path, capsys, quick):
    """Named by the ends of the held-out images' paths: brighter by 5 levels, as another program left them."""
    for path in (drawings / "test").rglob("*.png"):
        other = tmp_path / "brighter" / path.relative_to(drawings / "test").with_suffix(".bmp")
        other.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).point(lambda level: level + 5).save(other)
    flags = [runs[1], *"--nfe 3 --count 12 --batch-size 5 --metrics psnr bias --device cpu".split(),
             "--output", str(tmp_path / "out"), "--pictures", str(tmp_path / "brighter")]
    assert evaluate.main(flags) == 0
    table = (tmp_path / "out/table.md").read_text()
    assert f"| brighter |  | – | {20 * math.log10(255 / 5):.2f} ± .00 | +5.0 ± .0 +5.0 ± .0 +5.0 ± .0 |" in table
    capsys.readouterr()
    Image.new("RGB", (9, 16)).save(other)
    for breaks, line in ((None, "has 9x16 pixels"), (other.unlink, "it has none for the held-out image test/")):
        if breaks:
            breaks()
        assert evaluate.main([*flags, "--count", "42"]) == 2
        said = capsys.readouterr().err
        assert line in said and said.count("\n") == 1


def test_checkpoints_of_one_run_are_a_curve_against_the_step(drawings, tmp_path, quick):
    run = start(tmp_path / "runs", f"--method regression --solver auto --sample-steps None --dataset {drawings} "
                "--no-overfit --max-steps 4 --keep-every 2 --ema-decay 0.5 --name run")
    steps = sorted(map(str, (run / "checkpoints").glob("step_*.pt")))
    asked = ["--metrics", "psnr", "--count", "8", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert len(steps) == 2 and evaluate.main([*steps, *asked]) == 0
    results = [json.loads((tmp_path / f"out/run-step-{step}.json").read_text()) for step in (2, 4)]
    figures = [result["rows"][0]["psnr"] for result in results]
    assert figures[0] != figures[1]
    (curve,) = report.swept(results, "step")
    assert [(row["step"], row["psnr"]) for row in curve["rows"]] == list(zip((2, 4), figures))
    assert "| regression, step 2 |" in (tmp_path / "out/table.md").read_text()
