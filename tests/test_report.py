"""The table, the plot and the JSON files of an evaluation say the same, and say what is no comparison."""
import json
import re

import pytest
import torch
from PIL import Image

from evaluation import report
from measured import LOCAL


def test_the_json_holds_each_figure_with_its_record(results):
    _, (interpolant, udpm) = results
    assert [(row["sampler"], row["nfe"]) for row in interpolant["rows"][:2]] == [("euler", 2), ("midpoint", 3)]
    assert interpolant["rows"][2]["sampler"] == "dopri5" and interpolant["rows"][2]["default"]
    assert [(row["nfe"], row["default"]) for row in udpm["rows"]] == [(3, True)]
    assert interpolant["nfe_left_out"] == [1] and udpm["nfe_left_out"] == [1, 2]
    for result in (interpolant, udpm):
        problem, training, costs = result["problem"], result["training"], result["costs"]
        assert (problem["images"], problem["split"], problem["seed"]) == (12, "test", 0)
        assert (training["images_seen"], costs["global_batch"], training["weights"]) == (2 * 4, 4, "EMA")
        assert result["record"]["code"] and problem["classifier_accuracy"] == 100 and costs["training_flops"] > 0
        assert all(set(LOCAL) < row.keys() and set(LOCAL) == row["errors"].keys() for row in result["rows"])
        assert result["baselines"][-1]["errors"].keys() == {"accuracy", "frechet"}  # the floor's
        json.dumps(result, allow_nan=False)
    assert interpolant["baselines"] == udpm["baselines"] and len(interpolant["costs"]["parameters"]) == 1
    net, critic = udpm["costs"]["parameters"]
    weights = torch.load(f"{udpm['run']}/checkpoints/last.pt", weights_only=True)["players"]
    assert net > 1000 and critic == sum(w.numel() for key, w in weights[1].items() if key != "steps")


def test_the_table_says_what_the_json_says(results):
    output, found = results
    written = (output / "table.md").read_text()
    lines = [line for line in written.splitlines() if line.startswith("| ")]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    header = rows[0]
    for result in found:
        for row in result["rows"]:
            line = next(r for r in rows if r[0] == result["method"] and r[1].startswith(row["sampler"])
                        and r[2] == f"{row['nfe']:.4g}")
            for heading, metric in {"PSNR, dB ↑": "psnr", "FD ↓": "frechet", "accuracy, % ↑": "accuracy"}.items():
                assert line[header.index(heading)] == report.cell(row, metric)
    assert [r[0] for r in rows[1:4]] == ["input", "bicubic", "truth against truth"]
    assert "SSIM" not in header and "regression network is missing" in written
    assert "100.0% of all test images" in written
    assert "exactly so many: interpolant 1; udpm 1, 2" in written and "Not one comparison" not in written
    assert re.search(r"\| udpm \|.*\| 0\.\d\dM \+ 0\.\d\dM \| 8 \| 4 \|", written)


def test_a_regression_network_is_missed_only_where_there_is_an_image_to_start_from():
    result = dict(left_out={}, nfe_left_out=[], method="edm", record={}, problem=dict(
        task="generate", classifier=None, images=4, split="test", seed=0))
    record = dict(batch_size=2, device="CPU", precision="fp32", code="1", torch="2")
    for task, missed in (("generate", False), ("sr", True)):
        one = result | dict(record=record, problem=result["problem"] | dict(task=task))
        assert ("regression" in " ".join(report.notes([one], lambda r: r["method"]))) == missed


def test_a_cell_shows_the_error_in_the_digits_of_the_figure():
    row = dict(psnr=23.478, bias=[1.25, -0.34], nfe=3.0, errors=dict(psnr=0.0216, bias=[0.31, 1.26]))
    assert report.cell(row, "psnr") == "23.48 ± .02" and report.cell(row, "bias") == "+1.2 ± .3 -0.3 ± 1.3"
    assert report.cell(row, "nfe") == "3" and report.cell(row, "ssim") == "–"
    assert report.cell(dict(psnr=23.478), "psnr") == "23.48"  # an older result


def test_the_plot_says_what_the_json_says(results):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    output, found = results
    assert (output / "quality.pdf").read_bytes().startswith(b"%PDF") and Image.open(output / "quality.png").width > 1000
    panels = {ax.get_ylabel(): ax for ax in report.plot(found).axes}
    assert list(panels) == ["PSNR, dB →", "accuracy, % →", "FD ←"]  # to be read upwards
    interpolant, udpm = found
    lines = {drawn.get_label(): drawn.get_xydata() for drawn in panels["PSNR, dB →"].lines}
    assert lines["interpolant"].tolist() == [[row["nfe"], row["psnr"]] for row in interpolant["rows"][:2]]
    assert lines["udpm"].tolist() == [[3, udpm["rows"][0]["psnr"]]]
    assert lines["bicubic"][:, 1].tolist() == [interpolant["baselines"][1]["psnr"]] * 2
    assert "truth against truth" not in lines
    assert "truth against truth" in {drawn.get_label() for drawn in panels["FD ←"].lines}
    regression = interpolant | dict(method="regression", rows=[dict(sampler="own", nfe=1, default=True, psnr=20.0)])
    drawn = {d.get_label(): d.get_xydata() for d in report.plot([regression, udpm]).axes[0].lines}
    assert drawn["regression"].tolist() == [[0, 20], [1, 20]]  # a horizontal line, as the baseline that it is


def test_a_problem_without_figures_has_an_empty_panel(results):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    _, (interpolant, udpm) = results
    failed = udpm | dict(problem=udpm["problem"] | dict(task="blur"), baselines=[],
                         rows=[dict(sampler="own", default=True, steps=None, failed="not finite")])
    assert len(report.plot([interpolant, failed]).axes) == 2 * len(report.plot([interpolant]).axes)


def test_what_is_no_comparison_is_said(results):
    _, (interpolant, udpm) = results
    assert report.differences([interpolant, udpm]) == []
    longer = udpm | dict(training=udpm["training"] | dict(images_seen=999, overfit=True))
    said = " ".join(report.differences([interpolant, longer]))
    assert "images seen: 8 (interpolant); 999 (udpm)" in said and "trained on a single batch (overfit) (udpm)" in said
    blurred = udpm | dict(problem=udpm["problem"] | dict(task="blur (kernel uniform, width 9, sigma 10.0)"))
    written = report.table([interpolant, blurred])
    assert "**Not one comparison:** the runs differ in task" in written
    assert written.count("| bicubic |") == 2  # a table each
    twin = interpolant | dict(name="twin")
    assert "| twin | euler |" in report.table([interpolant, twin])
