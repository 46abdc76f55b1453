"""Libraries of the extra ``explain``, imported when they are used."""

from typing import Any

_HELP = "pictures need the extra explain: pip install 'visionattn[explain]'"


def need_matplotlib() -> Any:
    """The module matplotlib.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(_HELP) from error
    return matplotlib
