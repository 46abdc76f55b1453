# OverLoCK's, https://github.com/LMMMEng/OverLoCK: segmentation/configs/overlock
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime_mmseg.py",
]
model = dict(
    backbone=dict(model_name="overlock_t", drop_path_rate=0.2, sync_bn=True),
    decode_head=dict(in_channels=[64, 128, 384, 640]),
    auxiliary_head=dict(in_channels=384),
)
val_dataloader = dict(dataset=dict(pipeline={{_base_.aligned_pipeline}}))
test_dataloader = val_dataloader
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))))
