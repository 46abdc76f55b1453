"""Routed attention the ways a GPU is used: compiled, replayed, under autocast, deterministic, on a second device.

Every mode runs wherever it can: with the eager kernels on the CPU, and with the Triton kernels on a GPU, or else in
Triton's interpreter. Where no graph can be recorded, its replay is the call itself.
"""

from collections.abc import Callable

import pytest
import timm
import torch
from helpers import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import visionattn  # noqa: F401  (registers the models)
from visionattn.ops import region_mean, routed_attention, topk_regions, use_backend

pytest.importorskip("triton")
TRITON = "triton on cuda" if torch.cuda.is_available() else "triton interpreted"
PLACES = {"eager on cpu": ("cpu", "eager"), TRITON: (TRITON.split()[-1].replace("interpreted", "cpu"), "triton")}


@pytest.fixture(params=PLACES)
def device(request):
    """Device of a place, with its kernels in force."""
    device, backend = PLACES[request.param]
    with use_backend(backend):
        yield device


class Operators(nn.Module):
    """All operators in a row on a packed map ``[B, 6, 9, 3, 2, 16]`` with regions of 2 x 3 pixels."""

    def forward(self, qkv):
        q, k, v = qkv.unbind(3)
        index = topk_regions(region_mean(q.flatten(3), (2, 3)), region_mean(k.flatten(3), (2, 3)), 2)
        return routed_attention(q, k, v, index, (2, 3))


class Model(nn.Module):
    """The small BiFormer, in training, as a function to a tuple."""

    def __init__(self):
        super().__init__()
        self.model = timm.create_model("test_biformer", num_classes=10)

    def forward(self, images):
        return (self.model(images),)


# the interpreter is slow; at 64 pixels the model needs both families of kernels
SIZES = {Operators: (6, 9, 3, 2, 16), Model: (3, 64, 64) if torch.cuda.is_available() else (3, 32, 32)}
BOTH = pytest.mark.parametrize("kind", SIZES)


def batch(kind: type[nn.Module], n: int, device: str) -> Tensor:
    return torch.randn(n, *SIZES[kind]).to(device).requires_grad_()


def with_gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Outputs, and the gradients of input and parameters."""
    outputs = module(x)
    loss = sum(y.float().sin().sum() for y in outputs)
    return *outputs, *torch.autograd.grad(loss, [x, *module.parameters()])


@pytest.mark.slow
@BOTH
def test_one_compiled_graph_serves_all_batches(kind, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    module = kind().to(device)
    counter = CompileCounterWithBackend("aot_eager" if device == "cpu" else "inductor")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    rel = 1e-5 if kind is Operators else 1e-3  # normalisation over a batch of few values amplifies rounding
    # at least 3 images: of 2, batch norm over a map of one pixel leaves nothing but their order, and no gradient
    for n, stance in ((4, "default"), (3, "fail_on_recompile"), (5, "fail_on_recompile")):
        x = batch(kind, n, device)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance(stance):
            actual = with_gradients(compiled, x)
        expected = with_gradients(module, x)
        outputs = len(expected) - 1 - len(list(module.parameters()))
        for i in range(outputs + 1):
            assert_close(f"output or gradient {i} of {n}", expected[i], actual[i], rel)
        if kind is Model:  # as one vector: some of the gradients are 0 but for rounding
            pair = (torch.cat([g.flatten() for g in grads[outputs + 1 :]]) for grads in (expected, actual))
            assert_close(f"parameters' gradients of {n}", *pair, rel)
    assert counter.frame_count == 1


def replayable(module: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """``with_gradients`` of whatever is in ``x`` at the time of the call, as a CUDA graph where there is one."""
    if x.device.type == "cpu":
        return lambda: with_gradients(module, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            with_gradients(module, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = with_gradients(module, x)

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


@BOTH
def test_replayed_graph_gives_the_same_bits(kind, device):
    module, x = kind().to(device), batch(kind, 2, device)
    replay = replayable(module, x)
    before = [y.clone() for y in replay()]
    with torch.no_grad():
        x.copy_(torch.randn(x.shape))
    actual = [y.clone() for y in replay()]
    assert not torch.equal(before[0], actual[0])
    for i, expected in enumerate(with_gradients(module, x)):
        assert torch.equal(expected, actual[i]), f"result {i} differs"


def test_autocast_equals_an_explicit_cast(device, request):
    # the interpreter has no bfloat16
    dtype = torch.float16 if "interpreted" in request.node.callspec.id else torch.bfloat16
    index = torch.randint(9, (2, 1, 9, 3), dtype=torch.int32).to(device)
    qkv = batch(Operators, 2, device)
    results = []
    for cast in (False, True):
        with torch.autocast(device, dtype, enabled=not cast):
            parts = [x.to(dtype) if cast else x for x in qkv.unbind(3)]
            out, lse = routed_attention(*parts, index, (2, 3))
        (grad,) = torch.autograd.grad(out.float().sin().sum() + lse.sin().sum(), qkv)
        assert (out.dtype, lse.dtype, grad.dtype) == (dtype, torch.float32, torch.float32)
        results.append((out, lse, grad))
    for name, implicit, explicit in zip(("out", "lse", "gradient"), *results, strict=True):
        assert torch.equal(implicit, explicit), f"{name} differs"


def test_deterministic_mode_changes_no_bit_of_the_operators(device):
    qkv = batch(Operators, 2, device)
    results = []
    for mode in (False, True):
        torch.use_deterministic_algorithms(mode)  # conftest.py puts it back
        results.append(with_gradients(Operators(), qkv))
    for i, (plain, deterministic) in enumerate(zip(*results, strict=True)):
        assert torch.equal(plain, deterministic), f"result {i} differs"


def test_deterministic_mode_takes_a_model(device):
    torch.use_deterministic_algorithms(True)
    module, x = Model().to(device), batch(Model, 2, device)
    first, second = (with_gradients(module, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


if torch.cuda.device_count() > 1:

    def test_second_device_works_while_the_first_is_current():
        torch.cuda.set_device(0)
        qkv = batch(Operators, 2, "cuda:0")
        there = qkv.detach().to("cuda:1").requires_grad_()
        for i, (expected, actual) in enumerate(
            zip(with_gradients(Operators(), qkv), with_gradients(Operators(), there), strict=True)
        ):
            assert actual.device == there.device and torch.equal(expected.cpu(), actual.cpu()), f"result {i} differs"
        assert torch.cuda.current_device() == 0
