"""Factor and offset of every channel, with the addition of another map."""

from visionattn.ops.affine.interface import affine_add, affine_join

__all__ = ["affine_add", "affine_join"]
