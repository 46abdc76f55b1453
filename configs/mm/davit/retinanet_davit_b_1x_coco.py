# the code gives DaViT-T's settings only; the drop path of this size is not published and is DaViT-T's here
_base_ = "./retinanet_davit_t_1x_coco.py"
model = dict(
    backbone=dict(model_name="davit_b"),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
