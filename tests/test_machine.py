"""What a command asks of its machine."""
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import sample
import trainer
from support import machine
from support.machine import chip, set_up, stream

# fifty tensors of 4 MiB, made and freed as a training step does; printed: the pages that each further turn waits for
TURNS = """
import resource, torch
from support.machine import set_up
set_up(torch.device("cpu"))
def faults(turns):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(turns):
        kept = [torch.ones(2**20) for _ in range(50)]
        del kept
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // turns
faults(3)
print(faults(5))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_freed_memory_is_used_again():
    ours = {name: value for name, value in os.environ.items()
            if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", TURNS], env=ours, cwd=Path(__file__).parent.parent,
                          capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of 51,200 pages of 4 KiB


def test_help_does_not_wait_for_packages_that_only_a_run_needs():
    program = "import sys, trainer, sample, evaluate; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True,
                          text=True, check=True)
    slow = {"scipy", "torchdiffeq", "torchvision", "wandb", "matplotlib", "torch._inductor"}
    assert not slow & set(done.stdout.split())


@pytest.mark.parametrize("helps, chosen", [(True, "bf16"), (False, "fp32")])
def test_the_precision_is_bf16_only_where_the_chip_computes_in_it(monkeypatch, helps, chosen):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: helps)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert set_up(torch.device("cpu")) == chosen
    assert [set_up(torch.device("cpu"), named) for named in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_neighbouring_seeds_and_steps_have_streams_of_their_own():
    first = {torch.rand(2, generator=stream("cpu", "train", seed, step)).tolist()[1]
             for seed in range(50) for step in range(50)}
    assert len(first) > 2490  # of 2,500 values out of 2**24; seeds of 16 bits would give 2,450


@pytest.mark.parametrize("found, name", [
    (dict(cpu_name="Intel Xeon", amx_bf16=True), "Intel Xeon with AMX"), (dict(cpu_name="AMD EPYC"), "AMD EPYC"),
    ({}, "CPU")])
def test_a_cpu_is_named_with_what_decides_its_speed(found, name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert chip(torch.device("cpu")) == f"{name}, threads: {torch.get_num_threads()}"


# ------------------------------------------------------------------------------------------------------------ processes

TORCHRUN = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


@pytest.fixture
def environment(monkeypatch):
    def be(**variables):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    be()
    return be


@pytest.mark.parametrize("left, fault", [
    (dict(RANK="3"), "WORLD_SIZE and LOCAL_RANK and MASTER_ADDR and MASTER_PORT are missing"),
    (dict(WORLD_SIZE="4"), "RANK and"), (dict(RANK="3", WORLD_SIZE="8"), "LOCAL_RANK and"),
    ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT is missing"),
    (TORCHRUN | dict(RANK="2"), "RANK = '2' of WORLD_SIZE = '2'"), (TORCHRUN | dict(RANK="-1"), "RANK = '-1'"),
    (TORCHRUN | dict(WORLD_SIZE="two"), "WORLD_SIZE = 'two'"), (TORCHRUN | dict(LOCAL_RANK=""), "LOCAL_RANK = ''")])
def test_what_a_parent_job_left_in_the_environment_is_one_line(environment, capsys, tmp_path, left, fault):
    environment(**left)
    for command, flags in ((trainer, ["--name", "x", "--out-dir", str(tmp_path)]), (sample, ["x"]), (evaluate, ["x"])):
        assert command.main(flags) == 2
        said = capsys.readouterr().err
        assert fault in said and "unset " + list(left)[0] in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alone", [
    {}, dict(RANK="0", WORLD_SIZE="1"), dict(LOCAL_RANK="2"), dict(MASTER_ADDR="h", MASTER_PORT="1")])
def test_what_says_nothing_of_others_is_no_fault(environment, alone):
    environment(**alone)
    machine.check_environment()
    assert machine.processes() == (0, 1)


def test_torchruns_environment_counts(environment):
    environment(**TORCHRUN | dict(RANK="1"))
    machine.check_environment()
    assert machine.processes() == (1, 2)
