"""What samples and training cost: network evaluations (NFE), and floating-point operations."""
import math
from dataclasses import replace

from torch.utils.flop_counter import FlopCounterMode

from images import SettingsError
from images.corruptions import Batch
from support.machine import autocast, reseed
from support.model import ZeroNet, run_sampler
from trainer import Config
from unet import Counted, Guided


def evaluations(config: Config, batch: Batch) -> float:
    """NFE of the sampler, counted with a network that says 0; inf where it does not allow its count of steps."""
    counted = Counted(ZeroNet(config))
    try:
        run_sampler(config, Guided(counted, config.guidance), batch)
    except SettingsError:
        return math.inf
    return counted.rows / len(batch.zlo)


def samplers(config: Config, nfe, batch: Batch, solver="auto", default=True) -> tuple[list[Config], list[int]]:
    """For each of `nfe` the sampler that takes exactly so many evaluations, the method's default last; and the NFE
    left out, since no count of steps takes exactly those."""
    own = replace(config, solver="auto", sample_steps=None)
    few = [replace(own, solver=solver if config.chosen.has_ode else "auto")]
    if few[0].sampler == "dopri5":  # it chooses its own steps; in few, midpoint is better than euler where it fits
        few = [replace(own, solver=name) for name in ("midpoint", "euler")]
    usual = evaluations(own, batch) if few[0].sampler == own.sampler else None
    found, missing = [], []
    for n in sorted(set(nfe)):
        exact = [own] if usual == n else [setting for each in few if (setting := with_evaluations(each, n, batch))]
        found += exact[:1]
        missing += [] if exact else [n]
    if default and own not in found:
        found.append(own)
    return found, missing


def with_evaluations(config: Config, n: int, batch: Batch) -> Config | None:
    """The sampler in as many steps as take exactly n evaluations, which grow by as many with each step; else None."""
    first, second = (evaluations(replace(config, sample_steps=steps), batch) for steps in (1, 2))
    if first == n:
        return replace(config, sample_steps=1)
    if not first < second < math.inf:
        return None
    setting = replace(config, sample_steps=1 + round(max(0, n - first) / (second - first)))
    return setting if evaluations(setting, batch) == n else None


def training_flops(levels: int, players: list, batch: Batch, precision: str) -> float:
    """Floating-point operations of a training step, forward and backward, of every player, per image.

    A method with levels (UDPM; else 0) draws one for each step: the mean over levels, told apart by what they cost.
    """
    levels = max(levels, 1)
    costs = [set() for _ in players]
    for number in range(8 * levels):
        reseed("flops", number)
        for cost, (module, loss) in zip(costs, players):
            with FlopCounterMode(display=False) as counter:
                with autocast(batch.zlo.device, precision):
                    value = loss(module, batch).mean()
                value.backward()
            module.zero_grad()
            cost.add(counter.get_total_flops())
        if all(len(cost) == levels for cost in costs):
            break
    return sum(sum(cost) / len(cost) for cost in costs) / len(batch.zlo)
