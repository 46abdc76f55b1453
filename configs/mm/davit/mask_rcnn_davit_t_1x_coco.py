# DaViT's, https://github.com/dingmyu/davit: mmdet/configs
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_instance.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime_mmdet.py",
]
model = dict(
    backbone=dict(model_name="davit_t", drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
train_dataloader = dict(dataset=dict(pipeline={{_base_.multiscale_pipeline}}))
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
