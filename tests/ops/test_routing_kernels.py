"""The Triton kernels of the routing operators, without a GPU in Triton's interpreter, against the reference."""

import itertools

import pytest
import torch
from helpers import assert_close

from visionattn.ops import region_mean, routed_attention, topk_regions, use_backend

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter has no bfloat16
RELATIVE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}

# batch, map, heads, head_dim, region, entries of a list, tables
LISTED = dict(
    one_tile_a_list=dict(size=(1, 16, 16), heads=2, d=32, region=(8, 8), K=1),
    several_tiles=dict(size=(1, 16, 24), heads=2, d=32, region=(8, 8), K=3),
    large_regions=dict(size=(1, 32, 16), heads=1, d=16, region=(16, 16), K=2),
    small_regions=dict(size=(2, 12, 8), heads=2, d=8, region=(4, 4), K=2, tables=2),
    odd_regions=dict(size=(1, 10, 21), heads=3, d=10, region=(5, 7), K=2),
    odd_regions_one_entry=dict(size=(1, 10, 21), heads=1, d=40, region=(5, 7), K=1),
    other_key_regions=dict(size=(1, 16, 16), heads=1, d=16, region=(4, 4), kv_region=(8, 2), K=2),
    one_region=dict(size=(1, 16, 16), heads=1, d=32, region=(16, 16), K=1),
)
DENSE = dict(
    tiny_regions=dict(size=(1, 14, 14), heads=2, d=32, region=(2, 2), K=16),
    single_pixels=dict(size=(2, 7, 7), heads=1, d=24, region=(1, 1), K=5),
    odd_tiny_regions=dict(size=(1, 9, 15), heads=2, d=16, region=(3, 1), K=3, tables=2),
)
CASES = LISTED | DENSE


def tables(size, region, K, kv_region=None, tables=1, entries="distinct", **_):
    B, H, W = size
    P, PK = ((H // rh) * (W // rw) for rh, rw in (region, kv_region or region))
    index = torch.rand(B, tables, P, PK).argsort(-1)[..., :K]
    if entries != "distinct":
        index = torch.randint(0, PK, (B, tables, P, K))  # regions may come twice
        index[torch.rand(index.shape) < 0.3] = -1
        index[:, :, 0] = -1  # an empty list
    return index.int().to(DEVICE)


def results(case, index, dtype, kind, backend, scale=None, shift=0.0):
    """Output, log-sum-exp and the gradient of a packed projection, for the same numbers in ``kind``."""
    (B, H, W), heads, d = case["size"], case["heads"], case["d"]
    g = torch.Generator().manual_seed(1)
    packed = torch.randn(B, H, W, 3 * heads * d, generator=g, dtype=torch.float64)
    packed[..., :d] += shift  # of all queries of the first head, along its keys
    packed[..., heads * d : heads * d + d] += abs(shift)
    packed = packed.to(DEVICE, dtype).to(kind)
    packed.requires_grad_()
    q, k, v = (x.view(B, H, W, heads, d) for x in packed.chunk(3, dim=-1))
    with use_backend(backend):
        out, lse = routed_attention(q, k, v, index, case["region"], case.get("kv_region"), scale)
        loss = sum(
            (
                x.double().masked_fill(x.isinf(), 0) * torch.randn(x.shape, generator=g, dtype=torch.float64).to(DEVICE)
            ).sum()
            for x in (out, lse)
        )
        (grad,) = torch.autograd.grad(loss, packed)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grad.chunk(3, dim=-1)), strict=True))


def compare(case, index, dtype, scale=None, shift=0.0, relative=None):
    expected = results(case, index, dtype, torch.float64, "reference", scale, shift)
    actual = results(case, index, dtype, dtype, "triton", scale, shift)
    for name in expected:
        assert_close(name, expected[name], actual[name], relative or RELATIVE[dtype])


@pytest.mark.parametrize("entries", ["distinct", "missing and repeated"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_reference(name, entries):
    compare(CASES[name], tables(**CASES[name], entries=entries), torch.float32)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["several_tiles", "one_tile_a_list", "tiny_regions"])
def test_half_precision_is_close(name, dtype):
    compare(CASES[name], tables(**CASES[name]), dtype)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("name", ["several_tiles", "tiny_regions"])
def test_any_scale_works(name, scale):
    compare(CASES[name], tables(**CASES[name]), torch.float32, scale)


@pytest.mark.parametrize("shift", [-6.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["several_tiles", "large_regions", "small_regions", "tiny_regions"])
def test_scores_beyond_the_range_of_exponentials(name, dtype, shift):
    # about +-36 sqrt(d) before the exponential: powers of 2 that float32 has no numbers for
    case = CASES[name]
    # scores of hundreds carry an absolute error that the exponential turns into a relative one
    compare(case, tables(**case), dtype, scale=1.0, shift=shift, relative=10 * RELATIVE[dtype])


@pytest.mark.parametrize("name", ["several_tiles", "one_tile_a_list", "tiny_regions"])
def test_two_runs_are_equal(name):
    case = CASES[name]
    index = tables(**case, entries="missing and repeated")
    first, second = (results(case, index, torch.float32, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [pytest.param("small_regions", 3, marks=pytest.mark.thorough), ("odd_tiny_regions", 2)],
)
def test_search_finds_tiles_that_work(name, kernels, monkeypatch, caplog):
    from visionattn.ops import _tiles
    from visionattn.ops.routing import launch

    monkeypatch.setenv("VISIONATTN_AUTOTUNE", "1")
    if DEVICE == "cpu":  # the interpreter's times mean nothing: take the last candidate
        order = itertools.count()
        monkeypatch.setattr(launch, "searching", lambda device: True)
        monkeypatch.setattr(_tiles, "milliseconds", lambda run: (run(), -next(order))[1])
    plans = launch._forward_plans, launch._backward_plans
    for plan in plans:
        plan.clear()
    with caplog.at_level("INFO", logger="visionattn"):
        compare(CASES[name], tables(**CASES[name]), torch.float16)
    for plan in plans:
        plan.clear()
    assert sum("fastest of" in message for message in caplog.messages) == kernels


def test_float64_and_wide_heads_take_the_eager_form():
    case = dict(size=(1, 8, 8), heads=1, d=160, region=(4, 4), K=2)
    compare(case, tables(**case), torch.float32)
    index = tables(**CASES["several_tiles"])
    actual = results(CASES["several_tiles"], index, torch.float64, torch.float64, "triton")
    expected = results(CASES["several_tiles"], index, torch.float64, torch.float64, "reference")
    assert_close("out", expected["out"], actual["out"], 1e-12)


def test_inverted_table_lists_every_use():
    from visionattn.ops.routing.launch import invert_index

    index = torch.randint(-1, 6, (2, 2, 9, 4), dtype=torch.int32, device=DEVICE)
    listed, count = invert_index(index, 6)
    for b, h, region in ((b, h, r) for b in range(2) for h in range(2) for r in range(7)):
        times = (index[b, h] == (region if region < 6 else -1)).sum(dim=1).tolist()
        expected = [p + 65536 * n for p, n in enumerate(times) if n]
        assert listed[b, h, region, : count[b, h, region]].tolist() == expected


@pytest.mark.parametrize(
    "size, channels, region", [((14, 14), 48, (2, 2)), ((15, 28), 200, (5, 7)), ((16, 16), 32, (16, 16))]
)
def test_region_means_equal(size, channels, region):
    x = torch.randn(2, *size, 3 * channels, device=DEVICE)[..., channels : 2 * channels]
    with use_backend("triton"):
        actual = region_mean(x, region)
    with use_backend("reference"):
        assert_close("means", region_mean(x, region), actual, 1e-6)


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("P, PK, topk", [(49, 49, 16), (20, 7, 7), (5, 200, 1)])
def test_ranking_equals_with_ties(P, PK, topk, heads):
    lead = (2, heads) if heads else (2,)
    query, key = (torch.randint(-2, 3, (*lead, n, 70)).float().to(DEVICE) for n in (P, PK))
    with use_backend("triton"):
        actual = topk_regions(query, key, topk)
    with use_backend("reference"):
        assert torch.equal(topk_regions(query, key, topk), actual)
