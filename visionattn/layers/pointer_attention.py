"""Attention whose scores over a set of inputs are the output: a pointer.

Papers: Pointer Networks, arXiv:1506.03134, equation 3 (additive); OAT, arXiv:2407.13335, "object attention" (dot).
Code of the latter: HKUST-NISL/oat_eccv24, ``src/model/models.py``. Neither is normalised here: a softmax or a
cross-entropy follows.
"""

import math

import torch
from torch import Tensor, nn

SCORES = ("additive", "dot")


class DotScores(nn.Module):
    """One head of OAT's pointer: ``(A key + a) . (B query + b) / sqrt(dim)``.

    Args:
        dim: Channels C of queries, keys and scores.

    Shape:
        query: ``[B, T, C]``; keys: ``[B, N, C]``; returns ``[B, T, N]``.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.decode_fc = nn.Linear(dim, dim)
        self.encode_fc = nn.Linear(dim, dim)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        return self.decode_fc(query) @ self.encode_fc(keys).mT / math.sqrt(query.shape[-1])


class PointerAttention(nn.Module):
    """Scores of every query for every key.

    ``"additive"``: ``v . tanh(W1 key + W2 query)``, no biases. ``"dot"``: a linear readout over the heads of
    ``DotScores``, ``sum_h w_h s_h + c``; with ``padding_class`` a further class whose ``s_h`` is 0 stands behind the
    keys.

    Args:
        dim: Channels C.
        score: One of ``SCORES``.
        num_heads: Heads of ``"dot"``.
        padding_class: Append OAT's class for positions after the end.

    Shape:
        query: ``[B, T, C]``.
        keys: ``[B, N, C]``.
        mask: ``[B, N]`` or ``[B, T, N]`` bool, True where a key may be chosen; None: everywhere.
        returns: ``[B, T, N]``, or ``[B, T, N + 1]`` with the padding class; minus infinity outside the mask.

    Raises:
        ValueError: Another score, or heads or a padding class with the additive one.
    """

    def __init__(self, dim: int, score: str = "additive", num_heads: int = 1, padding_class: bool = False):
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score={score!r} must be one of {', '.join(SCORES)}")
        if num_heads < 1 or (score == "additive" and (num_heads > 1 or padding_class)):
            raise ValueError(
                f"num_heads={num_heads}, padding_class={padding_class}: the additive score has one head and no padding "
                "class, the other at least one head"
            )
        self.score, self.padding_class = score, padding_class
        if score == "additive":
            self.W1 = nn.Linear(dim, dim, bias=False)
            self.W2 = nn.Linear(dim, dim, bias=False)
            self.v = nn.Parameter(torch.empty(dim).uniform_(-1, 1) / math.sqrt(dim))
        else:
            self.heads = nn.ModuleList(DotScores(dim) for _ in range(num_heads))
            self.readout = nn.Linear(num_heads, 1)

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        if query.shape[0] != keys.shape[0] or query.shape[-1] != keys.shape[-1]:
            raise ValueError(
                f"query {list(query.shape)} and keys {list(keys.shape)} must be [B, T, C] and [B, N, C] of one B and C"
            )
        if self.score == "additive":
            scores = torch.tanh(self.W1(keys)[:, None] + self.W2(query)[:, :, None]) @ self.v
        else:
            each = torch.stack([head(query, keys) for head in self.heads], -1)  # [B, T, N, heads]
            if self.padding_class:
                each = nn.functional.pad(each, (0, 0, 0, 1))
            scores = self.readout(each)[..., 0]
        if mask is not None:
            mask = mask[:, None] if mask.dim() == 2 else mask
            if self.score == "dot" and self.padding_class:
                mask = nn.functional.pad(mask, (0, 1), value=True)
            scores = scores.masked_fill(~mask, -math.inf)
        return scores

    def extra_repr(self) -> str:
        return f"score={self.score}, padding_class={self.padding_class}"
