"""The backbones, one family per file; importing this package registers them with timm."""

from visionattn.models import activator, biformer, davit, nat, ninformer

__all__ = ["activator", "biformer", "davit", "nat", "ninformer"]
