_base_ = "./upernet_overlock_t_160k_ade20k.py"
model = dict(
    backbone=dict(model_name="overlock_b", drop_path_rate=0.5),
    decode_head=dict(in_channels=[80, 160, 528, 720]),
    auxiliary_head=dict(in_channels=528),
)
