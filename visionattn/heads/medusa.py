"""A classifier inspired by MEDUSA: one encoder-decoder of attention that gates every stage of a backbone.

Paper: MEDUSA, arXiv:2110.06063 (Frontiers in Medicine 8, 821120), of which the abstract was read. Repository:
lindawangg/COVID-Net, which offers the network as COVIDNet-CXR-3 in form of a TensorFlow graph, without its code.
These sources say: a single attention body of encoder and decoder is computed once and feeds the classifier at several
scales through heads of their own; it takes a grey image of 256 x 256, standardised, beside the classifier's colour
image; body and classifier have 29.2 M parameters. They leave open: the layers of the body, the form of the heads, where
the gates sit and how they are applied. All of that is this package's own choice, so this is not MEDUSA, and published
figures do not apply to it.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.heads._backbones import create_backbone

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class _DoubleConv(nn.Sequential):
    def __init__(self, in_dim: int, dim: int):
        super().__init__(
            nn.Conv2d(in_dim, dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
        )


class MultiScaleAttention(nn.Module):
    """The attention body: a U-Net from an image to one map that all gates share.

    The image is made grey (unless ``grey=False``), resized to ``size`` and standardised by its own mean and deviation,
    as the published graph's grey input is. Each level halves the sides and doubles the channels; the way back resizes,
    joins the level's map and convolves.

    Args:
        in_chans: Channels of the image; 3 are weighted as ITU-R BT.601 does to make it grey, others averaged.
        dim: Channels of the first level and of the map.
        levels: Levels, at least 1.
        size: Side that the image is resized to, pixels; None for its own size.
        grey: Look at the image without colours.

    Shape:
        x: ``[B, in_chans, H, W]``.
        returns: ``[B, dim, size, size]``, or ``[B, dim, H, W]``.

    Raises:
        ValueError: Arguments outside the ranges above, or an image too small for the levels.
    """

    def __init__(self, in_chans: int = 3, dim: int = 32, levels: int = 4, size: int | None = 256, grey: bool = True):
        super().__init__()
        if levels < 1 or dim < 1:
            raise ValueError(f"levels={levels}, dim={dim} must be at least 1")
        if size is not None and size < 2 ** (levels - 1):
            raise ValueError(
                f"size={size} is too small to be halved {levels - 1} times; use {2 ** (levels - 1)} or more"
            )
        self.size, self.levels, self.grey = size, levels, grey
        self.weights: tuple[float, ...] = _GREY if in_chans == 3 else (1 / in_chans,) * in_chans
        dims = [dim * 2**i for i in range(levels)]
        self.down = nn.ModuleList(
            [_DoubleConv(a, b) for a, b in zip([1 if grey else in_chans, *dims[:-1]], dims, strict=True)]
        )
        self.up = nn.ModuleList([_DoubleConv(a + b, a) for a, b in pairwise(dims)])

    def forward(self, x: Tensor) -> Tensor:
        if self.grey:
            x = (x * x.new_tensor(self.weights)[:, None, None]).sum(dim=1, keepdim=True)
        if self.size is not None:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            x = F.interpolate(wide, size=(self.size, self.size), mode="bilinear", antialias=True).to(x.dtype)
        if min(x.shape[2:]) < 2 ** (self.levels - 1):
            raise ValueError(
                f"the image is {x.shape[2]} x {x.shape[3]}, too small to be halved {self.levels - 1} times; enlarge "
                "it, or use fewer levels"
            )
        deviation, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
        x = (x - mean) / (deviation + 1e-6)  # an image of one colour has no deviation
        maps = []
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else F.max_pool2d(x, 2))
            maps.append(x)
        for level, skip in zip(reversed(self.up), reversed(maps[:-1]), strict=True):
            x = level(torch.cat((skip, F.interpolate(x, size=skip.shape[2:], mode="bilinear")), dim=1))
        return x


class StageGate(nn.Module):
    """Gate of one stage: ``features * (1 + tanh(conv3x3(resize(map))))``.

    The convolution begins at zero, so the factor is exactly 1 and a pretrained backbone is undisturbed at first; later
    it lies in (0, 2). A sigmoid, which begins at a half, would not allow that.

    Args:
        dim: Channels of the shared map.
        features: Channels of the stage.
        per_channel: A factor for each channel; else one for all.
        name: Module of the backbone, for messages.
        channels_last: The stage gives ``[B, H, W, C]``.
    """

    def __init__(self, dim: int, features: int, per_channel: bool, name: str, channels_last: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(dim, features if per_channel else 1, 3, padding=1)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)
        self.features, self.name, self.channels_last = features, name, channels_last
        self.shared: Tensor | None = None

    def forward(self, features: Tensor, shared: Tensor) -> Tensor:
        x = features.permute(0, 3, 1, 2) if self.channels_last else features
        # means first: plain resizing would look at few pixels of a much larger map, and the gradient of resizing with
        # antialiasing has no deterministic form on a GPU
        if (factor := min(shared.shape[2] // x.shape[2], shared.shape[3] // x.shape[3])) > 1:
            shared = F.avg_pool2d(shared, factor)
        gate = self.conv(F.interpolate(shared, size=x.shape[2:], mode="bilinear")).tanh()
        x = torch.addcmul(x, x, gate.to(x.dtype))
        return x.permute(0, 2, 3, 1) if self.channels_last else x

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the stage; without a shared map the stage's output stays as it is."""
        shared, self.shared = self.shared, None  # so that Medusa sees which gates ran
        if shared is None:
            return output
        axis = 3 if self.channels_last else 1
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[axis] != self.features:
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            wanted = f"[B, H, W, {self.features}]" if self.channels_last else f"[B, {self.features}, H, W]"
            raise ValueError(
                f"the backbone's module {self.name!r} returns {found}, expected a map {wanted}; name other stages, or "
                "take a backbone whose stages return maps"
            )
        return self(output, shared)


class Medusa(nn.Module):
    """A timm classifier whose stages are gated by one attention body; inspired by MEDUSA, see the module.

    The gates are forward hooks on the modules that ``feature_info`` names, so that a stage sees the gated output of the
    one before. They follow a copy of the model (as of averaged weights), and the state dict has ``backbone.*``,
    ``body.*`` and ``gates.*`` and nothing else.

    Args:
        backbone: A name in timm.
        num_classes: Classes.
        in_chans: Channels of the image.
        pretrained: Load the backbone's weights.
        stages: Which entries of ``feature_info`` are gated; None for all.
        per_channel: A gate for each channel of a stage; else one for all.
        body_dim: Channels of the body's first level and of the shared map.
        body_levels: Levels of the body.
        body_size: Side of the image that the body sees, pixels; None for the image's own size.
        grey: The body sees no colours.
        **kwargs: For ``timm.create_model``.

    Shape:
        x: ``[B, in_chans, H, W]``.
        returns: Logits ``[B, num_classes]``.

    Raises:
        ValueError: A backbone that timm does not have or that names no stages, stages that it has not, or whose output
            is no map; in ``forward``, a backbone that does not call a stage's module, as some do when they recompute
            activations.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        pretrained: bool = False,
        stages: tuple[int, ...] | None = None,
        per_channel: bool = True,
        body_dim: int = 32,
        body_levels: int = 4,
        body_size: int | None = 256,
        grey: bool = True,
        **kwargs: Any,
    ):
        super().__init__()
        self.backbone: Any = create_backbone(
            backbone, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **kwargs
        )
        info = list(getattr(self.backbone, "feature_info", None) or [])
        if not info:
            raise ValueError(f"backbone={backbone!r} names no stages (feature_info); take a backbone that has some")
        wanted = range(len(info)) if stages is None else stages
        unknown = [i for i in wanted if not 0 <= i < len(info)]
        if unknown:
            raise ValueError(f"stages={stages}: {backbone!r} has the stages 0 to {len(info) - 1}, not {unknown[0]}")
        self.body = MultiScaleAttention(in_chans, body_dim, body_levels, body_size, grey)
        self.gates = nn.ModuleList()
        modules = dict(self.backbone.named_modules())
        channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        for i in wanted:
            name = info[i]["module"]
            if name not in modules:
                raise ValueError(
                    f"{backbone!r} has no module {name!r} that its feature_info names; leave out stage {i}"
                )
            gate = StageGate(body_dim, info[i]["num_chs"], per_channel, name, channels_last)
            # a bound method, which a deep copy of the model binds to the copy's own gate
            modules[name].register_forward_hook(gate.on_output)
            self.gates.append(gate)
        self.feature_info, self.num_features = self.backbone.feature_info, self.backbone.num_features
        self.head_hidden_size = getattr(self.backbone, "head_hidden_size", self.num_features)
        self.num_classes, self.pretrained_cfg = num_classes, self.backbone.pretrained_cfg
        self.default_cfg = self.pretrained_cfg

    def forward_features(self, x: Tensor) -> Tensor:
        """Gated map of the last stage, as the backbone gives it."""
        shared, gates = self.body(x), [gate for gate in self.gates if isinstance(gate, StageGate)]
        for gate in gates:
            gate.shared = shared
        try:
            features = self.backbone.forward_features(x)
            if left := [gate.name for gate in gates if gate.shared is not None]:
                raise ValueError(f"the backbone passes by its modules {left}; turn off gradient checkpointing")
            return features
        finally:
            for gate in gates:
                gate.shared = None

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or the pooled features, of the backbone's map."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The backbone's classifier."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0 classes for none."""
        self.num_classes = num_classes
        self.backbone.reset_classifier(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the backbone keeps from weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else set()
        return {f"backbone.{name}" for name in names}

    def lr_scales(self) -> dict[str, float]:
        """Factors on the learning rate that the backbone asks for, by the names of parameters."""
        scales = self.backbone.lr_scales() if hasattr(self.backbone, "lr_scales") else {}
        return {f"backbone.{name}": factor for name, factor in scales.items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)
