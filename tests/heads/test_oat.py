"""OAT against the published network, and what must hold for any number of objects and any backbone."""

import json
import re

import pytest
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights

from visionattn.heads.oat import OAT, Scenes

SMALL = dict(rows=3, cols=4, dim=32, num_heads=2, mlp_dim=32, depths=(1, 1), crop=(29, 29))


def whole_manifest(manifest):
    """The manifest with the tensors of all four layers."""
    tensors = {}
    for key, tensor in manifest["tensors"].items():
        for i in range(4) if ".layers.0." in key else (0,):
            tensors[key.replace(".layers.0.", f".layers.{i}.")] = tensor
    return manifest | dict(tensors=tensors)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    manifest, stored = load_reference("heads/oat")
    manifest = whole_manifest(manifest)
    path = tmp_path_factory.mktemp("oat") / "published.pth"
    torch.save(published_weights(manifest), path)
    network = OAT().double().eval().load_published(path)
    given = manifest["input"]
    crops = inputs(given["shape"], given["seed"]).permute(0, 1, 4, 2, 3)
    places = torch.stack([torch.arange(22) // 11, torch.arange(22) % 11], -1).expand(2, -1, -1)
    target = torch.tensor(given["targets"])
    scenes = Scenes(crops, torch.zeros(2, 22, 4), places.double(), target, torch.ones(2, 22, dtype=torch.bool))
    return manifest, stored, network, scenes, path


def paths_of(gazes):
    longest = max(map(len, gazes))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in gazes])


def test_network_and_greedy_decoding_equal_the_published(published):
    manifest, stored, network, scenes, _ = published
    with torch.no_grad():
        memory = network.encode(scenes)
        tokens, classes = network.teacher(paths_of(manifest["input"]["gazes"]), 22)
        logits = network.decode(memory, tokens)
        paths = network.generate(memory, manifest["greedy"]["max_len"])
    assert_golden("logits", stored["logits"], logits.transpose(0, 1))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten(), ignore_index=23)
    assert loss.item() == pytest.approx(stored["loss"].item(), rel=1e-8)
    assert network.path_loss(logits, classes).item() == pytest.approx(stored["loss"].item(), rel=1e-6)
    assert_golden("encoder", stored["encoder"], memory.tokens.transpose(0, 1)[::8, :, ::64])
    assert paths == manifest["greedy"]["gazes"]


def test_parameters_are_the_published_ones_without_those_that_never_run(published):
    manifest, _, network, _, _ = published
    unused = sum(
        torch.Size(t["shape"]).numel() for k, t in manifest["tensors"].items() if k.startswith(("gener", "Linear"))
    )
    assert sum(p.numel() for p in network.parameters()) + unused == manifest["params"] == 18_269_179


def test_other_files_are_refused(published, tmp_path):
    weights = torch.load(published[4], weights_only=True)
    del weights["pe"]  # the published file has none
    torch.save(weights, tmp_path / "a.pth")
    assert OAT().load_published(tmp_path / "a.pth").pe.shape == (11, 86)
    with pytest.raises(ValueError, match="0 tensors are missing.* 1 of another shape .*encoder.fc"):
        OAT(crop=(93, 93)).load_published(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="18 unknown"):
        OAT(depths=(4, 3)).load_published(tmp_path / "a.pth")


def made_up(count=5, batch=2, size=29, whole=False):
    image = torch.rand(batch, 3, 64, 64) if whole else torch.rand(batch, count, 3, size, size)
    corner = torch.rand(batch, count, 2) * 40
    boxes = torch.cat([corner, corner + 16], -1)
    places = torch.rand(batch, count, 2) * 3  # free boxes: rows and columns between whole ones
    return Scenes(image, boxes, places, torch.tensor([1, 3][:batch]), torch.ones(batch, count, dtype=torch.bool))


def padded(scenes, more=3):
    batch = len(scenes.mask)
    rest = torch.rand(batch, more, 4) * 50
    image = scenes.image
    if image.dim() == 5:
        image = torch.cat([image, torch.rand(batch, more, *image.shape[2:])], 1)
    return Scenes(
        image,
        torch.cat([scenes.boxes, rest], 1),
        torch.cat([scenes.places, rest[..., :2]], 1),
        scenes.target,
        torch.nn.functional.pad(scenes.mask, (0, more)),
    )


@pytest.mark.parametrize("kwargs", [{}, dict(objects="image", backbone="test_biformer")], ids=["crops", "image"])
def test_padding_changes_nothing(kwargs):
    model = OAT(**SMALL, **kwargs).eval()
    few = made_up(whole=bool(kwargs))
    many = padded(few)
    paths = torch.tensor([[0, 4, 4, 1], [2, 3, -1, -1]])
    with torch.no_grad():
        expected, found = model(few, model.teacher(paths, 5)[0]), model(many, model.teacher(paths, 8)[0])
        assert_close("loss", model.loss(few, paths), model.loss(many, paths), 1e-5)
        assert model.generate(model.encode(few), 6) == model.generate(model.encode(many), 6)
    assert torch.isinf(found[..., 5:8]).all()
    assert_close("logits", expected, found[..., [0, 1, 2, 3, 4, 8, 9]], 1e-5)


def test_a_batch_of_scenes_of_different_size_equals_the_scenes_alone():
    model = OAT(**SMALL, spp=2).eval()
    small, large = made_up(3, 1, 20), made_up(6, 1, 20)
    both = Scenes(*(torch.cat(pair) for pair in zip(padded(small), large, strict=True)))
    with torch.no_grad():
        alone = model.generate(model.encode(small), 5) + model.generate(model.encode(large), 5)
        assert model.generate(model.encode(both), 5) == alone


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(spp=3),
        dict(backbone="test_davit", crop=(32, 32)),
        dict(backbone="test_efficientnet"),
        dict(objects="image", backbone="test_nat", backbone_kwargs=dict(level=1, cells=1)),
    ],
)
def test_any_encoder_of_objects_learns(kwargs):
    model = OAT(**{**SMALL, **kwargs})
    scenes = made_up(whole="objects" in kwargs, size=32)
    loss = model.loss(scenes, torch.tensor([[0, 4, 1], [2, 3, -1]]))
    loss.backward()
    # the pointer's readout adds one constant to every class, which a softmax does not see
    unused = [name for name, p in model.named_parameters() if p.grad is None and "backbone" not in name]
    assert loss.isfinite() and not unused


def test_sampling_is_reproducible_and_never_gives_padding_or_an_empty_path():
    model = OAT(**SMALL, spp=2).eval()
    scenes = padded(made_up())
    with torch.no_grad():
        memory = model.encode(scenes).repeat(20)
    draws = [model.generate(memory, 4, True, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert draws[0] == draws[1]
    assert all(1 <= len(path) <= 4 and max(path) < 5 for path in draws[0])
    assert len({tuple(path) for path in draws[0]}) > 5


def test_scenes_without_a_target_end_too():
    model = OAT(**SMALL, spp=2).eval()
    scenes = made_up()._replace(target=torch.tensor([-1, -1]))
    with torch.no_grad():
        assert model.loss(scenes, torch.tensor([[0, 4], [2, -1]])).isfinite()
        assert all(model.generate(model.encode(scenes), 4))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(dim=30), "rows=3, cols=4, dim=30"),
        (dict(crop=(20, 20)), r"crop=(20, 20) is too small"),
        (dict(crop=(16, 20), spp=2), "19 pixels a side are needed"),
        (dict(spp=1), "spp=1 must be 0, 2, 3 or 4"),
        (dict(objects="image"), "expected objects='crops', or 'image' with a backbone"),
        (dict(backbone_kwargs=dict(x=1)), "need a backbone"),
        (dict(backbone="biformerr_s"), "unknown backbone 'biformerr_s'; nearest: biformer_s"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OAT(**{**SMALL, **kwargs})


def test_bad_scenes():
    model, scenes = OAT(**SMALL), made_up()
    with pytest.raises(ValueError, match=r"5, 5\] objects and the targets \[1, 7\]"):
        model.encode(scenes._replace(target=torch.tensor([1, 7])))
    with pytest.raises(ValueError, match=r"\[5, 0\] objects"):
        model.encode(scenes._replace(mask=torch.tensor([[True] * 5, [False] * 5]), target=torch.tensor([0, -1])))
    with pytest.raises(ValueError, match="takes crops .* set objects='image'"):
        model.encode(made_up(whole=True))
    image = OAT(**SMALL, objects="image", backbone="test_biformer")
    with pytest.raises(ValueError, match="takes images .* set objects='crops'"):
        image.encode(scenes)


def test_manifest_is_small():
    assert len(json.dumps(load_reference("heads/oat")[0])) < 9000
