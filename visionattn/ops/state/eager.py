"""``visionattn::state_attention``: the operator with its gradient, for every device.

With ``phi(x) = elu(x) + 1``, ``~`` for the rotation and ``g`` the gradient of the output, the linear form has

    S = mean_j k~_j^T v_j,  z_i = 1 / (phi(q_i) . mean_j phi(k_j) + eps),  out_i = z_i q~_i S
    t_i = g_i S^T,  d q~_i = z_i t_i,  d(1 / z_i) = -z_i^2 (q~_i . t_i),  dS = sum_i z_i q~_i^T g_i

so that neither pass needs the output again. The other form is ``out = q A^T`` with ``A = softmax(scale k^T v)``.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionattn.ops._dispatch import launcher, register_autocast, use_triton
from visionattn.ops.state.reference import rotate


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _heads_first(x: Tensor) -> Tensor:
    """``[B, H, W, heads, d]`` as ``[B, heads, H W, d]``."""
    return x.flatten(1, 2).transpose(1, 2)


def _heads_last(x: Tensor, like: Tensor) -> Tensor:
    """Back again, contiguous, in the dtype of ``like``."""
    return x.transpose(1, 2).to(like.dtype, memory_format=torch.contiguous_format).contiguous().view(like.shape)


def _features(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    """``phi(x)`` and its rotation, ``[B, heads, N, d]``."""
    plain = F.elu(_wide(x)) + 1
    turned = plain if cos is None or sin is None else rotate(plain, cos.to(plain.dtype), sin.to(plain.dtype))
    return _heads_first(plain), _heads_first(turned)


def _back(grad: Tensor, like: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """The inverse rotation of a gradient ``[B, heads, N, d]``."""
    if cos is None or sin is None:
        return grad
    grad = grad.transpose(1, 2).reshape(like.shape)
    return _heads_first(rotate(grad, cos.to(grad.dtype), -sin.to(grad.dtype)))


@torch.library.custom_op("visionattn::state_attention", mutates_args=())
def state_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    eps: float,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention through a state.

    Returns:
        The output ``[B, H, W, heads, d]``; the state ``[B, heads, d, d]`` in float32 or more, ``S`` or ``A``; the mean
        of ``phi(key)``, ``[B, heads, d]``, or an empty tensor.
    """
    if use_triton(query) and launcher("state").serves(query, key, value, cos):
        return launcher("state").forward(query, key, value, cos, sin, scale, eps, softmax)
    if softmax:
        q, k, v = (_heads_first(_wide(x)) for x in (query, key, value))
        state = ((k * scale).transpose(2, 3) @ v).softmax(dim=-1)
        return _heads_last(q @ state.transpose(2, 3), query), state, state.new_empty(0)
    count = query.shape[1] * query.shape[2]
    k, turned = _features(key, cos, sin)
    norm = k.mean(dim=2)
    state = (turned / count).transpose(2, 3) @ _heads_first(_wide(value))
    q, turned = _features(query, cos, sin)
    out = (turned @ state) / (q @ norm[..., None] + eps)
    return _heads_last(out, query), state, norm


@state_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    eps: float,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, _, heads, d = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    state = query.new_empty((B, heads, d, d), dtype=wide)
    norm = state.new_empty(0) if softmax else state.new_empty((B, heads, d))
    return query.new_empty(query.shape), state, norm


@torch.library.custom_op("visionattn::state_attention_backward", mutates_args=())
def state_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    state: Tensor,
    norm: Tensor,
    scale: float,
    eps: float,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    if use_triton(query) and launcher("state").serves(query, key, value, cos):
        return launcher("state").backward(grad_out, query, key, value, cos, sin, state, norm, scale, eps, softmax)
    with torch.autocast(query.device.type, enabled=False):  # a backward pass may run inside its block
        g = _heads_first(_wide(grad_out))
        if softmax:
            q, k, v = (_heads_first(_wide(x)) for x in (query, key, value))
            dq, da = g @ state, g.transpose(2, 3) @ q
            ds = scale * state * (da - (da * state).sum(dim=-1, keepdim=True))
            return _heads_last(dq, query), _heads_last(v @ ds.transpose(2, 3), key), _heads_last(k @ ds, value)
        count = query.shape[1] * query.shape[2]
        q, turned = _features(query, cos, sin)
        z = 1 / (q @ norm[..., None] + eps)
        t = g @ state.transpose(2, 3)
        dz = -(z**2) * (turned * t).sum(dim=-1, keepdim=True)
        dq = _back(z * t, query, cos, sin) + dz * norm[:, :, None]
        ds, dnorm = (z * turned).transpose(2, 3) @ g / count, (dz * q).sum(dim=2, keepdim=True) / count
        k, turned = _features(key, cos, sin)
        dk = _back(_heads_first(_wide(value)) @ ds.transpose(2, 3), key, cos, sin) + dnorm
        # phi' is 1 above 0 and phi itself below
        dq, dk = dq * q.clamp(max=1.0), dk * k.clamp(max=1.0)
        return _heads_last(dq, query), _heads_last(dk, key), _heads_last(turned @ ds, value)


@state_attention_backward.register_fake
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    state: Tensor,
    norm: Tensor,
    scale: float,
    eps: float,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.eps, ctx.softmax = inputs
    _, state, norm = output
    ctx.save_for_backward(*tensors, state, norm)


def _vjp(ctx: Any, grad_out: Tensor, grad_state: Tensor, grad_norm: Tensor) -> tuple[Tensor | None, ...]:
    # state and norm never leave the interface, so that nothing comes back through them
    grads = state_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale, ctx.eps, ctx.softmax)
    return *grads, None, None, None, None, None


state_attention.register_autograd(_vjp, setup_context=_setup)
register_autocast(state_attention, tensors=3)


@register_flop_formula(torch.ops.visionattn.state_attention)
def _flops(
    query: Any, key: Any, value: Any, cos: Any, sin: Any, scale: Any, eps: Any, softmax: Any, out_shape: Any = None
) -> int:
    """A multiply-add for every entry of the state and pixel, in the state and in the output."""
    return 4 * math.prod(query) * query[-1]


@register_flop_formula(torch.ops.visionattn.state_attention_backward)
def _backward_flops(grad_out: Any, query: Any, *rest: Any, out_shape: Any = None) -> int:
    """Four such products: gradients of query, state, key and value."""
    return 8 * math.prod(query) * query[-1]
