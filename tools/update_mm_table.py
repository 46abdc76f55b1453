"""Write the table of docs/mm.md from docs/mm.csv; --measure first counts parameters and MACs of configs/mm again."""

import argparse
from pathlib import Path

import visionattn.integrations.mm  # noqa: F401  (completes mmcv, which the next import needs)
from visionattn.integrations._mm_table import page_with_table, update_figures

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="takes about five minutes")
    if parser.parse_args().measure:
        update_figures(ROOT)
    (ROOT / "docs" / "mm.md").write_text(page_with_table(ROOT), encoding="utf-8")
