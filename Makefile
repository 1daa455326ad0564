# make run    environment + the main job on an embedded model        make test   environment + tests
# make check  ruff, mypy     make bench  costs as ratios     make models  train the embedded models again (10 minutes)
# make cases  make the models of known circuits again (5 minutes)                 make docs   the site of docs/, in site/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tiny models on a contended machine run up to 20 times slower with two threads than with one.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: run test test-cluster check docs bench models cases clean

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

run: $(VENV)/.ready
	$(BIN)/relp compare ioi sva_across_pp --model tiny-gpt2 --methods atp,relp,relp+ah --output runs/demo/compare
	$(BIN)/relp score sva_across_pp --model tiny-gpt2 --nodes mlp_neuron --pairs 300 --output runs/demo/sva
	$(BIN)/relp circuit runs/demo/sva --threshold 0.05
	$(BIN)/relp evaluate runs/demo/sva --sweep log:1e-3:1:7
	$(BIN)/relp report runs/demo/sva

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-cluster:
	$(PYTHON) -m venv .venv-cluster
	.venv-cluster/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ray==2.60.0
	.venv-cluster/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	.venv-cluster/bin/python -m pytest tests/cluster

check: $(VENV)/.ready
	$(BIN)/ruff check relp_cli tests docs/hooks.py
	$(BIN)/ruff format --check relp_cli tests docs/hooks.py
	$(BIN)/mypy

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.ready
	$(BIN)/relp bench
	$(BIN)/relp bench --layers 24 --rounds 1 --only act_patch

models: $(VENV)/.ready
	$(BIN)/python -m relp_cli.models.training

cases: $(VENV)/.ready
	$(BIN)/python -m relp_cli.known make

clean:
	rm -rf $(VENV) .venv-cluster runs build dist site
