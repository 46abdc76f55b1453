"""Neighbourhood operators against the published results, Python loops, and the plain form."""

import itertools

import pytest
import torch
from helpers import assert_close, assert_golden, inputs, load_reference

from visionattn.ops import neighborhood_attention, neighborhood_sum, use_backend
from visionattn.ops.neighborhood.reference import windows
from visionattn.ops.neighborhood.tiles import first_keys, segments

OPS = torch.ops.visionattn
BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])


def strided(x, text):
    """``x`` at a stride like ``"[..., ::8]"``."""
    return x if text == "all" else x[..., :: int(text.split("::")[1].rstrip("]"))]


def published_cases():
    for name in ("na2d_14x14", "na2d_15x23"):
        for case in load_reference(f"layers/{name}")[0]["cases"]:
            yield name, case


@BACKENDS
@pytest.mark.parametrize("name, case", list(published_cases()))
def test_attention_equals_published(name, case, backend):
    manifest, stored = load_reference(f"layers/{name}")
    args = manifest["cases"][case]
    k = args["kernel_size"]
    q, key, v = (inputs(**manifest["inputs"][x]).requires_grad_() for x in "qkv")
    rpb = inputs((2, 2 * k - 1, 2 * k - 1), 3).requires_grad_() if args["rel_pos_bias"] else None
    with use_backend(backend):
        out = neighborhood_attention(q, key, v, k, tuple(args["dilation"]), rpb)
    assert_golden("out", stored[case], strided(out, manifest["strides"]["output"]))
    if args["grad"]:
        (out * inputs(out.shape, 4)).sum().backward()
        for label, x in (("dq", q), ("dk", key), ("dv", v)):
            assert_golden(label, stored[f"{case}.{label}"], strided(x.grad, manifest["strides"]["dq, dk, dv"]))
        assert_golden("drpb", stored[f"{case}.drpb"], rpb.grad)


@BACKENDS
@pytest.mark.parametrize("name", ["na2d_k7", "na2d_k3x5_d2x1"])
def test_attention_equals_stored_operator(name, backend):
    manifest, stored = load_reference(f"ops/{name}")
    x = {key: inputs(**spec).requires_grad_(key != "grad_out") for key, spec in manifest["inputs"].items()}
    args = x["q"], x["k"], x["v"], tuple(manifest["params"]["kernel"]), tuple(manifest["params"]["dilation"])
    with use_backend(backend):
        assert_golden("out_no_bias", stored["out_no_bias"], neighborhood_attention(*args))
        out = neighborhood_attention(*args, x["rpb"])
    assert_golden("out", stored["out"], out)
    out.backward(x["grad_out"])
    for label in ("q", "k", "v", "rpb"):
        assert_golden(label, stored[f"d{label}"], x[label].grad)


@BACKENDS
def test_sum_equals_published(backend):
    manifest, stored = load_reference("layers/na2d_av")
    for case, args in manifest["cases"].items():
        H, W, k = args["H"], args["W"], args["kernel_size"]
        weights, v = inputs((1, 4, H, W, k * k), 0).requires_grad_(), inputs((1, 4, H, W, 8), 1).requires_grad_()
        logits, value = weights.permute(0, 4, 1, 2, 3), v.permute(0, 2, 3, 1, 4)
        with use_backend(backend):
            out = neighborhood_sum(logits, value, [k]).permute(0, 3, 1, 2, 4)
            raw = neighborhood_sum(logits, value, [k], softmax=False).permute(0, 3, 1, 2, 4)
        assert_golden(case, stored[case], out[..., ::2])
        if f"{case}.raw" in stored:
            assert_golden("raw", stored[f"{case}.raw"], raw[..., ::2])
            (raw * inputs(raw.shape, 2)).sum().backward()
            assert_golden("dattn", stored[f"{case}.dattn"], weights.grad[..., ::3])
            assert_golden("dv", stored[f"{case}.dv"], v.grad)
    manifest, stored = load_reference("ops/na2d_av_k7")
    logits, v, grad = (inputs(**manifest["inputs"][x]) for x in ("logits", "v", "grad_out"))
    logits.requires_grad_(), v.requires_grad_()
    with use_backend(backend):
        out = neighborhood_sum(logits.permute(0, 4, 1, 2, 3), v.permute(0, 2, 3, 1, 4), [7]).permute(0, 3, 1, 2, 4)
    out.backward(grad)
    for label, x in (("out", out), ("dlogits", logits.grad), ("dv", v.grad)):
        assert_golden(label, stored[label], x)


AXES = [(7, 7, 1, 1), (9, 3, 1, 1), (15, 7, 2, 1), (23, 5, 3, 1), (12, 3, 4, 1)]
AXES += [(23, 7, 1, 2), (21, 7, 1, 7), (31, 5, 2, 3), (20, 6, 1, 4), (27, 4, 2, 4), (17, 8, 1, 8)]


@pytest.mark.parametrize("length, kernel, dilation, stride", AXES)
def test_windows_follow_the_rule(length, kernel, dilation, stride):
    positions, relative = windows(length, kernel, dilation, stride=stride)
    for i in range(length):
        group = list(range(i % dilation, length, dilation))
        place = group.index(i)
        leader = min(place // stride * stride + stride // 2, len(group) - 1)
        start = min(max(leader - kernel // 2, 0), len(group) - kernel)
        assert positions[i].tolist() == group[start : start + kernel]
        assert relative[i].tolist() == [start + j - place + kernel - 1 for j in range(kernel)]


@pytest.mark.parametrize("kernel", range(1, 11))
def test_every_query_lies_in_its_own_window(kernel):
    """So relative positions stay in the table, and every key has a query, whatever remains of the last group."""
    for length, stride in itertools.product(range(kernel, 3 * kernel + 3), range(1, kernel + 1)):
        positions, relative = windows(length, kernel, 1, stride=stride)
        own = torch.arange(length)[:, None]
        assert (positions == own).any(1).all() and torch.equal(relative, positions - own + kernel - 1)
        assert relative.min() >= 0 and relative.max() <= 2 * kernel - 2 and (positions.diff(dim=0) >= 0).all()
        assert tuple(positions[:, 0].tolist()) == first_keys(length, kernel, stride)


@pytest.mark.parametrize("size", [1, 3, 4, 8, 30])
@pytest.mark.parametrize("length, kernel, dilation, stride", AXES)
def test_segments_cover_every_query_once(length, kernel, dilation, stride, size):
    positions, relative = windows(length, kernel, dilation, stride=stride)
    seen = []
    for shape, found in segments(length, kernel, dilation, size, stride).items():
        for segment in found:
            queries, keys = (list(range(length))[x] for x in segment)
            assert len(keys) == shape.keys <= (kernel if size <= stride == kernel else length)
            for i, query in list(enumerate(queries))[shape.skip :]:
                assert keys[shape.starts[i] : shape.starts[i] + kernel] == positions[query].tolist()
                assert shape.relative[i] == relative[query, 0]
                seen.append(query)
    assert sorted(seen) == list(range(length))


def attention_inputs(size, heads, d, kernel, bias, dtype=torch.float64):
    x = [torch.randn(*size, heads, d, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]
    shape = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    return [*x, torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() if bias else None]


CASES = [
    dict(size=(2, 9, 11), heads=2, d=3, kernel=(3, 5), dilation=(2, 1)),
    dict(size=(3, 17, 20), heads=1, d=4, kernel=(7, 7), dilation=(1, 2)),
    dict(size=(1, 7, 7), heads=3, d=2, kernel=(7, 7), dilation=(1, 1)),
    dict(size=(2, 13, 29), heads=2, d=5, kernel=(1, 3), dilation=(3, 4)),
    dict(size=(1, 30, 19), heads=2, d=8, kernel=(13, 9), dilation=(2, 1)),
    dict(size=(2, 19, 22), heads=2, d=3, kernel=(7, 5), dilation=(1, 2), stride=(3, 4)),
    dict(size=(1, 28, 15), heads=1, d=4, kernel=(7, 7), dilation=(1, 1), stride=(7, 7)),
    dict(size=(2, 16, 13), heads=2, d=4, kernel=(8, 4), dilation=(1, 1), stride=(8, 2)),
    dict(size=(1, 29, 40), heads=2, d=2, kernel=(13, 11), dilation=(2, 1), stride=(13, 1)),
]
RELATIVE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_plain_form(case, bias, dtype):
    *tensors, table = attention_inputs(case["size"], case["heads"], case["d"], case["kernel"], bias, dtype)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in (*tensors, table)]
    results = []
    for backend, given in (("reference", exact), ("auto", [*tensors, table])):
        given_tensors = [x for x in given if x is not None]
        with use_backend(backend):
            out = neighborhood_attention(
                *given[:3], case["kernel"], case["dilation"], given[3], stride=case.get("stride", 1)
            )
        loss = (out * inputs(out.shape, 1).to(out.dtype)).sum()
        results.append((out, *torch.autograd.grad(loss, given_tensors)))
    for label, expected, actual in zip(("out", "dq", "dk", "dv", "dbias"), *results, strict=False):
        assert_close(label, expected, actual, RELATIVE[dtype])


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("size, kernels", [((2, 14, 14), (5, 13)), ((1, 7, 9), (5, 7)), ((2, 15, 23), (3,))])
def test_sum_equals_plain_form(size, kernels, softmax, dtype):
    B, H, W = size
    logits = torch.randn(B, sum(k * k for k in kernels), 2, H, W, dtype=torch.float64).to(dtype)
    value = torch.randn(B, H, W, 2 * len(kernels), 3, dtype=torch.float64).to(dtype)
    tables = [torch.randn(2, 2 * k - 1, 2 * k - 1, dtype=torch.float64).to(dtype) for k in kernels]
    results = []
    for backend, kind in (("reference", torch.float64), ("auto", dtype)):
        given = [x.to(kind).requires_grad_() for x in (logits, value, *tables)]
        with use_backend(backend):
            out = neighborhood_sum(given[0], given[1], kernels, given[2:], softmax)
        loss = (out * inputs(out.shape, 1).to(out.dtype)).sum()
        results.append((out, *torch.autograd.grad(loss, given)))
    for label, expected, actual in zip(("out", "dlogits", "dvalue", "db1", "db2"), *results, strict=False):
        assert_close(label, expected, actual, RELATIVE[dtype])


def test_gradients_equal_differences():
    *x, table = attention_inputs((1, 5, 6), 2, 2, (3, 3), True)
    for rest in ((), ([2, 3],)):
        rest = [3, 3], [1, 2], 0.5, *rest
        operator = lambda *a, rest=rest: OPS.neighborhood_attention(*a, *rest)  # noqa: E731
        assert torch.autograd.gradcheck(
            operator, (*x, table), fast_mode=True
        )  # in random directions: the rest takes minutes
    logits = torch.randn(1, 34, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, 5, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 25 + 81, dtype=torch.float64, requires_grad=True)
    for softmax in (True, False):
        assert torch.autograd.gradcheck(
            lambda *a, s=softmax: OPS.neighborhood_sum(*a, [3, 5], s)[: 2 if s else 1],
            (logits, value, bias),
            fast_mode=True,
        )


@pytest.mark.parametrize("bias", [False, True])
def test_operators_are_registered_properly(bias):
    *x, table = attention_inputs((2, 8, 9), 2, 4, (3, 5), bias, torch.float32)
    rest = [3, 5], [2, 1], 0.5
    torch.library.opcheck(OPS.neighborhood_attention, (*x, table, *rest))
    torch.library.opcheck(OPS.neighborhood_attention, (*x, table, *rest, [3, 2]))
    given = [None if a is None else a.detach() for a in (*x, table)]
    out, lse = OPS.neighborhood_attention(*given, *rest, [3, 2])
    grads = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(OPS.neighborhood_attention_backward, (*grads, *given, out, lse, *rest, [3, 2]))
    logits, value = torch.randn(2, 34, 2, 7, 8, requires_grad=True), torch.randn(2, 7, 8, 4, 3, requires_grad=True)
    tables = torch.randn(2, 25 + 81, requires_grad=True) if bias else None
    torch.library.opcheck(OPS.neighborhood_sum, (logits, value, tables, [3, 5], True))


def test_autocast_takes_the_dtype_of_the_call():
    *x, table = attention_inputs((1, 7, 7), 2, 4, (3, 3), True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert neighborhood_attention(*x, 3, 1, table).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert neighborhood_attention(*x, 3, 1, table).dtype == torch.float16


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kernel_size=4), r"kernel_size=\(4, 4\) must be odd and"),
        (dict(kernel_size=4, stride=3), r"\(4, 4\) must be odd \(or even where stride=\(3, 3\) is\)"),
        (dict(stride=0), r"stride=\(0, 0\) must be at least 1"),
        (dict(stride=(1, 4)), r"stride=\(1, 4\) .* at most kernel_size=\(3, 3\).*in width choose 1 .* to 3"),
        (dict(kernel_size=(3, 9)), r"at least 9 pixels in width, got 8x7"),
        (dict(dilation=3), r"at least 9 pixels in height"),
        (dict(dilation=0), "dilation"),
        (dict(key=torch.zeros(1, 8, 7, 2, 3)), "alike"),
        (dict(value=torch.zeros(1, 8, 7, 2, 4).half()), "one float dtype"),
        (dict(bias=torch.zeros(2, 3, 5)), r"bias must be \[2, 5, 5\]"),
    ],
)
def test_wrong_arguments_of_attention_are_named(change, message):
    x = torch.zeros(1, 8, 7, 2, 4)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**{**dict(query=x, key=x, value=x, kernel_size=3), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kernel_sizes=[3, 7]), r"logits must be \[B, 58"),
        (dict(kernel_sizes=[5, 3], biases=[torch.zeros(2, 5, 5)] * 2), "biases must be"),
        (dict(value=torch.zeros(1, 8, 7, 3, 4)), "groups"),
    ],
)
def test_wrong_arguments_of_sum_are_named(change, message):
    given = dict(logits=torch.zeros(1, 34, 2, 8, 7), value=torch.zeros(1, 8, 7, 4, 4), kernel_sizes=[3, 5])
    with pytest.raises(ValueError, match=message):
        neighborhood_sum(**{**given, **change})
    with pytest.raises(ValueError, match="at least 9 pixels"):
        neighborhood_sum(torch.zeros(1, 81, 1, 8, 9), torch.zeros(1, 8, 9, 1, 2), [9])


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_windows_of_all_pixels_equal_a_loop(stride):
    q, k, v = (torch.randn(1, 6, 5, 1, 3, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 5, 5, dtype=torch.float64)
    out = neighborhood_attention(q, k, v, 3, 1, bias, 0.7, stride)
    first = {  # of the rows and of the columns
        1: ([0, 0, 1, 2, 3, 3], [0, 0, 1, 2, 2]),
        2: ([0, 0, 2, 2, 3, 3], [0, 0, 2, 2, 2]),
        3: ([0, 0, 0, 3, 3, 3], [0, 0, 0, 2, 2]),
    }
    for y, x in itertools.product(range(6), range(5)):
        top, left = first[stride][0][y], first[stride][1][x]
        pixels = [(top + a, left + b) for a in range(3) for b in range(3)]
        scores = torch.stack([0.7 * k[0, i, j, 0] @ q[0, y, x, 0] + bias[0, i - y + 2, j - x + 2] for i, j in pixels])
        expected = scores.softmax(0) @ torch.stack([v[0, i, j, 0] for i, j in pixels])
        assert_close("pixel", expected, out[0, y, x, 0], 1e-12)


@BACKENDS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [(7, 7), (4, 3)])
def test_stride_of_the_kernel_is_window_attention(kernel, bias, backend):
    size, heads, d = (2, 4 * kernel[0], 3 * kernel[1]), 2, 5
    *x, table = attention_inputs(size, heads, d, kernel, bias)
    with use_backend(backend):
        out = neighborhood_attention(*x, kernel, 1, table, stride=kernel)

    def split(x):  # [windows, heads, pixels, d]
        x = x.unflatten(2, (-1, kernel[1])).unflatten(1, (-1, kernel[0])).permute(0, 1, 3, 5, 2, 4, 6)
        return x.flatten(4, 5).flatten(0, 2)

    mask = None
    if bias:
        y, x_ = (torch.arange(k) for k in kernel)
        y, x_ = (x[None] - x[:, None] + len(x) - 1 for x in (y, x_))  # key less query
        mask = table[:, y[:, None, :, None], x_[None, :, None, :]].flatten(3).flatten(1, 2)
    joined = torch.nn.functional.scaled_dot_product_attention(*map(split, x), mask)
    given = [*x, *([table] if bias else [])]
    weights = torch.randn_like(out)
    expected = joined, *torch.autograd.grad((joined * split(weights)).sum(), given)
    actual = split(out), *torch.autograd.grad((out * weights).sum(), given)
    for label, e, a in zip(("out", "dq", "dk", "dv", "dbias"), expected, actual, strict=False):
        assert_close(label, e, a, 1e-12)


def test_stride_goes_through_compilers():
    q, k, v = torch.randn(3, 2, 9, 11, 1, 4).unbind(0)
    expected = neighborhood_attention(q, k, v, (3, 5), (2, 1), stride=(2, 5))
    assert not torch.equal(expected, neighborhood_attention(q, k, v, (3, 5), (2, 1)))

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return neighborhood_attention(q, k, v, (3, 5), (2, 1), stride=(2, 5))

    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)
    exported = torch.export.export(Module(), (q, k, v)).module()
    for run in (compiled, exported):
        assert torch.equal(run(q, k, v), expected)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiled_calls_check_their_arguments_when_they_run(backend):
    compiled = torch.compile(neighborhood_attention, backend="eager", dynamic=True)
    x = torch.zeros(1, 5, 5, 1, 4)
    with use_backend(backend), pytest.raises(ValueError, match="at least 7 pixels"):
        compiled(x, x, x, 7)
    operator = torch.ops.visionattn.neighborhood_sum
    with use_backend(backend), pytest.raises(ValueError, match=r"table of biases must be \[1, 25\]"):
        operator(torch.zeros(1, 9, 1, 5, 5), x, torch.zeros(1, 9), [3], True)


def test_tensors_are_on_one_device():
    x, bias = torch.zeros(1, 5, 5, 1, 4), torch.zeros(1, 5, 5, device="meta")
    with pytest.raises(ValueError, match="on one device, got cpu, meta"):
        neighborhood_attention(x, x, x, 3, bias=bias)
    with pytest.raises(ValueError, match="on one device, got cpu, meta"):
        neighborhood_sum(torch.zeros(1, 9, 1, 5, 5), x, [3], [bias])
