"""Rules of the house that no linter knows: sizes, docstrings, what an import costs and pulls in."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import visionattn

ROOT = Path(__file__).parent.parent
PACKAGE = Path(visionattn.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
# what a class's own docstring says already
INHERITED = {"forward", "extra_repr"}


def short(path):
    return str(path.relative_to(PACKAGE.parent if path.is_relative_to(PACKAGE) else ROOT))


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


EVERY_SOURCE = pytest.mark.parametrize("path", SOURCES, ids=short)


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tools").rglob("*.py"))], ids=short)
def test_file_is_short(path):
    model = path.parent == PACKAGE / "models" and not path.name.startswith("_")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (600 if model else 400)


@EVERY_SOURCE
def test_functions_are_short(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, FUNCTION):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            # what one Triton program does cannot be split without hiding its plan
            assert length <= (120 if path.name.startswith("kernels_") else 60), f"{node.name} has {length} lines"


def public(node, prefix=""):
    """Names and nodes of the public classes, functions and methods below a module or class."""
    for child in node.body:
        if isinstance(child, FUNCTION | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{child.name}.")


@EVERY_SOURCE
def test_everything_public_has_a_docstring(path):
    tree = parse(path)
    assert ast.get_docstring(tree), "the module has none"
    bare = [name for name, node in public(tree) if not ast.get_docstring(node)]
    assert not [name for name in bare if not ("." in name and name.split(".")[1] in INHERITED)]


@pytest.mark.parametrize("path", [path for path in SOURCES if not path.name.startswith("cli")], ids=short)
def test_nothing_prints_but_the_command(path):
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_every_model_file_is_imported():
    files = {path.stem for path in (PACKAGE / "models").glob("*.py") if not path.name.startswith("_")}
    imports = [node for node in ast.walk(parse(PACKAGE / "models" / "__init__.py")) if isinstance(node, ast.ImportFrom)]
    assert files == {alias.name for node in imports if node.module == "visionattn.models" for alias in node.names}


def targets():
    """Every ``_target_`` of the configs and the files that name it."""
    found = {}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        for name in re.findall(r"^[^#\n]*_target_:\s*[\"']?([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(name, []).append(path.name)
    return found


def locate(name):
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def test_every_target_of_the_configs_imports():
    found = targets()
    assert found, "no config names a _target_"
    for name, files in found.items():
        assert callable(locate(name)), f"{name} in {files}"


def test_files_name_no_place_on_a_machine():
    folders = ("visionattn", "configs", "tools", "tests", "docs", "checkpoints", ".ci")
    files = [*ROOT.glob("*.*"), ROOT / "Makefile", *(p for folder in folders for p in (ROOT / folder).rglob("*"))]
    place = re.compile(r"""(?:^|[\s"'`=(,:])(?:/(?:work|home|root|tmp|Users)/\w|[A-Z]:\\\w)""", re.MULTILINE)
    found = []
    for path in files:
        body = path.read_bytes() if path.is_file() else b""
        if b"\0" not in body and (match := place.search(body.decode("utf-8", "replace"))):
            found.append((path, match[0]))
    assert not found


# importing the package

MEASURE = """
import json, sys, time
start = time.process_time()
import timm
before = set(sys.modules)
middle = time.process_time()
import visionattn
end = time.process_time()
everything = sorted(sys.modules)
print(json.dumps(dict(share=(end - middle) / (middle - start), new=sorted(set(everything) - before), all=everything)))
"""


def python(program, *options):
    command = [sys.executable, *options, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_import_is_quick_and_pulls_in_nothing_more():
    result = python(MEASURE, "-W", "error")
    assert result.returncode == 0 and not result.stderr, result.stderr
    imports = json.loads(result.stdout)
    heavy = {"hydra", "omegaconf", "lightning", "pytorch_lightning", "torchmetrics", "matplotlib"}
    heavy |= {"mmengine", "mmcv", "mmseg", "mmdet", "segmentation_models_pytorch"}
    assert not heavy & {name.partition(".")[0] for name in imports["all"]}
    assert not [name for name in imports["new"] if name.partition(".")[0] == "triton"]
    assert imports["share"] < 0.12  # of the time of timm, whatever the machine and what else it does


def test_package_works_without_triton_and_connections():
    code = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"connection to {args}")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.modules["triton"] = None
import timm, torch, visionattn
for name in visionattn.list_models():
    timm.create_model(name, device="meta")
visionattn.create_model("test_biformer")(torch.zeros(2, 3, 64, 64)).sum().backward()
import visionattn.tasks.train, visionattn.tasks.export, visionattn.explain, visionattn.integrations.web
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
