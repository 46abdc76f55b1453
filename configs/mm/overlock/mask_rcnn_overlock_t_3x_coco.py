# OverLoCK's, https://github.com/LMMMEng/OverLoCK: detection/configs/maskrcnn_overlock
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_instance.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime_mmdet.py",
]
model = dict(
    backbone=dict(model_name="overlock_t", drop_path_rate=0.2, overview=True, sync_bn=True),
    neck=dict(in_channels=[64, 128, 384, 640]),
)
train_dataloader = dict(dataset=dict(pipeline={{_base_.multiscale_pipeline}}))
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
