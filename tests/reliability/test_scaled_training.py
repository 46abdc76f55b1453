"""The same training in other shapes: accumulated batches, two processes, sharded weights."""

import pytest
import torch
from processes import finish, make_pictures, start_ranks, training

from visionattn.cli import main
from visionattn.tasks.inference import load_run

# no BatchNorm, no choice that depends on the batch, and steps that do not hide the scale of a gradient as Adam's do
PLAIN = ["model=test_nat", "+model.drop_path_rate=0", "task.mixup=0", "task.cutmix=0", "task.opt=sgd"]
PLAIN += ["task.ema_decay=null", "trainer.max_epochs=2"]
PLAIN += ["task.lr=0.1", "task.lr_batch=16", "task.warmup_epochs=0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """One process, batches of 16."""
    folder = tmp_path_factory.mktemp("whole")
    main(training(pictures, folder, "x", *PLAIN, "data.batch_size=16", "trainer.accumulate_grad_batches=1"))
    return weights(folder / "x")


def test_accumulated_batches_equal_the_large_batch(pictures, whole, tmp_path):
    main(training(pictures, tmp_path, "x", *PLAIN, "data.batch_size=4", "trainer.accumulate_grad_batches=4"))
    assert_close(whole, weights(tmp_path / "x"))
    main(training(pictures, tmp_path, "other", *PLAIN, "data.batch_size=4", "trainer.accumulate_grad_batches=1"))
    with pytest.raises(AssertionError):
        assert_close(whole, weights(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.thorough)])
def test_two_processes_equal_one(pictures, whole, tmp_path, strategy):
    changes = ["data.batch_size=8", "trainer.accumulate_grad_batches=1", "trainer.devices=2"]
    arguments = training(pictures, tmp_path, "x", *PLAIN, *changes, f"+trainer.strategy={strategy}")
    for rank, process in enumerate(start_ranks(arguments, tmp_path)):
        finish(process, tmp_path / f"rank{rank}.log")
    assert_close(whole, weights(tmp_path / "x"))
    assert load_run(tmp_path / "x").classes == ["cat", "dog"]  # a checkpoint like any other
