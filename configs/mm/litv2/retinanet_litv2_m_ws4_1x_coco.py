_base_ = "./retinanet_litv2_s_ws4_1x_coco.py"
model = dict(
    backbone=dict(model_name="litv2_m"),
)
