"""The backbones, one family per file; importing this package registers them with timm."""

from visionattn.models import biformer, davit, nat, patnet

__all__ = ["biformer", "davit", "nat", "patnet"]
