"""Region routing: pool a map to regions, pick the best key regions, attend only to those (BiFormer)."""

from visionattn.ops.routing.interface import region_mean, routed_attention, topk_regions

__all__ = ["region_mean", "routed_attention", "topk_regions"]
