"""The Triton kernels of neighbourhood attention, without a GPU in Triton's interpreter, against the definition."""

import itertools

import pytest
import torch
from helpers import assert_close

from visionattn.ops import neighborhood_attention, use_backend
from visionattn.ops.neighborhood import geometry, reference

pytest.importorskip("triton")
OPS = torch.ops.visionattn
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter has no bfloat16
RELATIVE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# batch, map; heads; head_dim; kernel; dilation
CASES = dict(
    ragged_tiles=dict(size=(2, 9, 11), heads=2, d=8, kernel=(3, 5)),
    borders_meet=dict(size=(1, 14, 14), heads=1, d=16, kernel=(7, 7)),
    inner_tiles=dict(size=(1, 26, 21), heads=1, d=16, kernel=(3, 3)),
    window_is_map=dict(size=(2, 7, 7), heads=2, d=12, kernel=(7, 7)),
    dilated=dict(size=(1, 13, 15), heads=1, d=8, kernel=(3, 3), dilation=(4, 2)),
    group_is_window=dict(size=(1, 14, 10), heads=1, d=32, kernel=(7, 5), dilation=(2, 2)),
    one_row=dict(size=(1, 1, 40), heads=1, d=16, kernel=(1, 5), dilation=(9, 3)),
    single_pixel=dict(size=(1, 6, 7), heads=3, d=1, kernel=(1, 1)),
    tall_window=dict(size=(1, 15, 6), heads=1, d=40, kernel=(13, 3)),
    large_window=dict(size=(1, 23, 8), heads=1, d=8, kernel=(21, 7)),
    wide_heads=dict(size=(1, 8, 8), heads=1, d=128, kernel=(5, 5)),
    stride=dict(size=(2, 17, 19), heads=1, d=8, kernel=(7, 5), stride=(3, 4)),
    dilated_stride=dict(size=(1, 14, 21), heads=2, d=8, kernel=(5, 3), dilation=(1, 3), stride=(2, 3)),
    stride_of_one_axis=dict(size=(1, 3, 40), heads=1, d=16, kernel=(3, 9), stride=(1, 9)),
    windows=dict(size=(2, 14, 21), heads=2, d=16, kernel=(7, 7), stride=(7, 7)),
    ragged_windows=dict(size=(1, 16, 9), heads=1, d=8, kernel=(7, 4), stride=(7, 4)),
    even_windows=dict(size=(1, 12, 13), heads=1, d=8, kernel=(6, 8), stride=(2, 4)),
)
SMALL = dict(size=(1, 9, 8), heads=1, d=8, kernel=(3, 5), dilation=(2, 1))
BIASED = ["ragged_tiles", "borders_meet", "dilated", "group_is_window", "one_row", "wide_heads"]
BIASED += ["stride", "dilated_stride", "stride_of_one_axis", "windows", "ragged_windows", "even_windows"]


def results(case, dtype, kind, backend, bias=False, scale=None, shift=0.0):
    """Output, log-sum-exp and the gradients of a packed projection and the bias, for the same numbers in ``kind``."""
    size, heads, d, kernel = case["size"], case["heads"], case["d"], case["kernel"]
    g = torch.Generator().manual_seed(1)
    packed = torch.randn(*size, 3 * heads * d, generator=g, dtype=torch.float64)
    packed[..., :d] += shift  # of all queries of the first head, along its keys
    packed[..., heads * d : heads * d + d] += abs(shift)
    table = torch.randn(heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1, generator=g, dtype=torch.float64)
    packed, table = (x.to(DEVICE, dtype).to(kind).requires_grad_() for x in (packed, table))
    q, k, v = (x.view(*size, heads, d) for x in packed.chunk(3, dim=-1))
    rest = list(kernel), list(case.get("dilation", (1, 1))), d**-0.5 if scale is None else scale
    rest += (list(case["stride"]),) if "stride" in case else ()
    function = reference.neighborhood_attention if backend == "reference" else OPS.neighborhood_attention
    with use_backend(backend):
        out, lse = function(q, k, v, table if bias else None, *rest)
        weights = (torch.randn(x.shape, generator=g, dtype=torch.float64).to(DEVICE) for x in (out, lse))
        loss = sum((x.double() * w).sum() for x, w in zip((out, lse), weights, strict=True))
        grad, *dbias = torch.autograd.grad(loss, [packed, table] if bias else [packed])
    found = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grad.chunk(3, dim=-1)), strict=True))
    return found | dict(zip(["dbias"], dbias, strict=False))


def compare(case, dtype, bias=False, scale=None, shift=0.0, relative=None):
    expected = results(case, dtype, torch.float64, "reference", bias, scale, shift)
    actual = results(case, dtype, dtype, "triton", bias, scale, shift)
    for name in expected:
        assert actual[name].dtype == (torch.float32 if name == "lse" else dtype)
        assert_close(name, expected[name], actual[name], relative or RELATIVE[dtype])


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_reference(name):
    # one pixel is the whole sum: only rounding is left of the gradients of queries and keys
    if name == "single_pixel":
        expected, actual = (
            results(CASES[name], torch.float32, kind, backend)
            for kind, backend in ((torch.float64, "reference"), (torch.float32, "triton"))
        )
        assert all((expected[key].double() - actual[key].double()).abs().max() < 1e-5 for key in ("out", "dv", "dq"))
    else:
        compare(CASES[name], torch.float32)


@pytest.mark.parametrize("name", BIASED)
def test_bias_and_its_gradient_equal_reference(name):
    compare(CASES[name], torch.float32, bias=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["inner_tiles", "dilated", "dilated_stride"])
def test_half_precision_is_close(name, dtype, bias):
    compare(CASES[name], dtype, bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale_works(scale, bias):
    compare(SMALL, torch.float32, bias, scale)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shift", [-6.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_beyond_the_range_of_exponentials(dtype, shift, bias):
    # about +-36 sqrt(d) before the exponential: powers of 2 that float32 has no numbers for
    case = dict(SMALL, d=32)
    # scores of hundreds carry an absolute error that the exponential turns into a relative one
    compare(case, dtype, bias, scale=1.0, shift=shift, relative=10 * RELATIVE[dtype])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_two_runs_are_equal(dtype, bias):
    first, second = (results(SMALL, dtype, dtype, "triton", bias) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_other_strides_and_bias_of_another_dtype():
    case = CASES["ragged_tiles"]
    q, k, v = torch.randn(3, 2, 9, 11, 2, 8, device=DEVICE).half()
    bias = torch.randn(2, 9, 5, device=DEVICE).transpose(1, 2)
    k = k.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)  # channels apart
    v = v.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)  # heads first
    q = q[:1].expand(2, -1, -1, -1, -1)
    tensors = [x.requires_grad_() for x in (q.detach(), k.detach(), v.detach(), bias)]
    with use_backend("triton"):
        out = neighborhood_attention(*tensors[:3], case["kernel"], bias=tensors[3])
        actual = out, *torch.autograd.grad(out.float().sin().sum(), tensors)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    with use_backend("reference"):
        out = neighborhood_attention(*wide[:3], case["kernel"], bias=wide[3])
        expected = out, *torch.autograd.grad(out.sin().sum(), wide)
    for label, e, a in zip(("out", "dq", "dk", "dv", "dbias"), expected, actual, strict=True):
        assert a.dtype == (torch.float32 if label == "dbias" else torch.float16)
        assert_close(label, e, a, 3e-3)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_direct_and_registered_calls_are_equal(stride):
    q, k, v = torch.randn(3, 1, 9, 9, 1, 8, device=DEVICE).unbind(0)
    bias = torch.randn(1, 5, 5, device=DEVICE)
    tensors = [x.requires_grad_() for x in (q, k, v, bias)]
    with use_backend("triton"):
        direct = neighborhood_attention(q, k, v, 3, bias=bias, stride=stride)
        registered = OPS.neighborhood_attention(q, k, v, bias, [3, 3], [1, 1], 8**-0.5, [stride, stride])[0]
        assert "NeighborhoodAttentionBackward" in type(direct.grad_fn).__name__
        grads = [torch.autograd.grad(x.sin().sum(), tensors) for x in (direct, registered)]
        with torch.no_grad():
            assert torch.equal(direct, neighborhood_attention(q, k, v, 3, bias=bias, stride=stride))
            if stride > 1:  # prepared launches are not those of other windows
                assert not torch.allclose(direct, neighborhood_attention(q, k, v, 3, bias=bias))
    assert torch.equal(direct, registered)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("frozen", ["bias", "query"])
def test_gradients_are_those_asked_for(frozen):
    tensors = dict(zip(("query", "key", "value"), torch.randn(3, 1, 6, 6, 1, 8, device=DEVICE).unbind(0), strict=True))
    tensors["bias"] = torch.randn(1, 5, 5, device=DEVICE)
    for name, x in tensors.items():
        x.requires_grad_(name != frozen)
    with use_backend("triton"):
        neighborhood_attention(**tensors, kernel_size=3).sum().backward()
    assert {name for name, x in tensors.items() if x.grad is None} == {frozen}


def test_autocast_runs_in_half_precision():
    q, k, v = torch.randn(3, 1, 6, 6, 1, 8, device=DEVICE).unbind(0)
    bias = torch.randn(1, 5, 5, device=DEVICE, requires_grad=True)
    with use_backend("triton"), torch.autocast(DEVICE, torch.float16):
        out = neighborhood_attention(q, k, v, 3, bias=bias)
        assert out.dtype == torch.float16
        registered = OPS.neighborhood_attention(q, k, v, bias, [3, 3], [1, 1], 8**-0.5)[0]
    assert torch.equal(out, registered)
    (grad,) = torch.autograd.grad(out.float().sum(), bias)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("bias", [False, True])
def test_kernels_pass_opcheck(bias):
    tensors = [torch.randn(1, 6, 6, 1, 8, device=DEVICE, requires_grad=True) for _ in range(3)]
    table = torch.randn(1, 5, 5, device=DEVICE, requires_grad=True) if bias else None
    with use_backend("triton"):
        for rest in ((), ([2, 3],)):
            torch.library.opcheck(OPS.neighborhood_attention.default, (*tensors, table, [3, 3], [2, 1], 0.5, *rest))


def test_float64_and_wide_heads_take_the_eager_form():
    compare(dict(size=(1, 8, 8), heads=1, d=160, kernel=(3, 3)), torch.float32)
    case = CASES["ragged_tiles"]
    actual = results(case, torch.float64, torch.float64, "triton", bias=True)["out"]
    assert_close("out", results(case, torch.float64, torch.float64, "reference", bias=True)["out"], actual, 1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_search_finds_tiles_that_work(bias, monkeypatch, caplog):
    from visionattn.ops import _tiles
    from visionattn.ops.neighborhood import launch, tuning

    monkeypatch.setenv("VISIONATTN_AUTOTUNE", "1")
    if DEVICE == "cpu":  # the interpreter's times mean nothing: take the last of a few candidates
        order = itertools.count()
        monkeypatch.setattr(launch, "searching", lambda device: True)
        monkeypatch.setattr(_tiles, "milliseconds", lambda run: (run(), -next(order))[1])
        found = tuning.candidates
        monkeypatch.setattr(tuning, "candidates", lambda *args: found(*args)[:2])
    plans = launch._forward_plans, launch._backward_plans
    for plan in plans:
        plan.clear()
    with caplog.at_level("INFO", logger="visionattn"):
        compare(SMALL, torch.float16, bias)
    for plan in plans:
        plan.clear()
    assert sum("fastest of" in message for message in caplog.messages) == 3 + bias


@pytest.mark.parametrize("whole", [0, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_a_program_may_serve_several_images(bias, whole, monkeypatch):
    from visionattn.ops.neighborhood import launch, tuning

    tile, case = tuning.Tile(4, 4, 32, 1, 2, images=2, whole=whole), dict(SMALL, size=(3, 9, 8))
    for name in ("PROGRAMS", "BIAS_PROGRAMS", "FUSED_PROGRAMS"):
        monkeypatch.setattr(launch, name, 1)
    monkeypatch.setattr(tuning, "choose", lambda *args: tile)
    launch._forward_plans.clear(), launch._backward_plans.clear()
    compare(case, torch.float16, bias)
    launch._forward_plans.clear(), launch._backward_plans.clear()


AXES = [(23, 5, 2, 4, 1), (14, 7, 1, 8, 1), (9, 1, 1, 4, 1), (40, 13, 3, 6, 1), (23, 5, 2, 4, 3), (28, 7, 1, 8, 7)]
AXES += [(29, 7, 1, 3, 7), (40, 7, 1, 12, 4), (30, 6, 2, 5, 2), (40, 13, 3, 6, 12), (9, 4, 1, 16, 4)]


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("length, kernel, dilation, size, stride", AXES)
def test_tiles_cover_every_pair_once(length, kernel, dilation, size, stride, by_key):
    members, _ = reference.windows(length, kernel, dilation, stride=stride)
    expected = torch.zeros(length, length, dtype=torch.int32)
    expected.scatter_(1, members, 1)
    found = torch.zeros_like(expected)
    tiles, kinds = geometry.axis(length, kernel, dilation, size, by_key, stride)
    for row, column, number in tiles:
        kind = kinds[number]
        assert len(kind.meets) <= size and all(low <= high for low, high in kind.meets)
        assert column == row + dilation * kind.shift
        for i, (low, high) in enumerate(kind.meets):
            found[row + dilation * i, column + dilation * low : column + dilation * high + 1 : dilation] += 1
    assert torch.equal(found.T if by_key else found, expected)


@pytest.mark.parametrize("by_key", [False, True])
def test_tiles_of_windows_without_overlap_reach_no_further(by_key):
    from visionattn.ops.neighborhood import tuning

    rest = (56, 56), (7, 7), by_key, (7, 7)
    assert tuning.shape(64, *rest) == (7, 7)
    for rows, columns in ((16, 49), (32, 49), (64, 49), (128, 98)):
        tile = tuning.shape(rows, *rest)
        walk = geometry.walk((56, 56), (7, 7), (1, 1), tile, 64, by_key, 256, (7, 7))
        assert walk.rows.columns * walk.columns.columns == columns and walk.whole
        assert walk.classes == (1 if rows >= 64 else 2 if rows == 32 else 4)
    given = tuning.Tile(7, 7, 64, 4, 2)
    found = tuning.candidates(given, (56, 56), (7, 7), (1, 1), (7, 7), by_key)
    assert found[0] == given and all(7 % tile.height == 0 or tile.height < 7 for tile in found)


@pytest.mark.parametrize("block, whole, parts", [
    (64, 256, ((0, 64), (64, 64), (128, 64), (192, 16))),
    (128, 256, ((0, 128), (128, 64), (192, 16))),
    (64, 0, ((0, 16),)),
])  # fmt: skip
def test_halos_are_taken_whole_or_walked_over(block, whole, parts):
    walk = geometry.walk((28, 28), (7, 7), (1, 1), (8, 8), block, whole=whole)
    assert walk.rows.columns * walk.columns.columns == 14 * 14
    assert walk.parts == parts and walk.whole == (whole > 0)
    assert 32 * walk.words >= walk.rest + block * max(map(walk.chunks, walk.rows.kinds)) >= 14 * 14


def test_tiles_of_a_class_leave_their_sums_side_by_side():
    walk = geometry.walk((20, 23), (5, 5), (1, 1), (4, 8), 32, whole=256)
    places, classes = geometry.order(walk, 3)
    assert sorted(places.tolist()) == list(range(walk.tiles))
    pairs = [(y[2], x[2]) for y in walk.rows.tiles for x in walk.columns.tiles]
    for place, (y, x) in zip(places.tolist(), pairs, strict=True):
        first, count = classes[y * len(walk.columns.kinds) + x, :2].tolist()
        assert first <= 3 * place < first + count
    assert classes[:, 1].sum() == 3 * walk.tiles


def test_bias_of_nan_is_seen():
    q, k, v = torch.randn(3, 1, 6, 6, 2, 8, device=DEVICE).unbind(0)
    bias = torch.zeros(2, 5, 5, device=DEVICE)
    bias[0, 2, 2] = torch.nan  # of every pixel with itself
    with use_backend("triton"):
        out = neighborhood_attention(q, k, v, 3, bias=bias)
    assert out[:, :, :, 0].isnan().all() and not out[:, :, :, 1].isnan().any()


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_offsets_of_31_bits_are_served(axis):
    from visionattn.ops.neighborhood import launch

    x = torch.empty(1, 8, 8, 8, 16, device="meta")
    far = list(x.stride())
    assert launch.serves(x, x, x, None, (3, 3))
    far[axis] = 2**29
    far = torch.empty_strided(x.shape, far, device="meta")
    assert not any(launch.serves(*(far if i == n else x for i in range(3)), None, (3, 3)) for n in range(3))


def test_calls_of_one_geometry_share_tables_and_graphs_keep_them(monkeypatch):
    from visionattn.ops.neighborhood import launch

    plans = launch._forward_plans, launch._backward_plans
    for plan in (*plans, launch._recorded):
        plan.clear()
    launch._tables.cache_clear()
    monkeypatch.setattr(launch, "_capturing", lambda device: True)
    bias = torch.zeros(1, 5, 5, device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        for n in (1, 2):
            x = torch.randn(n, 6, 6, 1, 8, device=DEVICE, requires_grad=True)
            neighborhood_attention(x, x, x, 3, bias=bias).sum().backward()
    assert launch._tables.cache_info().misses == 3  # of queries and keys, and of queries without a tail
    assert sum(len(tiles.more) for tiles in launch._recorded) == 2 * 3
    assert len(launch._recorded) == 2 * 4  # of both batches the forward and backward kernels
    launch._recorded.clear()


def test_tables_do_not_follow_the_default_device():
    with torch.device("meta"):
        walk = geometry.walk((9, 8), (3, 5), (2, 1), (4, 4), 32)
        tensors = geometry.table(walk, True), geometry.words(walk, False), *geometry.splits(walk, 2, 9)
    assert all(x.device.type == "cpu" for x in tensors)
