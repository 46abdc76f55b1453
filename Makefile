# Everything lives in this folder: .venv for the installation, outputs for results.
PYTHON ?= python3
BIN := .venv/bin
# what installs; make INSTALL='uv pip install --python .venv/bin/python' takes a third of pip's time
INSTALL ?= $(BIN)/python -m pip install

.PHONY: demo test test-all test-browser lint docs clean
.DELETE_ON_ERROR:

# installed-train and installed-dev: the package with that extra, in the tested versions
.venv/installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "visionattn needs Python 3.11 or newer; say which with make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -q -c constraints.txt -e '.[$*]'
	@touch $@

# the pictures of trees that travel in a package; its code is never imported, so what it requires stays out
.venv/trees: .venv/installed-dev
	$(INSTALL) -q -c constraints.txt --no-deps deepforest
	@touch $@

demo: .venv/installed-train
	$(BIN)/visionattn demo --output outputs/demo

test: .venv/installed-dev .venv/trees
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=8

# with what other tests show for one model, size or GPU shown for all
test-all: .venv/installed-dev .venv/trees
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=8 -m "not browser"

# the web page in a headless Chromium, which pip does not install: apt-get install chromium, or set VISIONATTN_CHROMIUM
test-browser: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/integrations/test_web_browser.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the pages as a site in outputs/site; every warning is an error
docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv outputs build dist
