"""SHA-256 of weights: stated in the overlay or the index, checked before anything is read."""

import http.server
import threading

import pytest
import timm
import torch
from huggingface_hub import constants

from visionattn import _files

NAME = "test_patnet"


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(NAME).state_dict(), path)
    return path


def load(path, **overlay):
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(overlay, **path), cache_dir=None)


def test_stated_digest_is_checked(checkpoint):
    digest = _files.sha256(checkpoint)
    load(dict(file=str(checkpoint)), sha256=digest.upper())
    with pytest.raises(ValueError, match=rf"weights\.pth has SHA-256 {digest}, pretrained_cfg_overlay says 0000"):
        load(dict(file=str(checkpoint)), sha256="0" * 64)
    assert checkpoint.is_file()
    with pytest.raises(ValueError, match="'abc' is no SHA-256"):
        load(dict(file=str(checkpoint)), sha256="abc")


@pytest.mark.parametrize("good", [True, False])
def test_download_is_checked_by_the_index(checkpoint, tmp_path, monkeypatch, good):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    url, index = checkpoint.as_uri(), tmp_path / "index.csv"
    digest = _files.sha256(checkpoint) if good else "0" * 64
    index.write_text(f"name,source_sha256,source_url\n{NAME}.untrained,{digest},{url}\n")
    monkeypatch.setattr(_files, "index_path", lambda: index)
    if good:
        load(dict(url=url))
        return
    with pytest.raises(RuntimeError, match="invalid hash value"):
        load(dict(url=url))
    assert not list((tmp_path / "hub").rglob("*.pth")) and checkpoint.is_file()


def test_cached_download_that_has_changed_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    url, index = checkpoint.as_uri(), tmp_path / "index.csv"
    index.write_text(f"name,source_sha256,source_url\n{NAME}.untrained,{_files.sha256(checkpoint)},{url}\n")
    monkeypatch.setattr(_files, "index_path", lambda: index)
    load(dict(url=url))
    (cached,) = (tmp_path / "hub").rglob("*.pth")
    cached.write_bytes(cached.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"untrained\.pth has SHA-256 .*, checkpoints/index\.csv says"):
        load(dict(url=url))


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """A hub on this machine whose one file is ``checkpoint``, with an empty cache."""
    body = checkpoint.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if self.path == "/somebody/patnet/resolve/main/weights.pth" else 404)
            for name, value in {"ETag": '"one"', "X-Repo-Commit": "0" * 40, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield dict(hf_hub_id="somebody/patnet", hf_hub_filename="weights.pth", url="")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("good", [True, False])
def test_file_of_the_hub_is_checked_by_the_index(hub, checkpoint, tmp_path, monkeypatch, good):
    index, digest = tmp_path / "index.csv", _files.sha256(checkpoint) if good else "0" * 64
    index.write_text(f"name,source_sha256,source_url\n{NAME}.untrained,{digest},{hub['hf_hub_id']}\n")
    monkeypatch.setattr(_files, "index_path", lambda: index)
    if good:
        weights = load(hub).state_dict()
        assert all(torch.equal(weights[key], x) for key, x in torch.load(checkpoint, weights_only=True).items())
        return
    with pytest.raises(ValueError, match=rf"weights\.pth has SHA-256 {_files.sha256(checkpoint)}, .*says 0000"):
        load(hub)
