"""Sums around scaled channels: the fused forms do what the modules do, and leave changed modules alone."""

import pytest
import torch
from helpers import assert_close
from timm.layers import DropPath
from torch import nn

from visionattn.layers import ChannelAffine, add_scaled, channel_affine, update_last
from visionattn.ops import use_backend

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("where_kernels_run")


@pytest.fixture
def served(watch):
    """Names of the operators that ran."""
    return watch(channel_affine, "affine_add", "affine_join")


def scale(dim=12):
    module = ChannelAffine(dim)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


def hooked(module):
    module.register_forward_hook(lambda module, given, out: 3 * out)
    return module


class Other(ChannelAffine):
    def forward(self, x):
        return super().forward(x).sin()


def results(function, modules, *maps):
    wanted = [*maps, *(p for module in modules for p in module.parameters() if p.requires_grad)]
    torch.manual_seed(3)
    out = function(*modules, *(x.permute(0, 3, 1, 2) for x in maps))
    return (out, *torch.autograd.grad(out.sin().sum(), wanted))


def compare(function, plain, modules, *maps):
    expected = results(plain, modules, *maps)
    assert all(torch.equal(e, a) for e, a in zip(expected, results(function, modules, *maps), strict=True))
    with use_backend("triton"):
        actual = results(function, modules, *maps)
    for e, a in zip(expected, actual, strict=True):
        assert_close("out or gradient", e, a, 1e-6)
    return actual[0]


SERVED = {
    "plain": (scale, nn.Identity),
    "drops": (scale, lambda: DropPath(0.4)),
    "drops without gain": (scale, lambda: DropPath(0.4, scale_by_keep=False)),
    "drops all": (scale, lambda: DropPath(1.0)),
    "evaluation": (scale, lambda: DropPath(0.4).eval()),
    "frozen": (lambda: scale().requires_grad_(False), nn.Identity),
}
OTHERS = {
    "identity": (nn.Identity, lambda: DropPath(0.4)),
    "hook": (lambda: hooked(scale()), nn.Identity),
    "hook on the branch": (scale, lambda: hooked(nn.Identity())),
    "subclass": (lambda: Other(12), nn.Identity),
    "other branch": (scale, nn.Tanh),
}


@pytest.mark.parametrize("name", [*SERVED, *OTHERS])
def test_sum_is_that_of_the_modules(name, served):
    modules = [make() for make in {**SERVED, **OTHERS}[name]]
    x, y = torch.randn(2, 5, 4, 3, 12).requires_grad_().unbind()
    out = compare(add_scaled, lambda s, d, x, y: s(x) + d(y), modules, x, y)
    assert served == (["affine_add"] if name in SERVED else [])
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["plain", "frozen", "hook", "subclass"])
def test_update_is_that_of_the_modules(name, served):
    modules = [scale(), {**SERVED, **OTHERS}[name][0]()]
    x, y = torch.randn(2, 5, 4, 20).requires_grad_(), torch.randn(2, 5, 4, 12).requires_grad_()

    def plain(s, t, x, y):
        return torch.cat((x[:, :8], s(x[:, 8:]) + t(y)), dim=1)

    out = compare(update_last, plain, modules, x, y)
    assert served == (["affine_join"] if name in SERVED else [])
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_other_layouts_are_left_to_the_modules(served):
    modules, x = (scale(), nn.Identity()), torch.randn(2, 12, 5, 4)
    with use_backend("triton"):
        assert torch.equal(add_scaled(*modules, x, x), modules[0](x) + x)
        add_scaled(*modules, x.to(memory_format=torch.channels_last), x)
    assert not served


def test_autocast_sets_the_dtype():
    modules, x = (scale(), nn.Identity()), torch.randn(2, 5, 4, 12).permute(0, 3, 1, 2)
    with torch.autocast(DEVICE, torch.float16), use_backend("triton"):
        out = add_scaled(*modules, x, x)
    assert out.dtype == torch.float16
    assert_close("out", modules[0](x) + x, out.float(), 1e-3)


def test_a_traced_graph_names_the_modules():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.drop = scale(), DropPath(0.1)

        def forward(self, x, y):
            return add_scaled(self.scale, self.drop, x, y)

    block, x = Block().eval(), torch.randn(2, 12, 5, 4)
    graph = torch.fx.symbolic_trace(block)
    targets = [node.target for node in graph.graph.nodes if node.op in ("call_module", "get_attr")]
    assert "scale.weight" in targets or "scale" in targets
    assert torch.equal(graph(x, x), block(x, x))
