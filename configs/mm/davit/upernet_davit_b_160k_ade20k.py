# the code gives DaViT-T's settings only; the drop path of this size is not published and is DaViT-T's here
_base_ = "./upernet_davit_t_160k_ade20k.py"
model = dict(
    backbone=dict(model_name="davit_b"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
