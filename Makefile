# make demo    see it work (installs everything into .venv on first use)
# make test    run the tests
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
# On PCs a wheel that pip caches may be reused on another CPU: AVX2 at most. Boards build for the CPU they are.
ifeq ($(shell uname -m),x86_64)
export CMAKE_ARGS ?= -DGGML_NATIVE=OFF
endif

# pip says much that nobody needs, unless it fails
quietly := log=$(VENV)/install.log;
or_show := >$$log 2>&1 || { tail -n 40 $$log >&2; exit 1; }

.PHONY: demo test bench check lint types generated install train evaluate clean

demo: $(VENV)/.installed
	$(VENV)/bin/agentd demo

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n auto --dist loadfile
	scripts/test-unprivileged.sh $(VENV)

bench: $(VENV)/.installed-dev
	$(VENV)/bin/python -m tests.bench

check: lint types generated test

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed-dev
	$(VENV)/bin/mypy

generated: $(VENV)/.installed-dev
	scripts/check-generated.sh

$(VENV)/.installed: pyproject.toml
	@scripts/prerequisites.sh $(PYTHON)
	@$(PYTHON) -m venv $(VENV)
	@$(quietly) $(VENV)/bin/pip install --disable-pip-version-check --upgrade pip $(or_show)
	@echo "Installing agentd into $(VENV). The first time llama.cpp is compiled: 5 minutes on 2 cores, more on a Pi."
	@echo "Follow it with: tail -f $(VENV)/install.log"
	@$(quietly) $(VENV)/bin/pip install --disable-pip-version-check -e . $(or_show)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need."
	@$(quietly) $(VENV)/bin/pip install --disable-pip-version-check -e '.[dev]' $(or_show)
	@touch $@

train:
	@scripts/prerequisites.sh $(PYTHON)
	$(PYTHON) -m venv .venv-train
	.venv-train/bin/pip install --disable-pip-version-check --quiet -e '.[train]'
	.venv-train/bin/python -m training.train --out agentd/models/pocket.gguf

evaluate: $(VENV)/.installed
	$(VENV)/bin/python -m training.evaluate agentd/models/pocket.gguf

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
