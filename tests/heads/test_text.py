"""Text encoders: words of the training questions, and sentence models from a folder."""

import json

import pytest
import torch
from helpers import assert_close

from visionattn.heads.text import build_vocabulary, create_text_encoder, split_words

WORDS = ["circle", "is", "red", "the", "where"]


def words(**kwargs):
    return create_text_encoder("words", **{**dict(vocabulary=WORDS, dim=6), **kwargs})


def test_vocabulary_is_sorted_words():
    questions = ["Where is the RED circle?", "what's red-hot?"]
    assert build_vocabulary(questions) == ["circle", "hot", "is", "red", "s", "the", "what", "where"]
    assert build_vocabulary(questions, 2) == ["red"]
    assert split_words("Größe: 2,5") == ["größe", "2", "5"]
    with pytest.raises(ValueError, match="no word that occurs 3 times"):
        build_vocabulary(questions, 3)


def test_sentences_do_not_depend_on_their_neighbours():
    encoder = words()
    alone, together = encoder(["red circle"]), encoder(["red circle", "where is the red circle"])
    assert together.shape == (2, 6)
    assert_close("padding", alone[0], together[0], 1e-6)
    together.sum().backward()
    assert not [key for key, p in encoder.named_parameters() if p.grad is None]


def test_unknown_words_are_one_word_and_told():
    encoder = words()
    assert encoder.unknown("Where is the blue square?") == ["blue", "square"]
    assert torch.equal(encoder(["where is blue"]), encoder(["where is green"]))
    assert not torch.equal(encoder(["where is blue"]), encoder(["where is red"]))


@pytest.mark.parametrize("question, message", [("", "is empty"), ("?!", "has no word"), ("red " * 65, "65 words.*64")])
def test_bad_questions_are_named(question, message):
    with pytest.raises(ValueError, match=message):
        words()([question])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kind='letters' must be one of words, transformer"):
        create_text_encoder("letters")
    with pytest.raises(ValueError, match="vocabulary of 2 words, 1 of them different"):
        words(vocabulary=["a", "a"])
    with pytest.raises(ValueError, match="unexpected keyword argument 'width'"):
        words(width=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with a word-piece vocabulary, as a hub would keep it."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("sentences")
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "?"]))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    (path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="BertTokenizer", do_lower_case=True)))
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config = transformers.BertConfig(vocab_size=11, max_position_embeddings=12, **sizes)
    transformers.BertModel(config).save_pretrained(path)
    return path


def test_sentence_model_is_the_normalised_mean_of_its_tokens(folder):
    from transformers import AutoModel, AutoTokenizer

    encoder = create_text_encoder("transformer", name=str(folder))
    found = encoder(["where is the red circle?", "red", "where is the red circle?"])
    assert found.shape == (3, 8) and encoder.dim == 8 and not list(encoder.state_dict())
    tokens = AutoTokenizer.from_pretrained(folder)("red", return_tensors="pt")
    with torch.no_grad():
        mean = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state.mean(1)
    assert_close("mean", mean / mean.norm(), found[1:2], 1e-5)
    assert_close("norm", torch.ones(3), found.norm(dim=1), 1e-5)
    assert torch.equal(found[0], found[2]) and not found.requires_grad
    with pytest.raises(ValueError, match="tokens, expected at most 12"):
        encoder(["red " * 20])


def test_sentence_model_can_be_trained(folder):
    encoder = create_text_encoder("transformer", name=str(folder), trainable=True)
    encoder(["red circle"]).sum().backward()
    assert not [key for key, p in encoder.named_parameters() if p.grad is None]
    assert not any(p.requires_grad for p in create_text_encoder("transformer", name=str(folder)).parameters())


def test_missing_sentence_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*absent with a sentence model"):
        create_text_encoder("transformer", name=str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="no sentence model at"):
        create_text_encoder("transformer", name=str(tmp_path))
