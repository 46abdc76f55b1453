"""Public neighbourhood operators: check the arguments, pick an implementation, nothing else."""

import torch
from torch import Tensor

from visionattn.ops._dispatch import use_reference
from visionattn.ops.neighborhood import direct, direct_sum, eager, eager_sum, reference  # noqa: F401  (register operators)
from visionattn.ops.neighborhood.arguments import check_attention, check_sum


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    stride: int | tuple[int, int] = 1,
) -> Tensor:
    """Attention of every pixel to the window around it.

    At a border the window is moved inward, never shortened: every pixel has ``kernel_size`` squared keys. With a
    dilation ``D`` the pixels ``D`` apart form groups of their own, each with its own borders.

    With a stride ``S`` windows move on by ``S`` pixels: in a dilation group of length ``n`` the members ``S * g`` to
    ``S * g + S - 1`` share the window of ``min(S * g + S // 2, n - 1)``. A stride of ``kernel_size`` on a map that it
    divides gives windows without overlap, as DaViT and Swin have them.

    Args:
        query: Queries, ``[B, H, W, heads, head_dim]``; any strides.
        key: Keys, shape of ``query``.
        value: Values, shape of ``query``.
        kernel_size: Side of the window in pixels, or (height, width); odd, or even where the stride is.
        dilation: Distance of a window's neighbouring pixels, or one for each axis; ``kernel_size * dilation`` must not
            exceed the map.
        bias: Table of relative positions, ``[heads, 2 * kernel_h - 1, 2 * kernel_w - 1]``, added to the scaled scores;
            entry ``[key - query + kernel - 1]`` in units of the dilated grid.
        scale: Factor on the dot products, ``head_dim ** -0.5`` by default.
        stride: Neighbouring pixels, of a dilation group, that share a window, or one number for each axis; from 1 to
            ``kernel_size``.

    Returns:
        ``[B, H, W, heads, head_dim]``, contiguous, dtype of ``query``.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, an even kernel with an odd stride, a stride below 1 or
            beyond the kernel, or a window that exceeds the map.

    Reference: Neighborhood Attention Transformer, arXiv:2204.07143; dilated, arXiv:2209.15001; with a stride
    Generalized Neighborhood Attention, arXiv:2504.16922.
    """
    kernel = [kernel_size, kernel_size] if isinstance(kernel_size, int) else list(kernel_size)
    dilations = [dilation, dilation] if isinstance(dilation, int) else list(dilation)
    strides = [stride, stride] if isinstance(stride, int) else list(stride)
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    if torch.jit.is_scripting():
        out, _ = torch.ops.visionattn.neighborhood_attention(query, key, value, bias, kernel, dilations, scale, strides)
        return out
    if not torch.compiler.is_compiling():  # sizes may be symbols there, and a check would fix them
        check_attention(query, key, value, bias, kernel, dilations, strides)
    if use_reference():
        return reference.neighborhood_attention(query, key, value, bias, kernel, dilations, scale, strides)[0]
    if not torch.compiler.is_compiling():
        out = direct.neighborhood_attention(query, key, value, bias, kernel, dilations, scale, strides)
        if out is not None:
            return out
    return torch.ops.visionattn.neighborhood_attention(query, key, value, bias, kernel, dilations, scale, strides)[0]


def _side_by_side(biases: list[Tensor] | None) -> Tensor | None:
    return None if biases is None else torch.cat([table.flatten(1) for table in biases], dim=1)


def neighborhood_sum(
    logits: Tensor,
    value: Tensor,
    kernel_sizes: list[int],
    biases: list[Tensor] | None = None,
    softmax: bool = True,
) -> Tensor:
    """Sum of the window around every pixel, with weights given for each pixel: a dynamic convolution.

    Several kernels work side by side, each on channels of its own. Windows lie as in ``neighborhood_attention``.

    Args:
        logits: Weights before the softmax, ``[B, taps, groups, H, W]`` with ``taps`` the sum of the squared kernels, in
            their order, row by row: what a 1 x 1 convolution emits.
        value: ``[B, H, W, kernels * groups, d]``, the first ``groups`` for the first kernel.
        kernel_sizes: Sides of the windows, odd.
        biases: For each kernel a table of relative positions ``[groups, 2k - 1, 2k - 1]`` that is added to the logits.
        softmax: Normalise the weights over each window.

    Returns:
        ``[B, H, W, kernels * groups, d]``, contiguous, dtype of ``value``.

    Raises:
        ValueError: Shapes or devices that do not fit, an even kernel, or one that exceeds the map.

    Reference: the context-mixing convolution of OverLoCK, arXiv:2502.20087; without it NATTEN's ``na2d_av``.
    """
    kernels = list(kernel_sizes)
    if torch.jit.is_scripting():
        return torch.ops.visionattn.neighborhood_sum(logits, value, _side_by_side(biases), kernels, softmax)[0]
    if not torch.compiler.is_compiling():
        check_sum(logits, value, kernels, biases)
    bias = _side_by_side(biases)
    if use_reference():
        return reference.neighborhood_sum(logits, value, bias, kernels, softmax)[0]
    out = None if torch.compiler.is_compiling() else direct_sum.neighborhood_sum(logits, value, bias, kernels, softmax)
    return out if out is not None else torch.ops.visionattn.neighborhood_sum(logits, value, bias, kernels, softmax)[0]
