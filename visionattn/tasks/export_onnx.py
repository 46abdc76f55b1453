"""Operators that PyTorch translates to ONNX for the traced sizes alone, translated for all."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import FLOAT, INT64
from onnxscript.onnx_opset import opset18 as op


def _shares(length: Any, parts: Any) -> Any:
    """Matrix of means, ``[parts, length]``: part ``i`` is that from ``floor(i * length / parts)`` up to, not with,
    ``ceil((i + 1) * length / parts)``, each of its positions by its share.
    """
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    part = op.Unsqueeze(op.Range(zero, parts, one), [1])
    position = op.Unsqueeze(op.Range(zero, length, one), [0])
    first = op.Div(op.Mul(part, length), parts)  # of integers, so rounded down
    end = op.Div(op.Sub(op.Add(op.Mul(op.Add(part, one), length), parts), one), parts)
    inside = op.And(op.GreaterOrEqual(position, first), op.Less(position, end))
    return op.Div(op.Cast(inside, to=FLOAT.dtype), op.Cast(op.Sub(end, first), to=FLOAT.dtype))


def adaptive_avg_pool2d(self: FLOAT, output_size: Sequence[INT64]) -> FLOAT:
    """Means of (nearly) equal parts, ``[B, C, H, W]`` to ``[B, C, *output_size]``, as two products of matrices.

    PyTorch unrolls this operator by the largest number of positions in a part, which it takes from the traced sizes.
    """
    axes = [op.Squeeze(op.Shape(self, start=axis, end=axis + 1), [0]) for axis in (2, 3)]
    parts = [op.Constant(value_int=size) if isinstance(size, int) else size for size in output_size]
    rows, columns = (_shares(length, count) for length, count in zip(axes, parts, strict=True))
    return op.MatMul(op.MatMul(rows, self), op.Transpose(columns, perm=[1, 0]))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d
}
"""For ``custom_translation_table`` of ``torch.onnx.export``."""
