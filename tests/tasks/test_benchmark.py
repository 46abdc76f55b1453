"""Timing of models and attention layers."""

import re

import pytest

from visionattn.cli import main
from visionattn.tasks.benchmark import times_in_turn


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = times_in_turn(calls, 3, "cpu")
    assert order == list("ab") * 5 and {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def rows(text):
    return re.findall(r"^\| `(.+?)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)


def test_models_are_timed_side_by_side(capsys):
    main(["benchmark", "test_patnet", "test_patnet:folded", "test_ninformer", "--rounds", "2", "--batch", "3"])
    output = capsys.readouterr().out
    found = rows(output)
    assert [row[0] for row in found] == ["test_patnet", "test_patnet:folded", "test_ninformer"]
    median, fastest, rate, ratio = map(float, found[0][1:])
    assert ratio == 1 and fastest <= median and rate == pytest.approx(3000 / median, rel=0.05)
    assert "Batch 3" in output and "PyTorch" in output


def test_attention_layers_are_timed_side_by_side(capsys):
    main(["benchmark", "--attention", "14", "--dim", "48", "--heads", "4", "--rounds", "1"])
    names = [row[0] for row in rows(capsys.readouterr().out)]
    assert names == ["windows of 7", "HiLo, alpha 0.9", "HiLo, alpha 0.5", "spatial reduction by 2", "whole map"]


@pytest.mark.parametrize("arguments", [[], ["test_nat", "--attention", "7"]])
def test_neither_or_both_is_refused(arguments):
    with pytest.raises(SystemExit, match="either names of models or --attention"):
        main(["benchmark", *arguments])


def test_unknown_model_is_named():
    with pytest.raises(SystemExit, match="unknown model 'nat_x'; did you mean"):
        main(["benchmark", "nat_x"])
