"""Libraries of the extra ``explain``, imported when they are used, and models left as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn


def need(module: str, package: str) -> Any:
    """Import a module of the extra.

    Args:
        module: Name of the module.
        package: Name under which it is installed.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {package}: pip install 'visionattn[explain]'") from error


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode and without gradients of its parameters; afterwards everything as it was."""
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _, _ in kept:
            parameter.requires_grad_(False)
        yield model.eval()
    finally:
        for parameter, needed, grad in kept:
            parameter.requires_grad_(needed)
            parameter.grad = grad
        for module, training in modes:
            module.training = training
