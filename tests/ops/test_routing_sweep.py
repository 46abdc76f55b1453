"""Routed attention at random sizes, tables and memory layouts against the float64 definition.

Every case is a function of its number, so the name of a failed test is enough to repeat it. On a GPU the compiler takes
nearly all the time: cases share a few geometries, that is what a kernel is compiled for, and differ in the rest.
"""

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from visionattn.ops import routed_attention, use_backend
from visionattn.tasks.benchmark_routing import SHAPES

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CASES, GEOMETRIES = (240, 40) if CUDA else (12, 12)
PIXELS = 4000 if CUDA else 150  # of all images of a case
COPIED = 1 << 24  # values that the float64 definition, which gathers, may hold in one tensor
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
RELATIVE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Map(NamedTuple):
    """``rows`` x ``columns`` regions of ``region`` pixels."""

    rows: int
    columns: int
    region: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        return self.rows * self.region[0], self.columns * self.region[1]

    @property
    def regions(self) -> int:
        return self.rows * self.columns

    @property
    def pixels(self) -> int:  # of a region
        return self.region[0] * self.region[1]

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}-of-{self.region[0]}x{self.region[1]}"


class Geometry(NamedTuple):
    """What kernels are compiled for."""

    query: Map
    key: Map
    heads: int
    dim: int
    topks: tuple[int, ...]
    dtype: torch.dtype
    layout: str


class Case(NamedTuple):
    """One call: a geometry and what may change from call to call."""

    geometry: Geometry
    batch: int
    entries: str
    topk: int
    shared: bool
    scale: float | None


def draw_map(rng: random.Random) -> Map:
    most = min(20, int(PIXELS**0.5))
    region = round(most ** rng.random()), round(most ** rng.random())  # small ones as likely as large ones
    rows = rng.randint(1, min(7, PIXELS // (region[0] * region[1])))
    return Map(rows, rng.randint(1, min(7, PIXELS // (rows * region[0] * region[1]))), region)


def draw_geometry(number: int) -> Geometry:
    rng = random.Random(number)
    query = draw_map(rng)
    key = query if number % 3 else draw_map(rng)
    layout = rng.choice(["plain", "packed", "heads_first", "channels_first", "expanded", "unaligned"])
    dtype = DTYPES[number // 3 % len(DTYPES)]
    dims = [1, 7, 16, 24, 32, 32, 40, 64, 77, 128]
    if dtype == torch.float32 and max(math.prod(query.size), math.prod(key.size)) > 64:
        dims = dims[:6]  # exact products of large tiles take the compiler up to 15 s a kernel
    topks = tuple(rng.randint(1, key.regions + 2) for _ in range(2))
    return Geometry(query, key, rng.randint(1, 8 if CUDA else 3), rng.choice(dims), topks, dtype, layout)


def draw(number: int) -> Case:
    rng, g = random.Random(1000 + number), draw_geometry(number % GEOMETRIES)
    batch = rng.randint(1, min(3, PIXELS // max(math.prod(g.query.size), math.prod(g.key.size))))
    entries = rng.choice(["distinct", "missing", "empty", "repeated"])
    return Case(g, batch, entries, rng.choice(g.topks), rng.random() < 0.5, rng.choice([None, -0.25, 0.02]))


def published() -> Iterator[Case]:
    for shape, dtype in itertools.product(SHAPES.values(), [torch.float32, torch.bfloat16]):
        regions = shape.side // shape.region
        whole = Map(regions, regions, (shape.region, shape.region))
        geometry = Geometry(whole, whole, shape.heads, 32, (shape.topk,), dtype, "packed")
        yield Case(geometry, 2, "distinct", shape.topk, True, None)


def cases() -> list[Any]:
    """All cases, named; those of one geometry stay in one process of pytest-xdist, which compiles for it once."""
    found = []
    for number, case in enumerate([*map(draw, range(CASES)), *(published() if CUDA else [])]):
        g = case.geometry
        words = number, g.dtype, f"{case.batch}x{g.heads}x{g.dim}", g.query, *([g.key] if g.key != g.query else [])
        words = *words, f"{case.entries}{case.topk}{'' if case.shared else '-per-head'}", g.layout, case.scale
        name = "-".join(map(str, words)).replace("torch.", "")
        group = number % GEOMETRIES if number < CASES else number
        found.append(pytest.param(case, id=name, marks=pytest.mark.xdist_group(f"geometry {group}")))
    return found


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same map ``[B, H, W, heads, d]`` otherwise in memory, with NaN around it."""
    match layout:
        case "packed":  # a slice of a projection
            return torch.full((*x.shape[:3], 3, *x.shape[3:]), torch.nan).to(x)[:, :, :, 1].copy_(x)
        case "heads_first":
            return x.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
        case "channels_first":
            return x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        case "expanded":  # other values: the same in all images and heads
            return x[:1, :, :, :1].expand_as(x)
        case "unaligned":
            return torch.full((x.numel() + 2,), torch.nan).to(x)[1:-1].view(x.shape).copy_(x)
    return x


def table(case: Case) -> Tensor:
    P_k = case.geometry.key.regions
    shape = case.batch, 1 if case.shared else case.geometry.heads, case.geometry.query.regions
    if case.entries == "repeated":
        return torch.randint(0, P_k, (*shape, case.topk), dtype=torch.int32)
    index = torch.rand(*shape, P_k).argsort(-1)[..., : case.topk].int()
    if case.entries == "missing":
        index[torch.rand(index.shape) < 0.3] = -1
    if case.entries == "empty":
        index[torch.rand(shape) < 0.5] = -1
    return index


def run(tensors: list[Tensor], rest: tuple[Any, ...], weights: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name, for gradients ``weights`` of both outputs."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out, lse = routed_attention(*tensors, *rest)
    grads = torch.autograd.grad((out, lse), tensors, [w.to(x.dtype) for w, x in zip(weights, (out, lse), strict=True)])
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))


def compare(label: str, expected: Tensor, actual: Tensor, rel: float) -> None:
    """RMS error at most ``rel`` standard deviations, where these mean something.

    Results of one or a few values have no spread to speak of, so the mean, which is about 0 elsewhere, counts as spread
    too. The log-sum-exp of long lists hardly varies, around a value that float32 resolves no better; but an error of it
    is a relative error of all probabilities, so its unit is 1 at least.
    """
    assert actual.shape == expected.shape
    assert not actual.isnan().any(), f"{label} has NaN"
    assert torch.equal(actual == -torch.inf, expected == -torch.inf), f"{label}: -inf at other places"
    expected, actual = (x.double().masked_fill(x == -torch.inf, 0.0) for x in (expected, actual))
    error, unit = (x.square().mean().sqrt().item() for x in (actual - expected, expected))
    if label == "lse":
        unit = max(expected.std(correction=0).item(), 1.0)
    assert error <= rel * unit, f"{label}: RMS error {error:.2e} of {unit:.2e}, {error / (unit or 1e-300):.1e} of it"


@pytest.mark.parametrize("case", cases())
def test_kernels_equal_definition(case):
    g = case.geometry
    maps = [torch.randn(case.batch, *m.size, g.heads, g.dim).to(DEVICE, g.dtype) for m in (g.query, g.key, g.key)]
    tensors = [lay_out(x, g.layout) for x in maps]
    rest = table(case).to(DEVICE), g.query.region, g.key.region, case.scale
    weights = [
        torch.randn(maps[0].shape).to(DEVICE, g.dtype),
        torch.randn(case.batch, g.heads, *g.query.size).to(DEVICE),
    ]
    with use_backend("triton"):
        if g.layout == "unaligned":  # what is kept of a launch for aligned tensors must not serve others
            run(maps, rest, weights)
        actual, again = (run(tensors, rest, weights) for _ in range(2))
    copied = case.batch * g.heads * case.topk * g.query.regions * g.key.pixels * max(g.dim, g.query.pixels)
    with use_backend("reference" if copied <= COPIED else "eager"):
        expected = run([x.double() for x in tensors], rest, weights)
    for label in expected:
        assert actual[label].dtype == (torch.float32 if label == "lse" else g.dtype)
        compare(label, expected[label], actual[label], RELATIVE[g.dtype])
        assert torch.equal(actual[label], again[label]), f"{label} differs from run to run"
