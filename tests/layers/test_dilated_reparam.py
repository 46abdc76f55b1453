"""The re-parameterisable convolution: what must hold for any weights (``tests/models`` compares published ones)."""

import copy

import pytest
import torch
from helpers import assert_close
from timm.utils import reparameterize_model
from torch import nn

from visionattn.layers import DilatedReparamConv, dilated_reparam
from visionattn.ops import use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("side", [5, 7, 9, 11, 13, 15, 17, 19])
def test_fused_convolution_equals_the_sum(side):
    layer = DilatedReparamConv(3, side, dtype=torch.float64)
    x = torch.randn(4, 3, 21, 18, dtype=torch.float64)
    layer(2 * x + 1)  # running statistics other than 0 and 1
    model = nn.Sequential(layer).eval()
    fused = reparameterize_model(model)
    assert type(fused[0]) is nn.Conv2d and fused[0].kernel_size == (side, side)
    assert not fused[0].training and fused[0].weight.dtype == torch.float64 and fused[0].weight.requires_grad
    assert_close("output", model(x), fused(x), 1e-14)


def test_fused_convolution_of_a_frozen_layer_is_frozen():
    layer = DilatedReparamConv(3, 5).requires_grad_(False)
    assert not any(p.requires_grad for p in layer.fuse().parameters())


# all branches at once, where there are kernels


@pytest.fixture
def together(monkeypatch):
    """One entry for every sum that was computed at once."""
    pytest.importorskip("triton")
    calls, run = [], dilated_reparam.branch_sum
    monkeypatch.setattr(dilated_reparam, "branch_sum", lambda *args: calls.append(args) or run(*args))
    return calls


def prepared(side, C=5, size=(2, 6, 4), dtype=torch.float32):
    """A layer whose norms are not the identity, and a map that is not centred, channels innermost."""
    layer = DilatedReparamConv(C, side).to(DEVICE)
    for branch in (layer.large, *layer.dilated.values()):
        for tensor in (branch[1].weight, branch[1].bias, branch[1].running_mean):
            nn.init.normal_(tensor, 0.5)
        nn.init.uniform_(branch[1].running_var, 0.5, 1.5)
    x = torch.randn(size[0], *size[1:], C, device=DEVICE).add(1.0).to(dtype)
    return layer, x.permute(0, 3, 1, 2)


def trained(layer, x, backend):
    """Output, gradients and running statistics of one step."""
    x = x.detach().requires_grad_()
    wanted = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    with use_backend(backend):
        out = layer(x)
        grads = torch.autograd.grad(out.double().sin().sum(), wanted.values())
    return {"out": out, **dict(zip(wanted, grads, strict=True)), **dict(layer.named_buffers())}


def compare(layer, x, relative):
    other = copy.deepcopy(layer).double()
    for _ in range(2):
        expected, actual = trained(other, x.double(), "eager"), trained(layer, x, "triton")
        for name, value in expected.items():
            if name.endswith("num_batches_tracked"):
                assert torch.equal(actual[name], value)
            else:
                assert_close(name, value, actual[name], relative)
    assert actual["out"].dtype == x.dtype


@pytest.mark.parametrize("side", [5, pytest.param(9, marks=pytest.mark.slow)])
def test_branches_at_once_equal_the_modules(side, together):
    compare(*prepared(side), 2e-5)
    assert len(together) == 2


@pytest.mark.skipif(DEVICE == "cpu", reason="too much for the interpreter")
@pytest.mark.parametrize("dtype, relative", [(torch.float32, 5e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("side, C, size", [(17, 64, (4, 56, 56)), (15, 112, (3, 28, 28)), (13, 256, (8, 14, 14))])
def test_branches_at_once_at_full_size(side, C, size, dtype, relative, together):
    compare(*prepared(side, C, size, dtype), relative)
    assert len(together) == 2


def test_no_map_but_the_input_is_kept(together):
    layer, x = prepared(5, size=(2, 9, 8))  # more values than the weights have
    kept = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        layer(x.requires_grad_())
    assert len(together) == 1
    assert [y.shape for y in kept if y.numel() >= x.numel()] == [x.permute(0, 2, 3, 1).shape]


def test_half_precision_under_autocast(together):
    layer, x = prepared(5)
    other = copy.deepcopy(layer).double()
    with torch.autocast(DEVICE, torch.float16), use_backend("triton"):
        out = layer(x)
        grads = torch.autograd.grad(out.float().sin().sum(), list(layer.parameters()))
    assert out.dtype == torch.float16 and len(together) == 1
    expected = trained(other, x.double(), "eager")
    assert_close("out", expected["out"], out, 2e-3)
    for (name, parameter), grad in zip(layer.named_parameters(), grads, strict=True):
        assert grad.dtype == parameter.dtype
        assert_close(name, expected[name], grad, 1e-2)


def test_variances_hold_where_means_are_large(together):
    """Kernels of one value give every pixel the same mean, some hundred deviations."""
    layer, _ = prepared(5)
    for branch in (layer.large, *layer.dilated.values()):
        weight = branch[0].weight
        with torch.no_grad():
            weight.zero_()[:, :, weight.shape[2] // 2, weight.shape[3] // 2] = 0.7
    x = torch.randn(2, 16, 12, 5, device=DEVICE).add(500.0).permute(0, 3, 1, 2)
    expected, other = trained(copy.deepcopy(layer).double(), x.double(), "eager"), copy.deepcopy(layer)
    modules, actual = trained(other, x, "eager"), trained(layer, x, "triton")
    assert len(together) == 1
    for name in ("out", "x", *(name for name in expected if name.endswith("running_var"))):
        errors = [(found[name] - expected[name]).abs().max() for found in (modules, actual)]
        assert errors[1] <= 2 * errors[0] + 1e-6 * expected[name].abs().max(), name


@pytest.mark.parametrize("frozen", [slice(None), slice(0, 1), slice(1, 3)])
def test_frozen_kernels_get_no_gradient(frozen, together):
    layer, x = prepared(5)
    for branch in [layer.large, *layer.dilated.values()][frozen]:
        branch[0].requires_grad_(False)
    compare(layer, x, 2e-5)
    assert len(together) == 2


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels, one for every launch; plans are made anew."""
    pytest.importorskip("triton")
    from visionattn.ops.depthwise import launch_branches

    names, run = [], launch_branches.Launch.__call__
    monkeypatch.setattr(launch_branches, "_plans", launch_branches.Plans())
    monkeypatch.setattr(
        launch_branches.Launch, "__call__", lambda self, *args: names.append(self._kernel.__name__) or run(self, *args)
    )
    return names


def test_few_launches_lie_between_the_convolutions(launched):
    layer, x = prepared(5)
    x.requires_grad_()
    with use_backend("triton"):
        out = layer(x)
        assert len(launched) == 3 + 3 + 1  # statistics, what lies between, the convolution
        launched.clear()
        out.sin().sum().backward()
    assert len(launched) == 3 + 3 * 4  # of the merged kernel and the norms; of each branch
    assert sum(name == "weight_sum_kernel" for name in launched) == 3


def test_only_wanted_gradients_are_computed(launched):
    layer, x = prepared(5)
    layer.dilated.requires_grad_(False)
    with use_backend("triton"):
        out = layer(x)  # of which no gradient is wanted
        launched.clear()
        grads = torch.autograd.grad(out.sin().sum(), list(layer.large.parameters()))
    assert len(launched) == 3 + 3
    with use_backend("eager"):
        expected = torch.autograd.grad(layer(x).sin().sum(), list(layer.large.parameters()))
    for e, a in zip(expected, grads, strict=True):
        assert_close("grad", e, a, 2e-5)


def test_sums_of_many_parts(launched, monkeypatch):
    """What large maps and many channels need: programs that add up in several steps, and several slices."""
    from visionattn.ops.depthwise import launch_branches

    for name, count in dict(PIXELS=8, VALUES=8, STATISTICS=2, GRADIENTS=8).items():
        monkeypatch.setattr(launch_branches, f"{name}_AT_ONCE", count)
    monkeypatch.setattr(launch_branches, "PIXELS", 13)
    layer, x = prepared(5, C=66, size=(4, 3, 5))
    expected = trained(copy.deepcopy(layer).double(), x.double(), "eager")
    for name, value in trained(layer, x, "triton").items():
        assert_close(name, expected[name].double(), value, 2e-5)
    assert launched


def test_gradients_lie_as_their_parameters_do(launched):
    """Or each would be copied where it is kept."""
    layer, x = prepared(5)
    layer.to(memory_format=torch.channels_last)
    with use_backend("triton"):
        layer(x).sin().sum().backward()
    assert launched
    for name, parameter in layer.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name
        assert parameter.grad.data_ptr() % 16 == 0 or parameter.dim() == 1, name
    compare(layer, x, 2e-5)


def test_layers_of_one_geometry_share_their_launches_alone(launched):
    from visionattn.ops.depthwise import launch_branches

    for _ in range(2):
        compare(*prepared(5), 2e-5)
    assert launched
    assert len(launch_branches._plans) == 1


def test_two_runs_are_equal(together):
    layer, x = prepared(5)
    runs = [trained(copy.deepcopy(layer), x, "triton") for _ in range(2)]
    assert len(together) == 2
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_parameters_in_half_precision(together):
    layer, x = prepared(5, dtype=torch.float16)
    compare(layer.half(), x, 2e-2)
    assert len(together) == 2


def test_running_statistics_count_as_changed(together):
    layer, x = prepared(5)
    versions = [buffer._version for buffer in layer.buffers()]
    with use_backend("triton"):
        layer(x)
    assert all(buffer._version > version for buffer, version in zip(layer.buffers(), versions, strict=True))


def first_norm(change):
    def apply(layer):
        change(layer.large[1])

    return apply


APART = {
    "evaluation": lambda layer: layer.eval(),
    "frozen norm": first_norm(lambda norm: norm.eval()),
    "cumulative average": first_norm(lambda norm: setattr(norm, "momentum", None)),
    "other eps": first_norm(lambda norm: setattr(norm, "eps", 0.1)),
    "other momentum": first_norm(lambda norm: setattr(norm, "momentum", 0.3)),
    "hook": first_norm(lambda norm: norm.register_forward_hook(lambda module, args, out: 2 * out)),
    "no norm": lambda layer: layer.large.__setitem__(1, nn.Identity()),
    "kernel that is no square": lambda layer: layer.dilated["k3_1"].__setitem__(
        0, nn.Conv2d(5, 5, (1, 3), padding=(0, 1), groups=5, bias=False, device=DEVICE)
    ),
    "kernel beyond the large one": lambda layer: layer.dilated["k3_1"].__setitem__(
        0, nn.Conv2d(5, 5, 7, padding=3, groups=5, bias=False, device=DEVICE)
    ),
    "replaced": lambda layer: setattr(layer, "large", nn.Sequential(*layer.large)),
}


@pytest.mark.parametrize("name", APART)
def test_modules_are_called_where_they_do_something_else(name, together):
    layer, x = prepared(5)
    APART[name](layer)
    compare(layer, x, 2e-5)
    assert not together


def test_maps_that_do_not_fit_are_not_computed_at_once():
    layer, x = prepared(5)
    with use_backend("triton"):
        assert not dilated_reparam._at_once([layer.large], x[:, :4])
        with pytest.raises(ValueError, match="depthwise_conv wants"):
            layer(x.permute(0, 2, 3, 1).repeat(1, 1, 1, 2).permute(0, 3, 1, 2))
        layer.large[0].to("meta")
        assert not dilated_reparam._at_once([layer.large], x)


def test_statistics_of_several_devices_are_left_to_their_norm():
    layer, x = prepared(5)
    with use_backend("triton"):
        assert dilated_reparam._at_once([layer.large], x)
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
        assert not dilated_reparam._at_once([layer.large], x)


def test_a_single_pixel_is_refused_as_by_the_norm(together):
    layer, x = prepared(5, size=(1, 1, 1))
    with use_backend("triton"), pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x)
    assert not together


@pytest.mark.parametrize("side", [1, 3, 6, 12, 21])
def test_unknown_kernel_is_named(side):
    with pytest.raises(ValueError, match=f"kernel_size={side} must be one of 5, 7, 9"):
        DilatedReparamConv(4, side)
