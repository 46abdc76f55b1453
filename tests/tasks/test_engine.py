"""Overrides that change how a network is trained: launchers, compiled and recomputed networks, waits for data."""

import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401
from visionattn.tasks.engine import (
    accept_own_figures,
    compile_mode,
    lost_processes,
    machines,
    set_grad_checkpointing,
    strategy,
)
from visionattn.tasks.loaders import WaitClock


def torchrun(monkeypatch, world, local):
    for key, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", local)):
        monkeypatch.setenv(key, str(value))


def test_numbers_follow_from_torchrun_or_are_errors(monkeypatch):
    torchrun(monkeypatch, 8, 4)
    assert machines("auto", "auto", "gpu") == machines(4, 2, "gpu") == (4, 2)
    with pytest.raises(ValueError, match=r"trainer.devices=8.*torchrun started 4.*trainer.devices=4"):
        machines(8, "auto", "gpu")
    with pytest.raises(ValueError, match=r"trainer.num_nodes=3"):
        machines("auto", 3, "gpu")


def test_several_nodes_need_a_launcher(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match=r"num_nodes=2.*torchrun --nnodes=2"):
        machines(1, 2, "cpu")
    assert machines("auto", "auto", "cpu") == (1, 1)


@pytest.mark.parametrize("name", ["ddp", "ddp_find_unused_parameters_true", "fsdp"])
def test_timeout_is_that_of_the_processes(name):
    assert strategy(name, 2, "10m")._timeout == timedelta(minutes=10)


@pytest.mark.parametrize("timeout", [600, "0s", "10 m", "1.5h", "soon", False])
def test_other_timeouts_are_named(timeout):
    with pytest.raises(ValueError, match=rf"trainer.timeout={timeout} must be .*10m"):
        strategy("ddp", 2, timeout)


def test_timeout_of_one_process_and_of_other_strategies_is_refused():
    for name in ("auto", "single_device", "no such"):
        assert strategy(name, 1) == name
        with pytest.raises(ValueError, match=f"not of {name}"):
            strategy(name, 1, "10m")


@pytest.mark.parametrize(
    ("text", "processes", "expected"),
    [
        ("Application timeout caused pair closure", 2, ConnectionError),
        ("[pair.cc:538] Connection closed by peer [127.0.0.1]:1", 2, ConnectionError),
        ("[unbound_buffer.cc:81] Timed out waiting 10000ms for recv operation", 2, ConnectionError),
        ("Timed out after 11 seconds waiting for clients. 1/2 clients joined.", 2, ConnectionError),
        ("wait timeout after 10000ms, keys: /default_pg/0", 2, ConnectionError),
        ("Connection closed by peer", 1, RuntimeError),
        ("shape '[2]' is invalid", 2, RuntimeError),
        ("DataLoader timed out after 5 seconds", 2, RuntimeError),
    ],
)
def test_only_errors_of_lost_processes_are_said_in_one_line(tmp_path, text, processes, expected):
    killed = []
    trainer = SimpleNamespace(world_size=processes, global_rank=1)
    trainer.strategy = SimpleNamespace(launcher=SimpleNamespace(kill=killed.append))
    with pytest.raises(expected) as raised, lost_processes(trainer, "10m", tmp_path):
        raise RuntimeError(text)
    assert text in str(raised.value) and ("trainer.timeout=10m" in str(raised.value)) == bool(killed)
    assert bool(killed) == (expected is ConnectionError)


def test_advice_is_silent_on_own_figures_only():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        accept_own_figures()
        for name in ("lr", "val/loss", "lr2"):
            warnings.warn(f"It is recommended to use `self.log({name!r}, ..., sync_dist=True)` when", stacklevel=1)
    assert [str(warning.message).split("'")[1] for warning in seen] == ["val/loss", "lr2"]


def test_recomputed_blocks_have_the_same_gradients():
    model, images = timm.create_model("test_biformer", num_classes=3), torch.randn(2, 3, 64, 64)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        set_grad_checkpointing(model)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_networks_without_blocks_and_unknown_modes_are_named():
    with pytest.raises(ValueError, match="Linear and its parts"):
        set_grad_checkpointing(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"task.compile=fast.*default"):
        compile_mode("fast")
    assert compile_mode(True) == "default" and compile_mode(None) is None


def test_waits_are_counted_once():
    clock = WaitClock()
    assert clock.next(iter([5])) == 5
    assert clock.take() > 0 and clock.take() == 0
