"""Settings that must be made before anything imports Triton or asks a hub, and one seed for every test."""

import functools
import os
import random
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic mode refuses matrix products on a GPU


def quicken_interpreter():
    """Triton's interpreter without the work that tells a test nothing, more than half of its time.

    It asks of every sum and product of integers whether 32 bits hold it, which the small maps of tests never need; it
    patches the language again at every call of a helper; and it makes a table of types for every conversion.
    """
    import triton
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    numpy_type = interpreter._get_np_dtype
    scalar = functools.cache(numpy_type)  # pointers and blocks have no hash
    interpreter._get_np_dtype = lambda kind: scalar(kind) if type(kind) is triton.language.dtype else numpy_type(kind)
    patch, builtin = interpreter._patch_lang, triton.language.load
    languages = (triton.language, triton.language.core)

    @functools.cache
    def seen(function):
        return [language for language in languages if language in function.__globals__.values()]

    def patch_once(function):
        patched = all(language.load is not builtin for language in seen(function))
        return interpreter._LangPatchScope() if patched else patch(function)

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    quicken_interpreter()


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
