"""Detectors among the models to time, and BiFormer with the attention of its published code."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.layers.routing_attention import RoutingAttention

PUBLISHED_SIZE = (800, 1333)
GATHERED = ":gather"
"""Suffix of a BiFormer's name: regions gathered as copies."""
_OBJECTS = 12
_CLASSES = 80  # of COCO
# regions of BiFormer's published networks for dense tasks; its classifiers have 7
_REGIONS = dict(upernet=8, fpn=8, retinanet=16, mask_rcnn=16)


class GatheredRouting(nn.Module):
    """Bi-level routing attention as the published code computes it, with the weights of another.

    The map is cut into regions before the projection, the chosen regions of keys and values are copied for every
    region of queries, and attention is dense among the copies.

    Args:
        layer: Its parameters are shared.

    Shape:
        x: ``[B, H, W, C]``.
        returns: ``[B, H, W, C]``.

    Reference: BiFormer, arXiv:2303.08810; code rayleizhu/BiFormer, ``ops/bra_legacy.py``.
    """

    def __init__(self, layer: RoutingAttention):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, (height, width), n = self.layer, x.shape[1:3], self.layer.num_regions
        x = F.pad(x, (0, 0, 0, -width % n, 0, -height % n))
        B, H, W, C = x.shape
        h, w, heads = H // n, W // n, layer.num_heads
        x = x.unflatten(2, (n, w)).unflatten(1, (n, h)).transpose(2, 3).reshape(B, n * n, h * w, C)
        q, kv = layer.qkv(x).split([C, 2 * C], dim=-1)
        with torch.no_grad():
            scores = (q.mean(2) * layer.scale) @ kv[..., :C].mean(2).transpose(1, 2)
            index = scores.topk(layer.topk).indices  # [B, n*n, topk]
        copies = kv[:, None].expand(-1, n * n, -1, -1, -1)
        copies = copies.gather(2, index[..., None, None].expand(-1, -1, -1, h * w, 2 * C))
        # [B * n*n, heads, tokens, C / heads]
        k, v = (y.unflatten(-1, (heads, -1)).flatten(2, 3).flatten(0, 1).transpose(1, 2) for y in copies.split(C, -1))
        scores = (q.unflatten(-1, (heads, -1)).flatten(0, 1).transpose(1, 2) * layer.scale) @ k.transpose(2, 3)
        out = _joined((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), B, n, (h, w))
        values = _joined(kv[..., C:].flatten(0, 1), B, n, (h, w)).permute(0, 3, 1, 2)
        out = out + layer.lepe(values).permute(0, 2, 3, 1)
        return layer.proj(out)[:, :height, :width]


def _joined(x: Tensor, batch: int, n: int, region: tuple[int, int]) -> Tensor:
    """Regions ``[B * n*n, h*w, C]`` to a map ``[B, n*h, n*w, C]``."""
    x = x.unflatten(1, region).unflatten(0, (batch, n, n))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def gathered(network: nn.Module) -> nn.Module:
    """Replace the routing attentions of a network by the published form.

    Raises:
        ValueError: It has none.
    """
    found = [name for name, module in network.named_modules() if isinstance(module, RoutingAttention)]
    if not found:
        raise ValueError(f"{GATHERED} is the published form of BiFormer's attention, which this network does not have")
    for name in found:
        network.set_submodule(name, GatheredRouting(network.get_submodule(name)))
    return network


class Boxed(nn.Module):
    """A detector on a batch of images of one size, each with the same objects.

    Shape:
        images: ``[B, 3, H, W]``.
        returns: In training the sum of the losses, otherwise the detections.
    """

    def __init__(self, backbone: str, detector: str, **kwargs: Any):
        from visionattn.heads.detection import Detector

        super().__init__()
        # the images have their final size
        self.network = Detector(backbone, detector, num_classes=_CLASSES, min_size=None, norm_eval=True, **kwargs)
        self.masks = detector == "mask_rcnn"

    def forward(self, images: Tensor) -> Any:
        if not self.training:
            return self.network(list(images))
        height, width = images.shape[2:]
        number = torch.arange(_OBJECTS, device=images.device)
        corner = torch.stack([number % 4 * width / 4, number // 4 * height / 3], -1)
        boxes = torch.cat([corner, corner + torch.tensor([width / 6, height / 5], device=images.device)], -1)
        target = dict(boxes=boxes, labels=number + 1)
        if self.masks:
            rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
            left, top, right, bottom = boxes.T[:, :, None, None]
            inside = (columns >= left) & (columns < right) & (rows[:, None] >= top) & (rows[:, None] < bottom)
            target["masks"] = inside.to(torch.uint8)
        losses = self.network(list(images), [dict(target) for _ in images])
        return torch.stack(list(losses.values())).sum()


def dense_arguments(head: str, backbone: str, size: tuple[int, int], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a network for a dense task: BiFormer's regions there, the size where a backbone wants to know it."""
    own: dict[str, Any] = {}
    if head in _REGIONS and backbone.startswith("biformer"):
        own = dict(n_win=_REGIONS[head])
    elif (cfg := timm.get_pretrained_cfg(backbone, allow_unregistered=True)) and cfg.fixed_input_size:
        own = dict(img_size=tuple(side + -side % 32 for side in size))  # detectors pad so
    return {**kwargs, "backbone_kwargs": {**own, **kwargs.get("backbone_kwargs", {})}}
