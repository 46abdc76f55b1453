"""Windows without overlap as registered operators, for the same reason as padding.

How many windows a map has is an expression of its size, and may be one: PyTorch's own reshapes then add conditions on
the size to an exported program.
"""

from visionattn.ops.windows.interface import join_windows, split_windows

__all__ = ["join_windows", "split_windows"]
