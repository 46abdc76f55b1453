# PATNet's, https://github.com/haiduo/PartialNet: detection/configs/partialnet, where the widths are still FasterNet's
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_instance.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime_mmdet.py",
]
model = dict(
    backbone=dict(model_name="patnet_s", drop_path_rate=0.15),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
