"""Routing operators against Python loops, the plain form, and the published function."""

import itertools

import pytest
import torch
from helpers import assert_close, assert_golden, inputs, load_reference

from visionattn.ops import crop, pad_to_multiple, region_mean, routed_attention, topk_regions, use_backend

INF = float("inf")
CASES = {
    "shared_table": dict(size=(2, 4, 6), heads=2, d=3, region=(2, 3), K=2),
    "table_per_head": dict(size=(2, 4, 6), heads=2, d=3, region=(2, 3), K=2, shared=False),
    "missing_entries": dict(size=(2, 4, 6), heads=2, d=3, region=(2, 3), K=3, low=-1),
    "missing_per_head": dict(size=(1, 4, 4), heads=3, d=2, region=(2, 2), K=3, low=-1, shared=False),
    "duplicates": dict(size=(1, 4, 4), heads=1, d=2, region=(2, 2), K=6),
    "other_key_map": dict(size=(2, 4, 6), heads=2, d=3, region=(2, 3), K=2, kv_size=(6, 4), kv_region=(3, 2)),
    "smaller_key_map": dict(size=(1, 4, 4), heads=2, d=3, region=(1, 2), K=2, kv_size=(3, 2), kv_region=(1, 1), low=-1),
    "whole_map": dict(size=(2, 4, 3), heads=2, d=3, region=(4, 3), K=1),
    "single_pixels": dict(size=(1, 3, 4), heads=2, d=3, region=(1, 1), K=5),
    "odd_regions": dict(size=(1, 5, 9), heads=1, d=5, region=(5, 3), K=2),
    "wide_list": dict(size=(1, 6, 6), heads=1, d=4, region=(3, 3), K=40),
    "one_channel": dict(size=(1, 4, 4), heads=1, d=1, region=(2, 2), K=2),
}


def make(size, heads, d, region, K, kv_size=None, kv_region=None, low=0, shared=True, dtype=torch.float64):
    """Query, key, value, table and regions of one case."""
    (B, H, W), (H_k, W_k) = size, kv_size or size[1:]
    kv_region = kv_region or region
    P, P_k = (H // region[0]) * (W // region[1]), (H_k // kv_region[0]) * (W_k // kv_region[1])
    query = torch.randn(B, H, W, heads, d, dtype=torch.float64).to(dtype)
    key, value = torch.randn(2, B, H_k, W_k, heads, d, dtype=torch.float64).to(dtype)
    index = torch.randint(low, P_k, (B, 1 if shared else heads, P, K), dtype=torch.int32)
    return query, key, value, index, region, kv_region


def brute_force(query, key, value, index, region, kv_region, scale=None):
    """Attention of every pixel by itself, differentiable."""
    B, H, W, heads, d = query.shape
    columns, kv_columns = W // region[1], key.shape[2] // kv_region[1]
    scale = d**-0.5 if scale is None else scale
    out, lse = torch.zeros_like(query), query.new_full((B, heads, H, W), -INF)
    for b, h, y, x in itertools.product(range(B), range(heads), range(H), range(W)):
        regions = index[b, h % index.shape[1], y // region[0] * columns + x // region[1]].tolist()
        corners = [(r // kv_columns * kv_region[0], r % kv_columns * kv_region[1]) for r in regions if r >= 0]
        rows = [top + i for top, _ in corners for i in range(kv_region[0]) for _ in range(kv_region[1])]
        cols = [left + j for _, left in corners for _ in range(kv_region[0]) for j in range(kv_region[1])]
        if corners:
            scores = scale * key[b, rows, cols, h] @ query[b, y, x, h]
            out[b, y, x, h] = scores.softmax(0) @ value[b, rows, cols, h]
            lse[b, h, y, x] = scores.logsumexp(0)
    return out, lse


def with_gradients(function, query, key, value, *rest, **kwargs):
    """Named outputs and gradients of a fixed random functional of both outputs."""
    query, key, value = (x.detach().clone().requires_grad_() for x in (query, key, value))
    out, lse = function(query, key, value, *rest, **kwargs)
    noise = torch.Generator().manual_seed(1)
    w_out, w_lse = (torch.randn(x.shape, generator=noise, dtype=torch.float64) for x in (out, lse))
    loss = (out * w_out.to(out.dtype)).sum() + (lse.masked_fill(lse == -INF, 0.0) * w_lse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, (query, key, value))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def assert_same(expected, actual, rel, grad_rel=None):
    for name in expected:
        assert_close(name, expected[name], actual[name], grad_rel or rel if name.startswith("d") else rel)


# descriptors and ranking


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("size, region", [((2, 4, 6, 3), (2, 3)), ((1, 5, 7, 2), (5, 1)), ((1, 3, 3, 4), (3, 3))])
def test_region_mean_equals_loop(backend, size, region):
    x = torch.randn(size, dtype=torch.float64)
    grid = itertools.product(range(0, size[1], region[0]), range(0, size[2], region[1]))
    expected = torch.stack([x[:, y : y + region[0], z : z + region[1]].mean((1, 2)) for y, z in grid], 1)
    with use_backend(backend):
        assert_close("mean", expected, region_mean(x, region), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_region_mean_sums_in_float32(dtype):
    x = torch.randn(1, 16, 16, 4, dtype=torch.float64).to(dtype)
    mean = region_mean(x, (8, 8))
    assert mean.dtype == torch.float32
    assert_close("mean", region_mean(x.double(), (8, 8)), mean, 1e-6)


def test_region_mean_gradient_is_spread_evenly():
    x = torch.randn(2, 4, 6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, 3, dtype=torch.float64)
    (region_mean(x, (2, 3)) * weight).sum().backward()
    expected = (weight / 6).unflatten(1, (2, 2)).repeat_interleave(2, 1).repeat_interleave(3, 2)
    assert_close("gradient", expected, x.grad, 1e-14)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("lead", [(2,), (2, 3)], ids=["shared", "per_head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_topk_equals_sorted_loop_with_ties(backend, lead, dtype):
    # small whole numbers: sums are exact in every dtype and many scores tie
    query, key = torch.randint(-1, 2, (*lead, 5, 4)).to(dtype), torch.randint(-1, 2, (*lead, 12, 4)).to(dtype)
    with use_backend(backend):
        table = topk_regions(query, key, 7)
    assert table.dtype == torch.int32
    assert table.shape == (2, 3 if len(lead) == 2 else 1, 5, 7)
    q, k = (x.view(-1, *x.shape[-2:]).tolist() for x in (query, key))
    for rows, queries, keys in zip(table.flatten(0, 1).tolist(), q, k, strict=True):
        for row, one in zip(rows, queries, strict=True):
            scores = [sum(a * b for a, b in zip(one, other, strict=True)) for other in keys]
            assert row == sorted(range(12), key=lambda i: (-scores[i], i))[:7]


def test_topk_of_equal_scores_counts_up():
    assert topk_regions(torch.zeros(1, 2, 3), torch.randn(1, 100, 3), 50).tolist() == [[[list(range(50))] * 2]]


def test_topk_ranks_half_precision_in_float32():
    query, key = torch.randn(2, 1, 64, 32).to(torch.bfloat16)
    assert torch.equal(topk_regions(query, key, 16), topk_regions(query.float(), key.float(), 16))
    assert not torch.equal(topk_regions(query, key, 16)[:, 0], (query @ key.mT).topk(16).indices.int())


def test_topk_carries_no_gradient():
    query, key = torch.randn(2, 1, 4, 3, requires_grad=True)
    assert not topk_regions(query, key, 2).requires_grad


# attention


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_brute_force(name):
    args = make(**CASES[name])
    assert_same(with_gradients(brute_force, *args), with_gradients(routed_attention, *args), 1e-13)


@pytest.mark.parametrize("name", CASES)
def test_reference_backend_equals_brute_force(name):
    args = make(**CASES[name])
    with use_backend("reference"):
        actual = with_gradients(routed_attention, *args, scale=0.7)
    assert_same(with_gradients(brute_force, *args, scale=0.7), actual, 1e-13)


TOLERANCES = {torch.float64: (1e-13, 1e-13), torch.float32: (1e-6, 1e-6), torch.bfloat16: (5e-3, 1e-2)}
TOLERANCES[torch.float16] = (1e-3, 2e-3)
LARGE = {
    "stage1": dict(size=(1, 28, 28), heads=2, d=32, region=(4, 4), K=1),
    "stage3": dict(size=(2, 14, 14), heads=4, d=32, region=(2, 2), K=16),
    "cut_lists": dict(size=(1, 12, 12), heads=1, d=8, region=(2, 2), K=150, low=-1, shared=False),
    "cut_rows": dict(size=(1, 32, 32), heads=1, d=8, region=(16, 16), K=4, low=-1),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_attention_of_larger_maps_equals_reference_backend(name, dtype):
    query, key, value, *rest = make(**LARGE[name], dtype=dtype)
    with use_backend("reference"):
        expected = with_gradients(routed_attention, query.double(), key.double(), value.double(), *rest)
    actual = with_gradients(routed_attention, query, key, value, *rest)
    assert actual["out"].dtype == actual["dk"].dtype == dtype
    assert actual["lse"].dtype == torch.promote_types(dtype, torch.float32)
    assert_same(expected, actual, *TOLERANCES[dtype])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty_lists_give_zero_and_no_gradient(backend):
    query, key, value, index, *regions = make((2, 4, 4), 2, 3, (2, 2), 3, shared=False)
    index[0] = -1
    with use_backend(backend):
        result = with_gradients(routed_attention, query, key, value, index, *regions)
    assert (result["lse"][0] == -INF).all() and result["lse"][1].isfinite().all()
    for name in ("out", "dq", "dk", "dv"):
        assert (result[name][0] == 0).all() and (result[name][1] != 0).any(), name


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_list_of_no_entries_is_empty(backend):
    query, key, value, index, *regions = make((1, 4, 4), 2, 3, (2, 2), 0)
    with use_backend(backend):
        result = with_gradients(routed_attention, query, key, value, index, *regions)
    assert (result["lse"] == -INF).all()
    assert all((result[name] == 0).all() for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bad", [INF, float("nan")])
def test_missing_entries_hide_region_zero(backend, bad):
    query, key, value, index, *regions = make((1, 4, 4), 2, 3, (2, 2), 3)
    index[..., 0], index[..., 1:] = -1, index[..., 1:].clamp(min=1)
    with use_backend(backend):
        expected = with_gradients(routed_attention, query, key, value, index, *regions)
        key[:, :2, :2], value[:, :2, :2] = bad, bad
        assert_same(expected, with_gradients(routed_attention, query, key, value, index, *regions), 1e-13)


@pytest.mark.parametrize("missing", [0, 1])
def test_large_scores_do_not_overflow(missing):
    query, key, value, index, *regions = make((1, 4, 4), 2, 8, (2, 2), 3, low=-missing, dtype=torch.float32)
    with use_backend("reference"):
        expected = with_gradients(routed_attention, query * 1e3, key, value, index, *regions)
    actual = with_gradients(routed_attention, query * 1e3, key, value, index, *regions)
    assert_same(expected, actual, 1e-5, 1e-4)


def test_packed_projection_goes_in_as_it_is():
    packed = torch.randn(2, 4, 6, 3, 2, 5, dtype=torch.float64)
    index = make((2, 4, 6), 2, 5, (2, 3), 2)[3]
    expected = with_gradients(routed_attention, *packed.unbind(3), index, (2, 3))
    packed.requires_grad_()
    query, key, value = packed.unbind(3)
    assert not query.is_contiguous()
    out, lse = routed_attention(query, key, value, index, (2, 3))
    assert out.is_contiguous()
    assert_same({"out": expected["out"], "lse": expected["lse"]}, {"out": out, "lse": lse}, 1e-15)
    w = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(out, packed, w)
    with use_backend("reference"):
        (by_reference,) = torch.autograd.grad(routed_attention(*packed.unbind(3), index, (2, 3))[0], packed, w)
    assert_close("gradient of the packed map", by_reference, grad, 1e-13)


def test_permuted_maps_and_gradients_give_the_same():
    query, key, value, *rest = make((2, 4, 6), 2, 5, (2, 3), 2)
    expected = with_gradients(routed_attention, query, key, value, *rest)
    turned = [x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for x in (query, key, value)]
    assert_same(expected, with_gradients(routed_attention, *turned, *rest), 1e-15)
    query.requires_grad_()
    out, lse = routed_attention(query, key, value, *rest)
    (from_expanded,) = torch.autograd.grad([out, lse], query, [torch.ones(()).expand(x.shape) for x in (out, lse)])
    (from_full,) = torch.autograd.grad(routed_attention(query, key, value, *rest), query, [out * 0 + 1, lse * 0 + 1])
    assert_close("gradient from an expanded one", from_full, from_expanded, 1e-15)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty_batch_gives_empty_results(backend):
    with use_backend(backend):
        result = with_gradients(routed_attention, *make((0, 4, 6), 2, 3, (2, 3), 2))
        assert topk_regions(torch.zeros(0, 4, 3), torch.zeros(0, 4, 3), 2).shape == (0, 1, 4, 2)
        assert region_mean(torch.zeros(0, 4, 6, 3), (2, 3)).shape == (0, 4, 3)
    assert result["out"].shape == result["dq"].shape == (0, 4, 6, 2, 3)
    assert result["lse"].shape == (0, 2, 4, 6)


def test_scale_defaults_to_head_dim():
    args = make((1, 4, 4), 2, 16, (2, 2), 2)
    assert torch.equal(routed_attention(*args)[0], routed_attention(*args, scale=0.25)[0])


def test_key_region_defaults_to_query_region():
    query, key, value, index, region, _ = make((1, 4, 4), 2, 3, (2, 2), 2)
    expected = routed_attention(query, key, value, index, region, region)
    assert torch.equal(expected[0], routed_attention(query, key, value, index, region)[0])


def test_parts_of_a_table_merge_to_the_whole():
    query, key, value, index, *regions = make((2, 4, 6), 2, 3, (2, 3), 4, low=-1, shared=False)
    index[0, 0, 0, :2] = -1  # one part empty
    index[1, 1, 1] = -1  # both parts empty
    out, lse = routed_attention(query, key, value, index, *regions)
    parts = [routed_attention(query, key, value, part.contiguous(), *regions) for part in index.split(2, dim=3)]
    merged = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [(part - merged).exp().nan_to_num(0.0).permute(0, 2, 3, 1)[..., None] for _, part in parts]
    assert_close("lse", lse, merged, 1e-14)
    assert_close("out", out, sum(w * part for w, (part, _) in zip(weights, parts, strict=True)), 1e-14)


@pytest.mark.parametrize("name", ["routed_region_exact", "routed_region_padded"])
def test_attention_equals_published_function(name):
    manifest, stored = load_reference(f"ops/{name}")
    region, heads = tuple(manifest["params"]["region"]), manifest["params"]["heads"]
    made = manifest["inputs"]
    query, key, value, grad = (inputs(**made[n]).permute(0, 2, 3, 1) for n in ("q", "k", "v", "grad_out"))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    maps = [pad_to_multiple(x, region[0]) if name.endswith("padded") else x for x in leaves]
    index = stored["idx"].int().unsqueeze(1)
    scale = maps[0].shape[3] ** -0.5
    out, _ = routed_attention(*(x.unflatten(3, (heads, -1)) for x in maps), index, region, scale=scale)
    out = crop(out.flatten(3), *grad.shape[1:3])
    actual = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, grad), strict=True), out=out)
    for output, tensor in actual.items():
        assert_golden(output, stored[output], tensor.permute(0, 3, 1, 2))


def test_ranking_equals_published_table():
    manifest, stored = load_reference("ops/routed_region_exact")
    query, key = (inputs(**manifest["inputs"][n]).permute(0, 2, 3, 1) for n in ("q", "k"))
    region = tuple(manifest["params"]["region"])
    table = topk_regions(region_mean(query, region), region_mean(key, region), manifest["params"]["topk"])
    assert torch.equal(table, stored["idx"].int().unsqueeze(1))
