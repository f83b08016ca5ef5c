# Two commands do everything on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
# Test files at once: most of them wait for processes they start.
TEST_JOBS ?= 2
STAMP := $(VENV)/.installed-$(shell sha256sum pyproject.toml | cut -c1-16)

.PHONY: help setup demo demo-slurm experiments test slow lint bench clean
help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## make .venv with every pinned package (a second call does nothing)

$(STAMP): | pyproject.toml    # its name holds the hash; a clone is newer than any stamp
	@bash .ci/venv $(VENV) $(PYTHON)
	@rm -f $(VENV)/.installed-* && touch $@

demo: $(STAMP)   ## real images -> tokens -> four trained models -> table, plots and one page in demo/ (at most 12 min)
	@source $(VENV)/bin/activate && bash jobs/demo.sh

demo-slurm: $(STAMP)  ## a real SLURM of four nodes on this machine runs the job scripts (root, slurm-wlm, munge; 1 min)
	@source $(VENV)/bin/activate && bash jobs/demo_slurm.sh

experiments: $(STAMP)   ## APF against its rivals on open data, three seeds (hours on two cores; python -m launch study --help)
	@source $(VENV)/bin/activate && python -m launch study

test: $(STAMP)   ## the default tests, as CI runs them
	@source $(VENV)/bin/activate && python -m pytest -m "not slow" -n $(TEST_JOBS) --durations=20 --durations-min=5 $(PYTEST_ARGS)

slow: $(STAMP)   ## the long tests
	@source $(VENV)/bin/activate && python -m pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP)   ## ruff (rules and layout) and mypy alone
	@source $(VENV)/bin/activate && ruff check . && ruff format --check . && mypy

bench: $(STAMP)  ## the ratios of tests/benchmarks
	@source $(VENV)/bin/activate && python tests/benchmarks/bench_build.py

clean:           ## remove what the demo made; .venv stays
	rm -rf demo
