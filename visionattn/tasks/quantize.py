"""ONNX files with weights of 8 bits, kept only if the predictions stay."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor

from visionattn.tasks.export import Exportable
from visionattn.tasks.export_formats import Runner, check_domains, load_onnx, need_packages
from visionattn.tasks.verify import class_folders

RANDOM_IMAGES = 64
MAX_LOSS = 1.0  # percent
_logger = logging.getLogger("visionattn")


def quantize_file(path: Path) -> None:
    """Turn the constant factors of matrix products into 8 bits, in place; activations are scaled while running.

    Convolutions stay: ONNX Runtime's product of 8 bits for them is slower than that of floats on most CPUs.

    Raises:
        ImportError: Packages are missing.
        ValueError: The result needs operators of another domain than ONNX's.
    """
    need_packages("onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    temporary = path.with_name(path.name + ".int8")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # advice to simplify the graph first, by functions of the root logger
    try:
        quantize_dynamic(
            str(path),
            str(temporary),
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        content = onnx.load(str(temporary))
        used = {node.domain for node in content.graph.node}
        for entry in [entry for entry in content.opset_import if entry.domain and entry.domain not in used]:
            content.opset_import.remove(entry)
        check_domains(content)
        onnx.save(content, str(temporary))
        temporary.replace(path)
    finally:
        root.setLevel(level)
        temporary.unlink(missing_ok=True)


def _labelled(network: Exportable, root: str, limit: int | None) -> Iterator[tuple[Tensor, int | None]]:
    names = network.classes if network.weights == "run" else None
    source = class_folders(root, len(network.classes), names, network.in_chans)
    transform: Any = create_transform(**network.preprocessing, is_training=False)
    count = len(source) if limit is None else min(limit, len(source))
    for i in range(count):
        image, label, _ = source[i * len(source) // count]  # spread over the classes
        yield transform(image)[None], label


def _random(network: Exportable, count: int) -> Iterator[tuple[Tensor, int | None]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        yield torch.randn(1, network.in_chans, *network.size, generator=generator), None


def _labels(logits: Tensor, threshold: float | None) -> Tensor:
    """Classes ``[B]`` of logits ``[B, K]``, or of every pixel ``[B, H, W]``."""
    if logits.dim() == 4 and logits.shape[1] == 1:
        return (logits[:, 0].sigmoid() > (0.5 if threshold is None else threshold)).long()
    return logits.argmax(1)


def _measure(
    before: Runner, after: Runner, images: Iterator[tuple[Tensor, int | None]], threshold: float | None
) -> dict[str, Any]:
    count, same, right = 0, 0.0, [0, 0]
    for batch, label in images:
        first, second = (_labels(run(batch), threshold) for run in (before, after))
        same += float((first == second).float().mean())
        count += 1
        if label is not None:
            right = [right[0] + int(first[0] == label), right[1] + int(second[0] == label)]
    return dict(images=count, agreement=100 * same / count, right=right)


def int8(
    data: str | None = None, limit: int | None = None, max_loss: float = MAX_LOSS
) -> Callable[[Path, Exportable], dict[str, Any]]:
    """What ``export`` does to an ONNX file after it has been compared.

    With labelled images the share of right answers is measured before and after, else the share of random images, or
    of their pixels, whose class stays. Random images are no measure of accuracy: they say whether the graph survived.

    Args:
        data: Folder ``ROOT/CLASS/IMAGE`` or ``ROOT/val/CLASS/IMAGE``.
        limit: Images to take of it, spread over the classes; all by default. Of random ones ``RANDOM_IMAGES``.
        max_loss: Percent by which top-1 may fall, or of classes that may change.

    Returns:
        A function that changes the file and returns ``{"int8": measurements}``; it raises ValueError where more is
        lost, or where ``data`` does not fit the network.

    Raises:
        ValueError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--images {limit}: 8 bits are measured on at least 1 image; leave it out for all of them")

    def change(path: Path, network: Exportable) -> dict[str, Any]:
        if data and network.task != "classification":
            raise ValueError("--data with --int8 is for classifiers; masks are compared on random images")
        before, bytes_before = load_onnx(path), path.stat().st_size
        quantize_file(path)
        after = load_onnx(path)
        images = _labelled(network, data, limit) if data else _random(network, limit or RANDOM_IMAGES)
        found = _measure(before, after, images, network.threshold)
        facts: dict[str, Any] = dict(images=found["images"], agreement=found["agreement"], bytes_before=bytes_before)
        if data:
            top1, top1_int8 = (100 * n / found["images"] for n in found["right"])
            facts |= dict(top1=top1, top1_int8=top1_int8)
            loss, what = top1 - top1_int8, f"top-1 falls from {top1:.2f} to {top1_int8:.2f} %"
        else:
            loss = 100 - found["agreement"]
            what = f"the class stays the same in {found['agreement']:.2f} % of {found['images']} random images"
        if loss > max_loss:
            raise ValueError(f"8 bits not kept: {what}, which is more than --max-loss {max_loss:g} allows")
        return dict(int8=facts)

    return change
