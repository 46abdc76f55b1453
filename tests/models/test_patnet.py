"""PATNet: its bias by distance, its inference form, its head, and what it refuses."""

import math

import pytest
import timm
import torch
from helpers import assert_close, inputs, load_reference, published_weights
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

from visionattn.models.patnet import PartialChannelAttention, distance_buckets

# parameters and GMACs of the inference form, without and with the gates per pixel; four heads
COUNTS = {
    "patnet_t0": (3_486_160, 3_558_240, 0.2326, 0.2335),
    "patnet_t1": (5_985_552, 6_144_552, 0.5165, 0.5178),
    "patnet_t2": (12_269_816, 12_650_424, 1.0326, 1.0346),
    "patnet_s": (28_013_304, 28_975_704, 2.7046, 2.7080),
    "patnet_m": (59_179_000, 61_366_776, 6.6728, 6.6793),
    "patnet_l": (100_641_336, 104_465_336, 11.8815, 11.8906),
}


def filled(name, dtype):
    """A model with the weights of a reference, whose norms have statistics."""
    weights = published_weights(load_reference(f"backbones/{name}")[0])
    overlay = dict(state_dict={key: tensor.to(dtype) for key, tensor in weights.items()})
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=dtype).eval()


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_published_networks(name, spatial):
    model = timm.create_model(name, use_spatial_attn=spatial, attn_heads=4, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name][spatial]
    folded = reparameterize_model(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        folded(torch.zeros(1, 3, 224, 224, device="meta"))
    assert round(counter.get_total_flops() / 2e9, 4) == COUNTS[name][2 + spatial]


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (65, 97), (224, 224)])
@pytest.mark.parametrize("name", ["patnet_t0", "patnet_t2"])
def test_inference_form_gives_the_same(name, size):
    x = inputs((2, 3, *size))
    model = filled(name, torch.float64)
    folded = reparameterize_model(model)
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    with torch.no_grad():
        expected = model(x)
        assert_close("logits", expected, folded(x), 1e-12)
        assert torch.equal(reparameterize_model(folded)(x), folded(x))
        single = filled(name, torch.float32)
        error = (single(x.float()) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        # at some sizes the plain form in float32 is itself further off than a millionth
        assert_close("float32", expected, reparameterize_model(single)(x.float()), max(1e-6, 2 * error.item()))


@pytest.mark.parametrize("spatial", [False, True])
def test_inference_form_can_be_scripted_exported_and_differentiated(spatial):
    model = reparameterize_model(timm.create_model("test_patnet", use_spatial_attn=spatial).eval())
    x, free = torch.randn(2, 3, 64, 96), torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (x,), dynamic_shapes=({0: free, 2: free, 3: free},))
    scripted = torch.jit.script(model)
    for size in ((3, 3, 97, 65), (1, 3, 64, 64)):
        x = torch.randn(size, requires_grad=True)
        expected = model(x)
        assert_close("exported", expected, program.module()(x), 1e-5)
        assert_close("scripted", expected, scripted(x), 1e-5)
        (grad,) = torch.autograd.grad(expected.sum(), x)
        assert grad.isfinite().all()


def test_buckets_follow_the_distance():
    height, width = 3, 200
    buckets = distance_buckets(height, width, torch.device("cpu"))
    for i, j in ((0, 0), (0, 1), (1, 200), (5, 402), (0, 20), (0, 21), (0, 100), (10, 590), (0, 199)):
        distance = round(math.hypot(i // width - j // width, i % width - j % width))
        if distance > 20:
            distance = min(round(20 + 20 * math.log(distance / 20) / math.log(8)), 40)
        assert buckets[i, j] == buckets[j, i] == 40 + distance


def test_deviation_is_unbiased_and_flat_maps_have_gradients():
    mixer = PartialChannelAttention(16).double().eval()
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    std, mean = torch.std_mean(x[:, 4:], dim=(2, 3))
    gate = mixer.gate_norm(mixer.gate_fc(torch.stack((mean, std), -1).flatten(1)))
    expected = mixer.norm(x[:, 4:] * torch.nn.functional.hardsigmoid(gate)[:, :, None, None])
    assert_close("gated channels", expected, mixer(x)[:, 4:], 1e-12)
    flat = torch.ones(1, 16, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(mixer(flat).sum(), flat)[0].isfinite().all()


def test_dropout_of_the_attention_is_the_published():
    attn = timm.create_model("patnet_t0", device="meta").stages[3].blocks[0].mixer.attn
    assert (attn.attn_drop.p, attn.proj_drop.p) == (0.1, 0.1)
    attn = timm.create_model("test_patnet", attn_drop_rate=0.2, proj_drop_rate=0.3).stages[3].blocks[0].mixer.attn
    assert (attn.attn_drop.p, attn.proj_drop.p) == (0.2, 0.3)


def test_head_changes_with_pooling():
    model = timm.create_model("test_patnet").eval()
    x = torch.randn(2, 3, 64, 96)
    assert (model.num_features, model.head_hidden_size) == (128, 192)
    model.reset_classifier(5, "")
    assert model(x).shape == (2, 5, 2, 3)
    model.reset_classifier(0, "")
    assert model.head_hidden_size == 128 and torch.equal(model(x), model.forward_features(x))
    model.reset_classifier(7, "avg")
    assert model.head_hidden_size == 192 and model(x).shape == (2, 7)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(depths=(1, 1, 1)), r"4 stages.*\(1, 1, 1\)"),
        (dict(embed_dims=(16, 32, 64, 130)), r"multiples of 4, got .*130\)"),
        (dict(attn_heads=5), "attn_heads=5 must divide 96"),
        (dict(global_pool="catavgmax"), "global_pool='catavgmax' .* use 'avg'"),
    ],
)
def test_bad_architecture_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_patnet", **kwargs)


def test_small_images_are_named():
    with pytest.raises(ValueError, match="at least 32 x 32 pixels, got 16 x 64"):
        timm.create_model("test_patnet")(torch.zeros(1, 3, 16, 64))
    with pytest.raises(ValueError, match="at least 2 pixels, got 1"):
        PartialChannelAttention(16)(torch.zeros(1, 16, 1, 1))


@pytest.mark.parametrize("in_chans", [1, 5])
@pytest.mark.parametrize("size", [(65, 97), (256, 320)])
def test_any_size_and_number_of_channels_trains(size, in_chans):
    model = timm.create_model("test_patnet", in_chans=in_chans, num_classes=7)
    out = model(torch.randn(2, in_chans, *size))
    out.square().sum().backward()
    assert out.shape == (2, 7) and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_onnx_of_the_folded_model_equals_eager(tmp_path):
    import onnxruntime

    model, path = reparameterize_model(timm.create_model("test_patnet").eval()), tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (torch.randn(2, 3, 65, 97),), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(3, 3, 65, 97)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close("logits", model(x), logits, 1e-5)
