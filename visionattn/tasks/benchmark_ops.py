"""Routed attention on a GPU beside the published gather, dense attention and FlexAttention: checked, then timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from visionattn.ops import routed_attention, use_backend
from visionattn.ops.routing.reference import split_regions
from visionattn.tasks.records import ORIGIN, CsvFile, markdown, origin
from visionattn.tasks.timing import events_ms, extra_mib, graph_ms, host_us

COPY_RATE, EXP_RATE = 3.0e12, 3.7e12  # bytes and exponentials a second of an H100, for the floors
TOLERANCE, PEER_TOLERANCE = 2e-2, 5e-2  # of the standard deviation, RMS, in half precision; peers round more often
OURS, GATHER, DENSE, FLEX = "visionattn", "gather", "dense SDPA", "flex_attention"
_DEVICE = "cuda"
_FLEX_BLOCK = 64  # tokens of the smallest block that FlexAttention's kernels walk over on an H100


class Shape(NamedTuple):
    """A call: batch, side of the map, heads, side of a region, entries of a list, channels of a head."""

    batch: int
    side: int
    heads: int
    region: int
    topk: int
    dim: int = 32


SHAPES = {
    "biformer stage 1": Shape(128, 56, 2, 8, 1),
    "biformer stage 2": Shape(128, 28, 4, 4, 4),
    "biformer stage 3": Shape(128, 14, 8, 2, 16),
    "112x112": Shape(16, 112, 2, 16, 4),
    "224x224, topk 8": Shape(4, 224, 2, 32, 8),
    "224x224, topk 16": Shape(4, 224, 2, 32, 16),
}
# milliseconds of the published code on an H100, bfloat16: forward, forward and backward
OFFICIAL_MS = dict(
    zip(SHAPES, ((0.790, 5.24), (0.994, 4.20), (1.711, 5.34), (2.294, 8.07), (19.03, 44.9), (24.64, 74.6)), strict=True)
)

_KINDS = "forward", "both"  # both: forward and backward
_FIGURES = ("ms", "clock", "events_ms", "host_us", "extra_mib", "floor_ms", "to_floor", "to_official")
COLUMNS = ("shape", "form", "error", *(f"{kind}_{x}" for kind in _KINDS for x in _FIGURES), "note")


class Prepared(NamedTuple):
    """A form of the attention at work on given tensors.

    ``attend`` of ``inputs`` is what is timed; ``inputs`` are made beforehand, in the layout that the form likes best,
    and ``restore`` brings its output to ``[B, H, W, heads, head_dim]`` where the form leaves it in another one.
    """

    inputs: list[Tensor]
    attend: Callable[..., Tensor]
    restore: Callable[[Tensor], Tensor] = lambda out: out


def _regions(x: Tensor, shape: Shape) -> Tensor:
    """``[B, H, W, ...]`` to ``[B, P, T, ...]``, region by region."""
    return split_regions(x, (shape.region, shape.region)).flatten(3, 4).flatten(1, 2)


def ours(packed: Tensor, index: Tensor, shape: Shape) -> Prepared:
    """The operator of this package, on slices of a packed projection ``[B, H, W, 3, heads, head_dim]``."""
    region = shape.region, shape.region
    return Prepared(list(packed.unbind(3)), lambda q, k, v: routed_attention(q, k, v, index, region)[0])


def gather_form(packed: Tensor, index: Tensor, shape: Shape) -> Prepared:
    """The core of the published code: chosen regions gathered as copies, then dense attention region by region.

    There the map is cut into regions before the projection, so its results come as ``[B, P, T, C]`` with keys and
    values side by side, and the list as int64.
    """
    B, side, heads, region, d = packed.shape[0], shape.side, shape.heads, shape.region, shape.dim
    n, T, C = side // region, region**2, heads * d
    chosen = index[:, 0].long()[..., None, None].expand(-1, -1, -1, T, 2 * C)

    def attend(q: Tensor, kv: Tensor) -> Tensor:
        kv = kv[:, None].expand(-1, n * n, -1, -1, -1).gather(2, chosen)  # [B, P, topk, T, 2C]
        k, v = (x.unflatten(4, (heads, d)).flatten(2, 3).flatten(0, 1) for x in kv.split(C, dim=-1))
        q = q.unflatten(3, (heads, d)).flatten(0, 1).transpose(1, 2)  # [B*P, heads, T, d]
        scores = (q * d**-0.5) @ k.permute(0, 2, 3, 1)
        out = scores.softmax(dim=-1) @ v.transpose(1, 2)
        out = out.unflatten(2, (region, region)).unflatten(0, (B, n, n))  # [B, rows, columns, heads, rh, rw, d]
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, side, side, heads, d)

    return Prepared(list(_regions(packed, shape).flatten(3).split([C, 2 * C], dim=-1)), attend)


def dense_form(packed: Tensor, index: Tensor, shape: Shape) -> Prepared:
    """Attention to the whole map by PyTorch's fused kernel: what routing must beat."""
    inputs = [x.flatten(1, 2).transpose(1, 2) for x in packed.unbind(3)]
    size = (shape.side, shape.side)
    return Prepared(inputs, F.scaled_dot_product_attention, lambda out: out.transpose(1, 2).unflatten(1, size))


def block_mask(index: Tensor, shape: Shape) -> BlockMask:
    """The table ``[B, 1, P, K]`` as FlexAttention takes it, for tokens in the order of the regions.

    Regions that are blocks of its kernels are listed as such; smaller ones are looked up token by token.
    """
    B, _, P, _ = index.shape
    T = shape.region**2
    table = torch.zeros((B, P, P), dtype=torch.bool, device=index.device).scatter_(2, index[:, 0].long(), True)

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[b, query // T, key // T]

    if T < _FLEX_BLOCK:
        return create_block_mask(mask, B, None, P * T, P * T, device=index.device)
    count = table.sum(dim=-1, dtype=torch.int32)[:, None]
    blocks = table.int().argsort(dim=-1, descending=True, stable=True).int()[:, None].contiguous()
    # none of the blocks is cut by the mask
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(blocks), count, blocks, BLOCK_SIZE=(T, T), mask_mod=mask
    )


def flex_form(packed: Tensor, index: Tensor, shape: Shape) -> Prepared:
    """FlexAttention, compiled, on tokens that were brought into the order of the regions before the clock starts."""
    torch.compiler.reset()  # it compiles anew for every shape, and gives up after some
    mask, compiled = block_mask(index, shape), torch.compile(flex_attention, dynamic=False)
    inputs = [_regions(x, shape).flatten(1, 2).transpose(1, 2).contiguous() for x in packed.unbind(3)]
    n = shape.side // shape.region

    def restore(out: Tensor) -> Tensor:
        out = out.transpose(1, 2).unflatten(1, (n, n, shape.region, shape.region))
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    return Prepared(inputs, lambda q, k, v: compiled(q, k, v, block_mask=mask), restore)


FORMS: dict[str, Callable[[Tensor, Tensor, Shape], Prepared]] = {
    OURS: ours,
    GATHER: gather_form,
    DENSE: dense_form,
    FLEX: flex_form,
}


def _generator() -> torch.Generator:
    """A generator of its own: a capture that fails leaves the default one unusable."""
    return torch.Generator(_DEVICE).manual_seed(0)


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random packed projection ``[B, H, W, 3, heads, d]``, table ``[B, 1, P, topk]``, gradient of the output."""
    generator = _generator()
    size = (shape.batch, shape.side, shape.side, 3, shape.heads, shape.dim)
    packed = torch.empty(size, device=_DEVICE, dtype=dtype).normal_(generator=generator)
    regions = (shape.side // shape.region) ** 2
    order = torch.rand(shape.batch, 1, regions, regions, device=_DEVICE, generator=generator).argsort(-1)
    weights = torch.empty_like(packed[:, :, :, 0]).normal_(generator=generator)
    return packed.requires_grad_(), order[..., : shape.topk].int().contiguous(), weights


def check(form: str, prepared: Prepared, packed: Tensor, index: Tensor, weights: Tensor, shape: Shape) -> float:
    """Largest RMS error of output and gradient of the first image against float64, in standard deviations.

    Raises:
        ValueError: It is above the tolerance: a wrong result is not worth timing.
    """
    out = prepared.restore(prepared.attend(*prepared.inputs))
    (grad,) = torch.autograd.grad(out, packed, weights)
    if form == DENSE:
        every = torch.arange(index.shape[2], dtype=torch.int32, device=index.device)
        index = every.expand(1, 1, index.shape[2], -1)
    exact = packed[:1].detach().double().requires_grad_()
    with use_backend("eager"):
        expected = ours(exact, index[:1].contiguous(), shape)
        exact_out = expected.attend(*expected.inputs)
        (exact_grad,) = torch.autograd.grad(exact_out, exact, weights[:1].double())
    pairs = ((exact_out, out), (exact_grad, grad))
    error = max(((b[:1].double() - a).square().mean().sqrt() / a.std()).item() for a, b in pairs)
    allowed = TOLERANCE if form == OURS else PEER_TOLERANCE
    if not error <= allowed:
        raise ValueError(f"{form}, {shape}: error {error:.1e} of the standard deviation, allowed {allowed}; not timed")
    return error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _figures(
    make: Callable[[], Callable[[], Any]], rounds: int, calls: int, results: int
) -> tuple[dict[str, Any], str]:
    """Times and memory of a call, and why it has no graph; ``make`` gives a call whose leaves no stream has seen."""
    call = make()
    events = events_ms(call, rounds)
    host = host_us(call, max(3, min(calls, int(100 / events))))
    memory = max(0.0, extra_mib(call, results))
    note, clock = "", "graph"
    try:
        device = graph_ms(make(), max(1, min(10, int(20 / events))), rounds)
    except RuntimeError as error:
        device, clock, note = events, "events", _reason(error)
    return dict(ms=device, clock=clock, events_ms=events, host_us=host, extra_mib=round(memory)), note


def _floors_ms(shape: Shape, size: int) -> tuple[float, float]:
    """Least milliseconds of forward, and of forward and backward, for tensors of ``size`` bytes.

    Forward reads three of them and writes one; backward reads five and writes three. Each computes every exponential.
    """
    exps = shape.batch * shape.heads * shape.side**2 * shape.topk * shape.region**2 / EXP_RATE
    forward = max(4 * size / COPY_RATE, exps)
    return 1e3 * forward, 1e3 * (forward + max(8 * size / COPY_RATE, exps))


def measure(name: str, form: str, data: tuple[Tensor, Tensor, Tensor], rounds: int) -> dict[str, Any]:
    """Error, times and memory of one form at one of ``SHAPES``.

    Args:
        name: Of ``SHAPES``.
        form: Of ``FORMS``.
        data: As from ``inputs``.
        rounds: Replays of each graph.

    Returns:
        A row under names of ``COLUMNS``.

    Raises:
        ValueError: The result is wrong.
    """
    shape, (packed, index, weights) = SHAPES[name], data
    prepared = FORMS[form](packed, index, shape)
    row: dict[str, Any] = dict(shape=name, form=form, error=check(form, prepared, packed, index, weights, shape))
    fixed = [x.detach() for x in prepared.inputs]

    def forward() -> Tensor:
        with torch.no_grad():
            return prepared.attend(*fixed)

    grad = torch.empty_like(forward()).normal_(generator=_generator())
    size = weights.numel() * weights.element_size()

    def both() -> Callable[[], Any]:
        leaves = [x.detach().requires_grad_() for x in fixed]
        return lambda: torch.autograd.grad(prepared.attend(*leaves), leaves, grad)

    notes = []
    plan = ("forward", lambda: forward, 50, size), ("both", both, 20, 4 * size)
    for (kind, make, calls, results), floor in zip(plan, _floors_ms(shape, size), strict=True):
        figures, note = _figures(make, rounds, calls, results)
        figures |= dict(floor_ms=floor, to_floor=figures["ms"] / floor)
        row |= {f"{kind}_{key}": value for key, value in figures.items()}
        notes += [f"{kind}: {note}"] if note else []
    return row | dict(note="; ".join(notes))


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _line(row: dict[str, Any]) -> list[str]:
    """A row of ``COLUMNS`` as cells of the table: forward / forward and backward."""

    def pair(figure: str) -> str:
        values = [row.get(f"{kind}_{figure}") for kind in _KINDS]
        marks = ["*" if figure == "ms" and row.get(f"{kind}_clock") == "events" else "" for kind in _KINDS]
        texts = [f"{value:.4g}{mark}" for value, mark in zip(values, marks, strict=True) if value is not None]
        return " / ".join(texts) or "-"

    figures = ("ms", "to_floor", "to_official", "host_us", "events_ms", "extra_mib")
    return [row["shape"], row["form"], *map(pair, figures), row["note"].replace("|", "/")]


def benchmark_ops(path: Path | None, forms: list[str], rounds: int = 30) -> str:
    """Check and time routed attention and its peers at every shape.

    A peer that cannot run, or that computes something else, is in the table with the reason instead of figures.

    Args:
        path: CSV file to append to, row by row.
        forms: Of ``FORMS``.
        rounds: Replays of each graph.

    Returns:
        A Markdown table.

    Raises:
        ValueError: There is no CUDA device, the file has other columns, or the result of this package is wrong.
    """
    if _DEVICE == "cuda" and not torch.cuda.is_available():
        raise ValueError("the operators' benchmark needs a CUDA device; visionattn benchmark times models on a CPU")
    if unknown := [form for form in forms if form not in FORMS]:
        raise ValueError(f"unknown form {unknown[0]!r}; choose of {', '.join(FORMS)}")
    file, where, rows = CsvFile(path, (*COLUMNS, *ORIGIN)), origin(_DEVICE), []
    for name, shape in SHAPES.items():
        data = inputs(shape, torch.bfloat16)
        for form in forms:
            try:
                row = measure(name, form, data, rounds)
                if form == GATHER and "H100" in where["device"]:
                    for kind, official in zip(_KINDS, OFFICIAL_MS[name], strict=True):
                        row[f"{kind}_to_official"] = row[f"{kind}_ms"] / official
            except Exception as error:  # whatever a peer's compiler or kernels raise
                if form == OURS:
                    raise
                row = dict(shape=name, form=form, note=_reason(error))
            row = {key: _rounded(value) for key, value in row.items()}
            file.append(row | where)
            rows.append(_line(row))
    both = "ms", "times the floor", "times the published", "host us", "events ms", "extra MiB"
    table = markdown(("shape", "form", *both, "note"), rows)
    return f"{table}\n\nForward / forward and backward; * by events. {', '.join(f'{k} {v}' for k, v in where.items())}."
