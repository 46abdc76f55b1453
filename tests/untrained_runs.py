"""Runs that nobody trained: the files that ``visionattn train`` leaves, with random weights."""

import json

import timm
import torch

from visionattn.tasks.networks import make_classifier
from visionattn.tasks.segmentation_data import make_network


def save_run(folder, hparams, network):
    """A run's folder with its best checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    weights = {f"model.{key}": x for key, x in network.state_dict().items()}
    torch.save(dict(hyper_parameters=hparams, state_dict=weights), folder / "checkpoints" / "best.ckpt")
    return folder


def classification_run(folder, name="test_biformer", classes=("cat", "dog", "owl"), in_chans=1, size=48, **arguments):
    """A classifier of grey images; its metrics say top-1 62.5 %."""
    model = dict(model_name=name, **arguments)
    network = make_classifier(model, len(classes), in_chans)
    data = dict(timm.data.resolve_model_data_config(network), input_size=[in_chans, size, size], mean=[0.4], std=[0.3])
    hparams = dict(classes=list(classes), in_chans=in_chans, model=model, data=data)
    save_run(folder, hparams, network)
    (folder / "metrics.json").write_text(json.dumps({"val/top1": 0.625, "val/top5": 1.0, "val/loss": 0.9}))
    return folder


def segmentation_run(folder, **model):
    """A network for masks of one class."""
    classes = ["background", "nucleus"]
    hparams = dict(
        task="segmentation",
        classes=classes,
        in_chans=1,
        model=model,
        data=dict(recipe="default", size=64),
        threshold=0.4,
        window=None,
        flips=False,
    )
    return save_run(folder, hparams, make_network(model, classes, 1))
