# DaViT's, https://github.com/dingmyu/davit: mmseg/configs; batch norms of the heads are not synchronised
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime_mmseg.py",
]
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    backbone=dict(model_name="davit_t", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768], norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=384, norm_cfg=norm_cfg),
)
