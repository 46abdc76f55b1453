"""Python blocks of the documentation run as they stand, each in a namespace of its own."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ["explain.md", "export.md", "frameworks.md", "scaling.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks():
    """Page, line of the block's first line of code, and the code, of every page."""
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            yield page, text.count("\n", 0, match.start(1)) + 1, match[1]


BLOCKS = list(blocks())


def test_every_page_has_blocks():
    assert {page for page, _, _ in BLOCKS} == set(PAGES)


@pytest.mark.parametrize("page, line, code", BLOCKS, ids=[f"{page}:{line}" for page, line, _ in BLOCKS])
def test_block_runs(page, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what a block writes
    # blank lines in front, so that an error names the page's own line
    exec(compile("\n" * (line - 1) + code, str(DOCS / page), "exec"), {"__name__": "__main__"})
