"""The neighbourhood sum launched without PyTorch's dispatcher, for eager calls on a GPU, where host time counts.

Where something has to see the calls (a compiler, an exporter, a dispatch mode) the registered operator runs instead;
both launch the same kernels.
"""

from typing import Any

import torch
from torch import Tensor

from visionattn.ops._dispatch import autocast_dtype, differentiable_once, launcher, launches, learns


class _NeighborhoodSum(torch.autograd.Function):
    """``visionattn::neighborhood_sum`` and its gradient; the log-sum-exp stays inside."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, value: Tensor, bias: Tensor | None, kernels: list[int], softmax: bool
    ) -> Tensor:
        out, lse = launcher("neighborhood", "launch_sum").forward(logits, value, bias, kernels, softmax)
        ctx.save_for_backward(logits, value, bias, out, lse)
        ctx.rest = kernels, softmax
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        run, wanted = launcher("neighborhood", "launch_sum").backward, ctx.needs_input_grad[2]
        dlogits, dvalue, dbias = run(grad_out, None, *ctx.saved_tensors, *ctx.rest, bias_grad=wanted)
        return dlogits, dvalue, dbias if wanted else None, None, None


def neighborhood_sum(
    logits: Tensor, value: Tensor, bias: Tensor | None, kernels: list[int], softmax: bool
) -> Tensor | None:
    """The sum, or None where this way is not open."""
    if not launches(value) or type(logits) is not Tensor:
        return None
    dtype = autocast_dtype(value)
    if torch.is_autocast_enabled(value.device.type) and dtype != torch.float64:
        logits, value = logits.to(dtype), value.to(dtype)
    if not launcher("neighborhood", "launch_sum").serves(logits, value, bias, kernels):
        return None
    if learns(logits, value, bias):
        return _NeighborhoodSum.apply(logits, value, bias, kernels, softmax)
    return launcher("neighborhood", "launch_sum").forward(logits, value, bias, kernels, softmax)[0]
