_base_ = "./upernet_nat_mini_160k_ade20k.py"
model = dict(
    backbone=dict(model_name="nat_b", drop_path_rate=0.5),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
