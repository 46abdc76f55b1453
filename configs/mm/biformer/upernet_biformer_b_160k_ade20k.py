_base_ = "./upernet_biformer_s_160k_ade20k.py"
model = dict(
    backbone=dict(model_name="biformer_b", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
