_base_ = "./semantic_fpn_litv2_s_80k_ade20k.py"
model = dict(
    backbone=dict(model_name="litv2_m"),
)
