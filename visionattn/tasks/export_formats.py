"""Files that other programs run: writing them, and reading them back into a function to compare with.

Models are traced through the plain form of the operators (``reference.py``), so the files hold PyTorch's or ONNX's own
operators alone and run without this package. The exception is ``torch.export`` with free height and width (``trace``).
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from visionattn.ops import use_backend

FREE = {"none": (), "batch": (0,), "all": (0, 2, 3)}
"""Axes of ``[B, C, H, W]`` whose sizes a file leaves open."""
AXES = {0: "batch", 2: "height", 3: "width"}
OPSET = 20
INPUT, OUTPUT = "images", "output"
_ONNX_DOMAINS = {"", "ai.onnx"}
_ATEN = ("aten", "prims", "_operator", "math", "<built-in", "torch.sym_", "<function sym_")

Runner = Callable[[Tensor], Tensor]


def need_packages(*names: str) -> None:
    """Say what to install where packages are missing.

    Raises:
        ImportError: Some are.
    """
    from importlib.util import find_spec

    if missing := [name for name in names if find_spec(name) is None]:
        raise ImportError(f'this needs more packages ({", ".join(missing)}): pip install "visionattn[export]"')


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on what they leave as it is."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _free_sizes(free: str) -> Any:
    return ({axis: torch.export.Dim.DYNAMIC for axis in FREE[free]},) if FREE[free] else None


def _refused(free: str, error: Exception) -> ValueError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    remedy = {"all": "--dynamic batch or fixed sizes may work", "batch": "leave out --dynamic"}.get(free, "")
    return ValueError(f"the model cannot be traced with {_words(free)}: {reason[:200]}{remedy and '; ' + remedy}")


def _words(free: str) -> str:
    return {"none": "fixed sizes", "batch": "a free batch", "all": "free batch, height and width"}[free]


def trace(model: nn.Module, images: Tensor, free: str = "none", plain: bool = True) -> torch.export.ExportedProgram:
    """``torch.export`` of a model.

    Args:
        model: In evaluation mode.
        images: Example, ``[B, C, H, W]``; two or more where the batch is free.
        free: Key of ``FREE``.
        plain: In PyTorch's own operators. Padding and regions of a map whose sides are only symbols then leave
            conditions on them that other sizes fail; behind this package's operators they do not arise.

    Raises:
        ValueError: The model cannot be traced, or ``plain`` and calls operators that PyTorch alone does not know.
    """
    try:
        with use_backend("reference" if plain else "eager"), torch.no_grad(), _quiet():
            program = torch.export.export(model, (images,), dynamic_shapes=_free_sizes(free))
    except Exception as error:  # a dozen types, most of them internal
        raise _refused(free, error) from error
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    foreign = sorted(call for call in calls if not call.startswith(_ATEN if plain else (*_ATEN, "visionattn.")))
    if foreign:
        raise ValueError(f"the traced model calls {', '.join(foreign[:3])}, which PyTorch alone does not know")
    return program


def write_torch(model: nn.Module, images: Tensor, free: str, path: Path, facts: str) -> Runner:
    """A ``.pt2`` file of ``torch.export``; ``facts`` lie in it as ``visionattn.json``."""
    program = trace(model, images, free, plain=free != "all")
    with path.open("wb") as file:  # a file object, for torch wants the name to end with .pt2
        torch.export.save(program, file, extra_files={"visionattn.json": facts})
    with path.open("rb") as file:
        return torch.export.load(file).module()


def write_aoti(model: nn.Module, images: Tensor, free: str, path: Path, facts: str) -> Runner:
    """A package of compiled code for this machine's kind of CPU, by AOTInductor; loads in Python and C++.

    Raises:
        ValueError: There is no C++ compiler, or the code does not compile.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"--format aoti compiles C++ and there is no {compiler}; install g++ or set CXX, or take torch or onnx"
        )
    program, named = trace(model, images, free), path.with_name(path.name + ".pt2")
    try:
        with _quiet():
            torch._inductor.aoti_compile_and_package(program, package_path=str(named))
        named.replace(path)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"AOTInductor cannot compile the model with {_words(free)}: {reason[-1][:300]}") from error
    finally:
        named.unlink(missing_ok=True)
    return load_aoti(path)


def load_aoti(path: Path) -> Runner:
    """The compiled model of a package, for any file name."""
    with path.open("rb") as file:
        return torch._inductor.aoti_load_package(file)


def write_onnx(model: nn.Module, images: Tensor, free: str, path: Path, facts: str) -> Runner:
    """An ONNX file of opset ``OPSET`` with operators of ONNX alone; ``facts`` are its metadata ``visionattn``.

    Raises:
        ImportError: Packages are missing.
        ValueError: The model cannot be translated, or only with operators of another domain, or not run.
    """
    need_packages("onnx", "onnxruntime", "onnxscript")
    import onnx

    from visionattn.tasks.export_onnx import TRANSLATIONS

    try:
        with torch.no_grad(), _quiet():
            program: Any = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=_free_sizes(free),
                custom_translation_table=TRANSLATIONS,
            )
    except Exception as error:
        raise _refused(free, error) from error
    shape = program.model.graph.inputs[0].shape
    program.rename_axes({str(shape[axis]): AXES[axis] for axis in FREE[free]})
    program.save(str(path), external_data=False)
    content = onnx.load(str(path))
    onnx.helper.set_model_props(content, {"visionattn": facts})
    check_domains(content)
    onnx.checker.check_model(content)
    onnx.save(content, str(path))
    try:
        return load_onnx(path)
    except Exception as error:  # the runtime's own types, for operators that it lacks for a dtype
        raise ValueError(f"ONNX Runtime cannot run what was exported: {' '.join(str(error).split())[-200:]}") from error


def check_domains(model: Any) -> Counter[str]:
    """Number of nodes of each domain of an ONNX model.

    Raises:
        ValueError: A domain other than ONNX's own.
    """
    domains = Counter(node.domain for graph in (model.graph, *model.functions) for node in graph.node)
    if foreign := set(domains) - _ONNX_DOMAINS - {function.domain for function in model.functions}:
        raise ValueError(f"the file needs operators of {', '.join(sorted(foreign))}, which not every runtime has")
    return domains


def opset_of(path: Path) -> int:
    """The opset that an ONNX file states."""
    import onnx

    found = onnx.load(str(path), load_external_data=False)
    return next(int(entry.version) for entry in found.opset_import if entry.domain in _ONNX_DOMAINS)


def load_onnx(path: Path) -> Runner:
    """The model of an ONNX file in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def write_safetensors(model: nn.Module, images: Tensor, free: str, path: Path, facts: str) -> Runner:
    """The weights alone, under the model's own keys, loaded again by the call that ``facts`` state as ``create_model``.

    Raises:
        ValueError: timm does not load the file with that call.
    """
    named, call = path.with_name(path.name + ".safetensors"), json.loads(facts).get("create_model")
    try:
        named.write_bytes(_packed(model, {"visionattn": facts}))  # timm knows the format by the ending
        again = _emptied(model, named) if call is None else _by_timm(call, named)
        named.replace(path)
    finally:
        named.unlink(missing_ok=True)
    return again


def _emptied(model: nn.Module, path: Path) -> nn.Module:
    again = deepcopy(model)
    for x in again.state_dict().values():
        x.detach().zero_()
    _unwrapped(again).load_state_dict(load_file(path))
    return again


def _by_timm(call: dict[str, Any], path: Path) -> nn.Module:
    overlay = call["pretrained_cfg_overlay"] | dict(file=str(path))
    try:
        return timm.create_model(**call | dict(pretrained_cfg_overlay=overlay)).eval()
    except Exception as error:  # of timm and the models, which raise a dozen types
        raise ValueError(f"timm does not load the weights again: {' '.join(str(error).split())[-200:]}") from error


def _unwrapped(model: nn.Module) -> Any:
    return getattr(model, "network", model)  # without the wrapper of networks for masks


def _packed(model: nn.Module, metadata: dict[str, str] | None = None) -> bytes:
    weights = _unwrapped(model).state_dict()
    return save({key: x.detach().contiguous().clone() for key, x in weights.items()}, metadata)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of what ``safetensors.torch.save`` makes of the weights under the model's own keys."""
    return hashlib.sha256(_packed(model)).hexdigest()


WRITERS: dict[str, Callable[[nn.Module, Tensor, str, Path, str], Runner]] = {
    "torch": write_torch,
    "aoti": write_aoti,
    "onnx": write_onnx,
    "safetensors": write_safetensors,
}
"""Format to a function that writes the file and gives back what was read from it."""
