# BiFormer's, https://github.com/rayleizhu/BiFormer: semantic_segmentation/configs/ade20k
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime_mmseg.py",
]
model = dict(
    backbone=dict(model_name="biformer_s", n_win=8, drop_path_rate=0.3, sync_bn=True),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
