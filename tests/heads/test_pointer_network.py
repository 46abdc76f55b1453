"""Pointer Networks: padding, decoding, and that they learn."""

import pytest
import torch

from visionattn.heads.pointer_network import PointerNetwork


def test_padding_changes_nothing_and_decoding_follows_the_scores():
    model = PointerNetwork(16).eval()
    points, path = torch.rand(2, 4, 2), torch.tensor([[0, 3, 1], [2, 0, -1]])
    counts = torch.tensor([4, 3])
    more = torch.nn.functional.pad(points, (0, 0, 0, 2), value=0.3)
    with torch.no_grad():
        scores, wide = model(points, counts, path.clamp_min(0)), model(more, counts, path.clamp_min(0))
        assert scores.shape == (2, 4, 5) and torch.isinf(scores[1, :, 3]).all()
        torch.testing.assert_close(wide[..., [0, 1, 2, 3, 6]], scores)
        torch.testing.assert_close(model.loss(more, counts, path), model.loss(points, counts, path))
        found = model.generate(points, counts, 5)
        assert found == model.generate(more, counts, 5)
        for i, row in enumerate(found):  # every choice is the best after those before it
            again = model(points[i : i + 1], counts[i : i + 1], torch.tensor([row], dtype=torch.long))[0].argmax(-1)
            assert again[: len(row)].tolist() == row and (len(row) == 5 or again[-1] == 4)


def test_it_learns_the_order_of_numbers():
    model = PointerNetwork(32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        x = torch.rand(64, 3, 1)
        loss = model.loss(x, torch.full((64,), 3), x[..., 0].argsort(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.rand(200, 3, 1)
    found = model.generate(x, torch.full((200,), 3), 4)
    assert sum(p == t for p, t in zip(found, x[..., 0].argsort(1).tolist(), strict=True)) > 150


def test_faults_are_named():
    with pytest.raises(ValueError, match="dim=0"):
        PointerNetwork(0)
    with pytest.raises(ValueError, match=r"at least one input, got \[3, 0\]"):
        PointerNetwork(4).generate(torch.rand(2, 3, 2), torch.tensor([3, 0]), 3)
