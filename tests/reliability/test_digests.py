"""SHA-256 of weights: stated in the overlay or the index, checked before anything is read."""

import pytest
import timm
import torch

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
