"""Every backbone of timm and this package in mmsegmentation and mmdetection.

One import does it, in a config ``custom_imports = dict(imports=["visionattn.integrations.mm"])``. It

* registers the backbones with timm (mmsegmentation's own ``TIMMBackbone`` then finds them too) and ``VisionAttn`` with
  the root registry of mmengine, which both frameworks fall back to;
* supplies the few compiled operators that their models need, where mmcv has none (mmcv-lite);
* lets mmengine read its own checkpoints with ``torch.load(weights_only=True)``.

What is changed in other packages is ``PATCHES``; it lasts as long as the process.
"""

from importlib import import_module, util

# package: versions that the adapter was written for, [first, last)
STACK = {"mmengine": ("0.10.4", "0.11"), "mmcv": ("2.0.0", "2.2.0")}
# what the frameworks import without declaring it
UNDECLARED = ("ftfy", "regex")
# everything that this import changes outside the package, and why
PATCHES = {
    "sys.modules['mmcv._ext']": (
        "stands in for the compiled operators, only where mmcv comes without them: nms, roi_align (average), "
        "sigmoid_focal_loss, ms_deform_attn; any other one raises NotImplementedError when it is called"
    ),
    "mmengine.runner.CheckpointLoader, scheme ''": (
        "local files are read with weights_only=True, with the plain classes of mmengine's checkpoints allowed; also "
        ".safetensors"
    ),
    "mmengine.runner.CheckpointLoader, schemes http:// and https://": (
        "files are downloaded once per address and read the same way"
    ),
    "mmengine.registry.MODELS": "knows the backbone VisionAttn",
}


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())


def check_stack() -> None:
    """Refuse an environment without the frameworks' common parts, or with versions that they do not run with.

    Raises:
        ImportError: mmengine or mmcv is missing or of another version, or both frameworks are missing.
    """
    remedy = 'install the extra "mm" (pip install "visionattn[mm]")'
    for package, (first, last) in STACK.items():
        if not util.find_spec(package):
            raise ImportError(f"visionattn.integrations.mm needs {package}, which is not installed; {remedy}")
        found = import_module(package).__version__
        if not _version(first) <= _version(found) < _version(last):
            raise ImportError(
                f"{package} {found} does not fit: mmsegmentation 1.2.2 and mmdetection 3.3.0 need {first} or newer, "
                f"older than {last}; {remedy}"
            )
    frameworks = [package for package in ("mmseg", "mmdet") if util.find_spec(package)]
    if not frameworks:
        raise ImportError(f"neither mmsegmentation nor mmdetection is installed; {remedy}")
    missing = [package for package in UNDECLARED if "mmseg" in frameworks and not util.find_spec(package)]
    if missing:
        raise ImportError(f"mmsegmentation imports {' and '.join(missing)} without declaring it; {remedy}")


check_stack()  # before the imports that would fail less clearly

from visionattn.integrations import _mm_checkpoints, _mm_operators  # noqa: E402
from visionattn.integrations._mm_backbone import VisionAttn  # noqa: E402

__all__ = ["PATCHES", "STACK", "VisionAttn", "check_stack"]

_mm_operators.install()
_mm_checkpoints.install()
