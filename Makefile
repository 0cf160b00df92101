PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

setup: $(READY) ## build .venv with every pinned dependency

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "$$(grep ^torch== constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## fit and edit one shipped picture on the embedded base: outputs/demo/sheet.png
	$(BIN)/imagic-lora demo

test: $(READY) ## the tests, some minutes on two cores
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: $(READY) ## what takes longer
	$(BIN)/pytest -m slow

test-gpu: $(READY) ## what needs a CUDA device
	$(BIN)/pytest -m gpu

torture: $(READY) ## kills, power cuts, full disks, flipped bits, hostile files, many times over; half an hour at the most
	PYTHONPATH=tests $(BIN)/python -m torture

lint: $(READY) ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

check: lint test ## all that must pass

critters-report: $(READY) ## the figures and the sheet of the embedded base
	$(BIN)/python scripts/critters_report.py

bench-critters: $(READY) ## CritterBench, all methods, hours on two cores; goes on where it was: docs/critterbench.md
	$(BIN)/imagic-lora bench critters --cases 60 --seed 7 --workers 2
	$(BIN)/python scripts/critterbench_figures.py outputs/bench/critters-7

bench-memory: $(READY) ## predicted, and on a card measured, peaks: docs/memory.md
	$(BIN)/python scripts/bench_memory.py

bench-speed: $(READY) ## our loop against a plain one, the price of the levers: docs/speed.md
	$(BIN)/python scripts/bench_speed.py

bench-swaps: $(READY) ## time of a swap between two adapters, on critters and at the size of SD 1.5
	$(BIN)/python scripts/bench_swaps.py

clean: ## remove outputs, caches and .venv
	rm -rf outputs $(VENV) .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup demo test test-slow test-gpu torture lint check critters-report bench-critters bench-memory bench-speed bench-swaps clean
