# LITv2's, https://github.com/ziplab/LITv2: detection/configs/litv2; windows of 4 in the third stage
_base_ = [
    "../_base_/retinanet.py",
    "../_base_/coco_detection.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime_mmdet.py",
]
model = dict(
    backbone=dict(model_name="litv2_s", window_sizes=(0, 0, 4, 1), drop_path_rate=0.2, norm_indices=(1, 2, 3)),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale="dynamic", optimizer=dict(lr=1e-4, weight_decay=1e-4))
