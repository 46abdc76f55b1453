"""The files in ``configs/mm``: every one builds, and its network has the parameters that the papers print."""

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
from made_up_mm import CONFIGS, made_up_ade20k, small_config, swap_backbone
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope, init_default_scope
from PIL import Image

from visionattn.integrations import mm
from visionattn.integrations._mm_table import build_on_meta, measure, page_with_table

pytestmark = pytest.mark.mm
ROOT = CONFIGS.parent.parent
FILES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("[!_]*/*.py"))
with (ROOT / "docs" / "mm.csv").open() as table:
    ROWS = {row["config"]: row for row in csv.DictReader(table)}
BY_SIZE = sorted(FILES, key=lambda f: float(ROWS[f]["params_m"]), reverse=True)  # the smallest last, which stays
ONE_EACH = {f.split("/")[0] + "/" + re.split(f"_{f.split('/')[0]}_", f.split("/")[1])[0]: f for f in BY_SIZE}
BUILT = [pytest.param(file, marks=[] if file in ONE_EACH.values() else pytest.mark.thorough) for file in FILES]


def test_every_file_has_a_row_in_the_table():
    assert set(FILES) == set(ROWS)
    assert page_with_table(ROOT) == (ROOT / "docs" / "mm.md").read_text()


def bases(path):
    found = re.search(r"^_base_ = (\[[^\]]*\]|\"[^\"]*\")", path.read_text(), re.MULTILINE)
    return [path.parent / name for name in re.findall(r'"([^"]+)"', found[1])] if found else []


def test_a_value_is_at_most_two_hops_away():
    for path in (CONFIGS / f"{file}.py" for file in FILES):
        assert bases(path), path
        assert not [last for base in bases(path) for second in bases(base) for last in bases(second)], path


@pytest.mark.slow
@pytest.mark.parametrize("file", BUILT)
def test_file_builds_network_and_data(file):
    config = Config.fromfile(CONFIGS / f"{file}.py")
    model, row = build_on_meta(config), ROWS[file]
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert f"{millions:.1f}" == row["params_m"]
    if row["published_params"]:
        assert millions == pytest.approx(float(row["published_params"].split()[0]), rel=0.02)
    names = [name for name, _ in model.named_parameters()]
    spared = config.optim_wrapper.get("paramwise_cfg", {}).get("custom_keys", {})
    assert all(any(key in name for name in names) for key in spared), f"{list(spared)} spare nothing"
    with DefaultScope.overwrite_default_scope(config.default_scope):
        for split in ("train", "val", "test"):
            Compose(config[f"{split}_dataloader"].dataset.pipeline)
    assert config.auto_scale_lr.base_batch_size == 8 * config.train_dataloader.batch_size


@pytest.mark.slow
def test_counts_are_the_published_ones():
    parameters, macs = measure(Config.fromfile(CONFIGS / "nat" / "mask_rcnn_nat_mini_3x_coco.py"))
    assert round(parameters / 1e6) == 40 and round(macs / 1e9) == 225


def test_page_lists_what_is_changed():
    page = (ROOT / "docs" / "mm.md").read_text()
    listed = page.split("| where | what |")[1].split("\n\n")[0].strip().splitlines()[1:]
    assert len(listed) == len(mm.PATCHES)
    for name in ("mmcv._ext", "CheckpointLoader", "MODELS"):
        assert any(name in key for key in mm.PATCHES) and any(name in line for line in listed)


def examples():
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mm.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_example_of_the_page_trains_and_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = made_up_ade20k(tmp_path / "ade")
    shutil.copy(data / "images" / "validation" / "00000000.jpg", "street.jpg")

    file = re.search(r'fromfile\("configs/mm/(.*?)"\)', examples()[0])[1]
    config = small_config(file, data, tmp_path)
    swap_backbone(config, "test_nat")
    monkeypatch.setattr(Config, "fromfile", lambda path: config)
    space = {}
    exec(examples()[0], space)
    assert space["labels"].shape[1:] == Image.open("street.jpg").size[::-1]
    assert Path("outputs/semantic_fpn_biformer_s/iter_4.pth").is_file()


def test_example_configuration_of_the_page_builds(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine" / "own.py").write_text(examples()[1])
    config = Config.fromfile(tmp_path / "mine" / "own.py")
    model = build_on_meta(config)
    assert [x.shape[1] for x in model.backbone(torch.empty(1, 3, 64, 64, device="meta"))] == [96, 192, 384, 768]


def test_scope_needs_no_prefix():
    for scope in ("mmseg", "mmdet"):
        init_default_scope(scope)
        with DefaultScope.overwrite_default_scope(scope):
            from mmengine.registry import MODELS

            assert MODELS.build(dict(type="VisionAttn", model_name="test_nat")).channels == [16, 32, 48, 64]
