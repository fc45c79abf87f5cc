"""Whether a run is well: its losses, the gradients that were not finite, whether its state may replace a good one."""
import math

import torch
import torch.distributed as dist
from torch import Tensor

DIVERGED = 100  # times the lowest loss: a run that stands above it replaces no checkpoint


class Health:
    """Counts on the device; the host looks when it reports and when it saves.

    usual_skips: how many gradients in a row need not be finite before something is wrong: with fp16, some, by which
    its scale is found.
    """

    def __init__(self, device: torch.device, usual_skips: int = 0):
        self.usual_skips = usual_skips
        self.loss = torch.zeros(2, device=device)  # since the last report: sum of the finite ones, their number
        self.parts = {}  # the same of the loss's parts, and of other networks' losses, by name
        self.norm = torch.zeros((), device=device)  # of the network's last gradient, before it was clipped
        self.skipped = torch.zeros(2, device=device)  # steps whose gradient was not finite: in all, in a row
        self.first = torch.full((), math.nan, device=device)  # the first loss that was counted
        self.recent = self.lowest = None  # mean losses between two reports: the last one, the lowest one

    def count(self, loss: Tensor, norm: Tensor, skip: Tensor, parts: dict[str, Tensor]):
        """A step's loss, its gradient's norm, whether it was skipped (1) or not (0), and the loss's parts: scalars.

        In place, since a CUDA graph may hold it.
        """
        self.loss += tally(loss)
        for name, part in parts.items():
            self.parts.setdefault(name, torch.zeros_like(self.loss)).add_(tally(part))
        self.norm.copy_(norm)
        in_all, in_a_row = self.skipped
        self.skipped.copy_(torch.stack([in_all + skip, (in_a_row + 1) * skip]))
        self.first.copy_(torch.where(self.first.isnan(), loss, self.first))

    def report(self) -> tuple[dict[str, float | None], int]:
        """What is logged: mean losses since the last report, over all processes, the last gradient's norm, the steps
        skipped in all. And how many were skipped in a row up to now."""
        self.share()
        means = {"loss": self.loss} | {f"loss_{name}": self.parts[name] for name in sorted(self.parts)}
        for name, sums in means.items():
            total, count = sums.tolist()
            means[name] = total / count if count else None
            sums.zero_()
        mean, (skipped, in_a_row), norm = means["loss"], map(int, self.skipped.tolist()), self.norm.item()
        self.recent = math.inf if mean is None else mean
        seen = [value for value in (self.lowest, self.first.item(), mean) if value is not None and math.isfinite(value)]
        self.lowest = min(seen, default=None)
        means |= dict(gradient_norm=norm if math.isfinite(norm) else None, skipped_steps=skipped or None)
        return means, in_a_row

    def share(self):
        """What this process has counted becomes the mean of what all have."""
        if dist.is_initialized():
            for sums in (self.loss, *(self.parts[name] for name in sorted(self.parts))):
                dist.all_reduce(sums)
                sums /= dist.get_world_size()

    def unfit(self, checkpoint: dict) -> str | None:
        """Why a checkpoint of this moment must not replace a good one; None: it may."""
        (loss, count), in_a_row = self.loss.tolist(), int(self.skipped[1])
        recent = loss / count if count else self.recent
        if in_a_row > self.usual_skips:
            return f"the last {in_a_row} gradients were not finite"
        if recent is not None and self.lowest is not None and recent > DIVERGED * self.lowest > 0:
            return f"the loss is {recent:.3g}, {DIVERGED} times and more above the {self.lowest:.3g} where it was"
        if not is_finite(checkpoint):
            return "the weights or the optimizer's averages are not finite"

    def state(self) -> dict:
        first = self.first.item()
        return dict(loss=self.loss, parts=self.parts, skipped=self.skipped, lowest_loss=self.lowest,
                    first_loss=first if math.isfinite(first) else None)

    def load(self, checkpoint: dict, anew: bool):
        """anew: what is learned now is another thing, so that no loss from now on is compared with those of before."""
        self.skipped = checkpoint["skipped"].to(self.loss.device)
        if anew:
            return
        self.loss = checkpoint["loss"].to(self.loss.device)
        self.parts = {name: sums.to(self.loss.device) for name, sums in checkpoint.get("parts", {}).items()}
        self.lowest = checkpoint.get("lowest_loss")
        if checkpoint.get("first_loss") is not None:
            self.first.fill_(float(checkpoint["first_loss"]))


def tally(value: Tensor) -> Tensor:
    """(2,): a scalar and 1, or two zeros where it is not finite."""
    return torch.stack([value.nan_to_num(0, 0, 0), value.isfinite().to(value.dtype)])


def is_finite(checkpoint) -> bool:
    """Whether every number in nested dicts and lists of tensors of one device is, by one look at the device."""
    extremes = [bound.float() for bounds in extremes_of(checkpoint) for bound in bounds]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def extremes_of(value) -> list[tuple[Tensor, Tensor]]:
    """The least and the largest value of each tensor: both are NaN where one value is. They are 15 times as fast as
    isfinite().all() on a CPU."""
    if torch.is_tensor(value):
        return [value.aminmax()] if value.numel() else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [bounds for each in inner for bounds in extremes_of(each)]
