"""Where the evidence for a class lies in the last map: Grad-CAM."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.explain._need import frozen, need
from visionattn.models.overlock import FocusStage


@dataclass
class ClassActivation:
    """Class activation of one image.

    Args:
        heat: Evidence for the class, ``[H, W]`` in pixels of the image, scaled to ``[0, 1]``.
        target: The class.
        probability: What the model gives the class.
        layer: Name of the module whose map was used.
    """

    heat: Tensor
    target: int
    probability: float
    layer: str


def grad_cam(model: nn.Module, image: Tensor, target: int | None = None, layer: str | None = None) -> ClassActivation:
    """Grad-CAM: the last map, its channels weighted by their mean gradient for a class, negative values cut.

    Args:
        model: A classifier of this package or of timm; it is left as it was.
        image: One normalised image, ``[1, C, H, W]``.
        target: Class; the most likely one by default.
        layer: Name of the module whose output is used: a map ``[1, C, h, w]`` or ``[1, h, w, C]``, or tokens
            ``[1, N, C]``; by default the last stage (the first norm of the last block where a class token is read).

    Returns:
        The heat map.

    Raises:
        ValueError: A model without classes, a class or layer that it has not, or an output that is no map.
        ImportError: pytorch-grad-cam is not installed.

    Reference: Grad-CAM, arXiv:1610.02391; library pytorch-grad-cam.
    """
    library = need("pytorch_grad_cam", "grad-cam")
    targets = need("pytorch_grad_cam.utils.model_targets", "grad-cam")
    name, module = _layer(model, layer)
    with frozen(model):
        with torch.no_grad():
            logits = model(image)
        if logits.dim() != 2 or not logits.shape[1]:
            raise ValueError(f"Grad-CAM needs a classifier, but the model gives {list(logits.shape)}; set num_classes")
        target = int(logits[0].argmax()) if target is None else target
        if not 0 <= target < logits.shape[1]:
            raise ValueError(f"class {target}: the model has the classes 0 to {logits.shape[1] - 1}")

        def to_map(x: Tensor) -> Tensor:
            return _as_map(model, x, image.shape[2:], name)

        with library.GradCAM(model, [module], reshape_transform=to_map) as cam, torch.enable_grad():
            wanted = [targets.ClassifierOutputTarget(target)]
            heat = cam(image.detach().clone().requires_grad_(), wanted)
    probability = logits[0].softmax(0)[target].item()
    return ClassActivation(torch.from_numpy(heat[0]).float(), target, probability, name)


def _layer(model: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules or not name:
            near = [key for key in modules if key.endswith(name.rpartition(".")[2])][:5]
            raise ValueError(f"the model has no layer {name!r}; it has {', '.join(near or list(modules)[1:6])}")
        return name, modules[name]
    info = getattr(model, "feature_info", None)
    rows = getattr(info, "info", info)
    last = rows[-1].get("module") if rows else None
    # a network around a backbone may pass on its information, which names modules inside the backbone
    found = [key for key in modules if last and (key == last or key.endswith(f".{last}"))]
    if not found:
        raise ValueError(f"{type(model).__name__} does not say what its last map is; name a module with layer=")
    name = min(found, key=len)
    if isinstance(modules[name], FocusStage):
        name += ".focus"  # the stage gives a list of maps
    # behind the last attention only the class token has a gradient
    if getattr(model, "num_prefix_tokens", 0) and f"{name}.norm1" in modules:
        name += ".norm1"
    return name, modules[name]


def _as_map(model: nn.Module, x: Any, image: tuple[int, int], name: str) -> Tensor:
    """``[B, C, h, w]`` from tokens or from maps with the channels last."""
    if isinstance(x, Tensor) and x.dim() == 3:
        x = x[:, getattr(model, "num_prefix_tokens", 0) :]
        embed = getattr(model, "patch_embed", None)
        if hasattr(embed, "dynamic_feat_size"):
            rows, columns = embed.dynamic_feat_size(tuple(image))
        else:
            rows = columns = round(x.shape[1] ** 0.5)
        if rows * columns == x.shape[1]:
            return x.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    elif isinstance(x, Tensor) and x.dim() == 4:
        width = getattr(model, "num_features", x.shape[1])
        return x.permute(0, 3, 1, 2) if x.shape[3] == width != x.shape[1] else x
    shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
    raise ValueError(f"layer {name!r} gives {shape}, which is no map; name another module with layer=")
