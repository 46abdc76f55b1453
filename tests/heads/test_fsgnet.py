"""FSG-Net against the published network's outputs, its loss, and its decoder on other backbones."""

import pytest
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights
from reference import fill
from safetensors.torch import save_file
from torch import nn

from visionattn.heads.fsgnet import Block, DropBlock, FSGNet, FSGNetDecoder, multiscale_dice_bce
from visionattn.ops import use_backend

NAMES = ["fsgnet_base_c16", "fsgnet_noguide_base_c16", "fsgnet"]
PRESENT = [name for name in NAMES if (fill.HERE / f"heads/{name}.npz").is_file()]


def published(name, path):
    """The network of a manifest, with weights that went through a published file."""
    manifest, stored = load_reference(f"heads/{name}")
    given = manifest["hyperparameters"]
    model = FSGNet(base_c=given["base_c"], depths=given["depths"], guided=given["class"] == "FSGNet").double().eval()
    weights = {f"module.{key}": tensor.contiguous() for key, tensor in published_weights(manifest).items()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"model_state_dict": weights, "epoch": 3}, path)
    model.load_published(path)
    return model, manifest, stored


@pytest.mark.parametrize("name", PRESENT)
def test_network_equals_published(name, tmp_path):
    model, manifest, stored = published(name, tmp_path / ("a.pth" if "noguide" in name else "a.safetensors"))
    assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    modules = dict(model.named_modules())
    actual, handles = {}, []
    for key in stored:
        module = modules.get(f"decoder.{key}", modules.get(f"encoder.{key}"))
        if module is not None:
            handles.append(module.register_forward_hook(lambda m, i, out, key=key: actual.__setitem__(key, out)))
    with torch.no_grad():
        outputs = model(inputs(**manifest["input"]), all_scales=True)
        alone = model(inputs(**manifest["input"]))
    assert torch.equal(alone, outputs[0])
    for i, logits in enumerate(outputs, 1):
        actual[f"out_{i}"] = logits.sigmoid()
        actual[f"output_layer{i}.0"] = logits  # ours runs before the enlargement
    assert stored.keys() <= actual.keys()  # some inner maps are left out of the stored ones
    for key, expected in stored.items():
        steps = manifest["outputs"][key]["stride"]
        got = actual[key][tuple(slice(None, None, step) for step in steps)]
        if key.startswith("out_"):  # a saturated sigmoid has next to no spread to compare with
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        else:
            assert_golden(key, expected, got)


def test_published_sizes():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in FSGNet(guided=guided).parameters()) for guided in (True, False)]
    assert sizes == [18_318_831, 16_851_587]


def test_channels_stay_innermost():
    model = FSGNet(base_c=4, depths=(1, 1, 1, 1)).to(memory_format=torch.channels_last)
    wrong = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda m, args, out, name=name: (
                    None
                    if out.is_contiguous(memory_format=torch.channels_last) or out.shape[1] == 1
                    else wrong.append(name)
                )
            )
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.randn(2, 3, 56, 64).to(memory_format=torch.channels_last))
    assert not wrong
    sum(out.float().sum() for out in outputs).backward()


@pytest.mark.parametrize("size", [(48, 48), (53, 66)])
def test_every_parameter_has_a_gradient_at_any_size(size):
    model = FSGNet(base_c=4, depths=(1, 1, 1, 1), in_chans=1, num_classes=2)
    torch.nn.init.ones_(model.encoder.down_conv_4[1].gamma)
    outputs = model(torch.randn(2, 1, *size))
    assert [out.shape for out in outputs] == [(2, 2, *size)] * 3
    sum(out.square().sum() for out in outputs).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_images_do_not_depend_on_their_batch_unless_published_so():
    x = torch.randn(2, 3, 48, 56)
    x[1] *= 3
    for per, same in (("image", True), ("batch", False)):
        torch.manual_seed(1)
        model = FSGNet(base_c=4, depths=(1, 1, 1, 1), per=per).double().eval()
        with torch.no_grad():
            alone, together = model(x[:1].double()), model(x.double())[:1]
        assert torch.allclose(alone, together, rtol=1e-9, atol=1e-10) is same


def test_wrong_images_and_arguments_are_named():
    model = FSGNet(base_c=4, depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="47 x 64.*at least 48"):
        model(torch.zeros(1, 3, 47, 64))
    with pytest.raises(ValueError, match="four depths"):
        FSGNet(depths=(1, 1))
    with pytest.raises(ValueError, match="'radius'"):
        FSGNet(base_c=4, guided=False, radius=3)
    with pytest.raises(ValueError, match="nearest: .*biformer_s"):
        FSGNetDecoder("biformer_small")
    with pytest.raises(ValueError, match="attention='global'"):
        FSGNet(base_c=4, attention="global")


def test_wrong_checkpoints_are_named(tmp_path):
    model = FSGNet(base_c=4, depths=(1, 1, 1, 1))
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        model.load_published(tmp_path / "absent.pth")
    other = FSGNet(base_c=8, depths=(1, 1, 1, 1))
    weights = {key.partition(".")[2]: tensor for key, tensor in other.state_dict().items()}
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="of another shape.*base_c"):
        model.load_published(tmp_path / "other.pth")
    other.load_published(tmp_path / "other.pth")
    torch.save({"model": model}, tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match="not unpickled"):
        model.load_published(tmp_path / "pickled.pth")
    (tmp_path / "short.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot read"):
        model.load_published(tmp_path / "short.safetensors")


def test_kernels_give_the_same():
    pytest.importorskip("triton")
    device, results = "cuda" if torch.cuda.is_available() else "cpu", []
    block = Block(8).eval()
    nn.init.normal_(block.gamma)
    block = block.to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 8, 11, 13, device=device).contiguous(memory_format=torch.channels_last)
    for backend in ("eager", "triton"):
        with use_backend(backend), torch.backends.cudnn.flags(allow_tf32=False), torch.no_grad():
            results.append(block(x))
    assert_close("block", *results, 1e-6)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_dropblock_drops_squares_at_the_published_rate(backend):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drop, x = DropBlock().train(), torch.zeros(8, 16, 40, 16, device=device)
    with use_backend(backend):
        factor = drop.factor(x.contiguous(memory_format=torch.channels_last)).cpu()
    dropped = factor == 0
    # a pixel well inside is dropped by any of 49 places; the width counts for both sides
    gamma = 0.5 / 49 * 16**2 / 10**2
    assert dropped[..., 6:-6, 6:-6].float().mean().item() == pytest.approx(1 - (1 - gamma) ** 49, abs=0.05)
    assert factor.mean().item() == pytest.approx(1, abs=1e-5)
    # every dropped pixel lies in some square of seven that is dropped as a whole
    whole = -torch.nn.functional.max_pool2d(-dropped.float(), 7, 1)  # squares that are dropped entirely
    covered = torch.nn.functional.max_pool2d(torch.nn.functional.pad(whole, (6,) * 4), 7, 1)
    assert torch.equal(covered > 0, dropped)
    assert drop(torch.ones(2, 2, 6, 5)).isfinite().all()  # smaller than the block
    x = torch.randn(1, 2, 16, 16)
    assert drop.eval()(x) is x


def test_loss_equals_published():
    score = inputs((4, 1, 24, 32), 0)
    labels = inputs((4, 1, 24, 32), 1) + score > 0.6
    expected = torch.tensor(1.0156642480525666, dtype=torch.float64)  # of the published losses.py for these inputs
    assert_close("loss", expected, multiscale_dice_bce(score, labels), 1e-12)
    assert_close("mean", expected, multiscale_dice_bce((score,) * 3, labels[:, 0]), 1e-12)
    with pytest.raises(ValueError, match="expected the logits' shape"):
        multiscale_dice_bce(score, labels[..., 1:])


@pytest.mark.parametrize("backbone", ["test_resnet", "test_biformer", "test_nat", "test_vit"])
def test_decoder_on_backbones(backbone):
    kwargs = dict(img_size=64) if backbone == "test_vit" else {}
    attention = {"test_resnet": "routed", "test_nat": "neighborhood"}.get(backbone)
    model = FSGNetDecoder(backbone, base_c=4, attention=attention, **kwargs)
    x = torch.randn(2, 3, 64, 64 if kwargs else 72)
    outputs = model(x)
    assert [out.shape for out in outputs] == [(2, 1, *x.shape[2:])] * 3
    multiscale_dice_bce(outputs, torch.rand(2, *x.shape[2:]) > 0.5).backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None}
    assert not silent - {name for name in silent if name.startswith("encoder.backbone")}
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.backbone.parameters())
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()


def test_attention_at_the_bottom_sees_the_whole_map():
    model = FSGNet(base_c=4, depths=(1, 1, 1, 1), attention="routed").eval()
    assert "decoder.bottleneck.attn.qkv.weight" in model.state_dict()
    x = torch.randn(1, 32, 8, 8, requires_grad=True)
    model.decoder.bottleneck(x)[0, :, 0, 0].sum().backward()
    assert (x.grad.abs().sum(1) > 0).sum() > 4
