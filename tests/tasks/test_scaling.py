"""The arithmetic of docs/scaling.md and its tables."""

from pathlib import Path

import pytest

from visionattn.tasks import scaling

ROOT = Path(__file__).parents[2]


def test_page_shows_the_present_tables():
    text = scaling.page_with_tables(ROOT)
    assert (ROOT / scaling.PAGE).read_text(encoding="utf-8") == text, "run python tools/update_scaling_table.py"
    recipes = sorted((ROOT / "configs" / "experiment" / "imagenet").glob("*.yaml"))
    assert recipes and all(f"| `{path.stem}` | " in text for path in recipes)


def test_interval_loses_the_least_time():
    best = scaling.young_interval(5, 3600)
    lost = scaling.lost_share(best, 5, 3600)
    assert lost < scaling.lost_share(1.2 * best, 5, 3600) and lost < scaling.lost_share(best / 1.2, 5, 3600)
    assert best == pytest.approx(189.7, abs=0.1)


def test_hours_count_all_images():
    # one GPU's second is 1,000 images, at 95 % on each of 8
    assert scaling.training_hours(1000, 300, 8, images=7600 * 3600) == pytest.approx(300)


def test_page_without_markers_is_named(tmp_path):
    for folder in ("docs/benchmarks", "configs"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("docs/benchmarks/models.csv", "docs/models.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / scaling.PAGE).write_text("no tables here")
    with pytest.raises(ValueError, match=r"scaling\.md must hold the markers"):
        scaling.page_with_tables(tmp_path)
