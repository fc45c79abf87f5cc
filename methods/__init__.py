"""The five methods, the flow map and the baseline, a file each. Here: their common interface, and inpainting."""
from torch import Tensor, nn

from images import SettingsError
from images.corruptions import Batch
from ode_int import ODE
from support import bounds


class Method:
    """A method is its knobs, the fields of a frozen dataclass, and its equations.

    Training, sampling and measuring use nothing of it but what stands here. `net` is called as net(x, t, y, cond) ->
    prediction, with t (B,) float32 of order 1: whatever tells it how noisy x is, gamma in SR3, k/n in I2SB; of a method
    with two_times (B, 2). Guidance, counting and tiling wrap around it, so no method knows of them.

    The comment above or beside a field is its help on the command line, and what it is annotated with its type and
    bounds (support/bounds.py). The class's name in small letters, the field of Config and the choice of --method are
    the same.
    """

    solver = "own"  # used where the user names none: "own" is the method's own sampler, any other name ode_int's
    picture_steps = None  # steps of its own sampler that are enough for the pictures in training; None: its usual count
    has_ode = False  # whether `velocity` gives one
    no_ode = "has no ODE"  # what the error message says where it gives none
    two_times = False  # whether the network is told a time and a span of time, t (B, 2)
    guided = True  # whether classifier-free guidance of the network's output makes sense
    upscale = 1  # sides of the network's output in units of its input's
    # names of the fields that the network's training does not depend on, so that they may be changed when sampling
    free_at_sampling = ()
    not_in_ode = ()  # those of them that only the method's own sampler reads, not `velocity`
    levels = 0  # how often the method halves an image's sides

    def __post_init__(self):
        """Raises SettingsError, one line, for a field of another type or out of its bounds.

        A method with a rule between several fields calls this first.
        """
        bounds.check(self, self.prefix)

    @property
    def prefix(self) -> str:
        """What stands before a field's name on the command line and in messages."""
        return f"{type(self).__name__.lower()}."

    def check(self, task: str, condition: bool):
        """Raises SettingsError, one line, for a task, with or without sight of the damaged image, that these settings
        can't do, and where this machine lacks what training by them needs."""

    def settled(self) -> "Method":
        """These settings with what they left open decided, by what this machine has. A run keeps the decision."""
        return self

    def loss(self, net, batch: Batch) -> Tensor:
        """(B,) mean over the pixels to be made, see masked_mean; draws its own t and noise, by batch.draws."""
        raise NotImplementedError

    def sample(self, net, batch: Batch, steps: int | None = None, trace: list | None = None) -> Tensor:
        """(B, C, H, W), known pixels kept, see keep_known; never reads batch.z1. None: the method's usual `steps`.

        `trace`, where it is given, gets (t, state, clean estimate) before each step, scaled to be looked at: its first
        state is shown as the start. Here t is 1 at the clean image. SettingsError for `steps` that can't be done.
        """
        raise NotImplementedError

    def velocity(self, net, batch: Batch) -> ODE:
        """An ODE that ends at a clean image, for any solver of ode_int."""
        raise SettingsError(f"solver: {type(self).__name__} {self.no_ode}; allowed is auto")

    def players(self, net: nn.Module, channels: int, num_classes: int, cond_channels: int) -> list:
        """[(module, its loss)], trained in turn: the network, then any other module that the method trains."""
        return [(net, self.loss)]

    def after_step(self, modules: list[nn.Module]):
        """Called after each training step with the players' modules."""


def same_shape(prediction: Tensor, target: Tensor) -> Tensor:
    """The prediction, whose shape has to be the target's: broadcasting would train one channel on colour images."""
    assert prediction.shape == target.shape, f"the network predicts {[*prediction.shape]} for {[*target.shape]}"
    return prediction


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """error (B, C, H, W), mask (B, 1, H, W) -> (B,), each image's mean over the pixels to be made (to_make 1)."""
    (B, _, H, W), shape = mask.shape, error.shape
    assert len(shape) == 4 and (shape[0], *shape[2:]) == (B, H, W), f"an error of {[*shape]}, a mask of {[*mask.shape]}"
    return (error.mean(1, keepdim=True) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)


def keep_known(x: Tensor, batch: Batch) -> Tensor:
    """x (B, C, H, W), but zlo in the pixels that are not to be made (to_make 0)."""
    return x.where(batch.to_make > 0, batch.zlo)
