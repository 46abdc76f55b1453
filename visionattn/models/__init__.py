"""The backbones, one family per file; importing this package registers them with timm."""

from visionattn.models import activator, biformer, davit, lgvit, litv2, nat, ninformer, overlock, patnet

__all__ = ["activator", "biformer", "davit", "lgvit", "litv2", "nat", "ninformer", "overlock", "patnet"]
