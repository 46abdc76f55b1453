"""Compile the kernels as they are launched for the shapes of published models, for a GPU that need not be there.

Prints the shared memory of each in bytes as JSON. Run without TRITON_INTERPRET::

    python tests/ops/compile_kernels.py 90 [--once] [states neighborhoods ...]

``--once`` compiles each kernel only for the call with the largest tiles.
"""

import argparse
import json
import math
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from visionattn.ops.affine import launch as affine
from visionattn.ops.depthwise import launch as depthwise
from visionattn.ops.depthwise import launch_branches, launch_large
from visionattn.ops.linear import launch as linear
from visionattn.ops.neighborhood import launch as neighborhood
from visionattn.ops.neighborhood import launch_sum as neighborhood_sum
from visionattn.ops.norm import launch as norm
from visionattn.ops.routing import launch
from visionattn.ops.state import launch as state

found = {}
KINDS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorder:
    """Stands for a kernel: instead of launching it compiles for the arguments."""

    def __init__(self, name, kernel, target, once):
        self.name, self.kernel, self.target = name, kernel, target
        self.arg_names, self.once, self.calls = kernel.arg_names, once, []

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **options):
        if self.once:
            self.calls.append((args, options))
        else:
            self.build(*args, **options)

    def build_largest(self):
        """The one of the recorded calls whose sizes of tiles and numbers of stages have the largest product."""

        def size(call):
            args, options = call
            widest = max(value.itemsize for value in args if torch.is_tensor(value))
            return widest * math.prod(v for v in options.values() if type(v) is int and v > 0)

        args, options = max(self.calls, key=size)
        self.build(*args, **options)

    def build(self, *args, num_warps=4, num_stages=2, maxnreg=None, **constants):
        names = [name for name in self.kernel.arg_names if name not in constants]
        signature, attrs = dict.fromkeys(constants, "constexpr"), {}
        for name, value in zip(names, args, strict=True):
            signature[name] = (
                KINDS[value.dtype] if torch.is_tensor(value) else "fp32" if isinstance(value, float) else "i32"
            )
            if torch.is_tensor(value) or (isinstance(value, int) and value % 16 == 0):
                attrs[(self.kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
        signature = {name: signature[name] for name in self.kernel.arg_names}
        source = ASTSource(self.kernel, signature, constants, attrs)
        options = dict(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)
        built = triton.compile(source, target=self.target, options=options)
        family = self.kernel.__module__.rsplit(".", 1)[1].removeprefix("kernels_")
        label = f"{family}.{self.name} {' '.join(str(v) for v in constants.values())}"
        found[label] = max(found.get(label, 0), built.metadata.shared)


def routing(_capability):
    """Routed attention and the steps around it."""
    stages = [(56, 2, 8, 1, torch.bfloat16), (28, 4, 4, 4, torch.bfloat16), (14, 8, 2, 16, torch.float32)]
    stages.append((14, 8, 2, 16, torch.bfloat16))
    wide = [(56, 1, 8, 3, torch.float32)]  # the longest rows, of which the fewest fit
    for side, heads, region, topk, dtype in stages + wide:
        dim = 128 if heads == 1 else 32
        q, k, v = (torch.empty(1, side, side, heads, dim, dtype=dtype) for _ in range(3))
        index = torch.zeros(1, 1, 49, topk, dtype=torch.int32)
        rest = index, (region, region), (region, region), 0.1
        out, lse = launch.forward(q, k, v, *rest)
        launch.backward(out, lse, q, k, v, index, out, lse, *rest[1:])
        grads = torch.empty(1, side, side, 3, heads, dim, dtype=dtype).unbind(3)
        launch.backward(out, None, q, k, v, index, out, lse, *rest[1:], grads)
    launch.region_mean(torch.empty(1, 56, 56, 64), (8, 8))
    launch.topk_regions(torch.empty(1, 49, 64), torch.empty(1, 49, 64), 4)


def neighborhoods(_capability):
    """Neighbourhood attention of NAT and DiNAT, and the widest heads and rows."""
    stages = [(56, 2, 32, 7, 1, torch.bfloat16), (14, 8, 32, 7, 1, torch.float16), (28, 4, 32, 7, 4, torch.bfloat16)]
    wide = [(40, 2, 128, 13, 1, torch.bfloat16), (30, 1, 128, 5, 1, torch.float32), (30, 1, 64, 7, 1, torch.bfloat16)]
    for side, heads, dim, kernel, dilation, dtype in stages + wide:
        q, k, v = (torch.empty(64, side, side, heads, dim, dtype=dtype) for _ in range(3))
        for bias in (None, torch.empty(heads, 2 * kernel - 1, 2 * kernel - 1)):
            rest = (kernel, kernel), (dilation, dilation), 0.1
            out, lse = neighborhood.forward(q, k, v, bias, *rest)
            neighborhood.backward(out, None, q, k, v, bias, out, lse, *rest)


def norms(_capability):
    """Layer norm alone and behind an addition, in training and inference."""
    for shape, dtype in (((1, 56, 56, 64), torch.bfloat16), ((2, 7, 96), torch.float16), ((9, 1000), torch.float32)):
        x, weight = torch.empty(shape, dtype=dtype), torch.empty(shape[-1])
        for delta in (None, x):
            norm.forward(x, delta, weight, weight, 1e-6, dtype, save=False)
            total, out, stats = norm.forward(x, delta, weight, weight, 1e-6, dtype, save=True)
            norm.backward(out, delta, total, stats, weight, weight, partial=delta is not None)


def affine_sums(_capability):
    """Sums on the main path and updates of a context, wide and ragged."""
    for C, K, dtype, kind in (
        (320, 320, torch.bfloat16, torch.float32),
        (384, 128, torch.bfloat16, torch.float32),
        (10, 10, torch.float32, torch.float32),
        (33, 10, torch.float16, torch.float16),
    ):
        x, y, weight = torch.empty(2, 7, 7, C, dtype=dtype), torch.empty(2, 7, 7, K, dtype=dtype), torch.empty(K)
        weight, scaled = weight.to(kind), weight.to(kind) if C > K else None
        for keep in (None, torch.empty(2, dtype=dtype)) if C == K else (None,):
            affine.forward(x, y, weight, weight, scaled, scaled, keep, 1.25, dtype)
            for partial in (False, True):
                affine.backward(x, x, y, weight, scaled, keep, 1.25, partial, dtype, dtype, y.shape)


def depthwise_convolutions(_capability):
    """A position convolution on its own input, and one of a packed projection's values."""
    for side, C, kernel, dtype in (
        (56, 64, 3, torch.bfloat16),
        (14, 256, 5, torch.bfloat16),
        (7, 10, 7, torch.float32),
    ):
        packed = torch.empty(2, side, side, 3 * C, dtype=dtype)
        weight, x = torch.empty(C, 1, kernel, kernel), packed[..., 2 * C :]
        out = depthwise.forward(x, weight, torch.empty(C), packed[..., :C].contiguous())
        depthwise.forward(out, weight, None, out, flip=True)
        depthwise.forward(out, weight, None, x, flip=True, out=x)
        depthwise.weight_grad(out, x, weight, torch.empty(C))


def linear_layers(_capability):
    """Casts, bias gradients and the gradient of GELU for an MLP and for single layers."""
    for rows, C, hidden, dtype in (
        (784, 64, 192, torch.bfloat16),
        (49, 96, 288, torch.float16),
        (9, 10, 33, torch.float32),
    ):
        parameters = [torch.empty(shape) for shape in ((hidden, C), (hidden,), (C, hidden), (C,))]
        linear.cast(parameters, dtype)
        linear.cast(parameters[:3], torch.float16)
        grad, pre = torch.empty(rows, C, dtype=dtype), torch.empty(rows, hidden, dtype=dtype)
        linear.column_sums(grad, torch.float32)
        for outer, kind in ((grad, torch.float32), (None, torch.float32), (None, None)):
            linear.gelu_grad(pre, pre, outer, kind)


def neighborhood_sums(_capability):
    """OverLoCK's two stages, a map too wide for tiles of whole rows, and wide groups."""
    for side, groups, d, kernels, dtype, softmax in (
        (14, 8, 16, (5, 13), torch.bfloat16, True),
        (7, 12, 14, (5, 7), torch.float16, True),
        (50, 2, 10, (5, 13), torch.bfloat16, True),
        (20, 1, 128, (3,), torch.float32, False),
    ):
        logits = torch.empty(2, groups, sum(k * k for k in kernels), side, side, dtype=dtype).transpose(1, 2)
        value = torch.empty(2, side, side, len(kernels) * groups, d, dtype=dtype)
        bias = torch.empty(groups, sum((2 * k - 1) ** 2 for k in kernels)) if softmax else None
        out, lse = neighborhood_sum.forward(logits, value, bias, kernels, softmax)
        neighborhood_sum.backward(out, None, logits, value, bias, out, lse, kernels, softmax)


def states(_capability):
    """HER-Seg's linear attention, DaViT's attention between channels, and heads of other widths."""
    for side, heads, d, dtype, rotated, softmax in (
        (64, 12, 16, torch.bfloat16, True, False),
        (64, 24, 4, torch.bfloat16, True, False),
        (28, 6, 32, torch.bfloat16, False, True),
        (9, 3, 10, torch.float16, True, False),
        (9, 2, 128, torch.bfloat16, True, False),
        (9, 2, 64, torch.float32, True, False),
        (9, 2, 40, torch.float16, False, True),
    ):
        q, k, v = (torch.empty(16, side, side, heads, d, dtype=dtype) for _ in range(3))
        table = torch.empty(side, side, heads * d // 2) if rotated else None
        rest = 0.1, 1e-6, softmax
        out, kept, norm = state.forward(q, k, v, table, table, *rest)
        state.backward(out, q, k, v, table, table, kept, norm, *rest)


def large_convolutions(capability):
    """Merged and dilated convolutions as OverLoCK has them, and one of a map whose row strides are not known.

    They need hardly any shared memory, so all of them, which take long, are compiled for one capability.
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [(56, 64, 17, 1, bf16), (14, 256, 13, 1, bf16), (56, 64, 3, 7, fp32), (30, 112, 19, 1, torch.float16)]
    for side, C, kernel, dilation, dtype in cases if capability == 90 else cases[2:3]:
        x, weight = torch.empty(2, side, side, C, dtype=dtype), torch.empty(C, 1, kernel, kernel)
        launch_large.SIZES = 0 if side == 30 else 64
        out = depthwise.forward(x, weight, torch.empty(C), None, dilation=dilation)
        depthwise.forward(out, weight, None, out, flip=True, dilation=dilation)
        depthwise.weight_grad(out, x, weight, None, dilation)
        launch_large.statistics_plan(x, weight, x, dilation, 0)[0](x, weight, torch.empty(C), x, x, torch.empty(C))


def branches(capability):
    """A sum of normalised convolutions, on a small map: what lies between them is the same on any."""
    cases = [(64, torch.float32, torch.bfloat16), (10, torch.float16, torch.float16)]
    for C, kind, dtype in cases if capability == 90 else cases[:1]:
        x, kernels = torch.empty(2, 7, 7, C, dtype=dtype), [(7, 1), (5, 1), (3, 2), (3, 3)]
        weights, norms = [torch.empty(C, 1, k, k, dtype=kind) for k, _ in kernels], [torch.empty(C, dtype=kind)] * 4
        running = norms, norms, [torch.tensor(0)] * 4
        plan = launch_branches.plan(x, weights, tuple(d for _, d in kernels))
        out, kept = launch_branches.forward(plan, x, weights, norms, norms, running, 1e-5, 0.1)
        launch_branches.backward(plan, out, x, kept, kind, [True] * 5)


FAMILIES = (
    routing,
    neighborhoods,
    norms,
    affine_sums,
    depthwise_convolutions,
    linear_layers,
    neighborhood_sums,
    states,
    large_convolutions,
    branches,
)


def run(capability, once, names):
    """Call the launching code with tensors of the published shapes and kernels that only compile."""
    target = GPUTarget("cuda", capability, 32)
    recorders = []
    modules = [x for name, x in sys.modules.items() if name.startswith("visionattn.ops.") and ".kernels_" in name]
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            recorders.append(Recorder(name, getattr(module, name), target, once))
            setattr(module, name, recorders[-1])
    for family in FAMILIES:
        if not names or family.__name__ in names:
            family(capability)
    for recorder in recorders:
        if recorder.calls:
            recorder.build_largest()


parser = argparse.ArgumentParser()
parser.add_argument("capability", type=int)
parser.add_argument("families", nargs="*", metavar="FAMILY", help="functions of this file; all of them by default")
parser.add_argument("--once", action="store_true")
arguments = parser.parse_args()
run(arguments.capability, arguments.once, arguments.families)
print(json.dumps(found))
