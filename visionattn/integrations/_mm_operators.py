"""The compiled operators that mmseg's and mmdet's models call, from torchvision and PyTorch.

mmcv's Python side calls functions of a module ``mmcv._ext`` that write their result into tensors given to them. Here
is such a module, with the signatures of mmcv 2.1 and for any device. Sums run in float32 (float64 for float64), as the
compiled operators are float32 or accumulate in it; so half precision under autocast is cast up and back.

Code: https://github.com/open-mmlab/mmcv (Apache-2.0), ``mmcv/ops``; it is called, not copied.
"""

import sys
from collections.abc import Callable
from importlib import util
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32, other types as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes: Corners x1, y1, x2, y2 in pixels, ``[N, 4]``.
        scores: ``[N]``.
        iou_threshold: Boxes with a greater overlap with a kept one are dropped.
        offset: 1 where a box includes its last pixel (width x2 - x1 + 1), else 0.

    Returns:
        Indices of the kept boxes, best first, ``[M]``.
    """
    boxes = _wide(boxes)
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def _check_pooling(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            "RoIAlign with pool_mode='max' is not supplied; take pool_mode='avg' or a compiled mmcv"
        )


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (Mask R-CNN, arXiv:1703.06870) by averages.

    Args:
        input: Maps, ``[B, C, H, W]``.
        rois: Index of the image and corners in pixels of the image, ``[N, 5]``.
        output: Receives ``[N, C, aligned_height, aligned_width]``.
        argmax_y: Not used by averages.
        argmax_x: Not used by averages.
        aligned_height: Rows of the output.
        aligned_width: Columns of the output.
        spatial_scale: Pixels of the map per pixel of the image.
        sampling_ratio: Samples per side of an output cell; 0 takes as many as the cell has pixels.
        pool_mode: 1, averages.
        aligned: Shift by half a pixel.

    Raises:
        NotImplementedError: ``pool_mode=0``, maxima.
    """
    _check_pooling(pool_mode)
    x = _wide(input)
    pooled = torch.ops.torchvision.roi_align(
        x, rois.to(x.dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of ``roi_align_forward`` with respect to the maps, added to ``grad_input`` ``[B, C, H, W]``.

    Raises:
        NotImplementedError: ``pool_mode=0``, maxima.
    """
    _check_pooling(pool_mode)
    grad = _wide(grad_output).contiguous()
    grad_input += torch.ops.torchvision._roi_align_backward(
        grad,
        rois.to(grad.dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )


def _focal_loss(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    if weight.numel():
        raise NotImplementedError("sigmoid_focal_loss with weights of classes is not supplied; take a compiled mmcv")
    one_hot = target[:, None] == torch.arange(input.shape[1], device=input.device)  # background is a row of zeros
    return torchvision.ops.sigmoid_focal_loss(input, one_hot.to(input.dtype), alpha, gamma)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (RetinaNet, arXiv:1708.02002) of every box and class.

    Args:
        input: Logits, ``[N, C]``.
        target: Class, or C for background, ``[N]``.
        weight: Empty.
        output: Receives the loss, ``[N, C]``.
        gamma: Exponent.
        alpha: Weight of the positive class.

    Raises:
        NotImplementedError: Weights of classes.
    """
    output.copy_(_focal_loss(_wide(input), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of the summed loss by the logits, written to ``grad_input`` ``[N, C]``.

    Raises:
        NotImplementedError: Weights of classes.
    """
    with torch.enable_grad():
        logits = _wide(input).detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _deformable_attention(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # mmcv.ops wants this module first

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159) by mmcv's own PyTorch formula.

    Args:
        value: ``[B, N, heads, head_dim]``, the pixels of all levels in a row.
        value_spatial_shapes: Rows and columns of the levels, ``[L, 2]``.
        value_level_start_index: First pixel of each level; follows from the shapes.
        sampling_locations: x, y as fractions of the level, ``[B, Q, heads, L, points, 2]``.
        attention_weights: ``[B, Q, heads, L, points]``.
        im2col_step: Images at a time in the compiled operator; not used.

    Returns:
        ``[B, Q, heads * head_dim]``.
    """
    mixed = (_wide(x) for x in (sampling_locations, attention_weights))
    return _deformable_attention(_wide(value), value_spatial_shapes, *mixed).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of ``ms_deform_attn_forward``, written to the tensors of those names, by running it again."""
    with torch.enable_grad():
        inputs = [_wide(x).detach().requires_grad_() for x in (value, sampling_locations, attention_weights)]
        out = _deformable_attention(inputs[0], value_spatial_shapes, *inputs[1:])
    grads = torch.autograd.grad(out, inputs, grad_output.to(out.dtype))
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        target.copy_(grad)


SUPPLIED: tuple[Callable[..., Any], ...] = (
    nms,
    roi_align_forward,
    roi_align_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    ms_deform_attn_forward,
    ms_deform_attn_backward,
)


class Operators(ModuleType):
    """Module with the operators of ``SUPPLIED``, and for every other name a function that says it is not supplied.

    mmcv asks for all names when it is imported, so they must be there; that is no reason to fail before one is called.
    """

    def __init__(self) -> None:
        super().__init__("mmcv._ext", "Operators of visionattn in the place of mmcv's compiled ones.")
        # without a loader, by which mmengine tells that mmcv has no compiled operators
        self.__spec__ = ModuleSpec("mmcv._ext", loader=None)
        for function in SUPPLIED:
            setattr(self, function.__name__, function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def not_supplied(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(
                f"mmcv's operator {name!r} exists compiled only and mmcv-lite is installed; visionattn supplies "
                f"{', '.join(function.__name__ for function in SUPPLIED)}; install a compiled mmcv for this model"
            )

        return not_supplied


def install() -> bool:
    """Put the module in the place of mmcv's compiled one, unless there is one.

    Returns:
        Whether the operators are ours.
    """
    if "mmcv._ext" not in sys.modules and util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = Operators()
    return isinstance(sys.modules.get("mmcv._ext"), Operators)
