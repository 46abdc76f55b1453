_base_ = "./cascade_mask_rcnn_nat_mini_3x_coco.py"
model = dict(
    backbone=dict(model_name="nat_s", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
