"""Going on from something: the rules in support/run_folder.py, seen from outside."""
import json
import shutil
from dataclasses import fields

import pytest
import torch
from PIL import Image

import trainer
from images import data
from runs import FINISHED, TINY, checkpoint, contents, metrics, one_line, resume, same, start
from trainer import Config


def train(out, flags, status=0):
    assert trainer.main(f"{TINY} --out-dir {out} {flags}".split()) == status


# ------------------------------------------------------------------------------------------- which folder is a run's

def test_an_exported_file_is_refused_with_the_word_init(tmp_path, capsys):
    for more in ("", f"--name new --out-dir {tmp_path}"):
        resume(tmp_path / "model.safetensors", more, status=2)
        assert "--init" in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["previous.pt", "step_000002.pt"])
def test_an_older_state_goes_on_as_a_branch_which_leaves_the_run_as_it_is(tmp_path, copy, capsys, name):
    older, straight = copy / "checkpoints" / name, checkpoint(copy)
    if not older.exists():
        shutil.copy(copy / "checkpoints/previous.pt", older)
    before = contents(copy)
    capsys.readouterr()
    resume(older, "--max-steps 4", status=2)
    assert "add --name NEW" in one_line(capsys)
    resume(older, f"--max-steps 4 --name branch --out-dir {tmp_path}")
    assert contents(copy) == before
    same(checkpoint(tmp_path / "branch"), straight)
    assert [line["step"] for line in metrics(tmp_path / "branch")] == [4, 4]
    capsys.readouterr()
    resume(older, f"--max-steps 6 --name branch --out-dir {tmp_path}", status=2)  # it has a state of its own now
    assert "name = 'branch'" in one_line(capsys)
    train(tmp_path, "--name branch --max-steps 5")
    assert checkpoint(tmp_path / "branch")["step"] == 5


def test_a_checkpoint_beside_other_files_does_not_make_their_folder_a_run(tmp_path, copy, capsys):
    home = tmp_path / "home"
    (home / "dl" / "checkpoints").mkdir(parents=True)
    for name in ("dl/last.pt", "dl/checkpoints/last.pt", "last.pt"):
        shutil.copy(copy / "checkpoints/last.pt", home / name)
    for name in ("config.json", "work/.mine.tmp", "dl/.mine.tmp"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("precious")
    before = contents(home)
    capsys.readouterr()
    for name in ("dl/last.pt", "dl/checkpoints/last.pt", "dl", "last.pt"):
        resume(home / name, "--max-steps 6", status=2)
        assert "resume = " in one_line(capsys)
    train(tmp_path, "--name home", status=2)
    assert "holds something else than a run" in one_line(capsys)
    assert contents(home) == before and not (home / ".lock").exists()
    resume(home / "dl/last.pt", f"--max-steps 5 --name new --out-dir {tmp_path}")
    assert contents(home) == before and checkpoint(tmp_path / "new")["step"] == 5


def test_a_run_of_before_is_known_by_what_it_holds_and_only_its_own_leftovers_go(copy):
    (copy / ".lock").write_bytes(b"")
    ours = [copy / ".config.json.1.tmp", copy / "checkpoints/.next.pt", copy / "samples/.step.png.1.tmp"]
    theirs = [copy / "notes/.draft.tmp", copy / "samples/mine/.draft.tmp"]
    for path in ours + theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    resume(copy, "--max-steps 5")
    assert [path.exists() for path in ours + theirs] == [False] * 3 + [True] * 2
    shutil.rmtree(copy / "checkpoints")
    train(copy.parent, f"--name {copy.name} --max-steps 1")  # by now it is marked


def test_the_lock_comes_before_the_look(tmp_path, monkeypatch):
    """Whoever comes second reads what the first one has saved, however long ago it looked at the folder's name."""
    original, first = trainer.command_line.run_folder.RunFolder, []

    def late(path):
        if not first:
            first.append(path)
            train(tmp_path, "--name mine --max-steps 2")  # another trainer, from its beginning to its end
        return original(path)

    monkeypatch.setattr(trainer.command_line.run_folder, "RunFolder", late)
    train(tmp_path, "--name mine --max-steps 4")
    straight = start(tmp_path / "straight", "--max-steps 4")
    same(checkpoint(tmp_path / "mine"), checkpoint(straight))
    assert [line["step"] for line in metrics(tmp_path / "mine") if "psnr" in line] == [2, 4]


# ------------------------------------------------------------------------------------------------------- every setting

REFUSED = {
    "method": "sr3", "condition": None, "channels": 1, "unet_channels": 16, "unet_dim_mults": "1 2", "unet_blocks": 2,
    "unet_use_classes": None, "init": "other", "preset": "couplings", "out_dir": "other", "dataset": "FOLDER"}
TAKEN = {  # beside the methods' own
    "task": "blur", "overfit": False, "image_size": 24, "max_steps": 7, "batch_size": 2, "base_lr": 1e-4,
    "lr_schedule": "linear", "weight_decay": 0.5, "warmup_steps": 100, "grad_clip": 1e-3, "ema_decay": 0.1,
    "label_drop": 0.9, "flip": False, "seed": 1, "unet_dropout": 0.5, "sample_every": 5, "sample_count": 1,
    "sample_steps": 3, "solver": "heun", "guidance": 2, "print_loss_every": 5, "keep_every": 5, "precision": "bf16",
    "micro_batch": 1, "data_path": "elsewhere", "lr_decay": 0.5, "sample_at_start": True, "unet_checkpointing": True,
    "integration_atol": 1e-3, "integration_rtol": 1e-3, "checkpoint_every": 3, "wandb_project": "other",
    "wandb_entity": "me", "device": "cpu", "compile": "off", "graph": False, "use_tensorboard": False,
    "use_wandb": False}
KNOBS = {"damage.factor": 4, "interpolant.sigma": 0.5}
# tested above, or of another task, data set or method
ELSEWHERE = {"name", "crop", "resume", "paired_path", "sr3", "i2sb", "edm", "udpm", "flowmap", "regression"}


def flag(name, value) -> str:
    name = name.replace("_", "-")
    return f"--no-{name}" if value in (None, False) else f"--{name}" + ("" if value is True else f" {value}")


def test_no_field_is_left_out():
    named = [*REFUSED, *TAKEN, *ELSEWHERE, *(knob.partition(".")[0] for knob in KNOBS)]
    assert sorted(named) == sorted(field.name for field in fields(Config))


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_can_not_change_is_refused_by_name(finished, folder, capsys, name):
    before, value = contents(finished), folder if REFUSED[name] == "FOLDER" else REFUSED[name]
    capsys.readouterr()
    resume(finished, f"--max-steps 5 {flag(name, value)}", status=2)
    assert f"{name} = " in one_line(capsys) and contents(finished) == before


def test_every_other_setting_that_is_given_on_resume_is_taken(copy):
    """Also where the checkpoint has another value, as in the state of the optimizer."""
    flags = " ".join(flag(*each) for each in (TAKEN | KNOBS).items())
    run = trainer.Trainer(*trainer.read_command_line(f"--resume {copy} {flags}".split()))
    run.train_step()
    run.save()
    run.folder.close()
    group = run.players[0].optimizer.param_groups[0]
    assert (group["weight_decay"], group["lr"]) == (0.5, pytest.approx(1e-4 * 5 / 100))
    for config in (json.loads((copy / "config.json").read_text()), checkpoint(copy)["config"]):
        assert {name: config[name] for name in TAKEN} == TAKEN
        assert (config["damage"]["factor"], config["interpolant"]["sigma"]) == (4, 0.5)


# --------------------------------------------------------------------------------------------- classes, and the losses

@pytest.fixture
def animals(tmp_path):
    """Two data sets of classes bird and ship, airplane and bird: the same number, and one name in common."""
    images = data.load("shapes", 16, limit=24).train
    for root, classes in (("before", ("bird", "ship")), ("after", ("airplane", "bird"))):
        for i, image in enumerate(images):
            path = tmp_path / root / classes[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return tmp_path


def test_classes_go_by_name(animals, capsys):
    run = start(animals / "out", f"--dataset {animals}/before --max-steps 2")
    capsys.readouterr()
    resume(run, f"--dataset {animals}/after --max-steps 3", status=2)
    assert "its classes are airplane, bird, and the run knows bird, ship" in one_line(capsys)
    flags = f"{TINY} --out-dir {animals}/new --dataset {animals}/after --init {run}"
    new, fresh = (trainer.Trainer(*trainer.read_command_line(each.split())).net.state_dict()["embed_class.0.weight"]
                  for each in (flags, flags.partition("--init")[0]))
    assert "fresh are class airplane" in capsys.readouterr().out
    old = checkpoint(run)["ema"]["embed_class.0.weight"]
    assert torch.equal(new, torch.stack([fresh[0], old[0], old[2]]))


def test_the_lowest_loss_of_the_demo_does_not_stop_the_full_run(tmp_path, copy, capsys):
    """The demo's loss of one batch, learned by heart, is far below any that a full run will see."""
    path = copy / "checkpoints/last.pt"
    torch.save(checkpoint(copy) | dict(lowest_loss=1e-9), path)
    shutil.copytree(copy, tmp_path / "same")
    resume(tmp_path / "same", "--max-steps 6", status=1)
    assert "is not saved" in capsys.readouterr().err
    resume(copy, "--max-steps 6 --no-overfit")
    assert checkpoint(copy)["step"] == 6 and checkpoint(copy)["lowest_loss"] > 1e-3


def test_a_run_says_which_code_made_it(finished):
    code = json.loads((finished / "config.json").read_text())["code"]
    assert checkpoint(finished)["code"] == code and code != ""


def test_commands_to_paste_quote_blanks(tmp_path, capsys):
    assert trainer.main([*f"{TINY} {FINISHED} --name".split(), "my run", "--out-dir", str(tmp_path)]) == 0
    assert f"--resume '{tmp_path}/my run'" in capsys.readouterr().out
