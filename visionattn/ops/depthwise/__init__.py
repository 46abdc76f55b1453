"""Depthwise convolution of channels-last maps with what models add to it."""

from visionattn.ops.depthwise.interface import depthwise_conv

__all__ = ["depthwise_conv"]
