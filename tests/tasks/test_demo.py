"""The demo, shortened: every file, and figures that belong together."""

import json

import pytest
from PIL import Image

from visionattn.cli import main


@pytest.mark.slow
def test_demo_writes_report_and_pictures(tmp_path, capsys):
    folder = tmp_path / "demo"
    former = folder / "biformer_nano" / "checkpoints" / "last.ckpt"  # a former demo is replaced
    former.parent.mkdir(parents=True)
    former.touch()
    main(["demo", "--output", str(folder), "trainer.max_epochs=2", "+trainer.limit_train_batches=2"])
    printed = capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    simple = metrics["baselines_top1"]
    assert list(simple.values()) == pytest.approx([0.946, 0.958], abs=0.003)
    ours, peer = metrics["models"].values()
    assert ours["parameters"] < 2e6 and peer["parameters"] < 2e6
    assert ours["epochs"] == len(ours["curve"]["val/top1"]) == 2 and peer["epochs"] == len(peer["curve"]["seconds"])
    # from the saved weights, one picture at a time, against what the training run counted
    assert ours["top1"] == pytest.approx(ours["curve"]["val/top1"][-1], abs=0.002)
    report = (folder / "report.md").read_text()
    assert report in printed
    assert all(f"{value:.1%}" in report for value in (*simple.values(), ours["top1"], peer["top1"]))
    for name in ("learning_curve.png", "predictions.png"):
        image = Image.open(folder / name).convert("L")
        low, high = image.getextrema()
        assert min(image.size) > 300 and low < 64 and high == 255
    assert sorted(path.name for path in folder.iterdir()) == [
        "biformer_nano",
        "edgenext_xx_small",
        "learning_curve.png",
        "metrics.json",
        "predictions.png",
        "report.md",
    ]
