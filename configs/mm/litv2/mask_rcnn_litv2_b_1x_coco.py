_base_ = "./mask_rcnn_litv2_s_1x_coco.py"
model = dict(
    backbone=dict(model_name="litv2_b", drop_path_rate=0.3, with_cp=True),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
