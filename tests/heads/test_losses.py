"""The loss of HER-Seg against the released code's number."""

import math

import pytest
import torch
from helpers import inputs

from visionattn.heads import DiceFocalLoss

PUBLISHED = 0.39104081080262226  # loss.py of the released code on sigmoid(logits), float64


def test_loss_equals_published():
    logits, noise = inputs((4, 1, 24, 32), 0), inputs((4, 1, 24, 32), 1)
    target = noise + logits > 0.6
    assert DiceFocalLoss()(logits, target).item() == pytest.approx(PUBLISHED, rel=1e-10)


def test_loss_does_not_saturate():
    logits = torch.full((1, 1, 4, 4), 200.0, requires_grad=True)
    loss = DiceFocalLoss()(logits, torch.zeros(1, 1, 4, 4))
    loss.backward()
    assert math.isclose(loss.item(), 0.8 * (1 - 1 / 17) + 0.2 * 0.8 * 200, rel_tol=1e-5)
    assert logits.grad.abs().min() > 0


def test_dice_is_averaged_over_classes():
    logits, target = inputs((2, 3, 4, 5)), inputs((2, 3, 4, 5), 1) > 0
    only_dice = DiceFocalLoss(dice_weight=1.0)
    single = [only_dice(logits[:, k : k + 1], target[:, k : k + 1]).item() for k in range(3)]
    assert only_dice(logits, target).item() == pytest.approx(sum(single) / 3, rel=1e-12)


def test_half_precision_is_computed_in_float32():
    logits, target = inputs((2, 1, 64, 64)).bfloat16(), inputs((2, 1, 64, 64), 1) > 0
    loss = DiceFocalLoss()(logits, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(DiceFocalLoss()(logits.double(), target).item(), rel=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"got \[2, 1, 4, 4\] and \[2, 4, 4\]; give the target an axis"):
        DiceFocalLoss()(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"dice_weight in \[0, 1\].*got 1.5"):
        DiceFocalLoss(dice_weight=1.5)
