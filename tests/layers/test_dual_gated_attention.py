"""Dual-gated attention against the published block, and what must hold for any weights."""

import pytest
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights

from visionattn.layers import DualGatedAttention, DualGatedBlock
from visionattn.layers.dual_gated_attention import rotary_table

RENAME = {"act_proj": "gate", "out_proj": "proj", "up_proj": "v_reduce", "down_proj": "v_expand"}


def test_block_equals_published_module():
    manifest, stored = load_reference("layers/dla_block")
    args, given = manifest["params"], manifest["inputs"]
    block = DualGatedBlock(args["dim"], args["heads"], args["mlp_ratio"]).double()
    weights = published_weights(manifest, RENAME)
    del weights["attn.rope.rotations"]
    block.load_state_dict(weights)
    x = inputs(**given["x"]).requires_grad_()
    tables = stored["rotations"].unbind(-1)  # the published ones, which were computed in float32
    out = block(x.unflatten(1, args["input_resolution"]), tables).flatten(1, 2)
    out.backward(inputs(**given["grad_out"]))
    assert_golden("out", stored["out"], out)
    assert_golden("dx", stored["dx"], x.grad)
    own = rotary_table(x.detach().unflatten(1, args["input_resolution"]))
    for expected, actual in zip(tables, own, strict=True):
        assert (expected - actual).abs().max() < 1e-6


def brute_force(layer, x):
    """The formula of the docstring, pixel by pixel."""
    B, H, W, C = x.shape
    q, k = (1 + torch.nn.functional.elu(y) for y in layer.qk(x).chunk(2, -1))
    v = layer.v_expand(torch.nn.functional.silu(layer.v_reduce(x)))
    rates = [10000 ** (-4 * t / C) for t in range(C // 4)]
    angles = [[y * r for r in rates] + [x * r for r in rates] for y in range(H) for x in range(W)]
    turn = torch.polar(torch.ones(H * W, C // 2, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))

    def rotate(y):
        pairs = torch.view_as_complex(y.reshape(B, H * W, C // 2, 2).contiguous()) * turn
        return torch.view_as_real(pairs).reshape(B, H * W, layer.num_heads, -1)

    def split(y):
        return y.reshape(B, H * W, layer.num_heads, -1)

    scores = torch.einsum("bind,bjnd->bijn", rotate(q), rotate(k))
    sums = torch.einsum("bind,bjnd->bijn", split(q), split(k)).mean(2, keepdim=True) + 1e-6
    out = torch.einsum("bijn,bjnd->bind", scores / sums / (H * W), split(v)).reshape(B, H, W, C)
    return out + layer.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_layer_is_the_formula_on_any_map():
    layer = DualGatedAttention(16, 2).double()
    for shape in ((2, 3, 5, 16), (1, 1, 1, 16), (1, 6, 2, 16)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_close(str(shape), brute_force(layer, x), layer(x), 1e-10)


def test_table_is_kept_and_fits_training_after_an_evaluation():
    x = torch.randn(1, 9, 11, 16)
    with torch.inference_mode():
        first = rotary_table(x)
    assert rotary_table(x.bfloat16())[0] is first[0] and first[0].dtype == torch.float32
    assert first[0].shape == (9, 11, 8) and rotary_table(x.double())[0].dtype == torch.float64
    layer = DualGatedAttention(16, 2)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0


def test_compiled_layer_is_one_graph_for_all_sizes():
    block = DualGatedBlock(16, 2).eval()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    for height, width in ((4, 6), (5, 7)):
        x = torch.randn(2, height, width, 16)
        assert_close("out", block(x), compiled(x), 1e-5)


def test_block_runs_under_autocast_and_trains_every_parameter():
    block = DualGatedBlock(16, 4, drop_path=0.1)
    x = torch.randn(2, 6, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
    assert_close("out", block.eval()(x), out, 0.5)


def test_scripted_block_gives_the_same():
    block, x = DualGatedBlock(16, 2).eval(), torch.randn(2, 5, 3, 16)
    expected = block(x)
    assert_close("out", expected, torch.jit.script(block)(x), 1e-5)
    assert_close("half", expected, torch.jit.script(block.bfloat16())(x.bfloat16()), 1e-2)


@pytest.mark.parametrize("dim, heads", [(18, 2), (16, 3), (16, 0)])
def test_widths_that_do_not_divide_are_refused(dim, heads):
    with pytest.raises(ValueError, match=rf"dim={dim} must be a multiple of 4.*num_heads={heads}; choose"):
        DualGatedAttention(dim, heads)
