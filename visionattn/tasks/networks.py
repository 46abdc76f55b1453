"""Networks from the ``model`` group of a configuration or a checkpoint, which can name nothing else."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

import visionattn

_HEADS = "visionattn.heads."
TIMM = "timm.create_model"


@contextmanager
def arguments_of(group: str) -> Iterator[None]:
    """Say which group of the configuration a call got its arguments from, where it refuses them.

    Args:
        group: The name that its keys begin with.

    Raises:
        ValueError: In place of what packages raise for an unknown argument, another type or a wrong value.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # weights that cannot be had, or of another network
        raise ValueError(f"{group}: {' '.join(str(error).split())}") from error
    except (TypeError, AssertionError, KeyError) as error:
        raise ValueError(f"{group}.* has an unknown setting or a wrong value ({error!r})") from error


def head_class(target: str) -> type[nn.Module]:
    """A module of ``visionattn.heads`` by its full name.

    Raises:
        ValueError: The name of anything else.
    """
    module, _, name = target.rpartition(".")
    if module.startswith(_HEADS) and module.removeprefix(_HEADS).isidentifier():
        try:
            found = getattr(import_module(module), name, None)
        except ModuleNotFoundError:
            found = None
        if isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == module:
            return found
    raise ValueError(f"model._target_={target} is no network of {_HEADS}*; for masks choose model=unet or another")


def make_head(arguments: dict[str, Any], kind: type[nn.Module] = nn.Module, choose: str = "", **more: Any) -> Any:
    """The network of a ``model`` group that names a class of ``visionattn.heads``.

    Args:
        arguments: ``_target_`` and the arguments of the class.
        kind: What the class must be.
        choose: What to choose otherwise.
        **more: Further arguments.

    Raises:
        ValueError: Another ``_target_``, or arguments that its class does not have.
    """
    target = str(arguments.get("_target_"))
    network = head_class(target)
    if not issubclass(network, kind):
        raise ValueError(f"model._target_={target} is no {kind.__name__}; choose {choose}")
    given = {key: value for key, value in arguments.items() if not key.startswith("_")}
    known = inspect.signature(network).parameters
    free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    if unknown := [key for key in given if key not in known and not free]:
        left_out = " ".join(f"'~model.{key}'" for key in unknown)
        raise ValueError(
            f"{network.__name__} has no argument {', '.join(unknown)}, which another model of this experiment has; "
            f"leave out: {left_out}"
        )
    with arguments_of("model"):
        return network(**given, **more)


def make_classifier(arguments: dict[str, Any], num_classes: int, in_chans: int) -> nn.Module:
    """The classifier of a ``model`` group: a model of timm, or a class of ``visionattn.heads`` around one.

    Args:
        arguments: ``model_name`` and timm's arguments; or ``_target_``, ``backbone`` and the arguments of the class.
        num_classes: Classes.
        in_chans: Channels of the image.

    Raises:
        ValueError: An unknown model, or as ``make_head``.
    """
    given = {key: value for key, value in arguments.items() if key != "_target_"}
    sizes = dict(num_classes=num_classes, in_chans=in_chans)
    if arguments.get("_target_", TIMM) != TIMM:
        return make_head(arguments, **sizes)
    with arguments_of("model"):
        return visionattn.create_model(given.pop("model_name"), **given, **sizes)
