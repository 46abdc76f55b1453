"""Heads: modules that turn the maps of a backbone, or an image, into a task's output."""

from visionattn.heads.herseg import HERSeg
from visionattn.heads.losses import DiceFocalLoss
from visionattn.heads.mask_decoder import MaskDecoder

__all__ = ["DiceFocalLoss", "HERSeg", "MaskDecoder"]
