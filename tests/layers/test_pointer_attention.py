"""Pointers and the table of positions, against the published results and their definitions."""

import math

import pytest
import torch
from helpers import assert_golden, inputs, load_reference, published_weights

from visionattn.layers.pointer_attention import PointerAttention
from visionattn.layers.position_table import position_table, read_table, table_loss, target_cosines


def test_additive_score_is_the_equation():
    manifest, stored = load_reference("layers/../heads/pointer_attention")
    layer = PointerAttention(32).double()
    layer.load_state_dict(published_weights(manifest))
    given = manifest["input"]
    keys, query = inputs(**given["encoder"]), inputs(**given["decoder"])
    assert_golden("scores", stored["scores"], layer(query, keys))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[-1, -2:] = False
    scores = layer(query, keys, mask)
    assert_golden("probabilities", stored["probabilities"], scores.softmax(-1))
    assert torch.isinf(scores[-1, :, -2:]).all()
    assert sum(p.numel() for p in layer.parameters()) == manifest["params"]


@pytest.mark.parametrize("padding_class", [False, True])
def test_dot_score_reads_its_heads_out(padding_class):
    layer = PointerAttention(8, "dot", 2, padding_class).double()
    query, keys = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    scores = layer(query, keys, mask)
    assert scores.shape == (2, 3, 5 + padding_class)
    head = [(h.encode_fc(keys[1, 2]) @ h.decode_fc(query[1, 0])) / math.sqrt(8) for h in layer.heads]
    weight, bias = layer.readout.weight[0], layer.readout.bias[0]
    assert scores[1, 0, 2].item() == pytest.approx((weight[0] * head[0] + weight[1] * head[1] + bias).item())
    assert torch.isinf(scores[1, :, 3:5]).all() and not torch.isinf(scores[0]).any()
    if padding_class:
        assert torch.equal(scores[..., 5], bias.expand(2, 3))
    each = layer(query, keys, mask[:, None].expand(-1, 3, -1))
    assert torch.equal(each, scores)
    scores[:, :, :3].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_faults_are_named():
    with pytest.raises(ValueError, match="score='cosine' must be one of additive, dot"):
        PointerAttention(8, "cosine")
    with pytest.raises(ValueError, match="num_heads=2.*one head"):
        PointerAttention(8, "additive", 2)
    with pytest.raises(ValueError, match=r"\[2, 3, 8\] and keys \[1, 3, 8\]"):
        PointerAttention(8)(torch.zeros(2, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="rows=1"):
        position_table(1)


@pytest.mark.parametrize("rows, sigma", [(11, 2.0), (14, 2.0), (11, 2.5)])
def test_table_meets_the_published_objective(rows, sigma):
    table = position_table(rows, sigma=sigma)
    unit = table / table.norm(dim=1, keepdim=True)
    # the largest errors of the published tables are 5e-5, 5e-4 and 1e-4
    assert (unit @ unit.T - target_cosines(rows, sigma)).abs().max() < 1e-10
    assert table_loss(table, sigma) < 1e-20 < table_loss(torch.randn(rows, 86).double(), sigma)
    assert torch.equal(table, position_table(rows, sigma=sigma))
    assert 5 < table.norm(dim=1).mean() < 12  # the published ones have 5.9 to 8.9


def test_a_table_made_under_another_device_is_no_empty_one():
    with torch.device("meta"):
        table = position_table(5, 7, seed=9)
    assert table.device.type == "cpu" and torch.equal(table, position_table(5, 7, seed=9))


def test_a_table_with_more_rows_than_numbers():
    table = position_table(40, 12)
    unit = table / table.norm(dim=1, keepdim=True)
    assert (unit @ unit.T - target_cosines(40, 2.0)).abs().max() < 0.25
    assert (unit @ unit.T).argmax(1).equal(torch.arange(40))


def test_reading_between_rows():
    table = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 9.0]])
    found = read_table(table, torch.tensor([[0.0, 1.0], [0.5, 1.25], [-3.0, 7.0]]))
    assert found.tolist() == [[[0, 1], [2, 3]], [[1, 2], [2.5, 4.5]], [[0, 1], [4, 9]]]
