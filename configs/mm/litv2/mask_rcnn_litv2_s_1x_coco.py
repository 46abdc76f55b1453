# LITv2's, https://github.com/ziplab/LITv2: detection/configs/litv2; windows of 2 in the third stage
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_instance.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime_mmdet.py",
]
model = dict(
    backbone=dict(model_name="litv2_s", drop_path_rate=0.2, norm_indices=(1, 2, 3)),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(lr=2e-4, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0), "downsample.1": dict(decay_mult=0.0)}),
)
