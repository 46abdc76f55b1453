"""Every family against the outputs of the published networks, loaded from files with the published keys.

``tests/reference`` holds what fits; a larger collection is used with the environment variable VISIONATTN_REFERENCE.
With VISIONATTN_AGREEMENT=checkpoints/agreement.csv the errors that are found are written there for the table of models.
"""

import math

import pytest
import timm
import torch
from helpers import assert_golden, inputs, load_reference, published_weights, record_agreement
from reference import fill

from visionattn.ops import split_windows

# reference: model and its arguments
NETWORKS = {
    "biformer_tiny": ("biformer_t", {}),
    "biformer_small": ("biformer_s", {}),
    "biformer_base": ("biformer_b", {}),
    "biformer_stl": ("biformer_stl", {}),
    "davit_tiny": ("davit_t", {}),
    "davit_tiny_timm": ("davit_t", {}),
    "davit_tiny_230x250": ("davit_t", {}),
    "davit_small": ("davit_s", {}),
    "davit_small_timm": ("davit_s", {}),
    "davit_base": ("davit_b", {}),
    "davit_base_timm": ("davit_b", {}),
    "litv2_small": ("litv2_s", {}),
    "litv2_medium": ("litv2_m", {}),
    "litv2_base": ("litv2_b", {}),
    "nat_mini": ("nat_mini", {}),
    "nat_mini_160x192": ("nat_mini", {}),
    "nat_tiny": ("nat_t", {}),
    "nat_small": ("nat_s", {}),
    "nat_base": ("nat_b", {}),
    "dinat_mini": ("dinat_mini", {}),
    "dinat_tiny": ("dinat_t", {}),
    "overlock_xt": ("overlock_xt", {"aux_head": True}),
    "overlock_xt_192x160": ("overlock_xt", {"aux_head": True}),
    "overlock_t": ("overlock_t", {"aux_head": True}),
    "overlock_s": ("overlock_s", {"aux_head": True}),
    "overlock_b": ("overlock_b", {"aux_head": True}),
    "patnet_t0": ("patnet_t0", {}),
    "patnet_t0_yaml": ("patnet_t0", dict(use_spatial_attn=False)),
    "patnet_t1": ("patnet_t1", {}),
    "patnet_t2": ("patnet_t2", {}),
    "patnet_s": ("patnet_s", {}),
}
INNER = {"base": "stages.2.base", "overview": "stages.2.overview"}  # maps that are not a stage's output
SHAPES = {"dinat_small": "dinat_s", "dinat_base": "dinat_b", "dinat_large": "dinat_l"}
# of families with smaller ones here
LARGEST = ("biformer_base", "davit_base", "litv2_base", "nat_base", "overlock_t", "overlock_s", "overlock_b")
EVERY_NETWORK = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.thorough] if name in LARGEST else [])
        for name in NETWORKS
        if (fill.HERE / f"backbones/{name}.npz").is_file()
    ],
)


def tapped(model, weights, filter_fn, names):
    """Outputs of the published modules ``names`` as they come, found by the tensors that their weights become."""
    outputs, handles = {}, []
    own = {id(tensor): key for key, tensor in filter_fn(dict(weights), model).items()}
    for name in names:
        key = own[id(weights[f"{name}.weight"])]
        module = model.get_submodule(key.rpartition(".")[0])
        handles.append(module.register_forward_hook(lambda m, i, out, name=name: outputs.__setitem__(name, out)))
    return outputs, handles


def thinned(x):
    """Every s-th value of a flattened tensor, about 512 of them: what the references keep of inner modules."""
    step = math.ceil(x.numel() / 512)
    return x.detach().contiguous().flatten()[:: step + 1 - step % 2]


def strides_of(manifest, name):
    steps = manifest.get("strides", {}).get(name)
    if steps is None:  # as the manifests without the field say in words
        steps = {"feat3": [1, 4, 1, 1], "grad": [1, 1, 8, 8]}.get(name, [1, 4, 7, 7])
    return tuple(slice(None, None, step) for step in steps)


@EVERY_NETWORK
def test_network_equals_published(name, tmp_path):
    manifest, stored = load_reference(f"backbones/{name}")
    model_name, kwargs = NETWORKS[name]
    weights = published_weights(manifest)
    inner = (manifest.get("checkpoint") or {}).get("inner_key")
    path = tmp_path / "published.pth"
    torch.save({"model": weights} if inner == "model" else weights, path)
    num_classes = manifest["hyperparameters"].get("num_classes", 1000)
    model = timm.create_model(
        model_name,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=num_classes),
        num_classes=num_classes,
        dtype=torch.float64,
        **kwargs,
    ).eval()
    assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    module = __import__(type(model).__module__, fromlist=["checkpoint_filter_fn"])
    taps = [key.removeprefix("tap.") for key in stored if key.startswith("tap.")]
    outputs, handles = tapped(model, weights, module.checkpoint_filter_fn, taps)
    inner = {}
    for key in INNER.keys() & stored.keys():
        part = model.get_submodule(INNER[key])
        handles.append(part.register_forward_hook(lambda m, i, out, key=key: inner.__setitem__(key, out)))
    x = inputs(**manifest["input"]).requires_grad_("grad" in stored)
    final, maps = model.forward_intermediates(x)
    actual = {f"feat{i}": feature[strides_of(manifest, f"feat{i}")] for i, feature in enumerate(maps)}
    actual["logits"] = model.forward_head(final)
    for handle in handles:
        handle.remove()
    if "aux_logits" in stored:
        actual["aux_logits"] = model.aux_head(inner["overview"])
    actual |= {key: out[strides_of(manifest, key)] for key, out in inner.items()}
    if "grad" in stored:
        actual["grad"] = torch.autograd.grad(actual["logits"].sum(), x)[0][strides_of(manifest, "grad")]
    actual |= {f"tap.{key}": thinned(as_published(key, out)) for key, out in outputs.items()}
    assert actual.keys() == stored.keys()
    errors = {}
    for key, expected in stored.items():
        there = ~actual[key].isnan()
        assert there.all() or (key.endswith(".0.attn.proj") and there.sum() > 100)
        errors[key] = assert_golden(key, expected[there], actual[key][there])
    record_agreement(model_name, name, errors)


def as_published(key, out):
    """Layout of the published module's output: projections of window attention came as windows, ours as a map.

    Ours leaves out the pixels of the padding, which nothing reads: they are NaN here and not compared.
    """
    if key.endswith(".0.attn.proj") and out.dim() == 4:
        height, width = (-side % 7 for side in out.shape[1:3])
        padded = torch.nn.functional.pad(out, (0, 0, 0, width, 0, height), value=math.nan)
        return split_windows(padded, 7)
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_weights_have_the_published_shapes(name):
    manifest = fill.json.loads((fill.HERE / f"backbones/{name}.json").read_text())
    model = timm.create_model(SHAPES[name], device="meta")
    assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    module = __import__(type(model).__module__, fromlist=["checkpoint_filter_fn"])
    published = {key: torch.empty(spec["shape"], device="meta") for key, spec in manifest["tensors"].items()}
    renamed = module.checkpoint_filter_fn(published, model)
    own = {key: tensor.shape for key, tensor in model.state_dict().items() if "num_batches" not in key}
    assert {key: tensor.shape for key, tensor in renamed.items()} == own
