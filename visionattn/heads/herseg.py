"""HER-Seg: masks of large medical images from a backbone of stride 16 and a prompt-free two-way mask decoder.

Paper: HER-Seg, arXiv:2504.06205 (version 1: HRMedSeg). Code: https://github.com/xq141839/HER-Seg, ``model.py``.

Departures: images of any size, any backbone of timm with a map of stride 16, more than one class, and no modules that a
network without prompts never runs. See ``docs/herseg.md``.
"""

import re
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import load_state_dict
from torch import Tensor, nn

from visionattn import _files
from visionattn.heads._backbones import create_backbone
from visionattn.heads.mask_decoder import PUBLISHED_MASKS, MaskDecoder
from visionattn.ops import crop, pad_to_multiple

STRIDE = 16

# of the published decoder: patterns and our names; what no prompt-free network runs has none
_KEYS = (
    (r"^neck\.", "neck."),
    (r"^prompt_encoder\.no_mask_embed\.weight$", "no_mask"),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "position.matrix"),
    (r"^mask_decoder\.(iou_token|mask_tokens)\.weight$", r"\1"),
    (r"^mask_decoder\.output_upscaling\.0\.", "upscale1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "upscale_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "upscale2."),
    (
        r"^mask_decoder\.output_hypernetworks_mlps\.(\d+)\.layers\.(\d)\.",
        lambda m: f"hypernetworks.{m[1]}.{2 * int(m[2])}.",
    ),
    (r"^mask_decoder\.transformer\.final_attn_token_to_image\.", "transformer.final_attn."),
    (r"^mask_decoder\.transformer\.norm_final_attn\.", "transformer.norm_final."),
    (r"^mask_decoder\.transformer\.(layers\.\d+)\.cross_attn_(\w+)\.", r"transformer.\1.\2."),
    (r"^mask_decoder\.transformer\.(layers\.\d+)\.mlp\.lin1\.", r"transformer.\1.mlp.0."),
    (r"^mask_decoder\.transformer\.(layers\.\d+)\.mlp\.lin2\.", r"transformer.\1.mlp.2."),
    (r"^mask_decoder\.transformer\.", "transformer."),
)
_ENCODER = "image_encoder."
_UNUSED = re.compile(
    r"prompt_encoder\.(point_embeddings\.\d|not_a_point_embed|mask_downscaling\.\d)\.|"
    rf"mask_decoder\.output_hypernetworks_mlps\.[0-{PUBLISHED_MASKS - 1}]\.layers\.[0-2]\."
)


class HERSeg(nn.Module):
    """HER-Seg, or its decoder on another backbone.

    Args:
        backbone: Name of a model of timm whose ``features_only`` form has a map of stride 16; ``lgvit_d96`` is the
            published one.
        in_chans: Channels of the image.
        num_classes: Masks; the published network has one, more are an extension.
        mask_token: ``"first"`` as published or ``"own"``, see ``MaskDecoder``.
        pretrained_backbone: Load the backbone's published weights.
        backbone_kwargs: Further arguments of the backbone, for example ``dict(drop_path_rate=0.1)`` (published).
        decoder_kwargs: Further arguments of ``MaskDecoder``.
        checkpointing: Recompute the backbone's blocks in the backward pass instead of keeping their activations.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: Images, ``[B, in_chans, H, W]``, any size. They are completed to multiples of 16 by zeros at the bottom and
            right.
        returns: Logits, ``[B, num_classes, H, W]``, in float32 under autocast; ``sigmoid`` makes them probabilities.

    Raises:
        ValueError: A backbone that timm does not know or that has no map of stride 16, or arguments that
            ``MaskDecoder`` refuses; in ``forward``, images of another shape.

    Reference: HER-Seg, arXiv:2504.06205; code xq141839/HER-Seg, ``model.py``.
    """

    def __init__(
        self,
        backbone: str = "lgvit_d96",
        in_chans: int = 3,
        num_classes: int = 1,
        mask_token: str = "first",
        pretrained_backbone: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
        decoder_kwargs: dict[str, Any] | None = None,
        checkpointing: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.backbone_name, self.in_chans, self.num_classes = backbone, in_chans, num_classes
        self.backbone_kwargs = {"in_chans": in_chans, **(backbone_kwargs or {})}
        level = _level_of_stride_16(backbone, self.backbone_kwargs)
        self.backbone_kwargs |= dict(features_only=True, out_indices=(level,))
        encoder = create_backbone(backbone, pretrained=pretrained_backbone, **self.backbone_kwargs)
        self.backbone = encoder
        channels = encoder.feature_info.channels()[-1]
        self.decoder = MaskDecoder(channels, num_classes, mask_token, **(decoder_kwargs or {}))
        self.to(device=device, dtype=dtype)
        if checkpointing:
            self.set_grad_checkpointing()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping their activations.

        Raises:
            ValueError: A backbone that cannot.
        """
        backbone: Any = self.backbone  # or, in timm's wrapper of some models, the model in it
        if not hasattr(backbone, "set_grad_checkpointing"):
            backbone = getattr(backbone, "model", None)
        if not hasattr(backbone, "set_grad_checkpointing"):
            raise ValueError(f"the backbone {self.backbone_name!r} offers no checkpointing; leave it off")
        backbone.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"HERSeg takes images [B, {self.in_chans}, H, W], got shape {list(x.shape)}; "
                "for other channels create it with in_chans="
            )
        padded = pad_to_multiple(x.permute(0, 2, 3, 1), STRIDE).permute(0, 3, 1, 2)
        masks = self.decoder(self.backbone(padded)[-1])
        # enlarged in float32 at once: a loss and a threshold want it, and half precision would be one more copy
        masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
        masks = F.interpolate(masks, padded.shape[2:], mode="bilinear", align_corners=False)
        return crop(masks.permute(0, 2, 3, 1), x.shape[2], x.shape[3]).permute(0, 3, 1, 2)

    def load_published(self, path: str | Path) -> "HERSeg":
        """Fill the network from a checkpoint of the released code.

        Prompt branches and hypernetworks that a network without prompts never runs are recognised by their names and
        left out. With other ``in_chans`` timm adapts the first convolution.

        Args:
            path: A state dict as .safetensors, or as .pth, which is read with ``weights_only=True``; possibly under
                ``model`` or ``state_dict``.

        Returns:
            The network itself.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A file that is damaged or holds more than tensors, a checkpoint of another network, or a
                network that no published checkpoint fits.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {str(path)!r}; give the path of a .pth or .safetensors file")
        if self.num_classes > PUBLISHED_MASKS or self.decoder.mask_token != "first":
            raise ValueError(
                f"a published checkpoint has {PUBLISHED_MASKS} masks that all read the first token; create HERSeg with "
                f"num_classes <= {PUBLISHED_MASKS} and mask_token='first', got {self.num_classes} and "
                f"{self.decoder.mask_token!r}"
            )
        decoder = self._decoder_weights(path)
        encoder = timm.create_model(
            self.backbone_name,
            pretrained=True,
            pretrained_cfg_overlay=dict(file=str(path)),
            **self.backbone_kwargs,
            **_kind(self),
        )
        self.backbone.load_state_dict(encoder.state_dict())
        self.decoder.load_state_dict(decoder)
        return self

    def _decoder_weights(self, path: Path) -> dict[str, Tensor]:
        """Neck and decoder of a published file under our names, all of them and no others."""
        own, found, foreign = self.decoder.state_dict(), {}, []
        for key, tensor in _read(path).items():
            name = _renamed(key)
            if name in own:
                if own[name].shape != tensor.shape:
                    raise ValueError(
                        f"{path}: {key} has shape {list(tensor.shape)}, expected {list(own[name].shape)}; "
                        f"is it of another backbone than {self.backbone_name!r}?"
                    )
                found[name] = tensor
            elif not key.startswith(_ENCODER) and not _UNUSED.match(key):
                foreign.append(key)
        missing = sorted(own.keys() - found.keys())
        if missing or foreign:
            raise ValueError(
                f"{path} is no published checkpoint of HER-Seg: {len(missing)} of the decoder's tensors are missing "
                f"(first {missing[:1]}), {len(foreign)} are unknown (first {sorted(foreign)[:1]}); networks of our own "
                "are filled with load_state_dict"
            )
        return found


def _kind(module: nn.Module) -> dict[str, Any]:
    parameter = next(module.parameters())
    return dict(device=parameter.device, dtype=parameter.dtype)


def _level_of_stride_16(backbone: str, kwargs: dict[str, Any]) -> int:
    """Index of the deepest level of a backbone whose stride is 16."""
    info = create_backbone(backbone, features_only=True, **kwargs).feature_info
    levels = [i for i, reduction in zip(info.out_indices, info.reduction(), strict=True) if reduction == STRIDE]
    if not levels:
        raise ValueError(
            f"backbone={backbone!r} has maps of strides {info.reduction()} and none of {STRIDE}; choose one that has"
        )
    return int(levels[-1])


def _read(path: Path) -> dict[str, Tensor]:
    _files.check_archive(path)
    try:
        weights: Any = load_state_dict(str(path), use_ema=False)
    except Exception as error:  # readers raise a dozen types for damaged files, and for objects that could run code
        raise ValueError(
            f"{path} cannot be read as a state dict ({error}); it must be complete and hold tensors alone: save it as "
            ".safetensors with a tool you trust"
        ) from error
    for inner in ("model", "state_dict"):
        if isinstance(weights.get(inner), dict):
            weights = weights[inner]
    return weights


def _renamed(key: str) -> str:
    for pattern, name in _KEYS:
        changed, count = re.subn(pattern, name, key)
        if count:
            return changed
    return key
