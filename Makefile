# `make run` and `make test` set up everything they need in .venv, from pyproject.toml alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test slow lint format clean

run: $(READY)
	@printf 'Once upon a time'
	@$(BIN)/tcinfer generate -p 'Once upon a time' -n 200

# Tests start hundreds of processes; without compiled modules each of them takes longer.
unexport PYTHONDONTWRITEBYTECODE

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile --durations 10 -m "not slow and not peer"

# What takes minutes, and what compares with llama.cpp and PyTorch (skipped where they are not installed).
slow: $(READY)
	$(BIN)/python -m pytest -m "slow or peer"

# mypy cannot follow folders that are mapped into the package: it reads a tree of links.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .mypy_tree && mkdir -p .mypy_tree && cp -rs $(CURDIR)/tcinfer .mypy_tree/tcinfer
	ln -s $(CURDIR)/kernels .mypy_tree/tcinfer/kernels
	ln -s $(CURDIR)/converters .mypy_tree/tcinfer/converters
	ln -s $(CURDIR)/models/__init__.py .mypy_tree/tcinfer/models.py
	cd .mypy_tree && ../$(BIN)/mypy --config-file ../pyproject.toml -p tcinfer

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml
	@echo "setting up $(VENV)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e ".[test,lint]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_tree .mypy_cache .pytest_cache .ruff_cache
