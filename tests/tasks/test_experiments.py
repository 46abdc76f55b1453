"""Every experiment of the package composes, and its model, transforms and optimizer can be made."""

from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from timm.data import create_transform, resolve_model_data_config
from timm.scheduler import CosineLRScheduler
from torch import nn

import visionattn
from visionattn.cli import main
from visionattn.data.detection_transforms import DetectionTransform
from visionattn.data.grounding_pipeline import GroundingTransform
from visionattn.data.segmentation_transforms import SegmentationTransform
from visionattn.tasks.classification import Classification, scale_learning_rates
from visionattn.tasks.config import compose, config_folder
from visionattn.tasks.detection import Detection
from visionattn.tasks.detection_data import make_detector
from visionattn.tasks.grounding import Grounding
from visionattn.tasks.grounding_data import make_grounder
from visionattn.tasks.segmentation import Segmentation
from visionattn.tasks.segmentation_data import make_network
from visionattn.tasks.semantic import Semantic

FOLDER = config_folder() / "experiment"
EXPERIMENTS = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))
SETTINGS = dict(opt="sgd", weight_decay=0.0, layer_decay=None, warmup_epochs=0, warmup_lr=0.0, min_lr=0.0)
SETTINGS |= dict(smoothing=0.0, mixup=0.0, cutmix=0.0, ema_decay=None, ema_eval=False)


HEADS = {path.stem for path in (config_folder() / "model").glob("*.yaml") if "visionattn.heads." in path.read_text()}
CLASSES = [name for name in EXPERIMENTS if "override /task:" not in (FOLDER / f"{name}.yaml").read_text()]
MASKS = [name for name in EXPERIMENTS if "override /task: segmentation" in (FOLDER / f"{name}.yaml").read_text()]
SCENES = [name for name in EXPERIMENTS if "override /task: semantic" in (FOLDER / f"{name}.yaml").read_text()]
QUESTIONS = [name for name in EXPERIMENTS if "override /task: grounding" in (FOLDER / f"{name}.yaml").read_text()]

OBJECTS = [name for name in EXPERIMENTS if "override /task: detection" in (FOLDER / f"{name}.yaml").read_text()]


@pytest.mark.parametrize("name", OBJECTS)
def test_detection_experiment_can_be_made(name):
    config = compose([f"experiment={name}", *([] if name.startswith("embedded/") else ["data.root=somewhere"])])
    arguments = OmegaConf.to_container(config.model, resolve=True)
    model = make_detector({**arguments, "pretrained": False}, ["x"], config.data.in_chans)
    settings = OmegaConf.to_container(config.task, resolve=True)
    settings = {k: v for k, v in settings.items() if k not in ("_target_", "lr_batch")}
    assert Detection(model, num_classes=1, seed=0, hparams={}, **settings).masks == config.data.get("masks", False)
    DetectionTransform(**OmegaConf.to_container(config.data.transform, resolve=True))


@pytest.mark.parametrize("name", MASKS)
def test_segmentation_experiment_can_be_made(name):
    config = compose([f"experiment={name}", *([] if name.startswith("embedded/") else ["data.root=somewhere"])])
    arguments = OmegaConf.to_container(config.model, resolve=True)
    with torch.device("meta"):
        model = make_network(arguments, ["background", "x"], config.data.in_chans)
    settings = OmegaConf.to_container(config.task, resolve=True)
    settings = {k: v for k, v in settings.items() if k not in ("_target_", "lr_batch")}
    Segmentation(model, num_classes=1, seed=0, hparams={}, **settings)


@pytest.mark.parametrize("backbone", ["biformer_s", "davit_t", "overlock_xt"])
@pytest.mark.parametrize("name", SCENES)
def test_semantic_experiment_can_be_made_on_any_backbone(name, backbone):
    config = compose([f"experiment={name}", "data.root=somewhere", f"model.backbone={backbone}"])
    arguments = OmegaConf.to_container(config.model, resolve=True)
    with torch.device("meta"):
        model = make_network({**arguments, "pretrained": False}, [str(i) for i in range(150)], config.data.in_chans)
    settings = OmegaConf.to_container(config.task, resolve=True)
    settings = {k: v for k, v in settings.items() if k not in ("_target_", "lr_batch")}
    Semantic(model, num_classes=150, seed=0, hparams={}, **settings)
    SegmentationTransform(**OmegaConf.to_container(config.data.transform, resolve=True))
    # 80,000 or 160,000 steps of 16 images
    assert config.data.epoch_steps * config.trainer.max_epochs == 80_000 * (1 + (name == "ade20k/upernet"))
    processes = 8 if config.trainer.devices == "auto" else config.trainer.devices  # of the published recipe
    assert config.data.batch_size * processes == config.task.lr_batch == 16


@pytest.mark.parametrize("name", QUESTIONS)
def test_grounding_experiment_can_be_made(name):
    config = compose([f"experiment={name}", *([] if name.startswith("embedded/") else ["data.root=somewhere"])])
    arguments = OmegaConf.to_container(config.model, resolve=True)
    arguments = {**arguments, "pretrained": False, "text": dict(kind="words", vocabulary=["x"], dim=8)}
    with torch.device("meta"):
        model = make_grounder(arguments, config.data.in_chans)
    settings = OmegaConf.to_container(config.task, resolve=True)
    settings = {k: v for k, v in settings.items() if k not in ("_target_", "lr_batch")}
    Grounding(model, num_classes=1, seed=0, hparams={}, **settings)
    GroundingTransform(**OmegaConf.to_container(config.data.transform, resolve=True))


@pytest.mark.parametrize("name", CLASSES)
def test_experiment_can_be_made(name):
    embedded = name == "digits" or name.startswith("embedded/")
    config = compose([f"experiment={name}", *([] if embedded else ["data.root=somewhere"])])
    arguments = OmegaConf.to_container(config.model, resolve=True)
    del arguments["_target_"]
    model = timm.create_model(**{**arguments, "pretrained": False, "device": "meta"})
    size = config.data.transform.get("input_size", model.pretrained_cfg["input_size"])
    assert model.pretrained_cfg["input_size"] == tuple(size) or not model.pretrained_cfg.get("fixed_input_size")
    given = OmegaConf.to_container(config.data.transform, resolve=True)
    interpolation = given.pop("train_interpolation", None)
    defaults = {k: v for k, v in resolve_model_data_config(model).items() if k in ("input_size", "mean", "std")}
    create_transform(**{**defaults, "interpolation": interpolation or "bicubic", **given}, is_training=True)


def test_every_published_model_has_a_configuration_and_a_recipe():
    models = {path.stem for path in (config_folder() / "model").glob("*.yaml")}
    assert models - HEADS == set(visionattn.list_models())
    published = {name for name in models - HEADS if timm.models.get_pretrained_cfg(name).url}
    assert published <= {Path(name).name for name in EXPERIMENTS}


class Two(nn.Module):
    """A model with an auxiliary output in training, and a parameter that learns more slowly."""

    def __init__(self):
        super().__init__()
        self.main, self.aux = nn.Linear(4, 3), nn.Linear(4, 3)

    def lr_scales(self):
        return {"aux.weight": 0.01}

    def forward(self, x):
        return (self.main(x), self.aux(x)) if self.training else self.main(x)


def test_auxiliary_output_adds_its_loss():
    task = Classification(Two(), 3, seed=0, epochs=1, lr=0.1, aux_weight=0.4, hparams={}, **SETTINGS)
    task.log = lambda *args, **kwargs: None
    task._trainer = type("Trainer", (), dict(current_epoch=0, global_rank=0))()
    x, label = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    loss = task.training_step(dict(image=x, label=label), 0)
    main, aux = (nn.functional.cross_entropy(layer(x), label) for layer in (task.model.main, task.model.aux))
    assert loss.item() == pytest.approx((main + 0.4 * aux).item())


@pytest.mark.parametrize("layer_scale", [1.0, 0.5])
def test_parameters_keep_their_own_learning_rate(layer_scale):
    model = Two()
    optimizer = torch.optim.SGD([dict(params=list(model.parameters()), lr_scale=layer_scale)], lr=1.0)
    scale_learning_rates(optimizer, model)
    CosineLRScheduler(optimizer, t_initial=10, warmup_t=2, warmup_lr_init=0.0).step(2)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == 4
    full = rates[model.main.weight]
    assert (
        full == rates[model.aux.bias] == pytest.approx(layer_scale * optimizer.param_groups[0]["initial_lr"], rel=0.1)
    )
    assert rates[model.aux.weight] == pytest.approx(0.01 * full)


@pytest.mark.slow
def test_several_models_give_one_table(tmp_path, capsys):
    changes = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=2"]
    models = ["~models", "+models={a:['model=test_biformer'],b:['model=test_litv2','task.lr=1.0e-3']}"]
    main(["train", "experiment=embedded/all", *models, f"output_dir={tmp_path}", *changes])
    report = (tmp_path / "embedded" / "report.md").read_text()
    assert report in capsys.readouterr().out
    for name in ("nearest neighbour", "| a | 0.", "| b | 0.", "edgenext_xx_small"):
        assert name in report
    with pytest.raises(SystemExit, match="models is for the embedded digits"):
        main(["train", "experiment=embedded/all", "data=folder", f"data.root={tmp_path}", f"output_dir={tmp_path}"])
