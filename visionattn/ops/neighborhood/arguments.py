"""Checks of the neighbourhood operators' arguments.

The public functions make them, except where a compiler traces them with sizes that are symbols; so the registered
operators make them again when they run, for kernels do not notice what lies beyond a tensor.
"""

from collections.abc import Sequence

from torch import Tensor


def _check_kernel(
    name: str, kernel: Sequence[int], dilation: Sequence[int], H: int, W: int, stride: Sequence[int] = (1, 1)
) -> None:
    for k, d, s, length, axis in zip(kernel, dilation, stride, (H, W), ("height", "width"), strict=True):
        if k < 1 or (k % 2 == 0 and s % 2 == 1) or d < 1:  # around an even stride an even window is symmetric
            even = f" (or even where stride={tuple(stride)} is)" if max(stride) > 1 else ""
            raise ValueError(f"{name}={tuple(kernel)} must be odd{even} and dilation={tuple(dilation)} at least 1")
        if not 1 <= s <= k:
            raise ValueError(
                f"stride={tuple(stride)} must be at least 1 and at most {name}={tuple(kernel)}, or a query would lie "
                f"outside its own window; in {axis} choose 1 (a window for every query) to {k} (none overlap), or "
                "raise the kernel"
            )
        if k > 1 and k * d > length:  # one pixel has no distance
            raise ValueError(
                f"{name}={tuple(kernel)} with dilation={tuple(dilation)} needs a map of at least {k * d} pixels in "
                f"{axis}, got {H}x{W}; pad it first (visionattn.ops.pad_to_at_least) or lower kernel or dilation"
            )


def _check_devices(tensors: Sequence[Tensor | None]) -> None:
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int] = (1, 1),
) -> None:
    """Check the arguments of ``neighborhood_attention``.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, an even kernel with an odd stride, a stride below 1 or
            beyond the kernel, or a window that exceeds the map.
    """
    if query.dim() != 5 or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            "query, key and value must be [B, H, W, heads, head_dim] alike, "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(f"query, key, value must share one float dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    _check_kernel("kernel_size", kernel, dilation, query.shape[1], query.shape[2], stride)
    table = (query.shape[3], 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    if bias is not None and bias.shape != table:
        raise ValueError(f"bias must be {list(table)} for this kernel and these heads, got {list(bias.shape)}")
    _check_devices((query, key, value, bias))


def check_sum(
    logits: Tensor,
    value: Tensor,
    kernels: Sequence[int],
    biases: Sequence[Tensor] | None = None,
    table: Tensor | None = None,
) -> None:
    """Check the arguments of ``neighborhood_sum``.

    Args:
        logits: As there.
        value: As there.
        kernels: As there.
        biases: As there.
        table: All of them side by side as the registered operator takes them, ``[groups, entries]``.

    Raises:
        ValueError: Shapes or devices that do not fit, an even kernel, or one that exceeds the map.
    """
    taps, count = sum(k * k for k in kernels), len(kernels)
    groups = logits.shape[2] if logits.dim() == 5 else 0
    if (
        value.dim() != 5
        or logits.shape != (value.shape[0], taps, groups, *value.shape[1:3])
        or value.shape[3] != count * groups
    ):
        raise ValueError(
            f"for the kernels {list(kernels)} logits must be [B, {taps}, groups, H, W] and value "
            f"[B, H, W, {count} * groups, d], got {tuple(logits.shape)} and {tuple(value.shape)}"
        )
    for k in kernels:
        _check_kernel("kernel", (k, k), (1, 1), value.shape[1], value.shape[2])
    if biases is not None and [tuple(b.shape) for b in biases] != [(groups, 2 * k - 1, 2 * k - 1) for k in kernels]:
        raise ValueError(
            f"biases must be [groups={groups}, 2k - 1, 2k - 1] for each of the kernels {list(kernels)}, "
            f"got {[tuple(b.shape) for b in biases]}"
        )
    entries = sum((2 * k - 1) ** 2 for k in kernels)
    if table is not None and table.shape != (groups, entries):
        raise ValueError(f"the table of biases must be [{groups}, {entries}], got {list(table.shape)}")
    _check_devices((logits, value, table, *(biases or ())))
