"""The five methods, one file a paper, and what they share for inpainting, in the loss and in the sampler."""
import torch
from torch import Tensor


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """error (B, C, H, W), mask (B, 1, H, W) -> (B,), each image's mean over the pixels to be made (mask 1)."""
    return (error.mean(1, keepdim=True) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)


def keep_known(x: Tensor, batch) -> Tensor:
    """x (B, C, H, W), but zlo in the pixels that are not to be made (mask 0)."""
    return torch.where(batch.mask > 0, x, batch.zlo)
