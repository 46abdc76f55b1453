"""Training, validation, checkpoints and their resumption by mmengine's Runner, from the files in ``configs/mm``."""

import pytest
import torch
from made_up_mm import made_up_ade20k, made_up_coco, small_config, swap_backbone
from mmengine.runner import Runner

pytestmark = pytest.mark.mm

FILES = {
    "semantic_fpn": "biformer/semantic_fpn_biformer_s_80k_ade20k.py",
    "upernet": "overlock/upernet_overlock_t_160k_ade20k.py",
    "retinanet": "litv2/retinanet_litv2_s_1x_coco.py",
    "mask_rcnn": "nat/mask_rcnn_nat_mini_3x_coco.py",
}
SMALL = {
    "semantic_fpn": "test_biformer",
    "upernet": "test_davit",
    "retinanet": "test_litv2",
    "mask_rcnn": "test_nat",
}
BACKBONES = ("biformer_t", "litv2_s", "davit_t", "overlock_xt", "patnet_t2", "nat_mini")
SEGMENTERS = ("semantic_fpn", "upernet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    ade20k, coco = made_up_ade20k(root / "ade"), made_up_coco(root / "coco")
    return {architecture: ade20k if architecture in SEGMENTERS else coco for architecture in FILES}


def run(architecture, backbone, folder, work_dir, epochs=1, resume=False):
    config = small_config(FILES[architecture], folder, work_dir, epochs)
    swap_backbone(config, backbone)
    config.resume = resume
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


# one of each package; test_mm_configs builds the other two
FIRST = [
    pytest.param(a, b, marks=[] if a in ("upernet", "mask_rcnn") else pytest.mark.thorough) for a, b in SMALL.items()
]
EVERY = [pytest.param(a, b, marks=pytest.mark.thorough) for a in FILES for b in BACKBONES]


@pytest.mark.slow
@pytest.mark.parametrize("architecture, backbone", [*FIRST, *EVERY])
def test_run_is_resumed_from_its_checkpoint(architecture, backbone, folders, tmp_path):
    first = run(architecture, backbone, folders[architecture], tmp_path)
    losses = first.message_hub.get_scalar("train/loss").data[0]
    assert first.iter == 4 and torch.tensor(losses).isfinite().all()
    second = run(architecture, backbone, folders[architecture], tmp_path, epochs=2, resume=True)
    resumed = second.message_hub.get_scalar("train/loss").data[0]
    assert second.iter == 8
    assert list(resumed[: len(losses)]) == list(losses)  # the log goes on where the checkpoint has it
    metric = "mIoU" if architecture in SEGMENTERS else "coco/bbox_mAP"
    assert len(second.message_hub.get_scalar(f"val/{metric}").data[0])


def one_step(architecture, backbone, folder, work_dir):
    """Losses of a training step, the share of the backbone's tensors that it moved, and predictions of one image."""
    config = small_config(FILES[architecture], folder, work_dir)
    swap_backbone(config, backbone)
    runner = Runner.from_cfg(config)
    model, wrapper = runner.model.train(), runner.build_optim_wrapper(runner.optim_wrapper)
    batch = next(iter(runner.build_dataloader(runner._train_dataloader)))
    before = [parameter.detach().clone() for parameter in model.backbone.body.parameters()]
    losses = model.train_step(batch, wrapper)
    moved = [not torch.equal(x, y) for x, y in zip(before, model.backbone.body.parameters(), strict=True)]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    predictions = model.eval().test_step(next(iter(runner.build_dataloader(runner._val_dataloader))))
    return losses, sum(moved) / len(moved), predictions


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("architecture", FILES)
def test_every_backbone_learns_and_predicts(architecture, backbone, folders, tmp_path):
    losses, moved, predictions = one_step(architecture, backbone, folders[architecture], tmp_path)
    assert losses["loss"].isfinite() and moved > 0.9
    if architecture in SEGMENTERS:
        assert predictions[0].pred_sem_seg.data.shape[1:] == predictions[0].ori_shape
    else:
        assert predictions[0].pred_instances.bboxes.shape[1] == 4
