_base_ = "./cascade_mask_rcnn_dinat_mini_3x_coco.py"
model = dict(
    backbone=dict(
        model_name="dinat_l",
        drop_path_rate=0.6,
        pretrained="https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth",
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
