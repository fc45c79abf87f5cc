"""The network: one UNet for every method, in the style of lucidrains' denoising-diffusion-pytorch (guided_diffusion).

It begins with a 7x7 stem. Each level has residual blocks (GroupNorm, SiLU, scale and shift from the embedding of time
and class) followed by linear attention; full attention is in the middle; skip connections lead into the way up.
Activations are channels_last, so that attention's (B, HW, C) view costs nothing, and bf16 under autocast. The
embedding (on CUDA by TF32 products), the statistics of the norms and the output are fp32. In sampling, Counted, Guided
and Tiled go around it.
"""
import math
from functools import lru_cache
from itertools import product
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD = 32  # channels of an attention head
OVERLAP = 24  # pixels that neighbouring tiles share, see docs/sampling.md


class FourierTime(nn.Module):
    """t (B,) of order 1 -> (B, dim + 1): t itself, then sines and cosines at learned frequencies."""

    def __init__(self, dim: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        angle = 2 * math.pi * t[:, None] * self.frequencies
        return torch.cat([t[:, None], angle.sin(), angle.cos()], dim=1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm that returns its input's dtype, where autocast alone would return fp32.

    Whatever the dtype is, the kernel accumulates in fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            # not F.group_norm, which refuses a single value in a group, as the deepest level of a 1x1 image may have
            return torch.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps,
                                    torch.backends.cudnn.enabled)


class LayerNorm(nn.Module):
    """Layer norm over the channels of (B, HW, C), with a gain only; fp32 statistics, its input's dtype."""

    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.gain.shape, self.gain.to(x.dtype))


class ResBlock(nn.Module):
    """Two 3x3 convolutions; the embedding scales and shifts between them."""

    def __init__(self, dim_in: int, dim_out: int, dim_emb: int, dropout: float):
        super().__init__()
        self.embed = nn.Linear(dim_emb, 2 * dim_out)
        self.conv1, self.norm1 = nn.Conv2d(dim_in, dim_out, 3, padding=1), GroupNorm(8, dim_out)
        self.conv2, self.norm2 = nn.Conv2d(dim_out, dim_out, 3, padding=1), GroupNorm(8, dim_out)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.embed(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm1(self.conv1(x))
        h = F.silu(torch.addcmul(shift.to(h.dtype), h, (1 + scale).to(h.dtype)))
        h = F.silu(self.norm2(self.conv2(self.dropout(h))))
        # skip(x) comes first, because a sum has its first term's memory format: before torch 2.15, CUDA's group norm
        # returns NCHW, so h may have lost channels_last
        return self.skip(x) + h


class LinearAttention(nn.Module):
    """Residual attention whose cost grows with the number of pixels, not its square (arXiv:1812.01243)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * HEAD, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * HEAD, dim), LayerNorm(dim))
        # a block for each head on the diagonal of a (heads * HEAD)^2 matrix, and 0 elsewhere: one large product, masked
        # by it, is faster than many small products and their copies
        blocks = torch.block_diag(*[torch.full((HEAD, HEAD), HEAD**-0.5)] * heads)
        self.register_buffer("blocks", blocks, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(rearrange(x, "b c h w -> b (h w) c"))).chunk(3, dim=-1)
        # softmax of q over a head's channels, of k over the pixels; `dtype` keeps them in bf16, where CUDA's autocast
        # alone would return fp32, and the kernel sums in fp32 all the same
        q = q.unflatten(-1, (self.heads, HEAD)).softmax(dim=-1, dtype=q.dtype).flatten(-2)
        k = k.softmax(dim=1, dtype=k.dtype)
        context = k.transpose(1, 2) @ v * self.blocks.to(v.dtype)
        out = self.to_out(q @ context)
        return x + rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])


class Attention(nn.Module):
    """Residual full self-attention with as many heads as fill the channels."""

    def __init__(self, dim: int):
        super().__init__()
        heads = max(1, dim // HEAD)
        self.norm = LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(rearrange(x, "b c h w -> b (h w) c")))
        q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, d=HEAD)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")
        return x + rearrange(self.to_out(out), "b (h w) c -> b c h w", h=x.shape[2])


class Level(nn.Module):
    """Residual blocks at one resolution, then linear attention.

    On the way down each block's output, the last one's after attention, is kept for a skip connection.
    """

    def __init__(self, dims: list[tuple[int, int]], block, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(block(dim_in, dim_out) for dim_in, dim_out in dims)
        self.attention = LinearAttention(dims[-1][1], heads)


class Unet(nn.Module):
    """net(x, t, y, cond) -> prediction.

    in_channels   of x and cond together
    out_channels  of the prediction
    dim           channels of the stem; level i has half the side of level i - 1, and dim * dim_mults[i] channels on the
                  way up, those of level i - 1 (of level 0: dim) on the way down
    num_classes   labels 0 .. num_classes - 1, and num_classes is the null label; 0 switches labels off
    blocks        residual blocks a level
    dropout       share of activations dropped before each block's second convolution
    upscale       the prediction has upscale times x's side (a pixel shuffle at the end)
    dim_time      sines and cosines in the time embedding, at dim_time / 2 learned frequencies
    two_times     t is (B, 2), a time and a span of time; the span's embedding is 0 at first, and added to the time's
    block         the residual block's class: block(dim_in, dim_out, dim_emb, dropout), called with (x, emb)
    checkpointing blocks keep only their input and compute the rest again in the backward pass: less memory, more time
    """

    def __init__(self, in_channels: int, out_channels: int, *, dim: int = 128,
                 dim_mults: tuple[int, ...] = (1, 2, 2, 2), num_classes: int = 0, blocks: int = 2, dropout: float = 0.0,
                 upscale: int = 1, dim_time: int = 32, two_times: bool = False, checkpointing: bool = False,
                 block: type[nn.Module] = ResBlock):
        super().__init__()
        self.checkpointing, self.num_classes, self.upscale = checkpointing, num_classes, upscale
        self.stride = 2 ** (len(dim_mults) - 1)
        dims = [dim, *(dim * m for m in dim_mults)]
        dim_emb, heads = 4 * dim, max(1, dim // HEAD)

        self.embed_time = nn.Sequential(
            FourierTime(dim_time), nn.Linear(dim_time + 1, dim_emb), nn.GELU(), nn.Linear(dim_emb, dim_emb))
        if num_classes:
            self.embed_class = nn.Sequential(
                nn.Embedding(num_classes + 1, dim), nn.Linear(dim, dim_emb), nn.GELU(), nn.Linear(dim_emb, dim_emb))
            dim_emb *= 2

        def residual(dim_in: int, dim_out: int) -> nn.Module:
            return block(dim_in, dim_out, dim_emb, dropout)

        self.stem = nn.Conv2d(in_channels, dim, 7, padding=3)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.enlarge = nn.ModuleList(), nn.ModuleList()
        for i, (before, after) in enumerate(zip(dims, dims[1:])):
            last = i == len(dim_mults) - 1
            self.down.append(Level([(before, before)] * blocks, residual, heads))
            self.shrink.append(nn.Conv2d(before, after, 3, padding=1) if last else nn.Conv2d(before, after, 4, 2, 1))
        self.middle1 = residual(dims[-1], dims[-1])
        self.middle_attention = Attention(dims[-1])
        self.middle2 = residual(dims[-1], dims[-1])
        for i, (before, after) in reversed(list(enumerate(zip(dims, dims[1:])))):
            self.up.append(Level([(after + before, after)] * blocks, residual, heads))
            self.enlarge.append(nn.Conv2d(after, before, 3, padding=1))
        self.last = residual(2 * dim, dim)
        self.out = nn.Conv2d(dim, out_channels * upscale**2, 1)
        self.embed_span = None
        if two_times:  # made last, so that all other weights are those of a network without it
            self.embed_span = nn.Sequential(
                FourierTime(dim_time), nn.Linear(dim_time + 1, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))
            nn.init.zeros_(self.embed_span[-1].weight), nn.init.zeros_(self.embed_span[-1].bias)

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), any sides; t (B,), or (B, 2) with two_times; y (B,) int64, None: the null label; cond
        (B, Cc, H, W) -> (B, out_channels, H * upscale, W * upscale) fp32."""
        if cond is not None:
            x = torch.cat([x, cond], dim=1)
        height, width = x.shape[2:]
        right, below = -width % self.stride, -height % self.stride
        if right or below:
            x = F.pad(x, (0, right, 0, below), mode="replicate")

        with torch.autocast(x.device.type, enabled=False):
            t, span = (t, None) if self.embed_span is None else t.unbind(1)
            emb = self.embed_time(t.float())
            if span is not None:
                emb = emb + self.embed_span(span.float())
            if self.num_classes:
                y = torch.full_like(t, self.num_classes, dtype=torch.long) if y is None else y
                emb = torch.cat([emb, self.embed_class(y)], dim=1)
            emb = F.silu(emb)

        x = self.stem(x)  # channels_last from here on, if the weights are
        skips, run = [x], self.run
        for level, shrink in zip(self.down, self.shrink):
            for block in level.blocks[:-1]:
                x = run(block, x, emb)
                skips.append(x)
            x = run(level.attention, run(level.blocks[-1], x, emb))
            skips.append(x)
            x = shrink(x)
        x = run(self.middle2, run(self.middle_attention, run(self.middle1, x, emb)), emb)
        for i, (level, enlarge) in enumerate(zip(self.up, self.enlarge)):
            for block in level.blocks:
                x = run(block, torch.cat([x, skips.pop()], dim=1), emb)
            x = run(level.attention, x)
            if i < len(self.up) - 1:
                with torch.autocast(x.device.type, enabled=False):  # which would make fp32 of the copies
                    x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = enlarge(x)
        x = self.out(run(self.last, torch.cat([x, skips.pop()], dim=1), emb))
        if self.upscale > 1:
            x = F.pixel_shuffle(x, self.upscale)
        return x[:, :, : height * self.upscale, : width * self.upscale].float()


class Network(Protocol):
    """What stands in for Unet has: another network is its class, a line in support.model.make_unet, and its own fields
    of Config, whose names begin with unet_: those keep a run from going on with another one, and are told in tables."""

    num_classes: int  # of the labels; it is the null label's number, and 0 where the network sees no labels
    upscale: int  # sides of the output in units of x's

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), any sides; t (B,) float32, (B, 2) where a method has two_times; y (B,) int64, None: the null
        label; cond (B, Cc, H, W), None: no image is seen -> (B, C, H * upscale, W * upscale), float32."""


class Counted:
    """net(x, t, y, cond) that counts its rows: NFE = rows / images, so a guided evaluation counts two."""

    def __init__(self, net):
        self.net, self.rows = net, 0
        self.num_classes, self.upscale = net.num_classes, net.upscale

    def __call__(self, x, t, y=None, cond=None):
        self.rows += len(x)
        return self.net(x, t, y, cond)


class Guided:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) of the network's output:

        null + scale (labelled - null)

    Every method's clean estimate is affine in the output, so it is guided by the same formula. scale = 1 is the
    conditional network, 0 the unconditional one; any other scale evaluates both, as one batch of twice the size.
    """

    def __init__(self, net, scale: float):
        self.net, self.scale = net, scale

    def __call__(self, x, t, y=None, cond=None):
        if y is None or self.scale == 1:
            return self.net(x, t, y, cond)
        null = torch.full_like(y, self.net.num_classes)
        if self.scale == 0:
            return self.net(x, t, null, cond)
        cond = None if cond is None else torch.cat([cond, cond])
        both = self.net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, y]), cond)
        without, labelled = both.chunk(2)
        return without + self.scale * (labelled - without)


class Tiled:
    """net(x, t, y, cond) on images of any size, in overlapping tiles whose predictions are blended.

    The sampler sees one field over the whole image, so no seam survives a step. Noise is drawn and known pixels are
    kept for the whole image too, not tile by tile.
    """

    def __init__(self, net, height: int, tile: int, align: int, rows: int):
        """height: of z1. tile: side of a tile, 2 align or more. align: tiles begin at its multiples.
        rows: the most rows in one call of the network, where a tile has one row for each image."""
        self.net, self.height, self.tile, self.align, self.rows = net, height, tile, align, rows
        self.num_classes, self.upscale = net.num_classes, net.upscale

    def __call__(self, x, t, y=None, cond=None):
        scale = self.upscale
        out = x.new_zeros(*x.shape[:2], scale * x.shape[2], scale * x.shape[3])
        shrunk = self.height // out.shape[2]  # UDPM makes smaller images on the way to z1
        axes = (windows(side, self.tile // shrunk, self.align // shrunk, x.device) for side in out.shape[2:])
        tiles, most = list(product(*axes)), max(1, self.rows // len(x))

        def cut(z, some):
            at = [[slice(s.start // scale, s.stop // scale) for s, _ in tile] for tile in some]
            return None if z is None else torch.cat([z[:, :, down, across] for down, across in at])

        for some in (tiles[k:k + most] for k in range(0, len(tiles), most)):
            labels = None if y is None else y.repeat(len(some))
            made = self.net(cut(x, some), torch.cat([t] * len(some)), labels, cut(cond, some)).chunk(len(some))
            for ((down, v), (across, w)), tile in zip(some, made):
                out[:, :, down, across] += v[:, None] * w * tile
        return out


@lru_cache(maxsize=16)
def windows(side: int, tile: int, align: int, device=None) -> list[tuple[slice, Tensor]]:
    """The tiles that cover `side`: where each lies, and how much its pixels count, (tile,); a pixel's sum is 1.

    Neighbours share OVERLAP pixels, or three eighths of a small tile, or more. From a tile's edge inwards pixels count
    0 over a third of that, where its edge disturbs the network, then smoothly more over a third, then fully. Where a
    tile's edge is the image's edge too, the pixels count fully.
    """
    overlap = min(OVERLAP, 3 * tile // 8)
    step = (tile - overlap) // align * align
    tile = min(tile, side)
    starts = torch.tensor([*range(0, side - tile, step), side - tile])
    at = torch.arange(tile)
    from_start = torch.where(starts[:, None] == 0, math.inf, at + 0.5)  # (tiles, tile), to the edge that disturbs
    from_end = torch.where(starts[:, None] == side - tile, math.inf, tile - at - 0.5)
    rise = (3 * torch.minimum(from_start, from_end) / overlap - 1).clamp(0, 1)
    weights = rise * rise * (3 - 2 * rise)
    # Never (tiles, side): of a strip of 65,000 pixels that would be gigabytes.
    pixels = starts[:, None] + at
    total = torch.zeros(side).index_put((pixels,), weights, accumulate=True)
    weights = (weights / total[pixels]).to(device)
    return [(slice(start, start + tile), row) for start, row in zip(starts.tolist(), weights)]
