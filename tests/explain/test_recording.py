"""Weights recomputed from the inputs of attention layers make the outputs that the layers gave."""

import pytest
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model

import visionattn
from visionattn.explain import record
from visionattn.ops import use_backend

# number of recorded layers: attention, dynamic kernels, channels, gates
FAMILIES = {
    "test_biformer": (4, 0, 0, 0),
    "test_nat": (5, 0, 0, 0),
    "test_dinat": (5, 0, 0, 0),
    "test_litv2": (3, 0, 0, 0),
    "test_davit": (4, 0, 4, 0),
    "test_patnet": (1, 0, 0, 9),
    "test_overlock": (0, 6, 0, 10),
    "test_lgvit": (3, 0, 0, 3),
    "test_ninformer": (0, 0, 0, 4),
    "test_activator": (0, 0, 0, 4),
}


def recorded(name, dtype=torch.float64, size=(64, 64), batch=1, backend=None, seed=0):
    torch.manual_seed(seed)
    model = visionattn.create_model(name, in_chans=1, num_classes=3).to(dtype).eval()
    with torch.no_grad():  # tables of positions start at zero, and batch norms as identities
        for key, x in model.state_dict().items():
            if "rpb" in key or "bias" in key or "running_mean" in key:
                x.normal_(0, 0.3)
    size = (32, 32) if name == "test_ninformer" else size  # the only one that it takes
    image = torch.randn(batch, 1, *size, dtype=dtype)
    with torch.no_grad(), record(model) as maps:
        if backend is None:
            model(image)
        else:
            with use_backend(backend):
                model(image)
    return model, maps


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=["float64", "float32"])
def test_weights_times_values_are_the_output(name, backend, dtype, allowed):
    _, maps = recorded(name, dtype, batch=2, backend=backend)
    layers = [*maps.attention(), *maps.kernels()]
    assert (len(maps.attention()), len(maps.kernels()), len(maps.channels()), len(maps.gates())) == FAMILIES[name]
    for layer in layers:
        assert layer.error() < allowed, layer.name
    for layer in maps.channels():
        torch.testing.assert_close(layer.output(), layer.expected, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("name, size", [("test_nat", (35, 50)), ("test_davit", (50, 70)), ("test_litv2", (45, 70))])
def test_sizes_that_windows_do_not_divide(name, size):
    _, maps = recorded(name, size=size)
    assert max(layer.error() for layer in maps.attention()) < 1e-11
    assert any(layer.padded != layer.size for layer in maps.attention())


@pytest.mark.parametrize("size", [(40, 100), (33, 47)])  # the last map is smaller than the large kernel
def test_enlarged_maps_of_dynamic_kernels(size):
    _, maps = recorded("test_overlock", size=size)
    assert max(layer.error() for layer in maps.kernels()) < 1e-11
    assert any(layer.padded != layer.size for layer in maps.kernels())
    for layer in maps.kernels():
        at = layer.at(layer.size[0] - 1, 0)
        assert at.shape == (1, 2 * (layer.stage - 2), *layer.size)
        torch.testing.assert_close(at.sum((2, 3)), torch.ones_like(at[:, :, 0, 0]))


def test_weights_lie_where_the_layer_looks():
    _, maps = recorded("test_nat")
    first = maps.attention()[0]  # windows of 3 x 3 on a map of 16 x 16
    seen = first.at(7, 9)[0, 0] > 0
    assert seen[6:9, 8:11].all() and seen.sum() == 9
    corner = first.at(0, 15)[0, 0] > 0  # moved inward
    assert corner[:3, 13:].all() and corner.sum() == 9
    _, maps = recorded("test_davit")
    seen = maps.attention()[0].at(5, 2)[0, 0] > 0  # windows of 4 x 4
    assert seen[4:8, :4].all() and seen.sum() == 16
    _, maps = recorded("test_litv2")
    high, low, _ = maps.attention()
    assert (high.kind, low.kind) == ("high", "low") and (high.heads, low.heads) == (1, 2)
    assert (high.at(3, 2)[0, 0] > 0).nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]  # windows of 2 x 2
    spread = low.at(3, 2)[0, 1]
    assert torch.equal(spread[::2, ::2], spread[1::2, 1::2]) and spread.sum().item() == pytest.approx(1)


def test_kernels_sum_to_one_and_lie_around_the_position():
    _, maps = recorded("test_overlock", size=(96, 96))  # a map of 6 x 6
    small, large = maps.kernels()[:2]
    assert small.kernel(2, 1).shape == (1, 2, 3, 3) and large.kernel(2, 1).shape == (1, 2, 5, 5)
    at = small.at(2, 1)[0]
    assert (at > 0).sum() == 2 * 9
    torch.testing.assert_close(at[:, 1:4, :3], small.kernel(2, 1)[0])


def test_gates_multiply_what_their_modules_pass_on():
    """By the modules' own other halves: what a gate multiplies, times the gate, is what the module gave."""
    _, maps = recorded("test_patnet")
    calls = {call.watched.name: call for call in maps.calls}
    for gate in maps.gates():
        assert 0 <= gate.values.min() <= gate.values.max() <= 1
        call = calls[gate.layer]
        module, x = call.watched.module, call.inputs[0]
        if gate.values.dim() == 2:
            expected = module.norm(x[:, module.split[0] :] * gate.values[:, :, None, None])
            torch.testing.assert_close(call.output[:, module.split[0] :], expected)
        else:
            expected = module.norm1(x.chunk(2, 1)[0] * gate.values[:, None])
            torch.testing.assert_close(call.output.chunk(2, 1)[0], expected)
    _, maps = recorded("test_ninformer")
    call = maps.calls[0]
    torch.testing.assert_close(call.watched.module.proj(call.inputs[0]) * maps.gates()[0].values, call.output)
    _, maps = recorded("test_activator")
    call = maps.calls[0]
    unit, values = call.watched.module, maps.gates()[0].values
    torch.testing.assert_close(unit.proj(values * unit.norm(unit.value(call.inputs[0]))), call.output)
    _, maps = recorded("test_lgvit")
    attention, block = (next(c for c in maps.calls if c.watched.role == role) for role in ("attention", "gate"))
    module, x = block.watched.module, block.inputs[0].permute(0, 2, 3, 1)
    x = x + module.proj(attention.output * maps.gates()[0].values)
    torch.testing.assert_close((x + module.mlp(module.norm2(x))).permute(0, 3, 1, 2), block.output)


def test_gates_of_the_folded_network_are_the_same():
    model, maps = recorded("test_patnet")
    folded = reparameterize_model(model)
    with torch.no_grad(), record(folded) as other:
        folded(maps.image)
    assert len(other.gates()) == len(maps.gates())
    for one, two in zip(maps.gates(), other.gates(), strict=True):
        torch.testing.assert_close(one.values, two.values)


def test_context_is_the_overview_networks():
    model, maps = recorded("test_overlock")
    [(name, prior)] = maps.context()
    assert name == "stages.2.context" and prior.shape == (1, 16, 2, 2)
    with torch.no_grad():
        stage, x = model.stages[2], model.stage_maps(maps.image, 2)[-1]
        torch.testing.assert_close(prior, F.conv2d(stage.overview(stage.base(x)), *stage.context.parameters()))


def test_half_precision_and_autocast():
    model, maps = recorded("test_davit", torch.bfloat16)
    assert all(layer.error() < 0.05 and layer.query.dtype == torch.float32 for layer in maps.attention())
    model = model.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), record(model) as others:
        model(maps.image.float())
        assert all(layer.error() < 0.05 and layer.query.dtype == torch.float32 for layer in others.attention())


def test_last_call_is_kept_and_features_are_recorded_too():
    model = visionattn.create_model("test_biformer", features_only=True).eval()
    with torch.no_grad(), record(model) as maps:
        model(torch.zeros(1, 3, 64, 64))
        model(torch.zeros(2, 3, 96, 64))
    assert maps.image.shape == (2, 3, 96, 64)
    assert [layer.stage for layer in maps.attention()] == [1, 2, 3, 4]
    assert maps.attention()[0].size == (24, 16) and maps.grid(1, (24, 16)).stride == 4
