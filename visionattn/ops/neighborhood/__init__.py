"""Neighbourhood attention: every pixel attends to a window around it, or sums it with weights of its own."""

from visionattn.ops.neighborhood.interface import neighborhood_attention, neighborhood_sum

__all__ = ["neighborhood_attention", "neighborhood_sum"]
