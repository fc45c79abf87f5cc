"""A batch in one piece, in several, or shared by processes: the same noise, the same gradients to rounding."""
import os
import re
import signal

import pytest
import torch

import trainer
from images.corruptions import Draws
from runs import TINY, TRAINER, checkpoint, finite, metrics, ranks, resume, start, together, until
from trainer import Trainer

# groups of two channels: with groups of one, a bias before a norm has no gradient but rounding
FLAGS = ("--batch-size 6 --unet-channels 16 --grad-clip 1e9 --max-steps 1 --no-overfit --precision fp32 "
         "--print-loss-every 1 --sample-every 1000")
METHODS = dict(
    interpolant="--task sr,inpaint --damage.mask freeform-10-20", sr3="--method sr3 --sample-steps 2 --solver auto",
    i2sb="--method i2sb --task jpeg,blur --solver auto", edm="--method edm --task generate --solver auto",
    udpm="--method udpm --udpm.lpips-weight 0 0 0 --udpm.adv-weight 0 0 0 --solver auto --sample-steps 3",
    regression="--method regression --solver auto --sample-steps 1")


def recorded(arguments, record):
    """A run that leaves the gradients of its first step in `record`."""
    original = Trainer.train_step

    def train_step(self):
        original(self)
        torch.save({name: p.grad for name, p in self.net.named_parameters()}, record)

    Trainer.train_step = train_step
    try:
        return trainer.main(arguments)
    finally:
        Trainer.train_step = original


def flags(out, method, more="") -> list[str]:
    return f"{TINY} {FLAGS} {METHODS[method]} --out-dir {out} {more}".split()


def same_step(folder, *names):
    """The gradients and the loss that the runs of these names left are equal, to rounding."""
    whole, *others = (torch.load(folder / f"{name}.pt") for name in names)
    largest = max(grad.abs().max() for grad in whole.values())
    for other in others:
        for name, grad in whole.items():
            assert (other[name] - grad).abs().max() < 1e-5 * largest, name
    losses = {metrics(next(folder.glob(f"{name}-out/*")))[0]["loss"] for name in names}
    assert max(losses) - min(losses) < 2e-5 * max(losses)


@pytest.mark.parametrize("method", METHODS)
def test_pieces_have_the_gradients_of_one_piece(tmp_path, method):
    for name, more in (("whole", ""), ("pieces", "--micro-batch 4")):  # 4 and 2 images
        assert recorded(flags(tmp_path / f"{name}-out", method, more), tmp_path / f"{name}.pt") == 0
    same_step(tmp_path, "whole", "pieces")


def test_processes_have_the_gradients_of_one(tmp_path, process):
    pair = flags(tmp_path / "pair-out", "interpolant")
    together(process, recorded, (pair, tmp_path / "pair.pt"), (pair, tmp_path / "other.pt"))
    assert recorded(flags(tmp_path / "whole-out", "interpolant"), tmp_path / "whole.pt") == 0
    same_step(tmp_path, "whole", "pair")
    one, other = (torch.load(tmp_path / name) for name in ("pair.pt", "other.pt"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_both_players_of_udpm_train_in_two_processes_with_pieces(tmp_path, process):
    """The discriminator's minibatch statistic is of a piece, so no equality to one piece; but both processes agree."""
    arguments = (f"{TINY} {FLAGS} --method udpm --udpm.lpips-weight 0 0 0 --udpm.disc-channels 8 --solver auto "
                 f"--sample-steps 3 --micro-batch 2 --batch-size 8 --max-steps 3 --out-dir {tmp_path}/out").split()
    together(process, recorded, *((arguments, tmp_path / str(rank)) for rank in range(2)))
    state = checkpoint(next((tmp_path / "out").iterdir()))
    assert finite(state) and state["players"][1]["steps"] == 3
    one, other = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_number_of_processes_goes_on(tmp_path, process):
    arguments = f"{TINY} {FLAGS} --batch-size 4 --max-steps 2 --name shared --out-dir {tmp_path}"
    together(process, trainer.main, *[(arguments.split(),)] * 2)
    resume(tmp_path / "shared", "--max-steps 4")
    alone = start(tmp_path / "alone", f"{FLAGS} --batch-size 4 --max-steps 4")
    ours, theirs = (checkpoint(run)["players"][0] for run in (tmp_path / "shared", alone))
    assert checkpoint(tmp_path / "shared")["step"] == 4
    moved = max((ours[name] - theirs[name]).abs().max() for name in ours)
    assert moved < 2e-3  # four steps of at most 1e-3 each, which rounding turns around in few weights
    assert sum((ours[name] - theirs[name]).square().sum() for name in ours) < 1e-4


@pytest.mark.parametrize("rows, shape", [(slice(1, None, 2), (3, 2)), (slice(0, 4, 2), (2, 5)), (slice(4, 6), (2,))])
def test_draws_are_the_rows_of_the_whole(rows, shape):
    def streams():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    whole, part = Draws(*streams(), total=6), Draws(*streams(), (rows,), 6)
    x = torch.empty(6, *shape[1:])
    for draw in (lambda d, x: d.randn_like(x), lambda d, x: d.rand(x, 2), lambda d, x: d.randint(0, 100, x)):
        assert torch.equal(draw(whole, x)[rows], draw(part, x[rows]))
    assert [whole.one(0, 1000) for _ in range(3)] == [part.one(0, 1000) for _ in range(3)]


@pytest.mark.parametrize("more, said", [
    ("--seed 1", "process 1 differs from process 0 in seed"), ("--dataset OTHER", "in dataset, images")])
def test_processes_that_differ_end_in_one_line(tmp_path, process, folder, more, said):
    """One was started with another seed or other images: no step is made."""
    more = more.replace("OTHER", str(folder))
    flags = f"{TINY} --batch-size 4 --max-steps 6 --out-dir {tmp_path}/out"
    logs = together(process, trainer.main, *((f"{flags} {other}".split(),) for other in ("", more)), status=2)
    assert all(said in log and "Traceback" not in log and "allowed are the same" in log for log in logs), logs
    assert not any((tmp_path / "out").glob("*/checkpoints"))


def test_a_process_that_dies_ends_the_other_in_one_line(tmp_path, process):
    flags = f"{TINY} --batch-size 4 --max-steps 100000 --print-loss-every 1 --sample-every 1000000 --out-dir {tmp_path}"
    first, second = [process(trainer.main, flags.split(), env=env) for env in ranks(2)]
    until(lambda: first.log.exists() and "step 3" in first.log.read_text(), first, second)
    second.kill()
    first.join(100)
    said = first.log.read_text()
    assert first.exitcode == 1 and "Traceback" not in said, said
    assert said.count("another process has ended") == 1


def torchrun(arguments, port):
    from torch.distributed.run import main

    main(["--nproc-per-node", "2", "--max-restarts", "3", "--master-port", port, str(TRAINER), *arguments])


def test_a_lost_process_is_made_good_by_torchrun(tmp_path, process):
    """One of two is killed: torchrun starts both again, and by its name the run goes on from its checkpoint."""
    flags = (f"{TINY} --max-steps 60 --checkpoint-every 5 --print-loss-every 10 --sample-every 1000 --name lost "
             f"--out-dir {tmp_path}")
    run = process(torchrun, flags.split(), ranks(1)[0]["MASTER_PORT"], env=dict(OMP_NUM_THREADS="1"))
    until((tmp_path / "lost/checkpoints/previous.pt").exists, run)
    os.kill(worker(run.pid), signal.SIGKILL)
    run.join(120)
    said = run.log.read_text()
    assert run.exitcode == 0, said
    first, second = re.findall(r"steps ([\d,]+) to 60", said)
    assert first == "0" and int(second) >= 5 and checkpoint(tmp_path / "lost")["step"] == 60


def worker(agent: int) -> int:
    """The process of rank 1 that torchrun has started."""
    for folder in os.listdir("/proc"):
        if folder.isdecimal():
            try:
                parent = int(open(f"/proc/{folder}/stat").read().rsplit(")", 1)[1].split()[1])
                environment = open(f"/proc/{folder}/environ").read().split("\0")
            except (OSError, IndexError):
                continue
            if parent == agent and "RANK=1" in environment:
                return int(folder)
    raise AssertionError("no worker")
