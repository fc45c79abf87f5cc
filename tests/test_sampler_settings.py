"""A method's own settings, changed when a trained run samples: which may be, what that does, and what is refused."""
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from evaluation.report import plot
from images import SettingsError
from methods.edm import EDM
from methods.i2sb import I2SB
from methods.interpolant import Interpolant
from methods.sr3 import SR3
from methods.udpm import UDPM
from pixels import get, photo, put
from sample import open_model
from support.sampler_settings import with_method
from trainer import Config
from untrained import METHODS, make_run, run

# of each method: trained settings, flags, and what a run has that was trained with the settings that they ask for
CHANGES = dict(
    interpolant=(dict(solver="heun", sample_steps=2), "--interpolant.eps0 1 --steps 3",
                 dict(interpolant=Interpolant(eps0=1.0), sample_steps=3)),
    sr3=(dict(sr3=SR3(T=3)), "--sr3.schedule linear --sr3.no-clamp --sr3.T 4",
         dict(sr3=SR3(T=4, schedule="linear", clamp=False))),
    i2sb=(dict(i2sb=I2SB(n=3, beta_max=40.0)), "--i2sb.clip-denoise",
          dict(i2sb=I2SB(n=3, beta_max=40.0, clip_denoise=True))),
    edm=(dict(sample_steps=3), "--edm.sampler euler --edm.S-churn 40",
         dict(sample_steps=3, edm=EDM(sampler="euler", S_churn=40.0))))


@pytest.mark.parametrize("method", CHANGES)
def test_a_run_samples_as_one_that_was_trained_with_what_the_flags_say(tmp_path, method):
    trained, flags, asked = CHANGES[method]
    put(tmp_path / "in.png", photo(8, 8))
    made = []
    for name, settings, more in (("as trained", trained, ""), ("changed", trained, flags), ("other", asked, "")):
        path = make_run(tmp_path / f"run {name}", method=method, task="jpeg", **settings)
        assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / name, *more.split()) == 0
        made.append(get(tmp_path / name / "in.png"))
    np.testing.assert_array_equal(made[1], made[2])
    assert (made[0] != made[1]).mean() > 0.02


def test_what_is_given_counts_where_it_is_the_methods_default(tmp_path):
    path = make_run(tmp_path / "run", method="edm", edm=EDM(sampler="euler", sigma_min=0.01), sample_steps=2)
    put(tmp_path / "in.png", photo(4, 4))
    for name, flags in dict(trained=(), heun=("--edm.sampler", "heun")).items():
        assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / name, *flags) == 0
    assert (get(tmp_path / "trained/in.png") != get(tmp_path / "heun/in.png")).any()
    assert open_model(path, edm=dict(sampler="heun")).config.edm == EDM(sampler="heun", sigma_min=0.01)


@pytest.mark.parametrize("method", [Interpolant(), I2SB(), EDM()])
def test_what_is_free_leaves_the_loss_as_it_is(method):
    """So no training depends on it. SR3's schedule draws the gammas of its training; its network is told them."""
    other = dict(eps0=2.0, clip_denoise=True, sigma_min=0.1, sigma_max=9.0, rho=3.0, sampler="euler", S_churn=5.0,
                 S_min=0.5, S_max=2.0, S_noise=1.1)
    batch = Config(task="jpeg").damaged(torch.rand(2, 3, 16, 16) * 2 - 1)
    losses = []
    for name in (None, *method.free_at_sampling):
        torch.manual_seed(0)
        each = replace(method, **{name: other[name]}) if name else method
        losses.append(each.loss(lambda x, t, y, cond: 0.3 * x + t[:, None, None, None], batch))
    assert len(losses) > 1 and all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_training_fixed_is_refused_with_its_value(method):
    c, fixed = Config(method=method, task="jpeg", udpm=UDPM(lpips_weight=(0, 0, 0))), 0
    for f in fields(c.chosen):
        if f.name not in c.chosen.free_at_sampling:
            value, fixed = getattr(c.chosen, f.name), fixed + 1
            with pytest.raises(SettingsError) as refusal:
                with_method(c, {f.name: "other"})
            assert str(refusal.value) == (f"{method}.{f.name} = 'other': the run was trained with {value!r}, "
                                          "and samples with it")
            assert with_method(c, {f.name: value}) == c
    assert fixed >= 1


@pytest.mark.parametrize("flags, line", [
    ("--i2sb.beta-max 1", "i2sb.beta_max = 1.0: the run was trained with 0.3, and samples with it"),
    ("--i2sb.ot-ode", "i2sb.ot_ode = True: the run was trained with False, and samples with it"),
    ("--edm.S-churn 40", "edm.S_churn = 40.0: allowed are settings of the run's method, i2sb"),
    ("--i2sb.clip-denoise maybe", "maybe"), ("--i2sb.n -1", "i2sb.n = -1: allowed is")])
def test_flags_that_do_not_fit_are_one_line(tmp_path, capsys, flags, line):
    path = make_run(tmp_path / "run", method="i2sb")
    put(tmp_path / "in.png", photo(4, 4))
    assert run(path, "--input", tmp_path / "in.png", "--output", tmp_path / "out", *flags.split()) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_settings_that_the_task_or_the_solver_can_not_take_are_refused(tmp_path):
    blind = make_run(tmp_path / "blind", condition=False)
    with pytest.raises(SettingsError, match="^interpolant.eps0 = 1.0: allowed is 0 where the network does not see"):
        open_model(blind, interpolant=dict(eps0=1.0))
    path = make_run(tmp_path / "run", method="edm")
    for wrong, line in ((dict(edm=dict(S_churn=-1.0)), "edm.S_churn = -1.0: allowed is"),
                        (dict(edm=dict(churn=1)), "edm.churn = 1: there is no such setting"),
                        (dict(edm=3), "edm = 3: allowed is"), (dict(i2sb=dict(n=3)), "i2sb = "),
                        (dict(stepz=3), "stepz = 3: allowed is"),
                        (dict(solver="heun", edm=dict(rho=1.0)), "edm.rho = 1.0: allowed is 7.0 with the solver heun")):
        with pytest.raises(SettingsError, match=f"^{line}[^\n]*$"):
            open_model(path, **wrong)
    assert open_model(path, solver="heun", edm=dict(sigma_max=20.0)).config.edm.sigma_max == 20  # which its ODE reads


@pytest.fixture
def evaluated(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "training_flops", lambda *_: 1.0)

    def evaluated(*flags, status=0) -> dict:
        """What evaluate.py wrote of the interpolant among `runs`: its JSON files, by what they say was changed."""
        common = "--count 12 --nfe 2 --metrics psnr --device cpu --precision fp32 --output".split()
        assert evaluate.main([runs[0], *common, str(tmp_path / "out"), *flags]) == status
        found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
        return {json.dumps(result["changed"]): result for result in found}

    return evaluated


def test_a_sweep_of_guidance_is_rows_a_curve_and_a_picture(evaluated, runs, tmp_path):
    found = evaluated("--guidance", "1", "3", "--nfe", "4")
    assert found.keys() == {'{"guidance": 1.0}', '{"guidance": 3.0}'}
    one, three = (found[key]["rows"] for key in sorted(found))
    assert one[0]["psnr"] != three[0]["psnr"] and one[0]["nfe"] == three[0]["nfe"] == 4
    table = (tmp_path / "out/table.md").read_text()
    for scale, row in (("1.0", one[0]), ("3.0", three[0])):
        start = f"| interpolant, guidance {scale} | euler | 4 |"
        line, = (line for line in table.splitlines() if line.startswith(start))
        assert f"{row['psnr']:.2f}" in line
    assert "the runs differ in guidance: 1.0 (interpolant, guidance 1.0); 3.0 (interpolant, guidance 3.0)" in table
    page = get(tmp_path / f"out/{Path(runs[0]).name}.png")
    above, below = page[-6 - 2 * 68:-6, -6 - 530:-6].reshape(2, 68, 530, 3).astype(int)  # 8 images of 64 in frames
    assert above.std() > 50 and 0 < abs(above - below).mean() < 20  # their noise is the same
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out/quality-guidance.png").exists() and (tmp_path / "out/quality.png").exists()
    curve, = plot(list(found.values()), "guidance").axes[0].get_lines()[:1]
    assert sorted(curve.get_xdata()) == [1, 3]


def test_other_settings_of_one_run_stand_beside_it(evaluated, tmp_path):
    plain, = evaluated().values()
    both = evaluated("--interpolant.eps0", "1")
    assert both.keys() == {"{}", '{"interpolant.eps0": 1.0}'}  # the second evaluation left the first one's file
    changed = both['{"interpolant.eps0": 1.0}']
    assert changed["config"]["interpolant"]["eps0"] == 1 and plain["config"]["interpolant"]["eps0"] == 0
    assert changed["name"] == plain["name"] + "-interpolant.eps0-1.0"
    assert changed["rows"][0]["sampler"] == "own" and changed["rows"][0]["psnr"] != plain["rows"][0]["psnr"]
    files = [str(path) for path in (tmp_path / "out").glob("*.json")]
    assert len(files) == 2 and evaluate.main([*files, "--output", str(tmp_path / "joined")]) == 0
    table = (tmp_path / "joined/table.md").read_text()
    assert "| interpolant | euler |" in table and "| interpolant, interpolant.eps0 1.0 | own |" in table


@pytest.mark.parametrize("flags, line", [
    ("--interpolant.sigma 2", "interpolant.sigma = 2.0: the run was trained with 1.0, and samples with it"),
    ("--edm.rho 2", "edm.rho = 2.0: allowed are settings of the run's method, interpolant"),
    ("--interpolant.eps0 1 --solver heun", "interpolant.eps0 = 1.0: allowed is 0.0 with the solver heun"),
    ("--guidance", "guidance")])
def test_evaluation_refuses_what_sampling_refuses(evaluated, capsys, flags, line):
    evaluated(*flags.split(), status=2)
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
