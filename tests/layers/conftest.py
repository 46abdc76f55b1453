"""What tests of layers that call operators share."""

import pytest
import torch

from visionattn.ops import use_backend


@pytest.fixture
def where_kernels_run(monkeypatch):
    """New tensors lie on the GPU where there is one, whose kernels take no others, and only forced kernels run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), use_backend("eager"):
        yield


@pytest.fixture
def watch(monkeypatch):
    """Names of a module's operators that ran, from the call on."""

    def operators(module, *names):
        ran = []

        def recorder(name, run):
            return lambda *args: ran.append(name) or run(*args)

        for name in names:
            monkeypatch.setattr(module, name, recorder(name, getattr(module, name)))
        return ran

    return operators
