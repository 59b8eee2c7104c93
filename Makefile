# Thin lines: what there is to do is in `benchtop`, this file only sees to the environment.
PYTHON ?= python3
EXTRAS ?=
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: book bundle test lab run check bench radar clean

book: $(VENV)/.publish  ## run what is stale, build the pages, say which file to open
	@$(BIN)/benchtop run --stale --profile laptop
	@$(BIN)/benchtop build

bundle: $(VENV)/.publish  ## one zip of pages, notebooks and checksums that opens from any disk
	@$(BIN)/benchtop bundle

test: $(VENV)/.test  ## ruff, package, chapters (papermill and nbval in smoke), site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	BENCHTOP_PROFILE=smoke OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval-lax tests book

lab: $(VENV)/.lab  ## JupyterLab in the environment
	$(BIN)/jupyter lab --notebook-dir=book

run: $(VENV)/.publish  ## make run CHAPTER=pissa PROFILE=gpu
	@test -n "$(CHAPTER)" || { echo "name a chapter: make run CHAPTER=pissa PROFILE=gpu"; exit 2; }
	$(BIN)/benchtop run --all $(CHAPTER) --profile $(or $(PROFILE),laptop)

check: $(VENV)/.test $(VENV)/.peers  ## structure, fairness, exercises, planted mistakes and peers of every chapter
	$(BIN)/benchtop check

bench: $(VENV)/.jax  ## speed of the seeds engine: plain loop, fit, JAX; about ten minutes on a quiet machine
	$(BIN)/python benchmarks/fit.py

radar: $(VENV)/.publish  ## does the book survive the newest releases?
	$(BIN)/benchtop radar

clean:
	rm -rf $(VENV) _build ci-artefacts .pytest_cache .ruff_cache .hypothesis

# One environment; each stamp adds an extra to it.
$(VENV)/.publish $(VENV)/.test $(VENV)/.lab $(VENV)/.peers $(VENV)/.jax: $(VENV)/.%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)")' && $(PYTHON) -m venv $(VENV); }
	@echo "installing benchtop[$*$(addprefix $(comma),$(EXTRAS))] into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*$(addprefix $(comma),$(EXTRAS))]'
	@case " $* $(EXTRAS) " in *peers*) $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(ALONE);; esac
	@touch $@

comma := ,
# Peers that name torchvision among their needs, where what is compared does not import it; and torchvision must match
# the build of torch, or breaks what looks for it.
ALONE := mup timm
