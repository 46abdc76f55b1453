"""LITv2 on images of other sizes, in training, and exported."""

import numpy as np
import pytest
import timm
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights
from torch.nn.functional import layer_norm

from visionattn.models.litv2 import checkpoint_filter_fn


def test_features_equal_published_detection_backbone():
    manifest, stored = load_reference("backbones/litv2_small_dense")
    weights = published_weights(manifest)
    norms = {i: (weights.pop(f"norm{i}.weight"), weights.pop(f"norm{i}.bias")) for i in (1, 2, 3)}
    model = timm.create_model("litv2_s", num_classes=0, dtype=torch.float64).eval()
    missing, unknown = model.load_state_dict(checkpoint_filter_fn(weights, model), strict=False)
    assert not unknown and {key for key in missing if "num_batches" not in key} == {"norm.weight", "norm.bias"}
    own = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.norm.parameters())
    assert own + sum(p.numel() for pair in norms.values() for p in pair) == manifest["params"]
    maps = model.forward_intermediates(inputs(**manifest["input"]), intermediates_only=True)
    outputs = {f"feat{i}": x for i, x in enumerate(maps)}
    for i, (weight, bias) in norms.items():
        outputs[f"norm{i}"] = layer_norm(maps[i].permute(0, 2, 3, 1), weight.shape, weight, bias).permute(0, 3, 1, 2)
    assert outputs.keys() == stored.keys()
    for key, x in outputs.items():
        assert_golden(key, stored[key], x[:, ::4] if key.endswith("3") else x[:, ::4, ::7, ::7])


@pytest.mark.parametrize("in_chans, size", [(3, (224, 224)), (1, (256, 320)), (5, (65, 97)), (3, (29, 30))])
def test_any_size_works(in_chans, size):
    model = timm.create_model("test_litv2", num_classes=7, in_chans=in_chans)
    out = model(torch.randn(2, in_chans, *size))
    out.square().sum().backward()
    assert out.shape == (2, 7)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_image_is_padded_to_whole_patches():
    model, x = timm.create_model("test_litv2").eval(), torch.randn(1, 3, 65, 97)
    whole = torch.zeros(1, 3, 68, 100)
    whole[:, :, :65, :97] = x
    assert torch.equal(model(x), model(whole))


def test_small_image_is_named():
    with pytest.raises(ValueError, match=r"a map of 1x4 holds no patch of 2x2; use a larger image"):
        timm.create_model("test_litv2")(torch.zeros(1, 3, 28, 64))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(depths=(1, 1, 1)), r"4 stages.*\(1, 1, 1\)"),
        (dict(window_sizes=(2, 1)), r"4 stages.*\(2, 1\)"),
        (dict(window_sizes=(0, 0, -1, 1)), "window_size=-1 be positive"),
        (dict(alpha=2), r"alpha=2 must lie in \[0, 1\]"),
        (dict(num_heads=(1, 2, 3, 5)), "num_heads=5 must divide dim=64"),
    ],
)
def test_bad_architecture_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_litv2", **kwargs)


def test_windows_of_a_stage_take_the_same_weights():
    model = timm.create_model("test_litv2").eval()
    wide = timm.create_model("test_litv2", window_sizes=(0, 0, 4, 1)).eval()
    wide.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 128, 128)
    assert not torch.equal(model(x), wide(x))


def test_drop_path_grows_linearly():
    model = timm.create_model("litv2_s", drop_path_rate=0.2, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.2, 12).tolist())


def test_weights_of_offsets_learn_slowly():
    model = timm.create_model("test_litv2")
    names = [f"stages.{i}.downsample.0.conv_offset.weight" for i in (1, 2, 3)]
    assert model.lr_scales() == dict.fromkeys(names, 0.01)
    assert not any(model.get_parameter(name).any() for name in names)


def test_checkpointed_blocks_give_the_same_gradients():
    model, x = timm.create_model("test_litv2"), torch.randn(2, 3, 65, 97)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        grads.append(torch.autograd.grad(model(x).sum(), list(model.parameters())))
    for (name, _), expected, actual in zip(model.named_parameters(), *grads, strict=True):
        assert (actual - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max()), name


def displacing(name, **kwargs):
    """A model whose offsets are not the zeros of the start."""
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    for key in model.lr_scales():
        torch.nn.init.normal_(model.get_parameter(key), std=0.1)
    return model


def test_scripted_model_equals_eager():
    model, x = displacing("test_litv2"), torch.randn(2, 3, 65, 97)
    assert_close("logits", model(x), torch.jit.script(model)(x), 1e-6)


@pytest.mark.slow
def test_compiled_equals_eager():
    model, x = displacing("test_litv2"), torch.randn(2, 3, 65, 97)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (model, compiled):
        model.zero_grad()
        out = function(x)
        out.square().sum().backward()
        grads.append((out, model.stem.conv.weight.grad.clone()))
    assert_close("logits", grads[0][0], grads[1][0], 1e-5)
    assert_close("gradient of the first layer", grads[0][1], grads[1][1], 1e-4)


def test_exported_with_free_sizes_equals_eager():
    free = torch.export.Dim.DYNAMIC
    model = displacing("test_litv2")
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: free, 2: free, 3: free},))
    for size in ((3, 3, 97, 65), (1, 3, 224, 224)):
        x = torch.randn(size)
        with torch.no_grad():
            assert_close(f"logits at {size}", model(x), program.module()(x), 1e-5)


@pytest.mark.thorough
def test_onnx_with_a_free_batch_equals_eager(tmp_path):
    import onnxruntime

    model, path = displacing("test_litv2"), tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (torch.randn(2, 3, 65, 97),), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(3, 3, 65, 97)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close("logits", model(x), logits, 1e-5)
