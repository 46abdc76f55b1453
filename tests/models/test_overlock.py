"""OverLoCK: its blocks against the published ones, merging, the auxiliary classifier, and graphs at any size."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionattn.layers import ContextMixing, DilatedReparamConv, context_mixing
from visionattn.models.overlock import ChannelAffine, DynamicConvBlock, RepConvBlock, checkpoint_filter_fn
from visionattn.ops import use_backend

# parameters multi-branch, merged, and merged without auxiliary classifier; multiply-adds multi-branch at 224
PUBLISHED = {
    "overlock_xt": (17307272, 16791384, 16453712, 2862635208),
    "overlock_t": (34990472, 33981064, 33467040, 5992635712),
    "overlock_s": (58309772, 56670476, 56156452, 10437111616),
    "overlock_b": (98012968, 95520680, 94942528, 17962637584),
}
STEPS = {  # modules of the published block, and ours
    "fusion": "fusion",
    "gate": "gate",
    "weight_query": "mix.query",
    "weight_key": "mix.key",
    "dyconv_proj.0": "mix_proj.0",
    "se_layer": "se",
    "proj.1": "proj.1",
    "mlp.4": "mlp.4",
}
CASES = ["first_14x14_k7", "later_15x23_k13", "last_8x10_k7", "small_5x6_k7", "small_12x10_k13"]


def fill(module, weights, published, own):
    """Load a part of the network, which there is at ``published`` and here at ``own``, through the filter."""
    whole = module.double().eval()
    for name in reversed(own.split(".")):
        whole, part = nn.Module(), whole
        whole.add_module(name, part)
    renamed = checkpoint_filter_fn({f"{published}.{key}": tensor for key, tensor in weights.items()}, whole)
    missing, unexpected = whole.load_state_dict(renamed, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    return module


def thinned(x):
    step = math.ceil(x.numel() / 512)
    return x.contiguous().flatten()[:: step + 1 - step % 2]


def test_rep_conv_block_equals_published():
    manifest, stored = load_reference("layers/overlock_repconv_block")
    block = fill(RepConvBlock(32, 13), published_weights(manifest), "blocks3.0", "stages.2.base.blocks.0")
    x = inputs(**manifest["input"])
    assert_golden("output", stored["output"], block(x)[:, ::4])
    assert_golden("branch", stored["branch"], block.mlp(block.branch(block.dwconv(x)))[:, ::4])


@pytest.mark.parametrize("side", [17, 15, 13, 7])
def test_dilated_convolution_equals_published(side):
    manifest, stored = load_reference("layers/overlock_dilated_reparam")
    weights = published_weights(manifest["cases"][f"k{side}"])
    layer = fill(DilatedReparamConv(8, side), weights, "blocks1.0.proj.1", "stages.0.base.blocks.0.branch.1")
    x, merged = inputs(**manifest["input"]), layer.fuse()
    for name, module in (("branches", layer), ("merged", merged)):
        assert_golden(name, stored[f"k{side}"], module(x)[:, ::2])
    assert_golden("kernel", stored[f"k{side}.merged_weight"], merged.weight[::2])
    assert_golden("bias", stored[f"k{side}.merged_bias"], merged.bias)


@pytest.mark.parametrize("name", CASES)
def test_dynamic_block_equals_published(name, monkeypatch):
    manifest, stored = load_reference("layers/overlock_dynamic_conv_block")
    case, actual = manifest["cases"][name], {}
    block = DynamicConvBlock(32, 16, 1, case["kernel_size"], first=case["is_first"])
    fill(block, published_weights(case), "sub_blocks3.0", "stages.2.focus.blocks.0")

    def record(logits, *args):
        actual["weight_proj"] = logits.flatten(3)
        return weigh(logits, *args)

    weigh = context_mixing.neighborhood_sum
    monkeypatch.setattr(context_mixing, "neighborhood_sum", record)
    for step, own in STEPS.items():
        hook = lambda module, given, out, step=step: actual.update({step: out, f"{step}.input": given[0]})  # noqa: E731
        block.get_submodule(own).register_forward_hook(hook)
    x, context, prior = (inputs((1, c, case["H"], case["W"]), seed) for seed, c in enumerate((32, 16, 16)))
    out = block(torch.cat((x, context), dim=1), prior)
    assert_golden("output", stored[name], out[:, ::3])
    steps = [key.removeprefix(f"{name}.") for key in stored if key.startswith(f"{name}.")]
    assert {*STEPS, "weight_proj", "dyconv_proj.0.input"} == set(steps)
    for step in steps:
        assert_golden(step, stored[f"{name}.{step}"], thinned(actual[step]))


def randomised(name, **kwargs):
    """A float64 model in evaluation whose norms are not the identity."""
    torch.manual_seed(0)
    model = timm.create_model(name, dtype=torch.float64, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.normal_(module.weight, 1.0, 0.1)
    return model


def test_merged_network_equals_the_trained_one(tmp_path):
    model, x = randomised("test_overlock"), torch.randn(2, 3, 65, 97, dtype=torch.float64)
    merged = reparameterize_model(model)
    assert not [name for name in merged.state_dict() if ".dilated." in name]
    other = timm.create_model("test_overlock", merged=True, dtype=torch.float64).eval()
    other.load_state_dict(merged.state_dict())
    for actual in (merged, other):
        assert_close("logits", model(x), actual(x), 1e-12)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "overlock_xt" else pytest.mark.thorough) for name in PUBLISHED]
)
def test_size_is_the_published_one(name):
    model = timm.create_model(name, aux_head=True, device="meta").eval()
    merged = timm.create_model(f"{name}.in1k_merged", device="meta")
    counts = [sum(p.numel() for p in part.parameters()) for part in (model, merged, model.aux_head)]
    assert [counts[0], counts[1] + counts[2], counts[1]] == list(PUBLISHED[name][:3])
    counter, parts = FlopCounterMode(display=False), []
    for module in model.modules():
        if isinstance(module, ContextMixing | ChannelAffine):
            module.register_forward_hook(lambda module, given, out: parts.append((module, given[0].shape)))
    with counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() // 2 == PUBLISHED[name][3] - sum(spared(*part) for part in parts)


def spared(module, shape):
    """Multiply-adds of the published form that ours does without: affine maps are not convolutions here, and the keys
    are mapped to taps before they meet the queries.
    """
    if isinstance(module, ChannelAffine):
        return math.prod(shape)
    regions, taps = module.taps.in_features, module.taps.out_features
    width, pixels = module.query[0].out_channels, module.groups * shape[2] * shape[3]
    published = width // module.groups * pixels * regions + pixels * regions * taps
    return published - (width * regions * taps + width // module.groups * pixels * taps)


def test_published_merged_weights_load(tmp_path):
    manifest, _ = load_reference("backbones/overlock_xt")
    weights = published_weights(manifest)
    model = timm.create_model("overlock_xt", dtype=torch.float64).eval()
    model.load_state_dict(checkpoint_filter_fn(dict(weights), model), strict=False)
    merged, path = reparameterize_model(model), tmp_path / "overlock_xt_in1k_224_reparam.pth"
    for key in [key for key in weights if ".origin_bn." in key or ".dil_" in key]:
        del weights[key]
    for key in [key for key in weights if key.endswith(".lk_origin.weight")]:
        bias = key.removesuffix("weight") + "bias"
        (_, own) = checkpoint_filter_fn({bias: torch.empty(0), key: weights[key]}, merged)
        conv = merged.get_submodule(own.removesuffix(".weight"))
        weights[key], weights[bias] = conv.weight.detach(), conv.bias.detach()
    torch.save({"state_dict": weights}, path)
    overlay = dict(file=str(path))
    loaded = timm.create_model(
        "overlock_xt", pretrained=True, pretrained_cfg_overlay=overlay, merged=True, dtype=torch.float64
    )
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert_close("logits", model(x), loaded.eval()(x), 1e-12)
    with pytest.raises(ValueError, match=r"overlock_xt: the checkpoint has merged convolutions.*merged=True"):
        timm.create_model("overlock_xt", pretrained=True, pretrained_cfg_overlay=overlay)


def test_branches_do_not_load_into_merged_convolutions():
    manifest, _ = load_reference("backbones/overlock_xt")
    published = {key: torch.empty(spec["shape"], device="meta") for key, spec in manifest["tensors"].items()}
    with pytest.raises(ValueError, match="has multi-branch convolutions; create the model with merged=False"):
        checkpoint_filter_fn(published, timm.create_model("overlock_xt", merged=True, device="meta"))


# the auxiliary classifier


def test_auxiliary_classifier_answers_in_training_only():
    model, x = timm.create_model("test_overlock", aux_head=True, num_classes=7), torch.randn(2, 3, 64, 64)
    logits, further = model(x)
    assert logits.shape == further.shape == (2, 7)
    (logits.square().mean() + 0.4 * further.square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert isinstance(model.eval()(x), torch.Tensor)
    assert torch.jit.script(model)(x).shape == (2, 7)
    assert isinstance(timm.create_model("test_overlock").train()(x), torch.Tensor)


def test_auxiliary_classifier_is_reset_with_the_other():
    model, x = timm.create_model("test_overlock", aux_head=True).double(), torch.randn(2, 3, 64, 64).double()
    model.reset_classifier(5)
    assert [out.shape for out in model(x)] == [(2, 5), (2, 5)]
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size) and model.aux_head is None
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 80, 2, 2) and model.head_hidden_size == model.num_features == 80
    model.reset_classifier(3, "avg")
    assert [out.shape for out in model(x)] == [(2, 3), (2, 3)] and model.head_hidden_size == 128


def test_auxiliary_classifier_starts_anew_for_other_classes(tmp_path):
    model, path = timm.create_model("test_overlock", aux_head=True), tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    other = timm.create_model("test_overlock", aux_head=True, num_classes=9, **kwargs)
    assert other.aux_head[1].fc.weight.shape == (9, 64)
    assert timm.create_model("test_overlock", **kwargs).aux_head is None
    assert len(timm.create_model("test_overlock", num_classes=0, global_pool="", **kwargs).projection) == 0


if torch.cuda.is_available():

    @pytest.mark.parametrize("merged", [False, True])
    def test_kernels_train_it_as_pytorch_does(merged):
        torch.manual_seed(0)
        model = timm.create_model("test_overlock", num_classes=5, merged=merged).cuda()
        other, x = copy.deepcopy(model).double(), torch.randn(4, 3, 96, 96, device="cuda")
        results = []
        for network, images, backend in ((other, x.double(), "eager"), (model, x, "auto")):
            with use_backend(backend):
                out = network(images)
                results.append((out, *torch.autograd.grad(out.double().square().sum(), list(network.parameters()))))
        (out, *grads), (actual_out, *actual_grads) = results
        assert_close("out", out, actual_out, 5e-3)
        largest = max(grad.norm() for grad in grads)
        for expected, actual in zip(grads, actual_grads, strict=True):
            # before a norm some gradients are nothing but rounding errors
            assert (expected - actual).norm() <= 5e-3 * max(expected.norm(), 1e-3 * largest)
        for (name, expected), (_, actual) in zip(other.named_buffers(), model.named_buffers(), strict=True):
            assert (expected - actual).abs().max() <= 5e-4 * expected.abs().max().clamp_min(1.0), name


# the network as timm's tools see it


def test_layers_are_ordered_as_they_compute():
    model = timm.create_model("test_overlock", aux_head=True)
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    names = ["stem.0.weight", "stages.2.base.downsample.0.weight", "stages.2.overview.blocks.0.dwconv.weight"]
    names += ["stages.2.focus.blocks.0.dwconv1.weight", "stages.3.downsample.0.0.weight", "head.fc.weight"]
    order = [groups[name] for name in names]
    assert order == sorted(set(order))
    assert groups["stages.2.context.weight"] == groups["stages.2.overview.blocks.0.dwconv.weight"]
    assert groups["aux_head.0.weight"] == groups["head.fc.weight"] == groups["projection.0.weight"]


def test_drop_path_grows_linearly():
    model = timm.create_model("overlock_xt", drop_path_rate=0.16, device="meta")
    stages = model.stages
    rows = [stages[0].base, stages[1].base, stages[2].base, stages[2].overview, stages[2].focus, stages[3].focus]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for row in rows for block in row.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.16, 17).tolist())


@pytest.mark.parametrize("stage, left", [(0, "stages.0"), (1, "stages.1"), (2, "stages.2.focus")])
def test_pruned_network_has_no_more_than_it_needs(stage, left):
    model, x = timm.create_model("test_overlock").eval(), torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, intermediates_only=True)[stage]
    model.prune_intermediate_layers([stage])
    assert torch.equal(model.forward_features(x), expected)
    last = [name for name, _ in model.named_parameters()][-1]
    assert last.startswith(left)


@pytest.mark.parametrize("size", [(224, 224), (256, 320), (65, 97)])
@pytest.mark.parametrize("in_chans", [1, 5])
def test_any_size_trains(size, in_chans):
    model = timm.create_model("test_overlock", in_chans=in_chans, num_classes=7)
    model(torch.randn(2, in_chans, *size)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_checkpointed_blocks_give_the_same_gradients():
    model, x = randomised("test_overlock"), torch.randn(2, 3, 65, 97, dtype=torch.float64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        grads.append(torch.autograd.grad(model(x).sum(), list(model.parameters())))
    for (name, _), expected, actual in zip(model.named_parameters(), *grads, strict=True):
        assert_close(name, expected, actual, 1e-10)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(depths=(1, 1, 1)), r"4 values.*\(1, 1, 1\)"),
        (dict(focus_depths=(1, 1, 1)), r"focus_depths and num_heads 2, got.*\(1, 1, 1\)"),
        (dict(embed_dims=(16, 32, 48, 66)), r"embed_dims=\(16, 32, 48, 66\).*multiple of 4"),
        (dict(num_heads=(1, 3)), r"num_heads=3: 4 \* num_heads must divide dim=64"),
        (dict(kernel_sizes=(7, 7, 5, 6)), "kernel_size=6 must be one of 5, 7"),
        (dict(small_kernel=4), "small_kernel=4 and kernel_size=5 must be odd"),
    ],
)
def test_bad_architecture_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_overlock", **kwargs)


# graphs


@pytest.mark.slow
def test_exported_with_free_sizes_equals_eager_on_both_sides_of_the_kernels():
    free, model = torch.export.Dim.DYNAMIC, timm.create_model("test_overlock", num_classes=10).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: free, 2: free, 3: free},))
    for size in ((3, 3, 97, 65), (1, 3, 256, 224)):
        x = torch.randn(size)
        with torch.no_grad():
            assert_close(f"logits at {size}", model(x), program.module()(x), 1e-5)


@pytest.mark.slow
def test_onnx_with_a_free_batch_equals_eager(tmp_path):
    """A block of either kind, merged, and what is around them; tests of ``visionattn export`` take whole networks."""
    import onnxruntime

    path, shapes = tmp_path / "model.onnx", ({0: torch.export.Dim("batch")},)
    kwargs = dict(depths=(0, 0, 1, 0), focus_depths=(0, 1), kernel_sizes=(5, 5, 5, 5), merged=True)
    model = timm.create_model("test_overlock", **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)  # or the logits would be next to nothing
    x = torch.randn(2, 3, 65, 97)
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, optimize=False, dynamic_shapes=shapes)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # remarks on what the optimiser, left out for its time, would have folded
    session = onnxruntime.InferenceSession(path, options)
    x = torch.randn(3, 3, 65, 97)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close("logits", model(x), logits, 1e-5)
