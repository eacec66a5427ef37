# make demo    install into a new environment and run the main job on built-in data
# make test    install everything and run the tests
# make check   what CI runs: format, lint, types, import directions, tests
# make bench   the benchmarks that need nothing but the package (see benchmarks/README.md)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check lint bench clean

demo: $(VENV)/.installed
	$(BIN)/lehr fit digits
	@echo "lehr is $(BIN)/lehr; to type lehr alone: . $(BIN)/activate"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

check: lint test

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/schedules.py
	$(BIN)/python benchmarks/loop.py

clean:
	rm -rf $(VENV)

# An install is made anew when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	@echo "installing PyTorch and the rest into $(VENV): some minutes, a few GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml
	@echo "installing PyTorch, the rest and what the tests need into $(VENV): some minutes, a few GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@ $(VENV)/.installed
