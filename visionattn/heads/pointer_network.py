"""Pointer Network: an LSTM that reads a set of vectors, and one that points at them one after the other.

Paper: arXiv:1506.03134 (its equations were read in a summary; there is no official code). The end is one more key, a
learned vector behind the inputs: how the authors did it is not stated in what was read.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from visionattn.layers.pointer_attention import PointerAttention


class PointerNetwork(nn.Module):
    """Encoder, decoder and pointer.

    Indices: inputs 0 to N - 1, N the end.

    Args:
        dim: Channels C of both LSTMs.
        in_dim: Numbers of each input; 2 for points.

    Shape:
        points: ``[B, N, in_dim]``.
        counts: ``[B]``, how many inputs each item has; the rest only fills up the batch.
        path: ``[B, T]``, the inputs chosen so far, below N.
        returns: Scores ``[B, T + 1, N + 1]`` of the next choice after each of them and at the start; minus infinity
            for what only fills up.

    Raises:
        ValueError: An item without inputs, or arguments below 1.
    """

    def __init__(self, dim: int = 128, in_dim: int = 2):
        super().__init__()
        if min(dim, in_dim) < 1:
            raise ValueError(f"dim={dim}, in_dim={in_dim}: expected at least 1")
        self.encoder = nn.LSTM(in_dim, dim, batch_first=True)
        self.decoder = nn.LSTM(in_dim, dim, batch_first=True)
        self.start = nn.Parameter(torch.zeros(in_dim))
        self.end = nn.Parameter(torch.randn(dim) / math.sqrt(dim))
        self.pointer = PointerAttention(dim)

    def _encode(self, points: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        if bool((counts < 1).any()):
            raise ValueError(f"every item needs at least one input, got {counts.tolist()}")
        packed = pack_padded_sequence(points, counts.cpu(), batch_first=True, enforce_sorted=False)
        found, state = self.encoder(packed)
        keys, _ = pad_packed_sequence(found, batch_first=True, total_length=points.shape[1])
        keys = torch.cat([keys, self.end.expand(len(keys), 1, -1)], 1)
        mask = torch.arange(points.shape[1], device=points.device) < counts[:, None]
        return keys, F.pad(mask, (0, 1), value=True), state

    def forward(self, points: Tensor, counts: Tensor, path: Tensor) -> Tensor:
        keys, mask, state = self._encode(points, counts)
        chosen = points.gather(1, path[..., None].expand(-1, -1, points.shape[-1]))
        inputs = torch.cat([self.start.expand(len(points), 1, -1), chosen], 1)
        return self.pointer(self.decoder(inputs, state)[0], keys, mask)

    def loss(self, points: Tensor, counts: Tensor, path: Tensor) -> Tensor:
        """Cross-entropy of the choices and the end, the mean over both.

        Args:
            points: ``[B, N, in_dim]``.
            counts: ``[B]``.
            path: ``[B, T]`` with -1 behind the last choice.
        """
        scores = self(points, counts, path.clamp_min(0))
        lengths = (path >= 0).sum(1, keepdim=True)
        classes = F.pad(path, (0, 1), value=-1)
        classes = classes.masked_fill(torch.arange(classes.shape[1], device=path.device) == lengths, points.shape[1])
        return F.cross_entropy(scores.flatten(0, 1).float(), classes.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, points: Tensor, counts: Tensor, max_length: int) -> list[list[int]]:
        """The most probable choice step by step, until the end or ``max_length`` choices.

        Args:
            points: ``[B, N, in_dim]``.
            counts: ``[B]``.
            max_length: Longest result.
        """
        keys, mask, state = self._encode(points, counts)
        count, rows = points.shape[1], torch.arange(len(points), device=points.device)
        given = self.start.expand(len(points), 1, -1)
        done = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        found = []
        for _ in range(max_length):
            out, state = self.decoder(given, state)
            chosen = self.pointer(out, keys, mask)[:, 0].argmax(-1)
            done |= chosen == count
            found.append(chosen.masked_fill(done, count))
            given = points[rows, chosen.clamp_max(count - 1)][:, None]
            if bool(done.all()):
                break
        return [[i for i in row if i < count] for row in torch.stack(found, 1).tolist()]
