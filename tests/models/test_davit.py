"""DaViT's blocks against the published ones."""

import pytest
from helpers import assert_golden, inputs, load_reference, published_weights

from visionattn.layers import WindowAttention
from visionattn.models.davit import ChannelAttention, DaViTBlock

RENAME = {"cpe.0.proj": "cpe1", "cpe.1.proj": "cpe2"}


def test_channel_attention_equals_published():
    manifest, stored = load_reference("layers/davit_channel_attention")
    layer = ChannelAttention(64, 2).double()
    layer.load_state_dict(published_weights(manifest))
    x = inputs(**manifest["input"]).requires_grad_()
    out = layer(x.unflatten(1, (14, 14))).flatten(1, 2)
    (out * inputs(out.shape, 1)).sum().backward()
    assert_golden("output", stored["output"], out[:, ::3, ::2])
    assert_golden("dx", stored["dx"], x.grad[:, ::3, ::2])


@pytest.mark.parametrize(
    "name, attn", [("spatial", lambda: WindowAttention(64, 2, 7)), ("channel", lambda: ChannelAttention(64, 2))]
)
def test_block_equals_published(name, attn):
    manifest, stored = load_reference(f"layers/davit_{name}_block")
    block = DaViTBlock(64, attn()).double()
    block.load_state_dict(published_weights(manifest, RENAME))
    x = inputs(manifest["input"]["shape"], 0).unflatten(1, (15, 23)).permute(0, 3, 1, 2)
    out = block(x).flatten(2).transpose(1, 2)
    assert_golden("output", stored["output"], out[:, ::2, ::2])


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="num_heads=5 must divide dim=64"):
        ChannelAttention(64, 5)
