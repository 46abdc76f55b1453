"""Prepared launches: what reaches the kernel, and what is checked before."""

import pytest
import torch

from visionattn.ops import depthwise_conv, layer_norm, linear, routed_attention, use_backend

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Recorder:
    """Stands for a kernel and keeps the arguments of its launches."""

    arg_names = ("x", "scale", "n", "BLOCK")

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((grid, args, options))


def test_numbers_arrive_as_floats_and_sizes_as_integers():
    from visionattn.ops._launch import Launch

    kernel, x = Recorder(), torch.zeros(4, device=DEVICE)
    Launch(kernel, (2,), (3,), dict(BLOCK=16), num_warps=1)(x, 1)
    ((grid, args, options),) = kernel.calls
    assert grid == (2, 1, 1)
    assert args[0] is x
    assert args[1:] == (1.0, 3)
    assert type(args[1]) is float  # Triton would make a constant of the integer 1
    assert type(args[2]) is int
    assert options == dict(BLOCK=16, num_warps=1, num_stages=2)


def test_plans_forget_the_oldest():
    from visionattn.ops._launch import Plans

    plans = Plans(limit=2)
    for key in "abc":
        plans.keep(key, key)
    assert list(plans) == ["b", "c"]


def test_a_search_passes_over_tiles_that_cannot_be_prepared_or_launched(monkeypatch, caplog):
    from visionattn.ops import _tiles

    launched = []
    monkeypatch.setattr(_tiles, "milliseconds", lambda run: (run(), 1.0)[1])

    def prepare(tile):
        if tile == "wide":
            raise ValueError("too many programs")

        def launch(x):
            if tile == "high":
                raise RuntimeError("too much shared memory")
            launched.append(tile)

        return launch

    x = torch.zeros(1, device=DEVICE)
    with caplog.at_level("INFO", logger="visionattn"):
        _tiles.Search("sum", ["wide", "high", "small"], prepare)(x)
    assert launched == ["small"] * 3  # for its results, its time and the call
    wide, high, fastest = caplog.messages
    assert wide == "sum: wide does not work: too many programs"
    assert high == "sum: high does not work: too much shared memory"
    assert fastest.startswith("sum: fastest of 1 is small")
    with pytest.raises(RuntimeError, match="no tile of 2 works for sum"):
        _tiles.Search("sum", ["wide", "high"], prepare)(x)


def test_a_search_passes_over_tiles_with_other_results(monkeypatch, caplog):
    from visionattn.ops import _tiles

    times = {"usual": 3.0, "rounded": 2.0, "wrong": 1.0, "not a number": 1.0}
    values = {"usual": 1.0, "rounded": 1.001, "wrong": 1.5, "not a number": float("nan")}
    order = iter([times["usual"], times["rounded"]])
    monkeypatch.setattr(_tiles, "milliseconds", lambda run: (run(), next(order))[1])

    def prepare(tile):
        return lambda x, out: out.copy_(x * values[tile])

    x = torch.tensor([3.0, float("inf"), -2.0], device=DEVICE)
    out = torch.empty_like(x)
    with caplog.at_level("INFO", logger="visionattn"):
        _tiles.Search("product", list(times), prepare)(x, out)
    assert torch.equal(out, x * values["rounded"])
    assert [message.split(";")[0] for message in caplog.messages] == [
        "product: wrong gives other results", "product: not a number gives other results",
        "product: fastest of 2 is rounded, 2.0000 ms",
    ]  # fmt: skip


@pytest.mark.parametrize("scale", [1, 0.125, 2])
def test_scale_may_be_an_integer(scale):
    q, k, v = torch.randn(3, 1, 8, 8, 1, 16, device=DEVICE)
    index = torch.zeros(1, 1, 4, 1, dtype=torch.int32, device=DEVICE)
    with use_backend("triton"):
        actual, _ = routed_attention(q, k, v, index, (4, 4), scale=scale)
    with use_backend("reference"):
        expected, _ = routed_attention(q, k, v, index, (4, 4), scale=scale)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_table_is_refused_however_it_comes():
    q = torch.randn(1, 8, 8, 1, 16, device=DEVICE)
    index = torch.zeros(1, 1, 2, 1, dtype=torch.int32, device=DEVICE)
    with use_backend("triton"):
        for _ in range(2):
            with pytest.raises(ValueError, match="index must be"):
                torch.ops.visionattn.routed_attention(q, q, q, index, (4, 4), (4, 4), 1.0)
            with pytest.raises(ValueError, match="index must be"):
                routed_attention(q, q, q, index, (4, 4))
    with pytest.raises(ValueError, match="height and a width"):
        routed_attention(q, q, q, index, (4,))


def test_parameters_may_be_slices():
    pairs = torch.randn(8, 2, device=DEVICE)
    x, kernel = torch.randn(2, 5, 7, 8, device=DEVICE), torch.randn(8, 1, 3, 3, device=DEVICE)
    calls = [lambda: layer_norm(x, pairs[:, 0], pairs[:, 1]), lambda: depthwise_conv(x, kernel, pairs[:, 1])]
    for call in calls:
        with use_backend("triton"):
            actual = call()
        with use_backend("reference"):
            torch.testing.assert_close(actual, call(), rtol=1e-4, atol=1e-5)


def test_tensors_of_a_convolution_must_be_on_one_device():
    x, kernel = torch.randn(1, 5, 7, 8, device=DEVICE), torch.randn(8, 1, 3, 3, device=DEVICE)
    with pytest.raises(ValueError, match="one device"):
        depthwise_conv(x, kernel, torch.zeros(8, device="meta"))


@pytest.mark.parametrize("frozen", [True, False])
def test_tangents_of_forward_mode_pass(frozen):
    weight, square = torch.randn(4, 1, 3, 3, device=DEVICE), torch.randn(4, 4, device=DEVICE)
    ones = torch.ones(4, device=DEVICE).requires_grad_(not frozen)
    operators = {
        "norm": lambda x: layer_norm(x, ones, ones),
        "convolution": lambda x: depthwise_conv(x, weight, ones),
        "linear": lambda x: linear(x, square, ones),
    }
    x, direction = torch.randn(2, 1, 5, 6, 4, device=DEVICE)
    for name, operator in operators.items():
        tangents = []
        for backend in ("triton", "eager"):
            with use_backend(backend), torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, direction)
                tangents.append(torch.autograd.forward_ad.unpack_dual(operator(dual)).tangent)
        assert tangents[0] is not None, name
        torch.testing.assert_close(tangents[0], tangents[1])


def test_a_penalty_on_a_gradient_does_not_quietly_lose_its_share():
    weight = torch.randn(4, 4, device=DEVICE).requires_grad_()
    x = torch.randn(3, 4, device=DEVICE).requires_grad_()
    with use_backend("triton"):  # the gradient that comes in is a constant, that of x is not
        (grad,) = torch.autograd.grad(linear(x, weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad.square().sum() + x.sum()).backward()
