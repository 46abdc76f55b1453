"""Small COCO and ADE20K folders in the published layouts, and configurations of ``configs/mm`` cut down to them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
from mmengine.config import Config
from PIL import Image

import visionattn.integrations.mm  # noqa: F401  (registers the models and completes mmcv)

CONFIGS = Path(__file__).parent.parent / "configs" / "mm"
SIDE = 64  # of the images that the networks see
COUNTS = {"train": 8, "val": 2}
# of channels, candidates and samples in necks and heads
FEWER = {128: 16, 256: 16, 512: 16, 1000: 50, 1024: 32, 2000: 50}


def boxes(random: np.random.Generator) -> Iterator[tuple[int, int, int, int]]:
    """x, y, width, height of the bright rectangles of one picture."""
    for _ in range(2):
        width, height = random.integers(20, 44, 2)
        yield int(random.integers(0, 80 - width)), int(random.integers(0, 72 - height)), int(width), int(height)


def picture(random: np.random.Generator, found: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Noise with bright rectangles, ``[72, 80, 3]``."""
    pixels = random.integers(0, 100, (72, 80, 3), dtype=np.uint8)
    for x, y, width, height in found:
        pixels[y : y + height, x : x + width] += 120
    return pixels


def made_up_coco(root: Path) -> Path:
    """``train2017``, ``val2017`` and ``annotations`` with boxes and polygons of the first two of 80 classes."""
    from mmdet.datasets import CocoDataset  # after visionattn.integrations.mm, without which it does not import

    random = np.random.default_rng(0)
    categories = [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO["classes"], start=1)]
    (root / "annotations").mkdir(parents=True)
    for split, count in COUNTS.items():
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(count):
            found = list(boxes(random))
            Image.fromarray(picture(random, found)).save(root / f"{split}2017" / f"{i:012d}.jpg")
            images.append(dict(id=i, file_name=f"{i:012d}.jpg", height=72, width=80))
            for j, (x, y, width, height) in enumerate(found):
                polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=i,
                        category_id=categories[j]["id"],
                        bbox=[x, y, width, height],
                        area=width * height,
                        segmentation=[polygon],
                        iscrowd=0,
                    )
                )
        labels = dict(images=images, annotations=annotations, categories=categories)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(labels))
    return root


def made_up_ade20k(root: Path) -> Path:
    """``images`` and ``annotations`` below ``training`` and ``validation``; 0 in a map is no class."""
    random = np.random.default_rng(0)
    for split, count in {"training": COUNTS["train"], "validation": COUNTS["val"]}.items():
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            found, labels = list(boxes(random)), np.zeros((72, 80), np.uint8)
            for label, (x, y, width, height) in enumerate(found, start=1):
                labels[y : y + height, x : x + width] = label
            Image.fromarray(picture(random, found)).save(root / "images" / split / f"{i:08d}.jpg")
            Image.fromarray(labels).save(root / "annotations" / split / f"{i:08d}.png")
    return root


def shrink(node: Any) -> None:
    """Every size of images and crops below a part of a configuration becomes ``SIDE``."""
    children = list(node.values()) if isinstance(node, dict) else list(node) if isinstance(node, list | tuple) else []
    for child in children:
        shrink(child)
    if isinstance(node, dict):
        for key in ("scale", "crop_size", "size"):
            if isinstance(node.get(key), list | tuple):
                node[key] = (SIDE, SIDE)
        if node.get("type") == "RandomChoiceResize":
            node["scales"] = [(SIDE, SIDE)]


def narrow(node: Any) -> Any:
    """A part of a configuration with fewer channels, candidates and samples."""
    if isinstance(node, dict):
        return {key: value if key == "backbone" else narrow(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(narrow(value) for value in node)
    return FEWER.get(node, node) if isinstance(node, int) else node


def swap_backbone(config: Config, name: str, **kwargs: Any) -> None:
    """Another backbone in a configuration, with the channels that necks and heads need."""
    config.model.backbone = dict(type="VisionAttn", model_name=name, **kwargs)
    channels = timm.create_model(name, features_only=True).feature_info.channels()
    if "neck" in config.model:
        config.model.neck.in_channels = channels
    else:
        config.model.decode_head.in_channels = channels
        config.model.auxiliary_head.in_channels = channels[2]


def small_config(file: str, data: Path, work_dir: Path, epochs: int = 1) -> Config:
    """A file of ``configs/mm`` for the made-up folders, on a CPU: batches of two, four of them an epoch."""
    config = Config.fromfile(CONFIGS / file)
    shrink(config.train_dataloader)
    shrink(config.val_dataloader)
    config.model = narrow(config.model)
    shrink(config.model.data_preprocessor)
    config.merge_from_dict({"optim_wrapper.type": "OptimWrapper", "work_dir": str(work_dir)})
    config.optim_wrapper.pop("loss_scale", None)  # there is no automatic mixed precision on a CPU
    for split in ("train", "val"):
        loader = config[f"{split}_dataloader"]
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data)
    config.train_dataloader.batch_size = 2
    if config.train_cfg.type == "IterBasedTrainLoop":
        config.train_cfg.update(max_iters=4 * epochs, val_interval=4)
        config.default_hooks.checkpoint.interval = 4
    else:
        config.train_cfg.max_epochs = epochs
        boxes_test = config.model.test_cfg.get("rcnn", config.model.test_cfg)
        boxes_test.score_thr = 0.0  # there is no metric without a prediction
        config.val_evaluator.ann_file = str(data / "annotations" / "instances_val2017.json")
    config.test_dataloader, config.test_evaluator = config.val_dataloader, config.val_evaluator
    config.experiment_name = f"{work_dir.name}_{epochs}"  # runs of one process share their logs by this name
    config.default_hooks.logger.interval = 1
    return config
