_base_ = "./mask_rcnn_litv2_s_ws4_1x_coco.py"
model = dict(
    backbone=dict(model_name="litv2_m"),
)
