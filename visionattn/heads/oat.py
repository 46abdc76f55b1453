"""OAT: gaze scanpaths as sequences of objects, by a transformer that points at its input.

Paper: arXiv:2407.13335 (its abstract was read). Code: HKUST-NISL/oat_eccv24, ``src/model/models.py``.
Indices: objects 0 to N - 1, N the end (the target's second token, behind the objects), N + 1 padding, N + 2 begin.
Departures: sequences and scenes have the batch first; an object is encoded once and its feature serves both sides;
begin, end and padding keep one blank crop in decoding too; the two layers that the published network never uses are
left out.
Own: scenes of different numbers of objects in a batch, free boxes, no target, and timm backbones for the objects.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.heads._published import fill, read_published
from visionattn.heads.object_encoders import Scenes, object_features
from visionattn.layers.pointer_attention import PointerAttention
from visionattn.layers.position_table import position_table, read_table

UNUSED = ("generator.", "LinearEmbedding.")
_ZERO_ROWS = 4  # behind the position table, where end and padding land on a grid without room for them


class Memory(NamedTuple):
    """Encoded scenes: what the decoder reads.

    Args:
        tokens: ``[B, N + 1, E]``, objects and target.
        mask: ``[B, N + 1]`` bool, True where there is a token.
        features: ``[B, N + 1, F]``, of the objects and of the blank crop.
        places: ``[B, N + 3, 2]``, of objects, end, padding and begin.
        target: ``[B]``.
    """

    tokens: Tensor
    mask: Tensor
    features: Tensor
    places: Tensor
    target: Tensor

    def repeat(self, count: int) -> "Memory":
        """Every scene ``count`` times in a row."""
        return Memory(*(x.repeat_interleave(count, 0) for x in self))


def step_code(steps: int, dim: int) -> Tensor:
    """Sine code ``[steps, dim]``: sines of ``t / 10000^(2i / dim)`` at even, cosines at odd places."""
    step, i = torch.arange(steps, dtype=torch.float64), torch.arange(0, dim, 2, dtype=torch.float64)
    angle = step[:, None] * torch.exp(-math.log(10000.0) * i / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim]


def _layer(cls: Any, dim: int, heads: int, mlp_dim: int, drop: float) -> Any:
    return cls(dim, heads, mlp_dim, drop, batch_first=True)


class OAT(nn.Module):
    """The object-level attention transformer.

    Args:
        rows: Rows R of the grid; of free boxes the rows that the height of the image is divided into.
        cols: Columns K.
        dim: Channels E, divisible by ``2 * num_heads``.
        num_heads: Attention heads.
        mlp_dim: Hidden channels of the feed-forward layers.
        depths: Layers of encoder and decoder.
        pointer_heads: Heads of the output.
        drop: Dropout.
        objects: ``"crops"``, or ``"image"``: one pass over the image and ``roi_align``, which needs a backbone.
        backbone: A name in timm that encodes the objects; None: the published CNN.
        backbone_kwargs: Of the backbone; with ``"image"`` also ``level`` and ``cells`` of ``ImageFeatures``.
        in_chans: Channels of the image.
        crop: Height and width of the crops, pixels.
        spp: Spatial pyramid pooling of the published CNN, see ``CropCNN``.
        table_rows: Rows of the position table; None: the longer side of the grid.
        sigma: Width of the position table's target.

    Shape:
        scenes: ``Scenes``.
        sequence: ``[B, T]``, the fixations fed to the decoder, the begin index first.
        returns: Logits ``[B, T, N + 2]``; minus infinity for objects outside the mask.

    Raises:
        ValueError: Sizes that do not fit each other.
    """

    pe: Tensor

    def __init__(
        self,
        rows: int = 2,
        cols: int = 11,
        dim: int = 512,
        num_heads: int = 4,
        mlp_dim: int = 512,
        depths: tuple[int, int] = (4, 4),
        pointer_heads: int = 2,
        drop: float = 0.1,
        objects: str = "crops",
        backbone: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        in_chans: int = 3,
        crop: tuple[int, int] = (150, 93),
        spp: int = 0,
        table_rows: int | None = None,
        sigma: float = 2.0,
    ):
        super().__init__()
        if min(rows, cols) < 1 or dim % (2 * num_heads) or len(depths) != 2:
            raise ValueError(
                f"rows={rows}, cols={cols}, dim={dim}, num_heads={num_heads}, depths={tuple(depths)}: expected a grid "
                "of at least 1 x 1, dim divisible by 2 * num_heads, and the layers of encoder and decoder"
            )
        self.rows, self.cols, self.dim, self.drop = rows, cols, dim, drop
        half = dim // 2
        # named as in the published network
        self.cnn_embedding = object_features(
            objects, backbone, half, in_chans, (crop[0], crop[1]), spp, dict(backbone_kwargs or {})
        )
        length = max(rows, cols, 2) if table_rows is None else table_rows
        self.register_buffer("pe", position_table(length, -(-half // 3), sigma).float())
        encoder = _layer(nn.TransformerEncoderLayer, dim, num_heads, mlp_dim, drop)
        decoder = _layer(nn.TransformerDecoderLayer, dim, num_heads, mlp_dim, drop)
        self.transformer_encoder = nn.TransformerEncoder(encoder, depths[0], enable_nested_tensor=False)
        self.transformer_decoder = nn.TransformerDecoder(decoder, depths[1])
        self.pointer = PointerAttention(dim, "dot", pointer_heads, padding_class=True)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and ".backbone." not in name:
                nn.init.xavier_uniform_(parameter)

    def _positions(self, places: Tensor, flag: Tensor) -> Tensor:
        """Codes ``[B, n, E / 2]`` of places ``[B, n, 2]`` and target flags ``[B, n]`` bool."""
        table = F.pad(self.pe, (0, 0, 0, _ZERO_ROWS))
        codes = [read_table(table, places[..., 0]), read_table(table, places[..., 1]), self.pe[flag.long()]]
        return torch.cat(codes, -1)[..., : self.dim // 2]

    def _special_places(self, count: Tensor) -> Tensor:
        """Places ``[B, 3, 2]`` of end, padding and begin for the numbers of objects ``[B]``."""
        index = torch.stack([count, count + 1], 1)
        found = torch.stack([index // self.cols, index % self.cols], -1)
        begin = found.new_tensor([self.rows // 2, self.cols // 2]).expand(len(count), 1, 2)
        return torch.cat([found, begin], 1)

    def encode(self, scenes: Scenes) -> Memory:
        """Encode objects and target.

        Raises:
            ValueError: A scene without objects, or a target that is none of its objects.
        """
        counts = scenes.mask.sum(1)
        if bool((counts == 0).any()) or bool((scenes.target >= counts).any()):
            raise ValueError(
                f"every scene needs an object and a target among them, got {counts.tolist()} objects and the targets "
                f"{scenes.target.tolist()}"
            )
        features, blank = self.cnn_embedding(scenes)
        features = torch.cat([features, blank.expand(len(features), 1, -1)], 1)
        places = torch.cat([scenes.places, self._special_places(counts).to(scenes.places)], 1)
        count, rows = scenes.mask.shape[1], torch.arange(len(features), device=features.device)
        aimed = scenes.target >= 0  # without a target the end stands for nothing and in the middle
        own = features[rows, scenes.target.where(aimed, torch.full_like(scenes.target, count))]
        place = places[rows, scenes.target.where(aimed, torch.full_like(scenes.target, count + 2))]
        content = torch.cat([features[:, :-1], own[:, None]], 1)
        where = torch.cat([places[:, :count], place[:, None]], 1)
        flag = torch.zeros(where.shape[:2], dtype=torch.bool, device=where.device)
        flag[:, -1] = True
        mask = F.pad(scenes.mask, (0, 1), value=True)
        tokens = torch.cat([content, self._positions(where, flag).to(content.dtype)], -1)
        tokens = self.transformer_encoder(tokens, src_key_padding_mask=~mask)
        return Memory(tokens, mask, features, places, scenes.target)

    def decode(self, memory: Memory, sequence: Tensor) -> Tensor:
        """Logits ``[B, T, N + 2]`` of what follows each of the tokens ``[B, T]``."""
        count, steps = memory.mask.shape[1] - 1, sequence.shape[1]
        index = sequence.clamp_max(count)[..., None]
        content = memory.features.gather(1, index.expand(-1, -1, memory.features.shape[-1]))
        places = memory.places.gather(1, sequence[..., None].expand(-1, -1, 2))
        flag = sequence == memory.target[:, None]
        tokens = torch.cat([content, self._positions(places, flag).to(content.dtype)], -1)
        code = step_code(steps, self.dim).to(tokens)
        tokens = F.dropout(tokens + code, self.drop, self.training)
        causal = torch.ones(steps, steps, dtype=torch.bool, device=tokens.device).triu(1)
        out = self.transformer_decoder(
            tokens,
            memory.tokens,
            tgt_mask=causal,
            tgt_key_padding_mask=sequence == count + 1,
            memory_key_padding_mask=~memory.mask,
        )
        return self.pointer(out, memory.tokens, memory.mask)

    def forward(self, scenes: Scenes, sequence: Tensor) -> Tensor:
        return self.decode(self.encode(scenes), sequence)

    def teacher(self, paths: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Tokens for the decoder and the classes that it should give.

        Args:
            paths: ``[B, T]`` objects, -1 behind the last fixation.
            count: N, the objects of the widest scene.

        Returns:
            Two tensors ``[B, T + 1]``: begin, path, end, padding without the last, and without the first.
        """
        lengths = (paths >= 0).sum(1, keepdim=True)
        step = torch.arange(paths.shape[1] + 1, device=paths.device)
        tail = torch.where(step == lengths, count, count + 1)
        classes = torch.where(step < lengths, F.pad(paths, (0, 1), value=-1), tail)
        begin = torch.full_like(classes[:, :1], count + 2)
        return torch.cat([begin, classes[:, :-1]], 1), classes

    def loss(self, scenes: Scenes, paths: Tensor) -> Tensor:
        """Cross-entropy of the fixations and the end under teacher forcing, the mean over both; paths as
        ``teacher``."""
        count = scenes.mask.shape[1]
        tokens, classes = self.teacher(paths, count)
        return self.path_loss(self(scenes, tokens), classes)

    def path_loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """The loss of logits ``[B, T, N + 2]`` for classes ``[B, T]``; padding counts nowhere."""
        ignored = logits.shape[-1] - 1
        return F.cross_entropy(logits.flatten(0, 1).float(), classes.flatten(), ignore_index=ignored)

    @torch.no_grad()
    def generate(
        self, memory: Memory, max_length: int, sample: bool = False, generator: torch.Generator | None = None
    ) -> list[list[int]]:
        """Scanpaths step by step: not the end at the first step, never padding.

        Args:
            memory: Of ``encode``.
            max_length: Longest path, in fixations.
            sample: Draw from the softmax instead of taking the largest logit.
            generator: Of the draws; on the CPU.

        Returns:
            For each scene its objects, at least one, without the end.
        """
        count = memory.mask.shape[1] - 1
        sequence = torch.full_like(memory.target[:, None], count + 2)
        done = torch.zeros_like(memory.target, dtype=torch.bool)
        for step in range(max_length):
            logits = self.decode(memory, sequence)[:, -1, : count + 1].float()
            if step == 0:
                logits[:, count] = -math.inf
            if sample:
                drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]
                chosen = drawn.to(logits.device)
            else:
                chosen = logits.argmax(-1)
            done |= chosen == count
            sequence = torch.cat([sequence, chosen.masked_fill(done, count + 1)[:, None]], 1)
            if bool(done.all()):
                break
        return [[i for i in row if i < count] for row in sequence[:, 1:].tolist()]

    def load_published(self, path: str | Path) -> "OAT":
        """Load a checkpoint with the published names; the position table stays if the file has none.

        Args:
            path: ``.pth``, ``.ckpt`` or ``.safetensors``.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, holds more than tensors and plain values, or is of another network.
        """
        names = {"cross_attentions.": "pointer.heads.", "readout.": "pointer.readout.", "cnn_embedding.": ""}
        weights = {}
        for key, tensor in read_published(path).items():
            key = key.removeprefix("model.")
            if key.startswith(UNUSED):
                continue
            new = next((value + key.removeprefix(old) for old, value in names.items() if key.startswith(old)), key)
            weights["cnn_embedding.encoder." + new if key.startswith("cnn_embedding.") else new] = tensor
        fill(self, weights, path, "rows, cols, dim, depths, crop and spp", optional="pe")
        return self
