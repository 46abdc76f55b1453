"""Training that starts from the weights of another run."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from visionattn.tasks.inference import read_checkpoint


def continued(config: DictConfig) -> DictConfig:
    """The configuration with the network of the run ``start_from``, and the images that it knows.

    Size, channels and normalization of the images become those of that run where ``data.transform`` does not say
    otherwise.

    Args:
        config: ``configs/train.yaml`` with its groups; ``start_from`` is a run's folder, a ``.ckpt`` file, or null.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: It is no run of a classification.
    """
    if config.start_from is None:
        return config
    path, hparams, _ = read_checkpoint(config.start_from, None)
    if not isinstance(hparams.get("model"), dict) or not isinstance(hparams.get("data"), dict):
        raise ValueError(f"start_from={config.start_from}: {path} is no checkpoint of a classification")
    config = config.copy()
    OmegaConf.set_struct(config, False)
    config.model = dict(hparams["model"])
    config.data.in_chans = hparams["in_chans"]
    config.data.transform = {**hparams["data"], **OmegaConf.to_container(config.data.transform, resolve=True)}
    return config


def load_start(model: nn.Module, config: DictConfig, classes: list[str]) -> None:
    """Load the weights of the run ``start_from``; the classifier starts anew when the classes differ.

    Args:
        model: The network of ``continued``.
        config: As returned by it; nothing is loaded without ``start_from``.
        classes: Names of the classes in label order.

    Raises:
        ValueError: The weights do not fit the network.
    """
    if config.start_from is None:
        return
    path, hparams, weights = read_checkpoint(config.start_from, None)
    anew: list[str] = []
    if hparams["classes"] != classes:
        anew = _classifier_keys(model, weights)
        weights = {key: value for key, value in weights.items() if key not in anew}
    missing, unknown = model.load_state_dict(weights, strict=False)
    if unknown or set(missing) - set(anew):
        raise ValueError(f"start_from={config.start_from}: the weights of {path} do not fit the network")
    rank_zero_info(f"weights of {path}, {'a new classifier' if anew else 'with its classifier'}")


def _classifier_keys(model: Any, weights: dict[str, Tensor]) -> list[str]:
    """Keys of the classifier, and of auxiliary ones, which have as many outputs."""
    classifier = model.get_classifier()
    names = [f"{name}." for name, module in model.named_modules() if module is classifier]
    own = model.state_dict()
    return [
        key
        for key, value in own.items()
        if key.startswith(tuple(names)) or weights.get(key, value).shape != value.shape
    ]
