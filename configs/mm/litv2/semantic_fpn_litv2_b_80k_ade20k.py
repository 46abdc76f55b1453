_base_ = "./semantic_fpn_litv2_s_80k_ade20k.py"
model = dict(
    backbone=dict(model_name="litv2_b", drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
