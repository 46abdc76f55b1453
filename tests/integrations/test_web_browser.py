"""The web page in a headless Chromium: choosing, uploading, clicking, asking, and what leaves the machine (nothing)."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import train_runs
from PIL import Image

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parent.parent.parent
WAIT = 120_000  # milliseconds; a busy machine is slow, not wrong
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """Path of an installed Chromium; ``VISIONATTN_CHROMIUM`` names another."""
    found = os.environ.get("VISIONATTN_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert found, f"none of {', '.join(NAMES)} is installed: apt-get install chromium, or set VISIONATTN_CHROMIUM"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("web")
    train_runs(found)
    (found / "tmp").mkdir()
    return found


@pytest.fixture(scope="module")
def server(folder):
    """The running command and the page's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "visionattn.cli", "web", "--models", "test_biformer", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "(Ctrl+C ends it)" in line:
            break
    assert lines and "(Ctrl+C ends it)" in lines[-1], "".join(lines)
    yield process, f"http://127.0.0.1:{port}/"
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def page(server):
    """An opened page, with the addresses that it asked for in ``page.asked``."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        found = browser.new_page(viewport=dict(width=1280, height=900))
        found.set_default_timeout(WAIT)
        found.asked = []
        found.on("request", lambda request: found.asked.append(request.url))
        found.goto(server[1])
        found.wait_for_selector("#run")
        yield found
        browser.close()


def choose(page, text):
    page.click("#model input")
    page.locator("[role=option]", has_text=text).click()
    page.wait_for_function("text => document.querySelector('#model input').value.includes(text)", arg=text)
    page.wait_for_function("() => document.querySelector('#text').innerText.includes('appears here')")


def upload(page, path):
    """Put a picture in place of the present one, and wait until the server knows."""
    before = page.locator("#picture img").get_attribute("src") if page.locator("#picture img").count() else ""
    if before:
        page.locator("#picture button[aria-label^=Remove], #picture button[aria-label=Clear]").first.click()
    page.set_input_files("#picture input[type=file]", path)
    page.wait_for_function("() => document.querySelector('#picture img')?.src.includes('/file=')")


def shown(page, selector):
    """Pixels of what the page shows."""
    page.wait_for_function("s => document.querySelector(s)?.complete", arg=selector)
    path = page.locator(selector).first
    from io import BytesIO

    return np.array(Image.open(BytesIO(path.screenshot())).convert("RGB")).astype(int)


def run(page, text):
    """Press the button and wait for words of the result."""
    page.click("#run")
    page.wait_for_function("text => document.querySelector('#text').innerText.includes(text)", arg=text)


def test_list_has_the_runs_and_says_which_weights_are_random(page):
    page.click("#model input")
    labels = page.locator("[role=option]").all_inner_texts()
    page.keyboard.press("Escape")
    names = "digits (classification run)", "grounding (grounding run)", "nuclei (segmentation run)"
    expected = [*(f"outputs/{name}" for name in names), "test_biformer (random weights)"]
    assert [label.replace("✓", "").strip() for label in labels] == expected
