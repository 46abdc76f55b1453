"""The documentation as a site."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "WARNING -" not in result.stderr, result.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    sources = sorted((ROOT / "docs").rglob("*.md"))
    assert {p.relative_to(tmp_path).with_suffix("") for p in pages} >= {
        p.relative_to(ROOT / "docs").with_suffix("") for p in sources
    }
    loaded = re.compile(
        r"<(?:script|img|link(?= [^>]*rel=.?(?:stylesheet|preconnect|icon)))[^>]*(?:src|href)=\"?https?:"
    )
    for page in pages:
        assert not loaded.findall(page.read_text(encoding="utf-8")), page.name
