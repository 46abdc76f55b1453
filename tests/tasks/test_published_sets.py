"""Experiments on published sets, from the archives as downloaded to masks."""

import json

import made_up_archives
import numpy as np
import pytest
from PIL import Image

from visionattn.cli import main

FSGNET = ["model.base_c=4", "+model.depths=[1,1,1,1]"]
UNET = ["model.backbone=test_biformer", "+model.decoder_kwargs.decoder_channels=[16,16,8,8,8]"]
EXPERIMENTS = {
    "drive": ("drive/fsgnet", FSGNET, 20),
    "chase": ("chase/unet_biformer_s", UNET, 8),
    "stare": ("stare/unet_biformer_s", UNET, 10),
    "hrf": ("hrf/fsgnet", FSGNET, 30),
    "isic2018": ("isic/herseg", ["model.backbone=lgvit_d24"], 1),
}
TWO_STEPS = [
    "trainer=cpu",
    "trainer.max_epochs=1",
    "+trainer.limit_train_batches=2",
    "+trainer.limit_val_batches=2",
    "task.warmup_epochs=0",
    "data.batch_size=1",
    "data.workers=0",
    "data.transform.size=64",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    # the others differ in their archives alone, which tests/data unpacks
    "name",
    [pytest.param(n, marks=[] if n in ("isic2018", "drive") else pytest.mark.thorough) for n in EXPERIMENTS],
)
def test_archives_become_a_trained_network_and_its_masks(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(made_up_archives, "SHAPE", (64, 72))
    experiment, model, count = EXPERIMENTS[name]
    archives, root, run = getattr(made_up_archives, name)(tmp_path), tmp_path / "set", tmp_path / "run"
    few = ["--partial"] if name == "isic2018" else []
    main(["data", "prepare", name, *map(str, archives), "--output", str(root), *few])
    where = [f"data.root={root}", f"output_dir={tmp_path}", "name=run"]
    schedule = ["task.cycles=1"] if "herseg" not in experiment else []
    main(["train", f"experiment=medical/{experiment}", *where, *TWO_STEPS, *schedule, *model])
    main(["eval", str(run), "data.val_split=test"])
    (result,) = json.loads((run / "eval" / "test" / "metrics.json").read_text())["classes"].values()
    assert result["images"] == count
    image = sorted((root / "images").iterdir())[0]
    main(["predict", "--run", str(run), str(image), "--output", str(tmp_path / "masks")])
    mask = np.asarray(Image.open(tmp_path / "masks" / f"{image.stem}_mask.png"))
    assert mask.shape == (64, 72) and set(np.unique(mask)) <= {0, 1}
