_base_ = "./mask_rcnn_patnet_s_1x_coco.py"
model = dict(
    backbone=dict(model_name="patnet_l", drop_path_rate=0.3),
    neck=dict(in_channels=[160, 320, 640, 1280]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
