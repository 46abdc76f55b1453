"""Neighbourhood attention at random sizes, windows and memory layouts against the float64 definition.

Every case is a function of its number, so the name of a failed test is enough to repeat it. On a GPU the compiler takes
nearly all the time: cases share a few geometries, that is what a kernel is compiled for, and differ in the rest.
"""

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from visionattn.ops import use_backend

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CASES, GEOMETRIES = (240, 48) if CUDA else (12, 12)
PIXELS = 6000 if CUDA else 120  # of a map
COPIED = 1 << 24  # values that the float64 definition, which gathers, may hold in one tensor
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float16, torch.float16, torch.float32]
RELATIVE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Geometry(NamedTuple):
    """What kernels are compiled for."""

    kernel: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]
    heads: int
    dim: int
    dtype: torch.dtype
    layout: str
    bias: bool
    stride: tuple[int, int]


class Case(NamedTuple):
    """One call: a geometry and what may change from call to call."""

    geometry: Geometry
    batch: int
    scale: float | None
    bias_dtype: torch.dtype


def draw_geometry(number: int) -> Geometry:
    rng = random.Random(number)
    most = 21 if CUDA else 5
    if rng.random() < 0.5:
        kernel = (rng.choice([k for k in (3, 5, 7, 13, 21) if k <= most]),) * 2
    else:
        kernel = rng.randrange(1, most + 1, 2), rng.randrange(1, most + 1, 2)
    dilation = (1, 1) if rng.random() < 0.5 else (rng.randint(1, 4), rng.randint(1, 4))
    least = [k * d for k, d in zip(kernel, dilation, strict=True)]
    height = least[0] + round(rng.random() ** 2 * max(0, min(60, PIXELS // least[1] - least[0])))
    width = least[1] + round(rng.random() ** 2 * max(0, min(60, PIXELS // height - least[1])))
    layout = rng.choice(["plain", "packed", "heads_first", "channels_first", "expanded", "unaligned"])
    dtype = DTYPES[number // 2 % len(DTYPES)]
    dims = [1, 7, 16, 24, 32, 32, 40, 64, 77, 128]
    if dtype == torch.float32:
        dims = dims[:6]  # exact products of large tiles take the compiler up to 15 s a kernel
    heads, dim = rng.randint(1, 6 if CUDA else 2), rng.choice(dims)
    stride = rng.choice([(1, 1), kernel, (rng.randint(1, kernel[0]), rng.randint(1, kernel[1]))])
    return Geometry(kernel, dilation, (height, width), heads, dim, dtype, layout, number % 2 == 0, stride)


def draw(number: int) -> Case:
    rng, g = random.Random(1000 + number), draw_geometry(number % GEOMETRIES)
    batch = rng.randint(1, max(1, min(3, PIXELS // (g.size[0] * g.size[1]))))
    return Case(g, batch, rng.choice([None, -0.25, 0.02]), rng.choice([g.dtype, torch.float32]))


def cases() -> list[Any]:
    """All cases, named; those of one geometry stay in one process of pytest-xdist, which compiles for it once."""
    found = []
    for number, case in enumerate(map(draw, range(CASES))):
        g = case.geometry
        sizes = ("x".join(map(str, pair)) for pair in (g.kernel, g.dilation, g.stride, g.size))
        words = number, g.dtype, f"{case.batch}x{g.heads}x{g.dim}", *sizes, g.layout, case.scale
        name = "-".join(map(str, (*words, *(["bias", case.bias_dtype] if g.bias else [])))).replace("torch.", "")
        group = pytest.mark.xdist_group(f"neighborhood {number % GEOMETRIES}")
        found.append(pytest.param(case, id=name, marks=group))
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


LABELS = "out", "lse", "dq", "dk", "dv", "dbias"


def run(tensors: list[Tensor], rest: tuple[Any, ...], weights: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name, for gradients ``weights`` of both outputs."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    bias = tensors[3] if len(tensors) > 3 else None
    out, lse = torch.ops.visionattn.neighborhood_attention(*tensors[:3], bias, *rest)
    grads = torch.autograd.grad((out, lse), tensors, [w.to(x.dtype) for w, x in zip(weights, (out, lse), strict=True)])
    return dict(zip(LABELS, (out.detach(), lse.detach(), *grads), strict=False))


def compare(label: str, expected: Tensor, actual: Tensor, rel: float, unit: float) -> None:
    """RMS error at most ``rel`` times the RMS of what is expected, or ``unit`` where that is small."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any(), f"{label} has NaN"
    error, size = (x.double().square().mean().sqrt().item() for x in (actual.double() - expected, expected))
    assert error <= rel * max(size, unit), f"{label}: RMS error {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("case", cases())
def test_kernels_equal_definition(case):
    g = case.geometry
    shape = case.batch, *g.size, g.heads, g.dim
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=generator).to(DEVICE, g.dtype) for _ in range(3)]
    table = torch.randn(g.heads, 2 * g.kernel[0] - 1, 2 * g.kernel[1] - 1, generator=generator)
    bias = [table.to(DEVICE, case.bias_dtype)] if g.bias else []
    tensors = [*(lay_out(x, g.layout) for x in maps), *bias]
    rest = list(g.kernel), list(g.dilation), g.dim**-0.5 if case.scale is None else case.scale, list(g.stride)
    weights = [torch.randn(shape, generator=generator).to(DEVICE, g.dtype)]
    weights.append(torch.randn(case.batch, g.heads, *g.size, generator=generator).to(DEVICE))
    with use_backend("triton"):
        if g.layout == "unaligned":  # what is kept of a launch for aligned tensors must not serve others
            run([*maps, *bias], rest, weights)
        actual, again = (run(tensors, rest, weights) for _ in range(2))
    copied = case.batch * g.heads * g.size[0] * g.size[1] * g.kernel[0] * g.kernel[1] * g.dim
    # the eager form is held to the definition elsewhere
    with use_backend("eager"):
        expected = run([x.double() for x in tensors], rest, weights)
    if copied <= COPIED:
        from visionattn.ops.neighborhood import reference

        wide = [x.double() for x in tensors]
        out, lse = reference.neighborhood_attention(*wide[:3], wide[3] if g.bias else None, *rest)
        expected |= dict(out=out, lse=lse)
    # with a window of one pixel, or the same keys everywhere, gradients of queries and keys are rounding alone
    units = dict(out=0.0, lse=1.0, dv=0.0, dbias=1.0, dq=abs(rest[2]), dk=abs(rest[2]))
    for label in expected:
        kind = torch.float32 if label == "lse" else case.bias_dtype if label == "dbias" else g.dtype
        assert actual[label].dtype == kind
        compare(label, expected[label], actual[label], RELATIVE[g.dtype], units[label])
        assert torch.equal(actual[label], again[label]), f"{label} differs from run to run"
