"""Wrong arguments: every message names the value and what would fit."""

import os
import subprocess
import sys

import pytest
import torch

from visionattn.ops import (
    backend,
    crop,
    pad_to_multiple,
    region_mean,
    routed_attention,
    topk_regions,
    use_backend,
)


def attention(
    q=(1, 4, 6, 2, 3), kv=None, dtype=torch.float32, kv_dtype=None, index=None, region=(2, 3), kv_region=None
):
    key = torch.randn(kv or q).to(kv_dtype or dtype)
    index = torch.zeros(1, 1, 4, 2, dtype=torch.int32) if index is None else index
    return routed_attention(torch.randn(q).to(dtype), key, key, index, region, kv_region)


def table(*entries):
    return torch.tensor(entries, dtype=torch.int32).expand(1, 1, 4, len(entries))


CASES = {
    "mean_region": (
        lambda: region_mean(torch.zeros(1, 5, 6, 1), (2, 3)),
        r"region=\(2, 3\).*H=5, W=6.*pad_to_multiple",
    ),
    "mean_zero_region": (lambda: region_mean(torch.zeros(1, 4, 6, 1), (0, 3)), r"region=\(0, 3\) must divide"),
    "mean_axes": (lambda: region_mean(torch.zeros(4, 6, 1), (2, 3)), r"\[B, H, W, C\], got shape \(4, 6, 1\)"),
    "topk_zero": (lambda: topk_regions(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), 0), r"topk=0 must lie in \[1, 4\]"),
    "topk_large": (lambda: topk_regions(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), 5), r"topk=5 must lie in \[1, 4\]"),
    "topk_axes": (
        lambda: topk_regions(torch.zeros(1, 4, 2), torch.zeros(1, 1, 4, 2), 1),
        r"\[B, P, C\].*\[1, 1, 4, 2\]",
    ),
    "topk_channels": (lambda: topk_regions(torch.zeros(1, 4, 2), torch.zeros(1, 4, 3), 1), r"\[1, 4, 2\].*\[1, 4, 3\]"),
    "topk_batch": (lambda: topk_regions(torch.zeros(1, 4, 2), torch.zeros(3, 4, 2), 1), r"\[1, 4, 2\].*\[3, 4, 2\]"),
    "query_region": (lambda: attention(region=(3, 3)), r"q_region=\(3, 3\).*H=4, W=6.*pad_to_multiple"),
    "key_region": (lambda: attention(kv_region=(2, 4)), r"kv_region=\(2, 4\).*H=4, W=6.*pad_to_multiple"),
    "index_dtype": (lambda: attention(index=table(0, 1).long()), r"int32.*got torch.int64"),
    "index_axes": (lambda: attention(index=table(0, 1)[0]), r"\[B, 1 or heads, P_q, K\], got torch.int32 \(1, 4, 2\)"),
    "index_regions": (lambda: attention(index=table(0, 1)[:, :, :3]), r"\[1, 1 or 2, 4, K\].*got \(1, 1, 3, 2\)"),
    "index_heads": (lambda: attention(index=table(0).expand(1, 3, 4, 1)), r"\[1, 1 or 2, 4, K\].*got \(1, 3, 4, 1\)"),
    "index_batch": (lambda: attention(index=table(0).expand(2, 1, 4, 1)), r"\[1, 1 or 2, 4, K\].*got \(2, 1, 4, 1\)"),
    "query_axes": (
        lambda: attention(q=(1, 4, 6, 6), kv=(1, 4, 6, 2, 3)),
        r"\[B, H, W, heads, head_dim\].*\(1, 4, 6, 6\)",
    ),
    "heads_differ": (lambda: attention(kv=(1, 4, 6, 1, 3)), r"\(1, 4, 6, 2, 3\).*\(1, 4, 6, 1, 3\).*heads"),
    "batch_differs": (lambda: attention(kv=(2, 4, 6, 2, 3)), r"\(1, 4, 6, 2, 3\).*\(2, 4, 6, 2, 3\).*batch"),
    "dtypes_differ": (lambda: attention(kv_dtype=torch.float64), r"one float dtype.*float32.*float64"),
    "whole_numbers": (lambda: attention(dtype=torch.int64), r"float dtype, got torch.int64"),
    "multiple": (lambda: pad_to_multiple(torch.zeros(1, 4, 6, 1), 0), r"multiple >= 1.*got 0"),
    "pad_axes": (lambda: pad_to_multiple(torch.zeros(4, 6, 1), 2), r"\[B, H, W, C\], got 2 and 3 axes"),
    "crop_axes": (lambda: crop(torch.zeros(4, 6, 1), 2, 2), r"\[B, H, W, C\], got 3 axes"),
    "crop_large": (lambda: crop(torch.zeros(1, 4, 6, 1), 5, 6), r"5x6 is larger than the map 4x6; use pad_to"),
    "backend": (lambda: use_backend("nonsense").__enter__(), r"backend='nonsense'.*auto, triton, eager, reference"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_argument_is_named(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("where", ["auto", "reference"])
@pytest.mark.parametrize("entries", [(0, 4), (-2, 0), (-1, 2**31 - 1)])
def test_table_entry_out_of_range_is_named(entries, where):
    low, high = entries
    with use_backend(where), pytest.raises(ValueError, match=rf"\[-1, 4\).*got {low} to {high}"):
        attention(index=table(*entries))


@pytest.mark.parametrize("where", ["auto", "reference"])
def test_crop_refuses_a_larger_size(where):
    with use_backend(where), pytest.raises(ValueError, match="larger than the map"):
        crop(torch.zeros(1, 4, 6, 1), 4, 7)


def test_backend_is_restored_after_an_error():
    before = backend()
    with pytest.raises(KeyError), use_backend("reference"):
        assert backend() == "reference"
        raise KeyError
    assert backend() == before


def test_environment_variable_sets_the_backend():
    program = """
import os
try:
    import visionattn.ops
except ValueError as error:
    print(error)
os.environ["VISIONATTN_BACKEND"] = "reference"
import visionattn.ops
print(visionattn.ops.backend())
"""
    env = {**os.environ, "VISIONATTN_BACKEND": "nonsense"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    error, chosen = result.stdout.splitlines()
    assert error.startswith("VISIONATTN_BACKEND='nonsense' is not a backend")
    assert error.endswith("auto, triton, eager, reference") and chosen == "reference"
