_base_ = "./mask_rcnn_overlock_t_3x_coco.py"
model = dict(
    backbone=dict(model_name="overlock_b", drop_path_rate=0.6),
    neck=dict(in_channels=[80, 160, 528, 720]),
)
