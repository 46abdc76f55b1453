"""Encoders of questions: strings to vectors.

``WordEncoder`` is small and learns with the network, from the training questions alone. ``TransformerEncoder`` takes a
published sentence model from a folder or hub.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("words", "transformer")
PAD, UNKNOWN = 0, 1


def split_words(text: str) -> list[str]:
    """The words of a question in lower case; what stands between letters and digits separates them."""
    return re.findall(r"[^\W_]+", text.lower())


def build_vocabulary(questions: Iterable[str], min_count: int = 1) -> list[str]:
    """The words of questions, sorted.

    Args:
        questions: Of the training split.
        min_count: Words that occur less often are left out, so that training meets unknown words too.

    Raises:
        ValueError: There is no word.
    """
    counts = Counter(word for question in questions for word in split_words(question))
    words = sorted(word for word, count in counts.items() if count >= min_count)
    if not words:
        raise ValueError(f"the questions hold no word that occurs {min_count} times; lower min_count or give questions")
    return words


class TextEncoder(nn.Module):
    """What a network asks of an encoder.

    Attributes:
        dim: Length D of the embeddings.

    Shape:
        questions: B strings.
        returns: ``[B, D]``.
    """

    dim: int

    def check(self, questions: Sequence[str]) -> None:
        """Refuse questions that cannot be encoded.

        Raises:
            ValueError: One is empty or too long.
        """
        for question in questions:
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"a question is empty ({question!r}); write a sentence with at least one word")

    def unknown(self, question: str) -> list[str]:
        """Words of a question that the encoder has no vector for."""
        return []


class WordEncoder(TextEncoder):
    """Embeddings of words and a GRU, whose last state is the embedding of the sentence.

    Words outside the vocabulary share one vector, which is zero until training meets such words.

    Args:
        vocabulary: Words in lower case.
        dim: Length D of word vectors and embeddings.
        max_words: Words of the longest question.
        layers: Layers of the GRU.

    Raises:
        ValueError: An empty vocabulary or words twice in it; in ``forward``, questions without a word or with more
            than ``max_words``.
    """

    def __init__(self, vocabulary: Sequence[str], dim: int = 64, max_words: int = 64, layers: int = 1):
        super().__init__()
        if not vocabulary or len(set(vocabulary)) < len(vocabulary):
            raise ValueError(
                f"vocabulary of {len(vocabulary)} words, {len(set(vocabulary))} of them different; "
                "build it from the training questions with build_vocabulary"
            )
        self.dim, self.max_words = dim, max_words
        self.number = {word: i + 2 for i, word in enumerate(vocabulary)}
        self.embedding = nn.Embedding(len(vocabulary) + 2, dim, padding_idx=PAD)
        with torch.no_grad():
            self.embedding.weight[UNKNOWN].zero_()
        self.gru = nn.GRU(dim, dim, num_layers=layers, batch_first=True)

    def check(self, questions: Sequence[str]) -> None:
        """As ``TextEncoder.check``."""
        super().check(questions)
        for question in questions:
            count = len(split_words(question))
            if not count:
                raise ValueError(f"the question {question!r} has no word; write a sentence with at least one")
            if count > self.max_words:
                raise ValueError(
                    f"the question {question[:40]!r}... has {count} words, expected at most {self.max_words}; shorten "
                    "it, or train with a larger model.text.max_words"
                )

    def unknown(self, question: str) -> list[str]:
        """Words of a question that are not in the vocabulary."""
        return [word for word in split_words(question) if word not in self.number]

    def forward(self, questions: Sequence[str]) -> Tensor:
        self.check(questions)
        numbers = [[self.number.get(word, UNKNOWN) for word in split_words(question)] for question in questions]
        longest, device = max(map(len, numbers)), self.embedding.weight.device
        padded = torch.tensor([row + [PAD] * (longest - len(row)) for row in numbers], device=device)
        states, _ = self.gru(self.embedding(padded))  # [B, longest, D]
        last = torch.tensor([len(row) - 1 for row in numbers], device=device)
        return states[torch.arange(len(numbers), device=device), last]


class TransformerEncoder(TextEncoder):
    """A sentence model of transformers: the mean of its tokens' vectors, divided by its length.

    That is what sentence-transformers computes for all-MiniLM-L6-v2. A frozen model is shared by all networks of a
    process, stays out of their checkpoints, and keeps the embeddings that it has computed.

    Args:
        name: A folder with the model's files, or a name on a hub (which is asked, unless HF_HUB_OFFLINE=1).
        trainable: Train it with the network.
        max_tokens: Tokens of the longest question; None takes the model's positions, at most 256 (MiniLM's).

    Raises:
        ImportError: The package transformers is not installed.
        FileNotFoundError: There is no such folder or model.
        ValueError: In ``forward``, questions that are empty or too long.
    """

    def __init__(self, name: str, trainable: bool = False, max_tokens: int | None = None):
        super().__init__()
        self.name, self.trainable = name, trainable
        tokenizer, model = _load(name) if not trainable else _load.__wrapped__(name)
        self.dim = int(model.config.hidden_size)
        positions = int(getattr(model.config, "max_position_embeddings", 256))
        self.max_tokens = min(positions, 256) if max_tokens is None else max_tokens
        self.tokenizer = tokenizer
        if trainable and hasattr(model, "pooler"):
            model.pooler = None  # which the mean does not use
        self.model = model.train().requires_grad_(True) if trainable else None
        self.known: dict[str, Tensor] = {}
        self.place: Tensor
        self.register_buffer("place", torch.empty(0), persistent=False)  # follows the network to its device

    def check(self, questions: Sequence[str]) -> None:
        """As ``TextEncoder.check``."""
        super().check(questions)
        for question in questions:
            count = len(self.tokenizer(question)["input_ids"])
            if count > self.max_tokens:
                raise ValueError(
                    f"the question {question[:40]!r}... has {count} tokens, expected at most {self.max_tokens}; "
                    "shorten it"
                )

    def forward(self, questions: Sequence[str]) -> Tensor:
        if self.model is not None:
            self.check(questions)
            return self._encode(self.model, questions)
        new = [question for question in dict.fromkeys(questions) if question not in self.known]
        if new:
            self.check(new)
            with torch.no_grad():
                model = _load(self.name)[1].to(self.place.device)
                self.known.update(zip(new, self._encode(model, new).cpu(), strict=True))
        return torch.stack([self.known[question] for question in questions]).to(self.place)

    def _encode(self, model: Any, questions: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(questions), padding=True, return_tensors="pt").to(self.place.device)
        states = model(**tokens).last_hidden_state  # [B, T, D]
        mask = tokens["attention_mask"][:, :, None].to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


@lru_cache(maxsize=2)
def _load(name: str) -> tuple[Any, Any]:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError('text encoders need the package transformers: pip install "visionattn[ground]"') from error
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(f"no folder {name} with a sentence model; give its folder or a hub's name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no sentence model at {name!r} ({str(error).splitlines()[0]}); give a folder with config.json, a "
            "tokeniser and model.safetensors, or a hub's name"
        ) from error
    return tokenizer, model.eval().requires_grad_(False)


def create_text_encoder(kind: str, **kwargs: Any) -> TextEncoder:
    """An encoder by its kind.

    Args:
        kind: ``"words"`` (``WordEncoder``) or ``"transformer"`` (``TransformerEncoder``).
        **kwargs: Arguments of its class.

    Raises:
        ValueError: Another kind, or arguments that its class does not have.
    """
    if kind not in KINDS:
        raise ValueError(f"text.kind={kind!r} must be one of {', '.join(KINDS)}")
    try:
        return WordEncoder(**kwargs) if kind == "words" else TransformerEncoder(**kwargs)
    except TypeError as error:
        raise ValueError(f"text={dict(kind=kind, **kwargs)}: {error}") from error
