"""Routed attention on a GPU beside the published gather form and dense attention: checked first, then timed."""

import csv
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops import routed_attention, use_backend
from visionattn.ops.routing.reference import split_regions

COPY_RATE, EXP_RATE = 3.0e12, 3.7e12  # bytes and exponentials a second of an H100, for the floors
TOLERANCE = 2e-2  # of the standard deviation, RMS, in half precision


class Shape(NamedTuple):
    """A call: batch, side of the map, heads, side of a region, entries of a list; head dim 32."""

    batch: int
    side: int
    heads: int
    region: int
    topk: int


SHAPES = {
    "biformer stage 1": Shape(128, 56, 2, 8, 1),
    "biformer stage 2": Shape(128, 28, 4, 4, 4),
    "biformer stage 3": Shape(128, 14, 8, 2, 16),
    "112x112": Shape(16, 112, 2, 16, 4),
    "224x224, topk 8": Shape(4, 224, 2, 32, 8),
    "224x224, topk 16": Shape(4, 224, 2, 32, 16),
}
_DIM = 32


def gather_form(query: Tensor, key: Tensor, value: Tensor, index: Tensor, region: int) -> Tensor:
    """Routed attention as the published code computes it: copies of the chosen regions, then dense attention."""
    B, H, W, heads, d = query.shape
    q, k, v = (
        split_regions(x, (region, region)).flatten(3, 4).flatten(1, 2).flatten(3) for x in (query, key, value)
    )  # [B, P, T, C]
    P, T, C = q.shape[1:]
    chosen = index[:, 0].long()[..., None, None].expand(-1, -1, -1, T, C)
    k, v = (x[:, None].expand(-1, P, -1, -1, -1).gather(2, chosen).flatten(2, 3) for x in (k, v))
    q, k, v = (x.unflatten(3, (heads, d)).transpose(2, 3).flatten(0, 1) for x in (q, k, v))
    out = ((q * d**-0.5) @ k.transpose(2, 3)).softmax(dim=-1) @ v
    out = out.transpose(1, 2).reshape(B, H // region, W // region, region, region, C).transpose(2, 3)
    return out.reshape(B, H, W, heads, d)


def dense_form(query: Tensor, key: Tensor, value: Tensor, index: Tensor, region: int) -> Tensor:
    """Attention to the whole map by PyTorch's fused kernel: what routing must beat."""
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(query.shape)


def ours(query: Tensor, key: Tensor, value: Tensor, index: Tensor, region: int) -> Tensor:
    """The operator of this package."""
    return routed_attention(query, key, value, index, (region, region))[0]


FORMS: dict[str, Callable[..., Tensor]] = {"visionattn": ours, "gather": gather_form, "dense SDPA": dense_form}


def _inputs(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    packed = torch.randn(batch, shape.side, shape.side, 3 * shape.heads * _DIM, device="cuda", dtype=dtype)
    packed.requires_grad_()
    parts = [x.view(batch, shape.side, shape.side, shape.heads, _DIM) for x in packed.chunk(3, dim=-1)]
    regions = (shape.side // shape.region) ** 2
    index = torch.rand(batch, 1, regions, regions, device="cuda").argsort(-1)[..., : shape.topk].int().contiguous()
    return packed, parts, index


def check(shape: Shape, dtype: torch.dtype) -> float:
    """Largest RMS error of output and gradient for one image against float64, in standard deviations.

    Raises:
        ValueError: It is above ``TOLERANCE``: a wrong result is not worth timing.
    """
    packed, parts, index = _inputs(shape, 1, dtype)
    out = ours(*parts, index, shape.region)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weights).sum(), packed)
    exact = packed.detach().double().requires_grad_()
    with use_backend("eager"):
        expected = ours(*(x.view(parts[0].shape) for x in exact.chunk(3, dim=-1)), index, shape.region)
        (exact_grad,) = torch.autograd.grad((expected * weights).sum(), exact)
    pairs = ((expected, out), (exact_grad, grad))
    error = max(((b.double() - a).square().mean().sqrt() / a.std()).item() for a, b in pairs)
    if not error <= TOLERANCE:
        raise ValueError(f"{shape}: error {error:.1e} of the standard deviation, allowed {TOLERANCE}; not timed")
    return error


def _graph_ms(call: Callable[[], Any], rounds: int) -> float:
    """Median milliseconds of a replayed CUDA graph: device time without the host's."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _events_ms(call: Callable[[], Any], rounds: int) -> float:
    """Median milliseconds of a call between events; where the device waits for the host, that is in it."""
    times = []
    for i in range(-3, rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 0:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def _extra_mib(call: Callable[[], Any], results: int) -> float:
    """Peak memory beyond what was there and what is returned, in MiB."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before - results) / 2**20


def measure(name: str, form: str, dtype: torch.dtype = torch.bfloat16, rounds: int = 20) -> dict[str, Any]:
    """Times and memory of one form at one of ``SHAPES``."""
    shape, function = SHAPES[name], FORMS[form]
    packed, parts, index = _inputs(shape, shape.batch, dtype)
    weights = torch.randn_like(parts[0])
    size = weights.numel() * weights.element_size()

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*parts, index, shape.region)

    def both() -> Any:
        return torch.autograd.grad(function(*parts, index, shape.region), packed, weights)

    exps = shape.batch * shape.heads * shape.side**2 * shape.topk * shape.region**2
    floor = max(4 * size / COPY_RATE, exps / EXP_RATE) * 1e3
    return dict(
        shape=name,
        form=form,
        forward_ms=round(_graph_ms(forward, rounds), 4),
        both_ms=round(_events_ms(both, rounds), 4),
        forward_extra_mib=round(_extra_mib(forward, size)),
        both_extra_mib=round(_extra_mib(both, 4 * size)),
        floor_forward_ms=round(floor, 4),
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=version("triton"),
    )


def benchmark_ops(path: Path | None, forms: list[str], rounds: int = 20) -> str:
    """Check and time routed attention and its peers at every shape.

    Args:
        path: CSV file to append to.
        forms: Of ``FORMS``.
        rounds: Replays of each graph.

    Returns:
        A Markdown table.

    Raises:
        ValueError: There is no CUDA device, or a result is wrong.
    """
    if not torch.cuda.is_available():
        raise ValueError("the operators' benchmark needs a CUDA device; visionattn benchmark times models on a CPU")
    columns = "shape", "form", "forward ms (graph)", "forward and backward ms (events)", "extra MiB", "floor ms"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, shape in SHAPES.items():
        check(shape, torch.bfloat16)
        for form in forms:
            row = measure(name, form, rounds=rounds)
            extra = f"{row['forward_extra_mib']} / {row['both_extra_mib']}"
            times = f"{row['forward_ms']:.3f} | {row['both_ms']:.3f} | {extra} | {row['floor_forward_ms']:.3f}"
            lines.append(f"| {name} | {form} | {times} |")
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                new = not path.is_file()
                with path.open("a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, row, lineterminator="\n")
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
    return "\n".join(lines)
