"""Memory of the operators beyond inputs, outputs and gradients, as PyTorch's CPU allocator reports it."""

import pytest
import torch
from helpers import assert_close

from visionattn.ops.routing import eager, reference

OPS = torch.ops.visionattn
BOUND = 2.0  # in units of the bytes of key and value together
# batch, side of the map, heads, head_dim, side of a region, entries per list
SHAPES = {
    "stage1": (1, 56, 2, 32, 8, 1),
    "stage2": (2, 28, 4, 32, 4, 4),
    "stage3": (2, 14, 8, 32, 2, 16),
    "large_regions": (1, 32, 1, 32, 16, 4),
    "whole_map": (1, 32, 1, 32, 32, 1),
    "whole_map_2_heads": (1, 32, 2, 32, 32, 1),
}


def size(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def run_metered(function, *args):
    """The tensors that ``function`` returns, and the most bytes that were allocated beside them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function(*args)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # negative for memory given back
        peak = max(peak, now)
    assert now == size(*result), "the meter lost sight of an allocation"
    return result, peak - size(*result)


def make(name, dtype):
    B, side, heads, d, region, K = SHAPES[name]
    query, key, value = (torch.randn(B, side, side, heads, d).to(dtype) for _ in range(3))
    P = (side // region) ** 2
    index = torch.rand(B, 1, P, P).argsort(-1)[..., :K].int()
    return query, key, value, index, (region, region), (region, region), d**-0.5


def backward_arguments(query, key, value, index, *rest):
    out, lse = OPS.routed_attention(query, key, value, index, *rest)
    return torch.randn_like(out), torch.randn_like(lse), query, key, value, index, out, lse, *rest


def test_meter_sees_the_peak():
    def function(x):
        big = x.repeat(3)
        y = big[: len(x)].clone()
        del big
        return (y,)

    x = torch.zeros(1 << 18)
    assert run_metered(function, x)[1] == 3 * size(x)


@pytest.mark.parametrize("name", SHAPES)
def test_meter_sees_the_gather_of_the_reference(name):
    args = make(name, torch.float32)
    _, extra = run_metered(reference.routed_attention, *args)
    assert extra > max(SHAPES[name][5], BOUND) * size(*args[1:3])  # key and value once for every entry of a list


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_forward_memory_is_bounded(name, dtype, record_property):
    args = make(name, dtype)
    _, extra = run_metered(OPS.routed_attention, *args)
    record_property("share", share := extra / size(*args[1:3]))
    assert share < BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_backward_memory_is_bounded(name, dtype, record_property):
    args = make(name, dtype)
    _, extra = run_metered(OPS.routed_attention_backward, *backward_arguments(*args))
    record_property("share", share := extra / size(*args[1:3]))
    assert share < BOUND


@pytest.mark.parametrize("entries", [4, 49, 490])
def test_memory_does_not_grow_with_the_lists(entries):
    query, key, value = torch.randn(3, 1, 14, 14, 2, 32).unbind(0)
    index = torch.randint(49, (1, 1, 49, entries), dtype=torch.int32)
    args = query, key, value, index, (2, 2), (2, 2), 1.0
    _, forward = run_metered(OPS.routed_attention, *args)
    _, backward = run_metered(OPS.routed_attention_backward, *backward_arguments(*args))
    assert max(forward, backward) < BOUND * size(key, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["large_regions", "whole_map_2_heads"])
def test_cut_regions_and_channels_change_nothing(name, dtype):
    query, key, value, index, *rest = make(name, dtype)
    index = torch.cat([index, index[..., :1], torch.full_like(index[..., :1], -1)], dim=-1)  # repeated, missing
    index[:, :, 1:2] = -1  # an empty list, where there is more than one
    walk = eager._plan(query, key, index.shape[3], *(r[0] * r[1] for r in rest[:2]), buffers=(8, 5, 2))
    assert walk.pixels < rest[1][0] * rest[1][1] and walk.rows < rest[0][0] * rest[0][1]
    results = []
    for function, kind in ((reference.routed_attention, torch.float64), (OPS.routed_attention, dtype)):
        tensors = [x.to(kind).requires_grad_() for x in (query, key, value)]
        out, lse = function(*tensors, index, *rest)
        loss = out.double().square().sum() + lse.double().masked_fill(lse.isinf(), 0.0).sum()
        results.append((out, lse, *torch.autograd.grad(loss, tensors)))
    rel = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for label, expected, actual in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        assert_close(label, expected, actual, rel)


# neighbourhood operators: batch, side of the map, heads, head_dim, kernel, dilation, stride
WINDOWS = [
    (1, 56, 2, 32, 7, 1, 1),
    (2, 28, 4, 32, 7, 4, 1),
    (2, 14, 8, 32, 7, 1, 1),
    (1, 7, 16, 32, 7, 1, 1),
    (1, 56, 2, 32, 13, 1, 1),
    (1, 56, 3, 32, 7, 1, 7),
    (1, 56, 2, 32, 13, 1, 10),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, side, heads, d, kernel, dilation, stride", WINDOWS)
def test_neighborhood_attention_is_bounded(B, side, heads, d, kernel, dilation, stride, dtype):
    query, key, value = (torch.randn(B, side, side, heads, d).to(dtype) for _ in range(3))
    bias = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1).to(dtype)
    rest = [kernel, kernel], [dilation, dilation], d**-0.5, [stride, stride]
    (out, lse), extra = run_metered(OPS.neighborhood_attention, query, key, value, bias, *rest)
    grads = torch.randn_like(out), torch.randn_like(lse)
    _, more = run_metered(OPS.neighborhood_attention_backward, *grads, query, key, value, bias, out, lse, *rest)
    assert max(extra, more) < 4 * size(key, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "B, side, groups, d, kernels", [(1, 56, 4, 8, (5, 13)), (2, 14, 8, 8, (5, 13)), (1, 7, 16, 16, (5, 7))]
)
def test_neighborhood_sum_takes_less_than_its_inputs(B, side, groups, d, kernels, dtype):
    logits = torch.randn(B, sum(k * k for k in kernels), groups, side, side).to(dtype)
    value = torch.randn(B, side, side, 2 * groups, d).to(dtype)
    bias = torch.randn(groups, sum((2 * k - 1) ** 2 for k in kernels)).to(dtype)
    (out, lse), extra = run_metered(OPS.neighborhood_sum, logits, value, bias, list(kernels), True)
    grads = torch.randn_like(out), torch.randn_like(lse)
    _, more = run_metered(OPS.neighborhood_sum_backward, *grads, logits, value, bias, out, lse, list(kernels), True)
    assert max(extra, more) < size(logits, value)
