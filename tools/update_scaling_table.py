"""Write the tables of docs/scaling.md; --check only says whether they are up to date."""

import argparse
import sys
from pathlib import Path

from visionattn.tasks.scaling import PAGE, page_with_tables, write_page

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is out of date, write nothing")
    if parser.parse_args().check:
        sys.exit(0 if page_with_tables(ROOT) == (ROOT / PAGE).read_text(encoding="utf-8") else f"out of date: {PAGE}")
    print(PAGE, "changed" if write_page(ROOT) else "is up to date")
