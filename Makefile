# Depthcut: `make run` opens the dashboard, `make test` passes the tests; both do all the set-up.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8501
WORKSPACE := $(or $(DEPTHCUT_WORKSPACE),workspace)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WHEELS := https://download.pytorch.org/whl
# TORCH=cpu, cu126 or cu130 installs that build of torch; without it, PyPI's.

.PHONY: setup run smollm2 test check proof bench bench-gpu screenshots clean
setup: $(VENV)/.setup-done

$(VENV)/.setup-done: requirements.txt Makefile
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: install it, or give PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP) "$$(grep '^torch==' requirements.txt)" --index-url $(WHEELS)/$(TORCH))
	$(PIP) -r requirements.txt
	$(BIN)/python tests/browser/find_browser.py --install
	touch $@

run: setup
	$(BIN)/python -m streamlit run app.py --server.port $(PORT)

smollm2: setup
	test -f $(WORKSPACE)/smollm2/config.json || $(BIN)/python -m core import smollm2 --out $(WORKSPACE)/smollm2

check: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# Tests start many processes: compiled modules are kept, even if the environment says otherwise.
test: check
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

proof: setup
	$(BIN)/python -m bench.proof
	-$(BIN)/python -m bench.smollm2 workspace/proof-smollm2
	-$(BIN)/python -m bench.quantize workspace/proof-smollm2
	-$(BIN)/python -m bench.choosing workspace/proof-choosing
	-$(BIN)/python -m bench.recovering workspace/proof-recovering
	$(BIN)/python -m bench.export --save

bench: setup
	$(BIN)/python -m bench.importance --save

bench-gpu: setup
	$(BIN)/python -m bench.gpu

screenshots: setup
	$(BIN)/python -m bench.screenshots

clean:
	rm -rf $(VENV)
