"""Layer norm over the channels, alone or behind the addition of a branch."""

from visionattn.ops.norm.interface import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "layer_norm"]
