"""Linear layers and MLPs whose training step costs little host time."""

from visionattn.ops.linear.interface import linear, mlp

__all__ = ["linear", "mlp"]
