"""Speed of models and attention layers side by side, on whatever machine this is."""

import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

import visionattn
from visionattn.layers import HiLoAttention, WindowAttention, multi_head_attention

FOLDED = ":folded"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SpatialReductionAttention(nn.Module):
    """Attention of every pixel to the map convolved with a stride, as in PVT (arXiv:2102.12122); a peer to time."""

    def __init__(self, dim: int, num_heads: int, reduction: int = 2):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.reduce, self.norm = nn.Conv2d(dim, dim, reduction, stride=reduction), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.norm(self.reduce(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2))
        k, v = self.kv(reduced).chunk(2, dim=-1)
        out = multi_head_attention(self.q(x).flatten(1, 2), k, v, self.num_heads)
        return self.proj(out).view(x.shape)


class DenseAttention(nn.Module):
    """Attention of every pixel to the whole map; a peer to time."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
        return self.proj(multi_head_attention(q, k, v, self.num_heads)).view(x.shape)


def times_in_turn(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call in every round.

    The calls take turns, so that whatever else the machine does meets all of them alike.

    Args:
        calls: What to time, by name.
        rounds: Times that each is called after two for warming up.
        device: Where the calls work.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-2, rounds):
        for name, call in calls.items():
            if device != "cpu":
                torch.accelerator.synchronize()
            start = time.perf_counter()
            call()
            if device != "cpu":
                torch.accelerator.synchronize()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _model(text: str, size: int | None, device: str, dtype: torch.dtype) -> nn.Module:
    name = text.removesuffix(FOLDED)
    fixed = visionattn.create_model(name, device="meta").pretrained_cfg.get("fixed_input_size")
    model = visionattn.create_model(name, **(dict(img_size=size) if fixed and size else {})).eval()
    if text.endswith(FOLDED):
        model = reparameterize_model(model)
    return model.to(device=device, dtype=dtype)


def _report(title: str, seconds: dict[str, list[float]], batch: int, device: str, dtype: str) -> str:
    first = statistics.median(next(iter(seconds.values())))
    lines = ["| | median ms | fastest ms | images/s | times as fast as the first |", "|---|---|---|---|---|"]
    for name, values in seconds.items():
        median = statistics.median(values)
        figures = f"{1e3 * median:.2f} | {1e3 * min(values):.2f} | {batch / median:.1f} | {first / median:.2f}"
        lines.append(f"| `{name}` | {figures} |")
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    versions = f"PyTorch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    count = len(next(iter(seconds.values())))
    return "\n".join([*lines, "", f"{title}, {dtype}, {where}, {count} rounds in turn; {versions}."])


def benchmark_models(names: list[str], batch: int, size: int | None, rounds: int, device: str, dtype: str) -> str:
    """Time the inference of models.

    Args:
        names: Names of timm or this package; ``NAME:folded`` for the form of ``timm.utils.reparameterize_model``.
        batch: Images at once.
        size: Side of the images in pixels; each model's own by default.
        rounds: Times that each model is called.
        device: ``cpu`` or ``cuda``.
        dtype: Name of the numbers' type.

    Returns:
        A Markdown table.

    Raises:
        ValueError: An unknown model.
    """
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        model = _model(name, size, device, _DTYPES[dtype])
        side = size or model.pretrained_cfg["input_size"][-1]
        x = torch.randn(batch, model.pretrained_cfg["input_size"][0], side, side, device=device, dtype=_DTYPES[dtype])
        calls[name] = lambda model=model, x=x: model(x)
    with torch.inference_mode():
        seconds = times_in_turn(calls, rounds, device)
    return _report(f"Batch {batch}, {size or 'own'} pixels", seconds, batch, device, dtype)


def benchmark_attention(size: int, dim: int, num_heads: int, batch: int, rounds: int, device: str, dtype: str) -> str:
    """Time HiLo attention beside attention in windows, with spatial reduction, and over the whole map.

    Args:
        size: Side of the map.
        dim: Channels.
        num_heads: Attention heads.
        batch: Maps at once.
        rounds: Times that each layer is called.
        device: ``cpu`` or ``cuda``.
        dtype: Name of the numbers' type.

    Returns:
        A Markdown table.
    """
    layers: dict[str, nn.Module] = {
        "windows of 7": WindowAttention(dim, num_heads, 7),
        "HiLo, alpha 0.9": HiLoAttention(dim, num_heads, alpha=0.9),
        "HiLo, alpha 0.5": HiLoAttention(dim, num_heads, alpha=0.5),
        "spatial reduction by 2": SpatialReductionAttention(dim, num_heads),
        "whole map": DenseAttention(dim, num_heads),
    }
    x = torch.randn(batch, size, size, dim, device=device, dtype=_DTYPES[dtype])
    for layer in layers.values():
        layer.eval().to(device, _DTYPES[dtype])
    calls: dict[str, Callable[[], object]] = {name: lambda layer=layer: layer(x) for name, layer in layers.items()}
    with torch.inference_mode():
        seconds = times_in_turn(calls, rounds, device)
    return _report(
        f"Map {size}x{size}, {dim} channels, {num_heads} heads, batch {batch}", seconds, batch, device, dtype
    )
