"""The classifier inspired by MEDUSA: gates that at first change nothing, and then every later stage."""

import copy

import pytest
import timm
import torch

import visionattn  # noqa: F401
from visionattn.heads.medusa import Medusa, MultiScaleAttention

SMALL = dict(num_classes=5, body_dim=4, body_levels=2, body_size=32)
BACKBONES = ["test_biformer", "test_davit", "test_resnet"]


def opened(model):
    """The model with gates that are not 1."""
    for gate in model.gates:
        torch.nn.init.normal_(gate.conv.weight)
    return model


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gates_begin_as_nothing_and_then_act(backbone):
    model = Medusa(backbone, **SMALL).eval()
    plain = timm.create_model(backbone, num_classes=5).eval()
    plain.load_state_dict(model.backbone.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        opened(model)
        assert not torch.allclose(model(x), plain(x), atol=1e-4)
        assert torch.equal(model.backbone(x), plain(x))  # the backbone by itself stays what it was
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone", "body", "gates"}


def test_a_stage_sees_the_gated_output_of_the_one_before():
    model = Medusa("test_biformer", stages=(0,), **SMALL).eval()
    assert len(model.gates) == 1
    x, seen = torch.randn(1, 3, 64, 64), []
    model.backbone.stages[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        opened(model)(x)
        shared = model.body(x)
        expected = model.gates[0](seen[0], shared)
    torch.testing.assert_close(seen[1], expected)


@pytest.mark.parametrize("per_channel", [True, False])
def test_training_reaches_body_and_gates(per_channel):
    model = Medusa("test_biformer", in_chans=1, per_channel=per_channel, **SMALL).train()
    x, labels = torch.randn(2, 1, 64, 64), torch.tensor([0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # in the first step the gates are zero, so the body has no gradient yet
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    for part in (model.body, model.gates, model.backbone):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
        assert sum(p.grad.abs().sum() for p in part.parameters()) > 0


def test_a_copy_has_gates_of_its_own():
    model = Medusa("test_resnet", **SMALL).eval()
    other = opened(copy.deepcopy(model))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first, second = model(x), other(x)
        assert not torch.allclose(first, second)
        assert torch.equal(first, Medusa.forward(model, x))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), first)


def test_compiles_with_its_gates():
    model = opened(Medusa("test_resnet", **SMALL)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_timm_interface():
    model = Medusa("test_biformer", **SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, 2, 2)
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 64, 64)
    model.reset_classifier(2)
    assert model(x).shape == (1, 2) and model.get_classifier().out_features == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()


def test_body_standardises_the_grey_image():
    body = MultiScaleAttention(dim=4, levels=3, size=None).eval()
    x = torch.rand(2, 3, 21, 30)
    out = body(x)
    assert out.shape == (2, 4, 21, 30)
    torch.testing.assert_close(body(5 * x + 2), out, rtol=1e-3, atol=1e-4)
    assert body(torch.ones(1, 3, 8, 8)).isfinite().all()
    assert MultiScaleAttention(dim=4, levels=2, size=16, grey=False)(x).shape == (2, 4, 16, 16)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="stages 0 to 3, not 4"):
        Medusa("test_biformer", stages=(4,), **SMALL)
    with pytest.raises(ValueError, match="size=4 is too small"):
        MultiScaleAttention(levels=4, size=4)
    with pytest.raises(ValueError, match="2 x 8, too small"):
        MultiScaleAttention(levels=4, size=None)(torch.zeros(1, 3, 2, 8))
    with pytest.raises(ValueError, match="expected a map"):
        Medusa("test_vit", img_size=64, **SMALL)(torch.zeros(1, 3, 64, 64))


def test_stages_that_are_passed_by_are_named():
    model = Medusa("resnet18", num_classes=2, body_dim=4, body_levels=2, body_size=None).train()
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match="passes by its modules .*layer1.*turn off gradient checkpointing"):
        model(torch.randn(2, 3, 64, 64))


def test_maps_with_channels_last_are_gated_along_their_channels():
    model = Medusa("swin_tiny_patch4_window7_224", num_classes=2, img_size=384, stages=(0,), body_dim=4, body_levels=2)
    gate, x = model.gates[0], torch.randn(1, 96, 96, 96)
    with torch.no_grad():
        gate.conv.bias[5] = 1.0
        out = gate(x, torch.zeros(1, 4, 96, 96))
    changed = (out != x).flatten(0, 2).any(0)
    assert changed.nonzero().tolist() == [[5]]
