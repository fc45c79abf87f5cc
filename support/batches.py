"""What a run trains on and what it shows: batches that are functions of the seed and the step."""
import torch
from torch import Tensor

from images import SettingsError, data
from images.corruptions import Batch, Draws
from support import machine


class Batches:
    """A run's batches, damaged; each process makes its own share of them.

    config, images, device: the run's trainer.Config, its data.Images, and where its network is. Raises SettingsError
    where the images can't be shared by all processes, or have no classes to guide by.
    """

    def __init__(self, config, images: data.Images, device: torch.device):
        self.config, self.images, self.device = config, images, device
        self.rank, self.world = machine.processes()
        # of each piece's noise; they stay, since a CUDA graph knows them, and are seeded anew
        self.streams = {}
        self.num_classes = len(images.classes) if config.unet_use_classes else 0
        if config.batch_size % self.world:
            raise SettingsError(f"batch_size = {config.batch_size}: allowed are multiples of {self.world}, "
                                "the number of processes that share it")
        if config.guidance != 1 and not self.num_classes:
            raise SettingsError(f"guidance = {config.guidance}: allowed is 1, since {images.name} has no classes")
        self.feed = data.Feed(images, device, config.batch_size, config.seed, self.rank, self.world, config.overfit)

    def __call__(self, step: int) -> list[Batch]:
        """This process's share of the step's batch, in pieces of at most config.micro_batch images."""
        share, size = self.feed(step), self.config.micro_batch or self.config.batch_size
        return [self.piece(step, start, *(None if x is None else x[start:start + size] for x in share))
                for start in range(0, len(share[0]), size)]

    def piece(self, step: int, start: int, z1: Tensor, y: Tensor | None, zlo: Tensor | None) -> Batch:
        """`start`: the number of its first image in this process's share."""
        c = self.config
        rows = slice(self.rank + start * self.world, self.rank + (start + len(z1)) * self.world, self.world)
        stream = machine.stream(self.device, "train", c.seed, step, before=self.streams.get(start))
        self.streams[start] = stream
        draws = Draws(stream, machine.stream("cpu", "host", c.seed, step), (rows,), c.batch_size)
        if c.flip and not c.overfit:
            flip = draws.rand(z1, 1, 1, 1) < 0.5
            z1 = torch.where(flip, z1.flip(3), z1)
            zlo = None if zlo is None else torch.where(flip, zlo.flip(3), zlo)
        if not self.num_classes:
            y = None
        elif c.dropped:
            y = torch.where(draws.rand(z1) < c.dropped, self.num_classes, y)
        return c.damaged(z1, y, zlo, draws)

    def shown(self) -> Batch:
        """What samplings show: the overfitted batch, or test images; always the same ones, damaged the same way."""
        c, images = self.config, self.images
        split, size = ("train", c.batch_size) if c.overfit else ("test", c.sample_count)
        index = data.batch_indices(len(getattr(images, split)), size, c.seed, 0)[:c.sample_count]
        z1, y, zlo = images.batch(index, self.device, split)
        machine.reseed("show", c.seed)
        return c.damaged(z1, y if self.num_classes else None, zlo)

    def agree(self):
        """Raises SettingsError, one line, where another process has other settings or images than this one."""
        if self.world > 1:
            index = torch.linspace(0, len(self.images.train) - 1, 64).long()
            some = machine.digest(x for x in self.images.batch(index, self.device, "train") if x is not None)
            about = len(self.images.train), len(self.images.test), self.images.classes, some
            machine.agree(**vars(self.config), images=about)
