"""Losses that no library has.

Paper: HER-Seg, arXiv:2504.06205. Code: https://github.com/xq141839/HER-Seg, ``loss.py``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DiceFocalLoss(nn.Module):
    """Dice and a focal term on the mean cross entropy, the loss of HER-Seg.

    With ``p = sigmoid(logits)``, sums over batch and pixels and ``BCE`` the mean binary cross entropy of everything:

        ``Dice = (2 sum p t + smooth) / (sum p + sum t + smooth)``
        ``focal = alpha (1 - exp(-BCE)) ** gamma BCE``
        ``loss = dice_weight (1 - Dice) + (1 - dice_weight) focal``

    The focal factor is one for the whole batch, not one per pixel as in other focal losses. Dice is taken per class
    and averaged; the published loss knows one class. It works on logits, where nothing saturates, and is the same
    number as the published one on probabilities.

    Args:
        dice_weight: Weight of the Dice term, in ``[0, 1]``.
        alpha: Factor of the focal term.
        gamma: Exponent of the focal term, at least 0.
        smooth: Added to numerator and denominator of Dice.

    Shape:
        logits: ``[B, K, ...]``.
        target: The same, values in ``[0, 1]``, any dtype.
        returns: A scalar in float32, of float64 logits in float64.

    Raises:
        ValueError: A weight outside ``[0, 1]``, a negative exponent or ``smooth``; in ``forward``, shapes that differ.
    """

    def __init__(self, dice_weight: float = 0.8, alpha: float = 0.8, gamma: float = 2.0, smooth: float = 1.0):
        super().__init__()
        if not 0 <= dice_weight <= 1 or gamma < 0 or smooth < 0:
            raise ValueError(
                "DiceFocalLoss wants dice_weight in [0, 1], gamma >= 0 and smooth >= 0, "
                f"got {dice_weight}, {gamma}, {smooth}"
            )
        self.dice_weight, self.alpha, self.gamma, self.smooth = dice_weight, alpha, gamma, smooth

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.dim() < 2 or logits.shape != target.shape:
            raise ValueError(
                f"DiceFocalLoss wants logits [B, K, ...] and a target of that shape, got {list(logits.shape)} and "
                f"{list(target.shape)}; give the target an axis of classes (target[:, None] for one)"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = target.to(logits.dtype)
        axes = [0, *range(2, logits.dim())]
        p = logits.sigmoid()
        overlap = 2 * (p * target).sum(axes) + self.smooth
        dice = (overlap / (p.sum(axes) + target.sum(axes) + self.smooth)).mean()
        bce = F.binary_cross_entropy_with_logits(logits, target)
        focal = self.alpha * (1 - torch.exp(-bce)) ** self.gamma * bce
        return self.dice_weight * (1 - dice) + (1 - self.dice_weight) * focal
