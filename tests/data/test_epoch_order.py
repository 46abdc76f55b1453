"""The order of an epoch: a source's own one, and the part of it that a resumed run still has to see."""

import numpy as np
import pytest

from visionattn.data.pipeline import EpochSampler


class Ordered:
    """A source of numbers, each process's share one stretch of a permutation."""

    def __init__(self, size):
        self.size = size
        self.source = self

    def __len__(self):
        return self.size

    def epoch_order(self, epoch, seed, rank, world_size):
        if epoch is None:
            return range(rank * self.size // world_size, (rank + 1) * self.size // world_size)
        length = -(-self.size // world_size)
        order = np.random.default_rng((seed, epoch)).permutation(self.size)
        return np.resize(order, length * world_size)[rank * length : (rank + 1) * length].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_source_orders_the_epoch_itself(world_size):
    data = Ordered(10)
    positions = set()
    for rank in range(world_size):
        sampler = EpochSampler(data, True, seed=5, rank=rank, world_size=world_size)
        sampler.set_epoch(2)
        keys = list(sampler)
        assert len(keys) == len(sampler) == -(-10 // world_size)
        assert [i for _, _, i in keys] == data.epoch_order(2, 5, rank, world_size)
        positions |= {position for _, position, _ in keys}
    assert positions == set(range(-(-10 // world_size) * world_size))


def test_unshuffled_pass_has_every_image_once():
    shares = [[i for _, _, i in EpochSampler(Ordered(5), False, rank=rank, world_size=2)] for rank in range(2)]
    assert shares == [[0, 1], [2, 3, 4]]
    assert [len(EpochSampler(Ordered(5), False, rank=rank, world_size=2)) for rank in range(2)] == [2, 3]


def test_epochs_of_some_samples_go_on_in_the_own_order():
    data = Ordered(5)
    sampler, seen = EpochSampler(data, True, seed=1, samples=3), []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        seen += [i for _, _, i in sampler]
    assert seen == [i for number in range(3) for i in data.epoch_order(number, 1, 0, 1)]


def test_repeated_images_stay_side_by_side_in_the_own_order():
    data = Ordered(10)
    found = [i for _, _, i in EpochSampler(data, True, seed=1, repeats=3)]
    assert found == np.repeat(data.epoch_order(0, 1, 0, 1), 3).tolist()[:10]


@pytest.mark.parametrize("samples", [None, 7])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("data", [range(9), Ordered(9)], ids=["plain", "ordered"])
def test_resumed_epoch_gives_the_rest_and_later_ones_all(data, samples, repeats):
    whole = EpochSampler(data, True, 3, repeats, samples=samples)
    part = EpochSampler(data, True, 3, repeats, samples=samples)
    part.resume(1, 4)
    assert len(part) == len(whole)
    for epoch, first in ((1, 4), (2, 0)):
        whole.set_epoch(epoch)
        part.set_epoch(epoch)
        assert list(part) == list(whole)[first:]
