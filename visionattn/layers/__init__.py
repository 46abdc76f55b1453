"""Modules used by two or more backbones, that wrap an operator, or that are of use by themselves."""

from visionattn.layers.channel_affine import ChannelAffine, add_scaled, update_last
from visionattn.layers.channels_last import (
    ChannelsLast,
    MapSequential,
    add_normalize,
    convolve,
    normalize,
    on_map,
    project,
    transform,
)
from visionattn.layers.context_mixing import ContextMixing
from visionattn.layers.deformable_patches import DeformablePatches
from visionattn.layers.dilated_reparam import DilatedReparamConv
from visionattn.layers.dual_gated_attention import DualGatedAttention, DualGatedBlock
from visionattn.layers.hilo_attention import HiLoAttention
from visionattn.layers.neighborhood_attention import NeighborhoodAttention
from visionattn.layers.routing_attention import RoutingAttention
from visionattn.layers.windows import (
    ResidualDepthwiseConv,
    WindowAttention,
    multi_head_attention,
)

__all__ = [
    "ChannelAffine",
    "ChannelsLast",
    "ContextMixing",
    "DeformablePatches",
    "DilatedReparamConv",
    "DualGatedAttention",
    "DualGatedBlock",
    "HiLoAttention",
    "MapSequential",
    "NeighborhoodAttention",
    "ResidualDepthwiseConv",
    "RoutingAttention",
    "WindowAttention",
    "add_normalize",
    "add_scaled",
    "convolve",
    "multi_head_attention",
    "normalize",
    "on_map",
    "project",
    "transform",
    "update_last",
]
