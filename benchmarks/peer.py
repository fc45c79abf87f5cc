"""A network that others use for the same job, to be timed beside ours: diffusers' UNet2DModel of the same widths."""
import torch
from torch import Tensor, nn

from trainer import Config


class Peer(nn.Module):
    """Called as ours is. Full attention at the second level and in the middle, as in diffusers' CIFAR-10 network."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__()
        from diffusers import UNet2DModel

        widths = [config.unet_channels * factor for factor in config.unet_dim_mults]
        attends = [level == min(1, len(widths) - 1) for level in range(len(widths))]
        self.net = UNet2DModel(
            in_channels=(1 + config.condition) * config.channels, out_channels=config.channels,
            layers_per_block=config.unet_blocks, block_out_channels=widths,
            down_block_types=["AttnDownBlock2D" if at else "DownBlock2D" for at in attends],
            up_block_types=["AttnUpBlock2D" if at else "UpBlock2D" for at in reversed(attends)],
            num_class_embeds=num_classes + 1 if num_classes else None, norm_num_groups=min(32, config.unet_channels))
        self.num_classes = num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        x = x if cond is None else torch.cat([x, cond], dim=1)
        y = torch.full_like(t, self.num_classes, dtype=torch.long) if y is None and self.num_classes else y
        return self.net(x, 1000 * t, class_labels=y).sample.float()  # its embedding of time expects 0 to 1000
