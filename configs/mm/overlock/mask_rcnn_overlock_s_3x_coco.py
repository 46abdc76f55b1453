_base_ = "./mask_rcnn_overlock_t_3x_coco.py"
model = dict(
    backbone=dict(model_name="overlock_s", drop_path_rate=0.4),
    neck=dict(in_channels=[64, 128, 448, 640]),
)
