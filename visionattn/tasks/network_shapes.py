"""Which operators the published networks call, and at what sizes."""

from collections.abc import Iterable, Iterator

import timm
from torch import nn

import visionattn  # noqa: F401  (it registers the models)


def stage_modules(
    models: Iterable[str], kind: type[nn.Module], size: int = 224
) -> Iterator[tuple[str, int, nn.Module]]:
    """Modules of a kind in the stages of some models.

    Args:
        models: Names of models with ``stages`` at strides 4, 8, 16 and 32.
        kind: Class of the modules.
        size: Side of the images in pixels.

    Yields:
        Model and stage (``nat_t stage 1``), the side of the stage's map, the module.
    """
    for name in models:
        model = timm.create_model(name, device="meta")
        for i, stage in enumerate(model.stages):
            for module in stage.modules():
                if isinstance(module, kind):
                    yield f"{name} stage {i + 1}", size >> (2 + i), module
