"""Operators are tested with NaN in every fresh buffer, so that a result never rests on memory nobody wrote."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fill_fresh_memory():
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
