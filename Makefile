# make demo   the main job on embedded images: EMIM, Barlow Twins and VICReg on equal terms   (EPOCHS=1 for a quick look)
# make test   lint, docs and tests      make test-main SOLO=<clone of solo-learn>   the same tests on solo-learn main
# make docs   the documentation as a site, in build/site          make dist   sdist and wheel, checked
PYTHON ?= python3
VENV ?= .venv
EPOCHS ?=
BIN := $(VENV)/bin

.PHONY: setup demo lint docs test test-main dist speed

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

test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-main: setup
	test -d '$(SOLO)/solo/data' || { echo "make test-main SOLO=<folder of a clone of solo-learn main>"; exit 2; }
	PYTHONPATH='$(abspath $(SOLO))' OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

speed: setup
	$(BIN)/python benchmarks/objective_speed.py
