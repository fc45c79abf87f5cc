"""Damaged or hostile headers, settings and results end in one line that names the file, never in a traceback."""
import json

import pytest
import torch

import evaluate
from images import SettingsError
from support.checkpoints import export, open_run
from support.disk import parse_json
from support.model import load_network
from trainer import Config
from untrained import make_run

DEEP, LONG = "[" * 100_000 + "]" * 100_000, "1" + 5000 * "0"


@pytest.mark.parametrize("text", [
    "", "{", "nul", "\x00", b"\xff\xfe{", '"\\ud8"', DEEP, LONG, "-" + LONG, "1e999",
    "-1e999", "NaN", "[Infinity]", "-Infinity", '{"a": 1e308, "b": 2e308}'],
    ids=lambda text: repr(text[:20]) + str(len(text)))
def test_what_could_harm_the_reader_is_no_json(text):
    with pytest.raises(ValueError) as refused:
        parse_json(text)
    assert "\n" not in str(refused.value) and not isinstance(refused.value, RecursionError)


def test_usual_json_is_read_as_it_is():
    value = {"a": [1, -2.5e-300, None, True, "é\\\n"], "b": {}, "c": 10**29, "": 1e308}
    assert parse_json(json.dumps(value)) == value == parse_json(json.dumps(value).encode())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    export(open_run(make_run(path.parent / "run", method="i2sb"), Config), path)
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()["run"]
    return path, header, safetensors.load_file(path)


WRONG = ["null", "[]", '"x"', "-1", LONG, DEEP, "NaN"]


@pytest.mark.parametrize("key", ["config", "classes", "num_classes", "pair_factor", "step", "images_seen", "i2sb"])
def test_a_damaged_header_of_an_exported_file_is_one_line(exported, tmp_path, key):
    import safetensors.torch
    _, header, weights = exported
    about = json.loads(header)
    owner = about["config"] if key == "i2sb" else about
    harmless = 0
    for wrong in WRONG:
        whole = json.dumps(about | {key: "HERE"} if owner is about else about | {"config": owner | {key: "HERE"}})
        path = tmp_path / "damaged.safetensors"
        safetensors.torch.save_file(weights, path, {"run": whole.replace('"HERE"', wrong)})
        try:
            load_network(open_run(path, Config))
            harmless += 1  # no classes, no settings for a method: the defaults
        except SettingsError as refused:
            assert str(path) in str(refused) and "\n" not in str(refused) and len(str(refused)) < 700
    assert harmless <= 1


@pytest.mark.parametrize("key, wrong", [
    ("config", dict(unet_dim_mults=(10**6,))), ("config", dict(batch_size=10**9)), ("config", dict(i2sb=[[[]]])),
    ("config", dict(base_lr=10**400)), ("config", {1: 2, "a": 3} | dict(seed=-1)), ("step", -1), ("step", True),
    pytest.param("step", 10**5000, id="a step of 5,000 digits"), ("classes", [1, 2]), ("num_classes", 10**9),
    ("num_classes", 1), ("pair_factor", 0), ("images_seen", -5), ("ema", {}), ("ema", {1: 2}),
    ("ema", {"stem.weight": "x"}), ("players", []), ("players", [[]]), ("absolute_paths", {"dataset": 1}),
    ("optimizers", "x"), ("sampled", None), ("scaler", []), ("loss", 3), ("parts", []), ("skipped", {}),
    ("first_loss", "x"), ("lowest_loss", []), ("wandb_id", 3)])
@pytest.mark.filterwarnings("ignore:settings of another version")
def test_a_damaged_checkpoint_is_one_line(tmp_path, key, wrong):
    run = damaged(tmp_path, key, wrong)
    with pytest.raises(SettingsError, match=r"\Arun = [^\n]*\Z") as refused:
        load_network(open_run(run, Config))
    assert len(str(refused.value)) < 700


@pytest.mark.parametrize("wrong", [{"seed": "/"}, {"dataset": "x" * 10_000}, {"dataset": "a\0b"}])
def test_paths_that_are_none_are_passed_over(tmp_path, wrong):
    assert open_run(damaged(tmp_path, "absolute_paths", wrong), Config).config.dataset is None


def damaged(tmp_path, key: str, wrong) -> str:
    """A run whose checkpoint has something else in one place."""
    run = make_run(tmp_path / "run", method="i2sb")
    file = tmp_path / "run/checkpoints/last.pt"
    state = torch.load(file, weights_only=True)
    state[key] = state[key] | wrong if key == "config" else wrong
    torch.save(state, file)
    return run


@pytest.mark.parametrize("text", ["", "[]", "{}", "1", DEEP, LONG, "NaN", '{"rows": [], "name": 1}',
                                  '{"rows": ' + DEEP + "}", '{"rows": [1e999]}'], ids=lambda text: text[:20])
def test_a_damaged_result_is_one_line(tmp_path, capsys, text):
    (tmp_path / "result.json").write_text(text)
    assert evaluate.main([str(tmp_path / "result.json"), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("evaluate.py: run = ") and "result.json" in said and said.count("\n") == 1
