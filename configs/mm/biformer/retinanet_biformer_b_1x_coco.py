_base_ = "./retinanet_biformer_s_1x_coco.py"
model = dict(
    backbone=dict(model_name="biformer_b", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
