"""Operators and models the ways a GPU is used: compiled, replayed, under autocast, deterministic, on a second device.

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
from visionattn.ops import (
    neighborhood_attention,
    neighborhood_sum,
    region_mean,
    routed_attention,
    topk_regions,
    use_backend,
)

pytest.importorskip("triton")
TRITON = "triton on cuda" if torch.cuda.is_available() else "triton interpreted"
PLACES = {"eager on cpu": ("cpu", "eager"), TRITON: (TRITON.split()[-1].replace("interpreted", "cpu"), "triton")}


@pytest.fixture(params=list(PLACES))
def device(request):
    """Device of a place, with its kernels in force."""
    device, backend = PLACES[request.param]
    with use_backend(backend):
        yield device


class Routing(nn.Module):
    """The routing operators in a row on a packed map ``[B, H, W, 3, 2, 16]`` with regions of 2 x 3 pixels."""

    def forward(self, qkv):
        q, k, v = qkv.unbind(3)
        index = topk_regions(region_mean(q.flatten(3), (2, 3)), region_mean(k.flatten(3), (2, 3)), 2)
        return routed_attention(q, k, v, index, (2, 3))


class Windows(nn.Module):
    """The neighbourhood operators in a row on such a map, with dilation and tables of relative positions."""

    def __init__(self):
        super().__init__()
        self.bias, self.table = (nn.Parameter(torch.randn(2, 5, 5)) for _ in range(2))

    def forward(self, qkv):
        q, k, v = qkv.unbind(3)
        out = neighborhood_attention(q, k, v, 3, (1, 2), self.bias)
        return out, neighborhood_sum(q[..., :9].permute(0, 4, 3, 1, 2), out, [3], [self.table])


class BiFormer(nn.Module):
    """The small BiFormer, in training, as a function to a tuple."""

    name = "test_biformer"

    def __init__(self):
        super().__init__()
        self.model = timm.create_model(self.name, num_classes=10)

    def forward(self, images):
        return (self.model(images),)


class NAT(BiFormer):
    """The small NAT, in training."""

    name = "test_nat"


# the interpreter is slow; at 64 pixels BiFormer needs both families of kernels
GPU = torch.cuda.is_available()
IMAGE, MAP = ((3, 64, 64), (6, 9, 3, 2, 16)) if GPU else ((3, 32, 32), (4, 6, 3, 2, 16))
SIZES = {Routing: MAP, Windows: MAP, BiFormer: IMAGE, NAT: IMAGE}
OPERATORS = pytest.mark.parametrize("kind", [Routing, Windows])


def places(*kinds):
    """Pairs of kind and place. What the interpreter could show of a model it shows of its operators, in less time."""
    pairs = [(kind, place) for place in PLACES for kind in kinds]
    pairs = [pair for pair in pairs if "interpreted" not in pair[1] or not issubclass(pair[0], BiFormer)]
    return pytest.mark.parametrize("kind, device", pairs, indirect=["device"])


def batch(kind: type[nn.Module], n: int, device: str) -> Tensor:
    return torch.randn(n, *SIZES[kind]).to(device).requires_grad_()


def with_gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Outputs, and the gradients of input and parameters."""
    outputs = module(x)
    loss = sum(y.float().sin().sum() for y in outputs)
    return *outputs, *torch.autograd.grad(loss, [x, *module.parameters()])


@pytest.mark.slow
@places(Routing, BiFormer, *([Windows, NAT] if GPU else []))
def test_one_compiled_graph_serves_all_batches(kind, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    module = kind().to(device)
    counter = CompileCounterWithBackend("aot_eager" if device == "cpu" else "inductor")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    rel = 1e-3 if issubclass(kind, BiFormer) else 1e-5  # normalisation over a batch of few values amplifies rounding
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
        if len(expected) > outputs + 1:  # as one vector: some of the gradients are 0 but for rounding
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


@places(*SIZES)
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


@OPERATORS
def test_autocast_equals_an_explicit_cast(kind, device, request):
    # the interpreter has no bfloat16
    dtype = torch.float16 if "interpreted" in request.node.callspec.id else torch.bfloat16
    regions = MAP[0] // 2 * MAP[1] // 3
    index = torch.randint(regions, (2, 1, regions, 3), dtype=torch.int32).to(device)
    table, qkv = torch.randn(2, 5, 5).to(device), batch(kind, 2, device)
    results = []
    for cast in (False, True):
        with torch.autocast(device, dtype, enabled=not cast):
            q, k, v = (x.to(dtype) if cast else x for x in qkv.unbind(3))
            logits, value = (x.to(dtype) if cast else x for x in qkv.unbind(3)[::2])  # gradients add up in float32
            if kind is Routing:
                outputs = routed_attention(q, k, v, index, (2, 3))
            else:
                outputs = (
                    neighborhood_attention(q, k, v, 3, (1, 2), table),
                    neighborhood_sum(logits[..., :9].permute(0, 4, 3, 1, 2), value, [3], [table]),
                )
        (grad,) = torch.autograd.grad(sum(y.float().sin().sum() for y in outputs), qkv)
        assert outputs[0].dtype == dtype and grad.dtype == torch.float32
        assert outputs[1].dtype == (torch.float32 if kind is Routing else dtype)
        results.append((*outputs, grad))
    for name, implicit, explicit in zip(("first", "second", "gradient"), *results, strict=True):
        assert torch.equal(implicit, explicit), f"{name} differs"


@OPERATORS
def test_deterministic_mode_changes_no_bit_of_the_operators(kind, device):
    qkv, module = batch(kind, 2, device), kind().to(device)
    results = []
    for mode in (False, True):
        torch.use_deterministic_algorithms(mode)  # conftest.py puts it back
        results.append(with_gradients(module, qkv))
    for i, (plain, deterministic) in enumerate(zip(*results, strict=True)):
        assert torch.equal(plain, deterministic), f"result {i} differs"


@places(BiFormer, NAT)
def test_deterministic_mode_takes_a_model(kind, device):
    torch.use_deterministic_algorithms(True)
    module, x = kind().to(device), batch(kind, 2, device)
    first, second = (with_gradients(module, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


if torch.cuda.device_count() > 1:

    @OPERATORS
    def test_second_device_works_while_the_first_is_current(kind):
        torch.cuda.set_device(0)
        module = kind()
        qkv = batch(kind, 2, "cuda:0")
        there = qkv.detach().to("cuda:1").requires_grad_()
        here = with_gradients(module.to("cuda:0"), qkv)
        for i, (expected, actual) in enumerate(zip(here, with_gradients(module.to("cuda:1"), there), strict=True)):
            assert actual.device == there.device and torch.equal(expected.cpu(), actual.cpu()), f"result {i} differs"
        assert torch.cuda.current_device() == 0
