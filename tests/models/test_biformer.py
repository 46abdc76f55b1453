"""BiFormer against the published networks, and with the tools that people put around a backbone."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights, renamed
from torchvision.ops import FeaturePyramidNetwork

import visionattn
from visionattn.models.biformer import BiFormerBlock
from visionattn.ops import use_backend

RENAME = {"mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", "attn.qkv.qkv": "attn.qkv", "attn.wo": "attn.proj"}


@pytest.mark.parametrize("stage", range(4))
def test_block_equals_published_block(stage):
    manifest, stored = load_reference(f"layers/biformer_block_stage{stage}")
    args = manifest["hyperparameters"]
    block = BiFormerBlock(args["dim"], args["effective_num_heads"], args["n_win"], args["topk"], args["mlp_ratio"])
    block = block.double()
    block.load_state_dict(published_weights(manifest, RENAME))
    x = inputs(**manifest["input"]).requires_grad_()
    out = block(x)
    out.backward(inputs(out.shape, 1000))
    step = 4 if stage < 2 else 8
    assert_golden("out", stored.pop("out"), out[:, ::step])
    assert_golden("grad_input", stored.pop("grad_input"), x.grad[:, ::step])
    assert len(stored) == len(list(block.parameters()))
    for key, expected in stored.items():
        grad = block.get_parameter(renamed(key.removeprefix("grad_param."), RENAME)).grad.reshape(-1)
        assert_golden(key, expected, grad[:: max(1, grad.numel() // 512)])


@pytest.mark.parametrize("name", ["biformer_t", "biformer_stl"])
@pytest.mark.parametrize("size", [(65, 97), (50, 75), (33, 128), (224, 224)])
def test_any_size_works(name, size):
    model = timm.create_model(name, num_classes=7)
    out = model(torch.randn(2, 3, *size))
    out.square().sum().backward()
    assert out.shape == (2, 7)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got shape \[1, 4, 64, 64\].*in_chans="):
        timm.create_model("test_biformer")(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(depths=(1, 1, 1)), r"4 stages.*\(1, 1, 1\)"),
        (dict(topks=(1, 4, 50, -2)), r"topk=50 must lie in \[1, 16\]"),
        (dict(num_heads=(1, 2, 3, 5)), "num_heads=5 must divide dim=64"),
    ],
)
def test_bad_architecture_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_biformer", **kwargs)


def test_drop_path_grows_linearly():
    model = timm.create_model("biformer_t", drop_path_rate=0.26)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.26, 14).tolist())


def test_checkpointed_blocks_give_the_same_gradients():
    model, x = timm.create_model("test_biformer"), torch.randn(2, 3, 65, 97)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        grads.append(torch.autograd.grad(model(x).sum(), list(model.parameters())))
    for (name, _), expected, actual in zip(model.named_parameters(), *grads, strict=True):
        assert (actual - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max()), name


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (50, 75)] if torch.cuda.is_available() else [(50, 75)])
def test_model_by_kernels_equals_model_without(size):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 2 if device == "cuda" else 1  # the interpreter is slow
    model, x = timm.create_model("test_biformer").to(device).eval(), torch.randn(n, 3, *size, device=device)
    forms, results = [("eager", model), ("triton", model)], []
    if device == "cuda":
        forms.append(("triton", torch.compile(model, fullgraph=True, backend="aot_eager")))
    with torch.backends.cudnn.flags(allow_tf32=False):
        for backend, function in forms:
            with use_backend(backend):
                logits = function(x)
                grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
                with torch.no_grad():
                    assert_close("logits without gradients", logits, function(x), 1e-5)
            results.append(
                dict(zip(["logits", *(n for n, _ in model.named_parameters())], [logits, *grads], strict=True))
            )
    for name, expected in results[0].items():
        for actual in results[1:]:
            assert_close(name, expected, actual[name], 1e-4)


@pytest.mark.slow
def test_exported_with_free_sizes_equals_eager():
    free = torch.export.Dim.DYNAMIC
    model = timm.create_model("test_biformer", num_classes=10).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: free, 2: free, 3: free},))
    for size in ((3, 3, 97, 65), (1, 3, 224, 224)):
        x = torch.randn(size)
        with torch.no_grad():
            assert_close(f"logits at {size}", model(x), program.module()(x), 1e-5)


@pytest.mark.slow
def test_onnx_with_a_free_batch_equals_eager(tmp_path):
    import onnxruntime

    model, path = timm.create_model("test_biformer").eval(), tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (torch.randn(2, 3, 65, 97),), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(3, 3, 65, 97)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close("logits", model(x), logits, 1e-5)


# decoders

DECODERS = {"unet": smp.Unet, "upernet": smp.UPerNet, "fpn": smp.FPN, "segformer": smp.Segformer}


def decoder(name, encoder, in_channels):
    return DECODERS[name](f"tu-{encoder}", encoder_weights=None, in_channels=in_channels, classes=4)


def assert_trains(model, out):
    """Finite gradients for the decoder and head, and for the encoder as far as the decoder reads its maps."""
    out.square().sum().backward()
    parameters = dict(model.named_parameters())
    assert all(p.grad.isfinite().all() for p in parameters.values() if p.grad is not None)
    assert all(p.grad is not None for name, p in parameters.items() if "stages.3.blocks" in name or "stem" in name)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_trains(name):
    model = decoder(name, "biformer_s", 3)
    out = model(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 4, 64, 96)
    assert_trains(model, out)


@pytest.mark.parametrize("in_channels", [1, 3, 5])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_trains_at_odd_size(name, in_channels):
    model = decoder(name, "test_biformer", in_channels)
    size = (63, 95) if name == "fpn" else (65, 97)  # that decoder wants every map twice the next, of any backbone
    features = model.encoder(torch.randn(2, in_channels, *size))  # the model itself would refuse the size before this
    assert_trains(model, model.segmentation_head(model.decoder(features)))


@pytest.mark.parametrize("in_chans", [1, 3, 5])
@pytest.mark.parametrize("name", ["test_biformer", "biformer_nano"])
def test_feature_pyramid_trains_at_odd_size(name, in_chans):
    backbone = timm.create_model(name, features_only=True, in_chans=in_chans)
    maps = backbone(torch.randn(2, in_chans, 65, 97))
    pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), 16)
    outputs = pyramid({str(i): x for i, x in enumerate(maps)})
    assert [x.shape[2:] for x in outputs.values()] == [(17, 25), (9, 13), (5, 7), (3, 4)]
    sum(x.square().sum() for x in outputs.values()).backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


# the package's own entry points


def test_models_are_listed():
    names = ["biformer_b", "biformer_nano", "biformer_s", "biformer_stl", "biformer_t", "test_biformer"]
    assert [name for name in visionattn.list_models() if "biformer" in name] == names
    assert visionattn.list_models("biformer_s*") == ["biformer_s", "biformer_stl"]
    assert visionattn.list_models("nothing*") == []


def test_create_model_makes_any_timm_model():
    assert visionattn.create_model("test_biformer", num_classes=3).num_classes == 3
    assert visionattn.create_model("biformer_nano.untrained", num_classes=3).num_classes == 3
    assert visionattn.create_model("test_vit", num_classes=3).num_classes == 3


@pytest.mark.parametrize("name, near", [("biformer_ss", "biformer_s"), ("resnet52", "resnet"), ("qqqq", "activator")])
def test_unknown_model_names_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown model {name!r}; did you mean .*{near}"):
        visionattn.create_model(name)
