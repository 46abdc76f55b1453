"""Effective receptive fields: how much every pixel of the image counts for the middle of a map."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionattn.explain._need import frozen

SHARES = (0.2, 0.3, 0.5, 0.99)
_MAPS = 6  # drawn at most: of models with a map per block some


@dataclass
class ReceptiveField:
    """Effective receptive field of the middle pixel of one map.

    Args:
        stage: Number of the map among the model's, counted from 1.
        heat: Mean size of the gradient, ``[H, W]``, scaled to sum 1.
        ratios: For each share of the heat the area of the smallest square around the middle that holds it, over the
            area of the image.
    """

    stage: int
    heat: Tensor
    ratios: dict[float, float]


def receptive_fields(
    model: nn.Module, images: Tensor, shares: Sequence[float] = SHARES, batch: int = 4
) -> list[ReceptiveField]:
    """Effective receptive fields of a model's maps.

    The sum of the channels of a map's middle pixel is differentiated by the image; sizes of the gradient are summed
    over colours and averaged over images. What chooses between regions (routing) has no gradient and does not count.

    Args:
        model: A backbone of this package or of timm with ``forward_intermediates``; it is left as it was.
        images: Normalised images, ``[N, C, H, W]``, or random ones of that size.
        shares: Shares of the heat for which areas are measured, in ``(0, 1]``.
        batch: Images at once.

    Returns:
        One entry per map, in their order; of models with more than six maps six.

    Raises:
        ValueError: A model that gives no maps, no images, or a share outside its range.

    Reference: Luo et al., arXiv:1701.04128; the ratios of areas as in RepLKNet, arXiv:2203.06717.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no forward_intermediates, which gives the maps to differentiate")
    if images.dim() != 4 or not len(images):
        raise ValueError(f"receptive_fields takes images [N, C, H, W], got shape {list(images.shape)}")
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares={tuple(shares)} must lie in (0, 1]")
    heats: dict[int, Tensor] = {}
    sizes: dict[int, tuple[int, int]] = {}
    with frozen(model), torch.enable_grad():
        for part in images.split(batch):
            x = part.detach().clone().requires_grad_()
            maps = model.forward_intermediates(x, intermediates_only=True)
            for i in sorted({round(j * (len(maps) - 1) / (_MAPS - 1)) for j in range(_MAPS)}):
                sizes[i] = height, width = maps[i].shape[2:]
                middle = maps[i][:, :, height // 2, width // 2].sum()
                (gradient,) = torch.autograd.grad(middle, x, retain_graph=True)
                heats[i] = heats.get(i, 0) + gradient.abs().sum(dim=(0, 1)).double()
    return [_measured(i, heat / heat.sum().clamp(min=1e-300), sizes[i], shares) for i, heat in heats.items()]


def _measured(index: int, heat: Tensor, size: tuple[int, int], shares: Sequence[float]) -> ReceptiveField:
    middles = [(n // 2 + 0.5) * side / n - 0.5 for n, side in zip(size, heat.shape, strict=True)]
    rows, columns = (
        (torch.arange(side, device=heat.device) - middle).abs()
        for side, middle in zip(heat.shape, middles, strict=True)
    )
    radius = torch.maximum(rows[:, None], columns[None, :]).flatten()
    order = radius.argsort(stable=True)
    held, reached = heat.flatten()[order].cumsum(0), radius[order]
    ratios = {}
    for share in shares:
        needed = int(torch.searchsorted(held, min(share, held[-1].item())).clamp(max=len(held) - 1))
        ratios[float(share)] = (radius <= reached[needed]).double().mean().item()
    return ReceptiveField(index + 1, heat, ratios)
