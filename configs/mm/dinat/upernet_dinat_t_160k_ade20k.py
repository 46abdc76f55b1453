_base_ = "./upernet_dinat_mini_160k_ade20k.py"
model = dict(
    backbone=dict(model_name="dinat_t", drop_path_rate=0.3),
)
