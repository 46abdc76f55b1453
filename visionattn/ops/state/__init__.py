"""Attention through a state of ``head_dim x head_dim`` numbers a head: its cost is linear in the pixels."""

from visionattn.ops.state.interface import rotation_table, state_attention

__all__ = ["rotation_table", "state_attention"]
