"""What only NAT and DiNAT have: tagged variants, other kernels and dilations, small maps."""

import pytest
import timm
import torch
from helpers import assert_close


def test_tags_bring_dilations_and_kernel():
    attns = {}
    for tag in ("in22k_ft_in1k", "in22k_ft_in1k_384", "in22k_ft_in1k_384_k11"):
        model = timm.create_model(f"dinat_l.{tag}", device="meta")
        attns[tag] = [[(b.attn.kernel_size, b.attn.dilation) for b in stage.blocks[:3]] for stage in model.stages]
        assert model.pretrained_cfg["input_size"][1] == (384 if "384" in tag else 224)
    small, large, k11 = attns.values()
    assert small == [[(7, d) for d in row] for row in ((1, 8, 1), (1, 4, 1), (1, 2, 1), (1, 1, 1))]
    assert large == [[(7, d) for d in row] for row in ((1, 13, 1), (1, 6, 1), (1, 3, 1), (1, 1, 1))]
    assert k11 == [[(11, d) for _, d in row] for row in small]
    model = timm.create_model("dinat_l.in22k_ft_in1k_384", device="meta", dilations=2)
    assert model.stages[0].blocks[0].attn.dilation == 2


def test_weights_serve_other_dilations():
    model, dilated = timm.create_model("test_nat"), timm.create_model("test_nat", dilations=((2, 1), 2, (1, 2), 1))
    dilated.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 96)
    assert not torch.allclose(model(x), dilated(x))


def test_tables_are_resampled_for_another_kernel(tmp_path):
    model, path = timm.create_model("test_nat"), tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    overlay = dict(file=str(path))
    wide = timm.create_model("test_nat", pretrained=True, pretrained_cfg_overlay=overlay, kernel_size=5)
    table, own = wide.stages[0].blocks[0].attn.rpb, model.stages[0].blocks[0].attn.rpb
    assert table.shape[1:] == (9, 9) and own.shape[1:] == (5, 5)
    assert_close("middle", own[:, 2, 2], table[:, 4, 4], 1e-6)


@pytest.mark.parametrize("size", [(33, 40), (64, 224), (200, 65)])
def test_maps_below_the_window_are_padded(size):
    model = timm.create_model("test_dinat", num_classes=7)
    out = model(torch.randn(2, 3, *size))
    out.square().sum().backward()
    assert out.shape == (2, 7) and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(kernel_size=4), "kernel_size=4 must be odd"),
        (dict(dilations=(1, 2, 3)), r"dilations need one value for each of the 4 stages.*\(1, 2, 3\)"),
        (dict(dilations=0), "dilation=0 must be at least 1"),
        (dict(num_heads=(1, 2, 3, 5)), "num_heads=5 must divide dim=64"),
    ],
)
def test_bad_architecture_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_nat", **kwargs)
