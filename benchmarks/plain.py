"""The plain recipe: what one writes first, which everything is compared with."""
import torch
import torchdiffeq
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms.functional import to_tensor

from benchmarks.step import unet
from images import data
from images.corruptions import Batch
from support.machine import reseed
from trainer import Config


class PlainPairs(Dataset):
    """Pairs for super-resolution, made one PIL image at a time: clean, damaged, label."""

    def __init__(self, images: data.Images, config: Config):
        self.pixels, self.y = images.train.permute(0, 2, 3, 1).squeeze(-1).numpy(), images.train_y.tolist()
        self.small = (config.image_size // config.damage.factor,) * 2
        self.down, self.up = (Image.Resampling[name.upper()] for name in (config.damage.down, config.damage.up))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int):
        clean = Image.fromarray(self.pixels[i])
        if torch.rand(()) < 0.5:
            clean = clean.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        low = clean.resize(self.small, self.down).resize(clean.size, self.up)
        return to_tensor(clean) * 2 - 1, to_tensor(low) * 2 - 1, self.y[i]


class PlainLoop:
    """The plain recipe's data and training: DataLoader and AdamW as they come, clipping, no average of the weights."""

    def __init__(self, config: Config, images: data.Images, device: torch.device, workers: int):
        self.config, self.device = config, device
        pairs = PlainPairs(images, config)
        endless = RandomSampler(pairs, replacement=True, num_samples=2**40)
        pinned = device.type == "cuda"
        loader = DataLoader(pairs, config.batch_size, sampler=endless, num_workers=workers, pin_memory=pinned)
        self.batches, self.ahead = iter(loader), workers * loader.prefetch_factor
        reseed("weights", config.seed)
        self.net = unet(config).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), config.base_lr, weight_decay=0.0)

    def batch(self) -> list[torch.Tensor]:
        return [x.to(self.device, non_blocking=True) for x in next(self.batches)]

    def use_up(self):
        """Takes the batches that the workers have made while nothing was asked of them."""
        for _ in range(1 + self.ahead):
            self.batch()

    def step(self):
        z1, zlo, y = self.batch()
        c, one = self.config, torch.ones_like(z1[:, :1])
        batch = Batch(z1, zlo, one, 0 * one, zlo if c.condition else None, y if c.unet_use_classes else None)
        self.optimizer.zero_grad()
        c.chosen.loss(self.net, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), c.grad_clip)
        self.optimizer.step()


def plain_sample(config: Config, net, batch: Batch) -> torch.Tensor:
    """torchdiffeq's dopri5 as it comes, at 1e-5."""
    ode = config.chosen.velocity(net, batch)
    times = torch.tensor([ode.t0, ode.t1], device=ode.z.device)
    return torchdiffeq.odeint(ode.velocity, ode.z, times, atol=1e-5, rtol=1e-5, method="dopri5")[-1]
