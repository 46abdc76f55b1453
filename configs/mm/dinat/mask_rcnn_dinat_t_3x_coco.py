_base_ = "./mask_rcnn_dinat_mini_3x_coco.py"
model = dict(
    backbone=dict(model_name="dinat_t"),
)
