"""Pure functions on tensors: no modules, no parameters, nothing imported from the rest of the package."""

from visionattn.ops._dispatch import backend, use_backend
from visionattn.ops.affine import affine_add, affine_join
from visionattn.ops.depthwise import depthwise_conv
from visionattn.ops.linear import linear, mlp
from visionattn.ops.neighborhood import neighborhood_attention, neighborhood_sum
from visionattn.ops.norm import add_layer_norm, layer_norm
from visionattn.ops.padding import crop, pad_to_at_least, pad_to_multiple
from visionattn.ops.routing import region_mean, routed_attention, topk_regions
from visionattn.ops.state import rotation_table, state_attention
from visionattn.ops.windows import join_windows, split_windows

__all__ = [
    "add_layer_norm",
    "affine_add",
    "affine_join",
    "backend",
    "crop",
    "depthwise_conv",
    "join_windows",
    "layer_norm",
    "linear",
    "mlp",
    "neighborhood_attention",
    "neighborhood_sum",
    "pad_to_at_least",
    "pad_to_multiple",
    "region_mean",
    "rotation_table",
    "routed_attention",
    "split_windows",
    "state_attention",
    "topk_regions",
    "use_backend",
]
