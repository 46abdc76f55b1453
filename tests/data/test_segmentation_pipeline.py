"""Transforms of image and mask together, reproducible samples, batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from visionattn.data.layouts import LAYOUTS
from visionattn.data.nuclei import Nuclei
from visionattn.data.pipeline import EpochSampler
from visionattn.data.segmentation import IGNORE, Sample
from visionattn.data.segmentation_pipeline import SegmentationSamples, collate_samples
from visionattn.data.segmentation_transforms import SegmentationTransform, cut_mix, to_unit


class Squares:
    """The image is 200 in red where the mask is 1, so that an alignment can be seen; sample ``fault`` is unreadable."""

    classes, in_chans = ["background", "square"], 3

    def __init__(self, count=6, fault=None):
        self.count, self.fault = count, fault

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i == self.fault:
            raise ValueError(f"sample {i} is broken")
        mask = np.zeros((40, 48), dtype=np.int64)
        mask[5 + i : 25 + i, 8:30] = 1
        image = np.zeros((40, 48, 3), dtype=np.uint8)
        image[..., 0] = 200 * mask
        return Sample(image, mask, f"square_{i}")


PLAIN = dict(mean=[0.0], std=[1.0])


@pytest.mark.parametrize("recipe", ["default", "fsgnet", "herseg", "none"])
def test_image_and_mask_stay_aligned(recipe):
    samples = SegmentationSamples(Squares(), SegmentationTransform(recipe, size=32, **PLAIN))
    agreed = []
    for position in range(12):
        item = samples[0, position, position % 6]
        assert item["image"].shape == (3, 32, 32) and item["image"].dtype == torch.float32
        assert item["mask"].shape == (32, 32) and item["mask"].dtype == torch.int64
        assert type(item["image"]) is torch.Tensor and set(item["mask"].unique().tolist()) <= {0, 1, IGNORE}
        # blur and resampling disagree in a rim of the square only
        red = item["image"].max(dim=0).values
        agreed.append(((red > 0.35) == (item["mask"] == 1)).float().mean().item())
    assert np.mean(agreed) > 0.93, agreed


def test_elastic_and_turns_keep_alignment():
    transform = SegmentationTransform("default", size=48, elastic=1.0, **PLAIN)
    item = SegmentationSamples(Squares(), transform)[0, 0, 0]
    assert ((item["image"].max(dim=0).values > 0.35) == (item["mask"] == 1)).float().mean() > 0.9


def test_cut_mix_takes_one_box_of_both():
    from torchvision import tv_tensors

    blank = tv_tensors.Image(torch.zeros(3, 20, 30)), tv_tensors.Mask(torch.zeros(20, 30, dtype=torch.int64))
    full = tv_tensors.Image(torch.ones(3, 40, 24)), tv_tensors.Mask(torch.ones(40, 24, dtype=torch.int64))
    image, mask = cut_mix(blank, full, p=1.0)
    assert 0 < mask.sum() < mask.numel() and torch.equal(image[0].as_subclass(torch.Tensor) > 0.5, mask == 1)
    assert blank[1].sum() == 0
    assert cut_mix(blank, full, p=0.0) is blank


def test_keys_alone_decide_what_is_drawn():
    samples = SegmentationSamples(Squares(), SegmentationTransform("fsgnet", size=24), seed=3)
    torch.manual_seed(1)
    first = samples[2, 5, 1]
    torch.manual_seed(2)
    assert torch.equal(first["image"], samples[2, 5, 1]["image"])
    assert not torch.equal(first["image"], samples[3, 5, 1]["image"])


def test_workers_draw_what_one_process_draws():
    samples = SegmentationSamples(Squares(), SegmentationTransform(size=24), seed=3)
    batches = []
    for workers in (0, 2):
        loader = DataLoader(
            samples, 3, sampler=EpochSampler(samples, shuffle=True), num_workers=workers, collate_fn=collate_samples
        )
        batches.append(list(loader))
    for one, other in zip(*batches, strict=True):
        assert one["name"] == other["name"] and one["image"].shape == (3, 3, 24, 24)
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["mask"], other["mask"])


def test_evaluation_keeps_size_and_ignores_outside_the_field():
    sample = Squares()[0]
    sample.field = np.zeros((40, 48), dtype=bool)
    sample.field[10:30] = True
    sample.spacing = (0.5, 2.0)
    item = SegmentationTransform("fsgnet", train=False)(sample)
    assert item["image"].shape == (3, 40, 48) and item["spacing"] == (0.5, 2.0)
    assert (item["mask"][:10] == IGNORE).all() and (item["mask"][10:30] != IGNORE).all()
    resized = SegmentationTransform("herseg", size=20, train=False)(sample)
    assert resized["image"].shape == (3, 20, 20) and torch.equal(resized["mask"], item["mask"])
    assert resized["spacing"] == (0.5, 2.0)
    sample.mask = None
    assert (SegmentationTransform(train=False)(sample)["mask"] == IGNORE).all()
    with pytest.raises(ValueError, match="square_0 has no mask"):
        SegmentationTransform(size=8)(sample)


def test_depth_is_kept():
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64, 1) * 16
    assert len(to_unit(deep).unique()) == 4096 and to_unit(deep).max() == pytest.approx(65520 / 65535)
    scaled = to_unit(deep, "percentile")
    assert scaled.min() == 0 and scaled.max() == 1 and len(scaled.unique()) > 3900
    floats = np.full((2, 2, 1), 3.5, dtype=np.float32)
    assert (to_unit(floats) == 3.5).all()
    with pytest.raises(ValueError, match="int32"):
        to_unit(floats.astype(np.int32))
    with pytest.raises(ValueError, match="not finite"):
        to_unit(floats * np.nan)


def test_unreadable_samples_are_replaced_left_out_or_raised():
    source, transform = Squares(fault=2), SegmentationTransform(size=16)
    replaced = SegmentationSamples(source, transform, on_error="skip")[0, 0, 2]
    assert replaced["name"] == "square_3" and replaced["skipped"] == ["sample 2 is broken"]
    samples = SegmentationSamples(source, transform, on_error="skip", replace=False)
    batch = collate_samples([samples[0, 0, 2], samples[0, 1, 3]])
    assert batch["name"] == ["square_3"] and batch["skipped"] == ["sample 2 is broken"]
    assert collate_samples([samples[0, 0, 2]])["image"].numel() == 0
    with pytest.raises(ValueError, match="sample 2 is broken.*on_error=skip"):
        SegmentationSamples(source, transform)[0, 0, 2]
    with pytest.raises(ValueError, match="on_error='stop'"):
        SegmentationSamples(source, transform, on_error="stop")


def test_unreadable_partner_is_replaced():
    samples = SegmentationSamples(Squares(count=2, fault=1), SegmentationTransform("fsgnet", size=16), on_error="skip")
    items = [samples[0, position, 0] for position in range(8)]
    assert {item["name"] for item in items} == {"square_0"}
    assert {tuple(item["skipped"]) for item in items} == {(), ("sample 1 is broken",)}


@pytest.mark.parametrize("recipe", ["default", "fsgnet"])
def test_floats_beyond_one_survive_training(recipe):
    image = np.linspace(-100, 900, 64 * 64, dtype=np.float32).reshape(64, 64, 1)
    sample = Sample(image, np.ones((64, 64), dtype=np.int64), "slice")
    transform = SegmentationTransform(recipe, size=48, **PLAIN)
    drawn = []
    for seed in range(6):
        torch.manual_seed(seed)
        drawn.append(transform(sample, sample)["image"])
    assert drawn[0].shape == (1, 48, 48) and max(image.max() for image in drawn) > 500


def test_batch_of_two_sizes_is_refused():
    small = SegmentationTransform(size=16), SegmentationTransform(size=20)
    with pytest.raises(ValueError, match="2 shapes"):
        collate_samples([SegmentationSamples(Squares(), t)[0, 0, 0] for t in small])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(recipe="unet"), "recipe='unet'"),
        (dict(size=0), "size=0"),
        (dict(size=[8, 8, 8]), "size="),
        (dict(intensity="log"), "intensity='log'"),
        (dict(elastic=2.0), "elastic=2.0"),
    ],
)
def test_wrong_transform_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationTransform(**options)


def test_mean_must_fit_the_channels():
    with pytest.raises(ValueError, match="3 channels, but mean has 2"):
        SegmentationTransform(size=16, mean=[0.5, 0.5])(Squares()[0])


def test_nuclei_splits_are_disjoint_bands():
    shares, names = {}, set()
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        source = Nuclei(split, in_chans=1)
        assert len(source) == count
        sample = source[0]
        assert sample.image.shape == (128, 128, 1) and sample.image.dtype == np.float32
        # nuclei are bright
        assert sample.image[sample.mask == 1].mean() > 2 * sample.image[sample.mask == 0].mean()
        shares[split] = np.mean([source[i].mask.mean() for i in range(count)])
        names |= {source[i].name for i in range(count)}
    assert len(names) == 16 and all(0.1 < share < 0.6 for share in shares.values()), shares
    assert len(Nuclei("train", tile=64)) == 32
    with pytest.raises(ValueError, match="tile=100"):
        Nuclei(tile=100)


def test_nuclei_name_the_extra(monkeypatch):
    monkeypatch.setattr("visionattn.data.nuclei.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"visionattn\[seg\]"):
        Nuclei()


CONFIGS = ["nuclei", "masks", "herseg_split", "dicom", "nifti", *LAYOUTS]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_fit_their_sources(name):
    import inspect

    from hydra.utils import get_class
    from omegaconf import OmegaConf

    config = OmegaConf.load(Path(__file__).parents[2] / "configs" / "data" / f"{name}.yaml")
    source = dict(OmegaConf.to_container(config.source, resolve=False))
    parameters = inspect.signature(get_class(source.pop("_target_"))).parameters
    assert set(source) <= set(parameters) - {"split"} and "in_chans" in source
    SegmentationTransform(**config.transform)
    assert (config.train_split, config.val_split, config.val_batch_size) == ("train", "val", 1)
