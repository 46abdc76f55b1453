"""Sentence Attention Blocks against the published head, and what must hold for any backbone."""

import pytest
import timm
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights
from torch.nn import functional as F

from visionattn.heads.sentence_attention import SentenceAttentionNet, SentenceDecoder, efficientnet_key

WORDS = dict(kind="words", vocabulary=["red", "square", "where"], dim=8)


def small(backbone="test_biformer", **kwargs):
    return SentenceAttentionNet(backbone, **{**dict(text=WORDS), **kwargs})


def test_head_equals_published():
    manifest, stored = load_reference("heads/sentence_attention")
    decoder = SentenceDecoder(manifest["hyperparameters"]["channels"], 384).double().eval()
    decoder.load_state_dict(published_weights(manifest), strict=False)
    assert sum(p.numel() for p in decoder.parameters()) == manifest["params"] == 4_713_505
    maps = [inputs(**entry) for entry in manifest["input"]["features"]]
    found = {}
    for name, part in (("attention_0", decoder.sentence_attentions[0].attention), ("merge_3", decoder.merge_blocks[3])):
        part.register_forward_hook(lambda module, args, out, name=name: found.__setitem__(name, out))
    with torch.no_grad():
        logits = decoder(maps, inputs(**manifest["input"]["text"]))
    size = manifest["input"]["output_size"]
    found["logits"] = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    assert found.keys() == stored.keys()
    for key, expected in stored.items():
        assert_golden(
            key, expected, found[key][tuple(slice(None, None, s) for s in manifest["outputs"][key]["stride"])]
        )


def published_name(key):
    """efficientnet_pytorch's name of a tensor of timm's EfficientNet-B0, whose first block does not expand."""
    depths = [1, 2, 2, 3, 3, 4, 1]
    stem = {"conv_stem": "_conv_stem", "bn1": "_bn0"}
    if not key.startswith("blocks."):
        part, _, rest = key.partition(".")
        return f"{stem[part]}.{rest}"
    _, stage, block, *part, end = key.split(".")
    number, part = sum(depths[: int(stage)]) + int(block), ".".join(part)
    names = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
    ours = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
    if number == 0:
        names, ours = names[2:], ["conv_dw", "bn1", "conv_pw", "bn2"]
    table = dict(zip(ours, names, strict=True)) | {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
    return f"_blocks.{number}.{table[part]}.{end}"


def test_published_file_loads_with_backbone_and_instance_norm(tmp_path):
    net = SentenceAttentionNet("tf_efficientnet_b0", image_norm=True, text_dim=4, num_classes=2)
    weights, expected = (
        {},
        {k: torch.randn_like(x) if x.is_floating_point() else x for k, x in net.state_dict().items()},
    )
    for key, tensor in expected.items():
        if key.startswith("backbone."):
            weights["backbone." + published_name(key.removeprefix("backbone."))] = tensor
        else:
            weights[key.removeprefix("decoder.")] = tensor
    torch.save(weights, tmp_path / "sab.pth")
    loaded = SentenceAttentionNet("tf_efficientnet_b0", image_norm=True, text_dim=4, num_classes=2)
    loaded.load_published(tmp_path / "sab.pth")
    assert all(torch.equal(x, expected[key]) for key, x in loaded.state_dict().items())
    plain = SentenceAttentionNet("tf_efficientnet_b0", text_dim=4, num_classes=2)
    assert plain.load_published(tmp_path / "sab.pth") is plain  # the norm's statistics are of no use to it
    with pytest.raises(ValueError, match=r"does not fit .* of another shape .*check backbone, text_dim"):
        SentenceAttentionNet("tf_efficientnet_b0", text_dim=8, num_classes=2).load_published(tmp_path / "sab.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        plain.load_published(tmp_path / "absent.pth")
    assert efficientnet_key("_fc.weight", net.backbone) == "_fc.weight"
    assert efficientnet_key("_blocks.99._bn0.weight", net.backbone) == "_blocks.99._bn0.weight"


@pytest.mark.parametrize("backbone, maps", [("test_biformer", 4), ("resnet10t", 5)])
def test_any_backbone_and_size(backbone, maps):
    net = small(backbone).eval()
    assert len(net.decoder.sentence_attentions) == maps
    x, questions = torch.randn(2, 3, 64, 51), ["where red", "square"]
    with torch.no_grad():
        out = net(x, questions)
        alone = torch.cat([net(x[i : i + 1], questions[i : i + 1]) for i in range(2)])
        assert_close("embeddings", out, net(x, net.text(questions)), 1e-6)
        assert not torch.equal(out, net(x, questions[::-1]))
    assert out.shape == (2, 1, 64, 51)
    assert_close("batch", alone, out, 1e-4)


def test_every_parameter_is_trained():
    net = small(image_norm=True)
    net(torch.randn(2, 3, 64, 64), ["where red", "square where"]).square().mean().backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None]
    names = net.no_weight_decay()
    assert names <= {key for key, _ in net.named_parameters()}


def test_image_norm_makes_brightness_and_contrast_alike():
    net, x = small(image_norm=True, dropout=0.0).train(), torch.rand(1, 3, 64, 64)
    net.backbone.eval()
    with torch.no_grad():
        assert_close("normalised", net.init_norm(x), net.init_norm(100 * x + 3), 1e-3)
    assert timm.models.is_model("tf_efficientnet_b7")


def test_bad_arguments_and_inputs_are_named():
    net = small()
    x = torch.zeros(2, 3, 64, 64)
    for bad, text, message in (
        (x[:, :1], ["red", "red"], r"takes images \[B, 3, H, W\], got \[2, 1, 64, 64\]"),
        (x, ["red"], "2 images want a list of 2 questions, got 1"),
        (x, "where", "got one string"),
        (x, torch.zeros(2, 9), r"text \[2, 8\], got 4 maps and text \[2, 9\]"),
        (x, ["red", "  "], "a question is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            net(bad, text)
    with pytest.raises(ValueError, match="no text encoder"):
        small(text=None)(x, ["red", "red"])
    with pytest.raises(ValueError, match="at least two maps"):
        SentenceDecoder([8], 4)
    with pytest.raises(ValueError, match="unknown backbone 'nothing'"):
        small("nothing")
