# DiNAT's, https://github.com/SHI-Labs/Neighborhood-Attention-Transformer: segmentation/configs/dinat
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime_mmseg.py",
]
model = dict(
    backbone=dict(
        model_name="dinat_mini",
        dilations=((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2, 1, 2, 1)),
        drop_path_rate=0.2,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    paramwise_cfg=dict(
        custom_keys={
            "rpb": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
            "stem.2": dict(decay_mult=0.0),
            "downsample.1": dict(decay_mult=0.0),
        }
    ),
)
