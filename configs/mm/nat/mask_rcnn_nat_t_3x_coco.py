_base_ = "./mask_rcnn_nat_mini_3x_coco.py"
model = dict(
    backbone=dict(model_name="nat_t"),
)
