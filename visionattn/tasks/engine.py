"""What one override changes about how a network is trained: compiled, checkpointed, sharded, on many machines."""

import os
import re
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from visionattn.tasks.callbacks import TIMINGS
from visionattn.tasks.stopping import parse_duration

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_BLOCK = re.compile(r"(^|\.)blocks\.\d+$")  # timm's name of the residual blocks of a stage
_LOST = re.compile(  # as gloo and the store of a process group say it
    r"timed out (after \d+ seconds )?waiting|(wait|socket|application) timeout|connection (closed|reset)|broken pipe",
    re.IGNORECASE,
)


def compile_mode(value: str | bool | None) -> str | None:
    """The mode of ``torch.compile`` that ``task.compile`` asks for.

    Args:
        value: A mode, true for the default one, false or None for none.

    Raises:
        ValueError: Another mode.
    """
    if value is None or value is False:
        return None
    mode = "default" if value is True else str(value)
    if mode not in COMPILE_MODES:
        raise ValueError(f"task.compile={value} must be null or one of {', '.join(COMPILE_MODES)}")
    return mode


def set_grad_checkpointing(model: nn.Module) -> None:
    """Let blocks forget what they computed and compute it again in the backward pass.

    "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174.

    Args:
        model: Anything with timm's ``set_grad_checkpointing``, or with parts that have it.

    Raises:
        ValueError: Neither it nor a part of it can.
    """
    if _checkpoint_parts(model) == 0:
        raise ValueError(
            f"task.grad_checkpointing=true: {type(model).__name__} and its parts have no set_grad_checkpointing; "
            f"expected a backbone of timm; set task.grad_checkpointing=false, or a smaller data.batch_size with "
            f"trainer.accumulate_grad_batches"
        )


def _checkpoint_parts(module: nn.Module) -> int:
    method = getattr(module, "set_grad_checkpointing", None)
    if method is not None:
        try:
            method(True)
        except (AssertionError, NotImplementedError, AttributeError):  # how models of timm say that they cannot
            return 0
        return 1
    return sum(_checkpoint_parts(child) for child in module.children())


def compile_network(model: nn.Module, mode: str, entry_points: Sequence[str] = ("forward",)) -> None:
    """``torch.compile`` of a network in place, which renames no parameter.

    Args:
        model: The network.
        mode: One of ``COMPILE_MODES``.
        entry_points: Its methods that are called from outside.
    """
    for name in entry_points:
        if name == "forward":
            model.compile(mode=mode)
        else:
            setattr(model, name, torch.compile(getattr(model, name), mode=mode))


def shard(model: nn.Module, mesh: Any, entry_points: Sequence[str] = ("forward",)) -> None:
    """Split parameters, gradients and the optimizer's state among processes, block by block, and the rest as one.

    "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", https://arxiv.org/abs/2304.11277.

    Args:
        model: The network; its state dict keeps its keys.
        mesh: One-dimensional device mesh of the processes.
        entry_points: Methods that are called from outside, which gather the parameters first.
    """
    for name, module in reversed(list(model.named_modules())):
        if _BLOCK.search(name):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in entry_points:
        if name != "forward":  # FSDP's own
            register_fsdp_forward_method(model, name)


def launched(environment: Mapping[str, str] = os.environ) -> tuple[str, int, int] | None:
    """Who started this process as one of several: ``torchrun`` or ``srun``, processes of a node, and nodes.

    Args:
        environment: Environment variables.

    Returns:
        None if nobody did, so that Lightning starts the processes of this machine.

    Raises:
        ValueError: Nodes with different numbers of processes.
    """
    if TorchElasticEnvironment.detect():
        world, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        name = "torchrun"
    elif SLURMEnvironment.detect():
        world = int(environment["SLURM_NTASKS"])
        local = world // int(environment.get("SLURM_NNODES", "1"))
        name = "srun"
    else:
        return None
    if local < 1 or world % local:
        raise ValueError(f"{name} started {world} processes, not as many on every node; expected equal numbers")
    return name, local, world // local


def machines(devices: Any, num_nodes: Any, accelerator: str) -> tuple[Any, int]:
    """Processes of a node and number of nodes: what the launcher started, or what the configuration says.

    Args:
        devices: ``trainer.devices``; ``"auto"`` is what the launcher started on each node, or all GPUs (one CPU).
        num_nodes: ``trainer.num_nodes``; ``"auto"`` is what the launcher started, or 1.
        accelerator: ``trainer.accelerator``.

    Raises:
        ValueError: Either says something else than the launcher did; several nodes and no launcher.
    """
    found = launched()
    if found is None:
        nodes = 1 if num_nodes == "auto" else int(num_nodes)
        if nodes > 1 and "MASTER_ADDR" not in os.environ:
            raise ValueError(
                f"trainer.num_nodes={nodes}, but nothing started this command on several nodes; start it on each "
                f"through torchrun --nnodes={nodes} -m visionattn.cli train ..., or through srun"
            )
        if devices == "auto":
            devices = 1 if accelerator == "cpu" else max(torch.cuda.device_count(), 1)
        return devices, nodes
    name, local, nodes = found
    count = len(devices) if isinstance(devices, list | tuple) else devices
    for key, given, started in (("devices", count, local), ("num_nodes", num_nodes, nodes)):
        if given not in ("auto", started, -1):
            raise ValueError(
                f"trainer.{key}={given}, but {name} started {local} processes on each of {nodes} nodes; "
                f"set trainer.{key}={started} or auto, or start it otherwise"
            )
    return (devices if isinstance(devices, list | tuple) else local), nodes


def check_options(trainer: Mapping[str, Any], task: Mapping[str, Any], count: int) -> None:
    """Refuse options of the groups ``trainer`` and ``task`` that exclude each other.

    Args:
        trainer: The group.
        task: The group.
        count: Processes on all machines; with one SyncBN is BatchNorm.

    Raises:
        ValueError: SyncBN of several processes on CPUs; averaged weights or channels last of a sharded network.
    """
    if trainer.get("sync_batchnorm") and trainer["accelerator"] == "cpu" and count > 1:
        raise ValueError("trainer.sync_batchnorm=true needs GPUs; set trainer=ddp, or trainer.sync_batchnorm=false")
    if trainer.get("strategy") == "fsdp" and task.get("ema_decay"):
        raise ValueError(
            f"task.ema_decay={task['ema_decay']} keeps whole averaged weights, which a sharded network cannot "
            f"update; set task.ema_decay=null, or trainer=ddp"
        )
    if trainer.get("strategy") == "fsdp" and task.get("channels_last"):
        raise ValueError(
            "task.channels_last=true: PyTorch shards only weights that lie in memory in the order of their axes; set "
            "task.channels_last=false, or trainer=ddp"
        )


def processes(devices: Any) -> int:
    """Processes of one machine that ``devices`` of Lightning asks for: a number, a list, or -1 for all GPUs."""
    if isinstance(devices, list | tuple):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    return torch.cuda.device_count() if int(devices) == -1 else int(devices)


def strategy(name: str, processes: int, timeout: Any = None) -> Any:
    """``trainer.strategy`` for Lightning: ``"fsdp"`` shards over all processes, other names are Lightning's own.

    A checkpoint is one file of whole tensors either way. Lightning's own ``"fsdp"`` is the older wrapper, which renames
    parameters and refuses CPUs.

    Args:
        name: The strategy.
        processes: On all machines.
        timeout: ``trainer.timeout``, how long a process waits for the others: ``"90s"``, ``"10m"`` or ``"2h"``; None
            for Lightning's 30 minutes.

    Raises:
        ValueError: Another timeout; one for a strategy that has none.
    """
    limit = {} if timeout is None else dict(timeout=timedelta(seconds=parse_duration(timeout) or 0))
    if limit and not limit["timeout"]:
        raise ValueError(f"trainer.timeout={timeout} must be seconds (90s), minutes (10m), hours (2h), or null")
    if name == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False, **limit
        )
    if not limit:
        return name
    entry = dict(StrategyRegistry).get(name, {})  # its own get would build the strategy
    if entry.get("strategy") is not DDPStrategy:
        raise ValueError(
            f"trainer.timeout={timeout} is how long processes of trainer.strategy=ddp or fsdp wait for each other, not "
            f"of {name}; set one of them, or trainer.timeout=null"
        )
    return DDPStrategy(**entry["init_params"], **limit)


def accept_own_figures() -> None:
    """Silence Lightning's advice to average over all processes what the first logs alone on purpose."""
    names = (*TIMINGS, "lr", "val/threshold", "val/dice_at_half")
    warnings.filterwarnings("ignore", rf"It is recommended to use `self\.log\('({'|'.join(names)})'")


@contextmanager
def lost_processes(trainer: Any, timeout: Any, path: Any) -> Iterator[None]:
    """Say in one line that another process died or did not answer, and leave none behind that Lightning started here.

    Under NCCL the process group ends its process itself, with lines of its own.

    Args:
        trainer: Lightning's.
        timeout: ``trainer.timeout``.
        path: The last checkpoint.

    Raises:
        ConnectionError: A process was lost.
    """
    try:
        yield
    except RuntimeError as error:
        if trainer.world_size == 1 or not _LOST.search(str(error)):
            raise
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)  # a process that hangs heeds nothing else
        raise ConnectionError(
            f"process {trainer.global_rank} of {trainer.world_size} lost another one, which died (its own output says "
            f"why) or did not answer within trainer.timeout={timeout or '30m'} (raise that if it was only slow); end "
            f"what is left of the run and start it again with ckpt_path=auto, from {path} if it is there "
            f"({str(error).splitlines()[0]})"
        ) from error
