"""First values of weights."""

from timm.layers import trunc_normal_ as _trunc_normal_
from torch import Tensor


def trunc_normal_(tensor: Tensor, std: float = 1.0) -> Tensor:
    """``timm.layers.trunc_normal_``; nothing on the meta device.

    A tensor without values has none to set, and there each of the steps is interpreted in Python: they would take most
    of the time in which a network is built to count its parameters.
    """
    return tensor if tensor.is_meta else _trunc_normal_(tensor, std=std)
