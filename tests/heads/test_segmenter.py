"""Segmenter: every decoder on a backbone of the package, any size, errors, freezing, bottleneck."""

import pytest
import torch

from visionattn.heads.segmenter import DECODERS, Segmenter


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "pan"])
def test_every_decoder_takes_any_size(decoder):
    torch.manual_seed(0)
    model = Segmenter("test_biformer", decoder, in_chans=2, num_classes=3).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 2, 50, 71)).shape == (1, 3, 50, 71)


def test_completing_with_zeros_changes_nothing_but_the_size():
    model = Segmenter("test_biformer", "fpn").eval()
    x = torch.randn(1, 3, 40, 64)
    with torch.no_grad():
        whole = model(torch.nn.functional.pad(x, (0, 0, 0, 24)))
        assert torch.equal(model(x), whole[:, :, :40])


@pytest.mark.parametrize("kind", ["routed", "neighborhood"])
def test_bottleneck_acts_on_the_deepest_map_and_learns(kind):
    model = Segmenter("test_biformer", "unet", bottleneck=kind).train()
    x = torch.randn(2, 3, 64, 64)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.bottleneck.attn.qkv.parameters())
    with torch.no_grad():
        model.eval()
        before = model(x)
        for p in model.bottleneck.parameters():
            p.zero_()
        assert not torch.allclose(model(x), before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(decoder="unett"), "nearest: unet"),
        (dict(decoder="deeplabv3"), "output_stride"),
        (dict(backbone="biformer_small"), "unknown backbone 'biformer_small'; nearest: .*biformer_s"),
        (dict(bottleneck="rooted"), "must be one of routed, neighborhood"),
        (dict(decoder="dpt", bottleneck="routed"), "not for the decoder dpt"),
        (dict(num_classes=0), "must be at least 1"),
        (dict(decoder_kwargs=dict(no_such=1)), "does not fit backbone"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(**{"backbone": "test_biformer", **arguments})


def test_wrong_images_are_named():
    with pytest.raises(ValueError, match=r"wants images \[B, 3, H, W\], got \[1, 1, 8, 8\]"):
        Segmenter("test_biformer")(torch.zeros(1, 1, 8, 8))


def test_frozen_parts_keep_weights_and_statistics():
    model = Segmenter("test_biformer", "unet").train()
    model.freeze(["encoder", "decoder"])
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("net.segmentation_head") for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("net.segmentation_head") for name in changed)
    with pytest.raises(ValueError, match="names no part; expected encoder, decoder, batchnorm or"):
        model.freeze(["stage_9"])
