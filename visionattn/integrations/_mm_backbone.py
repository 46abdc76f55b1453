"""The backbone that mmseg and mmdet build by ``type="VisionAttn"``."""

import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from timm.layers import LayerNorm2d
from torch import Tensor, nn

import visionattn  # noqa: F401  (registers the models)
from visionattn.heads._backbones import check_name, create_backbone
from visionattn.layers import ChannelAffine
from visionattn.models._weights import unwrap


class OutNorm(NamedTuple):
    """Norm of each map that the published dense backbones add to those of classification."""

    kind: str
    eps: float


# by the file that defines a family; the wrappers are in the detection and segmentation folders of the papers' code
PUBLISHED_NORMS = {
    "visionattn.models.biformer": OutNorm("layer", 1e-6),
    "visionattn.models.davit": OutNorm("layer", 1e-5),
    "visionattn.models.litv2": OutNorm("layer", 1e-5),
    "visionattn.models.nat": OutNorm("layer", 1e-5),
    "visionattn.models.overlock": OutNorm("layer", 1e-6),
    "visionattn.models.patnet": OutNorm("batch", 1e-5),
}
NORMS = {"layer": LayerNorm2d, "batch": nn.BatchNorm2d}
STAGE = re.compile(r"^(?:model\.)?(?:(stem|patch_embed)\b|stem_|(?:stages|layers)[._](\d+))")


def family(model_name: str) -> str:
    """Module in which a model of timm is defined, as ``"visionattn.models.biformer"``; empty for those of a hub."""
    bare = model_name.split(".")[0]
    return timm.model_entrypoint(bare).__module__ if timm.is_model(bare) else ""


class Overview(nn.Module):
    """What OverLoCK's published detectors add to the last map: the Overview-Net's, normed, widened and scaled.

    Args:
        dim: Channels of the Overview-Net's map.
        out_dim: Channels of the last map.
        eps: Of the norm.

    Shape:
        x: ``[B, dim, H, W]``.
        returns: ``[B, out_dim, H, W]``.

    Reference: https://github.com/LMMMEng/OverLoCK, ``detection/models/overlock.py``.
    """

    def __init__(self, dim: int, out_dim: int, eps: float):
        super().__init__()
        self.norm = LayerNorm2d(dim, eps=eps)
        self.proj = nn.Conv2d(dim, out_dim, 1)
        self.scale = ChannelAffine(out_dim)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)
        nn.init.constant_(self.scale.weight, 1e-5)  # so that training starts from the last map alone

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.proj(self.norm(x)))


def _keep_overview(stage: nn.Module, args: Any, maps: list[Tensor]) -> None:
    # on the stage, not in a closure: copies of the backbone, such as averaged weights, then have their own
    stage.overview_map = maps[2]  # of the stage's map, the context and the Overview-Net's map


@MODELS.register_module()
class VisionAttn(BaseModule):
    """Maps of any backbone of timm or this package, for the necks and heads of mmseg and mmdet.

    Args:
        model_name: Name in timm, also with a tag.
        out_indices: Maps to return, counted from the first that the backbone has.
        out_norm: Norm of every returned map: ``"published"`` as the family's own dense backbones have it (none for
            others), ``"layer"``, ``"batch"`` or None.
        norm_indices: Maps that get the norm; all of ``out_indices`` by default.
        overview: Add the Overview-Net's map to the last one, as OverLoCK's published detectors do.
        frozen_stages: The stem (0), or the stem and that many stages (1 to 4) are not trained; -1 for none.
        norm_eval: Batch norms keep their statistics in training.
        sync_bn: Batch norms take their statistics over all processes of a distributed run.
        with_cp: Recompute blocks in the backward pass to save memory.
        pretrained: True for the published weights by timm, or a checkpoint as in ``init_cfg``.
        init_cfg: As of mmengine; ``dict(type="Pretrained", checkpoint=FILE_OR_URL, prefix=None)`` takes checkpoints
            of the paper's repository, of timm, and of this class (``prefix="backbone."`` from a whole detector).
        **kwargs: Arguments of the model: ``drop_path_rate``, ``in_chans``, ``n_win``, ``dilations`` and so on.

    Shape:
        x: ``[B, in_chans, H, W]``.
        returns: A tuple of ``[B, C_i, H_i, W_i]``.

    Raises:
        ValueError: An unknown name, norm or argument value; weights that do not fit.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: str | None = "published",
        norm_indices: Sequence[int] | None = None,
        overview: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        sync_bn: bool = False,
        with_cp: bool = False,
        pretrained: bool | str = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        settings = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
        weights = [setting for setting in settings if setting.get("type") == "Pretrained"]
        if pretrained:
            weights.append(dict(checkpoint=pretrained))
        if len(weights) > 1:
            raise ValueError("weights are asked for twice; give either pretrained= or one init_cfg of type Pretrained")
        super().__init__([setting for setting in settings if setting.get("type") != "Pretrained"] or None)
        self.weights = dict(weights[0]) if weights else {}
        self.arguments = dict(model_name=model_name, out_indices=tuple(out_indices), **kwargs)
        self.body = self._create(**self.arguments)
        if with_cp:
            self._checkpoint_gradients()
        self.channels = self.body.feature_info.channels()
        self.norms = self._out_norms(model_name, out_indices, out_norm, norm_indices)
        self.overview = self._overview(model_name) if overview else None
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self._freeze()
        if sync_bn and torch.distributed.is_available() and torch.distributed.is_initialized():
            self.body = nn.SyncBatchNorm.convert_sync_batchnorm(self.body)

    @staticmethod
    def _create(model_name: str, **kwargs: Any) -> Any:
        return create_backbone(model_name, features_only=True, **kwargs)

    def _checkpoint_gradients(self) -> None:
        model = getattr(self.body, "model", self.body)
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(f"with_cp=True: {self.arguments['model_name']} cannot recompute blocks; leave it out")
        model.set_grad_checkpointing(True)

    def _out_norms(
        self, name: str, out_indices: Sequence[int], out_norm: str | None, norm_indices: Sequence[int] | None
    ) -> nn.ModuleList:
        setting = PUBLISHED_NORMS.get(family(name)) if out_norm == "published" else None
        if out_norm not in ("published", None):
            check_name(out_norm, list(NORMS), "out_norm")
            setting = OutNorm(out_norm, 1e-5)
        normed = out_indices if norm_indices is None else norm_indices
        if not set(normed) <= set(out_indices):
            raise ValueError(
                f"norm_indices={tuple(normed)} names maps that out_indices={tuple(out_indices)} leaves out"
            )
        return nn.ModuleList(
            NORMS[setting.kind](width, eps=setting.eps) if setting and index in normed else nn.Identity()
            for index, width in zip(out_indices, self.channels, strict=True)
        )

    def _overview(self, name: str) -> Overview:
        if family(name) != "visionattn.models.overlock" or 3 not in self.arguments["out_indices"]:
            raise ValueError(f"overview=True is for OverLoCK with its last map (index 3), got {name}")
        self.body.model.stages[2].register_forward_hook(_keep_overview)
        return Overview(self.body.model.overview_dim, self.channels[-1], PUBLISHED_NORMS[family(name)].eps)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images ``[B, in_chans, H, W]`` to a tuple of maps ``[B, C_i, H_i, W_i]``."""
        maps = [norm(out) for norm, out in zip(self.norms, self.body(x), strict=True)]
        if self.overview is not None:
            stage = self.body.model.stages[2]
            maps[-1] = maps[-1] + self.overview(stage.overview_map)
            del stage.overview_map
        return tuple(maps)

    # parts that are not trained

    def _frozen(self, name: str) -> bool:
        match = STAGE.match(name)
        return bool(match) and int(match[2] or -1) < self.frozen_stages

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        found = {int(match[2]) for name, _ in self.body.named_parameters() if (match := STAGE.match(name)) and match[2]}
        if not found or self.frozen_stages > len(found):
            raise ValueError(
                f"frozen_stages={self.frozen_stages}: {self.arguments['model_name']} has {len(found)} stages by the "
                "names stages.0, stages.1, ...; give -1 to train all"
            )
        for name, parameter in self.body.named_parameters():
            if self._frozen(name):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "VisionAttn":
        """Training mode, but for frozen parts, and for batch norms with ``norm_eval``."""
        super().train(mode)
        for name, module in self.body.named_modules():
            batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if (self.frozen_stages >= 0 and self._frozen(name)) or (self.norm_eval and batch_norm):
                module.training = False
        return self

    # weights

    def init_weights(self) -> None:
        """Fill the backbone with the weights that ``pretrained`` or ``init_cfg`` names.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: Missing or unknown tensors, or others than the backbone's shapes.
        """
        fill = self.weights and not self.is_init
        super().init_weights()
        if not fill:
            return
        if self.weights["checkpoint"] is True:
            donor = self._create(**self.arguments, pretrained=True)
            self.body.load_state_dict(donor.state_dict())
        else:
            self._load(self.weights["checkpoint"], self.weights.get("prefix"))

    def _load(self, checkpoint: str, prefix: str | None) -> None:
        found = unwrap(CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu"))
        found = {key.removeprefix("module."): x for key, x in found.items() if isinstance(x, Tensor)}
        if prefix:
            found = {key.removeprefix(prefix): x for key, x in found.items() if key.startswith(prefix)}
        if any(key.startswith("body.") for key in found):
            _compare(found, self.state_dict(), checkpoint, self.arguments["model_name"])
            self.load_state_dict(found, strict=False)
            return
        name, kwargs = self.arguments["model_name"], dict(self.arguments)
        kwargs.pop("out_indices")
        with torch.device("meta"):  # the classifier's names and shapes, without its memory
            whole = timm.create_model(kwargs.pop("model_name"), **kwargs)
        rename = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", lambda weights, model: weights)
        classifier = whole.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
        own = {key: x for key, x in whole.state_dict().items() if not key.startswith(heads)}
        renamed = {key: x for key, x in rename(found, whole).items() if not key.startswith(heads)}
        _compare(renamed, own, checkpoint, name)
        donor = self._create(**self.arguments, pretrained=True, pretrained_cfg_overlay=dict(state_dict=found))
        self.body.load_state_dict(donor.state_dict())


def _compare(found: dict[str, Tensor], own: dict[str, Tensor], source: str, name: str) -> None:
    """Refuse weights other than a model's own, but for counters of batches and an image's channels.

    Raises:
        ValueError: Missing or unknown tensors, or others than the model's shapes.
    """
    missing = sorted(key for key in own.keys() - found.keys() if not key.endswith("num_batches_tracked"))
    unknown = sorted(found.keys() - own.keys())
    shapes = [f"{key} {list(found[key].shape)}" for key in sorted(own.keys() & found.keys())]
    shapes = [text for text in shapes if _differs(found[text.split()[0]], own[text.split()[0]])]
    if missing or unknown or shapes:
        raise ValueError(
            f"{source} does not fit {name}: {len(missing)} tensors are missing {missing[:5]}, {len(unknown)} are "
            f"unknown {unknown[:5]}, {len(shapes)} of another shape {shapes[:5]}; is it of another architecture or "
            "variant, or of a whole network (then give its prefix, as 'backbone.')?"
        )


def _differs(found: Tensor, own: Tensor) -> bool:
    first = found.dim() == 4 and found.shape[1] == 3  # timm adapts the first convolution to in_chans
    return found.shape != own.shape and not (
        first and found.shape[0] == own.shape[0] and found.shape[2:] == own.shape[2:]
    )
