_base_ = "./mask_rcnn_patnet_s_1x_coco.py"
model = dict(
    backbone=dict(model_name="patnet_m", drop_path_rate=0.2),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
