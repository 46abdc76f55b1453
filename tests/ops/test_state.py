"""Attention through a state: the definition against loops, PyTorch's form against the definition, and its contract."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from visionattn.ops import rotation_table, state_attention, use_backend

MODES = ["linear", "rotated", "channel_softmax"]


def tensors(B, H, W, heads, d, dtype=torch.float64, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, W, heads, d, dtype=dtype, generator=drawn) for _ in range(4)]


def options(mode, H, W, channels):
    """Arguments of a form; a random rotation tells rows, columns and pairs apart."""
    if mode != "rotated":
        return dict(mode=mode)
    angle = torch.randn(H, W, channels // 2, generator=torch.Generator().manual_seed(9))
    return dict(mode="linear", rotation=(angle.cos(), angle.sin()))


def by_loops(q, k, v, mode="linear", rotation=None, eps=1e-6):
    """One pixel, head and channel after the other, with Python's complex numbers."""
    B, H, W, heads, d = q.shape
    n, out = H * W, torch.zeros_like(q)

    def phi(x, b, h):
        return [[(t + 1 if t > 0 else math.exp(t)) for t in row] for row in x[b, :, :, h].reshape(n, d).tolist()]

    def turned(x, b, h):
        rows, found = [phi(x, b, head) for head in range(heads)], []
        for i in range(n):
            merged = [value for head in rows for value in head[i]]
            if rotation is not None:
                for p in range(len(merged) // 2):
                    factor = complex(*(float(t[i // W, i % W, p]) for t in rotation))
                    number = complex(merged[2 * p], merged[2 * p + 1]) * factor
                    merged[2 * p : 2 * p + 2] = number.real, number.imag
            found.append(merged[h * d : (h + 1) * d])
        return found

    for b in range(B):
        for h in range(heads):
            vs = v[b, :, :, h].reshape(n, d).tolist()
            if mode == "channel_softmax":
                qs, ks = (x[b, :, :, h].reshape(n, d).tolist() for x in (q, k))
                for a in range(d):
                    scores = [math.exp(sum(ks[i][a] * vs[i][e] for i in range(n)) / math.sqrt(d)) for e in range(d)]
                    for i in range(n):
                        mixed = sum(score * qs[i][e] for e, score in enumerate(scores)) / sum(scores)
                        out[b, i // W, i % W, h, a] = mixed
                continue
            plain_q, plain_k, qs, ks = phi(q, b, h), phi(k, b, h), turned(q, b, h), turned(k, b, h)
            for i in range(n):
                below = sum(sum(x * y for x, y in zip(plain_q[i], row, strict=True)) for row in plain_k) / n + eps
                weights = [sum(x * y for x, y in zip(qs[i], row, strict=True)) / n / below for row in ks]
                for c in range(d):
                    out[b, i // W, i % W, h, c] = sum(w * row[c] for w, row in zip(weights, vs, strict=True))
    return out


@pytest.mark.parametrize("mode", MODES)
def test_definition_is_the_equation(mode):
    q, k, v, _ = tensors(2, 2, 3, 2, 3)  # pairs of odd heads reach into the next head
    kwargs = options(mode, 2, 3, 6)
    with use_backend("reference"):
        actual = state_attention(q, k, v, **kwargs)
    torch.testing.assert_close(actual, by_loops(q, k, v, **kwargs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 5, 3, 2, 4), (1, 1, 1, 1, 2), (1, 4, 4, 3, 6)])
def test_eager_is_the_definition(mode, shape):
    *inputs, grad = tensors(*shape)
    kwargs, results = options(mode, shape[1], shape[2], shape[3] * shape[4]), []
    for name in ("reference", "eager"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with use_backend(name):
            out = state_attention(*leaves, **kwargs)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_finite_differences(mode):
    leaves = [x.requires_grad_() for x in tensors(1, 2, 3, 2, 2)[:3]]
    kwargs = options(mode, 2, 3, 4)
    assert torch.autograd.gradcheck(lambda *x: state_attention(*x, **kwargs), leaves)


@pytest.mark.parametrize("mode", MODES)
def test_operator_keeps_pytorchs_contract(mode):
    leaves = [x.requires_grad_() for x in tensors(2, 3, 2, 2, 4, torch.float32)[:3]]
    tables = options(mode, 3, 2, 8).get("rotation", (None, None))
    args = (*leaves, *tables, 0.5, 1e-6, mode == "channel_softmax")
    torch.library.opcheck(torch.ops.visionattn.state_attention.default, args)
    out, state, norm = torch.ops.visionattn.state_attention(*(x.detach() for x in leaves), *args[3:])
    args = out, *(x.detach() for x in leaves), *tables, state, norm, *args[5:]
    torch.library.opcheck(torch.ops.visionattn.state_attention_backward.default, args)


@pytest.mark.parametrize("mode", MODES)
def test_slices_of_a_packed_projection_go_in_as_they_are(mode):
    packed = torch.randn(2, 4, 3, 3, 2, 4, generator=torch.Generator().manual_seed(1))
    kwargs = options(mode, 4, 3, 8)
    views = packed.unbind(3)
    out = state_attention(*views, **kwargs)
    assert out.is_contiguous()
    torch.testing.assert_close(out, state_attention(*(x.contiguous() for x in views), **kwargs))


def test_scale_and_eps_reach_the_equation():
    q, k, v, _ = tensors(1, 3, 3, 2, 4)
    sharp = state_attention(q, k, v, mode="channel_softmax", scale=2.0)
    by_key = state_attention(q, 4 * k, v, mode="channel_softmax")  # the usual scale is 1 / 2
    torch.testing.assert_close(sharp, by_key)
    # a large eps is all of the normaliser
    torch.testing.assert_close(state_attention(q, k, v, eps=2e9), state_attention(q, k, v, eps=1e9) / 2)


def test_autocast_gives_its_dtype_and_sums_in_float32():
    q, k, v, _ = tensors(1, 8, 8, 2, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = state_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    rounded = [x.bfloat16().float() for x in (q, k, v)]
    torch.testing.assert_close(out.float(), state_attention(*rounded), rtol=2**-8, atol=1e-6)


def test_operations_are_counted():
    q, k, v, grad = tensors(2, 3, 4, 2, 5, torch.float32)
    with FlopCounterMode(display=False) as counter:
        state_attention(q.requires_grad_(), k, v).backward(grad)
    assert counter.get_total_flops() == 12 * q.numel() * 5


def test_rotation_table_has_the_angles_of_the_equation():
    cos, sin = rotation_table(3, 4, 8)
    assert cos.shape == sin.shape == (3, 4, 4)
    for y, x in ((0, 0), (2, 1), (1, 3)):
        for i, angle in enumerate((y, y / 100, x, x / 100)):
            assert cos[y, x, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[y, x, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert rotation_table(2, 2, 4, dtype=torch.float64)[0].dtype == torch.float64


BAD = {
    "mode='sum' is not a form": dict(mode="sum"),
    "leave rotation out": dict(mode="channel_softmax", rotation=(torch.ones(3, 2, 4),) * 2),
    "scale=0.5 has no effect": dict(scale=0.5),
    "eps=-1 must be 0 or more": dict(eps=-1),
    r"cos of the rotation must be .*\[3, 2, 4\].*rotation_table\(3, 2, 8\)": dict(rotation=(torch.ones(2, 3, 4),) * 2),
    "pair \\(cos, sin\\), got 1": dict(rotation=(torch.ones(3, 2, 4),)),
    "gets no gradient": dict(rotation=(torch.ones(3, 2, 4, requires_grad=True),) * 2),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_options_are_named(message):
    q, k, v, _ = tensors(1, 3, 2, 2, 4)
    with pytest.raises(ValueError, match=message):
        state_attention(q, k, v, **BAD[message])


def test_wrong_tensors_are_named():
    q, k, v, _ = tensors(1, 3, 2, 2, 4)
    with pytest.raises(ValueError, match=r"one shape .*\[1, 3, 2, 2, 4\], \[1, 2, 2, 2, 4\]"):
        state_attention(q, k[:, :2], v)
    with pytest.raises(ValueError, match=r"one float dtype, got torch.float64, torch.float32"):
        state_attention(q, k.float(), v)
    with pytest.raises(ValueError, match="even number of channels, got 1 heads of 3"):
        state_attention(*(x[..., :1, :3] for x in (q, k, v)), rotation=(torch.ones(3, 2, 1),) * 2)
    with pytest.raises(ValueError, match="multiple of 4"):
        rotation_table(2, 2, 6)
    with pytest.raises(ValueError, match="got 0x2"):
        rotation_table(0, 2, 8)
    with pytest.raises(ValueError, match="base=0 must be positive"):
        rotation_table(2, 2, 8, base=0)


@pytest.mark.parametrize("mode", ["linear", "channel_softmax"])
def test_backward_inside_autocast_is_exact(mode):
    inputs = [torch.randn(1, 4, 5, 2, 8, requires_grad=True) for _ in range(3)]
    out = state_attention(*inputs, mode=mode)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(out, inputs, grad)
    assert all(map(torch.equal, expected, actual))
