"""Zero padding and cropping of channels-last maps as opaque operators.

A map whose height is only a symbol would otherwise carry expressions like ``7*((h + 6)//7)`` through every later
shape check, and ``torch.export`` with free sizes gives up on them. Behind an operator the result is a plain size.
"""

from visionattn.ops.padding.interface import crop, pad_to_at_least, pad_to_multiple

__all__ = ["crop", "pad_to_at_least", "pad_to_multiple"]
