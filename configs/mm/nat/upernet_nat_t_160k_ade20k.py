_base_ = "./upernet_nat_mini_160k_ade20k.py"
model = dict(
    backbone=dict(model_name="nat_t", drop_path_rate=0.3),
)
