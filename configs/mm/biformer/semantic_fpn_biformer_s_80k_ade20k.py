# BiFormer's, https://github.com/rayleizhu/BiFormer: semantic_segmentation/configs/ade20k
_base_ = [
    "../_base_/semantic_fpn.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_80k.py",
    "../_base_/runtime_mmseg.py",
]
model = dict(
    backbone=dict(model_name="biformer_s", n_win=8, drop_path_rate=0.15, sync_bn=True),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(batch_size=4)
val_dataloader = dict(dataset=dict(pipeline={{_base_.aligned_pipeline}}))
test_dataloader = val_dataloader
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale=512.0, optimizer=dict(lr=2e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-8, begin=1000, end=80000, T_max=79000, by_epoch=False),
]
auto_scale_lr = dict(base_batch_size=32)
