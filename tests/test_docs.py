"""Every block of the documentation is run, parsed or composed; none is passed over.

By the language of a block:

- ``python`` runs as it stands, in an empty folder and a namespace of its own. ``<!-- compiled: REASON -->`` in front of
  one that needs data has it compiled only.
- ``console``: every line is checked for what it names: commands and options of ``visionattn``, configurations that
  Hydra composes, tools, files of tests, extras, targets of the Makefile.
- ``json`` is read; ``text`` and ``bibtex`` are for people.

Blocks behind ``<!-- runs: NAME -->`` run together, in their order, as a user runs them (``test_first_steps``).
"""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import hydra
import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from visionattn.cli import parse
from visionattn.tasks.config import config_folder

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "checkpoints" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- (?P<marker>.*?) -->\n)?```(?P<language>[^\n]*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
LANGUAGES = {"python", "console", "json", "text", "bibtex"}
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@dataclass
class Block:
    """A fenced block: page, line of its first line of content, language, content, and the comment in front of it."""

    page: str
    line: int
    language: str
    body: str
    marker: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(path):
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        page = str(path.relative_to(ROOT))
        yield Block(page, line, match["language"].strip(), match["body"], match["marker"] or "")


BLOCKS = [block for path in PAGES for block in blocks_of(path)]
FIRST_STEPS = [block for block in BLOCKS if block.marker == "runs: first steps"]
PYTHON = [block for block in BLOCKS if block.language == "python" and block not in FIRST_STEPS]


def lines_of(block):
    """Commands, as they stand and as words without comments; continued lines are joined."""
    for line in block.body.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            if words := shlex.split(command, comments=True):
                yield command.strip(), words


def test_every_block_is_of_a_checked_language():
    assert len(BLOCKS) > 60 and FIRST_STEPS
    assert not [f"{block}: {block.language!r}" for block in BLOCKS if block.language not in LANGUAGES]
    known = re.compile(r"|compiled: .+|runs: first steps|zoo table: (begin|end)")
    assert not [f"{block}: {block.marker!r}" for block in BLOCKS if not known.fullmatch(block.marker)]


def test_no_fence_is_missed():
    for path in PAGES:
        fences = re.findall(r"^ *```", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(list(blocks_of(path))), f"{path.name}: a fence that is indented or not closed"


def test_commands_are_in_blocks_of_their_own():
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"^ {4}(?:visionattn|pip|python|make) .*", text, re.MULTILINE), path.name


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(block, tmp_path, monkeypatch):
    # blank lines in front, so that an error names the page's own line
    code = compile("\n" * (block.line - 1) + block.body, str(ROOT / block.page), "exec")
    if block.marker.startswith("compiled: "):
        for name in re.findall(r"\"(?:\.\./)?(configs/[\w/.]+)\"", block.body):
            assert (ROOT / name).is_file(), name
        return
    monkeypatch.chdir(tmp_path)  # for what a block writes
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.925, 0.95, 0.975, 1.0])
def test_serving_code_makes_the_pixels_of_timm(crop_pct):
    (code,) = [block.body for block in PYTHON if "def prepare(" in block.body]
    (function,) = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    for size in ((224, 224), (64, 64), (64, 96)):
        how = dict(input_size=(3, *size), crop_pct=crop_pct, interpolation="bicubic", mean=(0.4,) * 3, std=(0.3,) * 3)
        names = dict(how=how, np=np, Image=Image)
        exec(ast.unparse(function), names)
        for shape in ((80, 121, 3), (333, 250, 3)):
            picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8))
            expected = create_transform(**how, is_training=False)(picture).numpy()[None]
            np.testing.assert_allclose(names["prepare"](picture), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "json"], ids=str)
def test_json_is_json(block):
    json.loads(block.body)


# command lines


def check_pip(words):
    assert words[1] == "install"
    for word in words:
        if extras := re.fullmatch(r"(?:\.|visionattn)\[([\w,]+)\]", word):
            assert set(extras[1].split(",")) <= EXTRAS, word
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()


def check_python(words, parsed):
    if words[1:3] == ["-m", "venv"]:
        return
    if words[1] == "-m":
        raise ValueError(f"{words[2]}: not a module that this test knows")
    assert (ROOT / words[1]).is_file(), words[1]
    commands = {"benchmark_models": ["benchmark"], "benchmark_ops": ["benchmark", "--ops"]}
    if command := commands.get(Path(words[1]).stem):
        parsed.append([*command, *words[2:]])


def check_make(words):
    assert {word for word in words[1:] if "=" not in word} <= TARGETS, words


def check_command(words, parsed):
    """Check a command; those for visionattn's own parser are appended to ``parsed``."""
    while words and re.fullmatch(r"\w+=.*", words[0]):  # variables of the shell
        words = words[1:]
    if words[0] == "compute-sanitizer":
        words = words[words.index("python") :]
    if words[0] == "torchrun":
        parsed.append(words[words.index("visionattn.cli") + 1 :])
        return
    if words[0] == "srun":
        words = words[words.index("visionattn") :]
    if words[0] == "visionattn":
        parsed.append(words[1:])
    elif words[0] in ("python", "python3"):
        check_python(words, parsed)
    elif words[0] == "pip":
        check_pip(words)
    elif words[0] == "make":
        check_make(words)
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests"))
    else:
        assert words == [".", ".venv/bin/activate"], f"{words[0]}: not a command that this test knows"


@pytest.fixture(scope="module")
def command_lines():
    """Every line for visionattn's parser with where it stands; the others are checked on the way."""
    found, wrong = {}, []
    for block in (block for block in BLOCKS if block.language == "console"):
        for line, words in lines_of(block):
            parsed = []
            try:
                check_command(words, parsed)
            except (AssertionError, ValueError, IndexError) as error:
                wrong.append(f"{block}: {line}: {error}")
            found |= {tuple(words): f"{block}: {line}" for words in parsed}
    assert not wrong, "\n".join(wrong)
    return found


def test_commands_are_parsed(command_lines, capsys):
    assert len(command_lines) > 60
    wrong = []
    for words, where in command_lines.items():
        try:
            parse(list(words))
        except SystemExit:
            wrong.append(f"{where}\n    {capsys.readouterr().err.strip().splitlines()[-1]}")
    assert not wrong, "\n".join(wrong)


def test_trainings_compose(command_lines):
    trainings = {tuple(words[1:]): where for words, where in command_lines.items() if words[0] == "train"}
    assert len(trainings) > 20
    wrong = []
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        for overrides, where in trainings.items():
            try:
                hydra.compose("train", overrides=[text for text in overrides if text != "--show"])
            except Exception as error:
                wrong.append(f"{where}\n    {error}")
    assert not wrong, "\n".join(wrong)


# as a user does it


def console_lines(blocks):
    """The command lines of the first steps but for the installation, and their Python blocks."""
    for block in blocks:
        if block.language == "python":
            yield [sys.executable, "-c", block.body], str(block)
            continue
        for line, words in lines_of(block):
            if words[0] == "visionattn":
                yield [sys.executable, "-m", "visionattn.cli", *words[1:]], line


@pytest.mark.thorough
def test_first_steps(tmp_path):
    """The commands of the README one after the other, in an empty folder."""
    for command, line in console_lines(FIRST_STEPS):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    assert (tmp_path / "finetuned.png").is_file() and (tmp_path / "model.onnx").is_file()
    assert result.stdout.split() == ["seven"]
