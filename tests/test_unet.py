"""The network: its parts against the formulas written out, and what it must not depend on."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unet import Attention, Counted, FourierTime, GroupNorm, Guided, LayerNorm, LinearAttention, ResBlock, Unet

BF16 = 2.0**-8  # half the distance of neighbouring bf16 numbers, relative
# autocast on CUDA takes norms to fp32 unasked, on the CPU it does not
DEVICES = pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
SMALL = dict(dim=16, dim_mults=(1, 2), num_classes=3)


def randomize(module: nn.Module, seed=1) -> nn.Module:
    """Also the gains and biases that start at one and zero, where a missing one would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 1:
            p.data = 0.3 * noise + (1 if "norm" in name and name.endswith("weight") or "gain" in name else 0)
        else:
            p.data = noise / p[0].numel() ** 0.5
    return module.eval()


def make(in_channels=6, out_channels=3, **knobs) -> Unet:
    return randomize(Unet(in_channels, out_channels, **(SMALL | knobs)))


def inputs(size=3, height=8, width=8):
    generator = torch.Generator().manual_seed(2)
    x, cond = torch.randn(2, size, 3, height, width, generator=generator)
    return x, torch.linspace(0.1, 0.9, size), torch.arange(size) % 3, cond


# parts

def test_number_of_parameters():
    default, small = Unet(6, 3, num_classes=10), Unet(6, 3, dim=16, dim_mults=(1, 2), num_classes=10, blocks=1)
    assert [sum(p.numel() for p in net.parameters()) for net in (default, small)] == [34_407_443, 174_691]


@pytest.mark.parametrize("knobs, corner", [
    (dict(), [-0.609, -0.261, 1.305, -0.008]), (dict(upscale=2), [1.275, -3.168, 0.767, -1.274]),
    (dict(num_classes=0, blocks=1, dim_mults=(1, 2, 2)), [-2.204, -0.644, 0.081, 0.071])])
def test_weights_mean_what_they_meant(knobs, corner):
    """Else no run goes on and no published file is of use. The order of x and cond, of skips and of pixels, and the
    embedding's nonlinearities are in it."""
    out = make(**knobs)(*inputs())
    torch.testing.assert_close(out[-1, -1, -1, -4:], torch.tensor(corner), rtol=0, atol=2e-3)


def test_fourier_time():
    layer = randomize(FourierTime(8))
    t = torch.tensor([0.0, 0.3, 0.98849, -2.0])
    angles = 2 * math.pi * torch.outer(t, layer.frequencies).double()
    expected = torch.cat([t[:, None], angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(layer(t).double(), expected, rtol=0, atol=1e-5)


@DEVICES
@pytest.mark.parametrize("layer, formula", [
    (GroupNorm(4, 16), lambda x, layer: F.group_norm(x, 4, layer.weight.double(), layer.bias.double())),
    (LayerNorm(16), lambda x, layer: F.layer_norm(x, (16,), layer.gain.double()))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 20.0])  # far from zero, statistics summed in bf16 would be lost
def test_norms_keep_their_inputs_dtype_and_their_statistics_precise(layer, formula, dtype, mean, device):
    x = (mean + torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(4))).to(dtype)
    exact = formula(x.double(), randomize(layer.cpu()))
    for autocast in (False, True):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            out = layer.to(device)(x.to(device)).cpu()
        assert out.dtype == dtype
        bound = 2.5 * BF16 * (exact.abs() + 1) if dtype == torch.bfloat16 else 1e-5 * (1 + mean)
        assert ((out.double() - exact).abs() <= bound).all()


def sequence(x):
    """(B, C, H, W) -> (B, HW, C)."""
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("heads", [1, 3])
def test_linear_attention_is_the_heads_products_one_by_one(heads):
    layer, x = randomize(LinearAttention(24, heads)).double(), torch.randn(2, 24, 5, 7).double()
    layer.blocks = layer.blocks.to(torch.float32)  # HEAD^-0.5 as it is kept
    w = dict(layer.named_parameters())
    qkv = F.layer_norm(sequence(x), (24,), w["norm.gain"]) @ w["to_qkv.weight"].T
    q, k, v = (part.reshape(2, 35, heads, 32) for part in qkv.split(heads * 32, dim=-1))
    context = torch.einsum("bnhd,bnhe->bhde", k.softmax(1), v)
    out = torch.einsum("bhde,bnhd->bnhe", context, q.softmax(-1) / 32**0.5).flatten(2)
    out = F.layer_norm(out @ w["to_out.0.weight"].T + w["to_out.0.bias"], (24,), w["to_out.1.gain"])
    torch.testing.assert_close(sequence(layer(x)), sequence(x) + out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim, heads", [(16, 1), (96, 3)])
def test_full_attention_is_its_softmax_written_out(dim, heads):
    layer, x = randomize(Attention(dim)).double(), torch.randn(2, dim, 4, 3).double()
    w = dict(layer.named_parameters())
    qkv = F.layer_norm(sequence(x), (dim,), w["norm.gain"]) @ w["to_qkv.weight"].T
    q, k, v = (part.reshape(2, 12, heads, 32) for part in qkv.split(heads * 32, dim=-1))
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(32)).softmax(-1)
    out = torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2) @ w["to_out.weight"].T + w["to_out.bias"]
    torch.testing.assert_close(sequence(layer(x)), sequence(x) + out, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dim_in, dim_out", [(16, 16), (8, 16)])
def test_residual_block(dim_in, dim_out):
    block = randomize(ResBlock(dim_in, dim_out, 5, 0.0)).double()
    x, emb = torch.randn(2, dim_in, 6, 6).double(), torch.randn(2, 5).double()
    w = dict(block.named_parameters())
    scale, shift = (emb @ w["embed.weight"].T + w["embed.bias"])[..., None, None].split(dim_out, dim=1)
    h = F.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=1)
    h = F.silu(F.group_norm(h, 8, w["norm1.weight"], w["norm1.bias"]) * (1 + scale) + shift)
    h = F.conv2d(h, w["conv2.weight"], w["conv2.bias"], padding=1)
    h = F.silu(F.group_norm(h, 8, w["norm2.weight"], w["norm2.bias"]))
    skip = x if dim_in == dim_out else F.conv2d(x, w["skip.weight"], w["skip.bias"])
    torch.testing.assert_close(block(x, emb), skip + h, rtol=0, atol=1e-10)


def test_dropout_drops_its_share_before_the_second_convolution_and_only_in_training():
    net, seen = make(dropout=0.3), []
    for block in (m for m in net.modules() if isinstance(m, ResBlock)):
        block.conv2.register_forward_pre_hook(lambda module, args: seen.append((args[0] == 0).float().mean().item()))
    x, t, y, cond = inputs(8, 16, 16)
    quiet = net(x, t, y, cond)
    assert max(seen) < 0.01
    torch.testing.assert_close(quiet, make(dropout=0.0)(x, t, y, cond))
    seen.clear()
    torch.manual_seed(1)
    loud = net.train()(x, t, y, cond)
    np.testing.assert_allclose(seen, 0.3, atol=0.03)
    assert not torch.allclose(loud, quiet, atol=1e-2)


# the whole

@pytest.mark.parametrize("height, width", [(30, 27), (8, 9), (1, 5)])
@pytest.mark.parametrize("upscale", [1, 2])
def test_any_size_is_padded_by_its_edge_and_cropped(height, width, upscale):
    net = make(dim=8, dim_mults=(1, 2, 2), upscale=upscale)  # stride 4
    x, t, y, cond = inputs(2, height, width)
    rows, columns = (torch.arange(math.ceil(height / 4) * 4).clamp(max=height - 1),
                     torch.arange(math.ceil(width / 4) * 4).clamp(max=width - 1))
    padded = net(x[:, :, rows][..., columns], t, y, cond[:, :, rows][..., columns])
    out = net(x, t, y, cond)
    assert out.shape == (2, 3, height * upscale, width * upscale)
    torch.testing.assert_close(out, padded[:, :, :height * upscale, :width * upscale], rtol=0, atol=1e-6)
    assert not torch.allclose(out, net(0 * x, t, y, cond), atol=1e-2)


def test_labels():
    net, (x, t, y, cond) = make(), inputs()
    by_label = [net(x, t, torch.full_like(y, c), cond) for c in range(4)]
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(by_label[i], by_label[j], atol=1e-2)
    assert torch.equal(net(x, t, None, cond), by_label[3])  # None is the null label
    mixed = net(x, t, torch.tensor([2, 0, 3]), cond)
    torch.testing.assert_close(mixed, torch.stack([by_label[c][i] for i, c in enumerate((2, 0, 3))]))

    off = make(num_classes=0)
    assert torch.equal(off(x, t, y, cond), off(x, t, None, cond))
    assert not any("class" in name for name, _ in off.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_of_a_batch_do_not_meet(dtype):
    net, (x, t, y, cond) = make(), inputs(4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = net(x, t, y, cond)
        for i in range(4):
            others = torch.arange(4) != i
            x2, t2, y2, cond2 = x.clone(), t.clone(), y.clone(), cond.clone()
            x2[others], t2[others], y2[others], cond2[others] = 5 * x[others] + 1, 0.5, 0, -cond[others]
            changed = net(x2, t2, y2, cond2)
            torch.testing.assert_close(changed[i], out[i], rtol=0, atol=1e-6)
            assert not torch.allclose(changed[others], out[others], atol=0.1)


# gradients

def gradients(net, dtype):
    """The output and the weights' gradients, by name; in bf16 by autocast."""
    x, t, y, cond = inputs(4, 8, 8)
    net.zero_grad()
    kept = torch.float32 if dtype == torch.bfloat16 else dtype
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = net.to(kept)(x.to(kept), t, y, cond.to(kept))
    assert out.dtype == torch.float32
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    (out - target).square().mean().backward()
    return out.detach(), {name: p.grad.double().flatten() for name, p in net.named_parameters()}


def test_bf16_agrees_with_float64():
    net = make(blocks=1)
    exact_out, exact = gradients(net, torch.float64)
    assert all(grad.any() for grad in exact.values())  # no parameter is idle
    for dtype, tolerance in ((torch.float32, 1e-8), (torch.bfloat16, 1e-2)):
        out, found = gradients(net, dtype)
        a, b = torch.cat(list(exact.values())), torch.cat(list(found.values()))
        assert 1 - F.cosine_similarity(a, b, dim=0) < tolerance
        assert abs(b.norm() / a.norm() - 1) < 5 * tolerance + 1e-5
        for name in exact:
            alike = F.cosine_similarity(exact[name], found[name], dim=0)
            assert len(exact[name]) <= 16 or alike > 1 - 10 * tolerance, name
        assert (out - exact_out).square().mean().sqrt() < 2 * math.sqrt(tolerance) * exact_out.std()


def test_checkpointing_computes_the_blocks_twice_and_the_same():
    results, calls = [], []
    for checkpointing in (False, True):
        net = make(dropout=0.3, blocks=1, checkpointing=checkpointing).train()
        net.up[0].blocks[0].register_forward_pre_hook(lambda *_: calls.append(checkpointing))
        torch.manual_seed(4)
        net(*inputs()).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    assert calls == [False, True, True]
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*results, strict=True))


def test_channels_last_computes_the_same():
    net, (x, t, y, cond) = make(dim_mults=(1, 2, 2)), inputs(2, 16, 12)
    plain = net(x, t, y, cond)
    net, layouts = net.to(memory_format=torch.channels_last), []
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d) and m is not net.stem):
        conv.register_forward_pre_hook(
            lambda module, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(net(x, t, y, cond), plain, rtol=1e-4, atol=1e-4)
    assert len(layouts) > 20 and all(layouts)  # from the stem to the end, so that nothing is copied on the way


def test_the_compiled_network_computes_the_same():
    """The one graph that torch.compile takes of it, run without its kernels, which need a compiler."""
    graphs = []

    def run_as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net, compiled = (make(dim=8, dim_mults=(1,), blocks=1, checkpointing=True).train() for _ in range(2))
    compiled.compile(backend=run_as_it_is, fullgraph=True, dynamic=False)
    results = []
    for each in (net, compiled):
        for _ in range(2):
            out = each(*inputs(2))
        out.square().sum().backward()
        results.append([out, *(p.grad for p in each.parameters())])
    assert len(graphs) == 1 and compiled.state_dict().keys() == net.state_dict().keys()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@DEVICES
def test_activations_are_bf16_and_the_embedding_is_not(device):
    net, kinds, embeddings = make().to(device), set(), []
    for m in net.modules():
        if isinstance(m, (ResBlock, LinearAttention, Attention, GroupNorm, LayerNorm, nn.Conv2d)):
            m.register_forward_hook(lambda module, args, out: kinds.add(out.dtype))
    for m in (net.embed_time, net.embed_class):
        m.register_forward_hook(lambda module, args, out: embeddings.append(out))
    arguments = [a.to(device) for a in inputs()]
    net(*arguments)
    kinds.clear()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = net(*arguments)
    assert kinds == {torch.bfloat16} and out.dtype == torch.float32
    assert torch.equal(embeddings[0], embeddings[2]) and torch.equal(embeddings[1], embeddings[3])  # to fp32's last bit


# guidance

@pytest.mark.parametrize("with_cond", [True, False])
def test_guidance(with_cond):
    net, (x, t, _, cond) = make(6 if with_cond else 3), inputs()
    y = torch.tensor([2, 3, 0])  # the second has no label: nothing guides it
    cond = cond if with_cond else None
    labelled, null = net(x, t, y, cond), net(x, t, None, cond)
    assert not torch.allclose(labelled, null, atol=0.1)
    for scale, rows in ((1, 3), (0, 3), (2.5, 6), (-1.0, 6)):
        counted = Counted(net)
        out = Guided(counted, scale)(x, t, y, cond)
        assert counted.rows == rows
        torch.testing.assert_close(out, null + scale * (labelled - null), rtol=0, atol=5e-5)
        counted = Counted(net)
        assert torch.equal(Guided(counted, scale)(x, t, None, cond), null) and counted.rows == 3
