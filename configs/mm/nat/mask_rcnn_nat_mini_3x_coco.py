# NAT's, https://github.com/SHI-Labs/Neighborhood-Attention-Transformer: detection/configs/nat
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_instance.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime_mmdet.py",
]
model = dict(
    backbone=dict(model_name="nat_mini", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(dataset=dict(pipeline={{_base_.multiscale_pipeline}}))
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "rpb": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
            "stem.2": dict(decay_mult=0.0),
            "downsample.1": dict(decay_mult=0.0),
        }
    ),
)
