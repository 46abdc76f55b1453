"""The web page in a headless Chromium: choosing, uploading, clicking, asking, and what leaves the machine (nothing)."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import train_runs
from PIL import Image

from visionattn.cli import main

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parent.parent.parent
WAIT = 60_000  # milliseconds; a busy machine is slow, not wrong
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
    page.wait_for_function(
        "text => document.querySelector('#about').innerText.includes(text)", arg=text.partition(" ")[0]
    )


def upload(page, path):
    """Give the page a picture in place of the present one."""
    if page.locator("#picture img").count():
        page.locator('#picture button[title="Remove Image"]').first.click()
    page.set_input_files("#picture input[type=file]", path)
    page.wait_for_function("() => document.querySelector('#picture img')?.src.includes('/file=')")


def run(page, text):
    """Press the button and wait for words of the result."""
    page.click("#run")
    page.wait_for_function("text => document.querySelector('#text').innerText.includes(text)", arg=text)


def pixels(page, selector):
    """The picture of an element, as the server gave it."""
    page.wait_for_function("s => document.querySelector(s)?.complete", arg=selector)
    body = page.request.get(page.locator(selector).first.get_attribute("src")).body()
    return np.array(Image.open(BytesIO(body)).convert("RGB"))


def message(page, text):
    """Press the button and wait for a message with these words."""
    page.click("#run")
    page.locator(".toast-body", has_text=text).first.wait_for()


def screenshot(page, folder, name):
    """A picture of the whole page that is not blank."""
    page.screenshot(path=folder / name, full_page=True)
    assert np.array(Image.open(folder / name).convert("L")).std() > 10


def test_list_has_the_runs_and_says_which_weights_are_random(page):
    page.click("#model input")
    labels = page.locator("[role=option]").all_inner_texts()
    page.click("h1")  # closes the list
    names = "digits (classification run)", "grounding (grounding run)", "nuclei (segmentation run)"
    expected = [*(f"outputs/{name}" for name in names), "test_biformer (random weights)"]
    assert [label.strip("✓ \n") for label in labels] == expected


def test_click_shows_the_routed_regions(page, folder):
    choose(page, "outputs/digits")
    assert page.locator("#examples button.gallery-item").count() >= 3
    page.locator("#examples button.gallery-item").first.click()
    page.wait_for_selector("#picture img")
    run(page, "probability")
    assert page.locator("#scores").inner_text().count("%") == 5
    plain, box = pixels(page, "#view img"), page.locator("#view img").bounding_box()
    seen = []
    for x, y in ((0.1, 0.2), (0.9, 0.8)):
        before = page.locator("#view img").get_attribute("src")
        page.locator("#view img").click(position=dict(x=x * box["width"], y=y * box["height"]))
        page.wait_for_function("src => document.querySelector('#view img').src !== src", arg=before)
        page.wait_for_function("() => document.querySelectorAll('#stages img').length === 4")
        marked = (pixels(page, "#view img") != plain).any(2).nonzero()
        assert abs(marked[0].mean() / 448 - y) < 0.03 and abs(marked[1].mean() / 448 - x) < 0.03
        seen.append(pixels(page, "#stages img"))
    assert (seen[0] != seen[1]).any() and ": all" in page.locator("#stages").inner_text()
    screenshot(page, folder, "regions.png")


def test_upload_gets_a_mask_and_mistakes_a_message(page, folder):
    choose(page, "outputs/nuclei")
    (folder / "text.png").write_text("no picture")
    upload(page, folder / "text.png")
    message(page, "text.png is no picture that can be read")
    picture = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "mine.png")
    upload(page, folder / "mine.png")
    run(page, "nucleus")
    assert pixels(page, "#overlay img").shape == picture.shape
    assert page.locator("#view").count() == 0 or not page.locator("#view").is_visible()
    screenshot(page, folder, "mask.png")


def test_question_gets_an_answer(page, folder):
    choose(page, "outputs/grounding")
    message(page, "this run answers questions")
    page.fill("#question textarea, #question input", "where is the red circle?")
    run(page, "red circle")
    screenshot(page, folder, "answer.png")


def test_nothing_is_asked_of_other_machines(page, server):
    """Of all requests of the tests before; the policy would refuse them too."""
    local = (server[1], "data:", "blob:")
    assert page.asked and not [url for url in page.asked if not url.startswith(local)]
    policy = page.request.get(server[1]).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy


def test_port_in_use_is_one_line(server, folder):
    port = server[1].rstrip("/").rpartition(":")[2]
    with pytest.raises(SystemExit, match=f"port {port} is in use .*choose another, for example --port"):
        main(["web", "--port", port])


def test_end_removes_the_uploads(server, folder):
    process, _ = server
    assert list((folder / "tmp").glob("visionattn_web_*/uploads/*"))
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert not list((folder / "tmp").glob("visionattn_web_*"))
