"""Linear layers and MLPs: the one-node form of a GPU's training (in the interpreter without one) against float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch.utils.flop_counter import FlopCounterMode

from visionattn.ops import linear, mlp, use_backend
from visionattn.ops.linear import autograd

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter has no bfloat16
RELATIVE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NAMES = ("x", "weight1", "bias1", "weight2", "bias2")


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def given(lead, C, D, E, dtype, kind, layout="contiguous"):
    """Leaves in ``kind`` whose numbers ``dtype`` has, and the map in its layout."""
    g = torch.Generator().manual_seed(1)
    wide = {"slice": 3 * C}.get(layout, C)
    shapes = ((*lead, wide), (D, C), (D,), (E, D), (E,))
    scales = (1.0, C**-0.5, 0.3, D**-0.5, 0.3)
    leaves = []
    for shape, scale in zip(shapes, scales, strict=True):
        x = torch.randn(shape, generator=g, dtype=torch.float64) * scale
        leaves.append(x.to(DEVICE, dtype).to(kind).requires_grad_())
    views = {
        "contiguous": lambda x: x,
        "slice": lambda x: x[..., C : 2 * C],
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels_first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    }
    return leaves, [views[layout](leaves[0]), *leaves[1:]]


def results(sizes, dtype, kind, backend, form="mlp", without=(), frozen=(), layout="contiguous", watch=None):
    leaves, tensors = given(*sizes, dtype, kind, layout)
    named = dict(zip(NAMES, tensors, strict=True))
    named.update({name: None for name in without}, **{name: named[name].detach() for name in frozen})
    if form == "linear":
        named = {name: named[name] for name in NAMES[:3]}
    with use_backend(backend):
        out = (mlp if form == "mlp" else linear)(*named.values())
    if watch is not None:
        watch.append(type(out.grad_fn).__name__)
    wanted = [name for name in named if name not in without and name not in frozen]
    loss = (out.double().sin() + 0.3 * out.double()).sum()
    grads = torch.autograd.grad(loss, [leaves[NAMES.index(name)] for name in wanted])
    return {"out": out, **dict(zip(wanted, grads, strict=True))}


def compare(sizes, dtype=torch.float32, **kwargs):
    nodes = []
    expected = results(sizes, dtype, torch.float64, "eager", **kwargs)
    actual = results(sizes, dtype, dtype, "triton", watch=nodes, **kwargs)
    assert nodes[0] in ("_LinearBackward", "_MlpBackward", "ViewBackward0")
    for name in expected:
        assert actual[name].dtype == dtype
        assert_close(name, expected[name], actual[name], RELATIVE[dtype])


@pytest.mark.parametrize("form", ["linear", "mlp"])
@pytest.mark.parametrize(
    "sizes",
    [
        ((), 5, 3, 2),
        ((1,), 1, 1, 1),
        ((7,), 33, 10, 33),
        ((2, 5, 7), 64, 96, 64),
        ((1000,), 10, 200, 5),
        ((1, 3, 2, 1, 4), 1024, 20, 12),
    ],
    ids=str,
)
def test_equal_to_float64(sizes, form):
    compare(sizes, form=form)


@pytest.mark.parametrize("form", ["linear", "mlp"])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_close(dtype, form):
    compare(((2, 9, 7), 48, 96, 40), dtype, form=form)


@pytest.mark.parametrize("layout", ["slice", "transposed", "channels_first"])
@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_any_strides_go_in(form, layout):
    compare(((2, 3, 5), 20, 12, 8), form=form, layout=layout)


@pytest.mark.parametrize(
    ("form", "without"),
    [("linear", ("bias1",)), ("mlp", ("bias1",)), ("mlp", ("bias2",)), ("mlp", ("bias1", "bias2"))],
)
def test_biases_may_be_missing(form, without):
    compare(((2, 7), 16, 24, 16), form=form, without=without)


FROZEN = [("x",), ("weight1",), ("bias1",), ("weight1", "bias1"), ("weight2", "bias2"), ("x", "weight1", "bias1")]
FROZEN += [("x", "weight1", "weight2", "bias2"), ("x", "weight1", "bias1", "weight2"), NAMES[1:]]


@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
def test_frozen_parts_of_an_mlp_get_no_gradient_and_change_none(frozen):
    compare(((2, 7), 16, 24, 16), frozen=frozen)


@pytest.mark.parametrize("frozen", [("x",), ("weight1",), ("bias1",), ("x", "weight1"), ("weight1", "bias1")])
def test_frozen_parts_of_a_layer_get_no_gradient_and_change_none(frozen):
    compare(((2, 7), 16, 24, 16), form="linear", frozen=frozen)


@pytest.mark.parametrize("frozen, kept", [((), 5), (("weight1", "bias1", "weight2", "bias2"), 3), (("x",), 4)])
def test_only_what_the_backward_pass_needs_is_kept(frozen, kept):
    _, tensors = given((2, 7), 16, 24, 16, torch.float32, torch.float32)
    named = dict(zip(NAMES, tensors, strict=True))
    named.update({name: named[name].detach() for name in frozen})
    packed = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        mlp(*named.values())
    assert len(packed) == kept


@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_strided_weights(form):
    _, (x, *parameters) = given((2, 7), 16, 24, 16, torch.float32, torch.float32)
    strided = [p.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for p in parameters]
    assert not strided[0].is_contiguous()
    found = []
    with use_backend("triton"):
        for given_parameters in (parameters, strided):
            args = [x, *given_parameters][: 5 if form == "mlp" else 3]
            for autocast in (False, True):
                with torch.autocast(DEVICE, torch.float16, enabled=autocast):
                    out = (mlp if form == "mlp" else linear)(*args)
                found.append([out, *torch.autograd.grad(out.double().sin().sum(), args)])
    for expected, actual in (found[0::2], found[1::2]):
        for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
            assert_close(str(i), e, a, 1e-5 if e.dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "slice"])
def test_gradients_of_any_strides_come_back(kind):
    views = {
        "expanded": lambda g: g[:1, :1].expand(g.shape),
        "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
        "slice": lambda g: torch.cat((g, g), -1)[..., : g.shape[-1]],
    }
    leaves, tensors = given((3, 4), 16, 24, 16, torch.float32, torch.float32)
    with use_backend("triton"):
        for out, wanted in ((mlp(*tensors), leaves), (linear(*tensors[:3]), leaves[:3])):
            grad = views[kind](torch.randn(out.shape, device=DEVICE))
            actual = torch.autograd.grad(out, wanted, grad, retain_graph=True)
            expected = torch.autograd.grad(out, wanted, grad.contiguous())
            for e, a in zip(expected, actual, strict=True):  # of other strides PyTorch may take another product
                assert_close("gradient", e, a, 1e-6)


def test_more_rows_than_programs_hold(monkeypatch):
    from visionattn.ops.linear import launch

    for name, value in dict(PROGRAMS=3, TILE=256, GELU_TILE=128).items():
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(launch, "_plans", launch.Plans())
    for sizes in (((37,), 40, 70, 8), ((131,), 64, 96, 32)):
        compare(sizes)
        compare(sizes, form="linear")
        compare(sizes, frozen=("bias1",))


def test_slope_of_gelu_is_exact_to_float32():
    from visionattn.ops.linear import launch

    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    wide = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(wide).sum(), wide)
    given_x = x.float().to(DEVICE)[:, None].contiguous()
    actual = torch.ones_like(given_x)
    assert launch.gelu_grad(given_x, actual, None, None) == (None, None)
    assert (actual[:, 0].cpu().double() - expected).abs().max() < 5e-7


@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_two_runs_are_equal(form):
    sizes = (3, 50), 40, 24, 16
    first, second = (results(sizes, torch.float32, torch.float32, "triton", form=form) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("form", ["linear", "mlp"])
@pytest.mark.parametrize("input_dtype", [torch.float32, "half"])
def test_autocast_sets_the_dtype_of_results_and_parameters_that_of_gradients(input_dtype, form, half):
    input_dtype = half if input_dtype == "half" else input_dtype
    _, (x, *parameters) = given((2, 9, 7), 48, 96, 40, half, torch.float32)
    x = x.detach().to(input_dtype).requires_grad_()
    args = [x, *parameters][: 5 if form == "mlp" else 3]
    function, found = (mlp if form == "mlp" else linear), []
    wide = [y.detach().double().requires_grad_() for y in args]
    for tensors, autocast in ((args, True), (wide, False)):
        with use_backend("triton"), torch.autocast(DEVICE, half, enabled=autocast):
            out = function(*tensors)
        found.append([out, *torch.autograd.grad(out.double().sin().sum(), tensors)])
    actual, expected = found
    assert actual[0].dtype == half and actual[0].grad_fn.name() in ("_LinearBackward", "_MlpBackward")
    assert [g.dtype for g in actual[1:]] == [y.dtype for y in args]
    for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
        assert_close(str(i), e, a, RELATIVE[half])


@pytest.mark.parametrize("together", [1, 5])
def test_casts_are_the_same_however_many_share_a_launch(monkeypatch, together):
    from visionattn.ops.linear import launch

    monkeypatch.setattr(launch, "TOGETHER", together)
    monkeypatch.setattr(launch, "_casts", launch.Plans())
    _, (_, *parameters) = given((1,), 40, 70, 9, torch.float32, torch.float32)
    parameters = [p.detach() for p in parameters]
    for part in (parameters, parameters[:3], parameters[1:3], parameters[:1]):
        cast = launch.cast(part, torch.float16)
        assert all(torch.equal(c, p.half()) and c.is_contiguous() for c, p in zip(cast, part, strict=True))
        assert all(c is p for c, p in zip(launch.cast(part, torch.float32), part, strict=True))


def test_backward_inside_autocast_changes_nothing():
    leaves, tensors = given((2, 7), 16, 24, 16, torch.float32, torch.float32)
    with use_backend("triton"):
        out = mlp(*tensors)
        expected = torch.autograd.grad(out.sin().sum(), leaves, retain_graph=True)
        with torch.autocast(DEVICE, torch.float16):
            actual = torch.autograd.grad(out.sin().sum(), leaves)
    assert all(torch.equal(e, a) for e, a in zip(expected, actual, strict=True))


@pytest.mark.parametrize("changed", [0, 1])
def test_what_is_changed_before_the_backward_pass_is_noticed(changed):
    _, tensors = given((2, 3, 7), 16, 24, 16, torch.float32, torch.float32)
    for function, args in ((linear, tensors[:3]), (mlp, tensors)):
        with use_backend("triton"):
            out = function(*args)
        with torch.no_grad():
            args[changed].mul_(2)
        with pytest.raises(RuntimeError, match="inplace"):
            out.sum().backward()


def test_results_may_be_changed_in_place():
    grads = {}
    for backend in ("eager", "triton"):
        leaves, tensors = given((2, 7), 16, 24, 16, torch.float32, torch.float32)
        with use_backend(backend):
            out = mlp(*tensors).relu_() + linear(*tensors[:3])[..., :16].mul_(0.5)
        grads[backend] = torch.autograd.grad(out.sin().sum(), leaves)
    for name, expected, actual in zip(NAMES, grads["eager"], grads["triton"], strict=True):
        assert_close(name, expected, actual, 2e-5)


def test_second_derivative_is_refused():
    _, tensors = given((2, 7), 16, 24, 16, torch.float32, torch.float32)
    for function, args in ((linear, tensors[:3]), (mlp, tensors)):
        with use_backend("triton"):
            (grad,) = torch.autograd.grad(function(*args).cos().sum(), args[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


# which implementation runs


def count(monkeypatch):
    """Calls of the one-node forms from now on."""
    calls = []
    for name in ("linear", "mlp"):
        run = getattr(autograd, name)
        monkeypatch.setattr(autograd, name, lambda *args, run=run: calls.append(args) or run(*args))
    return calls


def plain(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_other_backends_give_what_pytorch_gives(monkeypatch, backend):
    calls = count(monkeypatch)
    _, tensors = given((2, 7), 16, 24, 16, torch.float32, torch.float32)
    with use_backend(backend):
        assert torch.equal(linear(*tensors[:3]), F.linear(*tensors[:3]))
        assert torch.equal(mlp(*tensors), plain(*tensors))
    assert not calls


def test_what_has_no_kernel_or_needs_none_is_left_to_pytorch(monkeypatch):
    calls = count(monkeypatch)
    _, tensors = given((2, 7), 16, 24, 16, torch.float32, torch.float32)
    cases = {
        "double": [t.double() for t in tensors],
        "no rows": [tensors[0][:0], *tensors[1:]],
        "frozen": [t.detach() for t in tensors],
        "no channels": [tensors[0][..., :0], tensors[1][:, :0], *tensors[2:]],
        "scalar bias": [*tensors[:4], tensors[4][:1]],
    }
    with use_backend("triton"):
        for args in cases.values():
            assert torch.equal(mlp(*args), plain(*args))
        assert torch.equal(linear(tensors[0], tensors[1], tensors[2][:1]), F.linear(*tensors[:2], tensors[2][:1]))
        with torch.no_grad():
            assert torch.equal(mlp(*tensors), plain(*tensors))
        assert not calls
        mlp(*tensors), linear(*tensors[:3])
    assert len(calls) == 2


def test_casts_without_a_gradient_are_one_launch(monkeypatch):
    calls = count(monkeypatch)
    _, tensors = given((2, 3, 7), 16, 24, 16, torch.float32, torch.float32)
    found = {}
    for backend in ("eager", "triton"):
        with use_backend(backend), torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            found[backend] = linear(*tensors[:3]), mlp(*tensors)
    assert len(calls) == 2
    for expected, actual in zip(*found.values(), strict=True):
        assert actual.dtype == torch.bfloat16 and not actual.requires_grad
        assert_close("out", expected, actual, 1e-2)


def test_what_does_not_fit_is_named_by_pytorch():
    _, (x, w1, b1, w2, b2) = given((2, 7), 16, 24, 16, torch.float32, torch.float32)
    with use_backend("triton"):
        for args in ((x[..., :5], w1, b1), (x, w1, b1[:7]), (x, w1.half(), b1), (x, w1, b1.double())):
            with pytest.raises(RuntimeError):
                linear(*args)
        for args in ((x, w1, b1, w2[:, :3], b2), (x, w1, b1, w2, b1), (x, w1, b1, w2.half(), b2)):
            with pytest.raises(RuntimeError):
                mlp(*args)


def test_whoever_watches_the_calls_sees_those_of_pytorch(monkeypatch):
    calls = count(monkeypatch)
    _, tensors = given((4, 2), 16, 24, 16, torch.float32, torch.float32)
    x, *rest = tensors
    x = x.detach()
    with use_backend("triton"):
        with FlopCounterMode(display=False) as counter:
            mlp(x, *rest)
        assert counter.get_total_flops() == 2 * 8 * (16 * 24 + 24 * 16)
        frozen = [y.detach() for y in rest]  # a trace takes no others as constants
        torch.jit.trace(lambda x: mlp(x, *frozen), tensors[0], check_trace=False)
        per_row = torch.func.vmap(lambda row: mlp(row, *rest))(x)
        slope = torch.func.grad(lambda x: mlp(x, *rest).cos().sum())(x)
        compiled = torch.compile(lambda x: linear(mlp(x, *rest), *rest[:2]), fullgraph=True, backend="aot_eager")(x)
        assert not calls
    assert_close("compiled", F.linear(plain(x, *rest), *rest[:2]), compiled, 1e-6)
    assert_close("rows", plain(x, *rest), per_row, 1e-6)
    assert slope.shape == x.shape


def test_subclasses_of_parameters_are_left_to_pytorch(monkeypatch):
    class Quantised(torch.Tensor):
        pass

    calls = count(monkeypatch)
    _, (x, weight, bias, *_) = given((4, 2), 16, 24, 16, torch.float32, torch.float32)
    with use_backend("triton"):
        linear(x, weight.detach().as_subclass(Quantised), bias)
        assert not calls
        linear(x, torch.nn.Parameter(weight.detach()), bias)
    assert len(calls) == 1
