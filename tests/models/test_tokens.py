"""NiNformer and Activator: the published networks, image sizes, what mixes tokens, and graphs."""

import pytest
import timm
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights, record_agreement

import visionattn  # noqa: F401  (registers the models)

NETWORKS = {
    "ninformer_cifar10": "ninformer_p4_32",
    "activator_cifar10": "activator_p4_32",
    "activator_geglu_cifar10": "activator_glu_p4_32",
}
BOTH_FAMILIES = pytest.mark.parametrize("name", ["test_ninformer", "test_activator"])


def load(name, weights, folder, **kwargs):
    path = folder / "weights.pth"
    torch.save(weights, path)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


@pytest.mark.parametrize("reference", NETWORKS)
def test_network_equals_published(reference, tmp_path):
    manifest, stored = load_reference(f"backbones/{reference}")
    weights = {"state_dict": published_weights(manifest)}
    model = load(NETWORKS[reference], weights, tmp_path, dtype=torch.float64)
    assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    x = inputs(**manifest["input"]).requires_grad_()
    final, maps = model.forward_intermediates(x)
    actual = {f"feat{i}": maps[i].flatten(2).transpose(1, 2)[:, ::4, ::4] for i in (0, 3)}  # tokens row by row
    actual["logits"] = model.forward_head(final)
    actual["grad"] = torch.autograd.grad(actual["logits"].sum(), x)[0][:, :, ::2, ::2]
    assert actual.keys() == stored.keys()
    errors = {key: assert_golden(key, expected, actual[key]) for key, expected in stored.items()}
    record_agreement(NETWORKS[reference], reference, errors)


@pytest.mark.parametrize(
    "name, kwargs, count",
    [
        ("ninformer_p4_32", dict(num_classes=100), 2_675_300),
        ("ninformer_p4_32", dict(img_size=28, in_chans=1), 2_582_478),
        ("ninformer_p16_224", {}, 3_632_120),
        ("activator_p4_32", dict(num_classes=100), 2_674_020),
        ("activator_glu_p4_32", dict(in_chans=1), 1_591_050),
    ],
)
def test_parameters_are_as_many_as_in_the_published_code(name, kwargs, count):
    assert sum(p.numel() for p in timm.create_model(name, device="meta", **kwargs).parameters()) == count


def test_weights_of_the_other_variant_are_named(tmp_path):
    weights = published_weights(load_reference("backbones/activator_geglu_cifar10")[0])
    with pytest.raises(ValueError, match=r"does not fit Activator: 16 of its keys are missing .*mlp\.fc1"):
        load("activator_p4_32", weights, tmp_path)


@BOTH_FAMILIES
def test_features_come_at_the_stride_of_the_patches(name):
    model = timm.create_model(name, features_only=True)
    stride = model.model.stem.feat_ratio()
    assert model.feature_info.reduction() == [stride] * 4 and model.feature_info.channels() == [64] * 4
    assert [tuple(x.shape) for x in model(torch.randn(2, 3, 32, 32))] == [(2, 64, 32 // stride, 32 // stride)] * 4


@BOTH_FAMILIES
def test_dropout_and_drop_path_reach_the_blocks(name):
    model = timm.create_model(name, proj_drop_rate=0.5, drop_path_rate=0.3)
    rates = [getattr(stage.blocks[0].drop_path, "drop_prob", 0.0) for stage in model.stages]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    mlps = [module for module in model.modules() if isinstance(module, timm.layers.Mlp)]
    assert len(mlps) == (12 if "ninformer" in name else 4)
    assert all(mlp.drop1.p == mlp.drop2.p == 0.5 for mlp in mlps)


@BOTH_FAMILIES
@pytest.mark.parametrize(
    "kwargs, message",
    [(dict(depth=0), "depth=0: the model needs at least one block"), (dict(patch_size=0), "patch_size=0 must")],
)
def test_bad_architecture_is_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **kwargs)


@BOTH_FAMILIES
def test_wrong_channels_are_named(name):
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got shape \[1, 4, 32, 32\].*in_chans="):
        timm.create_model(name)(torch.zeros(1, 4, 32, 32))


# Activator: any size, and no patch knows another


def shuffled_patches(x, side):
    patches = torch.nn.functional.unfold(x, side, stride=side)
    return torch.nn.functional.fold(patches[..., torch.randperm(patches.shape[-1])], x.shape[2:], side, stride=side)


@pytest.mark.parametrize("token_mixing", [False, True])
def test_shuffled_patches_matter_only_where_tokens_are_mixed(token_mixing):
    model = timm.create_model("activator_p4_32", token_mixing=token_mixing, dtype=torch.float64).eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    change = (model(shuffled_patches(x, 4)) - model(x)).abs().max() / model(x).std()
    assert change > 1e-3 if token_mixing else change < 1e-12


@pytest.mark.parametrize("in_chans", [1, 5])
@pytest.mark.parametrize("size", [(224, 224), (256, 320), (65, 97), (1, 1)])
@pytest.mark.parametrize("kwargs", [{}, dict(channel_mlp=False), dict(token_mixing=True)], ids=str)
def test_any_size_works(kwargs, size, in_chans):
    model = timm.create_model("test_activator", in_chans=in_chans, num_classes=7, **kwargs)
    out = model(torch.randn(2, in_chans, *size))
    out.square().sum().backward()
    assert out.shape == (2, 7)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_patches_are_completed_with_zeros():
    model, x = timm.create_model("test_activator").eval(), torch.randn(1, 3, 65, 97)
    assert_close("logits", model(torch.nn.functional.pad(x, (0, 7, 0, 7))), model(x), 1e-6)


# NiNformer: one size


@pytest.mark.parametrize("in_chans", [1, 5])
@pytest.mark.parametrize("size", [(224, 224), (256, 320)])
def test_size_can_be_chosen(size, in_chans):
    model = timm.create_model("ninformer_p16_224", img_size=size, in_chans=in_chans, num_classes=7)
    out = model(torch.randn(2, in_chans, *size))
    out.square().sum().backward()
    assert out.shape == (2, 7)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images of 32x32 pixels, got 64x48; .*img_size=.*set_input_size"):
        timm.create_model("test_ninformer")(torch.zeros(1, 3, 64, 48))


def test_patches_must_fill_the_image():
    with pytest.raises(ValueError, match="patch_size=4 must be positive and divide img_size=65x97; .*resize"):
        timm.create_model("test_ninformer", img_size=(65, 97))
    model = timm.create_model("test_ninformer")
    for side in (0, 5, 64):
        with pytest.raises(ValueError, match=f"patch_size={side} must be positive and divide img_size=32x32"):
            model.set_input_size(patch_size=side)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_new_size_starts_the_token_mlps_anew():
    model = timm.create_model("test_ninformer", proj_drop_rate=0.5, dtype=torch.float64).requires_grad_(False).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="MLPs over 8x8 tokens were replaced by untrained ones over 4x12"):
        model.set_input_size((16, 48))
    x = torch.randn(2, 3, 16, 48, dtype=torch.float64)
    assert torch.equal(model(x), model(x)) and not any(p.requires_grad for p in model.parameters())
    for key, tensor in model.state_dict().items():
        assert ".mlp_tokens." in key or torch.equal(tensor, before[key])
    assert model.stages[3].blocks[0].unit.mixer.mlp_tokens.drop1.p == 0.5


def test_new_size_with_the_same_tokens_keeps_the_weights(recwarn):
    model = timm.create_model("test_ninformer").eval()
    tokens = model.stages[0].blocks[0].unit.mixer.mlp_tokens
    model.set_input_size(64, patch_size=8)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    assert model.stages[0].blocks[0].unit.mixer.mlp_tokens is tokens and not recwarn
    assert [info["reduction"] for info in model.feature_info] == [8] * 4


@pytest.mark.filterwarnings("ignore:the MLPs over")
def test_new_size_survives_an_export_to_a_folder(tmp_path):
    pytest.importorskip("timm.models._input", reason="timm 1.0.29 exports the size of the default configuration")
    model = timm.create_model("test_ninformer").eval()
    model.set_input_size((64, 32), patch_size=8)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    reloaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 32)
    assert torch.equal(model(x), reloaded(x))


def test_weights_for_other_tokens_are_refused(tmp_path):
    weights = timm.create_model("test_ninformer").state_dict()
    with pytest.raises(ValueError, match=r"MLPs are over 64 tokens, those of the model over 256.*set_input_size\(\)"):
        load("test_ninformer", weights, tmp_path, img_size=64)


# graphs


@BOTH_FAMILIES
def test_checkpointed_blocks_give_the_same_gradients(name):
    model, x = timm.create_model(name), torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        grads.append(torch.autograd.grad(model(x).sum(), list(model.parameters())))
    for (key, _), expected, actual in zip(model.named_parameters(), *grads, strict=True):
        assert_close(key, expected, actual, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ninformer_p4_32", "activator_p4_32"])
def test_compiled_equals_eager(name):
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32)
    grads = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = function(x)
        grads.append((out, torch.autograd.grad(out.sum(), model.stem.proj.weight)[0]))
    assert_close("logits", grads[0][0], grads[1][0], 1e-5)
    assert_close("gradient of the first layer", grads[0][1], grads[1][1], 1e-4)


@pytest.mark.parametrize("token_mixing", [False, True])
def test_activator_exported_with_free_sizes_equals_eager(token_mixing):
    free = torch.export.Dim.DYNAMIC
    model = timm.create_model("test_activator", token_mixing=token_mixing).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: free, 2: free, 3: free},))
    for size in ((3, 3, 97, 65), (1, 3, 224, 224)):
        x = torch.randn(size)
        assert_close(f"logits at {size}", model(x), program.module()(x), 1e-5)


@pytest.mark.parametrize("name, kwargs", [("test_ninformer", {}), ("test_activator", dict(token_mixing=True))])
def test_onnx_equals_eager(name, kwargs, tmp_path):
    import onnxruntime

    model, path = timm.create_model(name, **kwargs).eval(), tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (torch.randn(2, 3, 32, 32),), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(3, 3, 32, 32)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close("logits", model(x), logits, 1e-5)
