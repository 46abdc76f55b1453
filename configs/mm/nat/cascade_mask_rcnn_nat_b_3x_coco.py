_base_ = "./cascade_mask_rcnn_nat_mini_3x_coco.py"
model = dict(
    backbone=dict(model_name="nat_b", drop_path_rate=0.5),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
