"""Write the tables of models into README.md and the docs; --check only says whether they are up to date."""

import argparse
import sys
from pathlib import Path

from visionattn.tasks.zoo import pages_with_table, write_tables

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is out of date, write nothing")
    if parser.parse_args().check:
        stale = [path for path, text in pages_with_table(ROOT).items() if path.read_text(encoding="utf-8") != text]
        sys.exit(f"out of date: {', '.join(map(str, stale))}" if stale else 0)
    print(*(path.relative_to(ROOT) for path in write_tables(ROOT)))
