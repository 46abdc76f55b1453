"""Cutting a map into windows and joining them again."""

import pytest
import torch

from visionattn.ops import join_windows, split_windows, use_backend

OPS = torch.ops.visionattn
BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])


@BACKENDS
def test_windows_are_cut_row_by_row_and_joined_again(backend):
    x = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3)
    with use_backend(backend):
        windows = split_windows(x, 2)
        assert windows.shape == (12, 4, 3)
        assert torch.equal(windows[6 + 5].view(2, 2, 3), x[1, 2:4, 4:6])
        assert torch.equal(join_windows(windows, 2, 2, 4, 6), x)


@pytest.mark.parametrize("size, side", [((2, 4, 6), 2), ((1, 3, 3), 3), ((3, 5, 2), 1)])
def test_operators_are_registered_properly(size, side):
    x = torch.randn(*size, 3, requires_grad=True)
    torch.library.opcheck(OPS.split_windows, (x, side))
    windows = split_windows(x, side).detach().requires_grad_()
    torch.library.opcheck(OPS.join_windows, (windows, side, *size))
    assert split_windows(x, side).data_ptr() != x.data_ptr()


def test_gradients_equal_differences():
    x = torch.randn(2, 4, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: split_windows(x, 2) ** 2, x)
    assert torch.autograd.gradcheck(lambda x: join_windows(split_windows(x, 2) ** 2, 2, 2, 4, 6), x)


def test_exported_with_free_sizes_takes_a_single_window():
    class Windows(torch.nn.Module):
        def forward(self, x):
            return join_windows(split_windows(x, 3) * 2, 3, *x.shape[:3])

    rows, columns = (torch.export.Dim(name, min=1, max=9) for name in ("rows", "columns"))
    program = torch.export.export(Windows(), (torch.ones(1, 6, 9, 2),), dynamic_shapes=({1: 3 * rows, 2: 3 * columns},))
    x = torch.randn(1, 3, 3, 2)
    assert torch.equal(program.module()(x), 2 * x)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"side=3 must divide the map, got H=6, W=8"):
        split_windows(torch.zeros(1, 6, 8, 2), 3)
    with pytest.raises(ValueError, match="do not make 1 maps of 4x6"):
        join_windows(torch.zeros(5, 4, 2), 2, 1, 4, 6)
