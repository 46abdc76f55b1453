"""One training run from a composed configuration: data, task, trainer, and the files beside the checkpoints."""

import json
import math
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning
import timm
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import visionattn
from visionattn._writing import remove_stale
from visionattn.data.images import check_channels
from visionattn.data.pipeline import collate, samples_of
from visionattn.tasks.callbacks import EpochLines, SkippedImages
from visionattn.tasks.classification import check_pairs
from visionattn.tasks.config import check_numbers, write_text
from visionattn.tasks.engine import accept_own_figures, check_options, lost_processes, machines, processes, strategy
from visionattn.tasks.finetuning import continued, load_start
from visionattn.tasks.kinds import KINDS, function
from visionattn.tasks.loaders import EpochData
from visionattn.tasks.networks import arguments_of, make_classifier
from visionattn.tasks.resuming import check_fit, check_monitor, goes_on, read_saved, starting_point
from visionattn.tasks.saving import DurableCheckpointIO
from visionattn.tasks.stopping import EpochCheckpoint, EpochStopping, LastCheckpoint
from visionattn.tasks.training import Training


class ImageData(EpochData):
    """Loaders of the training and validation split.

    Args:
        config: The ``data`` group.
        train: Source of training images.
        val: Source of validation images.
        defaults: Data configuration of the model (size, mean, std, interpolation, crop).
        seed: Seed of the run.
    """

    def __init__(self, config: dict[str, Any], train: Any, val: Any, defaults: dict[str, Any], seed: int):
        given = dict(config["transform"])
        fixed = {k: given.pop(k, v) for k, v in defaults.items()}
        sized = {k: fixed[k] for k in ("input_size", "mean", "std", "interpolation")}
        kwargs = dict(seed=seed, on_error=config["on_error"])
        # images may be resized in a random way for training only
        sized["interpolation"] = given.pop("train_interpolation", sized["interpolation"])
        augmented = samples_of(train, create_transform(**sized, **given, is_training=True), **kwargs)
        plain = samples_of(val, create_transform(**fixed, is_training=False), replace=False, **kwargs)
        super().__init__(config, augmented, plain, collate, seed)
        self.data_config = fixed


def _monitor(config: DictConfig, monitors: tuple[str, ...]) -> str:
    monitor = config.monitor or monitors[0]
    if monitor not in monitors:
        raise ValueError(f"monitor={monitor} must be one of {', '.join(monitors)}")
    return monitor


def _trainer(config: DictConfig, folder: Path, monitor: str) -> lightning.Trainer:
    mode = "min" if monitor.endswith(("loss", "delta")) else "max"
    group: Any = OmegaConf.to_container(config.trainer, resolve=True)
    devices, nodes = machines(group.get("devices", "auto"), group.get("num_nodes", "auto"), group["accelerator"])
    check_options(group, config.task, processes(devices) * nodes)
    callbacks = [
        EpochCheckpoint(folder / "checkpoints", "best", monitor=monitor, mode=mode),
        # of its own, since save_last of the former would leave out every epoch that is not the best so far; behind it,
        # so that a resumed run knows the best score
        EpochCheckpoint(folder / "checkpoints", "last"),
        SkippedImages(folder),
        EpochLines(),
        LastCheckpoint(folder, config.checkpoint_every, group.pop("max_steps", None), group.pop("max_time", None)),
    ]
    if config.patience is not None:
        if group.get("limit_val_batches") == 0:
            raise ValueError(
                f"patience={config.patience} waits for a better validation score, and trainer.limit_val_batches=0 "
                f"leaves none; set patience=null, or validate"
            )
        # an undefined score is no better one, but no reason to stop either
        stopping = EpochStopping(monitor, mode=mode, patience=config.patience, check_finite=False)
        callbacks.append(stopping)
    terminal = sys.stdout.isatty()
    if terminal:
        callbacks.append(RichProgressBar())
    return hydra.utils.instantiate(
        {k: v for k, v in group.items() if k not in ("devices", "num_nodes", "strategy", "timeout")},
        devices=devices,
        num_nodes=nodes,
        strategy=strategy(group.get("strategy", "auto"), processes(devices) * nodes, group.get("timeout")),
        default_root_dir=str(folder),
        callbacks=callbacks,
        plugins=[DurableCheckpointIO()],
        logger=list(hydra.utils.instantiate(config.logger).values()),
        enable_progress_bar=terminal,
        use_distributed_sampler=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _prepare(folder: Path, resumed: bool) -> None:
    """Make room for the files of a run; called when data, settings and checkpoint have proved usable."""
    for place in (folder, folder / "checkpoints"):
        remove_stale(place)
    if not resumed:
        for name in ("checkpoints", "logs", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("skipped_images.txt", "metrics.json"):
            if (file := folder / name).is_file():
                file.unlink()
    elif (log := folder / "logs" / "metrics.csv").is_file():  # the logger would begin it anew
        log.rename(log.with_name(f"metrics_before_{len(list(log.parent.glob('*.csv')))}.csv"))


def _prepare_images(config: DictConfig, source: Any, val: Any) -> tuple[nn.Module, ImageData, dict[str, Any], int]:
    """Network, loaders, what the checkpoint keeps of them, and the number of classes, of a classification run."""
    arguments: Any = OmegaConf.to_container(config.model, resolve=True)
    check_pairs(config.task, min(config.data.batch_size, len(source)))
    model = make_classifier(arguments, len(source.classes), config.data.in_chans)
    load_start(model, config, source.classes)
    defaults = resolve_model_data_config(model)
    data = ImageData(OmegaConf.to_container(config.data, resolve=True), source, val, defaults, config.seed)
    kept = dict(
        model={k: v for k, v in arguments.items() if k != "pretrained"},
        data={k: list(v) if isinstance(v, tuple) else v for k, v in data.data_config.items()},
    )
    return model, data, kept, len(source.classes)


def _task(config: DictConfig, model: nn.Module, num_classes: int, hparams: dict[str, Any], count: int) -> Training:
    """The training of a network in that many processes, its learning rate scaled to their batch."""
    batch = config.data.batch_size * count * config.trainer.accumulate_grad_batches
    lr = config.task.lr * batch / config.task.lr_batch
    rank_zero_info(
        f"effective batch {batch}, learning rate {config.task.lr:g} x {batch}/{config.task.lr_batch} = {lr:g}"
    )
    settings = {
        k: v
        for k, v in OmegaConf.to_container(config.task, resolve=True).items()
        if k not in ("_target_", "lr", "lr_batch")
    }
    task_class = hydra.utils.get_class(config.task._target_)
    with arguments_of("task"):
        return task_class(model=model, num_classes=num_classes, seed=config.seed, lr=lr, hparams=hparams, **settings)


def train(config: DictConfig) -> dict[str, float]:
    """Train, and write checkpoints, metrics and the resolved configuration to ``output_dir/name``.

    Args:
        config: ``configs/train.yaml`` with its groups.

    Returns:
        Metrics of the last epoch; empty in every process but the first.

    Raises:
        ValueError: Settings that do not fit each other, the data or the checkpoint.
        FileNotFoundError: Missing data or checkpoint.
        SavingError: The disk is full, or the folder cannot be written to; former checkpoints are intact.
    """
    check_numbers(config)
    folder = Path(config.output_dir, config.name)
    start = starting_point(config, folder)
    resumed = goes_on(start, folder)
    lightning.seed_everything(config.seed, verbose=False)
    config = continued(config)
    source = hydra.utils.instantiate(config.data.source, split=config.data.train_split)
    # a folder's validation labels must count the training split's classes
    counted = config.data.source._target_.endswith(("ImageFolder", ".Shards"))
    known = dict(classes=source.classes) if counted else {}
    val = hydra.utils.instantiate(config.data.source, split=config.data.val_split, **known)
    saved = read_saved(start, source.classes) if start else {}
    check_channels(config.data.in_chans)
    task_class = hydra.utils.get_class(config.task._target_)
    if config.start_from and task_class.kind in KINDS:
        raise ValueError(f"start_from={config.start_from} is for classification, not for task={task_class.kind}")
    monitor = _monitor(config, task_class.monitors)
    prepare = function(KINDS[task_class.kind].prepare) if task_class.kind in KINDS else _prepare_images
    with arguments_of("data"):  # of the transforms; those of the network are named where it is made
        model, data, kept, num_classes = prepare(config, source, val)
    trainer = _trainer(config, folder, monitor)
    hparams = dict(
        classes=source.classes,
        in_chans=config.data.in_chans,
        **kept,
        averaged=bool(config.task.ema_decay and config.task.ema_eval),
        versions=dict(torch=str(torch.__version__), timm=timm.__version__, visionattn=visionattn.__version__),
    )
    task = _task(config, model, num_classes, hparams, trainer.world_size)
    if start:
        batches = dict(batch_size=config.data.batch_size, world_size=trainer.world_size)
        check_fit(start, saved, task, config.trainer.max_epochs, batches)
        if resumed:
            check_monitor(start, saved, monitor)
        del saved  # it may be large, and is read again
    if trainer.is_global_zero:
        _prepare(folder, resumed)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
        write_text(folder / "run.json", json.dumps(dict(command=sys.argv, seed=config.seed, **hparams), indent=1))
    # the averaged copy of the model stays in evaluation mode; the other is about Lightning's own code
    warnings.filterwarnings("ignore", message="Found .* module.* in eval mode")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    accept_own_figures()
    with lost_processes(trainer, config.trainer.get("timeout"), folder / "checkpoints" / "last.ckpt"):
        trainer.fit(task, data, ckpt_path=start, weights_only=True)
    if not trainer.is_global_zero:
        return {}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if not metrics:  # nothing was left to train: those that are there stay
        return metrics
    known = {name: None if math.isnan(value) else value for name, value in metrics.items()}
    write_text(folder / "metrics.json", json.dumps(known, indent=1))
    return metrics
