"""The order of an epoch: a source's own one, and the part of it that a resumed run still has to see."""

import numpy as np
import pytest

from visionattn.data.pipeline import EpochSampler


class Ordered:
    def __init__(self, size, wrong=0):
        self.size, self.wrong = size, wrong
        self.source = self

    def __len__(self):
        return self.size

    def epoch_order(self, epoch, seed):
        return np.random.default_rng((seed, epoch)).permutation(self.size + self.wrong)


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_source_orders_the_epoch_itself(world_size):
    data = Ordered(10)
    ranks = []
    for rank in range(world_size):
        sampler = EpochSampler(data, True, seed=5, rank=rank, world_size=world_size)
        sampler.set_epoch(2)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) == -(-10 // world_size)
    together = [key for keys in zip(*ranks, strict=True) for key in keys]
    assert [position for _, position, _ in together] == list(range(len(together)))
    order = data.epoch_order(2, 5).tolist()
    assert [i for _, _, i in together] == (order * 2)[: len(together)]
    assert all(type(i) is int for _, _, i in together)


def test_own_order_is_for_shuffled_epochs_only():
    assert [i for _, _, i in EpochSampler(Ordered(4), False)] == [0, 1, 2, 3]


def test_epochs_of_some_samples_go_on_in_the_own_order():
    data = Ordered(5)
    sampler, seen = EpochSampler(data, True, seed=1, samples=3), []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        seen += [i for _, _, i in sampler]
    assert seen == [i for number in range(3) for i in data.epoch_order(number, 1)]


def test_wrong_orders_are_refused():
    with pytest.raises(ValueError, match=r"11 images of 10"):
        list(EpochSampler(Ordered(10, wrong=1), True))
    with pytest.raises(ValueError, match=r"data.repeats=3"):
        EpochSampler(Ordered(10), True, repeats=3)


@pytest.mark.parametrize("samples", [None, 7])
@pytest.mark.parametrize("repeats", [1, 3])
def test_resumed_epoch_gives_the_rest_and_later_ones_all(samples, repeats):
    whole = EpochSampler(range(9), True, 3, repeats, samples=samples)
    part = EpochSampler(range(9), True, 3, repeats, samples=samples)
    part.resume(1, 4)
    assert len(part) == len(whole)
    for epoch, first in ((1, 4), (2, 0)):
        whole.set_epoch(epoch)
        part.set_epoch(epoch)
        assert list(part) == list(whole)[first:]
