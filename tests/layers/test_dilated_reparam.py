"""The re-parameterisable convolution: what must hold for any weights (``tests/models`` compares published ones)."""

import pytest
import torch
from helpers import assert_close
from timm.utils import reparameterize_model
from torch import nn

from visionattn.layers import DilatedReparamConv


@pytest.mark.parametrize("side", [5, 7, 9, 11, 13, 15, 17, 19])
def test_fused_convolution_equals_the_sum(side):
    layer = DilatedReparamConv(3, side, dtype=torch.float64)
    x = torch.randn(4, 3, 21, 18, dtype=torch.float64)
    layer(2 * x + 1)  # running statistics other than 0 and 1
    model = nn.Sequential(layer).eval()
    fused = reparameterize_model(model)
    assert type(fused[0]) is nn.Conv2d and fused[0].kernel_size == (side, side)
    assert not fused[0].training and fused[0].weight.dtype == torch.float64 and fused[0].weight.requires_grad
    assert_close("output", model(x), fused(x), 1e-14)


def test_fused_convolution_of_a_frozen_layer_is_frozen():
    layer = DilatedReparamConv(3, 5).requires_grad_(False)
    assert not any(p.requires_grad for p in layer.fuse().parameters())


@pytest.mark.parametrize("side", [1, 3, 6, 12, 21])
def test_unknown_kernel_is_named(side):
    with pytest.raises(ValueError, match=f"kernel_size={side} must be one of 5, 7, 9"):
        DilatedReparamConv(4, side)
