"""README.md and docs/ say what the code does: presets, commands, links, and the size of a page."""
import re
from pathlib import Path

import pytest
import torch

import compare
import evaluate
import sample
import trainer
from images.corruptions import TASKS
from support.model import make_unet
from support.settings import PRESETS
from trainer import Config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {"trainer.py": trainer, "sample.py": sample, "evaluate.py": evaluate, "compare.py": compare}


def preset_row(name: str) -> str:
    """The row of docs/presets.md, but for its last cell, the paper, which is written by hand."""
    c = Config(**PRESETS[name])
    labels = 10 if c.unet_use_classes and c.dataset in (None, "cifar10", "fashion-mnist") else 0
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in make_unet(c, labels).parameters())
    cost = f"{c.steps:,} x {c.batch_size}" + (", overfit" if c.overfit else "")
    return (f"| `{name}` | {c.method} | {c.task} | {c.dataset or 'cifar10'}, {c.image_size} | "
            f"{parameters / 1e6:.1f}M | {cost} |")


def test_the_page_of_presets_has_each_as_it_is():
    rows = re.findall(r"^\| `.*", (ROOT / "docs/presets.md").read_text(), re.M)
    assert len(rows) == len(PRESETS)
    for row, name in zip(rows, PRESETS):
        assert row.startswith(preset_row(name)), f"docs/presets.md needs: {preset_row(name)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_are_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"(?:models|images|tests|benchmarks|assets)/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), path


def bash_lines(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    return [line.split("#")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_pages_have_flags_that_exist(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        COMMANDS[command].main(["--help"])
    known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out)) | {"--help"}
    lines = [line.split(command, 1)[1] for page in PAGES for line in bash_lines(page) if command in line]
    flags = {flag for line in lines for flag in re.findall(r"(?<=\s)--[a-zA-Z][\w.-]*", line)}
    assert lines and flags <= known, flags - known


def test_the_readme_is_one_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 120
    for page in PAGES[1:]:
        assert len(page.read_text().splitlines()) <= 100, page.name


def test_the_page_of_tasks_has_each_task_and_setting():
    page = (ROOT / "docs/tasks.md").read_text()
    assert set(TASKS) <= set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    for setting in trainer.Damage.__dataclass_fields__:
        assert f"--damage.{setting.replace('_', '-')}" in page
