PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

setup: $(READY) ## create .venv with the pinned dependencies

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "$$(grep ^torch== constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## fit and edit one image with the embedded base: outputs/demo/sheet.png
	$(BIN)/imagic-lora demo

test: $(READY) ## run the tests: eight to ten minutes on two cores
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: $(READY) ## run the slow tests
	$(BIN)/pytest -m slow

test-gpu: $(READY) ## run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

web: $(READY) ## open the studio in the browser on the embedded base, and the adapters of ./adapters
	$(BIN)/imagic-lora web --base critters --open-browser

AXE := $(VENV)/axe/node_modules/axe-core/axe.min.js

$(AXE): $(READY)
	npm install --silent --no-save --prefix $(VENV)/axe axe-core@4.14.1
	@touch $@

test-web: $(READY) ## run the tests of the studio in headless Chromium, about three minutes; they need chromium and npm
	if command -v npm >/dev/null; then $(MAKE) $(AXE); fi
	$(BIN)/pytest tests/web -m web --numprocesses 2 --dist loadfile

torture: $(READY) ## fault injection: kills, power cuts, full disks, flipped bits, hostile files; up to half an hour
	PYTHONPATH=tests $(BIN)/python -m torture

lint: $(READY) ## run ruff, pyright and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

check: lint test ## lint and test

docs-settings: $(READY) ## write docs/reference/settings.md from the config models
	$(BIN)/python scripts/settings_reference.py

docs-api: $(READY) ## write docs/reference/api.md from the docstrings of the public library
	$(BIN)/python scripts/api_reference.py

docs: docs-settings docs-api ## write the generated pages of docs/reference

critters: $(READY) ## make the embedded base from nothing: outputs/critters/data; hours on two cores, resumes
	$(BIN)/python scripts/train_critters.py

critters-dit: $(READY) ## make the transformer of critters-dit from nothing: outputs/critters-dit/data; hours on two cores, resumes
	$(BIN)/python scripts/train_critters.py --work outputs/critters-dit --transformer-of imagic_lora/critters/data

critters-report: $(READY) ## measure the embedded base and draw its sample sheet
	$(BIN)/python scripts/critters_report.py

bench-critters: $(READY) ## run CritterBench with all methods, hours on two cores; resumes: docs/internals/critterbench.md
	$(BIN)/imagic-lora bench critters --cases 60 --seed 11 --workers 2
	$(BIN)/python scripts/critterbench_figures.py outputs/bench/critters-11

bench-memory: $(READY) ## predict peak memory, and measure it on a card: docs/internals/memory-model.md
	$(BIN)/python scripts/bench_memory.py

plan-table: $(READY) ## rehearse the presets of flows that imagic_lora/memory/rehearsed.json lacks, and write the table of docs/guide/memory.md
	$(BIN)/python scripts/plan_table.py

bench-speed: $(READY) ## compare our loop with a plain one, time the memory levers: docs/internals/speed.md
	$(BIN)/python scripts/bench_speed.py

bench-swaps: $(READY) ## time the switch between two adapters, on critters and at the size of SD 1.5
	$(BIN)/python scripts/bench_swaps.py

dist: $(READY) ## sdist and wheel: dist/
	$(BIN)/python -m build

clean: ## remove outputs, caches and .venv
	rm -rf outputs dist $(VENV) .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup demo test web test-web test-slow test-gpu torture lint check docs docs-settings docs-api critters critters-dit critters-report bench-critters bench-memory plan-table bench-speed bench-swaps dist clean
