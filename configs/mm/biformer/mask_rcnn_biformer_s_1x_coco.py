# BiFormer's, https://github.com/rayleizhu/BiFormer: object_detection/configs/coco
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_instance.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime_mmdet.py",
]
model = dict(
    backbone=dict(model_name="biformer_s", n_win=16, drop_path_rate=0.2, norm_eval=True),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
