"""Modules called through operators: by whom they are served, and that nothing attached to them is lost."""

import copy

import pytest
import timm.layers
import torch
from helpers import assert_close
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune

from visionattn.layers import (
    ChannelsLast,
    MapSequential,
    ResidualDepthwiseConv,
    add_normalize,
    channels_last,
    convolve,
    normalize,
    on_map,
    project,
    transform,
)
from visionattn.ops import use_backend

X = torch.Size((2, 5, 7, 12))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("where_kernels_run")


@pytest.fixture
def served(watch):
    """Names of the operators that ran."""
    return watch(channels_last, "layer_norm", "add_layer_norm", "depthwise_conv", "linear", "mlp")


def depthwise(**kwargs):
    return nn.Conv2d(12, 12, 3, **{**dict(padding=1, groups=12), **kwargs})


def strides(x):
    """Those that say anything: an axis of one value has any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def with_attribute(module, name, value):
    setattr(module, name, value)
    return module


def with_hook(module, register, hook):
    getattr(module, register)(hook)
    return module


class Adapter(nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.base(x) * self.gain


class DoubledConv(nn.Conv2d):
    """Another forward under the same attributes."""

    def forward(self, x):
        return 2 * super().forward(x)


SERVED_NORMS = {
    "torch": lambda: nn.LayerNorm(12),
    "timm": lambda: timm.layers.LayerNorm(12),
    "frozen": lambda: nn.LayerNorm(12).requires_grad_(False),
}
OTHER_NORMS = {
    "identity": nn.Identity,
    "rms": lambda: timm.layers.RmsNorm(12),
    "without weight": lambda: nn.LayerNorm(12, elementwise_affine=False),
    "without bias": lambda: nn.LayerNorm(12, bias=False),
    "two axes": lambda: nn.LayerNorm((7, 12)),
    "fast": lambda: with_attribute(timm.layers.LayerNorm(12), "_fast_norm", True),
    "adapter": lambda: Adapter(nn.LayerNorm(12)),
    "hook": lambda: with_hook(nn.LayerNorm(12), "register_forward_hook", lambda module, args, out: 3 * out),
    "pre-hook": lambda: with_hook(nn.LayerNorm(12), "register_forward_pre_hook", lambda module, args: (args[0] ** 2,)),
    "patched": lambda: with_attribute(nn.LayerNorm(12), "forward", lambda x: x.sin()),
}


@pytest.mark.parametrize("name", [*SERVED_NORMS, *OTHER_NORMS])
def test_norms_do_what_the_module_does(name, served):
    norm, (x, delta) = {**SERVED_NORMS, **OTHER_NORMS}[name](), torch.randn(2, *X)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(normalize(norm, x), norm(x))
    total, out = add_normalize(norm, x, delta)
    assert torch.equal(total, x + delta) and torch.equal(out, norm(x + delta))
    assert served == (["layer_norm", "add_layer_norm"] if name in SERVED_NORMS else [])


SERVED_CONVS = {
    "plain": depthwise,
    "without bias": lambda: depthwise(bias=False),
    "dilated": lambda: depthwise(dilation=2, padding=2),
    "oblong": lambda: nn.Conv2d(12, 12, (1, 5), padding=(0, 2), groups=12),
}
OTHER_CONVS = {
    "identity": nn.Identity,
    "dense": lambda: nn.Conv2d(12, 12, 3, padding=1),
    "grouped": lambda: depthwise(groups=4),
    "reflecting": lambda: depthwise(padding_mode="reflect"),
    "padded by name": lambda: depthwise(padding="same"),
    "even": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(12, 12, 2, groups=12)),
    "adapter": lambda: Adapter(depthwise()),
    "subclass": lambda: DoubledConv(12, 12, 3, padding=1, groups=12),
    "weight norm": lambda: parametrizations.weight_norm(depthwise()),
    "hook": lambda: with_hook(depthwise(), "register_forward_hook", lambda module, args, out: 3 * out),
    "gradient hook": lambda: with_hook(
        depthwise(), "register_full_backward_hook", lambda module, grads, out: (3 * grads[0],)
    ),
    "patched": lambda: with_attribute(depthwise(), "forward", lambda x: x.sin()),
}


@pytest.mark.parametrize("name", [*SERVED_CONVS, *OTHER_CONVS])
def test_convolutions_do_what_the_module_does(name, served):
    conv = {**SERVED_CONVS, **OTHER_CONVS}[name]()
    x, residual = torch.randn(2, *X).requires_grad_().unbind()
    expected = residual + conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    actual = convolve(conv, x, residual)
    assert torch.equal(actual, expected)
    grads = [torch.autograd.grad(out.sin().sum(), (x, residual)) for out in (expected, actual)]
    for e, a in zip(*grads, strict=True):
        assert_close("gradient", e, a, 1e-6)
    assert served == (["depthwise_conv"] if name in SERVED_CONVS else [])


class DoubledLinear(nn.Linear):
    """Another forward under the same attributes."""

    def forward(self, x):
        return 2 * super().forward(x)


SERVED_LINEARS = {
    "plain": lambda: nn.Linear(12, 7),
    "without bias": lambda: nn.Linear(12, 7, bias=False),
    "frozen": lambda: nn.Linear(12, 7).requires_grad_(False),
    "slice": lambda: with_attribute(nn.Linear(12, 14), "weight", nn.Parameter(torch.randn(28, 12)[::2])),
}
OTHER_LINEARS = {
    "identity": nn.Identity,
    "adapter": lambda: Adapter(nn.Linear(12, 7)),
    "subclass": lambda: DoubledLinear(12, 7),
    "lazy": lambda: nn.LazyLinear(7),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(12, 7)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(12, 7), "weight", 9),
    "hook": lambda: with_hook(nn.Linear(12, 7), "register_forward_hook", lambda module, args, out: 3 * out),
    "gradient hook": lambda: with_hook(
        nn.Linear(12, 7), "register_full_backward_hook", lambda module, grads, out: (3 * grads[0],)
    ),
    "patched": lambda: with_attribute(nn.Linear(12, 7), "forward", lambda x: x.sin()),
}


@pytest.mark.parametrize("name", [*SERVED_LINEARS, *OTHER_LINEARS])
def test_linear_layers_do_what_the_module_does(name, served):
    layer, x = {**SERVED_LINEARS, **OTHER_LINEARS}[name](), torch.randn(X).requires_grad_()
    actual, expected = project(layer, x), layer(x)
    assert torch.equal(actual, expected)
    grads = [torch.autograd.grad(out.sin().sum(), x)[0] for out in (expected, actual)]
    assert torch.equal(*grads)
    assert served == (["linear"] if name in SERVED_LINEARS else [])


def mlp(part=None, change=None, **kwargs):
    """timm's MLP, of which one part is replaced or changed."""
    module = timm.layers.Mlp(12, 20, **kwargs)
    if part is not None:
        setattr(module, part, change(getattr(module, part)))
    return module


SERVED_MLPS = {
    "plain": mlp,
    "without biases": lambda: mlp(bias=False),
    "one bias": lambda: mlp(bias=(True, False)),
    "dropout in evaluation": lambda: mlp(drop=0.5).eval(),
    "frozen": lambda: mlp().requires_grad_(False),
}
OTHER_MLPS = {
    "identity": nn.Identity,
    "tanh": lambda: mlp("act", lambda act: nn.GELU(approximate="tanh")),
    "relu": lambda: mlp(act_layer=nn.ReLU),
    "norm": lambda: mlp(norm_layer=nn.LayerNorm),
    "dropout": lambda: mlp(drop=0.5),
    "gated": lambda: timm.layers.GluMlp(12, 20),
    "adapter": lambda: mlp("fc1", lambda fc1: nn.Sequential(fc1, nn.Tanh())),
    "subclass": lambda: mlp("fc2", lambda fc2: DoubledLinear(20, 12)),
    "weight norm": lambda: mlp("fc1", parametrizations.weight_norm),
    "hook": lambda: with_hook(mlp(), "register_forward_hook", lambda module, args, out: 3 * out),
    "patched": lambda: with_attribute(mlp(), "forward", lambda x: x.sin()),
    **{
        f"hook on {part}": lambda part=part: mlp(
            part, lambda inner: with_hook(inner, "register_forward_hook", lambda module, args, out: 3 * out)
        )
        for part in ("fc1", "act", "drop1", "norm", "fc2", "drop2")
    },
    "patched fc1": lambda: mlp("fc1", lambda fc1: with_attribute(fc1, "forward", lambda x: nn.Linear.forward(fc1, -x))),
}


@pytest.mark.parametrize("name", [*SERVED_MLPS, *OTHER_MLPS])
def test_mlps_do_what_the_module_does(name, served):
    module, x = {**SERVED_MLPS, **OTHER_MLPS}[name](), torch.randn(X).requires_grad_()
    found = []
    for function in (lambda x: transform(module, x), module):
        torch.manual_seed(1)
        out = function(x)
        found.append((out, *torch.autograd.grad(out.sin().sum(), x)))
    assert all(torch.equal(a, e) for a, e in zip(*found, strict=True))
    assert served == (["mlp"] if name in SERVED_MLPS else [])


@pytest.mark.parametrize("name", [*SERVED_CONVS, *OTHER_CONVS])
def test_maps_with_channels_inside_go_to_the_kernels(name, served):
    pytest.importorskip("triton")
    conv, x = {**SERVED_CONVS, **OTHER_CONVS}[name](), torch.randn(X).permute(0, 3, 1, 2)
    row = MapSequential(conv, nn.GELU())
    expected = nn.Sequential(conv, nn.GELU())(x)
    assert torch.equal(row(x), expected) and not served  # no kernels on a CPU
    with use_backend("triton"):
        assert_close("out", expected, row(x), 1e-6)
        assert served == (["depthwise_conv"] if name in SERVED_CONVS else [])
        assert_close("rearranged", expected, row(x.contiguous()), 1e-6)
    assert len(served) == (name in SERVED_CONVS)
    if name == "plain":
        assert torch.equal(torch.jit.script(row)(x), expected)
        names = [node.target for node in torch.fx.symbolic_trace(row).graph.nodes if node.op == "call_module"]
        assert names == ["0", "1"]


SERVED_POINTWISE = {
    "plain": lambda: nn.Conv2d(12, 7, 1),
    "without bias": lambda: nn.Conv2d(12, 7, 1, bias=False),
    "frozen": lambda: nn.Conv2d(12, 7, 1).requires_grad_(False),
    "padded by name": lambda: nn.Conv2d(12, 7, 1, padding="same"),
    "channels last": lambda: nn.Conv2d(12, 7, 1).to(memory_format=torch.channels_last),
}
OTHER_POINTWISE = {
    "strided": lambda: nn.Conv2d(12, 7, 1, stride=2),
    "padded": lambda: nn.Conv2d(12, 7, 1, padding=1),
    "grouped": lambda: nn.Conv2d(12, 8, 1, groups=4),
    "adapter": lambda: Adapter(nn.Conv2d(12, 7, 1)),
    "subclass": lambda: DoubledConv(12, 7, 1),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(12, 7, 1)),
    "hook": lambda: with_hook(nn.Conv2d(12, 7, 1), "register_forward_hook", lambda module, args, out: 3 * out),
}


@pytest.mark.parametrize("name", [*SERVED_POINTWISE, *OTHER_POINTWISE])
def test_convolutions_of_single_pixels_are_linear_layers(name, served):
    pytest.importorskip("triton")
    conv, wide = {**SERVED_POINTWISE, **OTHER_POINTWISE}[name](), torch.randn(2, 5, 7, 20).requires_grad_()
    wanted, results = [wide, *(p for p in conv.parameters() if p.requires_grad)], []
    for backend in ("eager", "triton"):
        with use_backend(backend):
            for x in (wide[..., :12], wide[..., 4:16]):  # contexts and maps lie side by side
                out = on_map(conv, x.permute(0, 3, 1, 2))
                results.append((out, *torch.autograd.grad(out.sin().sum(), wanted)))
    for expected, actual in zip(results[:2], results[2:], strict=True):
        for e, a in zip(expected, actual, strict=True):
            assert_close("out or gradient", e, a, 1e-6)
            assert strides(e) == strides(a) or e.dim() == 1
        if name in SERVED_POINTWISE:
            assert actual[0].is_contiguous(memory_format=torch.channels_last)
    assert served == (["linear"] * 2 if name in SERVED_POINTWISE else [])


@pytest.mark.parametrize("frozen", [False, True])
def test_single_pixels_under_autocast(frozen):
    pytest.importorskip("triton")
    conv, x = nn.Conv2d(12, 7, 1).requires_grad_(not frozen), torch.randn(X).permute(0, 3, 1, 2)
    with torch.autocast(DEVICE, torch.float16), use_backend("triton"):
        out = on_map(conv, x)
    assert out.dtype == torch.float16
    assert_close("out", conv(x), out.float(), 2e-3)
    if not frozen:
        grads = torch.autograd.grad(out.float().square().sum(), [conv.weight, conv.bias])
        expected = torch.autograd.grad(conv(x).square().sum(), [conv.weight, conv.bias])
        for e, a in zip(expected, grads, strict=True):
            assert a.dtype == torch.float32
            assert_close("gradient", e, a, 3e-3)


def test_whoever_watches_sees_the_convolution(served):
    from torch.utils.flop_counter import FlopCounterMode

    conv, x = nn.Conv2d(12, 7, 1), torch.randn(X).permute(0, 3, 1, 2)
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        on_map(conv, x)
    assert torch.ops.aten.convolution in counter.get_flop_counts()["Global"] and not served


def test_norms_of_maps_run_by_the_kernel(served):
    pytest.importorskip("triton")
    norm, x = timm.layers.LayerNorm2d(12), torch.randn(X).permute(0, 3, 1, 2)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    expected = norm(x)
    assert torch.equal(on_map(norm, x), expected) and not served  # no kernels on a CPU
    with use_backend("triton"):
        out = on_map(norm, x)
        assert served == ["layer_norm"]
        assert_close("out", expected, out, 1e-6)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert_close("rearranged", expected, on_map(norm, x.contiguous()), 1e-6)
        hooked = with_hook(norm, "register_forward_hook", lambda module, args, out: 3 * out)
        assert_close("hooked", 3 * expected, on_map(hooked, x), 1e-6)
    assert len(served) == 1


def test_residual_convolution_runs_by_the_kernel():
    pytest.importorskip("triton")
    layer, x = ResidualDepthwiseConv(12), torch.randn(X).permute(0, 3, 1, 2)
    expected = layer(x)
    with use_backend("triton"):
        out = layer(x)
    assert_close("out", expected, out, 1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.jit.script(layer)(x), expected)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = depthwise(), nn.LayerNorm(12), nn.LayerNorm(12)
        self.linear, self.mlp = nn.Linear(12, 12), mlp()

    def forward(self, x):
        x = convolve(self.conv, x, x)
        x, y = add_normalize(self.second, x, project(self.linear, normalize(self.first, x)))
        return x + transform(self.mlp, y)


def test_a_traced_graph_names_the_modules(served):
    block, x = Block(), torch.randn(X)
    graph = torch.fx.symbolic_trace(block)
    names = ["conv", "first", "linear", "second", *(f"mlp.{part}" for part in block.mlp._modules)]
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == names
    assert not served
    assert torch.equal(graph(x), block(x))


def test_compiled_equals_eager():
    block, x = Block(), torch.randn(X)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    assert_close("out", block(x), compiled(x), 1e-6)


def test_stem_changes_no_number_and_no_key():
    layers = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.GELU()
    plain, stem = nn.Sequential(*layers), ChannelsLast(*layers)
    assert plain.state_dict().keys() == stem.state_dict().keys()
    x = torch.randn(2, 3, 16, 16)
    assert_close("output", plain(x), stem(x), 1e-6)  # cuDNN has kernels of its own for this order
    assert_close("scripted", stem(x), torch.jit.script(stem)(x), 1e-6)


@pytest.mark.parametrize("device, expected", [("cuda", True), ("cpu", False)])
def test_stem_works_channels_last_on_a_gpu_alone(device, expected):
    with FakeTensorMode():  # knows shapes and strides of tensors on devices that need not be there
        stem = ChannelsLast(nn.Conv2d(3, 8, 3, padding=1, device=device), nn.BatchNorm2d(8, device=device))
        out = stem(torch.randn(2, 3, 16, 16, device=device))
    assert out.is_contiguous(memory_format=torch.channels_last) == expected


def test_hooks_on_all_modules_see_the_call(served):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    norm, linear, block = nn.LayerNorm(12), nn.Linear(12, 12), mlp()
    try:
        transform(block, project(linear, normalize(norm, torch.randn(X))))
    finally:
        handle.remove()
    assert seen == [norm, linear, *block.children(), block]
    assert not served
