"""Depthwise convolution: the definition by hand, and the Triton kernels (in the interpreter without a GPU)."""

import math

import pytest
import torch
from helpers import assert_close
from torch.utils.flop_counter import FlopCounterMode

from visionattn.ops import depthwise_conv, use_backend
from visionattn.ops.depthwise import eager

pytest.importorskip("triton")
OPS = torch.ops.visionattn
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter has no bfloat16
RELATIVE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

# batch, map, channels, kernel
CASES = dict(
    single_pixel=dict(size=(2, 1, 1), C=10, kernel=(3, 3)),
    one_row=dict(size=(1, 1, 19), C=33, kernel=(3, 5)),
    odd=dict(size=(2, 5, 7), C=10, kernel=(5, 5)),
    full_slice=dict(size=(1, 8, 16), C=64, kernel=(3, 3)),
    part_of_a_slice=dict(size=(1, 6, 9), C=96, kernel=(5, 3)),
    several_slices=dict(size=(1, 4, 5), C=200, kernel=(1, 3)),
    large_kernel=dict(size=(1, 9, 6), C=8, kernel=(7, 7)),
    pointwise=dict(size=(3, 5, 4), C=33, kernel=(1, 1)),
)
# the same of kernels with a loop over their columns, where a map may be smaller than the kernel
LARGE = dict(
    whole_map=dict(size=(2, 5, 4), C=10, kernel=(7, 9)),
    strips=dict(size=(1, 30, 3), C=5, kernel=(7, 3)),
    dilated=dict(size=(2, 7, 5), C=33, kernel=(3, 3), dilation=2),
    dilated_strips=dict(size=(1, 35, 2), C=5, kernel=(5, 3), dilation=2),
    beyond_the_map=dict(size=(1, 6, 9), C=3, kernel=(3, 5), dilation=7),
    several_slices=dict(size=(1, 2, 3), C=80, kernel=(1, 7)),
    largest=dict(size=(1, 4, 5), C=1, kernel=(19, 19)),
)
TERMS = {"bias and residual": (True, "other"), "bare": (False, None), "on itself": (True, "x")}


def by_hand(x, weight, bias=None, residual=None, dilation=1):
    """Pixel by pixel."""
    H, W, kh, kw = *x.shape[1:3], *weight.shape[2:]
    out = torch.zeros_like(x) if residual is None else residual.clone()
    for y in range(H):
        for z in range(W):
            for i in range(kh):
                for j in range(kw):
                    row, column = y + (i - kh // 2) * dilation, z + (j - kw // 2) * dilation
                    if 0 <= row < H and 0 <= column < W:
                        out[:, y, z] += x[:, row, column] * weight[:, 0, i, j]
    return out if bias is None else out + bias


def given(case, dtype, kind, layout="slice"):
    """Leaves in ``kind`` of numbers that ``dtype`` has, and map, weight, bias and residual from them."""
    C, g = case["C"], torch.Generator().manual_seed(1)
    shapes = (*case["size"], 3 * C), (C, 1, *case["kernel"]), (C,), (*case["size"], 3 * C)
    leaves = []
    for shape, scale in zip(shapes, (1.0, math.prod(case["kernel"]) ** -0.5, 1.0, 1.0), strict=True):
        of_map = shape[-1] == 3 * C
        # outputs of about 1, whatever the kernel: a sine, the loss below, would enlarge the errors of large ones
        x = scale * torch.randn(shape, generator=g, dtype=torch.float64)
        x = x.to(DEVICE, dtype if of_map else torch.float32)
        leaves.append(x.to(kind if of_map or kind == torch.float64 else torch.float32).requires_grad_())
    views = {
        "contiguous": lambda x: x[..., :C].contiguous(),
        "slice": lambda x: x[..., C : 2 * C],
        "transposed": lambda x: x[..., :C].transpose(1, 2).contiguous().transpose(1, 2),
        "channels_first": lambda x: x[..., :C].movedim(3, 1).contiguous().movedim(1, 3),
    }
    x, weight, bias, residual = leaves
    return leaves, views[layout](x), weight, bias, views[layout](residual)


def results(case, dtype, kind, backend, terms=(True, "other"), layout="slice"):
    leaves, x, weight, bias, residual = given(case, dtype, kind, layout)
    residual = {"other": residual, "x": x, None: None}[terms[1]]
    leaves = [leaves[0], weight] + [bias] * terms[0] + [leaves[3]] * (terms[1] == "other")
    with use_backend(backend):
        out = depthwise_conv(x, weight, bias if terms[0] else None, residual, case.get("dilation", 1))
        grads = torch.autograd.grad(out.double().sin().sum(), leaves)
    return dict(zip(("out", *(f"grad {i}" for i in range(len(grads)))), (out, *grads), strict=True))


def compare(case, dtype, **kwargs):
    expected = results(case, dtype, torch.float64, "reference", **kwargs)
    actual = results(case, dtype, dtype, "triton", **kwargs)
    for name in expected:
        assert_close(name, expected[name], actual[name], RELATIVE[dtype])


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
@pytest.mark.parametrize("case", [CASES["odd"], CASES["one_row"], LARGE["dilated"]])
def test_equals_a_loop_over_pixels(case, backend):
    _, x, weight, bias, residual = given(case, torch.float32, torch.float32)
    d = case.get("dilation", 1)
    with use_backend(backend):
        assert_close("all", by_hand(x, weight, bias, residual, d), depthwise_conv(x, weight, bias, residual, d), 1e-6)
        assert_close("bare", by_hand(x, weight, dilation=d), depthwise_conv(x, weight, dilation=d), 1e-6)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_float64(name, terms):
    compare(CASES[name], torch.float32, terms=TERMS[terms])


@pytest.mark.parametrize("sizes", [64, 0])
@pytest.mark.parametrize("name", LARGE)
def test_large_kernels_equal_float64(name, sizes, monkeypatch):
    from visionattn.ops.depthwise import launch, launch_large

    for plans in ("_forward", "_weight_grad"):
        monkeypatch.setattr(launch, plans, launch.Plans())
    monkeypatch.setattr(launch_large, "_sizes", set())
    monkeypatch.setattr(launch_large, "SIZES", sizes)
    monkeypatch.setattr(launch_large, "PROGRAMS", 9)
    compare(LARGE[name], torch.float32, terms=TERMS["bare" if sizes else "bias and residual"])
    assert len(launch_large._sizes) == (3 if sizes else 0)


if DEVICE == "cuda":  # too much for the interpreter

    @pytest.mark.parametrize("dtype", [torch.float32, HALF[-1]])
    @pytest.mark.parametrize(
        "side, C, kernel, dilation",
        [
            (56, 64, 17, 1),
            (56, 64, 9, 2),
            (56, 64, 3, 7),
            (28, 112, 15, 1),
            (14, 256, 13, 1),
            (14, 256, 3, 5),
            (7, 80, 7, 1),
            (33, 40, 19, 1),
        ],
    )
    def test_large_kernels_at_full_size(side, C, kernel, dilation, dtype):
        compare(dict(size=(5, side, side), C=C, kernel=(kernel, kernel), dilation=dilation), dtype)


@pytest.mark.parametrize("layout", ["transposed", "channels_first"])
def test_any_strides_go_into_large_kernels(layout):
    compare(LARGE["dilated"], HALF[0], layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_first"])
def test_any_strides_go_in(layout):
    compare(CASES["odd"], torch.float32, layout=layout)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["odd", "full_slice"])
def test_half_precision_is_close(name, dtype):
    compare(CASES[name], dtype)


def test_more_tiles_than_programs(monkeypatch):
    from visionattn.ops.depthwise import launch

    monkeypatch.setattr(launch, "PROGRAMS", 3)
    monkeypatch.setattr(launch, "_weight_grad", launch.Plans())
    compare(dict(size=(3, 9, 21), C=70, kernel=(3, 3)), torch.float32)


@pytest.mark.parametrize("case", [CASES["odd"], CASES["several_slices"], LARGE["dilated"]])
def test_two_runs_are_equal(case):
    first, second = (results(case, torch.float32, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_border_is_zero_whatever_lies_beside_the_map():
    packed = torch.full((2, 5, 7, 30), float("nan"), device=DEVICE)
    packed[:, 1:4, 1:6, 10:20] = torch.randn(2, 3, 5, 10, device=DEVICE)
    x, weight = packed[:, 1:4, 1:6, 10:20], torch.randn(10, 1, 5, 5, device=DEVICE)
    with use_backend("triton"):
        assert_close("out", by_hand(x.contiguous(), weight), depthwise_conv(x, weight), 1e-6)


def test_dtypes_are_promoted_by_the_residual():
    _, x, weight, bias, residual = given(CASES["odd"], torch.float16, torch.float32, "contiguous")
    with use_backend("triton"):
        out = depthwise_conv(x.half(), weight, bias, residual)
        assert_close("out", by_hand(x, weight, bias, residual), out, 1e-6)
        grads = torch.autograd.grad(out.sin().sum(), (x, residual, weight))
        expected = torch.autograd.grad(by_hand(x, weight, bias, residual).sin().sum(), (x, residual, weight))
    assert out.dtype == torch.float32 and all(grad.dtype == torch.float32 for grad in grads)
    for name, e, a in zip(("x", "residual", "weight"), expected, grads, strict=True):
        assert_close(name, e, a, 1e-3)


def test_kernels_give_the_dtype_of_autocast():
    _, x, weight, bias, residual = given(CASES["odd"], torch.float16, torch.float32, "contiguous")
    with use_backend("triton"), torch.autocast(DEVICE, torch.float16):
        half, full = depthwise_conv(x, weight, bias), depthwise_conv(x, weight, bias, residual)
    assert half.dtype == torch.float16 and full.dtype == torch.float32
    assert_close("half", by_hand(x, weight, bias), half, 1e-3)
    assert_close("full", by_hand(x, weight, bias, residual), full, 1e-6)
    grads = torch.autograd.grad(half.float().sin().sum() + full.sin().sum(), (x, weight, bias))
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("frozen", range(4))
def test_only_wanted_gradients_are_computed(frozen, monkeypatch):
    _, x, weight, bias, residual = given(CASES["odd"], torch.float32, torch.float32, "contiguous")
    inputs = [y.detach().requires_grad_(i != frozen) for i, y in enumerate((x, weight, bias, residual))]
    with use_backend("triton"):
        grads = torch.autograd.grad(
            depthwise_conv(*inputs).sin().sum(), [y for y in inputs if y.requires_grad], materialize_grads=True
        )
    expected = torch.autograd.grad(
        by_hand(x, weight, bias, residual).sin().sum(),
        [y for i, y in enumerate((x, weight, bias, residual)) if i != frozen],
    )
    for e, a in zip(expected, grads, strict=True):
        assert_close("grad", e, a, 1e-6)


def test_second_derivative_is_refused():
    _, x, weight, *_ = given(CASES["odd"], torch.float32, torch.float32)
    with use_backend("triton"):
        (grad,) = torch.autograd.grad(depthwise_conv(x, weight).sin().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# the registered operators


VARIANTS = {
    "plain": dict(),
    "grad": dict(grad=True),
    "bare": dict(grad=True, terms=False),
    "float64": dict(grad=True, dtype=torch.float64),
}


def arguments(grad=False, terms=True, dtype=torch.float32):
    shapes = (2, 3, 4, 6), (6, 1, 3, 5), (6,), (2, 3, 4, 6)
    x, weight, bias, residual = (torch.randn(s, device=DEVICE, dtype=dtype, requires_grad=grad) for s in shapes)
    return (x, weight, bias, residual) if terms else (x, weight, None, None)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_operators_pass_opcheck(variant, backend):
    x, weight, bias, residual = arguments(**VARIANTS[variant])
    with use_backend(backend):
        torch.library.opcheck(OPS.depthwise_conv.default, (x, weight, bias, residual))
        torch.library.opcheck(OPS.depthwise_conv.default, (x, weight, bias, residual, 2), test_utils="test_schema")
        x, weight, bias = (None if y is None else y.detach() for y in (x, weight, bias))
        torch.library.opcheck(OPS.depthwise_conv_input_grad.default, (torch.randn_like(x), weight, bias is None))
        torch.library.opcheck(OPS.depthwise_conv_weight_grad.default, (torch.randn_like(x), x, weight, bias))


def test_operator_passes_gradcheck():
    x, weight, bias, residual = arguments(grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(OPS.depthwise_conv.default, (x, weight, bias, residual))
    assert torch.autograd.gradcheck(OPS.depthwise_conv.default, (x, weight, bias, residual, 2))
    assert torch.autograd.gradcheck(lambda x: OPS.depthwise_conv.default(x, weight, None, x), x)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_operator_and_short_way_give_the_same(backend, dilation):
    given = arguments(grad=True)
    with use_backend(backend):
        ways = [function(*given, dilation) for function in (depthwise_conv, OPS.depthwise_conv.default)]
        grads = [torch.autograd.grad(out.sin().sum(), given) for out in ways]
    for e, a in zip((ways[0], *grads[0]), (ways[1], *grads[1]), strict=True):
        assert_close("result", e, a, 1e-6)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiled_equals_eager(backend):
    given = arguments(grad=True)
    counted = []

    def record(graph, inputs):
        counted.extend(str(node.target) for node in graph.graph.nodes if "depthwise_conv" in str(node.target))
        return graph.forward

    with use_backend(backend):
        expected = depthwise_conv(*given)
        torch._dynamo.reset()
        torch.compile(depthwise_conv, fullgraph=True, backend=record)(*given)
        compiled = torch.compile(depthwise_conv, fullgraph=True, backend="aot_eager")
        out = compiled(*given)
        results = [(y, *torch.autograd.grad(y.sin().sum(), given)) for y in (expected, out)]
    for e, a in zip(*results, strict=True):
        assert_close("result", e, a, 1e-6)
    assert bool(counted) == (backend == "triton")


def test_flop_counts_equal_hand_counts():
    x, weight, *_ = arguments(grad=True)
    with FlopCounterMode(display=False) as counter:
        OPS.depthwise_conv(x, weight, None, None).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 3 * 4 * 6) * (3 * 5)


def test_what_no_kernel_serves_is_left_to_pytorch(monkeypatch):
    calls, run = [], eager.direct
    monkeypatch.setattr(eager, "direct", lambda *args: calls.append(args) or run(*args))
    x = torch.randn(1, 4, 5, 6, device=DEVICE)
    with use_backend("triton"):
        wide = torch.randn(6, 1, 21, 1, device=DEVICE)
        assert_close("wide", by_hand(x, wide), depthwise_conv(x, wide), 1e-6)
        weight = torch.randn(6, 1, 3, 3, device=DEVICE)
        assert_close("double", by_hand(x, weight).double(), depthwise_conv(x.double(), weight.double()), 1e-6)
        assert depthwise_conv(x[:0], weight).shape == (0, 4, 5, 6)
        per_image = torch.func.vmap(lambda x: depthwise_conv(x[None], weight)[0])(x)
        assert_close("vmap", by_hand(x, weight), per_image, 1e-6)
        assert not calls
        depthwise_conv(x, weight)
    assert len(calls) == 1


WRONG = {
    "axes": (lambda x, w: depthwise_conv(x[0], w), r"\[B, H, W, C\].*got \(4, 5, 6\)"),
    "channels": (lambda x, w: depthwise_conv(x, w[:3]), r"got \(1, 4, 5, 6\) and \(3, 1, 3, 3\)"),
    "even": (lambda x, w: depthwise_conv(x, w[:, :, :2]), r"odd sides, got 2 x 3"),
    "bias": (lambda x, w: depthwise_conv(x, w, torch.zeros(1)), r"bias \[6\], got \(1,\)"),
    "dilation": (lambda x, w: depthwise_conv(x, w, dilation=0), "at least 1, got 0"),
    "residual": (lambda x, w: depthwise_conv(x, w, None, x[:, :1]), r"shape of x, got \(1, 1, 5, 6\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_argument_is_named(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 4, 5, 6), torch.zeros(6, 1, 3, 3))
