_base_ = "./cascade_mask_rcnn_dinat_mini_3x_coco.py"
model = dict(
    backbone=dict(model_name="dinat_b", drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
