# make demo   the main job on embedded images: EMIM, Barlow Twins and VICReg on equal terms   (EPOCHS=1 for a quick look)
# make test   lint, docs and tests      make test-main SOLO=<clone of solo-learn>   the same tests on solo-learn main
# make speed  EMIM's losses beside the suite's   make test-gpu [CIFAR10=<image folders>] [SOLO=<clone>]   what only a GPU shows, in half an hour
# make docs   the documentation as a site, in build/site          make dist   sdist and wheel, checked
PYTHON ?= python3
VENV ?= .venv
EPOCHS ?=
CIFAR10 ?=
GPU := runs/gpu
BIN := $(VENV)/bin
PY := $(BIN)/python

.PHONY: setup demo lint docs test test-main test-gpu gpu-steps gpu-benchmark dist speed

setup: $(VENV)/.installed

# solo-learn's registry release pins torch 1.9; without its pins it runs on today's through emim_solo.suite.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps solo-learn==1.0.2
	touch $@

demo: setup
	$(BIN)/emim-solo benchmark --config-name demo $(if $(EPOCHS),max_epochs=$(EPOCHS))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: setup
	@$(MAKE) --no-print-directory -j2 lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-main: setup
	test -d '$(SOLO)/solo/data' || { echo "make test-main SOLO=<folder of a clone of solo-learn main>"; exit 2; }
	PYTHONPATH='$(abspath $(SOLO))' OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

speed: setup
	$(BIN)/python benchmarks/objective_speed.py

# Each step leaves a file and is not done again: stopped, the same command goes on. The last one goes on by itself. Without a package
# registry, where all is installed: make gpu-steps PY=python3
test-gpu: setup
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    $(MAKE) --no-print-directory --keep-going gpu-steps; \
	else echo 'make test-gpu: torch sees no GPU here, so nothing was run'; fi

gpu-steps: $(GPU)/tests.xml $(GPU)/objective_speed.json $(if $(SOLO),$(GPU)/step_speed.json) gpu-benchmark

gpu-benchmark:
	$(PY) -m emim_solo benchmark --config-name cifar10 max_epochs=10 'seeds=[0]' dir=$(GPU)/cifar10 only=emim,barlow_twins,vicreg \
	    +run.precision=bf16-mixed $(if $(CIFAR10),+run.data.dataset=custom +run.data.train_path=$(CIFAR10)/train +run.data.val_path=$(CIFAR10)/test)

$(GPU)/tests.xml:
	mkdir -p $(GPU)
	PYTHONPATH="$(abspath $(SOLO)):$$PYTHONPATH" $(PY) -m pytest -m gpu --junitxml=$@.part && mv $@.part $@

$(GPU)/objective_speed.json:
	$(PY) benchmarks/objective_speed.py --output $@

$(GPU)/step_speed.json:
	$(PY) benchmarks/step_speed.py --solo '$(SOLO)' --output $@
