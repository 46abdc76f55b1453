"""HER-Seg against the published network, and what must hold for any backbone and size."""

import pytest
import timm
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights
from safetensors.torch import save_file

from visionattn.heads import HERSeg, MaskDecoder
from visionattn.heads.mask_decoder import FourierPosition

SMALL = dict(decoder_kwargs=dict(dim=32, num_heads=4, mlp_dim=32))


def small(**kwargs):
    return HERSeg(**{**dict(backbone="test_lgvit"), **SMALL, **kwargs})


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Manifest, stored outputs and the weights under the published keys, as tensors and as a file."""
    manifest, stored = load_reference("heads/herseg")
    weights = published_weights(manifest)
    path = tmp_path_factory.mktemp("herseg") / "published.pth"
    torch.save(weights | {"image_encoder.layers.1.blocks.0.attn.rope.rotations": torch.zeros(16, 16, 48, 2)}, path)
    return manifest, stored, weights, path


@pytest.fixture(scope="module")
def network(published):
    return HERSeg(dtype=torch.float64).load_published(published[3]).eval()


def test_network_equals_published(published, network):
    manifest, stored, _, _ = published
    outputs, encoder = {}, network.backbone.model
    taps = {"image_encoder.patch_embed": encoder.stem, "neck": network.decoder.neck, "mask_decoder": network.decoder}
    taps |= {f"image_encoder.layers.{i}": stage for i, stage in enumerate(encoder.stages)}
    taps["image_encoder.layers.1.blocks.0.attn"] = encoder.stages[1].blocks[0].attn
    taps["mask_decoder.transformer"] = network.decoder.transformer
    handles = [
        module.register_forward_hook(lambda m, i, out, key=key: outputs.__setitem__(key, out))
        for key, module in taps.items()
    ]
    with torch.no_grad():
        outputs["masks"] = network(inputs(**manifest["input"]))
    for handle in handles:
        handle.remove()
    outputs["mask_decoder.transformer"] = outputs["mask_decoder.transformer"][0]
    key = "image_encoder.layers.1.blocks.0.attn"
    outputs[key] = outputs[key].flatten(1, 2)
    for i in (1, 2, 3):  # the published tokens are a sequence, and so is the patch embedding a map with channels last
        outputs[f"image_encoder.layers.{i}"] = outputs[f"image_encoder.layers.{i}"].flatten(2).transpose(1, 2)
    patches = outputs["image_encoder.patch_embed"]
    outputs["image_encoder.patch_embed"] = patches.permute(0, 2, 3, 1)
    assert outputs.keys() == stored.keys()
    for key, expected in stored.items():
        steps = tuple(slice(None, None, step) for step in manifest["outputs"][key]["stride"])
        assert_golden(key, expected, outputs[key][steps])


def test_parameters_are_the_published_ones_without_those_that_never_run(published, network):
    manifest, _, weights, _ = published
    unused = [k for k in weights if k.startswith("prompt_encoder.") and "no_mask" not in k and "pe_layer" not in k]
    unused += [k for k in weights if "mlps.1." in k or "mlps.2." in k]
    own = sum(p.numel() for p in network.parameters())
    assert own + sum(weights[k].numel() for k in unused) == manifest["params"] == 3_526_364
    assert sum(p.numel() for p in network.backbone.parameters()) == 957_648


def test_published_file_can_be_safetensors_with_two_masks(published, tmp_path):
    path = tmp_path / "published.safetensors"
    save_file({key: x.float().contiguous() for key, x in published[2].items()}, path)
    two = HERSeg(in_chans=1, num_classes=2).load_published(path)
    grey = published[2]["image_encoder.patch_embed.proj.weight"].sum(1, keepdim=True)
    assert_close("patches of grey images", grey, two.backbone.model.stem.proj.weight, 1e-6)
    expected = published[2]["mask_decoder.output_hypernetworks_mlps.1.layers.2.weight"].float()
    assert torch.equal(two.decoder.hypernetworks[1][4].weight, expected)


def test_other_files_are_refused_by_name(published, tmp_path):
    weights, path = dict(published[2]), tmp_path / "other.pth"
    with pytest.raises(FileNotFoundError, match="no checkpoint at.*absent.pth"):
        small().load_published(tmp_path / "absent.pth")
    torch.save(weights | {"mask_decoder.extra.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"other.pth is no published.*1 are unknown \(first \['mask_decoder.extra"):
        HERSeg().load_published(path)
    torch.save({k: x for k, x in weights.items() if k != "neck.0.weight"}, path)
    with pytest.raises(ValueError, match=r"1 of the decoder's tensors are missing \(first \['neck.0.weight"):
        HERSeg().load_published(path)
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"neck.0.weight has shape \[256, 96, 1, 1\], expected \[256, 24, 1, 1\]"):
        HERSeg("lgvit_d24").load_published(path)
    torch.save({"weights": test_other_files_are_refused_by_name}, path)
    with pytest.raises(ValueError, match="other.pth cannot be read as a state dict .*tensors alone"):
        small().load_published(path)
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="other.pth cannot be read"):
        small().load_published(path)
    with pytest.raises(ValueError, match="num_classes <= 3 and mask_token='first', got 4"):
        small(num_classes=4).load_published(path)


def test_encoder_alone_takes_the_whole_networks_file(published, network):
    args = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(published[3])), dtype=torch.float64)
    encoder = timm.create_model("lgvit_d96", num_classes=0, **args)
    x = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(encoder.eval().forward_features(x), network.backbone(x)[-1])


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (16, 48), (5, 100)])
def test_masks_have_the_size_of_the_images(size):
    model = small(in_chans=1, num_classes=2).eval()
    x = torch.randn(2, 1, *size)
    with torch.no_grad():
        out = model(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(2)])
    assert out.shape == (2, 2, *size)
    assert_close("batch", alone, out, 1e-5)


@pytest.mark.parametrize("name", ["resnet18", "biformer_nano", "vit_tiny_patch16_224"])
def test_any_backbone_of_stride_16_serves(name):
    if name.startswith("vit"):
        model, size = small(backbone=name, backbone_kwargs=dict(dynamic_img_size=True, depth=4)).eval(), (40, 65)
    else:
        model, size = small(backbone=name).eval(), (70, 65)
    assert model.backbone.feature_info.reduction() == [16]
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).shape == (1, 1, *size)


def test_own_token_makes_masks_depend_on_their_tokens():
    for mask_token, expected in (("first", False), ("own", True)):
        model = small(num_classes=2, mask_token=mask_token, backbone_kwargs=dict(depths=(1, 1, 1, 1))).eval()
        read = []
        model.decoder.hypernetworks[1].register_forward_hook(lambda m, i, out, read=read: read.append(i[0]))
        model.decoder.transformer.register_forward_hook(lambda m, i, out, read=read: read.append(out[0]))
        model(torch.randn(1, 3, 32, 32))
        tokens, given = read
        assert torch.equal(given, tokens[:, 2 if expected else 0])


def test_network_trains_under_autocast_with_checkpointing():
    model, x = small(checkpointing=True), torch.randn(2, 3, 48, 32)
    assert all(stage.grad_checkpointing for stage in model.backbone.model.stages)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.float32
    out.square().mean().backward()
    dead = {key for key, p in model.named_parameters() if p.grad is None}
    assert not dead
    kept = model.state_dict()
    plain = small().eval()
    plain.load_state_dict(kept)
    model.eval()
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))


def test_compiled_network_is_one_graph():
    model = small().eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert_close("logits", model(x), compiled(x), 1e-4)


def test_position_is_that_of_the_centres():
    code = FourierPosition(8).double()
    out = code(2, 3).reshape(2, 3, 8)
    point = torch.tensor([5 / 6, 3 / 4], dtype=torch.float64) * 2 - 1  # x of the third column, y of the second row
    angles = 2 * torch.pi * point @ code.matrix
    assert_close("code", torch.cat((angles.sin(), angles.cos())), out[1, 2], 1e-12)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(backbone="no_such_net"), "unknown backbone 'no_such_net'; nearest"),
        (dict(backbone="test_activator"), r"has maps of strides \[.*\] and none of 16"),
        (dict(mask_token="mine"), "mask_token='mine' is not one of 'first', 'own'"),
        (dict(num_classes=0), "num_classes=0"),
        (dict(decoder_kwargs=dict(dim=40)), "dim=40 must be a multiple of 16"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"images \[B, 3, H, W\], got shape \[1, 1, 32, 32\]"):
        small()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"a map \[B, 8, h, w\], got shape \[1, 4, 2, 2\]"):
        MaskDecoder(8, dim=32, num_heads=4)(torch.zeros(1, 4, 2, 2))
