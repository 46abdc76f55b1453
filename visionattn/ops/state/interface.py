"""Public attention through a state: checks the arguments, picks an implementation, nothing else.

Papers: HER-Seg, arXiv:2504.06205 (code github.com/xq141839/HER-Seg), for the linear form with a rotation; DaViT,
arXiv:2204.03645 (code github.com/dingmyu/davit), for the attention between channels.
"""

import torch
from torch import Tensor

from visionattn.ops._dispatch import use_reference
from visionattn.ops.state import reference

# imported for the operator it registers
from visionattn.ops.state import eager  # noqa: F401  # isort: skip

MODES = ("linear", "channel_softmax")
Rotation = tuple[Tensor, Tensor]


def _check(
    query: Tensor, key: Tensor, value: Tensor, mode: str, rotation: Rotation | None, scale: float | None, eps: float
) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not a form of state_attention; use one of {', '.join(MODES)}")
    if query.dim() != 5 or key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            "state_attention wants query, key and value of one shape [B, H, W, heads, head_dim], "
            f"got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    dtypes, devices = ({getattr(x, name) for x in (query, key, value)} for name in ("dtype", "device"))
    # autocast gives them one dtype; it knows no meta device
    autocast = not query.is_meta and torch.is_autocast_enabled(query.device.type)
    if not query.is_floating_point() or (len(dtypes) > 1 and not autocast):
        raise ValueError(f"query, key, value must share one float dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    if mode == "channel_softmax" and rotation is not None:
        raise ValueError("mode='channel_softmax' has no positions to rotate; leave rotation out or use mode='linear'")
    if mode == "linear" and scale is not None:
        raise ValueError(f"scale={scale} has no effect in mode='linear', which is normalised; leave it out")
    if not eps >= 0:
        raise ValueError(f"eps={eps} must be 0 or more: it keeps the normaliser from 0")
    if rotation is not None:
        _check_rotation(query, rotation)
        devices |= {x.device for x in rotation}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def _check_rotation(query: Tensor, rotation: Rotation) -> None:
    _, H, W, heads, d = query.shape
    if len(rotation) != 2:
        raise ValueError(f"rotation must be a pair (cos, sin), got {len(rotation)} tensors; see rotation_table")
    if heads * d % 2:
        raise ValueError(f"a rotation needs an even number of channels, got {heads} heads of {d}")
    wanted = (H, W, heads * d // 2)
    for name, x in zip(("cos", "sin"), rotation, strict=True):
        if x.shape != wanted or not x.is_floating_point():
            raise ValueError(
                f"{name} of the rotation must be a float tensor {list(wanted)} for this map, got {x.dtype} "
                f"{list(x.shape)}; rotation_table({H}, {W}, {heads * d}) makes it"
            )
        if x.requires_grad:
            raise ValueError(f"{name} of the rotation gets no gradient; pass it detached")


def state_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mode: str = "linear",
    rotation: Rotation | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Attention whose keys and values become one ``[d, d]`` matrix a head before the queries meet them.

    ``"linear"``: with ``phi(x) = elu(x) + 1`` and ``phi~`` its rotation,
    ``out_i = phi~(q_i) (mean_j phi~(k_j)^T v_j) / (phi(q_i) . mean_j phi(k_j) + eps)``.

    ``"channel_softmax"``: ``A = softmax(scale k^T v)`` over its last axis, ``out = q A^T``.

    Args:
        query: ``[B, H, W, heads, head_dim]``; slices of a packed projection go in as they are.
        key: The same shape and dtype.
        value: The same shape and dtype.
        mode: ``"linear"`` or ``"channel_softmax"``.
        rotation: Cosines and sines ``[H, W, heads * head_dim / 2]`` of the angles by which channels ``(2i, 2i + 1)`` of
            all heads together are turned as complex numbers, as from ``rotation_table``; the normaliser takes features
            that are not turned. Gets no gradient. Only for ``"linear"``.
        scale: Of the scores of ``"channel_softmax"``; ``head_dim ** -0.5`` if None.
        eps: Added to the normaliser of ``"linear"``.

    Returns:
        ``[B, H, W, heads, head_dim]``, contiguous, dtype of ``query`` (under autocast its dtype); sums are float32 or
        more.

    Raises:
        ValueError: An unknown mode, shapes, dtypes or devices that do not fit, a rotation or scale that the mode does
            not have, a rotation that wants a gradient, a negative ``eps``.
    """
    if not torch.compiler.is_compiling() and not torch.jit.is_scripting():
        _check(query, key, value, mode, rotation, scale, eps)
    softmax = mode == "channel_softmax"
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    cos, sin = (None, None) if rotation is None else rotation
    if use_reference():
        return reference.state_attention(query, key, value, cos, sin, factor, eps, softmax)
    return torch.ops.visionattn.state_attention(query, key, value, cos, sin, factor, eps, softmax)[0]


def rotation_table(
    height: int,
    width: int,
    channels: int,
    *,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Rotation:
    """Cosines and sines of the 2-D rotary position code.

    With ``T = channels / 4`` frequencies ``theta_t = base ** (-t / T)`` the pixel ``(y, x)`` has the angles
    ``[y theta, x theta]`` in radians.

    Args:
        height: Rows ``H``.
        width: Columns ``W``.
        channels: Of all heads together, a multiple of 4.
        base: Ratio of the first frequency to the one after the last.
        device: Of the tables.
        dtype: Of the tables; angles are float32 in any case, as in the published code.

    Returns:
        ``cos`` and ``sin``, ``[H, W, channels / 2]`` each.

    Raises:
        ValueError: Sizes below 1, channels that are no multiple of 4, or a base that is not positive.
    """
    if not torch.compiler.is_compiling() and not torch.jit.is_scripting():  # a size may be a symbol there
        if height < 1 or width < 1:
            raise ValueError(f"a rotation table needs a map of at least 1x1 pixels, got {height}x{width}")
        if channels < 4 or channels % 4:
            raise ValueError(f"channels={channels} must be a multiple of 4: pairs for rows and as many for columns")
        if not base > 0:
            raise ValueError(f"base={base} must be positive")
    count = channels // 4
    theta = base ** (-torch.arange(count, dtype=torch.float32, device=device) / count)
    y = torch.arange(height, dtype=torch.float32, device=device)[:, None, None] * theta
    x = torch.arange(width, dtype=torch.float32, device=device)[None, :, None] * theta
    angle = torch.cat((y.expand(height, width, count), x.expand(height, width, count)), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)
