_base_ = "./upernet_dinat_mini_160k_ade20k.py"
model = dict(
    backbone=dict(model_name="dinat_s", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
