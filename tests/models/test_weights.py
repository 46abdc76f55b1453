"""Loading checkpoints: real downloads from a local server, and every way in which a file can be wrong."""

import http.server
import os
import pickle
import threading

import pytest
import timm
import torch
from safetensors.torch import save_file

import visionattn
from visionattn.models.biformer import checkpoint_filter_fn

NAME = "test_biformer"
HTML = (
    b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>"
    + b"<p>Please sign in.</p>" * 50
    + b"</body></html>"
)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    return timm.create_model(NAME).state_dict()


@pytest.fixture
def checkpoint(weights, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": weights}, path)
    return path


def load(path, name=NAME, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)


def assert_loaded(model, weights, but=()):
    for key, value in model.state_dict().items():
        assert key.startswith(but) or torch.equal(value, weights[key]), key


# downloads


class Server:
    """Serves ``files`` (path to bytes) on this machine and records what was asked for."""

    def __init__(self):
        self.files, self.asked, self.stop_after = {}, [], None
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                body = server.files.get(self.path)
                if body is None:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: server.stop_after])

            def log_message(self, *args):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.httpd.server_port}"
        self.thread = threading.Thread(target=self.httpd.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
        self.thread.start()

    def close(self):
        if self.thread.is_alive():
            self.httpd.shutdown()
            self.httpd.server_close()
            self.thread.join()


@pytest.fixture
def server(monkeypatch, checkpoint):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    server.files["/share/content"] = checkpoint.read_bytes()
    yield server
    server.close()


def fetch(server, cache, name=NAME, path="/share/content", **kwargs):
    overlay = dict(url=server.address + path, hf_hub_id=None)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache, **kwargs)


def test_weights_are_downloaded_once(server, weights, tmp_path):
    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        assert_loaded(fetch(server, cache), weights)
    assert server.asked == ["/share/content"]
    assert os.listdir(cache) == ["test_biformer.untrained.pth"]


def test_models_at_addresses_that_end_alike_keep_apart(server, weights, tmp_path):
    nano = timm.create_model("biformer_nano").state_dict()
    torch.save(nano, tmp_path / "nano.pth")
    server.files["/nano/share/content"] = (tmp_path / "nano.pth").read_bytes()
    cache = tmp_path / "cache"
    assert_loaded(fetch(server, cache), weights)
    assert_loaded(fetch(server, cache, "biformer_nano", "/nano/share/content"), nano)
    assert sorted(os.listdir(cache)) == ["biformer_nano.untrained.pth", "test_biformer.untrained.pth"]


def test_default_cache_is_the_hub_folder_of_torch(server, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    assert_loaded(fetch(server, None), weights)
    assert (tmp_path / "hub" / "checkpoints" / "test_biformer.untrained.pth").is_file()


def test_missing_address_is_named_and_leaves_nothing(server, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(RuntimeError, match=rf"{server.address}/gone.*404.*dict\(file=") as error:
        fetch(server, cache, path="/gone")
    assert error.type is RuntimeError
    assert not cache.exists() or not os.listdir(cache)


def test_silent_server_is_named(server, tmp_path):
    server.close()
    with pytest.raises(RuntimeError, match=f"{server.address}/share/content"):
        fetch(server, tmp_path / "cache")


@pytest.mark.parametrize("sent", [0, 1000, -1])
def test_broken_download_is_named_and_leaves_nothing(server, tmp_path, weights, sent):
    cache, server.stop_after = tmp_path / "cache", sent
    with pytest.raises((RuntimeError, ValueError), match=r"share/content"):
        fetch(server, cache)
    assert not cache.exists() or not os.listdir(cache)
    server.stop_after = None
    assert_loaded(fetch(server, cache), weights)


def test_good_download_survives_a_model_that_it_does_not_fit(server, tmp_path, weights):
    cache = tmp_path / "cache"
    assert_loaded(fetch(server, cache), weights)
    with pytest.raises(ValueError, match="does not fit"):
        fetch(server, cache, depths=(2, 1, 1, 1))
    assert os.listdir(cache) == ["test_biformer.untrained.pth"]


def test_page_instead_of_weights_is_named(server, tmp_path):
    server.files["/share/content"] = HTML
    with pytest.raises(ValueError, match=r"test_biformer\.untrained\.pth"):
        fetch(server, tmp_path / "cache")


def test_model_without_weights_says_so():
    with pytest.raises(RuntimeError, match=r"[Nn]o pretrained weights"):
        timm.create_model(NAME, pretrained=True)


def test_what_timm_refuses_of_its_own_models_is_a_value_error(tmp_path, monkeypatch):
    """Through ``visionattn.create_model``, which the commands use."""

    def create(name="test_resnet", **overlay):
        return visionattn.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)

    with pytest.raises(ValueError, match=r"^test_nat: No pretrained weights exist .*list_pretrained\('test_nat'\)"):
        visionattn.create_model("test_nat", pretrained=True)
    with pytest.raises(ValueError, match=r"^test_resnet.none: Invalid pretrained tag"):
        create("test_resnet.none")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere\.pth"):
        create(file="nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere\.pth"):
        visionattn.create_model("test_resnet", checkpoint_path="nowhere.pth")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"^test_resnet: Error\(s\) in loading state_dict"):
        create(file=str(tmp_path / "other.pth"))
    monkeypatch.delenv("VISIONATTN_TEST_MALICIOUS", raising=False)
    torch.save({"model": Malicious()}, tmp_path / "malicious.pth")
    with pytest.raises(ValueError, match=r"malicious\.pth holds more than tensors and is refused"):
        create(file=str(tmp_path / "malicious.pth"))
    assert "VISIONATTN_TEST_MALICIOUS" not in os.environ


# files


@pytest.mark.parametrize("inner", ["model", None])
def test_own_checkpoint_loads(weights, tmp_path, inner):
    torch.save({inner: weights} if inner else weights, tmp_path / "w.pth")
    assert_loaded(load(tmp_path / "w.pth"), weights)


def test_trained_weights_are_taken_rather_than_averaged_ones(weights, tmp_path):
    averaged = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    torch.save({"model_ema": averaged, "model": weights, "epoch": 3}, tmp_path / "w.pth")
    model = load(tmp_path / "w.pth")
    assert_loaded(model, weights)
    assert model.pretrained_cfg["state_dict"] is None and model.pretrained_cfg["file"]


@pytest.mark.parametrize("num_classes", [1000, 5])
def test_safetensors_load(weights, tmp_path, num_classes):
    save_file(weights, tmp_path / "w.safetensors")
    model = load(tmp_path / "w.safetensors", num_classes=num_classes)
    assert_loaded(model, weights, but=() if num_classes == 1000 else "head.fc.")
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, num_classes)


def test_other_channels_load(checkpoint, weights):
    model = load(checkpoint, in_chans=1)
    assert_loaded(model, weights, but="stem.0.weight")
    assert torch.allclose(model.stem[0].weight, weights["stem.0.weight"].sum(1, keepdim=True))


def test_feature_extractor_loads(checkpoint, weights):
    model = load(checkpoint, features_only=True)
    assert_loaded(model.model if hasattr(model, "model") else model, weights)


CLASSES = pytest.mark.parametrize("num_classes", [1000, 5])


@CLASSES
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_named(weights, tmp_path, keep, kind, num_classes):
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=kind == "zip")
    body = path.read_bytes()
    path.write_bytes(body[: int(len(body) * keep)])
    with pytest.raises(ValueError, match=path.name):
        load(path, num_classes=num_classes)


@CLASSES
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "body", [b"no weights here\n", HTML, b"\x00" * 100, b"\x80\x02."], ids=["text", "html", "zeros", "stub"]
)
def test_other_content_is_named(tmp_path, body, suffix, num_classes):
    path = tmp_path / f"page{suffix}"
    path.write_bytes(body)
    with pytest.raises(ValueError, match=path.name):
        load(path, num_classes=num_classes)


@CLASSES
@pytest.mark.parametrize("other", ["biformer_nano", "biformer_t", "test_vit"])
def test_other_architecture_is_named(tmp_path, other, num_classes):
    path = tmp_path / "other.pth"
    torch.save(timm.create_model(other).state_dict(), path)
    with pytest.raises(ValueError, match=path.name):
        load(path, num_classes=num_classes)


@CLASSES
@pytest.mark.parametrize("change", ["missing", "foreign", "shape", "empty", "tensor", "number"])
def test_changed_checkpoint_is_named(weights, tmp_path, change, num_classes):
    path, changed = tmp_path / "changed.pth", dict(weights)
    if change == "missing":
        del changed["stages.1.blocks.0.attn.qkv.weight"]
    elif change == "foreign":
        changed["stages.1.blocks.0.attn.router.weight"] = torch.zeros(2)
    elif change == "shape":
        changed["stages.1.blocks.0.attn.qkv.weight"] = torch.zeros(2, 2)
    torch.save({"empty": {}, "tensor": torch.zeros(3), "number": 3}.get(change, changed), path)
    with pytest.raises(ValueError, match=path.name):
        load(path, num_classes=num_classes)


def test_missing_classifier_is_named(weights, tmp_path):
    torch.save({k: v for k, v in weights.items() if not k.startswith("head.fc")}, tmp_path / "headless.pth")
    with pytest.raises(ValueError, match=r"headless\.pth"):
        load(tmp_path / "headless.pth")


@CLASSES
def test_missing_file_is_named(tmp_path, num_classes):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load(tmp_path / "nowhere.pth", num_classes=num_classes)


class Malicious:
    def __reduce__(self):
        return exec, ("import os; os.environ['VISIONATTN_TEST_MALICIOUS'] = 'ran'",)


@CLASSES
@pytest.mark.parametrize("inside", ["alone", "with_weights", "plain_pickle"])
def test_malicious_file_is_not_executed(weights, tmp_path, monkeypatch, inside, num_classes):
    monkeypatch.delenv("VISIONATTN_TEST_MALICIOUS", raising=False)
    path = tmp_path / "malicious.pth"
    if inside == "plain_pickle":
        path.write_bytes(pickle.dumps({"model": Malicious()}))
    else:
        torch.save(Malicious() if inside == "alone" else {"model": weights, "more": Malicious()}, path)
    with pytest.raises(ValueError, match=r"malicious\.pth"):
        load(path, num_classes=num_classes)
    assert "VISIONATTN_TEST_MALICIOUS" not in os.environ
    if inside == "plain_pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert os.environ["VISIONATTN_TEST_MALICIOUS"] == "ran"  # the file was able to


# names


def test_own_keys_pass_unchanged(weights):
    model = timm.create_model(NAME)
    for content in (weights, {"model": weights}):
        filtered = checkpoint_filter_fn(content, model)
        assert filtered.keys() == weights.keys()
        assert all(filtered[key] is weights[key] for key in weights)
