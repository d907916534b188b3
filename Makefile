# Every target works on a fresh clone and installs what it needs into .venv.
DATA       ?= demo
BACKBONE   ?= tiny
PRETRAINED ?=
RUN        ?=
PYTHON     ?= python3
VENV       ?= .venv
BIN        := $(VENV)/bin

# agiqa-3k:../sets/agiqa-3k -> agiqa-3k; local-dir:../models/x -> x; weights/a.pt -> a.pt
last_part  = $(notdir $(lastword $(subst :, ,$(1))))
NAME       := $(call last_part,$(DATA))_$(call last_part,$(BACKBONE))$(if $(PRETRAINED),_$(call last_part,$(PRETRAINED)))
CACHE      ?= cache/$(NAME).h5
THE_RUN    := $(or $(RUN),runs/$(basename $(notdir $(CACHE)))_residual_frozen)

.DEFAULT_GOAL := help
.PHONY: help setup extract train report predict test slow lint format bench bench-gpu docs backbone clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@echo "  variables: DATA=$(DATA) BACKBONE=$(BACKBONE) PRETRAINED=$(PRETRAINED) RUN=$(RUN) CACHE=$(CACHE)"

setup: $(VENV)/installed ## install deltaclip into .venv

$(VENV)/bin/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q uv

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/uv
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

extract: $(VENV)/installed ## DATA with BACKBONE -> CACHE; only what is new is computed
	$(BIN)/deltaclip extract $(DATA) --backbone $(BACKBONE) $(if $(PRETRAINED),--pretrained $(PRETRAINED)) --out $(CACHE)

train: extract ## extract, then train heads: a run directory, its metrics table and its page
	$(BIN)/deltaclip train $(CACHE) $(if $(RUN),--out $(RUN))
	$(BIN)/deltaclip report $(RUN)

report: $(VENV)/installed ## RUN (default the newest) as one page to open in a browser
	$(BIN)/deltaclip report $(RUN)

predict: $(VENV)/installed ## score DATA with RUN (trained first if there is none) -> scores.csv
	@test -d $(THE_RUN) || $(MAKE) train
	$(BIN)/deltaclip predict $(THE_RUN) $(DATA) --out scores.csv

test: $(VENV)/installed-dev ## all fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

slow: $(VENV)/installed-dev ## the tests that take minutes, those on Ray included
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[distributed]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2

lint: $(VENV)/installed-dev ## format, lint, types, import contracts, spelling
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	@mkdir -p .lint && ln -sfn .. .lint/deltaclip
	MYPYPATH=.lint $(BIN)/mypy -p deltaclip
	$(BIN)/lint-imports
	$(BIN)/codespell .

format: $(VENV)/installed-dev ## rewrite the code in house format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(VENV)/installed-dev ## measure speed, both sides of every ratio in one run
	$(BIN)/python -m benchmarks.run

bench-gpu: $(VENV)/installed-dev ## a GPU's numbers against the CPU's, and its speed, under ten minutes; DRY=1 tries it on the CPU
	$(BIN)/python -m benchmarks.gpu $(if $(ONLY),--only $(ONLY)) $(if $(DRY),--dry)

docs: $(VENV)/installed ## write docs/commands.md from the settings
	$(BIN)/python -m tools.commands_page

backbone: $(VENV)/installed ## train the bundled backbone anew (under an hour on 4 cores)
	$(BIN)/python -m tools.tiny.train

clean: ## remove what can be made again: .venv, caches of tools; runs/ and cache/ stay
	rm -rf $(VENV) .lint .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
