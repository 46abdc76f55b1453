"""Launching the Triton kernels of neighbourhood attention: tile sizes, masks and the order of the kernels."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn.ops._dispatch import KERNEL_DTYPES
from visionattn.ops._launch import Launch, Plans, channels_inside, layout
from visionattn.ops._tiles import Search, searching
from visionattn.ops.neighborhood import geometry, kernels_attention, kernels_attention_grad, tuning
from visionattn.ops.neighborhood.tuning import Tile

MAX_HEAD_DIM = 128
MAX_GRID = 65535  # programs along the second and third axis
MAX_KERNEL, MAX_BIASED = 41, 25  # sides of a window: masks grow with its area and with the tiles that a border reaches
PROGRAMS = 2048  # that keep a GPU busy; with more, one may serve several images
FUSED_PROGRAMS = 384  # the same where each leaves a tile of float32 for the gradient of the bias
BIAS_PROGRAMS = 2048  # of the bias gradient; each writes a tile of float32

_forward_plans, _backward_plans = Plans(), Plans()
_recorded: set[Any] = set()  # tables of which CUDA graphs have the addresses


def _addressable(x: Tensor) -> bool:
    """Whether offsets inside one image fit into 31 bits."""
    _, H, W, heads, d = x.shape
    return H * max(x.stride(1), W * heads * d) + W * x.stride(2) + heads * x.stride(3) < 2**31


def serves(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kernel: Sequence[int]) -> bool:
    """Whether there is a kernel for these tensors."""
    return (
        query.dtype in KERNEL_DTYPES
        and query.shape[0] <= MAX_GRID
        and query.shape[1] <= MAX_GRID
        and query.shape[4] <= MAX_HEAD_DIM
        and max(kernel) <= (MAX_KERNEL if bias is None else MAX_BIASED)
        and query.numel() > 0
        and _addressable(query)
        and _addressable(key)
        and _addressable(value)
    )


class _Shape:
    """Sizes of a call, as the kernels want them."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        kernel: Sequence[int],
        dilation: Sequence[int],
        stride: Sequence[int],
    ):
        self.B, self.H, self.W, self.heads, self.D = query.shape
        self.kernel, self.stride = (kernel[0], kernel[1]), (stride[0], stride[1])
        # one pixel has no distance
        self.dilation = dilation[0] if kernel[0] > 1 else 1, dilation[1] if kernel[1] > 1 else 1
        self.dtype, self.device = query.dtype, query.device
        self.strides = tuple(s for x in (query, key, value) for s in x.stride()[:4])
        self.block_d = max(16, 1 << (self.D - 1).bit_length())
        self.biased = bias is not None
        self.constants: dict[str, Any] = dict(
            HEADS=self.heads,
            D=self.D,
            BLOCK_D=self.block_d,
            KH=kernel[0],
            KW=kernel[1],
            BIAS=self.biased,
            PRECISION="ieee" if self.dtype == torch.float32 else "tf32",
        )

    def tuned(self, kernel: str, prepare: Callable[[Tile], Callable[..., None]]) -> Callable[..., None]:
        """The launch with the tile for ``kernel``, or a search around it."""
        tile = tuning.choose(
            kernel,
            (self.H, self.W),
            self.kernel,
            self.dilation,
            self.block_d,
            self.dtype,
            self.device,
            self.biased,
            self.stride,
        )
        if searching(self.device):
            by_key = kernel == "key_grad"
            found = tuning.candidates(tile, (self.H, self.W), self.kernel, self.dilation, self.stride, by_key)
            return Search(kernel, found, prepare)
        return prepare(tile)

    def prepare(self, kernel: Any, grid: tuple[int, ...], integers: tuple[int, ...], tile: Tile, **more: Any) -> Launch:
        values = {name: value for name, value in (self.constants | more).items() if name in kernel.arg_names}
        return Launch(kernel, grid, integers, values, tile.warps, tile.stages, tile.registers)


def _capturing(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _kept(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Copies on the device, complete when this returns.

    What a thread allocates while ``torch.compile`` runs it for a CUDA graph belongs to that graph, and must be gone
    afterwards. These copies stay, so a thread of their own makes them.
    """
    if device.type != "cuda":
        return tuple(x.to(device) for x in tensors)
    with ThreadPoolExecutor(1) as thread:
        return tuple(thread.map(lambda x: x.to(device), tensors))


class _Tables(NamedTuple):
    """A walk and what the kernels read of it, on the device."""

    walk: geometry.Walk
    rows: Tensor
    columns: Tensor
    words: Tensor
    classes: Tensor


@lru_cache(maxsize=256)
def _tables(
    size: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    tile: tuple[int, int],
    block: int,
    by_key: bool,
    parts: bool,
    whole: int,
    device: torch.device,
) -> _Tables:
    """The tables of one geometry, which calls with other batches, heads and memory layouts share."""
    walk = geometry.walk(size, kernel, dilation, tile, block, by_key, whole, stride)
    walk = walk if parts else walk._replace(parts=())
    axes = (geometry.table(walk, vertical) for vertical in (True, False))
    return _Tables(walk, *_kept((*axes, geometry.words(walk, by_key), geometry.classes(walk)), device))


class _Tiles:
    """How a kernel cuts the map: the walk of its programs, with tables and masks on the device."""

    def __init__(self, s: _Shape, tile: Tile, by_key: bool = False, parts: bool = True):
        size, block = (tile.height, tile.width), tile.columns
        found = _tables((s.H, s.W), s.kernel, s.dilation, s.stride, size, block, by_key, parts, tile.whole, s.device)
        self.walk = walk = found.walk
        self.tables = found.rows, found.columns
        self.more: tuple[Tensor, ...] = ()  # tables that a kernel has besides
        self.constants = dict(
            TILE_X=walk.width, WIDTH=walk.columns.columns, BLOCK_M=walk.block_m, BLOCK_N=block, PARTS=walk.parts,
            WALK=not walk.whole, WORDS=walk.words, BY_KEY=by_key,
        )  # fmt: skip
        self._device, self._words, self._classes, self._build = s.device, found.words, found.classes, None
        if s.biased:
            self._shape = walk.classes, s.heads, walk.block_m, 32 * walk.words
            self._dtype = torch.float32 if s.dtype == torch.float32 else torch.float16
            grid = walk.classes, s.heads, walk.words
            self._build = s.prepare(kernels_attention.bias_tile_kernel, grid, (), Tile(0, 0, 0, 4, 1), **self.constants)

    def meeting(self, bias: Tensor | None) -> Tensor:
        """Which rows meet which columns: bit masks, or with a bias tiles of it."""
        if _capturing(self._device):
            _recorded.add(self)  # plans may be forgotten before the graph is
        if bias is None or self._build is None:
            return self._words
        meet = torch.empty(self._shape, dtype=self._dtype, device=bias.device)
        self._build(bias, self._words, self._classes, meet)
        return meet


def _images(s: _Shape, tile: Tile, tiles: _Tiles, programs: int) -> int:
    """Images that a program serves, so that about ``programs`` remain."""
    return max(1, min(tile.images, tiles.walk.tiles * s.heads * s.B // programs))


def _launch(s: _Shape, kernel: Any, tile: Tile, tiles: _Tiles, images: int, **more: Any) -> Launch:
    """Launch of a kernel with a program for every tile, head and share of the images."""
    integers = (*s.strides, s.B, s.H, s.W, *s.dilation, len(tiles.walk.columns.kinds))
    grid = s.heads * len(tiles.walk.columns.tiles), len(tiles.walk.rows.tiles), -(-s.B // images)
    return s.prepare(kernel, grid, integers, tile, IMAGES=images, **tiles.constants, **more)


def _prepare(s: _Shape, kernel: Any, tile: Tile, by_key: bool = False, **more: Any) -> Callable[..., None]:
    """Launch of a kernel and of what makes its masks."""
    tiles = _Tiles(s, tile, by_key)
    launch = _launch(s, kernel, tile, tiles, _images(s, tile, tiles, PROGRAMS), **more)

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any) -> None:
        launch(query, key, value, tiles.meeting(bias), *tiles.tables, *rest)

    return run


def _prepare_fold(s: _Shape, tiles: _Tiles, classes: Tensor) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Launches that add up gradients of tiles of bias ``[sums, heads, rows, columns]`` to that of the bias."""
    walk, plain = tiles.walk, Tile(0, 0, 0, 4, 1)
    size = walk.block_m * 32 * walk.words
    together = min(16, 1 << (int(classes[:, 1].max()) - 1).bit_length())
    add = s.prepare(
        kernels_attention_grad.bias_sum_kernel, (-(-size * together // 4096), walk.classes, s.heads), (size,), plain,
        BLOCK_S=together, BLOCK=4096 // together,
    )  # fmt: skip
    places = (2 * s.kernel[0] - 1) * (2 * s.kernel[1] - 1)
    fold = s.prepare(
        kernels_attention_grad.bias_fold_kernel, (places, s.heads), (walk.classes,), plain._replace(warps=2),
        **tiles.constants,
    )  # fmt: skip

    def run(part: Tensor, classes: Tensor, dbias: Tensor) -> None:
        total = torch.empty((len(classes), s.heads, size), dtype=torch.float32, device=s.device)
        add(part, classes, total)
        fold(total, classes, dbias)

    return run


def _prepare_query_grad(
    s: _Shape, tile: Tile, lse_grad: bool, bias_grad: Callable[[], Callable[..., None]] | None, spread: int
) -> Callable[..., None]:
    """Launches of the query gradient and, if ``bias_grad`` is given, of that of the bias.

    It comes along where tiles are taken whole; else ``bias_grad`` tells the launches for it.
    """
    tiles = _Tiles(s, tile)
    fused = bias_grad is not None and tiles.walk.whole
    images = _images(s, tile, tiles, FUSED_PROGRAMS if fused else PROGRAMS)
    flags = dict(LSE_GRAD=lse_grad, BIAS_GRAD=fused, SPREAD=spread)
    launch = _launch(s, kernels_attention.query_grad_kernel, tile, tiles, images, **flags)
    if fused:
        shares = -(-s.B // images)
        found = geometry.order(tiles.walk, shares)
        tiles.more = _kept(found, s.device)
        fold = _prepare_fold(s, tiles, found.classes)
        size = tiles.walk.tiles * shares, s.heads, tiles.walk.block_m * 32 * tiles.walk.words
    apart = None if fused or bias_grad is None else bias_grad()

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any) -> None:
        out, lse, do, dlse, dq, delta, dbias, scale = rest
        given = query, key, value, tiles.meeting(bias), *tiles.tables
        if fused:
            order, classes = tiles.more
            part = torch.empty(size, dtype=torch.float32, device=s.device)
            launch(*given, order, out, lse, do, dlse, dq, delta, part, scale)
            fold(part, classes, dbias)
            return
        launch(*given, *tiles.tables[:1], out, lse, do, dlse, dq, delta, lse, scale)  # two of them not read or written
        if apart is not None:
            apart(query, key, value, bias, lse, do, delta, dbias, scale)

    return run


def _prepare_bias_grad(s: _Shape, tile: Tile) -> Callable[..., None]:
    """Launches that sum the gradient of the bias."""
    tiles = _Tiles(s, tile, parts=False)
    walk = tiles.walk
    chunks = 32 * walk.words // tile.columns
    parts = geometry.splits(walk, s.B, max(1, BIAS_PROGRAMS // (s.heads * chunks)))
    tiles.more = lists, splits, classes = _kept(parts, s.device)
    integers = (*s.strides, s.B, s.H, s.W, *s.dilation, chunks)
    grid = len(splits) * s.heads * chunks
    grad = s.prepare(kernels_attention_grad.bias_grad_kernel, (grid,), integers, tile, **tiles.constants)
    fold, size = _prepare_fold(s, tiles, parts.classes), (len(splits), s.heads, walk.block_m * 32 * walk.words)

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *rest: Any) -> None:
        *saved, dbias, scale = rest
        part = torch.empty(size, dtype=torch.float32, device=s.device)
        grad(query, key, value, tiles.meeting(bias), *tiles.tables, lists, splits, *saved, part, scale)
        fold(part, classes, dbias)

    return run


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    stride: Sequence[int] = (1, 1),
) -> tuple[Tensor, Tensor]:
    """``visionattn::neighborhood_attention`` on the device; arguments must have been checked."""
    query, key, value = channels_inside(query), channels_inside(key), channels_inside(value)
    bias = None if bias is None else bias.contiguous()
    name = (layout(query), layout(key), layout(value), bias is None or bias.dtype, *kernel, *dilation, *stride)
    run = _forward_plans.get(name)
    if run is None:
        s = _Shape(query, key, value, bias, kernel, dilation, stride)
        # float16 has no room for exponentials of unshifted scores
        run = _forward_plans.keep(name, s.tuned("forward", lambda tile: _prepare(
            s, kernels_attention.forward_kernel, tile, EXACT=s.dtype == torch.float16
        )))  # fmt: skip
    B, H, W, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty((B, heads, H, W), dtype=torch.float32, device=query.device)
    run(query, key, value, bias, out, lse, scale)
    return out, lse


class _Backward(NamedTuple):
    """Launches of a backward pass."""

    query_grad: Callable[..., None]  # and of the bias
    key_grad: Callable[..., None]


def _plan_backward(s: _Shape, lse_grad: bool, bias_grad: bool, spread: int) -> _Backward:
    apart = cache(lambda: s.tuned("bias_grad", lambda tile: _prepare_bias_grad(s, tile))) if bias_grad else None
    kernel = kernels_attention_grad.key_grad_kernel
    return _Backward(
        s.tuned("query_grad", lambda tile: _prepare_query_grad(s, tile, lse_grad, apart, spread)),
        s.tuned("key_grad", lambda tile: _prepare(s, kernel, tile, by_key=True, SPREAD=spread)),
    )


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    stride: Sequence[int] = (1, 1),
    bias_grad: bool = True,
    grads: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``visionattn::neighborhood_attention_backward`` on the device; no gradient of the bias unless ``bias_grad``.

    ``grads`` says where those of queries, keys and values go: heads side by side, pixels equally far apart.
    """
    query, key, value = channels_inside(query), channels_inside(key), channels_inside(value)
    bias, lse_grad = None if bias is None else bias.contiguous(), grad_lse is not None
    bias_grad = bias_grad and bias is not None
    if grads is None:
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    dq, dk, dv = grads
    spread = dq.stride(2) // (dq.shape[3] * dq.shape[4])
    signature = bias is None or bias.dtype, lse_grad, bias_grad, spread
    name = (layout(query), layout(key), layout(value), *signature, *kernel, *dilation, *stride)
    run = _backward_plans.get(name) or _backward_plans.keep(
        name, _plan_backward(_Shape(query, key, value, bias, kernel, dilation, stride), lse_grad, bias_grad, spread)
    )
    do, lse = grad_out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    dlse = lse if grad_lse is None else grad_lse.contiguous()
    dbias = torch.empty_like(bias) if bias_grad and bias is not None else None
    inputs = query, key, value, bias
    run.query_grad(*inputs, out.contiguous(), lse, do, dlse, dq, delta, dbias, scale)
    run.key_grad(*inputs, lse, do, delta, dk, dv, scale)
    return dq, dk, dv, dbias
