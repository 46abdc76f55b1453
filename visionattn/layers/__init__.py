"""Modules used by two or more backbones, or that wrap an operator."""

from visionattn.layers.routing_attention import RoutingAttention

__all__ = ["RoutingAttention"]
