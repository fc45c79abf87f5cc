"""What samples and training cost, against a count of the network's calls and of its operations."""
import pytest
import torch
from torch import nn

from evaluation import costs
from measured import SMALL, one_batch
from methods.edm import EDM
from methods.i2sb import I2SB
from methods.interpolant import Interpolant
from methods.sr3 import SR3
from support.model import make_unet, run_sampler
from trainer import Config
from unet import Counted, Guided


@pytest.mark.parametrize("settings, solver, missing, default", [
    (dict(method="interpolant"), "auto", [1], None),  # the clean estimate at the end is one more
    (dict(method="interpolant"), "heun", [1, 2, 4, 10], None),
    (dict(method="interpolant", interpolant=Interpolant(eps0=0.5)), "auto", [1], 101),
    (dict(method="sr3", sr3=SR3(T=20)), "auto", [], 20),
    (dict(method="sr3", sr3=SR3(T=4)), "auto", [5, 10], 4),
    (dict(method="sr3", sr3=SR3(T=20), guidance=2.0), "auto", [1, 3, 5], 40),  # guidance takes two
    (dict(method="i2sb", i2sb=I2SB(n=8)), "auto", [10], 8),
    (dict(method="edm"), "auto", [2, 4, 10], 35),
    (dict(method="edm", edm=EDM(sampler="euler")), "auto", [], 35),
    (dict(method="edm"), "euler", [1], 35),
    (dict(method="udpm"), "heun", [1, 2, 4, 5, 10], 3),  # no ODE: its own sampler
    (dict(method="i2sb", i2sb=I2SB(n=8)), "midpoint", [10], 8),  # nor without ot_ode
    (dict(method="regression"), "auto", [2, 3, 4, 5, 10], 1),
])
def test_nfe_against_the_networks_own_counter(settings, solver, missing, default):
    config, nfe = Config(**SMALL | settings), (1, 2, 3, 4, 5, 10)
    classes = 3 if config.guidance != 1 else 0
    net, batch = make_unet(config, classes).eval(), one_batch(config, classes)
    found, without = costs.samplers(config, nfe, batch, solver)
    assert without == missing
    counts = []
    for setting in found:
        calls = []
        hook = net.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
        counted = Counted(net)
        with torch.no_grad():
            run_sampler(setting, Guided(counted, config.guidance), batch)
        hook.remove()
        assert sum(calls) == counted.rows
        counts.append(sum(calls) / 3)
    own = counts.pop() if found[-1].solver == "auto" and found[-1].sample_steps is None and default not in nfe else None
    assert counts == [n for n in nfe if n not in missing]
    if default is None:  # dopri5 chooses its steps
        assert own > max(nfe)
    else:
        assert own == (None if default in nfe else default)
    assert costs.samplers(config, nfe, batch, solver, default=False)[0] == [s for s, n in zip(found, counts)]


def test_flops_of_a_step():
    convolution = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    forward = 2 * 5 * 3 * 9 * 16 * 16  # a multiplication and an addition a tap
    batch = one_batch(Config(**SMALL), 0)
    cost = costs.training_flops(0, [(convolution, lambda net, b: net(b.z1).square().mean((1, 2, 3)))], batch, "fp32")
    assert cost == 2 * forward  # the image needs no gradient: forward, and the weights'
    twice = nn.Sequential(convolution, nn.Conv2d(5, 5, 1, bias=False))
    small = 2 * 5 * 5 * 16 * 16
    cost = costs.training_flops(0, [(twice, lambda net, b: net(b.z1).mean((1, 2, 3)))] * 2, batch, "fp32")
    assert cost == 2 * (2 * forward + 3 * small)  # two players


def test_flops_are_the_mean_over_levels():
    def loss(net, batch):
        return net(batch.z1[:, :, :: 2 ** int(torch.randint(3, ())), :]).mean((1, 2, 3))

    convolution, forward = nn.Conv2d(3, 5, 3, padding=1, bias=False), 2 * 5 * 3 * 9 * 16 * 16
    cost = costs.training_flops(3, [(convolution, loss)], one_batch(Config(**SMALL), 0), "fp32")
    assert cost == pytest.approx(2 * forward * (1 + 1 / 2 + 1 / 4) / 3)
