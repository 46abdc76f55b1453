"""The backbones, one family per file; importing this package registers them with timm."""

from visionattn.models import biformer, davit, litv2, nat

__all__ = ["biformer", "davit", "litv2", "nat"]
