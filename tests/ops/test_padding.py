"""Padding to a multiple and cropping."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

from visionattn.ops import crop, pad_to_multiple, use_backend

BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size, multiple, padded", [((5, 7), 4, (8, 8)), ((1, 13), 7, (7, 14)), ((6, 5), 3, (6, 6))])
def test_pad_adds_zeros_below_and_right(backend, dtype, size, multiple, padded):
    x = torch.randn(2, *size, 3).to(dtype)
    with use_backend(backend):
        result = pad_to_multiple(x, multiple)
    assert result.shape == (2, *padded, 3) and result.dtype == dtype and result.is_contiguous()
    assert torch.equal(result[:, : size[0], : size[1]], x)
    assert not result[:, size[0] :].any() and not result[:, :, size[1] :].any()


@BACKENDS
@pytest.mark.parametrize("height, width", [(3, 2), (5, 1), (1, 7), (5, 6)])
def test_crop_keeps_the_top_left(backend, height, width):
    x = torch.randn(2, 5, 7, 3)
    with use_backend(backend):
        assert torch.equal(crop(x, height, width), x[:, :height, :width])


@BACKENDS
def test_fitting_map_is_returned_itself(backend):
    x = torch.randn(1, 4, 6, 2)
    with use_backend(backend):
        assert pad_to_multiple(x, 2) is x and pad_to_multiple(x, 1) is x and crop(x, 4, 6) is x


@BACKENDS
def test_gradients_are_each_others_operator(backend):
    x, y = torch.randn(2, 5, 7, 3, requires_grad=True), torch.randn(2, 8, 8, 3, requires_grad=True)
    grad_padded, grad_cropped = torch.randn(2, 8, 8, 3), torch.randn(2, 5, 7, 3)
    with use_backend(backend):
        pad_to_multiple(x, 4).backward(grad_padded)
        crop(y, 5, 7).backward(grad_cropped)
    assert torch.equal(x.grad, grad_padded[:, :5, :7])
    assert torch.equal(y.grad, F.pad(grad_cropped, (0, 0, 0, 1, 0, 3)))


def test_second_derivative_passes_through():
    x = torch.randn(1, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: crop(pad_to_multiple(x, 4).square(), 2, 6), [x])


def test_result_shares_no_memory():
    x = torch.randn(1, 4, 6, 2)
    for result in (torch.ops.visionattn.pad_to(x, 4, 6), torch.ops.visionattn.crop(x, 4, 6), crop(x, 2, 6)):
        assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_permuted_map_gives_the_same():
    x = torch.randn(2, 3, 5, 7).permute(0, 2, 3, 1)
    assert torch.equal(pad_to_multiple(x, 4), pad_to_multiple(x.contiguous(), 4))
    assert crop(x, 2, 3).is_contiguous()


@BACKENDS
def test_empty_batch_is_padded_and_cropped(backend):
    with use_backend(backend):
        assert pad_to_multiple(torch.zeros(0, 5, 7, 3), 4).shape == (0, 8, 8, 3)
        assert crop(torch.zeros(0, 5, 7, 3), 2, 2).shape == (0, 2, 2, 3)


class PadAndCrop(nn.Module):
    """``[B, H, W, C]`` to the same size through a padded map, and the padded map."""

    def forward(self, x):
        padded = pad_to_multiple(x, 4)
        return crop(padded.sin(), x.shape[1], x.shape[2]), padded.sum((1, 2))


def test_compiled_for_free_sizes_equals_eager():
    compiled = torch.compile(PadAndCrop(), fullgraph=True, backend="aot_eager")
    for size in ((2, 5, 7, 3), (2, 8, 9, 3), (2, 8, 12, 3), (1, 3, 2, 3)):
        x = torch.randn(size, requires_grad=True)
        out, total = compiled(x)
        assert_close(f"out at {size}", PadAndCrop()(x)[0], out, 1e-7)
        (grad,) = torch.autograd.grad(out.sum() + total.sum(), x)
        assert_close(f"grad at {size}", x.cos() + 1, grad, 1e-6)


def test_exported_with_free_sizes_equals_eager():
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        PadAndCrop(), (torch.randn(2, 5, 7, 3),), dynamic_shapes=({0: free, 1: free, 2: free},)
    )
    for size in ((2, 5, 7, 3), (3, 8, 12, 3), (5, 6, 2, 3)):
        x = torch.randn(size)
        for expected, actual in zip(PadAndCrop()(x), program.module()(x), strict=True):
            assert_close(f"at {size}", expected, actual, 1e-7)
