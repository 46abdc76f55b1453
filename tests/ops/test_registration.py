"""What PyTorch asks of a registered operator: schemas, gradients, tracing, autocast, FLOPs."""

import pytest
import torch
from helpers import assert_close
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from visionattn.ops import crop, pad_to_multiple, region_mean, routed_attention, topk_regions, use_backend

OPS = torch.ops.visionattn
REGION, KV_REGION = (2, 3), (2, 2)


def maps(dtype=torch.float32, grad=False, low=0, shared=True, batch=2):
    """Query, key, value on 4 x 6 maps in two heads, table, and regions as the operator takes them."""
    query, key, value = torch.randn(3, batch, 4, 6, 2, 3, dtype=torch.float64).to(dtype).unbind(0)
    index = torch.randint(low, 6, (batch, 1 if shared else 2, 4, 3), dtype=torch.int32)
    return *(x.detach().requires_grad_(grad) for x in (query, key, value)), index, REGION, KV_REGION, 0.5


def backward_arguments(**kwargs):
    query, key, value, index, *rest = maps(**kwargs)
    out, lse = OPS.routed_attention(query, key, value, index, *rest)
    return torch.randn_like(out), torch.randn_like(lse), query, key, value, index, out, lse, *rest


def plain(*shape, dtype=torch.float32, grad=False):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


VARIANTS = {
    "plain": dict(),
    "grad": dict(grad=True),
    "bfloat16": dict(grad=True, dtype=torch.bfloat16),
    "float64": dict(grad=True, dtype=torch.float64, low=-1, shared=False),
}
SAMPLES = {
    "region_mean": lambda **v: (OPS.region_mean, plain(2, 4, 6, 3, **v), REGION),
    "region_mean_permuted": lambda **v: (OPS.region_mean, plain(2, 3, 4, 6, **v).permute(0, 2, 3, 1), REGION),
    "topk_regions": lambda **v: (OPS.topk_regions, plain(2, 4, 3, **v), plain(2, 6, 3, **v), 2),
    "topk_regions_per_head": lambda **v: (OPS.topk_regions, plain(2, 2, 4, 3, **v), plain(2, 2, 6, 3, **v), 6),
    "pad_to": lambda **v: (OPS.pad_to, plain(2, 4, 5, 3, **v), 6, 6),
    "pad_to_same": lambda **v: (OPS.pad_to, plain(2, 4, 5, 3, **v), 4, 5),
    "crop": lambda **v: (OPS.crop, plain(2, 4, 5, 3, **v), 2, 5),
    "crop_same": lambda **v: (OPS.crop, plain(2, 4, 5, 3, **v), 4, 5),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SAMPLES)
def test_map_operator_passes_opcheck(name, variant):
    operator, *arguments = SAMPLES[name](**{k: v for k, v in VARIANTS[variant].items() if k in ("grad", "dtype")})
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_region_mean_backward_passes_opcheck(dtype):
    torch.library.opcheck(OPS.region_mean_backward.default, (plain(2, 4, 3), 4, 6, REGION, dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_passes_opcheck(variant):
    torch.library.opcheck(OPS.routed_attention.default, maps(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_backward_passes_opcheck(variant):
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in backward_arguments(**VARIANTS[variant])]
    torch.library.opcheck(OPS.routed_attention_backward.default, arguments)


def test_attention_of_packed_projection_passes_opcheck():
    packed = torch.randn(1, 4, 6, 3, 2, 3, requires_grad=True)
    torch.library.opcheck(OPS.routed_attention.default, (*packed.unbind(3), *maps(batch=1)[3:]))


@pytest.mark.parametrize("low", [0, -1])
def test_attention_passes_gradcheck(low):
    tensors = torch.randn(3, 1, 2, 4, 2, 2, dtype=torch.float64).unbind(0)
    tensors = [x.clone().requires_grad_() for x in tensors]
    index = torch.randint(low, 4, (1, 2, 2, 3), dtype=torch.int32)
    index[0, 0, 0] = low  # with -1: one empty list

    def function(*tensors):
        out, lse = routed_attention(*tensors, index, (2, 2), (1, 2), 0.7)
        return out, lse.masked_fill(lse == -float("inf"), 0.0)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize(
    "function",
    [lambda x: region_mean(x, (2, 5)), lambda x: pad_to_multiple(x, 3), lambda x: crop(x, 3, 2)],
    ids=["region_mean", "pad_to_multiple", "crop"],
)
def test_map_operator_passes_gradcheck(function):
    x = plain(2, 4, 5, 2, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(function, [x])
    assert torch.autograd.gradcheck(
        function, [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()]
    )


class Routing(nn.Module):
    """All operators in a row on a packed map ``[B, H, W, 3, 2, 4]``."""

    def forward(self, qkv):
        height, width = qkv.shape[1], qkv.shape[2]
        q, k, v = pad_to_multiple(qkv.flatten(3), 3).chunk(3, dim=-1)
        region = (q.shape[1] // 3, q.shape[2] // 3)
        index = topk_regions(region_mean(q, region), region_mean(k, region), 2)
        out, lse = routed_attention(*(x.unflatten(3, (2, 4)) for x in (q, k, v)), index, region)
        return crop(out.flatten(3), height, width), lse


def run(function, qkv):
    out, lse = function(qkv)
    return out, lse, *torch.autograd.grad(out.sin().sum() + lse.cos().sum(), qkv)


@pytest.mark.parametrize(
    "backend, size",
    [("aot_eager", (6, 9)), ("aot_eager", (7, 10)), pytest.param("inductor", (7, 10), marks=pytest.mark.slow)],
)
def test_compiled_equals_eager(backend, size):
    qkv = torch.randn(2, *size, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(Routing(), fullgraph=True, backend=backend)
    for name, expected, actual in zip(("out", "lse", "grad"), run(Routing(), qkv), run(compiled, qkv), strict=True):
        assert_close(name, expected, actual, 1e-13)


def test_second_compiled_graph_serves_all_further_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Routing(), fullgraph=True, backend=counter)
    for size in ((2, 7, 10), (3, 9, 13), (4, 5, 12)):
        qkv = torch.randn(*size, 3, 2, 4, dtype=torch.float64, requires_grad=True)
        for name, expected, actual in zip(("out", "lse", "grad"), run(Routing(), qkv), run(compiled, qkv), strict=True):
            assert_close(f"{name} at {size}", expected, actual, 1e-13)
    assert counter.frame_count == 2


def test_exported_with_free_sizes_equals_eager():
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        Routing(), (torch.randn(2, 7, 10, 3, 2, 4),), dynamic_shapes=({0: free, 1: free, 2: free},)
    )
    for size in ((3, 7, 10), (5, 9, 12), (1, 4, 17)):
        qkv = torch.randn(*size, 3, 2, 4)
        for name, expected, actual in zip(("out", "lse"), Routing()(qkv), program.module()(qkv), strict=True):
            assert_close(f"{name} at {size}", expected, actual, 1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_leaves_ranking_alone(backend):
    x = torch.randn(2, 16, 16, 32)
    with use_backend(backend):
        expected = topk_regions(region_mean(x, (2, 2)), region_mean(x.roll(1, 0), (2, 2)), 16)
        with torch.autocast("cpu", torch.bfloat16):
            means = region_mean(x, (2, 2)), region_mean(x.roll(1, 0), (2, 2))
            table = topk_regions(*means, 16)
            in_half = (means[0] @ means[1].mT).topk(16).indices
    assert means[0].dtype == torch.float32
    assert torch.equal(table, expected)
    assert not torch.equal(in_half.int(), expected[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_attention_in_its_dtype(dtype):
    query, key, value, *rest = maps(grad=True)
    expected = OPS.routed_attention(query.to(dtype), key.to(dtype), value.to(dtype), *rest)
    with torch.autocast("cpu", dtype):
        out, lse = routed_attention(query, key, value, *rest)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    grads = torch.autograd.grad(out.float().sum() + lse.sum(), (query, key, value))
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert routed_attention(*maps(torch.float64))[0].dtype == torch.float64


def test_flop_counts_equal_hand_counts():
    query, key, value, index, *rest = maps(grad=True)
    with FlopCounterMode(display=False) as counter:
        topk_regions(torch.randn(2, 4, 8), torch.randn(2, 6, 8), 3)
        out, lse = routed_attention(query, key, value, index, *rest)
        (out.sum() + lse.sum()).backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    # 2 images, 24 pixels, 2 heads, 3 channels; 3 regions of 4 pixels in a list
    product = 2 * (2 * 24 * 2 * 3) * (3 * 4)
    assert counts["visionattn.routed_attention"] == 2 * product
    assert counts["visionattn.routed_attention_backward"] == 5 * product
    assert counts["visionattn.topk_regions"] == 2 * (2 * 4 * 6 * 8)


def test_second_derivative_is_refused():
    query, *rest = maps(torch.float64, grad=True)
    (grad,) = torch.autograd.grad(routed_attention(query, *rest)[0].sum(), query, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), query)
