_base_ = "./upernet_overlock_t_160k_ade20k.py"
model = dict(
    backbone=dict(model_name="overlock_s", drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)
