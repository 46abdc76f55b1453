_base_ = "./semantic_fpn_biformer_s_80k_ade20k.py"
model = dict(
    backbone=dict(model_name="biformer_b", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
