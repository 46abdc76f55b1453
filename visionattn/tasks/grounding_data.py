"""What a grounding run is made of: network with text encoder, loaders, and what its checkpoint keeps."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from visionattn.data.grounding_pipeline import GroundingSamples, GroundingTransform, collate_questions
from visionattn.heads.text import build_vocabulary
from visionattn.tasks.loaders import EpochData
from visionattn.tasks.networks import make_head


def make_grounder(arguments: dict[str, Any], in_chans: int) -> nn.Module:
    """The network of a ``model`` group or of a checkpoint.

    Args:
        arguments: ``_target_``, a class of ``visionattn.heads`` that takes images and questions, and its arguments,
            among them ``text`` for ``create_text_encoder``, with a ``vocabulary`` where its kind is words.
        in_chans: Channels of the image.

    Raises:
        ValueError: Another ``_target_``, or no text encoder.
    """
    if not arguments.get("text"):
        raise ValueError("model.text is missing: a run needs a text encoder; choose model=sentence_attention")
    return make_head(arguments, num_classes=1, in_chans=in_chans)


def with_vocabulary(arguments: dict[str, Any], questions: list[str]) -> dict[str, Any]:
    """The arguments of a network with the vocabulary of the training questions, where its encoder wants one."""
    text = dict(arguments.get("text") or {})
    least = text.pop("min_count", 1)
    if text.get("kind") == "words" and "vocabulary" not in text:
        text["vocabulary"] = build_vocabulary(questions, least)
    return {**arguments, "text": text}


def prepare_questions(config: DictConfig, source: Any, val: Any) -> tuple[nn.Module, EpochData, dict[str, Any], int]:
    """Network, loaders, what the checkpoint keeps of them, and the number of outputs.

    Raises:
        ValueError: A network that takes no questions, an image in both splits, or a question that the text encoder
            refuses.
    """
    if not hasattr(source, "questions"):
        raise ValueError(f"{type(source).__name__} has no questions; choose data=questions, scenes or a published set")
    if shared := sorted(set(source.groups) & set(val.groups)):
        raise ValueError(f"{len(shared)} images are in training and validation, first {shared[0]!r}; divide them")
    given: Any = OmegaConf.to_container(config.model, resolve=True)
    arguments = with_vocabulary(given, source.questions)
    model: Any = make_grounder(arguments, config.data.in_chans)
    for question in dict.fromkeys([*source.questions, *val.questions]):
        model.text.check([question])
    group: Any = OmegaConf.to_container(config.data, resolve=True)

    def samples(split: Any, train: bool) -> GroundingSamples:
        transform = GroundingTransform(**group["transform"], train=train)
        return GroundingSamples(split, transform, config.seed, group["on_error"], replace=train)

    kept = dict(
        task="grounding",
        model={k: v for k, v in arguments.items() if k != "pretrained"},
        data=group["transform"],
    )
    return model, EpochData(group, samples(source, True), samples(val, False), collate_questions, config.seed), kept, 1
